//! Latents and pixels: AutoencoderKL in diffusers' layout, the TAESD family, and the quickstart's
//! own small autoencoder, which is of that family.

pub mod kl;
pub mod taesd;

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor};
use xxhash_rust::xxh3::Xxh3;

use crate::weights::{RawTensor, Weights, WeightsError};
use kl::{AutoencoderKl, KlConfig};
use taesd::Taesd;

/// The quickstart's weights; `trainer/assets/quickstart-autoencoder.md` tells their story.
const QUICKSTART: &[u8] = include_bytes!("../../assets/quickstart-autoencoder.safetensors");

/// What an encoder gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A posterior, as mean and standard deviation: a latent is drawn from it (AutoencoderKL).
    Moments,
    /// The latent itself: there is nothing to draw (the TAESD family).
    Latents,
}

/// What users of an autoencoder need to know about it.
#[derive(Debug, Clone, PartialEq)]
pub struct AutoencoderInfo {
    /// Tells autoencoders apart: the name that the weights give themselves, or architecture and digest.
    pub id: String,
    /// What [`Autoencoder::encode`] gives.
    pub kind: Kind,
    /// Channels of a latent: C.
    pub channels: usize,
    /// Pixels of the image to one of the latent, along each side.
    pub downsample: usize,
    /// One number a channel: a diffusion model sees (latent - shift) * scale.
    pub scale: Vec<f32>,
    /// One number a channel; see `scale`.
    pub shift: Vec<f32>,
}

/// A frozen autoencoder with its weights on a device.
#[derive(Debug, Clone)]
pub struct Autoencoder {
    info: AutoencoderInfo,
    model: Model,
}

#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "one a process")]
enum Model {
    Kl(AutoencoderKl),
    Taesd(Taesd),
}

impl Autoencoder {
    /// The autoencoder that a command names: `quickstart`, or a weight file as [`Autoencoder::open`] reads.
    ///
    /// # Errors
    /// As for [`Autoencoder::open`].
    pub fn named(name: &Path, device: &Device) -> Result<Self, WeightsError> {
        if name == Path::new("quickstart") { Ok(quickstart(device)) } else { Self::open(name, device) }
    }

    /// Opens a weight file, or a folder with one. Where the file is one of a pair such as
    /// `taef2_encoder.pth` and `taef2_decoder.pth`, both are read. For an AutoencoderKL, `config.json`
    /// beside the weights is read where it is there, and else inferred from names and shapes.
    ///
    /// # Errors
    /// No readable weights there, or not those of an autoencoder of a known architecture: the error
    /// names what is missing, unexpected or misshapen.
    pub fn open(path: &Path, device: &Device) -> Result<Self, WeightsError> {
        let weights = match halves(path) {
            Some([encoder, decoder]) => pair(&Weights::open(&encoder)?, &Weights::open(&decoder)?),
            None => Weights::open(path)?,
        };
        let folder = if path.is_dir() { Some(path) } else { path.parent() };
        let config_path = folder.unwrap_or(Path::new("")).join("config.json");
        let config = if is_kl(&weights) && config_path.is_file() {
            let text = std::fs::read_to_string(&config_path)
                .map_err(|source| WeightsError::Io { path: config_path.clone(), source })?;
            Some(KlConfig::from_json(&config_path, &text)?)
        } else {
            None
        };
        Self::from_weights(&weights, config.as_ref(), device)
    }

    /// From tensors: of an AutoencoderKL (`config` is inferred where it is None), or `encoder.*` and
    /// `decoder.*` of the TAESD family under its own or diffusers' names.
    ///
    /// # Errors
    /// The tensors are not those of an autoencoder of a known architecture.
    pub fn from_weights(
        weights: &Weights,
        config: Option<&KlConfig>,
        device: &Device,
    ) -> Result<Self, WeightsError> {
        if is_kl(weights) {
            let config = config.map_or_else(|| KlConfig::infer(weights), |c| Ok(c.clone()))?;
            let model = AutoencoderKl::from_weights(&config, weights, device)?;
            let info = AutoencoderInfo {
                id: identity("kl", weights),
                kind: Kind::Moments,
                channels: config.latent_channels,
                downsample: config.downsample(),
                scale: vec![config.scaling_factor as f32; config.latent_channels],
                shift: vec![config.shift_factor.unwrap_or(0.0) as f32; config.latent_channels],
            };
            return Ok(Self { info, model: Model::Kl(model) });
        }
        let weights = &with_own_names(weights);
        let (config, model) = Taesd::from_weights(weights, device)?;
        let info = AutoencoderInfo {
            id: identity("taesd", weights),
            kind: Kind::Latents,
            channels: config.latent_channels,
            downsample: config.downsample(),
            scale: per_channel(weights, "scale", config.latent_channels, 1.0)?,
            shift: per_channel(weights, "shift", config.latent_channels, 0.0)?,
        };
        Ok(Self { info, model: Model::Taesd(model) })
    }

    /// What it is.
    pub fn info(&self) -> &AutoencoderInfo {
        &self.info
    }

    /// Images [N, 3, H, W] in [-1, 1] to latents [N, C, h, w], or to mean and standard deviation
    /// [N, 2C, h, w], as [`AutoencoderInfo::kind`] says. H and W are multiples of the downsampling.
    pub fn encode(&self, images: Tensor<4>) -> Tensor<4> {
        match &self.model {
            Model::Kl(model) => model.encode(images),
            Model::Taesd(model) => model.encode(images * 0.5 + 0.5),
        }
    }

