//! Layers that several models share, over PyTorch's parameter layouts.

use burn::tensor::{DType, Tensor};

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

    /// From a weight [out, in] and a bias [out].
    pub fn new(weight: Tensor<2>, bias: Option<Tensor<1>>) -> Self {
        Self { weight, bias }
    }

    /// The weight's type.
    pub fn dtype(&self) -> DType {
        self.weight.dtype()
    }

    /// [..., in] -> [..., out]. The input is cast to the weight's type, so that casting the weights
    /// alone makes a half-precision layer.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        crate::ops::linear(x.cast(self.dtype()), self.weight.clone(), self.bias.clone())
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
        let Some((weight, bias)) = &self.affine else { return crate::ops::layer_norm(x, self.epsilon) };
        let dtype = x.dtype();
        let full = |t: &Tensor<1>| t.clone().cast(DType::F32);
        crate::ops::layer_norm_affine(x.cast(DType::F32), full(weight), full(bias), self.epsilon).cast(dtype)
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
        crate::ops::conv2d(x, self.weight.clone(), self.bias.clone(), self.stride, self.padding)
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

pub use crate::ops::silu;
