//! Kernels in CubeCL for what burn's fusion leaves in many pieces: rows that are normalised or become probabilities, sums
//! over a sample's tokens, and copies between layouts.
//!
//! Rows: [`LANES`] units go along one, in vectors. Columns: [`LANES`] vectors next to one another and [`ROWS`] units for
//! each, which share its rows among them. All sums are in float32 and in one order, so that two runs give the same bits.

use burn_cubecl::cubecl;
use burn_cubecl::cubecl::prelude::*;

/// Units of a row; those of NVIDIA's warps, so that a row needs no barrier there.
pub(super) const LANES: u32 = 32;
/// Rows of a cube.
pub(super) const ROWS: u32 = 8;

/// How tensors fall into rows of vectors, and those into groups that share their gain.
#[derive(CubeLaunch, CubeType)]
pub(super) struct Sizes {
    rows: usize,
    group: usize,
    vectors: usize,
    /// From a row to the next, of each input in the kernel's order; outputs have no gaps.
    step_a: usize,
    step_b: usize,
    step_c: usize,
}

/// Lets the units of a row know the sum, or the largest, of what each has. All of the cube have to call this together.
#[cube]
fn along_row(value: f32, #[comptime] largest: bool, #[comptime] planes: bool) -> f32 {
    if comptime!(planes) {
        // A loop before may have taken some lanes once more than others, and CUDA promises by nothing else that they
        // meet again: what is summed is what those lanes have that are there.
        sync_plane();
        if comptime!(largest) { plane_max(value) } else { plane_sum(value) }
    } else {
        let mut memory = Shared::<[f32]>::new_slice(comptime!((LANES * ROWS) as usize));
        let row = (UNIT_POS_Y * LANES) as usize;
        // Until all have read what was there before.
        sync_cube();
        memory[row + UNIT_POS_X as usize] = value;
        sync_cube();
        let mut all = memory[row];
        for lane in 1..LANES as usize {
            if comptime!(largest) {
                all = max(all, memory[row + lane]);
            } else {
                all += memory[row + lane];
            }
        }
        all
    }
}

/// A row's mean, and the inverse of its standard deviation.
#[cube]
fn moments<X: Float, N: Size>(
    x: &[Vector<X, N>],
    start: usize,
    vectors: usize,
    epsilon: f32,
    #[comptime] planes: bool,
) -> (f32, f32) {
    let count = f32::cast_from(vectors * N::value());
    let mut sum = Vector::<f32, N>::new(0.0f32);
    for i in range_stepped(UNIT_POS_X as usize, vectors, LANES as usize) {
        sum += Vector::cast_from(x[start + i]);
    }
    let mean = along_row(sum.vector_sum(), false, planes) / count;
    let mut squares = Vector::<f32, N>::new(0.0f32);
    for i in range_stepped(UNIT_POS_X as usize, vectors, LANES as usize) {
        let centred = Vector::<f32, N>::cast_from(x[start + i]) - Vector::new(mean);
        squares += centred * centred;
    }
    let variance = along_row(squares.vector_sum(), false, planes) / count;
    (mean, 1.0f32 / f32::sqrt(variance + epsilon))
}

/// The row of this unit, or the last one for units that have none, which go along for the barriers.
#[cube]
fn row_of_unit(rows: usize) -> usize {
    min(CUBE_POS * ROWS as usize + UNIT_POS_Y as usize, rows - 1)
}

/// See [`super::super::SitOps::modulate`]: inputs `x`, `gain`, `shift`.
#[cube(launch_unchecked)]
pub(super) fn modulate_rows<X: Float, W: Float, O: Float, N: Size>(
    x: &[Vector<X, N>],
    gain: &[Vector<W, N>],
    shift: &[Vector<W, N>],
    out: &mut [Vector<O, N>],
    sizes: &Sizes,
    unit: f32,
    epsilon: f32,
    #[comptime] planes: bool,
    #[define(X, W, O)] _types: [ElemType; 3],
) {
    let vectors = sizes.vectors;
    let row = row_of_unit(sizes.rows);
    let of_group = row / sizes.group;
    let (x_start, out_start) = (row * sizes.step_a, row * vectors);
    let (gain_start, shift_start) = (of_group * sizes.step_b, of_group * sizes.step_c);
    let (mean, inverse) = moments(x, x_start, vectors, epsilon, planes);
    for i in range_stepped(UNIT_POS_X as usize, vectors, LANES as usize) {
        let y = (Vector::<f32, N>::cast_from(x[x_start + i]) - Vector::new(mean)) * Vector::new(inverse);
        let gain = Vector::<f32, N>::cast_from(gain[gain_start + i]) + Vector::new(unit);
        out[out_start + i] = Vector::cast_from(y * gain + Vector::cast_from(shift[shift_start + i]));
    }
}

