//! Saving checkpoints while training goes on.
//!
//! A save has stages, and all ranks are in the same one: each tells in the step's control word whether its part of
//! the stage is done or has failed, and the sums move all of them on at the same step. So a rank that saves slowly
//! keeps nobody waiting, and no rank takes for durable what another could not write.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use metrics::{counter, gauge, histogram};
use repa_comm::{CommError, Communicator, ReduceOp};
use serde::{Deserialize, Serialize};

use super::learner::Learner;
use super::placement::Placement;
use super::snapshot::{Report, Setting, Writer};
use super::{Owned, TrainError, resume};
use crate::checkpoint::{About, CheckpointError, Checkpoints, DataRecord, Progress, ShardRecord};
use crate::config::{CheckpointConfig, Config, Sharding};
use crate::params::Layout;
use crate::telemetry::names;
use crate::telemetry::record::{MEANS, StepRecord};

/// What ranks tell each other of the save that goes on: sums over the ranks.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Word {
    /// Ranks whose part of the stage is done.
    pub(super) done: f64,
    /// Ranks whose part has failed.
    pub(super) failed: f64,
}

/// Where a save stands; the same on all ranks.
#[derive(Debug)]
enum Stage {
    Idle,
    /// All ranks write their shards.
    Writing(Box<About>),
    /// Shards are durable; the leaders make the checkpoint complete.
    Committing(u64),
    /// The save has failed, and the leaders clear it away.
    Discarding,
}

/// What a rank has to say about its part of a stage.
#[derive(Debug, Serialize, Deserialize)]
enum Outcome {
    Shard(ShardRecord),
    Done,
    Failed { host: String, message: String },
}

/// Something that rank 0 should say.
#[derive(Debug, PartialEq)]
pub(super) enum Event {
    /// The checkpoint of this step is durable.
    Durable(u64),
    /// It is not, and why; training goes on.
    Failed(String),
}

/// Saves of one run.
#[derive(Debug)]
pub(super) struct Saver {
    config: CheckpointConfig,
    writer: Writer,
    placement: Placement,
    location: PathBuf,
    stage: Stage,
    /// What this rank has to say, once its part of the stage is done.
    outcome: Option<Outcome>,
    begun: Instant,
    failed_in_a_row: u64,
    /// The newest durable checkpoint.
    durable: Option<u64>,
    branch: Option<u64>,
    data: Option<DataRecord>,
    /// Sums of [`MEANS`] since the last save, and steps in them.
    sums: [f64; MEANS.len()],
    steps: u64,
    last_save: Instant,
    /// How long saves have kept training waiting since the last record.
    stalled: Duration,
}

impl Saver {
    /// For a rank that owns this of the optimizer's state.
    pub(super) fn new(
        config: &Config,
        checkpoints: Checkpoints,
        layout: &Arc<Layout>,
        placement: Placement,
        owned: &Owned,
        branch: Option<u64>,
        comm: &dyn Communicator,
    ) -> Result<Self, TrainError> {
        let keep = &config.checkpoint;
        let location = checkpoints.location();
        let setting = Setting {
            checkpoints,
            layout: layout.clone(),
            retention: resume::retention(config),
            metric: keep.best_metric.clone(),
            sharded: config.optimizer.sharding == Sharding::Zero1,
            place: (comm.rank(), comm.size()),
        };
        let writer = Writer::start(setting, owned)
            .map_err(|e| TrainError::Setup { what: "the checkpoint thread", problem: e.to_string() })?;
        Ok(Self {
            config: keep.clone(),
            writer,
            placement,
            location,
            stage: Stage::Idle,
            outcome: None,
            begun: Instant::now(),
            failed_in_a_row: 0,
            durable: None,
            branch,
            data: None,
            sums: [0.0; MEANS.len()],
            steps: 0,
            last_save: Instant::now(),
            stalled: Duration::ZERO,
        })
    }

    /// Takes a step into the means that checkpoints keep.
    pub(super) fn observe(&mut self, record: &StepRecord) {
        if !record.skipped {
            self.steps += 1;
            self.sums.iter_mut().zip(MEANS).for_each(|(sum, (_, value))| *sum += value(record));
        }
    }

