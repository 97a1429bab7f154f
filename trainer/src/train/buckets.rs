//! Gradients on their way through a step: collected in buckets while the backward pass runs, and each bucket
//! summed over the ranks as soon as it is complete.
//!
//! A bucket is a contiguous range of the flat array. Buckets are summed in an order that follows from the
//! model alone, so that all ranks agree on it; their size changes no bit, because sums are taken element by
//! element in rank order.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use repa_comm::{Background, CommError, Communicator, Pending, Phases, Wire};

use super::state::Update;
use crate::config::{Config, Sharding};
use crate::model::SitConfig;
use crate::ops::GradientSink;
use crate::optim::CHUNK;
use crate::params::Layout;
use crate::train;

/// How the flat array is cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Contiguous ranges that cover it, in ascending order. All but the last are whole chunks of the
    /// optimizer's, so that norms have the same bits however it is cut.
    pub ranges: Vec<Range<usize>>,
    /// Numbers of the ranges in the order in which the backward pass completes them.
    pub order: Vec<usize>,
    /// Where each trainable parameter begins, ascending, and its length.
    parameters: Vec<Range<usize>>,
}

impl Plan {
    /// Cuts a model's gradients into buckets of about `bytes` bytes.
    #[must_use]
    pub fn new(sit: &SitConfig, layout: &Layout, bytes: usize) -> Self {
        let total = layout.trainable_len();
        let length = (bytes / size_of::<f32>()).next_multiple_of(CHUNK).max(CHUNK);
        let trainable = || layout.entries().iter().filter(|entry| entry.trainable);
        // What is complete last, the embeddings, has a bucket of its own, so that the last sum is a short one.
        let last = trainable().map(|e| sit.backward_position(&e.name)).max();
        let end_of_last = trainable()
            .filter(|e| Some(sit.backward_position(&e.name)) == last)
            .map(|e| e.offset + e.len())
            .max()
            .unwrap_or(0);
        let first = end_of_last.next_multiple_of(CHUNK).min(length).min(total);
        let rest = (first..total).step_by(length).map(|begin| begin..(begin + length).min(total));
        let ranges: Vec<Range<usize>> = std::iter::once(0..first).chain(rest).collect();
        // A bucket is complete with the last of its parameters.
        let completed = |range: &Range<usize>| {
            trainable()
                .filter(|e| e.offset < range.end && range.start < e.offset + e.len())
                .map(|e| sit.backward_position(&e.name))
                .max()
                .unwrap_or(0)
        };
        let mut order: Vec<usize> = (0..ranges.len()).collect();
        // Of buckets that are complete at the same time, the later part of the model comes first.
        order.sort_by_key(|&i| (completed(&ranges[i]), std::cmp::Reverse(i)));
        let parameters = trainable().map(|e| e.offset..e.offset + e.len()).collect();
        Self { ranges, order, parameters }
    }
}

/// How gradients are summed over the ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exchange {
    /// Buckets are summed as the backward pass completes them, else all at its end.
    pub overlap: bool,
    /// How gradients travel.
    pub wire: Wire,
    /// Every rank gets the sums of its shard of each bucket only.
    pub sharded: bool,
}

impl Exchange {
    /// As configured.
    pub fn new(config: &Config) -> Self {
        let sharded = config.optimizer.sharding == Sharding::Zero1;
        Self { overlap: config.comm.overlap, wire: config.comm.wire, sharded }
    }
}

/// A step's gradients: one array a bucket.
#[derive(Debug)]
pub struct Gradients {
    plan: Arc<Plan>,
    exchange: Exchange,
    data: Vec<Vec<f32>>,
    /// The part of each bucket, as a range of the flat array, whose sums this rank gets.
    owned: Vec<Range<usize>>,
}

impl Gradients {
    /// Zeros.
    #[must_use]
    pub fn new(plan: Plan, exchange: Exchange, comm: &dyn Communicator) -> Self {
        let data = plan.ranges.iter().map(|range| vec![0.0; range.len()]).collect();
        Self { owned: owned(&plan, exchange, |len| comm.shard(len)), plan: Arc::new(plan), exchange, data }
    }

    /// Whether every rank gets the sums of its part only.
    pub fn sharded(&self) -> bool {
        self.exchange.sharded
    }

    /// The parts of the flat array whose sums this rank gets, in ascending order.
    pub fn owned(&self) -> &[Range<usize>] {
        &self.owned
    }

