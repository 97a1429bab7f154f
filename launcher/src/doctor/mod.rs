//! `repa-dist doctor`: what this host, or the hosts of a job, have for a run and what they lack, a line a finding.
//!
//! A check may be slow, hang (a file system whose server has gone) or end its process (MPI's start): each has a
//! deadline and a thread or a process of its own, so that the page is always printed.

mod clock;
mod cuda;
mod disk;
mod gather;
mod gpu;
mod limits;
mod memory;
mod mpi;
mod network;
mod page;
mod probe;
mod segments;
mod slurm;
mod storage;
mod subject;

use std::sync::{Arc, mpsc};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use gather::{gather, names};
pub use gpu::count as gpus;
pub use mpi::broken;
pub use page::Page;
pub use probe::{StartWatch, probe};
pub use subject::Subject;

/// How long a check may take before it counts as hung. Speeds are measured in a fixed time, so that even a slow disk
/// is done by then.
const PATIENCE: Duration = Duration::from_secs(60);

/// What came of looking at something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it should be.
    Ok,
    /// A run starts, and will be slow, or is in danger.
    Warning,
    /// A run does not start, or does not get to its end.
    Error,
    /// Not here, and not needed.
    Absent,
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// What was looked at.
    pub topic: String,
    /// What came of it.
    pub state: State,
    /// What is there.
    pub found: String,
    /// What to do about it.
    pub fix: Option<String>,
    /// Hosts that it holds for; empty for all of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hosts: Vec<String>,
}

impl Line {
    fn new(topic: &str, state: State, found: impl Into<String>, fix: Option<String>) -> Self {
        Self { topic: topic.into(), state, found: found.into(), fix, hosts: Vec::new() }
    }

    /// All is well.
    pub fn ok(topic: &str, found: impl Into<String>) -> Self {
        Self::new(topic, State::Ok, found, None)
    }

    /// Not here, and not needed.
    pub fn absent(topic: &str, found: impl Into<String>) -> Self {
        Self::new(topic, State::Absent, found, None)
    }

    /// A run starts in spite of this.
    pub fn warning(topic: &str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::new(topic, State::Warning, found, Some(fix.into()))
    }

    /// A run fails because of this.
    pub fn error(topic: &str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::new(topic, State::Error, found, Some(fix.into()))
    }

    /// An error where what is missing is needed, a warning elsewhere.
    fn problem(topic: &str, needed: bool, found: impl Into<String>, fix: impl Into<String>) -> Self {
        let state = if needed { State::Error } else { State::Warning };
        Self::new(topic, state, found, Some(fix.into()))
    }
}

type Check = fn(&Subject) -> Vec<Line>;

/// What is looked at on every host, in the order of the page.
const CHECKS: [(&str, Check); 9] = [
    ("GPU", gpu::lines),
    ("storage", storage::lines),
    ("memory", memory::lines),
    ("shared memory", segments::lines),
    ("limits", limits::lines),
    ("ports", network::ports),
    ("network", network::names),
    ("clock", clock::lines),
    ("SLURM", slurm::lines),
];

/// Looks at this host. `tell` hears what is being looked at.
pub fn examine(subject: &Arc<Subject>, tell: &dyn Fn(&str)) -> Vec<Line> {
    let mut lines = Vec::new();
    for (topic, check) in CHECKS {
        tell(topic);
        lines.extend(within(topic, subject, check));
    }
    lines
}

/// What MPI does for a process that no launcher started: two ranks of its own are started to see.
pub fn examine_mpi(subject: &Arc<Subject>, tell: &dyn Fn(&str)) -> Vec<Line> {
    tell("MPI");
    within("MPI", subject, mpi::alone)
}

/// Runs a check, for so long.
fn within(topic: &str, subject: &Arc<Subject>, check: Check) -> Vec<Line> {
    let (send, receive) = mpsc::channel();
    let subject = Arc::clone(subject);
    // The thread of a check that hangs is left to itself: the process ends soon.
    let started = std::thread::Builder::new().name("check".into()).spawn(move || {
        // Nobody listens any more where it took too long.
        let _ = send.send(check(&subject));
    });
    let problem = match started {
        Err(error) => format!("not looked at: {error}"),
        Ok(_) => match receive.recv_timeout(PATIENCE) {
            Ok(lines) => return lines,
            Err(mpsc::RecvTimeoutError::Timeout) => format!("no answer within {} s", PATIENCE.as_secs()),
            Err(mpsc::RecvTimeoutError::Disconnected) => "the check itself failed (a bug)".to_owned(),
        },
    };
    let fix =
        "see whether a file system or a device of this host hangs (`df`, `dmesg`), and report this otherwise";
    vec![Line::error(topic, problem, fix)]
}
