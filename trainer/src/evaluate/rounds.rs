//! Features of many images, of all ranks.

use repa_comm::{Communicator, RemoteError, all_gather, all_or_first_error};

use super::EvaluationError;
use crate::generate::{each_rank, of_talk};
use crate::gpu_failure;

/// As [`each_rank`], of evaluations.
pub(super) fn part<T: Send>(
    comm: &dyn Communicator,
    work: impl FnOnce() -> Result<T, EvaluationError> + Send,
) -> Result<T, RemoteError> {
    each_rank(comm, work)
}

/// What each rank gives.
pub(super) fn gathered(comm: &dyn Communicator, mine: &[f32]) -> Result<Vec<Vec<f32>>, RemoteError> {
    all_or_first_error(comm, all_gather(comm, mine).map_err(of_talk))
}

/// How many images there are, and how many of them a rank takes at once.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rounds {
    pub count: usize,
    pub batch: usize,
}

impl Rounds {
    /// Has ranks take turns in making rows of `width` features of the images by their numbers, and gives all rows to
    /// `take` of every rank, in order and round by round.
    ///
    /// # Errors
    /// Those of `make` and `take` on any rank, the same on all.
    pub fn rows(
        self,
        comm: &dyn Communicator,
        width: usize,
        mut make: impl FnMut(&[u64]) -> Result<Vec<f32>, EvaluationError> + Send,
        mut take: impl FnMut(&[f32]) -> Result<(), EvaluationError> + Send,
    ) -> Result<(), RemoteError> {
        let (ranks, rank) = (comm.size(), comm.rank());
        let round = self.batch * ranks;
        for start in (0..self.count).step_by(round) {
            let end = self.count.min(start + round);
            let numbers: Vec<u64> = (start + rank..end).step_by(ranks).map(|number| number as u64).collect();
            let mine = part(comm, || make(&numbers))?;
            gpu_failure::has_worked();
            let rows = in_turn(&gathered(comm, &mine)?, width);
            part(comm, || take(&rows))?;
        }
        Ok(())
    }
}

/// The first row of each rank, then the second of each.
fn in_turn(parts: &[Vec<f32>], width: usize) -> Vec<f32> {
    let mut rows = Vec::with_capacity(parts.iter().map(Vec::len).sum());
    for at in (0..parts.iter().map(Vec::len).max().unwrap_or(0)).step_by(width) {
        parts.iter().filter_map(|part| part.get(at..at + width)).for_each(|row| rows.extend_from_slice(row));
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_in_order() {
        let parts = [vec![0.0, 0.5, 3.0, 3.5], vec![1.0, 1.5, 4.0, 4.5], vec![2.0, 2.5]];
        assert_eq!(in_turn(&parts, 2), [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5]);
        assert_eq!(in_turn(&[vec![], vec![]], 2), [0.0f32; 0]);
    }
}
