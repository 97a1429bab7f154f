//! What one forward pass keeps for the backward pass, and what the backward pass adds to that.
//!
//! Sizes are per pass of `samples` samples, in bytes. With R = samples x tokens rows, hidden size H,
//! MLP width M, A heads, T tokens, projector width D, feature width Z and e bytes an element of
//! matrix products (4, or 2 in half precision), a block keeps
//!
//! | operation | float32 on the CPU | half precision on the CPU | GPU |
//! |---|---|---|---|
//! | modulate: its input | 4 RH | 4 RH | 4 RH |
//! | qkv: its input | 4 RH | 2 RH | e RH |
//! | attention: q, k and v | 12 RH | 6 RH | 3 e RH |
//! | attention: probabilities, and what led to them where it is no fused form | 4 RAT | (8 + 2) RAT | e RAT |
//! | proj: its input | 4 RH | 2 RH | e RH |
//! | gated_add: the branch, on the CPU in float32 | 4 RH | 4 RH | e RH |
//! | modulate: its input | 4 RH | 4 RH | 4 RH |
//! | fc1: its input | 4 RH | 2 RH | e RH |
//! | GELU: its input; where it is no fused form also tanh's input and 1 + tanh | 4 RM | 6 RM | e RM |
//! | fc2: its input | 4 RM | 2 RM | e RM |
//! | gated_add: the branch, on the CPU in float32 | 4 RH | 4 RH | e RH |
//!
//! The probabilities are materialised, [samples, heads, T, T], by the fused attention too: its
//! backward pass reads them. On the CPU fused operations take float32 tensors (`ops::fused`): modulate and
//! gated_add see the float32 residual stream in every precision, the rest does so in float32 only.

use crate::model::{Precision, SitConfig};

/// Bytes of a float32.
const F32: u128 = 4;

/// Bytes of an element of matrix products.
pub(super) fn element(precision: Precision) -> u128 {
    match precision {
        Precision::F32 => 4,
        Precision::Bf16 | Precision::F16 => 2,
    }
}

/// One forward and backward pass.
#[derive(Debug, Clone)]
pub(super) struct Pass {
    samples: u128,
    rows: u128,
    hidden: u128,
    mlp: u128,
    heads: u128,
    tokens: u128,
    depth: u128,
    projector: u128,
    features: Vec<u128>,
    /// Elements of a patch.
    patch: u128,
    qk_norm: bool,
    element: u128,
    /// Whether all operations have fused forms, and not only those of the residual stream.
    fused: bool,
    /// Whether backward passes of one operation are made of several.
    composed: bool,
    /// Whether it is a GPU, whose kernels read half precision beside float32.
    gpu: bool,
}

impl Pass {
    pub(super) fn new(sit: &SitConfig, precision: Precision, samples: usize, on_cpu: bool) -> Self {
        Self {
            samples: samples as u128,
            rows: samples as u128 * sit.tokens() as u128,
            hidden: sit.hidden_size as u128,
            mlp: sit.mlp_hidden() as u128,
            heads: sit.num_heads as u128,
            tokens: sit.tokens() as u128,
            depth: sit.depth as u128,
            projector: sit.projector_dim as u128,
            features: sit.z_dims.iter().map(|&z| z as u128).collect(),
            patch: (sit.in_channels * sit.patch_size * sit.patch_size) as u128,
            qk_norm: sit.qk_norm,
            element: element(precision),
            fused: !on_cpu || precision == Precision::F32,
            composed: on_cpu && precision != Precision::F32,
            gpu: !on_cpu,
        }
    }

    /// Bytes of [rows, hidden] in float32.
    fn stream(&self) -> u128 {
        F32 * self.rows * self.hidden
    }

    /// Bytes of [rows, width] in the type of matrix products.
    fn matrix(&self, width: u128) -> u128 {
        self.element * self.rows * width
    }

    /// What a modulated normalisation keeps: its input.
    fn modulate(&self) -> u128 {
        self.stream()
    }

    /// What a gated addition keeps: the branch.
    fn branch(&self) -> u128 {
        if self.gpu { self.matrix(self.hidden) } else { self.stream() }
    }

    /// The attention's scores: the softmax's output; not fused, also its shifted input and its exponentials
    /// in float32.
    fn scores(&self) -> u128 {
        let each = if self.fused { self.element } else { 2 * F32 + self.element };
        each * self.rows * self.heads * self.tokens
    }

    /// q, k and v; where q and k are normalised, in float32, also the input of that.
    fn qkv(&self) -> u128 {
        let norms = if self.qk_norm { 2 * self.stream() } else { 0 };
        3 * self.matrix(self.hidden) + norms
    }

    /// What GELU keeps. Fused, its input; else the tanh's input and one more than its output as well.
    fn gelu(&self) -> u128 {
        (if self.fused { 1 } else { 3 }) * self.matrix(self.mlp)
    }

    /// What one block keeps: the table above, and the modulation's six vectors a sample.
    fn block(&self) -> u128 {
        2 * self.modulate()
            + 3 * self.matrix(self.hidden)
            + self.qkv()
            + self.scores()
            + 2 * self.branch()
            + self.gelu()
            + self.matrix(self.mlp)
            + 6 * F32 * self.samples * self.hidden
    }

