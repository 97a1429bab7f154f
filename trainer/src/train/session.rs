//! What a rank holds while it trains, how it comes by it, and how it is put away.

use std::sync::Arc;
use std::time::Instant;

#[cfg(any(feature = "cuda", feature = "wgpu"))]
use burn_std::config::{BurnConfig, RuntimeConfig};
use metrics::{gauge, histogram};
use repa_comm::board::Phase;
use repa_comm::{Board, Communicator};

use super::feed::{Data, Feed};
use super::folder;
use super::lead::Lead;
use super::learner::Learner;
use super::plan::Cut;
use super::resume::Beginning;
use super::samples::Samples;
use super::saver::{Event, Saver};
use super::{StopRequest, TrainError};
use crate::Device;
use crate::config::{Config, ConfigError, Loaded};
use crate::data::loader::LoaderPlan;
use crate::exit::Outcome;
use crate::gpu_failure;
use crate::params::Layout;
use crate::telemetry::events::EventKind;
use crate::telemetry::exporter::{self, Exporter, Identity};
use crate::telemetry::names;
use crate::telemetry::record::{Facts, RankRecord, StepRecord};

/// One rank's part of a run.
pub(super) struct Session {
    pub(super) learner: Learner,
    pub(super) feed: Feed,
    pub(super) saver: Saver,
    pub(super) board: Arc<Board>,
    pub(super) skipped_in_a_row: u64,
    /// Step and lowest rank at which the present row of skipped steps began.
    pub(super) first_skipped: (u64, usize),
    samples: Option<Samples>,
    exporter: Option<Exporter>,
    facts: Facts,
    /// What to say of how the run began.
    said: Vec<String>,
    /// What only rank 0 has.
    lead: Option<Lead>,
    /// Of the checkpoints' folder, where it has one of its own.
    _lock: Option<std::fs::File>,
}

/// Steps between looks at the weights' norm.
const NORM_EVERY: u64 = 50;

impl Session {
    /// Sets up a rank.
    #[expect(clippy::too_many_arguments, reason = "one call site, and a struct would only rename them")]
    pub(super) fn open(
        config: &Config,
        comm: &dyn Communicator,
        data: &Data,
        device: &Device,
        layout: Arc<Layout>,
        cut: Arc<Cut>,
        board: Arc<Board>,
        beginning: Beginning,
    ) -> Result<Self, TrainError> {
        let Beginning { folder, checkpoints, lock, placement, state, branch, durable, mut said } = beginning;
        let plan = LoaderPlan {
            seed: config.train.seed,
            start_sample: state.samples,
            global_batch: config.train.global_batch,
            rank: comm.rank(),
            world: comm.size(),
            queue_depth: config.data.queue_depth,
            threads: config.data.threads,
            label_drop: config.objective.label_drop,
            flip: config.data.flip,
            features: !config.alignment.z_dims.is_empty(),
            ..LoaderPlan::default()
        };
        let exporter = match config.telemetry.metrics || !config.telemetry.push_url.is_empty() {
            true => Some(exporter::start(&config.telemetry, &identity(config, comm))?),
            false => None,
        };
        let lead = folder
            .map(|folder| {
                let lead =
                    Lead::open(config, folder, checkpoints.local_folder(), &board, state.step, comm.host())?;
                if durable {
                    lead.watch.durable(state.step);
                }
                Ok::<_, TrainError>(lead)
            })
            .transpose()?;
        let mut saver = Saver::new(config, checkpoints, &layout, placement, &state.owned, branch, comm)?;
        if durable {
            saver.is_durable(state.step);
        }
        saver.trains_on(super::resume::of_data(config, data.index()));
        Ok(Self {
            feed: data.feed(plan)?,
            skipped_in_a_row: 0,
            first_skipped: (0, 0),
            samples: Samples::open(config, data.index(), &layout, device, &mut said)?,
            learner: Learner::new(config, state, cut, layout, data.index(), device),
            saver,
            board,
            exporter,
            facts: facts(config),
            said,
            lead,
            _lock: lock,
        })
    }

