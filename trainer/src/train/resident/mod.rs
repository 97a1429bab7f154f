//! Training on a GPU: weights, optimizer state and gradients stay there, bucket by bucket. The host sees losses and
//! norms, and the rest where it saves, draws samples, or ranks talk by way of its memory.

mod collector;
#[cfg(feature = "cuda")]
mod over_nccl;
mod travel;
mod weights;

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use burn::tensor::{Tensor, TensorData};
use repa_comm::{Background, CommError, Communicator, Phases, Wire};

use super::plan::Cut;
use super::snapshot::Source;
use super::state::Update;
use super::{Owned, State};
use crate::Device;
use crate::checkpoint::Array;
use crate::flat::Flat;
use crate::ops::squares;
use crate::optim::ema_update_on_device;
use crate::params::{Layout, Params};
pub(super) use collector::Collector;
use weights::Weights;

/// Steps after which a GPU's memory has stopped growing: of SiT-S/2 on the stand-in for CUDA, giving back after the first
/// one alone left 1.29 times the estimate.
const UNTIDY: usize = 3;

/// What a rank keeps on its GPU.
#[derive(Debug)]
pub(super) struct Resident {
    device: Device,
    layout: Arc<Layout>,
    cut: Arc<Cut>,
    owned: Owned,
    weights: Arc<Weights>,
    /// By bucket, what goes with the part that is this rank's, unless that is empty.
    own: Vec<Option<Own>>,
    /// Parameters that are not trained, by their number in the layout.
    fixed: Arc<Vec<Option<Tensor<1>>>>,
    /// Each bucket's gradients once they are summed; only the rank's own part counts.
    sums: Vec<Tensor<1>>,
    /// How many more steps give back to the GPU what they had taken on their way.
    untidy: usize,
}

#[derive(Debug, Clone)]
struct Own {
    ema: Tensor<1>,
    exp_avg: Tensor<1>,
    exp_avg_sq: Tensor<1>,
}

impl Resident {
    /// Brings a state's arrays to a device. The state keeps everything else.
    pub(super) fn new(state: &mut State, layout: &Arc<Layout>, cut: &Arc<Cut>, device: &Device) -> Self {
        let tensor = |values: &[f32]| {
            let len = values.len();
            Tensor::<1>::from_data(TensorData::new(values.to_vec(), [len]), device)
        };
        let [params, ema, exp_avg, exp_avg_sq]: [Flat; 4] = state.take_arrays();
        let own = |own: &Range<usize>| {
            (!own.is_empty()).then(|| {
                let local = state.owned.local(own);
                let [ema, exp_avg, exp_avg_sq] =
                    [&ema, &exp_avg, &exp_avg_sq].map(|array| tensor(&array[local.clone()]));
                Own { ema, exp_avg, exp_avg_sq }
            })
        };
        let buckets = cut.plan.ranges.iter().map(|bucket| tensor(&params[bucket.clone()]));
        let fixed = layout.entries().iter().map(|entry| (!entry.trainable).then(|| entry.fixed(device)));
        Self {
            weights: Arc::new(Weights::new(buckets)),
            own: cut.owned.iter().map(own).collect(),
            fixed: Arc::new(fixed.collect()),
            device: device.clone(),
            layout: layout.clone(),
            cut: cut.clone(),
            owned: state.owned.clone(),
            sums: Vec::new(),
            untidy: UNTIDY,
        }
    }

    /// The weights as the model takes them, each when it is asked for.
    pub(super) fn params(&self) -> Params {
        let (cut, weights, fixed) = (self.cut.clone(), self.weights.clone(), self.fixed.clone());
        Params::when_asked(&self.layout, move |number, entry| match &fixed[number] {
            Some(values) => values.clone(),
            None => {
                let parts = pieces(&cut, entry.offset..entry.offset + entry.len());
                joined(parts.map(|(number, local)| slice(weights.get(number), local)).collect())
            }
        })
    }

    /// Begins a step: what the collector is given becomes the gradients that [`Resident::sum`] waits for.
    pub(super) fn collect(&self, comm: &Arc<dyn Communicator>) -> Arc<Collector> {
        Arc::new(Collector::new(&self.cut, comm, &self.device))
    }

    /// Waits for the sums over the ranks. Gives the sum of squares of this rank's part of them, and whether its own
    /// gradients were all finite.
    ///
    /// # Errors
    /// The ranks could not talk.
    pub(super) fn sum(&mut self, collector: &Collector) -> Result<(f64, bool), CommError> {
        let summed = collector.finish()?;
        self.sums = summed.sums;
        let parts = self.cut.parts().zip(&self.sums).filter(|((_, local), _)| !local.is_empty());
        let squares = parts.map(|((_, local), sums)| squares(slice(sums.clone(), local))).collect();
        // One vector, so that the host waits once.
        let count = summed.own_squares.iter().map(|squares| squares.dims()[0]).sum();
        let all = [summed.own_squares, squares].concat();
        let all = read(Tensor::cat(all, 0));
        if self.untidy > 0 {
            // CubeCL's pages are as large as the largest tensor so far. Those that a pass has outgrown are empty, and
            // would be given back to the driver only when it has no more.
            self.device.memory_cleanup();
            self.untidy -= 1;
        }
        // One rank alone has no others to tell its own from.
        let (own, sums) = if count == 0 { (&all[..], &all[..]) } else { all.split_at(count) };
        let squared = sums.iter().map(|&square| f64::from(square)).sum();
        Ok((squared, own.iter().all(|square| square.is_finite())))
    }

