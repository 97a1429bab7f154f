//! From images to a store: decode, run the frozen models, write.

use std::io::Cursor;

use burn::tensor::Tensor;
use half::f16;
use repa_comm::{Communicator, RemoteError};

use super::build::{BuildError, BuildOptions, BuildProgress, Built, Fault, Made, MadeView, Source, build};
use super::source::images::{ImageSource, Picture};
use super::store::{EncoderSpec, Kind, Normalisation, Spread, StoreSpec};
use crate::Device;
use crate::autoencoder::{self, Autoencoder};
use crate::encoder::VisionEncoder;
use crate::images::{self, Image};

/// What the models make of N images.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Encoded {
    /// Moments or latents, as the spec says, [N, 2C or C, h, w]; `None`: the source's own are kept.
    pub latents: Option<Vec<f32>>,
    /// Features by encoder; [N, tokens, dim] each.
    pub features: Vec<Vec<f16>>,
}

/// The models: images in, latents and features out.
pub type EncodeFn<'a> = dyn Fn(&[Image]) -> Result<Encoded, String> + 'a;

/// The frozen models of an encoding.
#[derive(Debug)]
pub struct Models {
    /// Makes the latents; `None` keeps those of the source.
    pub autoencoder: Option<Autoencoder>,
    /// Make the features.
    pub encoders: Vec<VisionEncoder>,
    /// Where they run.
    pub device: Device,
}

impl Models {
    /// `spec` with what these models make of images of its resolution.
    ///
    /// # Errors
    /// [`BuildError::Unfit`]: a model does not take images of this resolution, or flipped copies are asked
    /// for that only an autoencoder can make.
    pub fn complete(&self, mut spec: StoreSpec) -> Result<StoreSpec, BuildError> {
        let unfit = |problem: String| Err(BuildError::Unfit(problem));
        if let Some(autoencoder) = &self.autoencoder {
            let info = autoencoder.info();
            if !spec.resolution.is_multiple_of(info.downsample) {
                return unfit(format!(
                    "images of {} pixels do not divide by the autoencoder's {}: choose another --resolution",
                    spec.resolution, info.downsample
                ));
            }
            spec.kind = match info.kind {
                autoencoder::Kind::Moments => Kind::Moments,
                autoencoder::Kind::Latents => Kind::Latents,
            };
            spec.channels = info.channels;
            spec.height = spec.resolution / info.downsample;
            spec.width = spec.height;
            spec.autoencoder.clone_from(&info.id);
            // A scale of 1 says nothing about the latents: they are measured then.
            let given = info.scale.iter().any(|&s| s != 1.0) || info.shift.iter().any(|&s| s != 0.0);
            spec.normalisation =
                given.then(|| Normalisation { shift: info.shift.clone(), scale: info.scale.clone() });
        } else if spec.flips {
            return unfit(
                "--flips needs --autoencoder: mirrored images have latents of their own".to_owned(),
            );
        }
        // Whatever the source's are, they come as standard deviations.
        spec.spread = Spread::Std;
        spec.encoders = Vec::new();
        for encoder in &self.encoders {
            let (rows, columns) =
                encoder.grid(spec.resolution).map_err(|e| BuildError::Unfit(e.to_string()))?;
            let (id, dim) = (encoder.id().to_owned(), encoder.embed_dim());
            spec.encoders.push(EncoderSpec { id, tokens: rows * columns, dim });
        }
        Ok(spec)
    }

    /// Latents and features of images of one size.
    ///
    /// # Errors
    /// An encoder does not take them.
    pub fn run(&self, batch: &[Image]) -> Result<Encoded, String> {
        let latents =
            self.autoencoder.as_ref().map(|a| values(a.encode(images::to_tensor(batch, &self.device))));
        let features = self
            .encoders
            .iter()
            .map(|encoder| {
                let features = encoder.features(batch).map_err(|e| e.to_string())?;
                Ok(values(features.patch_tokens).into_iter().map(f16::from_f32).collect())
            })
            .collect::<Result<_, String>>()?;
        crate::gpu_failure::has_worked();
        Ok(Encoded { latents, features })
    }
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().convert::<f32>().try_to_vec().expect("converted to f32 just now")
}

