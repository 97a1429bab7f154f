//! What a rank learns with: the run's state, the model, and the gradients, on the host or on a GPU.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use repa_comm::{CommError, Communicator};

use super::buckets::{self, Gradients};
use super::plan::Cut;
use super::resident::{self, Resident};
use super::snapshot::Source;
use super::state::Skipped;
use super::weights::{Travelling, Weights};
use super::{Compute, Details, LossSums, State};
use crate::Device;
use crate::config::Config;
use crate::data::loader::Batch;
use crate::data::store::Index;
use crate::flat;
use crate::ops::GradientSink;
use crate::optim::{global_norm, squared_norm_of};
use crate::params::Layout;

/// One rank's weights, optimizer state and gradients, and how they are computed.
pub(super) struct Learner {
    pub(super) layout: Arc<Layout>,
    pub(super) state: State,
    pub(super) cut: Arc<Cut>,
    compute: Compute,
    place: Place,
}

/// Where the state's arrays and the gradients are.
enum Place {
    Host(Host),
    Gpu(Resident),
}

struct Host {
    gradients: Gradients,
    /// New weights that other ranks send.
    travelling: Travelling,
}

/// Gradients on their way from a backward pass.
enum Collector {
    Host(Arc<buckets::Collector>),
    Gpu(Arc<resident::Collector>),
}

/// A forward and backward pass that has been made, or on a GPU been put in its queue, and whose gradients are on
/// their way between the ranks.
pub(super) struct Pass {
    pub(super) losses: LossSums,
    pub(super) details: Details,
    /// How long the pass waited for weights that other ranks had moved.
    pub(super) waited: Duration,
    collector: Collector,
}

/// What is known of a step's gradients once they are summed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sums {
    /// This rank's part of the sum of squares: over all ranks they add up to the squared norm.
    pub(super) squared: f64,
    /// Whether the rank's own gradients are all finite.
    pub(super) finite: bool,
}

impl Learner {
    /// Learns on `device` from `state` on, from a store with this index.
    pub(super) fn new(
        config: &Config,
        mut state: State,
        cut: Arc<Cut>,
        layout: Arc<Layout>,
        index: &Index,
        device: &Device,
    ) -> Self {
        let place = match config.device.is_cpu() {
            true => Place::Host(Host { gradients: Gradients::new(cut.clone()), travelling: Vec::new() }),
            false => Place::Gpu(Resident::new(&mut state, &layout, &cut, device)),
        };
        Self { compute: Compute::new(config, index, device), layout, state, cut, place }
    }

    /// The forward and backward pass of a batch. A part of the model waits for its weights where other ranks have moved
    /// them and they are still on their way.
    ///
    /// # Errors
    /// The ranks could not talk.
    pub(super) fn pass(
        &mut self,
        batch: &Batch,
        config: &Config,
        comm: &Arc<dyn Communicator>,
    ) -> Result<Pass, CommError> {
        let of_step = (self.state.step, self.state.loss_scale(config));
        let Self { layout, state, cut, compute, place } = self;
        match place {
            Place::Host(host) => {
                let params = std::mem::replace(&mut state.params, flat::zeros(0));
                let travelling = std::mem::take(&mut host.travelling);
                let weights = Arc::new(Weights::new(cut, params, travelling, host.gradients.take()));
                let collector = Arc::new(buckets::Collector::new(cut, &weights, comm));
                let sink: Arc<dyn GradientSink> = collector.clone();
                let params = weights.params(layout, compute.device());
                let (losses, mut details) = compute.gradients(&params, batch, of_step, &sink);
                let (params, waited) = weights.finish()?;
                state.params = params;
                details.forward = details.forward.saturating_sub(waited);
                Ok(Pass { losses, details, waited, collector: Collector::Host(collector) })
            }
            Place::Gpu(resident) => {
                let collector = resident.collect(comm);
                let sink: Arc<dyn GradientSink> = collector.clone();
                let (losses, mut details) = compute.gradients(&resident.params(), batch, of_step, &sink);
                let waited = resident.settle()?;
                details.forward = details.forward.saturating_sub(waited);
                Ok(Pass { losses, details, waited, collector: Collector::Gpu(collector) })
            }
        }
    }

