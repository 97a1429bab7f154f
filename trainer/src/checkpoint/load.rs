//! Reading what a rank goes on from, and checking digests on the way: one pass over the disk.

use std::ops::Range;

use rayon::prelude::*;
use xxhash_rust::xxh3::Xxh3;

use super::reader::{Checkpoint, Stretch, spread};
use super::{Array, CheckpointError};
use crate::params::Layout;

impl Checkpoint {
    /// Reads parts of arrays, as [`Checkpoint::read_ranges`] does for each of `wanted`. The shards `check` are read
    /// whole, and their digests compared; so are those of which more is wanted than not, which costs little then.
    ///
    /// # Errors
    /// The checkpoint is of another model, or cannot be read; or a digest is another than was written.
    pub(crate) fn read_checked(
        &self,
        layout: &Layout,
        wanted: &[(Array, &[Range<usize>])],
        check: &[usize],
    ) -> Result<Vec<Vec<f32>>, CheckpointError> {
        wanted.iter().try_for_each(|(array, _)| self.check(layout, *array))?;
        let length = |ranges: &[Range<usize>]| ranges.iter().map(Range::len).sum();
        let mut arrays: Vec<Vec<f32>> = wanted.iter().map(|(_, ranges)| vec![0.0; length(ranges)]).collect();
        let mut work: Vec<Vec<(Stretch, &mut [f32])>> = Vec::new();
        work.resize_with(self.manifest().shards.len(), Vec::new);
        for ((array, ranges), out) in wanted.iter().zip(&mut arrays) {
            for (stretch, part) in spread(&self.stretches(layout, *array, ranges), out) {
                work[stretch.shard].push((stretch, part));
            }
        }
        let mut work: Vec<_> = work.into_iter().enumerate().collect();
        // Each rank begins elsewhere: the disk has several to read at a time, and each finds in memory what others have
        // read.
        work.rotate_left(check.first().copied().unwrap_or(0));
        work.into_par_iter().try_for_each(|(shard, mut work)| {
            work.sort_unstable_by_key(|(stretch, _)| stretch.offset);
            let needed: u64 = work.iter().map(|(stretch, _)| stretch.end() - stretch.offset).sum();
            if check.contains(&shard) || 2 * needed > self.manifest().shards[shard].bytes {
                self.stream(shard, work)
            } else if work.is_empty() {
                Ok(())
            } else {
                self.fill_from(shard, &mut work)
            }
        })?;
        Ok(arrays)
    }

    /// Reads a whole shard from its beginning to its end, takes stretches, by ascending offset, out of what goes by,
    /// and compares the digest.
    fn stream(&self, shard: usize, work: Vec<(Stretch, &mut [f32])>) -> Result<(), CheckpointError> {
        let error = |source| self.unreadable(shard, source);
        let source = self.source(shard).map_err(error)?;
        source.read_through();
        let size = self.manifest().shards[shard].bytes;
        let mut hash = Xxh3::new();
        let at_once = 2 * source.worth() as u64;
        let mut buffer = Vec::new();
        let mut work = work.into_iter().peekable();
        let mut begin = 0;
        while begin < size {
            let end = size.min(begin + at_once);
            // What is wanted whole goes where it is wanted at once.
            if let Some((stretch, part)) = work.peek_mut()
                && stretch.offset <= begin
                && end <= stretch.end()
            {
                let part: &mut [u8] = bytemuck::cast_slice_mut(part);
                let bytes = &mut part[(begin - stretch.offset) as usize..(end - stretch.offset) as usize];
                source.read_at(bytes, begin).map_err(error)?;
                hash.update(bytes);
                if stretch.end() == end {
                    work.next();
                }
                begin = end;
                continue;
            }
            buffer.resize((end - begin) as usize, 0);
            source.read_at(&mut buffer, begin).map_err(error)?;
            hash.update(&buffer);
            while let Some((stretch, part)) = work.peek_mut() {
                let (from, to) = (stretch.offset.max(begin), stretch.end().min(end));
                if from < to {
                    let part: &mut [u8] = bytemuck::cast_slice_mut(part);
                    part[(from - stretch.offset) as usize..(to - stretch.offset) as usize]
                        .copy_from_slice(&buffer[(from - begin) as usize..(to - begin) as usize]);
                }
                if stretch.end() > end {
                    break;
                }
                work.next();
            }
            begin = end;
        }
        match format!("{:016x}", hash.digest()) {
            found if found == self.manifest().shards[shard].xxh3 => Ok(()),
            found => Err(self.other_digest(shard, &found)),
        }
    }
}
