//! The figures of `repa-dist bench data`, `start` and `import`: how fast batches come from a store, against
//! how fast pread fills a reused buffer; what a large store costs at the start; how fast an import is,
//! against copying the same bytes.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use half::f16;
use serde::Serialize;

use super::build::BuildError;
use super::draws::{Draws, Purpose};
use super::loader::{ImageTransform, Loader, LoaderError, LoaderPlan};
use super::store::{
    EncoderSpec, Kind, LatentStore, Normalisation, Precision, Sample, Spread, StoreError, StoreSpec,
    StoreWriter, View, partial_dir, write_sparse,
};
use crate::images::Image;

/// What was measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DataBench {
    /// Samples of the store.
    pub samples: u64,
    /// Bytes of the store's shards; 0 for a layout that is read in place.
    pub bytes: u64,
    /// Bytes a second that as many threads read with pread into one reused buffer each; not for a layout
    /// that is read in place.
    pub pread_bytes_per_second: Option<f64>,
    /// Bytes a second that come out of the loader, as they are stored, without draws.
    pub loader_bytes_per_second: f64,
    /// Samples a second of the same.
    pub loader_samples_per_second: f64,
    /// Samples a second with the draws that training needs (noise, posterior eps, time).
    pub training_samples_per_second: f64,
    /// Seconds from opening the store to the first batch.
    pub first_batch_seconds: f64,
}

/// The spec of ImageNet's latents at 256 pixels with the features of DINOv2-B, as REPA trains on.
#[must_use]
pub fn imagenet_spec(features: bool) -> StoreSpec {
    let encoder = EncoderSpec { id: "dinov2-vit-b".to_owned(), tokens: 256, dim: 768 };
    StoreSpec {
        kind: Kind::Moments,
        spread: Spread::Std,
        precision: Precision::F32,
        channels: 4,
        height: 32,
        width: 32,
        resolution: 256,
        autoencoder: "sd-vae-ft-ema".to_owned(),
        normalisation: Some(Normalisation::uniform(4, 0.18215)),
        classes: 1000,
        class_names: Vec::new(),
        encoders: if features { vec![encoder] } else { Vec::new() },
        images: false,
        flips: false,
        source: "synthetic".to_owned(),
    }
}

/// Writes a synthetic store of `samples` random samples at `dir`.
///
/// # Errors
/// It cannot be written.
pub fn synthetic_store(dir: &Path, spec: StoreSpec, samples: usize, seed: u64) -> Result<(), StoreError> {
    let writer = StoreWriter::create(dir, spec)?;
    let spec = writer.spec();
    let shard_len = spec.default_shard_len().min(samples.div_ceil(4)).max(1);
    let (latents, labels) = (Draws::new(seed, Purpose::Sample), Draws::new(seed, Purpose::LabelDrop));
    let mut latent = vec![0.0f32; spec.stored_len()];
    // One row of features for all: drawing them would take longer than anything that is measured.
    let features: Vec<Vec<f16>> = spec
        .encoders
        .iter()
        .map(|e| (0..e.tokens * e.dim).map(|i| f16::from_f32((i % 997) as f32 / 997.0)).collect())
        .collect();
    let shards = samples.div_ceil(shard_len);
    for number in 0..shards {
        let range = number * shard_len..((number + 1) * shard_len).min(samples);
        let mut shard = writer.shard(number, range.len())?;
        for i in range {
            latents.uniform(i as u64, &mut latent);
            let label = labels.words(i as u64, 0)[0] % spec.classes as u32;
            let image = if spec.images { latent.iter().map(|x| (x * 255.0) as u8).collect() } else { vec![] };
            let view = View { latent: &latent, features: &features };
            let flipped = spec.flips.then_some(view);
            shard.push(&Sample { label, view, flipped, image: &image })?;
        }
        shard.finish()?;
    }
    writer.commit(shards)?;
    Ok(())
}

/// What is done with the images of a store that keeps them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Images {
    /// They are not read.
    #[default]
    None,
    /// They are read.
    Bytes,
    /// They are read and decoded to RGB, 8 bits a channel.
    Decode,
}

/// How to measure.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DataBenchOptions {
    /// Samples of a batch.
    pub batch: usize,
    /// Loader threads, and threads of the comparison.
    pub threads: usize,
    /// What is done with images.
    pub images: Images,
    /// Seconds to spend on a figure.
    pub seconds: f64,
}

impl Default for DataBenchOptions {
    fn default() -> Self {
        Self { batch: 64, threads: 2, images: Images::None, seconds: 3.0 }
    }
}

