//! Reading a store by sample index. Shards are opened when first touched, and read with pread: a
//! file that is cut short is an error, where mmap would end the process.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use half::f16;
use half::slice::HalfFloatSliceExt as _;

use super::check::logvar_to_std;
use super::shard::{self, IMAGE_ENDS, LABELS, Places};
use super::writer::partial_dir;
use super::{Expected, INDEX_FILE, Index, Kind, Precision, Spread, StoreError};

/// A whole store, or a foreign layout read in place; open for reading by any number of threads.
#[derive(Debug)]
pub struct LatentStore {
    dir: PathBuf,
    index: Index,
    /// First sample of each shard, and the number of all samples.
    starts: Vec<u64>,
    shards: Vec<OnceLock<Shard>>,
    latent_field: usize,
    items: Vec<u64>,
    foreign: Option<Box<dyn Foreign>>,
}

/// Samples in a layout that is not ours, read in place: float32 latents, no features, no flipped copies.
pub(in crate::data) trait Foreign: std::fmt::Debug + Send + Sync {
    /// As [`LatentStore::latent`], with the spread as it is stored.
    fn latent(&self, i: usize, out: &mut [f32]) -> Result<(), StoreError>;
    /// As [`LatentStore::label`].
    fn label(&self, i: usize) -> Result<u32, StoreError>;
    /// As [`LatentStore::image`].
    fn image(&self, i: usize, out: &mut Vec<u8>) -> Result<(), StoreError>;
}

/// An open shard. Labels and image ends are held: 16 bytes a sample at most.
#[derive(Debug)]
pub(super) struct Shard {
    pub(super) file: File,
    pub(super) path: PathBuf,
    pub(super) places: Places,
    pub(super) labels: Vec<i64>,
    pub(super) image_ends: Vec<u64>,
}

