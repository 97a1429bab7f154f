//! The one definition of a sum over ranks, and how vectors are cut.

use crate::Collective;
use crate::communicator::{ReduceOp, shard_range};
use half::{bf16, f16};
use std::ops::Range;

/// A number that collectives can combine.
pub(crate) trait Element: bytemuck::Pod + Send {
    /// What values are combined in: half precision is added up in float32 and rounded once.
    type Wide: Copy;
    /// Tells the types apart in the check that all ranks are in the same operation.
    const CODE: u64;
    fn widen(self) -> Self::Wide;
    fn narrow(wide: Self::Wide) -> Self;
    fn add(a: Self::Wide, b: Self::Wide) -> Self::Wide;
    fn least(a: Self::Wide, b: Self::Wide) -> Self::Wide;
    fn greatest(a: Self::Wide, b: Self::Wide) -> Self::Wide;
}

macro_rules! float_element {
    ($type:ty, $wide:ty, $code:expr, $widen:expr, $narrow:expr) => {
        impl Element for $type {
            type Wide = $wide;
            const CODE: u64 = $code;
            #[inline(always)]
            fn widen(self) -> $wide {
                $widen(self)
            }
            #[inline(always)]
            fn narrow(wide: $wide) -> Self {
                $narrow(wide)
            }
            #[inline(always)]
            fn add(a: $wide, b: $wide) -> $wide {
                a + b
            }
            /// NaN if either is: an extreme must not hide a bad value on one rank.
            #[inline(always)]
            fn least(a: $wide, b: $wide) -> $wide {
                if b < a || b.is_nan() { b } else { a }
            }
            #[inline(always)]
            fn greatest(a: $wide, b: $wide) -> $wide {
                if b > a || b.is_nan() { b } else { a }
            }
        }
    };
}
float_element!(f32, f32, 1, std::convert::identity, std::convert::identity);
float_element!(f64, f64, 2, std::convert::identity, std::convert::identity);
float_element!(f16, f32, 3, f16::to_f32, f16::from_f32);
float_element!(bf16, f32, 4, bf16::to_f32, bf16::from_f32);

macro_rules! integer_element {
    ($type:ty, $code:expr) => {
        impl Element for $type {
            type Wide = $type;
            const CODE: u64 = $code;
            #[inline(always)]
            fn widen(self) -> $type {
                self
            }
            #[inline(always)]
            fn narrow(wide: $type) -> $type {
                wide
            }
            #[inline(always)]
            fn add(a: $type, b: $type) -> $type {
                a.wrapping_add(b)
            }
            #[inline(always)]
            fn least(a: $type, b: $type) -> $type {
                a.min(b)
            }
            #[inline(always)]
            fn greatest(a: $type, b: $type) -> $type {
                a.max(b)
            }
        }
    };
}
integer_element!(i64, 5);
integer_element!(u8, 6);

/// Elements added up at a time: small enough that the running sum stays in the first-level cache.
const BLOCK: usize = 1024;

/// Combines the ranks' values in rank order: rank 0's, then each next rank's onto it. `own` holds this rank's
/// values and receives the result; `other(r)` gives rank r's values (same length); `publish(offset, values)` sees
/// every finished stretch of the result while it is still in cache.
pub(crate) fn fold<'a, T: Element>(
    op: ReduceOp,
    rank: usize,
    size: usize,
    own: &mut [T],
    other: impl Fn(usize) -> &'a [T],
    publish: impl FnMut(usize, &[T]),
) {
    match op {
        ReduceOp::Sum => fold_with(T::add, rank, size, own, other, publish),
        ReduceOp::Min => fold_with(T::least, rank, size, own, other, publish),
        ReduceOp::Max => fold_with(T::greatest, rank, size, own, other, publish),
    }
}

