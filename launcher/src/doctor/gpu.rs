//! GPUs and their driver. The build of this program does not matter for looking: a build without CUDA is told of the
//! GPUs that it leaves unused.

use std::fs;

use nvml_wrapper::Nvml;
use nvml_wrapper::error::NvmlError;

use super::subject::{Subject, plural, size};
use super::{Line, cuda};

const TOPIC: &str = "GPU";

/// NVIDIA's number on the PCI bus.
const NVIDIA: &str = "0x10de";

/// A GPU.
#[derive(Debug, Clone, Default)]
struct Gpu {
    name: String,
    memory: u64,
    used: u64,
    /// Processes that compute on it.
    processes: usize,
}

/// A host's GPUs, with the driver that runs them.
#[derive(Debug, Clone, Default)]
struct Found {
    driver: String,
    /// The newest CUDA that the driver runs: 12040 is 12.4.
    cuda: Option<i32>,
    gpus: Vec<Gpu>,
}

/// What there is of GPUs.
#[derive(Debug, Clone)]
enum Host {
    /// A driver that answers.
    Driven(Found),
    /// A driver that does not, with its words.
    Broken(String),
    /// GPUs on the bus, this many, and no driver.
    Undriven(usize),
    /// None.
    None,
}

/// Every line about GPUs and about what CUDA needs.
pub fn lines(subject: &Subject) -> Vec<Line> {
    let host = look();
    let visible = std::env::var("CUDA_VISIBLE_DEVICES").ok();
    let built = cfg!(feature = "cuda-untuned");
    let mut lines = judge(&host, subject, built, visible.as_deref());
    match &host {
        // What kernels need is of interest only where they can run.
        Host::Driven(found) if built && !found.gpus.is_empty() => {
            lines.extend(cuda::lines(subject, found.cuda));
        }
        _ => {}
    }
    lines
}

/// How many GPUs this host shows; 0 where there is no driver that could tell.
pub fn count() -> usize {
    let count = Nvml::init().and_then(|nvml| nvml.device_count());
    count.map_or(0, |count| count as usize)
}

fn look() -> Host {
    match Nvml::init() {
        Ok(nvml) => ask(&nvml).map_or_else(|error| Host::Broken(error.to_string()), Host::Driven),
        // No such library.
        Err(NvmlError::LibloadingError(_)) => match (on_the_bus(), fs::exists("/proc/driver/nvidia/version"))
        {
            (_, Ok(true)) => {
                Host::Broken("its module is loaded, but its library libnvidia-ml.so.1 is not found".into())
            }
            (0, _) => Host::None,
            (gpus, _) => Host::Undriven(gpus),
        },
        Err(NvmlError::DriverNotLoaded) => match on_the_bus() {
            0 => Host::None,
            gpus => Host::Undriven(gpus),
        },
        Err(error) => Host::Broken(error.to_string()),
    }
}

fn ask(nvml: &Nvml) -> Result<Found, NvmlError> {
    let gpu = |number| {
        let device = nvml.device_by_index(number)?;
        // Parts of a GPU tell less than a whole one.
        let memory = device.memory_info().ok();
        Ok(Gpu {
            name: device.name()?,
            memory: memory.as_ref().map_or(0, |memory| memory.total),
            used: memory.as_ref().map_or(0, |memory| memory.used),
            processes: device.running_compute_processes().map_or(0, |processes| processes.len()),
        })
    };
    Ok(Found {
        driver: nvml.sys_driver_version()?,
        cuda: nvml.sys_cuda_driver_version().ok(),
        gpus: (0..nvml.device_count()?).map(gpu).collect::<Result<_, NvmlError>>()?,
    })
}

/// NVIDIA's display and compute devices on the PCI bus.
fn on_the_bus() -> usize {
    let text = |path: std::path::PathBuf| fs::read_to_string(path).unwrap_or_default();
    let devices = fs::read_dir("/sys/bus/pci/devices").into_iter().flatten().flatten();
    devices
        .map(|entry| entry.path())
        .filter(|path| text(path.join("vendor")).trim() == NVIDIA)
        // The class of displays.
        .filter(|path| text(path.join("class")).starts_with("0x03"))
        .count()
}

const BUILD: &str = "cargo build --release -p repa-dist --features cuda";

