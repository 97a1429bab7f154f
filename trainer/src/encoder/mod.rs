//! Frozen vision encoders whose patch tokens the alignment loss aims at, with their preprocessing.

mod family;
mod layouts;
pub mod preprocess;
pub mod probe;
pub mod resample;
pub mod vit;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::{Device, Tensor};
use xxhash_rust::xxh3::Xxh3;

use crate::images::Image;
use crate::params::Params;
use crate::weights::{Weights, WeightsError};
pub use family::Family;
use preprocess::Preprocess;
use vit::{Vit, VitConfig};

/// The quickstart's teacher (its card: `assets/quickstart-teacher.md`).
const QUICKSTART: &[u8] = include_bytes!("../../assets/quickstart-teacher.safetensors");

/// The quickstart's teacher by name, in stores and configurations.
pub const QUICKSTART_ID: &str = "quickstart-teacher";

/// Where in PyTorch's checkpoints encoders are: I-JEPA's, MoCo v3's, DINO's and MAE's. What else is in them, other
/// models and optimizers' state, is not read.
const PARTS: [&str; 4] = ["encoder", "state_dict", "teacher", "model"];

/// Why an encoder cannot be opened or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EncoderError {
    /// The weight file cannot be read, or holds another model.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The weight file lacks what tells the model's shape or family.
    #[error("{path} is no vision encoder that is known: {problem}")]
    Unknown {
        /// The file.
        path: PathBuf,
        /// What was looked for.
        problem: String,
    },
    /// No images were given.
    #[error("no images to encode")]
    NoImages,
    /// Images of one call differ in size.
    #[error(
        "image {number} is {found:?} pixels (width, height) where the first is {first:?}: give images of one size"
    )]
    MixedSizes {
        /// Position in the list.
        number: usize,
        /// Its width and height.
        found: (usize, usize),
        /// The first image's width and height.
        first: (usize, usize),
    },
    /// The images are not square.
    #[error("images are {width} x {height} pixels: encoders take square images, so crop them first")]
    NotSquare {
        /// In pixels.
        height: usize,
        /// In pixels.
        width: usize,
    },
    /// The resolution scales to no whole number of pixels.
    #[error("images of {resolution} pixels scale to no whole number at 224/256: use a multiple of 8")]
    Fraction {
        /// Pixels a side.
        resolution: usize,
    },
    /// The encoder's patches do not tile its input.
    #[error(
        "images of {resolution} pixels are seen at {input} pixels, which patches of {patch} do not tile: use a {}",
        fitting(*resolution, *input, *patch)
    )]
    Patches {
        /// Pixels a side of the image.
        resolution: usize,
        /// Pixels a side of the encoder's input.
        input: usize,
        /// Pixels a side of a patch.
        patch: usize,
    },
}

fn fitting(resolution: usize, input: usize, patch: usize) -> String {
    match resolution == input {
        true => format!("multiple of {patch}"),
        false => format!("resolution of which {patch} divides seven eighths"),
    }
}

/// Features of a batch of images.
#[derive(Debug, Clone)]
pub struct EncoderFeatures {
    /// [N, tokens, embed_dim], rows of patches top to bottom.
    pub patch_tokens: Tensor<3>,
    /// The class token [N, embed_dim], if there is one.
    pub cls: Option<Tensor<2>>,
}

impl EncoderFeatures {
    /// The mean over the patch tokens, [N, embed_dim].
    pub fn pooled(&self) -> Tensor<2> {
        let [n, _, d] = self.patch_tokens.dims();
        self.patch_tokens.clone().mean_dim(1).reshape([n, d])
    }
}

/// A frozen vision encoder.
#[derive(Debug, Clone)]
pub struct VisionEncoder {
    id: String,
    model: Vit,
    config: VitConfig,
    preprocess: Preprocess,
    device: Device,
}

impl VisionEncoder {
    /// Opens a weight file (safetensors or PyTorch's) in any layout in which such models are published;
    /// the shape follows from the tensors. The family has to be given where tensors do not show it.
    ///
    /// # Errors
    /// The file cannot be read, or holds another model: the message lists the missing, unexpected
    /// and misshapen tensors.
    pub fn open(path: &Path, family: Option<Family>, device: &Device) -> Result<Self, EncoderError> {
        Self::from_weights(&Weights::open_part(path, &PARTS)?, family, device)
    }

    /// From tensors in memory, named as in a published file.
    ///
    /// # Errors
    /// The tensors are not a vision encoder's.
    pub fn from_weights(
        weights: &Weights,
        family: Option<Family>,
        device: &Device,
    ) -> Result<Self, EncoderError> {
        let (family, weights) = layouts::official(weights, family)?;
        let config = layouts::infer(&weights, family)?;
        let params = Params::from_weights(&Arc::new(config.layout()), &weights, device)?;
        let model = Vit::bind(&config, &params);
        Ok(Self {
            id: identity(&config, &weights),
            model,
            config,
            preprocess: family.preprocess(),
            device: device.clone(),
        })
    }

    /// The encoder that a configuration or command names: the quickstart's teacher by its name, or a weight
    /// file, with its family before a colon (`mae:weights/mae.pth`) where that is needed.
    ///
    /// # Errors
    /// As for [`VisionEncoder::open`].
    pub fn named(name: &Path, device: &Device) -> Result<Self, EncoderError> {
        if name == Path::new(QUICKSTART_ID) {
            return Ok(Self::quickstart(device));
        }
        let (family, path) = Family::of_path(name);
        Self::open(&path, family, device)
    }

