//! From a source of samples to a store, on all ranks: load in parallel, make, check, write. What a shard
//! holds follows from its number alone, so that any number of ranks make the same bytes, and a finished
//! shard is not made again.

mod error;
mod progress;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::ScopedJoinHandle;
use std::time::Duration;

use half::f16;
use rayon::prelude::*;
use repa_comm::{Communicator, Failure, RemoteError, all_or_first_error};

pub use error::BuildError;
pub use progress::BuildProgress;

use super::store::{
    Checked, Index, LeftOut, Sample, ShardEntry, ShardPlan, ShardWriter, StoreError, StoreSpec, StoreWriter,
    View,
};
use progress::Board;

/// Bad members beyond the bound at which a rank gives up early: by then nobody mends them one by one.
const HOPELESS: usize = 100;

/// How long the ranks may wait for each other's part of small agreements.
pub(super) const DEADLINE: Duration = Duration::from_secs(600);

/// Samples by number, in a form of their own.
pub trait Source: Sync {
    /// What loading gives.
    type Raw: Send;

    /// Number of members.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What member `i` is called, for messages.
    fn name(&self, i: usize) -> String;

    /// Loads member `i`. Called from many threads.
    ///
    /// # Errors
    /// What is wrong with it.
    fn load(&self, i: usize) -> Result<Self::Raw, Fault>;
}

/// What is wrong with a member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The file at fault, where it is not the member itself.
    pub name: Option<String>,
    /// What is wrong with it.
    pub problem: String,
}

impl From<String> for Fault {
    fn from(problem: String) -> Self {
        Self { name: None, problem }
    }
}

/// A sample that is ready for the store.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Made {
    /// The class.
    pub label: u32,
    /// The sample as it is.
    pub view: MadeView,
    /// Of the mirrored image, where the store keeps flipped copies.
    pub flipped: Option<MadeView>,
    /// The encoded image; empty where the store keeps none.
    pub image: Vec<u8>,
}

/// Latent and features of a sample, as [`View`] borrows them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct MadeView {
    /// Moments or latents, as the spec says.
    pub latent: Vec<f32>,
    /// Features by encoder; [tokens, dim] each.
    pub features: Vec<Vec<f16>>,
}

impl Made {
    fn sample(&self) -> Sample<'_> {
        fn view(made: &MadeView) -> View<'_> {
            View { latent: &made.latent, features: &made.features }
        }
        Sample {
            label: self.label,
            view: view(&self.view),
            flipped: self.flipped.as_ref().map(view),
            image: &self.image,
        }
    }
}

/// Makes samples of what was loaded: the models of `data encode`, nothing at all for an import. Called by
/// one thread, in order; gives as many samples as it gets.
pub type Make<'a, Raw> = dyn Fn(Vec<Raw>) -> Result<Vec<Made>, String> + 'a;

/// How to build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildOptions {
    /// Members that are loaded, and made into samples, at once.
    pub batch: usize,
    /// Members of a shard; 0: as many as make about 1 GiB.
    pub shard_len: usize,
    /// How many members may be bad (unreadable, or of values that cannot be stored) and left out.
    pub max_bad: usize,
}

impl Default for BuildOptions {
    fn default() -> Self {
        Self { batch: 32, shard_len: 0, max_bad: 0 }
    }
}

/// A store that was made.
#[derive(Debug, Clone, PartialEq)]
pub struct Built {
    /// What it holds.
    pub index: Index,
    /// Members that are not in it; known on rank 0.
    pub left_out: Vec<LeftOut>,
}

