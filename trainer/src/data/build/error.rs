//! Why a store could not be made.

use std::ops::Range;
use std::path::PathBuf;

use crate::data::source::labels::LabelsError;
use crate::data::store::{LeftOut, StoreError};
use crate::exit::Kind;

/// Why a store could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The store cannot be written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// There are no usable labels.
    #[error(transparent)]
    Labels(#[from] LabelsError),
    /// The source is not in the layout.
    #[error("{}: {problem}", path.display())]
    Layout {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it, and what belongs there.
        problem: String,
    },
    /// More members are bad than allowed.
    #[error(
        "{count} members cannot be used, where --max-bad allows {allowed}; the first is {first}. All are listed in \
         {}. Mend them, or allow them with --max-bad {count}: the same command goes on from what is done",
        report.display()
    )]
    Bad {
        /// How many.
        count: usize,
        /// The bound.
        allowed: usize,
        /// The first of them.
        first: LeftOut,
        /// Where all are listed.
        report: PathBuf,
    },
    /// The models failed.
    #[error("encoding members {} to {}: {problem}", members.start, members.end)]
    Models {
        /// The members of the failed call.
        members: Range<usize>,
        /// What went wrong.
        problem: String,
    },
    /// Models and source do not fit together.
    #[error("{0}")]
    Unfit(String),
    /// The ranks do not see one folder.
    #[error(
        "{} is there on rank 0 and not here: all ranks have to write to one file system, so choose a shared \
         folder, or run the command on one host", partial.display()
    )]
    NotShared {
        /// The folder of the unfinished store.
        partial: PathBuf,
    },
}

impl BuildError {
    /// What kind of error it is, for the exit code.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Models { .. } => Kind::Runtime,
            Self::Unfit(_) => Kind::Usage,
            _ => Kind::Data,
        }
    }
}