    /// Says what begins, and publishes where the metrics are. Called by all ranks.
    pub(super) fn announce(&self, config: &Config, comm: &dyn Communicator) -> Result<(), TrainError> {
        let mine = self.exporter.as_ref().map_or_else(String::new, Exporter::told);
        let gathered = comm.all_gather_bytes(mine.as_bytes())?;
        let told: Vec<String> =
            gathered.iter().map(|bytes| String::from_utf8_lossy(bytes).into_owned()).collect();
        if let Some(exporter) = &self.exporter {
            exporter.learn(&told, comm.topology());
        }
        let addresses = exporter::addresses(&told);
        let Some(lead) = &self.lead else { return Ok(()) };
        let targets = folder::targets(&config.run.dir);
        lead.targets(config, &addresses)?;
        let millions = self.learner.layout.total_len() as f64 / 1e6;
        let topology = comm.topology();
        let plural = |n: usize, what: &str| if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") };
        let say = |text: String| lead.progress.line(&text);
        let ranks = format!(
            "{} on {} ({}), {} each, {}",
            plural(topology.size, "rank"),
            plural(topology.nodes, "host"),
            comm.describe(),
            plural(rayon::current_num_threads(), "thread"),
            config.device.0,
        );
        say(format!("repa-dist {}: {millions:.2} M parameters, {ranks}", env!("CARGO_PKG_VERSION")));
        let from = if self.learner.state.step == 0 { "from the beginning" } else { "from a checkpoint" };
        self.note(EventKind::Start, &format!("{from}: {ranks}"));
        if let Some(first) = addresses.first() {
            let whose = if config.telemetry.node_port == 0 { "rank 0" } else { "all of rank 0's host" };
            say(format!("metrics: http://{first}/metrics ({whose}); all addresses in {}", targets.display()));
        }
        match self.learner.state.step {
            0 => say(format!("run: {}, {} steps", config.run.dir.display(), config.train.steps)),
            step => say(format!(
                "run: {}, going on from step {step} to {}",
                config.run.dir.display(),
                config.train.steps
            )),
        }
        self.said.iter().cloned().for_each(say);
        Ok(())
    }

    /// Passes a step on to metrics, log and progress.
    pub(super) fn tell(
        &mut self,
        record: &StepRecord,
        rank: &RankRecord,
        run: &Config,
    ) -> Result<(), TrainError> {
        record.publish(rank, &self.facts);
        // A pass over all weights: seldom, and by one rank.
        if self.lead.is_some() && (record.step == 1 || record.step.is_multiple_of(NORM_EVERY)) {
            gauge!(names::PARAMETER_NORM).set(self.learner.parameter_norm()?);
        }
        if let Some(lead) = &mut self.lead {
            lead.tell(record, run);
        }
        Ok(())
    }

    /// Draws a grid of sample images, if one is due after this step. Called by all ranks. Comes before the step's save,
    /// so that a run that goes on from there has no grid to make up for.
    pub(super) fn sample(&mut self, comm: &dyn Communicator) -> Result<(), TrainError> {
        let step = self.learner.state.step;
        let Some(samples) = self.samples.as_ref().filter(|samples| samples.due(step)) else { return Ok(()) };
        let begun = Instant::now();
        self.board.publish_phase(Phase::Sampling);
        let average = self.learner.average(comm)?;
        let drawn = gpu_failure::between_steps(samples.config(), || samples.draw(&average, step, comm))?;
        if let (Some(lead), Some(drawn)) = (&mut self.lead, drawn) {
            lead.show(step, drawn);
        }
        histogram!(names::SAMPLING_SECONDS).record(begun.elapsed().as_secs_f64());
        self.board.publish_phase(Phase::Idle);
        Ok(())
    }

    /// Saves the state as it is now, while training goes on.
    pub(super) fn save(
        &mut self,
        config: &Config,
        comm: &dyn Communicator,
        stop: &StopRequest,
    ) -> Result<(), TrainError> {
        if let Err(error) = stop.save_begun() {
            tracing::warn!("cannot remove the file SAVE, so that every step will save: {error}");
        }
        self.board.publish_phase(Phase::Saving);
        let events = self.saver.save(&mut self.learner, config, comm)?;
        self.board.publish_phase(Phase::Idle);
        events.iter().for_each(|event| self.say(event));
        Ok(())
    }

