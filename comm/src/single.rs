//! One process: every collective is the identity.

use crate::{Background, CommError, Communicator, Pending, ReduceOp, Topology, Traffic, Values};
use std::ops::Range;
use std::time::Duration;

/// The communicator of a job of one rank, without MPI.
#[derive(Debug)]
pub struct Single {
    topology: Topology,
}

impl Single {
    /// Rank 0 of 1 on this host.
    pub fn new() -> Self {
        Self { topology: Topology::single() }
    }
}

impl Default for Single {
    fn default() -> Self {
        Self::new()
    }
}

impl Communicator for Single {
    fn topology(&self) -> &Topology {
        &self.topology
    }
    fn describe(&self) -> String {
        "one process, without MPI".to_owned()
    }
    fn set_deadline(&self, _deadline: Option<Duration>) {}
    fn set_step(&self, _step: u64) {}
    fn set_hierarchical(&self, _hierarchical: bool) {}
    fn traffic(&self) -> Traffic {
        Traffic::default()
    }
    fn all_reduce(&self, _values: Values, _op: ReduceOp) -> Result<(), CommError> {
        Ok(())
    }
    fn shard(&self, len: usize) -> Range<usize> {
        0..len
    }
    fn reduce_scatter_f32(&self, _data: &mut [f32]) -> Result<(), CommError> {
        Ok(())
    }
    fn all_gather_shards_f32(&self, _data: &mut [f32]) -> Result<(), CommError> {
        Ok(())
    }
    fn all_gather_bytes(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        Ok(vec![mine.to_vec()])
    }
    fn broadcast_bytes(&self, _data: &mut Vec<u8>, root: usize) -> Result<(), CommError> {
        assert_eq!(root, 0, "broadcast from rank {root} of 1");
        Ok(())
    }
    fn barrier(&self) -> Result<(), CommError> {
        Ok(())
    }
    /// Nothing travels, so nothing is rounded.
    fn start_f32(&self, data: Vec<f32>, _how: Background) -> Pending<Vec<f32>> {
        Pending::ready(data)
    }
    fn library_all_reduce_f32(&self, _data: &[f32], _sum: &mut [f32]) -> Result<bool, CommError> {
        Ok(false)
    }
    fn finalize(&self) -> Result<(), CommError> {
        Ok(())
    }
}
