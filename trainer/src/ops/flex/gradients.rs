//! The gradients of the fused operations on the CPU backend.

use burn_flex::{Flex, FlexTensor};

use super::attention::{self, Heads, Sizes};
use super::heads::with_probabilities;
use super::heads::{heads_of, packed, packed_heads, packed_sizes, row_heads, unpacked, unpacked_sizes};
use super::{
    Matrix, PIECE, ROWS, contiguous, convolution, dims, each, elementwise, norm, product, simd, tensor,
    update, values, vector,
};
use crate::ops::{ConvolutionGradients, LinearGradients, SitGradients};

/// The gradient by x, in the place of the gradient by y where that is free.
fn map_backward(
    x: FlexTensor,
    grad: FlexTensor,
    piece: usize,
    f: impl Fn(&[f32], &mut [f32]) + Sync + Send,
) -> FlexTensor {
    let x = contiguous(x);
    let x = values(&x);
    update(grad, |grad| {
        each(x.chunks(piece).zip(grad.chunks_mut(piece)).collect(), x.len(), |(x, grad)| f(x, grad));
    })
}

/// Sums [groups, pieces, width] over pieces, in order.
fn fold(parts: &[f32], groups: usize, width: usize) -> Vec<f32> {
    let mut sums = vec![0.0; groups * width];
    let pieces = parts.len() / (groups * width).max(1);
    for (sum, parts) in sums.chunks_mut(width).zip(parts.chunks(pieces * width)) {
        for part in parts.chunks(width) {
            sum.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
        }
    }
    sums
}

impl SitGradients for Flex {
    fn gelu_tanh_backward(x: FlexTensor, grad: FlexTensor) -> FlexTensor {
        map_backward(x, grad, PIECE, |x, grad| simd::run(elementwise::GeluBackward { x, grad }))
    }

    fn swish_backward(x: FlexTensor, grad: FlexTensor) -> FlexTensor {
        map_backward(x, grad, PIECE, |x, grad| simd::run(elementwise::SwishBackward { x, grad }))
    }

    fn normalise_backward(x: FlexTensor, grad: FlexTensor, epsilon: f32) -> FlexTensor {
        let width = *x.layout().shape().last().expect("at least one dimension");
        map_backward(x, grad, ROWS * width, |x, grad| {
            simd::run(norm::NormaliseBackward { x, grad, width, epsilon });
        })
    }

    fn modulate_backward(
        x: FlexTensor,
        gain: FlexTensor,
        grad: FlexTensor,
        unit: f32,
        epsilon: f32,
    ) -> [FlexTensor; 3] {
        let [samples, tokens, width] = dims(&x);
        let [x, gain] = [x, gain].map(contiguous);
        let (x, gain) = (values(&x), values(&gain));
        let (sample, piece) = (tokens * width, ROWS * width);
        let pieces = tokens.div_ceil(ROWS);
        let mut by_gain = vec![0.0; samples * pieces * width];
        let mut by_shift = by_gain.clone();
        let grad = update(grad, |grad| {
            let jobs = (x.chunks(sample).zip(grad.chunks_mut(sample)).zip(gain.chunks(width)))
                .flat_map(|((x, grad), gain)| {
                    x.chunks(piece).zip(grad.chunks_mut(piece)).map(move |(x, grad)| (x, grad, gain))
                })
                .zip(by_gain.chunks_mut(width).zip(by_shift.chunks_mut(width)))
                .collect();
            each(jobs, x.len(), |((x, grad, gain), (by_gain, by_shift))| {
                simd::run(norm::ModulateBackward { x, gain, grad, by_gain, by_shift, unit, epsilon });
            });
        });
        let [by_gain, by_shift] =
            [by_gain, by_shift].map(|parts| tensor(fold(&parts, samples, width), [samples, 1, width]));
        [grad, by_gain, by_shift]
    }

