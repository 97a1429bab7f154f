//! How images are drawn, after training and while it goes on. Nothing here decides what is learned.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::sample::{Mode, SamplerConfig};

/// Keys under `sample`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SampleConfig {
    /// Samples that go through the model at once.
    pub batch: usize,
    /// Seed of the samples.
    pub seed: u64,
    /// Weight file of the autoencoder that decodes; empty takes the one that the store names.
    pub autoencoder: PathBuf,
    /// Solver and guidance.
    pub solver: SamplerConfig,
    /// Grids that are drawn while a run trains.
    pub training: TrainingSamples,
}

impl Default for SampleConfig {
    fn default() -> Self {
        Self {
            batch: 64,
            seed: 0,
            autoencoder: PathBuf::new(),
            solver: SamplerConfig::default(),
            training: TrainingSamples::default(),
        }
    }
}

/// Keys under `sample.training`: grids of images by the averaged weights, always of the same noise and classes, in the
/// run folder's `samples`. Training waits for them, and they change no bit of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainingSamples {
    /// Steps between grids; 0 for none.
    pub every: u64,
    /// Most classes in a grid, spread over those that there are.
    pub classes: usize,
    /// Images of each class.
    pub per_class: usize,
    /// Steps of Euler's method on the flow; guidance is that of `sample.solver`.
    pub num_steps: usize,
}

impl Default for TrainingSamples {
    fn default() -> Self {
        Self { every: 0, classes: 8, per_class: 2, num_steps: 20 }
    }
}

impl TrainingSamples {
    /// Most images of a grid.
    pub const MOST: usize = 1024;

    /// The solver of grids; `sample` is that of other samples.
    #[must_use]
    pub fn solver(&self, sample: &SamplerConfig) -> SamplerConfig {
        SamplerConfig { mode: Mode::Ode, num_steps: self.num_steps, ..sample.clone() }
    }
}
