//! What the process takes of its host, and of its GPU.

use std::time::Duration;

use metrics_process::Collector;

/// Seconds between looks: a scrape every 5 s or more sees fresh figures.
const PERIOD: Duration = Duration::from_secs(5);

/// Starts a thread that keeps the metrics of process and GPU fresh. `gpu` is the number of this rank's GPU. The thread
/// lives as long as the process, as the endpoint does.
///
/// # Errors
/// There is no thread to be had.
pub(super) fn start(gpu: Option<usize>) -> std::io::Result<()> {
    let process = Collector::default();
    process.describe();
    process.collect();
    std::thread::Builder::new().name("telemetry".into()).spawn(move || {
        let gpu = gpu.and_then(Gpu::open);
        loop {
            if let Some(gpu) = &gpu {
                gpu.collect();
            }
            std::thread::sleep(PERIOD);
            process.collect();
        }
    })?;
    Ok(())
}

/// A GPU as NVIDIA's management library sees it. Untested on a GPU.
#[cfg(feature = "cuda")]
struct Gpu {
    nvml: nvml_wrapper::Nvml,
    which: Which,
}

/// How a GPU is named.
#[cfg(feature = "cuda")]
#[derive(Debug, PartialEq, Eq)]
enum Which {
    /// Among all of the host.
    Number(u32),
    /// `GPU-…` or `MIG-…`, as schedulers name those that a job may use.
    Uuid(String),
}

#[cfg(feature = "cuda")]
impl Which {
    /// The one that CUDA calls `number` where these are visible: the library counts all GPUs of the host, CUDA those
    /// that it is allowed to see.
    fn of(visible: &str, number: usize) -> Option<Self> {
        match visible.split(',').nth(number).map(str::trim) {
            None | Some("") => u32::try_from(number).ok().map(Self::Number),
            Some(name) => Some(name.parse().map_or_else(|_| Self::Uuid(name.to_owned()), Self::Number)),
        }
    }
}

#[cfg(feature = "cuda")]
impl Gpu {
    /// None where there is no such library or GPU: training does not need it.
    fn open(number: usize) -> Option<Self> {
        let nvml = nvml_wrapper::Nvml::init().inspect_err(|e| tracing::debug!("no GPU metrics: {e}")).ok()?;
        let which = Which::of(&std::env::var("CUDA_VISIBLE_DEVICES").unwrap_or_default(), number)?;
        Some(Self { nvml, which })
    }

    fn collect(&self) {
        use super::names;
        use metrics::gauge;
        let device = match &self.which {
            Which::Number(number) => self.nvml.device_by_index(*number),
            Which::Uuid(uuid) => self.nvml.device_by_uuid(uuid.as_str()),
        };
        let Ok(device) = device else { return };
        if let Ok(memory) = device.memory_info() {
            gauge!(names::GPU_MEMORY_USED_BYTES).set(memory.used as f64);
            gauge!(names::GPU_MEMORY_TOTAL_BYTES).set(memory.total as f64);
        }
        if let Ok(rates) = device.utilization_rates() {
            gauge!(names::GPU_UTILIZATION_RATIO).set(f64::from(rates.gpu) / 100.0);
        }
    }
}

/// There is none in this build.
#[cfg(not(feature = "cuda"))]
struct Gpu;

#[cfg(not(feature = "cuda"))]
impl Gpu {
    fn open(_number: usize) -> Option<Self> {
        None
    }

    #[expect(clippy::unused_self, reason = "as in a build with CUDA")]
    fn collect(&self) {}
}

#[cfg(all(test, feature = "cuda"))]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_is_found_by_what_its_scheduler_calls_it() {
        let of = |visible: &str, number| Which::of(visible, number);
        assert_eq!(of("", 3), Some(Which::Number(3)));
        assert_eq!(of("4, 6", 1), Some(Which::Number(6)));
        assert_eq!(of("GPU-5a,GPU-7c", 1), Some(Which::Uuid("GPU-7c".to_owned())));
        assert_eq!(of("2", 1), Some(Which::Number(1)));
    }
}
