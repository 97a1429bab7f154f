//! Products and copies whose results have no gaps in memory. CubeCL's own give rows on NVIDIA GPUs that begin at multiples
//! of up to 512 bytes, and burn copies those where they are next seen in another shape.

use burn::backend::fusion::custom::{
    CustomOpIr, HandleContainer, OperationFn, OperationIr, StreamId, TensorIr,
};
use burn::backend::fusion::{FusionBackend, FusionRuntime, FusionTensor};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Cube, Shape, TensorMetadata, backend_extension};
use burn::tensor::DType;
use burn_cubecl::CubeBackend;
use burn_cubecl::cubecl::calculate_cube_count_elemwise;
use burn_cubecl::cubecl::prelude::CubeDim;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::kernel::matmul::{MatmulStrategy, matmul};
use burn_cubecl::tensor::CubeTensor;

use super::kernels::{self, HeadSizesLaunch};
use super::launch::{element, like, rows_in_vectors, vector};

#[backend_extension(Cube, Fusion)]
pub(super) trait Layouts: Backend {
    /// a b for a [.., m, k] and b [.., k, n].
    #[fusion(dtype = a, shape = product(a, b))]
    fn product(a: FloatTensor<Self>, b: FloatTensor<Self>) -> FloatTensor<Self>;

    /// One of the `parts` of each row of [N, T, parts * heads * D], as [N * heads, T, D].
    #[fusion(dtype = rows, shape = split(rows, heads, parts))]
    fn split_heads(rows: FloatTensor<Self>, heads: usize, part: usize, parts: usize) -> FloatTensor<Self>;

    /// [N * heads, T, D] as [N, T, heads * D].
    #[fusion(dtype = matrices, shape = merged(matrices, heads, &1))]
    fn merge_heads(matrices: FloatTensor<Self>, heads: usize) -> FloatTensor<Self>;

    /// q, k and v, each [N * heads, T, D], as [N, T, 3 * heads * D].
    #[fusion(dtype = q, shape = merged(q, heads, &3))]
    fn pack_heads(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        heads: usize,
    ) -> FloatTensor<Self>;
}

fn product(a: &Shape, b: &Shape) -> Shape {
    let mut shape = a.clone();
    let last = shape.num_dims() - 1;
    shape[last] = b[last];
    shape
}

fn split(rows: &Shape, heads: &usize, parts: &usize) -> Shape {
    Shape::new([rows[0] * heads, rows[1], rows[2] / parts / heads])
}

fn merged(matrices: &Shape, heads: &usize, parts: &usize) -> Shape {
    Shape::new([matrices[0] / heads, matrices[1], parts * heads * matrices[2]])
}

fn cube(x: &CubeTensor, units: usize) -> CubeDim {
    CubeDim::new(&x.client, units)
}

/// The matrices' sizes in vectors of `n`, and how many they are.
fn head_sizes(
    matrices: &Shape,
    heads: usize,
    part: usize,
    step: usize,
    n: usize,
) -> (HeadSizesLaunch, usize) {
    let count = matrices.num_elements() / n;
    (HeadSizesLaunch::new(count, matrices[1], heads, matrices[2] / n, part, step / n), count)
}

/// Writes matrices to their part of the rows.
fn merge(matrices: CubeTensor, rows: &CubeTensor, heads: usize, part: usize) {
    let matrices = into_contiguous(matrices);
    let n = vector(matrices.shape()[2], matrices.dtype);
    let (sizes, count) = head_sizes(&matrices.shape(), heads, part, rows.shape()[2], n);
    if count == 0 {
        return;
    }
    let (client, kind, dim) = (matrices.client.clone(), element(&matrices), cube(&matrices, count));
    // SAFETY: both have no gaps and are as large as `sizes` says.
    unsafe {
        kernels::merge_heads::launch_unchecked(
            &client,
            calculate_cube_count_elemwise(&client, count, dim),
            dim,
            n,
            matrices.into_buffer_arg(),
            rows.clone().into_buffer_arg(),
            sizes,
            kind,
        );
    }
}

