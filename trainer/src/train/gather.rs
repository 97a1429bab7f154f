//! Finding the checkpoint that all ranks go on from, and reading it, wherever its shards lie.
//!
//! On a shared file system every rank reads what it needs, and digests are checked on the way: each shard's by a rank
//! that reads all of it. Where hosts have disks of their own, each shard is read on a host that has it, and broadcast.

use rayon::prelude::*;
use repa_comm::{Communicator, RemoteError};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use super::placement::Placement;
use super::{Owned, State, TrainError, agree};
use crate::checkpoint::{Array, Checkpoint, CheckpointError, Checkpoints, Stretch};
use crate::flat;
use crate::params::Layout;

/// A checkpoint that all ranks agree on.
#[derive(Debug)]
pub(super) struct Candidate {
    pub(super) checkpoint: Checkpoint,
    /// For each shard, a rank that can read it.
    owners: Vec<usize>,
}

/// What a group's leader sees of one checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Sight {
    step: u64,
    /// Of the manifest, without the place.
    digest: u64,
    /// Numbers of the shards that are there.
    shards: Vec<usize>,
    /// All shards that there should be.
    of: usize,
    /// What is wrong with it, if anything is.
    problem: Option<String>,
}

/// Which checkpoint to look for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    /// The newest.
    Newest,
    /// That of a step.
    Step(u64),
    /// That of a step, or the newest that came of going back to it.
    Branch(u64),
}

impl Wanted {
    fn takes(self, checkpoint: &Checkpoint) -> bool {
        let step = checkpoint.progress().step;
        match self {
            Self::Newest => true,
            Self::Step(wanted) => step == wanted,
            Self::Branch(wanted) => {
                step == wanted || (step > wanted && checkpoint.manifest().branch == Some(wanted))
            }
        }
    }
}

/// What a rank looks for, and what it needs of it.
pub(super) struct Search<'a> {
    pub(super) checkpoints: &'a Checkpoints,
    pub(super) placement: &'a Placement,
    pub(super) wanted: Wanted,
    pub(super) layout: &'a Layout,
    /// What this rank keeps of the optimizer's state.
    pub(super) owned: &'a Owned,
    /// Whether the run may go on from it.
    pub(super) allowed: &'a dyn Fn(&Checkpoint) -> Result<(), TrainError>,
}

/// The newest checkpoint of those that are wanted that is whole over all groups and whose digests hold, and what this
/// rank begins with. Damaged ones are passed over, and told in `said`; None where there is none at all. Called by all
/// ranks. What it begins with takes the place of the state `memory`, if that is large enough.
pub(super) fn find(
    search: &Search,
    mut memory: Option<State>,
    said: &mut Vec<String>,
    comm: &dyn Communicator,
) -> Result<Option<(Checkpoint, State)>, RemoteError> {
    let &Search { checkpoints, placement, wanted, .. } = search;
    let leads = placement.leader == comm.rank();
    let mine = if leads { look(checkpoints, wanted) } else { Ok(Vec::new()) };
    let mine = serde_json::to_vec(&agree(comm, mine.map_err(TrainError::from))?).expect("it serialises");
    let gathered = comm.all_gather_bytes(&mine).map_err(TrainError::from);
    let all: Vec<Vec<Sight>> = agree(comm, gathered)?
        .iter()
        .map(|bytes| serde_json::from_slice(bytes).expect("another rank's sight"))
        .collect();
    let mut steps: Vec<u64> = all.iter().flatten().map(|sight| sight.step).collect();
    steps.sort_unstable();
    steps.dedup();
    let mut problems = Vec::new();
    for &step in steps.iter().rev() {
        let found = match examine(checkpoints, placement, step, &all, comm)? {
            Ok(found) if wanted.takes(&found.checkpoint) => found,
            Ok(_) => continue,
            Err(problem) => {
                problems.push(problem);
                continue;
            }
        };
        agree(comm, (search.allowed)(&found.checkpoint))?;
        match load(&found, search, memory.take(), comm)? {
            Ok(state) => {
                said.extend(problems.iter().map(|p| format!("passed over a checkpoint: {p}")));
                return Ok(Some((found.checkpoint, state)));
            }
            Err(problem) => problems.push(problem),
        }
    }
    let path = checkpoints.location();
    let error = match wanted {
        Wanted::Step(step) | Wanted::Branch(step) => {
            let known: Vec<String> = steps.iter().map(u64::to_string).collect();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            let damaged =
                if problems.is_empty() { String::new() } else { format!(" ({})", problems.join("; ")) };
            let problem = format!(
                "there is no good checkpoint of that step in {}; there are: {known}{damaged}",
                path.display()
            );
            crate::config::ConfigError::value("run.resume", step, problem).into()
        }
        Wanted::Newest if problems.is_empty() => return Ok(None),
        Wanted::Newest => TrainError::from(CheckpointError::NoneGood { path, problems: problems.join("; ") }),
    };
    agree(comm, Err(error))
}