    /// Moves weights and average by the gradients of [`Resident::sum`]. With a sharded optimizer each bucket's new
    /// weights go to all ranks while the next one's are computed.
    pub(super) fn step(&mut self, update: &Update, comm: &dyn Communicator) {
        let sums = std::mem::take(&mut self.sums);
        for (number, (gradients, (_, local))) in sums.into_iter().zip(self.cut.parts()).enumerate() {
            let mut params = self.weights.take(number);
            if let Some(own) = self.own[number].take() {
                let (moved, own) = moved(update, params, own, gradients, local);
                self.own[number] = Some(own);
                params = moved;
            }
            let travelling = self.cut.exchange.sharded.then(|| {
                let how = Background { phases: Phases::Gather, wire: Wire::F32, bucket: number };
                travel::start(params.clone(), how, &self.device, comm)
            });
            self.weights.put(number, params, travelling);
        }
    }

    /// Waits for weights that are still on their way. Gives how long all who asked for some have waited since the last
    /// time.
    ///
    /// # Errors
    /// The ranks could not talk.
    pub(super) fn settle(&self) -> Result<Duration, CommError> {
        self.weights.settle()
    }

    /// Euclidean norm of the weights.
    pub(super) fn parameter_norm(&self) -> f64 {
        let squares = (0..self.own.len()).map(|number| squares(self.weights.get(number))).collect();
        read(Tensor::cat(squares, 0)).iter().map(|&square| f64::from(square)).sum::<f64>().sqrt()
    }

    /// The moving average of this rank's part.
    pub(super) fn average(&self) -> Vec<f32> {
        let mut own = vec![0.0; self.owned.len()];
        for range in self.owned.ranges() {
            self.copy(Array::Ema, range, &mut own[self.owned.local(range)]);
        }
        own
    }
}

/// The buckets that a range of the flat array lies in, and where in each.
fn pieces(cut: &Cut, range: Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> {
    cut.buckets_of(&range).map(move |number| {
        let bucket = &cut.plan.ranges[number];
        let part = range.start.max(bucket.start)..range.end.min(bucket.end);
        (number, part.start - bucket.start..part.end - bucket.start)
    })
}

impl Source for Resident {
    fn copy(&self, array: Array, range: &Range<usize>, out: &mut [f32]) {
        let mut rest = out;
        for (number, local) in pieces(&self.cut, range.clone()) {
            let (tensor, local) = match (array, &self.own[number]) {
                (Array::Model, _) => (self.weights.get(number), local),
                (_, Some(own)) => {
                    let before = self.cut.owned[number].start - self.cut.plan.ranges[number].start;
                    let tensor = match array {
                        Array::Ema => &own.ema,
                        Array::ExpAvg => &own.exp_avg,
                        Array::Model | Array::ExpAvgSq => &own.exp_avg_sq,
                    };
                    (tensor.clone(), local.start - before..local.end - before)
                }
                (_, None) => panic!("a copy of what another rank keeps: {range:?}"),
            };
            let (part, after) = rest.split_at_mut(local.len());
            part.copy_from_slice(&read(slice(tensor, local)));
            rest = after;
        }
    }
}

/// A bucket after an update by its gradients; `local` is where in it the rank's own part is.
fn moved(
    update: &Update,
    whole: Tensor<1>,
    own: Own,
    gradients: Tensor<1>,
    local: Range<usize>,
) -> (Tensor<1>, Own) {
    let all = local == (0..whole.dims()[0]);
    let (whole, params) = match all {
        true => (None, whole),
        false => (Some(whole.clone()), slice(whole, local.clone())),
    };
    let arrays = [params, own.exp_avg, own.exp_avg_sq];
    let [params, exp_avg, exp_avg_sq] = update.moved(arrays, slice(gradients, local.clone()));
    let ema = ema_update_on_device(own.ema, params.clone(), update.ema_decay());
    let params = match whole {
        Some(whole) => whole.slice_assign([local], params),
        None => params,
    };
    (params, Own { ema, exp_avg, exp_avg_sq })
}

/// Part of a vector.
fn slice(values: Tensor<1>, part: Range<usize>) -> Tensor<1> {
    match part == (0..values.dims()[0]) {
        true => values,
        false => values.slice([part]),
    }
}

/// Vectors one after another.
fn joined(mut parts: Vec<Tensor<1>>) -> Tensor<1> {
    match parts.len() {
        1 => parts.remove(0),
        _ => Tensor::cat(parts, 0),
    }
}

/// A vector's elements on the host. Waits for the device.
fn read(values: Tensor<1>) -> Vec<f32> {
    let data = values.into_data().convert::<f32>();
    data.try_into_vec().expect("converted to f32 above")
}
