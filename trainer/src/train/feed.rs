//! What a rank trains on: the store, and the features of its images, which are stored or computed as
//! training goes.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use burn::tensor::{Tensor, TensorData};
use half::f16;
use metrics::histogram;

use super::TrainError;
use crate::Device;
use crate::config::{Config, ConfigError, Resample};
use crate::data;
use crate::data::loader::{Batch, ImageTransform, Loader, LoaderError, LoaderPlan};
use crate::data::store::{EncoderSpec, Expected, Index, LatentStore};
use crate::encoder::VisionEncoder;
use crate::encoder::preprocess::Preprocess;
use crate::images::Image;
use crate::telemetry::names;

/// Images that go through an encoder at once: enough to fill a GPU, few enough for its memory.
const ENCODER_BATCH: usize = 64;

/// The data of a run.
pub(super) struct Data {
    store: Arc<LatentStore>,
    /// Empty where features are stored.
    encoders: Vec<VisionEncoder>,
    /// The store's index, with the encoders whose features training sees.
    index: Index,
}

impl Data {
    /// Opens the store of a configuration and the encoders it names, and checks that they are what the
    /// model needs.
    pub(super) fn open(config: &Config, device: &Device) -> Result<Self, TrainError> {
        let sit = config.sit();
        if config.data.dir.as_os_str().is_empty() {
            return Err(
                ConfigError::value("data.dir", "", "it is empty: name the data with data.dir=DIR").into()
            );
        }
        let store = data::open(&config.data.dir)?;
        let mut index = store.index().clone();
        let contents = &mut index.contents;
        let mut encoders = Vec::new();
        if !config.alignment.encoders.is_empty() {
            encoders = open_encoders(config, contents.resolution, device)?;
            if !contents.images {
                let problem = "they run on images, and the data set keeps none: make it again with --images, or \
                               leave this key empty to use stored features";
                return Err(encoders_error(config, problem.to_owned()).into());
            }
            contents.encoders = specs(config, &encoders, contents.resolution)?;
        }
        let on_grid = tokens_on_grid(config, &index)?;
        index.expect(
            store.dir(),
            &Expected {
                channels: sit.in_channels,
                input_size: sit.input_size,
                classes: sit.num_classes,
                tokens: on_grid,
                z_dims: sit.z_dims,
            },
        )?;
        Ok(Self { store: Arc::new(store), encoders, index })
    }

    /// What the data are.
    pub(super) fn index(&self) -> &Index {
        &self.index
    }

    /// Starts reading ahead.
    pub(super) fn feed(&self, plan: LoaderPlan) -> Result<Feed, LoaderError> {
        if self.encoders.is_empty() {
            return Ok(Feed::Stored(Loader::start(Arc::clone(&self.store), plan)?));
        }
        let resolution = self.index.contents.resolution;
        let inputs = EncoderInputs {
            resolution,
            preprocesses: self.encoders.iter().map(VisionEncoder::preprocessing).collect(),
        };
        let plan = LoaderPlan { features: false, ..plan };
        let loader = Loader::start_with(Arc::clone(&self.store), plan, Some(Arc::new(inputs)))?;
        Ok(Feed::Online(Online::start(loader, self.encoders.clone(), resolution)?))
    }
}

fn encoders_error(config: &Config, problem: String) -> ConfigError {
    let names: Vec<_> = config.alignment.encoders.iter().map(|p| p.display().to_string()).collect();
    ConfigError::value("alignment.encoders", names.join(", "), problem)
}

