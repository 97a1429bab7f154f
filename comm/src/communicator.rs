//! The interface that training sees.

use crate::reduce::Phases;
use crate::{Board, Call, CommError, Topology};
use half::{bf16, f16};
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

/// How values of different ranks become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReduceOp {
    /// Added in rank order (integers wrap); floats over NCCL in an order of its own.
    Sum,
    /// The smallest; NaN if any is.
    Min,
    /// The largest; NaN if any is.
    Max,
}

/// A vector of one of the types that can be combined.
#[derive(Debug)]
pub enum Values<'a> {
    /// float32.
    F32(&'a mut [f32]),
    /// float64.
    F64(&'a mut [f64]),
    /// float16; combined in float32, rounded once.
    F16(&'a mut [f16]),
    /// bfloat16; combined in float32, rounded once.
    Bf16(&'a mut [bf16]),
    /// Integers; sums wrap.
    I64(&'a mut [i64]),
    /// Bytes; sums wrap.
    U8(&'a mut [u8]),
}

macro_rules! values_from {
    ($($variant:ident: $type:ty),*) => {
        $(impl<'a> From<&'a mut [$type]> for Values<'a> {
            fn from(values: &'a mut [$type]) -> Self {
                Self::$variant(values)
            }
        })*
    };
}
values_from!(F32: f32, F64: f64, F16: f16, Bf16: bf16, I64: i64, U8: u8);

/// How float32 values travel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Wire {
    /// As they are.
    #[default]
    F32,
    /// Rounded to bfloat16, half the bytes. They are still added up in float32; the sum is rounded again.
    /// (NCCL may round between the additions, and hierarchical sums are rounded once more, on their way between nodes.)
    Bf16,
}

/// A collective on a gradient bucket that goes on while the rank computes.
#[derive(Debug, Clone, Copy)]
pub struct Background {
    /// All-reduce, reduce-scatter or all-gather.
    pub phases: Phases,
    /// How values travel. An all-gather moves them as they are.
    pub wire: Wire,
    /// Number of the bucket, for messages.
    pub bucket: usize,
}

/// What a rank has spent on collectives since its start.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Traffic {
    /// Time in collectives, waiting for other ranks included, hidden behind computation or not.
    pub busy: Duration,
    /// Bytes of the vectors that were handed in.
    pub bytes: u64,
}

/// The ranks of a job and what they can do together, on host memory.
///
/// Collectives are called by all ranks in the same order; slices have the same length on all ranks unless said
/// otherwise. Each has a deadline ([`Communicator::set_deadline`]); a missed one is an error that names the
/// operation, this rank and the ranks that were waited for. After any error the communicator refuses further work:
/// end the job by [`crate::abort`].
pub trait Communicator: Send + Sync {
    /// Who is where.
    fn topology(&self) -> &Topology;

    /// This process's number, 0 .. size.
    fn rank(&self) -> usize {
        self.topology().rank
    }
    /// Number of processes.
    fn size(&self) -> usize {
        self.topology().size
    }
    /// This process's number on its node.
    fn local_rank(&self) -> usize {
        self.topology().local_rank
    }
    /// Number of processes on this node.
    fn local_size(&self) -> usize {
        self.topology().local_size
    }
    /// This node's number.
    fn node(&self) -> usize {
        self.topology().node
    }
    /// This node's host name.
    fn host(&self) -> &str {
        &self.topology().hosts[self.rank()]
    }
    /// NCCL, where this is it: for values that are on the GPU.
    #[cfg(feature = "nccl")]
    fn nccl(&self) -> Option<&crate::Nccl> {
        None
    }
    /// "MPI, shared memory" and the like, for the log.
    fn describe(&self) -> String;

    /// How long one collective may take on this rank, waiting for the others included; None for ever.
    fn set_deadline(&self, deadline: Option<Duration>);

    /// Tells which training step goes on, for messages.
    fn set_step(&self, step: u64);
    /// Gives the board that is told of collectives and asked at a missed deadline; [`Board::start`] does.
    fn set_board(&self, _board: Arc<Board>) {}
    /// Whether sums of float32 are taken within each node first and between the nodes after, where nodes have
    /// equally many ranks and more than one. Another order of additions, and less on the network. The same on all
    /// ranks; true at the start.
    fn set_hierarchical(&self, hierarchical: bool);
    /// What collectives have cost so far.
    fn traffic(&self) -> Traffic;

    /// Sums or extremes over the ranks, the same bits on all. Sums are taken in rank order in the element's type
    /// (in float32 for half precision); float32 follows [`Communicator::set_hierarchical`].
    fn all_reduce(&self, values: Values, op: ReduceOp) -> Result<(), CommError>;
    /// Sum over the ranks; see [`Communicator::all_reduce`].
    fn all_reduce_f32(&self, data: &mut [f32]) -> Result<(), CommError> {
        self.all_reduce(data.into(), ReduceOp::Sum)
    }
    /// See [`Communicator::all_reduce`].
    fn all_reduce_f64(&self, data: &mut [f64], op: ReduceOp) -> Result<(), CommError> {
        self.all_reduce(data.into(), op)
    }
    /// See [`Communicator::all_reduce`].
    fn all_reduce_i64(&self, data: &mut [i64], op: ReduceOp) -> Result<(), CommError> {
        self.all_reduce(data.into(), op)
    }
    /// This rank's shard of a vector of `len` elements: contiguous; together the ranks' shards are the vector, in
    /// sizes that differ by two at most. In rank order but in hierarchical mode, where a node's ranks have
    /// neighbouring shards only of what they sum up together.
    fn shard(&self, len: usize) -> Range<usize>;
    /// Sums over the ranks, as all-reduce defines them, but only this rank's shard ([`Communicator::shard`]) is
    /// valid afterwards; the rest of `data` may be anything.
    fn reduce_scatter_f32(&self, data: &mut [f32]) -> Result<(), CommError>;
    /// Every rank's shard ([`Communicator::shard`]) of `data` to all ranks, in place.
    fn all_gather_shards_f32(&self, data: &mut [f32]) -> Result<(), CommError>;
    /// Every rank's bytes, by rank; lengths may differ.
    fn all_gather_bytes(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>, CommError>;
    /// `root`'s bytes to all; the other ranks' `data` is replaced. Panics if `root` is no rank.
    fn broadcast_bytes(&self, data: &mut Vec<u8>, root: usize) -> Result<(), CommError>;
    /// Returns when all ranks have called it.
    fn barrier(&self) -> Result<(), CommError>;

    /// Starts a collective on float32 and returns at once; operations are done in the order they were asked for.
    fn start_f32(&self, data: Vec<f32>, how: Background) -> Pending<Vec<f32>>;

    /// The MPI library's own all-reduce (sum, in the library's order) from `data` to `sum`, of the same length, for
    /// benchmarks. False if there is none.
    fn library_all_reduce_f32(&self, data: &[f32], sum: &mut [f32]) -> Result<bool, CommError>;

    /// Orderly end: all ranks have to call it, and nothing else after it. Calling it again does nothing.
    fn finalize(&self) -> Result<(), CommError>;
}

/// A result that is on its way. Dropping it abandons the result; the operation still takes place.
pub struct Pending<T> {
    pub(crate) state: PendingState<T>,
}

pub(crate) enum PendingState<T> {
    Ready(Result<T, CommError>),
    Running { receiver: Receiver<Result<T, CommError>>, call: Call, rank: usize, size: usize },
}

impl<T> Pending<T> {
    pub(crate) fn ready(value: T) -> Self {
        Self { state: PendingState::Ready(Ok(value)) }
    }

    /// Blocks until the operation is done.
    ///
    /// # Errors
    /// Those of the operation.
    pub fn wait(self) -> Result<T, CommError> {
        match self.state {
            PendingState::Ready(result) => result,
            PendingState::Running { receiver, call, rank, size } => {
                receiver.recv().unwrap_or(Err(CommError::Ended { call, rank, size, cause: None }))
            }
        }
    }
}

/// The part of `len` elements that belongs to `rank`: contiguous, ascending, the first `len % size` one longer.
pub fn shard_range(len: usize, rank: usize, size: usize) -> Range<usize> {
    let (each, extra) = (len / size, len % size);
    let start = rank * each + rank.min(extra);
    start..start + each + usize::from(rank < extra)
}

/// Every rank's values, by rank; lengths may differ.
///
/// # Errors
/// Those of the collective.
pub fn all_gather<T: bytemuck::Pod>(comm: &dyn Communicator, mine: &[T]) -> Result<Vec<Vec<T>>, CommError> {
    let parts = comm.all_gather_bytes(bytemuck::cast_slice(mine))?;
    let values = |part: &Vec<u8>| {
        // A copy, because the bytes are not aligned for T.
        let mut values = vec![T::zeroed(); part.len() / size_of::<T>()];
        bytemuck::cast_slice_mut(&mut values).copy_from_slice(part);
        values
    };
    Ok(parts.iter().map(values).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_are_contiguous_and_even() {
        for len in [0, 1, 2, 7, 100, 101] {
            for size in 1..9 {
                let mut next = 0;
                for rank in 0..size {
                    let shard = shard_range(len, rank, size);
                    assert_eq!(shard.start, next);
                    assert!(shard.len() == len / size || shard.len() == len / size + 1);
                    next = shard.end;
                }
                assert_eq!(next, len);
            }
        }
    }
}
