//! Attention between tensors and [`attention`]'s addresses.

use std::mem::MaybeUninit;

use burn_flex::FlexTensor;

use super::attention::{self, Heads, Sizes};
use super::{Matrix, contiguous, dims, tensor, values, vector};

/// [N, heads, tokens, head_dim] as the tensor has it.
pub(super) fn heads_of(x: &FlexTensor) -> Heads {
    let strides = x.layout().strides();
    let first = x.storage::<f32>()[x.layout().start_offset()..].as_ptr().cast_mut();
    Heads { first, strides: std::array::from_fn(|i| strides[i]) }
}

/// The three parts of packed rows [N, T, 3, heads, head_dim] that begin at `first`.
pub(super) fn packed_heads(first: *mut f32, tokens: usize, heads: usize, head_dim: usize) -> [Heads; 3] {
    let hidden = heads * head_dim;
    let strides = [tokens * 3 * hidden, head_dim, 3 * hidden, 1].map(|s| s as isize);
    std::array::from_fn(|i| Heads { first: first.wrapping_add(i * hidden), strides })
}

/// Rows [N, T, heads, head_dim] that begin at `first`.
pub(super) fn row_heads(first: *mut f32, tokens: usize, heads: usize, head_dim: usize) -> Heads {
    let strides = [tokens * heads * head_dim, head_dim, heads * head_dim, 1].map(|s| s as isize);
    Heads { first, strides }
}

pub(super) fn unpacked_sizes(q: &FlexTensor, k: &FlexTensor) -> Sizes {
    let [samples, heads, queries, head_dim] = dims(q);
    Sizes { samples, heads, queries, keys: dims::<4>(k)[2], head_dim }
}

pub(super) fn unpacked(
    q: FlexTensor,
    k: FlexTensor,
    v: FlexTensor,
    probabilities: Option<&mut [MaybeUninit<f32>]>,
) -> FlexTensor {
    let sizes = unpacked_sizes(&q, &k);
    let Sizes { samples, heads, queries, keys, head_dim } = sizes;
    let probabilities =
        probabilities.map(|p| Matrix { first: p.as_mut_ptr().cast(), rows: keys as isize, columns: 1 });
    let shape = [samples, heads, queries, head_dim];
    // SAFETY: the sizes are the tensors', `forward` writes all of out, and the probabilities are as many
    // as it makes (see the callers).
    let out = unsafe {
        vector(shape.iter().product(), |out| {
            let strides = [heads * queries * head_dim, queries * head_dim, head_dim, 1].map(|s| s as isize);
            let out = Heads { first: out.as_mut_ptr().cast(), strides };
            attention::forward(sizes, [&q, &k, &v].map(heads_of), out, probabilities);
        })
    };
    tensor(out, shape)
}

pub(super) fn packed_sizes(qkv: &FlexTensor, heads: usize) -> Sizes {
    let [samples, tokens, width] = dims(qkv);
    Sizes { samples, heads, queries: tokens, keys: tokens, head_dim: width / 3 / heads }
}

pub(super) fn packed(
    qkv: FlexTensor,
    heads: usize,
    probabilities: Option<&mut [MaybeUninit<f32>]>,
) -> FlexTensor {
    let sizes = packed_sizes(&qkv, heads);
    let Sizes { samples, queries: tokens, head_dim, .. } = sizes;
    let qkv = contiguous(qkv);
    let parts = packed_heads(values(&qkv).as_ptr().cast_mut(), tokens, heads, head_dim);
    let probabilities =
        probabilities.map(|p| Matrix { first: p.as_mut_ptr().cast(), rows: tokens as isize, columns: 1 });
    let shape = [samples, tokens, heads * head_dim];
    // SAFETY: the sizes are the tensor's, `forward` writes all of out, and the probabilities are as many
    // as it makes (see the callers).
    let out = unsafe {
        vector(shape.iter().product(), |out| {
            let out = row_heads(out.as_mut_ptr().cast(), tokens, heads, head_dim);
            attention::forward(sizes, parts, out, probabilities);
        })
    };
    tensor(out, shape)
}

/// Runs an attention that leaves its probabilities.
pub(super) fn with_probabilities(
    sizes: Sizes,
    f: impl FnOnce(Option<&mut [MaybeUninit<f32>]>) -> FlexTensor,
) -> [FlexTensor; 2] {
    let shape = [sizes.samples, sizes.heads, sizes.queries, sizes.keys];
    let mut out = None;
    // SAFETY: `attention::forward` writes every probability.
    let p = unsafe { vector(shape.iter().product(), |p| out = Some(f(Some(p)))) };
    [out.expect("set by the call above"), tensor(p, shape)]
}
