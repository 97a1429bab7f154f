//! A tensor cut into parts, whose gradients are written next to one another in the backward pass.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, Shape, TensorMetadata, backend_extension};
use burn::tensor::{Slice, Tensor};

use super::watch::Watching;

/// Where a part's gradient goes.
#[derive(Debug, Clone)]
pub struct Place {
    columns: Range<usize>,
    /// Whether a part's gradient has come already.
    begun: Arc<AtomicBool>,
}

/// What [`parts`] is made of.
#[backend_extension(Autodiff, Flex, Cube: cfg(any(feature = "cuda", feature = "wgpu")))]
pub trait Cutting: Backend {
    /// Columns of the last dimension.
    fn part(x: FloatTensor<Self>, place: Place) -> FloatTensor<Self> {
        let slices = slices(&x.shape(), &place.columns);
        Self::float_slice(x, &slices)
    }
}

impl Cutting for Flex {}

#[cfg(any(feature = "cuda", feature = "wgpu"))]
impl Cutting for burn::backend::Cube {}

/// `x` cut into `P` equal parts of its last dimension. Of `narrow`, burn would make each part's gradient a whole one of
/// zeros first, and add those up.
pub fn parts<const D: usize, const P: usize>(x: Tensor<D>) -> [Tensor<D>; P] {
    let width = x.dims()[D - 1] / P;
    assert_eq!(x.dims()[D - 1], P * width, "parts: they are equal");
    // A node of its own, which nothing else follows from: its gradient is the parts' and no more.
    let x = x.into_dispatch();
    let whole = Dispatch::after(x.clone(), x);
    let begun = Arc::new(AtomicBool::new(false));
    std::array::from_fn(|i| {
        let place = Place { columns: i * width..(i + 1) * width, begun: begun.clone() };
        Tensor::from_dispatch(Dispatch::part(whole.clone(), place))
    })
}

fn slices(shape: &Shape, columns: &Range<usize>) -> Vec<Slice> {
    let (_, rows) = shape.split_last().expect("a last dimension");
    let rows = rows.iter().map(|&len| Slice::from(0..len));
    rows.chain([Slice::from(columns.clone())]).collect()
}

#[derive(Debug)]
struct Part;

impl<B: Backend> Backward<B, 1> for Part {
    type State = (Place, Shape);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let (place, shape) = ops.state;
        let [Some(whole)] = ops.parents else { return };
        // Only parts follow from a whole, and no two have columns in common: what is there is written over.
        let by_whole = match place.begun.swap(true, Ordering::Relaxed) {
            true => grads.consume::<B>(&whole),
            false => B::float_zeros(shape.clone(), &grad.device(), grad.dtype().into()),
        };
        let by_whole = B::float_slice_assign(by_whole, &slices(&shape, &place.columns), grad);
        grads.register::<B>(whole.id, by_whole);
    }
}

impl<B: Cutting, C: CheckpointStrategy> Cutting for Autodiff<B, C> {
    fn part(x: FloatTensor<Self>, place: Place) -> FloatTensor<Self> {
        let shape = x.shape();
        match Backward::<B, 1>::prepare::<C>(Part, [x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let y = B::part(x.into_primitive(), place.clone());
                prep.finish((place, shape), y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::part(x.into_primitive(), place)),
        }
    }
}
