//! Paths from data to noise.

use std::f64::consts::FRAC_PI_2;

use burn::tensor::{DType, Tensor};
use serde::{Deserialize, Serialize};

/// How data and noise mix on the way: x_t = alpha(t) x + sigma(t) noise, from data at t = 0 to noise
/// at t = 1 (SiT, arXiv 2401.08740, section 2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Path {
    /// alpha = 1 - t, sigma = t.
    #[default]
    Linear,
    /// alpha = cos(pi t / 2), sigma = sin(pi t / 2).
    Cosine,
}

/// The state x_t and the velocity d_alpha x + d_sigma noise that a model is to predict there, from
/// data and noise [N, C, H, W] and times [N], in float32.
pub fn interpolate(path: Path, x: Tensor<4>, noise: Tensor<4>, t: Tensor<1>) -> (Tensor<4>, Tensor<4>) {
    let (x, noise) = (x.cast(DType::F32), noise.cast(DType::F32));
    let n = t.dims()[0];
    let t = t.cast(DType::F32).reshape([n, 1, 1, 1]);
    match path {
        Path::Linear => {
            let velocity = noise - x.clone();
            (x + velocity.clone() * t, velocity)
        }
        Path::Cosine => {
            let angle = t * FRAC_PI_2;
            let (cos, sin) = (angle.clone().cos(), angle.sin());
            let state = x.clone() * cos.clone() + noise.clone() * sin.clone();
            (state, (noise * cos - x * sin) * FRAC_PI_2)
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;

    fn run(path: Path, t: f32) -> (f32, f32) {
        let device = Device::flex();
        let full = |v: f32| Tensor::<4>::from_data(TensorData::new(vec![v], [1, 1, 1, 1]), &device);
        let t = Tensor::<1>::from_data(TensorData::new(vec![t], [1]), &device);
        let (state, velocity) = interpolate(path, full(3.0), full(-0.5), t);
        (state.into_scalar(), velocity.into_scalar())
    }

    #[test]
    fn paths_begin_at_data_and_end_at_noise() {
        for path in [Path::Linear, Path::Cosine] {
            assert!((run(path, 0.0).0 - 3.0).abs() < 1e-6, "{path:?}");
            assert!((run(path, 1.0).0 + 0.5).abs() < 1e-6, "{path:?}");
        }
    }

    #[test]
    fn the_velocity_is_the_derivative_of_the_state() {
        for path in [Path::Linear, Path::Cosine] {
            for t in [0.1f32, 0.5, 0.9] {
                let step = 1e-2;
                let slope = (run(path, t + step).0 - run(path, t - step).0) / (2.0 * step);
                let velocity = run(path, t).1;
                assert!(
                    (slope - velocity).abs() < 1e-3 * velocity.abs(),
                    "{path:?} at {t}: {slope} {velocity}"
                );
            }
        }
    }
}