impl LatentStore {
    /// Opens the store at `dir`: reads the index, and checks that every shard is there in its size.
    ///
    /// # Errors
    /// There is no store, it is not finished, its index makes no sense, or a shard is missing or has
    /// another size.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let path = dir.join(INDEX_FILE);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let (dir, partial) = (dir.to_owned(), partial_dir(dir));
                return Err(if partial.is_dir() {
                    StoreError::Unfinished { dir, partial, missing: None }
                } else {
                    StoreError::Missing { dir }
                });
            }
            Err(e) => return Err(StoreError::io("read", &path)(e)),
        };
        let store = Self::with_index(dir, Index::parse(&path, &text)?);
        for entry in &store.index.shards {
            let path = dir.join(&entry.file);
            let size = match fs::metadata(&path) {
                Ok(meta) => meta.len(),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                    return Err(StoreError::shard(&path, "is missing"));
                }
                Err(e) => return Err(StoreError::io("read", &path)(e)),
            };
            if size != entry.bytes {
                let problem = format!("has {size} bytes where the index says {}", entry.bytes);
                return Err(StoreError::shard(&path, problem));
            }
        }
        raise_open_files_limit(store.shards.len() as u64 + 256);
        Ok(store)
    }

    /// A foreign layout at `dir` that holds what `index` (which lists no shards) says.
    pub(in crate::data) fn in_place(dir: &Path, index: Index, foreign: Box<dyn Foreign>) -> Self {
        Self { foreign: Some(foreign), ..Self::with_index(dir, index) }
    }

    /// Whether this is another layout, read in place.
    #[must_use]
    pub fn is_foreign(&self) -> bool {
        self.foreign.is_some()
    }

    fn with_index(dir: &Path, index: Index) -> Self {
        let mut starts = vec![0];
        for shard in &index.shards {
            starts.push(starts[starts.len() - 1] + shard.samples);
        }
        let shards = index.shards.iter().map(|_| OnceLock::new()).collect();
        let latent_field = shard::latent_field(&index.contents);
        let items = shard::fields(&index.contents).iter().map(|f| f.item).collect();
        Self { dir: dir.to_owned(), index, starts, shards, latent_field, items, foreign: None }
    }

    /// The folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What the store holds.
    #[must_use]
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// Number of samples, at least 1.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a store without samples does not open")]
    pub fn len(&self) -> usize {
        self.index.samples as usize
    }

    /// Checks the store's shapes against a configuration's.
    ///
    /// # Errors
    /// [`StoreError::Mismatch`] names what differs.
    pub fn expect(&self, expected: &Expected) -> Result<(), StoreError> {
        self.index.expect(&self.dir, expected)
    }

    /// Reads the moments (mean ‖ std, whichever spread is stored) or the latent of sample `i` into
    /// `out`, as float32 and not normalised: `contents.stored_len()` elements. `flipped` takes those of
    /// the mirrored image.
    ///
    /// # Errors
    /// The shard cannot be read, or is not what the index says.
    ///
    /// # Panics
    /// If `i` is not below [`Self::len`], `out` has another length, or there are no flipped copies.
    pub fn latent(&self, i: usize, flipped: bool, out: &mut [f32]) -> Result<(), StoreError> {
        let spec = &self.index.contents;
        assert_eq!(out.len(), spec.stored_len(), "the buffer for a latent");
        let field = self.view_field(flipped);
        match (&self.foreign, spec.precision) {
            (Some(foreign), _) => foreign.latent(i, out)?,
            (None, Precision::F32) => self.read_item(i, field, bytemuck::cast_slice_mut(out))?,
            (None, Precision::F16) => {
                let mut halves = vec![f16::ZERO; out.len()];
                self.read_item(i, field, shard::f16_bytes_mut(&mut halves))?;
                halves.convert_to_f32_slice(out);
            }
        }
        if spec.kind == Kind::Moments && spec.spread == Spread::Logvar {
            out[spec.latent_len()..].iter_mut().for_each(|x| *x = logvar_to_std(*x));
        }
        Ok(())
    }

    /// The label of sample `i`.
    ///
    /// # Errors
    /// The shard cannot be read, or the label is not below the number of classes.
    ///
    /// # Panics
    /// If `i` is not below [`Self::len`].
    pub fn label(&self, i: usize) -> Result<u32, StoreError> {
        if let Some(foreign) = &self.foreign {
            return foreign.label(i);
        }
        let (shard, row) = self.locate(i)?;
        let label = shard.labels[row as usize];
        let classes = self.index.contents.classes;
        match u32::try_from(label) {
            Ok(label) if (label as usize) < classes => Ok(label),
            _ => {
                let problem = format!("sample {row} has the label {label}; there are {classes} classes");
                Err(StoreError::shard(&shard.path, problem))
            }
        }
    }

    /// Reads the features of encoder number `encoder` for sample `i`: tokens * dim elements. `flipped`
    /// takes those of the mirrored image.
    ///
    /// # Errors
    /// The shard cannot be read, or is not what the index says.
    ///
    /// # Panics
    /// If `i` or `encoder` is out of range, `out` has another length, or there are no flipped copies.
    pub fn features(
        &self,
        encoder: usize,
        i: usize,
        flipped: bool,
        out: &mut [f16],
    ) -> Result<(), StoreError> {
        let spec = &self.index.contents.encoders[encoder];
        assert_eq!(out.len(), spec.tokens * spec.dim, "the buffer for features");
        self.read_item(i, self.view_field(flipped) + 1 + encoder, shard::f16_bytes_mut(out))
    }

    /// The encoded image (PNG, JPEG) of sample `i`, in place of what `out` holds.
    ///
    /// # Errors
    /// The store has no images, or the shard cannot be read.
    ///
    /// # Panics
    /// If `i` is not below [`Self::len`].
    pub fn image(&self, i: usize, out: &mut Vec<u8>) -> Result<(), StoreError> {
        if !self.index.contents.images {
            let problem = "it keeps no images: make it again with images".to_owned();
            return Err(StoreError::Mismatch { dir: self.dir.clone(), problem });
        }
        if let Some(foreign) = &self.foreign {
            return foreign.image(i, out);
        }
        let (shard, row) = self.locate(i)?;
        shard.image(row as usize, out)
    }

    /// First sample of shard `number`; of the number of shards, the number of samples.
    pub(super) fn start(&self, number: usize) -> u64 {
        self.starts[number]
    }

    /// The field of the latents; the features of the same view follow it.
    fn view_field(&self, flipped: bool) -> usize {
        let spec = &self.index.contents;
        assert!(spec.flips || !flipped, "flipped copies of a store without");
        self.latent_field + usize::from(flipped) * (1 + spec.encoders.len())
    }

    fn read_item(&self, i: usize, field: usize, out: &mut [u8]) -> Result<(), StoreError> {
        let (shard, row) = self.locate(i)?;
        shard::read_exact(
            &shard.file,
            &shard.path,
            out,
            shard.places.offsets[field] + row * self.items[field],
        )
    }

    fn locate(&self, i: usize) -> Result<(&Shard, u64), StoreError> {
        assert!(i < self.len(), "sample {i} of {}", self.len());
        let number = self.starts.partition_point(|&s| s <= i as u64) - 1;
        Ok((self.shard(number)?, i as u64 - self.starts[number]))
    }

    fn shard(&self, number: usize) -> Result<&Shard, StoreError> {
        if let Some(shard) = self.shards[number].get() {
            return Ok(shard);
        }
        // Two threads may both open it; the second's is dropped.
        let shard = self.open_shard(number)?;
        Ok(self.shards[number].get_or_init(|| shard))
    }

    pub(super) fn open_shard(&self, number: usize) -> Result<Shard, StoreError> {
        let entry = &self.index.shards[number];
        let path = self.dir.join(&entry.file);
        let file = File::open(&path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => StoreError::shard(&path, "is missing"),
            _ => StoreError::io("open", &path)(e),
        })?;
        let places = shard::read_places(&file, &path, &self.index.contents, entry.samples)?;
        let count = entry.samples as usize;
        let mut bytes = vec![0; count * if places.short_labels { 4 } else { 8 }];
        shard::read_exact(&file, &path, &mut bytes, places.offsets[LABELS])?;
        let labels = if places.short_labels {
            bytes.as_chunks().0.iter().map(|b| i64::from(u32::from_le_bytes(*b))).collect()
        } else {
            bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect()
        };
        let mut image_ends = Vec::new();
        if self.index.contents.images {
            bytes.resize(count * 8, 0);
            shard::read_exact(&file, &path, &mut bytes, places.offsets[IMAGE_ENDS])?;
            image_ends = bytes.as_chunks().0.iter().map(|b| u64::from_le_bytes(*b)).collect();
        }
        Ok(Shard { file, path, places, labels, image_ends })
    }
}

impl Shard {
    /// Reads the encoded image of row `row`.
    pub(super) fn image(&self, row: usize, out: &mut Vec<u8>) -> Result<(), StoreError> {
        let begin = if row == 0 { 0 } else { self.image_ends[row - 1] };
        let end = self.image_ends[row];
        if begin > end || end > self.places.image_bytes {
            let problem = format!("has the image of sample {row} at bytes {begin} to {end}");
            return Err(StoreError::shard(&self.path, problem));
        }
        out.resize((end - begin) as usize, 0);
        shard::read_exact(&self.file, &self.path, out, self.places.images + begin)
    }
}

/// Shards stay open, and the usual soft limit of 1024 files is fewer than a large store has.
fn raise_open_files_limit(wanted: u64) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_some_and(|current| current < wanted) {
        let current = Some(limit.maximum.map_or(wanted, |maximum| maximum.min(wanted)));
        // Where it is refused, opening a shard says so later.
        let _ = setrlimit(Resource::Nofile, Rlimit { current, maximum: limit.maximum });
    }
}
