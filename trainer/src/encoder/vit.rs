//! The encoders' vision transformer (Dosovitskiy et al., arXiv 2010.11929; registers: Darcet et al., arXiv
//! 2309.16588), under the parameter names of DINOv2's release, which are timm's.

use burn::tensor::activation::{gelu, sigmoid};
use burn::tensor::{Int, Tensor};

use super::family::Family;
use super::resample::Bicubic;
use crate::nn::{LayerNorm, Linear};
use crate::ops::silu;
use crate::params::{Init, Layout, Params, Scope};

/// The shape of an encoder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VitConfig {
    /// Whose model it is, from which its parts follow.
    pub family: Family,
    /// Width of the tokens.
    pub embed_dim: usize,
    /// Number of transformer blocks.
    pub depth: usize,
    /// Attention heads.
    pub num_heads: usize,
    /// Pixels a side of one patch.
    pub patch_size: usize,
    /// Register tokens, between the class token and the patches (0 or 4, in DINOv2's models).
    pub registers: usize,
    /// SwiGLU instead of GELU in the feed-forward layers (the giant).
    pub swiglu: bool,
    /// Hidden units of the feed-forward layers (for SwiGLU: of each half).
    pub mlp_hidden: usize,
    /// Patches a side that the stored position embedding is for.
    pub grid: usize,
}

impl VitConfig {
    /// A published DINOv2 model, trained at 518 pixels: `dinov2-vit-s`, `-b`, `-l` or `-g`, with 4
    /// registers or none.
    pub fn published(size: char, registers: bool) -> Option<Self> {
        let (embed_dim, depth, num_heads, swiglu): (usize, _, _, _) = match size {
            's' => (384, 12, 6, false),
            'b' => (768, 12, 12, false),
            'l' => (1024, 24, 16, false),
            'g' => (1536, 40, 24, true),
            _ => return None,
        };
        // Two thirds of 4 x width in each half, rounded up to a multiple of 8.
        let mlp_hidden = if swiglu { (embed_dim * 4 * 2 / 3).div_ceil(8) * 8 } else { embed_dim * 4 };
        Some(Self {
            family: Family::DinoV2,
            embed_dim,
            depth,
            num_heads,
            patch_size: 14,
            registers: if registers { 4 } else { 0 },
            swiglu,
            mlp_hidden,
            grid: 518 / 14,
        })
    }

    /// Tokens before the first patch that have a position: the class token.
    fn positioned(&self) -> usize {
        usize::from(self.family.class_token())
    }

    /// The parameters, in the official order, without `mask_token`, which only training uses, and a final norm
    /// that is not computed. Initial values are those of the quickstart teacher's training.
    pub fn layout(&self) -> Layout {
        let d = self.embed_dim;
        let weight = Init::Normal(0.02);
        let zeros = Some(Init::Zeros);
        let mut layout = Layout::default();
        if self.family.class_token() {
            layout.add("cls_token", &[1, 1, d], weight.clone());
        }
        layout.add("pos_embed", &[1, self.positioned() + self.grid * self.grid, d], weight.clone());
        if self.registers > 0 {
            layout.add("register_tokens", &[1, self.registers, d], weight.clone());
        }
        let p = self.patch_size;
        let bound = 1.0 / ((3 * p * p) as f32).sqrt();
        layout.add("patch_embed.proj.weight", &[d, 3, p, p], Init::Uniform(bound));
        if self.family.patch_bias() {
            layout.add("patch_embed.proj.bias", &[d], Init::Uniform(bound));
        }
        if self.family.first_norm() {
            norm(&mut layout, "norm_pre", d);
        }
        for block in 0..self.depth {
            let name = |part: &str| format!("blocks.{block}.{part}");
            norm(&mut layout, &name("norm1"), d);
            layout.linear(&name("attn.qkv"), d, 3 * d, weight.clone(), zeros.clone());
            layout.linear(&name("attn.proj"), d, d, weight.clone(), zeros.clone());
            if self.family.layer_scale() {
                layout.add(name("ls1.gamma"), &[d], Init::Constant(0.5));
            }
            norm(&mut layout, &name("norm2"), d);
            let (first, second, wide) = if self.swiglu {
                ("mlp.w12", "mlp.w3", 2 * self.mlp_hidden)
            } else {
                ("mlp.fc1", "mlp.fc2", self.mlp_hidden)
            };
            layout.linear(&name(first), d, wide, weight.clone(), zeros.clone());
            layout.linear(&name(second), self.mlp_hidden, d, weight.clone(), zeros.clone());
            if self.family.layer_scale() {
                layout.add(name("ls2.gamma"), &[d], Init::Constant(0.5));
            }
        }
        if self.family.final_norm() {
            norm(&mut layout, "norm", d);
        }
        layout
    }
}

