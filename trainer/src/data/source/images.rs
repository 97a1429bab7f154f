//! Labelled images for encoding: trees of files, and stores that keep images.

use std::io;
use std::path::Path;

use super::labels::{Labels, LabelsError};
use super::list_digest;
use super::tree::Tree;
use crate::data::build::{BuildError, Fault};
use crate::data::import::IMAGES;
use crate::data::store::{LatentStore, StoreSpec};
use crate::images::{Image, center_crop};

/// A labelled image, and what its source has of it already.
#[derive(Debug, Clone, PartialEq)]
pub struct Picture {
    /// The image, of the source's resolution.
    pub image: Image,
    /// The class.
    pub label: u32,
    /// The bytes it was decoded from, where they are of this image as it is.
    pub encoded: Option<Vec<u8>>,
    /// Its moments (with standard deviations) or latent, where the source has them.
    pub latent: Option<Vec<f32>>,
}

/// Labelled images, by number.
pub trait ImageSource: Sync {
    /// Number of images.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What image `i` is called, for messages.
    fn name(&self, i: usize) -> String;

    /// Image `i`.
    ///
    /// # Errors
    /// What is wrong with it.
    fn get(&self, i: usize) -> Result<Picture, Fault>;
}

/// A folder or zip archive of images. Each is cropped as ADM does it (the reference's
/// `center-crop-dhariwal`) where it is not of the resolution already.
#[derive(Debug)]
pub struct ImageTree {
    tree: Tree,
    labels: Labels,
    resolution: usize,
}

impl ImageTree {
    /// Opens the tree at `root`. Labels come from the file `labels` (JSON or CSV), from `dataset.json` in
    /// the tree, or from the names of its top folders, whichever is there first.
    ///
    /// # Errors
    /// There is no such tree, or no usable labels.
    pub fn open(root: &Path, labels: Option<&Path>, resolution: usize) -> Result<Self, BuildError> {
        let layout = |path: &Path, problem: String| BuildError::Layout { path: path.to_owned(), problem };
        let tree = Tree::open(root).map_err(|e| {
            layout(root, format!("cannot be opened as a folder or zip archive of images: {e}"))
        })?;
        let labels = match labels {
            Some(path) => {
                let text = std::fs::read(path).map_err(|e| layout(path, format!("cannot be read: {e}")))?;
                Labels::parse(path, &text)?
            }
            None => find_labels(&tree)?,
        };
        Ok(Self { tree, labels, resolution })
    }

    /// One more than the greatest label, or the number of class names.
    #[must_use]
    pub fn classes(&self) -> usize {
        self.labels.classes()
    }

    /// Names of the classes by label; empty where labels are numbers.
    #[must_use]
    pub fn class_names(&self) -> &[String] {
        &self.labels.class_names
    }

    /// The source in words, for the store: its length and a digest of names and labels.
    #[must_use]
    pub fn describe(&self) -> String {
        let members = &self.labels.members;
        let digest = list_digest(members.iter().map(|(name, label)| (name.as_str(), *label)));
        format!("{} images ({digest}), cropped to {} pixels", members.len(), self.resolution)
    }
}

fn find_labels(tree: &Tree) -> Result<Labels, BuildError> {
    let path = tree.path_of("dataset.json");
    let unread = |problem: io::Error| LabelsError {
        path: path.clone(),
        problem: format!("cannot be read: {problem}"),
    };
    let mut text = Vec::new();
    match tree.read("dataset.json", &mut text) {
        Ok(()) => Ok(Labels::parse(&path, &text)?),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            Ok(Labels::from_folders(tree.path(), tree.list(IMAGES).map_err(unread)?)?)
        }
        Err(e) => Err(unread(e).into()),
    }
}

impl ImageSource for ImageTree {
    fn len(&self) -> usize {
        self.labels.members.len()
    }

    fn name(&self, i: usize) -> String {
        self.labels.members[i].0.clone()
    }

    fn get(&self, i: usize) -> Result<Picture, Fault> {
        let (name, label) = &self.labels.members[i];
        let mut bytes = Vec::new();
        self.tree.read(name, &mut bytes).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => "is listed but missing".to_owned(),
            _ => format!("cannot be read: {e}"),
        })?;
        let image = decode(&bytes)?;
        let side = self.resolution;
        if (image.width, image.height) == (side, side) {
            return Ok(Picture { image, label: *label, encoded: Some(bytes), latent: None });
        }
        Ok(Picture { image: center_crop(&image, side), label: *label, encoded: None, latent: None })
    }
}

