//! How a rank's metrics reach Prometheus: its endpoint, or its host's.

use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use metrics::{counter, gauge};
use metrics_exporter_prometheus::{
    BuildError, Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};
use repa_comm::Topology;
use tokio::net::{TcpListener, UnixListener};
use tokio::runtime::Runtime;

use super::node::{Node, Others};
use super::push::Pusher;
use super::server::{Listener, serve};
use super::{host, names};
use crate::config::TelemetryConfig;

/// Ports that are tried beyond the wanted one.
pub const PORTS_TRIED: u16 = 64;

/// Seconds beyond which a period counts as for ever.
const LONGEST_PERIOD: f64 = 1e9;

/// How often samples of durations are put into their buckets.
const UPKEEP: Duration = Duration::from_secs(5);

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
    /// Anything else.
    #[error("cannot serve metrics: {0}; to go without, set telemetry.metrics=false")]
    Start(String),
    /// There is nothing to push with.
    #[error("cannot push metrics to telemetry.push_url: {0}")]
    Push(String),
}

/// What makes a rank's metrics known. It lives as long as the process.
#[derive(Debug, Default)]
pub struct Exporter {
    /// Where metrics can be had, under the host's name if that is any of its addresses.
    address: Option<String>,
    /// The same, as this process reaches it.
    local: Option<SocketAddr>,
    /// The socket by which the lowest rank of the host gets them.
    socket: Option<String>,
    /// The other ranks' sockets, where this rank serves for its host.
    others: Option<Others>,
    pusher: Option<Pusher>,
}

/// Starts recording this process's metrics, and serving them: at `telemetry.port` + local rank, or for all ranks of a
/// host at `telemetry.node_port`, or the next free port; and pushing them, where that is asked for.
///
/// # Errors
/// No port is free, the address is not this host's, or the process already has such a recorder.
pub fn start(config: &TelemetryConfig, identity: &Identity) -> Result<Exporter, ExporterError> {
    let recorder = recorder(identity).map_err(failed)?;
    let handle = recorder.handle();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    let mut exporter = match config.metrics {
        true => exporter(config, identity, &handle, &runtime)?,
        false => Exporter::default(),
    };
    if !config.push_url.is_empty() {
        let period = Duration::from_secs_f64(config.push_seconds.min(LONGEST_PERIOD));
        let pusher = Pusher::start(&config.push_url, period, identity, handle.clone(), &runtime);
        exporter.pusher = Some(pusher.map_err(ExporterError::Push)?);
    }
    runtime.spawn(async move {
        loop {
            tokio::time::sleep(UPKEEP).await;
            handle.run_upkeep();
        }
    });
    metrics::set_global_recorder(recorder).map_err(failed)?;
    let drive = move || runtime.block_on(std::future::pending::<()>());
    std::thread::Builder::new().name("metrics".into()).spawn(drive).map_err(failed)?;
    announce(identity);
    let device = identity.device.as_str();
    let gpu = device.starts_with("cuda").then(|| crate::train::cuda_ordinal(device, identity.local_rank));
    if let Err(error) = host::start(gpu) {
        tracing::warn!("no metrics of the process: {error}");
    }
    Ok(exporter)
}

fn failed(problem: impl std::fmt::Display) -> ExporterError {
    ExporterError::Start(problem.to_string())
}

fn recorder(identity: &Identity) -> Result<PrometheusRecorder, BuildError> {
    let builder = PrometheusBuilder::new()
        .add_global_label("rank", identity.rank.to_string())
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), names::SECONDS_BUCKETS)?;
    Ok(builder.build_recorder())
}