    /// Each owned part of the flat array, and its sums.
    pub fn pieces(&self) -> impl Iterator<Item = (Range<usize>, &[f32])> {
        self.plan.ranges.iter().zip(&self.owned).zip(&self.data).map(|((bucket, owned), data)| {
            (owned.clone(), &data[owned.start - bucket.start..owned.end - bucket.start])
        })
    }

    /// Begins a step: what the sink is given becomes the gradients that [`Collector::finish`] returns here.
    pub fn collect(&mut self, comm: &Arc<dyn Communicator>) -> Arc<Collector> {
        let buckets = std::mem::take(&mut self.data)
            .into_iter()
            .map(|data| Bucket { missing: data.len(), data: State::Filling(data) })
            .collect();
        let filling = Filling {
            buckets,
            written: vec![false; self.plan.parameters.len()],
            last_part: false,
            next: 0,
            finite: true,
        };
        Arc::new(Collector {
            plan: Arc::clone(&self.plan),
            comm: Arc::clone(comm),
            exchange: self.exchange,
            filling: Mutex::new(filling),
        })
    }

    /// Moves the weights by `update`. With a sharded optimizer each bucket's new weights go to all ranks while the
    /// next one's are computed; they are not complete before [`Gradients::complete`].
    pub fn apply(
        &mut self,
        update: &Update,
        state: &mut train::State,
        comm: &dyn Communicator,
    ) -> Vec<Pending<Vec<f32>>> {
        let mut travelling = Vec::new();
        for (number, bucket) in self.plan.ranges.iter().enumerate() {
            let owned = &self.owned[number];
            let local = owned.start - bucket.start..owned.end - bucket.start;
            if !local.is_empty() {
                state.apply(update, owned, &self.data[number][local.clone()]);
            }
            if self.exchange.sharded {
                // The gradients have done their work; the new weights take their place.
                let mut values = std::mem::take(&mut self.data[number]);
                values[local].copy_from_slice(&state.params[owned.clone()]);
                let how = Background { phases: Phases::Gather, wire: Wire::F32, bucket: number };
                travelling.push(comm.start_f32(values, how));
            }
        }
        travelling
    }

    /// Waits for the weights that [`Gradients::apply`] sent around.
    ///
    /// # Errors
    /// The ranks could not talk.
    pub fn complete(
        &mut self,
        travelling: Vec<Pending<Vec<f32>>>,
        params: &mut [f32],
    ) -> Result<(), CommError> {
        for (number, pending) in travelling.into_iter().enumerate() {
            let values = pending.wait()?;
            params[self.plan.ranges[number].clone()].copy_from_slice(&values);
            self.data[number] = values;
        }
        Ok(())
    }

    /// All of an array of which this rank keeps the owned parts, `own`. Called by all ranks, between steps.
    ///
    /// # Errors
    /// The ranks could not talk.
    pub fn whole<'a>(&self, own: &'a [f32], comm: &dyn Communicator) -> Result<Cow<'a, [f32]>, CommError> {
        if !self.exchange.sharded {
            return Ok(Cow::Borrowed(own));
        }
        let mut whole = vec![0.0; self.plan.ranges.iter().map(Range::len).sum()];
        let mut taken = 0;
        for (bucket, owned) in self.plan.ranges.iter().zip(&self.owned) {
            whole[owned.clone()].copy_from_slice(&own[taken..taken + owned.len()]);
            taken += owned.len();
            comm.all_gather_shards_f32(&mut whole[bucket.clone()])?;
        }
        Ok(Cow::Owned(whole))
    }
}

/// The part of each bucket whose sums a rank gets: all of it, or its shard, which `shard` gives for a length.
pub fn owned(plan: &Plan, exchange: Exchange, shard: impl Fn(usize) -> Range<usize>) -> Vec<Range<usize>> {
    let part = |bucket: &Range<usize>| {
        let shard = shard(bucket.len());
        bucket.start + shard.start..bucket.start + shard.end
    };
    plan.ranges.iter().map(|bucket| if exchange.sharded { part(bucket) } else { bucket.clone() }).collect()
}

/// Takes a step's gradients from the backward pass.
pub struct Collector {
    plan: Arc<Plan>,
    comm: Arc<dyn Communicator>,
    exchange: Exchange,
    filling: Mutex<Filling>,
}

struct Filling {
    buckets: Vec<Bucket>,
    /// Which parameters have a gradient already, from this part of the batch or an earlier one.
    written: Vec<bool>,
    /// Whether the backward pass that runs is the step's last.
    last_part: bool,
    /// How many buckets, of the plan's order, are on their way.
    next: usize,
    /// Whether all of this rank's own gradients are finite.
    finite: bool,
}

