//! Checkpoints: sharded by rank, whole or absent, readable on any world size.
//!
//! `step-00050000/` holds `rank-00003-of-00008.safetensors`, one file a rank, and `manifest.json`. What
//! a run has learned is four flat float32 arrays in layout order ([`Array`]); each rank writes an even
//! part of each (a contiguous range, or what it keeps where the optimizer is sharded), cut at tensor
//! boundaries into pieces that carry the reference's parameter names. The manifest says where each piece lies, and gives every shard's digest; its own is in
//! `manifest.xxh3`. Frozen parameters follow from the model and are left out, but for those of an
//! imported checkpoint ([`reference`]), which may differ in their last bits.
//!
//! Where they lie, and how a set of files becomes a checkpoint there, is [`storage`]'s: shards are durable before
//! the manifest is written, and readers trust only a manifest whose digests hold.

mod diff;
mod folder;
mod load;
mod manifest;
mod reader;
pub mod reference;
mod retention;
mod shard;
pub mod storage;
mod stream;
#[cfg(test)]
mod stream_tests;
mod tensors;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

pub use diff::{Difference, TensorDifference, diff};
pub use folder::{Checkpoints, Found, split};
pub use manifest::{About, DataRecord, Manifest, Piece, Progress, ShardRecord, TensorRecord};
pub use reader::Checkpoint;
pub(crate) use reader::Stretch;
pub use retention::Retention;
pub use shard::{Arrays, Frozen, Part};
use storage::ObjectError;
pub use storage::name;
pub use tensors::Tensors;

use crate::exit::Kind;

/// The flat arrays of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Array {
    /// Weights.
    Model,
    /// Moving average of the weights.
    Ema,
    /// AdamW's first moment.
    ExpAvg,
    /// AdamW's second moment.
    ExpAvgSq,
}

impl Array {
    /// All of them, in the order in which a shard holds them.
    pub const ALL: [Array; 4] = [Array::Model, Array::Ema, Array::ExpAvg, Array::ExpAvgSq];

    /// What stands before a parameter's name.
    pub fn prefix(self) -> &'static str {
        match self {
            Array::Model => "model",
            Array::Ema => "ema",
            Array::ExpAvg => "exp_avg",
            Array::ExpAvgSq => "exp_avg_sq",
        }
    }
}

/// Why a checkpoint cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// A file or folder cannot be written.
    #[error("cannot write the checkpoint {path}: {source}{}", advice(source))]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file or folder cannot be read.
    #[error("cannot read the checkpoint {path}: {source}{}", passing(source))]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The checkpoint is damaged.
    #[error("the checkpoint {path} is damaged: {problem}; use an earlier one (`repa-dist checkpoint list`)")]
    Damaged {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The checkpoint is sound and of another model.
    #[error("the checkpoint {path} is of another model: {problem}")]
    Mismatch {
        /// The folder.
        path: PathBuf,
        /// The tensors that differ.
        problem: String,
    },
    /// The checkpoint is sound as far as it is here, and other nodes have the rest on their disks.
    #[error(
        "the checkpoint {path} was saved on disks of the hosts' own, and {missing} of its shards are not here (the \
         first is {first}): copy the other hosts' files into this folder, or go on training on all of them"
    )]
    Elsewhere {
        /// The folder.
        path: PathBuf,
        /// How many shards are not here.
        missing: usize,
        /// One of them.
        first: String,
    },
    /// Checkpoints are there, and none can be read.
    #[error("none of the checkpoints in {path} can be read: {problems}; move them away to begin anew")]
    NoneGood {
        /// The folder.
        path: PathBuf,
        /// What is wrong with each.
        problems: String,
    },
}

/// What to do about a disk; an object store's errors say it themselves.
fn advice(source: &std::io::Error) -> &'static str {
    match ObjectError::of(source) {
        Some(_) => "",
        None => "; free space there, or set run.dir to another disk",
    }
}

/// Whether reading failed for what is there. Otherwise the file system, or the way to it, has failed.
fn is_damage(source: &std::io::Error) -> bool {
    use std::io::ErrorKind::{InvalidData, IsADirectory, NotADirectory, NotFound, UnexpectedEof};
    match ObjectError::of(source) {
        Some(error) => error.kind == Kind::Data,
        None => {
            matches!(source.kind(), NotFound | UnexpectedEof | InvalidData | IsADirectory | NotADirectory)
        }
    }
}

/// What to do where a file could not be read that may be good.
fn passing(source: &std::io::Error) -> &'static str {
    match ObjectError::of(source) {
        None if !is_damage(source) => {
            "; it may be good: start again when the file system is well, or from an earlier one (`--resume STEP`)"
        }
        _ => "",
    }
}

impl CheckpointError {
    /// What kind of error it is, for the exit code.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Read { source, .. } | Self::Write { source, .. } if ObjectError::of(source).is_some() => {
                ObjectError::of(source).map_or(Kind::Data, |error| error.kind)
            }
            // Nobody's restart mends permissions.
            Self::Read { source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied => Kind::Data,
            Self::Read { source, .. } if !is_damage(source) => Kind::Runtime,
            _ => Kind::Data,
        }
    }

    /// Whether the checkpoint may be good all the same: what cannot be reached says nothing of what is there.
    pub(crate) fn may_be_good(&self) -> bool {
        matches!(self, Self::Read { source, .. } if !is_damage(source))
    }

    fn damaged(path: &Path, problem: impl Into<String>) -> Self {
        Self::Damaged { path: path.to_owned(), problem: problem.into() }
    }
}
