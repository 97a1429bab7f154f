//! Trains the quickstart's teacher: a small vision transformer of DINOv2's architecture, on the emoji
//! images that are not held out.
//!
//! From a changed view of an image (shift, rotation, flip, colour), of which most steps show some
//! patches only (which makes them cheap, as in FLIP, arXiv 2212.00794), linear maps of the class token
//! and of the mean patch token
//! - name the words of the emoji's Unicode name ("red heart"), and
//! - say between which neighbours it stands in Unicode's order (runs of 16: cats, fruit, clocks).
//!
//! Both come with the `emojis` crate and are finer than the nine groups that the quickstart trains on.
//!
//!     cargo run --release -p repa-trainer --example train_teacher -- --out teacher.safetensors

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use burn::tensor::activation::log_softmax;
use burn::tensor::{Device, Tensor, TensorData};
use half::f16;
use rayon::prelude::*;
use repa_trainer::data::draws::{Draws, Purpose};
use repa_trainer::data::emoji::{self, CLASSES, RESOLUTION};
use repa_trainer::encoder::preprocess::{Preprocess, to_tensor};
use repa_trainer::encoder::vit::{Vit, VitConfig};
use repa_trainer::encoder::{Family, VisionEncoder, probe};
use repa_trainer::images::Image;
use repa_trainer::nn::Linear;
use repa_trainer::params::{Init, Layout, Params};
use safetensors::tensor::{Dtype, TensorView};

/// Pixels a side that the teacher sees.
const INPUT: usize = 56;
/// The teacher: 8 x 8 tokens.
const TEACHER: VitConfig = VitConfig {
    family: Family::DinoV2,
    embed_dim: 96,
    depth: 4,
    num_heads: 4,
    patch_size: 7,
    registers: 0,
    swiglu: false,
    mlp_hidden: 384,
    grid: 8,
};
/// Words that fewer training names hold are not learnt.
const RARE: usize = 3;
/// Words that say nothing of what is drawn.
const EMPTY_WORDS: [&str; 8] = ["with", "of", "the", "and", "in", "on", "a", "button"];
/// Neighbours in Unicode's order that share a label.
const RUN: usize = 16;
/// Patches that a step sees, and every how many steps it sees all.
const VISIBLE: usize = 24;
const WHOLE: usize = 6;
const LEARNING_RATE: f64 = 2e-3;
const WARM_UP: usize = 40;
/// Decay of the weights' moving average, which is what is written.
const AVERAGE: f32 = 0.98;
/// Steps between lines of progress, and between probes (when the file is written as well).
const EVERY: (usize, usize) = (20, 100);

struct Options {
    out: PathBuf,
    steps: usize,
    batch: usize,
    seed: u64,
}