/// Opens what the rank is asked at.
fn exporter(
    config: &TelemetryConfig,
    identity: &Identity,
    handle: &PrometheusHandle,
    runtime: &Runtime,
) -> Result<Exporter, ExporterError> {
    // Listeners register with the runtime that they are made in.
    let _inside = runtime.enter();
    let mut exporter = Exporter::default();
    let first = match (config.node_port, identity.local_rank) {
        (0, local_rank) => config.port.saturating_add(local_rank as u16),
        (port, 0) => port,
        (_, _) => {
            let name = socket_name(identity.rank);
            let listener = Listener::Unix(UnixListener::bind(&name).map_err(failed)?);
            runtime.spawn(serve(listener, handle.clone()));
            exporter.socket = Some(name);
            return Ok(exporter);
        }
    };
    let (listener, address) = bind(config.bind, first)?;
    let listener = Listener::Tcp(listener);
    exporter.local = Some(address);
    exporter.address = Some(match address.ip().is_unspecified() {
        true => format!("{}:{}", identity.host, address.port()),
        false => address.to_string(),
    });
    if config.node_port == 0 {
        runtime.spawn(serve(listener, handle.clone()));
    } else {
        let others = Others::default();
        runtime.spawn(serve(listener, Node { own: handle.clone(), others: others.clone() }));
        exporter.others = Some(others);
    }
    Ok(exporter)
}

/// A socket without a file, which would stay behind a killed rank: its name begins with a zero (unix(7), "abstract").
fn socket_name(rank: usize) -> String {
    let token = RandomState::new().hash_one(rank);
    format!("\0repa-dist-metrics-{}-{rank}-{token:016x}", std::process::id())
}

/// The first free port from `first` on.
fn bind(bind: IpAddr, first: u16) -> Result<(TcpListener, SocketAddr), ExporterError> {
    let last = first.saturating_add(PORTS_TRIED);
    let attempt = |port| {
        let listener = std::net::TcpListener::bind((bind, port))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        Ok::<_, std::io::Error>((TcpListener::from_std(listener)?, address))
    };
    let mut reason = String::new();
    for port in first..=last {
        match attempt(port) {
            Ok(found) => return Ok(found),
            Err(error) => reason = error.to_string(),
        }
    }
    Err(ExporterError::NoPort { bind, first, last, reason })
}

/// What separates the parts of what a rank tells the others; none of them holds it.
const SEPARATOR: char = '\n';

impl Exporter {
    /// Where this process itself can read the metrics, if it serves any.
    pub fn local_address(&self) -> Option<SocketAddr> {
        self.local
    }

    /// What all ranks need to know of this one.
    pub fn told(&self) -> String {
        let [address, socket] = [&self.address, &self.socket].map(|part| part.as_deref().unwrap_or_default());
        format!("{address}{SEPARATOR}{socket}")
    }

    /// Learns what all ranks have told, by rank.
    pub fn learn(&self, told: &[String], topology: &Topology) {
        let Some(others) = &self.others else { return };
        let here = told.iter().zip(&topology.node_of).filter(|(_, node)| **node == topology.node);
        let sockets = here.filter_map(|(told, _)| told.split_once(SEPARATOR)).map(|(_, socket)| socket);
        // Told once.
        let _ = others.set(sockets.filter(|socket| !socket.is_empty()).map(str::to_owned).collect());
    }

    /// Pushes the last state, where metrics are pushed.
    pub fn finish(&mut self) {
        if let Some(pusher) = &mut self.pusher {
            if let Ok(now) = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH) {
                gauge!(names::RUN_END_TIME).set(now.as_secs_f64());
            }
            pusher.finish();
        }
    }
}

/// The addresses in what ranks have told.
pub fn addresses(told: &[String]) -> Vec<String> {
    let addresses = told.iter().filter_map(|told| told.split_once(SEPARATOR)).map(|(address, _)| address);
    addresses.filter(|address| !address.is_empty()).map(str::to_owned).collect()
}

fn announce(identity: &Identity) {
    names::describe();
    gauge!(names::RUN_END_TIME).set(0.0);
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

/// Writes Prometheus' file_sd target file: one group that holds every address. Readers see the old file or the new one.
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
