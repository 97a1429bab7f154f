//! The quickstart's data: emoji through the project's own autoencoder and teacher into a latent
//! store.

use std::path::Path;

use burn::tensor::Tensor;
use half::f16;

use crate::Device;
use crate::autoencoder::{self, Autoencoder};
use crate::data::emoji::{self, Emoji};
use crate::data::encode::{EncodeOptions, Encoded, ImageSource, encode};
use crate::data::store::{EncoderSpec, Kind, Precision, Spread, StoreSpec};
use crate::encoder::{self, VisionEncoder};
use crate::images::{self, Image};

/// Images that go through the two models at once.
const BATCH: usize = 32;

/// Images of a shard; small, so that a run that is cut short goes on where it was.
const SHARD: usize = 512;

struct EmojiSource(Vec<Emoji>);

impl ImageSource for EmojiSource {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn get(&self, i: usize) -> Result<(Image, u32), String> {
        Ok((self.0[i].image(), self.0[i].label as u32))
    }
}

/// Makes the store at `out` and gives the number of samples. `progress` is told how many images of
/// how many are done. A call that was cut short is gone on with.
///
/// # Errors
/// A message for people: the store cannot be written, or one of the models fails.
pub fn make_data(out: &Path, device: &Device, progress: &mut dyn FnMut(usize, usize)) -> Result<u64, String> {
    let autoencoder = autoencoder::quickstart(device);
    let teacher = encoder::quickstart(device);
    let spec = spec(&autoencoder, &teacher);
    let models = |batch: &[Image]| -> Result<Encoded, String> {
        let features = teacher.features(batch).map_err(|e| e.to_string())?;
        Ok(Encoded {
            latents: values(autoencoder.encode(images::to_tensor(batch, device))),
            features: vec![values(features.patch_tokens).into_iter().map(f16::from_f32).collect()],
        })
    };
    let options = EncodeOptions { batch: BATCH, shard_len: SHARD, ..EncodeOptions::default() };
    let source = EmojiSource(emoji::all());
    let (index, _) = encode(&source, out, spec, &options, &models, &mut |p| progress(p.done, p.total))
        .map_err(|e| e.to_string())?;
    Ok(index.samples)
}

fn spec(autoencoder: &Autoencoder, teacher: &VisionEncoder) -> StoreSpec {
    let info = autoencoder.info();
    let side = emoji::RESOLUTION / info.downsample;
    let (rows, columns) = teacher.tokens(emoji::RESOLUTION);
    StoreSpec {
        kind: Kind::Latents,
        spread: Spread::Std,
        precision: Precision::F32,
        channels: info.channels,
        height: side,
        width: side,
        resolution: emoji::RESOLUTION,
        autoencoder: info.id.clone(),
        normalisation: None,
        classes: emoji::CLASSES.len(),
        class_names: emoji::CLASSES.iter().map(|&name| name.to_owned()).collect(),
        encoders: vec![EncoderSpec {
            id: "quickstart-teacher".into(),
            tokens: rows * columns,
            dim: teacher.embed_dim(),
        }],
        images: false,
        source: "Twemoji 72 x 72 PNG, on white, resized to 64 x 64; CC-BY 4.0".into(),
    }
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().convert::<f32>().try_to_vec().expect("converted to f32 just now")
}
