//! The operations on GPUs: burn's own, which its fusion joins to kernels, but with gradients by formula, so that the
//! backward pass keeps less and recomputes what is cheap.

use burn::backend::Cube;
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Shape, TensorMetadata};
use burn::tensor::Tensor;

use super::{SitGradients, SitOps, formulas};

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

    fn modulate(x: Primitive, gain: Primitive, shift: Primitive, unit: f32, epsilon: f32) -> Primitive {
        primitive(formulas::modulate(tensor(x), tensor(gain), tensor(shift), unit, epsilon))
    }

    fn gated_add(x: Primitive, y: Primitive, gate: Primitive) -> Primitive {
        primitive(super::composite::gated_add(tensor(x), tensor(y), tensor(gate)))
    }

    fn unpacked_attention(q: Primitive, k: Primitive, v: Primitive) -> Primitive {
        let [y, _] = Self::unpacked_attention_forward(q, k, v);
        y
    }

    fn packed_attention(qkv: Primitive, heads: usize) -> Primitive {
        let [y, _] = Self::packed_attention_forward(qkv, heads);
        y
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
        formulas::modulate_backward(tensor(x), tensor(gain), tensor(grad), unit, epsilon).map(primitive)
    }

    fn gated_add_backward(y: Primitive, gate: Primitive, grad: Primitive) -> [Primitive; 2] {
        formulas::gated_add_backward(tensor(y), tensor(gate), tensor(grad)).map(primitive)
    }

    fn unpacked_attention_forward(q: Primitive, k: Primitive, v: Primitive) -> [Primitive; 2] {
        formulas::attention(tensor(q), tensor(k), tensor(v)).map(primitive)
    }

    fn unpacked_attention_backward(
        qkv: [Primitive; 3],
        probabilities: Primitive,
        grad: Primitive,
    ) -> [Primitive; 3] {
        formulas::attention_backward(qkv.map(tensor), tensor(probabilities), tensor(grad)).map(primitive)
    }

    fn packed_attention_forward(qkv: Primitive, heads: usize) -> [Primitive; 2] {
        let (y, probabilities) = formulas::packed_attention(tensor(qkv), heads);
        [primitive(y), primitive(probabilities)]
    }

    fn packed_attention_backward(qkv: Primitive, probabilities: Primitive, grad: Primitive) -> Primitive {
        primitive(formulas::packed_attention_backward(tensor(qkv), tensor(probabilities), tensor(grad)))
    }
}
