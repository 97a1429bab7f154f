//! What ends a run.

use std::path::PathBuf;

use crate::checkpoint::CheckpointError;
use crate::config::ConfigError;
use crate::data::loader::LoaderError;
use crate::data::store::StoreError;
use crate::exit::Kind;
use crate::telemetry::exporter::ExporterError;
use crate::weights::WeightsError;

/// What ends a run on this rank.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// The configuration cannot work here.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The latent store cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A batch cannot be read.
    #[error(transparent)]
    Loader(#[from] LoaderError),
    /// A checkpoint cannot be read or written.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The metrics endpoint did not start.
    #[error(transparent)]
    Exporter(#[from] ExporterError),
    /// Ranks cannot talk.
    #[error(transparent)]
    Comm(#[from] repa_comm::CommError),
    /// The run folder cannot be used.
    #[error("cannot {problem} the run folder {path}: {source}; free it, or choose another with run.dir=PATH")]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What was tried.
        problem: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Another run has the folder.
    #[error("the run folder {path} is in use by {holder}: wait for it, or choose another with run.dir=PATH")]
    InUse {
        /// The folder.
        path: PathBuf,
        /// Who has it.
        holder: String,
    },
    /// Another run has the folder of the checkpoints.
    #[error(
        "the checkpoints in {path} are those of another run, {holder}: wait for it, or choose another folder with \
         checkpoint.dir=PATH"
    )]
    CheckpointsInUse {
        /// The folder.
        path: PathBuf,
        /// Who has it.
        holder: String,
    },
    /// The folder holds a run that this configuration does not continue.
    #[error(
        "the run folder {path} holds a run with other settings ({differing}): \
         take them over, choose another folder with run.dir=PATH, or change them with run.allow_changed={keys}"
    )]
    OtherRun {
        /// The folder.
        path: PathBuf,
        /// Keys and both values.
        differing: String,
        /// The keys alone, as TOML writes them.
        keys: String,
    },
    /// Too many saves in a row have failed.
    #[error(
        "{count} saves in a row have failed, the last one so: {failure}. The last good checkpoint is {good}; make \
         room there, or set checkpoint.dir to another place, and start again to go on from it"
    )]
    Saves {
        /// How many.
        count: u64,
        /// The last durable checkpoint.
        good: String,
        /// Why the last save failed.
        failure: String,
    },
    /// The run ends, and its last state is not durable.
    #[error(
        "the state after step {step} could not be saved to {path}; the last good checkpoint is {good}: make room there, \
         or set checkpoint.dir to another place, and start again to go on from it"
    )]
    NotSaved {
        /// The last step.
        step: u64,
        /// Where it should have been.
        path: PathBuf,
        /// The last durable checkpoint.
        good: String,
    },
    /// Weights to start from cannot be read.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The gradient was not finite too often in a row.
    #[error(
        "the gradient was not finite in {count} steps in a row; the first was step {step}, samples {first_sample} \
         and up, first seen on rank {rank}. Lower optimizer.learning_rate, or look at those samples"
    )]
    NotFinite {
        /// How many steps.
        count: u64,
        /// The first of them.
        step: u64,
        /// Its first sample.
        first_sample: u64,
        /// The lowest rank whose own gradient was not finite.
        rank: usize,
    },
    /// Signal handlers or threads could not be set up.
    #[error("cannot set up {what}: {problem}")]
    Setup {
        /// What.
        what: &'static str,
        /// Why not.
        problem: String,
    },
}

impl TrainError {
    /// Whether all ranks have it at the same time, because it follows from what all of them know.
    pub(super) fn is_shared(&self) -> bool {
        matches!(self, Self::NotFinite { .. } | Self::Saves { .. } | Self::NotSaved { .. })
    }

    /// What kind of error it is, for the exit code.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Config(_)
            | Self::Folder { .. }
            | Self::InUse { .. }
            | Self::CheckpointsInUse { .. }
            | Self::OtherRun { .. } => Kind::Usage,
            Self::Checkpoint(error) => error.kind(),
            Self::Store(_) | Self::Loader(_) | Self::Weights(_) => Kind::Data,
            Self::Exporter(_)
            | Self::Comm(_)
            | Self::NotFinite { .. }
            | Self::Saves { .. }
            | Self::NotSaved { .. }
            | Self::Setup { .. } => Kind::Runtime,
        }
    }
}
