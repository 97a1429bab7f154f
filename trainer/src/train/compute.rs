//! The forward and backward pass of a rank's share of a batch.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use burn::tensor::{DType, Int, Tensor, TensorData};

use super::inputs::Inputs;
use crate::Device;
use crate::config::{AlignmentConfig, Config, ObjectiveConfig};
use crate::data::loader::Batch;
use crate::data::store::Index;
use crate::model::{Precision, Sit, SitConfig};
use crate::objective::{alignment_of, denoising_loss, interpolate, resample_tokens, similarities};
use crate::ops::GradientSink;
use crate::params::Params;

/// Losses of a rank's samples, added up.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LossSums {
    /// Mean squared errors of the velocity.
    pub denoising: f64,
    /// Negative cosine similarities with the encoders' tokens, each a mean over tokens and encoders.
    pub alignment: f64,
}

/// Parts of the unit interval that t is in.
pub const TIMESTEP_PARTS: usize = 4;

/// What there is to tell of a rank's forward and backward passes. On a GPU, work that is queued counts where it is
/// waited for.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Details {
    /// Alignment losses by encoder, added up over the samples.
    pub encoders: Vec<f64>,
    /// Denoising losses by the part of [0, 1] that t is in, added up, and the samples there.
    pub timesteps: [(f64, u64); TIMESTEP_PARTS],
    /// Time to bring the batch to where it is computed with.
    pub upload: Duration,
    /// Time of forward passes, losses and copies of the weights included.
    pub forward: Duration,
    /// Time of backward passes.
    pub backward: Duration,
}

/// Computes gradients on one device.
#[derive(Debug)]
pub struct Compute {
    device: Device,
    index: Index,
    sit: SitConfig,
    objective: ObjectiveConfig,
    precision: Precision,
    alignment: AlignmentConfig,
    global_batch: usize,
    micro_batch: usize,
    /// Whether features go up as they are stored, half as many bytes, and are converted there.
    takes_f16: bool,
}

impl Compute {
    /// For the model and losses of `config`, on `device`, from a store with this index.
    pub fn new(config: &Config, index: &Index, device: &Device) -> Self {
        Self {
            device: device.clone().autodiff(),
            index: index.clone(),
            sit: config.sit(),
            objective: config.objective.clone(),
            precision: config.train.precision,
            alignment: config.alignment.clone(),
            global_batch: config.train.global_batch,
            micro_batch: config.train.micro_batch,
            takes_f16: !config.device.is_cpu() && device.supports_dtype(DType::F16),
        }
    }

    /// Where it computes, with gradients.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Gives `sink` this rank's part of the gradient of `loss_scale` x the mean loss over the *global* batch, in the
    /// step that comes after `steps`, so that the sum over ranks is that gradient, however the batch is cut into ranks
    /// and micro-batches.
    pub fn gradients(
        &self,
        params: &Params,
        batch: &Batch,
        (steps, loss_scale): (u64, f32),
        sink: &Arc<dyn GradientSink>,
    ) -> (LossSums, Details) {
        let mut sums = LossSums::default();
        let mut details = Details { encoders: vec![0.0; self.sit.z_dims.len()], ..Details::default() };
        let samples = batch.len();
        if samples == 0 {
            return (sums, details);
        }
        let begun = Instant::now();
        let inputs = Inputs::new(batch, &self.index, &self.objective);
        details.upload += begun.elapsed();
        let most = if self.micro_batch == 0 { samples } else { self.micro_batch };
        let mut losses = Vec::new();
        for start in (0..samples).step_by(most) {
            let part = start..(start + most).min(samples);
            if part.end == samples {
                sink.last_part();
            }
            let of_part =
                self.part(params, batch, &inputs, part.clone(), (steps, loss_scale), &mut details, sink);
            losses.push((part, of_part));
        }
        // Last of all: on a GPU, whoever reads a number waits for all that was put in its queue before.
        let begun = Instant::now();
        for (part, losses) in losses {
            losses.add_to(&mut sums, &mut details, &inputs.times[part]);
        }
        details.backward += begun.elapsed();
        (sums, details)
    }