/// Makes the store at `dir`, on all ranks: each makes the shards whose number is its own modulo the world
/// size. `progress` hears, on rank 0, how far all ranks have come.
///
/// # Errors
/// The first rank's [`BuildError`], the same on all ranks. What is done is kept: the same call goes on from
/// there. On several ranks an error in the middle ends the job at once ([`repa_comm::abort`]), since the
/// others would work on for hours.
pub fn build<S: Source>(
    comm: &dyn Communicator,
    source: &S,
    dir: &Path,
    spec: &StoreSpec,
    options: &BuildOptions,
    make: &Make<S::Raw>,
    progress: &mut dyn FnMut(BuildProgress),
) -> Result<Built, RemoteError> {
    let shard_len = if options.shard_len == 0 { spec.default_shard_len() } else { options.shard_len };
    let plan = ShardPlan { members: source.len(), shard_len };
    let begin = || StoreWriter::with_plan(dir, spec.clone(), plan).map_err(BuildError::from);
    let first = if comm.rank() == 0 {
        Some(begin().and_then(|writer| Board::clear(writer.partial()).map(|()| writer)))
    } else {
        None
    };
    let first = agree(comm, first.transpose())?;
    // The others find what rank 0 has begun, and that they were given the same.
    let others = || {
        let partial = super::store::partial_dir(dir);
        if partial.is_dir() { begin() } else { Err(BuildError::NotShared { partial }) }
    };
    let writer = agree(comm, first.map_or_else(others, Ok))?;

    let shards = source.len().div_ceil(shard_len);
    let mut board = Board::new(comm, writer.partial(), source.len());
    let filled = fill(comm, source, &writer, plan, options, make, &mut |n, resumed| {
        board.advance(n, resumed, progress);
    });
    // A rank may be done hours before the last one.
    comm.set_deadline(None);
    if let Err(error) = filled.and_then(|()| board.finish(progress)) {
        if comm.size() > 1 {
            repa_comm::abort(i32::from(error.kind().code()), &error.to_string());
        }
        return agree(comm, Err(error));
    }
    let built =
        agree(comm, if comm.rank() == 0 { finish(&writer, shards, options).map(Some) } else { Ok(None) });
    comm.set_deadline(Some(DEADLINE));
    agree(comm, built?.map_or_else(|| read_back(dir), Ok))
}

/// What the other ranks know of the store when rank 0 has committed it.
fn read_back(dir: &Path) -> Result<Built, BuildError> {
    let store = super::store::LatentStore::open(dir)?;
    Ok(Built { index: store.index().clone(), left_out: Vec::new() })
}

/// All ranks go on, or all end with the first error.
pub(crate) fn agree<T>(comm: &dyn Communicator, local: Result<T, BuildError>) -> Result<T, RemoteError> {
    let failure = |e: BuildError| Failure { message: e.to_string(), code: i32::from(e.kind().code()) };
    all_or_first_error(comm, local.map_err(failure))
}

/// Commits, where not too many members are bad.
fn finish(writer: &StoreWriter, shards: usize, options: &BuildOptions) -> Result<Built, BuildError> {
    let left_out: Vec<LeftOut> =
        (0..shards).filter_map(|n| writer.finished(n)).flat_map(|finished| finished.left_out).collect();
    bound(writer, &left_out, options.max_bad)?;
    Ok(Built { index: writer.commit(shards)?, left_out })
}

/// An error, and a report, where more members are bad than allowed.
fn bound(writer: &StoreWriter, left_out: &[LeftOut], allowed: usize) -> Result<(), BuildError> {
    match left_out.first() {
        Some(first) if left_out.len() > allowed => Err(BuildError::Bad {
            count: left_out.len(),
            allowed,
            first: first.clone(),
            report: writer.report(left_out)?,
        }),
        _ => Ok(()),
    }
}

/// Members of one call, of one shard: the shard's number, the first one's number, what became of each.
struct Chunk<Raw> {
    shard: usize,
    begin: usize,
    loaded: Vec<Result<Raw, Fault>>,
}

