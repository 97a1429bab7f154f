//! Trains the quickstart's autoencoder: the TAESD family's architecture at small width, on 64 x 64
//! Twemoji. `trainer/assets/quickstart-autoencoder.md` says what came of it.
//!
//!     cargo run --release -p repa-trainer --example train_autoencoder -- --out FILE --steps N --seed S

mod conv;
mod network;

use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use burn::tensor::Device;
use conv::Planes;
use half::f16;
use network::Network;
use rayon::prelude::*;
use repa_trainer::autoencoder::taesd::{Taesd, TaesdConfig};
use repa_trainer::data::draws::{Draws, Purpose};
use repa_trainer::data::emoji;
use repa_trainer::images::{self, Image};
use repa_trainer::params::{Layout, Params};
use safetensors::tensor::{Dtype, TensorView, serialize};

const BATCH: usize = 4;
const PEAK_RATE: f64 = 2e-3;
const WARM_UP: usize = 100;
/// Noise added to latents of unit variance, so that a diffusion model's small errors decode well.
const LATENT_NOISE: f32 = 0.05;
/// Weight of (mean square of a latent channel - 1)^2.
const UNIT_VARIANCE: f64 = 0.01;
/// Weight of the absolute error beside the squared one.
const ABSOLUTE: f32 = 0.1;
/// Images are moved by up to this many pixels.
const SHIFT: i64 = 4;
const REPORT_EVERY: usize = 500;

fn main() -> Result<(), Box<dyn Error>> {
    let options = Options::parse()?;
    let config = TaesdConfig {
        latent_channels: 4,
        widths: vec![16, 32, 48],
        encoder_blocks: vec![0, 1, 2],
        decoder_blocks: vec![1, 1, 2],
        mid_group_norm: false,
    };
    let layout = Arc::new(config.layout());
    let (held_out, training): (Vec<_>, Vec<_>) = emoji::all().into_iter().partition(emoji::held_out);
    let draw = |list: &[emoji::Emoji]| list.iter().map(emoji::Emoji::image).collect::<Vec<_>>();
    let (training, held_out) = (draw(&training), draw(&held_out));
    println!(
        "{} training images, {} held out, {} parameters",
        training.len(),
        held_out.len(),
        layout.total_len()
    );

    let mut trainer = Trainer::new(config, layout, options.seed);
    let begin = Instant::now();
    let mut sum = 0.0;
    for step in 0..options.steps {
        let batch = augmented_batch(&training, options.seed, step);
        sum += trainer.step(&batch, step, options.steps, options.seed);
        if (step + 1) % REPORT_EVERY == 0 || step + 1 == options.steps {
            let psnr = trainer.psnr(&held_out[..held_out.len().min(24)]);
            let seconds = begin.elapsed().as_secs_f64();
            println!(
                "step {:6} of {}: loss {:.5}, held-out PSNR {psnr:.2} dB, {seconds:.0} s",
                step + 1,
                options.steps,
                sum / REPORT_EVERY as f64
            );
            sum = 0.0;
        }
        if (step + 1) % (4 * REPORT_EVERY) == 0 {
            trainer.save(&options, &training, &held_out)?;
        }
    }
    trainer.save(&options, &training, &held_out)
}

struct Options {
    out: PathBuf,
    steps: usize,
    seed: u64,
}

impl Options {
    fn parse() -> Result<Self, Box<dyn Error>> {
        let mut options = Self { out: PathBuf::new(), steps: 4000, seed: 0 };
        let mut arguments = std::env::args().skip(1);
        while let Some(name) = arguments.next() {
            let value = arguments.next().ok_or_else(|| format!("{name} needs a value"))?;
            match name.as_str() {
                "--out" => options.out = value.into(),
                "--steps" => options.steps = value.parse().map_err(|e| format!("--steps {value}: {e}"))?,
                "--seed" => options.seed = value.parse().map_err(|e| format!("--seed {value}: {e}"))?,
                _ => return Err(format!("unknown option {name}; known: --out, --steps, --seed").into()),
            }
        }
        if options.out.as_os_str().is_empty() {
            return Err("--out FILE is missing".into());
        }
        Ok(options)
    }
}

