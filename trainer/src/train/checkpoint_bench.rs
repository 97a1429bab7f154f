//! The figures of `repa-dist bench checkpoint`: how fast checkpoints are written and read, against dd and plain reads
//! on the same disk, and what a save costs the steps that go on meanwhile.

use std::fs::File;
use std::hint::black_box;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use repa_comm::{Communicator, ReduceOp, RemoteError};
use rustix::fs::{Advice, fadvise};
use serde::Serialize;

use super::bench::{Stepper, median};
use super::gather::{self, Search, Wanted};
use super::placement::Placement;
use super::saver::Saver;
use super::{Owned, State, TrainError, agree, deadline};
use crate::checkpoint::{CheckpointError, Checkpoints};
use crate::config::Config;

/// What to measure.
#[derive(Debug, Clone)]
pub struct CheckpointBenchOptions {
    /// Where to write.
    pub dir: PathBuf,
    /// How often; medians count.
    pub turns: usize,
    /// Steps to time without a save, a turn; about as many are timed with one. 0 for none.
    pub steps: usize,
}

/// What was measured. Times are medians over the turns, of the slowest rank.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CheckpointBench {
    /// Number of ranks.
    pub ranks: usize,
    /// Bytes of a checkpoint.
    pub bytes: u64,
    /// From the snapshot until the checkpoint was durable.
    pub write_seconds: f64,
    /// The checkpoint's bytes over that.
    pub write_bytes_per_second: f64,
    /// What `dd bs=1M conv=fsync` reaches with as many bytes.
    pub dd_bytes_per_second: f64,
    /// Median over the turns of the ratio of the two.
    pub write_share: f64,
    /// From looking for the checkpoint until every rank had what it needs, digests checked, no page of it in memory
    /// before; from the second turn on into memory that was in use already.
    pub read_seconds: f64,
    /// The checkpoint's bytes over that.
    pub read_bytes_per_second: f64,
    /// What one thread reaches that reads the same files and keeps nothing, no page of them in memory before.
    pub plain_bytes_per_second: f64,
    /// Median over the turns of the ratio of the two.
    pub read_share: f64,
    /// For how long a save keeps training waiting.
    pub snapshot_seconds: f64,
    /// What copying as many bytes as the rank writes takes, on all ranks at the same time.
    pub memcpy_seconds: f64,
    /// What a save costs the steps that go on meanwhile.
    pub steps: Option<StepCost>,
}

/// What a save costs the steps that go on meanwhile: medians over the turns of the means over the steps.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepCost {
    /// Seconds of a step while nothing is saved.
    pub without_seconds: f64,
    /// Seconds of a step while a save goes on.
    pub with_seconds: f64,
    /// Steps that were timed with one, over all turns.
    pub steps: usize,
    /// Saves in that time.
    pub saves: usize,
}

/// Measures on all ranks. What it writes is removed again.
///
/// # Errors
/// The folder cannot be written, or the ranks cannot talk.
pub fn run(
    config: &Config,
    comm: &Arc<dyn Communicator>,
    options: &CheckpointBenchOptions,
) -> Result<CheckpointBench, RemoteError> {
    let figures = measure(config, comm, options);
    if comm.rank() == 0 {
        // What is left of it is in nobody's way.
        let _ = std::fs::remove_dir_all(folder(options));
    }
    figures
}

fn folder(options: &CheckpointBenchOptions) -> PathBuf {
    options.dir.join("bench-checkpoint")
}

