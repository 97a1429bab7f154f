//! Rank 0's look at all ranks while they train: a file that says what each does, a word about ranks that are slower than
//! the others, and the end of a run in which nothing moves.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use metrics::gauge;
use repa_comm::Board;
use repa_comm::board::{Phase, Process, RankStatus, describe_late};

use super::status::{Status, between_steps};
use crate::exit::Kind;
use crate::telemetry::events::{EventKind, Events};
use crate::telemetry::names;

/// Time between looks.
const PERIOD: Duration = Duration::from_secs(1);

/// How long other hosts may take to answer.
const READING: Duration = Duration::from_millis(500);

/// A rank whose own work takes so many times the median's...
const SLOW: f64 = 1.3;

/// ... and so much longer...
const SLOWER_BY: Duration = Duration::from_millis(10);

/// ... at so many looks in a row is told.
const PERSISTENT: u32 = 10;

/// What to watch for.
#[derive(Debug, Clone)]
pub(super) struct Setting {
    /// The run folder.
    pub(super) run: PathBuf,
    /// The folder of its checkpoints, where they are in one.
    pub(super) checkpoints: Option<PathBuf>,
    /// Steps of the whole run.
    pub(super) steps: u64,
    /// Longest time without a new step; None for any.
    pub(super) limit: Option<Duration>,
    /// Where stragglers are told.
    pub(super) events: Events,
}

/// The watching thread. It ends with the value.
#[derive(Debug)]
pub(super) struct Watch {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
    durable: Arc<AtomicU64>,
}

/// No checkpoint is durable yet.
const NONE: u64 = u64::MAX;

impl Watch {
    pub(super) fn start(board: Arc<Board>, setting: Setting) -> std::io::Result<Self> {
        let (stop, stopped) = channel::<()>();
        let durable = Arc::new(AtomicU64::new(NONE));
        let shared = durable.clone();
        let thread = std::thread::Builder::new().name("watch".into()).spawn(move || {
            let mut stragglers = Stragglers::default();
            let mut patience = Patience::new(setting.limit);
            loop {
                let snapshot = board.snapshot(READING);
                disks(&setting);
                let known = shared.load(Ordering::Relaxed);
                let durable = (known != NONE).then_some(known);
                Status::new(&snapshot, "training", setting.steps, durable).write(&setting.run);
                for slow in stragglers.look(&snapshot) {
                    tracing::warn!("{slow}");
                    let step = snapshot.iter().filter_map(|s| s.progress()?.step).max().unwrap_or(0);
                    setting.events.tell(EventKind::Straggler, step, &slow);
                }
                if let Some(waited) = patience.look(&snapshot, Instant::now()) {
                    end(&snapshot, waited);
                }
                match stopped.recv_timeout(PERIOD) {
                    Err(RecvTimeoutError::Timeout) => {}
                    Ok(()) | Err(RecvTimeoutError::Disconnected) => break,
                }
            }
            let known = shared.load(Ordering::Relaxed);
            let durable = (known != NONE).then_some(known);
            Status::new(&board.snapshot(READING), "ended", setting.steps, durable).write(&setting.run);
        })?;
        Ok(Self { stop: Some(stop), thread: Some(thread), durable })
    }

    /// The checkpoint of this step is durable.
    pub(super) fn durable(&self, step: u64) {
        self.durable.store(step, Ordering::Relaxed);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // A panic there has been reported by its hook.
            let _ = thread.join();
        }
    }
}

/// Publishes how much room there is. A folder that does not exist yet is on its parent's disk.
fn disks(setting: &Setting) {
    for (name, folder) in [("run", Some(&setting.run)), ("checkpoints", setting.checkpoints.as_ref())] {
        let there = folder.and_then(|f| f.ancestors().find_map(|f| rustix::fs::statvfs(f).ok()));
        if let Some(there) = there {
            gauge!(names::DISK_FREE_BYTES, "folder" => name).set((there.f_bavail * there.f_frsize) as f64);
        }
    }
}

