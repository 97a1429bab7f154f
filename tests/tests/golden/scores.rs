//! `scores`: what ADM's evaluator gives for two batches of images, with Inception's weights by a formula.

use std::path::Path;

use repa_comm::Single;
use repa_tests::inception::weights;
use repa_trainer::evaluate::{Batch, Inception, Samples, score};
use repa_trainer::figures::NpzWriter;

use crate::case::{Case, device_for_much, slack};
use crate::inception::images;

/// Relative error that rounding may make in Fréchet distances and the inception score.
const TOLERANCE: f64 = 1e-4;

/// By way of files, as commands get them.
pub fn check(case: &Case) -> Result<(), String> {
    let text = |error: &dyn std::error::Error| error.to_string();
    let folder = tempfile::tempdir().map_err(|e| text(&e))?;
    let batch = |name: &str| batch(case, name, &folder.path().join(name));
    let (reference, samples) = (batch("reference")?, batch("samples")?);
    let inception = Inception::from_weights(weights(), &device_for_much()).map_err(|e| text(&e))?;
    let comm = Single::new();
    let scores = score(&comm, &inception, &reference, &Samples::Stored(&samples), |_| {})
        .map_err(|e| text(&e))?
        .ok_or("rank 0 has no scores")?;
    let close = |what: &str, ours: Option<f64>, tolerance: f64| {
        let (ours, expected) = (ours.ok_or(format!("{what} is missing"))?, case.f64s(what)[0]);
        match (ours - expected).abs() <= tolerance * expected.abs() {
            true => Ok(()),
            false => Err(format!("{what} is {ours} where the reference has {expected}")),
        }
    };
    close("fid", Some(scores.fid), TOLERANCE * slack())?;
    close("sfid", scores.sfid, TOLERANCE * slack())?;
    close("inception_score", Some(scores.inception_score), TOLERANCE * slack())?;
    // Fractions of 30 and of 40 points, of which few lie so near a border that coarser products count them otherwise.
    let fractions = if slack() > 1.0 { 0.1 } else { 1e-9 };
    close("precision", scores.precision, fractions)?;
    close("recall", scores.recall, fractions)
}

fn batch(case: &Case, name: &str, path: &Path) -> Result<Batch, String> {
    let shape = case.shape(name);
    let mut writer = NpzWriter::create(path, shape[0], shape[1], shape[2]).map_err(|e| e.to_string())?;
    images(case, name).iter().try_for_each(|image| writer.push(image)).map_err(|e| e.to_string())?;
    writer.finish().map_err(|e| e.to_string())?;
    Batch::open(path).map_err(|e| e.to_string())
}
