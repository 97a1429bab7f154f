//! The optimizer on flat float32 arrays, in memory or on a device: AdamW, clipping by global norm and EMA, each over whole
//! parameters or over one rank's shard of them. Work is split into chunks of a fixed size, so the
//! number of threads changes no bit.

mod adamw;
mod ema;
mod norm;

pub use adamw::AdamW;
pub use ema::{ema_update, ema_update_on_device};
pub use norm::{clip_coefficient, global_norm, squared_norm, squared_norm_of};

/// Elements that one task works on: a few of these arrays fit a core's second-level cache.
pub(crate) const CHUNK: usize = 1 << 14;
