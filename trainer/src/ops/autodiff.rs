//! The backward passes of the fused operations, for any backend that has [`SitGradients`].

use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend};
use burn::tensor::DType;

use super::{ConvolutionGradients, ConvolutionOps, LinearGradients, LinearOps, SitGradients, SitOps};

/// An operation of one input whose gradient follows from that input.
macro_rules! unary {
    ($op:ident, $x:expr, $forward:expr, $state:expr) => {{
        let x = $x;
        match $op.prepare::<C>([x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let saved = prep.checkpoint(&x);
                prep.finish((saved, $state), $forward(x.into_primitive()))
            }
            OpsKind::UnTracked(prep) => prep.finish($forward(x.into_primitive())),
        }
    }};
}

#[derive(Debug)]
struct GeluTanh;

#[derive(Debug)]
struct Swish;

#[derive(Debug)]
struct Normalise;

#[derive(Debug)]
struct Modulate;

#[derive(Debug)]
struct GatedAdd;

#[derive(Debug)]
struct UnpackedAttention;

#[derive(Debug)]
struct PackedAttention;

#[derive(Debug)]
struct Linear;

#[derive(Debug)]
struct Convolve;

impl<B: SitGradients> Backward<B, 1> for GeluTanh {
    type State = (NodeId, ());

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let x = checkpointer.retrieve_node_output(ops.state.0);
        unary_gradient::<B>(ops, grads, |grad| B::gelu_tanh_backward(x, grad));
    }
}

impl<B: SitGradients> Backward<B, 1> for Swish {
    type State = (NodeId, ());

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let x = checkpointer.retrieve_node_output(ops.state.0);
        unary_gradient::<B>(ops, grads, |grad| B::swish_backward(x, grad));
    }
}

impl<B: SitGradients> Backward<B, 1> for Normalise {
    type State = (NodeId, f32);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let (x, epsilon) = (checkpointer.retrieve_node_output(ops.state.0), ops.state.1);
        unary_gradient::<B>(ops, grads, |grad| B::normalise_backward(x, grad, epsilon));
    }
}

fn unary_gradient<B: Backend>(
    ops: Ops<impl Clone + Send + std::fmt::Debug + 'static, 1>,
    grads: &mut Gradients,
    gradient: impl FnOnce(FloatTensor<B>) -> FloatTensor<B>,
) {
    let grad = grads.consume::<B>(&ops.node);
    let [parent] = ops.parents;
    if let Some(parent) = parent {
        grads.register::<B>(parent.id, gradient(grad));
    }
}

impl<B: SitGradients> Backward<B, 3> for Modulate {
    type State = (NodeId, NodeId, f32, f32);

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let (x, gain, unit, epsilon) = ops.state;
        let (x, gain) = (checkpointer.retrieve_node_output(x), checkpointer.retrieve_node_output(gain));
        let grad = grads.consume::<B>(&ops.node);
        let gradients = B::modulate_backward(x, gain, grad, unit, epsilon);
        for (parent, gradient) in ops.parents.into_iter().zip(gradients) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, gradient);
            }
        }
    }
}

impl<B: SitGradients> Backward<B, 3> for GatedAdd {
    type State = (NodeId, NodeId);

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let y = checkpointer.retrieve_node_output(ops.state.0);
        let gate = checkpointer.retrieve_node_output(ops.state.1);
        let grad = grads.consume::<B>(&ops.node);
        let [x_parent, y_parent, gate_parent] = ops.parents;
        if y_parent.is_some() || gate_parent.is_some() {
            let [by_y, by_gate] = B::gated_add_backward(y, gate, grad.clone());
            if let Some(parent) = y_parent {
                grads.register::<B>(parent.id, by_y);
            }
            if let Some(parent) = gate_parent {
                grads.register::<B>(parent.id, by_gate);
            }
        }
        if let Some(parent) = x_parent {
            grads.register::<B>(parent.id, grad);
        }
    }
}

impl<B: SitGradients> Backward<B, 3> for UnpackedAttention {
    type State = ([NodeId; 3], FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let (qkv, probabilities) = ops.state;
        let qkv = qkv.map(|id| checkpointer.retrieve_node_output(id));
        let grad = grads.consume::<B>(&ops.node);
        let gradients = B::unpacked_attention_backward(qkv, probabilities, grad);
        for (parent, gradient) in ops.parents.into_iter().zip(gradients) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, gradient);
            }
        }
    }
}

