//! Checkpoints of the reference's `train.py`: into ours, and ours out under the reference's names.
//!
//! The reference saves one `.pt`: `model` and `ema` (state dictionaries), `opt` (AdamW's), `args` and
//! `steps`. [`import`] makes one of our checkpoints of it, [`export`] writes one of ours as safetensors;
//! there and back no bit changes. Frozen parameters come along: the moving average of one drifts by
//! rounding, so it is kept as it came.

mod export;
mod import;
mod infer;
mod source;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

pub use export::{Contents, MAX_FILE_BYTES, export};
pub use import::{Imported, Options, import};

use super::CheckpointError;
use crate::exit::Kind;
use crate::model::ModelError;
use crate::weights::WeightsError;

/// Why a checkpoint cannot be imported or exported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReferenceError {
    /// The file cannot be read, or is no weight file.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// Our side of it.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The file is readable and no checkpoint of the reference's.
    #[error(
        "{path} is neither a checkpoint of the reference (model, ema, opt, steps) nor weights of its model, which is \
         what can be imported: {problem}"
    )]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What it lacks, or has otherwise.
        problem: String,
    },
    /// Its tensors make no model that is known here.
    #[error("{path} is of another model than the reference's SiT: {problem}")]
    Model {
        /// The file.
        path: PathBuf,
        /// The key and its value.
        problem: ModelError,
    },
    /// Nothing says how many heads the attention has, and the tensors' shapes are the same for any.
    #[error(
        "{path} does not say how many attention heads its model has (args.model is {model}): pass --num-heads N, \
         a divisor of its width {hidden}"
    )]
    NumHeads {
        /// The file.
        path: PathBuf,
        /// `args.model`, as far as it is there.
        model: String,
        /// Width of the model.
        hidden: usize,
    },
    /// There are checkpoints already where one is to be put.
    #[error("{path} holds checkpoints already, up to step {step}: import into another run folder")]
    Occupied {
        /// The folder.
        path: PathBuf,
        /// The last of them.
        step: u64,
    },
    /// The file to be written has a name of another kind.
    #[error("cannot export to {path}: give a file name that ends in .safetensors")]
    Name {
        /// The name.
        path: PathBuf,
    },
    /// The exported file cannot be written.
    #[error("cannot write {path}: {source}; free space there, or write elsewhere with --out FILE")]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
}

impl ReferenceError {
    /// What kind of error it is, for the exit code.
    pub fn kind(&self) -> Kind {
        match self {
            Self::NumHeads { .. } | Self::Occupied { .. } | Self::Name { .. } | Self::Write { .. } => {
                Kind::Usage
            }
            Self::Checkpoint(error) => error.kind(),
            Self::Weights(_) | Self::Foreign { .. } | Self::Model { .. } => Kind::Data,
        }
    }

    fn foreign(path: &Path, problem: impl Into<String>) -> Self {
        Self::Foreign { path: path.to_owned(), problem: problem.into() }
    }
}