    /// Whether this state is a durable checkpoint of the run.
    pub(super) fn is_durable(&self) -> bool {
        self.saver.check_durable(self.learner.state.step).is_ok()
    }

    /// Waits for the last save, which has to be this state's.
    pub(super) fn settle(&mut self, comm: &dyn Communicator) -> Result<(), TrainError> {
        self.board.publish_phase(Phase::Saving);
        let events = self.saver.drain(comm)?;
        events.iter().for_each(|event| self.say(event));
        self.saver.check_durable(self.learner.state.step)
    }

    /// Says what has become of a save, on rank 0.
    pub(super) fn say(&self, event: &Event) {
        match (&self.lead, event) {
            (Some(lead), Event::Failed(failure)) => {
                lead.progress.line(failure);
                self.note(EventKind::SaveFailed, failure);
            }
            (Some(lead), Event::Durable(step)) => {
                lead.watch.durable(*step);
                self.note(EventKind::Durable, &format!("the checkpoint of step {step} is durable"));
            }
            (None, _) => {}
        }
    }

    /// Adds to the run's events, on rank 0.
    pub(super) fn note(&self, kind: EventKind, text: &str) {
        if let Some(lead) = &self.lead {
            lead.events.tell(kind, self.learner.state.step, text);
        }
    }

    /// Ends the rank's part: pushes the last metrics, empties the target file and lets go of the folder.
    pub(super) fn close(mut self, config: &Config, outcome: Outcome) -> Result<(), TrainError> {
        let text = match outcome {
            Outcome::Done => "all steps are done",
            Outcome::Stopped => "stopped on request, with a durable checkpoint",
        };
        self.note(EventKind::End, text);
        if let Some(exporter) = &mut self.exporter {
            exporter.finish();
        }
        let Some(lead) = self.lead else { return Ok(()) };
        // Not worth the failure of a run that is done.
        if let Err(error) = lead.targets(config, &[]) {
            tracing::warn!("{error}");
        }
        lead.progress.finish();
        Ok(())
    }
}

/// The device of a rank. On the CPU, sets the number of threads as well.
pub(super) fn open_device(config: &Config, comm: &dyn Communicator) -> Result<Device, TrainError> {
    let threads = match config.train.threads {
        0 => comm.topology().threads_per_rank(),
        threads => threads,
    };
    use_threads(threads)?;
    if !config.device.is_cpu() {
        gpu_failure::training(config, comm.size());
    }
    device(&config.device.0, comm.local_rank())
}

/// Sets the number of threads of this process, once.
pub fn use_threads(threads: usize) -> Result<(), TrainError> {
    // A second call comes from tests that train more than once in a process.
    match rayon::ThreadPoolBuilder::new().num_threads(threads).build_global() {
        Ok(()) => Ok(()),
        Err(_) if rayon::current_num_threads() == threads => Ok(()),
        Err(e) => Err(TrainError::Setup { what: "threads", problem: e.to_string() }),
    }
}

/// A device by its configured name.
///
/// # Errors
/// The name is not known, or this build or host has no such device.
pub fn device(name: &str, local_rank: usize) -> Result<Device, TrainError> {
    if name == "cpu" {
        return Ok(Device::flex());
    }
    if name == "wgpu" {
        return wgpu_device();
    }
    #[cfg(feature = "cuda")]
    super::kernels::keep(local_rank);
    cuda_device(name, cuda_ordinal(name, local_rank))
}

/// The number of a rank's GPU among those that it sees: the one that the configuration names, or else the local rank's.
/// Where a rank sees one GPU alone (`srun --gpus-per-task=1`), that is its own.
#[cfg(feature = "cuda")]
pub(crate) fn cuda_ordinal(name: &str, local_rank: usize) -> usize {
    let own = || if repa_comm::nccl::visible_gpus() == 1 { 0 } else { local_rank };
    crate::config::cuda_index(name).unwrap_or_else(own)
}

