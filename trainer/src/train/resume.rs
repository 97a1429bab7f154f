//! What a run goes on from: a checkpoint of its own, another run's, weights to start from, or nothing.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use repa_comm::{Communicator, RemoteError, all_gather};
use xxhash_rust::xxh3::xxh3_64;

use super::folder::{RunFolder, checkpoints, claim_checkpoints};
use super::gather::{self, Search, Wanted};
use super::placement::Placement;
use super::{Owned, State, StopRequest, TrainError, agree};
use crate::checkpoint::storage::is_url;
use crate::checkpoint::{Array, Checkpoint, CheckpointError, Checkpoints, DataRecord, Retention, Tensors};
use crate::config::{Config, ConfigError, InitWeights, Loaded, Resume};
use crate::data::store::{EncoderSpec, Index};
use crate::params::Layout;
use crate::weights::Weights;

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

/// Checks that all ranks see the same data and encoders: hosts may have copies, of which one may be stale.
pub(super) fn same_data(config: &Config, index: &Index, comm: &dyn Communicator) -> Result<(), RemoteError> {
    let mut data = index.clone();
    let encoders = encoder_ids(&std::mem::take(&mut data.contents.encoders));
    let digest = xxh3_64(&serde_json::to_vec(&data).expect("an index serialises"));
    let mine = serde_json::to_vec(&(digest, index.samples, &encoders)).expect("it serialises");
    let gathered = comm.all_gather_bytes(&mine).map_err(TrainError::from);
    let local = gathered.and_then(|all| {
        let (theirs, samples, their_encoders): (u64, u64, Vec<String>) =
            serde_json::from_slice(&all[0]).expect("another rank's");
        if theirs != digest {
            let problem = format!(
                "it holds other data than on rank 0 ({} samples, and {samples} there): give all hosts the same",
                index.samples
            );
            return Err(ConfigError::value("data.dir", config.data.dir.display(), problem).into());
        }
        if their_encoders != encoders {
            let problem = format!("rank 0 has {}: give all hosts the same", their_encoders.join(", "));
            return Err(ConfigError::value("alignment.encoders", encoders.join(", "), problem).into());
        }
        Ok(())
    });
    agree(comm, local)
}

fn encoder_ids(encoders: &[EncoderSpec]) -> Vec<String> {
    encoders.iter().map(|encoder| encoder.id.clone()).collect()
}

/// What a checkpoint is compared with besides the configuration.
pub(super) fn of_data(config: &Config, index: &Index) -> DataRecord {
    let aligns = !config.alignment.z_dims.is_empty();
    let encoders = if aligns { encoder_ids(&index.contents.encoders) } else { Vec::new() };
    DataRecord { samples: index.samples, encoders }
}

/// What a rank begins with.
pub(super) struct Beginning {
    /// Rank 0's.
    pub(super) folder: Option<RunFolder>,
    pub(super) checkpoints: Checkpoints,
    /// Of each leader: that of the checkpoints' folder, where it is not in the run folder.
    pub(super) lock: Option<File>,
    pub(super) placement: Placement,
    pub(super) state: State,
    /// The step that the run was sent back to last, if it was.
    pub(super) branch: Option<u64>,
    /// Whether the state is a durable checkpoint of this run.
    pub(super) durable: bool,
    /// What rank 0 should say of it.
    pub(super) said: Vec<String>,
}