    fn gated_add_backward(y: FlexTensor, gate: FlexTensor, grad: FlexTensor) -> [FlexTensor; 2] {
        let [samples, tokens, width] = dims(&y);
        let [y, gate, grad] = [y, gate, grad].map(contiguous);
        let (y, gate, grad) = (values(&y), values(&gate), values(&grad));
        let (sample, piece) = (tokens * width, ROWS * width);
        let mut by_gate = vec![0.0; samples * tokens.div_ceil(ROWS) * width];
        // SAFETY: the kernel writes every row, and pieces are whole rows.
        let by_y = unsafe {
            vector(y.len(), |by_y| {
                let rows = (y.chunks(sample).zip(grad.chunks(sample)))
                    .zip(by_y.chunks_mut(sample).zip(gate.chunks(width)))
                    .flat_map(|((y, grad), (by_y, gate))| {
                        (y.chunks(piece).zip(grad.chunks(piece)).zip(by_y.chunks_mut(piece)))
                            .map(move |((y, grad), by_y)| (y, grad, by_y, gate))
                    });
                let jobs = rows.zip(by_gate.chunks_mut(width)).collect();
                each(jobs, y.len(), |((y, grad, by_y, gate), by_gate)| {
                    simd::run(elementwise::GatedAddBackward { y, gate, grad, by_y, by_gate });
                });
            })
        };
        [tensor(by_y, [samples, tokens, width]), tensor(fold(&by_gate, samples, width), [samples, 1, width])]
    }

    fn unpacked_attention_forward(q: FlexTensor, k: FlexTensor, v: FlexTensor) -> [FlexTensor; 2] {
        with_probabilities(unpacked_sizes(&q, &k), |p| unpacked(q, k, v, p))
    }

    fn unpacked_attention_backward(
        [q, k, v]: [FlexTensor; 3],
        probabilities: FlexTensor,
        grad: FlexTensor,
    ) -> [FlexTensor; 3] {
        let sizes = unpacked_sizes(&q, &k);
        let Sizes { samples, heads, queries, keys, head_dim } = sizes;
        let [mut dq, mut dk, mut dv] =
            [queries, keys, keys].map(|tokens| vec![0.0f32; samples * heads * tokens * head_dim]);
        let by = [(&mut dq, queries), (&mut dk, keys), (&mut dv, keys)].map(|(values, tokens)| {
            let strides = [heads * tokens * head_dim, tokens * head_dim, head_dim, 1].map(|s| s as isize);
            Heads { first: values.as_mut_ptr(), strides }
        });
        // SAFETY: the sizes are the tensors', and the gradients' vectors are this function's own.
        unsafe {
            let inputs = [&q, &k, &v].map(heads_of);
            attention::backward(sizes, inputs, values(&probabilities), heads_of(&grad), by);
        }
        [(dq, queries), (dk, keys), (dv, keys)]
            .map(|(values, tokens)| tensor(values, [samples, heads, tokens, head_dim]))
    }

    fn packed_attention_forward(qkv: FlexTensor, heads: usize) -> (FlexTensor, Vec<FlexTensor>) {
        let sizes = packed_sizes(&qkv, heads);
        let [y, probabilities] = with_probabilities(sizes, |p| packed(qkv.clone(), heads, p));
        (y, vec![qkv, probabilities])
    }

    fn packed_attention_backward(saved: Vec<FlexTensor>, heads: usize, grad: FlexTensor) -> FlexTensor {
        let Ok([qkv, probabilities]) = <[_; 2]>::try_from(saved) else {
            unreachable!("two, by `packed_attention_forward`");
        };
        let sizes = packed_sizes(&qkv, heads);
        let Sizes { heads, queries: tokens, head_dim, .. } = sizes;
        let [qkv, grad] = [qkv, grad].map(contiguous);
        let parts = packed_heads(values(&qkv).as_ptr().cast_mut(), tokens, heads, head_dim);
        let grad = row_heads(values(&grad).as_ptr().cast_mut(), tokens, heads, head_dim);
        // SAFETY: the sizes are the tensor's, and `backward` writes all three parts.
        let by = unsafe {
            vector(values(&qkv).len(), |by| {
                let by = packed_heads(by.as_mut_ptr().cast(), tokens, heads, head_dim);
                attention::backward(sizes, parts, values(&probabilities), grad, by);
            })
        };
        tensor(by, qkv.layout().shape().clone())
    }
}

