//! The scores of ADM's evaluator (Dhariwal and Nichol, arXiv 2105.05233: `evaluations/evaluator.py`), by which the
//! paper compares models.

use repa_comm::{Communicator, ReduceOp, RemoteError, all_or_first_error, shard_range};
use serde::{Deserialize, Serialize};

use super::inception::{BATCH, Inception};
use super::neighbours::Points;
use super::rounds::{Rounds, gathered, part};
use super::{Batch, EvaluationError, Gaussian, GaussianStatistics};
use crate::generate::{Classes, Generator, of_talk, same_on_all};
use crate::images::Image;
use crate::sample::SamplerConfig;

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
    /// How the samples were drawn, where that was from a run.
    pub sampler: Option<SamplerConfig>,
    /// Whether each class had as many samples, where they were drawn from a run.
    pub even_classes: Option<bool>,
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

    /// Statistics that are there without looking at images: of pooled and of spatial features.
    fn given(&self) -> [Option<&Gaussian>; 2] {
        match self {
            Self::Drawn(..) => [None, None],
            Self::Stored(batch) => batch.given(),
        }
    }
}

/// Scores samples against a reference batch, on all ranks, which share the work; the scores come out on rank 0.
/// `progress` hears on every rank how many images have been looked at, the reference's and the samples together.
///
/// As in ADM's evaluator, statistics that a file holds go before those of its images.
///
/// # Errors
/// A sampler's, a file's or the communication's, files that differ between ranks, or features that are not finite: the
/// same on all ranks.
pub fn score(
    comm: &dyn Communicator,
    inception: &Inception,
    reference: &Batch,
    samples: &Samples,
    mut progress: impl FnMut(usize) + Send,
) -> Result<Option<Scores>, RemoteError> {
    const SAME: &str = "give all hosts the same file";
    same_on_all(
        comm,
        &[
            ("images of the reference batch", reference.count() as u64, SAME),
            ("statistics in the reference batch", reference.given().iter().flatten().count() as u64, SAME),
            ("samples", samples.count() as u64, SAME),
        ],
    )?;
    let first = comm.rank() == 0;
    let compared = reference.count() > 0;
    let theirs = Samples::Stored(reference);
    let mut looked = |samples: &Samples, before: usize| {
        // Neighbours are searched by all ranks, the rest is rank 0's.
        let wanted = samples.given().map(|given| first && given.is_none());
        Looked::at(comm, inception, samples, first || compared, wanted, &mut |done| progress(before + done))
    };
    let (theirs_looked, ours_looked) = (looked(&theirs, 0)?, looked(samples, reference.count())?);

    let figures = || -> Result<_, EvaluationError> {
        if !first {
            return Ok(None);
        }
        let distance = |which: usize| {
            let gaussian = |samples: &Samples, looked: &Looked| match samples.given()[which] {
                Some(given) => Ok(given.clone()),
                None => looked.statistics[which].gaussian(),
            };
            gaussian(samples, &ours_looked)?.frechet_distance(&gaussian(&theirs, &theirs_looked)?)
        };
        let spatial = compared || reference.given()[1].is_some();
        let (fid, sfid) = rayon::join(|| distance(0), || spatial.then(|| distance(1)).transpose());
        Ok(Some((fid?, sfid?, inception_score(inception, &ours_looked.pooled))))
    };
    let figures = part(comm, figures)?;
    let covered = match compared {
        true => Some(covered(comm, inception, [theirs_looked.pooled, ours_looked.pooled])?),
        false => None,
    };
    let Some((fid, sfid, inception_score)) = figures else { return Ok(None) };
    let drawn = match samples {
        Samples::Drawn(generator, _, classes) => Some((*generator, *classes)),
        Samples::Stored(_) => None,
    };
    Ok(Some(Scores {
        step: drawn.map(|(generator, _)| generator.step()),
        samples: samples.count(),
        sampler: drawn.map(|(generator, _)| generator.sampler().clone()),
        even_classes: drawn.map(|(_, classes)| classes == Classes::Even),
        reference: reference.path().display().to_string(),
        reference_images: reference.count(),
        fid,
        sfid,
        inception_score,
        precision: covered.map(|[precision, _]| precision),
        recall: covered.map(|[_, recall]| recall),
    }))
}

/// The images of these numbers, which are asked for in order.
type ByNumber<'a> = dyn FnMut(&[u64]) -> Result<Vec<Image>, EvaluationError> + Send + 'a;

/// What is left of images.
struct Looked {
    /// Pooled features of all of them, [N, 2048], flattened, where they were asked for.
    pooled: Vec<f32>,
    /// Of pooled and of spatial features, where they were asked for.
    statistics: [GaussianStatistics; 2],
}

impl Looked {
    fn at(
        comm: &dyn Communicator,
        inception: &Inception,
        samples: &Samples,
        keep: bool,
        wanted: [bool; 2],
        progress: &mut (dyn FnMut(usize) + Send),
    ) -> Result<Self, RemoteError> {
        const WIDTH: usize = Inception::POOLED + Inception::SPATIAL;
        let count = samples.count();
        let statistics =
            |which: usize, dimensions| GaussianStatistics::new(if wanted[which] { dimensions } else { 0 });
        let mut looked = Self {
            pooled: Vec::new(),
            statistics: [statistics(0, Inception::POOLED), statistics(1, Inception::SPATIAL)],
        };
        let (batch, mut images): (usize, Box<ByNumber>) = match samples {
            Samples::Drawn(generator, _, classes) => {
                (generator.batch_size(), Box::new(|numbers| Ok(generator.for_evaluators(numbers, *classes)?)))
            }
            Samples::Stored(batch) => {
                let mut stored = batch.images(comm.rank(), comm.size());
                (BATCH, Box::new(move |numbers| stored.take(numbers.len())))
            }
        };
        let make = |numbers: &[u64]| {
            let features = inception.features(&images(numbers)?);
            let rows =
                features.pooled.chunks(Inception::POOLED).zip(features.spatial.chunks(Inception::SPATIAL));
            Ok(rows.flat_map(|(pooled, spatial)| pooled.iter().chain(spatial)).copied().collect())
        };
        let (mut done, mut waiting) = (0, Vec::new());
        let take = |rows: &[f32]| {
            done += rows.len() / WIDTH;
            for row in rows.chunks(WIDTH) {
                let (pooled, spatial) = row.split_at(Inception::POOLED);
                if keep {
                    looked.pooled.extend_from_slice(pooled);
                }
                if wanted[1] {
                    waiting.extend_from_slice(spatial);
                }
            }
            if wanted[1] && (done == count || waiting.len() >= COUNTED * Inception::SPATIAL) {
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
    [reference, samples]: [Vec<f32>; 2],
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
    let mut within = part(comm, || {
        let precise = samples.within(share(samples), reference, &radii[0]);
        let recalled = reference.within(share(reference), samples, &radii[1]);
        Ok([precise, recalled].map(|count| count as i64))
    })?;
    all_or_first_error(comm, comm.all_reduce_i64(&mut within, ReduceOp::Sum).map_err(of_talk))?;
    let fraction = |count: i64, of: &Points| count as f64 / of.count() as f64;
    Ok([fraction(within[0], samples), fraction(within[1], reference)])
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