/// Measures a store, or a layout that is read in place. Cached figures need data that fit memory; a pass
/// over all of them comes first.
///
/// # Errors
/// The data cannot be read.
pub fn measure(dir: &Path, options: &DataBenchOptions) -> Result<DataBench, LoaderError> {
    let begin = Instant::now();
    let store = Arc::new(super::open(dir)?);
    let plan = LoaderPlan {
        global_batch: options.batch,
        threads: options.threads,
        // As few batches as keep all threads busy: they stay in the processor's cache.
        queue_depth: options.threads,
        images: options.images != Images::None,
        draws: false,
        ..LoaderPlan::default()
    };
    drop(Loader::start(Arc::clone(&store), LoaderPlan { draws: true, ..plan.clone() })?.next()?);
    let first_batch_seconds = begin.elapsed().as_secs_f64();
    let limit = Duration::from_secs_f64(options.seconds);
    let pread_bytes_per_second = if store.is_foreign() {
        None
    } else {
        pread_rate(&store, options.threads, Duration::ZERO)?;
        Some(pread_rate(&store, options.threads, limit)?)
    };
    let side = store.index().contents.resolution;
    let transform: Option<Arc<dyn ImageTransform>> = match options.images {
        Images::Decode => Some(Arc::new(Decode { side })),
        _ => None,
    };
    let (samples, bytes) = loader_rate(&store, plan.clone(), transform.clone(), limit)?;
    let (training, _) = loader_rate(&store, LoaderPlan { draws: true, ..plan }, transform, limit)?;
    Ok(DataBench {
        samples: store.index().samples,
        bytes: store.index().shards.iter().map(|s| s.bytes).sum(),
        pread_bytes_per_second,
        loader_bytes_per_second: bytes,
        loader_samples_per_second: samples,
        training_samples_per_second: training,
        first_batch_seconds,
    })
}

/// Decodes to RGB bytes, four to a number: what other loaders hand on, without their or our preprocessing.
struct Decode {
    side: usize,
}

impl ImageTransform for Decode {
    fn len(&self) -> usize {
        (3 * self.side * self.side).div_ceil(4)
    }

    fn apply(&self, encoded: &[u8], _flipped: bool, out: &mut [f32]) -> Result<(), String> {
        let image = Image::from_bytes(encoded)?;
        let out: &mut [u8] = bytemuck::cast_slice_mut(out);
        let len = image.pixels.len();
        let to = out.get_mut(..len).ok_or_else(|| format!("is {}x{} pixels", image.width, image.height))?;
        to.copy_from_slice(&image.pixels);
        Ok(())
    }
}

/// Threads read all shards in pieces of one sample's size, over and over: bytes a second. Every shard is
/// read at least once.
fn pread_rate(store: &LatentStore, threads: usize, limit: Duration) -> Result<f64, StoreError> {
    let spec = &store.index().contents;
    let piece = spec.stored_len() * 4 + spec.encoders.iter().map(|e| e.tokens * e.dim * 2).sum::<usize>();
    let paths: Vec<_> = store.index().shards.iter().map(|s| store.dir().join(&s.file)).collect();
    let total = AtomicU64::new(0);
    let begin = Instant::now();
    let read = |thread: usize| -> Result<(), StoreError> {
        let mut buffer = vec![0u8; piece];
        let mut first = true;
        while first || begin.elapsed() < limit {
            for path in paths.iter().skip(thread).step_by(threads) {
                let file = File::open(path).map_err(StoreError::io("open", path))?;
                let mut offset = 0;
                loop {
                    let n = file.read_at(&mut buffer, offset).map_err(StoreError::io("read", path))?;
                    if n == 0 || (!first && begin.elapsed() >= limit) {
                        break;
                    }
                    offset += n as u64;
                    total.fetch_add(n as u64, Ordering::Relaxed);
                }
            }
            first = false;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..threads).map(|thread| scope.spawn(move || read(thread))).collect();
        readers.into_iter().try_for_each(|r| r.join().expect("the reading thread does not panic"))
    })?;
    Ok(total.load(Ordering::Relaxed) as f64 / begin.elapsed().as_secs_f64())
}

