//! The figures of `repa-dist bench step`: how long steps take on random data, without reading or saving any.

use std::sync::Arc;
use std::time::{Duration, Instant};

use half::f16;
use repa_comm::{Communicator, ReduceOp};
use serde::Serialize;

use super::control::{self, Control};
use super::learner::Learner;
use super::plan::Cut;
use super::saver::{self, Event, Saver};
use super::{LossSums, Owned, State, TrainError, session};
use crate::config::Config;
use crate::data::batch::rank_samples;
use crate::data::bench::{imagenet_spec, peak_memory};
use crate::data::draws::{Draws, Purpose};
use crate::data::loader::Batch;
use crate::data::store::{EncoderSpec, Index, Normalisation, StoreSpec};

/// Steps before the clock starts.
const WARM_UP: usize = 2;

/// What was measured; times are medians over the steps, of the slowest rank.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepBench {
    /// Number of ranks.
    pub ranks: usize,
    /// Parameters of the model, projectors included.
    pub parameters: usize,
    /// Samples of a step, over all ranks.
    pub global_batch: usize,
    /// Steps that were timed.
    pub steps: usize,
    /// Seconds of a step.
    pub step_seconds: f64,
    /// Of which forward and backward pass.
    pub compute_seconds: f64,
    /// Of which collectives that nothing hid, waiting for other ranks included.
    pub exposed_communication_seconds: f64,
    /// Of which clipping, AdamW and EMA.
    pub optimizer_seconds: f64,
    /// Samples a second, over all ranks.
    pub images_per_second: f64,
    /// Against steps of ranks that train by themselves, where that was asked for.
    pub alone: Option<Alone>,
    /// Largest resident memory of a rank so far, in bytes, of the rank that has most; 0 where the system does
    /// not say. The first step that is timed has reached it.
    pub peak_memory_bytes: u64,
}

/// Steps of ranks that train by themselves on as many samples each, all at the same time, so that what they share of a
/// machine besides the network is shared in both. They take turns with the steps together.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Alone {
    /// Seconds of a step, of the slowest rank.
    pub step_seconds: f64,
    /// Weak scaling: that time over the time of the step together that came after it; the median over the steps.
    pub scaling: f64,
}

/// Times `steps` steps of a configuration, on all ranks; in turns with as many by which each rank trains by itself, if
/// `alone`.
///
/// # Errors
/// The device cannot be used, or the ranks cannot talk.
pub fn run(
    config: &Config,
    comm: &Arc<dyn Communicator>,
    steps: usize,
    alone: bool,
) -> Result<StepBench, TrainError> {
    let mut stepper = Stepper::new(config, comm)?;
    let mut single = if alone { Some(Single::of(config, comm.as_ref())?) } else { None };
    let (mut times, mut alone): ([Vec<f64>; 4], Vec<f64>) = Default::default();
    for _ in 0..WARM_UP + steps {
        if let Some(single) = &mut single {
            comm.barrier()?;
            alone.push(single.step()?);
        }
        comm.barrier()?;
        let (parts, _) = stepper.step(config, comm, saver::Word::default())?;
        for (list, time) in times.iter_mut().zip(parts) {
            list.push(time.as_secs_f64());
        }
    }
    let mut medians = times.each_ref().map(|list| median(list[WARM_UP..].to_vec()));
    comm.all_reduce_f64(&mut medians, ReduceOp::Max)?;
    let mut together = std::mem::take(&mut times[0]);
    comm.all_reduce_f64(&mut together, ReduceOp::Max)?;
    comm.all_reduce_f64(&mut alone, ReduceOp::Max)?;
    let alone = single.map(|_| {
        let ratios = alone.iter().zip(&together).skip(WARM_UP).map(|(alone, together)| alone / together);
        Alone { scaling: median(ratios.collect()), step_seconds: median(alone[WARM_UP..].to_vec()) }
    });
    let mut peak = [peak_memory().and_then(|bytes| i64::try_from(bytes).ok()).unwrap_or(0)];
    comm.all_reduce_i64(&mut peak, ReduceOp::Max)?;
    let [step_seconds, compute_seconds, exposed, optimizer_seconds] = medians;
    Ok(StepBench {
        ranks: comm.size(),
        parameters: stepper.learner.layout.total_len(),
        global_batch: config.train.global_batch,
        steps,
        step_seconds,
        compute_seconds,
        exposed_communication_seconds: exposed,
        optimizer_seconds,
        images_per_second: config.train.global_batch as f64 / step_seconds,
        alone,
        peak_memory_bytes: peak[0].unsigned_abs(),
    })
}

/// The middle one of some times, of which there is one at least.
pub(super) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A run of one rank, beside the one of all.
struct Single {
    config: Config,
    comm: Arc<dyn Communicator>,
    stepper: Stepper,
}

impl Single {
    /// With this rank's share of the batch, and its threads.
    fn of(config: &Config, comm: &dyn Communicator) -> Result<Self, TrainError> {
        let mut config = config.clone();
        let samples = rank_samples(0, config.train.global_batch, comm.rank(), comm.size());
        config.train.global_batch = ((samples.end - samples.start) as usize).max(1);
        config.train.threads = rayon::current_num_threads();
        let comm: Arc<dyn Communicator> = Arc::new(repa_comm::Single::new());
        let stepper = Stepper::new(&config, &comm)?;
        Ok(Self { config, comm, stepper })
    }

    /// Seconds of a step.
    fn step(&mut self) -> Result<f64, TrainError> {
        let (parts, _) = self.stepper.step(&self.config, &self.comm, saver::Word::default())?;
        Ok(parts[0].as_secs_f64())
    }
}

/// What it takes to train on random data.
pub(super) struct Stepper {
    pub(super) learner: Learner,
    batch: Batch,
}

