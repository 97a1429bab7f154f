//! [`kernels`] as operations in burn's queue.

use burn::backend::cubecl::dtype_to_elem_type;
use burn::backend::fusion::custom::TensorSpec;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Shape, TensorMetadata, backend_extension};
use burn::tensor::DType;
use burn_cubecl::CubeBackend;
use burn_cubecl::cubecl::calculate_cube_count_elemwise;
use burn_cubecl::cubecl::client::Client;
use burn_cubecl::cubecl::features::Plane;
use burn_cubecl::cubecl::ir::ElemType;
use burn_cubecl::cubecl::prelude::{CubeCount, CubeDim};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;

use super::kernels::{self, LANES, ROWS, SizesLaunch};

/// Most rows whose columns one cube adds up, of a sample.
const PART: usize = 256;
/// Elements that are worth a cube for their squares, and the most cubes for that.
const SQUARES: usize = 8192;
const MOST_SQUARES: usize = 512;

/// Rows are all dimensions but the last one; those of one sample, of `gain.shape()[0]`, follow one another.
#[backend_extension(Cube, Fusion)]
pub(super) trait Kernels: Backend {
    /// See [`super::SitOps::modulate`].
    #[fusion(dtype = *dtype, shape = x)]
    fn modulated(
        x: FloatTensor<Self>,
        gain: FloatTensor<Self>,
        shift: FloatTensor<Self>,
        unit: f32,
        epsilon: f32,
        dtype: DType,
    ) -> FloatTensor<Self>;

    /// By x; by gain and by shift in parts, [groups, parts, width] each, to be added up.
    #[fusion(meta = modulated_backward)]
    fn modulated_backward(
        x: FloatTensor<Self>,
        gain: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        unit: f32,
        epsilon: f32,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);

    /// Of [`super::SitOps::gated_add`] by y; by gate in parts, [groups, parts, width].
    #[fusion(meta = gated_backward)]
    fn gated_backward(
        y: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// The sums over the rows of each group of [groups, rows, width], in x's type: [groups, 1, width]. (burn's reduction,
    /// not tuned, gives a unit all rows of its columns.)
    #[fusion(dtype = x, shape = column_sums(x))]
    fn sums(x: FloatTensor<Self>) -> FloatTensor<Self>;

    /// softmax(scale scores) over the last dimension.
    #[fusion(dtype = scores, shape = scores)]
    fn probabilities(scores: FloatTensor<Self>, scale: f32) -> FloatTensor<Self>;

    /// The sum of squares of a vector, in parts.
    #[fusion(meta = |x: &TensorSpec| TensorSpec::new(Shape::new([square_parts(&x.shape)]), DType::F32))]
    fn squares(x: FloatTensor<Self>) -> FloatTensor<Self>;

    /// By the scores.
    #[fusion(dtype = grad, shape = grad)]
    fn probabilities_backward(
        probabilities: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        scale: f32,
    ) -> FloatTensor<Self>;
}

fn modulated_backward(
    x: &TensorSpec,
    gain: &TensorSpec,
    _grad: &TensorSpec,
    _unit: &f32,
    _epsilon: &f32,
) -> (TensorSpec, TensorSpec, TensorSpec) {
    let parts = TensorSpec::new(parts(&x.shape, &gain.shape), gain.dtype);
    (x.clone(), parts.clone(), parts)
}

fn gated_backward(y: &TensorSpec, gate: &TensorSpec, _grad: &TensorSpec) -> (TensorSpec, TensorSpec) {
    (y.clone(), TensorSpec::new(parts(&y.shape, &gate.shape), gate.dtype))
}

fn column_sums(x: &Shape) -> Shape {
    Shape::new([x[0], 1, x[2]])
}

/// Into how many parts a sum of squares falls: by the vector's length alone, so that it has the same bits each time.
fn square_parts(x: &Shape) -> usize {
    x.num_elements().div_ceil(SQUARES).clamp(1, MOST_SQUARES)
}

/// The shape of sums over parts of each group's rows.
fn parts(x: &Shape, gain: &Shape) -> Shape {
    let sizes = Sizes::new(x, gain);
    Shape::new([sizes.groups, sizes.group.div_ceil(PART), sizes.width])
}

/// How a tensor falls into rows, and those into groups.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    rows: usize,
    width: usize,
    groups: usize,
    /// Rows of a group.
    group: usize,
}

