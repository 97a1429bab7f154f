//! Weights on the device, of which some may still be on their way from the ranks that moved them.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use burn::tensor::Tensor;
use repa_comm::CommError;

use super::travel::Travelling;

/// The buckets: whoever needs one that has not arrived waits for it.
pub(super) struct Weights(Mutex<Inner>);

struct Inner {
    buckets: Vec<Bucket>,
    waited: Duration,
    failure: Option<CommError>,
}

struct Bucket {
    /// None while it is being moved. Of what is on its way, only this rank's part counts.
    values: Option<Tensor<1>>,
    travelling: Option<Travelling>,
}

impl std::fmt::Debug for Weights {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("Weights").field("buckets", &self.lock().buckets.len()).finish()
    }
}

impl Weights {
    pub(super) fn new(buckets: impl Iterator<Item = Tensor<1>>) -> Self {
        let buckets = buckets.map(|values| Bucket { values: Some(values), travelling: None }).collect();
        Self(Mutex::new(Inner { buckets, waited: Duration::ZERO, failure: None }))
    }

    /// A bucket. After an error of the ranks' talk, which [`Weights::settle`] tells, one that did not arrive.
    pub(super) fn get(&self, number: usize) -> Tensor<1> {
        self.lock().arrived(number).clone().expect("nobody asks for it while it is moved")
    }

    /// The same, to be put back moved: a kernel may write where it has read.
    pub(super) fn take(&self, number: usize) -> Tensor<1> {
        self.lock().arrived(number).take().expect("moved once a step")
    }

    /// Puts a bucket back, of which other ranks' parts may be on their way.
    pub(super) fn put(&self, number: usize, values: Tensor<1>, travelling: Option<Travelling>) {
        self.lock().buckets[number] = Bucket { values: Some(values), travelling };
    }

    /// Waits for all. Gives how long all who asked have waited since the last time.
    ///
    /// # Errors
    /// The ranks could not talk.
    pub(super) fn settle(&self) -> Result<Duration, CommError> {
        let mut inner = self.lock();
        for number in 0..inner.buckets.len() {
            inner.arrived(number);
        }
        match inner.failure.clone() {
            Some(failure) => Err(failure),
            None => Ok(std::mem::take(&mut inner.waited)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic elsewhere ends the process.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn arrived(&mut self, number: usize) -> &mut Option<Tensor<1>> {
        let bucket = &mut self.buckets[number];
        if let Some(travelling) = bucket.travelling.take() {
            let waiting = Instant::now();
            match travelling.wait() {
                Ok(values) => bucket.values = Some(values),
                Err(error) => {
                    // A later error follows from the first.
                    self.failure.get_or_insert(error);
                }
            }
            self.waited += waiting.elapsed();
        }
        &mut bucket.values
    }
}
