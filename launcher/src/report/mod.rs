//! A run, or several side by side, on one page of HTML that needs nothing but itself.

mod curves;
mod page;
mod tables;

use std::path::{Path, PathBuf};

use repa_trainer::telemetry::record::StepRecord;
use serde::Serialize;

use crate::exit::Failure;
use crate::run::{Run, Stand};

/// A run in figures.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// Its folder.
    pub run: PathBuf,
    /// Where it stands.
    pub state: Stand,
    /// Its model.
    pub model: String,
    /// Ranks of the last start.
    pub ranks: Option<u64>,
    /// Steps done.
    pub step: u64,
    /// Steps planned.
    pub steps: Option<u64>,
    /// Time that the steps took, saves' waits included; not what came between two starts.
    pub seconds: f64,
    /// Images over that time.
    pub images_per_second: f64,
    /// Steps, the last ones, that the losses below are means of.
    pub mean_over: usize,
    /// Mean squared error of the velocity.
    pub denoising_loss: f64,
    /// Negative mean cosine similarity with the encoders' tokens.
    pub alignment_loss: f64,
    /// Steps left out because the gradient norm was not finite.
    pub skipped_steps: usize,
    /// Fréchet distance of samples from the data, in the encoder's features, where it was measured.
    pub frechet_distance: Option<f64>,
    /// Fréchet Inception distance from a reference batch, where it was measured, of the last time.
    pub fid: Option<f64>,
    /// Checkpoints that can be read.
    pub checkpoints: usize,
    /// Starts by `launch`.
    pub attempts: usize,
}

impl Summary {
    /// Of a run.
    pub fn of(run: &Run) -> Self {
        let last = run.last();
        let images = |r: &StepRecord| r.images_per_second * r.step_seconds;
        let seconds: f64 = run.steps.iter().map(|r| r.step_seconds + r.snapshot_seconds).sum();
        let mean_over = (run.steps.len() / 20).clamp(1, 1000);
        let tail = &run.steps[run.steps.len() - mean_over..];
        let mean = |value: fn(&StepRecord) -> f64| {
            let finite: Vec<f64> = tail.iter().map(value).filter(|x| x.is_finite()).collect();
            finite.iter().sum::<f64>() / finite.len() as f64
        };
        let steps = run.status.as_ref().map(|status| status.steps);
        Self {
            run: run.folder.clone(),
            state: run.stand(),
            model: run.model(),
            ranks: run.environment["ranks"].as_u64(),
            step: last.step,
            steps: steps.or_else(|| run.setting("train.steps")?.parse().ok()),
            seconds,
            images_per_second: run.steps.iter().map(images).sum::<f64>() / seconds,
            mean_over,
            denoising_loss: mean(|r| r.denoising_loss),
            alignment_loss: mean(|r| r.alignment_loss),
            skipped_steps: run.steps.iter().filter(|r| r.skipped).count(),
            frechet_distance: run.evaluation.as_ref().map(|evaluation| evaluation.trained),
            fid: run.scores.last().map(|scores| scores.fid),
            checkpoints: run.checkpoints.iter().filter(|saved| saved.problem.is_none()).count(),
            attempts: run.attempts.len(),
        }
    }
}

/// Writes the page; readers see the old one or the new one. `pictures` is the most sample pictures of a run.
///
/// # Errors
/// The file cannot be written.
pub fn write(out: &Path, runs: &[Run], pictures: usize) -> Result<(), Failure> {
    let page = page::page(runs, pictures);
    let mut name = out.file_name().unwrap_or_default().to_os_string();
    name.push(".part");
    let part = out.with_file_name(name);
    std::fs::write(&part, page).and_then(|()| std::fs::rename(&part, out)).map_err(|e| {
        Failure::usage(format!("cannot write {}: {e}; name another file with --out", out.display()))
    })
}

#[cfg(test)]
mod tests;
