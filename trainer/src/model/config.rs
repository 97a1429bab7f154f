//! What a SiT is made of, and which parameters follow from that.

use serde::{Deserialize, Serialize};

use super::block::Block;
use super::embeddings::{LabelEmbedder, PatchEmbed, TimestepEmbedder, sincos_2d};
use super::projector::Projector;
use super::sit::FinalLayer;
use crate::params::{Init, Layout};

/// Why a model cannot be built.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A value of the config does not make a model.
    #[error("model.{key} = {value}: {problem}")]
    Invalid {
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
        /// What is wrong, and what would be right.
        problem: String,
    },
    /// There is no preset of this name.
    #[error("there is no model preset {name:?}; known are {known}")]
    UnknownPreset {
        /// The name asked for.
        name: String,
        /// The names there are.
        known: String,
    },
}

/// Shape of a SiT.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SitConfig {
    /// Side of the square latent, in latent pixels (32 for 256-pixel images under the SD-VAE).
    pub input_size: usize,
    /// Side of a patch, in latent pixels.
    pub patch_size: usize,
    /// Latent channels.
    pub in_channels: usize,
    /// Width of the transformer.
    pub hidden_size: usize,
    /// Number of blocks.
    pub depth: usize,
    /// Attention heads of a block.
    pub num_heads: usize,
    /// Width of a block's MLP in units of `hidden_size`.
    pub mlp_ratio: f64,
    /// Classes; the null class of classifier-free guidance is the one after the last.
    pub num_classes: usize,
    /// Blocks before the hidden tokens that the projectors see.
    pub encoder_depth: usize,
    /// Width of the projectors' hidden layers.
    pub projector_dim: usize,
    /// Feature width of each encoder to align with; empty for a SiT without REPA.
    pub z_dims: Vec<usize>,
    /// Whether queries and keys are normalised (affine LayerNorm over the head dimension).
    pub qk_norm: bool,
}

impl SitConfig {
    /// Checks that the values make a model. [`SitConfig::layout`] and binding take this for granted.
    ///
    /// # Errors
    /// [`ModelError::Invalid`] names the first wrong key, its value and what it may be.
    pub fn validate(&self) -> Result<(), ModelError> {
        let invalid = |key, value: &dyn std::fmt::Debug, problem: String| {
            Err(ModelError::Invalid { key, value: format!("{value:?}"), problem })
        };
        // The limits are far above any model, and keep products of sizes within a machine word.
        let ranges = [
            ("input_size", self.input_size, 1 << 14),
            ("patch_size", self.patch_size, 1 << 10),
            ("in_channels", self.in_channels, 1 << 12),
            ("hidden_size", self.hidden_size, 1 << 16),
            ("depth", self.depth, 1 << 12),
            ("num_heads", self.num_heads, 1 << 12),
            ("num_classes", self.num_classes, 1 << 24),
            ("encoder_depth", self.encoder_depth, 1 << 12),
            ("projector_dim", self.projector_dim, 1 << 16),
        ];
        for (key, value, limit) in ranges {
            if value == 0 || value > limit {
                return invalid(key, &value, format!("must be within 1..={limit}"));
            }
        }
        if self.z_dims.len() > 64 || self.z_dims.iter().any(|&z| z == 0 || z > 1 << 16) {
            let problem = "must be at most 64 widths, each within 1..=65536".to_owned();
            return invalid("z_dims", &self.z_dims, problem);
        }
        if !(self.mlp_ratio > 0.0 && self.mlp_ratio <= 64.0) || self.mlp_hidden() == 0 {
            let problem = "must be above 0, at most 64, and leave the MLP at least one unit".to_owned();
            return invalid("mlp_ratio", &self.mlp_ratio, problem);
        }
        if !self.input_size.is_multiple_of(self.patch_size) {
            let problem = format!("must divide input_size = {}", self.input_size);
            return invalid("patch_size", &self.patch_size, problem);
        }
        if !self.hidden_size.is_multiple_of(self.num_heads) {
            let problem = format!("must divide hidden_size = {}", self.hidden_size);
            return invalid("num_heads", &self.num_heads, problem);
        }
        if !self.hidden_size.is_multiple_of(4) {
            let problem = "must be a multiple of 4 (the position embedding has a sine and a cosine part \
                           for each of two axes)";
            return invalid("hidden_size", &self.hidden_size, problem.to_owned());
        }
        if self.encoder_depth > self.depth {
            let problem = format!("must not exceed depth = {}", self.depth);
            return invalid("encoder_depth", &self.encoder_depth, problem);
        }
        Ok(())
    }

