//! The fused operations on the CPU backend.
//!
//! Work is cut into pieces by shape alone and every sum over pieces runs in their order, so results
//! do not depend on the number of threads.

mod attention;
mod convolution;
mod elementwise;
mod gradients;
mod heads;
mod norm;
mod simd;

use std::mem::MaybeUninit;

use burn::tensor::{DType, Shape, TensorData};
use burn_flex::{Flex, FlexTensor};
use rayon::prelude::*;

use self::heads::{packed, unpacked};
use super::{ConvolutionOps, LinearOps, SitOps};

/// Elements of an element-wise operation that make one piece.
const PIECE: usize = 16 * 1024;
/// Rows of a row-wise operation that make one piece.
const ROWS: usize = 32;
/// Operations below which a second thread costs more than it brings.
const PARALLEL: usize = 64 * 1024;

/// Runs f on every job, in parallel where there are threads and `work` operations to share.
fn each<J: Send>(jobs: Vec<J>, work: usize, f: impl Fn(J) + Sync + Send) {
    if work < PARALLEL || jobs.len() < 2 || rayon::current_num_threads() == 1 {
        jobs.into_iter().for_each(f);
    } else {
        jobs.into_par_iter().for_each(f);
    }
}

/// A vector of `len` elements, all of which f writes.
///
/// # Safety
/// f initialises every element of the slice it gets.
unsafe fn vector(len: usize, f: impl FnOnce(&mut [MaybeUninit<f32>])) -> Vec<f32> {
    let mut values = Vec::with_capacity(len);
    f(&mut values.spare_capacity_mut()[..len]);
    // SAFETY: the capacity is at least `len`, and f has initialised so many elements.
    unsafe { values.set_len(len) };
    values
}

/// The tensor, or a copy, with its elements in order.
fn contiguous(x: FlexTensor) -> FlexTensor {
    if x.is_contiguous() { x } else { x.to_contiguous() }
}

fn values(x: &FlexTensor) -> &[f32] {
    x.as_slice().expect("contiguous float32, by `contiguous` and `fused`")
}

/// The elements in order, for writing: the tensor's own where nothing else holds them, else a copy.
fn update(x: FlexTensor, f: impl FnOnce(&mut [f32])) -> FlexTensor {
    let len = x.layout().num_elements();
    let mut x = if x.layout().contiguous_offsets() == Some((0, len)) { x } else { x.to_contiguous() };
    f(&mut x.storage_mut()[..len]);
    x
}

fn tensor(values: Vec<f32>, shape: impl Into<Shape>) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, shape.into()))
}

fn dims<const D: usize>(x: &FlexTensor) -> [usize; D] {
    std::array::from_fn(|i| x.layout().shape()[i])
}

/// Where a matrix lies, with the strides from a row to the next and from a column to the next.
#[derive(Clone, Copy)]
struct Matrix {
    first: *mut f32,
    rows: isize,
    columns: isize,
}

// SAFETY: a `Matrix` is an address. What follows it is unsafe.
unsafe impl Send for Matrix {}
// SAFETY: as above.
unsafe impl Sync for Matrix {}

impl Matrix {
    /// A tensor of two dimensions, for reading.
    fn of(x: &FlexTensor) -> Self {
        let strides = x.layout().strides();
        let first = x.storage::<f32>()[x.layout().start_offset()..].as_ptr().cast_mut();
        Self { first, rows: strides[0], columns: strides[1] }
    }

    fn transposed(self) -> Self {
        Self { first: self.first, rows: self.columns, columns: self.rows }
    }
}

/// out [m, n] = scale * a [m, k] b [k, n].
///
/// # Safety
/// The matrices have these sizes; a and b are initialised and nothing writes them meanwhile; nothing
/// else touches out.
unsafe fn multiply([m, n, k]: [usize; 3], out: Matrix, a: Matrix, b: Matrix, scale: f32) {
    // SAFETY: the caller's word. Where gemm does not read out, it need not be initialised.
    unsafe { call_gemm([m, n, k], out, a, b, scale, false, false) };
}