impl<B: SitGradients> Backward<B, 1> for PackedAttention {
    type State = (Vec<FloatTensor<B>>, usize);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (saved, heads) = ops.state.clone();
        unary_gradient::<B>(ops, grads, |grad| B::packed_attention_backward(saved, heads, grad));
    }
}

/// x and weight, each saved only where the other's gradient is wanted.
type LinearState = (Option<NodeId>, Option<NodeId>);

impl<B: LinearGradients> Backward<B, 2> for Linear {
    type State = LinearState;

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let [x_parent, weight_parent] = ops.parents;
        let ids = [x_parent.map(|p| p.id), weight_parent.map(|p| p.id)];
        linear_gradients::<B>(ids, ops.state, grad, grads, checkpointer);
    }
}

impl<B: LinearGradients> Backward<B, 3> for Linear {
    type State = LinearState;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let [x_parent, weight_parent, bias_parent] = ops.parents;
        if let Some(parent) = bias_parent {
            grads.register::<B>(parent.id, B::sum_rows(grad.clone()));
        }
        let ids = [x_parent.map(|p| p.id), weight_parent.map(|p| p.id)];
        linear_gradients::<B>(ids, ops.state, grad, grads, checkpointer);
    }
}

fn linear_gradients<B: LinearGradients>(
    [x_parent, weight_parent]: [Option<NodeId>; 2],
    (x, weight): LinearState,
    grad: FloatTensor<B>,
    grads: &mut Gradients,
    checkpointer: &mut Checkpointer,
) {
    let x: Option<FloatTensor<B>> = x.map(|id| checkpointer.retrieve_node_output(id));
    let weight: Option<FloatTensor<B>> = weight.map(|id| checkpointer.retrieve_node_output(id));
    if let (Some(parent), Some(x)) = (weight_parent, x) {
        grads.register::<B>(parent, B::project_backward_weight(grad.clone(), x));
    }
    if let (Some(parent), Some(weight)) = (x_parent, weight) {
        grads.register::<B>(parent, B::project_backward_input(grad, weight));
    }
}

impl<B: ConvolutionGradients> Backward<B, 3> for Convolve {
    type State = LinearState;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let [x_parent, weight_parent, bias_parent] = ops.parents;
        let x: Option<FloatTensor<B>> = ops.state.0.map(|id| checkpointer.retrieve_node_output(id));
        let weight: Option<FloatTensor<B>> = ops.state.1.map(|id| checkpointer.retrieve_node_output(id));
        if let Some(parent) = bias_parent {
            grads.register::<B>(parent.id, B::sum_channels(grad.clone()));
        }
        if let (Some(parent), Some(x)) = (weight_parent, x) {
            grads.register::<B>(parent.id, B::convolve_backward_weight(grad.clone(), x));
        }
        if let (Some(parent), Some(weight)) = (x_parent, weight) {
            grads.register::<B>(parent.id, B::convolve_backward_input(grad, weight));
        }
    }
}

impl<B: SitGradients, C: CheckpointStrategy> SitOps for Autodiff<B, C> {
    fn gelu_tanh(x: FloatTensor<Self>) -> FloatTensor<Self> {
        unary!(GeluTanh, x, B::gelu_tanh, ())
    }

    fn swish(x: FloatTensor<Self>) -> FloatTensor<Self> {
        unary!(Swish, x, B::swish, ())
    }

    fn normalise(x: FloatTensor<Self>, epsilon: f32) -> FloatTensor<Self> {
        unary!(Normalise, x, |x| B::normalise(x, epsilon), epsilon)
    }

