//! The latent store: what training reads, in a folder of safetensors shards and one `index.json`.
//!
//! A shard stacks its samples: `moments` (mean ‖ std, [N, 2C, h, w]) or `latents` ([N, C, h, w]) in
//! float32 or float16, `labels` [N], `digests` [N] (xxh3 of each sample), on request
//! `features.<encoder>` [N, T, D] in float16, and encoded images: `images` holds their bytes one
//! after another, `image_ends` [N] where each ends. One sample of one tensor is therefore one
//! contiguous range, read with pread. The index says what the numbers are (autoencoder,
//! normalisation, std or logvar, classes, encoders) and lists the shards with their sizes and digests.
//!
//! A store is whole or absent: it grows in `<dir>.partial`, shard by shard, and is renamed to
//! `<dir>` once all shards and the index are on disk.

#[cfg(target_endian = "big")]
compile_error!("the latent store is read without byte swapping: little-endian hosts only");

mod error;
mod index;
mod reader;
mod shard;
mod sparse;
#[cfg(test)]
mod tests;
mod verify;
mod writer;

pub use error::StoreError;
pub use index::{
    EncoderSpec, Expected, Index, Kind, Normalisation, Precision, ShardEntry, Spread, Statistics, StoreSpec,
};
pub use reader::LatentStore;
pub(super) use sparse::write_sparse;
pub use verify::{Finding, VerifyReport};
pub(super) use writer::partial_dir;
pub use writer::{Sample, ShardWriter, StoreWriter};

/// Name of the index file of a store.
pub const INDEX_FILE: &str = "index.json";
