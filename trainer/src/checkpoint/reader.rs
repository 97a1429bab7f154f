//! Reading checkpoints, on any world size.

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::manifest::{FORMAT, MANIFEST, MANIFEST_DIGEST, Shard, VERSION};
use super::{Array, CheckpointError, Manifest, Piece, Progress, TensorRecord};
use crate::params::Layout;

/// A checkpoint on disk.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    dir: PathBuf,
    manifest: Manifest,
}

impl Checkpoint {
    /// Reads the manifest, and checks that it makes sense and that the shards have their sizes.
    ///
    /// # Errors
    /// The manifest or a shard is missing or damaged.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let path = dir.join(MANIFEST_DIGEST);
        let digest = std::fs::read(&path).map_err(CheckpointError::read(&path))?;
        let path = dir.join(MANIFEST);
        let text = std::fs::read(&path).map_err(CheckpointError::read(&path))?;
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
        for shard in &manifest.shards {
            let path = dir.join(&shard.file);
            let bytes = std::fs::metadata(&path).map_err(CheckpointError::read(&path))?.len();
            if bytes != shard.bytes {
                let problem = format!("it has {bytes} bytes where {} were written", shard.bytes);
                return Err(CheckpointError::damaged(&path, problem));
            }
        }
        for (name, tensor) in manifest.tensors.values().flatten() {
            whole(tensor, &manifest.shards)
                .map_err(|problem| CheckpointError::damaged(&path, format!("{name}: {problem}")))?;
        }
        Ok(Self { dir: dir.to_owned(), manifest })
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
        let fault = |shard: &Shard| {
            let path = self.dir.join(&shard.file);
            match digest(&path, read) {
                Err(source) => Some(CheckpointError::read(&path)(source)),
                Ok(found) if found == shard.xxh3 => None,
                Ok(found) => {
                    let problem = format!("its digest is {found} where {} was written", shard.xxh3);
                    Some(CheckpointError::damaged(&path, problem))
                }
            }
        };
        self.manifest.shards.par_iter().map(fault).collect::<Vec<_>>().into_iter().flatten().collect()
    }

    /// Size of all shards, in bytes.
    pub fn bytes(&self) -> u64 {
        self.manifest.shards.iter().map(|shard| shard.bytes).sum()
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
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
    pub fn read(&self, layout: &Layout, array: Array) -> Result<Vec<f32>, CheckpointError> {
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
    ) -> Result<Vec<f32>, CheckpointError> {
        self.check(layout, array)?;
        let files = self
            .manifest
            .shards
            .iter()
            .map(|shard| {
                let path = self.dir.join(&shard.file);
                File::open(&path).map_err(CheckpointError::read(&path))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let mut out = vec![0.0f32; ranges.iter().map(Range::len).sum()];
        let mut begin = 0;
        for range in ranges {
            let entries = layout.entries().iter().filter(|e| e.trainable);
            let pieces = entries
                .skip_while(|e| e.offset + e.len() <= range.start)
                .take_while(|e| e.offset < range.end)
                .flat_map(|e| {
                    self.manifest.tensors[&array][&e.name].pieces.iter().map(move |p| (e.offset, p))
                });
            for (offset, piece) in pieces {
                let wanted = range.start.max(offset + piece.start)..range.end.min(offset + piece.end);
                if wanted.is_empty() {
                    continue;
                }
                let skipped = (wanted.start - offset - piece.start) * size_of::<f32>();
                let part = &mut out[begin + wanted.start - range.start..begin + wanted.end - range.start];
                let path = || self.dir.join(&self.manifest.shards[piece.shard].file);
                files[piece.shard]
                    .read_exact_at(bytemuck::cast_slice_mut(part), piece.offset + skipped as u64)
                    .map_err(|source| CheckpointError::Read { path: path(), source })?;
            }
            begin += range.len();
        }
        Ok(out)
    }

    /// The elements of one tensor of an array, frozen ones included; None where the checkpoint lacks it.
    ///
    /// # Errors
    /// A shard cannot be read.
    pub fn tensor(&self, array: Array, name: &str) -> Result<Option<Vec<f32>>, CheckpointError> {
        let Some(tensor) = self.manifest.tensors.get(&array).and_then(|tensors| tensors.get(name)) else {
            return Ok(None);
        };
        let mut out = vec![0.0f32; tensor.shape.iter().product()];
        for piece in &tensor.pieces {
            let path = self.dir.join(&self.manifest.shards[piece.shard].file);
            File::open(&path)
                .and_then(|file| {
                    let part = &mut out[piece.start..piece.end];
                    file.read_exact_at(bytemuck::cast_slice_mut(part), piece.offset)
                })
                .map_err(CheckpointError::read(&path))?;
        }
        Ok(Some(out))
    }

    /// Checks that an array has exactly a layout's trainable parameters, and no frozen one but the
    /// layout's.
    pub(super) fn check(&self, layout: &Layout, array: Array) -> Result<(), CheckpointError> {
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
        Err(CheckpointError::Mismatch { path: self.dir.clone(), problem })
    }
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
        if bytes.is_none_or(|bytes| bytes > file.bytes) {
            return Err(format!("a piece of it lies beyond the end of {}", file.file));
        }
    }
    if next == size { Ok(()) } else { Err(format!("its pieces hold {next} of {size} elements")) }
}

fn digest(path: &Path, read: &(dyn Fn(u64) + Sync)) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Xxh3::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(format!("{:016x}", hash.digest())),
            n => {
                hash.update(&buffer[..n]);
                read(n as u64);
            }
        }
    }
}