    /// Latents [N, C, h, w], as the encoder gives them (scale and shift undone), to images
    /// [N, 3, H, W], mostly in [-1, 1].
    pub fn decode(&self, latents: Tensor<4>) -> Tensor<4> {
        match &self.model {
            Model::Kl(model) => model.decode(latents),
            Model::Taesd(model) => model.decode(latents) * 2.0 - 1.0,
        }
    }
}

/// The autoencoder that the project trained for its quickstart: 64 x 64 images, latents 4 x 16 x 16.
pub fn quickstart(device: &Device) -> Autoencoder {
    Weights::from_safetensors(Path::new("quickstart-autoencoder.safetensors"), QUICKSTART)
        .and_then(|weights| Autoencoder::from_weights(&weights, None, device))
        .expect("the weights that are part of this library load")
}

/// The autoencoder that a latent store names, where it is part of this library.
///
/// # Errors
/// It is not: its weights have to be given.
pub fn by_id(id: &str, device: &Device) -> Result<Autoencoder, WeightsError> {
    let own = quickstart(device);
    if own.info().id == id {
        return Ok(own);
    }
    Err(WeightsError::Mismatch {
        path: PathBuf::from(id),
        problem: format!(
            "the latents were made by {id:?}: name its weight file with sample.autoencoder=PATH"
        ),
    })
}

fn is_kl(weights: &Weights) -> bool {
    weights.tensors.contains_key("encoder.conv_in.weight")
}

/// The two files of a pair, if the path is one of them or a folder that holds just one pair.
fn halves(path: &Path) -> Option<[PathBuf; 2]> {
    let of_file = |path: &Path| {
        let name = path.file_name()?.to_str()?;
        let named = |half: &str| {
            let renamed = name.replace("encoder", half).replace("decoder", half);
            path.with_file_name(renamed)
        };
        let both = [named("encoder"), named("decoder")];
        (both[0] != both[1] && both.iter().all(|p| p.is_file())).then_some(both)
    };
    if !path.is_dir() {
        return of_file(path);
    }
    let mut pairs: Vec<_> =
        std::fs::read_dir(path).ok()?.filter_map(|entry| of_file(&entry.ok()?.path())).collect();
    pairs.sort();
    pairs.dedup();
    if pairs.len() == 1 { pairs.pop() } else { None }
}

/// One set of tensors, `encoder.*` and `decoder.*`, out of two files.
fn pair(encoder: &Weights, decoder: &Weights) -> Weights {
    let named = |half: &str, weights: &Weights| -> Vec<(String, RawTensor)> {
        weights.tensors.iter().map(|(name, t)| (format!("{half}.{name}"), t.clone())).collect()
    };
    let tensors = named("encoder", encoder).into_iter().chain(named("decoder", decoder)).collect();
    Weights { path: encoder.path.clone(), tensors, metadata: encoder.metadata.clone() }
}

/// Renames diffusers' `AutoencoderTiny`: its sequences are called `layers`, and the decoder's begins
/// behind the soft bound, which is a member of the original's.
fn with_own_names(weights: &Weights) -> Weights {
    let renamed = |name: &str| -> Option<String> {
        let (half, rest) = name.split_once(".layers.")?;
        let (number, rest) = rest.split_once('.')?;
        let number = number.parse::<usize>().ok()? + usize::from(half == "decoder");
        Some(format!("{half}.{number}.{rest}"))
    };
    let tensors = weights
        .tensors
        .iter()
        .map(|(name, t)| (renamed(name).unwrap_or_else(|| name.clone()), t.clone()))
        .collect();
    Weights { path: weights.path.clone(), tensors, metadata: weights.metadata.clone() }
}

/// The `id` of the file's metadata, or architecture and digest of all tensors.
fn identity(architecture: &str, weights: &Weights) -> String {
    if let Some(id) = weights.metadata.get("id") {
        return id.clone();
    }
    let mut digest = Xxh3::new();
    for (name, tensor) in &weights.tensors {
        digest.update(name.as_bytes());
        digest.update(&tensor.bytes);
    }
    format!("{architecture}-{:016x}", digest.digest())
}

/// A list of the file's metadata, one number a channel.
fn per_channel(
    weights: &Weights,
    key: &str,
    channels: usize,
    default: f32,
) -> Result<Vec<f32>, WeightsError> {
    let Some(text) = weights.metadata.get(key) else { return Ok(vec![default; channels]) };
    match serde_json::from_str::<Vec<f32>>(text) {
        Ok(values) if values.len() == channels && values.iter().all(|v| v.is_finite()) => Ok(values),
        _ => Err(weights.mismatch(format!(
            "metadata {key} is {text}, where a JSON list of {channels} numbers belongs, one a latent channel"
        ))),
    }
}

/// Every pixel doubled in width and height: [N, C, H, W] -> [N, C, 2H, 2W].
fn upsample_nearest(x: Tensor<4>) -> Tensor<4> {
    let [n, c, h, w] = x.dims();
    x.reshape([n, c, h, 1, w, 1]).expand([n, c, h, 2, w, 2]).reshape([n, c, 2 * h, 2 * w])
}

#[cfg(test)]
mod tests;
