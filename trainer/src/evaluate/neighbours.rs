//! Precision and recall by nearest neighbours (Kynkäänniemi et al., arXiv 1904.06991), by parts, so that ranks can
//! share the work: N^2 D of it for the radii of N points.

use std::ops::Range;

use burn::tensor::{Device, Tensor, TensorData};
use rayon::prelude::*;

use super::EvaluateError;

/// Rows of distances that are in memory at once.
const ROWS: usize = 512;

/// Which neighbour of a point its radius reaches to, in the paper and in ADM's evaluator.
pub(super) const NEIGHBOUR: usize = 3;

/// Points in a space of features, on a device.
#[derive(Debug, Clone)]
pub(super) struct Points {
    /// [N, D].
    values: Tensor<2>,
    /// Squared lengths, [1, N].
    squares: Tensor<2>,
}

impl Points {
    /// Points [N, D], flattened.
    ///
    /// # Errors
    /// [`EvaluateError::NotFinite`] names the point and the feature; [`EvaluateError::TooFew`] where a point lacks the
    /// neighbour that its radius reaches to.
    pub fn new(values: Vec<f32>, dimensions: usize, device: &Device) -> Result<Self, EvaluateError> {
        assert!(values.len().is_multiple_of(dimensions), "no rows of {dimensions}");
        if let Some(at) = values.iter().position(|v| !v.is_finite()) {
            let (sample, dimension) = (at / dimensions, at % dimensions);
            return Err(EvaluateError::NotFinite { sample, dimension, value: f64::from(values[at]) });
        }
        let count = values.len() / dimensions;
        if count <= NEIGHBOUR {
            return Err(EvaluateError::TooFew { count: count as u64, needed: NEIGHBOUR as u64 + 1 });
        }
        let squares = values.par_chunks_exact(dimensions).map(|row| row.iter().map(|v| v * v).sum::<f32>());
        let squares = Tensor::from_data(TensorData::new(squares.collect::<Vec<_>>(), [1, count]), device);
        let values = Tensor::from_data(TensorData::new(values, [count, dimensions]), device);
        Ok(Self { values, squares })
    }

    /// How many they are.
    pub fn count(&self) -> usize {
        self.values.dims()[0]
    }

    /// Calls `each` with the squared distances of every point of `rows` to all of `to`.
    fn distances<T: Send>(
        &self,
        rows: Range<usize>,
        to: &Self,
        each: impl Fn(&mut [f32]) -> T + Sync,
    ) -> Vec<T> {
        let mut found = Vec::with_capacity(rows.len());
        for start in rows.clone().step_by(ROWS) {
            let part = start..rows.end.min(start + ROWS);
            let squares = self.squares.clone().narrow(1, part.start, part.len()).transpose();
            let products = self.values.clone().narrow(0, part.start, part.len());
            let products = products.matmul(to.values.clone().transpose());
            let distances = (squares + to.squares.clone() - products * 2.0).clamp_min(0.0);
            let distances = distances.into_data().convert::<f32>();
            let mut distances = distances.try_to_vec::<f32>().expect("converted to f32 just before");
            found.par_extend(distances.par_chunks_exact_mut(to.count()).map(&each));
        }
        found
    }

    /// Squared distances of these points to their third nearest other point.
    pub fn radii(&self, rows: Range<usize>) -> Vec<f32> {
        // The nearest is the point itself.
        self.distances(rows, self, |distances| *distances.select_nth_unstable_by(NEIGHBOUR, f32::total_cmp).1)
    }

    /// How many of these points lie within the radius of any of `centres`.
    pub fn within(&self, rows: Range<usize>, centres: &Self, radii: &[f32]) -> usize {
        assert_eq!(radii.len(), centres.count(), "a radius a centre");
        let covered =
            |distances: &mut [f32]| distances.iter().zip(radii).any(|(distance, radius)| distance <= radius);
        self.distances(rows, centres, covered).into_iter().filter(|&inside| inside).count()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Fractions of the samples within the data, and of the data within the samples, with work in `parts`.
    fn precision_recall(data: &[f32], samples: &[f32], d: usize, parts: usize) -> [f64; 2] {
        let device = Device::flex();
        let points = |values: &[f32]| Points::new(values.to_vec(), d, &device).expect("points");
        let (data, samples) = (points(data), points(samples));
        let shares = |n: usize| (0..parts).map(move |part| repa_comm::shard_range(n, part, parts));
        let covered = |points: &Points, centres: &Points| {
            let radii: Vec<f32> = shares(centres.count()).flat_map(|share| centres.radii(share)).collect();
            let within: usize =
                shares(points.count()).map(|share| points.within(share, centres, &radii)).sum();
            within as f64 / points.count() as f64
        };
        [covered(&samples, &data), covered(&data, &samples)]
    }

    #[test]
    fn samples_of_one_mode_are_precise_and_lack_recall() {
        // Data around 0 and around 100; samples around 0, and one between.
        let data: Vec<f32> = (0u8..10).map(f32::from).chain((100u8..110).map(f32::from)).collect();
        let samples: Vec<f32> = (0u8..9).map(|i| f32::from(i) + 0.5).chain([50.0]).collect();
        assert_eq!(precision_recall(&data, &samples, 1, 1), [0.9, 0.5]);
        assert_eq!(precision_recall(&data, &data, 1, 3), [1.0, 1.0]);
    }

    #[test]
    fn too_few_points_are_an_error() {
        let error = Points::new(vec![0.0, 1.0, 2.0], 1, &Device::flex()).expect_err("three").to_string();
        assert!(error.contains("3 samples are too few"), "{error}");
        assert!(Points::new(vec![0.0, f32::NAN, 1.0, 2.0], 1, &Device::flex()).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        /// By the formula, point by point. Whole numbers, so that no rounding decides what is within.
        #[test]
        fn matrix_products_count_as_points_one_by_one_do(
            values in prop::collection::vec(0u8..9, 3 * 50), split in 4usize..46, parts in 1usize..4
        ) {
            let values: Vec<f32> = values.into_iter().map(f32::from).collect();
            let (data, samples) = values.split_at(3 * split);
            let squared = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f32>();
            let covered = |points: &[f32], centres: &[f32]| {
                let radius = |centre: &[f32]| {
                    let mut all: Vec<f32> = centres.chunks(3).map(|other| squared(centre, other)).collect();
                    all.sort_by(f32::total_cmp);
                    all[NEIGHBOUR]
                };
                let inside = |point: &[f32]| centres.chunks(3).any(|c| squared(point, c) <= radius(c));
                points.chunks(3).filter(|point| inside(point)).count() as f64 / (points.len() / 3) as f64
            };
            let expected = [covered(samples, data), covered(data, samples)];
            prop_assert_eq!(precision_recall(data, samples, 3, parts), expected);
        }
    }
}
