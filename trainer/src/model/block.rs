//! The transformer block with adaLN-Zero conditioning (Peebles and Xie, arXiv 2212.09748).

use burn::tensor::{DType, Tensor};

use super::{SitConfig, xavier_linear, zero_linear};
use crate::nn::{LayerNorm, Linear};
use crate::ops;
use crate::params::{Init, Layout, Params, Scope};

/// Epsilon of the normalisations without weights.
pub(super) const EPSILON: f64 = 1e-6;

/// Epsilon of the normalisation of queries and keys (PyTorch's default).
const QK_EPSILON: f64 = 1e-5;

/// A linear map of the activated condition to `PARTS` vectors of the hidden size.
#[derive(Debug, Clone)]
pub(super) struct Modulation<const PARTS: usize> {
    linear: Linear,
}

impl<const PARTS: usize> Modulation<PARTS> {
    pub(super) fn layout(layout: &mut Layout, prefix: &str, hidden: usize) {
        zero_linear(layout, &format!("{prefix}.adaLN_modulation.1"), hidden, PARTS * hidden);
    }

    pub(super) fn bind(scope: &Scope) -> Self {
        Self { linear: Linear::bind(&scope.sub("adaLN_modulation.1")) }
    }

    /// SiLU of the condition, [N, hidden] -> `PARTS` x [N, 1, hidden], float32.
    pub(super) fn forward(&self, activated: Tensor<2>) -> [Tensor<3>; PARTS] {
        ops::parts(self.linear.forward(activated).cast(DType::F32).unsqueeze_dim(1))
    }
}

/// Multi-head self-attention with one linear layer for queries, keys and values.
#[derive(Debug, Clone)]
struct Attention {
    qkv: Linear,
    norms: Option<(LayerNorm, LayerNorm)>,
    proj: Linear,
    heads: usize,
}

impl Attention {
    fn layout(config: &SitConfig, layout: &mut Layout, prefix: &str) {
        let hidden = config.hidden_size;
        xavier_linear(layout, &format!("{prefix}.qkv"), hidden, 3 * hidden);
        if config.qk_norm {
            for name in ["q_norm", "k_norm"] {
                layout.add(format!("{prefix}.{name}.weight"), &[config.head_dim()], Init::Ones);
                layout.add(format!("{prefix}.{name}.bias"), &[config.head_dim()], Init::Zeros);
            }
        }
        xavier_linear(layout, &format!("{prefix}.proj"), hidden, hidden);
    }

    fn bind(config: &SitConfig, compute: &Scope, master: &Scope) -> Self {
        let norm = |name| LayerNorm::bind(&master.sub(name), QK_EPSILON);
        Self {
            qkv: Linear::bind(&compute.sub("qkv")),
            norms: config.qk_norm.then(|| (norm("q_norm"), norm("k_norm"))),
            proj: Linear::bind(&compute.sub("proj")),
            heads: config.num_heads,
        }
    }

    /// [N, T, hidden] -> [N, T, hidden], in the weights' type.
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [n, tokens, hidden] = x.dims();
        let qkv = self.qkv.forward(x);
        let mixed = match &self.norms {
            None => ops::attention_qkv(qkv, self.heads),
            Some((q_norm, k_norm)) => {
                // [N, T, 3 hidden] -> three of [N, heads, T, head_dim].
                let [q, k, v]: [Tensor<4>; 3] = std::array::from_fn(|i| {
                    let part = qkv.clone().narrow(2, i * hidden, hidden);
                    part.reshape([n, tokens, self.heads, hidden / self.heads]).swap_dims(1, 2)
                });
                let mixed = ops::attention(q_norm.forward(q), k_norm.forward(k), v);
                mixed.swap_dims(1, 2).reshape([n, tokens, hidden])
            }
        };
        self.proj.forward(mixed)
    }
}

/// One block: attention and MLP, each behind a modulated normalisation and a gate.
#[derive(Debug, Clone)]
pub(super) struct Block {
    attention: Attention,
    fc1: Linear,
    fc2: Linear,
    modulation: Modulation<6>,
}

impl Block {
    pub(super) fn layout(config: &SitConfig, layout: &mut Layout, number: usize) {
        let (hidden, mlp) = (config.hidden_size, config.mlp_hidden());
        let prefix = format!("blocks.{number}");
        Attention::layout(config, layout, &format!("{prefix}.attn"));
        xavier_linear(layout, &format!("{prefix}.mlp.fc1"), hidden, mlp);
        xavier_linear(layout, &format!("{prefix}.mlp.fc2"), mlp, hidden);
        Modulation::<6>::layout(layout, &prefix, hidden);
    }

    /// Matrices come from `compute`, weights of normalisations from `master`.
    pub(super) fn bind(config: &SitConfig, compute: &Params, master: &Params, number: usize) -> Self {
        let scope = compute.scope(format!("blocks.{number}"));
        let master = master.scope(format!("blocks.{number}.attn"));
        Self {
            attention: Attention::bind(config, &scope.sub("attn"), &master),
            fc1: Linear::bind(&scope.sub("mlp.fc1")),
            fc2: Linear::bind(&scope.sub("mlp.fc2")),
            modulation: Modulation::bind(&scope),
        }
    }

    /// Tokens [N, T, hidden] and the activated condition [N, hidden], both float32, to tokens.
    pub(super) fn forward(&self, x: Tensor<3>, activated: Tensor<2>) -> Tensor<3> {
        let [shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp] =
            self.modulation.forward(activated);
        let dtype = self.fc1.dtype();
        let h = self.attention.forward(ops::modulate(x.clone(), shift_msa, scale_msa, EPSILON, dtype));
        let x = ops::gated_add(x, h, gate_msa);
        let h = self.fc1.forward(ops::modulate(x.clone(), shift_mlp, scale_mlp, EPSILON, dtype));
        let h = self.fc2.forward(ops::gelu_tanh(h));
        ops::gated_add(x, h, gate_mlp)
    }
}