fn options() -> Result<Options, String> {
    let mut options =
        Options { out: "quickstart-teacher.safetensors".into(), steps: 1000, batch: 128, seed: 0 };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().ok_or(format!("{name} needs a value"))?;
        let number = || value.parse::<usize>().map_err(|e| format!("{name} {value}: {e}"));
        match name.as_str() {
            "--out" => options.out = value.into(),
            "--steps" => options.steps = number()?.max(1),
            "--batch" => options.batch = number()?.max(2),
            "--seed" => options.seed = number()? as u64,
            _ => return Err(format!("unknown option {name}: there are --out, --steps, --batch and --seed")),
        }
    }
    Ok(options)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let options = options()?;
    let (held_out, training): (Vec<_>, Vec<_>) = emoji::all().into_iter().partition(emoji::held_out);
    let decode = |set: &[emoji::Emoji]| -> (Vec<Image>, Vec<usize>) {
        (set.par_iter().map(emoji::Emoji::image).collect(), set.iter().map(|e| e.label).collect())
    };
    let sets = Sets { train: decode(&training), test: decode(&held_out) };
    println!("{} images to train on, {} held out", sets.train.0.len(), sets.test.0.len());

    let labels = Labels::of(&training);
    println!("{} words to name, {} runs of neighbours", labels.words, labels.runs);
    let layout = Arc::new(training_layout(&labels));
    let device = Device::flex().autodiff();
    let mut flat = layout.initial_values(options.seed);
    let random = encoder(&layout, &flat)?;
    let mut gradients = vec![0.0; flat.len()];
    let mut moments = (vec![0.0; flat.len()], vec![0.0; flat.len()]);
    let draws = Draws::new(options.seed, Purpose::Augment);
    let started = Instant::now();
    let mut shown = (0.0, 0.0);
    let mut average = flat.clone();
    for step in 0..options.steps {
        let batch = Batch::make(&sets.train.0, &draws, options.seed, step, options.batch);
        let params = Params::from_flat(&layout, &flat, &device);
        let (naming, placing) = losses(&params, &batch, &labels, &device);
        let both = Tensor::cat(vec![naming.clone(), placing.clone()], 0).into_data().convert::<f32>();
        let both = both.as_slice::<f32>()?;
        shown = (shown.0 + f64::from(both[0]), shown.1 + f64::from(both[1]));
        params.gradients(&(naming + placing).backward(), &mut gradients);
        adam(step, &mut flat, &gradients, &mut moments);
        let decay = AVERAGE.min((1 + step) as f32 / (10 + step) as f32);
        average.iter_mut().zip(&flat).for_each(|(a, x)| *a += (x - *a) * (1.0 - decay));
        if (step + 1) % EVERY.0 == 0 {
            let left =
                started.elapsed().as_secs_f64() / (step + 1) as f64 * (options.steps - step - 1) as f64;
            println!(
                "step {}/{}: naming {:.3}, placing {:.3}, {left:.0} s left",
                step + 1,
                options.steps,
                shown.0 / EVERY.0 as f64,
                shown.1 / EVERY.0 as f64
            );
            shown = (0.0, 0.0);
        }
        if (step + 1) % EVERY.1 == 0 && step + 1 < options.steps {
            // The rate is constant, so this is what `--steps` of as many would write.
            write(&layout, &average, &options)?;
            println!("step {}: {}", step + 1, sets.report(&encoder(&layout, &average)?)?);
        }
    }

    write(&layout, &average, &options)?;
    let trained = VisionEncoder::open(&options.out, None, &Device::flex())?;
    println!("linear probe on held-out images, {} classes:", CLASSES.len());
    println!("  teacher:        {}", sets.report(&trained)?);
    println!("  random weights: {}", sets.report(&random)?);
    for square in [1, 2, 4, 8] {
        let side = RESOLUTION / square;
        println!("  pixels, {side} x {side}: {:.1}%", sets.pixels(square)?);
    }
    println!("wrote {} after {:.0} s", options.out.display(), started.elapsed().as_secs_f64());
    Ok(())
}

/// What is asked of the training images.
struct Labels {
    /// Number of words that are not rare.
    words: usize,
    /// Number of runs of neighbours.
    runs: usize,
    /// The words of each image.
    words_of: Vec<Vec<usize>>,
    /// The run of each image.
    run_of: Vec<usize>,
}

impl Labels {
    fn of(training: &[emoji::Emoji]) -> Self {
        let split = |e: &emoji::Emoji| {
            let mut words: Vec<String> = e
                .name
                .split(|c: char| !c.is_alphanumeric())
                .map(str::to_lowercase)
                .filter(|w| !w.is_empty() && !EMPTY_WORDS.contains(&w.as_str()))
                .collect();
            words.sort();
            words.dedup();
            words
        };
        let mut uses: BTreeMap<String, usize> = BTreeMap::new();
        for word in training.iter().flat_map(split) {
            *uses.entry(word).or_default() += 1;
        }
        let kept: BTreeMap<String, usize> =
            uses.into_iter().filter(|(_, n)| *n >= RARE).enumerate().map(|(i, (w, _))| (w, i)).collect();
        let words_of =
            training.iter().map(|e| split(e).iter().filter_map(|w| kept.get(w).copied()).collect()).collect();
        // Runs end with their group.
        let mut run_of: Vec<usize> = Vec::new();
        let mut begun = 0;
        for (i, e) in training.iter().enumerate() {
            let run = run_of.last().copied().unwrap_or(0);
            let next = i > 0 && (i - begun == RUN || training[i - 1].label != e.label);
            if next {
                begun = i;
            }
            run_of.push(run + usize::from(next));
        }
        Self { words: kept.len(), runs: run_of.last().map_or(0, |r| r + 1), words_of, run_of }
    }