struct Bucket {
    data: State,
    /// Elements that the last part has yet to bring.
    missing: usize,
}

enum State {
    Filling(Vec<f32>),
    Travelling(Pending<Vec<f32>>),
    /// Taken, for a moment.
    Moved,
}

impl std::fmt::Debug for Collector {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("Collector").field("buckets", &self.plan.ranges.len()).finish_non_exhaustive()
    }
}

impl GradientSink for Collector {
    fn gradient(&self, offset: usize, values: &[f32]) {
        let mut filling = self.lock();
        let parameter = self.plan.parameters.partition_point(|p| p.start < offset);
        assert_eq!(
            self.plan.parameters.get(parameter),
            Some(&(offset..offset + values.len())),
            "a gradient of no parameter"
        );
        let again = std::mem::replace(&mut filling.written[parameter], true);
        filling.add(&self.plan, offset, values, again);
        self.launch(&mut filling, false);
    }

    fn last_part(&self) {
        self.lock().last_part = true;
    }
}

impl Collector {
    fn lock(&self) -> MutexGuard<'_, Filling> {
        // A panic elsewhere ends the process; the data are plain numbers.
        self.filling.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the sums of complete buckets, in the plan's order; of all that are left where `all`.
    fn launch(&self, filling: &mut Filling, all: bool) {
        while let Some(&number) = self.plan.order.get(filling.next) {
            let bucket = &mut filling.buckets[number];
            if !all && (!self.exchange.overlap || bucket.missing > 0) {
                return;
            }
            bucket.data = match std::mem::replace(&mut bucket.data, State::Moved) {
                State::Filling(data) => {
                    let Exchange { sharded, wire, .. } = self.exchange;
                    let phases = if sharded { Phases::Reduce } else { Phases::ReduceAndGather };
                    let how = Background { phases, wire, bucket: number };
                    State::Travelling(self.comm.start_f32(data, how))
                }
                other => other,
            };
            filling.next += 1;
        }
    }

    /// Waits for all sums, puts them back into `gradients`, and says whether all of this rank's own
    /// gradients were finite. Parameters without a gradient count as zeros.
    ///
    /// # Errors
    /// The ranks could not talk.
    pub fn finish(&self, gradients: &mut Gradients) -> Result<bool, CommError> {
        let mut filling = self.lock();
        for (number, parameter) in self.plan.parameters.iter().enumerate() {
            if !filling.written[number] {
                filling.clear(&self.plan, parameter);
            }
        }
        self.launch(&mut filling, true);
        gradients.data = vec![Vec::new(); self.plan.ranges.len()];
        // In the order in which they were started, so that the first error is the cause of the others.
        for &number in &self.plan.order {
            gradients.data[number] = match std::mem::replace(&mut filling.buckets[number].data, State::Moved)
            {
                State::Travelling(pending) => pending.wait()?,
                State::Filling(data) => data,
                State::Moved => Vec::new(),
            };
        }
        Ok(filling.finite)
    }
}

impl Filling {
    /// Writes, or adds, a parameter's gradient.
    fn add(&mut self, plan: &Plan, offset: usize, values: &[f32], again: bool) {
        self.finite &= values.iter().fold(true, |fine, x| fine & x.is_finite());
        let last = self.last_part;
        self.each(plan, &(offset..offset + values.len()), |out, part, missing| {
            let values = &values[part.start - offset..part.end - offset];
            if again {
                out.iter_mut().zip(values).for_each(|(sum, x)| *sum += x);
            } else {
                out.copy_from_slice(values);
            }
            if last {
                *missing -= part.len();
            }
        });
    }

    fn clear(&mut self, plan: &Plan, parameter: &Range<usize>) {
        self.each(plan, parameter, |out, _, _| out.fill(0.0));
    }