/// Takes the run folder, finds what to go on from, and reads it. Called by all ranks.
pub(super) fn begin(
    loaded: &Loaded,
    comm: &dyn Communicator,
    stop: &mut StopRequest,
    layout: &Layout,
    owned: Owned,
    data: &DataRecord,
) -> Result<Beginning, RemoteError> {
    let config = &loaded.config;
    let claimed = if comm.rank() == 0 { claim(config, comm, stop).map(Some) } else { Ok(None) };
    let folder = agree(comm, claimed)?;
    let own = checkpoints(config);
    let placement = Placement::find(&own, comm)?;
    let leads = placement.leader == comm.rank();
    let mut said = Vec::new();
    let apart = leads && !config.checkpoint.dir.as_os_str().is_empty();
    let lock = match own.local_folder() {
        Some(checkpoints) if apart && !same_folder(checkpoints, &config.run.dir) => {
            claim_checkpoints(checkpoints, comm.host()).map(Some)
        }
        _ => Ok(None),
    };
    let lock = agree(comm, lock)?;

    // Of this run's own checkpoints, or of another's where it has none yet.
    let wanted = match config.run.resume {
        Resume::Step(step) => Wanted::Branch(step),
        _ => Wanted::Newest,
    };
    let same = |checkpoint: &Checkpoint| same_run(config, data, checkpoint);
    let allowed = |checkpoint: &Checkpoint| match config.run.resume {
        Resume::Never => Err(refuse(config, checkpoint)),
        _ => same(checkpoint),
    };
    let search =
        Search { checkpoints: &own, placement: &placement, wanted, layout, owned: &owned, allowed: &allowed };
    let mut found = gather::find(&search, None, &mut said, comm)?;
    let durable = found.is_some();
    if let (None, Resume::Path(path)) = (&found, &config.run.resume) {
        let (theirs, wanted) = agree(comm, elsewhere(path))?;
        let placement = Placement::find(&theirs, comm)?;
        let search = Search { checkpoints: &theirs, placement: &placement, wanted, allowed: &same, ..search };
        found = gather::find(&search, None, &mut said, comm)?;
        if found.is_none() {
            let problem = "it holds no checkpoint";
            let error = ConfigError::value("run.resume", path.display(), problem);
            return agree(comm, Err(error.into()));
        }
    }
    let branch = found.as_ref().and_then(|(checkpoint, _)| match wanted {
        Wanted::Branch(step) if checkpoint.progress().step == step => Some(step),
        _ => checkpoint.manifest().branch,
    });
    let state = match found {
        Some((_, state)) => state,
        None => {
            let (state, digest) = agree(comm, fresh(config, layout, owned, &mut said))?;
            same_start(config, digest, comm)?;
            state
        }
    };
    // Nothing else writes there now.
    let tidied = if leads { tidy(config, &own, durable.then_some(state.step)) } else { Ok(Vec::new()) };
    said.extend(agree(comm, tidied.map_err(TrainError::from))?);
    let written = match &folder {
        Some(folder) => {
            let environment = super::environment::describe(comm);
            folder
                .write("config.toml", &super::session::config_text(loaded))
                .and_then(|()| folder.write("environment.json", &format!("{environment:#}\n")))
        }
        None => Ok(()),
    };
    agree(comm, written)?;
    Ok(Beginning { folder, checkpoints: own, lock, placement, state, branch, durable, said })
}

/// Whether two paths lead to one folder, which is locked already then.
fn same_folder(a: &Path, b: &Path) -> bool {
    let identity = |path: &Path| path.metadata().map(|found| (found.dev(), found.ino())).ok();
    identity(a).is_some_and(|a| Some(a) == identity(b))
}

/// Rank 0 takes the run folder.
fn claim(config: &Config, comm: &dyn Communicator, stop: &mut StopRequest) -> Result<RunFolder, TrainError> {
    let folder = RunFolder::claim(&config.run.dir, comm.host())?;
    stop.watch(&config.run.dir).map_err(|source| TrainError::Folder {
        path: config.run.dir.clone(),
        problem: "write to",
        source,
    })?;
    Ok(folder)
}

fn refuse(config: &Config, found: &Checkpoint) -> TrainError {
    let problem = format!(
        "{} holds checkpoints up to step {}: set run.resume=auto to go on from there, or choose another folder with \
         run.dir=PATH",
        config.run.dir.display(),
        found.progress().step
    );
    ConfigError::value("run.resume", "never", problem).into()
}

/// The checkpoints that `run.resume=PATH` means, and which of them.
fn elsewhere(path: &Path) -> Result<(Checkpoints, Wanted), TrainError> {
    if let Some((checkpoints, step)) = crate::checkpoint::split(path) {
        return Ok((checkpoints, Wanted::Step(step)));
    }
    if !path.is_dir() && !is_url(path) {
        let problem = "it is neither auto nor never, nor a step's number, nor a folder that is there";
        return Err(ConfigError::value("run.resume", path.display(), problem).into());
    }
    Ok((super::folder::checkpoints_of(path), Wanted::Newest))
}

/// Leaves only what belongs to the run as it goes on from `step`, its newest checkpoint: later ones, damaged or not,
/// are set aside, unfinished ones cleared away, and what an end before its time left too many of is removed.
fn tidy(config: &Config, own: &Checkpoints, step: Option<u64>) -> Result<Vec<String>, CheckpointError> {
    let mut said = Vec::new();
    if let Some(step) = step {
        let aside = own.set_aside_after(step)?;
        said.extend(aside.iter().map(|path| format!("set aside a later checkpoint: {}", path.display())));
        own.prune(&retention(config), &config.checkpoint.best_metric)?;
    }
    let unfinished = own.discard_unfinished()?;
    said.extend(unfinished.iter().map(|name| format!("cleared away {name}, a save that was cut short")));
    Ok(said)
}

/// What a run keeps.
pub(super) fn retention(config: &Config) -> Retention {
    let keep = &config.checkpoint;
    Retention { last: keep.keep, every: keep.keep_every, best: keep.keep_best }
}

