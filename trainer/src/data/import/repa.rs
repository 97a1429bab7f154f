//! REPA's (and EDM2's) layout: `vae-sd/dataset.json` and `vae-sd/*/*.npy`, `images/*/*.png`, each tree a
//! folder or a zip archive. Imported into a store, or read in place.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::{self, Cursor};
use std::path::{Path, PathBuf};

use super::{ImportOptions, ImportReport};
use crate::data::build::{BuildError, Fault, Made, MadeView, Source};
use crate::data::source::labels::Labels;
use crate::data::source::list_digest;
use crate::data::source::npy;
use crate::data::source::tree::Tree;
use crate::data::store::{Foreign, Index, Kind, LatentStore, Normalisation, Spread, StoreError, StoreSpec};

/// Where a member has no image.
const NO_IMAGE: u32 = u32::MAX;

/// A tree in REPA's layout, its images paired with its latents.
#[derive(Debug)]
pub struct RepaTree {
    latents: Tree,
    images: Option<Tree>,
    members: Vec<(String, u32)>,
    image_names: Vec<String>,
    /// Position in `image_names` of each member's image.
    image_of: Vec<u32>,
    spec: StoreSpec,
}

thread_local! {
    /// A file's bytes, so that reading thousands of them takes no allocation each.
    static BYTES: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl RepaTree {
    /// Whether the folder (or zip archive) at `root` looks like this layout.
    #[must_use]
    pub fn is_at(root: &Path) -> bool {
        let latents = root.join("vae-sd");
        latents.is_dir() || latents.with_extension("zip").is_file()
    }

    /// Opens `root`/vae-sd and, where `options.images` asks for them, `root`/images. Images belong to
    /// latents by folder and number: `00000/img00000042.png` to `00000/img-mean-std-00000042.npy`.
    ///
    /// # Errors
    /// [`BuildError::Layout`] or [`BuildError::Labels`] names what is not as it should be.
    pub fn open(root: &Path, options: &ImportOptions) -> Result<Self, BuildError> {
        let open = |name: &str| {
            let path = root.join(name);
            let problem = |e: io::Error| BuildError::Layout {
                problem: format!("cannot be opened as a folder or as {name}.zip ({e}); REPA's layout has it"),
                path: path.clone(),
            };
            Tree::open(&path).map_err(problem)
        };
        let latents = open("vae-sd")?;
        let labels = read_labels(&latents)?;
        let images = if options.images { Some(open("images")?) } else { None };
        let image_names = images.as_ref().map_or(Ok(Vec::new()), |tree| list(tree, super::IMAGES))?;
        let by_key: HashMap<String, u32> =
            image_names.iter().zip(0..).map(|(name, i)| (pair_key(name), i)).collect();
        let image_of = labels
            .members
            .iter()
            .map(|(name, _)| *by_key.get(&pair_key(name)).unwrap_or(&NO_IMAGE))
            .collect();
        let spec = spec_of(&latents, &labels, options)?;
        Ok(Self { latents, images, members: labels.members, image_names, image_of, spec })
    }

    /// Opens the tree as a store that is read in place, with its images where they are there.
    ///
    /// # Errors
    /// As for [`RepaTree::open`].
    pub fn in_place(root: &Path) -> Result<LatentStore, BuildError> {
        let images = Tree::open(&root.join("images")).is_ok();
        let tree = Self::open(root, &ImportOptions { images, ..ImportOptions::default() })?;
        let normalisation = tree
            .spec
            .normalisation
            .clone()
            .unwrap_or_else(|| Normalisation::uniform(tree.spec.channels, 1.0));
        let index = Index::in_place(tree.spec.clone(), tree.members.len() as u64, normalisation);
        Ok(LatentStore::in_place(root, index, Box::new(tree)))
    }

    /// What an import makes of it.
    #[must_use]
    pub fn spec(&self) -> &StoreSpec {
        &self.spec
    }

    /// What does not pair: files of latents that dataset.json does not list, and images without latents.
    ///
    /// # Errors
    /// The tree cannot be listed.
    pub fn report(&self) -> Result<ImportReport, BuildError> {
        let listed: std::collections::HashSet<&str> =
            self.members.iter().map(|(name, _)| name.as_str()).collect();
        let mut unlisted = list(&self.latents, &["npy"])?;
        unlisted.retain(|name| !listed.contains(name.as_str()));
        let mut taken = vec![false; self.image_names.len()];
        for &image in self.image_of.iter().filter(|&&image| image != NO_IMAGE) {
            taken[image as usize] = true;
        }
        let images_without_latents = self
            .image_names
            .iter()
            .zip(taken)
            .filter(|(_, taken)| !taken)
            .map(|(name, _)| name.clone())
            .collect();
        Ok(ImportReport { unlisted, images_without_latents })
    }

    fn read_moments(&self, i: usize, out: &mut [f32]) -> Result<(), String> {
        BYTES.with_borrow_mut(|bytes| {
            self.latents.read(&self.members[i].0, bytes).map_err(unread)?;
            let npy = npy::parse(bytes)?;
            let spec = &self.spec;
            let belongs = [2 * spec.channels, spec.height, spec.width];
            if npy.shape != belongs {
                return Err(format!("has the shape {:?} where {belongs:?} belongs", npy.shape));
            }
            npy.read(out);
            Ok(())
        })
    }

    /// The image of member `i`, and its name for messages.
    fn read_image(&self, i: usize, out: &mut Vec<u8>) -> Result<(), Fault> {
        let (Some(tree), true) = (&self.images, self.image_of[i] != NO_IMAGE) else {
            return Err("has no image of its number".to_owned().into());
        };
        let name = &self.image_names[self.image_of[i] as usize];
        tree.read(name, out)
            .map_err(unread)
            .map_err(|problem| Fault { name: Some(format!("images/{name}")), problem })
    }
}

impl Source for RepaTree {
    type Raw = Made;

    fn len(&self) -> usize {
        self.members.len()
    }

    fn name(&self, i: usize) -> String {
        format!("vae-sd/{}", self.members[i].0)
    }

    fn load(&self, i: usize) -> Result<Made, Fault> {
        let mut latent = vec![0.0; self.spec.stored_len()];
        self.read_moments(i, &mut latent)?;
        let mut image = Vec::new();
        if self.images.is_some() {
            self.read_image(i, &mut image)?;
            check_size(&image, self.spec.resolution).map_err(|problem| Fault {
                name: Some(format!("images/{}", self.image_names[self.image_of[i] as usize])),
                problem,
            })?;
        }
        let view = MadeView { latent, features: Vec::new() };
        Ok(Made { label: self.members[i].1, view, flipped: None, image })
    }
}

impl Foreign for RepaTree {
    fn latent(&self, i: usize, out: &mut [f32]) -> Result<(), StoreError> {
        let error = |problem| StoreError::Member { path: self.latents.path_of(&self.members[i].0), problem };
        self.read_moments(i, out).map_err(error)?;
        let fine = out.iter().fold(true, |fine, x| fine & x.is_finite());
        let spreads = &out[self.spec.latent_len()..];
        match (fine, spreads.iter().fold(true, |fine, &x| fine & (x >= 0.0))) {
            (true, true) => Ok(()),
            (false, _) => Err(error("holds values that are not finite".to_owned())),
            (_, false) => Err(error(
                "holds standard deviations below 0, so these look like log variances: import with --logvar"
                    .to_owned(),
            )),
        }
    }

    fn label(&self, i: usize) -> Result<u32, StoreError> {
        Ok(self.members[i].1)
    }

    fn image(&self, i: usize, out: &mut Vec<u8>) -> Result<(), StoreError> {
        self.read_image(i, out).map_err(|fault| {
            let name = fault.name.unwrap_or_else(|| self.name(i));
            let root = self.latents.path().parent().unwrap_or(Path::new(""));
            StoreError::Member { path: root.join(name), problem: fault.problem }
        })
    }
}

fn unread(e: io::Error) -> String {
    match e.kind() {
        io::ErrorKind::NotFound => "is listed but missing".to_owned(),
        _ => format!("cannot be read: {e}"),
    }
}

fn read_labels(latents: &Tree) -> Result<Labels, BuildError> {
    let path = latents.path_of("dataset.json");
    let mut text = Vec::new();
    match latents.read("dataset.json", &mut text) {
        Ok(()) => Ok(Labels::parse(&path, &text)?),
        Err(e) => Err(BuildError::Layout {
            path,
            problem: format!(
                "cannot be read ({e}); it lists the latents as {{\"labels\": [[\"00000/x.npy\", 6], ...]}}"
            ),
        }),
    }
}

/// The spec, with the latents' shape from the first member that can be read.
fn spec_of(latents: &Tree, labels: &Labels, options: &ImportOptions) -> Result<StoreSpec, BuildError> {
    let mut bytes = Vec::new();
    let readable = labels.members.iter().find_map(|(name, _)| {
        latents.read(name, &mut bytes).ok()?;
        <[usize; 3]>::try_from(npy::parse(&bytes).ok()?.shape).ok()
    });
    let bad =
        |problem: &str| BuildError::Layout { path: latents.path().to_owned(), problem: problem.to_owned() };
    let [channels, height, width] =
        readable.ok_or_else(|| bad("none of the listed files can be read as a .npy array of [2C, h, w]"))?;
    if !channels.is_multiple_of(2) {
        return Err(bad("the latents have an odd number of channels: mean and std belong in each file"));
    }
    let digest = list_digest(labels.members.iter().map(|(name, label)| (name.as_str(), *label)));
    Ok(StoreSpec {
        kind: Kind::Moments,
        spread: if options.logvar { Spread::Logvar } else { Spread::Std },
        precision: options.precision,
        channels: channels / 2,
        height,
        width,
        resolution: height * options.downsample.unwrap_or(8),
        autoencoder: options.autoencoder.clone().unwrap_or_else(|| "sd-vae".to_owned()),
        normalisation: Some(Normalisation::uniform(channels / 2, options.scale.unwrap_or(0.18215))),
        classes: options.classes.unwrap_or_else(|| labels.classes()),
        class_names: labels.class_names.clone(),
        encoders: Vec::new(),
        images: options.images,
        flips: false,
        source: format!("REPA layout, {} members listed ({digest})", labels.members.len()),
    })
}

/// That bytes are an image of `resolution` pixels square; it is not decoded.
fn check_size(bytes: &[u8], resolution: usize) -> Result<(), String> {
    let size = image::ImageReader::new(Cursor::new(bytes))
        .with_guessed_format()
        .map_err(image::ImageError::from)
        .and_then(image::ImageReader::into_dimensions)
        .map_err(|e| format!("is not an image: {e}"))?;
    if size != (resolution as u32, resolution as u32) {
        return Err(format!("is {}x{} pixels where {resolution}x{resolution} belong", size.0, size.1));
    }
    Ok(())
}

/// What a file of latents and its image have in common: the folder, and the number that ends the name.
fn pair_key(name: &str) -> String {
    let (folder, file) = name.rsplit_once('/').unwrap_or(("", name));
    let stem = file.rsplit_once('.').map_or(file, |(stem, _)| stem);
    let number = &stem[stem.trim_end_matches(|c: char| c.is_ascii_digit()).len()..];
    format!("{folder}/{}", if number.is_empty() { stem } else { number })
}

fn list(tree: &Tree, endings: &[&str]) -> Result<Vec<String>, BuildError> {
    tree.list(endings).map_err(|e| BuildError::Layout {
        path: PathBuf::from(tree.path()),
        problem: format!("cannot be listed: {e}"),
    })
}