fn measure(
    config: &Config,
    shared: &Arc<dyn Communicator>,
    options: &CheckpointBenchOptions,
) -> Result<CheckpointBench, RemoteError> {
    let comm = shared.as_ref();
    let mut config = config.clone();
    config.checkpoint.dir = folder(options).join("checkpoints");
    config.checkpoint.keep = 1;
    comm.set_deadline(Some(deadline(&config)));
    let stepper = Stepper::new(&config, shared);
    let mut stepper = agree(comm, stepper)?;
    let checkpoints = Checkpoints::at(&config.checkpoint.dir);
    let placement = Placement::find(&checkpoints, comm)?;
    let saver = Saver::new(
        &config,
        checkpoints.clone(),
        &stepper.learner.layout,
        placement.clone(),
        &stepper.learner.state.owned,
        None,
        comm,
    );
    let mut saver = agree(comm, saver)?;
    let own = Owned::new(stepper.learner.cut.owned.iter().cloned());
    let params = stepper.learner.layout.trainable_len();
    let mut turns: Vec<[f64; 6]> = Vec::new();
    let (mut costs, mut during) = (Vec::new(), 0);
    let mut bytes = 0;
    // As a plain read has its buffer, each turn reads into the memory of the one before: where free memory has to come
    // from the host of a virtual machine, that would take longer than the disk.
    let mut memory = None;
    for turn in 0..options.turns {
        stepper.learner.state.step += 1;
        if comm.rank() == 0 {
            settle();
        }
        agree(comm, comm.barrier().map_err(TrainError::from))?;
        let memcpy = agree(comm, memcpy(comm, 4 * (4 * params).div_ceil(comm.size())))?;
        pass_over(&stepper.learner.state);
        agree(comm, comm.barrier().map_err(TrainError::from))?;
        let begun = Instant::now();
        agree(comm, saver.save(&mut stepper.learner, &config, comm).map(drop))?;
        let snapshot = begun.elapsed().as_secs_f64();
        agree(comm, saver.drain(comm).map(drop))?;
        let write = begun.elapsed().as_secs_f64();
        agree(comm, saver.check_durable(stepper.learner.state.step))?;

        let opened = checkpoints.open(stepper.learner.state.step);
        bytes = agree(comm, opened.map_err(TrainError::from))?.bytes();
        let dd = on_first(comm, || dd(&folder(options), bytes))?;

        // Once before the clock: where a virtual machine gives free memory back to its host, the first to use it again
        // waits for that, and neither reading should always be it.
        let saved = checkpoints.path(stepper.learner.state.step);
        on_first(comm, || plain(&saved))?;
        let read_plainly = || on_first(comm, || plain(&saved));
        let mut read_checkpoint = || {
            let error = |source| CheckpointError::Read { path: saved.clone(), source };
            on_first(comm, || forget_all(&saved).map(drop).map_err(error))?;
            agree(comm, comm.barrier().map_err(TrainError::from))?;
            let begun = Instant::now();
            let search = Search {
                checkpoints: &checkpoints,
                placement: &placement,
                wanted: Wanted::Newest,
                layout: &stepper.learner.layout,
                owned: &own,
                allowed: &|_| Ok(()),
            };
            let found = gather::find(&search, memory.take(), &mut Vec::new(), comm)?;
            let seconds = begun.elapsed().as_secs_f64();
            memory = found.map(|(_, state)| state);
            Ok::<_, RemoteError>(seconds)
        };
        let (plain, read) = if turn.is_multiple_of(2) {
            let plain = read_plainly()?;
            (plain, read_checkpoint()?)
        } else {
            let read = read_checkpoint()?;
            (read_plainly()?, read)
        };
        turns.push(agree(comm, slowest(comm, [write, dd, read, plain, snapshot, memcpy]))?);

        if options.steps > 0 {
            let cost = agree(comm, steps(&mut stepper, &mut saver, &config, shared, options.steps))?;
            during += cost.1;
            costs.push(cost.0);
        }
    }
    let median_of = |f: &dyn Fn(&[f64; 6]) -> f64| median(turns.iter().map(f).collect());
    let size = bytes as f64;
    let [write_seconds, dd_seconds, read_seconds, plain_seconds, snapshot_seconds, memcpy_seconds] =
        std::array::from_fn(|i| median_of(&|turn| turn[i]));
    Ok(CheckpointBench {
        ranks: comm.size(),
        bytes,
        write_seconds,
        write_bytes_per_second: size / write_seconds,
        dd_bytes_per_second: size / dd_seconds,
        write_share: median_of(&|turn| turn[1] / turn[0]),
        read_seconds,
        read_bytes_per_second: size / read_seconds,
        plain_bytes_per_second: size / plain_seconds,
        read_share: median_of(&|turn| turn[3] / turn[2]),
        snapshot_seconds,
        memcpy_seconds,
        steps: (!costs.is_empty()).then(|| StepCost {
            without_seconds: median(costs.iter().map(|c| c[0]).collect()),
            with_seconds: median(costs.iter().map(|c| c[1]).collect()),
            steps: during,
            saves: costs.len(),
        }),
    })
}

/// The slowest rank's times.
fn slowest<const N: usize>(comm: &dyn Communicator, mut times: [f64; N]) -> Result<[f64; N], TrainError> {
    comm.all_reduce_f64(&mut times, ReduceOp::Max)?;
    Ok(times)
}

