//! Checkpoints of a run: which one it goes on from, and how all ranks save one together.

use std::time::Instant;

use metrics::{counter, histogram};
use repa_comm::{Communicator, RemoteError, shard_range};

use super::folder::{RunFolder, checkpoints};
use super::session::Session;
use super::{Owned, State, StopRequest, TrainError, agree};
use crate::checkpoint::{self, Array, Arrays, Checkpoint, CheckpointError, Part, Progress, ShardRecord};
use crate::config::{Config, ConfigError, Loaded, Resume};
use crate::params::Layout;
use crate::telemetry::names;

/// Sections of the configuration that decide the weights and the data order: a run goes on only with
/// the same.
const DECISIVE: [&str; 6] =
    ["model.", "alignment.", "objective.", "train.seed", "train.global_batch", "data.flip"];

/// Of those, what may be elsewhere on another machine.
const PLACES: [&str; 1] = ["alignment.encoders"];

/// Checks that all ranks have the same settings: they read their files and environments themselves.
pub(super) fn same_settings(loaded: &Loaded, comm: &dyn Communicator) -> Result<(), RemoteError> {
    let mine: Vec<String> =
        loaded.entries().into_iter().map(|(key, value, _)| format!("{key} = {value}")).collect();
    let gathered = comm.all_gather_bytes(mine.join("\n").as_bytes()).map_err(TrainError::from);
    let local = gathered.and_then(|all| {
        let first = String::from_utf8_lossy(&all[0]).into_owned();
        let differing = first.lines().zip(&mine).find(|(theirs, mine)| theirs != mine);
        match differing {
            None => Ok(()),
            Some((theirs, mine)) => {
                let (key, value) = mine.split_once(" = ").unwrap_or((mine, ""));
                let problem =
                    format!("rank 0 has {theirs}; give all ranks the same file, environment and arguments");
                Err(ConfigError::value(key, value, problem).into())
            }
        }
    });
    agree(comm, local)
}

/// Rank 0 takes the run folder, and finds the checkpoint to go on from.
pub(super) fn claim(
    loaded: &Loaded,
    comm: &dyn Communicator,
    stop: &mut StopRequest,
) -> Result<(RunFolder, Option<Checkpoint>), TrainError> {
    let config = &loaded.config;
    let folder = RunFolder::claim(&config.run.dir, comm.host())?;
    stop.watch(&config.run.dir).map_err(|source| TrainError::Folder {
        path: config.run.dir.clone(),
        problem: "write to",
        source,
    })?;
    let (found, passed_over) = checkpoint::latest(&checkpoints(&config.run.dir))?;
    for problem in passed_over {
        eprintln!("repa-dist: passed over a checkpoint: {problem}");
    }
    if let Some(found) = &found {
        if config.run.resume == Resume::Never {
            return Err(ConfigError::value(
                "run.resume",
                "never",
                format!(
                    "{} holds checkpoints up to step {}: set run.resume=auto to go on from there, or choose another \
                     folder with run.dir=PATH",
                    config.run.dir.display(),
                    found.progress().step
                ),
            )
            .into());
        }
        same_run(config, found)?;
    }
    folder.write("config.toml", &super::session::config_text(loaded))?;
    Ok((folder, found))
}

/// Refuses to go on with settings that would change what the run is.
fn same_run(config: &Config, found: &Checkpoint) -> Result<(), TrainError> {
    let now = serde_json::to_value(config).expect("the configuration serialises");
    let mut differing = Vec::new();
    let default = serde_json::to_value(Config::default()).expect("the configuration serialises");
    compare("", [&found.manifest().config, &default], &now, &mut |key, then, now| {
        if DECISIVE.iter().any(|part| key.starts_with(part)) && !PLACES.contains(&key) {
            differing.push(format!("{key} was {then} and is {now}"));
        }
    });
    if differing.is_empty() {
        return Ok(());
    }
    Err(TrainError::OtherRun { path: config.run.dir.clone(), differing: differing.join(", ") })
}

type Json = serde_json::Value;

/// Calls `visit` for every key whose values differ. A key that the older configuration lacks, because the
/// program did not have it then, had its default value.
fn compare(prefix: &str, [then, default]: [&Json; 2], now: &Json, visit: &mut dyn FnMut(&str, &Json, &Json)) {
    match (then, now) {
        (Json::Object(a), Json::Object(b)) => {
            for (key, now) in b {
                let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                let default = default.get(key).unwrap_or(&Json::Null);
                compare(&path, [a.get(key).unwrap_or(default), default], now, visit);
            }
        }
        _ if then != now => visit(prefix, then, now),
        _ => {}
    }
}

/// The state that all ranks begin with: the checkpoint that rank 0 has found, or a new one.
pub(super) fn restore(
    config: &Config,
    comm: &dyn Communicator,
    found: Option<Checkpoint>,
    layout: &Layout,
    owned: Owned,
) -> Result<State, RemoteError> {
    let mut path = found.map_or_else(Vec::new, |c| c.dir().to_string_lossy().into_owned().into_bytes());
    let broadcast = comm.broadcast_bytes(&mut path, 0).map_err(TrainError::from);
    agree(comm, broadcast)?;
    let state = if path.is_empty() {
        Ok(State::new(layout, config.train.seed, owned))
    } else {
        let path = String::from_utf8_lossy(&path).into_owned();
        Checkpoint::open(path.as_ref()).and_then(|checkpoint| load(&checkpoint, layout, owned))
    };
    agree(comm, state.map_err(TrainError::from))
}