#[cfg(not(feature = "cuda"))]
pub(crate) fn cuda_ordinal(name: &str, local_rank: usize) -> usize {
    crate::config::cuda_index(name).unwrap_or(local_rank)
}

/// Has burn's fusion take operations in the program's order. By default it follows up to five unrelated chains at once:
/// more kernels, and in some blocks GELU's 19 operations on the widest tensors ran one by one (BENCHMARKS.md).
#[cfg(any(feature = "cuda", feature = "wgpu"))]
fn fuse_in_order() {
    let in_order = serde_json::json!({ "fusion": { "beam_search": { "max_blocks": 1 } } });
    let config: BurnConfig = serde_json::from_value(in_order).expect("what else there is has defaults");
    // The first device of the process sets it.
    BurnConfig::try_set(config.override_from_env());
}

#[cfg(feature = "wgpu")]
#[expect(clippy::unnecessary_wraps, reason = "a build without it has an error to tell")]
fn wgpu_device() -> Result<Device, TrainError> {
    fuse_in_order();
    Ok(Device::wgpu(burn::tensor::DeviceKind::DefaultDevice))
}

#[cfg(not(feature = "wgpu"))]
fn wgpu_device() -> Result<Device, TrainError> {
    let problem = "this binary was built without it: build it with `cargo build --release --features wgpu`, or use \
                   device=cpu";
    Err(ConfigError::value("device", "wgpu", problem).into())
}

#[cfg(feature = "cuda")]
fn cuda_device(name: &str, index: usize) -> Result<Device, TrainError> {
    // SAFETY: looking for the driver library runs its initialisers, as burn would; burn itself panics
    // where it is missing.
    if unsafe { cudarc::driver::sys::is_culib_present() } {
        fuse_in_order();
        Ok(Device::cuda(index))
    } else {
        Err(ConfigError::value(
            "device",
            name,
            "this host has no NVIDIA driver (libcuda.so.1); use device=cpu",
        )
        .into())
    }
}

#[cfg(not(feature = "cuda"))]
fn cuda_device(name: &str, _index: usize) -> Result<Device, TrainError> {
    Err(ConfigError::value(
        "device",
        name,
        "this binary was built without CUDA: build it with `cargo build --release --features cuda`, or use device=cpu",
    )
    .into())
}

/// What does not change during a run, and metrics follow from.
pub(super) fn facts(config: &Config) -> Facts {
    let sit = config.sit();
    Facts {
        steps: config.train.steps,
        tokens_per_image: sit.tokens() as u64,
        flops_per_image: sit.training_flops() as f64,
        peak_flops: config.telemetry.peak_tflops * 1e12,
        ema_decay: config.optimizer.ema_decay,
    }
}

/// Who a rank is, for its metrics.
pub(super) fn identity(config: &Config, comm: &dyn Communicator) -> Identity {
    let dir = &config.run.dir;
    let run = dir.file_name().map_or_else(|| dir.display().to_string(), |n| n.to_string_lossy().into_owned());
    let model = match config.model.preset.as_str() {
        "" => format!("SiT {}x{}", config.model.depth, config.model.hidden_size),
        preset => preset.to_owned(),
    };
    Identity {
        rank: comm.rank(),
        local_rank: comm.local_rank(),
        world_size: comm.size(),
        host: comm.host().to_owned(),
        device: config.device.0.clone(),
        run,
        model,
        job_id: ["SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID"]
            .iter()
            .find_map(|name| std::env::var(name).ok())
            .unwrap_or_default(),
        restarts: ["REPA_RESTARTS", "SLURM_RESTART_COUNT"]
            .iter()
            .find_map(|name| std::env::var(name).ok()?.parse().ok())
            .unwrap_or(0),
    }
}

/// The merged configuration as the run folder keeps it: TOML, with the origin of each value.
pub(super) fn config_text(loaded: &Loaded) -> String {
    loaded.entries().iter().map(|(key, value, origin)| format!("{key} = {value}  # {origin}\n")).collect()
}
