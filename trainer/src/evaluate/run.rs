//! How far a run's samples are from its data, next to what gives the number a meaning: the untrained
//! model, decoded class means, and one half of the data against the other.

use half::f16;
use serde::{Deserialize, Serialize};

use super::{EvaluateError, GaussianStatistics};
use crate::Device;
use crate::config::Config;
use crate::data::{self, store::LatentStore};
use crate::encoder::VisionEncoder;
use crate::generate::{GenerateError, Generator, Which};
use crate::images::Image;

/// Images that go through the encoder at once.
const BATCH: usize = 50;

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

/// Why an evaluation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvaluationError {
    /// No images could be made.
    #[error(transparent)]
    Generate(#[from] GenerateError),
    /// The distances could not be computed.
    #[error(transparent)]
    Distance(#[from] EvaluateError),
    /// The encoder failed, or the store has no features of it.
    #[error("{0}")]
    Features(String),
}

/// Evaluates a run with `samples` samples; `encoder` must be the one whose features the store holds
/// first. `progress` is told how many samples are drawn.
///
/// # Errors
/// The run, its store or its encoder cannot be used.
pub fn evaluate_run(
    config: &Config,
    encoder: &VisionEncoder,
    samples: usize,
    device: &Device,
    mut progress: impl FnMut(usize),
) -> Result<Evaluation, EvaluationError> {
    let store = data::open(&config.data.dir).map_err(GenerateError::from)?;
    let real = stored_features(&store)?;
    let data = GaussianStatistics::of(&real.concat(), encoder.embed_dim())?;
    // The data's own sequence of labels, thinned: classes keep their proportions.
    let labels = (0..samples)
        .map(|i| Ok(store.label(i * store.len() / samples)? as usize))
        .collect::<Result<Vec<_>, _>>()
        .map_err(GenerateError::Store)?;

    let generator = Generator::open(config, Which::Ema, device)?;
    let mut initial = config.clone();
    initial.sample.solver.num_steps = UNTRAINED_STEPS;
    let untrained = Generator::open(&initial, Which::Initial, device)?;
    let (even, odd): (Vec<_>, Vec<_>) = real.iter().enumerate().partition(|(i, _)| i % 2 == 0);
    let half = |part: &[(usize, &Vec<f64>)]| {
        let features: Vec<f64> = part.iter().flat_map(|(_, f)| f.iter().copied()).collect();
        GaussianStatistics::of(&features, encoder.embed_dim())
    };
    let distance = |features: &Features, progress: &mut dyn FnMut(usize)| -> Result<f64, EvaluationError> {
        let mut statistics = GaussianStatistics::new(encoder.embed_dim());
        for (number, part) in labels.chunks(config.sample.batch).enumerate() {
            let first = number * config.sample.batch;
            statistics.add_f32(&features(first, part)?)?;
            progress(first + part.len());
        }
        Ok(statistics.frechet_distance(&data)?)
    };
    let drawn = |generator: &Generator, first: usize, labels: &[usize]| {
        pooled_features(encoder, &generator.images(labels, first as u64, |_| {})?)
    };
    let of_means = pooled_features(encoder, &class_means(&generator, &store)?)?;
    let of_mean = |label: &usize| &of_means[label * encoder.embed_dim()..][..encoder.embed_dim()];
    let nobody = &mut |_| {};
    Ok(Evaluation {
        step: generator.step(),
        samples,
        cfg_scale: config.sample.solver.cfg_scale,
        trained: distance(&|first, labels| drawn(&generator, first, labels), &mut progress)?,
        untrained: distance(&|first, labels| drawn(&untrained, first, labels), nobody)?,
        class_means: distance(&|_, labels| Ok(labels.iter().flat_map(of_mean).copied().collect()), nobody)?,
        floor: half(&even)?.frechet_distance(&half(&odd)?)?,
    })
}

/// The pooled features of the images of these labels, the first of which has this number.
type Features<'a> = dyn Fn(usize, &[usize]) -> Result<Vec<f32>, EvaluationError> + 'a;

/// Pooled features of every sample of a store, by its first encoder.
fn stored_features(store: &LatentStore) -> Result<Vec<Vec<f64>>, EvaluationError> {
    let Some(encoder) = store.index().contents.encoders.first() else {
        return Err(EvaluationError::Features(format!(
            "the store {} holds no encoder features to compare with: make it again with features",
            store.dir().display()
        )));
    };
    let mut tokens = vec![f16::ZERO; encoder.tokens * encoder.dim];
    (0..store.len())
        .map(|i| {
            store.features(0, i, false, &mut tokens).map_err(GenerateError::from)?;
            Ok(pool(tokens.iter().map(|v| v.to_f64()), encoder.tokens, encoder.dim))
        })
        .collect()
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
