//! Writing a store: shard by shard, by any number of processes at once, each its own shards. A shard
//! is numbered by the samples it holds, not by who writes it, so that the bytes of a store do not
//! depend on how many did.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use half::f16;
use half::slice::HalfFloatSliceExt as _;
use xxhash_rust::xxh3::Xxh3;

use super::shard::{self, DIGESTS, Field, IMAGE_ENDS, LABELS};
use super::{INDEX_FILE, Index, Kind, Precision, ShardEntry, Spread, StoreError, StoreSpec};

const SPEC_FILE: &str = "contents.json";

/// One sample to be stored.
#[derive(Debug, Clone, Copy)]
pub struct Sample<'a> {
    /// Moments (mean ‖ spread, 2*C*h*w elements) or latents (C*h*w), not normalised.
    pub latent: &'a [f32],
    /// The class.
    pub label: u32,
    /// Features by encoder, in the order of the spec; [tokens, dim] each.
    pub features: &'a [&'a [f16]],
    /// The encoded image (PNG, JPEG) where the store keeps images; empty otherwise.
    pub image: &'a [u8],
}

/// A store in the making, in `<dir>.partial`.
#[derive(Debug)]
pub struct StoreWriter {
    dir: PathBuf,
    partial: PathBuf,
    spec: StoreSpec,
}

impl StoreWriter {
    /// Begins a store that will be `dir`, or goes on with an unfinished one. Several processes may
    /// do so with the same spec; they write different shards, and one of them commits.
    ///
    /// # Errors
    /// `dir` holds a store already, an unfinished one has another spec, the spec makes no sense, or
    /// the folder cannot be made.
    pub fn create(dir: &Path, spec: StoreSpec) -> Result<Self, StoreError> {
        spec.check().map_err(|(key, problem)| StoreError::index(dir, key, problem))?;
        if dir.join(INDEX_FILE).exists() {
            return Err(StoreError::Exists { dir: dir.to_owned() });
        }
        let partial = partial_dir(dir);
        fs::create_dir_all(&partial).map_err(StoreError::write(&partial))?;
        let path = partial.join(SPEC_FILE);
        if path.exists() {
            let text = fs::read_to_string(&path).map_err(StoreError::io("read", &path))?;
            if let Some(difference) = difference(&text, &spec) {
                return Err(StoreError::OtherSettings { partial, difference });
            }
        } else {
            write_json(&path, &spec)?;
        }
        Ok(Self { dir: dir.to_owned(), partial, spec })
    }

    /// What the store is to hold.
    #[must_use]
    pub fn spec(&self) -> &StoreSpec {
        &self.spec
    }

    /// The entry of shard `number`, where it is finished (by this process, another or an earlier one).
    #[must_use]
    pub fn finished(&self, number: usize) -> Option<ShardEntry> {
        let text = fs::read_to_string(self.entry_path(number)).ok()?;
        let entry: ShardEntry = serde_json::from_str(&text).ok()?;
        let size = fs::metadata(self.partial.join(&entry.file)).map_or(0, |m| m.len());
        (entry.samples == 0 || size == entry.bytes).then_some(entry)
    }