fn judge(host: &Host, subject: &Subject, built: bool, visible: Option<&str>) -> Vec<Line> {
    let device = subject.config.device.0.as_str();
    let needed = subject.on_gpus();
    let mut lines = Vec::new();
    let found = match host {
        Host::None if !needed => return vec![Line::absent(TOPIC, "none here, and device=cpu needs none")],
        Host::None => {
            let found = format!("device={device}, and there is no NVIDIA GPU with its driver here");
            let fix = "run on a host with GPUs (of a container: with --gpus all), or set device=cpu";
            return vec![Line::error(TOPIC, found, fix)];
        }
        Host::Undriven(gpus) => {
            let found = format!("{} without NVIDIA's driver", plural(*gpus, "NVIDIA GPU"));
            return vec![Line::problem(
                TOPIC,
                needed,
                found,
                "install the driver and load it; see `nvidia-smi`",
            )];
        }
        Host::Broken(problem) => {
            let fix =
                "see what `nvidia-smi` says; after an update of the driver, the host has to be started anew";
            return vec![Line::problem(TOPIC, needed, format!("NVIDIA's driver: {problem}"), fix)];
        }
        Host::Driven(found) => found,
    };
    lines.push(inventory(found, visible));
    if !built {
        let text = format!("this program is built without CUDA; device={device}");
        lines.push(Line::problem("CUDA", needed, text, format!("{BUILD}, and device=cuda")));
    }
    if needed {
        lines.extend(fits(found, subject, visible));
    }
    lines
}

/// `4 x NVIDIA H100 (79.6 GiB), driver 550.54.15, CUDA up to 12.4`.
fn inventory(found: &Found, visible: Option<&str>) -> Line {
    let mut kinds: Vec<(String, usize)> = Vec::new();
    for gpu in &found.gpus {
        let kind = match gpu.memory {
            // Old drivers have another way to ask.
            0 => gpu.name.clone(),
            memory => format!("{} ({})", gpu.name, size(memory)),
        };
        match kinds.iter_mut().find(|(known, _)| *known == kind) {
            Some((_, count)) => *count += 1,
            None => kinds.push((kind, 1)),
        }
    }
    let mut text =
        kinds.iter().map(|(kind, count)| format!("{count} x {kind}")).collect::<Vec<_>>().join(", ");
    if text.is_empty() {
        text = "none".into();
    }
    text.push_str(&format!(", driver {}", found.driver));
    if let Some(cuda) = found.cuda {
        text.push_str(&format!(", CUDA up to {}.{}", cuda / 1000, cuda % 1000 / 10));
    }
    if let Some(visible) = visible {
        text.push_str(&format!("; CUDA_VISIBLE_DEVICES={visible}"));
    }
    let busy: Vec<String> = (0..)
        .zip(&found.gpus)
        .filter(|(_, gpu)| gpu.processes > 0)
        .map(|(number, gpu)| {
            let processes = if gpu.processes == 1 { "process" } else { "processes" };
            format!("GPU {number} by {} {processes} ({})", gpu.processes, size(gpu.used))
        })
        .collect();
    match busy.is_empty() {
        true => Line::ok(TOPIC, text),
        false => Line::warning(
            TOPIC,
            format!("{text}; used already: {}", busy.join(", ")),
            "end those processes (`nvidia-smi` lists them), or leave their GPUs out by CUDA_VISIBLE_DEVICES",
        ),
    }
}

