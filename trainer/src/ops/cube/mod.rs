//! The operations on GPUs: what is element by element by burn's own, which its fusion joins, what goes along rows and
//! columns by kernels, and both with gradients by formula, so that the backward pass keeps less and recomputes what is
//! cheap.

mod kernels;
mod launch;
mod layout;

use burn::backend::Cube;
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Shape, TensorMetadata};
use burn::tensor::{DType, Tensor};

use self::launch::Kernels;
use self::layout::Layouts;
use super::formulas::{self, Pieces};
use super::{LinearGradients, LinearOps, SitGradients, SitOps};

type Primitive = FloatTensor<Cube>;

fn tensor<const D: usize>(x: Primitive) -> Tensor<D> {
    Tensor::from_primitive::<Cube>(x)
}

fn primitive<const D: usize>(x: Tensor<D>) -> Primitive {
    x.try_into_primitive::<Cube>().expect("what was made of this backend's tensors")
}

/// The same elements in rows as long as the last dimension, or all in one.
fn rows(x: Primitive) -> Tensor<2> {
    let (count, width) = (x.shape().num_elements(), *x.shape().last().expect("at least one dimension"));
    tensor(Cube::float_reshape(x, Shape::new([count / width.max(1), width])))
}

fn flat(x: Primitive) -> Tensor<1> {
    let count = x.shape().num_elements();
    tensor(Cube::float_reshape(x, Shape::new([count])))
}

fn shaped<const D: usize>(x: Tensor<D>, shape: Shape) -> Primitive {
    Cube::float_reshape(primitive(x), shape)
}

impl SitOps for Cube {
    fn gelu_tanh(x: Primitive) -> Primitive {
        let shape = x.shape();
        shaped(formulas::gelu_tanh(flat(x)), shape)
    }

    fn swish(x: Primitive) -> Primitive {
        let shape = x.shape();
        shaped(formulas::swish(flat(x)), shape)
    }

    fn normalise(x: Primitive, epsilon: f32) -> Primitive {
        let shape = x.shape();
        shaped(formulas::normalise(rows(x), epsilon), shape)
    }

    fn modulate(
        x: Primitive,
        gain: Primitive,
        shift: Primitive,
        unit: f32,
        epsilon: f32,
        dtype: DType,
    ) -> Primitive {
        Self::modulated(x, gain, shift, unit, epsilon, dtype)
    }

    fn gated_add(x: Primitive, y: Primitive, gate: Primitive) -> Primitive {
        let y: Tensor<3> = tensor(y);
        let dtype = x.dtype();
        primitive(super::composite::gated_add(tensor(x), y.cast(dtype), tensor(gate)))
    }

    fn unpacked_attention(q: Primitive, k: Primitive, v: Primitive) -> Primitive {
        let [y, _] = Self::unpacked_attention_forward(q, k, v);
        y
    }

    fn packed_attention(qkv: Primitive, heads: usize) -> Primitive {
        Self::packed_attention_forward(qkv, heads).0
    }
}

impl SitGradients for Cube {
    fn gelu_tanh_backward(x: Primitive, grad: Primitive) -> Primitive {
        let shape = x.shape();
        shaped(formulas::gelu_tanh_backward(flat(x), flat(grad)), shape)
    }

    fn swish_backward(x: Primitive, grad: Primitive) -> Primitive {
        let shape = x.shape();
        shaped(formulas::swish_backward(flat(x), flat(grad)), shape)
    }

    fn normalise_backward(x: Primitive, grad: Primitive, epsilon: f32) -> Primitive {
        let shape = x.shape();
        shaped(formulas::normalise_backward(rows(x), rows(grad), epsilon), shape)
    }

    fn modulate_backward(
        x: Primitive,
        gain: Primitive,
        grad: Primitive,
        unit: f32,
        epsilon: f32,
    ) -> [Primitive; 3] {
        let (by_x, by_gain, by_shift) = Self::modulated_backward(x, gain, grad, unit, epsilon);
        [by_x, summed(by_gain), summed(by_shift)]
    }

    fn gated_add_backward(y: Primitive, gate: Primitive, grad: Primitive) -> [Primitive; 2] {
        let (by_y, by_gate) = Self::gated_backward(y, gate, grad);
        [by_y, summed(by_gate)]
    }

