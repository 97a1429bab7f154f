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

/// What attention is made of, by operations that any backend has. A device that has kernels for some has its own.
pub(super) trait Pieces {
    /// a b for a [B, m, k] and b [B, k, n].
    fn product(a: Tensor<3>, b: Tensor<3>) -> Tensor<3> {
        a.matmul(b)
    }

    /// softmax(scale scores) over the last dimension, in float32 and returned in the scores' type.
    fn softmax(scores: Tensor<3>, scale: f64) -> Tensor<3> {
        let dtype = scores.dtype();
        narrow(softmax(wide(scores) * scale, 2), dtype)
    }

    /// Its gradient by the scores.
    fn softmax_backward(probabilities: Tensor<3>, grad: Tensor<3>, scale: f64) -> Tensor<3> {
        let dtype = grad.dtype();
        let (p, grad) = (wide(probabilities), wide(grad));
        let along = (grad.clone() * p.clone()).sum_dim(2);
        narrow(p * (grad - along) * scale, dtype)
    }

    /// q, k and v, each [N * heads, T, D], of [N, T, 3 * heads * D].
    fn unpack(qkv: Tensor<3>, heads: usize) -> [Tensor<3>; 3] {
        let hidden = qkv.dims()[2] / 3;
        std::array::from_fn(|i| Self::split(qkv.clone().narrow(2, i * hidden, hidden), heads))
    }

    /// The inverse of [`Pieces::unpack`].
    fn pack(qkv: [Tensor<3>; 3], heads: usize) -> Tensor<3> {
        Tensor::cat(qkv.map(|x| Self::merge(x, heads)).to_vec(), 2)
    }

    /// [N, T, heads * D] as [N * heads, T, D].
    fn split(x: Tensor<3>, heads: usize) -> Tensor<3> {
        let [n, t, width] = x.dims();
        x.reshape([n, t, heads, width / heads]).swap_dims(1, 2).reshape([n * heads, t, width / heads])
    }

    /// The inverse of [`Pieces::split`].
    fn merge(x: Tensor<3>, heads: usize) -> Tensor<3> {
        let [batch, t, d] = x.dims();
        x.reshape([batch / heads, heads, t, d]).swap_dims(1, 2).reshape([batch / heads, t, heads * d])
    }
}

/// [`super::attention`] and its probabilities [N, heads, tokens of q, tokens of k].
pub(super) fn attention<P: Pieces>(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>) -> [Tensor<4>; 2] {
    let [n, heads, queries, _] = q.dims();
    let [q, k, v] = [q, k, v].map(folded);
    let [y, probabilities] = of_heads::<P>(q, k, v);
    [y, probabilities].map(|x| {
        let width = x.dims()[2];
        x.reshape([n, heads, queries, width])
    })
}

/// By q, k and v.
pub(super) fn attention_backward<P: Pieces>(
    qkv: [Tensor<4>; 3],
    probabilities: Tensor<4>,
    grad: Tensor<4>,
) -> [Tensor<4>; 3] {
    let shapes = qkv.each_ref().map(Tensor::dims);
    let gradients = of_heads_backward::<P>(qkv.map(folded), folded(probabilities), folded(grad));
    let mut shapes = shapes.into_iter();
    gradients.map(|gradient| gradient.reshape(shapes.next().expect("three of each")))
}

/// [N, heads, T, D] as [N * heads, T, D], in that order in memory: copied once for all products that read it.
fn folded(x: Tensor<4>) -> Tensor<3> {
    let [n, heads, t, d] = x.dims();
    x.reshape([n * heads, t, d])
}

/// How q and scores are scaled. In float16 before the product, whose sums could be too large for it.
fn scales(q: &Tensor<3>) -> [f64; 2] {
    let scale = 1.0 / (q.dims()[2] as f64).sqrt();
    if q.dtype() == DType::F16 { [scale, 1.0] } else { [1.0, scale] }
}

fn scaled(q: Tensor<3>, scale: f64) -> Tensor<3> {
    if scale == 1.0 { q } else { q * scale }
}

/// Attention of [N * heads, T, D], and its probabilities.
fn of_heads<P: Pieces>(q: Tensor<3>, k: Tensor<3>, v: Tensor<3>) -> [Tensor<3>; 2] {
    let [of_q, of_scores] = scales(&q);
    let probabilities = P::softmax(P::product(scaled(q, of_q), k.swap_dims(1, 2)), of_scores);
    [P::product(probabilities.clone(), v), probabilities]
}

/// By q, k and v.
fn of_heads_backward<P: Pieces>(
    [q, k, v]: [Tensor<3>; 3],
    probabilities: Tensor<3>,
    grad: Tensor<3>,
) -> [Tensor<3>; 3] {
    let scale = scales(&q).into_iter().product();
    let by_v = P::product(probabilities.clone().swap_dims(1, 2), grad.clone());
    let by_probabilities = P::product(grad, v.swap_dims(1, 2));
    let by_scores = P::softmax_backward(probabilities, by_probabilities, scale);
    let by_k = P::product(by_scores.clone().swap_dims(1, 2), q);
    [P::product(by_scores, k), by_k, by_v]
}

/// [`super::attention_qkv`], and what its backward pass wants: q, k, v and the probabilities.
pub(super) fn packed_attention<P: Pieces>(qkv: Tensor<3>, heads: usize) -> (Tensor<3>, [Tensor<3>; 4]) {
    let [q, k, v] = P::unpack(qkv, heads);
    let [y, probabilities] = of_heads::<P>(q.clone(), k.clone(), v.clone());
    (P::merge(y, heads), [q, k, v, probabilities])
}

/// By qkv.
pub(super) fn packed_attention_backward<P: Pieces>(
    [q, k, v, probabilities]: [Tensor<3>; 4],
    heads: usize,
    grad: Tensor<3>,
) -> Tensor<3> {
    let gradients = of_heads_backward::<P>([q, k, v], probabilities, P::split(grad, heads));
    P::pack(gradients, heads)
}
