//! How far a run's samples are from its data, next to what gives the number a meaning: the untrained
//! model, decoded class means, and one half of the data against the other.

use std::path::Path;

use half::f16;
use repa_comm::{Communicator, RemoteError};
use serde::{Deserialize, Serialize};

use super::rounds::{Rounds, part};
use super::{EvaluationError, GaussianStatistics};
use crate::Device;
use crate::config::Config;
use crate::data::{self, store::LatentStore};
use crate::encoder::VisionEncoder;
use crate::generate::{GenerateError, Generator, Which, same_step};
use crate::images::Image;

/// Images that go through the encoder at once.
const BATCH: usize = 50;

/// Images of the data that an encoder is run on; the samples of usual evaluations are as many.
const MOST_IMAGES: usize = 50_000;

/// Samples of each half of the data that statistics take at once.
const AT_ONCE: usize = 256;

/// Solver steps of the untrained model. Its velocity is exactly zero, since its output layer begins
/// at zero, so that more steps would change nothing.
const UNTRAINED_STEPS: usize = 2;

/// Fréchet distances to the data set, in an encoder's pooled features (mean over patch tokens).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Optimizer steps behind the weights.
    pub step: u64,
    /// Samples, in the classes' proportions in the data.
    pub samples: usize,
    /// Guidance scale of the samples.
    pub cfg_scale: f64,
    /// Of samples from the averaged weights.
    pub trained: f64,
    /// Of samples from the weights before the first step.
    pub untrained: f64,
    /// Of the decoded mean of each class's latents.
    pub class_means: f64,
    /// Of one half of the data from the other.
    pub floor: f64,
}

/// Evaluates a run (a checkpoint of it, by its folder, or else the newest) with `samples` samples, in the
/// features of `encoder`, which the store holds, or images for it. All ranks draw; the evaluation comes out on rank 0.
/// `progress` is told how many samples are drawn, on every rank.
///
/// # Errors
/// The run, its store or its encoder cannot be used: the same on all ranks.
pub fn evaluate_run(
    comm: &dyn Communicator,
    config: &Config,
    encoder: &VisionEncoder,
    (checkpoint, samples): (Option<&Path>, usize),
    device: &Device,
    mut progress: impl FnMut(usize) + Send,
) -> Result<Option<Evaluation>, RemoteError> {
    let first = comm.rank() == 0;
    let opened = part(comm, || {
        let store = data::open(&config.data.dir).map_err(GenerateError::from)?;
        // The data's own sequence of labels, thinned: classes keep their proportions.
        let labels = (0..samples)
            .map(|i| Ok(store.label(i * store.len() / samples)? as usize))
            .collect::<Result<Vec<_>, _>>()
            .map_err(GenerateError::Store)?;
        let generator = Generator::open(config, Which::Ema, checkpoint, device)?;
        let mut initial = config.clone();
        initial.sample.solver.num_steps = UNTRAINED_STEPS;
        let untrained = Generator::open(&initial, Which::Initial, None, device)?;
        Ok((store, labels, generator, untrained))
    });
    let (store, labels, generator, untrained) = opened?;
    same_step(comm, generator.step())?;
    let real = part(comm, || first.then(|| Real::of(&store, encoder)).transpose())?;

    let width = encoder.embed_dim();
    let drawn = |generator: &Generator, progress: &mut (dyn FnMut(usize) + Send)| {
        let mut statistics = GaussianStatistics::new(width);
        let mut done = 0;
        let draw = |numbers: &[u64]| {
            let labels: Vec<usize> = numbers.iter().map(|&number| labels[number as usize]).collect();
            pooled_features(encoder, &generator.of_numbers(numbers, &labels)?)
        };
        let take = |rows: &[f32]| {
            done += rows.len() / width;
            progress(done);
            Ok(statistics.add_f32(rows)?)
        };
        Rounds { count: samples, batch: generator.batch_size() }.rows(comm, width, draw, take)?;
        Ok::<_, RemoteError>(statistics)
    };
    let trained = drawn(&generator, &mut progress)?;
    let untrained = drawn(&untrained, &mut |_| {})?;
    part(comm, || {
        let Some(Real { all: data, halves: [even, odd] }) = &real else { return Ok(None) };
        let of_means = pooled_features(encoder, &class_means(&generator, &store)?)?;
        let mut means = GaussianStatistics::new(width);
        for labels in labels.chunks(AT_ONCE) {
            let rows = labels.iter().flat_map(|&label| &of_means[label * width..][..width]);
            means.add_f32(&rows.copied().collect::<Vec<_>>())?;
        }
        Ok(Some(Evaluation {
            step: generator.step(),
            samples,
            cfg_scale: config.sample.solver.cfg_scale,
            trained: trained.frechet_distance(data)?,
            untrained: untrained.frechet_distance(data)?,
            class_means: means.frechet_distance(data)?,
            floor: even.frechet_distance(odd)?,
        }))
    })
}

/// Statistics of the data's pooled features.
struct Real {
    all: GaussianStatistics,
    /// Of every other sample.
    halves: [GaussianStatistics; 2],
}

