//! What kernels and sums on GPUs need beside the driver: NVRTC, the CUDA headers, and NCCL.

use std::path::{Path, PathBuf};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use repa_trainer::config::Backend;

use super::Line;
use super::subject::Subject;

/// Names that CubeCL's CUDA runtime tries, newest first.
const NVRTC: [&str; 5] =
    ["libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so.11.2", "libnvrtc.so.11"];

/// Headers that its kernels include.
const HEADERS: [&str; 4] = ["cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h", "mma.h"];

const TOOLKIT: &str = "install the CUDA toolkit of the driver's version or older (or NVRTC with its headers), and \
                       set CUDA_PATH to it";

/// Lines for a build with CUDA, on a host with GPUs. `driver` is the newest CUDA that the driver runs: 12040 is 12.4.
pub fn lines(subject: &Subject, driver: Option<i32>) -> Vec<Line> {
    let needed = subject.on_gpus();
    vec![nvrtc(needed, driver), headers(needed, toolkit().as_deref()), nccl(subject)]
}

fn nvrtc(needed: bool, driver: Option<i32>) -> Line {
    let loaded = NVRTC.iter().find_map(|name| {
        // SAFETY: the library's initialisers are NVIDIA's, and run in any program that compiles kernels.
        let library = unsafe { Library::open(Some(*name), RTLD_NOW | RTLD_LOCAL) }.ok()?;
        Some((*name, version(&library)))
    });
    judge_nvrtc(needed, driver, loaded)
}

/// The library's own version.
fn version(library: &Library) -> Option<(i32, i32)> {
    type Function = unsafe extern "C" fn(*mut i32, *mut i32) -> i32;
    // SAFETY: nvrtc.h declares the symbol with this type, in every version.
    let function = unsafe { library.get::<Function>("nvrtcVersion") }.ok()?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the addresses are live for the call, which needs no device.
    let code = unsafe { function(&mut major, &mut minor) };
    (code == 0).then_some((major, minor))
}

fn judge_nvrtc(needed: bool, driver: Option<i32>, loaded: Option<(&str, Option<(i32, i32)>)>) -> Line {
    const TOPIC: &str = "NVRTC";
    match loaded {
        None => {
            let found = "libnvrtc.so is not found: no kernel can be compiled";
            let fix = format!("{TOOLKIT}, with its lib64 in LD_LIBRARY_PATH");
            Line::problem(TOPIC, needed, found, fix)
        }
        Some((name, None)) => {
            Line::problem(TOPIC, needed, format!("{name} does not say its version"), TOOLKIT)
        }
        Some((name, Some((major, minor)))) => {
            let found = format!("{major}.{minor} ({name})");
            match driver {
                Some(driver) if major > driver / 1000 => {
                    let newest = format!("{}.{}", driver / 1000, driver % 1000 / 10);
                    let found = format!("{found} is newer than the driver, which runs CUDA up to {newest}");
                    Line::problem(
                        TOPIC,
                        needed,
                        found,
                        "a newer driver, or an older CUDA toolkit first on LD_LIBRARY_PATH",
                    )
                }
                _ => Line::ok(TOPIC, found),
            }
        }
    }
}

/// The toolkit as CubeCL looks for it.
fn toolkit() -> Option<PathBuf> {
    if let Ok(path) = std::env::var("CUDA_PATH") {
        return Some(path.into());
    }
    let usual = ["/usr/local/cuda", "/opt/cuda"].map(PathBuf::from).into_iter().find(|path| path.exists());
    usual.or_else(|| Path::new("/usr/bin/nvcc").exists().then(|| "/usr".into()))
}

fn headers(needed: bool, toolkit: Option<&Path>) -> Line {
    const TOPIC: &str = "CUDA headers";
    let Some(toolkit) = toolkit else {
        let found = "no CUDA toolkit in CUDA_PATH, /usr/local/cuda or /opt/cuda, nor beside /usr/bin/nvcc";
        return Line::problem(TOPIC, needed, found, TOOLKIT);
    };
    let include = toolkit.join("include");
    let missing: Vec<&str> = HEADERS.into_iter().filter(|header| !include.join(header).exists()).collect();
    match missing.is_empty() {
        true => Line::ok(TOPIC, include.display().to_string()),
        false => {
            let found = format!("{} lacks {}", include.display(), missing.join(", "));
            Line::problem(TOPIC, needed, found, TOOLKIT)
        }
    }
}

