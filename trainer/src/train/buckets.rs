//! Gradients on their way through a step: collected in buckets while the backward pass runs, and each bucket
//! summed over the ranks as soon as it is complete.
//!
//! A bucket is a contiguous range of the flat array. Buckets are summed in an order that follows from the
//! model alone, so that all ranks agree on it; their size changes no bit, because sums are taken element by
//! element in rank order.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use repa_comm::{Background, CommError, Communicator, Pending, Phases, Wire};

use super::plan::{Cut, Exchange, Plan};
use super::state::Update;
use super::weights::{Travelling, Weights};
use crate::ops::GradientSink;
use crate::train;

/// A step's gradients: one array a bucket.
#[derive(Debug)]
pub struct Gradients {
    cut: Arc<Cut>,
    data: Vec<Vec<f32>>,
}

impl Gradients {
    /// Zeros.
    #[must_use]
    pub fn new(cut: Arc<Cut>) -> Self {
        Self { data: cut.plan.ranges.iter().map(|range| vec![0.0; range.len()]).collect(), cut }
    }

    /// The sums that this rank gets, in the order of the flat array.
    pub fn pieces(&self) -> impl Iterator<Item = &[f32]> {
        self.cut.parts().zip(&self.data).map(|((_, local), data)| &data[local])
    }

    /// The buckets' vectors, to be given back by [`Gradients::keep`] or [`Collector::finish`].
    pub fn take(&mut self) -> Vec<Vec<f32>> {
        std::mem::take(&mut self.data)
    }

    /// Vectors for the next step's gradients.
    pub fn keep(&mut self, data: Vec<Vec<f32>>) {
        self.data = data;
    }

    /// Moves the weights by `update`. With a sharded optimizer each bucket's new weights go to all ranks while the
    /// next one's are computed; they come in the vectors of the gradients.
    pub fn apply(
        &mut self,
        update: &Update,
        state: &mut train::State,
        comm: &dyn Communicator,
    ) -> Travelling {
        let mut travelling = Vec::new();
        for (number, (_, local)) in self.cut.parts().enumerate() {
            let owned = &self.cut.owned[number];
            if !local.is_empty() {
                state.apply(update, owned, &self.data[number][local.clone()]);
            }
            if self.cut.exchange.sharded {
                // The gradients have done their work; the new weights take their place.
                let mut values = std::mem::take(&mut self.data[number]);
                values[local].copy_from_slice(&state.params[owned.clone()]);
                let how = Background { phases: Phases::Gather, wire: Wire::F32, bucket: number };
                travelling.push(Some(comm.start_f32(values, how)));
            }
        }
        travelling
    }
}

/// Takes a step's gradients from the backward pass.
pub struct Collector {
    cut: Arc<Cut>,
    comm: Arc<dyn Communicator>,
    /// Whose vectors the gradients are collected in.
    weights: Arc<Weights>,
    filling: Mutex<Filling>,
}

struct Filling {
    /// Empty before the first gradient, while weights may still come in their vectors.
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
        f.debug_struct("Collector").field("buckets", &self.cut.plan.ranges.len()).finish_non_exhaustive()
    }
}

impl GradientSink for Collector {
    fn gradient(&self, offset: usize, values: &[f32]) {
        let mut filling = self.begun();
        let parameter = self.cut.plan.parameters.partition_point(|p| p.start < offset);
        assert_eq!(
            self.cut.plan.parameters.get(parameter),
            Some(&(offset..offset + values.len())),
            "a gradient of no parameter"
        );
        let again = std::mem::replace(&mut filling.written[parameter], true);
        filling.add(&self.cut.plan, offset, values, again);
        self.launch(&mut filling, false);
    }

    fn last_part(&self) {
        self.lock().last_part = true;
    }
}