    /// For each image of a batch its words, each a share of one, [images, words] (zeros where a name
    /// has only rare words), and its run, [images, runs].
    fn targets(&self, images: &[usize], device: &Device) -> (Tensor<2>, Tensor<2>) {
        let mut words = vec![0.0f32; images.len() * self.words];
        let mut runs = vec![0.0f32; images.len() * self.runs];
        for (row, &image) in images.iter().enumerate() {
            let of = &self.words_of[image];
            for &word in of {
                words[row * self.words + word] = 1.0 / of.len() as f32;
            }
            runs[row * self.runs + self.run_of[image]] = 1.0;
        }
        let tensor =
            |values, width| Tensor::from_data(TensorData::new(values, [images.len(), width]), device);
        (tensor(words, self.words), tensor(runs, self.runs))
    }
}

/// The teacher's parameters, and what only training needs: linear maps to words and runs.
fn training_layout(labels: &Labels) -> Layout {
    let d = TEACHER.embed_dim;
    let mut layout = TEACHER.layout();
    for (head, outputs) in [("words", labels.words), ("runs", labels.runs)] {
        let xavier = Init::XavierUniform { fan_in: d, fan_out: outputs };
        layout.linear(&format!("{head}_cls"), d, outputs, xavier.clone(), Some(Init::Zeros));
        layout.linear(&format!("{head}_mean"), d, outputs, xavier, Some(Init::Zeros));
    }
    layout
}

/// The naming and the placing loss of a batch, [1] each: cross-entropies, means over the class token's
/// and the mean patch token's.
fn losses(params: &Params, batch: &Batch, labels: &Labels, device: &Device) -> (Tensor<1>, Tensor<1>) {
    let n = batch.images.len();
    let model = Vit::bind(&TEACHER, params);
    let views = Tensor::<4>::from_data(TensorData::new(batch.pixels.clone(), [n, 3, INPUT, INPUT]), device);
    let output = match &batch.visible {
        Some(visible) => model.forward_visible(views, Tensor::from_data(visible.as_slice(), device)),
        None => model.forward(views),
    };
    let cls = output.cls.expect("the teacher has a class token");
    let mean = output.patch_tokens.mean_dim(1).reshape([n, TEACHER.embed_dim]);
    let (words, runs) = labels.targets(&batch.images, device);
    let loss = |head: &str, targets: Tensor<2>| {
        let one = |part: &str, features: &Tensor<2>| {
            let logits = Linear::bind(&params.scope(format!("{head}_{part}"))).forward(features.clone());
            (log_softmax(logits, 1) * targets.clone()).sum()
        };
        (one("cls", &cls) + one("mean", &mean)) * (-0.5 / n as f64)
    };
    (loss("words", words), loss("runs", runs))
}

/// One changed view of each image of a batch.
struct Batch {
    /// Positions in the training set.
    images: Vec<usize>,
    /// Normalised, [images, 3, INPUT, INPUT].
    pixels: Vec<f32>,
    /// The patches that are seen, if not all.
    visible: Option<Vec<i32>>,
}

impl Batch {
    fn make(set: &[Image], draws: &Draws, seed: u64, step: usize, size: usize) -> Self {
        let plane = 3 * INPUT * INPUT;
        let mut pixels = vec![0.0; size * plane];
        // Whole epochs, each in its own order.
        let mut order = (usize::MAX, Vec::new());
        let images: Vec<usize> = (step * size..(step + 1) * size)
            .map(|sample| {
                let epoch = sample / set.len();
                if order.0 != epoch {
                    order = (epoch, shuffled(set.len(), seed, epoch as u64));
                }
                order.1[sample % set.len()]
            })
            .collect();
        pixels.par_chunks_exact_mut(plane).enumerate().for_each(|(i, pixels)| {
            let mut u = [0.0; 16];
            draws.uniform((step * size + i) as u64, &mut u);
            augment(&set[images[i]], &u, pixels);
        });
        let visible = (step % WHOLE != WHOLE - 1).then(|| {
            // Apart from the epochs' orders.
            let order = shuffled(TEACHER.grid * TEACHER.grid, seed, (1 << 40) + step as u64);
            order[..VISIBLE].iter().map(|&i| i as i32).collect()
        });
        Self { images, pixels, visible }
    }
}