#[cfg(feature = "cuda-untuned")]
fn nccl(subject: &Subject) -> Line {
    let available = repa_comm::nccl::available();
    judge_nccl(
        subject,
        available.map(|found| found.version).map_err(|error| error.to_string()),
        loaded_from("libnccl"),
    )
}

/// Where a library that this process has loaded lies.
#[cfg(feature = "cuda-untuned")]
fn loaded_from(name: &str) -> Option<String> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let path =
        maps.lines().filter_map(|line| line.split_whitespace().nth(5)).find(|path| path.contains(name))?;
    Some(path.to_owned())
}

#[cfg(not(feature = "cuda-untuned"))]
fn nccl(subject: &Subject) -> Line {
    judge_nccl(subject, Err("this build has no CUDA".into()), None)
}

fn judge_nccl(subject: &Subject, available: Result<String, String>, path: Option<String>) -> Line {
    const TOPIC: &str = "NCCL";
    let backend = subject.config.comm.backend;
    match available {
        Ok(version) => {
            Line::ok(TOPIC, path.map_or_else(|| version.clone(), |path| format!("{version} at {path}")))
        }
        Err(problem) if backend == Backend::Mpi || !subject.on_gpus() => Line::absent(TOPIC, problem),
        Err(problem) if subject.ranks == 1 => Line::absent(TOPIC, format!("{problem}; one rank needs none")),
        Err(problem) => {
            let needed = backend == Backend::Nccl;
            let fix = "install NCCL 2.18 or later (Debian: libnccl2), or set REPA_NCCL_LIBRARY to its libnccl.so.2; \
                       gradients go through MPI and the hosts' memory without it";
            Line::problem(TOPIC, needed, problem, fix)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;
    use repa_trainer::config::Config;

    #[test]
    fn nvrtc_may_not_be_newer_than_the_driver() {
        let loaded = |major| Some(("libnvrtc.so.12", Some((major, 4))));
        assert_eq!(judge_nvrtc(true, Some(12040), loaded(12)).state, State::Ok);
        let newer = judge_nvrtc(true, Some(12040), loaded(13));
        assert!(newer.state == State::Error && newer.found.contains("up to 12.4"), "{newer:?}");
        assert_eq!(judge_nvrtc(false, Some(12040), loaded(13)).state, State::Warning);
        assert_eq!(judge_nvrtc(true, None, None).state, State::Error);
        assert_eq!(judge_nvrtc(true, None, Some(("libnvrtc.so", None))).state, State::Error);
    }

    #[test]
    fn headers_are_looked_for_one_by_one() {
        let folder = tempfile::tempdir().expect("a folder");
        let include = folder.path().join("include");
        std::fs::create_dir(&include).expect("made");
        for header in &HEADERS[1..] {
            std::fs::write(include.join(header), "").expect("written");
        }
        let line = headers(true, Some(folder.path()));
        assert!(line.state == State::Error && line.found.contains("lacks cuda_runtime.h"), "{line:?}");
        std::fs::write(include.join(HEADERS[0]), "").expect("written");
        assert_eq!(headers(true, Some(folder.path())).state, State::Ok);
        assert_eq!(headers(false, None).state, State::Warning);
    }

    #[test]
    fn nccl_is_needed_where_it_is_asked_for() {
        let state = |device: &str, backend, ranks| {
            let mut config = Config::default();
            config.device.0 = device.into();
            config.comm.backend = backend;
            judge_nccl(&Subject::alone(config, ranks, true), Err("missing".into()), None).state
        };
        assert_eq!(state("cpu", Backend::Auto, 2), State::Absent);
        assert_eq!(state("cuda", Backend::Auto, 1), State::Absent);
        assert_eq!(state("cuda", Backend::Auto, 2), State::Warning);
        assert_eq!(state("cuda", Backend::Nccl, 2), State::Error);
        let subject = Subject::alone(Config::default(), 1, true);
        let line = judge_nccl(&subject, Ok("2.30.3".into()), Some("/usr/lib/libnccl.so.2".into()));
        assert_eq!(line.found, "2.30.3 at /usr/lib/libnccl.so.2");
    }
}