/// out [m, n] = a [m, k] b [k, n], or out += that where `add`.
///
/// # Safety
/// As for [`multiply`]; where `add`, out is initialised.
unsafe fn multiply_add(sizes: [usize; 3], out: Matrix, a: Matrix, b: Matrix, add: bool, parallel: bool) {
    // SAFETY: the caller's word.
    unsafe { call_gemm(sizes, out, a, b, 1.0, add, parallel) };
}

unsafe fn call_gemm(
    [m, n, k]: [usize; 3],
    out: Matrix,
    a: Matrix,
    b: Matrix,
    scale: f32,
    add: bool,
    parallel: bool,
) {
    let parallel = parallel && rayon::current_num_threads() > 1;
    let parallelism = if parallel { gemm::Parallelism::Rayon(0) } else { gemm::Parallelism::None };
    // SAFETY: the word of the callers' callers.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.first,
            out.columns,
            out.rows,
            add,
            a.first,
            a.columns,
            a.rows,
            b.first,
            b.columns,
            b.rows,
            1.0,
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// a [m, k] b [k, n] as a new vector.
///
/// # Safety
/// The matrices have these sizes and are initialised.
unsafe fn product([m, n, k]: [usize; 3], a: Matrix, b: Matrix) -> Vec<f32> {
    // The same bound as burn-flex's.
    let parallel = m * n * k >= 192 * 192 * 192;
    // SAFETY: the product writes every element; the rest is the caller's word.
    unsafe {
        vector(m * n, |out| {
            let out = Matrix { first: out.as_mut_ptr().cast(), rows: n as isize, columns: 1 };
            multiply_add([m, n, k], out, a, b, false, parallel);
        })
    }
}

/// y of the same shape as x, piece by piece.
///
/// # Safety
/// f initialises every element of its second argument.
unsafe fn map(
    x: FlexTensor,
    piece: usize,
    f: impl Fn(&[f32], &mut [MaybeUninit<f32>]) + Sync + Send,
) -> FlexTensor {
    let x = contiguous(x);
    let source = values(&x);
    // SAFETY: the pieces cover the slice, and f initialises each.
    let y = unsafe {
        vector(source.len(), |y| {
            let jobs = source.chunks(piece).zip(y.chunks_mut(piece)).collect();
            each(jobs, source.len(), |(x, y)| f(x, y));
        })
    };
    tensor(y, x.layout().shape().clone())
}

/// Shows the elements of a tensor, in order.
pub(super) fn show(x: FlexTensor, f: impl FnOnce(&[f32])) {
    let x = contiguous(x);
    f(values(&x));
}

impl SitOps for Flex {
    fn gelu_tanh(x: FlexTensor) -> FlexTensor {
        // SAFETY: the kernel writes every element.
        unsafe { map(x, PIECE, |x, y| simd::run(elementwise::Gelu { x, y })) }
    }

    fn swish(x: FlexTensor) -> FlexTensor {
        // SAFETY: the kernel writes every element.
        unsafe { map(x, PIECE, |x, y| simd::run(elementwise::Swish { x, y })) }
    }

    fn normalise(x: FlexTensor, epsilon: f32) -> FlexTensor {
        let width = *x.layout().shape().last().expect("at least one dimension");
        // SAFETY: the kernel writes every row, and pieces are whole rows.
        unsafe { map(x, ROWS * width, |x, y| simd::run(norm::Normalise { x, y, width, epsilon })) }
    }

    fn modulate(
        x: FlexTensor,
        gain: FlexTensor,
        shift: FlexTensor,
        unit: f32,
        epsilon: f32,
        dtype: DType,
    ) -> FlexTensor {
        assert_eq!(dtype, DType::F32, "the CPU's kernels write float32");
        let [samples, tokens, width] = dims(&x);
        let [x, gain, shift] = [x, gain, shift].map(contiguous);
        let (source, gain, shift) = (values(&x), values(&gain), values(&shift));
        // SAFETY: the kernel writes every row, and pieces are whole rows.
        let y = unsafe {
            vector(source.len(), |y| {
                let sample = tokens * width;
                let piece = ROWS * width;
                let jobs = (source.chunks(sample).zip(y.chunks_mut(sample)))
                    .zip(gain.chunks(width).zip(shift.chunks(width)))
                    .flat_map(|((x, y), (gain, shift))| {
                        x.chunks(piece).zip(y.chunks_mut(piece)).map(move |(x, y)| (x, y, gain, shift))
                    })
                    .collect();
                each(jobs, source.len(), |(x, y, gain, shift)| {
                    simd::run(norm::Modulate { x, gain, shift, y, unit, epsilon });
                });
            })
        };
        tensor(y, [samples, tokens, width])
    }

    fn gated_add(x: FlexTensor, y: FlexTensor, gate: FlexTensor) -> FlexTensor {
        let [samples, tokens, width] = dims(&x);
        let [x, y, gate] = [x, y, gate].map(contiguous);
        let (x, y, gate) = (values(&x), values(&y), values(&gate));
        // SAFETY: the kernel writes every row, and pieces are whole rows.
        let out = unsafe {
            vector(x.len(), |out| {
                let sample = tokens * width;
                let piece = ROWS * width;
                let jobs = (x.chunks(sample).zip(y.chunks(sample)))
                    .zip(out.chunks_mut(sample).zip(gate.chunks(width)))
                    .flat_map(|((x, y), (out, gate))| {
                        (x.chunks(piece).zip(y.chunks(piece)).zip(out.chunks_mut(piece)))
                            .map(move |((x, y), out)| elementwise::GatedAdd { x, y, gate, out })
                    })
                    .collect();
                each(jobs, x.len(), simd::run);
            })
        };
        tensor(out, [samples, tokens, width])
    }

    fn unpacked_attention(q: FlexTensor, k: FlexTensor, v: FlexTensor) -> FlexTensor {
        unpacked(q, k, v, None)
    }

    fn packed_attention(qkv: FlexTensor, heads: usize) -> FlexTensor {
        packed(qkv, heads, None)
    }
}

impl LinearOps for Flex {
    fn project(x: FlexTensor, weight: FlexTensor) -> FlexTensor {
        let ([rows, inputs], [outputs, _]) = (dims(&x), dims::<2>(&weight));
        // SAFETY: the sizes are the tensors'.
        let y = unsafe { product([rows, outputs, inputs], Matrix::of(&x), Matrix::of(&weight).transposed()) };
        tensor(y, [rows, outputs])
    }

    fn affine(x: FlexTensor, weight: FlexTensor, bias: FlexTensor) -> FlexTensor {
        let bias = contiguous(bias);
        let bias = values(&bias);
        update(Self::project(x, weight), |y| {
            let work = y.len();
            each(y.chunks_mut(ROWS * bias.len()).collect(), work, |rows| {
                simd::run(elementwise::AddBias { bias, rows });
            });
        })
    }
}

impl ConvolutionOps for Flex {
    fn convolve(x: FlexTensor, weight: FlexTensor, bias: FlexTensor) -> FlexTensor {
        let sizes = convolution_sizes(&x, &weight);
        let convolution::Sizes { samples, inputs, outputs, height, width } = sizes;
        let [x, weight, bias] = [x, weight, bias].map(contiguous);
        let weights = values(&weight);
        let tap = |k: usize| Matrix {
            first: weights[k..].as_ptr().cast_mut(),
            rows: 9,
            columns: 9 * inputs as isize,
        };
        // SAFETY: the taps are the weight's, and `correlate` writes every element.
        let y = unsafe {
            vector(samples * outputs * height * width, |y| {
                convolution::correlate(sizes, values(&x), tap, Some(values(&bias)), y);
            })
        };
        tensor(y, [samples, outputs, height, width])
    }
}

/// The convolution of images x by a weight [outputs, inputs, 3, 3].
fn convolution_sizes(x: &FlexTensor, weight: &FlexTensor) -> convolution::Sizes {
    let ([samples, inputs, height, width], [outputs, ..]) = (dims(x), dims::<4>(weight));
    convolution::Sizes { samples, inputs, outputs, height, width }
}
