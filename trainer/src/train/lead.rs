//! What rank 0 does for all: the run folder and its lock, log, progress and watch.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use repa_comm::Board;

use super::TrainError;
use super::folder::{self, RunFolder};
use super::samples::Drawn;
use super::watch::{self, Watch};
use crate::config::Config;
use crate::telemetry::exporter;
use crate::telemetry::progress::Progress;
use crate::telemetry::record::{RunLog, StepRecord, log_path};

/// Rank 0's part of a run beside its share of the work.
pub(super) struct Lead {
    /// Held for its lock.
    _folder: RunFolder,
    log: RunLog,
    pub(super) progress: Progress,
    pub(super) watch: Watch,
}

impl Lead {
    /// For a run that goes on after `step`, whose checkpoints are in the folder `checkpoints`, if they are in one.
    pub(super) fn open(
        config: &Config,
        folder: RunFolder,
        checkpoints: Option<&Path>,
        board: &Arc<Board>,
        step: u64,
    ) -> Result<Self, TrainError> {
        let path = log_path(&config.run.dir);
        let log = RunLog::open(&path, step).map_err(|source| TrainError::Folder {
            path,
            problem: "write to",
            source,
        })?;
        let progress = Progress::new(config.telemetry.progress, step, config.train.steps);
        let limit = config.train.step_timeout_seconds;
        let setting = watch::Setting {
            run: config.run.dir.clone(),
            checkpoints: checkpoints.map(Path::to_owned),
            steps: config.train.steps,
            limit: (limit > 0.0).then(|| Duration::from_secs_f64(limit.min(super::LONGEST))),
        };
        let watch = Watch::start(board.clone(), setting)
            .map_err(|e| TrainError::Setup { what: "the watching thread", problem: e.to_string() })?;
        Ok(Self { _folder: folder, log, progress, watch })
    }

    /// Passes a step on to log and progress.
    pub(super) fn tell(&mut self, record: &StepRecord, config: &Config) -> Result<(), TrainError> {
        self.log.write(record).map_err(|source| TrainError::Folder {
            path: config.run.dir.clone(),
            problem: "write to",
            source,
        })?;
        self.progress.step(record);
        Ok(())
    }

    /// Says what has become of a step's sample images, where that is not as it should be.
    pub(super) fn show(&mut self, step: u64, drawn: Drawn) {
        if let Err(problem) = drawn {
            self.progress.line(&format!("no sample images of step {step}: {problem}. Training goes on"));
        }
    }

    /// Writes Prometheus' target file.
    pub(super) fn targets(&self, config: &Config, addresses: &[String]) -> Result<(), TrainError> {
        let path = folder::targets(&config.run.dir);
        exporter::write_targets(&path, addresses).map_err(|source| TrainError::Folder {
            path,
            problem: "write to",
            source,
        })
    }
}
