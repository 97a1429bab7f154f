//! Copying a store to a disk that is nearer: every node's ranks copy it together, and check what they
//! have copied.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;

use repa_comm::{Communicator, RemoteError};
use xxhash_rust::xxh3::Xxh3;

use super::build::{BuildError, agree};
use super::store::{INDEX_FILE, Index, LatentStore, StoreError, partial_dir, sync_dir};

/// What was copied on one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Staged {
    /// Bytes of all shards.
    pub bytes: u64,
    /// Bytes of those that were there already.
    pub kept: u64,
}

/// Copies the store at `from` to `to` on every node, each of a node's ranks its share of the shards, and
/// checks every shard's digest on the way. The copy is whole or absent, like any store; one that was cut
/// short goes on. `progress` hears the bytes that this rank has dealt with, and those it has to.
///
/// # Errors
/// The first rank's: the store is damaged, there is one at `to` already, or the disk is full.
pub fn stage(
    comm: &dyn Communicator,
    from: &Path,
    to: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Staged, RemoteError> {
    let store = agree(comm, begin(from, to))?;
    let index = store.index();
    let mine: Vec<usize> = (comm.local_rank()..index.shards.len()).step_by(comm.local_size()).collect();
    let total = mine.iter().map(|&n| index.shards[n].bytes).sum();
    let mut done = 0;
    let mut kept = 0;
    let copied = mine.iter().try_for_each(|&number| {
        let bytes = index.shards[number].bytes;
        if copy_shard(&store, number, to)? {
            kept += bytes;
        }
        done += bytes;
        progress(done, total);
        Ok(())
    });
    // Hosts take as long as their disks do.
    comm.set_deadline(None);
    let agreed = agree(comm, copied);
    comm.set_deadline(Some(super::build::DEADLINE));
    agreed?;
    // All ranks have agreed, so the node's first one can make it whole.
    let whole = if comm.local_rank() == 0 { commit(from, to, index) } else { Ok(()) };
    agree(comm, whole)?;
    let bytes = index.shards.iter().map(|s| s.bytes).sum();
    Ok(Staged { bytes, kept })
}

fn begin(from: &Path, to: &Path) -> Result<LatentStore, BuildError> {
    let store = super::open(from)?;
    if store.is_foreign() {
        return Err(BuildError::Layout {
            path: from.to_owned(),
            problem: "is not a store: make one of it with `repa-dist data import` first".to_owned(),
        });
    }
    if to.join(INDEX_FILE).exists() {
        return Err(StoreError::Exists { dir: to.to_owned() }.into());
    }
    let partial = partial_dir(to);
    fs::create_dir_all(&partial).map_err(StoreError::write(&partial))?;
    Ok(store)
}

/// Copies a shard, unless a sound copy is there, which it says.
fn copy_shard(store: &LatentStore, number: usize, to: &Path) -> Result<bool, BuildError> {
    let entry = &store.index().shards[number];
    let source = store.dir().join(&entry.file);
    let target = partial_dir(to).join(&entry.file);
    let digest_of = |path: &Path| -> io::Result<String> { copy(&mut File::open(path)?, &mut io::sink()) };
    if fs::metadata(&target).is_ok_and(|m| m.len() == entry.bytes)
        && digest_of(&target).is_ok_and(|digest| digest == entry.xxh3)
    {
        return Ok(true);
    }
    let mut input = File::open(&source).map_err(StoreError::io("open", &source))?;
    let mut output = File::create(&target).map_err(StoreError::write(&target))?;
    // A failed read is rarer than a full disk, and its message would name the same file.
    let digest = copy(&mut input, &mut output).map_err(StoreError::write(&target))?;
    if digest != entry.xxh3 {
        let problem = format!("its digest is {digest} and the index says {}: it is damaged", entry.xxh3);
        return Err(StoreError::Shard { path: source, problem }.into());
    }
    output.sync_all().map_err(StoreError::write(&target))?;
    Ok(false)
}

/// Copies all of `from` and gives its digest.
fn copy(from: &mut impl Read, to: &mut impl Write) -> io::Result<String> {
    let mut hasher = Xxh3::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(format!("{:016x}", hasher.digest())),
            n => {
                hasher.update(&buffer[..n]);
                to.write_all(&buffer[..n])?;
            }
        }
    }
}

fn commit(from: &Path, to: &Path, index: &Index) -> Result<(), BuildError> {
    let partial = partial_dir(to);
    let path = partial.join(INDEX_FILE);
    let bytes = fs::read(from.join(INDEX_FILE)).map_err(StoreError::io("read", from))?;
    let write = || {
        let mut file = File::create(&path)?;
        file.write_all(&bytes)?;
        file.sync_all()
    };
    write().map_err(StoreError::write(&path))?;
    sync_dir(&partial)?;
    fs::rename(&partial, to).map_err(StoreError::write(to))?;
    let copy = LatentStore::open(to)?;
    debug_assert_eq!(copy.index(), index, "the copy's index is the store's");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::bench::{imagenet_spec, synthetic_store};
    use crate::data::store::StoreSpec;

    #[test]
    fn a_copy_is_the_store_and_goes_on_where_it_was_cut_short() {
        let folder = tempfile::tempdir().unwrap();
        let [from, to] = ["from", "to"].map(|n| folder.path().join(n));
        let spec = StoreSpec { height: 2, width: 2, ..imagenet_spec(false) };
        synthetic_store(&from, spec, 40, 1).unwrap();
        let comm = repa_comm::Single::new();
        // One shard is there, another only in part.
        let partial = partial_dir(&to);
        fs::create_dir_all(&partial).unwrap();
        fs::copy(from.join("shard-00000.safetensors"), partial.join("shard-00000.safetensors")).unwrap();
        fs::write(partial.join("shard-00001.safetensors"), "torn").unwrap();
        let mut seen = Vec::new();
        let staged = stage(&comm, &from, &to, &mut |done, total| seen.push((done, total))).unwrap();
        let store = LatentStore::open(&from).unwrap();
        assert_eq!(staged.kept, store.index().shards[0].bytes);
        assert_eq!(seen.last(), Some(&(staged.bytes, staged.bytes)));
        let copy = LatentStore::open(&to).unwrap();
        assert_eq!(copy.index(), store.index());
        assert!(copy.verify(&|_| ()).findings.is_empty());
        let again = stage(&comm, &from, &to, &mut |_, _| ()).unwrap_err().to_string();
        assert!(again.contains("holds a data set already"), "{again}");
    }

    #[test]
    fn a_damaged_shard_is_not_copied() {
        let folder = tempfile::tempdir().unwrap();
        let [from, to] = ["from", "to"].map(|n| folder.path().join(n));
        synthetic_store(&from, StoreSpec { height: 2, width: 2, ..imagenet_spec(false) }, 40, 1).unwrap();
        let path = from.join("shard-00002.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(&path, bytes).unwrap();
        let error = stage(&repa_comm::Single::new(), &from, &to, &mut |_, _| ()).unwrap_err().to_string();
        assert!(error.contains("shard-00002") && error.contains("damaged"), "{error}");
        assert!(LatentStore::open(&to).is_err());
    }
}
