//! The training loop: what every rank does, step by step.

mod backend;
pub mod bench;
mod buckets;
pub mod checkpoint_bench;
mod compute;
mod control;
mod environment;
mod error;
mod feed;
mod folder;
mod gather;
mod inputs;
#[cfg(feature = "cuda")]
mod kernels;
mod lead;
mod learner;
mod placement;
mod plan;
mod resident;
mod resume;
mod samples;
mod saver;
mod session;
mod snapshot;
mod state;
mod status;
mod stop;
pub mod telemetry_bench;
mod watch;
mod weights;

use std::sync::Arc;
use std::time::{Duration, Instant};

use repa_comm::board::Phase;
use repa_comm::{Board, Communicator, Failure, ReduceOp, RemoteError, all_or_first_error};

pub use backend::communicator;
pub use compute::{Compute, Details, LossSums, TIMESTEP_PARTS};
pub use error::TrainError;
pub use folder::{RunFolder, checkpoints, checkpoints_of, targets};
pub use inputs::Inputs;
pub(crate) use session::cuda_ordinal;
pub use session::{device, use_threads};
pub use state::{Owned, State};
pub use status::{RankLine, Status, status_path};
pub use stop::StopRequest;

use crate::config::{Config, Loaded};
use crate::exit::Outcome;
use crate::telemetry::events::EventKind;
use crate::telemetry::record::{RankRecord, StepRecord};
use crate::telemetry::set_step;
use control::Control;
use plan::Cut;
use session::Session;
use state::Skipped;

/// Trains to `train.steps`, or until a stop is asked for. Called by all ranks.
///
/// # Errors
/// The first error of the lowest failing rank, the same on all ranks.
pub fn train(
    loaded: &Loaded,
    comm: &Arc<dyn Communicator>,
    stop: &mut StopRequest,
) -> Result<Outcome, RemoteError> {
    let config = &loaded.config;
    let mut session = begin(loaded, comm.as_ref(), stop)?;
    if session.learner.state.step >= config.train.steps && !session.is_durable() {
        // Gone on from another run's checkpoint, which has all the steps already.
        end_unless_agreed(session.save(config, comm.as_ref(), stop), comm.as_ref())?;
    }
    let outcome = loop {
        if session.learner.state.step >= config.train.steps {
            break Outcome::Done;
        }
        let asked = end_unless_agreed(session.step(config, comm, stop), comm.as_ref())?;
        crate::gpu_failure::has_worked();
        let step = session.learner.state.step;
        let last = step == config.train.steps;
        end_unless_agreed(session.sample(comm.as_ref()), comm.as_ref())?;
        let due = config.checkpoint.every > 0 && step.is_multiple_of(config.checkpoint.every);
        if due || asked.save || asked.stop || last {
            end_unless_agreed(session.save(config, comm.as_ref(), stop), comm.as_ref())?;
        }
        if asked.stop && !last {
            session.note(EventKind::Stop, "asked to stop: saving");
            break Outcome::Stopped;
        }
    };
    end_unless_agreed(session.settle(comm.as_ref()), comm.as_ref())?;
    agree(comm.as_ref(), session.close(config, outcome))?;
    Ok(outcome)
}

/// An error that all ranks have together is returned; with any other, the others wait in a collective that this rank
/// will never reach.
fn end_unless_agreed<T>(result: Result<T, TrainError>, comm: &dyn Communicator) -> Result<T, RemoteError> {
    match result {
        Ok(value) => Ok(value),
        Err(error) if error.is_shared() => agree(comm, Err(error)),
        Err(error) => repa_comm::abort(i32::from(error.kind().code()), &error.to_string()),
    }
}

/// Everything up to the first step. What can fail on one rank alone is agreed on before the next
/// part, so that no rank waits for one that has given up.
fn begin(loaded: &Loaded, comm: &dyn Communicator, stop: &mut StopRequest) -> Result<Session, RemoteError> {
    let config = &loaded.config;
    let local = || -> Result<_, TrainError> {
        let device = session::open_device(config, comm)?;
        let data = feed::Data::open(config, &device)?;
        Ok((device, data))
    };
    let (device, data) = agree(comm, local())?;
    resume::same_settings(loaded, comm)?;
    resume::same_data(config, data.index(), comm)?;
    comm.set_deadline(Some(deadline(config)));
    let board = agree(comm, Board::start(comm).map_err(TrainError::from))?;
    comm.set_hierarchical(config.comm.hierarchical);
    let layout = Arc::new(config.sit().layout());
    let cut = Arc::new(Cut::new(config, &layout, comm));
    let owned = Owned::new(cut.owned.iter().cloned());
    let beginning =
        resume::begin(loaded, comm, stop, &layout, owned, &resume::of_data(config, data.index()))?;
    if let Some(folder) = &beginning.folder {
        let text = crate::generate::space::text(data.index());
        // Of use where the data are not, and no reason to end a run.
        if let Err(error) = folder.write("latents.json", &text) {
            tracing::warn!("{error}");
        }
    }
    if beginning.state.step > 0 {
        // In an earlier start.
        crate::gpu_failure::has_worked();
    }
    let session = agree(comm, Session::open(config, comm, &data, &device, layout, cut, board, beginning))?;
    agree(comm, session.announce(config, comm))?;
    Ok(session)
}

/// Seconds beyond which a time counts as for ever.
const LONGEST: f64 = 1e9;

/// How long a collective may take.
fn deadline(config: &Config) -> Duration {
    Duration::from_secs_f64(config.comm.timeout_seconds.min(LONGEST))
}

