//! Bicubic resizing as PyTorch's `interpolate(mode="bicubic")` does it, with and without
//! antialiasing. Resizing is linear and separable, so it is two small matrix products, which run on
//! any device and are differentiable.

use burn::tensor::{Device, Tensor, TensorData};

/// Which of PyTorch's two bicubic kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bicubic {
    /// `antialias=False`: four taps with a = -0.75, edges repeated.
    Plain,
    /// `antialias=True`: a = -0.5 (as Pillow), widened when shrinking, cut off and renormalised at
    /// the edges.
    Antialiased,
}

impl Bicubic {
    /// Resizes [N, C, H, W] to [N, C, height, width] (`align_corners=False`).
    pub fn resize(self, x: Tensor<4>, height: usize, width: usize) -> Tensor<4> {
        let [n, c, h, w] = x.dims();
        if (h, w) == (height, width) {
            return x;
        }
        let device = x.device();
        let horizontal = self.matrix(w, width, &device).transpose();
        let vertical = self.matrix(h, height, &device);
        let rows = x.reshape([n * c * h, w]).matmul(horizontal);
        // [n c, h, width] -> [h, n c width], so that the second pass is one product as well.
        let columns = rows.reshape([n * c, h, width]).swap_dims(0, 1).reshape([h, n * c * width]);
        vertical
            .matmul(columns)
            .reshape([height, n * c, width])
            .swap_dims(0, 1)
            .reshape([n, c, height, width])
    }

    /// The matrix [to, from] that resizes one line.
    fn matrix(self, from: usize, to: usize, device: &Device) -> Tensor<2> {
        let mut weights = vec![0.0f32; to * from];
        for (i, row) in weights.chunks_exact_mut(from).enumerate() {
            match self {
                Self::Plain => plain_row(i, from, to, row),
                Self::Antialiased => antialiased_row(i, from, to, row),
            }
        }
        Tensor::from_data(TensorData::new(weights, [to, from]), device)
    }
}

fn plain_row(i: usize, from: usize, to: usize, row: &mut [f32]) {
    for (source, weight) in plain_taps(i, from, to) {
        row[source] += weight;
    }
}

/// The four inputs that output `i` of a line of `to` is made of, with their weights; edges are repeated.
pub(super) fn plain_taps(i: usize, from: usize, to: usize) -> [(usize, f32); 4] {
    let centre = (i as f64 + 0.5) * from as f64 / to as f64 - 0.5;
    let first = centre.floor();
    std::array::from_fn(|tap| {
        let position = first + tap as f64 - 1.0;
        let source = position.clamp(0.0, (from - 1) as f64) as usize;
        (source, cubic(position - centre, -0.75) as f32)
    })
}

fn antialiased_row(i: usize, from: usize, to: usize, row: &mut [f32]) {
    let scale = from as f64 / to as f64;
    let widening = scale.max(1.0);
    let support = 2.0 * widening;
    let centre = scale * (i as f64 + 0.5);
    let first = (centre - support + 0.5).max(0.0) as usize;
    let end = ((centre + support + 0.5) as usize).min(from);
    let weights: Vec<f64> = (first..end).map(|j| cubic((j as f64 - centre + 0.5) / widening, -0.5)).collect();
    let total: f64 = weights.iter().sum();
    for (to, weight) in row[first..end].iter_mut().zip(&weights) {
        *to = (weight / total) as f32;
    }
}

/// Keys' cubic convolution kernel with parameter `a`.
fn cubic(x: f64, a: f64) -> f64 {
    let x = x.abs();
    if x < 1.0 {
        ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * a
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(kernel: Bicubic, values: &[f32], to: usize) -> Vec<f32> {
        let device = Device::flex();
        let x = Tensor::<1>::from_data(values, &device).reshape([1, 1, 1, values.len()]);
        kernel.resize(x, 1, to).into_data().try_to_vec::<f32>().unwrap()
    }

    #[test]
    fn a_constant_stays_and_a_ramp_stays_a_ramp_inside() {
        for kernel in [Bicubic::Plain, Bicubic::Antialiased] {
            for to in [3, 8, 14, 29] {
                for v in line(kernel, &[2.5; 14], to) {
                    assert!((v - 2.5).abs() < 1e-5, "{kernel:?} {to}: {v}");
                }
            }
            let ramp: Vec<f32> = (0..32).map(|i| i as f32).collect();
            let half = line(kernel, &ramp, 16);
            assert!((half[8] - 16.5).abs() < 1e-4, "{kernel:?}: {}", half[8]);
        }
    }

    #[test]
    fn halving_uses_the_published_weights() {
        // Plain: taps at -1.5, -0.5, 0.5, 1.5 with a = -0.75.
        let mut impulse = [0.0; 8];
        impulse[3] = 1.0;
        let plain = line(Bicubic::Plain, &impulse, 4);
        assert!((plain[1] - 0.593_75).abs() < 1e-6 && (plain[2] + 0.093_75).abs() < 1e-6, "{plain:?}");
        // Antialiased: the kernel is twice as wide, so that more outputs see the impulse.
        let smooth = line(Bicubic::Antialiased, &impulse, 4);
        assert!(smooth[1] > 0.3 && smooth[1] < 0.5 && smooth[0] != 0.0, "{smooth:?}");
    }

    #[test]
    fn both_axes_are_resized() {
        let device = Device::flex();
        let x = Tensor::<1>::from_data(
            (0..2 * 3 * 6 * 4).map(|v| v as f32).collect::<Vec<_>>().as_slice(),
            &device,
        )
        .reshape([2, 3, 6, 4]);
        let y = Bicubic::Plain.resize(x.clone(), 12, 2);
        assert_eq!(y.dims(), [2, 3, 12, 2]);
        let transposed = Bicubic::Plain.resize(x.swap_dims(2, 3), 2, 12).swap_dims(2, 3);
        let difference = (y - transposed).abs().max().into_scalar::<f32>();
        assert!(difference < 1e-4, "{difference}");
    }
}
