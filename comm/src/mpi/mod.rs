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
mod stream;
mod thread;
mod waiter;

use crate::communicator::PendingState;
use crate::environment::Options;
use crate::reduce::{Element, Phases};
use crate::{
    Background, Board, Call, Collective, CommError, Communicator, Pending, ReduceOp, Topology, Traffic,
    Values, shard_range,
};
use hierarchy::Place;
use mpi::ffi;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;
use thread::{Engine, Manner, Order, Spent, with_board};

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

/// The communicator of a job under mpirun or srun. Made by [`crate::init`].
pub struct Mpi {
    topology: Topology,
    description: String,
    orders: Mutex<Option<Sender<Order>>>,
    /// Disconnected when the communication thread has ended.
    ended: Mutex<Receiver<()>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// In milliseconds; 0 for none.
    deadline: AtomicU64,
    /// [`NO_STEP`] before the first.
    step: AtomicU64,
    hierarchical: AtomicBool,
    /// This rank's place in two levels, where there are two.
    place: Option<Place>,
    spent: Arc<Spent>,
    board: OnceLock<Arc<Board>>,
}

/// No training step goes on.
const NO_STEP: u64 = u64::MAX;

impl Mpi {
    /// Starts the communication thread and MPI in it.
    ///
    /// # Errors
    /// MPI was started before, gives no thread support, or reports an error.
    pub(crate) fn start(options: &Options) -> Result<Self, CommError> {
        let (orders, inbox) = channel();
        let (started, start) = channel();
        let (end, ended) = channel::<()>();
        let options = options.clone();
        let deadline = AtomicU64::new(milliseconds(options.deadline));
        let thread = std::thread::Builder::new()
            .name("communication".to_owned())
            .spawn(move || {
                // Dropped when the thread ends, which is what `ended` sees.
                let _end = end;
                match Engine::start(&options) {
                    Ok(engine) => {
                        let info =
                            (engine.topology().clone(), engine.describe(), engine.place(), engine.spent());
                        if started.send(Ok(info)).is_ok() {
                            engine.serve(&inbox);
                        }
                    }
                    // Nobody listens only if the starting thread is gone, and the process with it.
                    Err(error) => drop(started.send(Err(error))),
                }
            })
            .map_err(|error| CommError::Start(format!("no thread for the communication: {error}")))?;
        let (topology, description, place, spent) = start.recv().unwrap_or_else(|_| {
            Err(CommError::Start("the communication thread failed to start".to_owned()))
        })?;
        Ok(Self {
            topology,
            description,
            orders: Mutex::new(Some(orders)),
            ended: Mutex::new(ended),
            thread: Mutex::new(Some(thread)),
            deadline,
            step: AtomicU64::new(NO_STEP),
            hierarchical: AtomicBool::new(true),
            place,
            spent,
            board: OnceLock::new(),
        })
    }

    fn deadline(&self) -> Option<Duration> {
        match self.deadline.load(Ordering::Relaxed) {
            0 => None,
            milliseconds => Some(Duration::from_millis(milliseconds)),
        }
    }

    /// What messages call a collective that begins now.
    fn call(&self, collective: Collective, bucket: Option<usize>) -> Call {
        let step = self.step.load(Ordering::Relaxed);
        Call { collective, bucket, step: (step != NO_STEP).then_some(step) }
    }

    fn manner(&self, call: Call, background: bool) -> Manner {
        let hierarchical = self.hierarchical.load(Ordering::Relaxed);
        Manner { call, deadline: self.deadline(), hierarchical, background }
    }

    fn ended(&self, call: Call) -> CommError {
        CommError::Ended { call, rank: self.topology.rank, size: self.topology.size, cause: None }
    }

    /// Hands work to the communication thread. If that has ended the work is dropped, and its reply channel with it.
    fn submit(&self, work: Box<dyn FnOnce(&mut Engine) + Send>) {
        let orders = self.orders.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(orders) = orders.as_ref() {
            // A failed send returns the work, which is dropped: the caller sees that as the end.
            drop(orders.send(Order::Work(work)));
        }
    }

    /// Runs `work` on the communication thread and waits for it.
    fn blocking<'a, R: Send + 'a>(
        &self,
        call: Call,
        work: impl FnOnce(&mut Engine, Manner) -> Result<R, CommError> + Send + 'a,
    ) -> Result<R, CommError> {
        let (reply, answer) = channel();
        let manner = self.manner(call, false);
        let work: Box<dyn FnOnce(&mut Engine) + Send + 'a> = Box::new(move |engine| {
            let result = work(engine, manner);
            // The receiver waits below until this is sent or dropped.
            drop(reply.send(result));
        });
        // SAFETY: only the lifetime is changed. What `work` borrows outlives it, because this function returns only
        // when `reply` is gone: either it was sent on after `work` ran, or it was dropped together with (and after
        // the unwinding of) `work`, which nothing keeps.
        let work = unsafe {
            std::mem::transmute::<
                Box<dyn FnOnce(&mut Engine) + Send + 'a>,
                Box<dyn FnOnce(&mut Engine) + Send + 'static>,
            >(work)
        };
        self.submit(work);
        answer.recv().unwrap_or_else(|_| Err(self.ended(call)))
    }

    fn reduce<T: Element>(
        &self,
        collective: Collective,
        data: &mut [T],
        op: ReduceOp,
        phases: Phases,
    ) -> Result<(), CommError> {
        let call = self.call(collective, None);
        // In rank order everywhere but for float32, whose vectors are the long ones.
        let two_levels = T::CODE == <f32 as Element>::CODE;
        self.blocking(call, |engine, manner| {
            let manner = Manner { hierarchical: manner.hierarchical && two_levels, ..manner };
            engine.reduce(data, op, phases, manner)
        })
    }
}