/// The batch of a step: images drawn with replacement, mirrored, moved, and now and then with their
/// colour channels in another order. Everything follows from seed and step.
fn augmented_batch(training: &[Image], seed: u64, step: usize) -> Vec<Image> {
    let draws = Draws::new(seed, Purpose::Augment);
    (0..BATCH)
        .map(|i| {
            let mut u = [0.0f32; 8];
            draws.uniform((step * BATCH + i) as u64, &mut u);
            let below = |u: f32, n: usize| ((f64::from(u) * n as f64) as usize).min(n - 1);
            let image = &training[below(u[0], training.len())];
            let shift = |u: f32| below(u, 2 * SHIFT as usize + 1) as i64 - SHIFT;
            let orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
            let order = if u[4] < 0.3 { orders[below(u[5], 6)] } else { orders[0] };
            augment(image, u[1] < 0.5, shift(u[2]), shift(u[3]), order)
        })
        .collect()
}

/// Mirrored or not, moved right by `dx` and down by `dy` onto white, channels reordered.
fn augment(image: &Image, mirror: bool, dx: i64, dy: i64, order: [usize; 3]) -> Image {
    let (width, height) = (image.width as i64, image.height as i64);
    let mut pixels = vec![255; image.pixels.len()];
    for y in 0..height {
        for x in 0..width {
            let from_x = if mirror { width - 1 - x } else { x } - dx;
            let from_y = y - dy;
            if (0..width).contains(&from_x) && (0..height).contains(&from_y) {
                let from = ((from_y * width + from_x) * 3) as usize;
                let to = ((y * width + x) * 3) as usize;
                for (channel, source) in order.into_iter().enumerate() {
                    pixels[to + channel] = image.pixels[from + source];
                }
            }
        }
    }
    Image { pixels, ..*image }
}

struct Trainer {
    config: TaesdConfig,
    layout: Arc<Layout>,
    network: Network,
    flat: Vec<f32>,
    first: Vec<f32>,
    second: Vec<f32>,
    /// Mean square of each latent channel, over the last steps.
    mean_squares: Vec<f64>,
}

/// What one image contributes to a step.
struct Contribution {
    loss: f64,
    mean_squares: Vec<f64>,
    gradient: Vec<f32>,
}

impl Trainer {
    fn new(config: TaesdConfig, layout: Arc<Layout>, seed: u64) -> Self {
        let flat = layout.initial_values(seed);
        let zeros = vec![0.0; flat.len()];
        Self {
            network: Network::new(&config, &layout),
            mean_squares: vec![1.0; config.latent_channels],
            config,
            layout,
            flat,
            first: zeros.clone(),
            second: zeros,
        }
    }

    /// One step of Adam on a batch. Returns the mean loss.
    fn step(&mut self, batch: &[Image], step: usize, steps: usize, seed: u64) -> f64 {
        let weights = self.network.weights(&self.flat);
        // One image a task, and sums in the batch's order: the thread count changes no bit.
        let contributions: Vec<Contribution> = batch
            .par_iter()
            .enumerate()
            .map(|(i, image)| {
                contribution(
                    &self.network,
                    &weights,
                    image,
                    &self.mean_squares,
                    seed,
                    (step * BATCH + i) as u64,
                )
            })
            .collect();
        let share = 1.0 / batch.len() as f32;
        let mut gradient = vec![0.0f32; self.flat.len()];
        let mut loss = 0.0;
        for part in &contributions {
            gradient.iter_mut().zip(&part.gradient).for_each(|(sum, g)| *sum += g * share);
            loss += part.loss / batch.len() as f64;
            for (mean, square) in self.mean_squares.iter_mut().zip(&part.mean_squares) {
                *mean += 0.01 * (square - *mean);
            }
        }
        self.update(&gradient, step, rate(step, steps));
        loss
    }

