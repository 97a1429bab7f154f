//! The communicator over MPI.
//!
//! One thread per rank, the communication thread, starts MPI, makes every MPI call and ends it; the others hand it
//! work through a channel and it does the work in order. So collectives of different threads cannot overtake each
//! other, a rank can compute while its gradients travel, and MPI needs no locks. (`abort` alone comes from any
//! thread.)

mod hierarchy;
mod messages;
mod raw;
mod shared;
mod thread;

use crate::communicator::PendingState;
use crate::environment::Options;
use crate::reduce::{Element, Phases};
use crate::worker::{Spent, Worker};
use crate::{
    Background, Board, Call, Collective, CommError, Communicator, Pending, ReduceOp, Topology, Traffic,
    Values, shard_range,
};
use hierarchy::Place;
use mpi::ffi;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use thread::{Engine, Manner};

/// Whether MPI runs and takes calls from any thread, so that `abort` may call it.
static ABORTABLE: AtomicBool = AtomicBool::new(false);

/// Ends all ranks through MPI where that is possible; returns otherwise.
pub(crate) fn abort_world(code: i32) {
    if ABORTABLE.load(Ordering::SeqCst) {
        // SAFETY: MPI runs at thread level Multiple (ABORTABLE) and the world communicator is always valid.
        unsafe { ffi::MPI_Abort(ffi::RSMPI_COMM_WORLD, code) };
    }
}

/// The MPI library's name and version, on one line. Works before MPI is started.
pub fn library_version() -> String {
    let mut text = vec![0u8; ffi::MPI_MAX_LIBRARY_VERSION_STRING as usize + 1];
    let mut len = 0;
    // SAFETY: the buffer has the length the standard asks for; the call is allowed at any time.
    let code = unsafe { ffi::MPI_Get_library_version(text.as_mut_ptr().cast(), &mut len) };
    if code != raw::SUCCESS {
        return "unknown MPI".to_owned();
    }
    text.truncate(usize::try_from(len).unwrap_or(0));
    let text = String::from_utf8_lossy(&text).into_owned();
    // OpenMPI: "Open MPI v4.1.4, package: ..., ident: ...": the first part says it.
    text.split([',', '\n', '\0']).next().unwrap_or_default().trim().to_owned()
}

/// Which threads may call MPI, in the standard's words (SINGLE, FUNNELED, SERIALIZED or MULTIPLE, of which the last lets
/// a rank end the others from any thread); None before MPI is started and after its end.
pub fn thread_level() -> Option<String> {
    let (mut started, mut ended) = (0, 0);
    // SAFETY: both calls are allowed at any time and from any thread; the addresses are live for them.
    unsafe {
        ffi::MPI_Initialized(&mut started);
        ffi::MPI_Finalized(&mut ended);
    }
    let runs = started != 0 && ended == 0;
    runs.then(|| format!("{:?}", mpi::environment::threading_support()).to_uppercase())
}

/// How much later than its parts the start as a whole is given up.
const MARGIN: Duration = Duration::from_secs(5);

/// The communicator of a job under mpirun or srun. Made by [`crate::init`].
pub struct Mpi {
    worker: Worker<Engine>,
    description: String,
    hierarchical: AtomicBool,
    /// This rank's place in two levels, where there are two.
    place: Option<Place>,
    spent: Arc<Spent>,
    board: OnceLock<Arc<Board>>,
}

impl Mpi {
    /// Starts the communication thread and MPI in it.
    ///
    /// # Errors
    /// MPI was started before, gives no thread support, or reports an error.
    pub(crate) fn start(options: &Options) -> Result<Self, CommError> {
        let options = options.clone();
        let (worker, (description, place, spent)) = Worker::start(
            "communication",
            options.deadline,
            // MPI's own part of the start has no deadline.
            options.deadline.map(|deadline| deadline + MARGIN),
            move || Engine::start(&options),
            |engine| (engine.describe(), engine.place(), engine.spent()),
        )?;
        let hierarchical = AtomicBool::new(true);
        Ok(Self { worker, description, hierarchical, place, spent, board: OnceLock::new() })
    }

    fn manner(&self, call: Call, background: bool) -> Manner {
        let hierarchical = self.hierarchical.load(Ordering::Relaxed);
        Manner { call, deadline: self.worker.deadline(), hierarchical, background }
    }

    /// Runs `work` on the communication thread and waits for it.
    fn blocking<R: Send>(
        &self,
        call: Call,
        work: impl FnOnce(&mut Engine, Manner) -> Result<R, CommError> + Send,
    ) -> Result<R, CommError> {
        let manner = self.manner(call, false);
        self.worker.blocking(call, move |engine| work(engine, manner))
    }

