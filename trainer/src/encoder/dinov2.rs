//! DINOv2's vision transformer (Oquab et al., arXiv 2304.07193; registers: Darcet et al., arXiv
//! 2309.16588), under the parameter names of the official release.

use burn::tensor::activation::gelu;
use burn::tensor::{Int, Tensor};

use super::resample::Bicubic;
use crate::nn::{LayerNorm, Linear};
use crate::ops::silu;
use crate::params::{Init, Layout, Params, Scope};

/// LayerNorm's epsilon in every DINOv2 model.
const EPSILON: f64 = 1e-6;

/// The shape of a DINOv2 model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DinoV2Config {
    /// Width of the tokens.
    pub embed_dim: usize,
    /// Number of transformer blocks.
    pub depth: usize,
    /// Attention heads.
    pub num_heads: usize,
    /// Pixels a side of one patch.
    pub patch_size: usize,
    /// Register tokens, between the class token and the patches (0 or 4 in the release).
    pub registers: usize,
    /// SwiGLU instead of GELU in the feed-forward layers (the giant).
    pub swiglu: bool,
    /// Hidden units of the feed-forward layers (for SwiGLU: of each half).
    pub mlp_hidden: usize,
    /// Patches a side that the stored position embedding is for.
    pub grid: usize,
}

impl DinoV2Config {
    /// A published model, trained at 518 pixels: `dinov2-vit-s`, `-b`, `-l` or `-g`, with 4
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

    /// The parameters, in the official order, without `mask_token`, which only training uses.
    /// Initial values are those of the quickstart teacher's training.
    pub fn layout(&self) -> Layout {
        let d = self.embed_dim;
        let weight = Init::Normal(0.02);
        let zeros = Some(Init::Zeros);
        let mut layout = Layout::default();
        layout.add("cls_token", &[1, 1, d], weight.clone());
        layout.add("pos_embed", &[1, 1 + self.grid * self.grid, d], weight.clone());
        if self.registers > 0 {
            layout.add("register_tokens", &[1, self.registers, d], weight.clone());
        }
        let p = self.patch_size;
        let bound = 1.0 / ((3 * p * p) as f32).sqrt();
        layout.add("patch_embed.proj.weight", &[d, 3, p, p], Init::Uniform(bound));
        layout.add("patch_embed.proj.bias", &[d], Init::Uniform(bound));
        for block in 0..self.depth {
            let name = |part: &str| format!("blocks.{block}.{part}");
            let mut norm = |part: &str| {
                layout.add(name(&format!("{part}.weight")), &[d], Init::Ones);
                layout.add(name(&format!("{part}.bias")), &[d], Init::Zeros);
            };
            norm("norm1");
            layout.linear(&name("attn.qkv"), d, 3 * d, weight.clone(), zeros.clone());
            layout.linear(&name("attn.proj"), d, d, weight.clone(), zeros.clone());
            layout.add(name("ls1.gamma"), &[d], Init::Constant(0.5));
            layout.add(name("norm2.weight"), &[d], Init::Ones);
            layout.add(name("norm2.bias"), &[d], Init::Zeros);
            let (first, second, wide) = if self.swiglu {
                ("mlp.w12", "mlp.w3", 2 * self.mlp_hidden)
            } else {
                ("mlp.fc1", "mlp.fc2", self.mlp_hidden)
            };
            layout.linear(&name(first), d, wide, weight.clone(), zeros.clone());
            layout.linear(&name(second), self.mlp_hidden, d, weight.clone(), zeros.clone());
            layout.add(name("ls2.gamma"), &[d], Init::Constant(0.5));
        }
        layout.add("norm.weight", &[d], Init::Ones);
        layout.add("norm.bias", &[d], Init::Zeros);
        layout
    }
}

/// What the transformer gives, after the final norm.
#[derive(Debug, Clone)]
pub struct DinoV2Output {
    /// [N, patches, embed_dim], rows of patches top to bottom; registers are dropped.
    pub patch_tokens: Tensor<3>,
    /// [N, embed_dim].
    pub cls: Tensor<2>,
}

/// A DINOv2 model bound to its values.
#[derive(Debug, Clone)]
pub struct DinoV2 {
    patch_weight: Tensor<2>,
    patch_bias: Tensor<1>,
    cls_token: Tensor<3>,
    pos_embed: Tensor<3>,
    register_tokens: Option<Tensor<3>>,
    blocks: Vec<Block>,
    norm: LayerNorm,
    patch_size: usize,
    grid: usize,
}

impl DinoV2 {
    /// Binds values that hold (at least) the config's layout.
    pub fn bind(config: &DinoV2Config, params: &Params) -> Self {
        let scope = params.scope("");
        let p = config.patch_size;
        let patch_weight: Tensor<4> = scope.get("patch_embed.proj.weight");
        Self {
            patch_weight: patch_weight.reshape([config.embed_dim, 3 * p * p]),
            patch_bias: scope.get("patch_embed.proj.bias"),
            cls_token: scope.get("cls_token"),
            pos_embed: scope.get("pos_embed"),
            register_tokens: scope.find("register_tokens"),
            blocks: (0..config.depth)
                .map(|i| Block::bind(config, &params.scope(format!("blocks.{i}"))))
                .collect(),
            norm: LayerNorm::bind(&scope.sub("norm"), EPSILON),
            patch_size: p,
            grid: config.grid,
        }
    }

