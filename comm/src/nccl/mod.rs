//! The communicator over NVIDIA's NCCL: sums of floats on GPUs; everything else by the communicator that it wraps.
//!
//! # What goes where
//! Sums of float32, float16 and bfloat16, reduce-scatter and all-gather of float32 go over NCCL. Other types, smallest
//! and largest values (NCCL's hide a NaN), bytes and barriers go over the inner communicator, normally MPI, and so
//! does the start: the ranks agree that all of them can, and rank 0's unique id is broadcast.
//!
//! NCCL fixes no order of additions: sums agree with the definition of this crate up to rounding, and all ranks get
//! the same bits. float16 and bfloat16 in host memory are added up in float32, as everywhere. But what travels as
//! bfloat16 ([`Wire::Bf16`]), and half precision on the device, NCCL may round between the additions; with two ranks
//! there is nothing in between.
//!
//! # How
//! One thread makes all calls of NCCL, in the order of their asking, as for MPI. Vectors in host memory pass through
//! three pairs of pinned and device buffers, so that the way to the device, NCCL's work and the way back overlap. Vectors
//! on the device ([`Nccl::start_device`]) are ordered with the caller's stream, or with all streams of the context, by
//! events, before and after, and nobody waits on the host.
//!
//! No call blocks for ever: NCCL's communicator is a non-blocking one, and events are polled, with NCCL's own error
//! state. After a missed deadline or an error the communicator is aborted, which also ends its work on the device, and
//! refuses further work. NCCL does not know for whom it waits, so the error names no rank.
//!
//! # What it needs
//! The NVIDIA driver, and `libnccl.so.2` of version 2.18 or later where the loader finds it (the distribution's package
//! libnccl2, or PyPI's nvidia-nccl-cu12 with its folder `nvidia/nccl/lib` in `LD_LIBRARY_PATH`), or named by the
//! environment variable `REPA_NCCL_LIBRARY`. All ranks need the same version. [`available`] says what is there.
//!
//! Each rank needs a GPU of its own, as a rule. Two ranks can share one (for tests; NCCL calls it experimental) with
//! NCCL 2.30 or later and `NCCL_MULTI_RANK_GPU_ENABLE=1` in the environment of all ranks, together with
//! `NCCL_NVLS_ENABLE=0` and a low `NCCL_MAX_CTAS` such as 4, without which the ranks' kernels may wait for each other for
//! ever. Sharing is refused at the start otherwise.
//!
//! # What has been tested
//! Never on a GPU so far: none was at hand, so no figure of speed and no word on how NCCL itself behaves (its kernels, the
//! end by ncclCommAbort, sharing a GPU). Against the real libnccl (2.32), by hand: that it is found and loaded, with all functions
//! that are used. On a driver and an NCCL that are only pretended (`tests/stand_in`): everything else, with the suite that
//! all communicators pass, and under the trainer, on burn's own memory. On a host with a GPU that suite runs on it, too.

mod device;
mod driver;
mod handle;
mod library;
mod meeting;
mod plan;
mod staging;
mod thread;
mod who;

use crate::communicator::PendingState;
use crate::reduce::Phases;
use crate::worker::{Spent, Worker};
use crate::{
    Background, Board, Call, Collective, CommError, Communicator, Pending, ReduceOp, Topology, Traffic,
    Values, Wire, shard_range,
};
use driver::{Device, Event};
use half::bf16;
use staging::Carries;
use std::ops::Range;
use std::sync::mpsc::channel;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use thread::{Engine, Manner};
use who::Who;

pub use cudarc::driver::sys::{CUdeviceptr, CUstream};
pub use device::{After, DevicePending, DeviceType, DeviceValues};

/// What NCCL would run on here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Available {
    /// NCCL's version, such as "2.30.3".
    pub version: String,
    /// Number of GPUs that this process sees.
    pub gpus: usize,
    /// Whether this NCCL can have several ranks on one GPU (with NCCL_MULTI_RANK_GPU_ENABLE=1).
    pub shares_gpus: bool,
}

/// How many GPUs this process sees, by NVIDIA's driver; 0 where there is no driver that works.
#[must_use]
pub fn visible_gpus() -> usize {
    driver::devices().unwrap_or(0)
}

/// Whether this host has what NCCL needs. Touches no GPU.
///
/// # Errors
/// What is missing, and what to do.
pub fn available() -> Result<Available, CommError> {
    let find = || {
        let version = library::Library::find()?.version;
        let shares_gpus = version >= meeting::SHARING;
        match driver::devices()? {
            0 => Err("this process sees no GPU".to_owned()),
            gpus => Ok(Available { version: version.to_string(), gpus, shares_gpus }),
        }
    };
    find().map_err(|problem| CommError::Start(format!("NCCL cannot be used: {problem}")))
}

/// The communicator of a job on GPUs.
pub struct Nccl {
    inner: Arc<dyn Communicator>,
    worker: Worker<Engine>,
    device: Device,
    description: String,
    spent: Arc<Spent>,
    /// The first error, of NCCL or of the inner communicator.
    failed: Arc<OnceLock<CommError>>,
    board: OnceLock<Arc<Board>>,
}

