//! Reading checkpoints, on any world size.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;
use xxhash_rust::xxh3::xxh3_64;

use super::manifest::{FORMAT, MANIFEST, MANIFEST_DIGEST, Shard, VERSION};
use super::storage::{Source, Storage, name, read_small};
use super::stream::Stream;
use super::{Array, CheckpointError, Manifest, Piece, Progress, TensorRecord, split};
use crate::flat::{Flat, Part};
use crate::params::Layout;

/// A complete checkpoint.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    storage: Arc<dyn Storage>,
    step: u64,
    manifest: Manifest,
}

/// A stretch of a shard that a reader wants, and where it wants it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stretch {
    /// Number of the shard.
    pub(crate) shard: usize,
    /// Its first byte in the shard.
    pub(crate) offset: u64,
    /// The first element of the output that it fills.
    pub(crate) at: usize,
    /// Elements.
    pub(crate) len: usize,
}

impl Stretch {
    /// The first byte in the shard that is not its.
    pub(super) fn end(&self) -> u64 {
        self.offset + (self.len * size_of::<f32>()) as u64
    }

    /// Whether another goes on where this one ends, in the shard and in the output.
    fn precedes(&self, next: &Self) -> bool {
        self.shard == next.shard && self.end() == next.offset && self.at + self.len == next.at
    }
}

