//! Why an attempt ended, from mpirun's exit code, its words and the ranks'.
//!
//! Debian's OpenMPI may crash after a rank has aborted the job, and its exit code is then lost: what the ranks and
//! mpirun said before counts more.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use repa_trainer::exit::{Kind, Outcome};
use serde::{Deserialize, Serialize};

use super::hosts::Placement;
use super::output::RankError;
use super::watch::Stuck;

/// Why an attempt ended, in a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Why {
    /// The run is complete.
    Done,
    /// On request, with a checkpoint.
    Stopped,
    /// The command line or the configuration is wrong.
    Config,
    /// Data or a checkpoint cannot be used.
    Data,
    /// A rank failed while running.
    Failed,
    /// A signal ended a rank.
    Killed,
    /// No step for too long.
    Hung,
    /// mpirun could not start the ranks.
    Start,
    /// mpirun went away.
    Mpirun,
    /// Hosts do not answer.
    Unreachable,
    /// Launch ended it: it did not stop in time, or a second signal came.
    Ended,
}

impl Why {
    fn of_code(code: i32) -> Self {
        match u8::try_from(code) {
            Ok(code) if code == Outcome::Done.code() => Self::Done,
            Ok(code) if code == Outcome::Stopped.code() => Self::Stopped,
            Ok(code) if code == Kind::Usage.code() => Self::Config,
            Ok(code) if code == Kind::Data.code() => Self::Data,
            _ => Self::Failed,
        }
    }
}

/// The end of an attempt.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict {
    /// In a word.
    pub why: Why,
    /// The exit code of the ranks, as far as it is known.
    pub code: Option<i32>,
    /// The signal that ended a rank, or mpirun.
    pub signal: Option<i32>,
    /// The rank that it began with.
    pub rank: Option<usize>,
    /// Its host.
    pub host: Option<String>,
    /// What to tell.
    pub message: String,
}

/// What launch itself did to end the attempt.
#[derive(Debug, Clone, PartialEq)]
pub enum Forced {
    /// There was no step for this many seconds, counted from the start if there was none at all.
    Hung {
        /// How long.
        seconds: f64,
        /// Whether there had been a step.
        stepped: bool,
        /// The option that says how long it may be.
        option: &'static str,
        /// Who may have caused it.
        stuck: Option<Stuck>,
    },
    /// The ranks were gone, or had failed, and mpirun went on waiting.
    Lingering,
    /// The ranks did not save within this many seconds of the request to stop.
    Grace(f64),
    /// A second signal.
    Again(i32),
}

/// Judges an attempt.
pub fn judge(
    status: Option<ExitStatus>,
    forced: Option<&Forced>,
    (errors, words): (&[RankError], &str),
    placement: &Placement,
) -> Verdict {
    let said = Said::read(words, placement);
    let verdict =
        |why, message: String| Verdict { why, code: None, signal: None, rank: None, host: None, message };
    match forced {
        Some(Forced::Again(signal)) => {
            return Verdict {
                signal: Some(*signal),
                ..verdict(Why::Ended, "ended by a second signal".into())
            };
        }
        Some(Forced::Grace(seconds)) => {
            let message = format!(
                "the ranks did not save within {seconds:.0} s of the request to stop (--grace-seconds)"
            );
            return verdict(Why::Ended, message);
        }
        Some(Forced::Hung { seconds, stepped, option, stuck }) if errors.is_empty() => {
            let what = if *stepped { "no new step" } else { "no first step" };
            let who = stuck.as_ref().map_or_else(String::new, |stuck| {
                format!("; rank {} on {}: {}", stuck.rank, stuck.host, stuck.text)
            });
            return Verdict {
                rank: stuck.as_ref().map(|stuck| stuck.rank),
                host: stuck.as_ref().map(|stuck| stuck.host.clone()),
                ..verdict(Why::Hung, format!("{what} for {seconds:.0} s ({option}){who}"))
            };
        }
        _ => {}
    }
    let code = said.code.or_else(|| status.and_then(|status| status.code()));
    // A signal that ended a rank is nearer the cause than what the others say of it.
    if let (Some((rank, host, signal, name)), None) = (&said.signalled, said.abort) {
        return Verdict {
            signal: Some(*signal),
            rank: Some(*rank),
            host: Some(host.clone()),
            ..verdict(Why::Killed, format!("rank {rank} on {host} was ended by signal {signal} ({name})"))
        };
    }
    if let Some(error) = errors.first().filter(|_| code != Some(0)) {
        let rank = errors.iter().find(|error| Some(error.rank) == said.rank).unwrap_or(error);
        let code = code.filter(|code| (1..128).contains(code)).unwrap_or(i32::from(Kind::Runtime.code()));
        return Verdict {
            code: Some(code),
            rank: Some(rank.rank),
            host: placement.host_of(rank.rank),
            ..verdict(Why::of_code(code), rank.text.trim_end().to_owned())
        };
    }
    if let Some(problem) = said.start {
        return verdict(Why::Start, problem);
    }
    if let Some(host) = said.lost {
        return Verdict {
            host: Some(host.clone()),
            ..verdict(Why::Unreachable, format!("mpirun has lost its connection to {host}"))
        };
    }
    if let Some(code) = code.filter(|&code| code < 128) {
        let why = Why::of_code(code);
        let message = match (why, said.rank) {
            (Why::Done, _) => "done".to_owned(),
            (Why::Stopped, _) => "stopped on request, saved".to_owned(),
            (_, Some(rank)) => format!("rank {rank} ended with exit code {code} and no message"),
            (_, None) => match last_line(words) {
                Some(line) => format!("mpirun ended with exit code {code}: {line}"),
                None => format!("mpirun ended with exit code {code} and no message"),
            },
        };
        return Verdict {
            code: Some(code),
            rank: said.rank,
            host: said.rank.and_then(|r| placement.host_of(r)),
            ..verdict(why, message)
        };
    }
    let (own, of_rank) = (status.and_then(|status| status.signal()), code.map(|code| code - 128));
    let (why, message) = match (forced, own, of_rank) {
        (Some(Forced::Lingering), ..) => {
            (Why::Mpirun, "all ranks were gone, and mpirun waited on".to_owned())
        }
        (_, Some(signal), _) => (Why::Mpirun, format!("mpirun was ended by signal {signal}")),
        (_, None, Some(signal)) => (Why::Killed, format!("a rank was ended by signal {signal}")),
        (_, None, None) => (Why::Mpirun, "mpirun could not be waited for".to_owned()),
    };
    Verdict { signal: own.or(of_rank), ..verdict(why, message) }
}