/// The gradient of [`modulate_rows`] by x, and for [`modulate_columns`] each row's mean and inverse deviation. Inputs `x`,
/// `gain`, `grad`.
#[cube(launch_unchecked)]
pub(super) fn modulate_rows_backward<X: Float, W: Float, G: Float, N: Size>(
    x: &[Vector<X, N>],
    gain: &[Vector<W, N>],
    grad: &[Vector<G, N>],
    by_x: &mut [Vector<X, N>],
    means: &mut [f32],
    inverses: &mut [f32],
    sizes: &Sizes,
    unit: f32,
    epsilon: f32,
    #[comptime] planes: bool,
    #[define(X, W, G)] _types: [ElemType; 3],
) {
    let vectors = sizes.vectors;
    let row = row_of_unit(sizes.rows);
    let (x_start, gain_start) = (row * sizes.step_a, row / sizes.group * sizes.step_b);
    let (grad_start, out_start) = (row * sizes.step_c, row * vectors);
    let (mean, inverse) = moments(x, x_start, vectors, epsilon, planes);
    let mut sum = Vector::<f32, N>::new(0.0f32);
    let mut along = Vector::<f32, N>::new(0.0f32);
    for i in range_stepped(UNIT_POS_X as usize, vectors, LANES as usize) {
        let y = (Vector::<f32, N>::cast_from(x[x_start + i]) - Vector::new(mean)) * Vector::new(inverse);
        let gain = Vector::<f32, N>::cast_from(gain[gain_start + i]) + Vector::new(unit);
        let by_y = Vector::<f32, N>::cast_from(grad[grad_start + i]) * gain;
        sum += by_y;
        along += by_y * y;
    }
    let count = f32::cast_from(vectors * N::value());
    let sum = along_row(sum.vector_sum(), false, planes) / count;
    let along = along_row(along.vector_sum(), false, planes) / count;
    for i in range_stepped(UNIT_POS_X as usize, vectors, LANES as usize) {
        let y = (Vector::<f32, N>::cast_from(x[x_start + i]) - Vector::new(mean)) * Vector::new(inverse);
        let gain = Vector::<f32, N>::cast_from(gain[gain_start + i]) + Vector::new(unit);
        let by_y = Vector::<f32, N>::cast_from(grad[grad_start + i]) * gain;
        let by_x_here = (by_y - Vector::new(sum) - y * Vector::new(along)) * Vector::new(inverse);
        by_x[out_start + i] = Vector::cast_from(by_x_here);
    }
    if UNIT_POS_X == 0 {
        means[row] = mean;
        inverses[row] = inverse;
    }
}

/// Adds up what the units of a column have. The result is the first one's.
#[cube]
fn along_column<N: Size>(value: Vector<f32, N>) -> Vector<f32, N> {
    let mut memory = Shared::<[Vector<f32, N>]>::new_slice(comptime!((LANES * ROWS) as usize));
    memory[UNIT_POS as usize] = value;
    sync_cube();
    let mut sum = memory[UNIT_POS_X as usize];
    for row in 1..ROWS as usize {
        sum += memory[row * LANES as usize + UNIT_POS_X as usize];
    }
    sum
}

/// The gradients of [`modulate_rows`] by gain and shift, summed over each `part` rows of a group: [groups, parts, vectors].
/// Inputs `x`, `grad`.
#[cube(launch_unchecked)]
pub(super) fn modulate_columns<X: Float, G: Float, O: Float, N: Size>(
    x: &[Vector<X, N>],
    grad: &[Vector<G, N>],
    means: &[f32],
    inverses: &[f32],
    by_gain: &mut [Vector<O, N>],
    by_shift: &mut [Vector<O, N>],
    sizes: &Sizes,
    part: usize,
    #[define(X, G, O)] _types: [ElemType; 3],
) {
    let column = (CUBE_POS_X * LANES + UNIT_POS_X) as usize;
    let first = CUBE_POS_Y as usize * part;
    let mut gain = Vector::<f32, N>::new(0.0f32);
    let mut shift = Vector::<f32, N>::new(0.0f32);
    if column < sizes.vectors {
        for i in range_stepped(first + UNIT_POS_Y as usize, min(first + part, sizes.group), ROWS as usize) {
            let row = CUBE_POS_Z as usize * sizes.group + i;
            let centred =
                Vector::<f32, N>::cast_from(x[row * sizes.step_a + column]) - Vector::new(means[row]);
            let grad = Vector::<f32, N>::cast_from(grad[row * sizes.step_b + column]);
            gain += grad * centred * Vector::new(inverses[row]);
            shift += grad;
        }
    }
    let gain = along_column(gain);
    let shift = along_column(shift);
    if UNIT_POS_Y == 0 && column < sizes.vectors {
        let at = (CUBE_POS_Z * CUBE_COUNT_Y + CUBE_POS_Y) as usize * sizes.vectors + column;
        by_gain[at] = Vector::cast_from(gain);
        by_shift[at] = Vector::cast_from(shift);
    }
}

