//! Samplers: from noise to latents by a trained velocity model, as the reference's
//! `samplers.py` (`euler_sampler`, `euler_maruyama_sampler`) computes them.

mod config;
mod noise;
mod solver;
mod times;

pub use config::{Mode, SamplerConfig};
pub use noise::{DrawnNoise, GivenNoise, Noise, draw_labels, draw_latents};
pub use solver::{Batch, sample};

/// Why samples cannot be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SampleError {
    /// A setting has a value that it cannot have.
    #[error("sampler setting {key} = {value} cannot be used: it must be {wanted}")]
    Config {
        /// The setting.
        key: &'static str,
        /// Its value.
        value: String,
        /// What it must be.
        wanted: &'static str,
    },
    /// A label that the model has no class for.
    #[error("cannot sample class {label}: the model knows 0 to {} (and {null_class} for none)", null_class - 1)]
    Label {
        /// The label.
        label: usize,
        /// The model's null class.
        null_class: usize,
    },
    /// The model's output overflowed, or its weights hold no numbers.
    #[error("the model's velocity at t = {t} is not finite: its weights are damaged or diverged in training")]
    NotFinite {
        /// The time of the evaluation.
        t: f64,
    },
}
