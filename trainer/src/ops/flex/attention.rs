//! Attention, head by head, over any strides: heads run in parallel, a head's scores stay in cache.

use std::ops::Range;

use super::elementwise::{Softmax, SoftmaxBackward};
use super::{Matrix, each, multiply, simd};

/// Queries whose scores are made at a time.
const QUERIES: usize = 256;

/// Where a [N, heads, tokens, head_dim] array lies: its first element and its strides.
#[derive(Clone, Copy)]
pub(super) struct Heads {
    pub first: *mut f32,
    pub strides: [isize; 4],
}

// SAFETY: a `Heads` is an address. The functions below, which follow it, are the unsafe ones.
unsafe impl Send for Heads {}
// SAFETY: as above.
unsafe impl Sync for Heads {}

impl Heads {
    /// The matrix [tokens, head_dim] of one head, from a token on.
    ///
    /// # Safety
    /// The array has that sample, head and token.
    unsafe fn head(self, sample: usize, head: usize, token: usize) -> Matrix {
        let [n, h, t, d] = self.strides;
        let offset = sample as isize * n + head as isize * h + token as isize * t;
        // SAFETY: the element lies within the array, by the caller's word.
        Matrix { first: unsafe { self.first.offset(offset) }, rows: t, columns: d }
    }
}

/// Sizes of an attention.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub samples: usize,
    pub heads: usize,
    pub queries: usize,
    pub keys: usize,
    pub head_dim: usize,
}

impl Sizes {
    fn scale(self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    fn for_each_head(self, f: impl Fn(usize, usize, usize) + Sync) {
        let jobs: Range<usize> = 0..self.samples * self.heads;
        let work = jobs.len() * self.queries * self.keys * self.head_dim;
        each(jobs.collect(), work, |i| f(i, i / self.heads, i % self.heads));
    }
}

/// out = softmax(q k^T / sqrt(head_dim)) v. The probabilities go to `probabilities` [samples, heads,
/// queries, keys] where that is given.
///
/// # Safety
/// q, k, v and out have `sizes`; q, k and v are initialised and nothing writes them meanwhile; nothing
/// else touches out or the probabilities, whose heads do not overlap.
pub(super) unsafe fn forward(sizes: Sizes, [q, k, v]: [Heads; 3], out: Heads, probabilities: Option<Matrix>) {
    let Sizes { queries, keys, head_dim, .. } = sizes;
    sizes.for_each_head(|i, sample, head| {
        let mut scratch: Vec<f32> = match probabilities {
            Some(_) => Vec::new(),
            None => Vec::with_capacity(queries.min(QUERIES) * keys),
        };
        for start in (0..queries).step_by(QUERIES) {
            let rows = QUERIES.min(queries - start);
            // SAFETY: head i has queries * keys elements of the probabilities for itself; the scratch
            // space has room for the rows of one turn. The first product initialises what the softmax
            // reads. The rest is the caller's word.
            unsafe {
                let scores = match probabilities {
                    Some(all) => all.first.add((i * queries + start) * keys),
                    None => scratch.as_mut_ptr(),
                };
                let matrix = Matrix { first: scores, rows: keys as isize, columns: 1 };
                let (q, k, v) =
                    (q.head(sample, head, start), k.head(sample, head, 0), v.head(sample, head, 0));
                multiply([rows, keys, head_dim], matrix, q, k.transposed(), sizes.scale());
                let scores = std::slice::from_raw_parts_mut(scores, rows * keys);
                simd::run(Softmax { scores, width: keys });
                multiply([rows, head_dim, keys], out.head(sample, head, start), matrix, v, 1.0);
            }
        }
    });
}

/// The gradients by q, k and v, written to `by`, from the gradient by the output and the probabilities
/// that [`forward`] made.
///
/// # Safety
/// As for [`forward`]: all have `sizes`, inputs are initialised, and nothing else touches `by`.
pub(super) unsafe fn backward(
    sizes: Sizes,
    [q, k, v]: [Heads; 3],
    probabilities: &[f32],
    grad: Heads,
    by: [Heads; 3],
) {
    let Sizes { queries, keys, head_dim, .. } = sizes;
    sizes.for_each_head(|i, sample, head| {
        let mut scratch = Vec::<f32>::with_capacity(queries * keys);
        let p = &probabilities[i * queries * keys..][..queries * keys];
        // SAFETY: the scratch space has room for the scores of a head, and the product initialises it
        // before the softmax reads it. The matrix over p is only read. The rest is the caller's word.
        unsafe {
            let p_matrix = Matrix { first: p.as_ptr().cast_mut(), rows: keys as isize, columns: 1 };
            let ds = Matrix { first: scratch.as_mut_ptr(), rows: keys as isize, columns: 1 };
            let [q, k, v] = [q, k, v].map(|x| x.head(sample, head, 0));
            let [dq, dk, dv] = by.map(|x| x.head(sample, head, 0));
            let grad = grad.head(sample, head, 0);
            multiply([keys, head_dim, queries], dv, p_matrix.transposed(), grad, 1.0);
            multiply([queries, keys, head_dim], ds, grad, v.transposed(), 1.0);
            let scores = std::slice::from_raw_parts_mut(ds.first, queries * keys);
            simd::run(SoftmaxBackward { probabilities: p, grad: scores, width: keys });
            multiply([queries, head_dim, keys], dq, ds, k, sizes.scale());
            multiply([keys, head_dim, queries], dk, ds.transposed(), q, sizes.scale());
        }
    });
}
