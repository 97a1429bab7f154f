//! Gradients on the device on their way through a step.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::tensor::{DType, Tensor};
use repa_comm::{Background, CommError, Communicator, Phases};

use super::slice;
use super::travel::{self, Travelling};
use crate::Device;
use crate::ops::{GradientSink, joined, squares};
use crate::train::plan::Cut;

/// Takes a step's gradients from the backward pass, and has each bucket summed over the ranks as soon as it is
/// complete.
pub(in crate::train) struct Collector {
    cut: Arc<Cut>,
    comm: Arc<dyn Communicator>,
    device: Device,
    filling: Mutex<Filling>,
}

struct Filling {
    /// By parameter.
    gradients: Vec<Gradient>,
    /// Whether the backward pass that runs is the step's last.
    last_part: bool,
    /// By bucket, elements that the last part has yet to bring.
    missing: Vec<usize>,
    /// How many buckets, of the plan's order, are on their way.
    next: usize,
    travelling: Vec<Option<Travelling>>,
    own_squares: Vec<Tensor<1>>,
}

/// A parameter's gradient, until all buckets that it lies in are on their way.
struct Gradient {
    values: Option<Tensor<1>>,
    /// Elements that are in no such bucket yet.
    left: usize,
}

/// What has come of a step's gradients.
pub(super) struct Summed {
    /// By bucket.
    pub(super) sums: Vec<Tensor<1>>,
    /// Sums of squares of the rank's own gradients in parts, where there are other ranks.
    pub(super) own_squares: Vec<Tensor<1>>,
}

impl std::fmt::Debug for Collector {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("Collector").field("buckets", &self.cut.plan.ranges.len()).finish_non_exhaustive()
    }
}

impl GradientSink for Collector {
    /// For a backend that gives its gradients as slices.
    fn gradient(&self, offset: usize, values: &[f32]) {
        self.tensor(offset, Tensor::from_floats(values, &self.device));
    }

    fn tensor(&self, offset: usize, gradient: Tensor<1>) {
        let mut filling = self.lock();
        let number = self.cut.plan.parameters.partition_point(|p| p.start < offset);
        let place = &self.cut.plan.parameters[number];
        assert_eq!(*place, offset..offset + gradient.dims()[0], "a gradient of no parameter");
        let values = &mut filling.gradients[number].values;
        *values = Some(match values.take() {
            Some(earlier) => earlier.cast(DType::F32) + gradient.cast(DType::F32),
            None => gradient,
        });
        if filling.last_part {
            for (bucket, missing) in self.cut.plan.ranges.iter().zip(&mut filling.missing) {
                *missing -= place.end.min(bucket.end).saturating_sub(place.start.max(bucket.start));
            }
            if self.cut.exchange.overlap {
                self.launch(&mut filling, false);
            }
        }
    }

    fn last_part(&self) {
        self.lock().last_part = true;
    }
}

impl Collector {
    pub(super) fn new(cut: &Arc<Cut>, comm: &Arc<dyn Communicator>, device: &Device) -> Self {
        let plan = &cut.plan;
        let filling = Filling {
            gradients: plan.parameters.iter().map(|p| Gradient { values: None, left: p.len() }).collect(),
            last_part: false,
            missing: plan.ranges.iter().map(std::ops::Range::len).collect(),
            next: 0,
            travelling: plan.ranges.iter().map(|_| None).collect(),
            own_squares: Vec::new(),
        };
        Self { cut: cut.clone(), comm: comm.clone(), device: device.clone(), filling: Mutex::new(filling) }
    }

    fn lock(&self) -> MutexGuard<'_, Filling> {
        // A panic elsewhere ends the process.
        self.filling.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the sums of complete buckets, in the plan's order; of all that are left where `all`.
    fn launch(&self, filling: &mut Filling, all: bool) {
        while let Some(&number) = self.cut.plan.order.get(filling.next) {
            if !all && filling.missing[number] > 0 {
                return;
            }
            let values = self.bucket(filling, number);
            let exchange = self.cut.exchange;
            if self.comm.size() > 1 {
                filling.own_squares.push(squares(values.clone()));
            }
            let phases = if exchange.sharded { Phases::Reduce } else { Phases::ReduceAndGather };
            let how = Background { phases, wire: exchange.wire, bucket: number };
            filling.travelling[number] = Some(travel::start(values, how, &self.device, self.comm.as_ref()));
            filling.next += 1;
        }
    }

    /// A bucket's gradients in float32, in memory of their own: sums are taken in place, and a gradient may share its memory
    /// with one that the backward pass still needs. Parameters without one count as zeros.
    fn bucket(&self, filling: &mut Filling, number: usize) -> Tensor<1> {
        let plan = &self.cut.plan;
        let bucket = &plan.ranges[number];
        let mut parts = Vec::new();
        let first = plan.parameters.partition_point(|p| p.end <= bucket.start);
        let within = plan.parameters[first..].iter().take_while(|p| p.start < bucket.end);
        for (gradient, place) in filling.gradients[first..].iter_mut().zip(within) {
            let part = place.start.max(bucket.start)..place.end.min(bucket.end);
            parts.push(match &gradient.values {
                Some(values) => slice(values.clone(), part.start - place.start..part.end - place.start),
                None => Tensor::zeros([part.len()], &self.device),
            });
            gradient.left -= part.len();
            if gradient.left == 0 {
                gradient.values = None;
            }
        }
        joined(parts)
    }

    /// Waits for all sums.
    ///
    /// # Errors
    /// The ranks could not talk.
    pub(super) fn finish(&self) -> Result<Summed, CommError> {
        let mut filling = self.lock();
        self.launch(&mut filling, true);
        let mut sums: Vec<Option<Tensor<1>>> = vec![None; self.cut.plan.ranges.len()];
        // In the order in which they were started, so that the first error is the cause of the others.
        for &number in &self.cut.plan.order {
            sums[number] = filling.travelling[number].take().map(Travelling::wait).transpose()?;
        }
        let own_squares = std::mem::take(&mut filling.own_squares);
        Ok(Summed { sums: sums.into_iter().flatten().collect(), own_squares })
    }
}