/// Makes the store at `dir` from images, on all ranks; `progress` hears how far it is, on rank 0.
///
/// # Errors
/// The first rank's [`BuildError`]; see [`build`].
pub fn encode(
    comm: &dyn Communicator,
    source: &(impl ImageSource + ?Sized),
    dir: &std::path::Path,
    spec: &StoreSpec,
    options: &BuildOptions,
    models: &EncodeFn,
    progress: &mut dyn FnMut(BuildProgress),
) -> Result<Built, RemoteError> {
    let make = |pictures: Vec<Picture>| make(spec, models, pictures);
    build(comm, &Pictures { source, spec }, dir, spec, options, &make, progress)
}

/// Images as a [`Source`]: of the right size, and with the bytes that are stored where they are.
struct Pictures<'a, S: ?Sized> {
    source: &'a S,
    spec: &'a StoreSpec,
}

impl<S: ImageSource + ?Sized> Source for Pictures<'_, S> {
    type Raw = Picture;

    fn len(&self) -> usize {
        self.source.len()
    }

    fn name(&self, i: usize) -> String {
        self.source.name(i)
    }

    fn load(&self, i: usize) -> Result<Picture, Fault> {
        let mut picture = self.source.get(i)?;
        let (image, side) = (&picture.image, self.spec.resolution);
        if (image.width, image.height) != (side, side) || image.pixels.len() != side * side * 3 {
            return Err(
                format!("is {}x{} pixels where {side}x{side} belong", image.width, image.height).into()
            );
        }
        if !self.spec.images {
            picture.encoded = None;
        } else if picture.encoded.is_none() {
            picture.encoded = Some(png(&picture.image));
        }
        Ok(picture)
    }
}

fn make(spec: &StoreSpec, models: &EncodeFn, pictures: Vec<Picture>) -> Result<Vec<Made>, String> {
    let count = pictures.len();
    let run = |images: &[Image]| models(images).and_then(|encoded| check(spec, encoded, count));
    let mut images = Vec::with_capacity(count);
    let mut rest = Vec::with_capacity(count);
    for picture in pictures {
        images.push(picture.image);
        rest.push((picture.label, picture.encoded, picture.latent));
    }
    let straight = run(&images)?;
    let flipped = if spec.flips {
        images.iter_mut().for_each(Image::mirror);
        Some(run(&images)?)
    } else {
        None
    };
    rest.into_iter()
        .enumerate()
        .map(|(row, (label, encoded, latent))| {
            Ok(Made {
                label,
                view: view(spec, &straight, row, latent)?,
                flipped: flipped.as_ref().map(|f| view(spec, f, row, None)).transpose()?,
                image: encoded.unwrap_or_default(),
            })
        })
        .collect()
}

/// Row `row` of what the models gave; `latent` is the source's own.
fn view(
    spec: &StoreSpec,
    encoded: &Encoded,
    row: usize,
    latent: Option<Vec<f32>>,
) -> Result<MadeView, String> {
    let len = spec.stored_len();
    let latent = match (&encoded.latents, latent) {
        (Some(latents), _) => latents[row * len..][..len].to_vec(),
        (None, Some(own)) => own,
        (None, None) => return Err("there is no autoencoder, and the source holds no latents".to_owned()),
    };
    let features = encoded
        .features
        .iter()
        .zip(&spec.encoders)
        .map(|(f, e)| f[row * e.tokens * e.dim..][..e.tokens * e.dim].to_vec())
        .collect();
    Ok(MadeView { latent, features })
}

/// That the models gave as much as the spec says.
fn check(spec: &StoreSpec, encoded: Encoded, count: usize) -> Result<Encoded, String> {
    if let Some(latents) = &encoded.latents
        && latents.len() != count * spec.stored_len()
    {
        let (got, belong) = (latents.len(), count * spec.stored_len());
        return Err(format!("the autoencoder gave {got} values for {count} images where {belong} belong"));
    }
    if encoded.features.len() != spec.encoders.len() {
        let (got, belong) = (encoded.features.len(), spec.encoders.len());
        return Err(format!("features of {got} encoders where {belong} belong"));
    }
    for (features, e) in encoded.features.iter().zip(&spec.encoders) {
        let belong = count * e.tokens * e.dim;
        if features.len() != belong {
            return Err(format!("{} gave {} features where {belong} belong", e.id, features.len()));
        }
    }
    Ok(encoded)
}

/// The image as PNG.
fn png(image: &Image) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image::write_buffer_with_format(
        &mut bytes,
        &image.pixels,
        image.width as u32,
        image.height as u32,
        image::ExtendedColorType::Rgb8,
        image::ImageFormat::Png,
    )
    .expect("a checked RGB image encodes to memory");
    bytes.into_inner()
}

#[cfg(test)]
mod tests;
