//! How much memory a rank needs to train a configuration, predicted without training it.
//!
//! Every term follows from a structure of the training loop: the flat arrays of
//! [`crate::train::State`] and of its gradient buckets, the working copy of
//! [`crate::params::Params`], what the operations of [`crate::ops`] keep for the backward pass
//! ([`activations`]), the loader's batches and the communicator's buffers. The few measured
//! constants are at the top and say how they were measured. `repa-dist bench step` measures what
//! this predicts; a test holds the two together.
//!
//! Who trains on a GPU has the flat arrays there, too, bucket by bucket, and the host has batches, snapshots and
//! buffers. That has been compared with what a stand-in for CUDA was asked for only (BENCHMARKS.md).

mod activations;

use serde::Serialize;

use crate::config::Config;
use crate::model::{Precision, SitConfig};
use activations::Pass;

const MIB: u128 = 1 << 20;

/// Bytes of a float32.
const F32: u128 = 4;

/// Measured: a process that trains on one thread, over the terms below. Three quarters of it is what a model
/// of a few thousand parameters takes (the program's pages, the C library, the heap's first pages), the rest
/// packed blocks of matrix products and the allocator's gaps, on SiT-S/2.
const PROCESS: u128 = 24 * MIB;

/// Measured: what a second compute thread adds to SiT-S/2. Its packed blocks of matrix products, its
/// attention scores, its stack and the allocator's arena of it.
const THREAD: u128 = 6 * MIB;

/// Measured: what the same process takes more under mpirun. OpenMPI's own buffers and pages.
const MPI: u128 = 8 * MIB;

/// Where memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// The host's main memory.
    Host,
    /// The GPU's memory.
    Device,
}

/// What memory is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// The flat array of weights.
    Parameters,
    /// The flat array of gradients, in buckets.
    Gradients,
    /// AdamW's first and second moments.
    Moments,
    /// The moving average of the weights.
    Ema,
    /// The tensors that a step computes with.
    WorkingCopy,
    /// What the forward pass keeps for the backward pass.
    Activations,
    /// Gradients on their way through the backward pass.
    Workspace,
    /// Batches that are ready, being read or in use.
    Loader,
    /// What a checkpoint that is being written holds.
    Snapshot,
    /// Buffers between ranks.
    Communication,
    /// Everything that does not depend on the model.
    Process,
}

impl Part {
    /// Its name in a table.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Parameters => "parameters",
            Self::Gradients => "gradients",
            Self::Moments => "optimizer moments",
            Self::Ema => "EMA",
            Self::WorkingCopy => "working copy",
            Self::Activations => "activations",
            Self::Workspace => "backward workspace",
            Self::Loader => "data loader",
            Self::Snapshot => "checkpoint",
            Self::Communication => "communication",
            Self::Process => "process",
        }
    }
}

/// One line of an estimate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Line {
    /// What it is for.
    pub part: Part,
    /// Where it is.
    pub place: Place,
    /// How much.
    pub bytes: u64,
    /// How it comes about.
    pub what: String,
}

/// What a rank holds at the peak of a step.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Estimate {
    /// The configured device.
    pub device: String,
    /// Number of ranks.
    pub ranks: usize,
    /// Ranks that share optimizer moments and EMA; 1 where each has all of them.
    pub shards: usize,
    /// Parameters of the model, projectors and frozen ones included.
    pub parameters: u64,
    /// Samples of a step that the rank with most takes.
    pub rank_batch: usize,
    /// Of which so many go through the model at once.
    pub micro_batch: usize,
    /// The parts.
    pub lines: Vec<Line>,
    /// Host memory of a rank, in bytes.
    pub host_bytes: u64,
    /// GPU memory of a rank, in bytes; 0 on the CPU.
    pub device_bytes: u64,
    /// Bytes that sharding over all ranks (ZeRO-1) saves each of them, against none, in the memory that it trains in.
    pub sharding_saves_bytes: u64,
    /// That, as a fraction of that memory without sharding.
    pub sharding_saves_fraction: f64,
    /// What is left out.
    pub notes: Vec<String>,
}

/// What an estimate is for, beside the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Job {
    /// Number of ranks; 0 counts as 1.
    pub ranks: usize,
    /// Ranks that share optimizer moments and EMA: 1 without sharding, `ranks` under ZeRO-1.
    pub shards: usize,
    /// Threads of a rank on the CPU.
    pub threads: usize,
}

