//! `encoder`: preprocessing and patch tokens of the families of encoders, beside `dinov2`'s.

use repa_trainer::encoder::{Family, VisionEncoder};

use crate::case::{Case, device};
use crate::compare::close_relative;
use crate::dinov2::{images, values};

const TOLERANCE: f64 = 1e-5;

/// Reads the case's weights as the family's published file and compares the input and the tokens.
pub fn check(case: &Case) -> Result<(), String> {
    let mut weights = case.weights.under("weights");
    weights.metadata.insert("num_heads".to_owned(), case.usize("num_heads", 0).to_string());
    let name = case.str("family", "");
    let family = Family::named(name).ok_or_else(|| format!("no family is called {name:?}"))?;
    let encoder =
        VisionEncoder::from_weights(&weights, Some(family), &device()).map_err(|e| e.to_string())?;
    let images = images(case)?;
    let preprocessed = encoder.preprocess(images.clone()).map_err(|e| e.to_string())?;
    let features = encoder.forward(images).map_err(|e| e.to_string())?;
    let compare = |what: &str, ours: Vec<f32>| close_relative(what, &ours, &case.f32s(what), TOLERANCE);
    compare("preprocessed", values(preprocessed))?;
    compare("patch_tokens", values(features.patch_tokens))
}
