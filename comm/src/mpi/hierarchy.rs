//! Collectives in two levels: within each node through shared memory, between the nodes by messages.
//!
//! The ranks of a node add up what they have, each one part of the vector (a reduce-scatter). Those with the same
//! local rank on all nodes then have the same part, and add it up over the network. So a node sends each element once,
//! not once a rank. The order of additions is that of the local ranks, then that of the nodes.

use super::messages::Messages;
use super::raw::check;
use super::shared::SharedMemory;
use crate::communicator::{ReduceOp, shard_range};
use crate::reduce::{Element, Phases};
use crate::waiter::Waiter;
use crate::{Collective, CommError, Topology};
use mpi::ffi;
use std::ffi::c_int;
use std::ops::Range;

/// Place of a rank among nodes of equally many ranks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    local_rank: usize,
    local_size: usize,
    node: usize,
    nodes: usize,
}

impl Place {
    /// None where two levels cannot be had, or would be one.
    pub(super) fn new(topology: &Topology) -> Option<Self> {
        let &Topology { local_rank, local_size, node, nodes, .. } = topology;
        let even = (0..nodes).all(|n| topology.node_of.iter().filter(|&&of| of == n).count() == local_size);
        (even && nodes > 1 && local_size > 1).then_some(Self { local_rank, local_size, node, nodes })
    }

    /// What the rank sums up with its node.
    fn outer(self, len: usize) -> Range<usize> {
        shard_range(len, self.local_rank, self.local_size)
    }

    /// The rank's shard: its part of that.
    pub(super) fn shard(self, len: usize) -> Range<usize> {
        let outer = self.outer(len);
        let inner = shard_range(outer.len(), self.node, self.nodes);
        outer.start + inner.start..outer.start + inner.end
    }
}

/// Both levels.
pub(super) struct Hierarchy {
    within: SharedMemory,
    across: Messages,
    place: Place,
}

impl Hierarchy {
    /// A collective of all ranks. `within` is the node's.
    pub(super) fn new(
        within: SharedMemory,
        place: Place,
        topology: &Topology,
        chunk_bytes: usize,
    ) -> Result<Self, CommError> {
        let mut across = std::mem::MaybeUninit::<ffi::MPI_Comm>::uninit();
        // SAFETY: MPI runs, in this thread; the address is live for the call. Ordered by node.
        let across = unsafe {
            let code = ffi::MPI_Comm_split(
                ffi::RSMPI_COMM_WORLD,
                place.local_rank as c_int,
                place.node as c_int,
                across.as_mut_ptr(),
            );
            check(code, Collective::Start.into(), topology.rank, topology.size)?;
            let across = across.assume_init();
            ffi::MPI_Comm_set_errhandler(across, ffi::RSMPI_ERRORS_RETURN);
            across
        };
        let members = (0..place.nodes)
            .map(|node| {
                let mut here = (0..topology.size).filter(|&rank| topology.node_of[rank] == node);
                here.nth(place.local_rank).expect("nodes have equally many ranks")
            })
            .collect();
        Ok(Self { within, across: Messages::new(across, place.node, members, chunk_bytes), place })
    }

    /// All-reduce or one of its halves, in place; shards are [`Place::shard`]'s.
    pub(super) fn run<T: Element>(
        &mut self,
        data: &mut [T],
        op: ReduceOp,
        phases: Phases,
        waiter: &mut Waiter,
    ) -> Result<(), CommError> {
        let outer = self.place.outer(data.len());
        if phases.reduces() {
            self.within.run(data, op, Phases::Reduce, waiter)?;
        }
        self.across.run(&mut data[outer], op, phases, waiter)?;
        if phases.gathers() {
            self.within.run(data, op, Phases::Gather, waiter)?;
        }
        Ok(())
    }

    /// Gives the shared memory back: a collective.
    pub(super) fn free(self) {
        self.within.free();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_of_two_levels_are_the_vector() {
        for (nodes, local_size) in [(2, 2), (3, 2), (4, 8)] {
            for len in [0, 1, 5, 100, 1001] {
                let mut seen = vec![0; len];
                for (node, local_rank) in (0..nodes).flat_map(|n| (0..local_size).map(move |l| (n, l))) {
                    Place { local_rank, local_size, node, nodes }.shard(len).for_each(|i| seen[i] += 1);
                }
                assert!(seen.iter().all(|&n| n == 1), "{len} over {nodes} nodes of {local_size}");
            }
        }
    }
}
