//! Reading what a rank goes on from, and checking digests on the way: one pass over the disk.

use std::ops::Range;

use rayon::prelude::*;

use super::reader::{Checkpoint, Stretch, spread};
use super::stream::Stream;
use super::{Array, CheckpointError};
use crate::flat::{Flat, Part, Room};
use crate::params::Layout;

/// Bytes by which a rank's reading of other ranks' shards stays behind its own, so that it finds them in memory.
const DISTANCE: u64 = 32 << 20;

/// When a shard is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Turn {
    /// At once: no other rank of this job does before.
    First,
    /// Behind what is read at once: another rank brings it into memory.
    Later,
}

impl Checkpoint {
    /// Reads parts of arrays, as [`Checkpoint::read_ranges`] does for each of `wanted`. The shards `check` are read
    /// whole, and their digests compared; so are those of which more is wanted than not, which costs little then. The
    /// arrays take the place of those in `memory`, where these are large enough.
    ///
    /// # Errors
    /// The checkpoint is of another model, or cannot be read; or a digest is another than was written.
    pub(crate) fn read_checked<const N: usize>(
        &self,
        layout: &Layout,
        wanted: [(Array, &[Range<usize>]); N],
        check: &[usize],
        memory: Option<[Flat; N]>,
    ) -> Result<[Flat; N], CheckpointError> {
        let whole = |shard, needed| match check.contains(&shard) {
            true => Some(Turn::First),
            false => (2 * needed > self.manifest().shards[shard].bytes).then_some(Turn::Later),
        };
        self.read_parts(layout, wanted, &whole, memory)
    }

    /// Reads parts of arrays. `whole` says of a shard, and the number of its bytes that are needed, whether to read all
    /// of it and to check its digest, and when.
    pub(super) fn read_parts<const N: usize>(
        &self,
        layout: &Layout,
        wanted: [(Array, &[Range<usize>]); N],
        whole: &dyn Fn(usize, u64) -> Option<Turn>,
        memory: Option<[Flat; N]>,
    ) -> Result<[Flat; N], CheckpointError> {
        wanted.iter().try_for_each(|(array, _)| self.check(layout, *array))?;
        let mut memory = memory.into_iter().flatten();
        let mut rooms = wanted.map(|(_, ranges)| {
            let len = ranges.iter().map(Range::len).sum();
            memory.next().map_or_else(|| Room::new(len), |memory| Room::reusing(memory, len))
        });
        let mut work: Vec<Vec<(Stretch, Part)>> = Vec::new();
        work.resize_with(self.manifest().shards.len(), Vec::new);
        for ((array, ranges), room) in wanted.iter().zip(&mut rooms) {
            for (stretch, part) in spread(self.stretches(layout, *array, ranges), room.part()) {
                work[stretch.shard].push((stretch, part));
            }
        }
        let mut streams = Vec::new();
        let mut parts = Vec::new();
        for (shard, mut work) in work.into_iter().enumerate() {
            work.sort_unstable_by_key(|(stretch, _)| stretch.offset);
            if work.windows(2).any(|pair| pair[0].0.end() > pair[1].0.offset) {
                let problem = format!("two tensors share bytes of {}", self.manifest().shards[shard].file);
                return Err(CheckpointError::damaged(&self.dir(), problem));
            }
            let needed: u64 = work.iter().map(|(stretch, _)| stretch.end() - stretch.offset).sum();
            match whole(shard, needed) {
                Some(turn) => streams.push((turn, Stream::new(self, shard, work))),
                None if work.is_empty() => {}
                None => parts.push((shard, work)),
            }
        }
        streams.sort_by_key(|(turn, _)| *turn);
        let threads = rayon::current_num_threads().min(streams.len());
        let mut shares: Vec<Vec<_>> = Vec::new();
        shares.resize_with(threads, Vec::new);
        for (number, stream) in streams.into_iter().enumerate() {
            shares[number % threads].push(stream);
        }
        let (streamed, filled) = rayon::join(
            || shares.into_par_iter().try_for_each(|share| take_turns(share, DISTANCE)),
            || parts.into_par_iter().try_for_each(|(shard, work)| self.fill_from(shard, work)),
        );
        streamed.and(filled)?;
        Ok(rooms.map(Room::finish))
    }
}

/// Reads shards in one thread: this rank's own one after the other, and those that other ranks read first at a distance
/// beside the last of them. What others have read is in memory then, and is copied while the disk brings the rest.
pub(super) fn take_turns(mut streams: Vec<(Turn, Stream)>, distance: u64) -> Result<(), CheckpointError> {
    // Each is an open file.
    const SIDE_BY_SIDE: usize = 8;
    loop {
        streams.retain(|(_, stream)| !stream.is_done());
        let own = streams.iter().filter(|(turn, _)| *turn == Turn::First).count();
        let mut limit = if own == 0 { u64::MAX } else { 0 };
        let Some((turn, first)) = streams.first_mut() else { return Ok(()) };
        if *turn == Turn::First {
            first.advance()?;
            if own == 1 {
                limit = first.at().saturating_sub(distance);
            }
        }
        for (_, stream) in streams[own..].iter_mut().take(SIDE_BY_SIDE).filter(|(_, s)| s.at() < limit) {
            stream.advance()?;
        }
    }
}
