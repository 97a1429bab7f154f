//! The checkpoints of a run: beginning, committing, finding and removing them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use xxhash_rust::xxh3::xxh3_64;

use super::manifest::{FORMAT, MANIFEST, MANIFEST_DIGEST, Shard, VERSION};
use super::storage::{Listed, Storage, is_url, name, place, step_of};
use super::{
    About, Array, Checkpoint, CheckpointError, Frozen, Manifest, Part, Retention, ShardRecord, TensorRecord,
    shard,
};
use crate::params::Layout;

/// The checkpoints of a run, wherever they lie.
#[derive(Debug, Clone)]
pub struct Checkpoints {
    storage: Arc<dyn Storage>,
}

/// The newest good checkpoint, and what was passed over on the way to it.
#[derive(Debug)]
pub struct Found {
    /// None where there are no checkpoints at all.
    pub checkpoint: Option<Checkpoint>,
    /// A message for each newer one that is damaged.
    pub passed_over: Vec<String>,
}

impl Checkpoints {
    /// Those in a folder, or at a URL `s3://BUCKET/PREFIX`, which need not exist yet.
    #[must_use]
    pub fn at(location: &Path) -> Self {
        Self::of(place(location))
    }

    /// Those in a place.
    #[must_use]
    pub fn of(storage: Arc<dyn Storage>) -> Self {
        Self { storage }
    }

    /// What messages call them.
    #[must_use]
    pub fn location(&self) -> PathBuf {
        self.storage.path("")
    }

    /// Lists them.
    ///
    /// # Errors
    /// The place cannot be read.
    pub fn list(&self) -> Result<Listed, CheckpointError> {
        self.storage.list().map_err(|source| CheckpointError::Read { path: self.location(), source })
    }

    /// What messages call a step's checkpoint.
    #[must_use]
    pub fn path(&self, step: u64) -> PathBuf {
        self.storage.path(&name(step))
    }

    /// When a checkpoint, or what an unfinished save has left, was last changed, by its name; None where the place
    /// cannot tell.
    #[must_use]
    pub fn changed(&self, entry: &str) -> Option<SystemTime> {
        self.storage.changed(entry)
    }

    /// Opens a step's checkpoint.
    ///
    /// # Errors
    /// It is missing or damaged.
    pub fn open(&self, step: u64) -> Result<Checkpoint, CheckpointError> {
        Checkpoint::of(self.storage.clone(), step)
    }

    /// Opens a step's checkpoint, of which other hosts may have shards.
    pub(crate) fn open_any(&self, step: u64) -> Result<Checkpoint, CheckpointError> {
        Checkpoint::with_any_shards(self.storage.clone(), step)
    }

    /// A step's checkpoint whose manifest came from elsewhere.
    pub(crate) fn with_manifest(&self, step: u64, manifest: Manifest) -> Checkpoint {
        Checkpoint::with_manifest(self.storage.clone(), step, manifest)
    }

    /// The folder, if they are in a folder: hosts may have their own under its name.
    pub(crate) fn local_folder(&self) -> Option<&Path> {
        self.storage.folder()
    }

    /// The newest checkpoint whose digests hold.
    ///
    /// # Errors
    /// The place cannot be read, or holds checkpoints and none is good.
    pub fn latest(&self) -> Result<Found, CheckpointError> {
        let mut passed_over = Vec::new();
        for step in self.list()?.steps.into_iter().rev() {
            let checked = self.open(step).and_then(|checkpoint| checkpoint.verify().map(|()| checkpoint));
            match checked {
                Ok(checkpoint) => return Ok(Found { checkpoint: Some(checkpoint), passed_over }),
                Err(error) if error.may_be_good() => return Err(error),
                Err(error) => passed_over.push(error.to_string()),
            }
        }
        if passed_over.is_empty() {
            Ok(Found { checkpoint: None, passed_over })
        } else {
            Err(CheckpointError::NoneGood { path: self.location(), problems: passed_over.join("; ") })
        }
    }