/// Samples and bytes a second out of a loader, after one pass over the data.
fn loader_rate(
    store: &Arc<LatentStore>,
    plan: LoaderPlan,
    transform: Option<Arc<dyn ImageTransform>>,
    limit: Duration,
) -> Result<(f64, f64), LoaderError> {
    let batches = (store.len() / plan.global_batch).clamp(4, 1000);
    let mut loader = Loader::start_with(Arc::clone(store), plan, transform)?;
    // The queue fills, buffers are made and files are cached before the clock starts.
    for _ in 0..batches {
        let (batch, _) = loader.next()?;
        loader.recycle(batch);
    }
    let begin = Instant::now();
    let (mut samples, mut bytes) = (0, 0);
    while begin.elapsed() < limit {
        let (batch, _) = loader.next()?;
        samples += batch.len();
        bytes += batch.stored_bytes();
        loader.recycle(batch);
    }
    let seconds = begin.elapsed().as_secs_f64();
    Ok((samples as f64 / seconds, bytes as f64 / seconds))
}

/// Makes a synthetic store in a fresh folder under `parent`, measures it and removes it.
///
/// # Errors
/// It cannot be written or read.
pub fn run(parent: &Path, samples: usize, options: &DataBenchOptions) -> Result<DataBench, LoaderError> {
    in_folder(parent, |dir| {
        synthetic_store(dir, imagenet_spec(true), samples, 0)?;
        measure(dir, options)
    })
}

/// What a store of many samples costs at the start.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StartBench {
    /// Samples of the store.
    pub samples: usize,
    /// Seconds from opening the store to the first batch.
    pub first_batch_seconds: f64,
    /// Seconds for the 100 batches after that, which touch samples all over the store.
    pub next_batches_seconds: f64,
    /// Largest resident memory of this process so far, in bytes; 0 where the system does not say.
    pub peak_memory_bytes: u64,
}

/// Makes a store of `samples` samples of moments in sparse files (its size on paper: 32 KiB a sample) in a fresh
/// folder under `parent`, loads from it and removes it.
///
/// # Errors
/// It cannot be written or read.
pub fn run_start(parent: &Path, samples: usize, batch: usize) -> Result<StartBench, LoaderError> {
    in_folder(parent, |dir| {
        write_sparse(dir, imagenet_spec(false), samples)?;
        let begin = Instant::now();
        let store = Arc::new(LatentStore::open(dir)?);
        let mut loader = Loader::start(store, LoaderPlan { global_batch: batch, ..LoaderPlan::default() })?;
        let (batch, _) = loader.next()?;
        loader.recycle(batch);
        let first = begin.elapsed();
        for _ in 0..100 {
            let (batch, _) = loader.next()?;
            loader.recycle(batch);
        }
        Ok(StartBench {
            samples,
            first_batch_seconds: first.as_secs_f64(),
            next_batches_seconds: (begin.elapsed() - first).as_secs_f64(),
            peak_memory_bytes: peak_memory().unwrap_or(0),
        })
    })
}

/// This process's largest resident memory so far (VmHWM), in bytes; None where the system does not say.
pub(crate) fn peak_memory() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// How fast an import is.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ImportBench {
    /// Samples, in REPA's layout: one .npy of moments each.
    pub samples: usize,
    /// Bytes of all files.
    pub bytes: u64,
    /// Seconds of each copy of all of them, one after another, into one file, fsync included.
    pub copy_seconds: Vec<f64>,
    /// Seconds of each import into a store.
    pub import_seconds: Vec<f64>,
    /// Median of the imports over median of the copies.
    pub ratio: f64,
}

/// Makes a tree of `samples` samples in REPA's layout in a fresh folder under `parent`, copies and imports it
/// in turns, and removes it.
///
/// # Errors
/// It cannot be written or read.
pub fn run_import(parent: &Path, samples: usize, turns: usize) -> Result<ImportBench, BuildError> {
    in_folder(parent, |dir| {
        let names = repa_tree(dir, samples)?;
        let comm = repa_comm::Single::new();
        let options = super::import::ImportOptions::default();
        let (mut copies, mut imports, mut bytes) = (Vec::new(), Vec::new(), 0);
        for turn in 0..=turns {
            let begin = Instant::now();
            bytes = copy_files(dir, &names)?;
            let copied = begin.elapsed().as_secs_f64();
            let begin = Instant::now();
            let store = dir.join("store");
            super::import::import(&comm, dir, &store, &options, &mut |_| ())
                .map_err(|e| BuildError::Layout { path: dir.to_owned(), problem: e.message })?;
            let imported = begin.elapsed().as_secs_f64();
            fs::remove_dir_all(&store).map_err(StoreError::io("remove", &store))?;
            // The first turn warms the page cache.
            if turn > 0 {
                copies.push(copied);
                imports.push(imported);
            }
        }
        let ratio = median(&imports) / median(&copies);
        Ok(ImportBench { samples, bytes, copy_seconds: copies, import_seconds: imports, ratio })
    })
}

