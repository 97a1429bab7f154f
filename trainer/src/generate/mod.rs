//! From a run to images: its weights, its sampler, its autoencoder.

mod many;
pub(crate) mod space;
mod together;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::{Tensor, TensorData};

use crate::Device;
use crate::autoencoder::{self, Autoencoder};
use crate::checkpoint::{self, Checkpoint, CheckpointError};
use crate::config::{Config, ConfigError, Source, Sources, load};
use crate::data::store::{Index, StoreError, StoreSpec};
use crate::exit::Kind;
use crate::figures::GridRow;
use crate::flat;
use crate::images::{self, Image};
use crate::model::Sit;
use crate::params::{Layout, Params};
use crate::sample::{Batch, DrawnNoise, SampleError, SamplerConfig, draw_latents, sample};
use crate::weights::WeightsError;
pub use many::{Classes, write_many};
pub use together::{each_rank, same_step};
pub(crate) use together::{of_talk, same_on_all, together};

/// Which weights of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// The moving average of the last checkpoint.
    Ema,
    /// The weights of the last checkpoint.
    Model,
    /// The weights before the first step.
    Initial,
}

/// Why a run makes no images.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GenerateError {
    /// The folder is no run.
    #[error("{path} holds no run (no config.toml): train one first, or name another folder with --run")]
    NoRun {
        /// The folder.
        path: PathBuf,
    },
    /// The run has saved nothing yet.
    #[error("{path} holds no checkpoint yet: wait for one, or train on")]
    NoCheckpoint {
        /// The folder.
        path: PathBuf,
    },
    /// Nothing says what latents are.
    #[error(
        "there are no data at {dir:?} to say what latents are, and the run keeps no latents.json: name the data with \
         data.dir=DIR; or, where latents were scaled as their autoencoder says (the SD-VAE's by 0.18215), give data.dir= \
         and sample.autoencoder=FILE"
    )]
    NoData {
        /// Where the data were looked for.
        dir: PathBuf,
    },
    /// What the run keeps of its data cannot be read.
    #[error("cannot read {path}: {problem}; remove it, and name the data with data.dir=DIR")]
    Kept {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The run's configuration, or an argument, cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The checkpoint cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The latent store cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The autoencoder cannot be read.
    #[error(transparent)]
    Autoencoder(#[from] WeightsError),
    /// The sampler failed.
    #[error(transparent)]
    Sample(#[from] SampleError),
}

impl GenerateError {
    /// What kind of error it is, for the exit code.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Config(_) => Kind::Usage,
            Self::Checkpoint(error) => error.kind(),
            Self::Sample(_) => Kind::Runtime,
            _ => Kind::Data,
        }
    }
}

impl From<GenerateError> for repa_comm::Failure {
    fn from(error: GenerateError) -> Self {
        Self { message: error.to_string(), code: i32::from(error.kind().code()) }
    }
}

/// The merged configuration that a run folder keeps, with `arguments` over it.
///
/// # Errors
/// The folder is no run, or an argument cannot be used.
pub fn run_config(run: &Path, arguments: &[String]) -> Result<Config, GenerateError> {
    let path = run.join("config.toml");
    if !path.is_file() {
        return Err(GenerateError::NoRun { path: run.to_owned() });
    }
    let sources =
        Sources { source: Some(Source::File(path)), environment: Vec::new(), arguments: arguments.to_vec() };
    Ok(load(&sources)?.config)
}

/// The autoencoder that decodes what a model of these data draws.
///
/// # Errors
/// It cannot be read, or has to be named.
pub(crate) fn autoencoder(
    config: &Config,
    index: &Index,
    device: &Device,
) -> Result<Autoencoder, WeightsError> {
    match config.sample.autoencoder.as_os_str().is_empty() {
        true => autoencoder::by_id(&index.contents.autoencoder, device),
        false => Autoencoder::open(&config.sample.autoencoder, device),
    }
}

/// Images as rows of a grid, one for each run of equal labels.
pub fn class_rows(contents: &StoreSpec, labels: &[usize], images: Vec<Image>) -> Vec<GridRow> {
    let name =
        |class: usize| contents.class_names.get(class).cloned().unwrap_or_else(|| format!("class {class}"));
    let mut images = images.into_iter();
    labels
        .chunk_by(|a, b| a == b)
        .map(|same| GridRow { label: name(same[0]), images: images.by_ref().take(same.len()).collect() })
        .collect()
}

/// A run's model with what it takes to make images.
#[derive(Debug)]
pub struct Generator {
    config: Config,
    index: Index,
    autoencoder: Autoencoder,
    device: Device,
    model: Sit,
    step: u64,
}

/// From images of the autoencoder, [N, 3, H, W] in [-1, 1], to pixels.
type Pixels = fn(Tensor<4>) -> Vec<Image>;