fn shuffled(len: usize, seed: u64, epoch: u64) -> Vec<usize> {
    let draws = Draws::new(seed, Purpose::Order);
    let mut order: Vec<usize> = (0..len).collect();
    order.sort_by_key(|&i| (draws.words(epoch, i as u32), i));
    order
}

/// One view of an image: 75 to 110 % of its side, shifted, rotated by up to 12 degrees, flipped, brightness,
/// contrast, saturation and tint; white outside the image. Normalised as the teacher's input.
fn augment(image: &Image, u: &[f32], out: &mut [f32]) {
    let spread = |u: f32, amount: f32| (2.0 * u - 1.0) * amount;
    let side = RESOLUTION as f32;
    let scale = (0.75 + 0.35 * u[0]) * side / INPUT as f32;
    let stretch = libm::expf(spread(u[1], 0.1));
    let (sin, cos) = libm::sincosf(spread(u[2], 12f32.to_radians()));
    let room = (side - scale * INPUT as f32).abs() / 2.0 + 2.0;
    let centre = (side / 2.0 + spread(u[3], room), side / 2.0 + spread(u[4], room));
    let flip = if u[5] < 0.5 { -1.0 } else { 1.0 };
    let brightness = 1.0 + spread(u[6], 0.2);
    let contrast = 1.0 + spread(u[7], 0.2);
    let saturation = if u[8] < 0.1 { 0.0 } else { 1.0 + spread(u[9], 0.4) };
    let tint = [0, 1, 2].map(|c| 1.0 + spread(u[10 + c], 0.1));
    let Preprocess { mean, std, .. } = Preprocess::DINOV2;
    for y in 0..INPUT {
        for x in 0..INPUT {
            let dx = (x as f32 + 0.5 - INPUT as f32 / 2.0) * scale * stretch * flip;
            let dy = (y as f32 + 0.5 - INPUT as f32 / 2.0) * scale / stretch;
            let colour =
                bilinear(image, centre.0 + cos * dx - sin * dy - 0.5, centre.1 + sin * dx + cos * dy - 0.5);
            let grey = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2];
            for c in 0..3 {
                let value = (grey + (colour[c] - grey) * saturation) * tint[c];
                let value = (((value - 0.5) * contrast + 0.5) * brightness).clamp(0.0, 1.0);
                out[(c * INPUT + y) * INPUT + x] = (value - mean[c]) / std[c];
            }
        }
    }
}

/// The colour at a place between pixels, in [0, 1].
fn bilinear(image: &Image, x: f32, y: f32) -> [f32; 3] {
    let (left, top) = (x.floor(), y.floor());
    let (fx, fy) = (x - left, y - top);
    let mut colour = [0.0; 3];
    for (dy, wy) in [(0, 1.0 - fy), (1, fy)] {
        for (dx, wx) in [(0, 1.0 - fx), (1, fx)] {
            let (px, py) = (left as i32 + dx, top as i32 + dy);
            let inside = (0..image.width as i32).contains(&px) && (0..image.height as i32).contains(&py);
            let at = (py.max(0) as usize * image.width + px.max(0) as usize) * 3;
            for (c, colour) in colour.iter_mut().enumerate() {
                let value = if inside { f32::from(image.pixels[at + c]) / 255.0 } else { 1.0 };
                *colour += value * wx * wy;
            }
        }
    }
    colour
}

/// One step of Adam (Kingma and Ba 2015), after clipping the gradient's norm to 1; the rate rises linearly
/// at first, then stays.
fn adam(step: usize, flat: &mut [f32], gradients: &[f32], moments: &mut (Vec<f32>, Vec<f32>)) {
    let rate = LEARNING_RATE * ((step + 1) as f64 / WARM_UP as f64).min(1.0);
    let norm = gradients.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
    let clip = (1.0 / norm.max(1e-12)).min(1.0) as f32;
    let (b1, b2) = (0.9f32, 0.98f32);
    let correction = |b: f32| 1.0 - f64::from(b).powi(step as i32 + 1);
    let (c1, c2) = (correction(b1), correction(b2));
    for (((x, &g), m), v) in flat.iter_mut().zip(gradients).zip(&mut moments.0).zip(&mut moments.1) {
        let g = g * clip;
        *m = b1 * *m + (1.0 - b1) * g;
        *v = b2 * *v + (1.0 - b2) * g * g;
        *x -= (rate * f64::from(*m) / c1 / ((f64::from(*v) / c2).sqrt() + 1e-8)) as f32;
    }
}

