//! Reading one tensor after another.

use super::reader::Checkpoint;
use super::{Array, CheckpointError};

/// Shards of which something is kept.
const WINDOWS: usize = 16;

/// Reads a checkpoint's tensors, and of each shard a little further than it was asked: a place that takes its time for
/// every read is asked once for many small tensors that follow one another.
#[derive(Debug)]
pub struct Tensors<'a> {
    checkpoint: &'a Checkpoint,
    /// The one that was used last comes last.
    windows: Vec<Window>,
}

/// What was read of a shard.
#[derive(Debug)]
struct Window {
    shard: usize,
    begin: u64,
    bytes: Vec<u8>,
}

impl Window {
    fn holds(&self, shard: usize, begin: u64, end: u64) -> bool {
        self.shard == shard && self.begin <= begin && end <= self.begin + self.bytes.len() as u64
    }
}

impl<'a> Tensors<'a> {
    /// Of a checkpoint.
    #[must_use]
    pub fn of(checkpoint: &'a Checkpoint) -> Self {
        Self { checkpoint, windows: Vec::new() }
    }

    /// The elements of one tensor of an array, frozen ones included; None where the checkpoint lacks it.
    ///
    /// # Errors
    /// A shard cannot be read.
    pub fn tensor(&mut self, array: Array, name: &str) -> Result<Option<Vec<f32>>, CheckpointError> {
        let checkpoint = self.checkpoint;
        let tensors = checkpoint.manifest().tensors.get(&array);
        let Some(tensor) = tensors.and_then(|tensors| tensors.get(name)) else { return Ok(None) };
        let mut out = vec![0.0f32; tensor.shape.iter().product()];
        for piece in &tensor.pieces {
            let part = bytemuck::cast_slice_mut(&mut out[piece.start..piece.end]);
            self.read(piece.shard, piece.offset, part)?;
        }
        Ok(Some(out))
    }

    fn read(&mut self, shard: usize, begin: u64, out: &mut [u8]) -> Result<(), CheckpointError> {
        let end = begin + out.len() as u64;
        let known = self.windows.iter().position(|window| window.holds(shard, begin, end));
        let window = match known {
            Some(at) => self.windows.remove(at),
            None => {
                let error = |source| self.checkpoint.unreadable(shard, source);
                let source = self.checkpoint.source(shard).map_err(error)?;
                if out.len() >= source.worth() {
                    return source.read_at(out, begin).map_err(error);
                }
                let last = self.checkpoint.manifest().shards[shard].bytes;
                let end = last.min(begin + source.worth() as u64);
                let mut bytes = vec![0; (end - begin) as usize];
                source.read_at(&mut bytes, begin).map_err(error)?;
                self.windows.retain(|window| window.shard != shard);
                if self.windows.len() == WINDOWS {
                    self.windows.remove(0);
                }
                Window { shard, begin, bytes }
            }
        };
        let from = (begin - window.begin) as usize;
        out.copy_from_slice(&window.bytes[from..from + out.len()]);
        self.windows.push(window);
        Ok(())
    }
}
