//! What rank 0 does for all: the run folder and its lock, log, events, progress, TensorBoard's files and watch.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use repa_comm::Board;

use super::TrainError;
use super::folder::{self, RunFolder};
use super::samples::Drawn;
use super::watch::{self, Watch};
use crate::config::Config;
use crate::telemetry::events::{Events, events_path};
use crate::telemetry::exporter;
use crate::telemetry::progress::Progress;
use crate::telemetry::record::{RunLog, StepRecord, log_path};
use crate::telemetry::tensorboard::{self, EventFile};

/// Rank 0's part of a run beside its share of the work.
pub(super) struct Lead {
    /// Held for its lock.
    _folder: RunFolder,
    log: RunLog,
    /// Whether the last write to the log failed, and has been told.
    log_failed: bool,
    pub(super) events: Events,
    /// None where none are asked for, or one could not be written.
    tensorboard: Option<EventFile>,
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
        host: &str,
    ) -> Result<Self, TrainError> {
        let path = log_path(&config.run.dir);
        let io = |path| move |source| TrainError::Folder { path, problem: "write to", source };
        let log = RunLog::open(&path, step).map_err(io(path))?;
        let events = Events::open(&config.run.dir).map_err(io(events_path(&config.run.dir)))?;
        let tensorboard = match config.telemetry.tensorboard {
            true => {
                let folder = tensorboard::folder(&config.run.dir);
                Some(EventFile::create(&folder, host, step).map_err(io(folder))?)
            }
            false => None,
        };
        let progress = Progress::new(config.telemetry.progress, step, config.train.steps);
        let limit = config.train.step_timeout_seconds;
        let setting = watch::Setting {
            run: config.run.dir.clone(),
            checkpoints: checkpoints.map(Path::to_owned),
            steps: config.train.steps,
            limit: (limit > 0.0).then(|| Duration::from_secs_f64(limit.min(super::LONGEST))),
            events: events.clone(),
        };
        let watch = Watch::start(board.clone(), setting)
            .map_err(|e| TrainError::Setup { what: "the watching thread", problem: e.to_string() })?;
        Ok(Self { _folder: folder, log, log_failed: false, events, tensorboard, progress, watch })
    }

    /// Passes a step on to log and progress. A log that cannot be written is no reason to lose a run.
    pub(super) fn tell(&mut self, record: &StepRecord, config: &Config) {
        let written = self.log.write(record);
        if let (Err(error), false) = (&written, self.log_failed) {
            let path = log_path(&config.run.dir);
            self.progress.line(&format!("cannot write to {}: {error}. Training goes on", path.display()));
        }
        self.log_failed = written.is_err();
        self.tensorboard(|file| file.step(record));
        self.progress.step(record);
    }

    /// Passes a step's sample images on, or says why there are none.
    pub(super) fn show(&mut self, step: u64, drawn: Drawn) {
        match drawn {
            Ok((path, grid)) => self.tensorboard(|file| {
                file.image(step, "samples", (grid.width, grid.height), &std::fs::read(&path)?)
            }),
            Err(problem) => {
                self.progress.line(&format!("no sample images of step {step}: {problem}. Training goes on"));
            }
        }
    }

    /// Writes to the event file, where there is one. Training does not depend on it: at the first failure it ends.
    fn tensorboard(&mut self, write: impl FnOnce(&mut EventFile) -> std::io::Result<()>) {
        if let Some(Err(error)) = self.tensorboard.as_mut().map(write) {
            self.tensorboard = None;
            self.progress.line(&format!("no more for TensorBoard: {error}. Training goes on"));
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
