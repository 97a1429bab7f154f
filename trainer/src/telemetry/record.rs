//! What a step leaves behind.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use metrics::{counter, gauge, histogram};
use serde::{Deserialize, Serialize};

use super::names;
use crate::train::{Details, TIMESTEP_PARTS};

/// One line of `metrics.jsonl`. Losses are means over the global batch; times are rank 0's, in
/// seconds. Numbers carry 9 significant digits; losses and norms that are not finite are `null` there, for which
/// JSON has no other word, and read as NaN.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Optimizer steps done, this one included.
    pub step: u64,
    /// denoising_loss + coefficient x alignment_loss.
    #[serde(deserialize_with = "or_nan")]
    pub loss: f64,
    /// Mean squared error of the velocity.
    #[serde(deserialize_with = "or_nan")]
    pub denoising_loss: f64,
    /// Negative mean cosine similarity with the encoders' tokens.
    #[serde(deserialize_with = "or_nan")]
    pub alignment_loss: f64,
    /// Global gradient norm before clipping.
    #[serde(deserialize_with = "or_nan")]
    pub grad_norm: f64,
    /// Whether the step was left out because that norm was not finite.
    pub skipped: bool,
    /// Learning rate.
    pub learning_rate: f64,
    /// Global batch over the step's duration.
    pub images_per_second: f64,
    /// Duration of the step.
    pub step_seconds: f64,
    /// Of which waiting for data.
    pub data_wait_seconds: f64,
    /// Of which forward and backward.
    pub compute_seconds: f64,
    /// Of which collectives that nothing hid.
    pub communication_seconds: f64,
    /// Time that collectives took, hidden or not.
    #[serde(default)]
    pub communication_busy_seconds: f64,
    /// Of which clipping, AdamW and EMA.
    pub optimizer_seconds: f64,
    /// Time after the step that a checkpoint kept training waiting.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub snapshot_seconds: f64,
}

fn or_nan<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
fn is_zero(x: &f64) -> bool {
    *x == 0.0
}

impl StepRecord {
    /// Rounds every number to 9 significant digits, which is what is written.
    #[must_use]
    pub fn rounded(mut self) -> Self {
        for x in [
            &mut self.loss,
            &mut self.denoising_loss,
            &mut self.alignment_loss,
            &mut self.grad_norm,
            &mut self.images_per_second,
            &mut self.step_seconds,
            &mut self.data_wait_seconds,
            &mut self.compute_seconds,
            &mut self.communication_seconds,
            &mut self.communication_busy_seconds,
            &mut self.optimizer_seconds,
            &mut self.snapshot_seconds,
        ] {
            *x = significant(*x);
        }
        self
    }

    /// Updates the metrics of this rank.
    pub fn publish(&self, rank: &RankRecord, facts: &Facts) {
        gauge!(names::LOSS).set(self.loss);
        gauge!(names::DENOISING_LOSS).set(self.denoising_loss);
        // What training no longer asks for raises no alert.
        gauge!(names::ALIGNMENT_LOSS).set(if rank.has_aligned { self.alignment_loss } else { f64::NAN });
        gauge!(names::GRADIENT_NORM).set(self.grad_norm);
        gauge!(names::LEARNING_RATE).set(self.learning_rate);
        gauge!(names::STEP).set(self.step as f64);
        gauge!(names::IMAGES_PER_SECOND).set(self.images_per_second);
        counter!(names::STEPS).increment(1);
        counter!(names::IMAGES).increment(rank.images);
        counter!(names::TOKENS).increment(rank.images * facts.tokens_per_image);
        counter!(names::COMMUNICATION_BYTES).increment(rank.communicated);
        rank.publish();
        let flops = self.images_per_second * facts.flops_per_image;
        gauge!(names::MODEL_FLOPS_PER_SECOND).set(flops);
        if facts.peak_flops > 0.0 {
            gauge!(names::MFU_RATIO).set(flops / facts.peak_flops);
        }
        gauge!(names::EMA_DECAY).set(facts.ema_decay);
        gauge!(names::PLANNED_STEPS).set(facts.steps as f64);
        counter!(names::SKIPPED_STEPS).increment(u64::from(self.skipped));
        histogram!(names::STEP_SECONDS).record(self.step_seconds);
        histogram!(names::DATA_WAIT_SECONDS).record(self.data_wait_seconds);
        histogram!(names::COMPUTE_SECONDS).record(self.compute_seconds);
        histogram!(names::COMMUNICATION_SECONDS).record(self.communication_seconds);
        histogram!(names::COMMUNICATION_BUSY_SECONDS).record(self.communication_busy_seconds);
        histogram!(names::OPTIMIZER_SECONDS).record(self.optimizer_seconds);
    }
}

