//! Gradients as formulas on plain tensors of any backend, for backends that fuse what is element by element by
//! themselves. Against autodiff of the composites, they keep nothing between forward and backward pass but the
//! operation's inputs, and of attention the probabilities.
//!
//! Computed in float32, returned in the type of what they are the gradient by.

// Only GPUs use them; the tests run them on the CPU, too.
#![cfg_attr(not(any(test, feature = "cuda", feature = "wgpu")), expect(dead_code))]

use burn::tensor::activation::{sigmoid, softmax};
use burn::tensor::{DType, Tensor};

/// sqrt(2 / pi).
const ROOT: f64 = 0.797_884_560_802_865_4;
const CUBIC: f64 = 0.044_715;

fn wide<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    if x.dtype() == DType::F32 { x } else { x.cast(DType::F32) }
}

fn narrow<const D: usize>(x: Tensor<D>, dtype: DType) -> Tensor<D> {
    if dtype == DType::F32 { x } else { x.cast(dtype) }
}

/// See [`super::gelu_tanh`].
pub(super) fn gelu_tanh(x: Tensor<1>) -> Tensor<1> {
    let dtype = x.dtype();
    let x = wide(x);
    let inner = (x.clone() * x.clone() * CUBIC + 1.0) * x.clone() * ROOT;
    narrow(x * 0.5 * (inner.tanh() + 1.0), dtype)
}

/// By x.
pub(super) fn gelu_tanh_backward(x: Tensor<1>, grad: Tensor<1>) -> Tensor<1> {
    let dtype = x.dtype();
    let (x, grad) = (wide(x), wide(grad));
    let square = x.clone() * x.clone();
    let t = ((square.clone() * CUBIC + 1.0) * x.clone() * ROOT).tanh();
    let slope = (square * (3.0 * CUBIC) + 1.0) * ROOT;
    let derivative = (t.clone() + 1.0) * 0.5 + x * 0.5 * (t.clone() * t * -1.0 + 1.0) * slope;
    narrow(grad * derivative, dtype)
}

/// See [`super::silu`].
pub(super) fn swish(x: Tensor<1>) -> Tensor<1> {
    let dtype = x.dtype();
    let x = wide(x);
    narrow(x.clone() * sigmoid(x), dtype)
}

/// By x.
pub(super) fn swish_backward(x: Tensor<1>, grad: Tensor<1>) -> Tensor<1> {
    let dtype = x.dtype();
    let (x, grad) = (wide(x), wide(grad));
    let s = sigmoid(x.clone());
    narrow(grad * s.clone() * (x * (s * -1.0 + 1.0) + 1.0), dtype)
}

/// (x - mean) / deviation and 1 / deviation, over the last dimension.
fn normalised<const D: usize>(x: Tensor<D>, epsilon: f32) -> [Tensor<D>; 2] {
    let centred = x.clone() - x.mean_dim(D - 1);
    let variance = (centred.clone() * centred.clone()).mean_dim(D - 1);
    let inverse = (variance + epsilon).sqrt().recip();
    [centred * inverse.clone(), inverse]
}

/// The gradient by x of the normalisation that gave `y`, by x.
fn denormalised<const D: usize>(y: Tensor<D>, inverse: Tensor<D>, grad: Tensor<D>) -> Tensor<D> {
    let along = (grad.clone() * y.clone()).mean_dim(D - 1);
    (grad.clone() - grad.mean_dim(D - 1) - y * along) * inverse
}

/// See [`super::layer_norm`].
pub(super) fn normalise(x: Tensor<2>, epsilon: f32) -> Tensor<2> {
    let dtype = x.dtype();
    let [y, _] = normalised(wide(x), epsilon);
    narrow(y, dtype)
}

/// By x.
pub(super) fn normalise_backward(x: Tensor<2>, grad: Tensor<2>, epsilon: f32) -> Tensor<2> {
    let dtype = x.dtype();
    let [y, inverse] = normalised(wide(x), epsilon);
    narrow(denormalised(y, inverse, wide(grad)), dtype)
}

/// See [`super::SitOps::modulate`].
pub(super) fn modulate(
    x: Tensor<3>,
    gain: Tensor<3>,
    shift: Tensor<3>,
    unit: f32,
    epsilon: f32,
) -> Tensor<3> {
    let dtype = x.dtype();
    let [y, _] = normalised(wide(x), epsilon);
    narrow(y * (wide(gain) + unit) + wide(shift), dtype)
}

