//! Where a sampler's random numbers come from.

use crate::data::draws::{Draws, Purpose};

/// The noise of a stochastic sampler.
pub trait Noise {
    /// Fills `out` ([N, C, H, W], flattened) with the standard normal draws of step `step`.
    fn fill(&self, step: usize, out: &mut [f64]);
}

/// Draws that follow from the seed and each sample's number, so that neither the batch size nor the
/// number of ranks changes a sample.
#[derive(Debug, Clone)]
pub struct DrawnNoise<'a> {
    draws: Draws,
    samples: &'a [u64],
}

impl<'a> DrawnNoise<'a> {
    /// Noise for the samples with these numbers, in the order in which they stand in the batch.
    pub fn new(seed: u64, samples: &'a [u64]) -> Self {
        Self { draws: Draws::new(seed, Purpose::SampleNoise), samples }
    }
}

impl Noise for DrawnNoise<'_> {
    fn fill(&self, step: usize, out: &mut [f64]) {
        assert!(out.len().is_multiple_of(self.samples.len()), "the batch holds other samples");
        let size = out.len() / self.samples.len();
        let first_block = u32::try_from(step * size.div_ceil(4)).expect("fewer than 2^34 draws a sample");
        let mut drawn = vec![0.0f32; size];
        for (&sample, out) in self.samples.iter().zip(out.chunks_exact_mut(size)) {
            self.draws.normal_from(sample, first_block, &mut drawn);
            out.iter_mut().zip(&drawn).for_each(|(to, &from)| *to = f64::from(from));
        }
    }
}

/// Noise drawn elsewhere, such as the reference's: `values` is [steps, N, C, H, W], flattened.
/// Asking for a step that it does not hold is a programming error and panics.
#[derive(Debug, Clone)]
pub struct GivenNoise {
    /// The draws, in the order in which they are used.
    pub values: Vec<f64>,
}

impl Noise for GivenNoise {
    fn fill(&self, step: usize, out: &mut [f64]) {
        out.copy_from_slice(&self.values[step * out.len()..(step + 1) * out.len()]);
    }
}

/// First states [N, C, H, W] (flattened) of the samples with these numbers: standard normal, of
/// `size` = C H W elements each.
pub fn draw_latents(seed: u64, samples: &[u64], size: usize) -> Vec<f64> {
    let draws = Draws::new(seed, Purpose::Sample);
    let mut drawn = vec![0.0f32; size];
    let mut latents = Vec::with_capacity(samples.len() * size);
    for &sample in samples {
        draws.normal(sample, &mut drawn);
        latents.extend(drawn.iter().map(|&v| f64::from(v)));
    }
    latents
}

/// A class below `classes` for each of the samples with these numbers, uniform.
pub fn draw_labels(seed: u64, samples: &[u64], classes: usize) -> Vec<usize> {
    // The last block: the latents' draws count up from the first.
    let draws = Draws::new(seed, Purpose::Sample);
    let label = |sample| (u64::from(draws.words(sample, u32::MAX)[0]) * classes as u64) >> 32;
    samples.iter().map(|&sample| label(sample) as usize).collect()
}