/// What metrics show of this rank's part of a step.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RankRecord {
    /// Images that it trained on.
    pub images: u64,
    /// Bytes of the vectors that it handed to collectives.
    pub communicated: u64,
    /// Losses in parts, and where the time went.
    pub details: Details,
    /// What the loss was multiplied by, where loss scaling is in use.
    pub loss_scale: Option<f64>,
    /// Whether the alignment loss has counted.
    pub has_aligned: bool,
}

/// What does not change during a run, and metrics follow from.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Facts {
    /// Steps of the whole run.
    pub steps: u64,
    /// Tokens of an image.
    pub tokens_per_image: u64,
    /// See [`crate::model::SitConfig::training_flops`].
    pub flops_per_image: f64,
    /// What all ranks' devices can do, in FLOP/s; 0 where nobody has said.
    pub peak_flops: f64,
    /// Decay of the weights' moving average.
    pub ema_decay: f64,
}

impl RankRecord {
    fn publish(&self) {
        let Details { encoders, timesteps, upload, forward, backward } = &self.details;
        if self.images > 0 {
            for (number, sum) in encoders.iter().enumerate() {
                gauge!(names::ENCODER_ALIGNMENT_LOSS, "encoder" => number.to_string())
                    .set(sum / self.images as f64);
            }
        }
        for (part, (sum, samples)) in timesteps.iter().enumerate().filter(|(_, (_, samples))| *samples > 0) {
            let bound = |part: usize| part as f64 / TIMESTEP_PARTS as f64;
            let label = format!("{:.2}-{:.2}", bound(part), bound(part + 1));
            gauge!(names::TIMESTEP_DENOISING_LOSS, "timestep" => label).set(sum / *samples as f64);
        }
        histogram!(names::HOST_TO_DEVICE_SECONDS).record(upload.as_secs_f64());
        histogram!(names::FORWARD_SECONDS).record(forward.as_secs_f64());
        histogram!(names::BACKWARD_SECONDS).record(backward.as_secs_f64());
        if let Some(scale) = self.loss_scale {
            gauge!(names::LOSS_SCALE).set(scale);
        }
    }
}

/// A figure of a step.
type Value = fn(&StepRecord) -> f64;

/// What a checkpoint keeps the means of, and how a step gives it.
pub const MEANS: [(&str, Value); 3] = [
    ("loss", |r| r.loss),
    ("denoising_loss", |r| r.denoising_loss),
    ("alignment_loss", |r| r.alignment_loss),
];

fn significant(x: f64) -> f64 {
    format!("{x:.8e}").parse().unwrap_or(x)
}

/// The run's `metrics.jsonl`: one JSON object a step, each written at once, so that a killed run
/// leaves whole lines but for the last.
#[derive(Debug)]
pub struct RunLog {
    file: File,
    /// Whether part of a line may stand at the end.
    torn: bool,
}

impl RunLog {
    /// Opens the log for a run that goes on after `step`: lines of later steps, and a line that a
    /// kill cut short, are dropped.
    ///
    /// # Errors
    /// The file cannot be read or written.
    pub fn open(path: &Path, step: u64) -> io::Result<Self> {
        let kept: String = read_log(path)?
            .into_iter()
            .filter(|r| r.step <= step)
            .map(|r| serde_json::to_string(&r).expect("a record serialises") + "\n")
            .collect();
        let part = path.with_extension("jsonl.part");
        std::fs::write(&part, kept)?;
        std::fs::rename(&part, path)?;
        Ok(Self { file: OpenOptions::new().append(true).open(path)?, torn: false })
    }

