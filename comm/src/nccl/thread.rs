//! The thread that owns the NCCL communicator and its streams.

use super::device::DeviceValues;
use super::driver::{Device, Event, Stream};
use super::handle::{Handle, unique_id};
use super::library::Library;
use super::meeting::{Told, judge};
use super::staging::Staging;
use super::who::Who;
use crate::reduce::Phases;
use crate::waiter::{Patience, Waiter};
use crate::worker::{Order, Serve, Spent, with_board};
use crate::{Board, Call, Collective, CommError, Communicator, Topology};
use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Collectives on the device that may be under way; putting in too many would block in the driver.
const MOST_UNDER_WAY: usize = 256;

/// The time between looks at what is under way while there is nothing else to do.
const WATCH: Duration = Duration::from_micros(100);

/// How the caller's call waits, and how one behind the rank's computation.
const FOREGROUND: Patience = Patience { spins: 0, yields: Duration::from_millis(1) };
const BACKGROUND: Patience = Patience { spins: 0, yields: Duration::from_micros(20) };

/// Nice value of the thread, where it may have one.
const PRIORITY: i32 = -10;

/// How a collective is done.
#[derive(Debug, Clone, Copy)]
pub(super) struct Manner {
    pub(super) call: Call,
    pub(super) deadline: Option<Duration>,
    /// Whether the rank computes meanwhile.
    pub(super) background: bool,
}

impl Manner {
    pub(super) fn patience(self) -> Patience {
        if self.background { BACKGROUND } else { FOREGROUND }
    }
}

/// A collective on the caller's device memory.
struct UnderWay {
    who: Who,
    started: Instant,
    deadline: Option<Duration>,
    bytes: usize,
    done: Arc<Event>,
    finished: Sender<Result<(), CommError>>,
}

/// NCCL and what was made for it; lives on its thread.
pub(super) struct Engine {
    pub(super) topology: Topology,
    device: Device,
    library: &'static Library,
    pub(super) handle: Handle,
    /// NCCL's.
    pub(super) stream: Stream,
    pub(super) staging: Staging,
    under_way: VecDeque<UnderWay>,
    /// When the last collective was done.
    last_done: Instant,
    spent: Arc<Spent>,
    /// The first error, here or of the inner communicator; all later work is refused with it.
    failed: Arc<OnceLock<CommError>>,
    board: Option<Arc<Board>>,
}

impl Engine {
    /// Finds the library and the device, agrees with the other ranks, and starts NCCL: a collective.
    pub(super) fn start(
        inner: &dyn Communicator,
        ordinal: usize,
        deadline: Option<Duration>,
    ) -> Result<Self, CommError> {
        let topology = inner.topology();
        let found = Library::find().and_then(|library| Ok((library, Device::open(ordinal)?)));
        let found = found.map_err(|problem| format!("NCCL cannot be used: {problem}"));
        let mine = match &found {
            Ok((library, device)) => Told::good(library.version, &device.uuid),
            Err(problem) => Told::bad(problem),
        };
        let told = inner.all_gather_bytes(&mine.encode())?;
        let told: Vec<Told> = told.iter().map(|bytes| Told::decode(bytes)).collect();
        judge(&told, topology).map_err(CommError::Start)?;
        let (library, device) = found.map_err(CommError::Start)?;
        let id = agree_on_id(inner, library)?;

        let call = Collective::Start.into();
        let manner = Manner { call, deadline, background: false };
        // Everything is allocated here, once: later allocations could wait for kernels that wait for other ranks.
        let parts = device.enter().and_then(|()| Ok((Stream::new()?, Staging::new()?)));
        let (stream, staging) = Who { call, rank: topology.rank, size: topology.size }.cuda(parts)?;
        let mut engine = Self {
            topology: topology.clone(),
            device,
            library,
            handle: Handle::new(library),
            stream,
            staging,
            under_way: VecDeque::new(),
            last_done: Instant::now(),
            spent: Arc::default(),
            failed: Arc::default(),
            board: None,
        };
        engine.call(manner, |engine, waiter| {
            engine.handle.init(&id, Who::from(&*waiter))?;
            engine.settle(waiter)
        })?;
        Ok(engine)
    }

    pub(super) fn set_board(&mut self, board: Arc<Board>) {
        self.board = Some(board);
    }

