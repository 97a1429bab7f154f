//! Other people's data sets, into a store. Files are read and checked in parallel and written in
//! order; a shard that is finished is not made again.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::{self, Cursor};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::store::{
    Index, Kind, Normalisation, Precision, Sample, Spread, StoreError, StoreSpec, StoreWriter,
};

pub mod npy;

/// Files read at once: enough for all cores, few enough for memory.
const CHUNK: usize = 256;

/// What is to be made of a tree in the layout of REPA's preprocessing (EDM2's).
#[derive(Debug, Clone, PartialEq)]
pub struct ImportOptions {
    /// Which autoencoder made the latents.
    pub autoencoder: String,
    /// What the second half of moments is.
    pub spread: Spread,
    /// Scale of all latent channels; 0.18215 for the SD-VAE.
    pub scale: f32,
    /// Pixels of the images per latent pixel, along a side; 8 for the SD-VAE.
    pub downsample: usize,
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

impl Default for ImportOptions {
    fn default() -> Self {
        Self {
            autoencoder: "sd-vae".to_owned(),
            spread: Spread::Std,
            scale: 0.18215,
            downsample: 8,
            classes: None,
            images: false,
            precision: Precision::F32,
            shard_len: 0,
            max_bad: 0,
        }
    }
}

/// A member that was left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BadMember {
    /// Its path in the tree.
    pub name: String,
    /// What is wrong with it.
    pub problem: String,
}

/// What an import came to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ImportReport {
    /// Samples of the store.
    pub samples: u64,
    /// Listed members that were left out by this call (not those of shards that an earlier call finished).
    pub bad: Vec<BadMember>,
    /// Files of latents that dataset.json does not list.
    pub unlisted: Vec<String>,
    /// Images without listed latents; looked for where images are kept.
    pub images_without_latents: Vec<String>,
}

/// Why an import ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    /// The store cannot be written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The tree is not in the layout.
    #[error("{}: {problem}", path.display())]
    Layout {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it, and what belongs there.
        problem: String,
    },
    /// More members are bad than allowed.
    #[error("{} {} ({allowed} bad members are allowed)", member.name, member.problem)]
    Bad {
        /// The one too many.
        member: BadMember,
        /// The bound.
        allowed: usize,
    },
}

#[derive(Deserialize)]
struct DatasetJson {
    labels: Option<Vec<(String, u32)>>,
}