impl Sizes {
    fn new(x: &Shape, gain: &Shape) -> Self {
        let width = *x.last().expect("rows have a dimension");
        let rows = x.num_elements() / width.max(1);
        let groups = gain[0];
        Self { rows, width, groups, group: rows / groups.max(1) }
    }

    fn is_empty(&self) -> bool {
        self.rows * self.width == 0
    }

    /// What a unit reads at once: up to 16 bytes of float32.
    fn vector(&self) -> usize {
        vector(self.width, DType::F32)
    }

    fn row_cubes(&self, client: &Client) -> CubeCount {
        calculate_cube_count_elemwise(client, self.rows * LANES as usize, cube())
    }

    /// For sums of so many parts of a group's rows.
    fn column_cubes(&self, parts: usize) -> CubeCount {
        let across = (self.width / self.vector()).div_ceil(LANES as usize);
        CubeCount::Static(across as u32, parts as u32, self.groups as u32)
    }

    /// With the inputs' steps, which [`Sizes::rows_of`] gives.
    fn with_steps<const N: usize>(&self, steps: [usize; N]) -> SizesLaunch {
        let step = |i: usize| steps.get(i).map_or(0, |step| step / self.vector());
        SizesLaunch::new(self.rows, self.group, self.width / self.vector(), step(0), step(1), step(2))
    }

    fn rows_of(&self, x: CubeTensor) -> (CubeTensor, usize) {
        rows_in_vectors(x, self.vector())
    }
}

/// A tensor whose rows lie at one distance, whole vectors of `n` elements apart, and that in elements; a copy where they
/// do not.
pub(super) fn rows_in_vectors(x: CubeTensor, n: usize) -> (CubeTensor, usize) {
    match row_step(x.meta.shape(), x.meta.strides()) {
        Some(step) if step.is_multiple_of(n) => (x, step),
        _ => {
            let x = into_contiguous(x);
            let width = *x.meta.shape().last().expect("rows have a dimension");
            (x, width)
        }
    }
}

/// The longest vector of up to 16 bytes that a width is a whole number of.
pub(super) fn vector(width: usize, dtype: DType) -> usize {
    let most = 16 / dtype.size();
    [8, 4, 2].into_iter().find(|&n| n <= most && width.is_multiple_of(n)).unwrap_or(1)
}

/// The distance of the rows in memory, where they follow one another at one.
fn row_step(shape: &[usize], strides: &[usize]) -> Option<usize> {
    let last = shape.len() - 1;
    let mut step = None;
    let mut expected = 0;
    for i in (0..last).rev().filter(|&i| shape[i] > 1) {
        if step.is_some() && strides[i] != expected {
            return None;
        }
        step.get_or_insert(strides[i]);
        expected = strides[i] * shape[i];
    }
    let step = step.unwrap_or(shape[last]);
    (strides[last] == 1 && step >= shape[last]).then_some(step)
}

fn cube() -> CubeDim {
    CubeDim::new_2d(LANES, ROWS)
}

/// Memory without gaps.
pub(super) fn like(x: &CubeTensor, shape: Shape, dtype: DType) -> CubeTensor {
    empty_device_contiguous_dtype(x.client.clone(), x.device.clone(), shape, dtype)
}

pub(super) fn element(x: &CubeTensor) -> ElemType {
    dtype_to_elem_type(x.dtype)
}

/// Whether a row's units are a plane, whose units know of one another without a barrier.
fn planes(x: &CubeTensor) -> bool {
    let properties = x.client.properties();
    let hardware = &properties.hardware;
    properties.features.plane.contains(Plane::Ops)
        && hardware.plane_size_min == LANES
        && hardware.plane_size_max == LANES
}

/// Sums over each of so many parts of a group's rows, [groups, parts, width].
fn sums_of_parts(x: CubeTensor, groups: usize, parts: usize, dtype: DType) -> CubeTensor {
    let sizes = Sizes::new(&x.shape(), &Shape::new([groups]));
    let out = like(&x, Shape::new([groups, parts, sizes.width]), dtype);
    if sizes.width * groups == 0 {
        return out;
    }
    let (x, step) = sizes.rows_of(x);
    let part = sizes.group.div_ceil(parts);
    let (client, types) = (x.client.clone(), [element(&x), element(&out)]);
    // SAFETY: both are as large as `sizes` says, at those distances.
    unsafe {
        kernels::sum_columns::launch_unchecked(
            &client,
            sizes.column_cubes(parts),
            cube(),
            sizes.vector(),
            x.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            sizes.with_steps([step]),
            part,
            types,
        );
    }
    out
}

