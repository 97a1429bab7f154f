//! The fixed position embedding.

use repa_trainer::model::sincos_2d;

use crate::case::Case;
use crate::compare::close_relative;

/// Compares the rows that the case keeps.
pub fn check(case: &Case) -> Result<(), String> {
    let hidden = case.usize("hidden_size", 1152);
    let ours: Vec<f32> = sincos_2d(hidden, case.usize("grid", 16))
        .chunks(hidden)
        .step_by(case.usize("row_step", 1))
        .flatten()
        .copied()
        .collect();
    close_relative("pos_embed", &ours, &case.f32s("pos_embed"), 1e-6)
}
