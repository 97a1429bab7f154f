//! Processes of this host, as /proc tells of them.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, getpid, kill_process};

use super::command::{MARK, MARK_PARAMETER};

/// How long killed processes may take to go.
const GOING: Duration = Duration::from_secs(5);

/// Ends every process of a launch on this host, whoever started it: ranks, and mpirun with its daemons. Returns how
/// many there were.
///
/// Another network namespace counts as another host.
pub fn reap(job: &str) -> usize {
    let started = Instant::now();
    let mut seen = Vec::new();
    loop {
        let found = marked(job);
        if found.is_empty() || started.elapsed() > GOING {
            return seen.len();
        }
        for pid in found {
            // One that has gone by itself meanwhile is as good.
            let _ = kill_process(pid, Signal::KILL);
            if !seen.contains(&pid) {
                seen.push(pid);
            }
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Processes that carry a launch's mark in their environment or arguments. One that has ended and waits for its
/// parent carries none.
fn marked(job: &str) -> Vec<Pid> {
    let variable = format!("{MARK}={job}");
    let network = |process: &str| fs::read_link(format!("/proc/{process}/ns/net")).ok();
    let here = network("self");
    let belongs = |pid: &Pid| {
        let place = pid.as_raw_nonzero().to_string();
        let has = |file: &str, test: &dyn Fn(&[&[u8]]) -> bool| {
            fs::read(format!("/proc/{place}/{file}"))
                .is_ok_and(|bytes| test(&bytes.split(|&b| b == 0).collect::<Vec<_>>()))
        };
        let by_variable = |words: &[&[u8]]| words.contains(&variable.as_bytes());
        let by_argument =
            |words: &[&[u8]]| words.windows(2).any(|w| w == [MARK_PARAMETER.as_bytes(), job.as_bytes()]);
        (has("environ", &by_variable) || has("cmdline", &by_argument)) && network(&place) == here
    };
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbers = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers.filter_map(Pid::from_raw).filter(|&pid| pid != getpid()).filter(belongs).collect()
}

/// A rank on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LocalRank {
    /// Its process.
    pub pid: Pid,
    /// Its number.
    pub rank: usize,
    /// Whether a signal has stopped it (or a debugger).
    pub stopped: bool,
}

/// The ranks that an mpirun has started on this host and that have not ended.
pub fn ranks(mpirun: Pid) -> Vec<LocalRank> {
    let tasks = PathBuf::from(format!("/proc/{}/task", mpirun.as_raw_nonzero()));
    let mut found = Vec::new();
    for task in fs::read_dir(tasks).into_iter().flatten().flatten() {
        let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        found.extend(children.split_whitespace().filter_map(|word| word.parse().ok()).filter_map(rank));
    }
    found.sort_unstable_by_key(|rank| rank.rank);
    found
}

fn rank(pid: i32) -> Option<LocalRank> {
    let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
    let value =
        environment.split(|&b| b == 0).find_map(|word| word.strip_prefix(b"OMPI_COMM_WORLD_RANK="))?;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold anything.
    let state = stat.rsplit(')').next()?.trim_start().chars().next()?;
    let rank = std::str::from_utf8(value).ok()?.parse().ok()?;
    (!"ZX".contains(state)).then_some(LocalRank {
        pid: Pid::from_raw(pid)?,
        rank,
        stopped: "Tt".contains(state),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn a_launch_finds_its_own_and_ends_them() {
        let job = format!("test-{}", std::process::id());
        let start = |by_variable: bool| {
            let mut command = Command::new("sh");
            command.stdout(Stdio::null()).stderr(Stdio::null());
            match by_variable {
                true => command.args(["-c", "sleep 60; :"]).env(MARK, &job),
                // The shell stays, with the words after it as its arguments, and no child that would outlive it.
                false => command.args(["-c", "kill -STOP $$", MARK_PARAMETER, &job]),
            };
            command.spawn().expect("started")
        };
        let mut children = [start(true), start(false)];
        let mut other = Command::new("sleep").arg("60").env(MARK, "another").spawn().expect("started");
        let waiting = Instant::now();
        while marked(&job).len() < 3 && waiting.elapsed() < GOING {
            std::thread::sleep(Duration::from_millis(5));
        }
        // Two shells and the sleep of the first.
        assert_eq!(reap(&job), 3);
        for child in &mut children {
            assert!(!child.wait().expect("ended").success());
        }
        assert!(other.try_wait().expect("asked").is_none());
        other.kill().expect("killed");
        other.wait().expect("ended");
    }
}