impl Generator {
    /// Opens a run of this configuration, with a checkpoint of it (its folder, `…/step-00050000`) or else the newest.
    ///
    /// # Errors
    /// Its checkpoint, store or autoencoder cannot be read.
    pub fn open(
        config: &Config,
        which: Which,
        checkpoint: Option<&Path>,
        device: &Device,
    ) -> Result<Self, GenerateError> {
        let (index, autoencoder) = space::find(config, device)?;
        let layout = Arc::new(config.sit().layout());
        let (flat, step) = match which {
            Which::Initial => (flat::copied(&layout.initial_values(config.train.seed)), 0),
            Which::Ema | Which::Model => {
                let checkpoint = match checkpoint {
                    Some(path) => Checkpoint::open(path).and_then(|found| found.verify().map(|()| found))?,
                    None => crate::train::checkpoints(config)
                        .latest()?
                        .checkpoint
                        .ok_or_else(|| GenerateError::NoCheckpoint { path: config.run.dir.clone() })?,
                };
                let array =
                    if which == Which::Ema { checkpoint::Array::Ema } else { checkpoint::Array::Model };
                (checkpoint.read(&layout, array)?, checkpoint.progress().step)
            }
        };
        Ok(Self::of_weights(config, index, autoencoder, device, &layout, &flat, step))
    }

    /// With weights that are in memory: the flat array in the order of `layout`, which is that of the configured model,
    /// after `step` optimizer steps.
    pub(crate) fn of_weights(
        config: &Config,
        index: Index,
        autoencoder: Autoencoder,
        device: &Device,
        layout: &Arc<Layout>,
        flat: &[f32],
        step: u64,
    ) -> Self {
        let params = Params::from_flat(layout, flat, device);
        Self {
            config: config.clone(),
            model: Sit::bind(&config.sit(), &params),
            index,
            autoencoder,
            device: device.clone(),
            step,
        }
    }

    /// What the run trained on.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// Optimizer steps behind the weights.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Draws one image a label. `first` numbers the samples: the same numbers, labels and settings
    /// give the same images, in whatever batches. `on_batch` is told how many are done.
    ///
    /// # Errors
    /// A label or a setting is out of range, or the model's output is not finite.
    pub fn images(
        &self,
        labels: &[usize],
        first: u64,
        mut on_batch: impl FnMut(usize),
    ) -> Result<Vec<Image>, GenerateError> {
        let batch = self.config.sample.batch;
        let mut images = Vec::with_capacity(labels.len());
        for (number, labels) in labels.chunks(batch).enumerate() {
            let start = first + (number * batch) as u64;
            let samples: Vec<u64> = (start..start + labels.len() as u64).collect();
            images.extend(self.batch(&samples, labels, images::from_tensor)?);
            crate::gpu_failure::has_worked();
            on_batch(images.len());
        }
        Ok(images)
    }

    /// Samples that are drawn at once.
    pub(crate) fn batch_size(&self) -> usize {
        self.config.sample.batch
    }

    /// How samples are drawn.
    pub(crate) fn sampler(&self) -> &SamplerConfig {
        &self.config.sample.solver
    }

    /// The images of these numbers, of classes that are drawn for each, as evaluators get them.
    pub(crate) fn for_evaluators(
        &self,
        samples: &[u64],
        classes: Classes,
    ) -> Result<Vec<Image>, GenerateError> {
        let (seed, of_all) = (self.config.sample.seed, self.index.contents.classes);
        let labels: Vec<usize> = samples.iter().map(|&i| classes.label(seed, i, of_all)).collect();
        self.batch(samples, &labels, images::truncated)
    }

    /// The images of these numbers and labels, all at once.
    pub(crate) fn of_numbers(&self, samples: &[u64], labels: &[usize]) -> Result<Vec<Image>, GenerateError> {
        self.batch(samples, labels, images::from_tensor)
    }

    fn batch(&self, samples: &[u64], labels: &[usize], pixels: Pixels) -> Result<Vec<Image>, GenerateError> {
        if samples.is_empty() {
            return Ok(Vec::new());
        }
        let settings = &self.config.sample;
        let contents = &self.index.contents;
        let latents = draw_latents(settings.seed, samples, contents.latent_len());
        let batch = Batch {
            latents: &latents,
            shape: [labels.len(), contents.channels, contents.height, contents.width],
            labels,
            null_class: self.config.model.num_classes,
            path: self.config.objective.path,
            device: &self.device,
        };
        let noise = DrawnNoise::new(settings.seed, samples);
        let states = sample(&self.model, &settings.solver, &batch, &noise, |_| {})?;
        let mut latents: Vec<f32> = states.into_iter().map(|v| v as f32).collect();
        self.index.normalisation.invert(&mut latents, contents.height * contents.width);
        Ok(self.decode(latents, pixels))
    }

    /// Images of latents as the autoencoder makes them, [N, C, h, w], flattened.
    pub fn decode_raw(&self, latents: Vec<f32>) -> Vec<Image> {
        self.decode(latents, images::from_tensor)
    }

    fn decode(&self, latents: Vec<f32>, pixels: Pixels) -> Vec<Image> {
        const AT_ONCE: usize = 50;
        let contents = &self.index.contents;
        latents
            .chunks(AT_ONCE * contents.latent_len())
            .flat_map(|part| {
                let shape =
                    [part.len() / contents.latent_len(), contents.channels, contents.height, contents.width];
                let latents = Tensor::<4>::from_data(TensorData::new(part.to_vec(), shape), &self.device);
                pixels(self.autoencoder.decode(latents))
            })
            .collect()
    }
}