/// Makes this rank's shards. `advance` hears how many members are dealt with, and whether an earlier
/// attempt had done so.
fn fill<S: Source>(
    comm: &dyn Communicator,
    source: &S,
    writer: &StoreWriter,
    plan: ShardPlan,
    options: &BuildOptions,
    make: &Make<S::Raw>,
    advance: &mut dyn FnMut(usize, bool),
) -> Result<(), BuildError> {
    let mut todo: Vec<(usize, Range<usize>)> = Vec::new();
    let mut bad: Vec<LeftOut> = Vec::new();
    for shard in (comm.rank()..plan.members.div_ceil(plan.shard_len)).step_by(comm.size()) {
        let members = shard * plan.shard_len..((shard + 1) * plan.shard_len).min(plan.members);
        match writer.finished(shard) {
            // A member that was bad may have been mended since.
            Some(done) if !done.left_out.iter().any(|m| source.load(m.member).is_ok()) => {
                bad.extend(done.left_out);
                advance(members.len(), true);
            }
            _ => todo.push((shard, members)),
        }
    }
    let batch = options.batch.max(1);
    std::thread::scope(|scope| {
        let (sender, chunks) = sync_channel(2);
        let order = todo.clone();
        scope.spawn(move || load(source, &order, batch, &sender));
        let mut finishing: Option<ScopedJoinHandle<Result<ShardEntry, StoreError>>> = None;
        for (number, members) in todo {
            let mut shard = writer.shard(number, members.len())?;
            for _ in 0..members.len().div_ceil(batch) {
                let Some(chunk) = next(&chunks, number) else {
                    return Err(BuildError::Unfit("the loading thread has ended early".to_owned()));
                };
                let count = chunk.loaded.len();
                store(source, writer.spec(), &mut shard, chunk, make, &mut bad)?;
                if bad.len() > options.max_bad.saturating_add(HOPELESS) {
                    bound(writer, &bad, options.max_bad)?;
                }
                advance(count, false);
            }
            // Digest and fsync of a shard go on behind the next one.
            if let Some(before) = finishing.replace(scope.spawn(move || shard.finish())) {
                joined(before)?;
            }
        }
        finishing.map_or(Ok(()), |last| joined(last).map(drop))
    })
}

fn joined<T>(thread: ScopedJoinHandle<Result<T, StoreError>>) -> Result<T, BuildError> {
    match thread.join() {
        Ok(result) => Ok(result?),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

fn next<Raw>(chunks: &Receiver<Chunk<Raw>>, shard: usize) -> Option<Chunk<Raw>> {
    let chunk = chunks.recv().ok()?;
    debug_assert_eq!(chunk.shard, shard, "chunks come in the order of the shards");
    Some(chunk)
}

/// Loads the members of all shards, ahead of need.
fn load<S: Source>(
    source: &S,
    shards: &[(usize, Range<usize>)],
    batch: usize,
    sender: &SyncSender<Chunk<S::Raw>>,
) {
    for (shard, members) in shards {
        for begin in members.clone().step_by(batch) {
            let range = begin..(begin + batch).min(members.end);
            let loaded = range.into_par_iter().map(|i| source.load(i)).collect();
            // The receiver is gone when building has failed: nothing more to load.
            if sender.send(Chunk { shard: *shard, begin, loaded }).is_err() {
                return;
            }
        }
    }
}

/// Makes samples of a chunk and adds them to the shard.
fn store<S: Source>(
    source: &S,
    spec: &StoreSpec,
    shard: &mut ShardWriter,
    chunk: Chunk<S::Raw>,
    make: &Make<S::Raw>,
    bad: &mut Vec<LeftOut>,
) -> Result<(), BuildError> {
    let members = chunk.begin..chunk.begin + chunk.loaded.len();
    let mut leave_out = |shard: &mut ShardWriter, member: usize, fault: Fault| {
        let name = fault.name.unwrap_or_else(|| source.name(member));
        let left_out = LeftOut { member, name, problem: fault.problem };
        shard.leave_out(left_out.clone());
        bad.push(left_out);
    };
    let mut good = Vec::with_capacity(members.len());
    let mut raw = Vec::with_capacity(members.len());
    for (member, loaded) in members.clone().zip(chunk.loaded) {
        match loaded {
            Ok(loaded) => {
                good.push(member);
                raw.push(loaded);
            }
            Err(fault) => leave_out(shard, member, fault),
        }
    }
    if raw.is_empty() {
        return Ok(());
    }
    let made = make(raw).map_err(|problem| BuildError::Models { members: members.clone(), problem })?;
    if made.len() != good.len() {
        let problem = format!("{} samples were made of {}", made.len(), good.len());
        return Err(BuildError::Models { members, problem });
    }
    let checked: Vec<_> = made.par_iter().map(|made| Checked::new(spec, &made.sample())).collect();
    for ((member, made), checked) in good.into_iter().zip(&made).zip(checked) {
        match checked {
            Ok(checked) => shard.push_checked(&made.sample(), &checked)?,
            Err(problem) => leave_out(shard, member, problem.into()),
        }
    }
    Ok(())
}
