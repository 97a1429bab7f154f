//! How far a run has come, from what it leaves in its folder.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use repa_trainer::checkpoint::Checkpoints;
use repa_trainer::telemetry::record::log_path;
use repa_trainer::train::{RankLine, Status};

use super::processes::LocalRank;

/// How often checkpoints are listed.
const LISTING: Duration = Duration::from_millis(500);

/// A rank that keeps the others waiting.
#[derive(Debug, Clone, PartialEq)]
pub struct Stuck {
    /// Which.
    pub rank: usize,
    /// Where.
    pub host: String,
    /// What it does.
    pub text: String,
}

/// One attempt's progress.
#[derive(Debug)]
pub struct Watch {
    log: PathBuf,
    run: PathBuf,
    checkpoints: Checkpoints,
    began: f64,
    /// The log of the attempt before: each attempt begins a new file.
    log_before: Option<(u64, u64)>,
    /// This attempt's log has been seen.
    is_new: bool,
    /// Its size when it was read last.
    log_size: u64,
    durable_before: Option<u64>,
    base: Option<u64>,
    step: Option<u64>,
    durable: Option<u64>,
    status: Option<Status>,
    /// Whether rank 0 has said from what it goes on.
    told: bool,
    progressed: Instant,
    /// When steps were seen first, to know how long saves take.
    reached: BTreeMap<u64, Instant>,
    last_durable: Option<Instant>,
    listed: Instant,
    step_seconds: Option<f64>,
    save_seconds: Option<f64>,
}

impl Watch {
    /// Begins before the ranks are started.
    pub fn begin(run: &Path, checkpoints: &Checkpoints) -> Self {
        let durable = newest(checkpoints);
        let log = log_path(run);
        Self {
            log_before: identity(&log).map(|(id, _)| id),
            is_new: false,
            log,
            run: run.to_owned(),
            checkpoints: checkpoints.clone(),
            began: unix_time(),
            log_size: 0,
            durable_before: durable,
            base: None,
            step: None,
            durable,
            status: None,
            told: false,
            progressed: Instant::now(),
            reached: BTreeMap::new(),
            last_durable: None,
            listed: Instant::now(),
            step_seconds: None,
            save_seconds: None,
        }
    }

    /// Looks again.
    pub fn look(&mut self) {
        self.read_log();
        self.read_status();
        let mut durable = self.status.as_ref().and_then(|status| status.durable);
        // A place that is no folder takes its time to answer: there, rank 0's word has to do.
        let is_folder = !self.checkpoints.location().to_string_lossy().contains(":/");
        if is_folder && self.listed.elapsed() > LISTING {
            self.listed = Instant::now();
            durable = durable.max(newest(&self.checkpoints));
        }
        self.saw_durable(durable);
    }

    /// Looks a last time, when the attempt has ended.
    pub fn look_last(&mut self) {
        self.look();
        self.saw_durable(newest(&self.checkpoints));
    }

    fn saw_durable(&mut self, durable: Option<u64>) {
        if durable > self.durable {
            self.durable = durable;
            self.progressed = Instant::now();
            self.last_durable = Some(self.progressed);
            let saved = durable.and_then(|step| self.reached.range(step..).next());
            if let Some(seconds) = saved.map(|(_, at)| at.elapsed().as_secs_f64()) {
                self.save_seconds = Some(self.save_seconds.map_or(seconds, |longest| longest.max(seconds)));
            }
            self.reached.clear();
        }
    }

    fn read_log(&mut self) {
        let Some((id, size)) = identity(&self.log) else { return };
        self.is_new |= Some(id) != self.log_before;
        if !self.is_new || size == self.log_size {
            return;
        }
        self.log_size = size;
        let Some(last) = last_line(&self.log, size) else { return };
        let Some(step) = last["step"].as_u64() else { return };
        self.step_seconds = last["step_seconds"].as_f64().or(self.step_seconds);
        let before = self.durable_before;
        // The log holds what the run goes on from, and after that this attempt's own steps.
        let base = *self.base.get_or_insert_with(|| match before {
            Some(durable) => durable.min(step),
            None => first_step(&self.log).map_or(0, |first| first.saturating_sub(1)),
        });
        if step > base {
            self.advance(step);
        }
    }

