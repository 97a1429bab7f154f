//! Writing a rank's shard.

use std::ops::Range;

use repa_comm::shard_range;
use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use xxhash_rust::xxh3::Xxh3;

use super::storage::{Sink, Storage, name};
use super::{Array, CheckpointError, Piece, ShardRecord};
use crate::flat::PAGE;
use crate::params::Layout;

#[cfg(target_endian = "big")]
compile_error!("checkpoints are written without byte swapping: little-endian hosts only");

/// What a rank writes of one flat array.
#[derive(Debug, Clone)]
pub struct Part<'a> {
    /// The array.
    pub array: Array,
    /// Ranges of it, ascending and apart.
    pub ranges: Vec<Range<usize>>,
    /// Their elements, one range after the other.
    pub values: &'a [f32],
}

/// The flat arrays of a run, in layout order, all of the same length.
#[derive(Debug, Clone, Copy)]
pub struct Arrays<'a> {
    /// Weights.
    pub model: &'a [f32],
    /// Moving average of the weights.
    pub ema: &'a [f32],
    /// AdamW's first moment.
    pub exp_avg: &'a [f32],
    /// AdamW's second moment.
    pub exp_avg_sq: &'a [f32],
}

impl<'a> Arrays<'a> {
    /// The even part of `rank` of `world` ranks that all have everything.
    pub fn parts(&self, rank: usize, world: usize) -> Vec<Part<'a>> {
        let values = [self.model, self.ema, self.exp_avg, self.exp_avg_sq];
        let part = |(array, values): (Array, &'a [f32])| {
            let range = shard_range(values.len(), rank, world);
            Part { array, values: &values[range.clone()], ranges: vec![range] }
        };
        Array::ALL.into_iter().zip(values).map(part).collect()
    }
}

/// A frozen parameter's value, kept where it may differ from the one that follows from the model: an
/// imported checkpoint must be able to give back what came in.
#[derive(Debug, Clone, Copy)]
pub struct Frozen<'a> {
    /// [`Array::Model`] or [`Array::Ema`].
    pub array: Array,
    /// Index of the parameter in the layout.
    pub number: usize,
    /// Its elements.
    pub values: &'a [f32],
}

/// Writes the shard of a rank, and brings it to disk.
pub(super) fn write(
    storage: &dyn Storage,
    step: u64,
    layout: &Layout,
    parts: &[Part],
    frozen: &[Frozen],
    (rank, world): (usize, usize),
) -> Result<ShardRecord, CheckpointError> {
    let file = format!("rank-{rank:05}-of-{world:05}.safetensors");

    let mut names = Vec::new();
    let mut pieces = Vec::new();
    let mut offset = 0;
    // One safetensors entry holds all that the shard has of a tensor, one piece after the other.
    let mut place = |array: Array, number: usize, parts: &[Range<usize>]| {
        let entry = &layout.entries()[number];
        let elements = parts.iter().map(Range::len).sum::<usize>();
        let bytes = elements * size_of::<f32>();
        names.push((
            format!("{}.{}", array.prefix(), entry.name),
            TensorInfo { dtype: Dtype::F32, shape: vec![elements], data_offsets: (offset, offset + bytes) },
        ));
        for part in parts {
            let piece = Piece { shard: rank, offset: offset as u64, start: part.start, end: part.end };
            pieces.push((array, number, piece));
            offset += part.len() * size_of::<f32>();
        }
    };
    for Part { array, ranges, values } in parts {
        assert_eq!(ranges.iter().map(Range::len).sum::<usize>(), values.len(), "a part does not fit");
        for (number, parts) in tensors(layout, ranges) {
            place(*array, number, &parts);
        }
    }
    for value in frozen {
        assert_eq!(value.values.len(), layout.entries()[value.number].len(), "a frozen value does not fit");
        place(value.array, value.number, std::slice::from_ref(&(0..value.values.len())));
    }
    let header = header(names, rank, world);
    for (_, _, piece) in &mut pieces {
        piece.offset += header.len() as u64;
    }

    let write = || -> std::io::Result<String> {
        let mut out = Hashed { file: storage.create(step, &file)?, hash: Xxh3::new() };
        out.write(&header)?;
        for part in parts {
            out.write(bytemuck::cast_slice(part.values))?;
        }
        for value in frozen {
            out.write(bytemuck::cast_slice(value.values))?;
        }
        out.finish()
    };
    let xxh3 = write().map_err(|source| {
        let path = storage.path(&name(step)).join(&file);
        CheckpointError::Write { path, source }
    })?;
    Ok(ShardRecord { file, bytes: (header.len() + offset) as u64, xxh3, pieces })
}

/// The trainable parameters that ranges of the flat array meet, and the elements of each that they hold.
fn tensors(layout: &Layout, ranges: &[Range<usize>]) -> Vec<(usize, Vec<Range<usize>>)> {
    let mut found = Vec::new();
    let mut next = 0;
    for (number, entry) in layout.entries().iter().enumerate().filter(|(_, entry)| entry.trainable) {
        let whole = entry.offset..entry.offset + entry.len();
        next += ranges[next..].partition_point(|range| range.end <= whole.start);
        let parts: Vec<Range<usize>> = ranges[next..]
            .iter()
            .take_while(|range| range.start < whole.end)
            .map(|range| range.start.max(whole.start) - whole.start..range.end.min(whole.end) - whole.start)
            .filter(|part| !part.is_empty())
            .collect();
        if !parts.is_empty() {
            found.push((number, parts));
        }
    }
    found
}

/// safetensors' header with its length before it, padded so that the data begins on a page, as it does in memory
/// ([`crate::flat`] says why). Its bytes follow
/// from the tensors alone (the library keeps the file's own metadata in a hash map, in any order).
fn header(tensors: Vec<(String, TensorInfo)>, rank: usize, world: usize) -> Vec<u8> {
    let about = serde_json::json!({
        "format": super::manifest::FORMAT,
        "rank": rank.to_string(),
        "world_size": world.to_string(),
    });
    let mut fields = serde_json::Map::from_iter([("__metadata__".to_owned(), about)]);
    for (name, info) in tensors {
        fields.insert(name, serde_json::to_value(info).expect("a tensor's description serialises"));
    }
    let mut json = serde_json::to_vec(&fields).expect("a header serialises");
    json.resize((8 + json.len()).next_multiple_of(PAGE) - 8, b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.extend(json);
    header
}

struct Hashed {
    file: Box<dyn Sink>,
    hash: Xxh3,
}

impl Hashed {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        const AT_ONCE: usize = 1 << 20;
        // Hashed and written while it is in the cache.
        for part in bytes.chunks(AT_ONCE) {
            self.hash.update(part);
            self.file.write(part)?;
        }
        Ok(())
    }

    fn finish(self) -> std::io::Result<String> {
        self.file.finish()?;
        Ok(format!("{:016x}", self.hash.digest()))
    }
}