    /// Begins shard `number`, of at most `capacity` samples. What an earlier attempt left of it is
    /// overwritten.
    ///
    /// # Errors
    /// The file cannot be made.
    ///
    /// # Panics
    /// If `capacity` is 0 or does not fit a shard (2^32).
    pub fn shard(&self, number: usize, capacity: usize) -> Result<ShardWriter<'_>, StoreError> {
        assert!(capacity > 0 && capacity < u32::MAX as usize, "a shard of {capacity} samples");
        let path = self.partial.join(shard_file(number));
        let temporary = self.partial.join(format!("{}.tmp", shard_file(number)));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&temporary)
            .map_err(StoreError::write(&temporary))?;
        let fields = shard::fields(&self.spec);
        let base = shard::header_len(&self.spec);
        let channels = self.spec.channels;
        Ok(ShardWriter {
            writer: self,
            number,
            path,
            temporary: Temporary(temporary),
            file,
            offsets: offsets(&fields, base, capacity as u64),
            fields,
            capacity,
            labels: Vec::new(),
            digests: Vec::new(),
            image_ends: Vec::new(),
            sums: vec![0.0; channels],
            squares: vec![0.0; channels],
            halves: Vec::new(),
        })
    }

    /// Makes the store whole: checks that shards 0 to `shards` - 1 are finished, writes the index and
    /// renames the folder. Shards without samples are left out.
    ///
    /// # Errors
    /// A shard is not finished, there is no sample at all, or a file cannot be written.
    pub fn commit(&self, shards: usize) -> Result<Index, StoreError> {
        let mut entries = Vec::with_capacity(shards);
        for number in 0..shards {
            let entry = self.finished(number).ok_or_else(|| StoreError::Unfinished {
                dir: self.dir.clone(),
                partial: self.partial.clone(),
                missing: Some(shard_file(number)),
            })?;
            if entry.samples > 0 {
                entries.push(entry);
            }
        }
        if entries.is_empty() {
            let problem = "no sample was written: the source is empty, or all of it is bad";
            return Err(StoreError::index(&self.dir.join(INDEX_FILE), "samples", problem));
        }
        let index = Index::new(self.spec.clone(), entries);
        let path = self.partial.join(INDEX_FILE);
        write_json(&path, &index)?;
        // What readers will see: JSON may change the last digit of a float.
        let text = fs::read_to_string(&path).map_err(StoreError::io("read", &path))?;
        let index = Index::parse(&path, &text)?;
        self.remove_leftovers(&index)?;
        sync_dir(&self.partial)?;
        // Replaces an empty folder, and fails on one that holds anything.
        fs::rename(&self.partial, &self.dir).map_err(StoreError::write(&self.dir))?;
        sync_dir(self.dir.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")))?;
        Ok(index)
    }

    /// Removes what is no part of the finished store: shard entries, the spec, torn shards.
    fn remove_leftovers(&self, index: &Index) -> Result<(), StoreError> {
        for item in fs::read_dir(&self.partial).map_err(StoreError::io("list", &self.partial))? {
            let path = item.map_err(StoreError::io("list", &self.partial))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name != INDEX_FILE && !index.shards.iter().any(|s| s.file == name) {
                fs::remove_file(&path).map_err(StoreError::io("remove", &path))?;
            }
        }
        Ok(())
    }

    fn entry_path(&self, number: usize) -> PathBuf {
        self.partial.join(format!("shard-{number:05}.json"))
    }
}

/// A shard in the making. Dropped unfinished, it leaves nothing.
#[derive(Debug)]
pub struct ShardWriter<'a> {
    writer: &'a StoreWriter,
    number: usize,
    path: PathBuf,
    temporary: Temporary,
    file: File,
    fields: Vec<Field>,
    offsets: Vec<u64>,
    capacity: usize,
    labels: Vec<i64>,
    digests: Vec<u64>,
    image_ends: Vec<u64>,
    sums: Vec<f64>,
    squares: Vec<f64>,
    halves: Vec<f16>,
}