/// The images of a store (or of REPA's layout, read in place), with their latents: to add features to it.
#[derive(Debug)]
pub struct StoreImages {
    store: LatentStore,
}

impl StoreImages {
    /// Takes the images of `store`.
    ///
    /// # Errors
    /// It keeps none.
    pub fn new(store: LatentStore) -> Result<Self, BuildError> {
        if store.index().contents.images {
            return Ok(Self { store });
        }
        Err(BuildError::Layout {
            path: store.dir().to_owned(),
            problem: "keeps no images to encode: import it with --images, or name the images themselves"
                .to_owned(),
        })
    }

    /// What the store holds.
    #[must_use]
    pub fn spec(&self) -> &StoreSpec {
        &self.store.index().contents
    }

    /// The store.
    #[must_use]
    pub fn store(&self) -> &LatentStore {
        &self.store
    }
}

impl ImageSource for StoreImages {
    fn len(&self) -> usize {
        self.store.len()
    }

    fn name(&self, i: usize) -> String {
        format!("{} sample {i}", self.store.dir().display())
    }

    fn get(&self, i: usize) -> Result<Picture, Fault> {
        let mut bytes = Vec::new();
        self.store.image(i, &mut bytes).map_err(|e| e.to_string())?;
        let image = decode(&bytes)?;
        let mut latent = vec![0.0; self.spec().stored_len()];
        self.store.latent(i, false, &mut latent).map_err(|e| e.to_string())?;
        let label = self.store.label(i).map_err(|e| e.to_string())?;
        Ok(Picture { image, label, encoded: Some(bytes), latent: Some(latent) })
    }
}

fn decode(bytes: &[u8]) -> Result<Image, Fault> {
    Ok(Image::from_bytes(bytes)
        .map_err(|problem| format!("is not a readable PNG or JPEG image: {problem}"))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn write(root: &Path, name: &str, width: u32, height: u32, level: u8) {
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        image::RgbImage::from_pixel(width, height, image::Rgb([level; 3])).save(path).unwrap();
    }

    #[test]
    fn class_folders_are_read_cropped_and_kept_where_they_fit() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), "dog/1.png", 8, 8, 10);
        write(root.path(), "cat/2.PNG", 20, 12, 20);
        let tree = ImageTree::open(root.path(), None, 8).unwrap();
        assert_eq!(
            (tree.len(), tree.classes(), tree.class_names()),
            (2, 2, &["cat".to_owned(), "dog".to_owned()][..])
        );
        let (cat, dog) = (tree.get(0).unwrap(), tree.get(1).unwrap());
        assert_eq!((cat.label, cat.image.width, cat.image.height, cat.encoded), (0, 8, 8, None));
        assert!(cat.image.pixels.iter().all(|&p| p == 20));
        assert_eq!((dog.label, dog.encoded.unwrap()), (1, fs::read(root.path().join("dog/1.png")).unwrap()));
        assert!(tree.describe().starts_with("2 images ("), "{}", tree.describe());
    }

    #[test]
    fn labels_come_from_a_file_before_dataset_json_before_folders() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), "a/1.png", 8, 8, 1);
        fs::write(root.path().join("dataset.json"), "{\"labels\": [[\"a/1.png\", 7]]}").unwrap();
        assert_eq!(ImageTree::open(root.path(), None, 8).unwrap().get(0).unwrap().label, 7);
        let csv = root.path().join("mine.csv");
        fs::write(&csv, "a/1.png,3\na/gone.png,1\n").unwrap();
        let tree = ImageTree::open(root.path(), Some(&csv), 8).unwrap();
        assert_eq!((tree.get(0).unwrap().label, tree.classes()), (3, 4));
        assert_eq!(tree.get(1).unwrap_err().problem, "is listed but missing");
        fs::write(root.path().join("a/1.png"), "junk").unwrap();
        assert!(tree.get(0).unwrap_err().problem.contains("not a readable PNG or JPEG"));
    }
}