    /// Adam (beta 0.9, 0.99) on the gradient clipped to norm 1.
    fn update(&mut self, gradient: &[f32], step: usize, rate: f64) {
        let norm = gradient.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
        let scale = (1.0 / norm).min(1.0) as f32;
        let (beta1, beta2) = (0.9f32, 0.99f32);
        let correct = |beta: f32| 1.0 - beta.powi(step as i32 + 1);
        let (correct1, correct2) = (correct(beta1), correct(beta2));
        for (i, gradient) in gradient.iter().enumerate() {
            let g = gradient * scale;
            self.first[i] += (1.0 - beta1) * (g - self.first[i]);
            self.second[i] += (1.0 - beta2) * (g * g - self.second[i]);
            let denominator = (self.second[i] / correct2).sqrt() + 1e-8;
            self.flat[i] -= rate as f32 * (self.first[i] / correct1) / denominator;
        }
    }

    fn model(&self, flat: &[f32]) -> Taesd {
        Taesd::bind(&self.config, &Params::from_flat(&self.layout, flat, &Device::flex()))
    }

    fn psnr(&self, images: &[Image]) -> f64 {
        measure(&self.model(&self.flat), images).psnr
    }

    /// Writes the weights in half precision, with what was measured on those very weights.
    fn save(&self, options: &Options, training: &[Image], held_out: &[Image]) -> Result<(), Box<dyn Error>> {
        let half: Vec<f16> = self.flat.iter().map(|&v| f16::from_f32(v)).collect();
        let rounded: Vec<f32> = half.iter().map(|h| h.to_f32()).collect();
        let model = self.model(&rounded);
        let some: Vec<Image> = training.iter().step_by(8).cloned().collect();
        let (seen, unseen) = (measure(&model, &some), measure(&model, held_out));
        let scale: Vec<f64> = seen.std.iter().map(|s| 1.0 / s).collect();
        println!(
            "PSNR {:.2} dB on training images, {:.2} dB on held-out ones; latent mean {:.3?}, std {:.3?}",
            seen.psnr, unseen.psnr, seen.mean, seen.std
        );
        let bytes: Vec<u8> = half.iter().flat_map(|h| h.to_le_bytes()).collect();
        let tensors = self
            .layout
            .entries()
            .iter()
            .map(|e| {
                let part = &bytes[2 * e.offset..2 * (e.offset + e.len())];
                Ok((e.name.as_str(), TensorView::new(Dtype::F16, e.shape.clone(), part)?))
            })
            .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
        let metadata = [
            ("id", "repa-dist-quickstart-autoencoder-1".to_owned()),
            ("shift", serde_json::to_string(&seen.mean)?),
            ("scale", serde_json::to_string(&scale)?),
            ("steps", options.steps.to_string()),
            ("seed", options.seed.to_string()),
            ("psnr_train", format!("{:.2}", seen.psnr)),
            ("psnr_held_out", format!("{:.2}", unseen.psnr)),
        ];
        let metadata = metadata.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
        std::fs::write(&options.out, serialize(tensors, Some(metadata))?)
            .map_err(|e| format!("cannot write {}: {e}", options.out.display()))?;
        println!("wrote {}", options.out.display());
        Ok(())
    }
}

