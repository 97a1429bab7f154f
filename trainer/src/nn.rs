//! Layers that several models share, over PyTorch's parameter layouts.

use burn::tensor::Tensor;
use burn::tensor::activation::{sigmoid, softmax};
use burn::tensor::module::conv2d;
use burn::tensor::ops::ConvOptions;

use crate::params::Scope;

/// `y = x W^T + b` over the last dimension; the weight is [out, in].
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
}

impl Linear {
    /// Binds `{scope}.weight` and, where the layout has it, `{scope}.bias`.
    pub fn bind(scope: &Scope) -> Self {
        Self { weight: scope.get("weight"), bias: scope.find("bias") }
    }

    /// [..., in] -> [..., out]. All leading dimensions are folded into one matrix product.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let mut shape = x.dims();
        let inputs = shape[D - 1];
        let rows = shape.iter().product::<usize>() / inputs.max(1);
        let mut y = x.reshape([rows, inputs]).matmul(self.weight.clone().transpose());
        if let Some(bias) = &self.bias {
            y = y + bias.clone().unsqueeze();
        }
        shape[D - 1] = self.weight.dims()[0];
        y.reshape(shape)
    }
}

/// Normalisation over the last dimension, in float32, with an affine map where it has weights.
#[derive(Debug, Clone)]
pub struct LayerNorm {
    affine: Option<(Tensor<1>, Tensor<1>)>,
    epsilon: f64,
}

impl LayerNorm {
    /// Binds `{scope}.weight` and `{scope}.bias`.
    pub fn bind(scope: &Scope, epsilon: f64) -> Self {
        Self { affine: Some((scope.get("weight"), scope.get("bias"))), epsilon }
    }

    /// Without weights.
    pub fn plain(epsilon: f64) -> Self {
        Self { affine: None, epsilon }
    }

    /// [..., features] -> [..., features].
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let y = crate::ops::layer_norm(x, self.epsilon);
        match &self.affine {
            Some((weight, bias)) => y * weight.clone().unsqueeze() + bias.clone().unsqueeze(),
            None => y,
        }
    }
}

/// 2D convolution; the weight is [out, in, kernel, kernel].
#[derive(Debug, Clone)]
pub struct Conv2d {
    weight: Tensor<4>,
    bias: Option<Tensor<1>>,
    stride: usize,
    padding: usize,
}

impl Conv2d {
    /// Binds `{scope}.weight` and, where the layout has it, `{scope}.bias`.
    pub fn bind(scope: &Scope, stride: usize, padding: usize) -> Self {
        Self { weight: scope.get("weight"), bias: scope.find("bias"), stride, padding }
    }

    /// [N, in, H, W] -> [N, out, H', W'].
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let options = ConvOptions::new([self.stride; 2], [self.padding; 2], [1, 1], 1);
        conv2d(x, self.weight.clone(), self.bias.clone(), options)
    }
}

/// Normalisation over groups of channels, with an affine map per channel.
#[derive(Debug, Clone)]
pub struct GroupNorm {
    weight: Tensor<1>,
    bias: Tensor<1>,
    groups: usize,
    epsilon: f64,
}

impl GroupNorm {
    /// Binds `{scope}.weight` and `{scope}.bias`.
    pub fn bind(scope: &Scope, groups: usize, epsilon: f64) -> Self {
        Self { weight: scope.get("weight"), bias: scope.get("bias"), groups, epsilon }
    }

    /// [N, C, H, W] -> [N, C, H, W].
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let [n, c, h, w] = x.dims();
        let y = crate::ops::layer_norm(x.reshape([n, self.groups, c / self.groups * h * w]), self.epsilon);
        let per_channel = |t: &Tensor<1>| t.clone().reshape([1, c, 1, 1]);
        y.reshape([n, c, h, w]) * per_channel(&self.weight) + per_channel(&self.bias)
    }
}

/// x * sigmoid(x).
pub fn silu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    x.clone() * sigmoid(x)
}

/// Scaled dot-product attention over [N, heads, tokens, head_dim], softmax in the input's type.
pub fn attention_composite(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>) -> Tensor<4> {
    let scale = 1.0 / (q.dims()[3] as f64).sqrt();
    softmax((q * scale).matmul(k.swap_dims(2, 3)), 3).matmul(v)
}