    /// Patches along a side.
    pub fn grid(&self) -> usize {
        self.input_size / self.patch_size
    }

    /// Patches of an image.
    pub fn tokens(&self) -> usize {
        self.grid() * self.grid()
    }

    /// Width of one attention head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_heads
    }

    /// Width of a block's MLP: `int(hidden_size * mlp_ratio)`.
    pub fn mlp_hidden(&self) -> usize {
        (self.hidden_size as f64 * self.mlp_ratio) as usize
    }

    /// The label that stands for no label.
    pub fn null_class(&self) -> usize {
        self.num_classes
    }

    /// All parameters with the reference's names, in the order of its `parameters()` (the position
    /// embedding comes first, frozen), with its `initialize_weights` as first values. The config
    /// must be valid.
    pub fn layout(&self) -> Layout {
        let mut layout = Layout::default();
        let positions = Init::Values(sincos_2d(self.hidden_size, self.grid()).into());
        layout.add_frozen("pos_embed", &[1, self.tokens(), self.hidden_size], positions);
        PatchEmbed::layout(self, &mut layout);
        TimestepEmbedder::layout(self, &mut layout);
        LabelEmbedder::layout(self, &mut layout);
        for number in 0..self.depth {
            Block::layout(self, &mut layout, number);
        }
        for number in 0..self.z_dims.len() {
            Projector::layout(self, &mut layout, number);
        }
        FinalLayer::layout(self, &mut layout);
        layout
    }
}