impl LinearGradients for Flex {
    fn project_backward_input(grad: FlexTensor, weight: FlexTensor) -> FlexTensor {
        let ([rows, outputs], [_, inputs]) = (dims(&grad), dims::<2>(&weight));
        // SAFETY: the sizes are the tensors'.
        let by = unsafe { product([rows, inputs, outputs], Matrix::of(&grad), Matrix::of(&weight)) };
        tensor(by, [rows, inputs])
    }

    fn project_backward_weight(grad: FlexTensor, x: FlexTensor) -> FlexTensor {
        let ([rows, outputs], [_, inputs]) = (dims(&grad), dims::<2>(&x));
        // SAFETY: the sizes are the tensors'.
        let by = unsafe { product([outputs, inputs, rows], Matrix::of(&grad).transposed(), Matrix::of(&x)) };
        tensor(by, [outputs, inputs])
    }

    fn sum_rows(grad: FlexTensor) -> FlexTensor {
        let [rows, width] = dims(&grad);
        let grad = contiguous(grad);
        let grad = values(&grad);
        let mut parts = vec![0.0; rows.div_ceil(ROWS) * width];
        let jobs = grad.chunks(ROWS * width).zip(parts.chunks_mut(width)).collect();
        each(jobs, grad.len(), |(grad, sums)| simd::run(elementwise::SumRows { grad, sums }));
        tensor(fold(&parts, 1, width), [width])
    }
}

impl ConvolutionGradients for Flex {
    fn convolve_backward_input(grad: FlexTensor, weight: FlexTensor) -> FlexTensor {
        let [outputs, inputs, ..] = dims::<4>(&weight);
        let [samples, _, height, width] = dims(&grad);
        let sizes = convolution::Sizes { samples, inputs: outputs, outputs: inputs, height, width };
        let [grad, weight] = [grad, weight].map(contiguous);
        let weights = values(&weight);
        let tap = |k: usize| Matrix {
            first: weights[8 - k..].as_ptr().cast_mut(),
            rows: 9 * inputs as isize,
            columns: 9,
        };
        // SAFETY: the taps are the weight's, turned round, and `correlate` writes every element.
        let by = unsafe {
            vector(samples * inputs * height * width, |by| {
                convolution::correlate(sizes, values(&grad), tap, None, by);
            })
        };
        tensor(by, [samples, inputs, height, width])
    }

    fn convolve_backward_weight(grad: FlexTensor, x: FlexTensor) -> FlexTensor {
        let ([samples, inputs, height, width], [_, outputs, ..]) = (dims(&x), dims::<4>(&grad));
        let sizes = convolution::Sizes { samples, inputs, outputs, height, width };
        let [x, grad] = [x, grad].map(contiguous);
        let parts = convolution::weight_gradients(sizes, values(&x), values(&grad));
        let sums = fold(&parts, 1, 9 * inputs * outputs);
        let mut by = vec![0.0; sums.len()];
        for (i, &sum) in sums.iter().enumerate() {
            // From [y, output, x, input].
            let (input, x, rest) = (i % inputs, i / inputs % 3, i / inputs / 3);
            let (output, y) = (rest % outputs, rest / outputs);
            by[(output * inputs + input) * 9 + y * 3 + x] = sum;
        }
        tensor(by, [outputs, inputs, 3, 3])
    }

    fn sum_channels(grad: FlexTensor) -> FlexTensor {
        let [_, channels, height, width] = dims(&grad);
        let grad = contiguous(grad);
        let mut sums = vec![0.0; channels];
        for (i, plane) in values(&grad).chunks(height * width).enumerate() {
            simd::run(elementwise::AddSum { values: plane, sum: &mut sums[i % channels] });
        }
        tensor(sums, [channels])
    }
}
