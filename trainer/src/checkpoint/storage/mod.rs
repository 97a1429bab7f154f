//! Where checkpoints lie: what the commit protocol needs of a place, and the places there are.

#[cfg(test)]
mod contract;
mod local;
mod local_sink;
mod object;

use std::fmt::Debug;
use std::io;
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

pub use local::Local;
pub use object::{ObjectError, ObjectStorage, check_url, is_url};

/// What a place holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listed {
    /// Steps of complete checkpoints, ascending. Their digests are unread.
    pub steps: Vec<u64>,
    /// Names of what saves that were cut short have left, and of what is being saved.
    pub unfinished: Vec<String>,
}

/// A place for the checkpoints of one run. A checkpoint is a set of files under one name ([`name`]); it is there
/// with all of them once [`Storage::commit`] has returned, and not at all before.
///
/// All methods may block for as long as the place takes.
pub trait Storage: Send + Sync + Debug {
    /// What messages call a part of the place.
    fn path(&self, part: &str) -> PathBuf;

    /// The folder, where it is one of a file system: hosts may each have another under its name.
    fn folder(&self) -> Option<&Path>;

    /// What is there. A place that does not exist yet is empty.
    ///
    /// # Errors
    /// It cannot be read.
    fn list(&self) -> io::Result<Listed>;

    /// Begins a file of a checkpoint that is not complete yet. What an unfinished save of the same step has left has
    /// to be [discarded](Storage::discard) before.
    ///
    /// # Errors
    /// It cannot be written.
    fn create(&self, step: u64, file: &str) -> io::Result<Box<dyn Sink>>;

    /// Makes the checkpoint of a step complete, with these small files, the last of which is the one that readers
    /// look for. It takes the place of an older one of the same step. `shards` are all files that were created for it,
    /// here and on other hosts.
    ///
    /// # Errors
    /// It cannot be written; the checkpoint is then still unfinished.
    fn commit(&self, step: u64, shards: &[&str], files: &[(&str, &[u8])]) -> io::Result<()>;

    /// Opens a file of a complete checkpoint.
    ///
    /// # Errors
    /// It cannot be read.
    fn open(&self, step: u64, file: &str) -> io::Result<Box<dyn Source>>;

    /// Removes a complete checkpoint.
    ///
    /// # Errors
    /// It cannot be removed.
    fn remove(&self, step: u64) -> io::Result<()>;

    /// Removes what an unfinished save has left, by its name in [`Listed::unfinished`].
    ///
    /// # Errors
    /// It cannot be removed.
    fn discard(&self, unfinished: &str) -> io::Result<()>;

    /// Takes a complete checkpoint out of the list without removing it, and says where it is now.
    ///
    /// # Errors
    /// It cannot be moved.
    fn set_aside(&self, step: u64) -> io::Result<PathBuf>;

    /// When a complete checkpoint, or what an unfinished save has left, was last changed, by its name; None where the
    /// place cannot tell.
    fn changed(&self, entry: &str) -> Option<SystemTime>;
}

/// A file that is being written.
pub trait Sink: Send {
    /// Appends.
    ///
    /// # Errors
    /// The bytes cannot be written.
    fn write(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// Returns once the file is durable.
    ///
    /// # Errors
    /// It is not, and will not be.
    fn finish(self: Box<Self>) -> io::Result<()>;
}

/// A file that is read, by several threads at a time.
pub trait Source: Send + Sync {
    /// Its size in bytes.
    ///
    /// # Errors
    /// The place cannot tell.
    fn size(&self) -> io::Result<u64>;

    /// Fills `out` from an offset in bytes.
    ///
    /// # Errors
    /// The file ends before, or cannot be read.
    fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<()>;

    /// As [`Source::read_at`], into memory that has no values yet. Returns all of `out`.
    ///
    /// # Errors
    /// As there.
    fn read_new<'a>(&self, out: &'a mut [MaybeUninit<u8>], offset: u64) -> io::Result<&'a mut [u8]> {
        out.fill(MaybeUninit::new(0));
        // SAFETY: all of it has a value now.
        let out = unsafe { out.assume_init_mut() };
        self.read_at(out, offset)?;
        Ok(out)
    }

    /// Says that all of it will be read from its beginning to its end.
    fn read_through(&self) {}

    /// Bytes that a read should ask for at least, where it can: with fewer, most of its time goes into the asking.
    fn worth(&self) -> usize {
        1 << 20
    }

    /// Bytes to ask for at a time where all of it is read.
    fn at_once(&self) -> usize {
        2 * self.worth()
    }
}

/// All of a small file.
pub(super) fn read_small(storage: &dyn Storage, step: u64, file: &str) -> io::Result<Vec<u8>> {
    let source = storage.open(step, file)?;
    let size = usize::try_from(source.size()?).map_err(io::Error::other)?;
    let mut bytes = vec![0; size];
    source.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// The place that a path, or a URL `s3://BUCKET/PREFIX`, names.
#[must_use]
pub fn place(location: &Path) -> Arc<dyn Storage> {
    match ObjectStorage::at(location) {
        Some(storage) => Arc::new(storage),
        None => Arc::new(Local::new(location)),
    }
}

/// Name of the checkpoint of a step.
pub fn name(step: u64) -> String {
    format!("step-{step:08}")
}

/// The step of a complete checkpoint's name.
pub fn step_of(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("step-")?;
    // `parse` would take a sign.
    digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok())?
}