/// What is in the place that this rank sees.
fn look(checkpoints: &Checkpoints, wanted: Wanted) -> Result<Vec<Sight>, CheckpointError> {
    let steps = checkpoints.list()?.steps;
    let opened: Vec<_> = steps
        .iter()
        .map(|&step| {
            let checkpoint = checkpoints.open_any(step)?;
            let missing = checkpoint.missing()?;
            Ok((checkpoint, missing))
        })
        .collect();
    let began =
        |wanted| opened.iter().flatten().any(|(checkpoint, _)| checkpoint.manifest().branch == Some(wanted));
    // Who asks for one step can do without the others, until the run has gone on from there.
    let matters = |step: u64| match wanted {
        Wanted::Newest => true,
        Wanted::Step(wanted) => step == wanted,
        Wanted::Branch(wanted) => step == wanted || (step > wanted && began(wanted)),
    };
    let unreachable = |(step, opened): (&u64, &Result<_, CheckpointError>)| {
        opened.as_ref().is_err_and(|error: &CheckpointError| error.may_be_good()) && matters(*step)
    };
    if let Some(at) = steps.iter().zip(&opened).position(unreachable) {
        return opened
            .into_iter()
            .nth(at)
            .expect("it is one of them")
            .map(|_: (Checkpoint, Vec<usize>)| Vec::new());
    }
    let sight = |(step, opened): (u64, Result<(Checkpoint, Vec<usize>), CheckpointError>)| match opened {
        Ok((checkpoint, missing)) => {
            let of = checkpoint.manifest().shards.len();
            let text = serde_json::to_vec(checkpoint.manifest()).expect("a manifest serialises");
            let shards = (0..of).filter(|n| !missing.contains(n)).collect();
            Sight { step, digest: xxh3_64(&text), shards, of, problem: None }
        }
        Err(error) => Sight { step, digest: 0, shards: Vec::new(), of: 0, problem: Some(error.to_string()) },
    };
    Ok(steps.iter().copied().zip(opened).map(sight).collect())
}

/// Whether a step's checkpoint is all there, and if not, why. Its digests are unread. The same on all ranks.
fn examine(
    checkpoints: &Checkpoints,
    placement: &Placement,
    step: u64,
    all: &[Vec<Sight>],
    comm: &dyn Communicator,
) -> Result<Result<Candidate, String>, RemoteError> {
    let sights: Vec<(usize, &Sight)> = all
        .iter()
        .enumerate()
        .flat_map(|(rank, sights)| sights.iter().filter(|s| s.step == step).map(move |s| (rank, s)))
        .collect();
    if let Some(problem) = sights.iter().find_map(|(_, sight)| sight.problem.clone()) {
        return Ok(Err(problem));
    }
    let path = checkpoints.path(step);
    let (_, first) = sights[0];
    if sights.iter().any(|(_, sight)| sight.digest != first.digest) {
        let problem = format!("the checkpoint {} is another one on each host", path.display());
        return Ok(Err(problem));
    }
    let owner = |n: usize| sights.iter().find(|(_, sight)| sight.shards.contains(&n)).map(|(rank, _)| *rank);
    let owners: Option<Vec<usize>> = (0..first.of).map(owner).collect();
    let Some(owners) = owners else {
        let missing = (0..first.of).filter(|&n| owner(n).is_none()).count();
        let problem = format!("the checkpoint {} lacks {missing} of {} shards", path.display(), first.of);
        return Ok(Err(problem));
    };
    let checkpoint = manifest(checkpoints, step, owners.first().copied(), placement, comm)?;
    Ok(Ok(Candidate { checkpoint, owners }))
}