    /// Waits for the sums of a pass's gradients over the ranks.
    ///
    /// # Errors
    /// The ranks could not talk.
    pub(super) fn sum(&mut self, pass: Pass, comm: &dyn Communicator) -> Result<Sums, CommError> {
        let (squared, finite) = match (&mut self.place, pass.collector) {
            (Place::Host(host), Collector::Host(collector)) => {
                let finite = collector.finish(&mut host.gradients)?;
                (squared_norm_of(host.gradients.pieces()), finite)
            }
            (Place::Gpu(resident), Collector::Gpu(collector)) => resident.sum(&collector)?,
            _ => unreachable!("a pass of another learner"),
        };
        // Where all ranks have all sums, one of them is enough, and no order of additions differs from a single rank's.
        let counts = self.cut.exchange.sharded || comm.rank() == 0;
        Ok(Sums { squared: if counts { squared } else { 0.0 }, finite })
    }

    /// Takes the step by summed gradients of this norm, or leaves it out and says why. With a sharded optimizer the other
    /// ranks' new weights are still on their way when it returns; without overlap it waits for them, for as long as the
    /// second value says.
    ///
    /// # Errors
    /// The ranks could not talk.
    pub(super) fn step(
        &mut self,
        norm: f64,
        config: &Config,
        comm: &dyn Communicator,
    ) -> Result<(Option<Skipped>, Duration), CommError> {
        let update = match self.state.begin(config, norm) {
            Ok(update) => update,
            Err(skipped) => return Ok((Some(skipped), Duration::ZERO)),
        };
        match &mut self.place {
            Place::Host(host) => {
                host.travelling = host.gradients.apply(&update, &mut self.state, comm);
                self.state.average(&update);
            }
            Place::Gpu(resident) => resident.step(&update, comm),
        }
        let waited = if self.cut.exchange.overlap { Duration::ZERO } else { self.settle()? };
        Ok((None, waited))
    }

    /// Waits for weights that are still on their way. Gives for how long.
    ///
    /// # Errors
    /// The ranks could not talk.
    pub(super) fn settle(&mut self) -> Result<Duration, CommError> {
        match &mut self.place {
            Place::Host(host) if host.travelling.is_empty() => Ok(Duration::ZERO),
            Place::Host(host) => {
                let params = std::mem::replace(&mut self.state.params, flat::zeros(0));
                let travelling = std::mem::take(&mut host.travelling);
                let weights = Weights::new(&self.cut, params, travelling, host.gradients.take());
                host.gradients.keep(weights.take_memory());
                let (params, waited) = weights.finish()?;
                self.state.params = params;
                Ok(waited)
            }
            Place::Gpu(resident) => resident.settle(),
        }
    }

    /// Where a snapshot copies from, once all weights have arrived.
    ///
    /// # Errors
    /// The ranks could not talk.
    pub(super) fn source(&mut self) -> Result<&dyn Source, CommError> {
        self.settle()?;
        Ok(match &self.place {
            Place::Host(_) => &self.state,
            Place::Gpu(resident) => resident,
        })
    }

    /// Euclidean norm of the weights, once all have arrived.
    ///
    /// # Errors
    /// The ranks could not talk.
    pub(super) fn parameter_norm(&mut self) -> Result<f64, CommError> {
        self.settle()?;
        Ok(match &self.place {
            Place::Host(_) => global_norm(&self.state.params),
            Place::Gpu(resident) => resident.parameter_norm(),
        })
    }

    /// The weights' moving average, the whole flat array. Called by all ranks, between steps.
    ///
    /// # Errors
    /// The ranks could not talk.
    pub(super) fn average(&self, comm: &dyn Communicator) -> Result<Cow<'_, [f32]>, CommError> {
        let own = match &self.place {
            Place::Host(_) => Cow::Borrowed(&self.state.ema[..]),
            Place::Gpu(resident) => Cow::Owned(resident.average()),
        };
        self.cut.whole(own, comm)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Array;
    use crate::train::Owned;
    use crate::train::bench::{self, tests::small};
    use crate::train::plan::{Exchange, Plan};
    use repa_comm::Single;

