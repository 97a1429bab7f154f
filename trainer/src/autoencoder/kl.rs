//! diffusers' `AutoencoderKL` (the autoencoders of Stable Diffusion and its relatives): residual
//! blocks with group normalisation, one attention in the middle, and a Gaussian posterior.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use burn::tensor::ops::PadMode;
use burn::tensor::{Device, Tensor};
use serde::Deserialize;

use crate::nn::{Conv2d, GroupNorm, Linear, silu};
use crate::params::{Init, Layout, Params, Scope};
use crate::weights::{Weights, WeightsError};

/// Epsilon of every group normalisation.
const NORM_EPSILON: f64 = 1e-6;
/// diffusers' bounds on the posterior's log variance.
const LOG_VARIANCE: (f64, f64) = (-30.0, 20.0);

/// The part of diffusers' `config.json` that decides the model. Keys that a file lacks take
/// diffusers' defaults; other keys are ignored.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct KlConfig {
    /// Channels at each resolution, finest first.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks at each resolution of the encoder; the decoder has one more.
    pub layers_per_block: usize,
    /// Channels of a latent (a posterior's mean).
    pub latent_channels: usize,
    /// Groups of every normalisation.
    pub norm_num_groups: usize,
    /// Whether a 1x1 convolution follows the encoder.
    pub use_quant_conv: bool,
    /// Whether a 1x1 convolution precedes the decoder.
    pub use_post_quant_conv: bool,
    /// Whether the middle has attention.
    pub mid_block_add_attention: bool,
    /// A diffusion model sees (latent - shift) * scale.
    pub scaling_factor: f64,
    /// See `scaling_factor`.
    pub shift_factor: Option<f64>,
}

impl Default for KlConfig {
    fn default() -> Self {
        Self {
            block_out_channels: vec![64],
            layers_per_block: 1,
            latent_channels: 4,
            norm_num_groups: 32,
            use_quant_conv: true,
            use_post_quant_conv: true,
            mid_block_add_attention: true,
            scaling_factor: 0.18215,
            shift_factor: None,
        }
    }
}

impl KlConfig {
    /// Reads diffusers' `config.json`; `path` is for messages.
    ///
    /// # Errors
    /// It is no JSON object of these keys, or describes no model.
    pub fn from_json(path: &Path, text: &str) -> Result<Self, WeightsError> {
        let format = |problem: String| WeightsError::Format { path: path.to_owned(), problem };
        // By way of an object: serde would read a struct from a JSON list as well.
        let config: Self = serde_json::from_str(text)
            .and_then(|object: serde_json::Map<_, _>| serde_json::from_value(object.into()))
            .map_err(|e| format(e.to_string()))?;
        config.validate().map_err(format)?;
        Ok(config)
    }

    fn validate(&self) -> Result<(), String> {
        let groups = self.norm_num_groups;
        if self.block_out_channels.is_empty() || self.layers_per_block == 0 || self.latent_channels == 0 {
            return Err("block_out_channels, layers_per_block or latent_channels is empty or zero".into());
        }
        match self.block_out_channels.iter().find(|&&c| c == 0 || groups == 0 || c % groups != 0) {
            None => Ok(()),
            Some(channels) => Err(format!(
                "norm_num_groups = {groups} does not divide the {channels} channels of a block; put the \
                 model's own config.json, with its norm_num_groups, beside the weights"
            )),
        }
    }

    /// Reads what it can off names and shapes. The groups and the scale leave no trace there and
    /// take diffusers' defaults, 32 and 0.18215.
    ///
    /// # Errors
    /// The tensors are not those of an AutoencoderKL, or 32 groups do not fit them.
    pub fn infer(weights: &Weights) -> Result<Self, WeightsError> {
        let shape = |name: &str| weights.tensors.get(name).map(|t| t.shape.as_slice());
        let outputs = |name: String| shape(&name).and_then(|s| s.first().copied());
        let mut config = Self { block_out_channels: vec![], ..Self::default() };
        while let Some(channels) =
            outputs(format!("encoder.down_blocks.{}.resnets.0.conv1.weight", config.block_out_channels.len()))
        {
            config.block_out_channels.push(channels);
        }
        let layer = |i: usize| shape(&format!("encoder.down_blocks.0.resnets.{i}.conv1.weight"));
        config.layers_per_block = (0..).take_while(|&i| layer(i).is_some()).count();
        let latent = shape("decoder.conv_in.weight").and_then(|s| s.get(1).copied());
        config.latent_channels = latent.unwrap_or(0);
        config.use_quant_conv = shape("quant_conv.weight").is_some();
        config.use_post_quant_conv = shape("post_quant_conv.weight").is_some();
        config.mid_block_add_attention = shape("encoder.mid_block.attentions.0.group_norm.weight").is_some();
        if config.block_out_channels.is_empty() || config.latent_channels == 0 {
            let names = weights.tensors.keys().take(3).cloned().collect::<Vec<_>>().join(", ");
            return Err(weights.mismatch(format!(
                "there is no encoder.down_blocks.0.resnets.0.conv1.weight or no decoder.conv_in.weight (it \
                 begins with {names}); an AutoencoderKL in diffusers' layout is needed"
            )));
        }
        config.validate().map_err(|problem| weights.mismatch(problem))?;
        Ok(config)
    }

