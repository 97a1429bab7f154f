//! The Fréchet distance of two Gaussians (Dowson and Landau 1982; FID, arXiv 1706.08500).

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatMut, MatRef, Par, Side};
use rayon::prelude::*;

use super::EvaluateError;

/// Rows that enter the scatter at a time, so that a large batch needs no centred copy of itself.
const ROWS: usize = 256;

/// Rows of the scatter that one thread computes at a time. The bits do not depend on how many threads there are.
const BLOCK: usize = 128;

/// Mean and covariance of features, gathered batch by batch. The same batches in the same order give
/// the same bits.
#[derive(Debug, Clone, PartialEq)]
pub struct GaussianStatistics {
    count: u64,
    mean: Vec<f64>,
    /// Sum over samples of (x - mean)(x - mean)^T, [D, D], row by row.
    scatter: Vec<f64>,
}

impl GaussianStatistics {
    /// Of no samples yet, with `dimensions` features each.
    pub fn new(dimensions: usize) -> Self {
        Self { count: 0, mean: vec![0.0; dimensions], scatter: vec![0.0; dimensions * dimensions] }
    }

    /// Of the samples `features` [N, D], flattened.
    ///
    /// # Errors
    /// As [`GaussianStatistics::add`].
    pub fn of(features: &[f64], dimensions: usize) -> Result<Self, EvaluateError> {
        let mut statistics = Self::new(dimensions);
        statistics.add(features)?;
        Ok(statistics)
    }

    /// Number of samples so far.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Number of features of a sample.
    pub fn dimensions(&self) -> usize {
        self.mean.len()
    }

    /// Adds samples, `features` [N, D], flattened. A length that D does not divide is a programming
    /// error and panics.
    ///
    /// # Errors
    /// [`EvaluateError::NotFinite`] names the sample and feature; nothing is added then.
    pub fn add(&mut self, features: &[f64]) -> Result<(), EvaluateError> {
        let d = self.dimensions();
        assert!(features.len().is_multiple_of(d), "{} features are no rows of {d}", features.len());
        if let Some(at) = features.iter().position(|v| !v.is_finite()) {
            let value = features[at];
            let sample = self.count as usize + at / d;
            return Err(EvaluateError::NotFinite { sample, dimension: at % d, value });
        }
        for rows in features.chunks(ROWS * d) {
            self.absorb(&Self::of_chunk(rows, d));
        }
        Ok(())
    }

    /// [`GaussianStatistics::add`] of float32 features, as encoders give them.
    ///
    /// # Errors
    /// As [`GaussianStatistics::add`].
    pub fn add_f32(&mut self, features: &[f32]) -> Result<(), EvaluateError> {
        self.add(&features.iter().map(|&v| f64::from(v)).collect::<Vec<_>>())
    }

    fn of_chunk(rows: &[f64], d: usize) -> Self {
        let n = rows.len() / d;
        let mut mean = vec![0.0; d];
        for row in rows.chunks_exact(d) {
            mean.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
        }
        mean.iter_mut().for_each(|sum| *sum /= n as f64);
        let centred: Vec<f64> =
            rows.chunks_exact(d).flat_map(|row| row.iter().zip(&mean).map(|(x, m)| x - m)).collect();
        let centred = MatRef::from_row_major_slice(&centred, n, d);
        let mut scatter = vec![0.0; d * d];
        scatter.par_chunks_mut(BLOCK * d).enumerate().for_each(|(block, into)| {
            let rows = into.len() / d;
            let into = MatMut::from_row_major_slice_mut(into, rows, d);
            let left = centred.subcols(block * BLOCK, rows).transpose();
            matmul(into, Accum::Replace, left, centred, 1.0, Par::Seq);
        });
        Self { count: n as u64, mean, scatter }
    }

    /// Chan, Golub and LeVeque's update (1979): no difference of large sums.
    fn absorb(&mut self, other: &Self) {
        if other.count == 0 {
            return;
        }
        let (a, b) = (self.count as f64, other.count as f64);
        let difference: Vec<f64> = other.mean.iter().zip(&self.mean).map(|(y, x)| y - x).collect();
        let weight = a * b / (a + b);
        let rows = self.scatter.par_chunks_exact_mut(difference.len());
        rows.zip(other.scatter.par_chunks_exact(difference.len())).zip(&difference).for_each(
            |((row, theirs), own)| {
                for ((sum, &term), d) in row.iter_mut().zip(theirs).zip(&difference) {
                    *sum += term + weight * own * d;
                }
            },
        );
        self.mean.iter_mut().zip(&difference).for_each(|(mean, d)| *mean += d * (b / (a + b)));
        self.count += other.count;
    }

    /// Mean [D].
    pub fn mean(&self) -> &[f64] {
        &self.mean
    }

    /// Covariance [D, D], row by row, normalised by N - 1.
    ///
    /// # Errors
    /// [`EvaluateError::TooFew`] below two samples.
    pub fn covariance(&self) -> Result<Vec<f64>, EvaluateError> {
        if self.count < 2 {
            return Err(EvaluateError::TooFew { count: self.count, needed: 2 });
        }
        let scale = 1.0 / (self.count - 1) as f64;
        Ok(self.scatter.iter().map(|s| s * scale).collect())
    }

