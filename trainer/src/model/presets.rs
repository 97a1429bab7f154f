//! The published model sizes (SiT, table 1; encoder depths from REPA, table 5).

use super::{ModelError, SitConfig};

/// Names of all presets.
pub const PRESETS: [&str; 12] = [
    "SiT-S/2", "SiT-S/4", "SiT-S/8", "SiT-B/2", "SiT-B/4", "SiT-B/8", "SiT-L/2", "SiT-L/4", "SiT-L/8",
    "SiT-XL/2", "SiT-XL/4", "SiT-XL/8",
];

impl SitConfig {
    /// A published size by name, such as `SiT-XL/2`, for 4x32x32 latents of 1000 classes with one
    /// projector to a 768-wide encoder. Every field can be changed afterwards.
    ///
    /// # Errors
    /// [`ModelError::UnknownPreset`] for a name outside [`PRESETS`].
    pub fn preset(name: &str) -> Result<Self, ModelError> {
        let unknown = || ModelError::UnknownPreset { name: name.to_owned(), known: PRESETS.join(", ") };
        if !PRESETS.contains(&name) {
            return Err(unknown());
        }
        let (size, patch) = name.trim_start_matches("SiT-").split_once('/').ok_or_else(unknown)?;
        let (hidden_size, depth, num_heads, encoder_depth) = match size {
            "S" => (384, 12, 6, 4),
            "B" => (768, 12, 12, 4),
            "L" => (1024, 24, 16, 8),
            _ => (1152, 28, 16, 8),
        };
        Ok(Self {
            input_size: 32,
            patch_size: patch.parse().map_err(|_| unknown())?,
            in_channels: 4,
            hidden_size,
            depth,
            num_heads,
            mlp_ratio: 4.0,
            num_classes: 1000,
            encoder_depth,
            projector_dim: 2048,
            z_dims: vec![768],
            qk_norm: false,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SiT's table 1 counts trainable parameters in millions, without REPA's projectors.
    #[test]
    fn presets_have_the_published_parameter_counts() {
        let published = [("SiT-S/2", 33), ("SiT-B/2", 130), ("SiT-L/2", 458), ("SiT-XL/2", 675)];
        for (name, millions) in published {
            let config = SitConfig { z_dims: vec![], ..SitConfig::preset(name).unwrap() };
            let count = config.layout().trainable_len() as f64;
            assert_eq!((count / 1e6).round() as i64, millions, "{name}: {count}");
        }
    }

    /// DiT's and SiT's training logs print 675,129,632 for XL/2, position embedding included, with a
    /// last layer of twice as many channels (it predicts a variance too).
    #[test]
    fn the_largest_preset_has_the_logged_number_of_parameters() {
        let config = SitConfig { z_dims: vec![], ..SitConfig::preset("SiT-XL/2").unwrap() };
        let variance = (config.hidden_size + 1) * 16;
        assert_eq!(config.layout().total_len() + variance, 675_129_632);
    }

    #[test]
    fn all_presets_are_valid_and_count_the_right_tokens() {
        for name in PRESETS {
            let config = SitConfig::preset(name).unwrap();
            config.validate().unwrap();
            assert_eq!(config.tokens(), (32 / config.patch_size).pow(2), "{name}");
            assert!(name.ends_with(&format!("/{}", config.patch_size)), "{name}");
        }
    }

    #[test]
    fn an_unknown_preset_names_the_known_ones() {
        for name in ["SiT-M/2", "SiT-XL/3", "SiT-XL", "", "XL/2", "SiT-/2"] {
            let message = SitConfig::preset(name).unwrap_err().to_string();
            assert!(message.contains("SiT-XL/2") && message.contains(name), "{message}");
        }
    }
}
