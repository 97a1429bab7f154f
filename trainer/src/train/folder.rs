//! The run folder: who may write to it, and what it holds.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::TrainError;
use crate::checkpoint::Checkpoints;
use crate::checkpoint::storage::is_url;
use crate::config::Config;

/// A run folder that this process may write to. The lock goes with the value.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    _lock: File,
}

impl RunFolder {
    /// Makes the folder where it is missing, and locks it.
    ///
    /// # Errors
    /// Another run uses the folder, or it cannot be written.
    pub fn claim(path: &Path, host: &str) -> Result<Self, TrainError> {
        match lock(path, host)? {
            Ok(lock) => Ok(Self { path: path.to_owned(), _lock: lock }),
            Err(holder) => Err(TrainError::InUse { path: path.to_owned(), holder }),
        }
    }

    /// Writes a small file; readers see the old one or the new one.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, name: &str, text: &str) -> Result<(), TrainError> {
        let io = |source| TrainError::Folder { path: self.path.clone(), problem: "write to", source };
        let part = self.path.join(format!("{name}.part"));
        std::fs::write(&part, text).map_err(io)?;
        std::fs::rename(&part, self.path.join(name)).map_err(io)
    }
}

/// Takes the folder of a run's checkpoints, where it is not in the run folder: two runs there would clear away each
/// other's. It is held as long as the file is open.
///
/// # Errors
/// Another run has it, or it cannot be written.
pub(super) fn claim_checkpoints(folder: &Path, host: &str) -> Result<File, TrainError> {
    lock(folder, host)?.map_err(|holder| TrainError::CheckpointsInUse { path: folder.to_owned(), holder })
}

/// Makes a folder where it is missing, and locks it; or says who holds it.
fn lock(path: &Path, host: &str) -> Result<Result<File, String>, TrainError> {
    let io = |problem| move |source| TrainError::Folder { path: path.to_owned(), problem, source };
    std::fs::create_dir_all(path).map_err(io("make"))?;
    let lock_path = path.join("lock");
    let mut lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&lock_path)
        .map_err(io("write to"))?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => {
            let mut holder = String::new();
            // The holder's name is a courtesy; the lock itself has spoken.
            let _ = lock.read_to_string(&mut holder);
            return Ok(Err(holder.trim().to_owned()));
        }
        // Lustre without `-o flock`, NFS without lockd: a run there is better than none.
        Err(error) => tracing::warn!(
            "{} cannot be locked ({error}): nothing keeps a second run from writing there",
            lock_path.display()
        ),
    }
    let name = format!("process {} on {host}\n", std::process::id());
    lock.set_len(0)
        .and_then(|()| lock.rewind())
        .and_then(|()| lock.write_all(name.as_bytes()))
        .map_err(io("write to"))?;
    Ok(Ok(lock))
}

/// The checkpoints of a run of this configuration.
pub fn checkpoints(config: &Config) -> Checkpoints {
    match config.checkpoint.dir.as_os_str().is_empty() {
        true => Checkpoints::at(&config.run.dir.join("checkpoints")),
        false => Checkpoints::at(&config.checkpoint.dir),
    }
}

/// The checkpoints of the run in a folder, which its `config.toml` says where to find; without one they are in the
/// folder `checkpoints`, or in the folder itself. Those at a URL, where there are no run folders.
pub fn checkpoints_of(run: &Path) -> Checkpoints {
    if is_url(run) {
        return Checkpoints::at(run);
    }
    #[derive(serde::Deserialize)]
    struct Text {
        #[serde(default)]
        checkpoint: Section,
    }
    #[derive(serde::Deserialize, Default)]
    struct Section {
        #[serde(default)]
        dir: PathBuf,
    }
    let text = std::fs::read_to_string(run.join("config.toml")).unwrap_or_default();
    // What cannot be read says nothing; who needs the rest of it will complain.
    let dir = toml::from_str::<Text>(&text).map(|text| text.checkpoint.dir).unwrap_or_default();
    let inside = run.join("checkpoints");
    if !dir.as_os_str().is_empty() {
        Checkpoints::at(&dir)
    } else if inside.is_dir() || !holds_checkpoints(run) {
        Checkpoints::at(&inside)
    } else {
        Checkpoints::at(run)
    }
}

fn holds_checkpoints(folder: &Path) -> bool {
    Checkpoints::at(folder).list().is_ok_and(|listed| !listed.steps.is_empty())
}

/// Prometheus' target file of a run.
pub fn targets(run: &Path) -> PathBuf {
    run.join("prometheus-targets.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_has_one_owner_at_a_time() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("deep/run");
        let first = RunFolder::claim(&path, "here").expect("free");
        let second = RunFolder::claim(&path, "here").expect_err("taken").to_string();
        assert!(second.contains("in use") && second.contains("process"), "{second}");
        drop(first);
        RunFolder::claim(&path, "here").expect("free again");
    }
}
