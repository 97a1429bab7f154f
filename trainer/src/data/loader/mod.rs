//! Batches for the training thread: samples read and random numbers drawn ahead of need, by
//! background threads, into bounded queues. What a batch holds follows from the plan's seed and from
//! sample numbers alone: not from the number of threads, and not from the world size.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use half::f16;
use metrics::{counter, gauge};

use super::batch::rank_samples;
use super::draws::{Draws, Purpose};
use super::order::Order;
use super::store::{Kind, LatentStore, Precision, StoreError};
use crate::telemetry::names;

/// What a rank is to be given.
#[derive(Debug, Clone, PartialEq)]
pub struct LoaderPlan {
    /// The run's seed: order and all draws follow from it.
    pub seed: u64,
    /// The run's sample number at which the first batch begins (step * global batch, when a run goes on).
    pub start_sample: u64,
    /// Samples of a step, over all ranks.
    pub global_batch: usize,
    /// This rank.
    pub rank: usize,
    /// Number of ranks.
    pub world: usize,
    /// Batches held ready, at least 1; rounded up to a multiple of `threads`.
    pub queue_depth: usize,
    /// Threads that read, at least 1. They change no bit.
    pub threads: usize,
    /// Probability that a label becomes the null class.
    pub label_drop: f32,
    /// Whether to read stored features.
    pub features: bool,
    /// Whether to read the encoded images.
    pub images: bool,
    /// Whether every other sample, by a draw of its own, is taken mirrored.
    pub flip: bool,
    /// Whether to draw noise and posterior eps (a benchmark of reading alone does without).
    pub draws: bool,
}

impl Default for LoaderPlan {
    fn default() -> Self {
        Self {
            seed: 0,
            start_sample: 0,
            global_batch: 256,
            rank: 0,
            world: 1,
            queue_depth: 4,
            threads: 1,
            label_drop: 0.1,
            features: true,
            images: false,
            flip: false,
            draws: true,
        }
    }
}

/// What loader threads make of a sample's encoded image.
pub trait ImageTransform: Send + Sync {
    /// Numbers that an image becomes.
    fn len(&self) -> usize;

    /// Whether it becomes none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Writes them to `out`; `flipped` asks for those of the mirrored image.
    ///
    /// # Errors
    /// What is wrong with the image.
    fn apply(&self, encoded: &[u8], flipped: bool, out: &mut [f32]) -> Result<(), String>;
}

/// Why there is no next batch.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoaderError {
    /// The store cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The plan makes no sense.
    #[error("{key} is {value}: {fix}")]
    Plan {
        /// The setting.
        key: &'static str,
        /// Its value.
        value: String,
        /// What it should be.
        fix: &'static str,
    },
    /// An image cannot be used.
    #[error("the image of sample {sample} of {}: {problem}", dir.display())]
    Image {
        /// The store.
        dir: PathBuf,
        /// Its number in the store.
        sample: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// What makes features of images failed.
    #[error("cannot compute features: {0}")]
    Features(String),
    /// The threads cannot be started.
    #[error("cannot start a loader thread: {0}")]
    Thread(std::io::Error),
    /// An earlier call gave the error, or a loader thread panicked.
    #[error("the data loader has ended after an earlier error")]
    Ended,
}