/// The teacher's part of the parameters as float16 safetensors.
fn serialise(layout: &Layout, flat: &[f32]) -> Result<Vec<u8>, safetensors::SafeTensorError> {
    let mut tensors = Vec::new();
    for entry in TEACHER.layout().entries() {
        let offset = layout.find(&entry.name).expect("the training layout begins with the teacher's").offset;
        let bytes: Vec<u8> =
            flat[offset..offset + entry.len()].iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect();
        tensors.push((entry.name.clone(), entry.shape.clone(), bytes));
    }
    let views: Vec<(&str, TensorView)> = tensors
        .iter()
        .map(|(name, shape, bytes)| Ok((&**name, TensorView::new(Dtype::F16, shape.clone(), bytes)?)))
        .collect::<Result<_, safetensors::SafeTensorError>>()?;
    let metadata = HashMap::from([("num_heads".to_owned(), TEACHER.num_heads.to_string())]);
    safetensors::serialize(views, Some(metadata))
}

fn write(layout: &Layout, flat: &[f32], options: &Options) -> Result<(), Box<dyn std::error::Error>> {
    std::fs::write(&options.out, serialise(layout, flat)?)
        .map_err(|e| format!("cannot write {}: {e}", options.out.display()).into())
}

fn encoder(layout: &Layout, flat: &[f32]) -> Result<VisionEncoder, Box<dyn std::error::Error>> {
    let bytes = serialise(layout, flat)?;
    let weights = repa_trainer::weights::Weights::from_safetensors("(in training)".as_ref(), &bytes)?;
    Ok(VisionEncoder::from_weights(&weights, None, &Device::flex())?)
}

/// Images and labels, to train on and held out.
struct Sets {
    train: (Vec<Image>, Vec<usize>),
    test: (Vec<Image>, Vec<usize>),
}

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

impl Sets {
    /// The probe's accuracy on the columns of a function of the images, for each of several ranges of
    /// columns.
    fn probe(
        &self,
        ranges: &[std::ops::Range<usize>],
        features: impl Fn(&[Image]) -> Outcome<Tensor<2>>,
    ) -> Outcome<Vec<f64>> {
        let all = |images: &[Image]| -> Outcome<Tensor<2>> {
            Ok(Tensor::cat(images.chunks(64).map(&features).collect::<Outcome<Vec<_>>>()?, 0))
        };
        let (train, test) = (all(&self.train.0)?, all(&self.test.0)?);
        let part = |x: &Tensor<2>, r: &std::ops::Range<usize>| x.clone().narrow(1, r.start, r.len());
        Ok(ranges
            .iter()
            .map(|r| {
                let (train, test) = (part(&train, r), part(&test, r));
                100.0 * probe::accuracy(train, &self.train.1, test, &self.test.1, CLASSES.len())
            })
            .collect())
    }

    fn report(&self, encoder: &VisionEncoder) -> Outcome<String> {
        let d = encoder.embed_dim();
        let (h, w) = encoder.tokens(RESOLUTION);
        let ranges = [0..d, d..2 * d, 0..2 * d, 2 * d..(2 + h * w) * d];
        let found = self.probe(&ranges, |images| {
            let features = encoder.features(images)?;
            let all = features.patch_tokens.clone().reshape([images.len(), h * w * d]);
            let cls = features.cls.clone().expect("the teacher has a class token");
            Ok(Tensor::cat(vec![features.pooled(), cls, all], 1))
        })?;
        let [mean, cls, both, all] = found[..] else { unreachable!("four ranges were asked for") };
        Ok(format!("mean patch {mean:.1}%, class token {cls:.1}%, both {both:.1}%, all patches {all:.1}%"))
    }

    /// Of the pixels themselves, each channel averaged over squares of `square` pixels.
    fn pixels(&self, square: usize) -> Outcome<f64> {
        let side = RESOLUTION / square;
        let whole = 0..3 * side * side;
        let found = self.probe(std::slice::from_ref(&whole), |images| {
            let n = images.len();
            let x = to_tensor(images, &Device::flex())?.reshape([n, 3, side, square, side, square]);
            Ok(x.mean_dim(5).mean_dim(3).reshape([n, 3 * side * side]))
        })?;
        Ok(found[0])
    }
}
