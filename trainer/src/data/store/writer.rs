//! Writing a store: shard by shard, by any number of processes at once, each its own shards. A shard
//! is numbered by the samples it holds, not by who writes it, so that the bytes of a store do not
//! depend on how many did.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::shard_writer::ShardWriter;
use super::{INDEX_FILE, Index, LEFT_OUT_FILE, ShardEntry, StoreError, StoreSpec};

/// What an unfinished store was begun with.
const BEGUN_FILE: &str = "contents.json";

/// How the members of a source are cut into shards: shard `n` holds those from `n * shard_len`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardPlan {
    /// Members of the source.
    pub members: usize,
    /// Members of a shard.
    pub shard_len: usize,
}

/// A member of the source that did not become a sample.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftOut {
    /// Its number in the source.
    pub member: usize,
    /// Its name, or that of the file at fault.
    pub name: String,
    /// What is wrong with it.
    pub problem: String,
}

impl std::fmt::Display for LeftOut {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{} {}", self.name, self.problem)
    }
}

#[derive(Serialize)]
struct Begun<'a> {
    contents: &'a StoreSpec,
    plan: Option<ShardPlan>,
}

/// A finished shard as the unfinished store remembers it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Finished {
    /// What the index will say of it.
    pub entry: ShardEntry,
    /// The members that were meant for it and are not in it.
    pub left_out: Vec<LeftOut>,
}

/// A store in the making, in `<dir>.partial`.
#[derive(Debug)]
pub struct StoreWriter {
    dir: PathBuf,
    partial: PathBuf,
    spec: StoreSpec,
}

impl StoreWriter {
    /// Begins a store that will be `dir`, or goes on with an unfinished one, as
    /// [`StoreWriter::with_plan`] does for shards of any length.
    ///
    /// # Errors
    /// As for [`StoreWriter::with_plan`].
    pub fn create(dir: &Path, spec: StoreSpec) -> Result<Self, StoreError> {
        Self::begin(dir, spec, None)
    }

    /// Begins a store that will be `dir`, or goes on with an unfinished one. Several processes may
    /// do so with the same spec and plan; they write different shards, and one of them commits.
    ///
    /// # Errors
    /// `dir` holds a store already, an unfinished one has another spec or plan, the spec makes no
    /// sense, or the folder cannot be made.
    pub fn with_plan(dir: &Path, spec: StoreSpec, plan: ShardPlan) -> Result<Self, StoreError> {
        Self::begin(dir, spec, Some(plan))
    }

    fn begin(dir: &Path, spec: StoreSpec, plan: Option<ShardPlan>) -> Result<Self, StoreError> {
        spec.check().map_err(|(key, problem)| StoreError::index(dir, key, problem))?;
        if dir.join(INDEX_FILE).exists() {
            return Err(StoreError::Exists { dir: dir.to_owned() });
        }
        let partial = partial_dir(dir);
        fs::create_dir_all(&partial).map_err(StoreError::write(&partial))?;
        let path = partial.join(BEGUN_FILE);
        let begun = Begun { contents: &spec, plan };
        if path.exists() {
            let text = fs::read_to_string(&path).map_err(StoreError::io("read", &path))?;
            if let Some(difference) = difference(&text, &begun) {
                return Err(StoreError::OtherSettings { partial, difference });
            }
        } else {
            write_json(&path, &begun)?;
        }
        Ok(Self { dir: dir.to_owned(), partial, spec })
    }

    /// What the store is to hold.
    #[must_use]
    pub fn spec(&self) -> &StoreSpec {
        &self.spec
    }

    /// The folder in which it grows.
    #[must_use]
    pub fn partial(&self) -> &Path {
        &self.partial
    }

    /// Shard `number`, where it is finished (by this process, another or an earlier one).
    #[must_use]
    pub fn finished(&self, number: usize) -> Option<Finished> {
        let text = fs::read_to_string(self.entry_path(number)).ok()?;
        let finished: Finished = serde_json::from_str(&text).ok()?;
        let size = fs::metadata(self.partial.join(&finished.entry.file)).map_or(0, |m| m.len());
        (finished.entry.samples == 0 || size == finished.entry.bytes).then_some(finished)
    }