    /// The quickstart's teacher: 64 x 64 images, 8 x 8 tokens. Its weights are part of the program.
    pub fn quickstart(device: &Device) -> Self {
        Weights::from_safetensors(Path::new("(built-in quickstart teacher)"), QUICKSTART)
            .map_err(EncoderError::from)
            .and_then(|weights| Self::from_weights(&weights, Some(Family::DinoV2), device))
            .map(|encoder| Self { id: QUICKSTART_ID.to_owned(), ..encoder })
            .expect("the built-in teacher is sound: a test opens it")
    }

    /// Tells encoders apart: the name that the weights give themselves (metadata `id`), or the model's
    /// usual name and a digest of its weights, such as `dinov2-vit-b-0123abcd`.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Side of the input, in pixels, for square images of `resolution` pixels.
    ///
    /// # Errors
    /// The resolution does not fit the encoder.
    pub fn input_size(&self, resolution: usize) -> Result<usize, EncoderError> {
        self.grid(resolution)?;
        self.preprocess.input_size(resolution).ok_or(EncoderError::Fraction { resolution })
    }

    /// Where it runs.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What is done to an image before the model sees it.
    pub fn preprocessing(&self) -> Preprocess {
        self.preprocess
    }

    /// Features of inputs that are preprocessed already, [N, 3, S, S].
    pub fn forward_preprocessed(&self, input: Tensor<4>) -> EncoderFeatures {
        let output = self.model.forward(input);
        EncoderFeatures { patch_tokens: output.patch_tokens, cls: output.cls }
    }

    /// Width of the features.
    pub fn embed_dim(&self) -> usize {
        self.config.embed_dim
    }

    /// The model's shape.
    pub fn config(&self) -> &VitConfig {
        &self.config
    }

    /// The token grid (height, width) for square images of `resolution` pixels. A resolution that
    /// does not fit is rounded down to the patch here, and refused by [`VisionEncoder::grid`] and
    /// [`VisionEncoder::features`].
    pub fn tokens(&self, resolution: usize) -> (usize, usize) {
        let (to, from) = self.preprocess.resize.unwrap_or((1, 1));
        let side = resolution * to / from / self.config.patch_size;
        (side, side)
    }

    /// The token grid, as [`VisionEncoder::tokens`], of a resolution that must fit.
    ///
    /// # Errors
    /// The patches do not tile the encoder's input at this resolution.
    pub fn grid(&self, resolution: usize) -> Result<(usize, usize), EncoderError> {
        let input = self.preprocess.input_size(resolution).ok_or(EncoderError::Fraction { resolution })?;
        let patch = self.config.patch_size;
        if !input.is_multiple_of(patch) {
            return Err(EncoderError::Patches { resolution, input, patch });
        }
        Ok(self.tokens(resolution))
    }

    /// Features of images, all square and of one size.
    ///
    /// # Errors
    /// The list is empty, or the images' sizes differ or do not fit the encoder.
    pub fn features(&self, images: &[Image]) -> Result<EncoderFeatures, EncoderError> {
        self.forward(preprocess::to_tensor(images, &self.device)?)
    }

    /// Features of images [N, 3, R, R] with values 0..255.
    ///
    /// # Errors
    /// The images are not square, or their size does not fit the encoder.
    pub fn forward(&self, images: Tensor<4>) -> Result<EncoderFeatures, EncoderError> {
        Ok(self.forward_preprocessed(self.preprocess(images)?))
    }

    /// The model's input for images [N, 3, R, R] with values 0..255.
    ///
    /// # Errors
    /// The images are not square, or their size does not fit the encoder.
    pub fn preprocess(&self, images: Tensor<4>) -> Result<Tensor<4>, EncoderError> {
        let [_, _, height, width] = images.dims();
        if height != width {
            return Err(EncoderError::NotSquare { height, width });
        }
        self.grid(height)?;
        self.preprocess.apply(images)
    }

    /// The position embedding [1, 1 + h w, embed_dim] (h w without a class token) resampled to a token grid.
    pub fn positions(&self, grid: [usize; 2]) -> Tensor<3> {
        self.model.positions(grid)
    }
}

/// The quickstart's teacher: [`VisionEncoder::quickstart`].
pub fn quickstart(device: &Device) -> VisionEncoder {
    VisionEncoder::quickstart(device)
}

/// The `id` of the file's metadata, or the model's usual name and a digest of all tensors.
fn identity(config: &VitConfig, weights: &Weights) -> String {
    if let Some(id) = weights.metadata.get("id") {
        return id.clone();
    }
    let size = match config.embed_dim {
        384 => "s".to_owned(),
        768 => "b".to_owned(),
        1024 => "l".to_owned(),
        1280 => "h".to_owned(),
        1536 => "g".to_owned(),
        other => other.to_string(),
    };
    let registers = if config.registers > 0 { "-reg" } else { "" };
    let mut digest = Xxh3::new();
    for (name, tensor) in &weights.tensors {
        digest.update(name.as_bytes());
        digest.update(&tensor.bytes);
    }
    format!("{}-vit-{size}{registers}-{:08x}", config.family, digest.digest() >> 32)
}

#[cfg(test)]
mod tests;