impl Checkpoint {
    /// Opens the checkpoint that a path names (`…/step-00050000`): reads the manifest, and checks that it makes
    /// sense and that the shards have their sizes.
    ///
    /// # Errors
    /// The manifest or a shard is missing or damaged.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let Some((checkpoints, step)) = split(path) else {
            let problem = "its name is not that of a checkpoint, step- and a number";
            return Err(CheckpointError::damaged(path, problem));
        };
        checkpoints.open(step)
    }

    /// The checkpoint of a step in a place; see [`Checkpoint::open`].
    pub(super) fn of(storage: Arc<dyn Storage>, step: u64) -> Result<Self, CheckpointError> {
        let checkpoint = Self::with_any_shards(storage, step)?;
        let missing = checkpoint.missing()?;
        let Some(first) = missing.first() else { return Ok(checkpoint) };
        let file = &checkpoint.manifest.shards[*first].file;
        let path = checkpoint.dir().join(file);
        if !checkpoint.manifest.node_local {
            return Err(CheckpointError::damaged(&path, "it is missing"));
        }
        Err(CheckpointError::Elsewhere {
            path: checkpoint.dir(),
            missing: missing.len(),
            first: file.clone(),
        })
    }

    /// As [`Checkpoint::of`], where shards may be missing because other nodes have them.
    pub(crate) fn with_any_shards(storage: Arc<dyn Storage>, step: u64) -> Result<Self, CheckpointError> {
        let path = |file: &str| storage.path(&name(step)).join(file);
        let small = |file: &str| {
            read_small(storage.as_ref(), step, file)
                .map_err(|source| CheckpointError::Read { path: path(file), source })
        };
        let (digest, text) = (small(MANIFEST_DIGEST)?, small(MANIFEST)?);
        let path = path(MANIFEST);
        if digest != format!("{:016x}\n", xxh3_64(&text)).as_bytes() {
            return Err(CheckpointError::damaged(
                &path,
                format!("its digest is not the one in {MANIFEST_DIGEST}"),
            ));
        }
        let manifest: Manifest =
            serde_json::from_slice(&text).map_err(|e| CheckpointError::damaged(&path, e.to_string()))?;
        if manifest.format != FORMAT || manifest.version != VERSION {
            let found = format!("{} version {}", manifest.format, manifest.version);
            let problem = format!("it is {found:?}, and this program reads {FORMAT} version {VERSION}");
            return Err(CheckpointError::damaged(&path, problem));
        }
        for (name, tensor) in manifest.tensors.values().flatten() {
            whole(tensor, &manifest.shards)
                .map_err(|problem| CheckpointError::damaged(&path, format!("{name}: {problem}")))?;
        }
        Ok(Self { storage, step, manifest })
    }

    pub(super) fn with_manifest(storage: Arc<dyn Storage>, step: u64, manifest: Manifest) -> Self {
        Self { storage, step, manifest }
    }

    /// Numbers of the shards that are not there.
    ///
    /// # Errors
    /// One is there, with another size than it was written with, or cannot be read.
    pub(crate) fn missing(&self) -> Result<Vec<usize>, CheckpointError> {
        // Side by side: a place may take its time for each.
        let shards = self.manifest.shards.par_iter().enumerate();
        let looked = shards.map(|(number, shard)| {
            let path = || self.dir().join(&shard.file);
            let size = self.storage.open(self.step, &shard.file).and_then(|source| source.size());
            match size {
                Ok(bytes) if bytes == shard.bytes => Ok(None),
                Ok(bytes) => {
                    let problem = format!("it has {bytes} bytes where {} were written", shard.bytes);
                    Err(CheckpointError::damaged(&path(), problem))
                }
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Some(number)),
                Err(source) => Err(CheckpointError::Read { path: path(), source }),
            }
        });
        looked.collect::<Vec<_>>().into_iter().filter_map(Result::transpose).collect()
    }

    /// Reads every shard and compares its digest with the manifest's.
    ///
    /// # Errors
    /// Names the first shard that differs.
    pub fn verify(&self) -> Result<(), CheckpointError> {
        self.faults(&|_| ()).into_iter().next().map_or(Ok(()), Err)
    }

    /// Reads every shard, in parallel, and lists by rank those that cannot be read or whose digest is
    /// not the manifest's. `read` is called with the number of bytes just read.
    pub fn faults(&self, read: &(dyn Fn(u64) + Sync)) -> Vec<CheckpointError> {
        let faults = (0..self.manifest.shards.len()).into_par_iter().map(|n| self.fault(n, read));
        faults.collect::<Vec<_>>().into_iter().flatten().collect()
    }

    /// What is wrong with a shard, if anything; see [`Checkpoint::faults`].
    pub(crate) fn fault(&self, number: usize, read: &(dyn Fn(u64) + Sync)) -> Option<CheckpointError> {
        let mut stream = Stream::new(self, number, Vec::new());
        while !stream.is_done() {
            let before = stream.at();
            if let Err(fault) = stream.advance() {
                return Some(fault);
            }
            read(stream.at() - before);
        }
        None
    }

    /// Size of all shards, in bytes.
    pub fn bytes(&self) -> u64 {
        self.manifest.shards.iter().map(|shard| shard.bytes).sum()
    }

    /// What messages call it.
    pub fn dir(&self) -> PathBuf {
        self.storage.path(&name(self.step))
    }

    /// What the checkpoint says of itself.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Where the run stood.
    pub fn progress(&self) -> &Progress {
        &self.manifest.progress
    }

    /// One array in a layout's order.
    ///
    /// # Errors
    /// The checkpoint is of another model, or cannot be read.
    pub fn read(&self, layout: &Layout, array: Array) -> Result<Flat, CheckpointError> {
        self.read_ranges(layout, array, std::slice::from_ref(&(0..layout.trainable_len())))
    }

    /// Parts of one array in a layout's order, one after the other, whatever the world size that wrote it. `ranges`
    /// are ascending and apart.
    ///
    /// # Errors
    /// The checkpoint is of another model, or cannot be read.
    pub fn read_ranges(
        &self,
        layout: &Layout,
        array: Array,
        ranges: &[Range<usize>],
    ) -> Result<Flat, CheckpointError> {
        let [values] = self.read_parts(layout, [(array, ranges)], &|_, _| None, None)?;
        Ok(values)
    }

    /// Where the elements of an array's ranges lie, in the order in which they fill an output that has them one
    /// after the other. What follows on each other in a shard is one stretch. [`Checkpoint::check`] has to have passed.
    pub(crate) fn stretches(&self, layout: &Layout, array: Array, ranges: &[Range<usize>]) -> Vec<Stretch> {
        let mut stretches: Vec<Stretch> = Vec::new();
        let mut begin = 0;
        let trainable: Vec<_> = layout.entries().iter().filter(|e| e.trainable).collect();
        for range in ranges {
            let first = trainable.partition_point(|e| e.offset + e.len() <= range.start);
            for entry in trainable[first..].iter().take_while(|e| e.offset < range.end) {
                let offset = entry.offset;
                for piece in &self.manifest.tensors[&array][&entry.name].pieces {
                    let wanted = range.start.max(offset + piece.start)..range.end.min(offset + piece.end);
                    if !wanted.is_empty() {
                        let skipped = (wanted.start - offset - piece.start) * size_of::<f32>();
                        let next = Stretch {
                            shard: piece.shard,
                            offset: piece.offset + skipped as u64,
                            at: begin + wanted.start - range.start,
                            len: wanted.len(),
                        };
                        match stretches.last_mut() {
                            Some(last) if last.precedes(&next) => last.len += next.len,
                            _ => stretches.push(next),
                        }
                    }
                }
            }
            begin += range.len();
        }
        stretches
    }

    /// Reads stretches of one shard, by ascending offset, in parallel. Neighbours are read together, so that a place
    /// that takes its time for every read is asked for few.
    pub(super) fn fill_from(&self, shard: usize, work: Vec<(Stretch, Part)>) -> Result<(), CheckpointError> {
        let error = |source| self.unreadable(shard, source);
        let source = self.source(shard).map_err(error)?;
        let mut work = cut(work, source.worth());
        runs(&mut work, source.worth() as u64).into_par_iter().try_for_each(|run| {
            let Some((first, _)) = run.first() else { return Ok(()) };
            let begin = first.offset;
            if let [(stretch, part)] = run {
                let read = part.take_filled(stretch.len, |out| source.read_new(out, begin));
                return read.map(drop).map_err(error);
            }
            let end = run.last().map_or(begin, |(stretch, _)| stretch.end());
            let mut bytes = vec![0; (end - begin) as usize];
            source.read_at(&mut bytes, begin).map_err(error)?;
            for (stretch, part) in run {
                let from = (stretch.offset - begin) as usize;
                let part: &mut [u8] = bytemuck::cast_slice_mut(part.take(stretch.len));
                part.copy_from_slice(&bytes[from..from + part.len()]);
            }
            Ok(())
        })
    }

    /// A shard's file.
    pub(super) fn source(&self, shard: usize) -> std::io::Result<Box<dyn Source>> {
        self.storage.open(self.step, &self.manifest.shards[shard].file)
    }

    /// That a shard cannot be read.
    pub(super) fn unreadable(&self, shard: usize, source: std::io::Error) -> CheckpointError {
        CheckpointError::Read { path: self.dir().join(&self.manifest.shards[shard].file), source }
    }

    /// That a shard's digest is another than was written.
    pub(super) fn other_digest(&self, shard: usize, found: &str) -> CheckpointError {
        let shard = &self.manifest.shards[shard];
        let problem = format!("its digest is {found} where {} was written", shard.xxh3);
        CheckpointError::damaged(&self.dir().join(&shard.file), problem)
    }

    /// Some bytes of a shard.
    ///
    /// # Errors
    /// It cannot be read.
    pub(crate) fn shard_bytes(
        &self,
        number: usize,
        offset: u64,
        out: &mut [u8],
    ) -> Result<(), CheckpointError> {
        let read = self.source(number).and_then(|source| source.read_at(out, offset));
        read.map_err(|source| self.unreadable(number, source))
    }

    /// Checks that an array has exactly a layout's trainable parameters, and no frozen one but the
    /// layout's.
    pub(crate) fn check(&self, layout: &Layout, array: Array) -> Result<(), CheckpointError> {
        let empty = Default::default();
        let tensors = self.manifest.tensors.get(&array).unwrap_or(&empty);
        let mut problems: Vec<String> = layout
            .entries()
            .iter()
            .filter_map(|entry| match tensors.get(&entry.name) {
                None if !entry.trainable => None,
                None => Some(format!("{} is missing", entry.name)),
                Some(tensor) if tensor.shape != entry.shape => {
                    Some(format!("{} is {:?} where {:?} belongs", entry.name, tensor.shape, entry.shape))
                }
                Some(_) => None,
            })
            .collect();
        problems.extend(
            tensors
                .keys()
                .filter(|name| layout.find(name).is_none())
                .map(|name| format!("{name} is unexpected")),
        );
        if problems.is_empty() {
            return Ok(());
        }
        let more = problems.len().saturating_sub(8);
        problems.truncate(8);
        let mut problem = problems.join(", ");
        if more > 0 {
            problem += &format!(" and {more} more");
        }
        Err(CheckpointError::Mismatch { path: self.dir(), problem })
    }
}