    fn read_status(&mut self) {
        let Some(status) = Status::read(&self.run) else { return };
        // One of the attempt before says nothing; clocks may differ a little between hosts.
        if status.time < self.began - 1.0 {
            return;
        }
        if self.between_steps() && !status.between_steps {
            // What was no step's time: the next one's begins.
            self.progressed = Instant::now();
        }
        // Lower than what was there where the run was sent back (`--resume STEP`): later ones are set aside by then.
        if !self.told && status.durable.is_some() {
            self.told = true;
            self.durable = status.durable.min(self.durable);
        }
        self.status = Some(status);
    }

    fn advance(&mut self, step: u64) {
        if self.step.is_none_or(|before| step > before) {
            self.step = Some(step);
            self.progressed = Instant::now();
            self.reached.insert(step, self.progressed);
            // Enough to time a save by.
            if self.reached.len() > 10_000 {
                self.reached.pop_first();
            }
        }
    }

    /// Whether this attempt's log has been seen: it is not where the folder is on rank 0's own disk.
    pub fn sees_log(&self) -> bool {
        self.is_new
    }

    /// This attempt's first step and its last one so far.
    pub fn steps(&self) -> Option<(u64, u64)> {
        Some((self.base? + 1, self.step?))
    }

    /// When a step or a checkpoint was seen last; the beginning before the first.
    pub fn progressed(&self) -> Instant {
        self.progressed
    }

    /// The newest durable checkpoint.
    pub fn durable(&self) -> Option<u64> {
        self.durable
    }

    /// When this attempt's last checkpoint was seen.
    pub fn last_durable(&self) -> Option<Instant> {
        self.last_durable
    }

    /// Whether something has been trained that no checkpoint holds.
    pub fn has_unsaved_steps(&self) -> bool {
        self.step > self.durable
    }

    /// How long stopping with a checkpoint will take, as far as can be told from those before.
    pub fn stopping_time(&self, otherwise: Duration) -> Duration {
        let step = self.step_seconds.unwrap_or(0.0);
        let save = self.save_seconds.unwrap_or(otherwise.as_secs_f64());
        Duration::from_secs_f64((5.0 + 3.0 * step + 2.0 * save).clamp(0.0, 1e9)).max(otherwise)
    }

    /// Whether no step is due now: the ranks save, draw sample images or begin.
    pub fn between_steps(&self) -> bool {
        self.status.as_ref().is_some_and(|status| status.between_steps)
    }

    /// Who keeps the others waiting, as far as can be told.
    pub fn stuck(&self, here: &[LocalRank], host: &str) -> Option<Stuck> {
        if let Some(stopped) = here.iter().find(|rank| rank.stopped) {
            let text = format!("stopped by a signal (process {})", stopped.pid.as_raw_nonzero());
            return Some(Stuck { rank: stopped.rank, host: host.to_owned(), text });
        }
        let ranks = &self.status.as_ref()?.ranks;
        let tell = |rank: &RankLine, text: String| Stuck { rank: rank.rank, host: rank.host.clone(), text };
        let gone = ["stopped", "ended", "no answer"];
        if let Some(rank) = ranks.iter().find(|rank| gone.contains(&rank.state.as_str())) {
            return Some(tell(rank, rank.state.clone()));
        }
        // Those that wait in a collective wait for one that does something else, or is behind.
        let rank = ranks
            .iter()
            .min_by_key(|rank| (rank.step, rank.phase.as_deref() == Some("communicating"), rank.rank))?;
        let phase = rank.phase.as_deref().unwrap_or("busy");
        let step = rank.step.map_or_else(String::new, |step| format!(" in step {step}"));
        let time = rank.in_phase_seconds.map_or_else(String::new, |s| format!(" for {s:.0} s"));
        Some(tell(rank, format!("{phase}{time}{step}")))
    }
}

/// Seconds since 1970.
pub fn unix_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

/// The step of the newest complete checkpoint, as far as it can be seen from here.
pub fn newest(checkpoints: &Checkpoints) -> Option<u64> {
    checkpoints.list().ok()?.steps.last().copied()
}

/// Which file it is, and its size.
fn identity(path: &Path) -> Option<((u64, u64), u64)> {
    let metadata = std::fs::metadata(path).ok()?;
    Some(((metadata.dev(), metadata.ino()), metadata.len()))
}

