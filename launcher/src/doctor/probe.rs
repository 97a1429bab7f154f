//! A rank that only says that it is there: `doctor` starts two of them to see whether ranks can be started at all, and
//! does the same with the ranks of a job.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use repa_comm::{CommError, Communicator, Options};
use serde::{Deserialize, Serialize};

/// Elements of the vector that the ranks sum: 4 MiB, as much as a bucket of gradients may have.
const ELEMENTS: usize = 1 << 20;

/// How often it is summed; the best time counts.
const TURNS: usize = 5;

/// How long the ranks may wait for each other, and for MPI's start.
pub const DEADLINE: Duration = Duration::from_secs(15);

/// The exit code of a rank whose MPI does not start, as of one that MPI itself ends.
const NOT_UP: i32 = 1;

/// What rank 0 says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Probe {
    /// The MPI library's name and version.
    pub library: String,
    /// Which threads may call it; None where it was not started.
    pub thread_level: Option<String>,
    /// How ranks talk.
    pub transport: String,
    /// Number of ranks.
    pub ranks: usize,
    /// Number of hosts.
    pub nodes: usize,
    /// What an all-reduce of the vector takes.
    pub sum_seconds: f64,
    /// Whether it comes out right.
    pub is_right: bool,
}

impl Probe {
    /// Sums a vector over the ranks. Called by all of them.
    ///
    /// # Errors
    /// Those of the communication.
    pub fn of(comm: &dyn Communicator) -> Result<Self, CommError> {
        let (mut best, mut is_right) = (f64::INFINITY, true);
        let size = comm.size();
        // 1 + 2 + ... + size.
        let sum = (size * (size + 1) / 2) as f32;
        for _ in 0..TURNS {
            let mut values = vec![comm.rank() as f32 + 1.0; ELEMENTS];
            comm.barrier()?;
            let started = Instant::now();
            comm.all_reduce_f32(&mut values)?;
            best = best.min(started.elapsed().as_secs_f64());
            is_right &= values.iter().all(|&value| value == sum);
        }
        Ok(Self {
            library: repa_comm::library_version(),
            thread_level: repa_comm::thread_level(),
            transport: comm.describe(),
            ranks: size,
            nodes: comm.topology().nodes,
            sum_seconds: best,
            is_right,
        })
    }

    /// `summed 4 MiB in 1.2 ms (shared memory)`.
    pub fn describe(&self) -> String {
        // "Open MPI v4.1.4, shared memory": the library has a line of its own.
        let how = self.transport.strip_prefix(&self.library).unwrap_or(&self.transport);
        let how = how.trim_start_matches(", ");
        format!("summed 4 MiB in {:.1} ms ({how})", 1e3 * self.sum_seconds)
    }
}

/// The hidden command: rank 0 prints what it has found, as JSON on one line.
///
/// # Errors
/// The ranks cannot be started, or cannot talk; the text says why not.
pub fn probe() -> Result<(), CommError> {
    let _watch = StartWatch::new(DEADLINE + Duration::from_secs(1));
    let comm = repa_comm::init(&Options { deadline: Some(DEADLINE), ..Options::default() })?;
    let probe = Probe::of(comm.as_ref())?;
    if comm.rank() == 0 {
        let json = serde_json::to_string(&probe).map_err(|e| CommError::Start(e.to_string()))?;
        println!("{json}");
    }
    comm.finalize()
}

/// Ends the process when its time is over, unless it is dropped before: MPI's start has no deadline of its own.
#[derive(Debug)]
pub struct StartWatch {
    done: Arc<AtomicBool>,
}

impl StartWatch {
    /// From now on, for so long.
    pub fn new(deadline: Duration) -> Self {
        let done = Arc::new(AtomicBool::new(false));
        let over = Arc::clone(&done);
        std::thread::spawn(move || {
            std::thread::sleep(deadline);
            if !over.load(Ordering::SeqCst) {
                eprintln!("error: the ranks were not up within {} s: MPI hangs", deadline.as_secs());
                std::process::exit(NOT_UP);
            }
        });
        Self { done }
    }
}

impl Drop for StartWatch {
    fn drop(&mut self) {
        self.done.store(true, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_rank_is_a_sum_too() {
        let probe = Probe::of(&repa_comm::Single::new()).expect("nothing to fail");
        assert!(probe.is_right && probe.ranks == 1 && probe.thread_level.is_none(), "{probe:?}");
        let text = serde_json::to_string(&probe).expect("JSON");
        assert_eq!(serde_json::from_str::<Probe>(&text).expect("read back"), probe);
    }

    #[test]
    fn the_library_is_not_said_twice() {
        let probe = Probe {
            library: "Open MPI v4.1.4".into(),
            thread_level: Some("MULTIPLE".into()),
            transport: "Open MPI v4.1.4, shared memory".into(),
            ranks: 2,
            nodes: 1,
            sum_seconds: 0.0012,
            is_right: true,
        };
        assert_eq!(probe.describe(), "summed 4 MiB in 1.2 ms (shared memory)");
    }
}
