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
    number: u32,
}

#[cfg(feature = "cuda")]
impl Gpu {
    /// None where there is no such library or GPU: training does not need it.
    fn open(number: usize) -> Option<Self> {
        let nvml = nvml_wrapper::Nvml::init().inspect_err(|e| tracing::debug!("no GPU metrics: {e}")).ok()?;
        // The library counts all GPUs of the host, CUDA those that it is allowed to see.
        let visible = std::env::var("CUDA_VISIBLE_DEVICES").unwrap_or_default();
        let listed = visible.split(',').nth(number).and_then(|n| n.trim().parse().ok());
        let number = listed.or_else(|| u32::try_from(number).ok())?;
        Some(Self { nvml, number })
    }

    fn collect(&self) {
        use super::names;
        use metrics::gauge;
        let Ok(device) = self.nvml.device_by_index(self.number) else { return };
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
