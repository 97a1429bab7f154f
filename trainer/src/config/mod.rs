//! The configuration of a run: TOML files, `REPA_` environment variables and `key=value` arguments,
//! merged in that order over the defaults below. [`load`] says where each value came from.

mod check;
mod error;
mod load;
mod operation;
mod sampling;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub(crate) use check::cuda_index;
pub use error::ConfigError;
pub use load::{Loaded, Source, Sources, load};
pub use operation::{Backend, CheckpointConfig, CommConfig, LogFormat, Progress, TelemetryConfig};
pub use sampling::{SampleConfig, TrainingSamples};

use crate::model::{Precision, SitConfig};
use crate::objective::{Path, Weighting};

/// Everything that decides a run. Every key has a default, so that a file names only what differs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// `cpu`, or `cuda:N` in a build with the feature `cuda`. `cuda` alone takes the local rank. In a build with the
    /// feature `wgpu` also `wgpu`: whatever Vulkan finds, in float32; slow, and meant for tests of the GPU's code.
    pub device: DeviceName,
    /// The run folder.
    pub run: RunConfig,
    /// Where the latents are.
    pub data: DataConfig,
    /// The diffusion transformer.
    pub model: ModelConfig,
    /// Representation alignment.
    pub alignment: AlignmentConfig,
    /// Interpolant and loss.
    pub objective: ObjectiveConfig,
    /// Batch, steps and seed.
    pub train: TrainConfig,
    /// AdamW and the moving average.
    pub optimizer: OptimizerConfig,
    /// How gradients travel between ranks.
    pub comm: CommConfig,
    /// What is saved, and how often.
    pub checkpoint: CheckpointConfig,
    /// Metrics, progress and logs.
    pub telemetry: TelemetryConfig,
    /// Sampling, after training and during it.
    pub sample: SampleConfig,
}

/// A device by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DeviceName(pub String);

impl DeviceName {
    /// The processor, with the host's memory.
    #[must_use]
    pub fn is_cpu(&self) -> bool {
        self.0 == "cpu"
    }

    /// An NVIDIA GPU.
    #[must_use]
    pub fn is_cuda(&self) -> bool {
        self.0 == "cuda" || cuda_index(&self.0).is_some()
    }
}

impl Default for DeviceName {
    fn default() -> Self {
        Self("cpu".into())
    }
}

/// Keys under `run`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RunConfig {
    /// Folder of this run: configuration, metrics, checkpoints, samples.
    pub dir: PathBuf,
    /// Where a run goes on from: `auto` is the newest good checkpoint of its folder, `never` refuses a folder that
    /// has any, a number is the checkpoint of that step, and a path is another run's folder or checkpoint, where
    /// this one has none of its own yet.
    pub resume: Resume,
    /// Weights to start from where there is nothing to go on from: a checkpoint, a run folder, or a weight file.
    /// Parameters whose name or shape is another keep their first values. Empty for none.
    pub init_from: PathBuf,
    /// Which of a checkpoint's weights `run.init_from` takes.
    pub init_weights: InitWeights,
    /// Keys that may have other values than in the checkpoint that the run goes on from, though they change the
    /// model or the data order.
    pub allow_changed: Vec<String>,
}

/// Where a start goes on from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "ResumeValue", into = "ResumeValue")]
pub enum Resume {
    /// The newest good checkpoint, if there is one.
    #[default]
    Auto,
    /// Refuses to go on, so that nothing is overwritten.
    Never,
    /// The checkpoint of this step; later ones are set aside.
    Step(u64),
    /// Another run's folder, or a checkpoint.
    Path(PathBuf),
}

/// How [`Resume`] is written.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(untagged)]
enum ResumeValue {
    Step(u64),
    Word(String),
}

impl From<ResumeValue> for Resume {
    fn from(value: ResumeValue) -> Self {
        match value {
            ResumeValue::Step(step) => Self::Step(step),
            ResumeValue::Word(word) => match word.as_str() {
                "auto" => Self::Auto,
                "never" => Self::Never,
                path => Self::Path(path.into()),
            },
        }
    }
}

impl From<Resume> for ResumeValue {
    fn from(resume: Resume) -> Self {
        match resume {
            Resume::Auto => Self::Word("auto".into()),
            Resume::Never => Self::Word("never".into()),
            Resume::Step(step) => Self::Step(step),
            Resume::Path(path) => Self::Word(path.to_string_lossy().into_owned()),
        }
    }
}