    /// Whether the time has come for a save that is due by the clock. One rank asks, and all follow.
    pub(super) fn due_by_clock(&self) -> bool {
        let minutes = self.config.every_minutes;
        minutes > 0.0 && self.last_save.elapsed().as_secs_f64() >= 60.0 * minutes
    }

    /// How long saves have kept training waiting since the last call.
    pub(super) fn stalled(&mut self) -> Duration {
        std::mem::take(&mut self.stalled)
    }

    /// This rank's part of the control word.
    pub(super) fn word(&mut self, comm: &dyn Communicator) -> Word {
        if let Some(report) = self.writer.report() {
            self.outcome = Some(outcome(report, comm));
        }
        match &self.outcome {
            None => Word::default(),
            Some(Outcome::Failed { .. }) => Word { done: 0.0, failed: 1.0 },
            Some(_) => Word { done: 1.0, failed: 0.0 },
        }
    }

    /// Moves on by the sums of all ranks' words. Called by all ranks with the same sums.
    ///
    /// # Errors
    /// The ranks could not talk, or too many saves in a row have failed (the same on all ranks).
    pub(super) fn learn(&mut self, sums: Word, comm: &dyn Communicator) -> Result<Option<Event>, TrainError> {
        let parts = match &self.stage {
            Stage::Idle => return Ok(None),
            Stage::Writing(_) => comm.size(),
            Stage::Committing(_) | Stage::Discarding => self.placement.leaders.len(),
        };
        if sums.done + sums.failed < parts as f64 {
            return Ok(None);
        }
        let outcomes = self.gather(comm)?;
        let failure = outcomes.iter().enumerate().find_map(|(rank, outcome)| match outcome {
            Some(Outcome::Failed { host, message }) => Some(format!("rank {rank} on {host}: {message}")),
            _ => None,
        });
        let leads = self.placement.leader == comm.rank();
        match std::mem::replace(&mut self.stage, Stage::Idle) {
            Stage::Idle => Ok(None),
            Stage::Writing(about) if failure.is_none() => {
                self.stage = Stage::Committing(about.progress.step);
                if leads {
                    let shard = |outcome| match outcome {
                        Some(Outcome::Shard(record)) => Some(record),
                        _ => None,
                    };
                    self.writer.commit(*about, outcomes.into_iter().filter_map(shard).collect());
                }
                Ok(None)
            }
            Stage::Committing(step) if failure.is_none() => {
                self.failed_in_a_row = 0;
                self.durable = Some(step);
                histogram!(names::CHECKPOINT_SECONDS).record(self.begun.elapsed().as_secs_f64());
                gauge!(names::CHECKPOINT_STEP).set(step as f64);
                if let Ok(now) = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH) {
                    gauge!(names::CHECKPOINT_TIME).set(now.as_secs_f64());
                }
                if leads {
                    self.writer.prune();
                }
                Ok(Some(Event::Durable(step)))
            }
            Stage::Writing(_) | Stage::Committing(_) => {
                let failure = failure.unwrap_or_else(|| "unknown".to_owned());
                self.stage = Stage::Discarding;
                if leads {
                    self.writer.discard();
                }
                self.count(failure).map(Some)
            }
            // What could not be cleared away is in nobody's way: names of unfinished saves are never read.
            Stage::Discarding => Ok(None),
        }
    }

    fn count(&mut self, failure: String) -> Result<Event, TrainError> {
        self.failed_in_a_row += 1;
        counter!(names::FAILED_CHECKPOINTS).increment(1);
        let good = self.durable.map_or("none yet".to_owned(), |step| format!("that of step {step}"));
        if self.failed_in_a_row > self.config.max_failed {
            return Err(TrainError::Saves { count: self.failed_in_a_row, good, failure });
        }
        Ok(Event::Failed(format!(
            "a checkpoint could not be saved ({} of checkpoint.max_failed = {} in a row): {failure}. Training goes \
             on; the last good one is {good}",
            self.failed_in_a_row, self.config.max_failed
        )))
    }

    /// What every rank has to say, by rank; None where it had no part.
    fn gather(&mut self, comm: &dyn Communicator) -> Result<Vec<Option<Outcome>>, CommError> {
        let mine = serde_json::to_vec(&self.outcome.take()).expect("an outcome serialises");
        let all = comm.all_gather_bytes(&mine)?;
        Ok(all.iter().map(|bytes| serde_json::from_slice(bytes).expect("another rank's outcome")).collect())
    }

    /// Copies the state for a save, and lets training go on. Waits for the save before. Called by all ranks.
    ///
    /// # Errors
    /// As [`Saver::learn`].
    pub(super) fn save(
        &mut self,
        learner: &mut Learner,
        config: &Config,
        comm: &dyn Communicator,
    ) -> Result<Vec<Event>, TrainError> {
        let waiting = Instant::now();
        let mut events = self.drain(comm)?;
        self.begun = Instant::now();
        self.last_save = self.begun;
        self.writer.write(learner.state.step, learner.source()?);
        let state = &learner.state;
        let steps = self.steps.max(1) as f64;
        let means = MEANS.iter().zip(self.sums).map(|((name, _), sum)| ((*name).to_owned(), sum / steps));
        // What is not finite could not be read back.
        let means = means.filter(|(_, mean)| mean.is_finite());
        let metrics = if self.steps == 0 { BTreeMap::new() } else { means.collect() };
        (self.sums, self.steps) = ([0.0; MEANS.len()], 0);
        self.stage = Stage::Writing(Box::new(About {
            progress: Progress {
                step: state.step,
                samples: state.samples,
                updates: state.updates,
                scaler: state.scaler,
            },
            config: serde_json::to_value(config).expect("the configuration serialises"),
            metrics,
            branch: self.branch,
            node_local: self.placement.node_local(),
            data: self.data.clone(),
        }));
        histogram!(names::CHECKPOINT_SNAPSHOT_SECONDS).record(self.begun.elapsed().as_secs_f64());
        if !self.config.asynchronous {
            events.extend(self.drain(comm)?);
        }
        self.stalled += waiting.elapsed();
        Ok(events)
    }

    /// Waits until no save goes on. Called by all ranks.
    ///
    /// # Errors
    /// As [`Saver::learn`].
    pub(super) fn drain(&mut self, comm: &dyn Communicator) -> Result<Vec<Event>, TrainError> {
        let mut events = Vec::new();
        let mut pause = Duration::from_micros(100);
        while !matches!(self.stage, Stage::Idle) {
            let Word { done, failed } = self.word(comm);
            let mut sums = [done, failed];
            comm.all_reduce_f64(&mut sums, ReduceOp::Sum)?;
            let [done, failed] = sums;
            events.extend(self.learn(Word { done, failed }, comm)?);
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(4));
        }
        Ok(events)
    }

    /// Checks that the run's last state is durable. Called when it ends, after [`Saver::drain`].
    ///
    /// # Errors
    /// It is not.
    pub(super) fn check_durable(&self, step: u64) -> Result<(), TrainError> {
        if self.durable == Some(step) {
            return Ok(());
        }
        let good = self.durable.map_or("none".to_owned(), |step| format!("that of step {step}"));
        Err(TrainError::NotSaved { step, path: self.location.clone(), good })
    }

    /// What the run trains on.
    pub(super) fn trains_on(&mut self, data: DataRecord) {
        self.data = Some(data);
    }

    /// The state that the run goes on from is durable already.
    pub(super) fn is_durable(&mut self, step: u64) {
        self.durable = Some(step);
    }
}

fn outcome(report: Report, comm: &dyn Communicator) -> Outcome {
    let failed = |error: &CheckpointError| Outcome::Failed {
        host: comm.host().to_owned(),
        message: error.to_string(),
    };
    match report {
        Report::Written(Ok(record)) => {
            counter!(names::CHECKPOINT_BYTES).increment(record.bytes);
            Outcome::Shard(record)
        }
        Report::Committed(Ok(())) | Report::Discarded(Ok(())) => Outcome::Done,
        Report::Written(Err(error)) | Report::Committed(Err(error)) => failed(&error),
        Report::Discarded(Err(error)) => {
            tracing::warn!("what a failed save has left stays: {error}");
            failed(&error)
        }
    }
}