/// What mpirun said.
#[derive(Debug, Default)]
struct Said {
    /// The rank that it began with.
    rank: Option<usize>,
    /// The exit code that a rank gave, or asked for by aborting the job.
    code: Option<i32>,
    /// Whether a rank aborted the job.
    abort: Option<usize>,
    /// Rank, host, signal, and the signal's name.
    signalled: Option<(usize, String, i32, String)>,
    /// Why it could not start the ranks.
    start: Option<String>,
    /// A host that it has lost.
    lost: Option<String>,
}

impl Said {
    fn read(words: &str, placement: &Placement) -> Self {
        // As one line: mpirun breaks its own.
        let text = words.split_whitespace().collect::<Vec<_>>().join(" ");
        let mut said = Self::default();
        if let Some(rest) = after(&text, "MPI_ABORT was invoked on rank ") {
            said.abort = number(rest);
            said.rank = said.abort;
            said.code = after(rest, "with errorcode ").and_then(number);
        } else if let Some(rest) = after(&text, "The first process to do so was: Process name: [[") {
            said.rank = after(rest, "],").and_then(number);
            said.code = after(rest, "Exit code: ").and_then(number);
        } else if let Some(rest) = after(&text, "mpirun noticed that process rank ") {
            let host = after(rest, " on node ").and_then(|rest| rest.split(' ').next()).map(str::to_owned);
            let signal = after(rest, "exited on signal ").and_then(number);
            let name = after(rest, "exited on signal ")
                .and_then(|rest| Some(rest.split_once('(')?.1.split_once(')')?.0.to_owned()));
            if let (Some(rank), Some(signal)) = (number(rest), signal) {
                let host = known(placement, host.as_deref())
                    .or_else(|| placement.host_of(rank))
                    .or(host)
                    .unwrap_or_default();
                said.signalled = Some((rank, host, signal, name.unwrap_or_default()));
            }
        }
        if let Some(rest) = after(&text, "lost communication with a remote daemon") {
            let host = after(rest, "Remote daemon:").and_then(|rest| after(rest, " on node "));
            said.lost = host.and_then(|rest| rest.split(' ').next()).map(str::to_owned);
        }
        said.start = start_problem(words, &text);
        said
    }
}

/// A host that mpirun names as we do; it may know another name for it. (Where `--map-by` orders ranks in a way of its own,
/// mpirun's word is better than our count.)
fn known(placement: &Placement, host: Option<&str>) -> Option<String> {
    placement.hosts().into_iter().map(|known| known.host).find(|known| Some(known.as_str()) == host)
}

/// Why mpirun could not start the ranks, if that is what it says.
fn start_problem(words: &str, text: &str) -> Option<String> {
    if text.contains("not enough slots available") {
        return Some(
            "mpirun has not enough slots for these ranks: give each host its number (--hosts NAME:RANKS), or start \
             fewer"
                .into(),
        );
    }
    if let Some(rest) = after(text, "unable to launch the specified application as it could not") {
        let word = |label| after(rest, label).and_then(|rest| rest.split(' ').next());
        let (program, host) =
            (word("Executable: ").unwrap_or("the program"), word("Node: ").unwrap_or("a host"));
        return Some(format!("{host} cannot run {program}: install it at the same path on every host"));
    }
    if text.contains("unable to reliably start one or more daemons")
        || text.contains("daemon has died unexpectedly")
        || text.contains("unexpectedly failed before communicating back to mpirun")
    {
        // What ssh, or the shell on the host, said before it.
        let said = words.lines().map(str::trim).find(|line| !line.is_empty() && !line.starts_with("--"));
        let said = said.filter(|line| !line.starts_with("ORTE") && !line.starts_with("A daemon"));
        return Some(format!(
            "mpirun could not start its daemon (orted) on every host: {}. OpenMPI has to be installed on all of them, \
             and they have to reach this one (--interface NAME)",
            said.unwrap_or("no further message").trim_end_matches('.')
        ));
    }
    if text.contains("unable to find the specified working directory") || text.contains("could not chdir to")
    {
        return Some("a host has no folder of this one's name: start from one that all hosts share".into());
    }
    None
}

fn after<'a>(text: &'a str, sign: &str) -> Option<&'a str> {
    text.split_once(sign).map(|(_, rest)| rest)
}

fn number<T: std::str::FromStr>(text: &str) -> Option<T> {
    let text = text.trim_start();
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    text[..end].parse().ok()
}

/// The last of mpirun's words that says something.
fn last_line(words: &str) -> Option<&str> {
    words.lines().rev().map(str::trim).find(|line| line.chars().any(char::is_alphanumeric))
}

#[cfg(test)]
#[path = "verdict_tests.rs"]
mod tests;