    /// The Gaussian fitted to the samples, with the covariance normalised by N - 1.
    ///
    /// # Errors
    /// [`EvaluateError::TooFew`] below two samples.
    pub fn gaussian(&self) -> Result<Gaussian, EvaluateError> {
        Ok(Gaussian { mean: self.mean.clone(), covariance: self.covariance()? })
    }

    /// The Fréchet distance of the Gaussians fitted to both.
    ///
    /// # Errors
    /// Fewer than two samples on a side, different numbers of features, or no convergence.
    pub fn frechet_distance(&self, other: &Self) -> Result<f64, EvaluateError> {
        self.gaussian()?.frechet_distance(&other.gaussian()?)
    }
}

/// A Gaussian of features.
#[derive(Debug, Clone, PartialEq)]
pub struct Gaussian {
    mean: Vec<f64>,
    covariance: Vec<f64>,
}

impl Gaussian {
    /// Of a mean [D] and a covariance [D, D], flattened. Other lengths are a programming error and panic.
    pub fn new(mean: Vec<f64>, covariance: Vec<f64>) -> Self {
        assert_eq!(covariance.len(), mean.len() * mean.len(), "no covariance of {} features", mean.len());
        Self { mean, covariance }
    }

    /// Number of features of a sample.
    pub fn dimensions(&self) -> usize {
        self.mean.len()
    }

    /// The Fréchet distance |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of the two Gaussians. With S1 = L L^T, the
    /// trace of the root is the sum of the roots of the eigenvalues of L^T S2 L, which is symmetric; singular
    /// covariances (fewer samples than features) need no special care.
    ///
    /// # Errors
    /// Different numbers of features, or no convergence.
    pub fn frechet_distance(&self, other: &Self) -> Result<f64, EvaluateError> {
        let d = self.dimensions();
        if d != other.dimensions() {
            return Err(EvaluateError::Dimensions { a: d, b: other.dimensions() });
        }
        let (s1, s2) = (&self.covariance, &other.covariance);
        let (s1, s2) = (MatRef::from_row_major_slice(s1, d, d), MatRef::from_row_major_slice(s2, d, d));
        let factor = factor(s1);
        let product = factor.transpose() * s2 * &factor;
        let rank = product.nrows();
        let product = Mat::from_fn(rank, rank, |i, j| 0.5 * (product[(i, j)] + product[(j, i)]));
        let values = product.self_adjoint_eigenvalues(Side::Lower).map_err(|_| EvaluateError::Eigenvalues)?;
        let trace_of_root: f64 = values.iter().map(|v| v.max(0.0).sqrt()).sum();
        let traces: f64 = (0..d).map(|i| s1[(i, i)] + s2[(i, i)]).sum();
        let means: f64 = self.mean.iter().zip(&other.mean).map(|(a, b)| (a - b) * (a - b)).sum();
        // Rounding may leave equal distributions a hair below zero.
        Ok((means + traces - 2.0 * trace_of_root).max(0.0))
    }
}

/// L [D, rank] with L L^T = `covariance`, by Cholesky's method.
fn factor(covariance: MatRef<f64>) -> Mat<f64> {
    match covariance.llt(Side::Lower) {
        Ok(factor) => factor.L().to_owned(),
        Err(_) => pivoted(covariance),
    }
}

/// The same of a singular matrix: the largest of what is left of the diagonal comes next, until that is rounding.
fn pivoted(covariance: MatRef<f64>) -> Mat<f64> {
    let d = covariance.nrows();
    let mut left: Vec<f64> = (0..d).map(|i| covariance[(i, i)]).collect();
    let rounding = left.iter().copied().fold(0.0, f64::max) * d as f64 * f64::EPSILON;
    let mut columns: Vec<Vec<f64>> = Vec::new();
    while let Some(pivot) =
        (0..d).max_by(|&i, &j| left[i].total_cmp(&left[j])).filter(|&i| left[i] > rounding)
    {
        let mut column: Vec<f64> = (0..d).map(|i| covariance[(i, pivot)]).collect();
        for other in &columns {
            let share = other[pivot];
            column.iter_mut().zip(other).for_each(|(value, part)| *value -= share * part);
        }
        let length = left[pivot].sqrt();
        for (value, left) in column.iter_mut().zip(&mut left) {
            *value /= length;
            *left -= *value * *value;
        }
        left[pivot] = 0.0;
        columns.push(column);
    }
    Mat::from_fn(d, columns.len(), |i, j| columns[j][i])
}

