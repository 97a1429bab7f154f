//! The whole model.

use std::sync::Arc;

use burn::tensor::{DType, Int, Tensor};

use super::block::{Block, EPSILON, Modulation};
use super::embeddings::{LabelEmbedder, PatchEmbed, TimestepEmbedder};
use super::projector::Projector;
use super::{Precision, SitConfig, zero_linear};
use crate::nn::{Linear, silu};
use crate::ops::{self, GradientSink};
use crate::params::{Layout, Params};

/// Anything that predicts velocities; what the samplers integrate.
pub trait VelocityModel {
    /// Velocity [N, C, S, S] of states `x` [N, C, S, S] at times `t` [N] under `labels` [N].
    fn velocity(&self, x: Tensor<4>, t: Tensor<1>, labels: Tensor<1, Int>) -> Tensor<4>;
}

/// What a training step needs of the model.
#[derive(Debug, Clone)]
pub struct SitOutput {
    /// Predicted velocity [N, C, S, S], float32.
    pub velocity: Tensor<4>,
    /// For each encoder, the projected hidden tokens [N, T, z_dim], float32.
    pub projected: Vec<Tensor<3>>,
}

/// The last normalisation and the map from tokens to patches.
#[derive(Debug, Clone)]
pub(super) struct FinalLayer {
    linear: Linear,
    modulation: Modulation<2>,
}

impl FinalLayer {
    pub(super) fn layout(config: &SitConfig, layout: &mut Layout) {
        let outputs = config.patch_size * config.patch_size * config.in_channels;
        zero_linear(layout, "final_layer.linear", config.hidden_size, outputs);
        Modulation::<2>::layout(layout, "final_layer", config.hidden_size);
    }

    fn bind(params: &Params) -> Self {
        let scope = params.scope("final_layer");
        Self { linear: Linear::bind(&scope.sub("linear")), modulation: Modulation::bind(&scope) }
    }

    /// [N, T, hidden] -> [N, T, patch * patch * C], float32.
    fn forward(&self, x: Tensor<3>, activated: Tensor<2>) -> Tensor<3> {
        let [shift, scale] = self.modulation.forward(activated);
        let x = ops::modulate(x, shift, scale, EPSILON, self.linear.dtype());
        self.linear.forward(x).cast(DType::F32)
    }
}

/// A SiT bound to parameter values. Binding is cheap: training binds anew each step.
#[derive(Debug, Clone)]
pub struct Sit {
    config: SitConfig,
    pos_embed: Tensor<3>,
    patches: PatchEmbed,
    times: TimestepEmbedder,
    labels: LabelEmbedder,
    inner: Inner,
}

/// Everything between the embeddings and the output.
#[derive(Debug, Clone)]
enum Inner {
    Bound {
        blocks: Vec<Block>,
        projectors: Vec<Projector>,
        final_layer: Box<FinalLayer>,
    },
    /// Bound where it is used, so that its gradients come as soon as the backward pass is past it.
    Watched(Box<Watched>),
}

/// Where parameters and their gradients are.
#[derive(Debug, Clone)]
struct Watched {
    compute: Params,
    master: Params,
    sink: Arc<dyn GradientSink>,
}

impl Inner {
    fn block(&self, config: &SitConfig, number: usize, tokens: &Tensor<3>) -> Block {
        match self {
            Self::Bound { blocks, .. } => blocks[number].clone(),
            Self::Watched(w) => {
                let [compute, master] = [&w.compute, &w.master].map(|p| p.watched(&w.sink, Some(tokens)));
                Block::bind(config, &compute, &master, number)
            }
        }
    }

    fn projectors(&self, config: &SitConfig, tokens: &Tensor<3>) -> Vec<Projector> {
        match self {
            Self::Bound { projectors, .. } => projectors.clone(),
            Self::Watched(w) => {
                let compute = w.compute.watched(&w.sink, Some(tokens));
                (0..config.z_dims.len()).map(|i| Projector::bind(&compute, i)).collect()
            }
        }
    }

    fn final_layer(&self, tokens: &Tensor<3>) -> FinalLayer {
        match self {
            Self::Bound { final_layer, .. } => (**final_layer).clone(),
            Self::Watched(w) => FinalLayer::bind(&w.compute.watched(&w.sink, Some(tokens))),
        }
    }
}

impl Sit {
    /// Binds a valid config's layers to values of its layout. Matrix products run in the values'
    /// type; everything else is float32 (see [`Precision`]). Values of another layout are a
    /// programming error and panic.
    pub fn bind(config: &SitConfig, params: &Params) -> Self {
        Self::bind_split(config, params, params)
    }

