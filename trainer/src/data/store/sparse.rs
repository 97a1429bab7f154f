//! A store of zeros in sparse files, of any size: to measure what a large store costs at the start.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::{INDEX_FILE, Index, ShardEntry, StoreError, StoreSpec, shard};

/// Writes a store of `samples` zeros (label 0) at `dir`. Its digests are not those of its shards:
/// computing them would read all of it.
pub(in crate::data) fn write_sparse(dir: &Path, spec: StoreSpec, samples: usize) -> Result<(), StoreError> {
    fs::create_dir_all(dir).map_err(StoreError::write(dir))?;
    let item: u64 = shard::fields(&spec).iter().map(|f| f.item).sum();
    let len = spec.default_shard_len();
    let mut entries = Vec::new();
    for (number, begin) in (0..samples).step_by(len).enumerate() {
        let count = len.min(samples - begin) as u64;
        let header = shard::header(&spec, count, 0);
        let entry = ShardEntry {
            file: format!("shard-{number:05}.safetensors"),
            samples: count,
            bytes: header.len() as u64 + item * count,
            xxh3: shard::hex(0),
            sums: vec![0.0; spec.channels],
            squares: vec![0.0; spec.channels],
        };
        let path = dir.join(&entry.file);
        let write = || {
            let file = File::create(&path)?;
            file.write_all_at(&header, 0)?;
            file.set_len(entry.bytes)
        };
        write().map_err(StoreError::write(&path))?;
        entries.push(entry);
    }
    let text =
        serde_json::to_string(&Index::new(spec, entries)).expect("plain numbers and strings serialise");
    let path = dir.join(INDEX_FILE);
    fs::write(&path, text).map_err(StoreError::write(&path))
}
