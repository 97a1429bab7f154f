//! The definitions: each operation as a composite of burn's own. Every fused form is tested against
//! these, and tensors that no fused form takes (half precision, other backends) run them.

use burn::tensor::activation::{gelu_approximate, sigmoid, softmax};
use burn::tensor::module;
use burn::tensor::ops::ConvOptions;
use burn::tensor::{DType, FloatDType, Tensor};

/// tanh-approximated GELU: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).
pub fn gelu_tanh<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    gelu_approximate(x)
}

/// x sigmoid(x).
pub fn silu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    x.clone() * sigmoid(x)
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

/// layer_norm(x) * weight + bias, for weight and bias over the last dimension.
pub fn layer_norm_affine<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<1>,
    bias: Tensor<1>,
    epsilon: f64,
) -> Tensor<D> {
    layer_norm(x, epsilon) * weight.unsqueeze() + bias.unsqueeze()
}

/// layer_norm(x) * (1 + scale) + shift for x [N, T, H], shift and scale [N, 1, H].
pub fn modulate(x: Tensor<3>, shift: Tensor<3>, scale: Tensor<3>, epsilon: f64) -> Tensor<3> {
    layer_norm(x, epsilon) * (scale + 1.0) + shift
}

/// x + gate * y for x and y [N, T, H], gate [N, 1, H].
pub fn gated_add(x: Tensor<3>, y: Tensor<3>, gate: Tensor<3>) -> Tensor<3> {
    x + gate * y
}

/// softmax(q k^T / sqrt(head_dim)) v over [N, heads, tokens, head_dim]; the softmax is in float32.
pub fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>) -> Tensor<4> {
    let scale = 1.0 / (q.dims()[3] as f64).sqrt();
    let scores = (q * scale).matmul(k.swap_dims(2, 3)).cast(DType::F32);
    softmax(scores, 3).cast(v.dtype()).matmul(v)
}

/// [`attention`] from [N, T, 3 * hidden], which holds q, k and v one after another, each [heads,
/// head_dim], to [N, T, hidden].
pub fn attention_qkv(qkv: Tensor<3>, heads: usize) -> Tensor<3> {
    let [n, t, width] = qkv.dims();
    let hidden = width / 3;
    let qkv = qkv.reshape([n, t, 3, heads, hidden / heads]);
    let part = |i: usize| qkv.clone().narrow(2, i, 1).reshape([n, t, heads, hidden / heads]).swap_dims(1, 2);
    attention(part(0), part(1), part(2)).swap_dims(1, 2).reshape([n, t, hidden])
}

/// x weight^T + bias over the last dimension; the weight is [out, in]. All leading dimensions are
/// folded into one matrix product.
pub fn linear<const D: usize>(x: Tensor<D>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<D> {
    let mut shape = x.dims();
    let inputs = shape[D - 1];
    let rows = shape[..D - 1].iter().product();
    shape[D - 1] = weight.dims()[0];
    let mut y = x.reshape([rows, inputs]).matmul(weight.transpose());
    if let Some(bias) = bias {
        y = y + bias.unsqueeze();
    }
    y.reshape(shape)
}

/// 2D convolution: x [N, in, H, W], weight [out, in, kernel, kernel], bias [out] -> [N, out, H', W'].
pub fn conv2d(
    x: Tensor<4>,
    weight: Tensor<4>,
    bias: Option<Tensor<1>>,
    stride: usize,
    padding: usize,
) -> Tensor<4> {
    module::conv2d(x, weight, bias, ConvOptions::new([stride; 2], [padding; 2], [1, 1], 1))
}