    pub(super) fn spent(&self) -> Arc<Spent> {
        Arc::clone(&self.spent)
    }

    pub(super) fn failed(&self) -> Arc<OnceLock<CommError>> {
        Arc::clone(&self.failed)
    }

    pub(super) fn device(&self) -> Device {
        self.device.clone()
    }

    pub(super) fn describe(&self) -> String {
        let Device { ordinal, name, .. } = &self.device;
        format!("NCCL {} on GPU {ordinal} ({name})", self.library.version)
    }

    fn who(&self, call: Call) -> Who {
        Who { call, rank: self.topology.rank, size: self.topology.size }
    }

    /// Counts a collective that is done. Those that follow each other closely share the time.
    pub(super) fn count(&mut self, started: Instant, bytes: usize) {
        self.spent.add(started.max(self.last_done), bytes);
        self.last_done = Instant::now();
    }

    /// Runs one call, unless an earlier one failed, and remembers its error.
    pub(super) fn call<R>(
        &mut self,
        manner: Manner,
        work: impl FnOnce(&mut Self, &mut Waiter) -> Result<R, CommError>,
    ) -> Result<R, CommError> {
        let who = self.who(manner.call);
        if let Some(error) = self.failed.get() {
            return Err(who.ended(Some(error)));
        }
        let mut waiter = Waiter::new(who.call, who.rank, who.size, manner.patience(), manner.deadline);
        let board = self.board.clone();
        if let Some(board) = &board {
            board.entered(who.call);
        }
        let result = work(self, &mut waiter).map_err(|error| with_board(error, board.as_deref()));
        match (&result, &board) {
            (Err(error), _) => self.fail(error),
            (Ok(_), Some(board)) => board.left(),
            (Ok(_), None) => {}
        }
        result
    }

    /// The end of all work here: what is under way is stopped, and nothing more is begun. Does nothing the second time.
    fn fail(&mut self, error: &CommError) {
        // An earlier error of the inner communicator stays the cause.
        let _ = self.failed.set(error.clone());
        self.handle.abort();
        for work in self.under_way.drain(..) {
            drop(work.finished.send(Err(work.who.ended(Some(error)))));
        }
    }

    /// Waits until NCCL has handed its last call over.
    pub(super) fn settle(&mut self, waiter: &mut Waiter) -> Result<(), CommError> {
        let who = Who::from(&*waiter);
        waiter.until(|| self.handle.settled(who), Vec::new)
    }

    /// Looks after what is under way: tells those whose collective is done.
    ///
    /// # Errors
    /// NCCL's or the driver's, or that one has missed its deadline, which its caller is told.
    fn look_after(&mut self, who: Who) -> Result<(), CommError> {
        if self.handle.is_live() {
            self.handle.settled(who)?;
        }
        while let Some(first) = self.under_way.front() {
            if who.cuda(first.done.passed())? {
                let Some(first) = self.under_way.pop_front() else { break };
                self.count(first.started, first.bytes);
                // Nobody listens if the handle was dropped.
                drop(first.finished.send(Ok(())));
                continue;
            }
            let waited = first.started.elapsed();
            if first.deadline.is_some_and(|deadline| waited > deadline) {
                let Some(first) = self.under_way.pop_front() else { break };
                let error = with_board(first.who.deadline(waited), self.board.as_deref());
                // First the end of NCCL's work: the caller may free its memory when it is told.
                self.fail(&error);
                drop(first.finished.send(Err(error.clone())));
                return Err(error);
            }
            break;
        }
        Ok(())
    }

    /// Between orders: errors stay with the engine, and the callers that wait are told.
    fn watch(&mut self) {
        let Some(first) = self.under_way.front() else { return };
        let who = first.who;
        if let Err(error) = self.look_after(who) {
            self.fail(&error);
        }
    }

    /// Waits for an event, looking after everything else meanwhile.
    pub(super) fn until_passed(&mut self, event: &Event, waiter: &mut Waiter) -> Result<(), CommError> {
        let who = Who::from(&*waiter);
        let ready = || {
            if who.cuda(event.passed())? {
                return Ok(true);
            }
            self.look_after(who)?;
            Ok(false)
        };
        waiter.until(ready, Vec::new)
    }

