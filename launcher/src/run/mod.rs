//! What a run's folder says of the run, for the commands that look at runs.

mod follow;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use repa_trainer::checkpoint::name;
use repa_trainer::evaluate::{Evaluation, Scores};
use repa_trainer::telemetry::events::{Event, events_path, parse_events};
use repa_trainer::telemetry::record::{StepRecord, log_path, read_log};
use repa_trainer::train::{Status, checkpoints_of};
use serde::Serialize;
use serde_json::Value;

use crate::exit::Failure;
use crate::launch::{Attempts, Record};

pub use follow::{Follow, News};

/// Where a run folder keeps what `evaluate` finds, and what it finds with Inception v3.
pub const EVALUATION: &str = "evaluation.json";
pub const SCORES: &str = "scores.jsonl";

/// Rank 0 writes its status every second: one as old as this is of a run that is no more.
const SIGN_OF_LIFE: f64 = 15.0;

/// A run as its folder tells of it. What is not there is empty.
#[derive(Debug)]
pub struct Run {
    /// The folder.
    pub folder: PathBuf,
    /// `config.toml`: the merged configuration with the origin of each value.
    pub config_text: String,
    /// The same by key.
    pub config: BTreeMap<String, String>,
    /// All steps, by ascending number.
    pub steps: Vec<StepRecord>,
    /// What rank 0 said last.
    pub status: Option<Status>,
    /// What the last start ran on.
    pub environment: Value,
    /// What happened.
    pub events: Vec<Event>,
    /// What `launch` tried.
    pub attempts: Vec<Record>,
    /// By ascending step.
    pub checkpoints: Vec<Saved>,
    /// Pictures of samples, by ascending step.
    pub samples: Vec<Sample>,
    /// How far samples are from the data.
    pub evaluation: Option<Evaluation>,
    /// What ADM's evaluator would say of them, the newest last.
    pub scores: Vec<Scores>,
}

/// A checkpoint.
#[derive(Debug, Clone, Serialize)]
pub struct Saved {
    /// Steps done.
    pub step: u64,
    /// When it became whole, in seconds since 1970, where its place tells.
    pub time: Option<f64>,
    /// All shards.
    pub bytes: u64,
    /// Ranks that wrote it.
    pub world_size: usize,
    /// Means since the one before.
    pub metrics: BTreeMap<String, f64>,
    /// Why it cannot be read.
    pub problem: Option<String>,
}

/// A picture of samples.
#[derive(Debug, Clone)]
pub struct Sample {
    /// The step in its name, if there is one.
    pub step: Option<u64>,
    /// The file.
    pub path: PathBuf,
}

/// Where a run stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Stand {
    /// It goes on.
    Training,
    /// All its steps are done.
    Complete,
    /// It was stopped on request.
    Stopped,
    /// It ended in some other way: a failure, or a kill.
    Interrupted,
}

impl Stand {
    /// From rank 0's last word, and the time now in seconds since 1970.
    pub fn of(status: &Status, now: f64) -> Self {
        match status.state.as_str() {
            "training" if now - status.time < SIGN_OF_LIFE => Self::Training,
            "training" => Self::Interrupted,
            _ if status.step >= status.steps => Self::Complete,
            _ => Self::Stopped,
        }
    }

    /// In a word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Training => "training",
            Self::Complete => "complete",
            Self::Stopped => "stopped",
            Self::Interrupted => "interrupted",
        }
    }
}

impl Run {
    /// Reads a run folder.
    ///
    /// # Errors
    /// It holds no step of a run, or its log cannot be read.
    pub fn open(folder: &Path) -> Result<Self, Failure> {
        let log = log_path(folder);
        let steps =
            read_log(&log).map_err(|e| Failure::data(format!("cannot read {}: {e}", log.display())))?;
        if steps.is_empty() {
            return Err(Failure::data(format!(
                "{} holds no metrics: train first, or name another run folder",
                folder.display()
            )));
        }
        let text = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap_or_default();
        let config_text = text("config.toml");
        Ok(Self {
            config: flatten(&config_text),
            config_text,
            steps,
            status: Status::read(folder),
            environment: serde_json::from_str(&text("environment.json")).unwrap_or_default(),
            events: parse_events(&std::fs::read_to_string(events_path(folder)).unwrap_or_default()),
            attempts: Attempts::read(folder),
            checkpoints: checkpoints(folder),
            samples: samples(&folder.join("samples")),
            evaluation: serde_json::from_str(&text(EVALUATION)).ok(),
            scores: text(SCORES).lines().filter_map(|line| serde_json::from_str(line).ok()).collect(),
            folder: folder.to_owned(),
        })
    }

    /// The last step.
    pub fn last(&self) -> &StepRecord {
        self.steps.last().expect("a run that was opened has steps")
    }

    /// Where it stands.
    pub fn stand(&self) -> Stand {
        self.status.as_ref().map_or(Stand::Interrupted, |status| Stand::of(status, now()))
    }

    /// A value of the configuration.
    pub fn setting(&self, key: &str) -> Option<&str> {
        self.config.get(key).map(String::as_str)
    }

    /// What its model is called.
    pub fn model(&self) -> String {
        let number = |key: &str| self.setting(key).unwrap_or("?").to_owned();
        match self.setting("model.preset") {
            Some(preset) if !preset.is_empty() => preset.to_owned(),
            _ => format!("SiT {}x{}", number("model.depth"), number("model.hidden_size")),
        }
    }
}

/// Seconds since 1970.
pub fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

