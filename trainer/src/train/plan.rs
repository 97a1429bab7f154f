//! How the flat array is cut into buckets, in which order they are summed over the ranks, and which rank keeps what.

use std::borrow::Cow;
use std::ops::Range;

use repa_comm::{CommError, Communicator, Wire};

use crate::config::{Config, Sharding};
use crate::model::SitConfig;
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
    pub(super) parameters: Vec<Range<usize>>,
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

/// A rank's buckets.
#[derive(Debug)]
pub struct Cut {
    /// Where they are.
    pub plan: Plan,
    /// How they are summed.
    pub exchange: Exchange,
    /// The part of each bucket, as a range of the flat array, whose sums this rank gets: all of it, or its shard.
    pub owned: Vec<Range<usize>>,
}

impl Cut {
    /// As configured.
    #[must_use]
    pub fn new(config: &Config, layout: &Layout, comm: &dyn Communicator) -> Self {
        let plan = Plan::new(&config.sit(), layout, config.comm.bucket_mib << 20);
        Self::of(plan, Exchange::new(config), |len| comm.shard(len))
    }

    /// With shards that `shard` gives for a length.
    #[must_use]
    pub fn of(plan: Plan, exchange: Exchange, shard: impl Fn(usize) -> Range<usize>) -> Self {
        let part = |bucket: &Range<usize>| {
            let shard = shard(bucket.len());
            bucket.start + shard.start..bucket.start + shard.end
        };
        let owned = plan
            .ranges
            .iter()
            .map(|bucket| if exchange.sharded { part(bucket) } else { bucket.clone() })
            .collect();
        Self { plan, exchange, owned }
    }

    /// Numbers of the buckets that a range of the flat array lies in.
    pub fn buckets_of(&self, range: &Range<usize>) -> Range<usize> {
        let ranges = &self.plan.ranges;
        let first = ranges.partition_point(|bucket| bucket.end <= range.start);
        first..ranges.partition_point(|bucket| bucket.start < range.end).max(first)
    }

    /// Each bucket, and where in it this rank's own part is.
    pub fn parts(&self) -> impl Iterator<Item = (&Range<usize>, Range<usize>)> {
        self.plan
            .ranges
            .iter()
            .zip(&self.owned)
            .map(|(bucket, own)| (bucket, own.start - bucket.start..own.end - bucket.start))
    }

    /// All of an array of which this rank keeps the owned parts, `own`. Called by all ranks, between steps.
    ///
    /// # Errors
    /// The ranks could not talk.
    pub fn whole<'a>(
        &self,
        own: Cow<'a, [f32]>,
        comm: &dyn Communicator,
    ) -> Result<Cow<'a, [f32]>, CommError> {
        if !self.exchange.sharded {
            return Ok(own);
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

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::train) fn sit() -> SitConfig {
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
}