impl Kernels for CubeBackend {
    fn modulated(
        x: CubeTensor,
        gain: CubeTensor,
        shift: CubeTensor,
        unit: f32,
        epsilon: f32,
        dtype: DType,
    ) -> CubeTensor {
        let sizes = Sizes::new(&x.shape(), &gain.shape());
        let out = like(&x, x.shape(), dtype);
        if sizes.is_empty() {
            return out;
        }
        let [(x, of_x), (gain, of_gain), (shift, of_shift)] = [x, gain, shift].map(|x| sizes.rows_of(x));
        let (client, planes) = (x.client.clone(), planes(&x));
        let types = [element(&x), element(&gain), element(&out)];
        // SAFETY: all are as large as `sizes` says, at those distances.
        unsafe {
            kernels::modulate_rows::launch_unchecked(
                &client,
                sizes.row_cubes(&client),
                cube(),
                sizes.vector(),
                x.into_buffer_arg(),
                gain.into_buffer_arg(),
                shift.into_buffer_arg(),
                out.clone().into_buffer_arg(),
                sizes.with_steps([of_x, of_gain, of_shift]),
                unit,
                epsilon,
                planes,
                types,
            );
        }
        out
    }

    fn modulated_backward(
        x: CubeTensor,
        gain: CubeTensor,
        grad: CubeTensor,
        unit: f32,
        epsilon: f32,
    ) -> (CubeTensor, CubeTensor, CubeTensor) {
        let sizes = Sizes::new(&x.shape(), &gain.shape());
        let shape = parts(&x.shape(), &gain.shape());
        let by_x = like(&x, x.shape(), x.dtype);
        let [by_gain, by_shift] = [0; 2].map(|_| like(&x, shape.clone(), gain.dtype));
        if sizes.is_empty() {
            return (by_x, by_gain, by_shift);
        }
        let [means, inverses] = [0; 2].map(|_| like(&x, Shape::new([sizes.rows]), DType::F32));
        let [(x, of_x), (gain, of_gain), (grad, of_grad)] = [x, gain, grad].map(|x| sizes.rows_of(x));
        let (client, planes) = (x.client.clone(), planes(&x));
        let types = [element(&x), element(&gain), element(&grad)];
        // SAFETY: all are as large as `sizes` says, at those distances.
        unsafe {
            kernels::modulate_rows_backward::launch_unchecked(
                &client,
                sizes.row_cubes(&client),
                cube(),
                sizes.vector(),
                x.clone().into_buffer_arg(),
                gain.into_buffer_arg(),
                grad.clone().into_buffer_arg(),
                by_x.clone().into_buffer_arg(),
                means.clone().into_buffer_arg(),
                inverses.clone().into_buffer_arg(),
                sizes.with_steps([of_x, of_gain, of_grad]),
                unit,
                epsilon,
                planes,
                types,
            );
            kernels::modulate_columns::launch_unchecked(
                &client,
                sizes.column_cubes(sizes.group.div_ceil(PART)),
                cube(),
                sizes.vector(),
                x.into_buffer_arg(),
                grad.into_buffer_arg(),
                means.into_buffer_arg(),
                inverses.into_buffer_arg(),
                by_gain.clone().into_buffer_arg(),
                by_shift.clone().into_buffer_arg(),
                sizes.with_steps([of_x, of_grad]),
                PART,
                [types[0], types[2], types[1]],
            );
        }
        (by_x, by_gain, by_shift)
    }

    fn gated_backward(y: CubeTensor, gate: CubeTensor, grad: CubeTensor) -> (CubeTensor, CubeTensor) {
        let sizes = Sizes::new(&y.shape(), &gate.shape());
        let by_y = like(&y, y.shape(), y.dtype);
        let by_gate = like(&y, parts(&y.shape(), &gate.shape()), gate.dtype);
        if sizes.is_empty() {
            return (by_y, by_gate);
        }
        let [(y, of_y), (gate, of_gate), (grad, of_grad)] = [y, gate, grad].map(|x| sizes.rows_of(x));
        let types = [element(&y), element(&gate), element(&grad)];
        // SAFETY: all are as large as `sizes` says, at those distances.
        unsafe {
            kernels::gated_columns::launch_unchecked(
                &y.client.clone(),
                sizes.column_cubes(sizes.group.div_ceil(PART)),
                cube(),
                sizes.vector(),
                y.into_buffer_arg(),
                gate.into_buffer_arg(),
                grad.into_buffer_arg(),
                by_y.clone().into_buffer_arg(),
                by_gate.clone().into_buffer_arg(),
                sizes.with_steps([of_y, of_gate, of_grad]),
                PART,
                types,
            );
        }
        (by_y, by_gate)
    }