/// Ends the job, with what every late rank does.
fn end(snapshot: &[RankStatus], waited: Duration) -> ! {
    let late: Vec<usize> = late(snapshot).collect();
    let said = describe_late(snapshot, u64::MAX, &late);
    let message = format!(
        "no step has been made for {:.0} s (train.step_timeout_seconds): {said}",
        waited.as_secs_f64()
    );
    repa_comm::abort(i32::from(Kind::Runtime.code()), &message)
}

/// The ranks that the others wait for: those that do not wait for others themselves, or all.
fn late(snapshot: &[RankStatus]) -> impl Iterator<Item = usize> + '_ {
    let waits = |status: &&RankStatus| {
        let progress = status.progress();
        progress.is_some_and(|p| p.process == Process::Running && p.phase == Phase::Communicating)
    };
    let all_wait = snapshot.iter().all(|status| waits(&status));
    snapshot.iter().filter(move |status| all_wait || !waits(status)).map(|status| status.rank)
}

/// How long the slowest rank has been in one step.
#[derive(Debug)]
struct Patience {
    limit: Option<Duration>,
    step: Option<u64>,
    since: Instant,
}

impl Patience {
    fn new(limit: Option<Duration>) -> Self {
        Self { limit, step: None, since: Instant::now() }
    }

    /// The time without a step, if that is too long. Saves, sample images and what comes before the first step do not
    /// count: they take as long as a disk, or a large model, takes.
    fn look(&mut self, snapshot: &[RankStatus], now: Instant) -> Option<Duration> {
        let step = snapshot.iter().filter_map(|status| Some(status.progress()?.step)).min().flatten();
        if step != self.step || step.is_none() || between_steps(snapshot) {
            (self.step, self.since) = (step, now);
        }
        let waited = now.saturating_duration_since(self.since);
        (waited > self.limit?).then_some(waited)
    }
}

/// Ranks whose own work takes longer than the others'.
#[derive(Debug, Default)]
struct Stragglers {
    /// By rank: looks in a row at which it was slow, and whether that was told.
    slow: Vec<(u32, bool)>,
}

impl Stragglers {
    /// Publishes each rank's own work, and gives a sentence about each rank that has become persistently slow.
    fn look(&mut self, snapshot: &[RankStatus]) -> Vec<String> {
        self.slow.resize(snapshot.len(), (0, false));
        let times: Vec<Option<Duration>> =
            snapshot.iter().map(|status| status.progress().and_then(|p| p.step_time)).collect();
        let mut sorted: Vec<Duration> = times.iter().flatten().copied().collect();
        sorted.sort_unstable();
        // The lower one of two: of two ranks, one can be slow.
        let Some(&median) = sorted.get(sorted.len().saturating_sub(1) / 2) else { return Vec::new() };
        let mut said = Vec::new();
        let mut count = 0;
        for ((status, time), (looks, told)) in snapshot.iter().zip(times).zip(&mut self.slow) {
            let Some(time) = time else { continue };
            let labels = [("peer", status.rank.to_string()), ("host", status.host.clone())];
            gauge!(names::RANK_WORK_SECONDS, &labels).set(time.as_secs_f64());
            if time.as_secs_f64() > SLOW * median.as_secs_f64() && time > median + SLOWER_BY {
                *looks += 1;
            } else {
                (*looks, *told) = (0, false);
            }
            if *looks >= PERSISTENT {
                count += 1;
                if !std::mem::replace(told, true) {
                    said.push(format!(
                        "rank {} on {} is a straggler: a step takes {:.3} s of its own work, {:.1} times the median \
                         of {:.3} s",
                        status.rank,
                        status.host,
                        time.as_secs_f64(),
                        time.as_secs_f64() / median.as_secs_f64(),
                        median.as_secs_f64()
                    ));
                }
            }
        }
        gauge!(names::STRAGGLERS).set(f64::from(count));
        said
    }
}

#[cfg(test)]
mod tests {
    use repa_comm::board::{Progress, RankState};

    use super::*;

    fn status(rank: usize, step: Option<u64>, phase: Phase, milliseconds: u64) -> RankStatus {
        let state = RankState::Known(Progress {
            pid: 1,
            process: Process::Running,
            step,
            phase,
            in_phase: Duration::from_secs(3),
            entered: 4,
            left: 4,
            call: None,
            unchanged: Duration::ZERO,
            step_time: Some(Duration::from_millis(milliseconds)),
        });
        RankStatus { rank, host: format!("h{rank}"), state }
    }

