//! Precision and recall by nearest neighbours (Kynkäänniemi et al., arXiv 1904.06991).

use rayon::prelude::*;

use super::EvaluateError;

/// How much of the samples lies within the data, and how much of the data within the samples.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PrecisionRecall {
    /// Fraction of the samples inside the data's neighbourhoods: fidelity.
    pub precision: f64,
    /// Fraction of the data inside the samples' neighbourhoods: variety.
    pub recall: f64,
}

/// Precision and recall of `samples` [M, D] against `data` [N, D] (flattened, D = `dimensions`), with
/// neighbourhoods that reach to each point's `neighbours`-th nearest of its own kind (3 in the paper).
/// The work is (N + M)^2 D, on all threads of rayon's pool.
///
/// # Errors
/// [`EvaluateError::TooFew`] unless each side has more than `neighbours` points.
pub fn precision_recall(
    data: &[f64],
    samples: &[f64],
    dimensions: usize,
    neighbours: usize,
) -> Result<PrecisionRecall, EvaluateError> {
    let (data, samples) = (Points::new(data, dimensions)?, Points::new(samples, dimensions)?);
    for points in [&data, &samples] {
        let (count, needed) = (points.count() as u64, neighbours as u64 + 1);
        if count < needed {
            return Err(EvaluateError::TooFew { count, needed });
        }
    }
    Ok(PrecisionRecall {
        precision: samples.covered_by(&data, &data.radii(neighbours)),
        recall: data.covered_by(&samples, &samples.radii(neighbours)),
    })
}

struct Points<'a> {
    values: &'a [f64],
    dimensions: usize,
}

impl<'a> Points<'a> {
    fn new(values: &'a [f64], dimensions: usize) -> Result<Self, EvaluateError> {
        assert!(values.len().is_multiple_of(dimensions), "no rows of {dimensions}");
        if let Some(at) = values.iter().position(|v| !v.is_finite()) {
            let (sample, dimension) = (at / dimensions, at % dimensions);
            return Err(EvaluateError::NotFinite { sample, dimension, value: values[at] });
        }
        Ok(Self { values, dimensions })
    }

    fn count(&self) -> usize {
        self.values.len() / self.dimensions
    }

    fn rows(&self) -> std::slice::ChunksExact<'_, f64> {
        self.values.chunks_exact(self.dimensions)
    }

    /// Squared distance of each point to its `neighbours`-th nearest other point.
    fn radii(&self, neighbours: usize) -> Vec<f64> {
        self.values
            .par_chunks_exact(self.dimensions)
            .map(|point| {
                let mut distances: Vec<f64> = self.rows().map(|other| squared(point, other)).collect();
                // The nearest is the point itself.
                *distances.select_nth_unstable_by(neighbours, f64::total_cmp).1
            })
            .collect()
    }

    /// Fraction of these points that lie within the radius of any of `centres`.
    fn covered_by(&self, centres: &Points, radii: &[f64]) -> f64 {
        let covered = self
            .values
            .par_chunks_exact(self.dimensions)
            .filter(|point| centres.rows().zip(radii).any(|(centre, &r)| squared(point, centre) <= r))
            .count();
        covered as f64 / self.count() as f64
    }
}

fn squared(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_of_one_mode_are_precise_and_lack_recall() {
        // Data around 0 and around 100; samples around 0, and one between.
        let data: Vec<f64> = (0..10).map(f64::from).chain((0..10).map(|i| 100.0 + f64::from(i))).collect();
        let samples: Vec<f64> = (0..9).map(|i| f64::from(i) + 0.5).chain([50.0]).collect();
        let ours = precision_recall(&data, &samples, 1, 3).expect("enough points");
        assert_eq!(ours, PrecisionRecall { precision: 0.9, recall: 0.5 });
        let same = precision_recall(&data, &data, 1, 3).expect("enough points");
        assert_eq!(same, PrecisionRecall { precision: 1.0, recall: 1.0 });
    }

    #[test]
    fn too_few_points_are_an_error() {
        let error = precision_recall(&[0.0, 1.0, 2.0], &[0.0, 1.0, 2.0, 3.0], 1, 3).expect_err("three");
        assert!(error.to_string().contains("3 samples are too few"), "{error}");
        assert!(precision_recall(&[0.0, f64::NAN], &[0.0, 1.0], 1, 1).is_err());
    }
}
