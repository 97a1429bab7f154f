//! The TAESD family of small autoencoders (O. Boer Bohan, `madebyollin/taesd`: TAESD, TAESDXL,
//! TAESD3, TAEF1, TAEF2): a few convolutions and residual blocks for each resolution, no posterior.
//!
//! The published files hold an encoder and a decoder, each a PyTorch `nn.Sequential` whose members
//! are named by number. The members follow from [`TaesdConfig`], which [`TaesdConfig::infer`] reads
//! off names and shapes.

use std::collections::BTreeMap;
use std::sync::Arc;

use burn::tensor::activation::relu;
use burn::tensor::{Device, Tensor};

use crate::nn::{Conv2d, GroupNorm};
use crate::params::{Init, Layout, Params, Scope};
use crate::weights::{RawTensor, Weights, WeightsError};

/// Groups of the normalisation in a middle block, and its epsilon (PyTorch's default).
const POOL_GROUPS: usize = 4;
const POOL_EPSILON: f64 = 1e-5;
/// A middle block's pooling path has this many times the block's channels.
const POOL_EXPANSION: usize = 4;
/// The decoder bounds latents softly: 3 tanh(x / 3).
const LATENT_BOUND: f64 = 3.0;

/// The shape of an autoencoder of the family. Lists go from the finest resolution (the image's) to
/// the coarsest (the latent's), each half the one before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaesdConfig {
    /// Channels of the latent: 4, 16 and 32 are published.
    pub latent_channels: usize,
    /// Channels at each resolution: four times 64 in the published ones.
    pub widths: Vec<usize>,
    /// The encoder's residual blocks at each resolution: 1, 3, 3, 3 in the published ones.
    pub encoder_blocks: Vec<usize>,
    /// The decoder's residual blocks at each resolution: 1, 3, 3, 3 in the published ones.
    pub decoder_blocks: Vec<usize>,
    /// Whether the blocks at the coarsest resolution have a normalised pooling path (TAEF2's do).
    pub mid_group_norm: bool,
}

/// One member of a sequence that has weights or does something, with its number as its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Member {
    Conv { inputs: usize, outputs: usize, stride: usize, bias: bool },
    Block { width: usize, pool: bool },
    Clamp,
    Relu,
    Upsample,
}

impl TaesdConfig {
    /// The published architecture: 64 channels everywhere, eight times downsampled.
    pub fn published(latent_channels: usize, mid_group_norm: bool) -> Self {
        Self {
            latent_channels,
            widths: vec![64; 4],
            encoder_blocks: vec![1, 3, 3, 3],
            decoder_blocks: vec![1, 3, 3, 3],
            mid_group_norm,
        }
    }

    /// Pixels of the image to one of the latent, along each side.
    pub fn downsample(&self) -> usize {
        1 << (self.widths.len() - 1)
    }

    fn encoder_members(&self) -> Vec<Member> {
        let coarsest = self.widths.len() - 1;
        let mut members = vec![conv(3, self.widths[0])];
        for (stage, &width) in self.widths.iter().enumerate() {
            if stage > 0 {
                let inputs = self.widths[stage - 1];
                members.push(Member::Conv { inputs, outputs: width, stride: 2, bias: false });
            }
            let pool = self.mid_group_norm && stage == coarsest;
            members.extend(std::iter::repeat_n(Member::Block { width, pool }, self.encoder_blocks[stage]));
        }
        members.push(conv(self.widths[coarsest], self.latent_channels));
        members
    }

    fn decoder_members(&self) -> Vec<Member> {
        let coarsest = self.widths.len() - 1;
        let mut members =
            vec![Member::Clamp, conv(self.latent_channels, self.widths[coarsest]), Member::Relu];
        for (stage, &width) in self.widths.iter().enumerate().rev() {
            if stage < coarsest {
                let inputs = self.widths[stage + 1];
                members.push(Member::Upsample);
                members.push(Member::Conv { inputs, outputs: width, stride: 1, bias: false });
            }
            let pool = self.mid_group_norm && stage == coarsest;
            members.extend(std::iter::repeat_n(Member::Block { width, pool }, self.decoder_blocks[stage]));
        }
        members.push(conv(self.widths[0], 3));
        members
    }

    /// The parameters, named `encoder.{number}...` and `decoder.{number}...`. First values: He's for
    /// ReLU, with the last convolution of each block made small, so that blocks begin near identity.
    pub fn layout(&self) -> Layout {
        let mut layout = Layout::default();
        for (half, members) in [("encoder", self.encoder_members()), ("decoder", self.decoder_members())] {
            for (number, member) in members.iter().enumerate() {
                member.add_to(&mut layout, &format!("{half}.{number}"));
            }
        }
        layout
    }