fn milliseconds(deadline: Option<Duration>) -> u64 {
    deadline.map_or(0, |deadline| u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX).max(1))
}

impl Communicator for Mpi {
    fn topology(&self) -> &Topology {
        &self.topology
    }

    fn describe(&self) -> String {
        self.description.clone()
    }

    fn set_deadline(&self, deadline: Option<Duration>) {
        self.deadline.store(milliseconds(deadline), Ordering::Relaxed);
    }

    fn set_step(&self, step: u64) {
        self.step.store(step, Ordering::Relaxed);
    }

    /// The first one counts.
    fn set_board(&self, board: Arc<Board>) {
        if self.board.set(Arc::clone(&board)).is_ok() {
            // Between the same two collectives on all ranks, so that their numbers can be compared.
            self.submit(Box::new(move |engine| engine.board = Some(board)));
        }
    }

    fn set_hierarchical(&self, hierarchical: bool) {
        self.hierarchical.store(hierarchical, Ordering::Relaxed);
    }

    fn traffic(&self) -> Traffic {
        Traffic {
            busy: Duration::from_nanos(self.spent.nanoseconds.load(Ordering::Relaxed)),
            bytes: self.spent.bytes.load(Ordering::Relaxed),
        }
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
        let call = self.call(Collective::AllGather, None);
        self.blocking(call, |engine, manner| engine.all_gather_bytes(mine, call, manner.deadline))
    }

    fn broadcast_bytes(&self, data: &mut Vec<u8>, root: usize) -> Result<(), CommError> {
        assert!(root < self.size(), "broadcast from rank {root} of {}", self.size());
        let call = self.call(Collective::Broadcast, None);
        self.blocking(call, |engine, manner| engine.broadcast_bytes(data, root, call, manner.deadline))
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.reduce(Collective::Barrier, &mut [0i64], ReduceOp::Max, Phases::ReduceAndGather)
    }

    fn start_f32(&self, mut data: Vec<f32>, how: Background) -> Pending<Vec<f32>> {
        let collective = match how.phases {
            Phases::ReduceAndGather => Collective::AllReduce,
            Phases::Reduce => Collective::ReduceScatter,
            Phases::Gather => Collective::AllGather,
        };
        let call = self.call(collective, Some(how.bucket));
        let manner = self.manner(call, true);
        let (reply, receiver) = channel();
        self.submit(Box::new(move |engine| {
            let result = engine.bucket(&mut data, how, manner);
            // Nobody listens if the handle was dropped; an error stays with the engine for the next call.
            drop(reply.send(result.map(|()| data)));
        }));
        let (rank, size) = (self.rank(), self.size());
        Pending { state: PendingState::Running { receiver, call, rank, size } }
    }

    fn library_all_reduce_f32(&self, data: &[f32], sum: &mut [f32]) -> Result<bool, CommError> {
        let call = self.call(Collective::LibraryAllReduce, None);
        self.blocking(call, |engine, _| engine.library_all_reduce_f32(data, sum))?;
        Ok(true)
    }

    fn finalize(&self) -> Result<(), CommError> {
        let Some(orders) = self.orders.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take()
        else {
            return Ok(());
        };
        // Fails only if the thread has ended already.
        drop(orders.send(Order::Stop));
        drop(orders);
        let ended = self.ended.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let waited = self.deadline();
        let (call, rank, size) = (self.call(Collective::Finalize, None), self.rank(), self.size());
        let board = self.board.get().map(Arc::as_ref);
        if let Some(board) = board {
            board.entered(call);
        }
        let late = match waited {
            Some(limit) => ended.recv_timeout(limit) == Err(std::sync::mpsc::RecvTimeoutError::Timeout),
            None => ended.recv().is_ok(),
        };
        if late {
            let (waited, missing) = (waited.unwrap_or_default(), Vec::new());
            let error = CommError::Deadline { call, rank, size, waited, missing, board: None };
            return Err(with_board(error, board));
        }
        let thread = self.thread.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        match thread.map(JoinHandle::join) {
            Some(Err(_)) => Err(self.ended(call)),
            _ => Ok(()),
        }
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