    fn modulate(
        x: FloatTensor<Self>,
        gain: FloatTensor<Self>,
        shift: FloatTensor<Self>,
        unit: f32,
        epsilon: f32,
        dtype: DType,
    ) -> FloatTensor<Self> {
        let prep = Modulate.prepare::<C>([x.node(), gain.node(), shift.node()]).compute_bound().stateful();
        let shift = shift.into_primitive();
        match prep {
            OpsKind::Tracked(mut prep) => {
                let state = (prep.checkpoint(&x), prep.checkpoint(&gain), unit, epsilon);
                let y = B::modulate(x.into_primitive(), gain.into_primitive(), shift, unit, epsilon, dtype);
                prep.finish(state, y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::modulate(
                x.into_primitive(),
                gain.into_primitive(),
                shift,
                unit,
                epsilon,
                dtype,
            )),
        }
    }

    fn gated_add(x: FloatTensor<Self>, y: FloatTensor<Self>, gate: FloatTensor<Self>) -> FloatTensor<Self> {
        let prep = GatedAdd.prepare::<C>([x.node(), y.node(), gate.node()]).compute_bound().stateful();
        let x = x.into_primitive();
        match prep {
            OpsKind::Tracked(mut prep) => {
                let state = (prep.checkpoint(&y), prep.checkpoint(&gate));
                prep.finish(state, B::gated_add(x, y.into_primitive(), gate.into_primitive()))
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(B::gated_add(x, y.into_primitive(), gate.into_primitive()))
            }
        }
    }

    fn unpacked_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let prep = UnpackedAttention.prepare::<C>([q.node(), k.node(), v.node()]).compute_bound().stateful();
        match prep {
            OpsKind::Tracked(mut prep) => {
                let saved = [&q, &k, &v].map(|x| prep.checkpoint(x));
                let [q, k, v] = [q, k, v].map(|x| x.into_primitive());
                let [y, probabilities] = B::unpacked_attention_forward(q, k, v);
                prep.finish((saved, probabilities), y)
            }
            OpsKind::UnTracked(prep) => {
                let [q, k, v] = [q, k, v].map(|x| x.into_primitive());
                prep.finish(B::unpacked_attention(q, k, v))
            }
        }
    }

    fn packed_attention(qkv: FloatTensor<Self>, heads: usize) -> FloatTensor<Self> {
        match PackedAttention.prepare::<C>([qkv.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (y, saved) = B::packed_attention_forward(qkv.into_primitive(), heads);
                prep.finish((saved, heads), y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::packed_attention(qkv.into_primitive(), heads)),
        }
    }
}

impl<B: LinearGradients, C: CheckpointStrategy> LinearOps for Autodiff<B, C> {
    fn project(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        let (x_tracked, weight_tracked) = (x.is_tracked(), weight.is_tracked());
        match Backward::<B, 2>::prepare::<C>(Linear, [x.node(), weight.node()]).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let state = (
                    weight_tracked.then(|| prep.checkpoint(&x)),
                    x_tracked.then(|| prep.checkpoint(&weight)),
                );
                prep.finish(state, B::project(x.into_primitive(), weight.into_primitive()))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::project(x.into_primitive(), weight.into_primitive())),
        }
    }

    fn affine(x: FloatTensor<Self>, weight: FloatTensor<Self>, bias: FloatTensor<Self>) -> FloatTensor<Self> {
        let (x_tracked, weight_tracked) = (x.is_tracked(), weight.is_tracked());
        let nodes = [x.node(), weight.node(), bias.node()];
        let bias = bias.into_primitive();
        match Backward::<B, 3>::prepare::<C>(Linear, nodes).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let state = (
                    weight_tracked.then(|| prep.checkpoint(&x)),
                    x_tracked.then(|| prep.checkpoint(&weight)),
                );
                prep.finish(state, B::affine(x.into_primitive(), weight.into_primitive(), bias))
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(B::affine(x.into_primitive(), weight.into_primitive(), bias))
            }
        }
    }
}

impl<B: ConvolutionGradients, C: CheckpointStrategy> ConvolutionOps for Autodiff<B, C> {
    fn convolve(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let (x_tracked, weight_tracked) = (x.is_tracked(), weight.is_tracked());
        let nodes = [x.node(), weight.node(), bias.node()];
        let bias = bias.into_primitive();
        match Convolve.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let state = (
                    weight_tracked.then(|| prep.checkpoint(&x)),
                    x_tracked.then(|| prep.checkpoint(&weight)),
                );
                prep.finish(state, B::convolve(x.into_primitive(), weight.into_primitive(), bias))
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(B::convolve(x.into_primitive(), weight.into_primitive(), bias))
            }
        }
    }
}