    /// Binds float32 master weights so that matrix products run in `precision`. The matrices are
    /// cast here, once a binding; gradients flow back to the master weights in float32.
    pub fn bind_mixed(config: &SitConfig, master: &Params, precision: Precision) -> Self {
        if precision == Precision::F32 {
            return Self::bind(config, master);
        }
        Self::bind_split(config, &master.cast(precision.dtype()), master)
    }

    /// As [`Sit::bind_mixed`], for one forward pass whose gradients go to `sink` while its backward pass
    /// runs, in the order of [`SitConfig::backward_position`] (on a backend that watches parameters; see
    /// [`crate::ops::watch`]).
    pub fn bind_watched(
        config: &SitConfig,
        master: &Params,
        precision: Precision,
        sink: &Arc<dyn GradientSink>,
    ) -> Self {
        let compute =
            if precision == Precision::F32 { master.clone() } else { master.cast(precision.dtype()) };
        let (at_end, master_at_end) = (compute.watched(sink, None), master.watched(sink, None));
        let inner = Inner::Watched(Box::new(Watched { compute, master: master.clone(), sink: sink.clone() }));
        Self::bind_with(config, &at_end, &master_at_end, inner)
    }

    fn bind_split(config: &SitConfig, compute: &Params, master: &Params) -> Self {
        let inner = Inner::Bound {
            blocks: (0..config.depth).map(|i| Block::bind(config, compute, master, i)).collect(),
            projectors: (0..config.z_dims.len()).map(|i| Projector::bind(compute, i)).collect(),
            final_layer: Box::new(FinalLayer::bind(compute)),
        };
        Self::bind_with(config, compute, master, inner)
    }

    fn bind_with(config: &SitConfig, compute: &Params, master: &Params, inner: Inner) -> Self {
        Self {
            config: config.clone(),
            pos_embed: master.get::<3>("pos_embed").cast(DType::F32),
            patches: PatchEmbed::bind(config, compute),
            times: TimestepEmbedder::bind(compute),
            labels: LabelEmbedder::bind(master),
            inner,
        }
    }

    /// The config it was bound with.
    pub fn config(&self) -> &SitConfig {
        &self.config
    }

    /// Velocity and projected tokens of states `x` [N, C, S, S] at times `t` [N] under `labels` [N],
    /// where `num_classes` is the null class.
    pub fn forward(&self, x: Tensor<4>, t: Tensor<1>, labels: Tensor<1, Int>) -> SitOutput {
        self.run(x, t, labels, true)
    }

    /// The velocity alone; no projector runs.
    pub fn velocity(&self, x: Tensor<4>, t: Tensor<1>, labels: Tensor<1, Int>) -> Tensor<4> {
        self.run(x, t, labels, false).velocity
    }

    fn run(&self, x: Tensor<4>, t: Tensor<1>, labels: Tensor<1, Int>, project: bool) -> SitOutput {
        let mut tokens = self.patches.forward(x) + self.pos_embed.clone();
        // Every modulation begins with the SiLU of the same condition: computed once.
        let activated = silu(self.times.forward(t) + self.labels.forward(labels));
        let mut aligned = None;
        for number in 0..self.config.depth {
            tokens = self.inner.block(&self.config, number, &tokens).forward(tokens, activated.clone());
            if project && number + 1 == self.config.encoder_depth {
                aligned = Some(tokens.clone());
            }
        }
        let projected = aligned.map_or_else(Vec::new, |aligned| {
            // Their gradients need nothing of the blocks above: early in the backward pass, they can travel while
            // those are computed.
            let aligned = ops::after(aligned, &tokens);
            let projectors = self.inner.projectors(&self.config, &aligned);
            projectors.iter().map(|p| p.forward(aligned.clone())).collect()
        });
        let final_layer = self.inner.final_layer(&tokens);
        let velocity = self.unpatchify(final_layer.forward(tokens, activated));
        SitOutput { velocity, projected }
    }

    /// [N, T, patch * patch * C] -> [N, C, S, S].
    fn unpatchify(&self, x: Tensor<3>) -> Tensor<4> {
        let (n, grid, p) = (x.dims()[0], self.config.grid(), self.config.patch_size);
        let (channels, side) = (self.config.in_channels, self.config.input_size);
        x.reshape([n, grid, grid, p, p, channels])
            .permute([0, 5, 1, 3, 2, 4])
            .reshape([n, channels, side, side])
    }
}

impl VelocityModel for Sit {
    fn velocity(&self, x: Tensor<4>, t: Tensor<1>, labels: Tensor<1, Int>) -> Tensor<4> {
        Sit::velocity(self, x, t, labels)
    }
}

#[cfg(test)]
mod tests;