/// Which of a checkpoint's weights a new run starts from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InitWeights {
    /// The moving average.
    #[default]
    Ema,
    /// The weights as they were.
    Model,
}

impl Default for RunConfig {
    fn default() -> Self {
        Self {
            dir: "runs/default".into(),
            resume: Resume::Auto,
            init_from: PathBuf::new(),
            init_weights: InitWeights::Ema,
            allow_changed: Vec::new(),
        }
    }
}

/// Keys under `data`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// Folder of the latent store.
    pub dir: PathBuf,
    /// Batches that the loader prepares ahead of the training thread.
    pub queue_depth: usize,
    /// Threads that read and draw (and decode images, where encoders run on them).
    pub threads: usize,
    /// Whether every other sample, at random, is taken mirrored; the store has to hold flipped copies.
    pub flip: bool,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self { dir: "data/latents".into(), queue_depth: 4, threads: 1, flip: false }
    }
}

/// Keys under `model`. A `preset` such as `SiT-XL/2` sets hidden_size, depth, num_heads,
/// patch_size and encoder_depth, which explicit keys override.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelConfig {
    /// A published size, or empty.
    pub preset: String,
    /// Width and height of the latents.
    pub input_size: usize,
    /// Channels of the latents.
    pub in_channels: usize,
    /// Width and height of a patch, in latent pixels.
    pub patch_size: usize,
    /// Width of the token stream.
    pub hidden_size: usize,
    /// Number of blocks.
    pub depth: usize,
    /// Attention heads.
    pub num_heads: usize,
    /// Width of the block's MLP over hidden_size.
    pub mlp_ratio: f64,
    /// Classes; the label `num_classes` is the null class.
    pub num_classes: usize,
    /// Whether queries and keys are normalised.
    pub qk_norm: bool,
}

impl Default for ModelConfig {
    fn default() -> Self {
        Self {
            preset: String::new(),
            input_size: 32,
            in_channels: 4,
            patch_size: 2,
            hidden_size: 384,
            depth: 12,
            num_heads: 6,
            mlp_ratio: 4.0,
            num_classes: 1000,
            qk_norm: false,
        }
    }
}

/// Keys under `alignment`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AlignmentConfig {
    /// Weight of the alignment loss; 0 trains plain SiT.
    pub coefficient: f64,
    /// Steps after which the coefficient is 0, since alignment helps early and hinders late (HASTE, arXiv 2505.16792);
    /// 0 for never. The loss is still computed, to be seen in the log. (The best checkpoints are then to be chosen by
    /// checkpoint.best_metric = denoising_loss: the sum of the losses jumps.)
    pub until_step: u64,
    /// Hidden tokens are taken after this many blocks.
    pub encoder_depth: usize,
    /// Width of the projector's hidden layers.
    pub projector_dim: usize,
    /// Feature width of each encoder.
    pub z_dims: Vec<usize>,
    /// Weight files of frozen encoders (or `quickstart-teacher`) that run on the stored images as training
    /// goes, one for each of z_dims; empty: features are read from the store. Before the file and a colon the
    /// family may stand: `dinov2`, `dinov1`, `mocov3`, `mae`, `jepa` or `clip`.
    pub encoders: Vec<PathBuf>,
    /// What to do where the encoders' token grid differs from the model's: `none` (an error) or
    /// `bilinear`.
    pub resample: Resample,
}

impl AlignmentConfig {
    /// The weight of the alignment loss in the step that comes after so many.
    #[must_use]
    pub fn coefficient_after(&self, steps: u64) -> f64 {
        match self.until_step > 0 && steps >= self.until_step {
            true => 0.0,
            false => self.coefficient,
        }
    }
}

/// How targets come to the model's token grid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resample {
    /// They have to be on it.
    None,
    /// By bilinear interpolation.
    Bilinear,
}

impl Default for AlignmentConfig {
    fn default() -> Self {
        Self {
            coefficient: 0.5,
            until_step: 0,
            encoder_depth: 4,
            projector_dim: 2048,
            z_dims: vec![768],
            encoders: Vec::new(),
            resample: Resample::None,
        }
    }
}