impl Collector {
    /// Begins a step. Gradients are collected in the vectors of `weights`.
    pub fn new(cut: &Arc<Cut>, weights: &Arc<Weights>, comm: &Arc<dyn Communicator>) -> Self {
        let filling = Filling {
            buckets: Vec::new(),
            written: vec![false; cut.plan.parameters.len()],
            last_part: false,
            next: 0,
            finite: true,
        };
        Self { cut: cut.clone(), comm: comm.clone(), weights: weights.clone(), filling: Mutex::new(filling) }
    }

    fn begun(&self) -> MutexGuard<'_, Filling> {
        let mut filling = self.lock();
        if filling.buckets.is_empty() {
            let memory = self.weights.take_memory().into_iter();
            let bucket = |data: Vec<f32>| Bucket { missing: data.len(), data: State::Filling(data) };
            filling.buckets = memory.map(bucket).collect();
        }
        filling
    }

    fn lock(&self) -> MutexGuard<'_, Filling> {
        // A panic elsewhere ends the process; the data are plain numbers.
        self.filling.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the sums of complete buckets, in the plan's order; of all that are left where `all`.
    fn launch(&self, filling: &mut Filling, all: bool) {
        while let Some(&number) = self.cut.plan.order.get(filling.next) {
            let bucket = &mut filling.buckets[number];
            if !all && (!self.cut.exchange.overlap || bucket.missing > 0) {
                return;
            }
            bucket.data = match std::mem::replace(&mut bucket.data, State::Moved) {
                State::Filling(data) => {
                    let Exchange { sharded, wire, .. } = self.cut.exchange;
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
        let mut filling = self.begun();
        for (number, parameter) in self.cut.plan.parameters.iter().enumerate() {
            if !filling.written[number] {
                filling.clear(&self.cut.plan, parameter);
            }
        }
        self.launch(&mut filling, true);
        gradients.data = vec![Vec::new(); self.cut.plan.ranges.len()];
        // In the order in which they were started, so that the first error is the cause of the others.
        for &number in &self.cut.plan.order {
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
    use crate::train::plan::tests::sit;
    use repa_comm::{Single, Wire};

    fn gradients(plan: Plan, exchange: Exchange) -> Gradients {
        Gradients::new(Arc::new(Cut::of(plan, exchange, |len| 0..len)))
    }

    fn collect(gradients: &mut Gradients, comm: &Arc<dyn Communicator>) -> Collector {
        let cut = gradients.cut.clone();
        let weights = Weights::new(&cut, crate::flat::zeros(0), Vec::new(), gradients.take());
        Collector::new(&cut, &Arc::new(weights), comm)
    }

    #[test]
    fn parts_of_a_batch_add_up_and_what_has_no_gradient_is_zero() {
        let (sit, layout) = (sit(), sit().layout());
        let comm: Arc<dyn Communicator> = Arc::new(Single::new());
        let entries: Vec<_> = layout.entries().iter().filter(|e| e.trainable).collect();
        for overlap in [true, false] {
            let exchange = Exchange { overlap, wire: Wire::F32, sharded: overlap };
            let mut gradients = gradients(Plan::new(&sit, &layout, 100_000), exchange);
            let collector = collect(&mut gradients, &comm);
            for part in 0..3 {
                if part == 2 {
                    collector.last_part();
                }
                for (i, entry) in entries.iter().enumerate().skip(1).rev() {
                    collector.gradient(entry.offset, &vec![(i * 10 + part) as f32; entry.len()]);
                }
            }
            assert!(collector.finish(&mut gradients).unwrap());
            let flat: Vec<f32> = gradients.pieces().flatten().copied().collect();
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
        let mut gradients = gradients(Plan::new(&sit, &layout, 1 << 20), exchange);
        let entry = layout.entries().iter().find(|e| e.trainable).unwrap();
        for (value, finite) in [(1.0, true), (f32::NAN, false), (f32::INFINITY, false)] {
            let collector = collect(&mut gradients, &comm);
            collector.last_part();
            let mut values = vec![0.5; entry.len()];
            values[3] = value;
            collector.gradient(entry.offset, &values);
            assert_eq!(collector.finish(&mut gradients).unwrap(), finite);
        }
    }
}
