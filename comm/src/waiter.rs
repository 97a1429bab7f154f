//! Waiting for other ranks: briefly by spinning, then by yielding, then asleep, and never beyond the deadline.

use crate::{Call, CommError};
use std::time::{Duration, Instant};

/// How a rank waits; chosen once from the topology.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    /// Polls without giving up the processor; 0 where ranks outnumber processors.
    pub(crate) spins: u32,
    /// How long to poll with yields before sleeping between polls.
    pub(crate) yields: Duration,
}

/// Between polls, once the wait has become long: a rank that computes needs the processor more than this one.
const SLEEP: Duration = Duration::from_micros(50);

/// One collective call: who waits in what since when.
pub(crate) struct Waiter {
    pub(crate) call: Call,
    pub(crate) rank: usize,
    pub(crate) size: usize,
    patience: Patience,
    started: Instant,
    deadline: Option<Duration>,
    polls: u32,
    waiting_since: Instant,
}

impl Waiter {
    pub(crate) fn new(
        call: Call,
        rank: usize,
        size: usize,
        patience: Patience,
        deadline: Option<Duration>,
    ) -> Self {
        let now = Instant::now();
        Self { call, rank, size, patience, started: now, deadline, polls: 0, waiting_since: now }
    }

    /// Polls until `ready` says true; `missing` lists who has not come, for the error.
    pub(crate) fn until(
        &mut self,
        mut ready: impl FnMut() -> Result<bool, CommError>,
        missing: impl FnOnce() -> Vec<usize>,
    ) -> Result<(), CommError> {
        self.polls = 0;
        while !ready()? {
            self.polls += 1;
            if self.polls <= self.patience.spins {
                std::hint::spin_loop();
                continue;
            }
            let now = Instant::now();
            if self.polls == self.patience.spins + 1 {
                self.waiting_since = now;
            }
            let waited = now - self.started;
            if self.deadline.is_some_and(|deadline| waited > deadline) {
                let (call, rank, size) = (self.call, self.rank, self.size);
                let missing = missing();
                return Err(CommError::Deadline { call, rank, size, waited, missing, board: None });
            }
            if now - self.waiting_since < self.patience.yields {
                std::thread::yield_now();
            } else {
                std::thread::sleep(SLEEP);
            }
        }
        Ok(())
    }

    pub(crate) fn mismatch(&self, other: usize) -> CommError {
        CommError::Mismatch { call: self.call, rank: self.rank, size: self.size, other }
    }
}