    /// Where the arrays are changes nothing: here they are, as on a GPU, on the device, which happens to be the CPU.
    #[test]
    fn what_is_learned_on_a_device_is_what_is_learned_on_the_host() {
        for micro_batch in [0, 3] {
            let mut config = small();
            config.train.micro_batch = micro_batch;
            config.optimizer.weight_decay = 0.1;
            config.optimizer.max_grad_norm = 0.5;
            let comm: Arc<dyn Communicator> = Arc::new(Single::new());
            let (index, layout) = (bench::index(&config), Arc::new(config.sit().layout()));
            let batch = bench::batch(&config, &index, comm.as_ref());
            // Buckets that end within parameters, and parameters that go over several buckets.
            let plan = Plan::new(&config.sit(), &layout, 1);
            assert!(plan.ranges.len() > 3, "{:?}", plan.ranges);
            let cut = Arc::new(Cut::of(plan, Exchange::new(&config), |len| 0..len));
            let state = State::new(&layout, 1, Owned::whole(layout.trainable_len()));
            let device = Device::flex();
            let new = || Learner::new(&config, state.clone(), cut.clone(), layout.clone(), &index, &device);
            let (mut host, mut there) = (new(), new());
            there.place = Place::Gpu(Resident::new(&mut there.state, &layout, &cut, &device));
            assert!(there.state.params.is_empty());
            for _ in 0..4 {
                let [host, there] = [&mut host, &mut there].map(|learner| {
                    let pass = learner.pass(&batch, &config, &comm).unwrap();
                    let losses = pass.losses;
                    let sums = learner.sum(pass, comm.as_ref()).unwrap();
                    assert!(sums.finite);
                    let (skipped, _) = learner.step(sums.squared.sqrt(), &config, comm.as_ref()).unwrap();
                    assert_eq!(skipped, None);
                    [losses.denoising, losses.alignment, sums.squared, learner.parameter_norm().unwrap()]
                });
                assert!(
                    host.iter().zip(there).all(|(a, b)| (a / b - 1.0).abs() < 1e-5),
                    "{host:?} {there:?}"
                );
            }
            assert_eq!(host.state.updates, there.state.updates);
            let len = layout.trainable_len();
            let mut before = vec![0.0; len];
            for array in Array::ALL {
                let [host, there] = [&mut host, &mut there].map(|learner| {
                    let mut values = vec![0.0; len];
                    // In two parts, as two ranks would write them.
                    let (first, second) = values.split_at_mut(len / 3);
                    let source = learner.source().unwrap();
                    source.copy(array, &(0..len / 3), first);
                    source.copy(array, &(len / 3..len), second);
                    values
                });
                assert_ne!(host, before, "{array:?} is an array of its own");
                let norm = global_norm(&host);
                let difference: Vec<f32> = host.iter().zip(&there).map(|(a, b)| a - b).collect();
                assert!(global_norm(&difference) < 1e-5 * norm, "{array:?}");
                before = host;
            }
            let mut ema = vec![0.0; len];
            there.source().unwrap().copy(Array::Ema, &(0..len), &mut ema);
            assert_eq!(there.average(comm.as_ref()).unwrap(), ema);
        }
    }

    #[test]
    fn a_gradient_that_is_not_finite_is_noticed_on_a_device() {
        let config = small();
        let comm: Arc<dyn Communicator> = Arc::new(Single::new());
        let (index, layout) = (bench::index(&config), Arc::new(config.sit().layout()));
        let mut batch = bench::batch(&config, &index, comm.as_ref());
        let cut = Arc::new(Cut::new(&config, &layout, comm.as_ref()));
        let state = State::new(&layout, 1, Owned::whole(layout.trainable_len()));
        let device = Device::flex();
        let mut learner = Learner::new(&config, state, cut.clone(), layout.clone(), &index, &device);
        learner.place = Place::Gpu(Resident::new(&mut learner.state, &layout, &cut, &device));
        batch.noise[5] = f32::NAN;
        let pass = learner.pass(&batch, &config, &comm).unwrap();
        let sums = learner.sum(pass, comm.as_ref()).unwrap();
        assert!(!sums.finite && !sums.squared.is_finite());
        let norm = learner.parameter_norm().unwrap();
        let (skipped, _) = learner.step(sums.squared.sqrt(), &config, comm.as_ref()).unwrap();
        assert_eq!((skipped, learner.parameter_norm().unwrap()), (Some(Skipped::NotFinite), norm));
    }
}