    #[test]
    fn what_is_between_steps_is_said_to_who_waits_for_them() {
        let of = |phases: [Phase; 2]| {
            let snapshot: Vec<_> =
                phases.into_iter().enumerate().map(|(rank, phase)| status(rank, Some(5), phase, 1)).collect();
            Status::new(&snapshot, "training", 10, None).between_steps
        };
        assert!(of([Phase::Sampling; 2]) && of([Phase::Saving, Phase::Ended]));
        assert!(!of([Phase::Computing, Phase::Saving]) && !of([Phase::Communicating; 2]));
    }

    #[test]
    fn a_rank_that_is_slow_for_long_is_told_once() {
        let even: Vec<_> = (0..4).map(|rank| status(rank, Some(5), Phase::Computing, 100)).collect();
        let mut uneven = even.clone();
        uneven[2] = status(2, Some(5), Phase::Computing, 160);
        let mut stragglers = Stragglers::default();
        for _ in 0..PERSISTENT - 1 {
            assert!(stragglers.look(&uneven).is_empty());
        }
        assert!(stragglers.look(&even).is_empty());
        let said: Vec<String> = (0..3 * PERSISTENT).flat_map(|_| stragglers.look(&uneven)).collect();
        assert_eq!(said.len(), 1);
        assert!(said[0].starts_with("rank 2 on h2 is a straggler: a step takes 0.160 s"), "{}", said[0]);
        // Of two ranks, the slower one; and of fast steps, none.
        let two = [status(0, Some(5), Phase::Computing, 40), status(1, Some(5), Phase::Computing, 90)];
        let mut stragglers = Stragglers::default();
        assert_eq!((0..20).flat_map(|_| stragglers.look(&two)).count(), 1);
        let fast = [status(0, Some(5), Phase::Computing, 2), status(1, Some(5), Phase::Computing, 9)];
        let mut stragglers = Stragglers::default();
        assert_eq!((0..20).flat_map(|_| stragglers.look(&fast)).count(), 0);
    }

    #[test]
    fn only_steps_count_as_moving_and_saves_are_excused() {
        let limit = Duration::from_secs(10);
        let start = Instant::now();
        let mut patience = Patience::new(Some(limit));
        let mut look = |phase, step, seconds| {
            let snapshot = [status(0, step, Phase::Communicating, 1), status(1, step, phase, 1)];
            patience.look(&snapshot, start + Duration::from_secs(seconds))
        };
        assert_eq!(look(Phase::Starting, None, 100), None);
        assert_eq!(look(Phase::Computing, Some(1), 101), None);
        assert_eq!(look(Phase::WaitingForData, Some(1), 110), None);
        assert_eq!(look(Phase::Computing, Some(2), 115), None);
        assert_eq!(look(Phase::Computing, Some(2), 126), Some(Duration::from_secs(11)));
        let mut patience = Patience::new(Some(limit));
        for phase in [Phase::Saving, Phase::Sampling] {
            let excused = [status(0, Some(7), phase, 1), status(1, Some(7), phase, 1)];
            for seconds in [0, 60, 600] {
                assert_eq!(patience.look(&excused, start + Duration::from_secs(seconds)), None);
            }
        }
        let mut none = Patience::new(None);
        none.look(&[status(0, Some(1), Phase::Computing, 1)], start);
        assert_eq!(none.look(&[status(0, Some(1), Phase::Computing, 1)], start + 1000 * limit), None);
    }

    #[test]
    fn those_that_wait_for_others_are_not_late() {
        let snapshot = [
            status(0, Some(3), Phase::Communicating, 1),
            status(1, Some(3), Phase::WaitingForData, 1),
            status(2, Some(3), Phase::Communicating, 1),
        ];
        assert_eq!(late(&snapshot).collect::<Vec<_>>(), [1]);
        assert_eq!(late(&snapshot[..1]).collect::<Vec<_>>(), [0]);
    }
}