    /// Pixels of the image to one of the latent, along each side.
    pub fn downsample(&self) -> usize {
        1 << (self.block_out_channels.len() - 1)
    }

    /// The parameters, under diffusers' names. First values are PyTorch's default for convolutions.
    pub fn layout(&self) -> Layout {
        let mut to = LayoutBuilder(Layout::default());
        let channels = &self.block_out_channels;
        let (finest, coarsest) = (channels[0], channels[channels.len() - 1]);
        let moments = 2 * self.latent_channels;

        to.conv("encoder.conv_in", 3, finest, 3);
        let mut inputs = finest;
        for (i, &outputs) in channels.iter().enumerate() {
            let name = format!("encoder.down_blocks.{i}");
            to.resnets(&name, inputs, outputs, self.layers_per_block);
            if i + 1 < channels.len() {
                to.conv(&format!("{name}.downsamplers.0.conv"), outputs, outputs, 3);
            }
            inputs = outputs;
        }
        to.middle("encoder.mid_block", coarsest, self.mid_block_add_attention);
        to.norm("encoder.conv_norm_out", coarsest);
        to.conv("encoder.conv_out", coarsest, moments, 3);

        to.conv("decoder.conv_in", self.latent_channels, coarsest, 3);
        to.middle("decoder.mid_block", coarsest, self.mid_block_add_attention);
        let mut inputs = coarsest;
        for (i, &outputs) in channels.iter().rev().enumerate() {
            let name = format!("decoder.up_blocks.{i}");
            to.resnets(&name, inputs, outputs, self.layers_per_block + 1);
            if i + 1 < channels.len() {
                to.conv(&format!("{name}.upsamplers.0.conv"), outputs, outputs, 3);
            }
            inputs = outputs;
        }
        to.norm("decoder.conv_norm_out", finest);
        to.conv("decoder.conv_out", finest, 3, 3);

        if self.use_quant_conv {
            to.conv("quant_conv", moments, moments, 1);
        }
        if self.use_post_quant_conv {
            to.conv("post_quant_conv", self.latent_channels, self.latent_channels, 1);
        }
        to.0
    }
}

struct LayoutBuilder(Layout);

impl LayoutBuilder {
    fn conv(&mut self, name: &str, inputs: usize, outputs: usize, kernel: usize) {
        let bound = Init::Uniform(1.0 / ((inputs * kernel * kernel) as f32).sqrt());
        self.0.add(format!("{name}.weight"), &[outputs, inputs, kernel, kernel], bound.clone());
        self.0.add(format!("{name}.bias"), &[outputs], bound);
    }

    fn norm(&mut self, name: &str, channels: usize) {
        self.0.add(format!("{name}.weight"), &[channels], Init::Ones);
        self.0.add(format!("{name}.bias"), &[channels], Init::Zeros);
    }

    fn resnets(&mut self, name: &str, inputs: usize, outputs: usize, count: usize) {
        for j in 0..count {
            let name = format!("{name}.resnets.{j}");
            let inputs = if j == 0 { inputs } else { outputs };
            self.norm(&format!("{name}.norm1"), inputs);
            self.conv(&format!("{name}.conv1"), inputs, outputs, 3);
            self.norm(&format!("{name}.norm2"), outputs);
            self.conv(&format!("{name}.conv2"), outputs, outputs, 3);
            if inputs != outputs {
                self.conv(&format!("{name}.conv_shortcut"), inputs, outputs, 1);
            }
        }
    }

    fn middle(&mut self, name: &str, channels: usize, attention: bool) {
        self.resnets(name, channels, channels, 2);
        if attention {
            let name = format!("{name}.attentions.0");
            self.norm(&format!("{name}.group_norm"), channels);
            let bound = Init::Uniform(1.0 / (channels as f32).sqrt());
            for part in ["to_q", "to_k", "to_v", "to_out.0"] {
                self.0.linear(
                    &format!("{name}.{part}"),
                    channels,
                    channels,
                    bound.clone(),
                    Some(bound.clone()),
                );
            }
        }
    }
}

