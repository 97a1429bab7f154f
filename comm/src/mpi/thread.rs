//! The communication thread: owns MPI.

use super::hierarchy::{Hierarchy, Place};
use super::messages::Messages;
use super::raw::{SUCCESS, check, error_text};
use super::shared::SharedMemory;
use super::{ABORTABLE, library_version};
use crate::abort::say;
use crate::environment::Options;
use crate::reduce::{Element, Phases};
use crate::topology::{Told, Topology};
use crate::waiter::{Patience, Waiter};
use crate::worker::{Order, Serve, Spent, with_board};
use crate::{Background, Board, Call, Collective, CommError, ReduceOp, Wire, shard_range};
use half::bf16;
use mpi::environment::Universe;
use mpi::{Threading, ffi};
use std::ffi::c_int;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

/// MPI and what was made with it; lives on the communication thread.
pub(super) struct Engine {
    universe: Option<Universe>,
    world: ffi::MPI_Comm,
    topology: Topology,
    messages: Messages,
    shared: Option<SharedMemory>,
    hierarchy: Option<Hierarchy>,
    patience: Patience,
    spent: Arc<Spent>,
    /// What is told of collectives, once there is one.
    pub(super) board: Option<Arc<Board>>,
    /// What is rounded for its way.
    rounded: Vec<bf16>,
    /// The first error; all later work is refused with it.
    failed: Option<CommError>,
}