impl SitConfig {
    /// When the backward pass of [`super::Sit::bind_watched`] is done with a parameter: those with a lower number
    /// come before those with a higher one.
    #[must_use]
    pub fn backward_position(&self, parameter: &str) -> usize {
        let block = parameter.strip_prefix("blocks.").and_then(|rest| rest.split('.').next()?.parse().ok());
        match block {
            Some(number) => self.depth.saturating_sub(number),
            // Projectors come early by `ops::after`.
            None if parameter.starts_with("final_layer.") || parameter.starts_with("projectors.") => 0,
            // The embeddings.
            None => self.depth + 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A change that spoils a preset.
    type Spoil = fn(&mut SitConfig);

    #[test]
    fn wrong_values_are_named() {
        let cases: [(&str, Spoil); 11] = [
            ("model.patch_size = 3: must divide input_size = 32", |c| c.patch_size = 3),
            ("model.num_heads = 5: must divide hidden_size = 384", |c| c.num_heads = 5),
            ("model.hidden_size = 6:", |c| (c.hidden_size, c.num_heads) = (6, 3)),
            ("model.encoder_depth = 13: must not exceed depth = 12", |c| c.encoder_depth = 13),
            ("model.encoder_depth = 0:", |c| c.encoder_depth = 0),
            ("model.input_size = 0:", |c| c.input_size = 0),
            ("model.patch_size = 0:", |c| c.patch_size = 0),
            ("model.depth = 1000000:", |c| c.depth = 1_000_000),
            ("model.z_dims = [768, 0]:", |c| c.z_dims = vec![768, 0]),
            ("model.mlp_ratio = NaN:", |c| c.mlp_ratio = f64::NAN),
            ("model.mlp_ratio = 0.001:", |c| c.mlp_ratio = 0.001),
        ];
        for (expected, spoil) in cases {
            let mut config = SitConfig::preset("SiT-S/2").unwrap();
            spoil(&mut config);
            let message = config.validate().unwrap_err().to_string();
            assert!(message.starts_with(expected), "{message:?}, expected {expected:?}");
        }
    }

    /// The order in the reference's checkpoints (tests/golden/reference-checkpoint.pt), where the
    /// optimizer's integer keys count it; queries' and keys' norms stand where timm makes them.
    #[test]
    fn parameters_come_in_the_reference_order() {
        let config = SitConfig {
            depth: 1,
            encoder_depth: 1,
            z_dims: vec![12, 16],
            qk_norm: true,
            ..SitConfig::preset("SiT-S/8").unwrap()
        };
        let layout = config.layout();
        let names: Vec<&str> = layout.entries().iter().map(|e| e.name.as_str()).collect();
        let expected = "pos_embed x_embedder.proj.weight x_embedder.proj.bias t_embedder.mlp.0.weight \
            t_embedder.mlp.0.bias t_embedder.mlp.2.weight t_embedder.mlp.2.bias \
            y_embedder.embedding_table.weight blocks.0.attn.qkv.weight blocks.0.attn.qkv.bias \
            blocks.0.attn.q_norm.weight blocks.0.attn.q_norm.bias blocks.0.attn.k_norm.weight \
            blocks.0.attn.k_norm.bias blocks.0.attn.proj.weight blocks.0.attn.proj.bias \
            blocks.0.mlp.fc1.weight blocks.0.mlp.fc1.bias blocks.0.mlp.fc2.weight blocks.0.mlp.fc2.bias \
            blocks.0.adaLN_modulation.1.weight blocks.0.adaLN_modulation.1.bias projectors.0.0.weight \
            projectors.0.0.bias projectors.0.2.weight projectors.0.2.bias projectors.0.4.weight \
            projectors.0.4.bias projectors.1.0.weight projectors.1.0.bias projectors.1.2.weight \
            projectors.1.2.bias projectors.1.4.weight projectors.1.4.bias final_layer.linear.weight \
            final_layer.linear.bias final_layer.adaLN_modulation.1.weight \
            final_layer.adaLN_modulation.1.bias";
        assert_eq!(names, expected.split_whitespace().collect::<Vec<_>>());
        let frozen: Vec<_> = layout.entries().iter().filter(|e| !e.trainable).map(|e| &e.name).collect();
        assert_eq!(frozen, ["pos_embed"]);
    }

    /// Mean, standard deviation and largest magnitude.
    fn moments(x: &[f32]) -> (f64, f64, f64) {
        let n = x.len() as f64;
        let mean = x.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
        let variance = x.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n;
        (mean, variance.sqrt(), x.iter().fold(0.0, |m, &v| m.max(f64::from(v.abs()))))
    }

    /// Every parameter against the distribution that the reference's `initialize_weights` gives its
    /// kind. Bounds on mean and deviation are 5 standard errors.
    #[test]
    fn first_values_follow_the_reference_distributions() {
        let config = SitConfig {
            depth: 2,
            encoder_depth: 1,
            projector_dim: 320,
            z_dims: vec![192],
            qk_norm: true,
            ..SitConfig::preset("SiT-S/2").unwrap()
        };
        let layout = config.layout();
        let flat = layout.initial_values(11);
        for entry in layout.entries().iter().filter(|e| e.trainable) {
            let values = &flat[entry.offset..entry.offset + entry.len()];
            let (name, n) = (entry.name.as_str(), entry.len() as f64);
            let (mean, std, largest) = moments(values);
            let normal =
                ["y_embedder.embedding_table.weight", "t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight"];
            if name.contains("_norm.") {
                let expected = if name.ends_with("weight") { 1.0 } else { 0.0 };
                assert!(values.iter().all(|&v| v == expected), "{name}");
            } else if name.ends_with("bias") || name.contains("adaLN") || name.starts_with("final_layer") {
                assert_eq!(largest, 0.0, "{name}");
            } else if normal.contains(&name) {
                assert!(mean.abs() < 5.0 * 0.02 / n.sqrt(), "{name}: mean {mean}");
                assert!((std / 0.02 - 1.0).abs() < 5.0 / (2.0 * n).sqrt(), "{name}: deviation {std}");
                assert!(largest > 3.0 * 0.02 && largest < 7.0 * 0.02, "{name}: largest {largest}");
            } else {
                let fans = entry.shape[0] + entry.shape[1..].iter().product::<usize>();
                let bound = (6.0 / fans as f64).sqrt();
                let expected = bound / 3f64.sqrt();
                assert!(mean.abs() < 5.0 * expected / n.sqrt(), "{name}: mean {mean}");
                // A uniform variable's squared deviation has relative variance 4/5.
                let error = 5.0 * (0.2 / n).sqrt();
                assert!((std / expected - 1.0).abs() < error, "{name}: deviation {std}, not {expected}");
                let slack = 20.0 / n;
                assert!(
                    largest <= bound * (1.0 + 1e-6) && largest > bound * (1.0 - slack),
                    "{name}: {largest}"
                );
            }
        }
    }

    #[test]
    fn first_values_follow_from_the_seed_and_differ_between_parameters() {
        let config = SitConfig { depth: 2, ..SitConfig::preset("SiT-S/8").unwrap() };
        let layout = SitConfig { encoder_depth: 1, z_dims: vec![], ..config }.layout();
        let flat = layout.initial_values(3);
        assert_eq!(flat, layout.initial_values(3));
        assert_ne!(flat, layout.initial_values(4));
        let part = |name: &str| {
            let entry = layout.find(name).unwrap();
            &flat[entry.offset..entry.offset + entry.len()]
        };
        assert_ne!(part("blocks.0.attn.qkv.weight"), part("blocks.1.attn.qkv.weight"));
    }
}