    fn unpacked_attention_forward(q: Primitive, k: Primitive, v: Primitive) -> [Primitive; 2] {
        formulas::attention::<ByKernels>(tensor(q), tensor(k), tensor(v)).map(primitive)
    }

    fn unpacked_attention_backward(
        qkv: [Primitive; 3],
        probabilities: Primitive,
        grad: Primitive,
    ) -> [Primitive; 3] {
        let gradients =
            formulas::attention_backward::<ByKernels>(qkv.map(tensor), tensor(probabilities), tensor(grad));
        gradients.map(primitive)
    }

    fn packed_attention_forward(qkv: Primitive, heads: usize) -> (Primitive, Vec<Primitive>) {
        let (y, saved) = formulas::packed_attention::<ByKernels>(tensor(qkv), heads);
        (primitive(y), saved.map(primitive).to_vec())
    }

    fn packed_attention_backward(saved: Vec<Primitive>, heads: usize, grad: Primitive) -> Primitive {
        let Ok(saved) = <[_; 4]>::try_from(saved) else {
            unreachable!("four, by `packed_attention_forward`");
        };
        let saved = saved.map(tensor);
        primitive(formulas::packed_attention_backward::<ByKernels>(saved, heads, tensor(grad)))
    }
}

/// Sums [groups, parts, width] over the parts, to [groups, 1, width].
fn summed(parts: Primitive) -> Primitive {
    if parts.shape()[1] == 1 { parts } else { Cube::sums(parts) }
}

/// Attention's pieces by kernels.
struct ByKernels;

impl Pieces for ByKernels {
    fn product(a: Tensor<3>, b: Tensor<3>) -> Tensor<3> {
        tensor(Cube::product(primitive(a), primitive(b)))
    }

    fn softmax(scores: Tensor<3>, scale: f64) -> Tensor<3> {
        tensor(Cube::probabilities(primitive(scores), scale as f32))
    }

    fn softmax_backward(probabilities: Tensor<3>, grad: Tensor<3>, scale: f64) -> Tensor<3> {
        tensor(Cube::probabilities_backward(primitive(probabilities), primitive(grad), scale as f32))
    }

    fn unpack(qkv: Tensor<3>, heads: usize) -> [Tensor<3>; 3] {
        let qkv = primitive(qkv);
        std::array::from_fn(|part| tensor(Cube::split_heads(qkv.clone(), heads, part, 3)))
    }

    fn pack(qkv: [Tensor<3>; 3], heads: usize) -> Tensor<3> {
        let [q, k, v] = qkv.map(primitive);
        tensor(Cube::pack_heads(q, k, v, heads))
    }

    fn split(x: Tensor<3>, heads: usize) -> Tensor<3> {
        tensor(Cube::split_heads(primitive(x), heads, 0, 1))
    }

    fn merge(x: Tensor<3>, heads: usize) -> Tensor<3> {
        tensor(Cube::merge_heads(primitive(x), heads))
    }
}

/// See [`super::squares`].
pub(super) fn squares(values: Tensor<1>) -> Tensor<1> {
    tensor(Cube::squares(primitive(values)))
}

/// See [`super::joined`].
pub(super) fn joined(parts: Vec<Tensor<1>>) -> Tensor<1> {
    tensor(layout::joined(parts.into_iter().map(primitive).collect()))
}

/// The weight's gradient as a product that has its layout, where burn's autodiff makes a transposed one and copies it.
/// Forward by burn's product, to which its fusion adds the bias.
impl LinearOps for Cube {
    fn project(x: Primitive, weight: Primitive) -> Primitive {
        Self::float_matmul(x, Self::float_transpose(weight))
    }

    fn affine(x: Primitive, weight: Primitive, bias: Primitive) -> Primitive {
        let width = bias.shape()[0];
        let bias = Self::float_reshape(bias, Shape::new([1, width]));
        Self::float_add(Self::project(x, weight), bias)
    }
}

impl LinearGradients for Cube {
    fn project_backward_input(grad: Primitive, weight: Primitive) -> Primitive {
        Self::product(grad, weight)
    }

    fn project_backward_weight(grad: Primitive, x: Primitive) -> Primitive {
        Self::product(Self::float_transpose(grad), x)
    }

    fn sum_rows(grad: Primitive) -> Primitive {
        let [rows, width] = grad.shape().dims();
        let sums = Self::sums(Self::float_reshape(grad, Shape::new([1, rows, width])));
        Self::float_reshape(sums, Shape::new([width]))
    }
}
