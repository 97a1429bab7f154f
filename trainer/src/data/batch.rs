//! Which samples of a global batch each rank takes. Sample numbers count through the run:
//! `step * global_batch + i`, across epoch boundaries, whatever the world size.

use std::ops::Range;

/// The positions of a global batch that `rank` of `world` takes: contiguous, and as even as the
/// batch allows (sizes differ by at most one; ranks may get none where the batch is smaller than
/// the world).
///
/// # Panics
/// If `rank` is not below `world`.
#[must_use]
pub fn rank_range(global_batch: usize, rank: usize, world: usize) -> Range<usize> {
    assert!(rank < world, "rank {rank} of a world of {world}");
    repa_comm::shard_range(global_batch, rank, world)
}

/// The run's sample numbers that `rank` takes of the global batch that begins at `start`.
///
/// # Panics
/// If `rank` is not below `world`.
#[must_use]
pub fn rank_samples(start: u64, global_batch: usize, rank: usize, world: usize) -> Range<u64> {
    let range = rank_range(global_batch, rank, world);
    start + range.start as u64..start + range.end as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ranks_partition_the_batch(global_batch in 0usize..5000, world in 1usize..70) {
            let ranges: Vec<_> = (0..world).map(|r| rank_range(global_batch, r, world)).collect();
            prop_assert_eq!(ranges[0].start, 0);
            prop_assert_eq!(ranges[world - 1].end, global_batch);
            prop_assert!(ranges.windows(2).all(|w| w[0].end == w[1].start));
            let smallest = ranges.iter().map(ExactSizeIterator::len).min().unwrap();
            let largest = ranges.iter().map(ExactSizeIterator::len).max().unwrap();
            prop_assert!(largest - smallest <= 1);
        }

        #[test]
        fn steps_follow_each_other(step in 0u64..1 << 40, global_batch in 1usize..5000, world in 1usize..70) {
            let first = rank_samples(step * global_batch as u64, global_batch, 0, world).start;
            let last = rank_samples(step * global_batch as u64, global_batch, world - 1, world).end;
            prop_assert_eq!(first, step * global_batch as u64);
            prop_assert_eq!(last, (step + 1) * global_batch as u64);
        }
    }
}
