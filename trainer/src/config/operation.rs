//! How a run is carried out: communication, checkpoints, telemetry. Nothing here decides what is learned.

use std::path::PathBuf;

use repa_comm::Wire;
use serde::{Deserialize, Serialize};

/// Keys under `comm`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CommConfig {
    /// Whether gradients are summed over the ranks while the backward pass still runs, and the new weights of a sharded
    /// optimizer arrive while the next forward pass does. Changes no bit.
    pub overlap: bool,
    /// Size of the buckets in which they are summed, in MiB. Changes no bit.
    pub bucket_mib: usize,
    /// Who sums them: `auto` is NCCL between GPUs where it can be had, and MPI otherwise; `mpi`; or `nccl`.
    pub backend: Backend,
    /// How gradients travel between ranks: `f32`, or `bf16` for half the bytes (they are added up in float32 in any
    /// case). Only `f32` gives the numbers of one rank.
    pub wire: Wire,
    /// Whether gradients are summed within each host before they go between hosts, where all hosts have equally many
    /// ranks and more than one. Less to send, and another order of additions.
    pub hierarchical: bool,
    /// Seconds that a collective may take, waiting for the slowest rank included, before the run ends with
    /// an error that names the ranks that did not come.
    pub timeout_seconds: f64,
}

impl Default for CommConfig {
    fn default() -> Self {
        Self {
            overlap: true,
            bucket_mib: 8,
            backend: Backend::Auto,
            wire: Wire::F32,
            hierarchical: true,
            timeout_seconds: 600.0,
        }
    }
}

/// What sums gradients over the ranks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// NCCL between GPUs where it can be had, MPI otherwise.
    #[default]
    Auto,
    /// MPI, through the hosts' memory.
    Mpi,
    /// NCCL.
    Nccl,
}

/// Keys under `checkpoint`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointConfig {
    /// Folder of the checkpoints; empty is `checkpoints` in the run folder. It may be on a disk that each host has
    /// for itself, or in an object store: s3://BUCKET/PREFIX, reached as the environment's AWS_* variables say.
    pub dir: PathBuf,
    /// Steps between checkpoints; 0 saves at the end only.
    pub every: u64,
    /// Minutes between checkpoints, besides; 0 for none.
    pub every_minutes: f64,
    /// How many of the newest are kept.
    pub keep: usize,
    /// Checkpoints whose step is a multiple of this are kept for ever; 0 for none.
    pub keep_every: u64,
    /// How many of the best are kept, by `checkpoint.best_metric`.
    pub keep_best: usize,
    /// What the best are chosen by, a mean over the steps since the save before: `loss`, `denoising_loss` or
    /// `alignment_loss`, each the lower the better.
    pub best_metric: String,
    /// Whether a checkpoint is written while training goes on; it costs a copy of what each rank writes, in memory.
    pub asynchronous: bool,
    /// Failed saves in a row with which training goes on.
    pub max_failed: u64,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self {
            dir: PathBuf::new(),
            every: 50_000,
            every_minutes: 0.0,
            keep: 2,
            keep_every: 0,
            keep_best: 0,
            best_metric: "loss".into(),
            asynchronous: true,
            max_failed: 3,
        }
    }
}

/// Keys under `telemetry`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TelemetryConfig {
    /// Whether each rank serves Prometheus metrics.
    pub metrics: bool,
    /// Address that the metrics listen on.
    pub bind: std::net::IpAddr,
    /// Port of local rank 0; others count on from it.
    pub port: u16,
    /// Port at which one rank of each host serves the metrics of all ranks there, in place of `port`; 0 for none. The
    /// next free one if it is taken.
    pub node_port: u16,
    /// Address of a Pushgateway, such as http://gateway:9091, that each rank sends its metrics to, also where `metrics`
    /// is false; empty for none. It is kept with the configuration: leave secrets out.
    pub push_url: String,
    /// Seconds between pushes.
    pub push_seconds: f64,
    /// Whether rank 0 writes TensorBoard's event files to the run folder's `tensorboard`: curves, and the grids of
    /// `sample.training`.
    pub tensorboard: bool,
    /// How rank 0 shows progress.
    pub progress: Progress,
    /// How log lines look, which RUST_LOG chooses: `text` or `json`.
    pub log: LogFormat,
    /// What the devices of all ranks can do together, in 10^12 floating-point operations a second at the training
    /// precision, for the model FLOP utilisation (MFU); 0 leaves it out.
    pub peak_tflops: f64,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// For people.
    Text,
    /// An object a line.
    Json,
}

/// How rank 0 shows progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Progress {
    /// A bar where a person watches, lines elsewhere.
    Auto,
    /// A bar.
    Bar,
    /// A line every few seconds.
    Lines,
    /// Nothing.
    Off,
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        Self {
            metrics: true,
            bind: std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST),
            port: 9400,
            node_port: 0,
            push_url: String::new(),
            push_seconds: 15.0,
            tensorboard: false,
            progress: Progress::Auto,
            log: LogFormat::Text,
            peak_tflops: 0.0,
        }
    }
}