/// Opens the checkpoint on every rank, also where this rank's host lacks it (a host that has come new).
fn manifest(
    checkpoints: &Checkpoints,
    step: u64,
    owner: Option<usize>,
    placement: &Placement,
    comm: &dyn Communicator,
) -> Result<Checkpoint, RemoteError> {
    if !placement.node_local() {
        return agree(comm, checkpoints.open_any(step).map_err(TrainError::from));
    }
    let root = owner.unwrap_or(0);
    let own = if comm.rank() == root { checkpoints.open_any(step).map(Some) } else { Ok(None) };
    let own = agree(comm, own.map_err(TrainError::from))?;
    let mut text = own.map_or_else(Vec::new, |c| serde_json::to_vec(c.manifest()).expect("it serialises"));
    let sent = comm.broadcast_bytes(&mut text, root).map_err(TrainError::from);
    agree(comm, sent)?;
    let manifest = serde_json::from_slice(&text).expect("another rank's manifest");
    Ok(checkpoints.with_manifest(step, manifest))
}

/// What this rank begins with, or what is wrong with the checkpoint. The same on all ranks.
fn load(
    found: &Candidate,
    search: &Search,
    memory: Option<State>,
    comm: &dyn Communicator,
) -> Result<Result<State, String>, RemoteError> {
    let &Search { placement, layout, owned, .. } = search;
    // The ranks of a group share the work of checking what its leader would read.
    let place = placement.members.iter().position(|&rank| rank == comm.rank()).unwrap_or(0);
    let mine = (0..found.owners.len()).filter(|n| found.owners[*n] == placement.leader);
    let mine: Vec<usize> = mine.skip(place).step_by(placement.members.len()).collect();
    let local = match placement.node_local() {
        true => mine
            .into_par_iter()
            .try_for_each(|n| found.checkpoint.fault(n, &|_| ()).map_or(Ok(()), Err))
            .map(|()| None),
        false => read(&found.checkpoint, layout, owned, &mine, memory).map(Some),
    };
    let local = match local {
        Ok(state) => Ok((state, String::new())),
        // One of another model is no damaged one, and one that cannot be reached now may be good.
        Err(error) if error.may_be_good() || matches!(error, CheckpointError::Mismatch { .. }) => {
            Err(error.into())
        }
        Err(error) => Ok((None, error.to_string())),
    };
    let (state, fault) = agree(comm, local)?;
    let gathered = comm.all_gather_bytes(fault.as_bytes()).map_err(TrainError::from);
    let faults = agree(comm, gathered)?;
    if let Some(fault) = faults.iter().find(|fault| !fault.is_empty()) {
        return Ok(Err(String::from_utf8_lossy(fault).into_owned()));
    }
    match state {
        Some(state) => Ok(Ok(state)),
        None => gathered_state(found, layout, owned, comm).map(Ok),
    }
}

