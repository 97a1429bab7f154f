//! Fréchet distance of two sets of features.

use repa_trainer::evaluate::frechet_distance;

use crate::case::Case;

/// Relative error that rounding may make.
const TOLERANCE: f64 = 1e-5;

pub fn check(case: &Case) -> Result<(), String> {
    let dimensions = case.shape("a")[1];
    let ours = frechet_distance(&case.f64s("a"), &case.f64s("b"), dimensions).map_err(|e| e.to_string())?;
    let expected = case.f64s("distance")[0];
    if (ours - expected).abs() <= TOLERANCE * expected.abs() {
        Ok(())
    } else {
        Err(format!("distance {ours}, expected {expected}"))
    }
}