/// This rank's part of one global batch: B samples, host arrays, outermost dimension first. B may
/// be 0 where the world is larger than the batch.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Batch {
    /// The run's sample numbers.
    pub samples: Range<u64>,
    /// Index into the data set of each sample; [B].
    pub indices: Vec<usize>,
    /// Moments (mean ‖ std; [B, 2C, h, w]) or latents ([B, C, h, w]), not normalised.
    pub latents: Vec<f32>,
    /// Standard normal draws for the posterior, [B, C, h, w]; empty where the store holds latents.
    pub posterior_eps: Vec<f32>,
    /// The noise to mix in, standard normal; [B, C, h, w].
    pub noise: Vec<f32>,
    /// Uniform in [0, 1), for the time; [B].
    pub time_uniform: Vec<f32>,
    /// Standard normal, for the time where its distribution needs one; [B].
    pub time_normal: Vec<f32>,
    /// Labels, the null class (= number of classes) where dropped; [B].
    pub labels: Vec<u32>,
    /// Labels as stored; [B].
    pub labels_original: Vec<u32>,
    /// Which samples are the mirrored ones; [B].
    pub flipped: Vec<bool>,
    /// Features by encoder; [B, tokens, dim] each.
    pub features: Vec<Vec<f16>>,
    /// Encoded images, never mirrored; [B] where the plan asks for them.
    pub images: Vec<Vec<u8>>,
    /// What the transform made of the images; [B, its length].
    pub pixels: Vec<f32>,
}

impl Batch {
    /// Number of samples B.
    #[must_use]
    pub fn len(&self) -> usize {
        self.indices.len()
    }

    /// Whether this rank has no sample of the global batch.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.indices.is_empty()
    }

    /// Bytes read from the store for it.
    #[must_use]
    pub fn stored_bytes(&self) -> usize {
        self.latents.len() * 4
            + self.features.iter().map(|f| f.len() * 2).sum::<usize>()
            + self.images.iter().map(Vec::len).sum::<usize>()
    }
}

/// Prefetches batches. Dropping it ends and joins its threads.
#[derive(Debug)]
pub struct Loader {
    queues: Vec<Receiver<Result<Batch, LoaderError>>>,
    threads: Vec<JoinHandle<()>>,
    shared: Arc<Shared>,
    next: u64,
    failed: bool,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    spare: Mutex<Vec<Batch>>,
}

impl Loader {
    /// Starts reading ahead.
    ///
    /// # Errors
    /// [`LoaderError::Plan`] names the setting that makes no sense; [`LoaderError::Thread`].
    pub fn start(store: Arc<LatentStore>, plan: LoaderPlan) -> Result<Self, LoaderError> {
        Self::start_with(store, plan, None)
    }

    /// Starts reading ahead, and puts every image through `transform` (which implies `plan.images`).
    ///
    /// # Errors
    /// As for [`Loader::start`].
    pub fn start_with(
        store: Arc<LatentStore>,
        mut plan: LoaderPlan,
        transform: Option<Arc<dyn ImageTransform>>,
    ) -> Result<Self, LoaderError> {
        plan.images |= transform.is_some();
        check(&plan, &store)?;
        let shared = Arc::new(Shared::default());
        let mut loader = Self { queues: Vec::new(), threads: Vec::new(), shared, next: 0, failed: false };
        let depth = plan.queue_depth.div_ceil(plan.threads);
        for thread in 0..plan.threads {
            // The batch that a thread holds while its queue is full counts as one of the depth.
            let (sender, queue) = sync_channel(depth - 1);
            let reader =
                Reader { transform: transform.clone(), ..Reader::new(Arc::clone(&store), plan.clone()) };
            let shared = Arc::clone(&loader.shared);
            let handle = std::thread::Builder::new()
                .name(format!("loader-{thread}"))
                .spawn(move || reader.run(thread, &sender, &shared))
                .map_err(LoaderError::Thread)?;
            loader.queues.push(queue);
            loader.threads.push(handle);
        }
        Ok(loader)
    }

    /// The next batch, in the order of sample numbers, and how long it had to be waited for.
    ///
    /// # Errors
    /// The store could not be read. Every later call gives [`LoaderError::Ended`].
    #[expect(clippy::should_implement_trait, reason = "it never ends, and gives the waiting time")]
    pub fn next(&mut self) -> Result<(Batch, Duration), LoaderError> {
        if self.failed {
            return Err(LoaderError::Ended);
        }
        let begin = Instant::now();
        let queue = &self.queues[(self.next % self.queues.len() as u64) as usize];
        let result = queue.recv().unwrap_or(Err(LoaderError::Ended));
        self.next += 1;
        self.failed = result.is_err();
        if !self.failed {
            gauge!(names::LOADER_QUEUE_DEPTH).decrement(1.0);
        }
        result.map(|batch| (batch, begin.elapsed()))
    }