    /// What a SiLU of a projector keeps, and the linear map behind it: its input and output, and not
    /// fused the sigmoid too.
    fn silu(&self) -> u128 {
        (if self.fused { 2 } else { 3 }) * self.matrix(self.projector)
    }

    /// What the projectors and the alignment loss keep: the input of each (where it is cast, or is not kept
    /// by the block above anyway), two SiLU, and projected tokens and features in float32, whose product and
    /// norms need both.
    fn projectors(&self) -> u128 {
        let input = if self.element == F32 { 0 } else { self.matrix(self.hidden) };
        self.features.iter().map(|z| input + 2 * self.silu() + 2 * F32 * self.rows * z).sum()
    }

    /// What comes before the first block and behind the last: patches, the last modulation with the input
    /// of its linear map, and some vectors a sample for time and label.
    fn ends(&self) -> u128 {
        let condition = F32 * self.samples * (256 + 8 * self.hidden);
        self.matrix(self.patch) + self.modulate() + self.matrix(self.hidden) + condition
    }

    /// Bytes that the forward pass keeps.
    pub(super) fn kept(&self) -> u128 {
        self.depth * self.block() + self.projectors() + self.ends()
    }

    /// Bytes that the backward pass needs beyond [`Pass::kept`] where it needs most. It runs the loss and the
    /// projectors first (`ops::after`), then the blocks from the last on, and lets go of what it has used.
    /// Gradients of weights stay until a part's tensors are done with (`ops::watch`), so that with few
    /// rows they count most. From the second block on, more has been freed than is made.
    pub(super) fn workspace(&self) -> u128 {
        let mut walk = Walk::default();
        // The last layer leaves the gradient of the residual stream.
        walk.step(self.stream(), self.matrix(self.hidden) + self.modulate());
        self.walk_projectors(&mut walk);
        self.walk_block(&mut walk);
        walk.peak
    }

    fn walk_projectors(&self, walk: &mut Walk) {
        // The encoders' projectors are at the same depths of the graph, so they go together.
        let encoders = self.features.len() as u128;
        let widths: u128 = self.features.iter().sum();
        let wide = encoders * self.matrix(self.projector);
        let tokens = F32 * self.rows * widths;
        let weight = |inputs: u128, outputs: u128| self.element * inputs * outputs;
        let weights = [
            weight(self.projector, widths),
            encoders * weight(self.projector, self.projector),
            encoders * weight(self.hidden, self.projector),
        ];
        // The product and both factors of the norm give a gradient each, which become one.
        walk.step(3 * tokens, 2 * tokens);
        walk.step(0, 2 * tokens);
        for (number, weight) in weights.iter().enumerate() {
            let (input, output) = (
                if number < 2 { wide } else { encoders * self.matrix(self.hidden) },
                if number == 0 { tokens } else { wide },
            );
            // The gradient by the input is made, that by the output and the input itself are let go.
            walk.step(weight + input, output + if number < 2 { wide } else { 0 });
            if number < 2 {
                // SiLU's gradient takes the place of its output's; not fused, the sigmoid is there too.
                walk.step(0, encoders * (self.silu() - self.matrix(self.projector)));
            }
        }
        // One gradient by the hidden tokens is left, for the block that made them.
        let others = encoders.saturating_sub(1) * self.matrix(self.hidden);
        walk.step(0, others + weights.iter().sum::<u128>());
    }

    fn walk_block(&self, walk: &mut Walk) {
        let (stream, hidden, mlp) = (self.stream(), self.matrix(self.hidden), self.matrix(self.mlp));
        let weight = |inputs: u128, outputs: u128| self.element * inputs * outputs;
        let square = weight(self.hidden, self.hidden);
        // What several operations need beside their result.
        let spare = |bytes: u128| if self.composed { bytes } else { 0 };
        // gated_add, from the gradient of the stream.
        walk.step(hidden + spare(stream), self.branch() + spare(stream));
        // fc2, GELU and fc1.
        walk.step(mlp + weight(self.hidden, self.mlp), hidden + mlp);
        walk.step(spare(3 * mlp), self.gelu() + spare(3 * mlp));
        walk.step(hidden + weight(self.hidden, self.mlp), mlp + hidden);
        // modulate, whose gradient is added to the stream's.
        walk.step(spare(2 * stream), hidden + self.modulate() + spare(2 * stream));
        // gated_add, proj, attention and qkv.
        walk.step(hidden + spare(stream), self.branch() + spare(stream));
        walk.step(hidden + square, 2 * hidden);
        // The probabilities' gradient, and of a GPU that by the scores beside it.
        let spare_scores = if self.gpu || self.composed { self.scores() } else { 0 };
        walk.step(3 * hidden + spare_scores, hidden + self.qkv() + self.scores() + spare_scores);
        walk.step(hidden + 3 * square, 4 * hidden);
        walk.step(0, hidden + self.modulate());
        // The modulation's own map.
        walk.step(6 * square, 0);
    }
}

/// Follows what a pass makes and lets go of.
#[derive(Debug, Default)]
struct Walk {
    made: u128,
    freed: u128,
    /// The most that there was beyond the beginning.
    peak: u128,
}

impl Walk {
    /// An operation that makes some and then lets go of some.
    fn step(&mut self, made: u128, freed: u128) {
        self.made += made;
        self.peak = self.peak.max(self.made.saturating_sub(self.freed));
        self.freed += freed;
    }
}