    fn reduce<T: Element>(
        &self,
        collective: Collective,
        data: &mut [T],
        op: ReduceOp,
        phases: Phases,
    ) -> Result<(), CommError> {
        let call = self.worker.call(collective, None);
        // In rank order everywhere but for float32, whose vectors are the long ones.
        let two_levels = T::CODE == <f32 as Element>::CODE;
        self.blocking(call, |engine, manner| {
            let manner = Manner { hierarchical: manner.hierarchical && two_levels, ..manner };
            engine.reduce(data, op, phases, manner)
        })
    }
}

impl Communicator for Mpi {
    fn topology(&self) -> &Topology {
        self.worker.topology()
    }

    fn describe(&self) -> String {
        self.description.clone()
    }

    fn set_deadline(&self, deadline: Option<Duration>) {
        self.worker.set_deadline(deadline);
    }

    fn set_step(&self, step: u64) {
        self.worker.set_step(step);
    }

    /// The first one counts.
    fn set_board(&self, board: Arc<Board>) {
        if self.board.set(Arc::clone(&board)).is_ok() {
            // Between the same two collectives on all ranks, so that their numbers can be compared.
            self.worker.submit(Box::new(move |engine| engine.board = Some(board)));
        }
    }

    fn set_hierarchical(&self, hierarchical: bool) {
        self.hierarchical.store(hierarchical, Ordering::Relaxed);
    }

    fn traffic(&self) -> Traffic {
        Traffic { busy: self.spent.busy(), bytes: self.spent.bytes() }
    }

    fn all_reduce(&self, values: Values, op: ReduceOp) -> Result<(), CommError> {
        let (collective, phases) = (Collective::AllReduce, Phases::ReduceAndGather);
        match values {
            Values::F32(data) => self.reduce(collective, data, op, phases),
            Values::F64(data) => self.reduce(collective, data, op, phases),
            Values::F16(data) => self.reduce(collective, data, op, phases),
            Values::Bf16(data) => self.reduce(collective, data, op, phases),
            Values::I64(data) => self.reduce(collective, data, op, phases),
            Values::U8(data) => self.reduce(collective, data, op, phases),
        }
    }

    fn shard(&self, len: usize) -> Range<usize> {
        match self.place.filter(|_| self.hierarchical.load(Ordering::Relaxed)) {
            Some(place) => place.shard(len),
            None => shard_range(len, self.rank(), self.size()),
        }
    }

    fn reduce_scatter_f32(&self, data: &mut [f32]) -> Result<(), CommError> {
        self.reduce(Collective::ReduceScatter, data, ReduceOp::Sum, Phases::Reduce)
    }

    fn all_gather_shards_f32(&self, data: &mut [f32]) -> Result<(), CommError> {
        self.reduce(Collective::AllGather, data, ReduceOp::Sum, Phases::Gather)
    }

    fn all_gather_bytes(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        let call = self.worker.call(Collective::AllGather, None);
        self.blocking(call, |engine, manner| engine.all_gather_bytes(mine, call, manner.deadline))
    }

    fn broadcast_bytes(&self, data: &mut Vec<u8>, root: usize) -> Result<(), CommError> {
        assert!(root < self.size(), "broadcast from rank {root} of {}", self.size());
        let call = self.worker.call(Collective::Broadcast, None);
        self.blocking(call, |engine, manner| engine.broadcast_bytes(data, root, call, manner.deadline))
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.reduce(Collective::Barrier, &mut [0i64], ReduceOp::Max, Phases::ReduceAndGather)
    }

    fn start_f32(&self, mut data: Vec<f32>, how: Background) -> Pending<Vec<f32>> {
        let call = self.worker.call(how.phases.into(), Some(how.bucket));
        let manner = self.manner(call, true);
        let (reply, receiver) = channel();
        self.worker.submit(Box::new(move |engine| {
            let result = engine.bucket(&mut data, how, manner);
            // Nobody listens if the handle was dropped; an error stays with the engine for the next call.
            drop(reply.send(result.map(|()| data)));
        }));
        let (rank, size) = (self.rank(), self.size());
        Pending { state: PendingState::Running { receiver, call, rank, size } }
    }

    fn library_all_reduce_f32(&self, data: &[f32], sum: &mut [f32]) -> Result<bool, CommError> {
        let call = self.worker.call(Collective::LibraryAllReduce, None);
        self.blocking(call, |engine, _| engine.library_all_reduce_f32(data, sum))?;
        Ok(true)
    }

    fn finalize(&self) -> Result<(), CommError> {
        let board = self.board.get().map(Arc::as_ref);
        self.worker.finish(self.worker.call(Collective::Finalize, None), board)
    }
}

impl Drop for Mpi {
    /// Finalizes, so that a forgotten `finalize` is not an error of the job; not while panicking, when the other
    /// ranks may never come.
    fn drop(&mut self) {
        if !std::thread::panicking()
            && let Err(error) = self.finalize()
        {
            tracing::warn!("{error}");
        }
    }
}