    /// A collective on a vector in device memory, after the mark `ready`. Gives the mark that comes after it as soon as
    /// that is in the stream; `finished` is told when the device has come to it.
    ///
    /// # Safety
    /// The values are in memory of this device that nobody uses but what is put in before `ready` and after the mark
    /// that is given back.
    pub(super) unsafe fn on_device(
        &mut self,
        values: DeviceValues,
        phases: Phases,
        ready: &Event,
        manner: Manner,
        finished: Sender<Result<(), CommError>>,
    ) -> Result<Arc<Event>, CommError> {
        let DeviceValues { start, len, kind } = values;
        let started = Instant::now();
        let who = self.who(manner.call);
        let result = self.call(manner, |engine, waiter| {
            while engine.under_way.len() >= MOST_UNDER_WAY {
                let oldest = Arc::clone(&engine.under_way[0].done);
                engine.until_passed(&oldest, waiter)?;
                engine.look_after(Who::from(&*waiter))?;
            }
            who.cuda(engine.stream.wait(ready))?;
            if len > 0 {
                // SAFETY: the caller's word.
                unsafe { engine.handle.on_shards(phases, (start, kind, len), &engine.stream, who) }?;
                engine.settle(waiter)?;
            }
            let done = who.cuda(Event::new())?;
            who.cuda(done.record(&engine.stream))?;
            Ok(Arc::new(done))
        });
        match &result {
            Ok(done) => {
                let (deadline, bytes, done) = (manner.deadline, len * kind.bytes(), Arc::clone(done));
                self.under_way.push_back(UnderWay { who, started, deadline, bytes, done, finished });
            }
            Err(error) => drop(finished.send(Err(error.clone()))),
        }
        result
    }

    /// Orderly end of NCCL: a collective. Nothing is left to do after an error.
    pub(super) fn finalize(&mut self, manner: Manner) -> Result<(), CommError> {
        if self.failed.get().is_some() {
            return Ok(());
        }
        self.call(manner, |engine, waiter| {
            if let Some(last) = engine.under_way.back() {
                let last = Arc::clone(&last.done);
                engine.until_passed(&last, waiter)?;
                engine.look_after(Who::from(&*waiter))?;
            }
            engine.handle.finalize(Who::from(&*waiter))?;
            engine.settle(waiter)?;
            engine.handle.destroy(Who::from(&*waiter))
        })
    }

    /// What is left when no more work comes. After an error, or without [`Engine::finalize`], NCCL is aborted, and the
    /// buffers stay where they are: copies may still be under way.
    fn end(mut self) {
        if self.handle.is_live() || self.failed.get().is_some() {
            self.handle.abort();
            std::mem::forget(self);
        }
    }
}

impl Serve for Engine {
    fn topology(&self) -> &Topology {
        &self.topology
    }

    fn serve(mut self, inbox: &Receiver<Order<Self>>) {
        // As for MPI: it works little and often, and the whole job waits for it.
        let _ = rustix::process::setpriority_process(None, PRIORITY);
        loop {
            self.watch();
            let order = if self.under_way.is_empty() {
                inbox.recv().map_err(RecvTimeoutError::from)
            } else {
                inbox.recv_timeout(WATCH)
            };
            match order {
                Ok(Order::Work(work)) => work(&mut self),
                Err(RecvTimeoutError::Timeout) => {}
                Ok(Order::Stop) | Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        self.end();
    }
}

/// Rank 0's unique id, on all ranks.
fn agree_on_id(inner: &dyn Communicator, library: &Library) -> Result<Vec<u8>, CommError> {
    // The first byte tells an id from the reason why there is none.
    let mut message = match (inner.rank() == 0).then(|| unique_id(library)) {
        Some(Ok(id)) => [&[1u8][..], &id].concat(),
        Some(Err(problem)) => [&[0u8][..], problem.as_bytes()].concat(),
        None => Vec::new(),
    };
    inner.broadcast_bytes(&mut message, 0)?;
    match message.split_first() {
        Some((1, id)) => Ok(id.to_vec()),
        other => {
            let problem = other.map_or_else(Default::default, |(_, text)| String::from_utf8_lossy(text));
            Err(CommError::Start(format!("rank 0 on {}: {problem}", inner.topology().hosts[0])))
        }
    }
}