/// Loss and gradient of one image: squared error, a little of the absolute error, and the pull of
/// each latent channel's mean square towards 1.
fn contribution(
    network: &Network,
    weights: &network::Weights,
    image: &Image,
    mean_squares: &[f64],
    seed: u64,
    sample: u64,
) -> Contribution {
    let mut gradient = vec![0.0; weights.len()];
    let x = planes(image);
    let (latent, encoder_tape) = network.encode(weights, x.clone());
    let mut noise = vec![0.0f32; latent.data.len()];
    Draws::new(seed, Purpose::Noise).normal(sample, &mut noise);
    let mut noisy = latent.clone();
    noisy.data.iter_mut().zip(&noise).for_each(|(v, n)| *v += LATENT_NOISE * n);
    let (mut decoded, decoder_tape) = network.decode(weights, noisy);
    let share = 1.0 / x.data.len() as f32;
    let mut loss = 0.0;
    for (v, x) in decoded.data.iter_mut().zip(&x.data) {
        // In units of [-1, 1], in which the loss is stated.
        let error = 2.0 * (*v - x);
        loss += f64::from(error * error + ABSOLUTE * error.abs());
        *v = 2.0 * (2.0 * error + ABSOLUTE * error.signum()) * share;
    }
    let mut of_latent = network.decode_backward(weights, decoder_tape, decoded, &mut gradient);
    let plane = latent.side * latent.side;
    let mut squares = vec![];
    for (channel, &mean) in mean_squares.iter().enumerate() {
        let values = &latent.data[channel * plane..(channel + 1) * plane];
        squares.push(values.iter().map(|v| f64::from(v * v)).sum::<f64>() / plane as f64);
        let pull = UNIT_VARIANCE * 4.0 * (mean - 1.0) / latent.data.len() as f64;
        let gradients = &mut of_latent.data[channel * plane..(channel + 1) * plane];
        gradients.iter_mut().zip(values).for_each(|(g, v)| *g += pull as f32 * v);
    }
    network.encode_backward(weights, encoder_tape, of_latent, &mut gradient);
    Contribution { loss: loss * f64::from(share), mean_squares: squares, gradient }
}

/// An image as planes in [0, 1].
fn planes(image: &Image) -> Planes {
    let data = (0..3).flat_map(|c| image.pixels.iter().skip(c).step_by(3).map(|&p| f32::from(p) / 255.0));
    Planes { channels: 3, side: image.width, data: data.collect() }
}

/// Warm-up, then half a cosine to nothing.
fn rate(step: usize, steps: usize) -> f64 {
    let progress = step as f64 / steps as f64;
    let warm = ((step + 1) as f64 / WARM_UP as f64).min(1.0);
    PEAK_RATE * warm * 0.5 * (1.0 + libm::cos(std::f64::consts::PI * progress))
}

struct Measured {
    /// Of the mean squared error over all images, after rounding to 8 bits.
    psnr: f64,
    mean: Vec<f64>,
    std: Vec<f64>,
}

/// Reconstruction quality and the latents' statistics per channel.
fn measure(model: &Taesd, list: &[Image]) -> Measured {
    let mut error = 0.0;
    let mut sums: Vec<[f64; 3]> = vec![];
    for batch in list.chunks(32) {
        let latents = model.encode(images::to_tensor(batch, &Device::flex()) * 0.5 + 0.5);
        let [n, channels, h, w] = latents.dims();
        let decoded = images::from_tensor(model.decode(latents.clone()) * 2.0 - 1.0);
        error += batch.iter().zip(&decoded).map(|(a, b)| images::mean_squared_error(a, b)).sum::<f64>();
        let data = latents.into_data();
        let values = data.as_slice::<f32>().expect("float32 latents");
        sums.resize(channels, [0.0; 3]);
        for (i, &v) in values.iter().enumerate().take(n * channels * h * w) {
            let sum = &mut sums[i / (h * w) % channels];
            let v = f64::from(v);
            *sum = [sum[0] + 1.0, sum[1] + v, sum[2] + v * v];
        }
    }
    let mean: Vec<f64> = sums.iter().map(|[n, x, _]| x / n).collect();
    let std = sums.iter().zip(&mean).map(|([n, _, xx], m)| (xx / n - m * m).sqrt()).collect();
    Measured { psnr: images::psnr(error / list.len() as f64), mean, std }
}