    /// Calls `f` for each bucket's part of a range of the flat array.
    fn each(
        &mut self,
        plan: &Plan,
        range: &Range<usize>,
        mut f: impl FnMut(&mut [f32], Range<usize>, &mut usize),
    ) {
        let first = plan.ranges.partition_point(|bucket| bucket.end <= range.start);
        for (bucket, place) in self.buckets[first..].iter_mut().zip(&plan.ranges[first..]) {
            let part = range.start.max(place.start)..range.end.min(place.end);
            if part.is_empty() {
                return;
            }
            let State::Filling(data) = &mut bucket.data else {
                panic!("a gradient came after its bucket was complete: {part:?}");
            };
            f(&mut data[part.start - place.start..part.end - place.start], part, &mut bucket.missing);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use repa_comm::Single;

    fn sit() -> SitConfig {
        SitConfig {
            input_size: 8,
            hidden_size: 64,
            depth: 4,
            num_heads: 2,
            num_classes: 3,
            encoder_depth: 2,
            projector_dim: 64,
            z_dims: vec![12],
            ..SitConfig::preset("SiT-S/2").unwrap()
        }
    }

    #[test]
    fn buckets_cover_everything_and_come_in_the_order_of_the_backward_pass() {
        let (sit, layout) = (sit(), sit().layout());
        for bytes in [1, 100_000, 1 << 20, 1 << 40] {
            let plan = Plan::new(&sit, &layout, bytes);
            assert_eq!(plan.ranges[0].start, 0);
            assert!(plan.ranges.windows(2).all(|w| w[0].end == w[1].start && w[0].len() % CHUNK == 0));
            assert!(plan.ranges.iter().all(|r| !r.is_empty()));
            assert_eq!(plan.ranges.last().map(|r| r.end), Some(layout.trainable_len()));
            let mut order = plan.order.clone();
            order.sort_unstable();
            assert!(order.into_iter().eq(0..plan.ranges.len()));
        }
        let plan = Plan::new(&sit, &layout, 1);
        // Against the order of the array, but that the embeddings come last in any case.
        let place = |name: &str| {
            let entry = layout.find(name).unwrap();
            let bucket =
                plan.ranges.iter().position(|r| r.contains(&(entry.offset + entry.len() / 2))).unwrap();
            plan.order.iter().position(|&b| b == bucket).unwrap()
        };
        let names = [
            "projectors.0.2.weight",
            "blocks.3.mlp.fc1.weight",
            "blocks.2.mlp.fc1.weight",
            "blocks.1.mlp.fc1.weight",
            "blocks.0.mlp.fc1.weight",
            "t_embedder.mlp.2.weight",
        ];
        let places: Vec<usize> = names.iter().map(|name| place(name)).collect();
        assert!(places.is_sorted(), "{places:?}");
    }

    #[test]
    fn parts_of_a_batch_add_up_and_what_has_no_gradient_is_zero() {
        let (sit, layout) = (sit(), sit().layout());
        let comm: Arc<dyn Communicator> = Arc::new(Single::new());
        let entries: Vec<_> = layout.entries().iter().filter(|e| e.trainable).collect();
        for overlap in [true, false] {
            let exchange = Exchange { overlap, wire: Wire::F32, sharded: overlap };
            let mut gradients = Gradients::new(Plan::new(&sit, &layout, 100_000), exchange, comm.as_ref());
            let collector = gradients.collect(&comm);
            for part in 0..3 {
                if part == 2 {
                    collector.last_part();
                }
                for (i, entry) in entries.iter().enumerate().skip(1).rev() {
                    collector.gradient(entry.offset, &vec![(i * 10 + part) as f32; entry.len()]);
                }
            }
            assert!(collector.finish(&mut gradients).unwrap());
            let flat: Vec<f32> = gradients.pieces().flat_map(|(_, values)| values.iter().copied()).collect();
            assert_eq!(flat.len(), layout.trainable_len());
            for (i, entry) in entries.iter().enumerate() {
                let expected = if i == 0 { 0.0 } else { (30 * i + 3) as f32 };
                let values = &flat[entry.offset..entry.offset + entry.len()];
                assert!(values.iter().all(|&v| v == expected), "{}", entry.name);
            }
        }
    }

    #[test]
    fn a_gradient_that_is_not_finite_is_noticed() {
        let (sit, layout) = (sit(), sit().layout());
        let comm: Arc<dyn Communicator> = Arc::new(Single::new());
        let exchange = Exchange { overlap: true, wire: Wire::F32, sharded: false };
        let mut gradients = Gradients::new(Plan::new(&sit, &layout, 1 << 20), exchange, comm.as_ref());
        let entry = layout.entries().iter().find(|e| e.trainable).unwrap();
        for (value, finite) in [(1.0, true), (f32::NAN, false), (f32::INFINITY, false)] {
            let collector = gradients.collect(&comm);
            collector.last_part();
            let mut values = vec![0.5; entry.len()];
            values[3] = value;
            collector.gradient(entry.offset, &values);
            assert_eq!(collector.finish(&mut gradients).unwrap(), finite);
        }
    }
}
