//! The scores of ADM's evaluator (Dhariwal and Nichol, arXiv 2105.05233: `evaluations/evaluator.py`), by which the
//! paper compares models.

use repa_comm::{Communicator, RemoteError, shard_range};
use serde::{Deserialize, Serialize};

use super::inception::{BATCH, Inception};
use super::rounds::{Rounds, gathered, part};
use super::{Batch, EvaluationError, Gaussian, GaussianStatistics, Points};
use crate::generate::{Classes, Generator};

/// Samples of which each inception score is; the score is their mean.
const SPLIT: usize = 5000;

/// Samples whose classes are predicted at once.
const PREDICTED: usize = 512;

/// Samples that statistics take at once: a few take almost as long.
const COUNTED: usize = 512;

/// How samples compare with a reference batch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// Optimizer steps behind the weights, where the samples were drawn from a run.
    pub step: Option<u64>,
    /// Samples.
    pub samples: usize,
    /// Guidance scale, where the samples were drawn from a run.
    pub cfg_scale: Option<f64>,
    /// The reference batch's file.
    pub reference: String,
    /// Images of the reference batch.
    pub reference_images: usize,
    /// Fréchet Inception distance (Heusel et al., arXiv 1706.08500).
    pub fid: f64,
    /// The same in spatial features (Nash et al., arXiv 2103.03841); None where the reference batch tells nothing of
    /// them.
    pub sfid: Option<f64>,
    /// Inception score (Salimans et al., arXiv 1606.03498).
    pub inception_score: f64,
    /// Fraction of the samples within the reference images' neighbourhoods; None without such images.
    pub precision: Option<f64>,
    /// Fraction of the reference images within the samples' neighbourhoods; None without such images.
    pub recall: Option<f64>,
}

/// Samples to score.
#[derive(Debug)]
pub enum Samples<'a> {
    /// As many from a run, of the same noise and classes as `sample --npz` draws.
    Drawn(&'a Generator, usize, Classes),
    /// The images of a file.
    Stored(&'a Batch),
}

impl Samples<'_> {
    /// How many.
    pub fn count(&self) -> usize {
        match self {
            Self::Drawn(_, count, _) => *count,
            Self::Stored(batch) => batch.count(),
        }
    }
}

/// Scores samples against a reference batch, on all ranks, which share the work; the scores come out on rank 0.
/// `progress` hears on every rank how many images have been looked at, the reference's and the samples together.
///
/// # Errors
/// Fewer than four images on a side; a sampler's, a file's or the communication's error, the same on all ranks.
pub fn score(
    comm: &dyn Communicator,
    inception: &Inception,
    reference: &Batch,
    samples: &Samples,
    mut progress: impl FnMut(usize) + Send,
) -> Result<Option<Scores>, RemoteError> {
    let first = comm.rank() == 0;
    let known = [reference.pooled.is_some(), reference.spatial.is_some()];
    let theirs = Samples::Stored(reference);
    let theirs = Looked::at(comm, inception, &theirs, known.map(|known| first && !known), &mut progress)?;
    let of_reference = reference.count();
    let mut later = |done| progress(of_reference + done);
    let ours = Looked::at(comm, inception, samples, [first; 2], &mut later)?;

    let covered = match of_reference {
        0 => None,
        _ => Some(covered(comm, inception, [&theirs.pooled, &ours.pooled])?),
    };
    let figures = || -> Result<_, EvaluationError> {
        if !first {
            return Ok(None);
        }
        let distance = |given: &Option<Gaussian>, theirs: &GaussianStatistics, ours: &GaussianStatistics| {
            let known = match given {
                Some(known) => known.clone(),
                None => theirs.gaussian()?,
            };
            ours.gaussian()?.frechet_distance(&known)
        };
        let (pooled, spatial) = rayon::join(
            || distance(&reference.pooled, &theirs.statistics[0], &ours.statistics[0]),
            || match reference.spatial.is_some() || of_reference > 0 {
                true => distance(&reference.spatial, &theirs.statistics[1], &ours.statistics[1]).map(Some),
                false => Ok(None),
            },
        );
        Ok(Some((pooled?, spatial?, inception_score(inception, &ours.pooled))))
    };
    let Some((fid, sfid, inception_score)) = part(comm, figures)? else { return Ok(None) };
    let (step, cfg_scale) = match samples {
        Samples::Drawn(generator, ..) => (Some(generator.step()), Some(generator.cfg_scale())),
        Samples::Stored(_) => (None, None),
    };
    Ok(Some(Scores {
        step,
        samples: samples.count(),
        cfg_scale,
        reference: reference.path().display().to_string(),
        reference_images: of_reference,
        fid,
        sfid,
        inception_score,
        precision: covered.map(|[precision, _]| precision),
        recall: covered.map(|[_, recall]| recall),
    }))
}

/// What is left of images.
struct Looked {
    /// Pooled features of all of them, [N, 2048], flattened, on every rank.
    pooled: Vec<f32>,
    /// Of pooled and of spatial features, where they were asked for.
    statistics: [GaussianStatistics; 2],
}