    /// Reads the configuration off the names and shapes of `encoder.*` and `decoder.*`.
    ///
    /// # Errors
    /// The tensors are not those of a model of this family.
    pub fn infer(weights: &Weights) -> Result<Self, WeightsError> {
        let encoder = Sequence::read(weights, "encoder")?;
        let decoder = Sequence::read(weights, "decoder")?;
        let reversed = |list: &[usize]| list.iter().rev().copied().collect::<Vec<_>>();
        let mirrored = reversed(&decoder.widths);
        if encoder.widths != mirrored {
            return Err(weights.mismatch(format!(
                "the encoder's channels by resolution are {:?} and the decoder's {mirrored:?}, not those of \
                 one autoencoder; are the two files of the same model?",
                encoder.widths
            )));
        }
        if encoder.outputs != decoder.inputs || encoder.inputs != 3 || decoder.outputs != 3 {
            return Err(weights.mismatch(format!(
                "encoder {} -> {} channels and decoder {} -> {} do not make an autoencoder of RGB images",
                encoder.inputs, encoder.outputs, decoder.inputs, decoder.outputs
            )));
        }
        Ok(Self {
            latent_channels: encoder.outputs,
            widths: encoder.widths,
            encoder_blocks: encoder.blocks,
            decoder_blocks: reversed(&decoder.blocks),
            mid_group_norm: encoder.pool || decoder.pool,
        })
    }
}

fn conv(inputs: usize, outputs: usize) -> Member {
    Member::Conv { inputs, outputs, stride: 1, bias: true }
}

/// PyTorch's shape for a 3x3 convolution, and He's bound on its uniform first values.
fn add_conv(layout: &mut Layout, name: &str, inputs: usize, outputs: usize, bias: bool, gain: f32) {
    let bound = gain * (6.0 / (9 * inputs) as f32).sqrt();
    layout.add(format!("{name}.weight"), &[outputs, inputs, 3, 3], Init::Uniform(bound));
    if bias {
        layout.add(format!("{name}.bias"), &[outputs], Init::Zeros);
    }
}

impl Member {
    fn add_to(self, layout: &mut Layout, name: &str) {
        match self {
            Member::Conv { inputs, outputs, bias, .. } => {
                add_conv(layout, name, inputs, outputs, bias, 0.7);
            }
            Member::Block { width, pool } => {
                for (number, gain) in [(0, 1.0), (2, 1.0), (4, 0.3)] {
                    add_conv(layout, &format!("{name}.conv.{number}"), width, width, true, gain);
                }
                if pool {
                    let wide = width * POOL_EXPANSION;
                    let bound = |inputs: usize| Init::Uniform(1.0 / (inputs as f32).sqrt());
                    layout.add(format!("{name}.pool.0.weight"), &[wide, width, 1, 1], bound(width));
                    layout.add(format!("{name}.pool.1.weight"), &[wide], Init::Ones);
                    layout.add(format!("{name}.pool.1.bias"), &[wide], Init::Zeros);
                    layout.add(format!("{name}.pool.3.weight"), &[width, wide, 1, 1], bound(wide));
                }
            }
            Member::Clamp | Member::Relu | Member::Upsample => {}
        }
    }
}

/// What the numbered tensors of one half say, in order: channels and blocks of each resolution.
struct Sequence {
    inputs: usize,
    outputs: usize,
    widths: Vec<usize>,
    blocks: Vec<usize>,
    pool: bool,
}

impl Sequence {
    fn read(weights: &Weights, half: &str) -> Result<Self, WeightsError> {
        let foreign = |problem: String| {
            weights.mismatch(format!("{problem}; it is not an autoencoder of the TAESD family"))
        };
        let part = weights.under(half);
        let mut members: BTreeMap<usize, Vec<(&str, &RawTensor)>> = BTreeMap::new();
        for (name, tensor) in &part.tensors {
            let numbered = name.split_once('.').and_then(|(n, rest)| Some((n.parse::<usize>().ok()?, rest)));
            let (number, rest) = numbered
                .ok_or_else(|| foreign(format!("tensor {half}.{name} has no number behind {half}")))?;
            members.entry(number).or_default().push((rest, tensor));
        }
        let mut read = Self { inputs: 0, outputs: 0, widths: vec![], blocks: vec![], pool: false };
        for (number, tensors) in &members {
            let find = |name: &str| tensors.iter().find(|(n, _)| *n == name).map(|(_, t)| t.shape.as_slice());
            match (find("weight"), find("bias"), find("conv.0.weight"), read.blocks.last_mut()) {
                (Some(&[outputs, inputs, 3, 3]), bias, None, last) => {
                    read.outputs = outputs;
                    if last.is_none() {
                        read.inputs = inputs;
                    }
                    // The first convolution and those without bias, which change the resolution,
                    // begin one; the convolution with bias after all blocks ends the sequence.
                    if last.is_none() || bias.is_none() {
                        read.widths.push(outputs);
                        read.blocks.push(0);
                    }
                }
                (None, _, Some(_), Some(last)) => {
                    *last += 1;
                    read.pool |= find("pool.0.weight").is_some();
                }
                _ => {
                    return Err(foreign(format!(
                        "{half}.{number} is neither a 3x3 convolution nor a residual block"
                    )));
                }
            }
        }
        if read.widths.is_empty() {
            return Err(foreign(format!("there are no tensors under {half}.")));
        }
        Ok(read)
    }
}