impl Nccl {
    /// Starts NCCL between the ranks of `inner`, each on its GPU number `device` (as the process sees them): a
    /// collective. `deadline` as in [`Communicator::set_deadline`], for the start as well.
    ///
    /// # Errors
    /// The same on all ranks where one has no library, driver or such GPU, versions differ, or ranks share a GPU that
    /// they cannot share. Another error of NCCL or a missed deadline only on the ranks that see it: end the job by
    /// [`crate::abort()`] then.
    pub fn start(
        inner: Arc<dyn Communicator>,
        device: usize,
        deadline: Option<Duration>,
    ) -> Result<Self, CommError> {
        inner.set_deadline(deadline);
        let bootstrap = Arc::clone(&inner);
        let (worker, (device, description, spent, failed)) = Worker::start(
            "nccl",
            deadline,
            None,
            move || Engine::start(bootstrap.as_ref(), device, deadline),
            |engine| (engine.device(), engine.describe(), engine.spent(), engine.failed()),
        )?;
        let description = format!("{description}; {}", inner.describe());
        Ok(Self { inner, worker, device, description, spent, failed, board: OnceLock::new() })
    }

    /// The number of this rank's GPU, as the process sees them.
    pub fn device(&self) -> usize {
        self.device.ordinal
    }

    /// Whether [`After::Context`] can be asked for, which the driver decides.
    pub fn marks_contexts(&self) -> bool {
        Device::marks_contexts()
    }

    /// Starts a collective on a vector in device memory, in place, and returns at once. It begins on the device after
    /// what `after` says; [`DevicePending::order`] makes a stream wait for it. The deadline includes the wait for
    /// `after`. Shards are [`Communicator::shard`]'s; `bucket` is for messages.
    ///
    /// # Errors
    /// The driver's. NCCL's come from [`DevicePending`].
    ///
    /// # Safety
    /// The values are in memory of this communicator's device that stays allocated and that nobody uses between what
    /// `after` means now and the end of the operation, by [`DevicePending::order`] or [`DevicePending::wait`]. A stream
    /// in `after` is a live one of that device, or null for the default stream.
    pub unsafe fn start_device(
        &self,
        values: DeviceValues,
        phases: Phases,
        bucket: Option<usize>,
        after: After,
    ) -> Result<DevicePending, CommError> {
        let call = self.worker.call(phases.into(), bucket);
        let manner = self.manner(call, true);
        let who = self.who(call);
        let ready = who.cuda(self.device.within(|| {
            let ready = Event::new()?;
            match after {
                // An event that was never recorded has passed.
                After::Nothing => {}
                // SAFETY: the caller's word.
                After::Stream(stream) => unsafe { ready.after(stream) }?,
                After::Context => self.device.mark(&ready)?,
            }
            Ok(ready)
        }))?;
        let ((put, enqueued), (finish, finished)) = (channel(), channel());
        self.worker.submit(Box::new(move |engine| {
            // SAFETY: the caller's word; `ready` is the mark in the stream.
            let result = unsafe { engine.on_device(values, phases, &ready, manner, finish) };
            // Nobody listens if the handle was dropped; an error stays with the engine for the next call.
            drop(put.send(result));
        }));
        let device = self.device.clone();
        Ok(DevicePending { device, enqueued, done: None, finished, who })
    }

    /// The sum over the ranks of a vector in device memory; see [`Nccl::start_device`].
    ///
    /// # Errors
    /// As for [`Nccl::start_device`].
    ///
    /// # Safety
    /// As for [`Nccl::start_device`].
    pub unsafe fn all_reduce_device(
        &self,
        values: DeviceValues,
        bucket: Option<usize>,
        after: After,
    ) -> Result<DevicePending, CommError> {
        // SAFETY: the caller's word.
        unsafe { self.start_device(values, Phases::ReduceAndGather, bucket, after) }
    }

    fn who(&self, call: Call) -> Who {
        Who { call, rank: self.rank(), size: self.size() }
    }

    fn manner(&self, call: Call, background: bool) -> Manner {
        Manner { call, deadline: self.worker.deadline(), background }
    }

    /// A collective on host memory over NCCL.
    fn sum<T: Send, W: Carries<T>>(&self, data: &mut [T], phases: Phases) -> Result<(), CommError> {
        let call = self.worker.call(phases.into(), None);
        let manner = self.manner(call, false);
        self.worker.blocking(call, |engine| engine.staged::<T, W>(data, phases, manner))
    }

    /// A collective over the inner communicator, unless something has failed here; its error ends this one, too.
    fn by_inner<R>(
        &self,
        collective: Collective,
        work: impl FnOnce(&dyn Communicator) -> Result<R, CommError>,
    ) -> Result<R, CommError> {
        if let Some(error) = self.failed.get() {
            return Err(self.who(self.worker.call(collective, None)).ended(Some(error)));
        }
        work(self.inner.as_ref()).inspect_err(|error| {
            // The first one stands.
            let _ = self.failed.set(error.clone());
        })
    }

