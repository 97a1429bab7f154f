//! What a run tells the world: Prometheus metrics, a progress bar, the run's log and its events.

pub mod events;
pub mod exporter;
mod host;
pub mod names;
mod node;
pub mod progress;
pub(crate) mod push;
pub mod record;
mod server;
pub mod tensorboard;

use std::sync::atomic::{AtomicU64, Ordering};

/// No step goes on.
const NO_STEP: u64 = u64::MAX;

static STEP: AtomicU64 = AtomicU64::new(NO_STEP);

/// The training step that this process is in, for its log.
pub fn step() -> Option<u64> {
    let step = STEP.load(Ordering::Relaxed);
    (step != NO_STEP).then_some(step)
}

/// A training step begins.
pub(crate) fn set_step(step: u64) {
    STEP.store(step, Ordering::Relaxed);
}
