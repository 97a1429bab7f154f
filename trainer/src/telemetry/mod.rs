//! What a run tells the world: Prometheus metrics, a progress bar, and the run's log.

pub mod exporter;
mod host;
pub mod names;
pub mod progress;
pub mod record;