impl ShardWriter<'_> {
    /// Samples so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there are none yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// Adds a sample.
    ///
    /// # Errors
    /// [`StoreError::Sample`] where the sample is not fit to be stored (nothing is added then): values
    /// that are not finite, negative standard deviations, a label or a shape other than the spec's.
    /// [`StoreError::Full`] or [`StoreError::Io`] where it cannot be written.
    ///
    /// # Panics
    /// If the shard has its capacity already.
    pub fn push(&mut self, sample: &Sample) -> Result<(), StoreError> {
        assert!(self.len() < self.capacity, "a shard of {} samples gets one more", self.capacity);
        let spec = &self.writer.spec;
        check_sample(spec, sample).map_err(|problem| StoreError::Sample {
            path: self.path.clone(),
            sample: self.len() as u64,
            problem,
        })?;
        let (sums, squares) = channel_sums(spec, sample.latent);
        let latent: &[u8] = match spec.precision {
            Precision::F32 => bytemuck::cast_slice(sample.latent),
            Precision::F16 => {
                self.halves.resize(sample.latent.len(), f16::ZERO);
                self.halves.convert_from_f32_slice(sample.latent);
                shard::f16_bytes(&self.halves)
            }
        };
        let mut digest = SampleDigest::new(i64::from(sample.label));
        let row = self.labels.len() as u64;
        let first = shard::latent_field(spec);
        let parts = std::iter::once(latent).chain(sample.features.iter().map(|f| shard::f16_bytes(f)));
        for (k, bytes) in parts.enumerate() {
            digest.update(bytes);
            let offset = self.offsets[first + k] + row * self.fields[first + k].item;
            self.file.write_all_at(bytes, offset).map_err(StoreError::write(&self.temporary.0))?;
        }
        if spec.images {
            digest.update(sample.image);
            let begin = self.image_ends.last().copied().unwrap_or(0);
            let images = *self.offsets.last().expect("an offset after the last field");
            self.file
                .write_all_at(sample.image, images + begin)
                .map_err(StoreError::write(&self.temporary.0))?;
            self.image_ends.push(begin + sample.image.len() as u64);
        }
        self.labels.push(i64::from(sample.label));
        self.digests.push(digest.finish());
        for c in 0..spec.channels {
            self.sums[c] += sums[c];
            self.squares[c] += squares[c];
        }
        Ok(())
    }

    /// Puts the shard on disk for good. One that got no sample leaves only its entry.
    ///
    /// # Errors
    /// [`StoreError::Full`] or [`StoreError::Io`].
    pub fn finish(mut self) -> Result<ShardEntry, StoreError> {
        let spec = &self.writer.spec;
        let samples = self.len() as u64;
        let mut entry = ShardEntry {
            file: shard_file(self.number),
            samples,
            bytes: 0,
            xxh3: String::new(),
            sums: std::mem::take(&mut self.sums),
            squares: std::mem::take(&mut self.squares),
        };
        if samples > 0 {
            let image_bytes = self.image_ends.last().copied().unwrap_or(0);
            self.close_gaps(image_bytes)?;
            let write = |bytes: &[u8], offset: u64| {
                self.file.write_all_at(bytes, offset).map_err(StoreError::write(&self.temporary.0))
            };
            write(&shard::header(spec, samples, image_bytes), 0)?;
            write(bytemuck::cast_slice(&self.digests), self.offsets[DIGESTS])?;
            write(bytemuck::cast_slice(&self.labels), self.offsets[LABELS])?;
            if spec.images {
                write(bytemuck::cast_slice(&self.image_ends), self.offsets[IMAGE_ENDS])?;
            }
            entry.bytes = self.offsets.last().expect("an offset after the last field") + image_bytes;
            self.file.set_len(entry.bytes).map_err(StoreError::write(&self.temporary.0))?;
            entry.xxh3 = shard::hex(shard::file_digest(&self.file, &self.temporary.0)?);
            self.file.sync_all().map_err(StoreError::write(&self.temporary.0))?;
            fs::rename(&self.temporary.0, &self.path).map_err(StoreError::write(&self.path))?;
        }
        write_json(&self.writer.entry_path(self.number), &entry)?;
        Ok(entry)
    }

    /// Moves the tensors together where the shard got fewer samples than it had room for.
    fn close_gaps(&mut self, image_bytes: u64) -> Result<(), StoreError> {
        let base = shard::header_len(&self.writer.spec);
        let to = offsets(&self.fields, base, self.len() as u64);
        if to != self.offsets {
            let samples = self.len() as u64;
            let sizes = self.fields.iter().map(|f| f.item * samples).chain([image_bytes]);
            let mut buffer = vec![0; 1 << 20];
            for ((from, to), size) in self.offsets.iter().zip(&to).zip(sizes) {
                let mut done = 0;
                // Every target lies before its source, so copying forwards never reads what was written.
                while done < size {
                    let n = (size - done).min(buffer.len() as u64);
                    let piece = &mut buffer[..n as usize];
                    // Labels, digests and the like are not in the file yet: what is not there is zeros.
                    read_or_zeros(&self.file, piece, from + done)
                        .map_err(StoreError::io("read", &self.temporary.0))?;
                    self.file.write_all_at(piece, to + done).map_err(StoreError::write(&self.temporary.0))?;
                    done += n;
                }
            }
            self.offsets = to;
        }
        Ok(())
    }
}

/// Removes its file when dropped, if that is still there.
#[derive(Debug)]
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        // Nothing to be done about a failure here: the next attempt truncates the file.
        let _ = fs::remove_file(&self.0);
    }
}

/// The digest of one sample: label, latent, features, image, as stored.
pub(super) struct SampleDigest(Xxh3);

impl SampleDigest {
    pub(super) fn new(label: i64) -> Self {
        let mut hasher = Xxh3::new();
        hasher.update(&label.to_le_bytes());
        Self(hasher)
    }

    pub(super) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub(super) fn finish(&self) -> u64 {
        self.0.digest()
    }
}

/// Where `<dir>` grows before it is whole.
pub(in crate::data) fn partial_dir(dir: &Path) -> PathBuf {
    let mut name = dir.as_os_str().to_owned();
    // "data/" and "data" are one folder.
    if let Some(text) = name.to_str() {
        name = text.trim_end_matches('/').into();
    }
    name.push(".partial");
    name.into()
}

fn shard_file(number: usize) -> String {
    format!("shard-{number:05}.safetensors")
}

/// First byte of each field of a shard with room for `samples`, and of the images.
fn offsets(fields: &[Field], base: u64, samples: u64) -> Vec<u64> {
    let mut next = base;
    let mut offsets = vec![base];
    for field in fields {
        next += field.item * samples;
        offsets.push(next);
    }
    offsets
}

fn read_or_zeros(file: &File, out: &mut [u8], offset: u64) -> std::io::Result<()> {
    let mut done = 0;
    while done < out.len() {
        match file.read_at(&mut out[done..], offset + done as u64)? {
            0 => break,
            n => done += n,
        }
    }
    out[done..].fill(0);
    Ok(())
}

