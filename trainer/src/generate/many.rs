//! Images by the ten thousand, of all ranks, in one file for an evaluator (the reference's `generate.py`).

use std::path::Path;

use repa_comm::{Communicator, Failure, RemoteError, all_or_first_error};

use super::{Generator, each_rank, of_talk};
use crate::data::draws::{Draws, Purpose};
use crate::exit::Kind;
use crate::figures::{FigureError, NpzWriter};
use crate::gpu_failure;
use crate::images::Image;

/// Block of a sample's draws that no latent reaches.
const LABEL: u32 = u32::MAX;

/// Images of each rank that all of them are sent at once.
const AT_ONCE: usize = 4;

/// The classes of images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Classes {
    /// Drawn for each image, as the reference does it.
    Random,
    /// One after another, so that all are as many, or one more.
    Even,
}

impl Classes {
    /// The class of an image.
    pub fn label(self, seed: u64, sample: u64, classes: usize) -> usize {
        match self {
            Self::Random => {
                let [word, ..] = Draws::new(seed, Purpose::Sample).words(sample, LABEL);
                ((u64::from(word) * classes as u64) >> 32) as usize
            }
            Self::Even => (sample % classes as u64) as usize,
        }
    }
}

/// Draws `count` images on all ranks, which take turns, and has rank 0 write them to an `.npz` as they come: `arr_0`,
/// uint8 [N, H, W, 3], values cut off below the point as the reference cuts them off. Noise and classes are the same in
/// the same order on any number of ranks. Called by all of them; `done` hears on each how many are written.
///
/// # Errors
/// A sampler's on any rank, or rank 0's disk is full: the same on all ranks, and no file is left. (A job that is ended
/// from outside leaves a part of it, `FILE.PID.tmp`.)
pub fn write_many(
    comm: &dyn Communicator,
    generator: &Generator,
    (count, classes): (usize, Classes),
    path: &Path,
    mut done: impl FnMut(usize),
) -> Result<(), RemoteError> {
    let (ranks, rank) = (comm.size(), comm.rank());
    let mut file = None;
    let round = generator.batch_size() * ranks;
    for start in (0..count).step_by(round) {
        let end = count.min(start + round);
        let mine: Vec<u64> = (start + rank..end).step_by(ranks).map(|i| i as u64).collect();
        let images = each_rank(comm, || generator.for_evaluators(&mine, classes))?;
        gpu_failure::has_worked();
        for first in (0..(end - start).div_ceil(ranks)).step_by(AT_ONCE) {
            let part = images.iter().skip(first).take(AT_ONCE);
            let part: Vec<u8> = part.flat_map(|image| image.pixels.iter().copied()).collect();
            let parts = comm.all_gather_bytes(&part).map_err(of_talk);
            let written = parts.and_then(|parts| match images.first() {
                Some(like) if rank == 0 => write(&mut file, (path, count), &parts, like).map_err(unwritten),
                _ => Ok(()),
            });
            all_or_first_error(comm, written)?;
        }
        done(end);
    }
    let finished = file.map_or(Ok(()), NpzWriter::finish);
    all_or_first_error(comm, finished.map_err(unwritten))
}

fn unwritten(error: FigureError) -> Failure {
    Failure { message: error.to_string(), code: i32::from(Kind::Runtime.code()) }
}

/// Writes the ranks' images in turn: the first of each, the second of each. They are as large as `like`.
fn write(
    file: &mut Option<NpzWriter>,
    (path, count): (&Path, usize),
    parts: &[Vec<u8>],
    like: &Image,
) -> Result<(), FigureError> {
    let (width, height) = (like.width, like.height);
    let file = match file {
        Some(file) => file,
        None => file.insert(NpzWriter::create(path, count, height, width)?),
    };
    let each = like.pixels.len();
    for number in 0..parts.iter().map(|part| part.len() / each).max().unwrap_or(0) {
        for pixels in parts.iter().filter_map(|part| part.get(number * each..(number + 1) * each)) {
            file.push(&Image { width, height, pixels: pixels.to_vec() })?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_follow_from_seed_and_number_and_reach_all_classes() {
        let labels = |classes: Classes, seed| -> Vec<usize> {
            (0..6000).map(|sample| classes.label(seed, sample, 3)).collect()
        };
        let counts = |labels: &[usize]| [0, 1, 2].map(|class| labels.iter().filter(|&&l| l == class).count());
        assert_eq!(counts(&labels(Classes::Even, 1)), [2000; 3]);
        let random = labels(Classes::Random, 1);
        // Three standard deviations are 110.
        assert!(counts(&random).iter().all(|count| count.abs_diff(2000) < 150), "{:?}", counts(&random));
        assert_eq!(random, labels(Classes::Random, 1));
        assert_ne!(random, labels(Classes::Random, 2));
    }
}