/// How a collective on a vector is done.
#[derive(Debug, Clone, Copy)]
pub(super) struct Manner {
    pub(super) call: Call,
    pub(super) deadline: Option<Duration>,
    /// Within nodes first, where that can be had.
    pub(super) hierarchical: bool,
    /// Whether the rank computes meanwhile.
    pub(super) background: bool,
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
        // Not to be finalised where the start fails: that would wait for ranks that may never come.
        let universe = ManuallyDrop::new(universe);
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
            check(code, Collective::Start.into(), rank as usize, size as usize)?;
            world.assume_init()
        };
        ABORTABLE.store(level == Threading::Multiple, Ordering::SeqCst);
        let (rank, size) = (rank as usize, size as usize);
        let (leader, local_size, node_comm) = split_by_node(rank, size)?;

        let chunk_bytes = options.chunk_bytes.clamp(64 << 10, 8 << 20);
        let mut messages = Messages::new(world, rank, (0..size).collect(), chunk_bytes);
        // Until it is known who shares processors: the careful way.
        let careful = Patience { spins: 0, yields: YIELDS };
        let waiter = || Waiter::new(Collective::Start.into(), rank, size, careful, options.deadline);
        let told = messages.all_gather_bytes(&Told::here(leader).encode(), &mut waiter())?;
        let told: Vec<Told> =
            told.iter().enumerate().map(|(rank, bytes)| Told::decode(rank, bytes)).collect();
        let topology = Topology::new(rank, &told);
        let spins = if topology.oversubscribed() { 0 } else { 200 };

        let place = Place::new(&topology);
        let (mut shared, mut hierarchy) = (None, None);
        if options.shared_memory && size > 1 && (local_size == size || place.is_some()) {
            let members: Vec<usize> =
                (0..size).filter(|&rank| topology.node_of[rank] == topology.node).collect();
            let mut all = |mine: Result<(), CommError>| {
                if let Err(error) = &mine {
                    // Nobody listens to warnings yet.
                    say(&format!(
                        "warning: no shared memory between the ranks of {}: {error}",
                        topology.hosts[topology.rank]
                    ));
                }
                let mut fit = [i64::from(mine.is_ok())];
                messages.run(&mut fit, ReduceOp::Min, Phases::ReduceAndGather, &mut waiter())?;
                Ok::<_, CommError>(fit[0] == 1)
            };
            // First whether there is room on every node: where there is none, OpenMPI's ranks leave each other waiting.
            let room = match topology.local_rank {
                0 => SharedMemory::room(members.len(), chunk_bytes),
                _ => Ok(()),
            };
            if all(room)? {
                let mut attempt = SharedMemory::new(node_comm, topology.local_rank, members, chunk_bytes);
                // Every rank got its view of its node's; otherwise nobody uses any.
                let reserved = match &mut attempt {
                    Ok(memory) => memory.reserve(),
                    Err(error) => Err(error.clone()),
                };
                // Where only some have it, it is left as it is: freeing would be a collective.
                if let (Ok(memory), true) = (attempt, all(reserved)?) {
                    match place {
                        None => shared = Some(memory),
                        Some(place) => {
                            hierarchy = Some(Hierarchy::new(memory, place, &topology, chunk_bytes)?);
                        }
                    }
                }
            }
        }
        Ok(Self {
            universe: Some(ManuallyDrop::into_inner(universe)),
            world,
            topology,
            messages,
            shared,
            hierarchy,
            patience: Patience { spins, yields: YIELDS },
            spent: Arc::default(),
            board: None,
            rounded: Vec::new(),
            failed: None,
        })
    }

    pub(super) fn spent(&self) -> Arc<Spent> {
        Arc::clone(&self.spent)
    }

    /// Where this rank stands in two levels, if there are two.
    pub(super) fn place(&self) -> Option<Place> {
        self.hierarchy.as_ref().and_then(|_| Place::new(&self.topology))
    }

    pub(super) fn describe(&self) -> String {
        let how = match (&self.shared, &self.hierarchy) {
            (Some(_), _) => "shared memory",
            (None, Some(_)) => "shared memory within hosts and messages",
            (None, None) => "messages",
        };
        format!("{}, {how}", library_version())
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
        if let Some(hierarchy) = self.hierarchy.take() {
            hierarchy.free();
        }
        ABORTABLE.store(false, Ordering::SeqCst);
        drop(universe);
    }

    /// Runs one collective on so many bytes, unless an earlier one failed, and remembers its error.
    fn call<R>(
        &mut self,
        (call, bytes): (Call, usize),
        deadline: Option<Duration>,
        patience: Patience,
        work: impl FnOnce(&mut Self, &mut Waiter) -> Result<R, CommError>,
    ) -> Result<R, CommError> {
        let (rank, size) = (self.topology.rank, self.topology.size);
        if let Some(error) = &self.failed {
            return Err(CommError::Ended { call, rank, size, cause: Some(error.to_string()) });
        }
        let started = Instant::now();
        let mut waiter = Waiter::new(call, rank, size, patience, deadline);
        let board = self.board.clone();
        if let Some(board) = &board {
            board.entered(call);
        }
        let result = work(self, &mut waiter).map_err(|error| with_board(error, board.as_deref()));
        match (&result, &board) {
            (Err(error), _) => self.failed = Some(error.clone()),
            (Ok(_), Some(board)) => board.left(),
            (Ok(_), None) => {}
        }
        self.spent.add(started, bytes);
        result
    }

    pub(super) fn reduce<T: Element>(
        &mut self,
        data: &mut [T],
        op: ReduceOp,
        phases: Phases,
        manner: Manner,
    ) -> Result<(), CommError> {
        let bytes = size_of_val(data);
        let patience = if manner.background { BACKGROUND } else { self.patience };
        self.call((manner.call, bytes), manner.deadline, patience, |engine, waiter| {
            match (&mut engine.shared, &mut engine.hierarchy) {
                (Some(shared), _) => shared.run(data, op, phases, waiter),
                (None, Some(hierarchy)) if manner.hierarchical => hierarchy.run(data, op, phases, waiter),
                _ => engine.messages.run(data, op, phases, waiter),
            }
        })
    }

    /// A collective on a gradient bucket, while the rank computes.
    pub(super) fn bucket(
        &mut self,
        data: &mut [f32],
        how: Background,
        manner: Manner,
    ) -> Result<(), CommError> {
        let (op, phases) = (ReduceOp::Sum, how.phases);
        if how.wire == Wire::F32 || !phases.reduces() {
            return self.reduce(data, op, phases, manner);
        }
        let mut rounded = std::mem::take(&mut self.rounded);
        rounded.clear();
        rounded.extend(data.iter().map(|&value| bf16::from_f32(value)));
        self.reduce(&mut rounded, op, phases, manner)?;
        let valid =
            if phases.gathers() { 0..data.len() } else { self.shard(data.len(), manner.hierarchical) };
        for (value, sum) in data[valid.clone()].iter_mut().zip(&rounded[valid]) {
            *value = sum.to_f32();
        }
        self.rounded = rounded;
        Ok(())
    }

    /// This rank's shard of a vector.
    fn shard(&self, len: usize, hierarchical: bool) -> Range<usize> {
        match self.place().filter(|_| hierarchical) {
            Some(place) => place.shard(len),
            None => shard_range(len, self.topology.rank, self.topology.size),
        }
    }

    pub(super) fn all_gather_bytes(
        &mut self,
        mine: &[u8],
        call: Call,
        deadline: Option<Duration>,
    ) -> Result<Vec<Vec<u8>>, CommError> {
        let work = |engine: &mut Self, waiter: &mut Waiter| engine.messages.all_gather_bytes(mine, waiter);
        self.call((call, mine.len()), deadline, self.patience, work)
    }

    pub(super) fn broadcast_bytes(
        &mut self,
        data: &mut Vec<u8>,
        root: usize,
        call: Call,
        deadline: Option<Duration>,
    ) -> Result<(), CommError> {
        let bytes = data.len();
        let work =
            |engine: &mut Self, waiter: &mut Waiter| engine.messages.broadcast_bytes(data, root, waiter);
        self.call((call, bytes), deadline, self.patience, work)
    }

    /// MPI_Allreduce, blocking. (Not in place: MPI_IN_PLACE has another value in every MPI, and the crate has none.)
    pub(super) fn library_all_reduce_f32(&mut self, data: &[f32], sum: &mut [f32]) -> Result<(), CommError> {
        assert_eq!(data.len(), sum.len(), "all-reduce into a slice of another length");
        let call = Collective::LibraryAllReduce.into();
        self.call((call, size_of_val(data)), None, self.patience, |engine, waiter| {
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
            check(code, waiter.call, waiter.rank, waiter.size)
        })
    }
}

impl Serve for Engine {
    fn topology(&self) -> &Topology {
        &self.topology
    }

    fn serve(mut self, inbox: &Receiver<Order<Self>>) {
        // This thread works little and often, and what the rank's computing threads gain by making it wait, the
        // whole job loses. Lowering the nice value takes a privilege; without it, things stay as they are.
        let _ = rustix::process::setpriority_process(None, PRIORITY);
        while let Ok(Order::Work(work)) = inbox.recv() {
            work(&mut self);
        }
        self.end();
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
        check(code, Collective::Start.into(), rank, size)?;
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
