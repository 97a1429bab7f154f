//! What a step does once the gradients are summed: their norm, the decision of all ranks, and the move.

use std::time::{Duration, Instant};

use repa_comm::{CommError, Communicator, ReduceOp};

use super::State;
use super::buckets::Gradients;
use super::saver;
use super::state::Skipped;
use crate::config::Config;
use crate::optim::squared_norm_of;

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

/// Adds up every rank's control word, and gives the gradients' global norm with it, without the loss scale. The
/// step's one small collective.
///
/// # Errors
/// The ranks could not talk.
pub(super) fn agree(
    mine: Control,
    gradients: &Gradients,
    scale: f32,
    comm: &dyn Communicator,
) -> Result<(Control, f64), CommError> {
    // Where all ranks have all sums, one of them is enough, and no order of additions differs from a single rank's.
    let counts = gradients.sharded() || comm.rank() == 0;
    let squared = if counts { squared_norm_of(gradients.pieces().map(|(_, values)| values)) } else { 0.0 };
    let Control { denoising, alignment, stop, save, saving } = mine;
    let mut word = [denoising, alignment, stop, save, saving.done, saving.failed, squared];
    comm.all_reduce_f64(&mut word, ReduceOp::Sum)?;
    let [denoising, alignment, stop, save, done, failed, squared] = word;
    let saving = saver::Word { done, failed };
    Ok((Control { denoising, alignment, stop, save, saving }, squared.sqrt() / f64::from(scale)))
}

/// Takes the step by gradients of this norm, or leaves it out. The second value is how long the rank waited for
/// other ranks' weights.
///
/// # Errors
/// The ranks could not talk.
pub(super) fn step(
    state: &mut State,
    gradients: &mut Gradients,
    norm: f64,
    config: &Config,
    comm: &dyn Communicator,
) -> Result<(Option<Skipped>, Duration), CommError> {
    let update = match state.begin(config, norm) {
        Ok(update) => update,
        Err(skipped) => return Ok((Some(skipped), Duration::ZERO)),
    };
    let travelling = gradients.apply(&update, state, comm);
    state.average(&update);
    let waiting = Instant::now();
    gradients.complete(travelling, &mut state.params)?;
    Ok((None, waiting.elapsed()))
}