    /// Begins shard `number`, of at most `capacity` samples. What an earlier attempt left of it is
    /// overwritten.
    ///
    /// # Errors
    /// The file cannot be made.
    ///
    /// # Panics
    /// If `capacity` is 0 or does not fit a shard (2^32).
    pub fn shard(&self, number: usize, capacity: usize) -> Result<ShardWriter<'_>, StoreError> {
        ShardWriter::new(self, number, capacity)
    }

    pub(super) fn record(
        &self,
        number: usize,
        entry: ShardEntry,
        left_out: Vec<LeftOut>,
    ) -> Result<(), StoreError> {
        write_json(&self.entry_path(number), &Finished { entry, left_out })
    }

    /// Makes the store whole: checks that shards 0 to `shards` - 1 are finished, writes the index and
    /// renames the folder. Shards without samples are left out; members that were left out are listed
    /// in `left-out.json`, if there are any.
    ///
    /// # Errors
    /// A shard is not finished, there is no sample at all, or a file cannot be written.
    pub fn commit(&self, shards: usize) -> Result<Index, StoreError> {
        let mut entries = Vec::with_capacity(shards);
        let mut left_out = Vec::new();
        for number in 0..shards {
            let finished = self.finished(number).ok_or_else(|| StoreError::Unfinished {
                dir: self.dir.clone(),
                partial: self.partial.clone(),
                missing: Some(shard_file(number)),
            })?;
            if finished.entry.samples > 0 {
                entries.push(finished.entry);
            }
            left_out.extend(finished.left_out);
        }
        if entries.is_empty() {
            let problem = "no sample was written: the source is empty, or all of it is bad";
            return Err(StoreError::index(&self.dir.join(INDEX_FILE), "samples", problem));
        }
        let index = Index::new(self.spec.clone(), entries);
        let path = self.partial.join(INDEX_FILE);
        write_json(&path, &index)?;
        // What readers will see: JSON may change the last digit of a float.
        let text = fs::read_to_string(&path).map_err(StoreError::io("read", &path))?;
        let index = Index::parse(&path, &text)?;
        self.report(&left_out)?;
        sync_dir(&self.partial)?;
        // Replaces an empty folder, and fails on one that holds anything.
        fs::rename(&self.partial, &self.dir).map_err(StoreError::write(&self.dir))?;
        sync_dir(self.dir.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")))?;
        // Only now: cut short before, the notes on finished shards are still needed.
        self.remove_leftovers(&index)?;
        Ok(index)
    }

    /// Lists the members that were left out in the unfinished store; no file where there are none.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn report(&self, left_out: &[LeftOut]) -> Result<PathBuf, StoreError> {
        let path = self.partial.join(LEFT_OUT_FILE);
        if !left_out.is_empty() {
            write_json(&path, left_out)?;
        } else if path.exists() {
            fs::remove_file(&path).map_err(StoreError::io("remove", &path))?;
        }
        Ok(path)
    }

    /// Removes what is no part of the finished store: shard entries, the spec, torn shards.
    fn remove_leftovers(&self, index: &Index) -> Result<(), StoreError> {
        for item in fs::read_dir(&self.dir).map_err(StoreError::io("list", &self.dir))? {
            let path = item.map_err(StoreError::io("list", &self.dir))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name != INDEX_FILE && name != LEFT_OUT_FILE && !index.shards.iter().any(|s| s.file == name) {
                fs::remove_file(&path).map_err(StoreError::io("remove", &path))?;
            }
        }
        Ok(())
    }

    fn entry_path(&self, number: usize) -> PathBuf {
        self.partial.join(format!("shard-{number:05}.json"))
    }
}

/// Where `<dir>` grows before it is whole.
pub(in crate::data) fn partial_dir(dir: &Path) -> PathBuf {
    let mut name = dir.as_os_str().to_owned();
    // "data/" and "data" are one folder.
    if let Some(text) = name.to_str() {
        name = text.trim_end_matches('/').into();
    }
    name.push(".partial");
    name.into()
}

pub(super) fn shard_file(number: usize) -> String {
    format!("shard-{number:05}.safetensors")
}

/// The first setting of an unfinished store that differs from what is begun now.
fn difference(text: &str, begun: &Begun) -> Option<String> {
    let Ok(old) = serde_json::from_str::<serde_json::Value>(text) else {
        return Some(format!("{BEGUN_FILE} is damaged"));
    };
    // Through text, as the old one was: serde_json's values hold float32 numbers with other digits.
    let new = serde_json::to_string(begun).expect("plain numbers and strings serialise");
    let new: serde_json::Value = serde_json::from_str(&new).expect("own JSON parses");
    ["contents", "plan"].iter().find_map(|part| {
        let keys = new[part].as_object().into_iter().flatten();
        keys.map(|(key, value)| (key, value, &old[part][key]))
            .find(|(_, value, was)| value != was)
            .map(|(key, value, was)| format!("{key} was {was} and is {value} now"))
    })
}

/// Writes a file as JSON so that it is there as a whole or not at all, even after a power failure.
fn write_json(path: &Path, value: &(impl serde::Serialize + ?Sized)) -> Result<(), StoreError> {
    let text = serde_json::to_string_pretty(value).expect("plain numbers and strings serialise");
    let temporary = path.with_extension(format!("json.{}.tmp", std::process::id()));
    let write = || {
        let file = File::create(&temporary)?;
        file.write_all_at(text.as_bytes(), 0)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().map_err(|e| {
        let _ = fs::remove_file(&temporary);
        StoreError::write(path)(e)
    })
}

/// Makes renames and new files in a folder durable.
pub(in crate::data) fn sync_dir(dir: &Path) -> Result<(), StoreError> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(StoreError::write(dir))
}