/// An AutoencoderKL with weights.
#[derive(Debug, Clone)]
pub struct AutoencoderKl {
    encoder: Encoder,
    decoder: Decoder,
    quant: Option<Conv2d>,
    post_quant: Option<Conv2d>,
}

#[derive(Debug, Clone)]
struct Encoder {
    conv_in: Conv2d,
    stages: Vec<Stage>,
    middle: Middle,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

#[derive(Debug, Clone)]
struct Decoder {
    conv_in: Conv2d,
    middle: Middle,
    stages: Vec<Stage>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

/// The blocks of one resolution, and the convolution to the next.
#[derive(Debug, Clone)]
struct Stage {
    resnets: Vec<Resnet>,
    resample: Option<Conv2d>,
}

#[derive(Debug, Clone)]
struct Resnet {
    norms: [GroupNorm; 2],
    convs: [Conv2d; 2],
    shortcut: Option<Conv2d>,
}

#[derive(Debug, Clone)]
struct Middle {
    resnets: Vec<Resnet>,
    attention: Option<Attention>,
}

#[derive(Debug, Clone)]
struct Attention {
    norm: GroupNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
}

impl AutoencoderKl {
    /// Binds the parameters of [`KlConfig::layout`].
    pub fn bind(config: &KlConfig, params: &Params) -> Self {
        let groups = config.norm_num_groups;
        let stages = config.block_out_channels.len();
        let stage = |scope: &Scope, blocks: &str, resample: &str, i: usize, resnets: usize, stride: usize| {
            let scope = scope.sub(blocks).sub(i);
            // Going down, the padding is not the same on both sides and is put on by hand.
            let padding = if stride == 1 { 1 } else { 0 };
            let conv = || Conv2d::bind(&scope.sub(resample).sub("0.conv"), stride, padding);
            Stage { resnets: resnets_of(&scope, resnets, groups), resample: (i + 1 < stages).then(conv) }
        };
        let (encoder, decoder) = (params.scope("encoder"), params.scope("decoder"));
        let layers = config.layers_per_block;
        let attention = config.mid_block_add_attention;
        Self {
            encoder: Encoder {
                conv_in: Conv2d::bind(&encoder.sub("conv_in"), 1, 1),
                stages: (0..stages)
                    .map(|i| stage(&encoder, "down_blocks", "downsamplers", i, layers, 2))
                    .collect(),
                middle: Middle::bind(&encoder.sub("mid_block"), groups, attention),
                norm_out: GroupNorm::bind(&encoder.sub("conv_norm_out"), groups, NORM_EPSILON),
                conv_out: Conv2d::bind(&encoder.sub("conv_out"), 1, 1),
            },
            decoder: Decoder {
                conv_in: Conv2d::bind(&decoder.sub("conv_in"), 1, 1),
                middle: Middle::bind(&decoder.sub("mid_block"), groups, attention),
                stages: (0..stages)
                    .map(|i| stage(&decoder, "up_blocks", "upsamplers", i, layers + 1, 1))
                    .collect(),
                norm_out: GroupNorm::bind(&decoder.sub("conv_norm_out"), groups, NORM_EPSILON),
                conv_out: Conv2d::bind(&decoder.sub("conv_out"), 1, 1),
            },
            quant: config.use_quant_conv.then(|| Conv2d::bind(&params.scope("quant_conv"), 1, 0)),
            post_quant: config
                .use_post_quant_conv
                .then(|| Conv2d::bind(&params.scope("post_quant_conv"), 1, 0)),
        }
    }

    /// Reads the weights, under diffusers' present names or its older ones.
    ///
    /// # Errors
    /// The tensors are not exactly those of the configuration's model.
    pub fn from_weights(config: &KlConfig, weights: &Weights, device: &Device) -> Result<Self, WeightsError> {
        config.validate().map_err(|problem| weights.mismatch(problem))?;
        let weights = with_present_names(weights);
        let params = Params::from_weights(&Arc::new(config.layout()), &weights, device)?;
        Ok(Self::bind(config, &params))
    }

    /// Images [N, 3, H, W] in [-1, 1] to the posterior's mean and standard deviation, as one
    /// [N, 2C, h, w].
    pub fn encode(&self, images: Tensor<4>) -> Tensor<4> {
        let encoder = &self.encoder;
        let x = encoder.stages.iter().fold(encoder.conv_in.forward(images), |x, stage| {
            let x = forward_all(&stage.resnets, x);
            match &stage.resample {
                Some(conv) => conv.forward(x.pad((0, 1, 0, 1), PadMode::Constant(0.0))),
                None => x,
            }
        });
        let x = encoder.norm_out.forward(encoder.middle.forward(x));
        let x = encoder.conv_out.forward(silu(x));
        let x = match &self.quant {
            Some(conv) => conv.forward(x),
            None => x,
        };
        let halves = x.chunk(2, 1);
        let std = (halves[1].clone().clamp(LOG_VARIANCE.0, LOG_VARIANCE.1) * 0.5).exp();
        Tensor::cat(vec![halves[0].clone(), std], 1)
    }

