//! What the ranks tell each other in every step.

use repa_comm::{CommError, Communicator, ReduceOp};

use super::saver;

/// The step's control word: what every rank tells, and sums over the ranks once they have agreed.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Control {
    /// Losses of the samples.
    pub(super) denoising: f64,
    /// As above.
    pub(super) alignment: f64,
    /// Ranks that were asked to stop.
    pub(super) stop: f64,
    /// Ranks that were asked to save.
    pub(super) save: f64,
    /// How the save that goes on stands.
    pub(super) saving: saver::Word,
}

/// Adds up every rank's control word, and gives the gradients' global norm with it, without the loss scale; `squared`
/// is the rank's part of its square. The step's one small collective.
///
/// # Errors
/// The ranks could not talk.
pub(super) fn agree(
    mine: Control,
    squared: f64,
    scale: f32,
    comm: &dyn Communicator,
) -> Result<(Control, f64), CommError> {
    let Control { denoising, alignment, stop, save, saving } = mine;
    let mut word = [denoising, alignment, stop, save, saving.done, saving.failed, squared];
    comm.all_reduce_f64(&mut word, ReduceOp::Sum)?;
    let [denoising, alignment, stop, save, done, failed, squared] = word;
    let saving = saver::Word { done, failed };
    Ok((Control { denoising, alignment, stop, save, saving }, squared.sqrt() / f64::from(scale)))
}
