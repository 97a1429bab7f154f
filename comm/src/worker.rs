//! A thread that owns what one thread has to own, and works for the others in the order in which they ask.

use crate::{Board, Call, Collective, CommError, Topology};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What the thread is asked to do.
pub(crate) enum Order<E> {
    Work(Work<'static, E>),
    Stop,
}

type Work<'a, E> = Box<dyn FnOnce(&mut E) + Send + 'a>;

/// What the thread owns.
pub(crate) trait Serve: Sized + 'static {
    fn topology(&self) -> &Topology;
    /// Does work in order until told to stop, or until nobody is left to ask.
    fn serve(self, inbox: &Receiver<Order<Self>>);
}

/// What collectives have cost, for other threads to read.
#[derive(Debug, Default)]
pub(crate) struct Spent {
    nanoseconds: AtomicU64,
    bytes: AtomicU64,
}

impl Spent {
    /// Counts a collective on so many bytes that has gone on since `started`.
    pub(crate) fn add(&self, started: Instant, bytes: usize) {
        let nanoseconds = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(crate) fn busy(&self) -> Duration {
        Duration::from_nanos(self.nanoseconds.load(Ordering::Relaxed))
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

/// The thread as the others see it, with what they have set for the work to come.
pub(crate) struct Worker<E> {
    topology: Topology,
    orders: Mutex<Option<Sender<Order<E>>>>,
    /// Disconnected when the thread has ended.
    ended: Mutex<Receiver<()>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// In milliseconds; 0 for none.
    deadline: AtomicU64,
    /// [`NO_STEP`] before the first.
    step: AtomicU64,
}

/// No training step goes on.
const NO_STEP: u64 = u64::MAX;

impl<E: Serve> Worker<E> {
    /// Starts a thread, and in it what it is to own; `about` picks what others need to know of that. What takes
    /// longer than `patience` counts as failed.
    ///
    /// # Errors
    /// Those of `start`.
    pub(crate) fn start<I: Send + 'static>(
        name: &str,
        deadline: Option<Duration>,
        patience: Option<Duration>,
        start: impl FnOnce() -> Result<E, CommError> + Send + 'static,
        about: impl FnOnce(&E) -> I + Send + 'static,
    ) -> Result<(Self, I), CommError> {
        let (orders, inbox) = channel();
        let (started, answer) = channel();
        let (end, ended) = channel::<()>();
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                // Dropped when the thread ends, which is what `ended` sees.
                let _end = end;
                match start() {
                    Ok(engine) => {
                        let info = (engine.topology().clone(), about(&engine));
                        if started.send(Ok(info)).is_ok() {
                            engine.serve(&inbox);
                        }
                    }
                    // Nobody listens only if the starting thread is gone, and the process with it.
                    Err(error) => drop(started.send(Err(error))),
                }
            })
            .map_err(|error| CommError::Start(format!("no thread for the communication: {error}")))?;
        let answered = match patience {
            Some(patience) => answer.recv_timeout(patience),
            None => answer.recv().map_err(Into::into),
        };
        let (topology, info) = answered.unwrap_or_else(|error| {
            Err(CommError::Start(match error {
                RecvTimeoutError::Disconnected => "the communication thread failed to start".to_owned(),
                RecvTimeoutError::Timeout => format!(
                    "the ranks did not find each other within {:.0} s: one of them hangs, or never came",
                    patience.unwrap_or_default().as_secs_f64()
                ),
            }))
        })?;
        let worker = Self {
            topology,
            orders: Mutex::new(Some(orders)),
            ended: Mutex::new(ended),
            thread: Mutex::new(Some(thread)),
            deadline: AtomicU64::new(milliseconds(deadline)),
            step: AtomicU64::new(NO_STEP),
        };
        Ok((worker, info))
    }

    pub(crate) fn topology(&self) -> &Topology {
        &self.topology
    }