fn norm(layout: &mut Layout, name: &str, width: usize) {
    layout.add(format!("{name}.weight"), &[width], Init::Ones);
    layout.add(format!("{name}.bias"), &[width], Init::Zeros);
}

/// What the transformer gives: after the final norm, where the family's features are.
#[derive(Debug, Clone)]
pub struct VitOutput {
    /// [N, patches, embed_dim], rows of patches top to bottom; registers are dropped.
    pub patch_tokens: Tensor<3>,
    /// The class token [N, embed_dim], if there is one.
    pub cls: Option<Tensor<2>>,
}

/// An encoder bound to its values.
#[derive(Debug, Clone)]
pub struct Vit {
    patch_weight: Tensor<2>,
    patch_bias: Option<Tensor<1>>,
    cls_token: Option<Tensor<3>>,
    pos_embed: Tensor<3>,
    register_tokens: Option<Tensor<3>>,
    first_norm: Option<LayerNorm>,
    blocks: Vec<Block>,
    norm: Option<LayerNorm>,
    patch_size: usize,
    grid: usize,
    /// Tokens before the first patch that have a position: the class token.
    positioned: usize,
}

impl Vit {
    /// Binds values that hold (at least) the config's layout.
    pub fn bind(config: &VitConfig, params: &Params) -> Self {
        let scope = params.scope("");
        let p = config.patch_size;
        let family = config.family;
        let norm = |name: &str| LayerNorm::bind(&scope.sub(name), family.epsilon());
        let patch_weight: Tensor<4> = scope.get("patch_embed.proj.weight");
        Self {
            patch_weight: patch_weight.reshape([config.embed_dim, 3 * p * p]),
            patch_bias: scope.find("patch_embed.proj.bias"),
            cls_token: scope.find("cls_token"),
            pos_embed: scope.get("pos_embed"),
            register_tokens: scope.find("register_tokens"),
            blocks: (0..config.depth)
                .map(|i| Block::bind(config, &params.scope(format!("blocks.{i}"))))
                .collect(),
            first_norm: family.first_norm().then(|| norm("norm_pre")),
            norm: family.final_norm().then(|| norm("norm")),
            patch_size: p,
            grid: config.grid,
            positioned: config.positioned(),
        }
    }

    /// Normalised images [N, 3, H, W], H and W multiples of the patch size.
    pub fn forward(&self, images: Tensor<4>) -> VitOutput {
        self.run(images, None)
    }

    /// As [`Vit::forward`], of some patches of each image alone: those whose numbers (row by row)
    /// are in `visible`. For training.
    pub fn forward_visible(&self, images: Tensor<4>, visible: Tensor<1, Int>) -> VitOutput {
        self.run(images, Some(visible))
    }

    fn run(&self, images: Tensor<4>, visible: Option<Tensor<1, Int>>) -> VitOutput {
        let [n, c, height, width] = images.dims();
        let p = self.patch_size;
        let grid = [height / p, width / p];
        let mut pixels = unfold(images, p).reshape([n, grid[0] * grid[1], c * p * p]);
        let positions = self.positions(grid);
        let d = positions.dims()[2];
        let positioned = self.positioned;
        let mut patch_positions = positions.clone().narrow(1, positioned, grid[0] * grid[1]);
        if let Some(visible) = visible {
            pixels = pixels.select(1, visible.clone());
            patch_positions = patch_positions.select(1, visible);
        }
        let count = pixels.dims()[1];
        // A convolution whose stride is its kernel's size is one matrix product.
        let patches = crate::ops::linear(pixels, self.patch_weight.clone(), self.patch_bias.clone());
        let mut tokens = Vec::new();
        if let Some(cls_token) = &self.cls_token {
            let cls = cls_token.clone() + positions.narrow(1, 0, 1);
            tokens.push(cls.expand([n, 1, d]));
        }
        let registers = self.register_tokens.as_ref().map_or(0, |r| r.dims()[1]);
        if let Some(register_tokens) = &self.register_tokens {
            tokens.push(register_tokens.clone().expand([n, registers, d]));
        }
        tokens.push(patches + patch_positions);
        let mut x = Tensor::cat(tokens, 1);
        if let Some(norm) = &self.first_norm {
            x = norm.forward(x);
        }
        for block in &self.blocks {
            x = block.forward(x);
        }
        if let Some(norm) = &self.norm {
            x = norm.forward(x);
        }
        VitOutput {
            patch_tokens: x.clone().narrow(1, positioned + registers, count),
            cls: self.cls_token.is_some().then(|| x.narrow(1, 0, 1).reshape([n, d])),
        }
    }