impl Layouts for CubeBackend {
    fn product(a: CubeTensor, b: CubeTensor) -> CubeTensor {
        let (shape, dtype) = (product(&a.shape(), &b.shape()), a.dtype);
        let out = like(&a, shape, dtype);
        matmul(a, b, Some(out), MatmulStrategy::default(), dtype)
            .unwrap_or_else(|error| panic!("no kernel for a matrix product: {error:?}"))
    }

    fn split_heads(rows: CubeTensor, heads: usize, part: usize, parts: usize) -> CubeTensor {
        let shape = split(&rows.shape(), &heads, &parts);
        let out = like(&rows, shape.clone(), rows.dtype);
        let n = vector(shape[2], rows.dtype);
        let (rows, step) = rows_in_vectors(rows, n);
        let (sizes, count) = head_sizes(&shape, heads, part, step, n);
        if count == 0 {
            return out;
        }
        let (client, kind, dim) = (rows.client.clone(), element(&rows), cube(&rows, count));
        // SAFETY: both are as large as `sizes` says, and rows lie at the distance that it says.
        unsafe {
            kernels::split_heads::launch_unchecked(
                &client,
                calculate_cube_count_elemwise(&client, count, dim),
                dim,
                n,
                rows.into_buffer_arg(),
                out.clone().into_buffer_arg(),
                sizes,
                kind,
            );
        }
        out
    }

    fn merge_heads(matrices: CubeTensor, heads: usize) -> CubeTensor {
        let out = like(&matrices, merged(&matrices.shape(), &heads, &1), matrices.dtype);
        merge(matrices, &out, heads, 0);
        out
    }

    fn pack_heads(q: CubeTensor, k: CubeTensor, v: CubeTensor, heads: usize) -> CubeTensor {
        let out = like(&q, merged(&q.shape(), &heads, &3), q.dtype);
        for (part, matrices) in [q, k, v].into_iter().enumerate() {
            merge(matrices, &out, heads, part);
        }
        out
    }
}

/// Tensors one after another, of any shapes and types, as one vector of float32.
pub(super) fn joined(parts: Vec<FloatTensor<Cube>>) -> FloatTensor<Cube> {
    let client = parts[0].client.clone();
    let len = parts.iter().map(|part| part.shape().num_elements()).sum();
    let out = TensorIr::uninit(client.create_empty_handle(), Shape::new([len]), DType::F32);
    let id = out.id;
    let inputs: Vec<TensorIr> = parts.into_iter().map(FusionTensor::into_ir).collect();
    let operation = CustomOpIr::new("joined", &inputs, &[out]);
    let execute = OperationFn(move |handles: &mut Handles| {
        let parts = inputs.iter().map(|part| handles.get_float_tensor::<CubeBackend>(part)).collect();
        handles.register_float_tensor::<CubeBackend>(&id, placed(parts, len));
        Ok(())
    });
    let mut outputs = client.register(StreamId::current(), OperationIr::Custom(operation), execute);
    outputs.pop().expect("one output")
}

fn placed(parts: Vec<CubeTensor>, len: usize) -> CubeTensor {
    let out = like(&parts[0], Shape::new([len]), DType::F32);
    let client = out.client.clone();
    let mut offset = 0;
    for part in parts {
        let part = into_contiguous(part);
        let elements = part.shape().num_elements();
        let n = [elements, offset, len].map(|len| vector(len, DType::F32)).into_iter().min().unwrap_or(1);
        let count = elements / n;
        if count > 0 {
            let (dim, types) = (cube(&part, count), [element(&part), element(&out)]);
            // SAFETY: both have no gaps, and the part ends where the next begins.
            unsafe {
                kernels::place::launch_unchecked(
                    &client,
                    calculate_cube_count_elemwise(&client, count, dim),
                    dim,
                    n,
                    part.into_buffer_arg(),
                    out.clone().into_buffer_arg(),
                    offset / n,
                    count,
                    types,
                );
            }
        }
        offset += elements;
    }
    out
}

type Runtime = <CubeBackend as FusionBackend>::FusionRuntime;
type Handles = HandleContainer<<Runtime as FusionRuntime>::FusionHandle>;
