//! Training on a GPU: weights, optimizer state and gradients stay there, bucket by bucket. The host sees losses and
//! norms, and the rest where it saves, draws samples, or ranks talk by way of its memory.

mod collector;
#[cfg(feature = "cuda")]
mod over_nccl;
mod travel;

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use burn::tensor::{Tensor, TensorData};
use repa_comm::{Background, CommError, Communicator, Phases, Wire};

use super::plan::Cut;
use super::snapshot::Source;
use super::state::Update;
use super::{Owned, State};
use crate::Device;
use crate::checkpoint::Array;
use crate::flat::Flat;
use crate::optim::ema_update_on_device;
use crate::params::{Layout, Params};
pub(super) use collector::Collector;

/// What a rank keeps on its GPU.
#[derive(Debug)]
pub(super) struct Resident {
    device: Device,
    layout: Arc<Layout>,
    cut: Arc<Cut>,
    owned: Owned,
    buckets: Vec<Bucket>,
    /// Parameters that are not trained, by their number in the layout.
    frozen: Vec<Option<Tensor<1>>>,
    /// Each bucket's gradients once they are summed; only the rank's own part counts.
    sums: Vec<Tensor<1>>,
    /// Sums of squares of the rank's gradients before that.
    own_squares: Vec<Tensor<1>>,
}

#[derive(Debug)]
struct Bucket {
    /// Weights, all of them.
    params: Tensor<1>,
    /// What goes with the part that is this rank's, unless that is empty.
    own: Option<Own>,
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
        let bucket = |(bucket, own): (&Range<usize>, &Range<usize>)| {
            let local = (!own.is_empty()).then(|| state.owned.local(own));
            let own = local.map(|local| {
                let [ema, exp_avg, exp_avg_sq] =
                    [&ema, &exp_avg, &exp_avg_sq].map(|array| tensor(&array[local.clone()]));
                Own { ema, exp_avg, exp_avg_sq }
            });
            Bucket { params: tensor(&params[bucket.clone()]), own }
        };
        let buckets = cut.plan.ranges.iter().zip(&cut.owned).map(bucket).collect();
        let frozen = |entry: &crate::params::Entry| {
            (!entry.trainable).then(|| {
                let mut values = vec![0.0; entry.len()];
                entry.init.fill(&mut values, 0, 0);
                tensor(&values)
            })
        };
        Self {
            frozen: layout.entries().iter().map(frozen).collect(),
            device: device.clone(),
            layout: layout.clone(),
            cut: cut.clone(),
            owned: state.owned.clone(),
            buckets,
            sums: Vec::new(),
            own_squares: Vec::new(),
        }
    }

    /// The weights as the model takes them.
    pub(super) fn params(&self) -> Params {
        Params::on_device(&self.layout, |number, entry| match &self.frozen[number] {
            Some(values) => values.clone(),
            None => {
                let parts = self.pieces(&(entry.offset..entry.offset + entry.len()));
                joined(
                    parts.map(|(number, local)| slice(self.buckets[number].params.clone(), local)).collect(),
                )
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
        (self.sums, self.own_squares) = (summed.sums, summed.own_squares);
        let parts = self.cut.parts().zip(&self.sums).filter(|((_, local), _)| !local.is_empty());
        let squares = parts.map(|((_, local), sums)| squared(slice(sums.clone(), local))).collect();
        // One vector, so that the host waits once.
        let count = self.own_squares.len();
        let all = [std::mem::take(&mut self.own_squares), squares].concat();
        let all = read(Tensor::cat(all, 0));
        let (own, sums) = all.split_at(count);
        let squared = sums.iter().map(|&square| f64::from(square)).sum();
        Ok((squared, own.iter().all(|square| square.is_finite())))
    }

    /// Moves weights and average by the gradients of [`Resident::sum`]. With a sharded optimizer each bucket's new
    /// weights go to all ranks while the next one's are computed; gives how long the rank waited for them.
    ///
    /// # Errors
    /// The ranks could not talk.
    pub(super) fn step(&mut self, update: &Update, comm: &dyn Communicator) -> Result<Duration, CommError> {
        let mut travelling = Vec::new();
        // Taken and put back, so that a kernel can write where it has read.
        let (buckets, sums) = (std::mem::take(&mut self.buckets), std::mem::take(&mut self.sums));
        for (number, ((mut bucket, gradients), (_, local))) in
            buckets.into_iter().zip(sums).zip(self.cut.parts()).enumerate()
        {
            if let Some(own) = bucket.own.take() {
                bucket = moved(update, bucket.params, own, gradients, local);
            }
            if self.cut.exchange.sharded {
                let how = Background { phases: Phases::Gather, wire: Wire::F32, bucket: number };
                travelling.push(travel::start(bucket.params.clone(), how, &self.device, comm));
            }
            self.buckets.push(bucket);
        }
        let waiting = Instant::now();
        for (bucket, travelling) in self.buckets.iter_mut().zip(travelling) {
            bucket.params = travelling.wait()?;
        }
        Ok(waiting.elapsed())
    }

    /// Euclidean norm of the weights.
    pub(super) fn parameter_norm(&self) -> f64 {
        let squares = self.buckets.iter().map(|bucket| squared(bucket.params.clone())).collect();
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

    /// The buckets that a range of the flat array lies in, and where in each.
    fn pieces(&self, range: &Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> + use<'_> {
        let range = range.clone();
        let first = self.cut.plan.ranges.partition_point(|bucket| bucket.end <= range.start);
        self.cut.plan.ranges[first..].iter().zip(first..).map_while(move |(bucket, number)| {
            let part = range.start.max(bucket.start)..range.end.min(bucket.end);
            (!part.is_empty()).then(|| (number, part.start - bucket.start..part.end - bucket.start))
        })
    }
}

impl Source for Resident {
    fn copy(&self, array: Array, range: &Range<usize>, out: &mut [f32]) {
        let mut rest = out;
        for (number, local) in self.pieces(range) {
            let Bucket { params, own } = &self.buckets[number];
            let (tensor, local) = match (array, own) {
                (Array::Model, _) => (params, local),
                (_, Some(own)) => {
                    let before = self.cut.owned[number].start - self.cut.plan.ranges[number].start;
                    let tensor = match array {
                        Array::Ema => &own.ema,
                        Array::ExpAvg => &own.exp_avg,
                        Array::Model | Array::ExpAvgSq => &own.exp_avg_sq,
                    };
                    (tensor, local.start - before..local.end - before)
                }
                (_, None) => panic!("a copy of what another rank keeps: {range:?}"),
            };
            let (part, after) = rest.split_at_mut(local.len());
            part.copy_from_slice(&read(slice(tensor.clone(), local)));
            rest = after;
        }
    }
}

/// A bucket after an update by its gradients; `local` is where in it the rank's own part is.
fn moved(update: &Update, whole: Tensor<1>, own: Own, gradients: Tensor<1>, local: Range<usize>) -> Bucket {
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
    Bucket { params, own: Some(Own { ema, exp_avg, exp_avg_sq }) }
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

/// The sum of squares, [1].
fn squared(values: Tensor<1>) -> Tensor<1> {
    (values.clone() * values).sum()
}

/// A vector's elements on the host. Waits for the device.
fn read(values: Tensor<1>) -> Vec<f32> {
    let data = values.into_data().convert::<f32>();
    data.try_into_vec().expect("converted to f32 above")
}
