//! `repa-dist launch`: starts the ranks with mpirun, watches them, and starts them again from the last durable
//! checkpoint when they fail.
//!
//! mpirun alone waits for minutes when a host has gone, gives ranks a second to save on SIGTERM, and never starts
//! anything again. So launch keeps its own deadlines, ends what mpirun leaves behind, and decides by the ranks' exit
//! codes what comes next.

mod agent;
mod allocation;
mod attempt;
mod budget;
mod check;
mod command;
mod error;
mod hosts;
mod lines;
mod output;
mod processes;
mod record;
mod signals;
mod supervisor;
mod tags;
mod verdict;
mod watch;

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::time::Duration;

use repa_trainer::checkpoint::Checkpoints;

pub use agent::Agent;
pub use allocation::{Allocation, tasks_of_step};
pub use attempt::Deadlines;
pub use command::{Daemons, Line, MARK, environment};
pub use error::LaunchError;
pub use hosts::{Placement, this_host};
pub use processes::reap;
pub use record::{Attempts, Record};
pub use signals::usual_stop;
pub use supervisor::supervise;

/// The run that is launched.
#[derive(Debug)]
pub struct Job {
    /// Arguments of `train`.
    pub train: Vec<String>,
    /// The run folder.
    pub run: PathBuf,
    /// Where its checkpoints are.
    pub checkpoints: Checkpoints,
    /// Steps in all.
    pub steps: u64,
    /// How long a rank may wait for another.
    pub patience: Duration,
}

/// How it is launched.
#[derive(Debug)]
pub struct Settings {
    /// Where ranks run.
    pub placement: Placement,
    /// The rest of the mpirun line.
    pub line: Line,
    /// How other hosts are reached.
    pub agent: Agent,
    /// Restarts without a newer checkpoint.
    pub max_restarts: usize,
    /// Whether the run goes on with the hosts that are left.
    pub elastic: bool,
    /// Whether the other ranks' standard error is shown.
    pub shows_others: bool,
    /// How long things may take.
    pub deadlines: Deadlines,
    /// How long all of it may take.
    pub limit: Option<Duration>,
}

impl Settings {
    /// The mpirun line as a shell reads it.
    pub fn dry_run(&self, job: &Job) -> String {
        command::quoted(&self.words(&self.placement, &job.train, &output::Terminal::new()))
    }

    fn words(&self, placement: &Placement, train: &[String], terminal: &output::Terminal) -> Vec<String> {
        let mut names = environment();
        names.extend([command::MARK, command::RESTARTS].map(str::to_owned));
        if terminal.width().is_some() {
            names.push(command::TERMINAL.to_owned());
        }
        if self.line.nccl_interface().is_some() {
            names.push("NCCL_SOCKET_IFNAME".to_owned());
        }
        self.line.words(placement, train, &names)
    }
}

/// The mark of launches of a run from this host: the same each time, so that one finds what another has left when it
/// was killed.
pub fn mark(run: &Path) -> String {
    let mut hasher = DefaultHasher::new();
    let absolute = std::path::absolute(run).unwrap_or_else(|_| run.to_owned());
    (hosts::this_host(), rustix::process::getuid().as_raw(), absolute).hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

/// Arguments of `train` for an attempt that goes on from what another has left: `run.resume=never` is for the first.
fn to_go_on(train: &[String]) -> Vec<String> {
    let mut kept = Vec::new();
    let mut words = train.iter();
    while let Some(word) = words.next() {
        match word.as_str() {
            "--resume" => {
                if let Some(value) = words.next().filter(|value| *value != "never") {
                    kept.extend([word.clone(), value.clone()]);
                }
            }
            "--resume=never" => {}
            _ => match word.split_once('=') {
                Some((key, value))
                    if key.trim() == "run.resume" && value.trim().trim_matches('"') == "never" => {}
                _ => kept.push(word.clone()),
            },
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restart_may_go_on() {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let went = |text: &str| to_go_on(&words(text)).join(" ");
        assert_eq!(went("--config c --resume never train.steps=5"), "--config c train.steps=5");
        assert_eq!(went("run.resume=never --resume=never a=b"), "a=b");
        assert_eq!(went("--resume 5 run.resume=7"), "--resume 5 run.resume=7");
    }

    #[test]
    fn runs_have_marks_of_their_own() {
        let here = std::env::current_dir().expect("a folder");
        assert_eq!(mark(Path::new("a")), mark(&here.join("a")));
        assert_ne!(mark(Path::new("a")), mark(Path::new("b")));
    }
}
