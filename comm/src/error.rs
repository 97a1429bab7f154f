//! What can go wrong between ranks.

use std::fmt;
use std::time::Duration;

/// The operations a rank can be in, for messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Collective {
    /// Starting the communicator.
    Start,
    /// Sum, minimum or maximum over the ranks, the same result on all.
    AllReduce,
    /// As all-reduce, each rank keeping its shard only.
    ReduceScatter,
    /// Every rank's part to all ranks.
    AllGather,
    /// One rank's bytes to all ranks.
    Broadcast,
    /// Nobody goes on before everybody has come.
    Barrier,
    /// The MPI library's own all-reduce, for comparison.
    LibraryAllReduce,
    /// Orderly end.
    Finalize,
}

impl fmt::Display for Collective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Start => "start",
            Self::AllReduce => "all-reduce",
            Self::ReduceScatter => "reduce-scatter",
            Self::AllGather => "all-gather",
            Self::Broadcast => "broadcast",
            Self::Barrier => "barrier",
            Self::LibraryAllReduce => "library all-reduce",
            Self::Finalize => "finalize",
        })
    }
}

/// A collective, and whose it is: what messages call it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// The operation.
    pub collective: Collective,
    /// The gradient bucket that it is for.
    pub bucket: Option<usize>,
    /// The training step in which it is called.
    pub step: Option<u64>,
}

impl From<Collective> for Call {
    fn from(collective: Collective) -> Self {
        Self { collective, bucket: None, step: None }
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.collective)?;
        if let Some(bucket) = self.bucket {
            write!(f, " of bucket {bucket}")?;
        }
        if let Some(step) = self.step {
            write!(f, " in step {step}")?;
        }
        Ok(())
    }
}

/// An error of a collective or of the start. After one the communicator is unusable: the job has to end.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CommError {
    /// Some ranks did not come in time.
    #[error(
        "{call} on rank {rank} of {size} gave up after {:.1} s waiting for {}{}",
        waited.as_secs_f64(), describe_missing(missing), describe_board(board)
    )]
    Deadline {
        /// The operation that waited.
        call: Call,
        /// The rank that waited.
        rank: usize,
        /// Number of ranks.
        size: usize,
        /// How long it waited.
        waited: Duration,
        /// The ranks that had not arrived, ascending (as far as this rank can see).
        missing: Vec<usize>,
        /// What the status board says of those that are late, if there is one.
        board: Option<String>,
    },
    /// MPI reported an error.
    #[error("{call} on rank {rank} of {size}: MPI error {code}: {text}")]
    Mpi {
        /// The operation.
        call: Call,
        /// This rank.
        rank: usize,
        /// Number of ranks.
        size: usize,
        /// MPI's error code.
        code: i32,
        /// MPI's text for it.
        text: String,
    },
    /// NCCL reported an error.
    #[error("{call} on rank {rank} of {size}: NCCL error {code}: {text}")]
    Nccl {
        /// The operation.
        call: Call,
        /// This rank.
        rank: usize,
        /// Number of ranks.
        size: usize,
        /// NCCL's error code.
        code: i32,
        /// NCCL's text for it, and its last message.
        text: String,
    },
    /// The CUDA driver reported an error.
    #[error("{call} on rank {rank} of {size}: CUDA error {code}: {text}")]
    Cuda {
        /// The operation.
        call: Call,
        /// This rank.
        rank: usize,
        /// Number of ranks.
        size: usize,
        /// The driver's error code.
        code: i32,
        /// The driver's text for it.
        text: String,
    },
    /// Another rank is in another operation, or in the same with another length: the ranks have come apart.
    #[error(
        "{call} on rank {rank} of {size}: rank {other} is in another operation or passes another length: \
         the ranks have come apart (a bug: please report it)"
    )]
    Mismatch {
        /// The operation here.
        call: Call,
        /// This rank.
        rank: usize,
        /// Number of ranks.
        size: usize,
        /// The rank that differs.
        other: usize,
    },
    /// The communicator has ended, by `finalize` or an earlier error.
    #[error("{call} on rank {rank} of {size}: the communicator has ended{}", cause_of(.cause))]
    Ended {
        /// The operation that was asked for.
        call: Call,
        /// This rank.
        rank: usize,
        /// Number of ranks.
        size: usize,
        /// The earlier error, if one was the reason.
        cause: Option<String>,
    },
    /// The ranks could not be started as asked; the text says what to do.
    #[error("{0}")]
    Start(String),
}

fn cause_of(cause: &Option<String>) -> String {
    cause.as_ref().map(|cause| format!(" (earlier error: {cause})")).unwrap_or_default()
}

fn describe_board(board: &Option<String>) -> String {
    let lines = board.as_ref().filter(|board| !board.is_empty());
    lines.map(|board| format!(" ({})", board.replace('\n', "; "))).unwrap_or_default()
}

/// "rank 3", "ranks 0, 2", or "the other ranks" when none is known.
fn describe_missing(missing: &[usize]) -> String {
    match missing {
        [] => "the other ranks".to_owned(),
        [one] => format!("rank {one}"),
        many => {
            let shown: Vec<String> = many.iter().take(16).map(ToString::to_string).collect();
            let more = if many.len() > 16 { format!(" and {} more", many.len() - 16) } else { String::new() };
            format!("ranks {}{more}", shown.join(", "))
        }
    }
}