    /// Latents [N, C, h, w] to images [N, 3, H, W], mostly in [-1, 1].
    pub fn decode(&self, latents: Tensor<4>) -> Tensor<4> {
        let decoder = &self.decoder;
        let x = match &self.post_quant {
            Some(conv) => conv.forward(latents),
            None => latents,
        };
        let x = decoder.middle.forward(decoder.conv_in.forward(x));
        let x = decoder.stages.iter().fold(x, |x, stage| {
            let x = forward_all(&stage.resnets, x);
            match &stage.resample {
                Some(conv) => conv.forward(super::upsample_nearest(x)),
                None => x,
            }
        });
        decoder.conv_out.forward(silu(decoder.norm_out.forward(x)))
    }
}

/// Renames the attention's `query`, `key`, `value` and `proj_attn` of older files, and flattens
/// weights that were stored as 1x1 convolutions.
fn with_present_names(weights: &Weights) -> Weights {
    let renamed = [("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")];
    let tensors: BTreeMap<_, _> = weights
        .tensors
        .iter()
        .map(|(name, tensor)| {
            let mut tensor = tensor.clone();
            let Some((block, part)) = name.split_once(".attentions.0.") else {
                return (name.clone(), tensor);
            };
            if let [outputs, inputs, 1, 1] = tensor.shape[..] {
                tensor.shape = vec![outputs, inputs];
            }
            let part = renamed
                .iter()
                .find_map(|(old, new)| Some(format!("{new}.{}", part.strip_prefix(old)?.strip_prefix('.')?)))
                .unwrap_or_else(|| part.to_owned());
            (format!("{block}.attentions.0.{part}"), tensor)
        })
        .collect();
    Weights { path: weights.path.clone(), tensors, metadata: weights.metadata.clone() }
}

fn resnets_of(scope: &Scope, count: usize, groups: usize) -> Vec<Resnet> {
    (0..count)
        .map(|j| {
            let scope = scope.sub("resnets").sub(j);
            let norm = |name: &str| GroupNorm::bind(&scope.sub(name), groups, NORM_EPSILON);
            let conv = |name: &str| Conv2d::bind(&scope.sub(name), 1, 1);
            let shortcut = scope.sub("conv_shortcut");
            Resnet {
                norms: [norm("norm1"), norm("norm2")],
                convs: [conv("conv1"), conv("conv2")],
                shortcut: shortcut.find::<4>("weight").map(|_| Conv2d::bind(&shortcut, 1, 0)),
            }
        })
        .collect()
}

fn forward_all(resnets: &[Resnet], x: Tensor<4>) -> Tensor<4> {
    resnets.iter().fold(x, |x, resnet| resnet.forward(x))
}

impl Resnet {
    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let y = self.convs[0].forward(silu(self.norms[0].forward(x.clone())));
        let y = self.convs[1].forward(silu(self.norms[1].forward(y)));
        match &self.shortcut {
            Some(conv) => conv.forward(x) + y,
            None => x + y,
        }
    }
}

impl Middle {
    fn bind(scope: &Scope, groups: usize, attention: bool) -> Self {
        let attention = attention.then(|| {
            let scope = scope.sub("attentions.0");
            Attention {
                norm: GroupNorm::bind(&scope.sub("group_norm"), groups, NORM_EPSILON),
                query: Linear::bind(&scope.sub("to_q")),
                key: Linear::bind(&scope.sub("to_k")),
                value: Linear::bind(&scope.sub("to_v")),
                out: Linear::bind(&scope.sub("to_out.0")),
            }
        });
        Self { resnets: resnets_of(scope, 2, groups), attention }
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let x = self.resnets[0].forward(x);
        let x = match &self.attention {
            Some(attention) => attention.forward(x),
            None => x,
        };
        self.resnets[1].forward(x)
    }
}

impl Attention {
    /// One head over all pixels, added to the input.
    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let [n, c, h, w] = x.dims();
        let tokens = self.norm.forward(x.clone()).reshape([n, c, h * w]).swap_dims(1, 2);
        let head = |linear: &Linear| linear.forward(tokens.clone()).reshape([n, 1, h * w, c]);
        let mixed = crate::ops::attention(head(&self.query), head(&self.key), head(&self.value));
        let out = self.out.forward(mixed.reshape([n, h * w, c]));
        x + out.swap_dims(1, 2).reshape([n, c, h, w])
    }
}