    fn sums(x: CubeTensor) -> CubeTensor {
        let dtype = x.dtype;
        let [groups, rows, _] = x.shape().dims();
        // Many rows in some hundreds of parts first, then those.
        let parts = if rows <= PART { 1 } else { rows.div_ceil(rows.div_ceil(PART).max(PART / 4)) };
        if parts == 1 {
            sums_of_parts(x, groups, 1, dtype)
        } else {
            sums_of_parts(sums_of_parts(x, groups, parts, DType::F32), groups, 1, dtype)
        }
    }

    fn probabilities(scores: CubeTensor, scale: f32) -> CubeTensor {
        let sizes = Sizes::new(&scores.shape(), &Shape::new([1]));
        let out = like(&scores, scores.shape(), scores.dtype);
        if sizes.is_empty() {
            return out;
        }
        let (scores, step) = sizes.rows_of(scores);
        let (client, planes, kind) = (scores.client.clone(), planes(&scores), element(&scores));
        // SAFETY: both are as large as `sizes` says, at those distances.
        unsafe {
            kernels::softmax_rows::launch_unchecked(
                &client,
                sizes.row_cubes(&client),
                cube(),
                sizes.vector(),
                scores.into_buffer_arg(),
                out.clone().into_buffer_arg(),
                sizes.with_steps([step]),
                scale,
                planes,
                kind,
            );
        }
        out
    }

    fn squares(x: CubeTensor) -> CubeTensor {
        let x = into_contiguous(x);
        let shape = x.shape();
        let out = like(&x, Shape::new([square_parts(&shape)]), DType::F32);
        let n = vector(shape.num_elements(), x.dtype);
        let (client, planes, kind) = (x.client.clone(), planes(&x), element(&x));
        // SAFETY: the vector has no gaps, and there is a sum for every cube.
        unsafe {
            kernels::squares::launch_unchecked(
                &client,
                CubeCount::Static(square_parts(&shape) as u32, 1, 1),
                cube(),
                n,
                x.into_buffer_arg(),
                out.clone().into_buffer_arg(),
                shape.num_elements() / n,
                planes,
                kind,
            );
        }
        out
    }

    fn probabilities_backward(probabilities: CubeTensor, grad: CubeTensor, scale: f32) -> CubeTensor {
        let sizes = Sizes::new(&grad.shape(), &Shape::new([1]));
        let out = like(&grad, grad.shape(), grad.dtype);
        if sizes.is_empty() {
            return out;
        }
        let [(probabilities, of_probabilities), (grad, of_grad)] =
            [probabilities, grad].map(|x| sizes.rows_of(x));
        let (client, planes, kind) = (grad.client.clone(), planes(&grad), element(&grad));
        // SAFETY: all are as large as `sizes` says, at those distances.
        unsafe {
            kernels::softmax_rows_backward::launch_unchecked(
                &client,
                sizes.row_cubes(&client),
                cube(),
                sizes.vector(),
                probabilities.into_buffer_arg(),
                grad.into_buffer_arg(),
                out.clone().into_buffer_arg(),
                sizes.with_steps([of_probabilities, of_grad]),
                scale,
                planes,
                kind,
            );
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_at_one_distance_are_read_where_they_are() {
        assert_eq!(row_step(&[4, 5, 6], &[30, 6, 1]), Some(6));
        // With gaps, as CubeCL lays out rows on NVIDIA GPUs.
        assert_eq!(row_step(&[4, 5, 6], &[40, 8, 1]), Some(8));
        // A part of each of a few wide rows.
        assert_eq!(row_step(&[4, 1, 6], &[36, 36, 1]), Some(36));
        assert_eq!(row_step(&[1, 1, 6], &[7, 9, 1]), Some(6));
        // Turned, in another order, one row many times.
        assert_eq!(row_step(&[4, 6], &[1, 4]), None);
        assert_eq!(row_step(&[4, 5, 6], &[6, 24, 1]), None);
        assert_eq!(row_step(&[4, 6], &[0, 1]), None);
    }
}
