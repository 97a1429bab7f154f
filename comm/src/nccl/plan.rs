//! How a vector goes through the staging buffers: in which steps, and what is where.
//!
//! NCCL's reduce-scatter and all-gather want the same number of elements for every rank, in the order of the ranks.
//! Shards differ by one element. So a buffer has a slot for every rank, as long as the longest part in it; what
//! lies between a shorter part and the next slot is whatever was there before, is added up with the rest and never read.

use crate::reduce::{Phases, Pieces};
use std::ops::Range;

/// The steps of one collective.
pub(super) struct Plan {
    phases: Phases,
    len: usize,
    rank: usize,
    size: usize,
    /// Elements of a step of an all-reduce.
    whole: usize,
    pieces: Pieces,
}

/// Elements of the vector, and where the first lies in the buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) vector: Range<usize>,
    pub(super) at: usize,
}

/// What one step moves; all numbers are elements.
pub(super) struct Step {
    /// From the vector into the buffer.
    pub(super) takes: Vec<Part>,
    /// What of the buffer goes to the device.
    pub(super) upload: Range<usize>,
    /// NCCL's count: of the vector's elements in an all-reduce, of every rank's otherwise.
    pub(super) count: usize,
    /// What of the buffer comes back.
    pub(super) download: Range<usize>,
    /// From the buffer into the vector.
    pub(super) gives: Vec<Part>,
}

impl Plan {
    /// `budget` bytes hold a step's values of type `T`.
    pub(super) fn new<T>(phases: Phases, len: usize, rank: usize, size: usize, budget: usize) -> Self {
        let whole = (budget / size_of::<T>()).max(1);
        Self { phases, len, rank, size, whole, pieces: Pieces::new::<T>(len, size, budget) }
    }

    pub(super) fn steps(&self) -> usize {
        match self.phases {
            Phases::ReduceAndGather => self.len.div_ceil(self.whole),
            _ if self.len == 0 => 0,
            _ => self.pieces.steps,
        }
    }

    pub(super) fn step(&self, step: usize) -> Step {
        if self.phases == Phases::ReduceAndGather {
            let vector = step * self.whole..((step + 1) * self.whole).min(self.len);
            let count = vector.len();
            let part = vec![Part { vector, at: 0 }];
            return Step { takes: part.clone(), upload: 0..count, count, download: 0..count, gives: part };
        }
        // Rank 0's part is never shorter than another's. NCCL is faster where slots begin at round addresses.
        let slot = self.pieces.of(0, step).len().next_multiple_of(16);
        let part = |rank: usize| Part { vector: self.pieces.of(rank, step), at: rank * slot };
        let all = || (0..self.size).map(part).collect();
        let (mine, mine_at) = (vec![part(self.rank)], self.rank * slot..(self.rank + 1) * slot);
        let whole = 0..self.size * slot;
        if self.phases == Phases::Reduce {
            Step { takes: all(), upload: whole, count: slot, download: mine_at, gives: mine }
        } else {
            Step { takes: mine, upload: mine_at, count: slot, download: whole, gives: all() }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard_range;
    use proptest::prelude::*;

    /// What NCCL does in place to the ranks' buffers.
    fn collective(phases: Phases, buffers: &mut [Vec<i32>], count: usize) {
        let sum = |buffers: &[Vec<i32>], i: usize| buffers.iter().map(|buffer| buffer[i]).sum::<i32>();
        let before = buffers.to_vec();
        for (rank, buffer) in buffers.iter_mut().enumerate() {
            match phases {
                Phases::ReduceAndGather => (0..count).for_each(|i| buffer[i] = sum(&before, i)),
                Phases::Reduce => {
                    (rank * count..(rank + 1) * count).for_each(|i| buffer[i] = sum(&before, i));
                }
                Phases::Gather => (0..before.len() * count).for_each(|i| buffer[i] = before[i / count][i]),
            }
        }
    }

    /// All ranks' vectors after the collective.
    fn run(phases: Phases, vectors: &mut [Vec<i32>], budget: usize) {
        let size = vectors.len();
        let len = vectors[0].len();
        let capacity = budget / size_of::<i32>();
        let plans: Vec<_> = (0..size).map(|rank| Plan::new::<i32>(phases, len, rank, size, budget)).collect();
        // Junk, where a step must not rely on zeros.
        let (mut hosts, mut devices) = (vec![vec![77; capacity]; size], vec![vec![-55; capacity]; size]);
        for step in 0..plans[0].steps() {
            let steps: Vec<_> = plans.iter().map(|plan| plan.step(step)).collect();
            for (rank, step) in steps.iter().enumerate() {
                for Part { vector, at } in &step.takes {
                    hosts[rank][*at..at + vector.len()].copy_from_slice(&vectors[rank][vector.clone()]);
                }
                let upload = step.upload.clone();
                devices[rank][upload.clone()].copy_from_slice(&hosts[rank][upload]);
                assert_eq!(step.count, steps[0].count, "all ranks pass the same count");
            }
            collective(phases, &mut devices, steps[0].count);
            for (rank, step) in steps.iter().enumerate() {
                let download = step.download.clone();
                hosts[rank][download.clone()].copy_from_slice(&devices[rank][download]);
                for Part { vector, at } in &step.gives {
                    vectors[rank][vector.clone()].copy_from_slice(&hosts[rank][*at..at + vector.len()]);
                }
            }
        }
    }

    proptest! {
        #[test]
        fn collectives_in_steps_are_collectives(
            len in 0usize..700,
            size in 1usize..9,
            // Room for 16 elements of each rank, at least.
            room in 1usize..30,
        ) {
            let budget = room * size * 16 * size_of::<i32>();
            let inputs: Vec<Vec<i32>> =
                (0..size).map(|rank| (0..len).map(|i| (i * 31 + rank * 7) as i32 % 1000).collect()).collect();
            let sums: Vec<i32> = (0..len).map(|i| inputs.iter().map(|input| input[i]).sum()).collect();

            let mut whole = inputs.clone();
            run(Phases::ReduceAndGather, &mut whole, budget);
            prop_assert!(whole.iter().all(|vector| *vector == sums));

            let mut halves = inputs.clone();
            run(Phases::Reduce, &mut halves, budget);
            for (rank, vector) in halves.iter_mut().enumerate() {
                let shard = shard_range(len, rank, size);
                prop_assert_eq!(&vector[shard.clone()], &sums[shard.clone()]);
                // The rest may be anything.
                vector.iter_mut().enumerate().filter(|(i, _)| !shard.contains(i)).for_each(|(_, v)| *v = 9);
            }
            run(Phases::Gather, &mut halves, budget);
            prop_assert!(halves.iter().all(|vector| *vector == sums));
        }
    }
}
