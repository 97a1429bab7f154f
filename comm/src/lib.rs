//! Ranks and collectives of repa-dist: one trait, [`Communicator`], over one process ([`Single`]), MPI
//! ([`Mpi`]) or, with the feature `nccl`, GPUs (`nccl::Nccl`).
//!
//! Sums have one definition: the values of the ranks are added element by element in rank order, in the
//! element's own type (float32 for gradients, and for half precision). Whatever the transport, the piece size or the
//! way a vector is cut into buckets, the bits are the same. (Adding up within nodes first is another order, and counts
//! as another layout of the ranks. NCCL fixes no order, so its sums agree up to rounding only.)
//!
//! Knows nothing of models or training.

pub mod abort;
pub mod agreement;
pub mod bench;
pub mod board;
mod communicator;
pub mod copy;
pub mod environment;
mod error;
mod mpi;
#[cfg(feature = "nccl")]
pub mod nccl;
mod reduce;
mod single;
mod topology;
mod waiter;
mod worker;

pub use abort::{Explain, abort, install_panic_hook};
pub use agreement::{Failure, RemoteError, all_or_first_error, end_with};
pub use board::Board;
pub use communicator::{
    Background, Communicator, Pending, ReduceOp, Traffic, Values, Wire, all_gather, shard_range,
};
pub use environment::{Launcher, Options, init};
pub use error::{Call, Collective, CommError};
pub use mpi::{Mpi, library_version, thread_level};
#[cfg(feature = "nccl")]
pub use nccl::Nccl;
pub use reduce::Phases;
pub use single::Single;
pub use topology::Topology;
