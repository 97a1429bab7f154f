//! What rank 0 says every second of all ranks: the run folder's `status.json`.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use repa_comm::board::{Phase, Process, Progress, RankState, RankStatus};
use serde::{Deserialize, Serialize};

/// Where a run says what its ranks do.
pub fn status_path(run: &Path) -> PathBuf {
    run.join("status.json")
}

/// What [`status_path`] holds. Times are in seconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// When it was written, since 1970.
    pub time: f64,
    /// `training`, or `ended` once the run has come to its end in good order.
    #[serde(default)]
    pub state: String,
    /// The step that goes on.
    #[serde(default)]
    pub step: u64,
    /// Steps of the whole run.
    #[serde(default)]
    pub steps: u64,
    /// The newest durable checkpoint.
    #[serde(default)]
    pub durable: Option<u64>,
    /// Whether all ranks are at what takes as long as a disk or a large model takes: no step is due.
    #[serde(default)]
    pub between_steps: bool,
    /// All ranks, in their order.
    #[serde(default)]
    pub ranks: Vec<RankLine>,
}

/// What it says of one rank.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RankLine {
    /// Which.
    pub rank: usize,
    /// Where.
    pub host: String,
    /// `running`, `stopped`, `ended`, `no answer` or `not shared`.
    pub state: String,
    /// Its process.
    #[serde(default)]
    pub pid: Option<u32>,
    /// The step that it is in.
    #[serde(default)]
    pub step: Option<u64>,
    /// What it does.
    #[serde(default)]
    pub phase: Option<String>,
    /// For how long.
    #[serde(default)]
    pub in_phase_seconds: Option<f64>,
    /// Own work of the last step, without waiting for other ranks.
    #[serde(default)]
    pub step_seconds: Option<f64>,
}

impl Status {
    pub(super) fn new(
        snapshot: &[RankStatus],
        state: &'static str,
        steps: u64,
        durable: Option<u64>,
    ) -> Self {
        Self {
            time: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |t| t.as_secs_f64()),
            state: state.into(),
            step: snapshot.iter().filter_map(|s| s.progress()?.step).max().unwrap_or(0),
            steps,
            durable,
            between_steps: between_steps(snapshot),
            ranks: snapshot.iter().map(RankLine::new).collect(),
        }
    }

    /// The status that a run folder holds; None where it has none that can be read.
    pub fn read(run: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(status_path(run)).ok()?).ok()
    }

    /// Replaces the file; readers see the old one or the new one. Training does not depend on it, so a full disk is no
    /// error.
    pub(super) fn write(&self, run: &Path) {
        let path = status_path(run);
        let part = path.with_extension("json.part");
        let text = serde_json::to_vec(self).expect("a status serialises");
        let replaced = std::fs::write(&part, text).and_then(|()| std::fs::rename(&part, &path));
        if let Err(error) = replaced {
            tracing::debug!("cannot write {}: {error}", path.display());
        }
    }
}

/// Whether no rank that is known is in a step: saves, sample images and what comes before the first step.
pub(super) fn between_steps(snapshot: &[RankStatus]) -> bool {
    let mut known = snapshot.iter().filter_map(RankStatus::progress);
    known.all(|p| matches!(p.phase, Phase::Saving | Phase::Sampling | Phase::Starting | Phase::Ended))
}

impl RankLine {
    fn new(status: &RankStatus) -> Self {
        let progress = status.progress();
        let state = match &status.state {
            RankState::Known(Progress { process: Process::Running, .. }) => "running",
            RankState::Known(Progress { process: Process::Stopped, .. }) => "stopped",
            RankState::Known(Progress { process: Process::Ended, .. }) => "ended",
            RankState::NoAnswer => "no answer",
            RankState::NotShared => "not shared",
        };
        Self {
            rank: status.rank,
            host: status.host.clone(),
            state: state.into(),
            pid: progress.map(|p| p.pid),
            step: progress.and_then(|p| p.step),
            phase: progress.map(|p| p.phase.to_string()),
            in_phase_seconds: progress.map(|p| p.in_phase.as_secs_f64()),
            step_seconds: progress.and_then(|p| p.step_time).map(|t| t.as_secs_f64()),
        }
    }
}