/// An autoencoder of the family, with weights.
#[derive(Debug, Clone)]
pub struct Taesd {
    encoder: Vec<Layer>,
    decoder: Vec<Layer>,
}

#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "a few dozen a model")]
enum Layer {
    Conv(Conv2d),
    Block(Block),
    Clamp,
    Relu,
    Upsample,
}

#[derive(Debug, Clone)]
struct Block {
    convs: [Conv2d; 3],
    pool: Option<(Conv2d, GroupNorm, Conv2d)>,
}

impl Taesd {
    /// Binds the parameters of [`TaesdConfig::layout`].
    pub fn bind(config: &TaesdConfig, params: &Params) -> Self {
        let half = |name: &str, members: Vec<Member>| {
            let scope = params.scope(name);
            members.iter().enumerate().map(|(number, m)| Layer::bind(*m, &scope.sub(number))).collect()
        };
        Self {
            encoder: half("encoder", config.encoder_members()),
            decoder: half("decoder", config.decoder_members()),
        }
    }

    /// Reads `encoder.*` and `decoder.*`; the configuration follows from them.
    ///
    /// # Errors
    /// The tensors are not exactly those of a model of this family.
    pub fn from_weights(weights: &Weights, device: &Device) -> Result<(TaesdConfig, Self), WeightsError> {
        let config = TaesdConfig::infer(weights)?;
        let params = Params::from_weights(&Arc::new(config.layout()), weights, device)?;
        let model = Self::bind(&config, &params);
        Ok((config, model))
    }

    /// Images [N, 3, H, W] in [0, 1] to latents [N, C, h, w].
    pub fn encode(&self, images: Tensor<4>) -> Tensor<4> {
        self.encoder.iter().fold(images, |x, layer| layer.forward(x))
    }

    /// Latents [N, C, h, w] to images [N, 3, H, W], mostly in [0, 1].
    pub fn decode(&self, latents: Tensor<4>) -> Tensor<4> {
        self.decoder.iter().fold(latents, |x, layer| layer.forward(x))
    }
}

impl Layer {
    fn bind(member: Member, scope: &Scope) -> Self {
        match member {
            Member::Conv { stride, .. } => Self::Conv(Conv2d::bind(scope, stride, 1)),
            Member::Block { pool, .. } => Self::Block(Block {
                convs: [0, 2, 4].map(|number| Conv2d::bind(&scope.sub("conv").sub(number), 1, 1)),
                pool: pool.then(|| {
                    let scope = scope.sub("pool");
                    (
                        Conv2d::bind(&scope.sub(0), 1, 0),
                        GroupNorm::bind(&scope.sub(1), POOL_GROUPS, POOL_EPSILON),
                        Conv2d::bind(&scope.sub(3), 1, 0),
                    )
                }),
            }),
            Member::Clamp => Self::Clamp,
            Member::Relu => Self::Relu,
            Member::Upsample => Self::Upsample,
        }
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        match self {
            Self::Conv(conv) => conv.forward(x),
            Self::Block(block) => block.forward(x),
            Self::Clamp => (x / LATENT_BOUND).tanh() * LATENT_BOUND,
            Self::Relu => relu(x),
            Self::Upsample => super::upsample_nearest(x),
        }
    }
}

impl Block {
    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let x = match &self.pool {
            Some((widen, norm, narrow)) => {
                let pooled = narrow.forward(relu(norm.forward(widen.forward(x.clone()))));
                x + pooled
            }
            None => x,
        };
        let [first, second, third] = &self.convs;
        let y = third.forward(relu(second.forward(relu(first.forward(x.clone())))));
        relu(y + x)
    }
}