/// The Fréchet distance of the Gaussians fitted, with N - 1 covariances, to `a` and `b`: features
/// [N, D] and [M, D], flattened, with D = `dimensions`.
///
/// # Errors
/// Fewer than two samples on a side, or features that are not finite.
pub fn frechet_distance(a: &[f64], b: &[f64], dimensions: usize) -> Result<f64, EvaluateError> {
    GaussianStatistics::of(a, dimensions)?.frechet_distance(&GaussianStatistics::of(b, dimensions)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::draws::{Draws, Purpose};

    fn features(seed: u64, count: usize, d: usize) -> Vec<f64> {
        let mut drawn = vec![0.0f32; count * d];
        Draws::new(seed, Purpose::Noise).normal(0, &mut drawn);
        drawn.into_iter().map(f64::from).collect()
    }

    /// Diagonal Gaussians: |m1 - m2|^2 + sum (s1 - s2)^2.
    #[test]
    fn the_distance_of_known_gaussians_is_the_formulas() {
        // Symmetric points have exactly the wanted mean and covariance.
        let points = |mean: [f64; 2], deviation: [f64; 2]| {
            let unit = 1.5f64.sqrt();
            let at = |i: usize, sign: f64, axis: usize| {
                mean[i] + if i == axis { sign * unit * deviation[i] } else { 0.0 }
            };
            [(1.0, 0), (-1.0, 0), (1.0, 1), (-1.0, 1)]
                .iter()
                .flat_map(|&(sign, axis)| [at(0, sign, axis), at(1, sign, axis)])
                .collect::<Vec<f64>>()
        };
        let a = points([0.0, 1.0], [1.0, 2.0]);
        let b = points([3.0, -1.0], [0.5, 5.0]);
        let distance = frechet_distance(&a, &b, 2).expect("a distance");
        assert!((distance - (9.0 + 4.0 + 0.25 + 9.0)).abs() < 1e-9, "{distance}");
        assert!(frechet_distance(&a, &a, 2).expect("a distance") < 1e-9);
    }

    #[test]
    fn singular_covariances_are_compared() {
        let (a, b) = (features(1, 5, 12), features(2, 6, 12));
        let forth = frechet_distance(&a, &b, 12).expect("a distance");
        let back = frechet_distance(&b, &a, 12).expect("a distance");
        assert!(forth > 0.0 && (forth - back).abs() < 1e-6 * forth, "{forth} {back}");
        assert!(frechet_distance(&a, &a, 12).expect("a distance") < 1e-6 * forth);
        // All samples alike.
        let still = frechet_distance(&[1.0; 12 * 3], &[2.0; 12 * 4], 12).expect("a distance");
        assert!((still - 12.0).abs() < 1e-12, "{still}");
    }

    #[test]
    fn factors_of_singular_matrices_have_their_rank() {
        let d = 9;
        let covariance =
            GaussianStatistics::of(&features(5, 4, d), d).and_then(|s| s.covariance()).expect("enough");
        let covariance = MatRef::from_row_major_slice(&covariance, d, d);
        let factor = pivoted(covariance);
        assert_eq!((factor.nrows(), factor.ncols()), (d, 3));
        let again = &factor * factor.transpose();
        let off = |i: usize, j: usize| (again[(i, j)] - covariance[(i, j)]).abs();
        assert!((0..d).all(|i| (0..d).all(|j| off(i, j) < 1e-12)));
    }

    #[test]
    fn parts_add_up_to_the_whole_far_from_zero() {
        let d = 7;
        let all: Vec<f64> = features(3, 1000, d).iter().map(|x| x + 1e6).collect();
        let whole = GaussianStatistics::of(&all, d).expect("statistics");
        let mut merged = GaussianStatistics::new(d);
        for part in [&all[..5 * d], &all[5 * d..5 * d], &all[5 * d..700 * d], &all[700 * d..]] {
            merged.add(part).expect("finite");
        }
        assert_eq!(merged.count(), 1000);
        let (a, b) = (whole.covariance().expect("enough"), merged.covariance().expect("enough"));
        for (i, (a, b)) in a.iter().zip(&b).enumerate() {
            assert!((a - b).abs() < 1e-9, "{i}: {a} {b}");
            let expected = if i % (d + 1) == 0 { 1.0 } else { 0.0 };
            assert!((a - expected).abs() < 0.15, "{i}: {a}");
        }
        assert!(whole.mean().iter().zip(merged.mean()).all(|(a, b)| (a - b).abs() < 1e-8));
    }

    #[test]
    fn what_cannot_be_compared_is_an_error() {
        let good = features(4, 10, 3);
        let message = |a: &[f64], b: &[f64]| frechet_distance(a, b, 3).expect_err("wrong").to_string();
        assert!(message(&good, &good[..3]).contains("1 samples are too few"));
        let mut bad = good.clone();
        bad[7] = f64::NAN;
        assert_eq!(message(&good, &bad), "feature 1 of sample 2 is NaN");
        let mut later = GaussianStatistics::of(&good, 3).expect("statistics");
        assert_eq!(later.add(&bad).expect_err("NaN").to_string(), "feature 1 of sample 12 is NaN");
        let other = GaussianStatistics::of(&good, 5).expect("statistics");
        assert!(other.frechet_distance(&GaussianStatistics::of(&good, 3).expect("three")).is_err());
    }
}
