//! What can be wrong with a store, said so that a user knows what to do.

use std::io;
use std::path::{Path, PathBuf};

/// Why a store cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// There is no store at the path.
    #[error(
        "no data set at {}: it has no index.json. Make the quickstart's with `repa-dist data quickstart`, \
         or name a store that exists", dir.display()
    )]
    Missing {
        /// Where the store was looked for.
        dir: PathBuf,
    },
    /// The store was begun but not finished.
    #[error(
        "the data set {} is not finished: {} holds what is done of it{}. Run the command that makes it \
         again: it goes on where it was stopped", dir.display(), partial.display(),
        missing.as_ref().map(|m| format!(" ({m} is missing)")).unwrap_or_default()
    )]
    Unfinished {
        /// Where the finished store would be.
        dir: PathBuf,
        /// Where its parts are.
        partial: PathBuf,
        /// The first missing part, where it is known.
        missing: Option<String>,
    },
    /// A store is there already.
    #[error("{} holds a data set already: remove it, or write to another folder", dir.display())]
    Exists {
        /// The store.
        dir: PathBuf,
    },
    /// An unfinished store was begun with other settings.
    #[error(
        "{} holds an unfinished data set made with other settings ({difference}): remove that folder to begin \
         anew, or use the same settings to go on", partial.display()
    )]
    OtherSettings {
        /// The unfinished store.
        partial: PathBuf,
        /// What differs.
        difference: String,
    },
    /// A file cannot be read or written.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io {
        /// What was being done: "read", "write", ...
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The disk is full.
    #[error(
        "the disk is full (or the quota used up) while writing {}: free some space and run the same command \
         again; the shards that are finished are kept", path.display()
    )]
    Full {
        /// The file that could not be written.
        path: PathBuf,
    },
    /// The index is not usable.
    #[error("{}: {key}: {problem}", path.display())]
    Index {
        /// The index file.
        path: PathBuf,
        /// The key at fault.
        key: String,
        /// What is wrong with its value, and what to do.
        problem: String,
    },
    /// A shard does not hold what the index says.
    #[error(
        "{}: {problem}. The shard and index.json disagree: copy the data set again or remake it \
         (`repa-dist data verify` lists all such shards)", path.display()
    )]
    Shard {
        /// The shard.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A foreign layout cannot be read in place.
    #[error("{}: {problem}", path.display())]
    Layout {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A file of a foreign layout, read in place, is not what the others are.
    #[error(
        "{} {problem}: mend it, or import the tree with `repa-dist data import`, which can leave files out",
        path.display()
    )]
    Member {
        /// The file, below its archive where it is in one.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A sample that is not fit to be stored.
    #[error("sample {sample} for {}: {problem}", path.display())]
    Sample {
        /// The shard it was meant for.
        path: PathBuf,
        /// Its number in the shard.
        sample: u64,
        /// What is wrong with it.
        problem: String,
    },
    /// The store is sound but not what the configuration needs.
    #[error("the data set {} does not fit the configuration: {problem}", dir.display())]
    Mismatch {
        /// The store.
        dir: PathBuf,
        /// What differs, and which value would fit.
        problem: String,
    },
}

impl StoreError {
    /// An error of the system while reading or otherwise handling `path`.
    pub(crate) fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { doing, path, source }
    }

    /// An error of the system while writing `path`: a full disk is told apart.
    pub(crate) fn write(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full { path },
            _ => Self::Io { doing: "write", path, source },
        }
    }

    pub(super) fn shard(path: &Path, problem: impl Into<String>) -> Self {
        Self::Shard { path: path.to_owned(), problem: problem.into() }
    }

    pub(super) fn index(path: &Path, key: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Index { path: path.to_owned(), key: key.into(), problem: problem.into() }
    }
}