    /// The end of NCCL; the inner communicator goes on.
    fn end(&self) -> Result<(), CommError> {
        if !self.worker.open() {
            return Ok(());
        }
        let call = self.worker.call(Collective::Finalize, None);
        let manner = self.manner(call, false);
        let result = self.worker.blocking(call, |engine| engine.finalize(manner));
        self.worker.finish(call, self.board.get().map(Arc::as_ref))?;
        result
    }
}

impl Communicator for Nccl {
    fn topology(&self) -> &Topology {
        self.worker.topology()
    }

    fn nccl(&self) -> Option<&Nccl> {
        Some(self)
    }

    /// NCCL, its version and the GPU, and what the inner communicator says of itself.
    fn describe(&self) -> String {
        self.description.clone()
    }

    fn set_deadline(&self, deadline: Option<Duration>) {
        self.worker.set_deadline(deadline);
        self.inner.set_deadline(deadline);
    }

    fn set_step(&self, step: u64) {
        self.worker.set_step(step);
        self.inner.set_step(step);
    }

    /// The first one counts.
    fn set_board(&self, board: Arc<Board>) {
        if self.board.set(Arc::clone(&board)).is_ok() {
            self.inner.set_board(Arc::clone(&board));
            self.worker.submit(Box::new(move |engine| engine.set_board(board)));
        }
    }

    /// Does nothing: NCCL chooses by itself what goes over which wires.
    fn set_hierarchical(&self, _hierarchical: bool) {}

    fn traffic(&self) -> Traffic {
        let inner = self.inner.traffic();
        Traffic { busy: inner.busy + self.spent.busy(), bytes: inner.bytes + self.spent.bytes() }
    }

    /// Sums of floats are NCCL's, in its order.
    fn all_reduce(&self, values: Values, op: ReduceOp) -> Result<(), CommError> {
        let phases = Phases::ReduceAndGather;
        match (values, op) {
            (Values::F32(data), ReduceOp::Sum) => self.sum::<f32, f32>(data, phases),
            (Values::F16(data), ReduceOp::Sum) => self.sum::<_, f32>(data, phases),
            (Values::Bf16(data), ReduceOp::Sum) => self.sum::<_, f32>(data, phases),
            (values, op) => self.by_inner(Collective::AllReduce, |inner| inner.all_reduce(values, op)),
        }
    }

    fn shard(&self, len: usize) -> Range<usize> {
        shard_range(len, self.rank(), self.size())
    }

    fn reduce_scatter_f32(&self, data: &mut [f32]) -> Result<(), CommError> {
        self.sum::<f32, f32>(data, Phases::Reduce)
    }

    fn all_gather_shards_f32(&self, data: &mut [f32]) -> Result<(), CommError> {
        self.sum::<f32, f32>(data, Phases::Gather)
    }

    fn all_gather_bytes(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        self.by_inner(Collective::AllGather, |inner| inner.all_gather_bytes(mine))
    }

    fn broadcast_bytes(&self, data: &mut Vec<u8>, root: usize) -> Result<(), CommError> {
        self.by_inner(Collective::Broadcast, |inner| inner.broadcast_bytes(data, root))
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.by_inner(Collective::Barrier, |inner| inner.barrier())
    }

    fn start_f32(&self, mut data: Vec<f32>, how: Background) -> Pending<Vec<f32>> {
        let call = self.worker.call(how.phases.into(), Some(how.bucket));
        let manner = self.manner(call, true);
        let rounded = how.wire == Wire::Bf16 && how.phases.reduces();
        let (reply, receiver) = channel();
        self.worker.submit(Box::new(move |engine| {
            let result = if rounded {
                engine.staged::<f32, bf16>(&mut data, how.phases, manner)
            } else {
                engine.staged::<f32, f32>(&mut data, how.phases, manner)
            };
            // Nobody listens if the handle was dropped; an error stays with the engine for the next call.
            drop(reply.send(result.map(|()| data)));
        }));
        let Who { rank, size, .. } = self.who(call);
        Pending { state: PendingState::Running { receiver, call, rank, size } }
    }

    /// The inner communicator's, to compare NCCL with.
    fn library_all_reduce_f32(&self, data: &[f32], sum: &mut [f32]) -> Result<bool, CommError> {
        self.by_inner(Collective::LibraryAllReduce, |inner| inner.library_all_reduce_f32(data, sum))
    }

    /// Ends NCCL, and the inner communicator after it.
    fn finalize(&self) -> Result<(), CommError> {
        self.end()?;
        self.inner.finalize()
    }
}

impl Drop for Nccl {
    /// Ends NCCL in good order, where `finalize` was forgotten and nothing has failed. While panicking the thread is left
    /// without work, which makes it abort NCCL: the other ranks may never come.
    fn drop(&mut self) {
        if !std::thread::panicking()
            && let Err(error) = self.end()
        {
            tracing::warn!("{error}");
        }
    }
}
