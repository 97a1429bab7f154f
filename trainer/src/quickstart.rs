//! The quickstart's data: emoji through the project's own autoencoder and teacher into a latent
//! store.

use std::path::Path;

use repa_comm::{Communicator, RemoteError};

use crate::Device;
use crate::autoencoder;
use crate::data::build::{BuildOptions, BuildProgress, Fault, agree};
use crate::data::emoji::{self, Emoji};
use crate::data::encode::{Models, encode};
use crate::data::source::images::{ImageSource, Picture};
use crate::data::store::StoreSpec;
use crate::encoder;

/// Images that go through the two models at once.
const BATCH: usize = 32;

/// Images of a shard; small, so that a run that is cut short goes on where it was.
const SHARD: usize = 512;

struct EmojiSource(Vec<Emoji>);

impl ImageSource for EmojiSource {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn name(&self, i: usize) -> String {
        self.0[i].name.to_owned()
    }

    fn get(&self, i: usize) -> Result<Picture, Fault> {
        Ok(Picture { image: self.0[i].image(), label: self.0[i].label as u32, encoded: None, latent: None })
    }
}

/// Makes the store at `out`, on all ranks, and gives the number of samples. `images` keeps the images as
/// well. A call that was cut short is gone on with.
///
/// # Errors
/// The store cannot be written, or one of the models fails.
pub fn make_data(
    comm: &dyn Communicator,
    out: &Path,
    images: bool,
    device: &Device,
    progress: &mut dyn FnMut(BuildProgress),
) -> Result<u64, RemoteError> {
    let models = Models {
        autoencoder: Some(autoencoder::quickstart(device)),
        encoders: vec![encoder::quickstart(device)],
        device: device.clone(),
    };
    let spec = models
        .complete(spec(images))
        // Measured: the quickstart's autoencoder has no usual scale.
        .map(|spec| StoreSpec { normalisation: None, ..spec });
    let spec = agree(comm, spec)?;
    let options = BuildOptions { batch: BATCH, shard_len: SHARD, max_bad: 0 };
    let source = EmojiSource(emoji::all());
    let built = encode(comm, &source, out, &spec, &options, &|batch| models.run(batch), progress)?;
    Ok(built.index.samples)
}

/// What is known before the models are asked.
fn spec(images: bool) -> StoreSpec {
    StoreSpec {
        class_names: emoji::CLASSES.iter().map(|&name| name.to_owned()).collect(),
        images,
        source: "Twemoji 72 x 72 PNG, on white, resized to 64 x 64; CC-BY 4.0".into(),
        ..StoreSpec::of_images(emoji::RESOLUTION, emoji::CLASSES.len())
    }
}
