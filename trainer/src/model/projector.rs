//! REPA's projection of hidden tokens to an encoder's features.

use burn::tensor::{DType, Tensor};

use super::{SitConfig, xavier_linear};
use crate::nn::{Linear, silu};
use crate::params::{Layout, Params};

/// A three-layer SiLU MLP (the reference's `build_mlp`), one for each encoder.
#[derive(Debug, Clone)]
pub(super) struct Projector {
    layers: [Linear; 3],
}

impl Projector {
    pub(super) fn layout(config: &SitConfig, layout: &mut Layout, number: usize) {
        let width = config.projector_dim;
        let sizes = [(config.hidden_size, width), (width, width), (width, config.z_dims[number])];
        for (i, (inputs, outputs)) in sizes.into_iter().enumerate() {
            xavier_linear(layout, &format!("projectors.{number}.{}", 2 * i), inputs, outputs);
        }
    }

    pub(super) fn bind(params: &Params, number: usize) -> Self {
        let scope = params.scope(format!("projectors.{number}"));
        Self { layers: [0, 2, 4].map(|i| Linear::bind(&scope.sub(i))) }
    }

    /// [N, T, hidden] -> [N, T, z_dim], float32.
    pub(super) fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [first, second, third] = &self.layers;
        third.forward(silu(second.forward(silu(first.forward(x))))).cast(DType::F32)
    }
}
