//! From attempt to attempt, until the run is complete, stopped, or cannot go on.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use repa_trainer::exit::Kind;
use repa_trainer::telemetry::progress::duration;
use rustix::fs::{FlockOperation, flock};

use super::attempt::{self, Ended, Start};
use super::budget::Budget;
use super::check;
use super::error::LaunchError;
use super::hosts::{Placement, plural, this_host};
use super::output::Terminal;
use super::processes::reap;
use super::record::{Attempts, Record};
use super::signals::{Asked, Requests};
use super::verdict::{Verdict, Why};
use super::watch::{Watch, newest, unix_time};
use super::{Job, Settings, to_go_on};
use crate::exit::{Failure, Outcome};

/// How often requests are looked for between attempts.
const TICK: Duration = Duration::from_millis(25);

/// Trains a run to its end.
///
/// # Errors
/// What ended it, with the ranks' exit code where that is final.
pub fn supervise(settings: &Settings, job: &Job) -> Result<Outcome, Failure> {
    let mut requests = Requests::listen(settings.limit).map_err(LaunchError::Signals)?;
    let terminal = Terminal::new();
    // Before hosts are asked, for that ends what other launches of this run have left.
    let is_new = !job.run.exists();
    let attempts =
        Attempts::open(&job.run).map_err(|source| LaunchError::Folder { path: job.run.clone(), source })?;
    let _lock = claim(&job.run)?;
    let first = assemble(settings, &terminal, true).map_err(|missing| {
        if is_new {
            forget(&job.run);
        }
        missing.into_error()
    })?;
    let durable = newest(&job.checkpoints);
    let mut supervisor = Supervisor {
        settings,
        job,
        terminal,
        attempts,
        budget: Budget::new(settings.max_restarts, durable),
        made: 0,
        restarts: 0,
        lost: Duration::ZERO,
        lost_since: None,
    };
    let mut placement = Ok(first);
    loop {
        let (verdict, watch) = match placement {
            Ok(placement) => supervisor.attempt(&placement, &mut requests)?,
            Err(missing) => supervisor.no_attempt(missing),
        };
        if let Some(end) = supervisor.end(&verdict, &watch, &mut requests) {
            return end;
        }
        if let Some(end) = supervisor.pause(&verdict, &watch, &mut requests) {
            return end;
        }
        placement = assemble(settings, &supervisor.terminal, false);
    }
}

/// Hosts that an attempt cannot do without.
struct NoHosts {
    problems: Vec<String>,
    first: String,
    wrong: bool,
}

impl NoHosts {
    fn into_error(self) -> LaunchError {
        LaunchError::Hosts { problems: self.problems.join("; "), wrong: self.wrong }
    }
}

/// Where the next attempt can run.
fn assemble(settings: &Settings, terminal: &Terminal, first: bool) -> Result<Placement, NoHosts> {
    let job = &settings.line.job;
    let Placement::Hosts(hosts) = &settings.placement else {
        reap(job);
        return Ok(settings.placement.clone());
    };
    let missing = check::hosts(hosts, &settings.agent, &settings.line.program, job);
    if missing.is_empty() {
        return Ok(settings.placement.clone());
    }
    let problems: Vec<String> = missing.iter().map(|missing| missing.problem.clone()).collect();
    let left: Vec<_> =
        hosts.iter().filter(|host| missing.iter().all(|missing| missing.host != **host)).cloned().collect();
    let wrong = missing.iter().any(|missing| missing.wrong);
    // At the start, a wrong name is a slip, and no host that was lost.
    if !settings.elastic || left.is_empty() || (first && wrong) {
        return Err(NoHosts { problems, first: missing[0].host.host.clone(), wrong });
    }
    terminal.line(&format!(
        "launch: going on with {} of {} hosts: {}",
        left.len(),
        hosts.len(),
        problems.join("; ")
    ));
    Ok(Placement::Hosts(left))
}

/// Takes the run folder for this launch; the ranks have a lock of their own.
fn claim(run: &Path) -> Result<File, LaunchError> {
    let folder = |source| LaunchError::Folder { path: run.to_owned(), source };
    let mut lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(run.join("launch.lock"))
        .map_err(folder)?;
    if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        let mut holder = String::new();
        // The holder's name is a courtesy; the lock itself has spoken.
        let _ = lock.read_to_string(&mut holder);
        return Err(LaunchError::InUse { path: run.to_owned(), holder: holder.trim().to_owned() });
    }
    let name = format!("process {} on {}\n", std::process::id(), this_host());
    lock.set_len(0)
        .and_then(|()| lock.rewind())
        .and_then(|()| lock.write_all(name.as_bytes()))
        .map_err(folder)?;
    Ok(lock)
}