    /// The position embedding [1, 1 + h w, embed_dim] for a grid (h w without a class token), as timm's
    /// `resample_abs_pos_embed` makes it: the class token's stays, the patches' are resized
    /// (bicubic, antialiased).
    pub fn positions(&self, [h, w]: [usize; 2]) -> Tensor<3> {
        if [h, w] == [self.grid; 2] {
            return self.pos_embed.clone();
        }
        let d = self.pos_embed.dims()[2];
        let g = self.grid;
        let patches = self.pos_embed.clone().narrow(1, self.positioned, g * g).reshape([1, g, g, d]);
        let resized = Bicubic::Antialiased.resize(patches.permute([0, 3, 1, 2]), h, w);
        let resized = resized.permute([0, 2, 3, 1]).reshape([1, h * w, d]);
        if self.cls_token.is_none() {
            return resized;
        }
        Tensor::cat(vec![self.pos_embed.clone().narrow(1, 0, 1), resized], 1)
    }
}

/// The pixels of each patch as a row: [N, 3, H, W] -> [N h w, 3 p p], each row channel by channel.
fn unfold(images: Tensor<4>, patch_size: usize) -> Tensor<2> {
    let [n, c, height, width] = images.dims();
    let p = patch_size;
    let (h, w) = (height / p, width / p);
    images.reshape([n, c, h, p, w, p]).permute([0, 2, 4, 1, 3, 5]).reshape([n * h * w, c * p * p])
}

#[derive(Debug, Clone)]
struct Block {
    norm1: LayerNorm,
    qkv: Linear,
    proj: Linear,
    scale1: Option<Tensor<1>>,
    norm2: LayerNorm,
    first: Linear,
    second: Linear,
    scale2: Option<Tensor<1>>,
    heads: usize,
    activation: Activation,
}

/// What is between the two layers of a feed-forward part.
#[derive(Debug, Clone, Copy)]
enum Activation {
    /// By the error function.
    Gelu,
    /// x sigmoid(1.702 x).
    QuickGelu,
    /// SwiGLU, of halves as wide.
    SwiGlu(usize),
}

impl Block {
    fn bind(config: &VitConfig, scope: &Scope) -> Self {
        let (first, second) = if config.swiglu { ("w12", "w3") } else { ("fc1", "fc2") };
        let epsilon = config.family.epsilon();
        let activation = match config.swiglu {
            true => Activation::SwiGlu(config.mlp_hidden),
            false if config.family.quick_gelu() => Activation::QuickGelu,
            false => Activation::Gelu,
        };
        Self {
            norm1: LayerNorm::bind(&scope.sub("norm1"), epsilon),
            qkv: Linear::bind(&scope.sub("attn.qkv")),
            proj: Linear::bind(&scope.sub("attn.proj")),
            scale1: scope.find("ls1.gamma"),
            norm2: LayerNorm::bind(&scope.sub("norm2"), epsilon),
            first: Linear::bind(&scope.sub("mlp").sub(first)),
            second: Linear::bind(&scope.sub("mlp").sub(second)),
            scale2: scope.find("ls2.gamma"),
            heads: config.num_heads,
            activation,
        }
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let scaled = |y: Tensor<3>, scale: &Option<Tensor<1>>| match scale {
            Some(scale) => y * scale.clone().unsqueeze(),
            None => y,
        };
        let y = self.attention(self.norm1.forward(x.clone()));
        let x = x + scaled(y, &self.scale1);
        let y = self.feed_forward(self.norm2.forward(x.clone()));
        x + scaled(y, &self.scale2)
    }

    fn attention(&self, x: Tensor<3>) -> Tensor<3> {
        self.proj.forward(crate::ops::attention_qkv(self.qkv.forward(x), self.heads))
    }

    fn feed_forward(&self, x: Tensor<3>) -> Tensor<3> {
        let x = self.first.forward(x);
        let hidden = match self.activation {
            Activation::Gelu => gelu(x),
            Activation::QuickGelu => sigmoid(x.clone() * 1.702) * x,
            Activation::SwiGlu(half) => silu(x.clone().narrow(2, 0, half)) * x.narrow(2, half, half),
        };
        self.second.forward(hidden)
    }
}