/// Whether the ranks of this host find their GPUs, and room on them.
fn fits(found: &Found, subject: &Subject, visible: Option<&str>) -> Option<Line> {
    let seen = match visible {
        // What is listed after a number that does not exist does not count; that is for the start to tell.
        Some(list) => list.split(',').filter(|word| !word.trim().is_empty()).count().min(found.gpus.len()),
        None => found.gpus.len(),
    };
    let (device, here) = (subject.config.device.0.as_str(), subject.here);
    let takes = subject.estimate.device_bytes;
    if let Some(number) = device.strip_prefix("cuda:").and_then(|number| number.parse::<usize>().ok()) {
        if number >= seen {
            let text = format!("device={device}, and this host shows {}", plural(seen, "GPU"));
            return Some(Line::error(
                "device",
                text,
                "device=cuda gives each rank of a host the GPU of its number",
            ));
        }
        if here > 1 {
            let text = format!("device={device} puts all {here} ranks of this host on one GPU");
            return Some(Line::warning("device", text, "device=cuda gives each rank a GPU of its own"));
        }
    } else if here > seen {
        let text = format!("{} on this host, and {}", plural(here, "rank"), plural(seen, "GPU"));
        return Some(Line::error("device", text, "start as many ranks on a host as it has GPUs"));
    }
    let smallest = found.gpus.iter().map(|gpu| gpu.memory).filter(|&memory| memory > 0).min()?;
    if takes > smallest {
        let text = format!("a rank takes some {} of the GPU's {}", size(takes), size(smallest));
        let fix =
            "set train.micro_batch lower, or train.precision=bf16; `repa-dist estimate` shows the parts";
        return Some(Line::warning("device", text, fix));
    }
    Some(Line::ok("device", format!("{device}; a rank takes some {} of {}", size(takes), size(smallest))))
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;
    use repa_trainer::config::Config;

    fn subject(device: &str, ranks: usize) -> Subject {
        let mut config = Config::default();
        config.device.0 = device.into();
        Subject::alone(config, ranks, true)
    }

    fn host(gpus: usize) -> Host {
        let gpu = Gpu { name: "NVIDIA H100".into(), memory: 80 << 30, used: 0, processes: 0 };
        Host::Driven(Found { driver: "550.54.15".into(), cuda: Some(12040), gpus: vec![gpu; gpus] })
    }

    fn states(lines: &[Line]) -> Vec<State> {
        lines.iter().map(|line| line.state).collect()
    }

    #[test]
    fn a_host_without_gpus_is_fine_for_the_cpu() {
        assert_eq!(states(&judge(&Host::None, &subject("cpu", 2), false, None)), [State::Absent]);
        let needed = judge(&Host::None, &subject("cuda:0", 2), false, None);
        assert_eq!(states(&needed), [State::Error]);
        assert!(needed[0].found.contains("device=cuda:0"), "{needed:?}");
        for host in [Host::Undriven(2), Host::Broken("no".into())] {
            assert_eq!(states(&judge(&host, &subject("cpu", 2), false, None)), [State::Warning]);
            assert_eq!(states(&judge(&host, &subject("cuda", 2), true, None)), [State::Error]);
        }
    }

    #[test]
    fn gpus_that_are_left_unused_are_told() {
        let lines = judge(&host(4), &subject("cpu", 2), false, None);
        assert_eq!(states(&lines), [State::Ok, State::Warning]);
        assert_eq!(lines[0].found, "4 x NVIDIA H100 (80.0 GiB), driver 550.54.15, CUDA up to 12.4");
        assert!(lines[1].fix.as_ref().is_some_and(|fix| fix.contains("--features cuda")));
        assert_eq!(states(&judge(&host(4), &subject("cuda", 4), false, None))[1], State::Error);
        assert_eq!(states(&judge(&host(4), &subject("cpu", 2), true, None)), [State::Ok]);
    }

    #[test]
    fn each_rank_needs_a_gpu() {
        let last = |device, ranks, visible| {
            judge(&host(4), &subject(device, ranks), true, visible).pop().expect("a line")
        };
        assert_eq!(last("cuda", 4, None).state, State::Ok);
        assert_eq!(last("cuda", 5, None).state, State::Error);
        assert_eq!(last("cuda", 4, Some("0,2")).state, State::Error);
        assert_eq!(last("cuda:4", 1, None).state, State::Error);
        assert_eq!(last("cuda:3", 1, None).state, State::Ok);
        assert_eq!(last("cuda:0", 2, None).state, State::Warning);
    }

    #[test]
    fn busy_and_small_gpus_are_told() {
        let mut found = Found { driver: "1".into(), cuda: None, gpus: vec![Gpu::default(); 2] };
        found.gpus[1] = Gpu { name: "T4".into(), memory: 1 << 20, used: 1 << 19, processes: 2 };
        let line = inventory(&found, None);
        assert!(line.state == State::Warning && line.found.contains("GPU 1 by 2 processes"), "{line:?}");
        let lines = judge(&Host::Driven(found), &subject("cuda", 1), true, None);
        assert!(lines.last().is_some_and(|line| line.found.contains("a rank takes")), "{lines:?}");
    }
}