/// Why a sample is not fit to be stored.
pub(super) fn check_sample(spec: &StoreSpec, sample: &Sample) -> Result<(), String> {
    if sample.latent.len() != spec.stored_len() {
        return Err(format!("{} latent values where {} belong", sample.latent.len(), spec.stored_len()));
    }
    if sample.label as usize >= spec.classes {
        return Err(format!("label {} is not below the number of classes, {}", sample.label, spec.classes));
    }
    if spec.precision == Precision::F16
        && let Some(x) = sample.latent.iter().find(|x| x.is_finite() && x.abs() > f16::MAX.to_f32())
    {
        return Err(format!("the value {x} does not fit float16: store float32"));
    }
    check_latent(spec, sample.latent)?;
    if sample.features.len() != spec.encoders.len() {
        return Err(format!("features of {} encoders, not {}", sample.features.len(), spec.encoders.len()));
    }
    for (features, encoder) in sample.features.iter().zip(&spec.encoders) {
        if features.len() != encoder.tokens * encoder.dim {
            let belongs = encoder.tokens * encoder.dim;
            return Err(format!("{} features of {} where {belongs} belong", features.len(), encoder.id));
        }
        check_features(&encoder.id, features)?;
    }
    if spec.images == sample.image.is_empty() {
        return Err(if spec.images { "its image is missing" } else { "an image for a store without" }.into());
    }
    Ok(())
}

/// Checks that latents are finite, and spreads what the spec says.
pub(super) fn check_latent(spec: &StoreSpec, latent: &[f32]) -> Result<(), String> {
    if let Some(i) = latent.iter().position(|x| !x.is_finite()) {
        return Err(format!("latent value {i} is {}, not a finite number", latent[i]));
    }
    if spec.kind == Kind::Moments && spec.spread == Spread::Std {
        let spreads = &latent[spec.latent_len()..];
        if let Some(i) = spreads.iter().position(|&x| x < 0.0) {
            return Err(format!(
                "standard deviation {i} is {}: below 0, so these look like log variances (spread = logvar)",
                spreads[i]
            ));
        }
    }
    Ok(())
}

/// Checks that features are finite.
pub(super) fn check_features(encoder: &str, features: &[f16]) -> Result<(), String> {
    match features.iter().position(|x| !x.is_finite()) {
        Some(i) => Err(format!("feature {i} of {encoder} is {}, not a finite float16", features[i])),
        None => Ok(()),
    }
}

/// Standard deviation of a stored log variance, held to diffusers' range.
pub(super) fn logvar_to_std(logvar: f32) -> f32 {
    libm::expf(0.5 * logvar.clamp(-30.0, 20.0))
}

/// Sums and expected sums of squares of a sample's latents, by channel.
fn channel_sums(spec: &StoreSpec, stored: &[f32]) -> (Vec<f64>, Vec<f64>) {
    let plane = spec.height * spec.width;
    let (mean, spread) = stored.split_at(spec.latent_len());
    let sum = |x: &[f32], f: &dyn Fn(f32) -> f64| x.iter().map(|&v| f(v)).sum::<f64>();
    let square = |v: f32| f64::from(v) * f64::from(v);
    let sums = mean.chunks_exact(plane).map(|x| sum(x, &f64::from)).collect();
    let mut squares: Vec<f64> = mean.chunks_exact(plane).map(|x| sum(x, &square)).collect();
    for (total, x) in squares.iter_mut().zip(spread.chunks_exact(plane)) {
        *total += match spec.spread {
            Spread::Std => sum(x, &square),
            Spread::Logvar => sum(x, &|v| square(logvar_to_std(v))),
        };
    }
    (sums, squares)
}

/// The first setting of an unfinished store that differs from `spec`.
fn difference(text: &str, spec: &StoreSpec) -> Option<String> {
    let Ok(old) = serde_json::from_str::<serde_json::Value>(text) else {
        return Some(format!("{SPEC_FILE} is damaged"));
    };
    // Through text, as the old one was: serde_json's values hold float32 numbers with other digits.
    let new = serde_json::to_string(spec).expect("plain numbers and strings serialise");
    let new: serde_json::Value = serde_json::from_str(&new).expect("own JSON parses");
    let keys = new.as_object().into_iter().flatten();
    keys.map(|(key, value)| (key, value, &old[key]))
        .find(|(_, value, was)| value != was)
        .map(|(key, value, was)| format!("{key} was {was} and is {value} now"))
}

/// Writes a file as JSON so that it is there as a whole or not at all, even after a power failure.
fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<(), StoreError> {
    let text = serde_json::to_string_pretty(value).expect("plain numbers and strings serialise");
    let temporary = path.with_extension(format!("json.{}.tmp", std::process::id()));
    let write = || {
        let file = File::create(&temporary)?;
        file.write_all_at(text.as_bytes(), 0)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().map_err(|e| {
        let _ = fs::remove_file(&temporary);
        StoreError::write(path)(e)
    })
}

fn sync_dir(dir: &Path) -> Result<(), StoreError> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(StoreError::write(dir))
}