    /// Gives a batch's buffers back, to be filled anew.
    pub fn recycle(&self, batch: Batch) {
        if let Ok(mut spare) = self.shared.spare.lock()
            && spare.len() < 2
        {
            spare.push(batch);
        }
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        // Without receivers, a thread that waits for room in its queue ends.
        self.queues.clear();
        for thread in self.threads.drain(..) {
            // A panic of the thread has been reported on its standard error.
            let _ = thread.join();
        }
    }
}

/// Makes one batch of a plan without threads, for those who need a few (figures, tests).
///
/// # Errors
/// The plan makes no sense or the store cannot be read.
pub fn read_batch(store: &Arc<LatentStore>, plan: &LoaderPlan) -> Result<Batch, LoaderError> {
    check(plan, store)?;
    let mut batch = Batch::default();
    Reader::new(Arc::clone(store), plan.clone()).fill(&mut batch, 0, &AtomicBool::new(false))?;
    Ok(batch)
}

fn check(plan: &LoaderPlan, store: &LatentStore) -> Result<(), LoaderError> {
    let bad = |key, value: String, fix| Err(LoaderError::Plan { key, value, fix });
    if plan.global_batch == 0 {
        return bad("global_batch", "0".to_owned(), "at least 1 is needed");
    }
    if plan.queue_depth == 0 {
        return bad("queue_depth", "0".to_owned(), "at least 1 is needed");
    }
    if plan.threads == 0 {
        return bad("loader threads", "0".to_owned(), "at least 1 is needed");
    }
    if !(0.0..=1.0).contains(&plan.label_drop) {
        return bad("label_drop", plan.label_drop.to_string(), "it is a probability, 0 to 1");
    }
    if plan.rank >= plan.world {
        return bad("rank", plan.rank.to_string(), "it must be below the number of ranks");
    }
    if plan.images && !store.index().contents.images {
        return bad("images", "true".to_owned(), "the data set keeps no images; make it again with them");
    }
    // Latents are not mirrored by mirroring their pixels: the data set has to hold both.
    if plan.flip && !store.index().contents.flips {
        return bad(
            "data.flip",
            "true".to_owned(),
            "the data set holds no flipped copies; make it again with `repa-dist data encode --flips`",
        );
    }
    Ok(())
}

/// What a thread needs to make batches.
struct Reader {
    store: Arc<LatentStore>,
    plan: LoaderPlan,
    order: Order,
    posterior: Draws,
    noise: Draws,
    time: Draws,
    label_drop: Draws,
    flip: Draws,
    transform: Option<Arc<dyn ImageTransform>>,
}

impl Reader {
    fn new(store: Arc<LatentStore>, plan: LoaderPlan) -> Self {
        let draws = |purpose| Draws::new(plan.seed, purpose);
        Self {
            order: Order::new(plan.seed, store.len()),
            posterior: draws(Purpose::Posterior),
            noise: draws(Purpose::Noise),
            time: draws(Purpose::Time),
            label_drop: draws(Purpose::LabelDrop),
            flip: draws(Purpose::Flip),
            transform: None,
            store,
            plan,
        }
    }

    /// Makes every `threads`-th batch, beginning with number `thread`, until told to stop or an error.
    fn run(&self, thread: usize, sender: &SyncSender<Result<Batch, LoaderError>>, shared: &Shared) {
        for number in (thread as u64..).step_by(self.plan.threads) {
            let mut batch = shared.spare.lock().ok().and_then(|mut s| s.pop()).unwrap_or_default();
            let result = self.fill(&mut batch, number, &shared.stop);
            if shared.stop.load(Ordering::Relaxed) {
                return;
            }
            let failed = result.is_err();
            if !failed {
                counter!(names::LOADER_BYTES).increment(self.bytes(&batch));
                // The one that waits for room in the queue is ready, too.
                gauge!(names::LOADER_QUEUE_DEPTH).increment(1.0);
            }
            if sender.send(result.map(|()| batch)).is_err() || failed {
                return;
            }
        }
    }