/// Predicts the memory of the rank that has most of a step's samples, for a configuration that
/// [`crate::config::load`] has checked.
#[must_use]
pub fn estimate(config: &Config, job: &Job) -> Estimate {
    let sit = config.sit();
    let (ranks, shards) = (job.ranks.max(1), job.shards.max(1));
    let rank_batch = config.train.global_batch.div_ceil(ranks);
    let micro_batch = match config.train.micro_batch {
        0 => rank_batch,
        most => most.min(rank_batch),
    };
    let on_cpu = config.device.is_cpu();
    let compute = if on_cpu { Place::Host } else { Place::Device };
    let counts = Counts::of(&sit);
    let pass = Pass::new(&sit, config.train.precision, micro_batch, on_cpu);
    let moments = |shards: usize| F32 * counts.trainable.div_ceil(shards as u128);

    let mut lines = Vec::new();
    let mut line = |part, place, bytes: u128, what: String| {
        lines.push(Line { part, place, bytes: clamp(bytes), what });
    };
    let flat = "float32, one flat array";
    let divided = if shards > 1 { format!(", 1/{shards} of it") } else { String::new() };
    line(Part::Parameters, compute, F32 * counts.trainable, flat.to_owned());
    let gradients = gradients(config, &counts, on_cpu);
    line(Part::Gradients, compute, gradients.0, gradients.1);
    line(Part::Moments, compute, 2 * moments(shards), format!("two of AdamW, {flat} each{divided}"));
    line(Part::Ema, compute, moments(shards), format!("{flat}{divided}"));
    let copy = working_copy(&counts, config.train.precision);
    line(Part::WorkingCopy, compute, copy.0, copy.1);
    let what = format!("kept for the backward pass, {}", plural(micro_batch, "sample"));
    line(Part::Activations, compute, pass.kept() + inputs(&sit, rank_batch, micro_batch), what);
    let what = "gradients in flight where most is alive".to_owned();
    line(Part::Workspace, compute, pass.workspace(), what);
    let (batches, each) = loader(config, &sit, rank_batch);
    let what = format!("{} of {}", plural(clamp(batches) as usize, "batch"), plural(rank_batch, "sample"));
    line(Part::Loader, Place::Host, batches.saturating_mul(each), what);
    let written = 4 * F32 * counts.trainable.div_ceil(ranks as u128);
    line(Part::Snapshot, Place::Host, written, "copy of what the rank writes".to_owned());
    if ranks > 1 {
        line(Part::Communication, Place::Host, communication(), "staging between ranks".to_owned());
    }
    let threads = job.threads.max(1);
    let mpi = if ranks > 1 { MPI } else { 0 };
    let with_mpi = if ranks > 1 { ", MPI" } else { "" };
    let what = format!("measured constants: program, {}{with_mpi}", plural(threads, "thread"));
    line(Part::Process, Place::Host, PROCESS + mpi + THREAD * (threads as u128 - 1), what);

    let total =
        |place| lines.iter().filter(|l| l.place == place).fold(0u64, |sum, l| sum.saturating_add(l.bytes));
    let (host_bytes, device_bytes) = (total(Place::Host), total(Place::Device));
    let whole = clamp(3 * moments(1));
    let unsharded = total(compute).saturating_sub(clamp(3 * moments(shards))).saturating_add(whole);
    let saved = whole - clamp(3 * moments(ranks));
    Estimate {
        device: config.device.0.clone(),
        ranks,
        shards,
        parameters: clamp(counts.trainable + counts.frozen),
        rank_batch,
        micro_batch,
        host_bytes,
        device_bytes,
        sharding_saves_bytes: saved,
        sharding_saves_fraction: saved as f64 / unsharded as f64,
        notes: notes(config, on_cpu, clamp(4 * F32 * counts.trainable)),
        lines,
    }
}

/// Numbers of parameters.
struct Counts {
    /// Those of the flat arrays: [`crate::params::Layout::trainable_len`].
    trainable: u128,
    /// The position embedding.
    frozen: u128,
    /// Those that are not cast to half precision: see [`crate::model::Sit::bind_watched`].
    float32_only: u128,
}