/// Refuses to go on with settings that would change what the run is.
fn same_run(config: &Config, data: &DataRecord, found: &Checkpoint) -> Result<(), TrainError> {
    let now = serde_json::to_value(config).expect("the configuration serialises");
    let mut differing = Vec::new();
    let allowed = |key: &str| config.run.allow_changed.iter().any(|allowed| allowed == key);
    for (key, then, now) in found.manifest().data.iter().flat_map(|then| then.differences(data)) {
        if !allowed(key) {
            differing.push((key.to_owned(), format!("{key} was {then} and is {now}")));
        }
    }
    let default = serde_json::to_value(Config::default()).expect("the configuration serialises");
    compare("", [&found.manifest().config, &default], &now, &mut |key, then, now| {
        let decisive = DECISIVE.iter().any(|part| key.starts_with(part)) && !PLACES.contains(&key);
        if decisive && !allowed(key) {
            differing.push((key.to_owned(), format!("{key} was {then} and is {now}")));
        }
    });
    if differing.is_empty() {
        return Ok(());
    }
    let (keys, sentences): (Vec<String>, Vec<String>) = differing.into_iter().unzip();
    Err(TrainError::OtherRun {
        path: config.run.dir.clone(),
        differing: sentences.join(", "),
        keys: format!("{keys:?}"),
    })
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

/// Checks that all ranks begin with the same weights, where each has read them by itself.
fn same_start(config: &Config, digest: Option<u64>, comm: &dyn Communicator) -> Result<(), RemoteError> {
    let Some(mine) = digest else { return Ok(()) };
    let gathered = all_gather(comm, &[mine]).map_err(TrainError::from);
    let local = gathered.and_then(|all| match all[0] == [mine] {
        true => Ok(()),
        false => {
            let problem = "it holds other weights than on rank 0: give all hosts the same";
            Err(ConfigError::value("run.init_from", config.run.init_from.display(), problem).into())
        }
    });
    agree(comm, local)
}

/// The state before the first step: drawn, or with weights from elsewhere, and then a digest of them.
fn fresh(
    config: &Config,
    layout: &Layout,
    owned: Owned,
    said: &mut Vec<String>,
) -> Result<(State, Option<u64>), TrainError> {
    let from = &config.run.init_from;
    if from.as_os_str().is_empty() {
        return Ok((State::new(layout, config.train.seed, owned), None));
    }
    let mut params = layout.initial_values(config.train.seed);
    let (mut taken, mut left) = (0, Vec::new());
    let source = InitSource::open(from, config.run.init_weights)?;
    for entry in layout.entries().iter().filter(|entry| entry.trainable) {
        match source.values(&entry.name, &entry.shape)? {
            Some(values) => {
                params[entry.offset..entry.offset + entry.len()].copy_from_slice(&values);
                taken += 1;
            }
            None => left.push(entry.name.as_str()),
        }
    }
    if taken == 0 {
        let problem = "none of its tensors has the name and shape of a parameter of this model";
        return Err(ConfigError::value("run.init_from", from.display(), problem).into());
    }
    let mut sentence = format!("start from {taken} of {} tensors of {}", taken + left.len(), from.display());
    if !left.is_empty() {
        let more = if left.len() > 6 { format!(" and {} more", left.len() - 6) } else { String::new() };
        let first: Vec<&str> = left.iter().copied().take(6).collect();
        sentence += &format!("; these keep their first values: {}{more}", first.join(", "));
    }
    said.push(sentence);
    let digest = xxh3_64(bytemuck::cast_slice(&params));
    Ok((State::starting_at(&params, owned), Some(digest)))
}

/// Weights by name, from a checkpoint of ours or a weight file.
enum InitSource {
    Checkpoint(Box<Checkpoint>, Array),
    File(Box<Weights>),
}

impl InitSource {
    fn open(path: &Path, which: InitWeights) -> Result<Self, TrainError> {
        let array = match which {
            InitWeights::Ema => Array::Ema,
            InitWeights::Model => Array::Model,
        };
        let checked = |checkpoint: Checkpoint| {
            checkpoint.verify()?;
            Ok(Self::Checkpoint(Box::new(checkpoint), array))
        };
        if crate::checkpoint::split(path).is_some() {
            return Checkpoint::open(path).and_then(checked).map_err(TrainError::from);
        }
        if path.is_dir() || is_url(path) {
            let found = super::folder::checkpoints_of(path).latest()?;
            if let Some(checkpoint) = found.checkpoint {
                return Ok(Self::Checkpoint(Box::new(checkpoint), array));
            }
            if is_url(path) {
                let problem = "it holds no checkpoint";
                return Err(ConfigError::value("run.init_from", path.display(), problem).into());
            }
        }
        Ok(Self::File(Box::new(Weights::open(path)?)))
    }

    /// None where there is no such tensor, or it has another shape.
    fn values(&self, name: &str, shape: &[usize]) -> Result<Option<Vec<f32>>, TrainError> {
        match self {
            Self::Checkpoint(checkpoint, array) => {
                let tensors = checkpoint.manifest().tensors.get(array);
                let same = tensors.and_then(|t| t.get(name)).is_some_and(|tensor| tensor.shape == shape);
                Ok(if same { Tensors::of(checkpoint).tensor(*array, name)? } else { None })
            }
            Self::File(weights) => match weights.tensors.get(name).filter(|t| t.shape == shape) {
                Some(_) => Ok(Some(weights.f32(name)?)),
                None => Ok(None),
            },
        }
    }
}
