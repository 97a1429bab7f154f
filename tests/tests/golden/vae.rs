//! diffusers' AutoencoderKL: moments and decoded images.

use repa_trainer::autoencoder::kl::{AutoencoderKl, KlConfig};

use crate::case::{Case, device};
use crate::compare::close_relative;

/// Checks one case.
pub fn check(case: &Case) -> Result<(), String> {
    let device = device();
    let weights = case.weights.under("weights");
    let config = KlConfig::from_json(&case.path, &case.config.to_string()).map_err(|e| e.to_string())?;
    let model = AutoencoderKl::from_weights(&config, &weights, &device).map_err(|e| e.to_string())?;
    let image = super::taesd::image(case, &device) * 2.0 - 1.0;
    let floats = |t: repa_trainer::Tensor<4>| t.into_data().try_to_vec::<f32>().expect("float32");
    let moments = floats(model.encode(image));
    close_relative("moments", &moments, &case.f32s("moments"), 1e-5)?;
    let decoded = floats(model.decode(case.tensor("latent", &device)));
    close_relative("decoded", &decoded, &case.f32s("decoded"), 1e-5)
}