impl Counts {
    fn of(sit: &SitConfig) -> Self {
        // Only the position embedding depends on the number of tokens, and its values may be many: they are
        // counted, not made.
        let layout = SitConfig { input_size: sit.patch_size, ..sit.clone() }.layout();
        let table = (sit.num_classes as u128 + 1) * sit.hidden_size as u128;
        let norms = if sit.qk_norm { 4 * (sit.head_dim() * sit.depth) as u128 } else { 0 };
        Self {
            trainable: layout.trainable_len() as u128,
            frozen: sit.tokens() as u128 * sit.hidden_size as u128,
            float32_only: table + norms,
        }
    }
}

/// Bytes of the tensors that a step computes with, and what they are. `Params::from_flat` copies the flat
/// array, and in half precision each part of the model casts its matrices where it is bound, which the
/// backward pass then keeps.
fn working_copy(counts: &Counts, precision: Precision) -> (u128, String) {
    let mut bytes = F32 * (counts.trainable + counts.frozen);
    let mut what = "float32 tensors of a step".to_owned();
    if precision != Precision::F32 {
        bytes += activations::element(precision) * (counts.trainable - counts.float32_only);
        what += ", and the matrices in half precision";
    }
    (bytes, what)
}

/// Bytes of the gradient buckets. On a GPU a parameter's gradient has memory of its own until its bucket is on its
/// way: at the end of the backward pass, or as soon as the bucket is complete.
fn gradients(config: &Config, counts: &Counts, on_cpu: bool) -> (u128, String) {
    let buckets = F32 * counts.trainable;
    let what = "float32, in buckets";
    if on_cpu {
        return (buckets, what.to_owned());
    }
    let waiting = match config.comm.overlap {
        true => ((config.comm.bucket_mib as u128) * MIB).min(buckets),
        false => buckets,
    };
    (buckets + waiting, format!("{what}, and those that wait for theirs"))
}

/// Bytes of a step's inputs: the rank's latents as `Inputs` normalises them, and for one pass the latents,
/// noise, state, target, velocity and error, each [samples, channels, side, side] in float32.
fn inputs(sit: &SitConfig, rank_batch: usize, micro_batch: usize) -> u128 {
    F32 * latent(sit) * (rank_batch as u128 + 6 * micro_batch as u128)
}

/// Elements of a sample's latent.
fn latent(sit: &SitConfig) -> u128 {
    (sit.in_channels * sit.input_size * sit.input_size) as u128
}

/// Batches that exist at once, and the bytes of one. `Loader` holds `data.queue_depth` ready, rounded up to
/// its threads; one is trained on, and one may wait to be filled anew. A sample has moments (two numbers for
/// each of the latent), two draws, and float16 features (which are taken to be on the model's grid).
fn loader(config: &Config, sit: &SitConfig, rank_batch: usize) -> (u128, u128) {
    let threads = config.data.threads.max(1) as u128;
    let ready = (config.data.queue_depth as u128).div_ceil(threads) * threads;
    let features: u128 = sit.z_dims.iter().map(|&z| (sit.tokens() * z) as u128).sum();
    (ready + 2, rank_batch as u128 * (4 * F32 * latent(sit) + 2 * features))
}

/// Bytes of the buffers between ranks, at most: `Messages` has two lanes each for inputs and results, which
/// send and receive a chunk each. The window between ranks of one node takes less: what a rank touches of all
/// segments comes to two chunks of its own inputs, as many of the others' and two of results. Buckets travel
/// where they are and take nothing more.
fn communication() -> u128 {
    8 * repa_comm::Options::default().chunk_bytes as u128
}

fn notes(config: &Config, on_cpu: bool, arrays: u64) -> Vec<String> {
    let mut notes = Vec::new();
    if !on_cpu {
        notes.push(
            "not measured on a GPU; of a stand-in for CUDA, SiT-S/2 took 1.01 to 1.05 times this, the spare memory of \
             CubeCL's pools included; CUDA's context and libraries come on top"
                .to_owned(),
        );
        notes.push(format!(
            "while it starts, before weights, moments and average are on the GPU, a rank without sharding has {:.1} GiB \
             of them on the host",
            arrays as f64 / f64::from(1 << 30)
        ));
    }
    if !config.alignment.encoders.is_empty() {
        notes.push("the encoders of alignment.encoders, and the images they see, come on top".to_owned());
    }
    notes
}

fn plural(count: usize, what: &str) -> String {
    match (count, what) {
        (1, what) => format!("1 {what}"),
        (count, "batch") => format!("{count} batches"),
        (count, what) => format!("{count} {what}s"),
    }
}

/// Sizes beyond a machine word count as the largest.
fn clamp(bytes: u128) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
