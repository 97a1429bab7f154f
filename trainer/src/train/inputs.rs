//! From what the loader reads and draws to what the model sees.

use crate::config::ObjectiveConfig;
use crate::data::loader::Batch;
use crate::data::store::{Index, Kind};

/// Clean latents and times of a rank's samples.
#[derive(Debug, Clone, PartialEq)]
pub struct Inputs {
    /// Normalised latents, drawn from their posteriors where the store holds moments; [B, C, h, w].
    pub latents: Vec<f32>,
    /// Times in [0, 1]; [B].
    pub times: Vec<f32>,
}

impl Inputs {
    /// Makes them from a batch of the store that `index` describes: z = (mean + std eps - shift) scale,
    /// with the reference's order of operations in float32.
    pub fn new(batch: &Batch, index: &Index, objective: &ObjectiveConfig) -> Self {
        let contents = &index.contents;
        let each = contents.latent_len();
        let mut latents = match contents.kind {
            Kind::Latents => batch.latents.clone(),
            Kind::Moments => batch
                .latents
                .chunks_exact(2 * each)
                .zip(batch.posterior_eps.chunks_exact(each))
                .flat_map(|(moments, eps)| {
                    let (mean, std) = moments.split_at(each);
                    mean.iter().zip(std).zip(eps).map(|((mean, std), eps)| mean + std * eps)
                })
                .collect(),
        };
        index.normalisation.apply(&mut latents, contents.height * contents.width);
        let weighting = objective.weighting();
        let times = batch
            .time_uniform
            .iter()
            .zip(&batch.time_normal)
            .map(|(&uniform, &normal)| weighting.time(objective.path, uniform, normal))
            .collect();
        Self { latents, times }
    }
}