    #[expect(clippy::too_many_arguments, reason = "one call site, and a struct would only rename them")]
    fn part(
        &self,
        params: &Params,
        batch: &Batch,
        inputs: &Inputs,
        samples: Range<usize>,
        (steps, loss_scale): (u64, f32),
        details: &mut Details,
        sink: &Arc<dyn GradientSink>,
    ) -> Losses {
        let begun = Instant::now();
        let count = samples.len();
        let (size, channels) = (self.sit.input_size, self.sit.in_channels);
        let each = channels * size * size;
        let images = |values: &[f32]| {
            let part = values[samples.start * each..samples.end * each].to_vec();
            Tensor::<4>::from_data(TensorData::new(part, [count, channels, size, size]), &self.device)
        };
        let times = TensorData::new(inputs.times[samples.clone()].to_vec(), [count]);
        let t = Tensor::<1>::from_data(times, &self.device);
        let labels: Vec<i64> = batch.labels[samples.clone()].iter().map(|&label| i64::from(label)).collect();
        let labels = Tensor::<1, Int>::from_data(TensorData::new(labels, [count]), &self.device);

        let features = if self.aligns() { self.features(batch, samples.clone()) } else { Vec::new() };
        details.upload += begun.elapsed();

        let begun = Instant::now();
        let (x_t, target) =
            interpolate(self.objective.path, images(&inputs.latents), images(&batch.noise), t.clone());
        let output = Sit::bind_watched(&self.sit, params, self.precision, sink).forward(x_t, t, labels);
        let denoising = denoising_loss(output.velocity, target);
        let mut losses =
            Losses { denoising: denoising.clone().inner(), similarities: Vec::new(), alignment: None };
        let mut total = denoising.sum();
        if self.aligns() {
            let similarities = similarities(output.projected, &features);
            losses.similarities = similarities.iter().map(|s| s.clone().inner()).collect();
            let alignment = alignment_of(&similarities);
            losses.alignment = Some(alignment.clone().inner());
            total = total + alignment.sum() * self.alignment.coefficient_after(steps);
        }
        let loss = total * (f64::from(loss_scale) / self.global_batch as f64);
        details.forward += begun.elapsed();
        let begun = Instant::now();
        // All gradients go to the sink, and nothing is left.
        drop(loss.backward());
        details.backward += begun.elapsed();
        losses
    }

    /// Whether there is an alignment loss.
    fn aligns(&self) -> bool {
        !self.sit.z_dims.is_empty()
    }

    /// Each encoder's features of some samples on the model's token grid, [B, tokens, dim].
    fn features(&self, batch: &Batch, samples: Range<usize>) -> Vec<Tensor<3>> {
        let encoders = &self.index.contents.encoders;
        encoders
            .iter()
            .zip(&batch.features)
            .map(|(encoder, values)| {
                let each = encoder.tokens * encoder.dim;
                let part = &values[samples.start * each..samples.end * each];
                let shape = [samples.len(), encoder.tokens, encoder.dim];
                let features = if self.takes_f16 {
                    let data = TensorData::new(part.to_vec(), shape);
                    Tensor::<3>::from_data(data, (&self.device, DType::F16)).cast(DType::F32)
                } else {
                    let part: Vec<f32> = part.iter().map(|v| v.to_f32()).collect();
                    Tensor::from_data(TensorData::new(part, shape), &self.device)
                };
                resample_tokens(features, self.sit.tokens())
            })
            .collect()
    }
}

/// Losses of each sample of a part, where they were computed.
struct Losses {
    denoising: Tensor<1>,
    /// By encoder.
    similarities: Vec<Tensor<1>>,
    alignment: Option<Tensor<1>>,
}

impl Losses {
    /// Adds them up; `times` are the samples' t.
    fn add_to(self, sums: &mut LossSums, details: &mut Details, times: &[f32]) {
        let each = values(self.denoising);
        sums.denoising += each.iter().sum::<f64>();
        for (loss, &t) in each.iter().zip(times) {
            let part = ((t * TIMESTEP_PARTS as f32) as usize).min(TIMESTEP_PARTS - 1);
            details.timesteps[part].0 += loss;
            details.timesteps[part].1 += 1;
        }
        for (sum, similarity) in details.encoders.iter_mut().zip(self.similarities) {
            *sum -= values(similarity).iter().sum::<f64>();
        }
        sums.alignment += self.alignment.map_or(0.0, |alignment| values(alignment).iter().sum());
    }
}

/// A vector's elements in float64, for sums in their order.
fn values(vector: Tensor<1>) -> Vec<f64> {
    let data = vector.into_data().convert::<f32>();
    data.as_slice::<f32>().expect("converted to f32 above").iter().map(|&v| f64::from(v)).collect()
}
