//! How often a run is started again, and after which pause.

use std::time::Duration;

/// The longest pause between attempts.
const LONGEST: Duration = Duration::from_secs(60);

/// Restarts that are left. A newer durable checkpoint than at the restart before gives all of them back.
#[derive(Debug)]
pub struct Budget {
    allowed: usize,
    used: usize,
    durable: Option<u64>,
}

impl Budget {
    /// For a run whose newest durable checkpoint is of step `durable`.
    pub fn new(allowed: usize, durable: Option<u64>) -> Self {
        Self { allowed, used: 0, durable }
    }

    /// Takes a restart after a failure, if one is left: the pause before it.
    pub fn take(&mut self, durable: Option<u64>) -> Option<Duration> {
        if durable > self.durable {
            self.used = 0;
        }
        // It is lower where the run was sent back: then what comes after that counts. A place that could not be
        // listed says nothing.
        self.durable = durable.or(self.durable);
        if self.used >= self.allowed {
            return None;
        }
        let pause = Duration::from_secs(1 << self.used.min(6)).min(LONGEST);
        self.used += 1;
        Some(pause)
    }

    /// The number of this restart, of how many.
    pub fn state(&self) -> (usize, usize) {
        (self.used, self.allowed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_progress_gives_restarts_back() {
        let mut budget = Budget::new(3, None);
        let mut take = |durable| budget.take(durable).map(|pause| pause.as_secs());
        assert_eq!([take(None), take(None), take(Some(5)), take(Some(5))], [1, 2, 1, 2].map(Some));
        assert_eq!([take(Some(5)), take(Some(5)), take(Some(5))], [Some(4), None, None]);
        assert_eq!(take(Some(6)), Some(1));
        // Sent back: later steps are new again.
        assert_eq!([take(Some(2)), take(Some(3)), take(Some(3))], [Some(2), Some(1), Some(2)]);
        assert_eq!([take(None), take(Some(3))], [Some(4), None]);
        assert_eq!(Budget::new(0, None).take(Some(7)), None);
        let mut long = Budget::new(100, None);
        let pauses: Vec<u64> = (0..9).filter_map(|_| long.take(None)).map(|p| p.as_secs()).collect();
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
    }
}
