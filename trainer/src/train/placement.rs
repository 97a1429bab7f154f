//! Which ranks see the same checkpoint folder.
//!
//! On a shared file system all do, and rank 0 makes checkpoints complete. Where each host has a disk of its own, the
//! ranks of a host do, and its lowest rank completes the host's part.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use repa_comm::{Communicator, RemoteError, all_gather};

use super::{TrainError, agree};
use crate::checkpoint::Checkpoints;

/// This rank's place among those that see the same folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Placement {
    /// The lowest rank of each group that sees one folder, ascending.
    pub(super) leaders: Vec<usize>,
    /// This rank's group's.
    pub(super) leader: usize,
    /// The ranks of this rank's group, ascending.
    pub(super) members: Vec<usize>,
}

impl Placement {
    /// Whether hosts, or groups of them, have folders of their own.
    pub(super) fn node_local(&self) -> bool {
        self.leaders.len() > 1
    }

    /// Finds out, by files that each host makes and all look for. Called by all ranks.
    pub(super) fn find(checkpoints: &Checkpoints, comm: &dyn Communicator) -> Result<Self, RemoteError> {
        let Some(folder) = checkpoints.local_folder() else {
            let members = (0..comm.size()).collect();
            return Ok(Self { leaders: vec![0], leader: 0, members });
        };
        let token = agree(comm, token(comm))?;
        let error = |problem: &'static str| {
            let path = folder.to_owned();
            move |source| TrainError::Folder { path, problem, source }
        };
        let lowest = |node: usize| comm.topology().node_of.iter().position(|&n| n == node);
        let mark = |rank: usize| folder.join(format!(".{token:016x}-{rank}"));
        let first = comm.local_rank() == 0;
        let made = if first { make(&mark(comm.rank())) } else { Ok(()) };
        agree(comm, made.map_err(error("write to")))?;
        // The lowest rank of the first node whose mark is seen here.
        let candidates = (0..comm.topology().nodes).filter_map(lowest);
        let seen = { candidates }.find(|&rank| mark(rank).exists()).unwrap_or(comm.rank());
        let gathered = all_gather(comm, &[seen as u64]).map_err(TrainError::from);
        let all = agree(comm, gathered)?;
        if first {
            // One that stays behind is hidden, empty, and named after no checkpoint.
            let _ = fs::remove_file(mark(comm.rank()));
        }
        let members = (0..comm.size()).filter(|&rank| all[rank][0] == seen as u64).collect();
        let mut leaders: Vec<usize> = all.iter().map(|seen| seen[0] as usize).collect();
        leaders.sort_unstable();
        leaders.dedup();
        Ok(Self { leaders, leader: seen, members })
    }
}

/// A number that tells this start from every other one.
fn token(comm: &dyn Communicator) -> Result<u64, TrainError> {
    let time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let own = time.map_or(0, |t| t.as_nanos() as u64) ^ u64::from(std::process::id()) << 40;
    let mut bytes = own.to_le_bytes().to_vec();
    comm.broadcast_bytes(&mut bytes, 0)?;
    Ok(bytes.try_into().map_or(own, u64::from_le_bytes))
}

fn make(path: &PathBuf) -> io::Result<()> {
    fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
    fs::write(path, [])
}
