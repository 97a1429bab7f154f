//! The figures of `repa-dist bench data`: how fast batches come from a store, against how fast pread
//! fills a reused buffer.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use half::f16;
use serde::Serialize;

use super::draws::{Draws, Purpose};
use super::loader::{Loader, LoaderError, LoaderPlan};
use super::store::{
    EncoderSpec, Kind, LatentStore, Normalisation, Precision, Sample, Spread, StoreError, StoreSpec,
    StoreWriter, partial_dir, write_sparse,
};

/// What was measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DataBench {
    /// Bytes of the store's shards.
    pub bytes: u64,
    /// Bytes a second that two threads read with pread into one reused buffer each.
    pub pread_bytes_per_second: f64,
    /// Bytes a second that come out of the loader as moments and features, without draws.
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
    let features: Vec<&[f16]> = features.iter().map(Vec::as_slice).collect();
    let shards = samples.div_ceil(shard_len);
    for number in 0..shards {
        let range = number * shard_len..((number + 1) * shard_len).min(samples);
        let mut shard = writer.shard(number, range.len())?;
        for i in range {
            latents.uniform(i as u64, &mut latent);
            let label = labels.words(i as u64, 0)[0] % spec.classes as u32;
            let image = if spec.images { latent.iter().map(|x| (x * 255.0) as u8).collect() } else { vec![] };
            shard.push(&Sample { latent: &latent, label, features: &features, image: &image })?;
        }
        shard.finish()?;
    }
    writer.commit(shards)?;
    Ok(())
}

/// Measures an existing store for about `seconds` a figure. Cached figures need a store that fits memory; the
/// first pass warms it.
///
/// # Errors
/// The store cannot be read.
pub fn measure(dir: &Path, batch: usize, seconds: f64) -> Result<DataBench, LoaderError> {
    let begin = Instant::now();
    let store = Arc::new(LatentStore::open(dir)?);
    let plan =
        LoaderPlan { global_batch: batch, threads: 2, queue_depth: 4, draws: false, ..LoaderPlan::default() };
    drop(Loader::start(Arc::clone(&store), LoaderPlan { draws: true, ..plan.clone() })?.next()?);
    let first_batch_seconds = begin.elapsed().as_secs_f64();
    let limit = Duration::from_secs_f64(seconds);
    pread_rate(&store, Duration::ZERO)?;
    let pread_bytes_per_second = pread_rate(&store, limit)?;
    let (samples, bytes) = loader_rate(&store, plan.clone(), limit)?;
    let (training, _) = loader_rate(&store, LoaderPlan { draws: true, ..plan }, limit)?;
    Ok(DataBench {
        bytes: store.index().shards.iter().map(|s| s.bytes).sum(),
        pread_bytes_per_second,
        loader_bytes_per_second: bytes,
        loader_samples_per_second: samples,
        training_samples_per_second: training,
        first_batch_seconds,
    })
}

/// Two threads read all shards in pieces of one sample's size, over and over: bytes a second.
/// Every shard is read at least once.
fn pread_rate(store: &LatentStore, limit: Duration) -> Result<f64, StoreError> {
    let spec = &store.index().contents;
    let piece = spec.stored_len() * 4 + spec.encoders.iter().map(|e| e.tokens * e.dim * 2).sum::<usize>();
    let paths: Vec<_> = store.index().shards.iter().map(|s| store.dir().join(&s.file)).collect();
    let total = AtomicU64::new(0);
    let begin = Instant::now();
    let read = |thread: usize| -> Result<(), StoreError> {
        let mut buffer = vec![0u8; piece];
        let mut first = true;
        while first || begin.elapsed() < limit {
            for path in paths.iter().skip(thread).step_by(2) {
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
        let other = scope.spawn(|| read(1));
        read(0)?;
        other.join().expect("the reading thread does not panic")
    })?;
    Ok(total.load(Ordering::Relaxed) as f64 / begin.elapsed().as_secs_f64())
}

/// Samples and bytes a second out of a loader.
fn loader_rate(
    store: &Arc<LatentStore>,
    plan: LoaderPlan,
    limit: Duration,
) -> Result<(f64, f64), LoaderError> {
    let mut loader = Loader::start(Arc::clone(store), plan)?;
    // The queue fills and the buffers are made before the clock starts.
    for _ in 0..4 {
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
pub fn run(parent: &Path, samples: usize, batch: usize, seconds: f64) -> Result<DataBench, LoaderError> {
    in_folder(parent, |dir| {
        synthetic_store(dir, imagenet_spec(true), samples, 0)?;
        measure(dir, batch, seconds)
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

/// This process's VmHWM.
fn peak_memory() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

fn in_folder<T>(parent: &Path, work: impl FnOnce(&Path) -> Result<T, LoaderError>) -> Result<T, LoaderError> {
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
        let figures = run(folder.path(), 40, 8, 0.05).unwrap();
        // 40 samples of 32 KiB of moments and 384 KiB of features.
        assert!(figures.bytes > 40 * 416 * 1024 && figures.bytes < 40 * 418 * 1024, "{figures:?}");
        assert!(figures.pread_bytes_per_second > 1e6 && figures.loader_bytes_per_second > 1e6, "{figures:?}");
        let bytes = figures.loader_samples_per_second * 416.0 * 1024.0;
        assert!((bytes / figures.loader_bytes_per_second - 1.0).abs() < 1e-6, "{figures:?}");
        assert!(figures.training_samples_per_second < 2.0 * figures.loader_samples_per_second, "{figures:?}");
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