/// Reads what a rank needs from a checkpoint that it sees all of, and checks these shards.
fn read(
    checkpoint: &Checkpoint,
    layout: &Layout,
    owned: &Owned,
    check: &[usize],
    memory: Option<State>,
) -> Result<State, CheckpointError> {
    let whole = Owned::whole(layout.trainable_len());
    let wanted = Array::ALL.map(|array| match array {
        Array::Model => (array, whole.ranges()),
        _ => (array, owned.ranges()),
    });
    let memory = memory.map(|state| [state.params, state.ema, state.exp_avg, state.exp_avg_sq]);
    let arrays = checkpoint.read_checked(layout, wanted, check, memory)?;
    Ok(State::resumed(checkpoint.progress(), owned.clone(), arrays))
}

/// Bytes that travel at a time.
const AT_ONCE: usize = 16 << 20;

/// Takes what a rank needs out of the shards as they are broadcast.
fn gathered_state(
    found: &Candidate,
    layout: &Layout,
    owned: &Owned,
    comm: &dyn Communicator,
) -> Result<State, RemoteError> {
    let Candidate { checkpoint, owners } = found;
    let whole = Owned::whole(layout.trainable_len());
    let ranges = |array| if array == Array::Model { whole.ranges() } else { owned.ranges() };
    let checked = Array::ALL.iter().try_for_each(|&array| checkpoint.check(layout, array));
    agree(comm, checked.map_err(TrainError::from))?;
    let mut wanted: Vec<(usize, Stretch)> = Vec::new();
    let mut arrays =
        Array::ALL.map(|array| flat::zeros(ranges(array).iter().map(std::ops::Range::len).sum()));
    for (number, array) in Array::ALL.into_iter().enumerate() {
        let stretches = checkpoint.stretches(layout, array, ranges(array));
        wanted.extend(stretches.into_iter().map(|stretch| (number, stretch)));
    }
    for (shard, &root) in owners.iter().enumerate() {
        let size = checkpoint.manifest().shards[shard].bytes;
        let mine: Vec<&(usize, Stretch)> = wanted.iter().filter(|(_, s)| s.shard == shard).collect();
        let mut bytes = Vec::new();
        for begin in (0..size).step_by(AT_ONCE) {
            let read = if comm.rank() == root {
                bytes.resize(AT_ONCE.min((size - begin) as usize), 0);
                checkpoint.shard_bytes(shard, begin, &mut bytes)
            } else {
                Ok(())
            };
            agree(comm, read.map_err(TrainError::from))?;
            let sent = comm.broadcast_bytes(&mut bytes, root).map_err(TrainError::from);
            agree(comm, sent)?;
            let end = begin + bytes.len() as u64;
            for (array, stretch) in &mine {
                let last = stretch.offset + (stretch.len * size_of::<f32>()) as u64;
                let (from, to) = (stretch.offset.max(begin), last.min(end));
                if from < to {
                    let out: &mut [u8] = bytemuck::cast_slice_mut(&mut arrays[*array]);
                    let at = stretch.at * size_of::<f32>() + (from - stretch.offset) as usize;
                    out[at..at + (to - from) as usize]
                        .copy_from_slice(&bytes[(from - begin) as usize..(to - begin) as usize]);
                }
            }
        }
    }
    Ok(State::resumed(checkpoint.progress(), owned.clone(), arrays))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{About, Progress, ShardRecord};
    use crate::data::draws::{Draws, Purpose};
    use crate::flat::Flat;
    use crate::model::SitConfig;
    use crate::objective::LossScaler;
    use crate::train::plan::{Cut, Exchange, Plan};
    use crate::train::snapshot::Snapshot;
    use proptest::prelude::*;
    use repa_comm::{Wire, shard_range};
    use std::path::Path;

    fn sit() -> SitConfig {
        SitConfig {
            input_size: 4,
            hidden_size: 32,
            depth: 2,
            num_heads: 2,
            num_classes: 3,
            encoder_depth: 1,
            projector_dim: 16,
            z_dims: vec![12],
            ..SitConfig::preset("SiT-S/2").unwrap()
        }
    }

    /// A job of so many ranks, sharded or not, with buckets of this size.
    type Job = (usize, bool, usize);

    fn owned_by(rank: usize, (world, sharded, bytes): Job) -> Owned {
        let exchange = Exchange { overlap: true, wire: Wire::F32, sharded };
        let plan = Plan::new(&sit(), &sit().layout(), bytes);
        Owned::new(Cut::of(plan, exchange, |len| shard_range(len, rank, world)).owned)
    }

    fn whole(job: Job, states: &[State]) -> [Flat; 4] {
        let len = states[0].params.len();
        let zeros = || flat::zeros(len);
        let mut arrays = [states[0].params.clone(), zeros(), zeros(), zeros()];
        for (rank, state) in states.iter().enumerate() {
            assert_eq!(state.params, arrays[0], "rank {rank}'s weights");
            for range in owned_by(rank, job).ranges() {
                let local = state.owned.local(range);
                for (array, own) in
                    arrays[1..].iter_mut().zip([&state.ema, &state.exp_avg, &state.exp_avg_sq])
                {
                    array[range.clone()].copy_from_slice(&own[local.clone()]);
                }
            }
        }
        arrays
    }

    fn save_all(folder: &Path, states: &[State], (world, sharded, _): Job) -> Vec<u64> {
        let (layout, step, checkpoints) = (sit().layout(), states[0].step, Checkpoints::at(folder));
        let write = |(rank, state)| {
            let snapshot = Snapshot::of(state, sharded, (rank, world));
            checkpoints.write_shard(step, &layout, &snapshot.parts(), &[], (rank, world)).unwrap()
        };
        let records: Vec<ShardRecord> = states.iter().enumerate().map(write).collect();
        let bytes = records.iter().map(|r| r.bytes).collect();
        let progress = Progress { step, samples: 8 * step, updates: step, scaler: LossScaler::default() };
        let config = serde_json::Value::Null;
        let about = About {
            progress,
            config,
            metrics: Default::default(),
            branch: None,
            node_local: false,
            data: None,
        };
        checkpoints.commit(&layout, about, records).unwrap();
        bytes
    }

    fn load_all(folder: &Path, job: Job) -> Vec<State> {
        let found = Checkpoints::at(folder).latest().unwrap().checkpoint.unwrap();
        let shards = found.manifest().shards.len();
        let read = |rank| {
            let mine: Vec<usize> = (rank..shards).step_by(job.0).collect();
            read(&found, &sit().layout(), &owned_by(rank, job), &mine, None).unwrap()
        };
        (0..job.0).map(read).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// Whatever jobs take over from each other, weights, moments and average stay what they were to the bit, and
        /// each rank writes its even part.
        #[test]
        fn resharding_changes_no_bit(
            jobs in prop::collection::vec((1usize..6, any::<bool>(), 1usize..400_000), 1..5),
        ) {
            let folder = tempfile::tempdir().unwrap();
            let layout = sit().layout();
            let random = |number| {
                let mut values = vec![0.0f32; layout.trainable_len()];
                Draws::new(3, Purpose::Noise).normal(number, &mut values);
                values
            };
            let expected = [0, 1, 2, 3].map(|number| flat::copied(&random(number)));
            let [params, ema, exp_avg, exp_avg_sq] = expected.clone();
            let first = Owned::whole(params.len());
            let scaler = LossScaler::default();
            let state =
                State { step: 7, samples: 56, updates: 7, params, owned: first, ema, exp_avg, exp_avg_sq, scaler };
            save_all(folder.path(), &[state], (1, false, 1 << 20));
            for job in jobs {
                let states = load_all(folder.path(), job);
                prop_assert!(whole(job, &states) == expected, "{job:?}");
                let bytes = save_all(folder.path(), &states, job);
                let (least, most) = (*bytes.iter().min().unwrap(), *bytes.iter().max().unwrap());
                // The headers' names are most of what differs in a model as small as this.
                prop_assert!(most - least < 16_384, "{bytes:?}");
            }
        }
    }
}