impl Real {
    /// By the features of `encoder` that the store holds, or else by `encoder` on its images, evenly spaced where they
    /// are more than [`MOST_IMAGES`].
    fn of(store: &LatentStore, encoder: &VisionEncoder) -> Result<Self, EvaluationError> {
        let contents = &store.index().contents;
        let width = encoder.embed_dim();
        let stored = contents.encoders.iter().position(|stored| stored.id == encoder.id());
        let new = || GaussianStatistics::new(width);
        let mut real = Self { all: new(), halves: [new(), new()] };
        let (mut waiting, mut count) = ([Vec::new(), Vec::new()], 0);
        // Statistics take many samples at a time almost as fast as one.
        let mut add = |pooled: &[f64], at_once: usize| {
            for features in pooled.chunks_exact(width) {
                waiting[count % 2].extend_from_slice(features);
                count += 1;
            }
            if waiting[0].len() >= at_once * width {
                for (half, waiting) in real.halves.iter_mut().zip(&mut waiting) {
                    real.all.add(waiting)?;
                    half.add(waiting)?;
                    waiting.clear();
                }
            }
            Ok::<_, EvaluationError>(())
        };
        if let Some(number) = stored {
            let stored = &contents.encoders[number];
            let mut tokens = vec![f16::ZERO; stored.tokens * stored.dim];
            for i in 0..store.len() {
                store.features(number, i, false, &mut tokens).map_err(GenerateError::from)?;
                add(&pool(tokens.iter().map(|v| v.to_f64()), stored.tokens, stored.dim), AT_ONCE)?;
            }
        } else if contents.images {
            let numbers: Vec<usize> = thinned(store.len(), MOST_IMAGES).collect();
            for numbers in numbers.chunks(BATCH) {
                let images =
                    numbers.iter().map(|&i| stored_image(store, i)).collect::<Result<Vec<_>, _>>()?;
                let pooled = pooled_features(encoder, &images)?;
                add(&pooled.iter().map(|&v| f64::from(v)).collect::<Vec<f64>>(), AT_ONCE)?;
            }
        } else {
            let held: Vec<&str> = contents.encoders.iter().map(|stored| stored.id.as_str()).collect();
            return Err(EvaluationError::Features(format!(
                "the store {} holds neither images nor features of {} to compare with (it has those of {}): name \
                 another encoder, or make the store again with images",
                store.dir().display(),
                encoder.id(),
                if held.is_empty() { "none".to_owned() } else { held.join(", ") }
            )));
        }
        add(&[], 0)?;
        Ok(real)
    }
}

/// Numbers below `len`, evenly spaced, at most `most` of them.
fn thinned(len: usize, most: usize) -> impl Iterator<Item = usize> {
    let count = len.min(most);
    (0..count).map(move |k| (k as u64 * len as u64 / count as u64) as usize)
}

fn stored_image(store: &LatentStore, i: usize) -> Result<Image, EvaluationError> {
    let mut bytes = Vec::new();
    store.image(i, &mut bytes).map_err(GenerateError::from)?;
    Image::from_bytes(&bytes).map_err(|problem| {
        let dir = store.dir().display();
        EvaluationError::Features(format!("the image of sample {i} of {dir} is not readable: {problem}"))
    })
}

/// Pooled features of images, [N, D] flattened.
fn pooled_features(encoder: &VisionEncoder, images: &[Image]) -> Result<Vec<f32>, EvaluationError> {
    let mut pooled = Vec::with_capacity(images.len() * encoder.embed_dim());
    for images in images.chunks(BATCH) {
        let features = encoder.features(images).map_err(|e| EvaluationError::Features(e.to_string()))?;
        let part = features.pooled().into_data().convert::<f32>();
        pooled.extend(part.try_to_vec::<f32>().map_err(|e| EvaluationError::Features(format!("{e:?}")))?);
    }
    Ok(pooled)
}

/// The mean over tokens of [tokens, dim].
fn pool(values: impl Iterator<Item = f64>, tokens: usize, dim: usize) -> Vec<f64> {
    let mut mean = vec![0.0; dim];
    for (i, value) in values.enumerate() {
        mean[i % dim] += value / tokens as f64;
    }
    mean
}

/// One decoded image a class: the mean of its latents.
fn class_means(generator: &Generator, store: &LatentStore) -> Result<Vec<Image>, EvaluationError> {
    let contents = &store.index().contents;
    let size = contents.latent_len();
    let mut sums = vec![vec![0.0f64; size]; contents.classes];
    let mut counts = vec![0usize; contents.classes];
    let mut stored = vec![0.0f32; contents.stored_len()];
    for i in 0..store.len() {
        store.latent(i, false, &mut stored).map_err(GenerateError::from)?;
        let label = store.label(i).map_err(GenerateError::from)? as usize;
        counts[label] += 1;
        // Of moments, the mean comes first.
        sums[label].iter_mut().zip(&stored[..size]).for_each(|(sum, &value)| *sum += f64::from(value));
    }
    let means: Vec<f32> = sums
        .iter()
        .zip(&counts)
        .flat_map(|(sum, &count)| sum.iter().map(move |value| (value / count.max(1) as f64) as f32))
        .collect();
    Ok(generator.decode_raw(means))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_spread_over_all() {
        let of = |len, most| thinned(len, most).collect::<Vec<_>>();
        assert_eq!(of(5, 9), [0, 1, 2, 3, 4]);
        assert_eq!(of(10, 4), [0, 2, 5, 7]);
        assert_eq!(of(0, 4), [0; 0]);
        assert_eq!(thinned(1_281_167, 50_000).last(), Some(1_281_141));
    }
}
