//! How far all ranks have come. Each leaves its count in a file of the unfinished store, which all ranks
//! write to anyway, and rank 0 adds them up: no rank has to wait for another to say so.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use repa_comm::Communicator;

use super::BuildError;
use crate::data::store::StoreError;

const EVERY: Duration = Duration::from_millis(500);
const PREFIX: &str = "progress-";

/// How far all ranks have come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BuildProgress {
    /// Members that are dealt with.
    pub done: usize,
    /// All members.
    pub total: usize,
    /// Those of `done` that an earlier attempt had dealt with.
    pub resumed: usize,
}

pub(super) struct Board {
    folder: PathBuf,
    rank: usize,
    world: usize,
    own: BuildProgress,
    told: Option<Instant>,
}

impl Board {
    /// Removes what an earlier attempt, perhaps of more ranks, has left.
    pub(super) fn clear(folder: &Path) -> Result<(), BuildError> {
        for item in fs::read_dir(folder).map_err(StoreError::io("list", folder))? {
            let path = item.map_err(StoreError::io("list", folder))?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(PREFIX)) {
                fs::remove_file(&path).map_err(StoreError::io("remove", &path))?;
            }
        }
        Ok(())
    }

    pub(super) fn new(comm: &dyn Communicator, folder: &Path, total: usize) -> Self {
        let own = BuildProgress { total, ..BuildProgress::default() };
        Self { folder: folder.to_owned(), rank: comm.rank(), world: comm.size(), own, told: None }
    }

    /// Counts members of this rank.
    pub(super) fn advance(&mut self, members: usize, resumed: bool, progress: &mut dyn FnMut(BuildProgress)) {
        self.own.done += members;
        self.own.resumed += if resumed { members } else { 0 };
        if self.world == 1 {
            return progress(self.own);
        }
        if self.told.is_none_or(|told| told.elapsed() >= EVERY) {
            self.told = Some(Instant::now());
            // Only the bar suffers where this fails; a disk that is full shows elsewhere.
            let _ = self.tell();
            if self.rank == 0 {
                progress(self.sum());
            }
        }
    }

    /// Says that this rank is done; rank 0 waits until all are.
    pub(super) fn finish(&mut self, progress: &mut dyn FnMut(BuildProgress)) -> Result<(), BuildError> {
        if self.world == 1 {
            return Ok(());
        }
        // Rank 0 waits for this last word, so it has to arrive.
        self.tell().map_err(StoreError::write(&self.path(self.rank)))?;
        if self.rank != 0 {
            return Ok(());
        }
        loop {
            let sum = self.sum();
            progress(sum);
            if sum.done >= sum.total {
                return Ok(());
            }
            std::thread::sleep(EVERY);
        }
    }

    fn path(&self, rank: usize) -> PathBuf {
        self.folder.join(format!("{PREFIX}{rank}"))
    }

    fn tell(&self) -> io::Result<()> {
        let part = self.folder.join(format!("{PREFIX}{}.tmp", self.rank));
        fs::write(&part, format!("{} {}\n", self.own.done, self.own.resumed))?;
        fs::rename(&part, self.path(self.rank))
    }

    fn sum(&self) -> BuildProgress {
        let mut sum = self.own;
        for rank in (0..self.world).filter(|&rank| rank != self.rank) {
            let text = fs::read_to_string(self.path(rank)).unwrap_or_default();
            let mut numbers = text.split_whitespace().map(|n| n.parse().unwrap_or(0));
            sum.done += numbers.next().unwrap_or(0);
            sum.resumed += numbers.next().unwrap_or(0);
        }
        sum
    }
}
