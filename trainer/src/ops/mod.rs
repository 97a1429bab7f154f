//! Operations that decide the speed of a step.
//!
//! Each has a definition in `composite`, made of burn's own operations, and may have a fused form on
//! a backend (`flex/` for the CPU, `cube` for GPUs) with a hand-written backward pass (`autodiff`). The functions here
//! choose: what a backend has fused forms for takes those, everything else the composite. To add
//! a backend, list it in [`SitOps`], implement that and [`SitGradients`], and extend `fused`.

pub mod allocator;
mod autodiff;
pub mod composite;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod cube;
mod flex;
mod formulas;
mod parts;
mod watch;

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, DispatchDevice, backend_extension};
use burn::tensor::{DType, Tensor};

pub use parts::parts;
pub use watch::{GradientSink, GradientSlot, after, watch};

/// Fused forms of operations of this module, on primitives of any strides, and on the CPU of float32 alone. The function of
/// the same name in `composite` is the definition.
#[backend_extension(Autodiff, Flex, Cube: cfg(any(feature = "cuda", feature = "wgpu")))]
pub trait SitOps: Backend {
    /// See [`gelu_tanh`].
    fn gelu_tanh(x: FloatTensor<Self>) -> FloatTensor<Self>;

    /// See [`silu`].
    fn swish(x: FloatTensor<Self>) -> FloatTensor<Self>;

    /// See [`layer_norm`].
    fn normalise(x: FloatTensor<Self>, epsilon: f32) -> FloatTensor<Self>;

    /// normalise(x) * (unit + gain) + shift for x [N, T, H], gain and shift [N, 1, H], in the type `dtype`.
    fn modulate(
        x: FloatTensor<Self>,
        gain: FloatTensor<Self>,
        shift: FloatTensor<Self>,
        unit: f32,
        epsilon: f32,
        dtype: DType,
    ) -> FloatTensor<Self>;

    /// See [`gated_add`].
    fn gated_add(x: FloatTensor<Self>, y: FloatTensor<Self>, gate: FloatTensor<Self>) -> FloatTensor<Self>;

    /// See [`attention`].
    fn unpacked_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
    ) -> FloatTensor<Self>;

    /// See [`attention_qkv`].
    fn packed_attention(qkv: FloatTensor<Self>, heads: usize) -> FloatTensor<Self>;
}

