//! The communication thread: owns MPI.

use super::messages::Messages;
use super::raw::{SUCCESS, check, error_text};
use super::shared::SharedMemory;
use super::waiter::{Patience, Waiter};
use super::{ABORTABLE, library_version};
use crate::environment::Options;
use crate::reduce::{Element, Phases};
use crate::topology::{Told, Topology};
use crate::{Collective, CommError, ReduceOp};
use mpi::environment::Universe;
use mpi::{Threading, ffi};
use std::ffi::c_int;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::time::Duration;

/// What the communication thread is asked to do.
pub(super) enum Order {
    Work(Box<dyn FnOnce(&mut Engine) + Send>),
    Stop,
}

/// MPI and what was made with it; lives on the communication thread.
pub(super) struct Engine {
    universe: Option<Universe>,
    world: ffi::MPI_Comm,
    topology: Topology,
    messages: Messages,
    shared: Option<SharedMemory>,
    patience: Patience,
    /// The first error; all later work is refused with it.
    failed: Option<CommError>,
}

/// The time a rank polls with yields before it sleeps between polls.
const YIELDS: Duration = Duration::from_millis(1);

/// Nice value of the communication thread, where it may have one.
const PRIORITY: i32 = -10;

/// The same where the rank computes meanwhile, and needs the processor more.
const BACKGROUND: Patience = Patience { spins: 0, yields: Duration::from_micros(20) };

impl Engine {
    /// Starts MPI and finds out who is where.
    pub(super) fn start(options: &Options) -> Result<Self, CommError> {
        let Some((universe, level)) = mpi::initialize_with_threading(Threading::Multiple) else {
            return Err(CommError::Start("MPI was already started in this process (a bug)".to_owned()));
        };
        if level == Threading::Single {
            return Err(CommError::Start(format!(
                "{} gives no thread support at all (level Single, at least Funneled is needed): \
                 use an MPI built with threads",
                library_version()
            )));
        }
        let mut world = std::mem::MaybeUninit::<ffi::MPI_Comm>::uninit();
        let (mut rank, mut size): (c_int, c_int) = (0, 1);
        // SAFETY: MPI runs, in this thread; the addresses are live for the calls. Errors as values from here on,
        // on the world and on the copy that inherits the handler.
        let world = unsafe {
            ffi::MPI_Comm_set_errhandler(ffi::RSMPI_COMM_WORLD, ffi::RSMPI_ERRORS_RETURN);
            ffi::MPI_Comm_rank(ffi::RSMPI_COMM_WORLD, &mut rank);
            ffi::MPI_Comm_size(ffi::RSMPI_COMM_WORLD, &mut size);
            let code = ffi::MPI_Comm_dup(ffi::RSMPI_COMM_WORLD, world.as_mut_ptr());
            check(code, Collective::Start, rank as usize, size as usize)?;
            world.assume_init()
        };
        ABORTABLE.store(level == Threading::Multiple, Ordering::SeqCst);
        let (rank, size) = (rank as usize, size as usize);
        let (leader, local_size, node_comm) = split_by_node(rank, size)?;

        let chunk_bytes = options.chunk_bytes.clamp(64 << 10, 8 << 20);
        let mut messages = Messages::new(world, rank, size, chunk_bytes);
        // Until it is known who shares processors: the careful way.
        let careful = Patience { spins: 0, yields: YIELDS };
        let waiter = || Waiter::new(Collective::Start, rank, size, careful, options.deadline);
        let told = messages.all_gather_bytes(&Told::here(leader).encode(), &mut waiter())?;
        let told: Vec<Told> =
            told.iter().enumerate().map(|(rank, bytes)| Told::decode(rank, bytes)).collect();
        let topology = Topology::new(rank, &told);
        let spins = if topology.oversubscribed() { 0 } else { 200 };

        let mut shared = None;
        if options.shared_memory && size > 1 {
            // All ranks on one node, and every one of them got its view; otherwise nobody uses it.
            let attempt = (local_size == size).then(|| SharedMemory::new(node_comm, rank, size, chunk_bytes));
            let mut usable = [i64::from(matches!(attempt, Some(Ok(_))))];
            messages.run(&mut usable, ReduceOp::Min, Phases::ReduceAndGather, &mut waiter())?;
            match attempt {
                Some(Ok(memory)) if usable[0] == 1 => shared = Some(memory),
                // Left as it is: freeing would be a collective, and not all ranks have one.
                Some(Ok(_)) => {}
                Some(Err(error)) => tracing::warn!("no shared memory between ranks, using messages: {error}"),
                None => {}
            }
        }
        let patience = Patience { spins, yields: YIELDS };
        Ok(Self { universe: Some(universe), world, topology, messages, shared, patience, failed: None })
    }

    pub(super) fn topology(&self) -> &Topology {
        &self.topology
    }

    pub(super) fn describe(&self) -> String {
        let how = if self.shared.is_some() { "shared memory" } else { "messages" };
        format!("{}, {how}", library_version())
    }

    /// Does work in order until told to stop, or until nobody is left to ask; then ends MPI.
    pub(super) fn serve(mut self, inbox: &Receiver<Order>) {
        // This thread works little and often, and what the rank's computing threads gain by making it wait, the
        // whole job loses. Lowering the nice value takes a privilege; without it, things stay as they are.
        let _ = rustix::process::setpriority_process(None, PRIORITY);
        while let Ok(Order::Work(work)) = inbox.recv() {
            work(&mut self);
        }
        self.end();
    }

