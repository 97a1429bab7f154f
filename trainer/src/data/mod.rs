//! What training reads: which sample when (order) and on which rank (batch), its random numbers
//! (draws), where its latents, labels and features lie (store), how they get to the training thread
//! (loader), and how they come to be there: from images (encode) or other people's files (import), both
//! through one engine (build) that reads what they name (source).

pub mod batch;
pub mod bench;
pub mod build;
pub mod draws;
pub mod emoji;
pub mod encode;
pub mod import;
pub mod loader;
pub mod order;
pub mod source;
pub mod stage;
pub mod store;

use std::path::Path;

use build::BuildError;
use import::RepaTree;
use store::{INDEX_FILE, LatentStore, StoreError};

/// Opens what training reads at `dir`: a latent store, or REPA's layout in place.
///
/// # Errors
/// There is neither, or it is not sound.
pub fn open(dir: &Path) -> Result<LatentStore, StoreError> {
    if dir.as_os_str().is_empty() {
        // Not the current folder: nobody has named any data.
        return Err(StoreError::Missing { dir: dir.to_owned() });
    }
    if dir.join(INDEX_FILE).exists() || !RepaTree::is_at(dir) {
        return LatentStore::open(dir);
    }
    RepaTree::in_place(dir).map_err(|error| match error {
        BuildError::Store(error) => error,
        BuildError::Layout { path, problem } => StoreError::Layout { path, problem },
        other => StoreError::Layout { path: dir.to_owned(), problem: other.to_string() },
    })
}