/// By x, gain and shift.
pub(super) fn modulate_backward(
    x: Tensor<3>,
    gain: Tensor<3>,
    grad: Tensor<3>,
    unit: f32,
    epsilon: f32,
) -> [Tensor<3>; 3] {
    let dtype = x.dtype();
    let grad = wide(grad);
    let [y, inverse] = normalised(wide(x), epsilon);
    let by_gain = (grad.clone() * y.clone()).sum_dim(1);
    let by_shift = grad.clone().sum_dim(1);
    let by_x = denormalised(y, inverse, grad * (wide(gain) + unit));
    [by_x, by_gain, by_shift].map(|gradient| narrow(gradient, dtype))
}

/// By y and gate, of [`super::gated_add`].
pub(super) fn gated_add_backward(y: Tensor<3>, gate: Tensor<3>, grad: Tensor<3>) -> [Tensor<3>; 2] {
    let dtype = y.dtype();
    let grad = wide(grad);
    let by_gate = (grad.clone() * wide(y)).sum_dim(1);
    [grad * wide(gate), by_gate].map(|gradient| narrow(gradient, dtype))
}

/// [`super::attention`] and its probabilities [N, heads, tokens of q, tokens of k].
pub(super) fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>) -> [Tensor<4>; 2] {
    let scores = wide((q.clone() * scale(&q)).matmul(k.swap_dims(2, 3)));
    let probabilities = narrow(softmax(scores, 3), v.dtype());
    [probabilities.clone().matmul(v), probabilities]
}

/// By q, k and v.
pub(super) fn attention_backward(
    [q, k, v]: [Tensor<4>; 3],
    probabilities: Tensor<4>,
    grad: Tensor<4>,
) -> [Tensor<4>; 3] {
    let (dtype, scale) = (q.dtype(), scale(&q));
    let by_v = probabilities.clone().swap_dims(2, 3).matmul(grad.clone());
    let by_probabilities = wide(grad.matmul(v.swap_dims(2, 3)));
    let probabilities = wide(probabilities);
    let along = (by_probabilities.clone() * probabilities.clone()).sum_dim(3);
    let by_scores = narrow(probabilities * (by_probabilities - along) * scale, dtype);
    let by_k = by_scores.clone().swap_dims(2, 3).matmul(q);
    [by_scores.matmul(k), by_k, by_v]
}

fn scale(q: &Tensor<4>) -> f64 {
    1.0 / (q.dims()[3] as f64).sqrt()
}

/// [`super::attention_qkv`] and its probabilities [N, heads, T, T].
pub(super) fn packed_attention(qkv: Tensor<3>, heads: usize) -> (Tensor<3>, Tensor<4>) {
    let [q, k, v] = unpacked(qkv, heads);
    let [y, probabilities] = attention(q, k, v);
    (joined(y), probabilities)
}

/// By qkv.
pub(super) fn packed_attention_backward(
    qkv: Tensor<3>,
    probabilities: Tensor<4>,
    grad: Tensor<3>,
) -> Tensor<3> {
    let [n, heads, t, _] = probabilities.dims();
    let grad = grad.reshape([n, t, heads, qkv.dims()[2] / (3 * heads)]).swap_dims(1, 2);
    let gradients = attention_backward(unpacked(qkv, heads), probabilities, grad).map(joined);
    Tensor::cat(gradients.to_vec(), 2)
}

/// q, k and v, each [N, heads, T, head_dim], of [N, T, 3 * hidden].
fn unpacked(qkv: Tensor<3>, heads: usize) -> [Tensor<4>; 3] {
    let [n, t, width] = qkv.dims();
    let hidden = width / 3;
    let qkv = qkv.reshape([n, t, 3, heads, hidden / heads]);
    std::array::from_fn(|i| {
        qkv.clone().narrow(2, i, 1).reshape([n, t, heads, hidden / heads]).swap_dims(1, 2)
    })
}

/// [N, heads, T, head_dim] as [N, T, heads * head_dim].
fn joined(x: Tensor<4>) -> Tensor<3> {
    let [n, heads, t, d] = x.dims();
    x.swap_dims(1, 2).reshape([n, t, heads * d])
}
