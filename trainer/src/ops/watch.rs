//! Gradients that leave the backward pass early, on any backend.

use std::sync::Arc;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{DType, FloatDType, Tensor};

use super::flex;

/// Takes gradients of parameters while the backward pass still runs.
pub trait GradientSink: std::fmt::Debug + Send + Sync {
    /// The gradient of the parameter that begins at `offset` of the flat array. Given once in each backward
    /// pass; those of several passes are added.
    fn gradient(&self, offset: usize, values: &[f32]);

    /// The same, of a backend whose tensors are not in the host's memory, in the type that the parameter was used in.
    /// Brings it there, unless the sink has a use for it where it is.
    fn tensor(&self, offset: usize, gradient: Tensor<1>) {
        let data = gradient.into_data().convert::<f32>();
        self.gradient(offset, data.as_slice::<f32>().expect("converted to f32 above"));
    }

    /// The backward pass that comes next is the last of the step.
    fn last_part(&self) {}
}

/// Where the gradient of one parameter goes.
#[derive(Debug, Clone)]
pub struct GradientSlot {
    /// Beginning of the parameter in the flat array.
    pub offset: usize,
    /// Who takes it.
    pub sink: Arc<dyn GradientSink>,
}

/// What [`after`] and [`watch`] are made of.
#[backend_extension(Autodiff, Flex, Cube: cfg(any(feature = "cuda", feature = "wgpu")))]
pub trait Watching: Backend {
    /// See [`after`].
    fn after(x: FloatTensor<Self>, _other: FloatTensor<Self>) -> FloatTensor<Self> {
        x
    }

    /// See [`watch`].
    fn watch(value: FloatTensor<Self>, _behind: FloatTensor<Self>, _slot: GradientSlot) -> FloatTensor<Self> {
        value
    }
}

/// A backend whose gradients can be given away.
pub trait Deliver: Watching {
    /// Gives a parameter's gradient to the slot's sink.
    fn deliver(gradient: FloatTensor<Self>, slot: &GradientSlot);
}

/// `x` itself, but what is computed from it counts as deeper in the graph than `other`, which takes no part: the
/// backward pass comes to it before it comes to what led to `other`. Changes no value and no gradient.
pub fn after(x: Tensor<3>, other: &Tensor<3>) -> Tensor<3> {
    Tensor::from_dispatch(Dispatch::after(x.into_dispatch(), other.clone().into_dispatch()))
}

/// The parameter `value` itself. Its gradient goes to the slot's sink, and no further, as soon as the backward
/// pass has done with everything that follows `behind` (which takes no part): burn runs a tape by falling
/// depth in the graph, and this gives a parameter the depth of the place where it is used. Without `behind`
/// that is the end of the pass.
pub fn watch(value: Tensor<1>, behind: Option<&Tensor<3>>, slot: GradientSlot) -> Tensor<1> {
    let value = value.into_dispatch();
    let behind = behind.map_or_else(|| value.clone(), |b| b.clone().into_dispatch());
    Tensor::from_dispatch(Dispatch::watch(value, behind, slot))
}

impl Watching for Flex {}

impl Deliver for Flex {
    fn deliver(gradient: FloatTensor<Self>, slot: &GradientSlot) {
        let gradient = match gradient.dtype() {
            DType::F32 => gradient,
            _ => Self::float_cast(gradient, FloatDType::F32),
        };
        flex::show(gradient, |values| slot.sink.gradient(slot.offset, values));
    }
}

/// A GPU's.
#[cfg(any(feature = "cuda", feature = "wgpu"))]
impl Watching for burn::backend::Cube {}

#[cfg(any(feature = "cuda", feature = "wgpu"))]
impl Deliver for burn::backend::Cube {
    fn deliver(gradient: FloatTensor<Self>, slot: &GradientSlot) {
        slot.sink.tensor(slot.offset, Tensor::from_primitive::<Self>(gradient));
    }
}

#[derive(Debug)]
struct After;

#[derive(Debug)]
struct Watch;

impl<B: Backend> Backward<B, 2> for After {
    type State = ();

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let [x, _] = ops.parents;
        if let Some(x) = x {
            grads.register::<B>(x.id, grad);
        }
    }
}

impl<B: Deliver> Backward<B, 2> for Watch {
    type State = GradientSlot;

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        B::deliver(grads.consume::<B>(&ops.node), &ops.state);
    }
}

impl<B: Deliver, C: CheckpointStrategy> Watching for Autodiff<B, C> {
    fn after(x: FloatTensor<Self>, other: FloatTensor<Self>) -> FloatTensor<Self> {
        match Backward::<B, 2>::prepare::<C>(After, [x.node(), other.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((), x.into_primitive()),
            OpsKind::UnTracked(prep) => prep.finish(x.into_primitive()),
        }
    }

    fn watch(value: FloatTensor<Self>, behind: FloatTensor<Self>, slot: GradientSlot) -> FloatTensor<Self> {
        match Backward::<B, 2>::prepare::<C>(Watch, [value.node(), behind.node()]).compute_bound().stateful()
        {
            OpsKind::Tracked(prep) => prep.finish(slot, value.into_primitive()),
            OpsKind::UnTracked(prep) => prep.finish(value.into_primitive()),
        }
    }
}