impl Looked {
    fn at(
        comm: &dyn Communicator,
        inception: &Inception,
        samples: &Samples,
        wanted: [bool; 2],
        progress: &mut (dyn FnMut(usize) + Send),
    ) -> Result<Self, RemoteError> {
        const WIDTH: usize = Inception::POOLED + Inception::SPATIAL;
        let count = samples.count();
        let mut looked = Self {
            pooled: Vec::with_capacity(count * Inception::POOLED),
            statistics: [Inception::POOLED, Inception::SPATIAL].map(GaussianStatistics::new),
        };
        let mut stored = match samples {
            Samples::Stored(batch) => Some(batch.images(comm.rank(), comm.size())),
            Samples::Drawn(..) => None,
        };
        let batch = match samples {
            Samples::Drawn(generator, ..) => generator.batch_size(),
            Samples::Stored(_) => BATCH,
        };
        let make = |numbers: &[u64]| {
            let images = match (samples, &mut stored) {
                (Samples::Drawn(generator, _, classes), _) => generator.for_evaluators(numbers, *classes)?,
                (Samples::Stored(_), Some(stored)) => stored.take(numbers.len())?,
                (Samples::Stored(_), None) => unreachable!("opened above"),
            };
            let features = inception.features(&images);
            let rows =
                features.pooled.chunks(Inception::POOLED).zip(features.spatial.chunks(Inception::SPATIAL));
            Ok(rows.flat_map(|(pooled, spatial)| pooled.iter().chain(spatial)).copied().collect())
        };
        let (mut done, mut waiting) = (0, Vec::new());
        let take = |rows: &[f32]| {
            done += rows.len() / WIDTH;
            for row in rows.chunks(WIDTH) {
                let (pooled, spatial) = row.split_at(Inception::POOLED);
                looked.pooled.extend_from_slice(pooled);
                if wanted[1] {
                    waiting.extend_from_slice(spatial);
                }
            }
            if done == count || waiting.len() >= COUNTED * Inception::SPATIAL {
                looked.statistics[1].add_f32(&waiting)?;
                waiting.clear();
            }
            progress(done);
            Ok(())
        };
        Rounds { count, batch }.rows(comm, WIDTH, make, take)?;
        part(comm, || {
            if wanted[0] {
                let mut parts = looked.pooled.chunks(COUNTED * Inception::POOLED);
                parts.try_for_each(|part| looked.statistics[0].add_f32(part))?;
            }
            Ok(looked)
        })
    }
}

/// Precision and recall of samples by their pooled features, the reference's first.
fn covered(
    comm: &dyn Communicator,
    inception: &Inception,
    [reference, samples]: [&[f32]; 2],
) -> Result<[f64; 2], RemoteError> {
    let share = |points: &Points| shard_range(points.count(), comm.rank(), comm.size());
    let (points, radii) = part(comm, || {
        let points = |values| Points::new(values, Inception::POOLED, inception.device());
        let points = [points(reference)?, points(samples)?];
        let radii = [0, 1].map(|side| points[side].radii(share(&points[side])));
        Ok::<_, EvaluationError>((points, radii))
    })?;
    let radii = [gathered(comm, &radii[0])?.concat(), gathered(comm, &radii[1])?.concat()];
    let [reference, samples] = &points;
    let within = part(comm, || {
        let precise = samples.within(share(samples), reference, &radii[0]);
        let recalled = reference.within(share(reference), samples, &radii[1]);
        Ok([precise, recalled].map(|count| count as f32))
    })?;
    // A rank's count is well below 2^24, so that float32 has it.
    let sums = gathered(comm, &within)?;
    let fraction = |side: usize, of: &Points| {
        sums.iter().map(|part| f64::from(part[side])).sum::<f64>() / of.count() as f64
    };
    Ok([fraction(0, samples), fraction(1, reference)])
}

/// exp of the mean divergence of each sample's classes from those of all, by splits, whose mean it is.
fn inception_score(inception: &Inception, pooled: &[f32]) -> f64 {
    let scores: Vec<f64> = pooled
        .chunks(SPLIT * Inception::POOLED)
        .map(|split| {
            let parts = split.chunks(PREDICTED * Inception::POOLED);
            let probabilities: Vec<f32> = parts.flat_map(|part| inception.probabilities(part)).collect();
            score_of_split(&probabilities, Inception::CLASSES)
        })
        .collect();
    scores.iter().sum::<f64>() / scores.len() as f64
}

fn score_of_split(probabilities: &[f32], classes: usize) -> f64 {
    let rows = probabilities.chunks_exact(classes);
    let count = rows.len() as f64;
    let mut mean = vec![0.0; classes];
    for row in rows.clone() {
        mean.iter_mut().zip(row).for_each(|(sum, &p)| *sum += f64::from(p) / count);
    }
    let divergence = |row: &[f32]| -> f64 {
        let terms = row.iter().zip(&mean).filter(|(p, _)| **p > 0.0);
        terms.map(|(&p, mean)| f64::from(p) * (f64::from(p).ln() - mean.ln())).sum()
    };
    (rows.map(divergence).sum::<f64>() / count).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_inception_score_counts_the_classes_that_are_told_apart() {
        let certain: Vec<f32> = (0..12).map(|i| f32::from(u8::from(i % 3 == i / 3 % 3))).collect();
        // Rows of classes 0, 1, 2 and 0: exp of the entropy of (1/2, 1/4, 1/4).
        let entropy = 0.5 * 2f64.ln() + 0.5 * 4f64.ln();
        assert!((score_of_split(&certain, 3) - entropy.exp()).abs() < 1e-12);
        assert!((score_of_split(&[0.5, 0.25, 0.25, 0.5, 0.25, 0.25], 3) - 1.0).abs() < 1e-12);
    }
}