/// Gives each stretch its part of the output. They are in the order of the output, and cover it.
pub(super) fn spread<'a>(stretches: Vec<Stretch>, out: Part<'a>) -> Vec<(Stretch, Part<'a>)> {
    let mut rest = out;
    stretches.into_iter().map(|stretch| (stretch, rest.split_off(stretch.len))).collect()
}

/// Cuts stretches that are longer than a few times what makes a read worth its while, so that one of them keeps
/// several threads busy.
fn cut(work: Vec<(Stretch, Part)>, worth: usize) -> Vec<(Stretch, Part)> {
    let most = 4 * worth / size_of::<f32>();
    let mut pieces = Vec::with_capacity(work.len());
    for (mut stretch, mut part) in work {
        while stretch.len > most {
            pieces.push((Stretch { len: most, ..stretch }, part.split_off(most)));
            stretch = Stretch {
                offset: stretch.offset + (most * size_of::<f32>()) as u64,
                at: stretch.at + most,
                len: stretch.len - most,
                ..stretch
            };
        }
        pieces.push((stretch, part));
    }
    pieces
}

/// Cuts stretches of one shard, by ascending offset, into runs that are each read at once: with no gap that is worth a
/// read of its own, and not growing once they are `worth` bytes.
fn runs<'a, 'b>(mut work: &'a mut [(Stretch, Part<'b>)], worth: u64) -> Vec<&'a mut [(Stretch, Part<'b>)]> {
    let mut runs = Vec::new();
    while let Some((first, _)) = work.first() {
        let begin = first.offset;
        let joined = work.windows(2).take_while(|pair| {
            let gap = pair[1].0.offset.checked_sub(pair[0].0.end());
            pair[1].0.end() - begin <= worth && gap.is_some_and(|gap| gap <= worth / 16)
        });
        let length = 1 + joined.count();
        let (run, after) = work.split_at_mut(length);
        runs.push(run);
        work = after;
    }
    runs
}

/// Checks that the pieces of a tensor are all of it, and lie within their shards.
fn whole(tensor: &TensorRecord, shards: &[Shard]) -> Result<(), String> {
    if tensor.dtype != "F32" {
        return Err(format!("its type is {}, and F32 belongs there", tensor.dtype));
    }
    let size = tensor.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).ok_or("its shape overflows")?;
    let mut next = 0;
    for Piece { shard, offset, start, end } in &tensor.pieces {
        if *start != next || end <= start {
            return Err(format!("its pieces leave a gap or overlap at element {next}"));
        }
        next = *end;
        let bytes = ((end - start) as u64).checked_mul(4).and_then(|bytes| bytes.checked_add(*offset));
        let Some(file) = shards.get(*shard) else {
            return Err(format!("it names shard {shard}, which is not there"));
        };
        if !offset.is_multiple_of(size_of::<f32>() as u64) {
            return Err(format!("a piece of it begins within a value, at byte {offset} of {}", file.file));
        }
        if bytes.is_none_or(|bytes| bytes > file.bytes) {
            return Err(format!("a piece of it lies beyond the end of {}", file.file));
        }
    }
    if next == size { Ok(()) } else { Err(format!("its pieces hold {next} of {size} elements")) }
}