impl Stepper {
    pub(super) fn new(config: &Config, comm: &Arc<dyn Communicator>) -> Result<Self, TrainError> {
        let device = session::open_device(config, comm.as_ref())?;
        let layout = Arc::new(config.sit().layout());
        let index = index(config);
        comm.set_hierarchical(config.comm.hierarchical);
        let cut = Arc::new(Cut::new(config, &layout, comm.as_ref()));
        let state = State::new(&layout, config.train.seed, Owned::new(cut.owned.iter().cloned()));
        let batch = batch(config, &index, comm.as_ref());
        Ok(Self { learner: Learner::new(config, state, cut, layout, &index, &device), batch })
    }

    /// One step, with what there is to tell of a save. Gives the times of the whole, of the backward pass, of exposed
    /// communication and of the optimizer, and what all ranks told.
    pub(super) fn step(
        &mut self,
        config: &Config,
        comm: &Arc<dyn Communicator>,
        saving: saver::Word,
    ) -> Result<([Duration; 4], Control), TrainError> {
        let begin = Instant::now();
        let scale = self.learner.state.loss_scale(config);
        let pass = self.learner.pass(&self.batch, config, comm)?;
        let waited = pass.waited;
        let computed = begin.elapsed();
        let LossSums { denoising, alignment } = pass.losses;
        let sums = self.learner.sum(pass, comm.as_ref())?;
        let mine = Control { denoising, alignment, saving, ..Control::default() };
        let (control, norm) = control::agree(mine, sums.squared, scale, comm.as_ref())?;
        let summed = begin.elapsed();
        let (_, waited_after) = self.learner.step(norm, config, comm.as_ref())?;
        let all = begin.elapsed();
        let exposed = summed - computed + waited + waited_after;
        Ok(([all, computed - waited, exposed, all - summed - waited_after], control))
    }

    /// One step of a run that saves. Gives whether a checkpoint has become durable.
    pub(super) fn step_saving(
        &mut self,
        config: &Config,
        comm: &Arc<dyn Communicator>,
        saver: &mut Saver,
    ) -> Result<bool, TrainError> {
        let word = saver.word(comm.as_ref());
        let (_, control) = self.step(config, comm, word)?;
        let event = saver.learn(control.saving, comm.as_ref())?;
        Ok(matches!(event, Some(Event::Durable(_))))
    }
}

/// Data that the configuration's model fits.
pub(super) fn index(config: &Config) -> Index {
    let sit = config.sit();
    let encoder = |(i, &dim): (usize, &usize)| EncoderSpec { id: i.to_string(), tokens: sit.tokens(), dim };
    let spec = StoreSpec {
        channels: sit.in_channels,
        height: sit.input_size,
        width: sit.input_size,
        classes: sit.num_classes,
        encoders: sit.z_dims.iter().enumerate().map(encoder).collect(),
        ..imagenet_spec(false)
    };
    let normalisation = Normalisation::uniform(sit.in_channels, 1.0);
    Index::in_place(spec, 1, normalisation)
}

/// This rank's part of a batch of random numbers.
pub(super) fn batch(config: &Config, index: &Index, comm: &dyn Communicator) -> Batch {
    let contents = &index.contents;
    let samples = rank_samples(0, config.train.global_batch, comm.rank(), comm.size());
    let count = (samples.end - samples.start) as usize;
    let draws = Draws::new(config.train.seed, Purpose::Noise);
    let normal = |number: u64, len: usize| {
        let mut values = vec![0.0f32; len];
        draws.normal(samples.start * 8 + number, &mut values);
        values
    };
    let latent = count * contents.latent_len();
    let features = contents
        .encoders
        .iter()
        .map(|e| normal(3, count * e.tokens * e.dim).into_iter().map(f16::from_f32).collect())
        .collect();
    Batch {
        indices: vec![0; count],
        latents: normal(0, count * contents.stored_len()).into_iter().map(f32::abs).collect(),
        posterior_eps: normal(1, latent),
        noise: normal(2, latent),
        time_uniform: (0..count).map(|i| (i as f32 + 0.5) / count as f32).collect(),
        time_normal: vec![0.0; count],
        labels: vec![0; count],
        labels_original: vec![0; count],
        features,
        samples,
        ..Batch::default()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A model that takes milliseconds.
    pub(in crate::train) fn small() -> Config {
        let mut config = Config::default();
        config.model.input_size = 8;
        config.model.hidden_size = 32;
        config.model.depth = 2;
        config.model.num_heads = 2;
        config.alignment.encoder_depth = 1;
        config.alignment.projector_dim = 16;
        config.alignment.z_dims = vec![12];
        config.train.global_batch = 4;
        config.train.threads = 1;
        config
    }

    #[test]
    fn steps_are_timed_and_the_parts_make_the_whole() {
        let config = small();
        let comm: Arc<dyn Communicator> = Arc::new(repa_comm::Single::new());
        let figures = run(&config, &comm, 5, true).unwrap();
        let alone = figures.alone.as_ref().unwrap();
        assert!(alone.step_seconds > 0.0 && (0.2..5.0).contains(&alone.scaling), "{alone:?}");
        assert_eq!(run(&config, &comm, 1, false).unwrap().alone, None);
        let parts =
            figures.compute_seconds + figures.exposed_communication_seconds + figures.optimizer_seconds;
        // Medians of parts do not add up to the median of the whole, but nearly.
        assert!(parts > 0.5 * figures.step_seconds && parts < 2.0 * figures.step_seconds, "{figures:?}");
        assert_eq!((figures.ranks, figures.steps, figures.global_batch), (1, 5, 4));
        assert!(figures.peak_memory_bytes > 1 << 20, "{figures:?}");
    }
}
