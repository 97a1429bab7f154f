//! What a training step minimises: the interpolant between data and noise, the weighting of its
//! times, the velocity's error and the alignment with frozen encoders.

mod interpolant;
mod losses;
mod resample;
mod scaler;
mod weighting;

pub use interpolant::{Path, interpolate};
pub use losses::{alignment_loss, alignment_of, denoising_loss, similarities};
pub use resample::resample_tokens;
pub use scaler::LossScaler;
pub use weighting::{Weighting, WeightingError};
