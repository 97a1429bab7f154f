//! Reading a shard from its beginning to its end, and its digest on the way.

use std::iter::Peekable;
use std::vec::IntoIter;

use xxhash_rust::xxh3::Xxh3;

use super::CheckpointError;
use super::reader::{Checkpoint, Stretch};
use super::storage::Source;
use crate::flat::Part;

/// A shard that is being read.
pub(super) struct Stream<'a> {
    checkpoint: &'a Checkpoint,
    shard: usize,
    /// Open from the first piece to the last.
    source: Option<Box<dyn Source>>,
    size: u64,
    /// What has gone by.
    at: u64,
    hash: Xxh3,
    /// What is taken out of what goes by, by ascending offset.
    work: Peekable<IntoIter<(Stretch, Part<'a>)>>,
    buffer: Vec<u8>,
}

impl<'a> Stream<'a> {
    /// From the shard's beginning. `work` is ascending by offset, and apart.
    pub(super) fn new(checkpoint: &'a Checkpoint, shard: usize, work: Vec<(Stretch, Part<'a>)>) -> Self {
        Self {
            checkpoint,
            shard,
            source: None,
            size: checkpoint.manifest().shards[shard].bytes,
            at: 0,
            hash: Xxh3::new(),
            work: work.into_iter().peekable(),
            buffer: Vec::new(),
        }
    }

    /// Bytes that have gone by.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    /// Whether all of it has gone by.
    pub(super) fn is_done(&self) -> bool {
        self.at == self.size
    }

    /// Reads the next piece of it; of the last one the digest is compared.
    pub(super) fn advance(&mut self) -> Result<(), CheckpointError> {
        let unreadable = |e| self.checkpoint.unreadable(self.shard, e);
        let source = match self.source.take() {
            Some(source) => source,
            None => {
                let source = self.checkpoint.source(self.shard).map_err(unreadable)?;
                source.read_through();
                source
            }
        };
        let begin = self.at;
        let at_once = source.at_once() as u64;
        let mut end = self.size.min(begin + at_once);
        // What is wanted goes where it is wanted at once, if that is worth a read of its own.
        let worth = at_once / 2;
        match self.work.peek_mut() {
            Some((stretch, part)) if stretch.offset <= begin && begin + worth <= stretch.end() => {
                end = end.min(stretch.end());
                let len = (end - begin) as usize / size_of::<f32>();
                let bytes = part.take_filled(len, |out| source.read_new(out, begin)).map_err(unreadable)?;
                self.hash.update(bytes);
                if stretch.end() == end {
                    self.work.next();
                }
            }
            next => {
                if let Some((stretch, _)) = next
                    && begin < stretch.offset
                    && stretch.offset + worth <= stretch.end()
                {
                    end = end.min(stretch.offset);
                }
                self.buffer.resize((end - begin) as usize, 0);
                source.read_at(&mut self.buffer, begin).map_err(unreadable)?;
                self.hash.update(&self.buffer);
                self.take_out(begin, end);
            }
        }
        self.at = end;
        if !self.is_done() {
            self.source = Some(source);
            return Ok(());
        }
        match format!("{:016x}", self.hash.digest()) {
            found if found == self.checkpoint.manifest().shards[self.shard].xxh3 => Ok(()),
            found => Err(self.checkpoint.other_digest(self.shard, &found)),
        }
    }

    /// Copies what is wanted of these bytes, which are in the buffer.
    fn take_out(&mut self, begin: u64, end: u64) {
        while let Some((stretch, part)) = self.work.peek_mut() {
            let (from, to) = (stretch.offset.max(begin), stretch.end().min(end));
            if from < to {
                let part = part.take((to - from) as usize / size_of::<f32>());
                bytemuck::cast_slice_mut(part)
                    .copy_from_slice(&self.buffer[(from - begin) as usize..(to - begin) as usize]);
            }
            if stretch.end() > end {
                return;
            }
            self.work.next();
        }
    }
}