    /// Appends a step. After an error the next one begins a line of its own.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&mut self, record: &StepRecord) -> io::Result<()> {
        let line = serde_json::to_string(record).expect("a record serialises");
        let before = if self.torn { "\n" } else { "" };
        let written = self.file.write_all(format!("{before}{line}\n").as_bytes());
        self.torn = written.is_err();
        written
    }
}

/// The steps that a `metrics.jsonl` holds; none where there is no file. Incomplete lines are left
/// out.
///
/// # Errors
/// The file cannot be read.
pub fn read_log(path: &Path) -> io::Result<Vec<StepRecord>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(e),
    }
}

/// Where a run keeps its log.
pub fn log_path(run: &Path) -> PathBuf {
    run.join("metrics.jsonl")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(step: u64) -> StepRecord {
        StepRecord {
            step,
            loss: 1.234_567_891_23,
            denoising_loss: 1.0 / 3.0,
            alignment_loss: -0.1,
            grad_norm: 2e-7 / 3.0,
            skipped: false,
            learning_rate: 1e-4,
            images_per_second: 100.0,
            step_seconds: 0.1,
            data_wait_seconds: 0.0,
            compute_seconds: 0.08,
            communication_seconds: 0.01,
            communication_busy_seconds: 0.03,
            optimizer_seconds: 0.01,
            snapshot_seconds: 0.0,
        }
        .rounded()
    }

    #[test]
    fn numbers_keep_nine_significant_digits() {
        let record = record(1);
        assert_eq!(record.loss, 1.234_567_89);
        assert_eq!(record.denoising_loss, 0.333_333_333);
        assert_eq!(record.grad_norm, 6.666_666_67e-8);
    }

    #[test]
    fn a_resumed_log_has_every_step_once() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = log_path(folder.path());
        let mut log = RunLog::open(&path, 0).expect("new");
        for step in 1..=5 {
            log.write(&record(step)).expect("written");
        }
        // A kill in the middle of a line.
        log.file.write_all(b"{\"step\":6,\"lo").expect("written");
        let mut log = RunLog::open(&path, 3).expect("reopened");
        log.write(&record(4)).expect("written");
        let steps: Vec<u64> = read_log(&path).expect("readable").iter().map(|r| r.step).collect();
        assert_eq!(steps, [1, 2, 3, 4]);
        assert_eq!(std::fs::read_to_string(&path).expect("text").lines().count(), 4);
    }

    #[test]
    fn a_step_that_was_left_out_stays_in_the_log() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = log_path(folder.path());
        let mut log = RunLog::open(&path, 0).expect("new");
        for (step, norm) in [(1, 0.5), (2, f64::NAN), (3, f64::INFINITY)] {
            let skipped = !norm.is_finite();
            log.write(&StepRecord { grad_norm: norm, loss: norm, skipped, ..record(step) }).expect("written");
        }
        RunLog::open(&path, 3).expect("reopened");
        let steps = read_log(&path).expect("readable");
        assert_eq!(
            steps.iter().map(|r| (r.step, r.skipped)).collect::<Vec<_>>(),
            [(1, false), (2, true), (3, true)]
        );
        assert!(steps[1].grad_norm.is_nan() && steps[2].loss.is_nan(), "{steps:?}");
    }

    #[test]
    fn a_line_that_was_cut_short_takes_no_other_with_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = log_path(folder.path());
        let mut log = RunLog::open(&path, 0).expect("new");
        log.write(&record(1)).expect("written");
        // As a full disk leaves it.
        log.file.write_all(b"{\"step\":2,\"lo").expect("written");
        log.torn = true;
        log.write(&record(3)).expect("written");
        log.write(&record(4)).expect("written");
        let steps: Vec<u64> = read_log(&path).expect("readable").iter().map(|r| r.step).collect();
        assert_eq!(steps, [1, 3, 4]);
    }
}