fn fold_with<'a, T: Element>(
    combine: impl Fn(T::Wide, T::Wide) -> T::Wide,
    rank: usize,
    size: usize,
    own: &mut [T],
    other: impl Fn(usize) -> &'a [T],
    mut publish: impl FnMut(usize, &[T]),
) {
    let mut sum = [T::zeroed().widen(); BLOCK];
    let mut start = 0;
    while start < own.len() {
        let end = (start + BLOCK).min(own.len());
        let sum = &mut sum[..end - start];
        for source in 0..size {
            let values = if source == rank { &own[start..end] } else { &other(source)[start..end] };
            for (total, &value) in sum.iter_mut().zip(values) {
                *total = if source == 0 { value.widen() } else { combine(*total, value.widen()) };
            }
        }
        let own = &mut own[start..end];
        own.iter_mut().zip(&*sum).for_each(|(value, &wide)| *value = T::narrow(wide));
        publish(start, own);
        start = end;
    }
}

/// Which halves of an all-reduce to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phases {
    /// Both, an all-reduce: every rank ends with everything.
    ReduceAndGather,
    /// The first, a reduce-scatter: every rank ends with its shard's result.
    Reduce,
    /// The second, an all-gather: every rank's shard goes to all.
    Gather,
}

impl Phases {
    /// Whether values are added up, which rounds them as they travel.
    pub fn reduces(self) -> bool {
        self != Self::Gather
    }
    pub(crate) fn gathers(self) -> bool {
        self != Self::Reduce
    }
}

impl From<Phases> for Collective {
    fn from(phases: Phases) -> Self {
        match phases {
            Phases::ReduceAndGather => Self::AllReduce,
            Phases::Reduce => Self::ReduceScatter,
            Phases::Gather => Self::AllGather,
        }
    }
}

/// A vector cut by rank into shards and each shard into pieces of at most `piece` elements; all ranks go through
/// the same number of steps.
pub(crate) struct Pieces {
    shards: Vec<Range<usize>>,
    pub(crate) piece: usize,
    pub(crate) steps: usize,
}

impl Pieces {
    /// `budget` bytes hold one piece for every rank; a piece is a multiple of 16 elements.
    pub(crate) fn new<T>(len: usize, size: usize, budget: usize) -> Self {
        let shards: Vec<_> = (0..size).map(|rank| shard_range(len, rank, size)).collect();
        let piece = (budget / size_of::<T>() / size / 16 * 16).max(16);
        let steps = shards[0].len().div_ceil(piece).max(1);
        Self { shards, piece, steps }
    }

    /// The elements of `rank`'s shard that step `step` handles (may be empty).
    pub(crate) fn of(&self, rank: usize, step: usize) -> Range<usize> {
        let shard = &self.shards[rank];
        let start = (shard.start + step * self.piece).min(shard.end);
        start..(start + self.piece).min(shard.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_start_at_rank_zero_and_go_up() {
        // 1e8 + 1 - 1e8 is 0 in float32 in this order and 1 in others.
        let values = [[1e8f32; 3], [1.0; 3], [-1e8; 3]];
        for rank in 0..3 {
            let mut own = values[rank];
            fold(ReduceOp::Sum, rank, 3, &mut own, |r| &values[r], |_, _| ());
            assert_eq!(own, [0.0; 3]);
        }
    }

    #[test]
    fn an_extreme_does_not_hide_a_nan() {
        for values in [[f64::NAN, 1.0], [1.0, f64::NAN]] {
            for op in [ReduceOp::Min, ReduceOp::Max] {
                let mut own = [values[0]];
                fold(op, 0, 2, &mut own, |_| &values[1..], |_, _| ());
                assert!(own[0].is_nan());
            }
        }
    }

    #[test]
    fn pieces_cover_every_element_once() {
        for (len, size) in [(0, 1), (1, 3), (100, 3), (1000, 4), (12345, 7)] {
            let pieces = Pieces::new::<f32>(len, size, 1024);
            let mut seen = vec![0; len];
            for step in 0..pieces.steps {
                for rank in 0..size {
                    pieces.of(rank, step).for_each(|i| seen[i] += 1);
                }
            }
            assert!(seen.iter().all(|&n| n == 1), "{len} over {size}");
        }
    }
}