/// The last whole line.
fn last_line(path: &Path, size: u64) -> Option<serde_json::Value> {
    // Longer than any two lines.
    const TAIL: u64 = 8 << 10;
    let mut file = File::open(path).ok()?;
    file.seek(SeekFrom::Start(size.saturating_sub(TAIL))).ok()?;
    let mut bytes = Vec::new();
    file.take(TAIL).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    text.lines().rev().find_map(|line| serde_json::from_str(line).ok())
}

fn first_step(path: &Path) -> Option<u64> {
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(8 << 10).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    serde_json::from_str::<serde_json::Value>(text.lines().next()?).ok()?["step"].as_u64()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(log: &Path, steps: &[u64]) {
        let text: String = steps.iter().map(|n| format!("{{\"step\":{n},\"step_seconds\":0.1}}\n")).collect();
        std::fs::write(log.with_extension("part"), text + "{\"step\":99").expect("written");
        std::fs::rename(log.with_extension("part"), log).expect("renamed");
    }

    #[test]
    fn steps_of_the_attempt_before_are_no_progress() {
        let run = tempfile::tempdir().expect("a folder");
        let log = log_path(run.path());
        let checkpoints = Checkpoints::at(&run.path().join("checkpoints"));
        step(&log, &[1, 2, 3]);
        std::fs::create_dir_all(run.path().join("checkpoints/step-00000002")).expect("made");
        let mut watch = Watch::begin(run.path(), &checkpoints);
        watch.look();
        assert!(watch.steps().is_none() && !watch.sees_log());
        step(&log, &[1, 2]);
        watch.look();
        assert!(watch.steps().is_none() && watch.sees_log());
        step(&log, &[1, 2, 3, 4]);
        watch.look();
        assert_eq!(watch.steps(), Some((3, 4)));
        // An old status says nothing.
        let between = |time: f64, between_steps: bool| {
            let rank = |rank: usize, host: &str, phase: &str| {
                serde_json::json!({
                    "rank": rank, "host": host, "pid": 1, "step": 5, "phase": phase,
                    "in_phase_seconds": 30.4, "step_seconds": null, "state": "running"})
            };
            let text = serde_json::json!({
                "time": time, "state": "training", "step": 5, "steps": 9, "durable": 4,
                "between_steps": between_steps, "ranks": [rank(0, "a", "communicating"), rank(1, "b", "computing")]});
            std::fs::write(run.path().join("status.json"), text.to_string()).expect("written");
        };
        let status = |time| between(time, false);
        status(unix_time() - 100.0);
        watch.look();
        assert_eq!((watch.stuck(&[], "a"), watch.durable()), (None, Some(2)));
        status(unix_time());
        watch.look();
        assert_eq!((watch.steps(), watch.durable()), (Some((3, 4)), Some(4)));
        let stuck = watch.stuck(&[], "a").expect("a rank");
        assert_eq!((stuck.rank, stuck.host.as_str()), (1, "b"));
        assert_eq!(stuck.text, "computing for 30 s in step 5");
        // A grid that has been drawn counts as progress when it is over.
        let before = watch.progressed();
        between(unix_time(), true);
        watch.look();
        assert!(watch.between_steps() && watch.progressed() == before);
        status(unix_time());
        watch.look();
        assert!(!watch.between_steps() && watch.progressed() > before);
    }

    #[test]
    fn a_run_that_is_sent_back_has_what_it_was_sent_back_to() {
        let run = tempfile::tempdir().expect("a folder");
        let checkpoints = Checkpoints::at(&run.path().join("checkpoints"));
        for step in [50, 100] {
            std::fs::create_dir_all(run.path().join(format!("checkpoints/step-{step:08}"))).expect("made");
        }
        let mut watch = Watch::begin(run.path(), &checkpoints);
        assert_eq!(watch.durable(), Some(100));
        std::fs::rename(
            run.path().join("checkpoints/step-00000100"),
            run.path().join("checkpoints/step-00000100.1.set-aside"),
        )
        .expect("renamed");
        let status = |durable: u64| {
            let text = serde_json::json!({
                "time": unix_time(), "state": "training", "step": 51, "steps": 200, "durable": durable,
                "between_steps": false, "ranks": []});
            std::fs::write(run.path().join("status.json"), text.to_string()).expect("written");
        };
        status(50);
        watch.look();
        assert_eq!(watch.durable(), Some(50));
        status(60);
        watch.look();
        assert_eq!(watch.durable(), Some(60));
    }
}