/// What a rank begins with that keeps the optimizer's state of `owned`.
fn load(checkpoint: &Checkpoint, layout: &Layout, owned: Owned) -> Result<State, CheckpointError> {
    let progress = checkpoint.progress();
    Ok(State {
        step: progress.step,
        updates: progress.updates,
        scaler: progress.scaler,
        params: checkpoint.read(layout, Array::Model)?,
        ema: checkpoint.read_ranges(layout, Array::Ema, owned.ranges())?,
        exp_avg: checkpoint.read_ranges(layout, Array::ExpAvg, owned.ranges())?,
        exp_avg_sq: checkpoint.read_ranges(layout, Array::ExpAvgSq, owned.ranges())?,
        owned,
    })
}

/// Saves a checkpoint of the session's state: every rank its part, then rank 0 the manifest.
pub(super) fn save(session: &Session, loaded: &Loaded, comm: &dyn Communicator) -> Result<(), RemoteError> {
    let started = Instant::now();
    let config = &loaded.config;
    let state = &session.state;
    let folder = checkpoints(&config.run.dir);
    let begun = if comm.rank() == 0 { checkpoint::begin(&folder, state.step).map(|_| ()) } else { Ok(()) };
    agree(comm, begun.map_err(TrainError::from))?;

    let dir = checkpoint::growing(&folder, state.step);
    let parts = parts(state, session.gradients.sharded(), comm.rank(), comm.size());
    let written = checkpoint::write_shard(&dir, &session.layout, &parts, &[], comm.rank(), comm.size());
    let record = agree(comm, written.map_err(TrainError::from))?;
    let bytes = record.bytes;
    let report = serde_json::to_vec(&record).expect("a record serialises");
    let gathered = comm.all_gather_bytes(&report).map_err(TrainError::from);
    let reports = agree(comm, gathered)?;

    let committed = if comm.rank() == 0 { finish(session, config, &reports) } else { Ok(()) };
    agree(comm, committed.map_err(TrainError::from))?;
    histogram!(names::CHECKPOINT_SECONDS).record(started.elapsed().as_secs_f64());
    counter!(names::CHECKPOINT_BYTES).increment(bytes);
    Ok(())
}

/// What this rank writes: an even part of what all ranks have, and of a sharded optimizer's state what it has.
fn parts(state: &State, sharded: bool, rank: usize, world: usize) -> Vec<Part<'_>> {
    let State { params, ema, exp_avg, exp_avg_sq, owned, .. } = state;
    if !sharded {
        return Arrays { model: params, ema, exp_avg, exp_avg_sq }.parts(rank, world);
    }
    let range = shard_range(params.len(), rank, world);
    let model = Part { array: Array::Model, values: &params[range.clone()], ranges: vec![range] };
    let own = |(array, values)| Part { array, ranges: owned.ranges().to_vec(), values };
    let arrays = [(Array::Ema, &ema[..]), (Array::ExpAvg, exp_avg), (Array::ExpAvgSq, exp_avg_sq)];
    std::iter::once(model).chain(arrays.map(own)).collect()
}

/// Rank 0's part of a save: commits, and removes what is too old.
fn finish(session: &Session, config: &Config, reports: &[Vec<u8>]) -> Result<(), CheckpointError> {
    let state = &session.state;
    let folder = checkpoints(&config.run.dir);
    let records: Vec<ShardRecord> =
        reports.iter().map(|r| serde_json::from_slice(r).expect("another rank's record")).collect();
    let progress = Progress {
        step: state.step,
        samples: state.step * config.train.global_batch as u64,
        updates: state.updates,
        scaler: state.scaler,
    };
    let config_json = serde_json::to_value(config).expect("the configuration serialises");
    checkpoint::commit(&folder, &session.layout, progress, config_json, records)?;
    checkpoint::prune(&folder, config.checkpoint.keep)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::draws::{Draws, Purpose};
    use crate::model::SitConfig;
    use crate::objective::LossScaler;
    use crate::train::buckets::{Exchange, Plan, owned};
    use proptest::prelude::*;
    use repa_comm::Wire;
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
        Owned::new(owned(&plan, exchange, |len| shard_range(len, rank, world)))
    }

    fn whole(job: Job, states: &[State]) -> [Vec<f32>; 4] {
        let len = states[0].params.len();
        let mut arrays = [states[0].params.clone(), vec![0.0; len], vec![0.0; len], vec![0.0; len]];
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
        let (layout, step) = (sit().layout(), states[0].step);
        let dir = checkpoint::begin(folder, step).unwrap();
        let write = |(rank, state)| {
            checkpoint::write_shard(&dir, &layout, &parts(state, sharded, rank, world), &[], rank, world)
                .unwrap()
        };
        let records: Vec<ShardRecord> = states.iter().enumerate().map(write).collect();
        let bytes = records.iter().map(|r| r.bytes).collect();
        let progress = Progress { step, samples: 8 * step, updates: step, scaler: LossScaler::default() };
        checkpoint::commit(folder, &layout, progress, serde_json::Value::Null, records).unwrap();
        bytes
    }

    fn load_all(folder: &Path, job: Job) -> Vec<State> {
        let found = checkpoint::latest(folder).unwrap().0.unwrap();
        (0..job.0).map(|rank| load(&found, &sit().layout(), owned_by(rank, job)).unwrap()).collect()
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
            let expected = [random(0), random(1), random(2), random(3)];
            let [params, ema, exp_avg, exp_avg_sq] = expected.clone();
            let first = Owned::new([0..params.len()]);
            let scaler = LossScaler::default();
            let state = State { step: 7, updates: 7, params, owned: first, ema, exp_avg, exp_avg_sq, scaler };
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