/// As [`SitOps`], for linear layers.
#[backend_extension(Autodiff, Flex, Cube: cfg(any(feature = "cuda", feature = "wgpu")))]
pub trait LinearOps: Backend {
    /// x weight^T for x [rows, in], weight [out, in].
    fn project(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self>;

    /// x weight^T + bias for x [rows, in], weight [out, in], bias [out].
    fn affine(x: FloatTensor<Self>, weight: FloatTensor<Self>, bias: FloatTensor<Self>) -> FloatTensor<Self>;
}

/// As [`SitOps`], for convolutions, which GPUs have good ones of already.
#[backend_extension(Autodiff, Flex)]
pub trait ConvolutionOps: Backend {
    /// See [`conv2d`], for a 3x3 kernel, stride 1, padding 1: x [N, in, H, W], weight [out, in, 3, 3],
    /// bias [out].
    fn convolve(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
    ) -> FloatTensor<Self>;
}

/// What the backward passes need of a backend that has [`SitOps`]: gradients by the inputs, given the
/// gradient by the output.
pub trait SitGradients: SitOps {
    /// By x.
    fn gelu_tanh_backward(x: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self>;

    /// By x.
    fn swish_backward(x: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self>;

    /// By x.
    fn normalise_backward(x: FloatTensor<Self>, grad: FloatTensor<Self>, epsilon: f32) -> FloatTensor<Self>;

    /// By x, gain and shift.
    fn modulate_backward(
        x: FloatTensor<Self>,
        gain: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        unit: f32,
        epsilon: f32,
    ) -> [FloatTensor<Self>; 3];

    /// By y and gate; the gradient by x is `grad` itself.
    fn gated_add_backward(
        y: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> [FloatTensor<Self>; 2];

    /// The attention and its probabilities [N, heads, tokens of q, tokens of k].
    fn unpacked_attention_forward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
    ) -> [FloatTensor<Self>; 2];

    /// By q, k and v.
    fn unpacked_attention_backward(
        qkv: [FloatTensor<Self>; 3],
        probabilities: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> [FloatTensor<Self>; 3];

    /// The attention, and what its backward pass wants of it.
    fn packed_attention_forward(
        qkv: FloatTensor<Self>,
        heads: usize,
    ) -> (FloatTensor<Self>, Vec<FloatTensor<Self>>);

    /// By qkv, given what the forward pass has left.
    fn packed_attention_backward(
        saved: Vec<FloatTensor<Self>>,
        heads: usize,
        grad: FloatTensor<Self>,
    ) -> FloatTensor<Self>;
}

/// What the backward passes need of a backend that has [`LinearOps`].
pub trait LinearGradients: LinearOps {
    /// [`LinearOps::project`]'s gradient by x: grad weight.
    fn project_backward_input(grad: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self>;

    /// [`LinearOps::project`]'s gradient by the weight: grad^T x.
    fn project_backward_weight(grad: FloatTensor<Self>, x: FloatTensor<Self>) -> FloatTensor<Self>;

    /// The sum over rows: [rows, out] -> [out].
    fn sum_rows(grad: FloatTensor<Self>) -> FloatTensor<Self>;
}

/// What the backward passes need of a backend that has [`ConvolutionOps`].
pub trait ConvolutionGradients: ConvolutionOps {
    /// [`ConvolutionOps::convolve`]'s gradient by x.
    fn convolve_backward_input(grad: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self>;

    /// [`ConvolutionOps::convolve`]'s gradient by the weight.
    fn convolve_backward_weight(grad: FloatTensor<Self>, x: FloatTensor<Self>) -> FloatTensor<Self>;

    /// The sum over samples and pixels: [N, channels, H, W] -> [channels].
    fn sum_channels(grad: FloatTensor<Self>) -> FloatTensor<Self>;
}

/// Whether the fused forms on the CPU take this tensor.
fn fused_on_cpu<const D: usize>(x: &Tensor<D>) -> bool {
    x.dtype() == DType::F32 && matches!(x.device().inner().as_dispatch(), DispatchDevice::Flex(_))
}

/// Whether those on GPUs do, in half precision as well.
fn fused_on_gpu<const D: usize>(x: &Tensor<D>) -> bool {
    match x.device().inner().as_dispatch() {
        #[cfg(any(feature = "cuda", feature = "wgpu"))]
        DispatchDevice::Cube(_) => matches!(x.dtype(), DType::F32 | DType::F16 | DType::BF16),
        _ => false,
    }
}

/// Whether one of them does.
fn fused<const D: usize>(x: &Tensor<D>) -> bool {
    fused_on_cpu(x) || fused_on_gpu(x)
}

/// Whether they take these together.
fn fused_together<const A: usize, const B: usize>(x: &Tensor<A>, y: &Tensor<B>) -> bool {
    fused(x) && fused(y) && x.dtype() == y.dtype()
}

/// Vectors of any float types one after another, as float32 in memory of their own.
pub fn joined(parts: Vec<Tensor<1>>) -> Tensor<1> {
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    if parts.iter().all(fused_on_gpu) {
        return cube::joined(parts);
    }
    let parts: Vec<_> = parts.into_iter().map(|part| part.cast(DType::F32)).collect();
    Tensor::cat(parts, 0)
}

/// Sums that together are the sum of a vector's squares, the same bits each time. (A GPU's own sum adds up what its cores
/// have in whatever order they come.)
pub fn squares(values: Tensor<1>) -> Tensor<1> {
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    if fused_on_gpu(&values) {
        return cube::squares(values);
    }
    (values.clone() * values).sum()
}

/// tanh-approximated GELU: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).
pub fn gelu_tanh<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    if !fused(&x) {
        return composite::gelu_tanh(x);
    }
    Tensor::from_dispatch(Dispatch::gelu_tanh(x.into_dispatch()))
}

/// x sigmoid(x).
pub fn silu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    if !fused(&x) {
        return composite::silu(x);
    }
    Tensor::from_dispatch(Dispatch::swish(x.into_dispatch()))
}

/// (x - mean) / sqrt(variance + epsilon) over the last dimension, computed in float32 and returned
/// in the input's type.
pub fn layer_norm<const D: usize>(x: Tensor<D>, epsilon: f64) -> Tensor<D> {
    if !fused(&x) {
        return composite::layer_norm(x, epsilon);
    }
    Tensor::from_dispatch(Dispatch::normalise(x.into_dispatch(), epsilon as f32))
}

/// layer_norm(x) * weight + bias, for weight and bias over the last dimension.
pub fn layer_norm_affine<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<1>,
    bias: Tensor<1>,
    epsilon: f64,
) -> Tensor<D> {
    if !(fused_together(&x, &weight) && fused_together(&x, &bias)) {
        return composite::layer_norm_affine(x, weight, bias, epsilon);
    }
    let shape = x.dims();
    let (features, dtype) = (shape[D - 1], x.dtype());
    let rows = shape[..D - 1].iter().product();
    let y = Dispatch::modulate(
        x.reshape([1, rows, features]).into_dispatch(),
        weight.reshape([1, 1, features]).into_dispatch(),
        bias.reshape([1, 1, features]).into_dispatch(),
        0.0,
        epsilon as f32,
        dtype,
    );
    Tensor::<3>::from_dispatch(y).reshape(shape)
}

/// layer_norm(x) * (1 + scale) + shift: adaptive layer normalisation (DiT, arXiv 2212.09748), for x
/// [N, T, H], shift and scale [N, 1, H], computed in their type and returned as `dtype`.
pub fn modulate(x: Tensor<3>, shift: Tensor<3>, scale: Tensor<3>, epsilon: f64, dtype: DType) -> Tensor<3> {
    if !(fused_together(&x, &shift) && fused_together(&x, &scale)) {
        return composite::modulate(x, shift, scale, epsilon).cast(dtype);
    }
    let [n, _, h] = x.dims();
    assert!(
        shift.dims() == [n, 1, h] && scale.dims() == [n, 1, h],
        "modulate: shift and scale are [N, 1, H]"
    );
    let at_once = if fused_on_gpu(&x) { dtype } else { x.dtype() };
    let y = Dispatch::modulate(
        x.into_dispatch(),
        scale.into_dispatch(),
        shift.into_dispatch(),
        1.0,
        epsilon as f32,
        at_once,
    );
    Tensor::<3>::from_dispatch(y).cast(dtype)
}

/// x + gate * y: the gated residual of a DiT block, for x and y [N, T, H], gate [N, 1, H], in the type of x and gate.
pub fn gated_add(x: Tensor<3>, y: Tensor<3>, gate: Tensor<3>) -> Tensor<3> {
    // GPUs read y as it is.
    let y = if fused_on_gpu(&y) { y } else { y.cast(x.dtype()) };
    if !(fused(&x) && fused(&y) && fused_together(&x, &gate)) {
        return composite::gated_add(x, y, gate);
    }
    let [n, t, h] = x.dims();
    assert!(y.dims() == [n, t, h] && gate.dims() == [n, 1, h], "gated_add: y is [N, T, H], gate [N, 1, H]");
    Tensor::from_dispatch(Dispatch::gated_add(x.into_dispatch(), y.into_dispatch(), gate.into_dispatch()))
}

/// softmax(q k^T / sqrt(head_dim)) v over [N, heads, tokens, head_dim]; k and v may have another
/// number of tokens than q.
pub fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>) -> Tensor<4> {
    if !(fused_together(&q, &k) && fused_together(&q, &v)) {
        return composite::attention(q, k, v);
    }
    let [n, heads, _, d] = q.dims();
    assert!(
        k.dims() == v.dims() && [k.dims()[0], k.dims()[1], k.dims()[3]] == [n, heads, d],
        "attention: q, k and v do not fit together"
    );
    Tensor::from_dispatch(Dispatch::unpacked_attention(
        q.into_dispatch(),
        k.into_dispatch(),
        v.into_dispatch(),
    ))
}

/// Self-attention straight from the packed projection: [N, T, 3 * hidden], which holds q, k and v one
/// after another, each [heads, head_dim] -> [N, T, hidden].
pub fn attention_qkv(qkv: Tensor<3>, heads: usize) -> Tensor<3> {
    let width = qkv.dims()[2];
    assert!(heads > 0 && width.is_multiple_of(3 * heads), "attention_qkv: {width} is not 3 * {heads} heads");
    if !fused(&qkv) {
        return composite::attention_qkv(qkv, heads);
    }
    Tensor::from_dispatch(Dispatch::packed_attention(qkv.into_dispatch(), heads))
}

/// x weight^T + bias over the last dimension; the weight is [out, in].
pub fn linear<const D: usize>(x: Tensor<D>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<D> {
    if !(fused_together(&x, &weight) && bias.as_ref().is_none_or(|bias| fused_together(&x, bias))) {
        return composite::linear(x, weight, bias);
    }
    let mut shape = x.dims();
    let [outputs, inputs] = weight.dims();
    assert_eq!(shape[D - 1], inputs, "linear: x does not fit the weight");
    let rows = shape[..D - 1].iter().product();
    shape[D - 1] = outputs;
    let (x, weight) = (x.reshape([rows, inputs]).into_dispatch(), weight.into_dispatch());
    let y = match bias {
        Some(bias) => Dispatch::affine(x, weight, bias.into_dispatch()),
        None => Dispatch::project(x, weight),
    };
    Tensor::<2>::from_dispatch(y).reshape(shape)
}

/// 2D convolution: x [N, in, H, W], weight [out, in, kernel, kernel], bias [out] -> [N, out, H', W'].
pub fn conv2d(
    x: Tensor<4>,
    weight: Tensor<4>,
    bias: Option<Tensor<1>>,
    stride: usize,
    padding: usize,
) -> Tensor<4> {
    let [outputs, inputs, kernel @ ..] = weight.dims();
    let fits = kernel == [3, 3] && stride == 1 && padding == 1 && x.dims()[1] == inputs;
    if !(fits && fused_on_cpu(&x) && fused_on_cpu(&weight) && bias.as_ref().is_none_or(fused_on_cpu)) {
        return composite::conv2d(x, weight, bias, stride, padding);
    }
    let bias = bias.unwrap_or_else(|| Tensor::zeros([outputs], &x.device()));
    Tensor::from_dispatch(Dispatch::convolve(x.into_dispatch(), weight.into_dispatch(), bias.into_dispatch()))
}

#[cfg(test)]
mod tests;
