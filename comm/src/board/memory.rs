//! The records of a node's ranks, in memory that they share.

use super::random;
use super::record::Record;
use memmap2::{MmapOptions, MmapRaw};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// One record for each of the node's ranks.
pub(super) struct Table {
    memory: Memory,
    ranks: usize,
}

enum Memory {
    Shared(MmapRaw),
    Own(Box<[Record]>),
}

/// The file that the ranks of a node map; goes away with this value, which need live only until all have.
pub(super) struct Name(PathBuf);

impl Name {
    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        // Nobody is left to tell, and a file in memory goes with the next boot.
        let _ = fs::remove_file(&self.0);
    }
}

impl Table {
    /// Of this process alone.
    pub(super) fn own(ranks: usize) -> Self {
        Self { memory: Memory::Own((0..ranks).map(|_| Record::default()).collect()), ranks }
    }

    /// New shared memory, in a file that only this user can open.
    pub(super) fn create(ranks: usize) -> io::Result<(Self, Name)> {
        let name = format!("repa-board-{}-{:016x}", std::process::id(), random());
        // The second is for hosts without the first; a file on a disk is shared in the same way.
        let create = |folder: &Path| {
            let path = folder.join(&name);
            let mut file =
                OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
            let name = Name(path);
            // Written, not just made longer: where there is no room, that is an error here, and not a signal at the
            // first use.
            file.write_all(&vec![0; ranks * size_of::<Record>()])?;
            Ok((Self::map(&file, ranks)?, name))
        };
        create(Path::new("/dev/shm")).or_else(|_: io::Error| create(&std::env::temp_dir()))
    }

    /// The memory that another process of this node made.
    pub(super) fn open(path: &Path, ranks: usize) -> io::Result<Self> {
        Self::map(&OpenOptions::new().read(true).write(true).open(path)?, ranks)
    }

    fn map(file: &File, ranks: usize) -> io::Result<Self> {
        let bytes = ranks * size_of::<Record>();
        if file.metadata()?.len() != bytes as u64 {
            return Err(io::Error::other("the file has another length"));
        }
        Ok(Self { memory: Memory::Shared(MmapOptions::new().len(bytes).map_raw(file)?), ranks })
    }

    /// By local rank.
    pub(super) fn records(&self) -> &[Record] {
        match &self.memory {
            // SAFETY: the mapping has this length (`map`), starts at a page, and lives as long as self; the file
            // cannot become shorter, because its name is gone and no rank makes it so. A record is atomics, for which
            // any bits are values, and other processes access them as atomics only.
            Memory::Shared(map) => unsafe { std::slice::from_raw_parts(map.as_ptr().cast(), self.ranks) },
            Memory::Own(records) => records,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::process::Identity;
    use super::*;

    #[test]
    fn two_mappings_are_one_memory_without_a_name() {
        let (table, name) = Table::create(3).expect("this host has /dev/shm or a temporary folder");
        let path = name.path().to_owned();
        assert!(Table::open(&path, 2).is_err(), "another number of ranks");
        let other = Table::open(&path, 3).expect("it is there");
        drop(name);
        assert!(!path.exists());
        assert!(Table::open(&path, 3).is_err());
        let here = Identity::here();
        table.records()[2].claim(here);
        assert!(other.records()[2].read(here) == table.records()[2].read(here));
        assert!(other.records()[2].read(here).progress(u64::MAX).is_some());
        assert!(other.records()[1].read(here).progress(u64::MAX).is_none());
    }
}
