//! The Prometheus endpoint of a rank.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use metrics::{counter, gauge};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder};

use super::{host, names};

/// Ports that are tried beyond the wanted one.
const PORTS_TRIED: u16 = 64;

/// Who a rank is, for its metrics.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Rank.
    pub rank: usize,
    /// Rank on its node.
    pub local_rank: usize,
    /// Number of ranks.
    pub world_size: usize,
    /// Host name.
    pub host: String,
    /// Device.
    pub device: String,
    /// Name of the run.
    pub run: String,
    /// Name of the model.
    pub model: String,
    /// The scheduler's number of the job; empty without one.
    pub job_id: String,
    /// How often the job has been started again.
    pub restarts: u64,
}

/// Why a rank serves no metrics.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExporterError {
    /// No port could be had.
    #[error(
        "no free port for metrics on {bind} from {first} to {last}: {reason}; set telemetry.port, or telemetry.metrics=false"
    )]
    NoPort {
        /// Address.
        bind: IpAddr,
        /// First port tried.
        first: u16,
        /// Last port tried.
        last: u16,
        /// The last failure.
        reason: String,
    },
}

/// Starts serving this process's metrics at `port` + local rank, or the next free port.
///
/// # Errors
/// No port is free, or the address is not this host's.
pub fn start(bind: IpAddr, port: u16, identity: &Identity) -> Result<SocketAddr, ExporterError> {
    let first = port.saturating_add(identity.local_rank as u16);
    let last = first.saturating_add(PORTS_TRIED);
    let mut reason = String::new();
    for port in first..=last {
        let address = SocketAddr::new(bind, port);
        match install(address, identity) {
            Ok(()) => {
                announce(identity);
                let gpu = match identity.device.as_str() {
                    "cpu" => None,
                    device => Some(crate::config::cuda_index(device).unwrap_or(identity.local_rank)),
                };
                if let Err(error) = host::start(gpu) {
                    tracing::warn!("no metrics of the process: {error}");
                }
                return Ok(address);
            }
            Err(e) => reason = e.to_string(),
        }
    }
    Err(ExporterError::NoPort { bind, first, last, reason })
}

fn install(address: SocketAddr, identity: &Identity) -> Result<(), BuildError> {
    PrometheusBuilder::new()
        .with_http_listener(address)
        .add_global_label("rank", identity.rank.to_string())
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), names::SECONDS_BUCKETS)?
        .install()
}

fn announce(identity: &Identity) {
    names::describe();
    gauge!(names::RUN_INFO,
        "run" => identity.run.clone(),
        "job_id" => identity.job_id.clone(),
        "model" => identity.model.clone(),
        "version" => env!("CARGO_PKG_VERSION"),
        "world_size" => identity.world_size.to_string())
    .set(1.0);
    gauge!(names::RANK_INFO,
        "node" => identity.host.clone(),
        "local_rank" => identity.local_rank.to_string(),
        "device" => identity.device.clone())
    .set(1.0);
    gauge!(names::RESTARTS).set(identity.restarts as f64);
    // There from the start, so that a rate sees the first one.
    counter!(names::FAILED_CHECKPOINTS).increment(0);
}

/// Writes Prometheus' file_sd target file: one group that holds every rank's address. Readers see
/// the old file or the new one.
///
/// # Errors
/// The file cannot be written.
pub fn write_targets(path: &Path, addresses: &[String]) -> std::io::Result<()> {
    let groups = if addresses.is_empty() {
        serde_json::json!([])
    } else {
        serde_json::json!([{ "targets": addresses }])
    };
    let part = path.with_extension("json.part");
    std::fs::write(&part, format!("{groups:#}\n"))?;
    std::fs::rename(&part, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_file_lists_every_rank_and_is_emptied() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("prometheus-targets.json");
        write_targets(&path, &["a:1".into(), "b:2".into()]).expect("written");
        let read = |path: &Path| -> serde_json::Value {
            serde_json::from_str(&std::fs::read_to_string(path).expect("text")).expect("JSON")
        };
        assert_eq!(read(&path)[0]["targets"], serde_json::json!(["a:1", "b:2"]));
        write_targets(&path, &[]).expect("written");
        assert_eq!(read(&path), serde_json::json!([]));
    }
}