    pub(crate) fn set_deadline(&self, deadline: Option<Duration>) {
        self.deadline.store(milliseconds(deadline), Ordering::Relaxed);
    }

    pub(crate) fn deadline(&self) -> Option<Duration> {
        match self.deadline.load(Ordering::Relaxed) {
            0 => None,
            milliseconds => Some(Duration::from_millis(milliseconds)),
        }
    }

    pub(crate) fn set_step(&self, step: u64) {
        self.step.store(step, Ordering::Relaxed);
    }

    /// What messages call a collective that begins now.
    pub(crate) fn call(&self, collective: Collective, bucket: Option<usize>) -> Call {
        let step = self.step.load(Ordering::Relaxed);
        Call { collective, bucket, step: (step != NO_STEP).then_some(step) }
    }

    fn ended(&self, call: Call) -> CommError {
        CommError::Ended { call, rank: self.topology.rank, size: self.topology.size, cause: None }
    }

    /// Hands work to the thread. If that has ended the work is dropped, and its reply channel with it.
    pub(crate) fn submit(&self, work: Work<'static, E>) {
        let orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(orders) = orders.as_ref() {
            // A failed send returns the work, which is dropped: the caller sees that as the end.
            drop(orders.send(Order::Work(work)));
        }
    }

    /// Runs `work` on the thread and waits for it.
    pub(crate) fn blocking<'a, R: Send + 'a>(
        &self,
        call: Call,
        work: impl FnOnce(&mut E) -> Result<R, CommError> + Send + 'a,
    ) -> Result<R, CommError> {
        let (reply, answer) = channel();
        let work: Work<'a, E> = Box::new(move |engine| {
            let result = work(engine);
            // The receiver waits below until this is sent or dropped.
            drop(reply.send(result));
        });
        // SAFETY: only the lifetime is changed. What `work` borrows outlives it, because this function returns only
        // when `reply` is gone: either it was sent on after `work` ran, or it was dropped together with (and after
        // the unwinding of) `work`, which nothing keeps.
        let work = unsafe { std::mem::transmute::<Work<'a, E>, Work<'static, E>>(work) };
        self.submit(work);
        answer.recv().unwrap_or_else(|_| Err(self.ended(call)))
    }

    /// Whether the thread has not been told to stop.
    #[cfg(feature = "nccl")]
    pub(crate) fn open(&self) -> bool {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Tells the thread to stop when it has done what it was asked before, and waits for its end. Does nothing the
    /// second time.
    pub(crate) fn finish(&self, call: Call, board: Option<&Board>) -> Result<(), CommError> {
        let Some(orders) = self.orders.lock().unwrap_or_else(PoisonError::into_inner).take() else {
            return Ok(());
        };
        // Fails only if the thread has ended already.
        drop(orders.send(Order::Stop));
        drop(orders);
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.deadline();
        if let Some(board) = board {
            board.entered(call);
        }
        let late = match waited {
            Some(limit) => ended.recv_timeout(limit) == Err(RecvTimeoutError::Timeout),
            None => ended.recv().is_ok(),
        };
        if late {
            let (rank, size) = (self.topology.rank, self.topology.size);
            let (waited, missing) = (waited.unwrap_or_default(), Vec::new());
            let error = CommError::Deadline { call, rank, size, waited, missing, board: None };
            return Err(with_board(error, board));
        }
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        match thread.map(JoinHandle::join) {
            Some(Err(_)) => Err(self.ended(call)),
            _ => Ok(()),
        }
    }
}

/// A missed deadline, with what the board says of those that are late.
pub(crate) fn with_board(mut error: CommError, board: Option<&Board>) -> CommError {
    if let (CommError::Deadline { missing, board: said, .. }, Some(board)) = (&mut error, board) {
        *said = Some(board.late(missing));
    }
    error
}

fn milliseconds(deadline: Option<Duration>) -> u64 {
    deadline.map_or(0, |deadline| u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX).max(1))
}