    /// Writes the shard of `rank` and returns once it is durable. One rank may give frozen parameters' values
    /// besides, each whole.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_shard(
        &self,
        step: u64,
        layout: &Layout,
        parts: &[Part],
        frozen: &[Frozen],
        (rank, world): (usize, usize),
    ) -> Result<ShardRecord, CheckpointError> {
        shard::write(self.storage.as_ref(), step, layout, parts, frozen, (rank, world))
    }

    /// Completes a checkpoint whose shards are all durable: `records` are the ranks' reports, by rank. Called by one
    /// rank of all that share the place.
    ///
    /// # Errors
    /// The manifest cannot be written.
    pub fn commit(
        &self,
        layout: &Layout,
        about: About,
        records: Vec<ShardRecord>,
    ) -> Result<(), CheckpointError> {
        let step = about.progress.step;
        let shards: Vec<String> = records.iter().map(|record| record.file.clone()).collect();
        let text = serde_json::to_vec_pretty(&manifest(layout, about, records)).expect("it serialises");
        let digest = format!("{:016x}\n", xxh3_64(&text));
        let shards: Vec<&str> = shards.iter().map(String::as_str).collect();
        self.storage
            .commit(step, &shards, &[(MANIFEST_DIGEST, digest.as_bytes()), (MANIFEST, &text)])
            .map_err(|source| CheckpointError::Write { path: self.path(step), source })
    }

    /// Clears away what saves that were cut short, or failed, have left. Called by one rank of all that share the
    /// place, while no save is under way.
    ///
    /// # Errors
    /// Something cannot be removed.
    pub fn discard_unfinished(&self) -> Result<Vec<String>, CheckpointError> {
        let unfinished = self.list()?.unfinished;
        for entry in &unfinished {
            let error = |source| CheckpointError::Write { path: self.storage.path(entry), source };
            self.storage.discard(entry).map_err(error)?;
        }
        Ok(unfinished)
    }

    /// Removes the checkpoints that `retention` does not keep; `metric` is what the best are chosen by. Called by
    /// one rank of all that share the place, when the newest checkpoint is complete.
    ///
    /// # Errors
    /// One cannot be removed.
    pub fn prune(&self, retention: &Retention, metric: &str) -> Result<(), CheckpointError> {
        // The manifest says it, also where other hosts have the shards. A damaged one is nobody's best; one that
        // cannot be reached may be.
        let mut unknown = Vec::new();
        let mut saved: Vec<(u64, Option<f64>)> = Vec::new();
        for step in self.list()?.steps {
            let manifest = if retention.best > 0 { self.open_any(step).map(Some) } else { Ok(None) };
            let metric = match manifest {
                Ok(checkpoint) => checkpoint.and_then(|c| c.manifest().metrics.get(metric).copied()),
                Err(error) => {
                    if error.may_be_good() {
                        unknown.push(step);
                    }
                    None
                }
            };
            saved.push((step, metric));
        }
        for step in retention.surplus(&saved).into_iter().filter(|step| !unknown.contains(step)) {
            let error = |source| CheckpointError::Write { path: self.path(step), source };
            self.storage.remove(step).map_err(error)?;
        }
        Ok(())
    }

    /// Takes the checkpoints after a step out of the list, and says where they are now.
    ///
    /// # Errors
    /// One cannot be moved.
    pub fn set_aside_after(&self, step: u64) -> Result<Vec<PathBuf>, CheckpointError> {
        let later = self.list()?.steps.into_iter().filter(|&s| s > step);
        later
            .map(|step| {
                let error = |source| CheckpointError::Write { path: self.path(step), source };
                self.storage.set_aside(step).map_err(error)
            })
            .collect()
    }
}

/// The checkpoints and the step that the path or URL of one checkpoint names: `…/step-00050000`.
pub fn split(path: &Path) -> Option<(Checkpoints, u64)> {
    let step = step_of(path.file_name()?.to_str()?)?;
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if is_url(path) && !is_url(parent) {
        // A bucket of such a name.
        return None;
    }
    Some((Checkpoints::at(parent), step))
}

fn manifest(layout: &Layout, about: About, records: Vec<ShardRecord>) -> Manifest {
    let mut tensors: BTreeMap<Array, BTreeMap<String, TensorRecord>> = BTreeMap::new();
    let world_size = records.len();
    let mut shards = Vec::with_capacity(world_size);
    for record in records {
        for (array, number, piece) in record.pieces {
            let entry = &layout.entries()[number];
            let empty =
                || TensorRecord { dtype: "F32".into(), shape: entry.shape.clone(), pieces: Vec::new() };
            let tensors = tensors.entry(array).or_default();
            tensors.entry(entry.name.clone()).or_insert_with(empty).pieces.push(piece);
        }
        shards.push(Shard { file: record.file, bytes: record.bytes, xxh3: record.xxh3 });
    }
    for tensor in tensors.values_mut().flat_map(BTreeMap::values_mut) {
        tensor.pieces.sort_by_key(|piece| piece.start);
    }
    let About { progress, config, metrics, branch, node_local, data } = about;
    Manifest {
        format: FORMAT.into(),
        version: VERSION,
        program: env!("CARGO_PKG_VERSION").into(),
        progress,
        world_size,
        node_local,
        branch,
        data,
        metrics,
        config,
        shards,
        tensors,
    }
}