    /// Ends MPI in good order; after an error MPI is left as it is, because its end would wait for all ranks.
    fn end(mut self) {
        let universe = self.universe.take();
        if self.failed.is_some() {
            std::mem::forget(universe);
            return;
        }
        if let Some(shared) = self.shared.take() {
            shared.free();
        }
        ABORTABLE.store(false, Ordering::SeqCst);
        drop(universe);
    }

    /// Runs one collective, unless an earlier one failed, and remembers its error.
    fn call<R>(
        &mut self,
        collective: Collective,
        deadline: Option<Duration>,
        work: impl FnOnce(&mut Self, &mut Waiter) -> Result<R, CommError>,
    ) -> Result<R, CommError> {
        self.call_with(self.patience, collective, deadline, work)
    }

    fn call_with<R>(
        &mut self,
        patience: Patience,
        collective: Collective,
        deadline: Option<Duration>,
        work: impl FnOnce(&mut Self, &mut Waiter) -> Result<R, CommError>,
    ) -> Result<R, CommError> {
        let (rank, size) = (self.topology.rank, self.topology.size);
        if let Some(error) = &self.failed {
            return Err(CommError::Ended { collective, rank, size, cause: Some(error.to_string()) });
        }
        let mut waiter = Waiter::new(collective, rank, size, patience, deadline);
        work(self, &mut waiter).inspect_err(|error| self.failed = Some(error.clone()))
    }

    pub(super) fn reduce<T: Element>(
        &mut self,
        collective: Collective,
        data: &mut [T],
        op: ReduceOp,
        phases: Phases,
        deadline: Option<Duration>,
    ) -> Result<(), CommError> {
        self.call(collective, deadline, |engine, waiter| match &mut engine.shared {
            Some(shared) => shared.run(data, op, phases, waiter),
            None => engine.messages.run(data, op, phases, waiter),
        })
    }

    /// All-reduce while the rank computes.
    pub(super) fn reduce_in_background(
        &mut self,
        data: &mut [f32],
        deadline: Option<Duration>,
    ) -> Result<(), CommError> {
        let (op, phases) = (ReduceOp::Sum, Phases::ReduceAndGather);
        self.call_with(BACKGROUND, Collective::AllReduce, deadline, |engine, waiter| {
            match &mut engine.shared {
                Some(shared) => shared.run(data, op, phases, waiter),
                None => engine.messages.run(data, op, phases, waiter),
            }
        })
    }

    pub(super) fn all_gather_bytes(
        &mut self,
        mine: &[u8],
        deadline: Option<Duration>,
    ) -> Result<Vec<Vec<u8>>, CommError> {
        let collective = Collective::AllGather;
        self.call(collective, deadline, |engine, waiter| engine.messages.all_gather_bytes(mine, waiter))
    }

    pub(super) fn broadcast_bytes(
        &mut self,
        data: &mut Vec<u8>,
        root: usize,
        deadline: Option<Duration>,
    ) -> Result<(), CommError> {
        let collective = Collective::Broadcast;
        self.call(collective, deadline, |engine, waiter| engine.messages.broadcast_bytes(data, root, waiter))
    }

    /// MPI_Allreduce, blocking. (Not in place: MPI_IN_PLACE has another value in every MPI, and the crate has none.)
    pub(super) fn library_all_reduce_f32(&mut self, data: &[f32], sum: &mut [f32]) -> Result<(), CommError> {
        assert_eq!(data.len(), sum.len(), "all-reduce into a slice of another length");
        self.call(Collective::LibraryAllReduce, None, |engine, waiter| {
            let length = c_int::try_from(data.len()).map_err(|_| {
                CommError::Start(format!("{} elements are too many for MPI_Allreduce", data.len()))
            })?;
            // SAFETY: both slices are ours for the whole (blocking) call and of this length.
            let code = unsafe {
                ffi::MPI_Allreduce(
                    data.as_ptr().cast(),
                    sum.as_mut_ptr().cast(),
                    length,
                    ffi::RSMPI_FLOAT,
                    ffi::RSMPI_SUM,
                    engine.world,
                )
            };
            check(code, waiter.collective, waiter.rank, waiter.size)
        })
    }
}

/// The lowest rank on this node, the number of ranks on it, and their communicator.
fn split_by_node(rank: usize, size: usize) -> Result<(usize, usize, ffi::MPI_Comm), CommError> {
    let mut node = std::mem::MaybeUninit::<ffi::MPI_Comm>::uninit();
    let (mut local_size, mut leader): (c_int, c_int) = (1, rank as c_int);
    // SAFETY: MPI runs, in this thread; the addresses are live for the calls. Ordered by world rank, so that the
    // node's first rank is its lowest.
    unsafe {
        let code = ffi::MPI_Comm_split_type(
            ffi::RSMPI_COMM_WORLD,
            ffi::RSMPI_COMM_TYPE_SHARED,
            rank as c_int,
            ffi::RSMPI_INFO_NULL,
            node.as_mut_ptr(),
        );
        check(code, Collective::Start, rank, size)?;
        let node = node.assume_init();
        ffi::MPI_Comm_set_errhandler(node, ffi::RSMPI_ERRORS_RETURN);
        ffi::MPI_Comm_size(node, &mut local_size);
        let code = ffi::MPI_Bcast((&raw mut leader).cast(), 1, ffi::RSMPI_INT32_T, 0, node);
        if code != SUCCESS {
            return Err(CommError::Start(format!("MPI_Bcast within the node: {}", error_text(code))));
        }
        Ok((leader as usize, local_size as usize, node))
    }
}