/// All ranks go on, or all end with the first error.
fn agree<T>(comm: &dyn Communicator, local: Result<T, TrainError>) -> Result<T, RemoteError> {
    let local = local.map_err(|e| Failure { message: e.to_string(), code: i32::from(e.kind().code()) });
    all_or_first_error(comm, local)
}

/// What any rank was asked to do after a step.
#[derive(Debug, Clone, Copy)]
struct Asked {
    stop: bool,
    save: bool,
}

impl Session {
    /// One optimizer step. Returns what any rank was asked to do.
    fn step(
        &mut self,
        config: &Config,
        comm: &Arc<dyn Communicator>,
        stop: &StopRequest,
    ) -> Result<Asked, TrainError> {
        let started = Instant::now();
        let coefficient = config.alignment.coefficient_after(self.learner.state.step);
        comm.set_step(self.learner.state.step + 1);
        set_step(self.learner.state.step + 1);
        self.board.publish_step(self.learner.state.step + 1);
        self.board.publish_phase(Phase::WaitingForData);
        let (batch, data_wait) = self.feed.next()?;

        self.board.publish_phase(Phase::Computing);
        let computing = Instant::now();
        let scale = self.learner.state.loss_scale(config);
        let before = comm.traffic();
        let mut pass = self.learner.pass(&batch, config, comm)?;
        let (losses, details, waited) = (pass.losses, std::mem::take(&mut pass.details), pass.waited);
        let compute = computing.elapsed() - waited;

        // What is left of the sums when the backward pass is done: the exposed part of communication.
        self.board.publish_phase(Phase::Communicating);
        let talking = Instant::now();
        let sums = self.learner.sum(pass, comm.as_ref())?;
        let flag = |asked: bool| f64::from(u8::from(asked));
        let mine = Control {
            denoising: losses.denoising,
            alignment: losses.alignment,
            stop: flag(stop.requested()),
            save: flag(comm.rank() == 0 && (stop.save_requested() || self.saver.due_by_clock())),
            saving: self.saver.word(comm.as_ref()),
        };
        let (control, norm) = control::agree(mine, sums.squared, scale, comm.as_ref())?;
        let exposed = talking.elapsed();

        self.board.publish_phase(Phase::Optimizing);
        let optimizing = Instant::now();
        let learning_rate = self.learner.state.learning_rate(config);
        let (skipped, waited_after) = self.learner.step(norm, config, comm.as_ref())?;
        let waited = waited + waited_after;
        self.count_skips(config, comm.as_ref(), skipped, sums.finite)?;
        let optimizer = optimizing.elapsed() - waited_after;

        // Own work: what other ranks keep this one waiting for would make all alike.
        self.board.publish_step_time(started.elapsed().saturating_sub(exposed + waited));
        self.board.publish_phase(Phase::Idle);
        let after = comm.traffic();
        let samples = config.train.global_batch as f64;
        let (denoising, alignment) = (control.denoising / samples, control.alignment / samples);
        let seconds = started.elapsed().as_secs_f64();
        let record = StepRecord {
            step: self.learner.state.step,
            loss: denoising + coefficient * alignment,
            denoising_loss: denoising,
            alignment_loss: alignment,
            grad_norm: norm,
            skipped: skipped.is_some(),
            learning_rate,
            images_per_second: samples / seconds,
            step_seconds: seconds,
            data_wait_seconds: data_wait.as_secs_f64(),
            compute_seconds: compute.as_secs_f64(),
            communication_seconds: (exposed + waited).as_secs_f64(),
            communication_busy_seconds: (after.busy - before.busy).as_secs_f64(),
            optimizer_seconds: optimizer.as_secs_f64(),
            snapshot_seconds: self.saver.stalled().as_secs_f64(),
        };
        self.saver.observe(&record);
        let rank = RankRecord {
            images: batch.len() as u64,
            communicated: after.bytes - before.bytes,
            details,
            loss_scale: config.train.precision.needs_loss_scaling().then_some(f64::from(scale)),
            has_aligned: coefficient > 0.0,
        };
        self.tell(&record.rounded(), &rank, config)?;
        self.feed.recycle(batch);
        if let Some(event) = self.saver.learn(control.saving, comm.as_ref())? {
            self.say(&event);
        }
        Ok(Asked { stop: control.stop > 0.0, save: control.save > 0.0 })
    }

    /// Ends the run after too many steps in a row whose gradient was not finite for no good reason.
    fn count_skips(
        &mut self,
        config: &Config,
        comm: &dyn Communicator,
        skipped: Option<Skipped>,
        own_is_finite: bool,
    ) -> Result<(), TrainError> {
        if skipped != Some(Skipped::NotFinite) {
            self.skipped_in_a_row = 0;
            return Ok(());
        }
        let text = "the gradient norm is not finite: the step is left out";
        self.note(EventKind::Skipped, text);
        if self.skipped_in_a_row == 0 {
            let mine = if own_is_finite { comm.size() } else { comm.rank() };
            let mut lowest = [mine as i64];
            comm.all_reduce_i64(&mut lowest, ReduceOp::Min)?;
            self.first_skipped = (self.learner.state.step, lowest[0] as usize);
        }
        self.skipped_in_a_row += 1;
        if self.skipped_in_a_row < config.train.max_skipped_steps {
            return Ok(());
        }
        let (step, rank) = self.first_skipped;
        Err(TrainError::NotFinite {
            count: self.skipped_in_a_row,
            step,
            first_sample: (step - 1) * config.train.global_batch as u64,
            rank,
        })
    }
}
