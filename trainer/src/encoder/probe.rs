//! A linear probe: how well a linear classifier on frozen features tells classes apart.

use burn::tensor::Tensor;
use faer::linalg::solvers::Solve;
use faer::{Mat, Side};

/// Strengths of the ridge penalty that are tried, as fractions of the mean squared feature norm.
const PENALTIES: [f64; 6] = [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0];

/// Accuracy on `test` of a ridge classifier fitted to `train`: rows of features, each feature
/// standardised by its training statistics. The penalty is chosen on a fifth of the training rows
/// (runs of 16 rows, so that neighbours stay together), never on the test rows.
///
/// Labels are below `classes`. Solved in its dual form, in float64, so that features may be many.
pub fn accuracy(
    train: Tensor<2>,
    train_labels: &[usize],
    test: Tensor<2>,
    test_labels: &[usize],
    classes: usize,
) -> f64 {
    let mean = train.clone().mean_dim(0);
    let centred = train - mean.clone();
    let deviation = (centred.clone() * centred.clone()).mean_dim(0).sqrt() + 1e-6;
    let train = centred / deviation.clone();
    let test = (test - mean) / deviation;
    let among = products(train.clone(), train.clone());
    let across = products(test, train);

    let (chosen, fitted): (Vec<usize>, Vec<usize>) =
        (0..train_labels.len()).partition(|i| (i / 16).is_multiple_of(5));
    let labels = |rows: &[usize]| rows.iter().map(|&i| train_labels[i]).collect::<Vec<_>>();
    let pick = |rows: &[usize], columns: &[usize]| {
        Mat::from_fn(rows.len(), columns.len(), |i, j| among[(rows[i], columns[j])])
    };
    let (fit_among, fit_across) = (pick(&fitted, &fitted), pick(&chosen, &fitted));
    let (fitted_labels, chosen_labels) = (labels(&fitted), labels(&chosen));
    let mut best = (PENALTIES[0], -1.0);
    for penalty in PENALTIES {
        let score = ridge(&fit_among, &fitted_labels, &fit_across, &chosen_labels, classes, penalty);
        if score > best.1 {
            best = (penalty, score);
        }
    }
    ridge(&among, train_labels, &across, test_labels, classes, best.0)
}

/// The inner products of the rows of `a` with those of `b`.
fn products(a: Tensor<2>, b: Tensor<2>) -> Mat<f64> {
    let [rows, columns] = [a.dims()[0], b.dims()[0]];
    let data = a.matmul(b.transpose()).into_data().convert::<f32>();
    let values = data.as_slice::<f32>().expect("converted to f32 above");
    Mat::from_fn(rows, columns, |i, j| f64::from(values[i * columns + j]))
}

fn ridge(
    among: &Mat<f64>,
    labels: &[usize],
    across: &Mat<f64>,
    expected: &[usize],
    classes: usize,
    penalty: f64,
) -> f64 {
    let n = labels.len();
    let scale = (0..n).map(|i| among[(i, i)]).sum::<f64>() / n as f64;
    let mut system = among.clone();
    for i in 0..n {
        system[(i, i)] += penalty * scale * n as f64 + 1e-9;
    }
    let share: Vec<f64> =
        (0..classes).map(|c| labels.iter().filter(|&&l| l == c).count() as f64 / n as f64).collect();
    let targets = Mat::from_fn(n, classes, |i, c| f64::from(u8::from(labels[i] == c)) - share[c]);
    let Ok(factor) = system.llt(Side::Lower) else { return 0.0 };
    let scores = across * factor.solve(&targets);
    let right = expected.iter().enumerate().filter(|&(i, &label)| {
        let score = |c: usize| scores[(i, c)] + share[c];
        (0..classes).all(|c| c == label || score(c) < score(label))
    });
    right.count() as f64 / expected.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::draws::{Draws, Purpose};
    use burn::tensor::{Device, TensorData};

    fn data(rows: usize, sample: u64, informative: bool) -> (Tensor<2>, Vec<usize>) {
        let mut x = vec![0.0; rows * 20];
        Draws::new(3, Purpose::Noise).normal(sample, &mut x);
        let labels: Vec<usize> = (0..rows).map(|i| (i * 7 + i / 5) % 3).collect();
        if informative {
            for (row, &label) in x.chunks_exact_mut(20).zip(&labels) {
                row[label] += 4.0;
            }
        }
        (Tensor::from_data(TensorData::new(x, [rows, 20]), &Device::flex()), labels)
    }

    #[test]
    fn it_finds_what_is_linear_and_nothing_in_noise() {
        for (informative, range) in [(true, 0.93..1.01), (false, 0.2..0.5)] {
            let (train, train_labels) = data(300, 1, informative);
            let (test, test_labels) = data(150, 2, informative);
            let found = accuracy(train, &train_labels, test, &test_labels, 3);
            assert!(range.contains(&found), "informative {informative}: {found}");
        }
    }
}
