//! From images to a store: decode, encode, write, shard by shard. Decoding runs ahead on its own
//! thread. What a shard holds follows from its number alone, so any number of ranks make the same
//! bytes, and a finished shard is not made again.

use std::io::Cursor;
use std::ops::Range;
use std::path::Path;
use std::sync::mpsc::sync_channel;

use half::f16;
use rayon::prelude::*;

use super::store::{Index, Sample, StoreError, StoreSpec, StoreWriter};
use crate::images::Image;

/// Labelled images, by number.
pub trait ImageSource: Sync {
    /// Number of images.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Image `i` at the store's resolution, and its label.
    ///
    /// # Errors
    /// What is wrong with it, with its name.
    fn get(&self, i: usize) -> Result<(Image, u32), String>;
}

impl ImageSource for [(Image, u32)] {
    fn len(&self) -> usize {
        <[_]>::len(self)
    }

    fn get(&self, i: usize) -> Result<(Image, u32), String> {
        Ok(self[i].clone())
    }
}

/// What the models make of N images.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Encoded {
    /// Moments or latents, as the spec says; [N, 2C or C, h, w].
    pub latents: Vec<f32>,
    /// Features by encoder; [N, tokens, dim] each.
    pub features: Vec<Vec<f16>>,
}

/// The models: images in, latents and features out.
pub type EncodeFn<'a> = dyn Fn(&[Image]) -> Result<Encoded, String> + 'a;

/// How to encode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Images of one call of the models.
    pub batch: usize,
    /// Samples of a shard; 0: as many as make about 1 GiB.
    pub shard_len: usize,
    /// This rank: it makes the shards whose number is `rank` modulo `world`.
    pub rank: usize,
    /// Number of ranks.
    pub world: usize,
    /// How many images may be bad (unreadable, or of values that cannot be stored) and left out.
    pub max_bad: usize,
}

impl Default for EncodeOptions {
    fn default() -> Self {
        Self { batch: 32, shard_len: 0, rank: 0, world: 1, max_bad: 0 }
    }
}

/// How far it has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncodeProgress {
    /// Images of this rank that are dealt with.
    pub done: usize,
    /// Images of this rank.
    pub total: usize,
    /// Those of `done` that an earlier attempt had dealt with.
    pub resumed: usize,
}

/// Why encoding ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// The store cannot be written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// More images are bad than allowed.
    #[error("image {image}: {problem} ({allowed} bad images are allowed)")]
    Image {
        /// Its number.
        image: usize,
        /// What is wrong with it.
        problem: String,
        /// The bound.
        allowed: usize,
    },
    /// The models failed.
    #[error("encoding images {} to {}: {problem}", images.start, images.end)]
    Models {
        /// The images of the failed call.
        images: Range<usize>,
        /// What went wrong.
        problem: String,
    },
}

/// An image that was left out.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct BadImage {
    /// Its number in the source.
    pub image: usize,
    /// What is wrong with it.
    pub problem: String,
}

/// Number of shards that `images` make under these options.
#[must_use]
pub fn shard_count(images: usize, spec: &StoreSpec, options: &EncodeOptions) -> usize {
    images.div_ceil(shard_len(spec, options))
}

fn shard_len(spec: &StoreSpec, options: &EncodeOptions) -> usize {
    if options.shard_len == 0 { spec.default_shard_len() } else { options.shard_len }
}

/// Makes a whole store at `dir`, alone: [`encode_shards`] for one rank, then the index.
///
/// # Errors
/// See [`EncodeError`]. What is done is kept: the same call goes on from there.
pub fn encode(
    source: &(impl ImageSource + ?Sized),
    dir: &Path,
    spec: StoreSpec,
    options: &EncodeOptions,
    models: &EncodeFn,
    progress: &mut dyn FnMut(EncodeProgress),
) -> Result<(Index, Vec<BadImage>), EncodeError> {
    let writer = StoreWriter::create(dir, spec)?;
    let options = EncodeOptions { rank: 0, world: 1, ..options.clone() };
    let bad = encode_shards(source, &writer, &options, models, progress)?;
    Ok((writer.commit(shard_count(source.len(), writer.spec(), &options))?, bad))
}

/// Makes this rank's shards. When all ranks have done so (a barrier), one of them calls
/// [`StoreWriter::commit`] with [`shard_count`].
///
/// Gives the images that were left out of the shards made by this call.
///
/// # Errors
/// See [`EncodeError`]. Finished shards are kept: the same call goes on from there.
pub fn encode_shards(
    source: &(impl ImageSource + ?Sized),
    writer: &StoreWriter,
    options: &EncodeOptions,
    models: &EncodeFn,
    progress: &mut dyn FnMut(EncodeProgress),
) -> Result<Vec<BadImage>, EncodeError> {
    let len = shard_len(writer.spec(), options);
    let mine: Vec<(usize, Range<usize>)> = (0..shard_count(source.len(), writer.spec(), options))
        .filter(|number| number % options.world == options.rank)
        .map(|number| (number, number * len..((number + 1) * len).min(source.len())))
        .collect();
    let total = mine.iter().map(|(_, images)| images.len()).sum();
    let mut state = EncodeProgress { done: 0, total, resumed: 0 };
    let mut bad = Vec::new();
    for (number, images) in mine {
        if writer.finished(number).is_some() {
            state.done += images.len();
            state.resumed += images.len();
            progress(state);
        } else {
            encode_shard(source, writer, options, models, number, images, &mut bad, &mut |n| {
                state.done += n;
                progress(state);
            })?;
        }
    }
    Ok(bad)
}

