//! Other people's data sets, into a store, on all ranks.

mod lightning;
mod repa;
#[cfg(test)]
mod tests;

use std::path::Path;

use repa_comm::{Communicator, RemoteError};
use serde::Serialize;

pub use lightning::LightningFolder;
pub use repa::RepaTree;

use super::build::{BuildError, BuildOptions, BuildProgress, Built, Made, Source, agree, build};
use super::store::{Precision, StoreSpec};

/// Endings of the images that are read.
pub(super) const IMAGES: &[&str] = &["png", "jpg", "jpeg"];

/// Files read at once: enough for all cores, few enough to stay in the cache until they are written.
const CHUNK: usize = 64;

/// The layouts that are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// REPA's and EDM2's: [`RepaTree`].
    Repa,
    /// LightningDiT's: [`LightningFolder`].
    Lightning,
}

/// What is to be made of a data set.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ImportOptions {
    /// The layout; `None`: whichever is recognised.
    pub layout: Option<Layout>,
    /// Which autoencoder made the latents; `None`: the layout's usual one.
    pub autoencoder: Option<String>,
    /// Whether the second half of moments are log variances, not standard deviations.
    pub logvar: bool,
    /// Scale of all latent channels; `None`: 0.18215 for REPA's layout, 1 for LightningDiT's, whose latents
    /// are brought to mean 0 and variance 1 first.
    pub scale: Option<f32>,
    /// Pixels of the images per latent pixel, along a side; `None`: 8 for REPA's layout, 16 for LightningDiT's.
    pub downsample: Option<usize>,
    /// Number of classes; `None`: one more than the greatest label.
    pub classes: Option<usize>,
    /// Whether to keep the images.
    pub images: bool,
    /// How latents are stored.
    pub precision: Precision,
    /// Samples of a shard; 0: as many as make about 1 GiB.
    pub shard_len: usize,
    /// How many members may be bad and left out.
    pub max_bad: usize,
}

/// What a data set has that does not come into the store.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct ImportReport {
    /// Files of latents that dataset.json does not list.
    pub unlisted: Vec<String>,
    /// Images without listed latents; looked for where images are kept.
    pub images_without_latents: Vec<String>,
}

/// Imports the data set at `root` into a store at `dir`, on all ranks; `progress` hears how far it is, on
/// rank 0. The report is rank 0's.
///
/// # Errors
/// The first rank's [`BuildError`]; see [`build`].
pub fn import(
    comm: &dyn Communicator,
    root: &Path,
    dir: &Path,
    options: &ImportOptions,
    progress: &mut dyn FnMut(BuildProgress),
) -> Result<(Built, ImportReport), RemoteError> {
    match agree(comm, layout(root, options))? {
        Layout::Repa => {
            let tree = agree(comm, RepaTree::open(root, options))?;
            let built = run(comm, &tree, tree.spec(), dir, options, progress)?;
            let report = if comm.rank() == 0 { tree.report() } else { Ok(ImportReport::default()) };
            Ok((built, agree(comm, report)?))
        }
        Layout::Lightning => {
            let folder = agree(comm, LightningFolder::open(root, options))?;
            let built = run(comm, &folder, folder.spec(), dir, options, progress)?;
            Ok((built, ImportReport::default()))
        }
    }
}

fn run<S: Source<Raw = Made>>(
    comm: &dyn Communicator,
    source: &S,
    spec: &StoreSpec,
    dir: &Path,
    options: &ImportOptions,
    progress: &mut dyn FnMut(BuildProgress),
) -> Result<Built, RemoteError> {
    let options = BuildOptions { batch: CHUNK, shard_len: options.shard_len, max_bad: options.max_bad };
    build(comm, source, dir, spec, &options, &Ok, progress)
}

fn layout(root: &Path, options: &ImportOptions) -> Result<Layout, BuildError> {
    if let Some(layout) = options.layout {
        return Ok(layout);
    }
    if RepaTree::is_at(root) {
        Ok(Layout::Repa)
    } else if LightningFolder::is_at(root) {
        Ok(Layout::Lightning)
    } else {
        Err(BuildError::Layout {
            path: root.to_owned(),
            problem:
                "holds neither REPA's layout (vae-sd/ or vae-sd.zip, with dataset.json) nor LightningDiT's \
                      (*.safetensors): name the folder above vae-sd/, or make a store from images with \
                      `repa-dist data encode`"
                    .to_owned(),
        })
    }
}
