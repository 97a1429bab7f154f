//! The communicator over MPI.
//!
//! One thread per rank, the communication thread, starts MPI, makes every MPI call and ends it; the others hand it
//! work through a channel and it does the work in order. So collectives of different threads cannot overtake each
//! other, a rank can compute while its gradients travel, and MPI needs no locks. (`abort` alone comes from any
//! thread.)

mod messages;
mod raw;
mod shared;
mod stream;
mod thread;
mod waiter;

use crate::communicator::PendingState;
use crate::environment::Options;
use crate::reduce::{Element, Phases};
use crate::{Collective, CommError, Communicator, Pending, ReduceOp, Topology, shard_range};
use mpi::ffi;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;
use thread::{Engine, Order};

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
}

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
                        let info = (engine.topology().clone(), engine.describe());
                        if started.send(Ok(info)).is_ok() {
                            engine.serve(&inbox);
                        }
                    }
                    // Nobody listens only if the starting thread is gone, and the process with it.
                    Err(error) => drop(started.send(Err(error))),
                }
            })
            .map_err(|error| CommError::Start(format!("no thread for the communication: {error}")))?;
        let (topology, description) = start.recv().unwrap_or_else(|_| {
            Err(CommError::Start("the communication thread failed to start".to_owned()))
        })?;
        Ok(Self {
            topology,
            description,
            orders: Mutex::new(Some(orders)),
            ended: Mutex::new(ended),
            thread: Mutex::new(Some(thread)),
            deadline,
        })
    }

    fn deadline(&self) -> Option<Duration> {
        match self.deadline.load(Ordering::Relaxed) {
            0 => None,
            milliseconds => Some(Duration::from_millis(milliseconds)),
        }
    }

    fn ended(&self, collective: Collective) -> CommError {
        CommError::Ended { collective, rank: self.topology.rank, size: self.topology.size, cause: None }
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
        collective: Collective,
        work: impl FnOnce(&mut Engine, Option<Duration>) -> Result<R, CommError> + Send + 'a,
    ) -> Result<R, CommError> {
        let (reply, answer) = channel();
        let deadline = self.deadline();
        let work: Box<dyn FnOnce(&mut Engine) + Send + 'a> = Box::new(move |engine| {
            let result = work(engine, deadline);
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
        answer.recv().unwrap_or_else(|_| Err(self.ended(collective)))
    }

    fn reduce<T: Element>(
        &self,
        collective: Collective,
        data: &mut [T],
        op: ReduceOp,
        phases: Phases,
    ) -> Result<(), CommError> {
        self.blocking(collective, |engine, deadline| engine.reduce(collective, data, op, phases, deadline))
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

    fn all_reduce_f32(&self, data: &mut [f32]) -> Result<(), CommError> {
        self.reduce(Collective::AllReduce, data, ReduceOp::Sum, Phases::ReduceAndGather)
    }

    fn all_reduce_f64(&self, data: &mut [f64], op: ReduceOp) -> Result<(), CommError> {
        self.reduce(Collective::AllReduce, data, op, Phases::ReduceAndGather)
    }

    fn all_reduce_i64(&self, data: &mut [i64], op: ReduceOp) -> Result<(), CommError> {
        self.reduce(Collective::AllReduce, data, op, Phases::ReduceAndGather)
    }

    fn reduce_scatter_f32(&self, data: &mut [f32]) -> Result<Range<usize>, CommError> {
        self.reduce(Collective::ReduceScatter, data, ReduceOp::Sum, Phases::Reduce)?;
        Ok(shard_range(data.len(), self.rank(), self.size()))
    }

    fn all_gather_shards_f32(&self, data: &mut [f32]) -> Result<(), CommError> {
        self.reduce(Collective::AllGather, data, ReduceOp::Sum, Phases::Gather)
    }

    fn all_gather_bytes(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        self.blocking(Collective::AllGather, |engine, deadline| engine.all_gather_bytes(mine, deadline))
    }

    fn broadcast_bytes(&self, data: &mut Vec<u8>, root: usize) -> Result<(), CommError> {
        assert!(root < self.size(), "broadcast from rank {root} of {}", self.size());
        self.blocking(Collective::Broadcast, |engine, deadline| engine.broadcast_bytes(data, root, deadline))
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.reduce(Collective::Barrier, &mut [0i64], ReduceOp::Max, Phases::ReduceAndGather)
    }

    fn start_all_reduce_f32(&self, mut data: Vec<f32>) -> Pending<Vec<f32>> {
        let collective = Collective::AllReduce;
        let (reply, receiver) = channel();
        let deadline = self.deadline();
        self.submit(Box::new(move |engine| {
            let result = engine.reduce_in_background(&mut data, deadline);
            // Nobody listens if the handle was dropped; an error stays with the engine for the next call.
            drop(reply.send(result.map(|()| data)));
        }));
        let (rank, size) = (self.rank(), self.size());
        Pending { state: PendingState::Running { receiver, collective, rank, size } }
    }

    fn library_all_reduce_f32(&self, data: &[f32], sum: &mut [f32]) -> Result<bool, CommError> {
        self.blocking(Collective::LibraryAllReduce, |engine, _| engine.library_all_reduce_f32(data, sum))?;
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
        let late = match waited {
            Some(limit) => ended.recv_timeout(limit) == Err(std::sync::mpsc::RecvTimeoutError::Timeout),
            None => ended.recv().is_ok(),
        };
        let (collective, rank, size) = (Collective::Finalize, self.rank(), self.size());
        if late {
            let missing = Vec::new();
            return Err(CommError::Deadline {
                collective,
                rank,
                size,
                waited: waited.unwrap_or_default(),
                missing,
            });
        }
        let thread = self.thread.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        match thread.map(JoinHandle::join) {
            Some(Err(_)) => Err(self.ended(collective)),
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