/// Imports `root`/vae-sd (moments as .npy, labels in dataset.json) and, on request, `root`/images
/// into a store at `dir`. Images belong to latents by folder and number: `00000/img00000042.png` to
/// `00000/img-mean-std-00000042.npy`. `progress` hears the members dealt with and their number.
///
/// # Errors
/// See [`ImportError`]. Finished shards are kept: the same call goes on from there.
pub fn import_repa(
    root: &Path,
    dir: &Path,
    options: &ImportOptions,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<ImportReport, ImportError> {
    let latents = root.join("vae-sd");
    let members = read_labels(&latents.join("dataset.json"))?;
    let images =
        if options.images { list(&root.join("images"), &["png", "jpg", "jpeg"])? } else { Vec::new() };
    let by_key: HashMap<String, &str> = images.iter().map(|name| (pair_key(name), name.as_str())).collect();
    let spec = spec_of(&latents, &members, options)?;
    let writer = StoreWriter::create(dir, spec)?;
    let spec = writer.spec();
    let len = if options.shard_len == 0 { spec.default_shard_len() } else { options.shard_len };

    let load = |(name, label): &(String, u32)| -> Result<(Vec<f32>, u32, Vec<u8>), BadMember> {
        let bad = |name: String, problem: String| BadMember { name, problem };
        let moments =
            load_moments(&latents.join(name), spec).map_err(|e| bad(format!("vae-sd/{name}"), e))?;
        let image = match (options.images, by_key.get(&pair_key(name))) {
            (false, _) => Vec::new(),
            (true, None) => {
                return Err(bad(format!("vae-sd/{name}"), "has no image of its number".to_owned()));
            }
            (true, Some(image)) => load_image(&root.join("images").join(image), spec.resolution)
                .map_err(|e| bad(format!("images/{image}"), e))?,
        };
        Ok((moments, *label, image))
    };
    let mut bad = Vec::new();
    let mut leave_out = |member: BadMember| {
        if bad.len() >= options.max_bad {
            return Err(ImportError::Bad { member, allowed: options.max_bad });
        }
        bad.push(member);
        Ok(())
    };
    let mut done = 0;
    for (number, members_of_shard) in members.chunks(len).enumerate() {
        if writer.finished(number).is_some() {
            done += members_of_shard.len();
            progress(done, members.len());
            continue;
        }
        let mut shard = writer.shard(number, members_of_shard.len())?;
        for chunk in members_of_shard.chunks(CHUNK) {
            let loaded: Vec<_> = chunk.par_iter().map(load).collect();
            for ((name, _), sample) in chunk.iter().zip(loaded) {
                match sample {
                    Err(member) => leave_out(member)?,
                    Ok((latent, label, image)) => {
                        let sample = Sample { latent: &latent, label, features: &[], image: &image };
                        match shard.push(&sample) {
                            Ok(()) => {}
                            Err(StoreError::Sample { problem, .. }) => {
                                leave_out(BadMember { name: format!("vae-sd/{name}"), problem })?;
                            }
                            Err(e) => return Err(e.into()),
                        }
                    }
                }
            }
            done += chunk.len();
            progress(done, members.len());
        }
        shard.finish()?;
    }
    let Index { samples, .. } = writer.commit(members.len().div_ceil(len))?;
    let listed: HashSet<&str> = members.iter().map(|(name, _)| name.as_str()).collect();
    let keys: HashSet<String> = members.iter().map(|(name, _)| pair_key(name)).collect();
    let mut unlisted = list(&latents, &["npy"])?;
    unlisted.retain(|name| !listed.contains(name.as_str()));
    let mut images_without_latents = images;
    images_without_latents.retain(|name| !keys.contains(&pair_key(name)));
    Ok(ImportReport { samples, bad, unlisted, images_without_latents })
}

fn read_labels(path: &Path) -> Result<Vec<(String, u32)>, ImportError> {
    let bad = |problem: String| ImportError::Layout { path: path.to_owned(), problem };
    let text = fs::read(path).map_err(|e| {
        bad(format!(
            "cannot be read ({e}); it lists the latents as {{\"labels\": [[\"00000/x.npy\", 6], ...]}}"
        ))
    })?;
    let json: DatasetJson = serde_json::from_slice(&text)
        .map_err(|e| bad(format!("is not {{\"labels\": [[name, label], ...]}}: {e}")))?;
    let members = json.labels.filter(|l| !l.is_empty()).ok_or_else(|| bad("lists no labels".to_owned()))?;
    let mut seen = HashSet::new();
    for (name, _) in &members {
        let path = Path::new(name);
        if !path.components().all(|c| matches!(c, std::path::Component::Normal(_))) {
            return Err(bad(format!("lists {name:?}, which is not a path below its folder")));
        }
        if !seen.insert(name) {
            return Err(bad(format!("lists {name:?} twice")));
        }
    }
    Ok(members)
}

/// The spec, with the latents' shape from the first member that can be read.
fn spec_of(
    latents: &Path,
    members: &[(String, u32)],
    options: &ImportOptions,
) -> Result<StoreSpec, ImportError> {
    let readable = members.iter().find_map(|(name, _)| {
        let npy = npy::parse(&fs::read(latents.join(name)).ok()?).ok()?;
        <[usize; 3]>::try_from(npy.shape).ok()
    });
    let bad = |problem: &str| ImportError::Layout { path: latents.to_owned(), problem: problem.to_owned() };
    let [channels, height, width] =
        readable.ok_or_else(|| bad("none of the listed files can be read as a .npy array of [2C, h, w]"))?;
    if !channels.is_multiple_of(2) {
        return Err(bad("the latents have an odd number of channels: mean and std belong in each file"));
    }
    let greatest = members.iter().map(|(_, label)| *label as usize).max().unwrap_or(0);
    Ok(StoreSpec {
        kind: Kind::Moments,
        spread: options.spread,
        precision: options.precision,
        channels: channels / 2,
        height,
        width,
        resolution: height * options.downsample,
        autoencoder: options.autoencoder.clone(),
        normalisation: Some(Normalisation::uniform(channels / 2, options.scale)),
        classes: options.classes.unwrap_or(greatest + 1),
        class_names: Vec::new(),
        encoders: Vec::new(),
        images: options.images,
        source: format!("REPA layout, {} members listed", members.len()),
    })
}

fn load_moments(path: &Path, spec: &StoreSpec) -> Result<Vec<f32>, String> {
    let bytes = fs::read(path).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => "is listed but missing".to_owned(),
        _ => format!("cannot be read: {e}"),
    })?;
    let npy = npy::parse(&bytes)?;
    let belongs = [2 * spec.channels, spec.height, spec.width];
    if npy.shape != belongs {
        return Err(format!("has the shape {:?} where {belongs:?} belongs", npy.shape));
    }
    Ok(npy.values)
}

fn load_image(path: &Path, resolution: usize) -> Result<Vec<u8>, String> {
    let bytes = fs::read(path).map_err(|e| format!("cannot be read: {e}"))?;
    let size = image::ImageReader::new(Cursor::new(&bytes))
        .with_guessed_format()
        .map_err(image::ImageError::from)
        .and_then(image::ImageReader::into_dimensions)
        .map_err(|e| format!("is not an image: {e}"))?;
    if size != (resolution as u32, resolution as u32) {
        return Err(format!("is {}x{} pixels where {resolution}x{resolution} belong", size.0, size.1));
    }
    Ok(bytes)
}

/// What a file of latents and its image have in common: the folder, and the number that ends the name.
fn pair_key(name: &str) -> String {
    let (folder, file) = name.rsplit_once('/').unwrap_or(("", name));
    let stem = file.rsplit_once('.').map_or(file, |(stem, _)| stem);
    let number = &stem[stem.trim_end_matches(|c: char| c.is_ascii_digit()).len()..];
    format!("{folder}/{}", if number.is_empty() { stem } else { number })
}

/// Files below `root` with one of these endings, by path from there, sorted.
fn list(root: &Path, endings: &[&str]) -> Result<Vec<String>, ImportError> {
    let mut names = Vec::new();
    let mut folders = vec![String::new()];
    while let Some(folder) = folders.pop() {
        let path = root.join(&folder);
        let items = fs::read_dir(&path)
            .and_then(Iterator::collect::<io::Result<Vec<_>>>)
            .map_err(|e| ImportError::Layout { path, problem: format!("cannot be listed: {e}") })?;
        for item in items {
            let name = format!("{folder}{}", item.file_name().to_string_lossy());
            if item.file_type().is_ok_and(|t| t.is_dir()) {
                folders.push(format!("{name}/"));
            } else if name.rsplit_once('.').is_some_and(|(_, end)| endings.contains(&end)) {
                names.push(name);
            }
        }
    }
    names.sort_unstable();
    Ok(names)
}

#[cfg(test)]
mod tests;
