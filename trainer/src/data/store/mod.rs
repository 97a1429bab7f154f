//! The latent store: what training reads, in a folder of safetensors shards and one `index.json`.
//!
//! A shard stacks its samples: `moments` (mean ‖ std, [N, 2C, h, w]) or `latents` ([N, C, h, w]) in
//! float32 or float16, `labels` [N], `digests` [N] (xxh3 of each sample), on request
//! `features.<encoder>` [N, T, D] in float16, and encoded images: `images` holds their bytes one
//! after another, `image_ends` [N] where each ends. A store may keep the arrays of the mirrored image
//! as well, under the same names with `_flipped`. One sample of one tensor is one contiguous range,
//! read with pread. The index says what the numbers are (autoencoder,
//! normalisation, std or logvar, classes, encoders) and lists the shards with their sizes and digests.
//!
//! A store is whole or absent: it grows in `<dir>.partial`, shard by shard, and is renamed to
//! `<dir>` once all shards and the index are on disk.

#[cfg(target_endian = "big")]
compile_error!("the latent store is read without byte swapping: little-endian hosts only");

mod check;
mod error;
mod index;
mod reader;
mod shard;
mod shard_writer;
mod sparse;
#[cfg(test)]
mod tests;
mod verify;
mod writer;

pub use check::{Checked, Sample, View};
pub use error::StoreError;
pub use index::{
    EncoderSpec, Expected, Index, Kind, Normalisation, Precision, ShardEntry, Spread, Statistics, StoreSpec,
};
pub(super) use reader::Foreign;
pub use reader::LatentStore;
pub use shard_writer::ShardWriter;
pub(super) use sparse::write_sparse;
pub use verify::{Finding, VerifyReport};
pub use writer::{Finished, LeftOut, ShardPlan, StoreWriter};
pub(super) use writer::{partial_dir, sync_dir};

/// Name of the index file of a store.
pub const INDEX_FILE: &str = "index.json";

/// Name of the file of a store that lists members of its source that are not in it; absent where all are.
pub const LEFT_OUT_FILE: &str = "left-out.json";
