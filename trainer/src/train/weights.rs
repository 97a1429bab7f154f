//! Weights on the host, of which some may still be on their way from the ranks that moved them.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use burn::tensor::{Tensor, TensorData};
use repa_comm::{CommError, Pending};

use super::plan::Cut;
use crate::Device;
use crate::flat::{self, Flat};
use crate::params::{Layout, Params};

/// Buckets of new weights that other ranks send; None where one has arrived, or was never sent.
pub(super) type Travelling = Vec<Option<Pending<Vec<f32>>>>;

/// The flat array while a pass uses it: whoever needs a part that has not arrived waits for it.
pub(super) struct Weights {
    cut: Arc<Cut>,
    inner: Mutex<Inner>,
}

struct Inner {
    params: Flat,
    travelling: Travelling,
    /// The vectors that buckets came in.
    memory: Vec<Vec<f32>>,
    waited: Duration,
    failure: Option<CommError>,
}

impl Weights {
    pub(super) fn new(cut: &Arc<Cut>, params: Flat, travelling: Travelling, memory: Vec<Vec<f32>>) -> Self {
        let inner = Inner { params, travelling, memory, waited: Duration::ZERO, failure: None };
        Self { cut: cut.clone(), inner: Mutex::new(inner) }
    }

    /// As the model takes them, each part when it is asked for.
    pub(super) fn params(self: &Arc<Self>, layout: &Arc<Layout>, device: &Device) -> Params {
        let (weights, device) = (Arc::clone(self), device.clone());
        Params::when_asked(layout, move |_, entry| match entry.trainable {
            true => weights.tensor(&(entry.offset..entry.offset + entry.len()), &device),
            false => entry.fixed(&device),
        })
    }

    fn tensor(&self, range: &Range<usize>, device: &Device) -> Tensor<1> {
        let mut inner = self.lock();
        inner.arrive(&self.cut, self.cut.buckets_of(range));
        let values = inner.params[range.clone()].to_vec();
        Tensor::from_data(TensorData::new(values, [range.len()]), device)
    }

    /// The vectors that buckets come in, once all have arrived.
    pub(super) fn take_memory(&self) -> Vec<Vec<f32>> {
        let mut inner = self.lock();
        inner.arrive(&self.cut, 0..self.cut.plan.ranges.len());
        std::mem::take(&mut inner.memory)
    }

    /// Waits for the rest. Gives the flat array back, and how long all who asked have waited.
    ///
    /// # Errors
    /// The ranks could not talk; what was given of what did not arrive was the weights before.
    pub(super) fn finish(&self) -> Result<(Flat, Duration), CommError> {
        let mut inner = self.lock();
        inner.arrive(&self.cut, 0..self.cut.plan.ranges.len());
        match inner.failure.take() {
            Some(failure) => Err(failure),
            None => Ok((std::mem::replace(&mut inner.params, flat::zeros(0)), inner.waited)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic elsewhere ends the process.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Waits for some buckets.
    fn arrive(&mut self, cut: &Cut, buckets: Range<usize>) {
        for number in buckets {
            let Some(pending) = self.travelling.get_mut(number).and_then(Option::take) else { continue };
            let waiting = Instant::now();
            let arrived = pending.wait();
            self.waited += waiting.elapsed();
            match arrived {
                Ok(values) => {
                    self.params[cut.plan.ranges[number].clone()].copy_from_slice(&values);
                    self.memory[number] = values;
                }
                Err(error) => {
                    // A later error follows from the first.
                    self.failure.get_or_insert(error);
                    self.memory[number] = vec![0.0; cut.plan.ranges[number].len()];
                }
            }
        }
    }
}