/// The gradients of x + y gate: by y, and by gate in sums over each `part` rows of a group. Inputs `y`, `gate`, `grad`.
#[cube(launch_unchecked)]
pub(super) fn gated_columns<Y: Float, W: Float, G: Float, N: Size>(
    y: &[Vector<Y, N>],
    gate: &[Vector<W, N>],
    grad: &[Vector<G, N>],
    by_y: &mut [Vector<Y, N>],
    by_gate: &mut [Vector<W, N>],
    sizes: &Sizes,
    part: usize,
    #[define(Y, W, G)] _types: [ElemType; 3],
) {
    let column = (CUBE_POS_X * LANES + UNIT_POS_X) as usize;
    let first = CUBE_POS_Y as usize * part;
    let mut sum = Vector::<f32, N>::new(0.0f32);
    if column < sizes.vectors {
        let gate = Vector::<f32, N>::cast_from(gate[CUBE_POS_Z as usize * sizes.step_b + column]);
        for i in range_stepped(first + UNIT_POS_Y as usize, min(first + part, sizes.group), ROWS as usize) {
            let row = CUBE_POS_Z as usize * sizes.group + i;
            let grad = Vector::<f32, N>::cast_from(grad[row * sizes.step_c + column]);
            sum += grad * Vector::cast_from(y[row * sizes.step_a + column]);
            by_y[row * sizes.vectors + column] = Vector::cast_from(grad * gate);
        }
    }
    let sum = along_column(sum);
    if UNIT_POS_Y == 0 && column < sizes.vectors {
        let at = (CUBE_POS_Z * CUBE_COUNT_Y + CUBE_POS_Y) as usize * sizes.vectors + column;
        by_gate[at] = Vector::cast_from(sum);
    }
}

/// Sums over each `part` rows of a group: [groups, parts, vectors]. Input `x`.
#[cube(launch_unchecked)]
pub(super) fn sum_columns<X: Float, O: Float, N: Size>(
    x: &[Vector<X, N>],
    sums: &mut [Vector<O, N>],
    sizes: &Sizes,
    part: usize,
    #[define(X, O)] _types: [ElemType; 2],
) {
    let column = (CUBE_POS_X * LANES + UNIT_POS_X) as usize;
    let first = CUBE_POS_Y as usize * part;
    let mut sum = Vector::<f32, N>::new(0.0f32);
    if column < sizes.vectors {
        for i in range_stepped(first + UNIT_POS_Y as usize, min(first + part, sizes.group), ROWS as usize) {
            let row = CUBE_POS_Z as usize * sizes.group + i;
            sum += Vector::cast_from(x[row * sizes.step_a + column]);
        }
    }
    let sum = along_column(sum);
    if UNIT_POS_Y == 0 && column < sizes.vectors {
        let at = (CUBE_POS_Z * CUBE_COUNT_Y + CUBE_POS_Y) as usize * sizes.vectors + column;
        sums[at] = Vector::cast_from(sum);
    }
}

/// softmax(scale scores) of each row. Input `scores`.
#[cube(launch_unchecked)]
pub(super) fn softmax_rows<S: Float, N: Size>(
    scores: &[Vector<S, N>],
    out: &mut [Vector<S, N>],
    sizes: &Sizes,
    scale: f32,
    #[comptime] planes: bool,
    #[define(S)] _type: ElemType,
) {
    let row = row_of_unit(sizes.rows);
    let (start, out_start) = (row * sizes.step_a, row * sizes.vectors);
    let mut largest = f32::min_value();
    for i in range_stepped(UNIT_POS_X as usize, sizes.vectors, LANES as usize) {
        let scores = Vector::<f32, N>::cast_from(scores[start + i]);
        #[unroll]
        for k in 0..N::value() {
            largest = max(largest, scores.extract(k));
        }
    }
    let largest = along_row(largest, true, planes);
    let mut sum = Vector::<f32, N>::new(0.0f32);
    for i in range_stepped(UNIT_POS_X as usize, sizes.vectors, LANES as usize) {
        let below = Vector::<f32, N>::cast_from(scores[start + i]) - Vector::new(largest);
        sum += Vector::exp(below * Vector::new(scale));
    }
    let inverse = 1.0f32 / along_row(sum.vector_sum(), false, planes);
    for i in range_stepped(UNIT_POS_X as usize, sizes.vectors, LANES as usize) {
        let below = Vector::<f32, N>::cast_from(scores[start + i]) - Vector::new(largest);
        out[out_start + i] =
            Vector::cast_from(Vector::exp(below * Vector::new(scale)) * Vector::new(inverse));
    }
}