/// A TOML text's values by dotted key; strings without their quotes. Empty where it is no TOML.
fn flatten(text: &str) -> BTreeMap<String, String> {
    fn add(prefix: &str, table: toml::Table, flat: &mut BTreeMap<String, String>) {
        for (key, value) in table {
            let key = if prefix.is_empty() { key } else { format!("{prefix}.{key}") };
            match value {
                toml::Value::Table(table) => add(&key, table, flat),
                toml::Value::String(text) => drop(flat.insert(key, text)),
                value => drop(flat.insert(key, value.to_string())),
            }
        }
    }
    let mut flat = BTreeMap::new();
    add("", toml::from_str(text).unwrap_or_default(), &mut flat);
    flat
}

fn checkpoints(folder: &Path) -> Vec<Saved> {
    let checkpoints = checkpoints_of(folder);
    // A place that cannot be reached has nothing to show; `checkpoint list` says why.
    let steps = checkpoints.list().map(|listed| listed.steps).unwrap_or_default();
    let saved = |step| {
        let time = checkpoints.changed(&name(step)).and_then(|at| at.duration_since(UNIX_EPOCH).ok());
        let time = time.map(|at| at.as_secs_f64());
        match checkpoints.open(step) {
            Ok(checkpoint) => Saved {
                step,
                time,
                bytes: checkpoint.bytes(),
                world_size: checkpoint.manifest().world_size,
                metrics: checkpoint.manifest().metrics.clone(),
                problem: None,
            },
            Err(error) => Saved {
                step,
                time,
                bytes: 0,
                world_size: 0,
                metrics: BTreeMap::new(),
                problem: Some(error.to_string()),
            },
        }
    };
    steps.into_iter().map(saved).collect()
}

fn samples(folder: &Path) -> Vec<Sample> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut samples: Vec<Sample> = entries
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "png"))
        .map(|path| Sample { step: step_in(&path), path })
        .collect();
    samples.sort_by(|a, b| (a.step, &a.path).cmp(&(b.step, &b.path)));
    samples
}

/// The number in a name such as `step-00001000.png`.
fn step_in(path: &Path) -> Option<u64> {
    let digits: String = path.file_stem()?.to_str()?.strip_prefix("step-")?.chars().collect();
    let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
    digits[..end].parse().ok()
}

/// What tells runs apart: each one's folder without what all have in common.
pub fn names(runs: &[Run]) -> Vec<String> {
    let parts = |run: &Run| -> Vec<String> {
        let words = run.folder.components().map(|part| part.as_os_str().to_string_lossy().into_owned());
        words.filter(|word| word != ".").collect()
    };
    let all: Vec<Vec<String>> = runs.iter().map(parts).collect();
    let shortest = all.iter().map(Vec::len).min().unwrap_or(0);
    let same = |at: usize| all.iter().all(|words| words[at] == all[0][at]);
    // At least the last word stays.
    let common = (0..shortest.saturating_sub(1)).take_while(|&at| same(at)).count();
    all.iter().map(|words| words[common.min(words.len().saturating_sub(1))..].join("/")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(state: &str, time: f64, step: u64) -> Status {
        let state = state.into();
        Status { time, state, step, steps: 10, durable: None, between_steps: false, ranks: Vec::new() }
    }

    #[test]
    fn where_a_run_stands_follows_from_its_last_word() {
        assert_eq!(Stand::of(&status("training", 100.0, 3), 102.0), Stand::Training);
        assert_eq!(Stand::of(&status("training", 100.0, 3), 900.0), Stand::Interrupted);
        assert_eq!(Stand::of(&status("ended", 100.0, 3), 900.0), Stand::Stopped);
        assert_eq!(Stand::of(&status("ended", 100.0, 10), 900.0), Stand::Complete);
    }

    #[test]
    fn values_are_found_by_dotted_keys() {
        let flat =
            flatten("train.steps = 5  # argument\nmodel.preset = \"SiT-S/2\"\nalignment.z_dims = [1, 2]\n");
        assert_eq!(flat["train.steps"], "5");
        assert_eq!(flat["model.preset"], "SiT-S/2");
        assert_eq!(flat["alignment.z_dims"], "[1, 2]");
        assert!(flatten("no toml").is_empty());
    }

    #[test]
    fn samples_are_sorted_by_their_steps() {
        let folder = tempfile::tempdir().expect("a folder");
        for name in ["step-900.png", "step-00001000.png", "mine.png", "step-20-cfg4.png", "notes.txt"] {
            std::fs::write(folder.path().join(name), "").expect("written");
        }
        let steps: Vec<_> = samples(folder.path()).iter().map(|sample| sample.step).collect();
        assert_eq!(steps, [None, Some(20), Some(900), Some(1000)]);
    }
}

/// Steps to test with.
#[cfg(test)]
pub mod tests_support {
    use repa_trainer::telemetry::record::StepRecord;

    /// A step of a run whose losses fall.
    pub fn record(step: u64) -> StepRecord {
        let fallen = (-(step as f64) / 100.0).exp();
        StepRecord {
            step,
            loss: 0.8 + fallen - 0.5 * 0.4,
            denoising_loss: 0.8 + fallen,
            alignment_loss: -0.4,
            grad_norm: 1.0 / step as f64,
            skipped: false,
            learning_rate: 1e-4,
            images_per_second: 200.0,
            step_seconds: 0.25,
            data_wait_seconds: 0.01,
            compute_seconds: 0.2,
            communication_seconds: 0.02,
            communication_busy_seconds: 0.05,
            optimizer_seconds: 0.015,
            snapshot_seconds: 0.0,
        }
        .rounded()
    }
}