/// Writes `dir`/vae-sd, and gives the names of its latents.
fn repa_tree(dir: &Path, samples: usize) -> Result<Vec<String>, StoreError> {
    let root = dir.join("vae-sd");
    let draws = Draws::new(0, Purpose::Sample);
    let mut moments = vec![0.0f32; 8 * 32 * 32];
    let mut members = Vec::with_capacity(samples);
    for i in 0..samples {
        let name = format!("{:05}/img-mean-std-{i:08}.npy", i / 1000);
        let path = root.join(&name);
        if i % 1000 == 0 {
            let folder = root.join(format!("{:05}", i / 1000));
            fs::create_dir_all(&folder).map_err(StoreError::write(&folder))?;
        }
        draws.uniform(i as u64, &mut moments);
        fs::write(&path, super::source::npy::to_bytes(&[8, 32, 32], &moments))
            .map_err(StoreError::write(&path))?;
        members.push((name, i % 1000));
    }
    let path = root.join("dataset.json");
    let json = serde_json::json!({ "labels": members });
    fs::write(&path, json.to_string()).map_err(StoreError::write(&path))?;
    Ok(members.into_iter().map(|(name, _)| name).collect())
}

/// Copies files one after another into one file, as plainly as can be.
fn copy_files(dir: &Path, names: &[String]) -> Result<u64, StoreError> {
    let path = dir.join("copy");
    let mut to = File::create(&path).map_err(StoreError::write(&path))?;
    let mut bytes = 0;
    let mut buffer = Vec::new();
    for name in names {
        let from = dir.join("vae-sd").join(name);
        buffer.clear();
        File::open(&from)
            .and_then(|mut f| f.read_to_end(&mut buffer))
            .map_err(StoreError::io("read", &from))?;
        to.write_all(&buffer).map_err(StoreError::write(&path))?;
        bytes += buffer.len() as u64;
    }
    to.sync_all().map_err(StoreError::write(&path))?;
    drop(to);
    fs::remove_file(&path).map_err(StoreError::io("remove", &path))?;
    Ok(bytes)
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

fn in_folder<T, E>(parent: &Path, work: impl FnOnce(&Path) -> Result<T, E>) -> Result<T, E> {
    let dir = parent.join(format!("bench-data-{}", std::process::id()));
    let result = work(&dir);
    for path in [partial_dir(&dir), dir] {
        // What could not be made need not be removed.
        let _ = fs::remove_dir_all(path);
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bench_gives_figures_and_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let options = DataBenchOptions { batch: 8, seconds: 0.05, ..DataBenchOptions::default() };
        let figures = run(folder.path(), 40, &options).unwrap();
        // 40 samples of 32 KiB of moments and 384 KiB of features.
        assert!(figures.bytes > 40 * 416 * 1024 && figures.bytes < 40 * 418 * 1024, "{figures:?}");
        assert!(
            figures.pread_bytes_per_second.unwrap() > 1e6 && figures.loader_bytes_per_second > 1e6,
            "{figures:?}"
        );
        let bytes = figures.loader_samples_per_second * 416.0 * 1024.0;
        assert!((bytes / figures.loader_bytes_per_second - 1.0).abs() < 1e-6, "{figures:?}");
        assert!(figures.training_samples_per_second < 2.0 * figures.loader_samples_per_second, "{figures:?}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn an_import_is_measured_against_a_copy() {
        let folder = tempfile::tempdir().unwrap();
        let figures = run_import(folder.path(), 30, 3).unwrap();
        assert_eq!((figures.samples, figures.bytes), (30, 30 * (128 + 32 * 1024)));
        assert_eq!((figures.copy_seconds.len(), figures.import_seconds.len()), (3, 3));
        let ratio = median(&figures.import_seconds) / median(&figures.copy_seconds);
        assert!(figures.ratio > 0.0 && figures.ratio == ratio, "{figures:?}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_million_samples_cost_no_memory_and_no_time_to_begin() {
        let folder = tempfile::tempdir().unwrap();
        let figures = run_start(folder.path(), 1_000_000, 16).unwrap();
        assert!(figures.first_batch_seconds < 1.0, "{figures:?}");
        assert!((1..300 << 20).contains(&figures.peak_memory_bytes), "{figures:?}");
    }
}