/// One decoded call of the models: the first image's number, and what became of each.
type Decoded = (usize, Vec<Result<(Image, u32), String>>);

#[expect(clippy::too_many_arguments, reason = "the loop's own state, private to this file")]
fn encode_shard(
    source: &(impl ImageSource + ?Sized),
    writer: &StoreWriter,
    options: &EncodeOptions,
    models: &EncodeFn,
    number: usize,
    images: Range<usize>,
    bad: &mut Vec<BadImage>,
    advance: &mut dyn FnMut(usize),
) -> Result<(), EncodeError> {
    let mut shard = writer.shard(number, images.len())?;
    let batch = options.batch.max(1);
    std::thread::scope(|scope| {
        let (sender, decoded) = sync_channel::<Decoded>(1);
        let begins = images.clone().step_by(batch);
        scope.spawn(move || {
            for begin in begins {
                let range = begin..(begin + batch).min(images.end);
                let decoded = range.into_par_iter().map(|i| source.get(i)).collect();
                // The receiver is gone when encoding has failed: nothing more to decode.
                if sender.send((begin, decoded)).is_err() {
                    return;
                }
            }
        });
        for (begin, decoded) in decoded {
            let count = decoded.len();
            let mut pictures = Vec::with_capacity(count);
            let mut labels = Vec::with_capacity(count);
            for (i, result) in (begin..).zip(decoded) {
                match result.and_then(|(image, label)| check_image(writer.spec(), image, label)) {
                    Ok((image, label)) => {
                        pictures.push(image);
                        labels.push((i, label));
                    }
                    Err(problem) => leave_out(bad, options.max_bad, i, problem)?,
                }
            }
            if !pictures.is_empty() {
                let images = begin..begin + count;
                let encoded = models(&pictures)
                    .and_then(|e| check_encoded(writer.spec(), e, pictures.len()))
                    .map_err(|problem| EncodeError::Models { images, problem })?;
                for (row, ((i, label), picture)) in labels.iter().zip(&pictures).enumerate() {
                    let stored = store_one(&mut shard, writer.spec(), &encoded, row, *label, picture);
                    match stored {
                        Ok(()) => {}
                        Err(StoreError::Sample { problem, .. }) => {
                            leave_out(bad, options.max_bad, *i, problem)?;
                        }
                        Err(e) => return Err(e.into()),
                    }
                }
            }
            advance(count);
        }
        shard.finish()?;
        Ok(())
    })
}

fn leave_out(
    bad: &mut Vec<BadImage>,
    allowed: usize,
    image: usize,
    problem: String,
) -> Result<(), EncodeError> {
    if bad.len() >= allowed {
        return Err(EncodeError::Image { image, problem, allowed });
    }
    bad.push(BadImage { image, problem });
    Ok(())
}

fn store_one(
    shard: &mut super::store::ShardWriter,
    spec: &StoreSpec,
    encoded: &Encoded,
    row: usize,
    label: u32,
    picture: &Image,
) -> Result<(), StoreError> {
    let len = spec.stored_len();
    let features: Vec<&[f16]> = encoded
        .features
        .iter()
        .zip(&spec.encoders)
        .map(|(f, e)| &f[row * e.tokens * e.dim..][..e.tokens * e.dim])
        .collect();
    let image = if spec.images { png(picture) } else { Vec::new() };
    let latent = &encoded.latents[row * len..][..len];
    shard.push(&Sample { latent, label, features: &features, image: &image })
}

fn check_image(spec: &StoreSpec, image: Image, label: u32) -> Result<(Image, u32), String> {
    if (image.width, image.height) != (spec.resolution, spec.resolution)
        || image.pixels.len() != image.width * image.height * 3
    {
        let (w, h, size) = (image.width, image.height, spec.resolution);
        return Err(format!("is {w}x{h} pixels where {size}x{size} belong"));
    }
    Ok((image, label))
}

