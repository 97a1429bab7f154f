//! How latent patches, positions, times and labels become vectors.

use burn::tensor::{DType, Int, Tensor, TensorData};

use super::SitConfig;
use crate::nn::{Linear, silu};
use crate::params::{Init, Layout, Params};

/// Width of the sinusoidal embedding of the time.
const TIME_FREQUENCIES: usize = 256;

/// Longest period of the sinusoidal embeddings.
const MAX_PERIOD: f64 = 10_000.0;

/// Fixed position embedding of a `grid` x `grid` image, [grid * grid, hidden] row by row: sines then
/// cosines of the column in the first half, of the row in the second, as MAE's
/// `get_2d_sincos_pos_embed` (computed in float64). `hidden` must be a multiple of 4.
pub fn sincos_2d(hidden: usize, grid: usize) -> Vec<f32> {
    assert!(hidden.is_multiple_of(4), "a position embedding of width {hidden} has no four equal parts");
    let (half, quarter) = (hidden / 2, hidden / 4);
    let mut axis = vec![0.0f32; grid * half];
    for (position, row) in axis.chunks_mut(half).enumerate() {
        for i in 0..quarter {
            let omega = 1.0 / libm::pow(MAX_PERIOD, i as f64 / quarter as f64);
            let (sin, cos) = libm::sincos(position as f64 * omega);
            (row[i], row[quarter + i]) = (sin as f32, cos as f32);
        }
    }
    let mut out = Vec::with_capacity(grid * grid * hidden);
    for row in axis.chunks(half) {
        for column in axis.chunks(half) {
            out.extend_from_slice(column);
            out.extend_from_slice(row);
        }
    }
    out
}

/// Cuts a latent into patches and maps each to a token. The reference's strided convolution is this
/// matrix product, because its patches do not overlap.
#[derive(Debug, Clone)]
pub(super) struct PatchEmbed {
    linear: Linear,
    patch: usize,
}

impl PatchEmbed {
    pub(super) fn layout(config: &SitConfig, layout: &mut Layout) {
        let (hidden, channels, patch) = (config.hidden_size, config.in_channels, config.patch_size);
        let weight = Init::XavierUniform { fan_in: channels * patch * patch, fan_out: hidden };
        layout.add("x_embedder.proj.weight", &[hidden, channels, patch, patch], weight);
        layout.add("x_embedder.proj.bias", &[hidden], Init::Zeros);
    }

    pub(super) fn bind(config: &SitConfig, params: &Params) -> Self {
        let scope = params.scope("x_embedder.proj");
        let inputs = config.in_channels * config.patch_size * config.patch_size;
        let weight = scope.get::<4>("weight").reshape([config.hidden_size, inputs]);
        Self { linear: Linear::new(weight, scope.find("bias")), patch: config.patch_size }
    }

    /// [N, C, S, S] -> [N, T, hidden], float32.
    pub(super) fn forward(&self, x: Tensor<4>) -> Tensor<3> {
        let [n, c, height, width] = x.dims();
        let p = self.patch;
        let (rows, columns) = (height / p, width / p);
        let patches = x.reshape([n, c, rows, p, columns, p]).permute([0, 2, 4, 1, 3, 5]).reshape([
            n,
            rows * columns,
            c * p * p,
        ]);
        self.linear.forward(patches).cast(DType::F32)
    }
}

/// Sinusoids of the time through a two-layer SiLU MLP.
#[derive(Debug, Clone)]
pub(super) struct TimestepEmbedder {
    frequencies: Tensor<2>,
    first: Linear,
    second: Linear,
}

impl TimestepEmbedder {
    pub(super) fn layout(config: &SitConfig, layout: &mut Layout) {
        for (name, inputs) in [("mlp.0", TIME_FREQUENCIES), ("mlp.2", config.hidden_size)] {
            let name = format!("t_embedder.{name}");
            layout.linear(&name, inputs, config.hidden_size, Init::Normal(0.02), Some(Init::Zeros));
        }
    }

    pub(super) fn bind(params: &Params) -> Self {
        let scope = params.scope("t_embedder.mlp");
        let half = TIME_FREQUENCIES / 2;
        let frequencies: Vec<f32> =
            (0..half).map(|i| libm::exp(-libm::log(MAX_PERIOD) * i as f64 / half as f64) as f32).collect();
        let device = params.get::<3>("pos_embed").device();
        Self {
            frequencies: Tensor::from_data(TensorData::new(frequencies, [1, half]), &device),
            first: Linear::bind(&scope.sub("0")),
            second: Linear::bind(&scope.sub("2")),
        }
    }

    /// Times [N] -> [N, hidden], float32.
    pub(super) fn forward(&self, t: Tensor<1>) -> Tensor<2> {
        let angles = t.cast(DType::F32).unsqueeze_dim::<2>(1) * self.frequencies.clone();
        let waves = Tensor::cat(vec![angles.clone().cos(), angles.sin()], 1);
        self.second.forward(silu(self.first.forward(waves))).cast(DType::F32)
    }
}

/// A learned vector a class, and one more for the null class.
#[derive(Debug, Clone)]
pub(super) struct LabelEmbedder {
    table: Tensor<2>,
}

impl LabelEmbedder {
    pub(super) fn layout(config: &SitConfig, layout: &mut Layout) {
        let shape = [config.num_classes + 1, config.hidden_size];
        layout.add("y_embedder.embedding_table.weight", &shape, Init::Normal(0.02));
    }

    pub(super) fn bind(params: &Params) -> Self {
        Self { table: params.get("y_embedder.embedding_table.weight") }
    }

    /// Labels [N] within 0..=num_classes -> [N, hidden], float32.
    pub(super) fn forward(&self, labels: Tensor<1, Int>) -> Tensor<2> {
        self.table.clone().select(0, labels).cast(DType::F32)
    }
}
