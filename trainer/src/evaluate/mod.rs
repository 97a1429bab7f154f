//! How near samples are to data: Fréchet distances, precision and recall, in the feature space of an
//! encoder.

mod frechet;
mod neighbours;
mod run;

pub use frechet::{GaussianStatistics, frechet_distance};
pub use neighbours::{PrecisionRecall, precision_recall};
pub use run::{Evaluation, EvaluationError, evaluate_run};

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
        /// Which sample, counted from 0 within the batch.
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
