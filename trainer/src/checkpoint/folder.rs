//! The folder of a run's checkpoints: beginning, committing, finding and removing them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::xxh3_64;

use super::manifest::{FORMAT, MANIFEST, MANIFEST_DIGEST, Shard, VERSION};
use super::{Array, Checkpoint, CheckpointError, Manifest, Progress, ShardRecord, TensorRecord};
use crate::params::Layout;

const PARTIAL: &str = ".partial";

/// Name of the checkpoint of a step.
pub fn name(step: u64) -> String {
    format!("step-{step:08}")
}

/// Makes the folder in which the checkpoint of `step` grows, empty, and gives its path. Called by one
/// rank, before the others write their shards.
///
/// # Errors
/// The folder cannot be made.
pub fn begin(folder: &Path, step: u64) -> Result<PathBuf, CheckpointError> {
    let dir = growing(folder, step);
    match fs::remove_dir_all(&dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(CheckpointError::write(&dir)(e)),
        _ => {}
    }
    fs::create_dir_all(&dir).map_err(CheckpointError::write(&dir))?;
    Ok(dir)
}

/// Where the checkpoint of a step grows.
pub fn growing(folder: &Path, step: u64) -> PathBuf {
    folder.join(name(step) + PARTIAL)
}

/// Completes a checkpoint whose shards are all on disk: `records` are the ranks' reports, by rank.
/// Called by one rank.
///
/// # Errors
/// The manifest cannot be written, or the folder not renamed.
pub fn commit(
    folder: &Path,
    layout: &Layout,
    progress: Progress,
    config: serde_json::Value,
    records: Vec<ShardRecord>,
) -> Result<PathBuf, CheckpointError> {
    let dir = growing(folder, progress.step);
    let manifest = manifest(layout, progress, config, records);
    let path = dir.join(MANIFEST);
    let text = serde_json::to_vec_pretty(&manifest).expect("a manifest serialises");
    let write = || {
        let digest = format!("{:016x}\n", xxh3_64(&text));
        for (path, bytes) in [(&dir.join(MANIFEST_DIGEST), digest.as_bytes()), (&path, &text)] {
            let mut file = File::create(path)?;
            file.write_all(bytes)?;
            file.sync_all()?;
        }
        File::open(&dir)?.sync_all()
    };
    write().map_err(CheckpointError::write(&path))?;
    let done = folder.join(name(progress.step));
    // The same step may have been saved by a run that was gone on with from an earlier one.
    let old = done.with_extension("old");
    let rename = || {
        if done.exists() {
            fs::rename(&done, &old)?;
        }
        fs::rename(&dir, &done)?;
        File::open(folder)?.sync_all()?;
        if old.exists() { fs::remove_dir_all(&old) } else { Ok(()) }
    };
    rename().map_err(CheckpointError::write(&done))?;
    Ok(done)
}

fn manifest(
    layout: &Layout,
    progress: Progress,
    config: serde_json::Value,
    records: Vec<ShardRecord>,
) -> Manifest {
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
    Manifest {
        format: FORMAT.into(),
        version: VERSION,
        program: env!("CARGO_PKG_VERSION").into(),
        progress,
        world_size,
        config,
        shards,
        tensors,
    }
}

/// What a folder of checkpoints holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listed {
    /// Complete checkpoints by ascending step. Their digests are unread.
    pub steps: Vec<(u64, PathBuf)>,
    /// Folders of saves that were cut short.
    pub unfinished: Vec<PathBuf>,
}

/// Lists a folder of checkpoints; one that does not exist is empty.
///
/// # Errors
/// The folder cannot be read.
pub fn list(folder: &Path) -> Result<Listed, CheckpointError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Listed::default()),
        Err(e) => return Err(CheckpointError::read(folder)(e)),
    };
    let mut listed = Listed::default();
    for entry in entries {
        let path = entry.map_err(CheckpointError::read(folder))?.path();
        let Some(step) = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.strip_prefix("step-"))
        else {
            continue;
        };
        match step.parse() {
            Ok(step) => listed.steps.push((step, path)),
            Err(_) => listed.unfinished.push(path),
        }
    }
    listed.steps.sort();
    listed.unfinished.sort();
    Ok(listed)
}

/// The newest checkpoint whose digests hold, and a message for each newer one that was passed over.
///
/// # Errors
/// The folder cannot be read, or holds checkpoints and none is good.
pub fn latest(folder: &Path) -> Result<(Option<Checkpoint>, Vec<String>), CheckpointError> {
    let listed = list(folder)?;
    let mut problems = Vec::new();
    for (_, path) in listed.steps.iter().rev() {
        let checked = Checkpoint::open(path).and_then(|checkpoint| checkpoint.verify().map(|()| checkpoint));
        match checked {
            Ok(checkpoint) => return Ok((Some(checkpoint), problems)),
            Err(error) => problems.push(error.to_string()),
        }
    }
    if problems.is_empty() {
        Ok((None, problems))
    } else {
        Err(CheckpointError::NoneGood { path: folder.to_owned(), problems: problems.join("; ") })
    }
}

/// Removes all but the last `keep` checkpoints, and what saves that were cut short left behind. Called
/// by one rank, when the newest checkpoint is complete and no save is under way.
///
/// # Errors
/// A folder cannot be removed.
pub fn prune(folder: &Path, keep: usize) -> Result<(), CheckpointError> {
    let listed = list(folder)?;
    let surplus = listed.steps.len().saturating_sub(keep.max(1));
    let old = listed.steps.iter().take(surplus).map(|(_, path)| path);
    for path in old.chain(&listed.unfinished) {
        fs::remove_dir_all(path).map_err(CheckpointError::write(path))?;
    }
    Ok(())
}