/// The gradient of [`softmax_rows`] by the scores, given its result and the gradient by that. Inputs `probabilities`,
/// `grad`.
#[cube(launch_unchecked)]
pub(super) fn softmax_rows_backward<S: Float, N: Size>(
    probabilities: &[Vector<S, N>],
    grad: &[Vector<S, N>],
    out: &mut [Vector<S, N>],
    sizes: &Sizes,
    scale: f32,
    #[comptime] planes: bool,
    #[define(S)] _type: ElemType,
) {
    let row = row_of_unit(sizes.rows);
    let (start, grad_start) = (row * sizes.step_a, row * sizes.step_b);
    let out_start = row * sizes.vectors;
    let mut along = Vector::<f32, N>::new(0.0f32);
    for i in range_stepped(UNIT_POS_X as usize, sizes.vectors, LANES as usize) {
        let p = Vector::<f32, N>::cast_from(probabilities[start + i]);
        along += p * Vector::cast_from(grad[grad_start + i]);
    }
    let along = along_row(along.vector_sum(), false, planes);
    for i in range_stepped(UNIT_POS_X as usize, sizes.vectors, LANES as usize) {
        let p = Vector::<f32, N>::cast_from(probabilities[start + i]);
        let by_p = Vector::<f32, N>::cast_from(grad[grad_start + i]) - Vector::new(along);
        out[out_start + i] = Vector::cast_from(p * by_p * Vector::new(scale));
    }
}

/// The sum of squares of every cube's share of `vectors`, which the whole of the grid goes over together.
#[cube(launch_unchecked)]
pub(super) fn squares<X: Float, N: Size>(
    x: &[Vector<X, N>],
    sums: &mut [f32],
    vectors: usize,
    #[comptime] planes: bool,
    #[define(X)] _type: ElemType,
) {
    let mut sum = Vector::<f32, N>::new(0.0f32);
    for i in range_stepped(ABSOLUTE_POS, vectors, CUBE_COUNT * CUBE_DIM as usize) {
        let x = Vector::<f32, N>::cast_from(x[i]);
        sum += x * x;
    }
    let of_row = along_row(sum.vector_sum(), false, planes);
    let sum = along_column(Vector::<f32, Const<1>>::new(of_row));
    if UNIT_POS == 0 {
        sums[CUBE_POS] = sum.extract(0usize);
    }
}

/// Where heads are in rows of `parts` x `heads` x `vectors`, and in matrices [samples x heads, tokens, vectors].
#[derive(CubeLaunch, CubeType)]
pub(super) struct HeadSizes {
    count: usize,
    tokens: usize,
    heads: usize,
    vectors: usize,
    part: usize,
    /// From a row to the next.
    step: usize,
}

/// Where in the rows the element is that a matrix has at `at`.
#[cube]
fn in_rows(at: usize, sizes: &HeadSizes) -> usize {
    let matrix = at / sizes.vectors / sizes.tokens;
    let token = at / sizes.vectors % sizes.tokens;
    let row = matrix / sizes.heads * sizes.tokens + token;
    let head = sizes.part * sizes.heads + matrix % sizes.heads;
    row * sizes.step + head * sizes.vectors + at % sizes.vectors
}

/// One part of the rows as matrices.
#[cube(launch_unchecked)]
pub(super) fn split_heads<E: Float, N: Size>(
    rows: &[Vector<E, N>],
    matrices: &mut [Vector<E, N>],
    sizes: &HeadSizes,
    #[define(E)] _type: ElemType,
) {
    if ABSOLUTE_POS < sizes.count {
        matrices[ABSOLUTE_POS] = rows[in_rows(ABSOLUTE_POS, sizes)];
    }
}

/// Matrices as one part of the rows.
#[cube(launch_unchecked)]
pub(super) fn merge_heads<E: Float, N: Size>(
    matrices: &[Vector<E, N>],
    rows: &mut [Vector<E, N>],
    sizes: &HeadSizes,
    #[define(E)] _type: ElemType,
) {
    if ABSOLUTE_POS < sizes.count {
        rows[in_rows(ABSOLUTE_POS, sizes)] = matrices[ABSOLUTE_POS];
    }
}

/// A vector as `count` vectors of another type from `offset` on in a longer one.
#[cube(launch_unchecked)]
pub(super) fn place<I: Float, O: Float, N: Size>(
    input: &[Vector<I, N>],
    out: &mut [Vector<O, N>],
    offset: usize,
    count: usize,
    #[define(I, O)] _types: [ElemType; 2],
) {
    if ABSOLUTE_POS < count {
        out[offset + ABSOLUTE_POS] = Vector::cast_from(input[ABSOLUTE_POS]);
    }
}