fn open_encoders(
    config: &Config,
    resolution: usize,
    device: &Device,
) -> Result<Vec<VisionEncoder>, TrainError> {
    let z_dims = &config.alignment.z_dims;
    let encoders = config
        .alignment
        .encoders
        .iter()
        .map(|name| VisionEncoder::named(name, device).map_err(|e| encoders_error(config, e.to_string())))
        .collect::<Result<Vec<_>, _>>()?;
    let widths: Vec<usize> = encoders.iter().map(VisionEncoder::embed_dim).collect();
    if widths != *z_dims {
        let problem =
            format!("their features are {widths:?} wide: set alignment.z_dims={widths:?} (it is {z_dims:?})");
        return Err(encoders_error(config, problem).into());
    }
    for encoder in &encoders {
        encoder.grid(resolution).map_err(|e| encoders_error(config, e.to_string()))?;
    }
    Ok(encoders)
}

fn specs(
    config: &Config,
    encoders: &[VisionEncoder],
    resolution: usize,
) -> Result<Vec<EncoderSpec>, ConfigError> {
    encoders
        .iter()
        .map(|encoder| {
            let (rows, columns) =
                encoder.grid(resolution).map_err(|e| encoders_error(config, e.to_string()))?;
            Ok(EncoderSpec { id: encoder.id().to_owned(), tokens: rows * columns, dim: encoder.embed_dim() })
        })
        .collect()
}

/// The number of tokens that features may have: the model's, or their own where they are resampled.
fn tokens_on_grid(config: &Config, index: &Index) -> Result<usize, TrainError> {
    let sit = config.sit();
    let tokens = sit.tokens();
    let other = index.contents.encoders.iter().find(|e| e.tokens != tokens);
    let Some(encoder) = other.filter(|_| !sit.z_dims.is_empty()) else { return Ok(tokens) };
    match config.alignment.resample {
        Resample::Bilinear if encoder.tokens.isqrt().pow(2) == encoder.tokens => Ok(encoder.tokens),
        _ => {
            let problem = format!(
                "the model has a grid of {} tokens and the features of {} one of {}: change model.patch_size or \
                 model.input_size, or set alignment.resample=bilinear (square grids only)",
                grid(tokens),
                encoder.id,
                grid(encoder.tokens)
            );
            Err(ConfigError::value("alignment.resample", "none", problem).into())
        }
    }
}

/// A number of tokens as people see it: `8 x 8`.
fn grid(tokens: usize) -> String {
    match tokens.isqrt() {
        side if side * side == tokens => format!("{side} x {side}"),
        _ => tokens.to_string(),
    }
}

/// Batches with features, ahead of need.
pub(super) enum Feed {
    /// Features come from the store, or are not needed.
    Stored(Loader),
    /// Features come from encoders.
    Online(Online),
}

impl Feed {
    /// The next batch, and how long it had to be waited for.
    pub(super) fn next(&mut self) -> Result<(Batch, Duration), LoaderError> {
        match self {
            Self::Stored(loader) => loader.next(),
            Self::Online(online) => online.next(),
        }
    }

    /// Gives a batch's buffers back.
    pub(super) fn recycle(&self, batch: Batch) {
        match self {
            Self::Stored(loader) => loader.recycle(batch),
            Self::Online(online) => online.recycle(batch),
        }
    }
}

/// Decodes and preprocesses images for all encoders, one after another, in the loader's threads.
struct EncoderInputs {
    resolution: usize,
    preprocesses: Vec<Preprocess>,
}

impl EncoderInputs {
    fn lengths(&self) -> impl Iterator<Item = usize> {
        self.preprocesses.iter().map(|p| p.input_size(self.resolution).map_or(0, |side| 3 * side * side))
    }
}

impl ImageTransform for EncoderInputs {
    fn len(&self) -> usize {
        self.lengths().sum()
    }

    fn apply(&self, encoded: &[u8], flipped: bool, mut out: &mut [f32]) -> Result<(), String> {
        let mut image = Image::from_bytes(encoded)?;
        let side = self.resolution;
        if (image.width, image.height) != (side, side) {
            return Err(format!("is {}x{} pixels where {side}x{side} belong", image.width, image.height));
        }
        if flipped {
            image.mirror();
        }
        for (preprocess, length) in self.preprocesses.iter().zip(self.lengths()) {
            let (here, rest) = out.split_at_mut(length);
            preprocess.apply_to(&image, here).map_err(|e| e.to_string())?;
            out = rest;
        }
        Ok(())
    }
}

