//! How fast the ranks sum vectors, against a plain copy and against the MPI library's own all-reduce.

use crate::{CommError, Communicator, ReduceOp};
use serde::Serialize;
use std::hint::black_box;
use std::time::{Duration, Instant};

/// What to measure.
#[derive(Debug, Clone)]
pub struct BenchOptions {
    /// Vector sizes in bytes (rounded down to whole float32).
    pub sizes: Vec<usize>,
    /// Also measure the library's own all-reduce.
    pub against_library: bool,
    /// Measure each size for about this long.
    pub time_per_size: Duration,
}

impl Default for BenchOptions {
    /// 1 KiB to 512 MiB in steps of four (and 512 MiB), half a second each.
    fn default() -> Self {
        let sizes = (0..10).map(|step| 1024 << (2 * step)).chain([512 << 20]).collect();
        Self { sizes, against_library: false, time_per_size: Duration::from_millis(500) }
    }
}

/// Time and bandwidths as nccl-tests define them: algorithm = bytes of the vector / time; bus = algorithm x
/// 2 (n - 1) / n, which can be compared between rank numbers and with the hardware's speed.
#[derive(Debug, Clone, Serialize)]
pub struct Bandwidth {
    /// Mean over the repeats of the slowest rank's mean, in seconds.
    pub seconds: f64,
    /// Bytes per second.
    pub algorithm_bytes_per_second: f64,
    /// Bytes per second.
    pub bus_bytes_per_second: f64,
}

/// One size.
#[derive(Debug, Clone, Serialize)]
pub struct BenchRow {
    /// Length of the vector in bytes.
    pub bytes: usize,
    /// How often it was summed.
    pub repeats: usize,
    /// This program's all-reduce.
    pub ours: Bandwidth,
    /// The MPI library's, if asked for and there is one.
    pub library: Option<Bandwidth>,
}

/// The whole measurement; the same on all ranks.
#[derive(Debug, Clone, Serialize)]
pub struct BenchReport {
    /// Number of ranks.
    pub ranks: usize,
    /// Number of nodes.
    pub nodes: usize,
    /// The transport.
    pub transport: String,
    /// Copy rate of one rank while all copy at the same time, in payload bytes per second: the slowest rank's.
    pub memcpy_bytes_per_second: f64,
    /// By size, as asked for.
    pub rows: Vec<BenchRow>,
}

/// Measures all-reduce for every size: a collective.
///
/// # Errors
/// Those of the collectives.
pub fn all_reduce(comm: &dyn Communicator, options: &BenchOptions) -> Result<BenchReport, CommError> {
    let memcpy_bytes_per_second = memcpy_rate(comm)?;
    let mut rows = Vec::with_capacity(options.sizes.len());
    for &bytes in &options.sizes {
        let mut data = vec![0f32; bytes / size_of::<f32>()];
        let (repeats, seconds) = time(comm, options.time_per_size, || comm.all_reduce_f32(&mut data))?;
        let ours = bandwidth(bytes, seconds, comm.size());
        let mut library = None;
        let mut sum = vec![0f32; if options.against_library { data.len() } else { 0 }];
        if options.against_library && comm.library_all_reduce_f32(&data, &mut sum)? {
            let work = || comm.library_all_reduce_f32(&data, &mut sum).map(drop);
            let (_, seconds) = time(comm, options.time_per_size, work)?;
            library = Some(bandwidth(bytes, seconds, comm.size()));
        }
        rows.push(BenchRow { bytes, repeats, ours, library });
    }
    let topology = comm.topology();
    Ok(BenchReport {
        ranks: topology.size,
        nodes: topology.nodes,
        transport: comm.describe(),
        memcpy_bytes_per_second,
        rows,
    })
}

fn bandwidth(bytes: usize, seconds: f64, ranks: usize) -> Bandwidth {
    let algorithm = bytes as f64 / seconds;
    let bus = algorithm * 2.0 * (ranks as f64 - 1.0) / ranks as f64;
    Bandwidth { seconds, algorithm_bytes_per_second: algorithm, bus_bytes_per_second: bus }
}

/// The repeats and the slowest rank's mean time of `work`, which runs twice before the clock starts.
fn time(
    comm: &dyn Communicator,
    budget: Duration,
    mut work: impl FnMut() -> Result<(), CommError>,
) -> Result<(usize, f64), CommError> {
    work()?;
    comm.barrier()?;
    let started = Instant::now();
    work()?;
    // The ranks have to agree on the number of repeats.
    let mut once = [started.elapsed().as_secs_f64()];
    comm.all_reduce_f64(&mut once, ReduceOp::Max)?;
    let repeats = (budget.as_secs_f64() / once[0].max(1e-9)).clamp(3.0, 10_000.0) as usize;
    comm.barrier()?;
    let started = Instant::now();
    for _ in 0..repeats {
        work()?;
    }
    let mut mean = [started.elapsed().as_secs_f64() / repeats as f64];
    comm.all_reduce_f64(&mut mean, ReduceOp::Max)?;
    Ok((repeats, mean[0]))
}

/// The slowest rank's copy rate between two buffers larger than the caches, all ranks at the same time.
fn memcpy_rate(comm: &dyn Communicator) -> Result<f64, CommError> {
    const BYTES: usize = 64 << 20;
    let from = vec![1u8; BYTES];
    let mut to = vec![0u8; BYTES];
    let copy = || {
        black_box(&mut to).copy_from_slice(black_box(&from));
        Ok(())
    };
    let (_, seconds) = time(comm, Duration::from_millis(300), copy)?;
    Ok(BYTES as f64 / seconds)
}
