//! SiT (Ma et al., arXiv 2401.08740) with the projectors of REPA (arXiv 2410.06940): a diffusion
//! transformer over latent patches whose parameters carry the reference implementation's names.

mod block;
mod config;
mod embeddings;
mod flops;
mod precision;
mod presets;
mod projector;
mod sit;

pub use config::{ModelError, SitConfig};
pub use embeddings::sincos_2d;
pub use precision::Precision;
pub use presets::PRESETS;
pub use sit::{Sit, SitOutput, VelocityModel};

use crate::params::{Init, Layout};

/// Adds a linear layer with the reference's default: xavier-uniform weight, zero bias.
fn xavier_linear(layout: &mut Layout, name: &str, inputs: usize, outputs: usize) {
    let weight = Init::XavierUniform { fan_in: inputs, fan_out: outputs };
    layout.linear(name, inputs, outputs, weight, Some(Init::Zeros));
}

/// Adds a linear layer that begins as the zero function (adaLN modulations, the last layer).
fn zero_linear(layout: &mut Layout, name: &str, inputs: usize, outputs: usize) {
    layout.linear(name, inputs, outputs, Init::Zeros, Some(Init::Zeros));
}