fn check_encoded(spec: &StoreSpec, encoded: Encoded, count: usize) -> Result<Encoded, String> {
    if encoded.latents.len() != count * spec.stored_len() {
        let (got, belong) = (encoded.latents.len(), count * spec.stored_len());
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
mod tests {
    use super::*;
    use crate::data::bench::imagenet_spec;
    use crate::data::store::{EncoderSpec, Kind, LatentStore};
    use std::cell::Cell;

    fn spec() -> StoreSpec {
        StoreSpec {
            kind: Kind::Latents,
            channels: 1,
            height: 2,
            width: 2,
            resolution: 4,
            normalisation: None,
            encoders: vec![EncoderSpec { id: "eye".to_owned(), tokens: 1, dim: 2 }],
            images: true,
            ..imagenet_spec(false)
        }
    }

    fn images(count: usize) -> Vec<(Image, u32)> {
        (0..count)
            .map(|i| (Image { width: 4, height: 4, pixels: vec![i as u8; 48] }, (i % 10) as u32))
            .collect()
    }

    fn models(images: &[Image]) -> Result<Encoded, String> {
        let value = |image: &Image| f32::from(image.pixels[0]);
        Ok(Encoded {
            latents: images.iter().flat_map(|i| [value(i); 4]).collect(),
            features: vec![images.iter().flat_map(|i| [f16::from_f32(value(i)), f16::ONE]).collect()],
        })
    }

    fn options() -> EncodeOptions {
        EncodeOptions { batch: 3, shard_len: 8, ..EncodeOptions::default() }
    }

    #[test]
    fn images_become_a_store_whatever_the_number_of_ranks() {
        let folder = tempfile::tempdir().unwrap();
        let images = images(29);
        let alone = folder.path().join("alone");
        let mut seen = Vec::new();
        let (index, bad) =
            encode(&images[..], &alone, spec(), &options(), &models, &mut |p| seen.push(p)).unwrap();
        assert!(bad.is_empty());
        assert!(seen.windows(2).all(|w| w[0].done < w[1].done));
        assert_eq!(seen.last(), Some(&EncodeProgress { done: 29, total: 29, resumed: 0 }));
        let store = LatentStore::open(&alone).unwrap();
        assert!(store.verify(&|_| ()).findings.is_empty());
        let (mut latent, mut image) = ([0.0; 4], Vec::new());
        for (i, (original, label)) in images.iter().enumerate() {
            store.latent(i, &mut latent).unwrap();
            assert_eq!((latent, store.label(i).unwrap()), ([i as f32; 4], *label));
            store.image(i, &mut image).unwrap();
            let decoded = image::load_from_memory(&image).unwrap().to_rgb8();
            assert_eq!(decoded.into_raw(), original.pixels);
        }
        for world in [2, 3] {
            let dir = folder.path().join(format!("by {world}"));
            for rank in (0..world).rev() {
                let writer = StoreWriter::create(&dir, spec()).unwrap();
                let options = EncodeOptions { rank, world, ..options() };
                encode_shards(&images[..], &writer, &options, &models, &mut |_| ()).unwrap();
                if rank == 0 {
                    let shards = shard_count(images.len(), &spec(), &options);
                    assert_eq!(writer.commit(shards).unwrap(), index, "digests and all");
                }
            }
        }
    }

    #[test]
    fn a_stopped_run_goes_on_and_gives_the_same_store() {
        let folder = tempfile::tempdir().unwrap();
        let [whole, stopped] = ["whole", "stopped"].map(|n| folder.path().join(n));
        let images = images(29);
        let (index, _) = encode(&images[..], &whole, spec(), &options(), &models, &mut |_| ()).unwrap();
        let calls = Cell::new(0);
        let failing = |images: &[Image]| {
            calls.set(calls.get() + 1);
            if calls.get() == 5 { Err("out of memory".to_owned()) } else { models(images) }
        };
        let error = encode(&images[..], &stopped, spec(), &options(), &failing, &mut |_| ()).unwrap_err();
        assert_eq!(error.to_string(), "encoding images 11 to 14: out of memory");
        assert!(LatentStore::open(&stopped).is_err());
        let mut first = None;
        let (resumed, _) =
            encode(&images[..], &stopped, spec(), &options(), &models, &mut |p| first = first.or(Some(p)))
                .unwrap();
        assert_eq!(first, Some(EncodeProgress { done: 8, total: 29, resumed: 8 }));
        assert_eq!(resumed, index);
    }

    #[test]
    fn bad_images_are_left_out_up_to_the_bound() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("store");
        let mut images = images(12);
        images[2].0 = Image { width: 3, height: 4, pixels: vec![0; 36] };
        images[9].1 = 5000;
        let run = |max_bad| {
            encode(&images[..], &dir, spec(), &EncodeOptions { max_bad, ..options() }, &models, &mut |_| ())
        };
        let error = run(0).unwrap_err().to_string();
        assert_eq!(error, "image 2: is 3x4 pixels where 4x4 belong (0 bad images are allowed)");
        let error = run(1).unwrap_err().to_string();
        assert!(error.starts_with("image 9: label 5000"), "{error}");
        let (index, bad) = run(2).unwrap();
        assert_eq!(index.samples, 10);
        // The first shard was finished by the second attempt, which has reported image 2.
        assert_eq!(bad.iter().map(|b| b.image).collect::<Vec<_>>(), [9]);
        assert!(LatentStore::open(&dir).unwrap().verify(&|_| ()).findings.is_empty());
    }
}
