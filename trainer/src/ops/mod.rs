//! Operations that decide the speed of a step. Each has a composite of burn's own operations, which
//! is its definition, and may have a fused form for a backend, tested against the composite.

use burn::tensor::{DType, FloatDType, Tensor};

/// tanh-approximated GELU: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).
pub fn gelu_tanh<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    burn::tensor::activation::gelu_approximate(x)
}

/// (x - mean) / sqrt(variance + epsilon) over the last dimension, computed in float32 and returned
/// in the input's type.
pub fn layer_norm<const D: usize>(x: Tensor<D>, epsilon: f64) -> Tensor<D> {
    let dtype = x.dtype();
    let x = if dtype == DType::F32 { x } else { x.cast(FloatDType::F32) };
    let centred = x.clone() - x.mean_dim(D - 1);
    let variance = (centred.clone() * centred.clone()).mean_dim(D - 1);
    let y = centred / (variance + epsilon).sqrt();
    match dtype {
        DType::F16 => y.cast(FloatDType::F16),
        DType::BF16 => y.cast(FloatDType::BF16),
        _ => y,
    }
}

/// softmax(q k^T / sqrt(head_dim)) v over [N, heads, tokens, head_dim].
pub fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>) -> Tensor<4> {
    crate::nn::attention_composite(q, k, v)
}
