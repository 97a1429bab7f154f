//! Gradients on their way through a step: collected in buckets while the backward pass runs, and each bucket
//! summed over the ranks as soon as it is complete.
//!
//! A bucket is a contiguous range of the flat array. Buckets are summed in an order that follows from the
//! model alone, so that all ranks agree on it; their size changes no bit, because sums are taken element by
//! element in rank order.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use repa_comm::{Background, CommError, Communicator, Pending, Phases, Wire};

use crate::model::SitConfig;
use crate::ops::GradientSink;
use crate::optim::CHUNK;
use crate::params::Layout;

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

/// A step's gradients: one array a bucket.
#[derive(Debug)]
pub struct Gradients {
    plan: Arc<Plan>,
    data: Vec<Vec<f32>>,
}

impl Gradients {
    /// Zeros.
    #[must_use]
    pub fn new(plan: Plan) -> Self {
        let data = plan.ranges.iter().map(|range| vec![0.0; range.len()]).collect();
        Self { plan: Arc::new(plan), data }
    }

    /// Each bucket's range of the flat array, and its values.
    pub fn pieces(&self) -> Vec<(Range<usize>, &[f32])> {
        self.plan.ranges.iter().cloned().zip(self.data.iter().map(Vec::as_slice)).collect()
    }

    /// Begins a step: what the sink is given becomes the gradients that [`Collector::finish`] returns here.
    /// With `overlap`, buckets are summed as they are completed, else all at the end.
    pub fn collect(&mut self, comm: &Arc<dyn Communicator>, overlap: bool) -> Arc<Collector> {
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
            overlap,
            filling: Mutex::new(filling),
        })
    }
}

/// Takes a step's gradients from the backward pass.
pub struct Collector {
    plan: Arc<Plan>,
    comm: Arc<dyn Communicator>,
    overlap: bool,
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
            if !all && (!self.overlap || bucket.missing > 0) {
                return;
            }
            bucket.data = match std::mem::replace(&mut bucket.data, State::Moved) {
                State::Filling(data) => {
                    let (phases, wire) = (Phases::ReduceAndGather, Wire::F32);
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
        let mut gradients = Gradients::new(Plan::new(&sit, &layout, 100_000));
        let entries: Vec<_> = layout.entries().iter().filter(|e| e.trainable).collect();
        for overlap in [true, false, true] {
            let collector = gradients.collect(&comm, overlap);
            for part in 0..3 {
                if part == 2 {
                    collector.last_part();
                }
                for (i, entry) in entries.iter().enumerate().skip(1).rev() {
                    collector.gradient(entry.offset, &vec![(i * 10 + part) as f32; entry.len()]);
                }
            }
            assert!(collector.finish(&mut gradients).unwrap());
            let flat: Vec<f32> =
                gradients.pieces().iter().flat_map(|(_, values)| values.iter().copied()).collect();
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
        let mut gradients = Gradients::new(Plan::new(&sit, &layout, 1 << 20));
        let entry = layout.entries().iter().find(|e| e.trainable).unwrap();
        for (value, finite) in [(1.0, true), (f32::NAN, false), (f32::INFINITY, false)] {
            let collector = gradients.collect(&comm, true);
            collector.last_part();
            let mut values = vec![0.5; entry.len()];
            values[3] = value;
            collector.gradient(entry.offset, &values);
            assert_eq!(collector.finish(&mut gradients).unwrap(), finite);
        }
    }
}
