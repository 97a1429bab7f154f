//! How near samples are to data: Fréchet distances in the feature space of an encoder, and the scores of ADM's
//! evaluator, by which papers compare models.

mod batch;
mod frechet;
mod inception;
mod neighbours;
mod rounds;
mod run;
mod scores;

use std::path::PathBuf;

use crate::exit::Kind;
use crate::generate::GenerateError;
pub use batch::Batch;
pub use frechet::{Gaussian, GaussianStatistics, frechet_distance};
pub use inception::{Inception, InceptionFeatures};
pub use run::{Evaluation, evaluate_run};
pub use scores::{Samples, Scores, score};

/// Why an evaluation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvaluationError {
    /// No images could be made.
    #[error(transparent)]
    Generate(#[from] GenerateError),
    /// A figure could not be computed.
    #[error(transparent)]
    Figure(#[from] EvaluateError),
    /// The encoder failed, or the store has no features of it.
    #[error("{0}")]
    Features(String),
    /// A batch of images or statistics cannot be used.
    #[error("{path} {problem}")]
    Batch {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

impl EvaluationError {
    /// What kind of error it is, for the exit code.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Generate(error) => error.kind(),
            Self::Figure(_) => Kind::Runtime,
            Self::Features(_) | Self::Batch { .. } => Kind::Data,
        }
    }
}

impl From<EvaluationError> for repa_comm::Failure {
    fn from(error: EvaluationError) -> Self {
        Self { message: error.to_string(), code: i32::from(error.kind().code()) }
    }
}

/// Why a figure cannot be computed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvaluateError {
    /// Statistics of fewer samples than the figure needs.
    #[error("{count} samples are too few: at least {needed} are needed")]
    TooFew {
        /// How many there are.
        count: u64,
        /// How many it takes.
        needed: u64,
    },
    /// Features of different encoders were put together.
    #[error("features of {a} and of {b} dimensions cannot be compared: they come from different encoders")]
    Dimensions {
        /// Dimensions of the one.
        a: usize,
        /// Dimensions of the other.
        b: usize,
    },
    /// NaN or infinity among the features.
    #[error("feature {dimension} of sample {sample} is {value}")]
    NotFinite {
        /// Which sample, counted from 0 over all that were added.
        sample: usize,
        /// Which of its features.
        dimension: usize,
        /// What it is.
        value: f64,
    },
    /// The eigenvalues of a covariance could not be found.
    #[error("the eigenvalues of the features' covariance did not converge")]
    Eigenvalues,
}
