//! Comparisons that say what differed.

use crate::case::slack;

/// Euclidean norm.
pub fn norm(x: &[f32]) -> f64 {
    x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt()
}

/// Norm of the difference.
pub fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len(), "lengths differ");
    a.iter().zip(b).map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2)).sum::<f64>().sqrt()
}

/// Fails unless |ours - expected| <= tolerance * scale, as norms; on a GPU the tolerance is wider
/// (see [`slack`]).
pub fn close(what: &str, ours: &[f32], expected: &[f32], tolerance: f64, scale: f64) -> Result<(), String> {
    if ours.len() != expected.len() {
        return Err(format!("{what}: {} elements where the reference has {}", ours.len(), expected.len()));
    }
    let d = distance(ours, expected);
    let tolerance = tolerance * slack();
    // Not `d > ...`: a NaN must fail.
    if d <= tolerance * scale {
        Ok(())
    } else {
        Err(format!("{what}: off by {d:.3e}, allowed {:.3e}", tolerance * scale))
    }
}

/// Fails unless the relative error, by norm, is within the tolerance.
pub fn close_relative(what: &str, ours: &[f32], expected: &[f32], tolerance: f64) -> Result<(), String> {
    close(what, ours, expected, tolerance, norm(expected))
}