/// Runs the encoders on a thread of its own, one batch ahead of training: on a GPU that is a stream of its
/// own as well.
pub(super) struct Online {
    batches: Option<Receiver<Result<Batch, LoaderError>>>,
    spare: Option<Sender<Batch>>,
    thread: Option<JoinHandle<()>>,
    failed: bool,
}

impl Online {
    fn start(
        mut loader: Loader,
        encoders: Vec<VisionEncoder>,
        resolution: usize,
    ) -> Result<Self, LoaderError> {
        let (sender, batches) = sync_channel(1);
        let (spare, spent) = channel::<Batch>();
        let run = move || {
            loop {
                for batch in spent.try_iter() {
                    loader.recycle(batch);
                }
                let result = loader.next().and_then(|(mut batch, _)| {
                    let begun = Instant::now();
                    fill(&mut batch, &encoders, resolution)?;
                    histogram!(names::ENCODER_SECONDS).record(begun.elapsed().as_secs_f64());
                    Ok(batch)
                });
                let failed = result.is_err();
                // The receiver is gone when training has ended.
                if sender.send(result).is_err() || failed {
                    return;
                }
            }
        };
        let thread =
            std::thread::Builder::new().name("encoder".to_owned()).spawn(run).map_err(LoaderError::Thread)?;
        Ok(Self { batches: Some(batches), spare: Some(spare), thread: Some(thread), failed: false })
    }

    fn next(&mut self) -> Result<(Batch, Duration), LoaderError> {
        let begin = Instant::now();
        let ended = || Err(LoaderError::Ended);
        let result = match &self.batches {
            Some(batches) if !self.failed => batches.recv().unwrap_or_else(|_| ended()),
            _ => ended(),
        };
        self.failed = result.is_err();
        result.map(|batch| (batch, begin.elapsed()))
    }

    fn recycle(&self, batch: Batch) {
        if let Some(spare) = &self.spare {
            // The thread has ended after an error, which the next call gives.
            let _ = spare.send(batch);
        }
    }
}

impl Drop for Online {
    fn drop(&mut self) {
        // Without a receiver the thread ends, and with it the loader.
        self.batches = None;
        self.spare = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported on its standard error.
            let _ = thread.join();
        }
    }
}

/// Computes the features of a batch from its pixels, in the precision of stored ones.
fn fill(batch: &mut Batch, encoders: &[VisionEncoder], resolution: usize) -> Result<(), LoaderError> {
    let wrong = |problem: String| LoaderError::Features(problem);
    let count = batch.len();
    let each = batch.pixels.len().checked_div(count).unwrap_or(0);
    batch.features.resize_with(encoders.len(), Vec::new);
    let mut begin = 0;
    for (encoder, features) in encoders.iter().zip(&mut batch.features) {
        features.clear();
        let side = encoder.input_size(resolution).map_err(|e| wrong(e.to_string()))?;
        let length = 3 * side * side;
        for first in (0..count).step_by(ENCODER_BATCH) {
            let rows = first..(first + ENCODER_BATCH).min(count);
            let shape = [rows.len(), 3, side, side];
            let pixels: Vec<f32> =
                rows.flat_map(|row| &batch.pixels[row * each + begin..][..length]).copied().collect();
            let input = Tensor::<4>::from_data(TensorData::new(pixels, shape), encoder.device());
            let tokens = encoder.forward_preprocessed(input).patch_tokens.into_data().convert::<f32>();
            let values = tokens.as_slice::<f32>().map_err(|e| wrong(format!("{e:?}")))?;
            features.extend(values.iter().map(|&v| f16::from_f32(v)));
        }
        begin += length;
    }
    Ok(())
}
