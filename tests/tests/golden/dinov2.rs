//! `dinov2`: preprocessing, position-embedding resampling, and the tokens after the final norm.

use repa_trainer::Tensor;
use repa_trainer::encoder::VisionEncoder;

use crate::case::{Case, device};
use crate::compare::close_relative;

const TOLERANCE: f64 = 1e-5;

/// Reads the case's weights as an official file and compares every stage.
pub fn check(case: &Case) -> Result<(), String> {
    let mut weights = case.weights.under("official");
    // Heads do not show in the tensors' shapes; the case's are not 64 wide.
    weights.metadata.insert("num_heads".to_owned(), case.usize("num_heads", 0).to_string());
    let encoder = VisionEncoder::from_weights(&weights, None, &device()).map_err(|e| e.to_string())?;

    let config = encoder.config();
    for (what, ours, expected) in [
        ("depth", config.depth, case.usize("depth", 0)),
        ("embed_dim", config.embed_dim, case.usize("embed_dim", 0)),
        ("patch_size", config.patch_size, case.usize("patch_size", 0)),
        ("registers", config.registers, case.usize("registers", 0)),
    ] {
        if ours != expected {
            return Err(format!("{what} read as {ours} where the case has {expected}"));
        }
    }
    let raw = case.usize("raw_resolution", 0);
    let grid = encoder.grid(raw).map_err(|e| e.to_string())?;
    let input = case.usize("input_resolution", 0);
    if grid != (input / config.patch_size, input / config.patch_size) {
        return Err(format!("{grid:?} tokens for an input of {input} pixels"));
    }

    let images = images(case)?;
    let preprocessed = encoder.preprocess(images.clone()).map_err(|e| e.to_string())?;
    let features = encoder.forward(images).map_err(|e| e.to_string())?;
    let compare = |what: &str, ours: Vec<f32>| close_relative(what, &ours, &case.f32s(what), TOLERANCE);
    compare("preprocessed", values(preprocessed))?;
    compare("resampled_pos_embed", values(encoder.positions([grid.0, grid.1])))?;
    compare("patch_tokens", values(features.patch_tokens))?;
    compare("cls", values(features.cls.ok_or("there is no class token")?))
}

/// The case's `image` [N, 3, R, R], values 0..255.
pub fn images(case: &Case) -> Result<Tensor<4>, String> {
    let pixels: Vec<f32> = case.u8s("image").iter().map(|&p| f32::from(p)).collect();
    let shape: [usize; 4] = case.shape("image").try_into().map_err(|_| "image is not [N, 3, R, R]")?;
    Ok(Tensor::<1>::from_data(pixels.as_slice(), &device()).reshape(shape))
}

/// A tensor's elements.
pub fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().convert::<f32>().try_to_vec().expect("converted to f32 above")
}