/// Removes the folder of a run that has not begun: a slip in a host's name leaves nothing behind.
fn forget(run: &Path) {
    // What cannot be removed is in nobody's way.
    let _ = std::fs::remove_file(run.join("launch.lock"));
    for folder in [run.join("attempts"), run.to_owned()] {
        let _ = std::fs::remove_dir(folder);
    }
}

struct Supervisor<'a> {
    settings: &'a Settings,
    job: &'a Job,
    terminal: Terminal,
    attempts: Attempts,
    budget: Budget,
    made: usize,
    restarts: usize,
    /// Time whose steps were made again, or in which none were.
    lost: Duration,
    lost_since: Option<Instant>,
}

impl Supervisor<'_> {
    /// Makes an attempt, and leaves its record.
    fn attempt(
        &mut self,
        placement: &Placement,
        requests: &mut Requests,
    ) -> Result<(Verdict, Watch), LaunchError> {
        let folder = |source| LaunchError::Folder { path: self.job.run.clone(), source };
        let number = self.attempts.next();
        let logs = self.attempts.logs(number).map_err(folder)?;
        self.made += 1;
        let again = self.made > 1;
        let train = if again { to_go_on(&self.job.train) } else { self.job.train.clone() };
        let line = self.settings.words(placement, &train, &self.terminal);
        let mut record = self.record(number, placement, line.clone());
        self.attempts.write(&record).map_err(folder)?;
        self.terminal.line(&format!(
            "launch: attempt {number}: {}, logs in {}",
            placement.describe(),
            logs.display()
        ));
        let mut watch = Watch::begin(&self.job.run, &self.job.checkpoints);
        let began = Instant::now();
        let start = Start {
            line: &line,
            placement,
            job: &self.settings.line.job,
            logs: &logs,
            shows_others: self.settings.shows_others,
            terminal: &self.terminal,
            steps: self.job.steps,
            nccl_interface: self.settings.line.nccl_interface(),
            run: &self.job.run,
            restarts: self.restarts,
            deadlines: self.settings.deadlines,
        };
        let ended = attempt::run(&start, &mut watch, requests)
            .map_err(|source| LaunchError::Mpirun { program: self.settings.line.mpirun.clone(), source });
        let ended = match ended {
            Ok(ended) => ended,
            Err(error) => {
                self.close(&mut record, &failed(Why::Mpirun, error.to_string()), &watch);
                return Err(error);
            }
        };
        if let (true, Placement::Hosts(hosts)) = (ended.unclean, placement) {
            // What cannot be reached now is asked again before the next attempt.
            check::hosts(hosts, &self.settings.agent, &self.settings.line.program, &self.settings.line.job);
        }
        self.account(&ended, &watch, began);
        self.close(&mut record, &ended.verdict, &watch);
        Ok((ended.verdict, watch))
    }

    /// An attempt that could not be made for want of hosts.
    fn no_attempt(&mut self, missing: NoHosts) -> (Verdict, Watch) {
        let watch = Watch::begin(&self.job.run, &self.job.checkpoints);
        let host = Some(missing.first.clone());
        let verdict = Verdict { host, ..failed(Why::Unreachable, missing.problems.join("; ")) };
        let mut record = self.record(self.attempts.next(), &self.settings.placement, Vec::new());
        self.made += 1;
        self.close(&mut record, &verdict, &watch);
        (verdict, watch)
    }

    fn record(&self, attempt: usize, placement: &Placement, command: Vec<String>) -> Record {
        Record {
            attempt,
            started: unix_time(),
            ended: None,
            world_size: placement.ranks(),
            hosts: placement.hosts(),
            command,
            why: None,
            exit_code: None,
            signal: None,
            rank: None,
            host: None,
            first_step: None,
            last_step: None,
            durable_step: None,
            message: None,
        }
    }

    fn close(&self, record: &mut Record, verdict: &Verdict, watch: &Watch) {
        record.ended = Some(unix_time());
        record.why = Some(verdict.why);
        record.exit_code = verdict.code;
        record.signal = verdict.signal;
        record.rank = verdict.rank;
        record.host = verdict.host.clone();
        record.first_step = watch.steps().map(|(first, _)| first);
        record.last_step = watch.steps().map(|(_, last)| last);
        record.durable_step = watch.durable();
        record.message = Some(verdict.message.clone());
        if let Err(error) = self.attempts.write(record) {
            self.terminal
                .line(&format!("launch: cannot write the record of attempt {}: {error}", record.attempt));
        }
    }

    /// Counts the time that failures have cost.
    fn account(&mut self, ended: &Ended, watch: &Watch, began: Instant) {
        let good = matches!(ended.verdict.why, Why::Done | Why::Stopped);
        let back = ended.first_step.or(good.then(Instant::now));
        if let (Some(since), Some(back)) = (self.lost_since, back) {
            self.lost += back.saturating_duration_since(since);
            self.lost_since = None;
        }
        if !good {
            self.lost_since = self.lost_since.or(watch.last_durable()).or(ended.first_step).or(Some(began));
        }
    }

    /// What is final after an attempt.
    fn end(
        &self,
        verdict: &Verdict,
        watch: &Watch,
        requests: &mut Requests,
    ) -> Option<Result<Outcome, Failure>> {
        let message = || verdict.message.clone();
        let runtime = Kind::Runtime.code();
        let good = || match watch.durable() {
            Some(step) => format!("the newest durable checkpoint is that of step {step}"),
            None => "there is no checkpoint yet".to_owned(),
        };
        match verdict.why {
            Why::Done => {
                self.terminal.line(&format!(
                    "launch: done in {}, {}, {} lost",
                    plural(self.made, "attempt"),
                    plural(self.restarts, "restart"),
                    duration(self.lost.as_secs_f64())
                ));
                return Some(Ok(Outcome::Done));
            }
            Why::Stopped => return Some(Ok(Outcome::Stopped)),
            Why::Config | Why::Data => {
                let code = verdict.code.and_then(|code| u8::try_from(code).ok());
                return Some(Err(Failure::with_code(code.unwrap_or(runtime), message())));
            }
            Why::Ended => {
                let code = verdict.signal.and_then(|signal| u8::try_from(128 + signal).ok());
                let text = format!("{}; {}", verdict.message, good());
                return Some(Err(Failure::with_code(code.unwrap_or(runtime), text)));
            }
            // Nothing has run yet, so it is how hosts are set up, and no accident.
            Why::Start if self.made == 1 => return Some(Err(Failure::with_code(runtime, message()))),
            Why::Failed | Why::Killed | Why::Hung | Why::Start | Why::Mpirun | Why::Unreachable => {}
        }
        match requests.look() {
            Asked::Nothing => None,
            Asked::End(signal) => {
                let code = u8::try_from(128 + signal).unwrap_or(runtime);
                Some(Err(Failure::with_code(code, format!("ended by a second signal; {}", good()))))
            }
            Asked::Stop if watch.has_unsaved_steps() => {
                let cause = requests.cause();
                let text =
                    format!("{cause}: the ranks ended before they had saved: {}; {}", message(), good());
                Some(Err(Failure::with_code(runtime, text)))
            }
            Asked::Stop => Some(Ok(self.stopped_between(requests))),
        }
    }

    /// A stop that came while nothing was trained that could be lost.
    fn stopped_between(&self, requests: &Requests) -> Outcome {
        let cause = requests.cause();
        self.terminal.line(&format!("launch: {cause}: stopped between attempts; the same command goes on"));
        Outcome::Stopped
    }

    /// Takes a restart, and waits before it.
    fn pause(
        &mut self,
        verdict: &Verdict,
        watch: &Watch,
        requests: &mut Requests,
    ) -> Option<Result<Outcome, Failure>> {
        let Some(pause) = self.budget.take(watch.durable()) else {
            let text = match self.budget.state() {
                (_, 0) => format!("{} (--max-restarts 0)", verdict.message),
                (used, _) => format!(
                    "gave up after {} without a newer checkpoint (--max-restarts): {}",
                    plural(used, "restart"),
                    verdict.message
                ),
            };
            return Some(Err(Failure::with_code(Kind::Runtime.code(), text)));
        };
        self.restarts += 1;
        let (used, allowed) = self.budget.state();
        let at = watch.steps().map_or_else(String::new, |(_, last)| format!(" after step {last}"));
        let from =
            watch.durable().map_or("from the beginning".to_owned(), |step| format!("from step {step}"));
        self.terminal.line(&format!(
            "launch: ended{at}: {}; starting again {from} in {} s (restart {used} of {allowed})",
            verdict.message,
            pause.as_secs()
        ));
        let until = Instant::now() + pause;
        let patient = until + self.job.patience + Duration::from_secs(10);
        loop {
            let now = Instant::now();
            requests.time_for(self.settings.deadlines.usual_stop);
            match requests.look() {
                Asked::Nothing => {}
                Asked::Stop => return Some(Ok(self.stopped_between(requests))),
                Asked::End(signal) => {
                    let code = u8::try_from(128 + signal).unwrap_or(Kind::Runtime.code());
                    return Some(Err(Failure::with_code(code, "ended by a second signal")));
                }
            }
            // A rank 0 on a host that cannot be reached holds the folder until it has given up.
            if now >= until && (is_free(&self.job.run) || now >= patient) {
                return None;
            }
            std::thread::sleep(TICK);
        }
    }
}

fn failed(why: Why, message: String) -> Verdict {
    Verdict { why, code: None, signal: None, rank: None, host: None, message }
}

/// Whether no rank 0 has the run folder.
fn is_free(run: &Path) -> bool {
    // The lock goes with the file. Where there is none, there was no rank.
    File::open(run.join("lock")).is_ok_and(|file| flock(&file, FlockOperation::NonBlockingLockShared).is_ok())
        || !run.join("lock").exists()
}