    /// Normalised images [N, 3, H, W], H and W multiples of the patch size.
    pub fn forward(&self, images: Tensor<4>) -> DinoV2Output {
        self.run(images, None)
    }

    /// As [`DinoV2::forward`], of some patches of each image alone: those whose numbers (row by row)
    /// are in `visible`. For training.
    pub fn forward_visible(&self, images: Tensor<4>, visible: Tensor<1, Int>) -> DinoV2Output {
        self.run(images, Some(visible))
    }

    fn run(&self, images: Tensor<4>, visible: Option<Tensor<1, Int>>) -> DinoV2Output {
        let [n, c, height, width] = images.dims();
        let p = self.patch_size;
        let grid = [height / p, width / p];
        let mut pixels = unfold(images, p).reshape([n, grid[0] * grid[1], c * p * p]);
        let positions = self.positions(grid);
        let d = positions.dims()[2];
        let mut patch_positions = positions.clone().narrow(1, 1, grid[0] * grid[1]);
        if let Some(visible) = visible {
            pixels = pixels.select(1, visible.clone());
            patch_positions = patch_positions.select(1, visible);
        }
        let count = pixels.dims()[1];
        // A convolution whose stride is its kernel's size is one matrix product.
        let patches = crate::ops::linear(pixels, self.patch_weight.clone(), Some(self.patch_bias.clone()));
        let cls = self.cls_token.clone() + positions.narrow(1, 0, 1);
        let mut tokens = vec![cls.expand([n, 1, d])];
        let registers = self.register_tokens.as_ref().map_or(0, |r| r.dims()[1]);
        if let Some(register_tokens) = &self.register_tokens {
            tokens.push(register_tokens.clone().expand([n, registers, d]));
        }
        tokens.push(patches + patch_positions);
        let mut x = Tensor::cat(tokens, 1);
        for block in &self.blocks {
            x = block.forward(x);
        }
        let x = self.norm.forward(x);
        DinoV2Output {
            patch_tokens: x.clone().narrow(1, 1 + registers, count),
            cls: x.narrow(1, 0, 1).reshape([n, d]),
        }
    }

    /// The position embedding [1, 1 + h w, embed_dim] for a grid, as timm's
    /// `resample_abs_pos_embed` makes it: the class token's stays, the patches' are resized
    /// (bicubic, antialiased).
    pub fn positions(&self, [h, w]: [usize; 2]) -> Tensor<3> {
        if [h, w] == [self.grid; 2] {
            return self.pos_embed.clone();
        }
        let d = self.pos_embed.dims()[2];
        let g = self.grid;
        let cls = self.pos_embed.clone().narrow(1, 0, 1);
        let patches = self.pos_embed.clone().narrow(1, 1, g * g).reshape([1, g, g, d]);
        let resized = Bicubic::Antialiased.resize(patches.permute([0, 3, 1, 2]), h, w);
        Tensor::cat(vec![cls, resized.permute([0, 2, 3, 1]).reshape([1, h * w, d])], 1)
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
    scale1: Tensor<1>,
    norm2: LayerNorm,
    first: Linear,
    second: Linear,
    scale2: Tensor<1>,
    heads: usize,
    /// Hidden units of SwiGLU's halves; `None` for GELU.
    swiglu: Option<usize>,
}

impl Block {
    fn bind(config: &DinoV2Config, scope: &Scope) -> Self {
        let (first, second) = if config.swiglu { ("w12", "w3") } else { ("fc1", "fc2") };
        Self {
            norm1: LayerNorm::bind(&scope.sub("norm1"), EPSILON),
            qkv: Linear::bind(&scope.sub("attn.qkv")),
            proj: Linear::bind(&scope.sub("attn.proj")),
            scale1: scope.get("ls1.gamma"),
            norm2: LayerNorm::bind(&scope.sub("norm2"), EPSILON),
            first: Linear::bind(&scope.sub("mlp").sub(first)),
            second: Linear::bind(&scope.sub("mlp").sub(second)),
            scale2: scope.get("ls2.gamma"),
            heads: config.num_heads,
            swiglu: config.swiglu.then_some(config.mlp_hidden),
        }
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let y = self.attention(self.norm1.forward(x.clone()));
        let x = x + y * self.scale1.clone().unsqueeze();
        let y = self.feed_forward(self.norm2.forward(x.clone()));
        x + y * self.scale2.clone().unsqueeze()
    }

    fn attention(&self, x: Tensor<3>) -> Tensor<3> {
        self.proj.forward(crate::ops::attention_qkv(self.qkv.forward(x), self.heads))
    }

    fn feed_forward(&self, x: Tensor<3>) -> Tensor<3> {
        let x = self.first.forward(x);
        let hidden = match self.swiglu {
            Some(half) => silu(x.clone().narrow(2, 0, half)) * x.narrow(2, half, half),
            // The exact GELU, by the error function.
            None => gelu(x),
        };
        self.second.forward(hidden)
    }
}