/// Mean seconds of steps without a save and with one, and how many there were with one.
fn steps(
    stepper: &mut Stepper,
    saver: &mut Saver,
    config: &Config,
    comm: &Arc<dyn Communicator>,
    count: usize,
) -> Result<([f64; 2], usize), TrainError> {
    let timed = |stepper: &mut Stepper, saver: &mut Saver| -> Result<(f64, bool), TrainError> {
        comm.barrier()?;
        let begun = Instant::now();
        let durable = stepper.step_saving(config, comm, saver)?;
        Ok((begun.elapsed().as_secs_f64(), durable))
    };
    timed(stepper, saver)?;
    let mut without = 0.0;
    for _ in 0..count {
        without += timed(stepper, saver)?.0;
    }
    let without = without / count as f64;
    saver.save(&mut stepper.learner, config, comm.as_ref())?;
    let (mut with, mut during) = (0.0, 0);
    loop {
        let (seconds, durable) = timed(stepper, saver)?;
        with += seconds;
        during += 1;
        if durable {
            break;
        }
    }
    let times = slowest(comm.as_ref(), [without, with / during as f64])?;
    Ok((times, during))
}

/// Seconds of a copy of so many bytes between buffers whose pages are in memory.
fn memcpy(comm: &dyn Communicator, bytes: usize) -> Result<f64, TrainError> {
    let from = vec![1u8; bytes];
    let mut to = vec![2u8; bytes];
    comm.barrier()?;
    let begun = Instant::now();
    black_box(&mut to).copy_from_slice(black_box(&from));
    Ok(begun.elapsed().as_secs_f64())
}

/// Waits until the disks have done with what was removed before, which some file systems tell them block by block.
fn settle() {
    rustix::fs::sync();
}

/// Seconds that dd takes to bring as many bytes to disk.
fn dd(folder: &Path, bytes: u64) -> Result<f64, CheckpointError> {
    let file = folder.join("dd");
    let error = |source| CheckpointError::Write { path: file.clone(), source };
    // A fresh file, as a checkpoint is.
    let _ = std::fs::remove_file(&file);
    settle();
    let begun = Instant::now();
    let output = Command::new("dd")
        .args(["if=/dev/zero", "bs=1M", "conv=fsync", "status=none"])
        .arg(format!("count={}", bytes.div_ceil(1 << 20)))
        .arg(format!("of={}", file.display()))
        .output()
        .map_err(error)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(error(std::io::Error::other(said)));
    }
    Ok(begun.elapsed().as_secs_f64())
}

/// What the first rank measures while the others wait; 0 there.
fn on_first<T: Default>(
    comm: &dyn Communicator,
    measure: impl FnOnce() -> Result<T, CheckpointError>,
) -> Result<T, RemoteError> {
    let measured = if comm.rank() == 0 { measure() } else { Ok(T::default()) };
    agree(comm, measured.map_err(TrainError::from))
}

/// Seconds that one thread takes to read a checkpoint's files from the disk.
fn plain(folder: &Path) -> Result<f64, CheckpointError> {
    let read = || {
        let files = forget_all(folder)?;
        let mut buffer = vec![0u8; 1 << 20];
        let begun = Instant::now();
        for file in files {
            let mut source = File::open(file)?;
            while source.read(&mut buffer)? > 0 {
                black_box(&mut buffer);
            }
        }
        Ok(begun.elapsed().as_secs_f64())
    };
    read().map_err(|source| CheckpointError::Read { path: folder.to_owned(), source })
}

/// Puts the pages of a folder's files, which are on disk, out of memory. Returns the files.
fn forget_all(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let forgotten = |entry: std::io::Result<std::fs::DirEntry>| {
        let file = entry?.path();
        fadvise(File::open(&file)?, 0, None, Advice::DontNeed)?;
        Ok(file)
    };
    std::fs::read_dir(folder)?.map(forgotten).collect()
}

/// Reads all of a state, which the step before a save would have had in its hands.
fn pass_over(state: &State) {
    for array in [&state.params, &state.ema, &state.exp_avg, &state.exp_avg_sq] {
        black_box(array.iter().sum::<f32>());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::bench::tests::small;
    use repa_comm::Single;

    #[test]
    fn everything_is_measured_and_nothing_is_left_behind() {
        let mut config = small();
        config.train.global_batch = 2;
        let folder = tempfile::tempdir().unwrap();
        let options = CheckpointBenchOptions { dir: folder.path().to_owned(), turns: 2, steps: 2 };
        let comm: Arc<dyn Communicator> = Arc::new(Single::new());
        let figures = run(&config, &comm, &options).unwrap();
        let layout = config.sit().layout();
        assert!(figures.bytes > 16 * layout.trainable_len() as u64, "{figures:?}");
        assert!(figures.write_seconds > 0.0 && figures.read_seconds > 0.0, "{figures:?}");
        let steps = figures.steps.unwrap();
        assert!(steps.saves == 2 && steps.steps >= 2 && steps.with_seconds > 0.0, "{steps:?}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