/// Keys under `objective`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ObjectiveConfig {
    /// The interpolant: `linear` or `cosine`.
    pub path: Path,
    /// The distribution of t: `uniform`, `lognormal` or `logit_normal`.
    pub weighting: WeightingName,
    /// Mean of the normal behind `logit_normal`.
    pub logit_mean: f64,
    /// Standard deviation of the normal behind `logit_normal`.
    pub logit_std: f64,
    /// Resolution shift of `logit_normal`; 1 is none.
    pub logit_shift: f64,
    /// Probability that a label becomes the null class.
    pub label_drop: f32,
}

/// Names of the distributions of t.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightingName {
    /// t uniform in [0, 1].
    Uniform,
    /// log-normal sigma.
    Lognormal,
    /// The logistic function of a normal.
    LogitNormal,
}

impl Default for ObjectiveConfig {
    fn default() -> Self {
        Self {
            path: Path::Linear,
            weighting: WeightingName::Uniform,
            logit_mean: 0.0,
            logit_std: 1.0,
            logit_shift: 1.0,
            label_drop: 0.1,
        }
    }
}

impl ObjectiveConfig {
    /// The distribution of t with its numbers.
    pub fn weighting(&self) -> Weighting {
        match self.weighting {
            WeightingName::Uniform => Weighting::Uniform,
            WeightingName::Lognormal => Weighting::Lognormal,
            WeightingName::LogitNormal => {
                Weighting::LogitNormal { mean: self.logit_mean, std: self.logit_std, shift: self.logit_shift }
            }
        }
    }
}

/// Keys under `train`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Optimizer steps of the whole run.
    pub steps: u64,
    /// Samples of a step, over all ranks.
    pub global_batch: usize,
    /// Most samples that a rank puts through the model at once; 0 is its whole share. Smaller
    /// values accumulate gradients and change nothing else.
    pub micro_batch: usize,
    /// Decides initial weights, data order and every random draw.
    pub seed: u64,
    /// Type of matrix products: `f32`, `bf16` or `f16`.
    pub precision: Precision,
    /// Threads of a rank on the CPU; 0 divides the cores that the rank may use.
    pub threads: usize,
    /// Non-finite steps in a row after which the run stops.
    pub max_skipped_steps: u64,
    /// Seconds without a new step after which the run ends with an error that says what each late rank does; 0 for
    /// none. Saves do not count.
    pub step_timeout_seconds: f64,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            steps: 400_000,
            global_batch: 256,
            micro_batch: 0,
            seed: 0,
            precision: Precision::F32,
            threads: 0,
            max_skipped_steps: 10,
            step_timeout_seconds: 1800.0,
        }
    }
}

/// Keys under `optimizer`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// Learning rate, constant after the warm-up.
    pub learning_rate: f64,
    /// Steps over which the learning rate rises linearly from 0.
    pub warmup_steps: u64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Gradients are scaled down to this global norm.
    pub max_grad_norm: f64,
    /// Decay of the weights' moving average.
    pub ema_decay: f64,
    /// Where the moments and the moving average are kept: `none` is all on every rank, `zero1` a part on each
    /// (ZeRO stage 1, Rajbhandari et al., arXiv 1910.02054). Changes no weight, and 12 bytes a parameter and rank
    /// become 12 / world size.
    pub sharding: Sharding,
}

/// How optimizer state is spread over the ranks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sharding {
    /// Every rank has all of it.
    #[default]
    None,
    /// Every rank has its part.
    Zero1,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            learning_rate: 1e-4,
            warmup_steps: 0,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            ema_decay: 0.9999,
            sharding: Sharding::None,
        }
    }
}

impl Config {
    /// The model with its projectors.
    pub fn sit(&self) -> SitConfig {
        let (model, alignment) = (&self.model, &self.alignment);
        SitConfig {
            input_size: model.input_size,
            patch_size: model.patch_size,
            in_channels: model.in_channels,
            hidden_size: model.hidden_size,
            depth: model.depth,
            num_heads: model.num_heads,
            mlp_ratio: model.mlp_ratio,
            num_classes: model.num_classes,
            encoder_depth: alignment.encoder_depth,
            projector_dim: alignment.projector_dim,
            z_dims: alignment.z_dims.clone(),
            qk_norm: model.qk_norm,
        }
    }
}