    /// What a batch took to read, as it is stored.
    fn bytes(&self, batch: &Batch) -> u64 {
        let element = match self.store.index().contents.precision {
            Precision::F32 => size_of::<f32>(),
            Precision::F16 => size_of::<f16>(),
        };
        let features: usize = batch.features.iter().map(Vec::len).sum();
        let images: usize = batch.images.iter().map(Vec::len).sum();
        (batch.latents.len() * element + features * size_of::<f16>() + images) as u64
    }

    /// Fills `batch` with this rank's part of the plan's batch `number`; leaves off early on `stop`.
    fn fill(&self, batch: &mut Batch, number: u64, stop: &AtomicBool) -> Result<(), LoaderError> {
        let plan = &self.plan;
        let spec = &self.store.index().contents;
        let start = plan.start_sample + number * plan.global_batch as u64;
        let samples = rank_samples(start, plan.global_batch, plan.rank, plan.world);
        let count = (samples.end - samples.start) as usize;
        let (stored, plane) = (spec.stored_len(), spec.latent_len());
        let eps = if plan.draws && spec.kind == Kind::Moments { plane } else { 0 };
        let noise = if plan.draws { plane } else { 0 };
        let encoders = if plan.features { spec.encoders.as_slice() } else { &[] };
        let pixels = self.transform.as_ref().map_or(0, |transform| transform.len());

        batch.samples = samples.clone();
        batch.indices.clear();
        batch.latents.resize(count * stored, 0.0);
        batch.posterior_eps.resize(count * eps, 0.0);
        batch.noise.resize(count * noise, 0.0);
        batch.features.resize_with(encoders.len(), Vec::new);
        for (features, e) in batch.features.iter_mut().zip(encoders) {
            features.resize(count * e.tokens * e.dim, f16::ZERO);
        }
        batch.images.resize_with(if plan.images { count } else { 0 }, Vec::new);
        batch.pixels.resize(count * pixels, 0.0);
        for list in [&mut batch.labels, &mut batch.labels_original] {
            list.clear();
        }
        batch.flipped.clear();
        batch.time_uniform.clear();
        batch.time_normal.clear();

        for (row, sample) in samples.enumerate() {
            if stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            let i = self.order.index(sample);
            batch.indices.push(i);
            let flipped = plan.flip && self.flip.uniform_one(sample, 0) < 0.5;
            batch.flipped.push(flipped);
            self.store.latent(i, flipped, &mut batch.latents[row * stored..][..stored])?;
            for (k, (features, e)) in batch.features.iter_mut().zip(encoders).enumerate() {
                let len = e.tokens * e.dim;
                self.store.features(k, i, flipped, &mut features[row * len..][..len])?;
            }
            if plan.images {
                self.store.image(i, &mut batch.images[row])?;
            }
            if let Some(transform) = &self.transform {
                let pixels = &mut batch.pixels[row * pixels..][..pixels];
                transform.apply(&batch.images[row], flipped, pixels).map_err(|problem| {
                    LoaderError::Image { dir: self.store.dir().to_owned(), sample: i, problem }
                })?;
            }
            let label = self.store.label(i)?;
            batch.labels_original.push(label);
            let dropped = self.label_drop.uniform_one(sample, 0) < plan.label_drop;
            batch.labels.push(if dropped { spec.classes as u32 } else { label });
            self.posterior.normal(sample, &mut batch.posterior_eps[row * eps..][..eps]);
            self.noise.normal(sample, &mut batch.noise[row * noise..][..noise]);
            // The uniform number is of the stream's first block, the normal one of its second.
            batch.time_uniform.push(self.time.uniform_one(sample, 0));
            let mut normal = [0.0];
            self.time.normal_from(sample, 1, &mut normal);
            batch.time_normal.push(normal[0]);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
