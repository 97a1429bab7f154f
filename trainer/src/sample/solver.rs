//! The integrators. The state is float64 on the host; only the model runs on the device.

use burn::tensor::{Device, Tensor, TensorData};

use super::times::linspace;
use super::{Mode, Noise, SampleError, SamplerConfig};
use crate::model::VelocityModel;
use crate::objective::Path;

/// What to sample.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// First states [N, C, H, W], flattened.
    pub latents: &'a [f64],
    /// [N, C, H, W].
    pub shape: [usize; 4],
    /// A class for each sample; the null class is allowed.
    pub labels: &'a [usize],
    /// The label that stands for no class: the model's number of classes.
    pub null_class: usize,
    /// The interpolant of the model's training.
    pub path: Path,
    /// Where the model runs. A device without autodiff keeps no graph.
    pub device: &'a Device,
}

/// The last time at which the SDE takes noise.
const SDE_LAST_TIME: f64 = 0.04;

/// Integrates a batch from t = 1 to t = 0 and returns its latents [N, C, H, W], flattened. `noise` is
/// asked in SDE mode only, once a step but for the last; `on_step` is told how many of
/// `config.num_steps` steps are done.
///
/// # Errors
/// The settings or a label are out of range, or the model's output is not finite. A batch whose
/// shape, latents and labels disagree is a programming error and panics.
pub fn sample(
    model: &dyn VelocityModel,
    config: &SamplerConfig,
    batch: &Batch,
    noise: &dyn Noise,
    mut on_step: impl FnMut(usize),
) -> Result<Vec<f64>, SampleError> {
    config.validate()?;
    assert_eq!(batch.latents.len(), batch.shape.iter().product::<usize>(), "latents do not fit the shape");
    assert_eq!(batch.labels.len(), batch.shape[0], "one label a sample");
    if let Some(&label) = batch.labels.iter().find(|&&label| label > batch.null_class) {
        return Err(SampleError::Label { label, null_class: batch.null_class });
    }
    let flow = Flow { model, config, batch };
    let mut x = batch.latents.to_vec();
    match config.mode {
        Mode::Ode | Mode::OdeHeun => {
            let times = linspace(1.0, 0.0, config.num_steps + 1);
            for step in 0..config.num_steps {
                let (t, next) = (times[step], times[step + 1]);
                let guided = config.guides(t);
                let mut slope = flow.velocity(&x, t, guided)?;
                if config.mode == Mode::OdeHeun && step + 1 < config.num_steps {
                    let mut ahead = x.clone();
                    advance(&mut ahead, &slope, next - t);
                    let second = flow.velocity(&ahead, next, guided)?;
                    slope.iter_mut().zip(second).for_each(|(a, b)| *a = 0.5 * *a + 0.5 * b);
                }
                advance(&mut x, &slope, next - t);
                on_step(step + 1);
            }
        }
        Mode::Sde => {
            let mut times = linspace(1.0, SDE_LAST_TIME, config.num_steps);
            times.push(0.0);
            let mut draws = vec![0.0; x.len()];
            for step in 0..config.num_steps {
                let (t, next) = (times[step], times[step + 1]);
                let drift = flow.drift(&x, t, config.guides(t))?;
                advance(&mut x, &drift, next - t);
                if step + 1 < config.num_steps {
                    noise.fill(step, &mut draws);
                    let (diffusion, root) = (diffusion(t).sqrt(), (next - t).abs().sqrt());
                    x.iter_mut().zip(&draws).for_each(|(x, draw)| *x += diffusion * (draw * root));
                }
                on_step(step + 1);
            }
        }
    }
    Ok(x)
}

fn advance(x: &mut [f64], slope: &[f64], dt: f64) {
    x.iter_mut().zip(slope).for_each(|(x, slope)| *x += dt * slope);
}

/// The SDE's diffusion coefficient w_t.
fn diffusion(t: f64) -> f64 {
    2.0 * t
}

struct Flow<'a> {
    model: &'a dyn VelocityModel,
    config: &'a SamplerConfig,
    batch: &'a Batch<'a>,
}

impl Flow<'_> {
    /// The ODE's right-hand side.
    fn velocity(&self, x: &[f64], t: f64, guided: bool) -> Result<Vec<f64>, SampleError> {
        Ok(self.guide(self.evaluate(x, t, guided)?, guided))
    }

    /// The SDE's: v - w/2 score, of which guidance mixes the conditional and the unconditional one.
    fn drift(&self, x: &[f64], t: f64, guided: bool) -> Result<Vec<f64>, SampleError> {
        let mut drift = self.evaluate(x, t, guided)?;
        let score = Score::at(self.batch.path, t);
        let half = 0.5 * diffusion(t);
        for (v, x) in drift.iter_mut().zip(x.iter().cycle()) {
            *v -= half * score.of_velocity(*v, *x);
        }
        Ok(self.guide(drift, guided))
    }

    /// Conditional velocities, followed by the unconditional ones if guided, in one run of the model.
    fn evaluate(&self, x: &[f64], t: f64, guided: bool) -> Result<Vec<f64>, SampleError> {
        let [n, c, h, w] = self.batch.shape;
        let copies = if guided { 2 } else { 1 };
        let device = self.batch.device;
        let states: Vec<f32> = x.iter().cycle().take(copies * x.len()).map(|&value| value as f32).collect();
        let mut labels: Vec<i64> = self.batch.labels.iter().map(|&label| label as i64).collect();
        labels.resize(copies * n, self.batch.null_class as i64);
        let velocity = self.model.velocity(
            Tensor::from_data(TensorData::new(states, [copies * n, c, h, w]), device),
            Tensor::from_data(TensorData::new(vec![t as f32; copies * n], [copies * n]), device),
            Tensor::from_data(TensorData::new(labels, [copies * n]), device),
        );
        let values = velocity.into_data().convert::<f64>();
        let values = values.as_slice::<f64>().expect("converted to f64 above");
        assert_eq!(values.len(), copies * x.len(), "the model's velocity has the state's shape");
        if values.iter().all(|v| v.is_finite()) {
            Ok(values.to_vec())
        } else {
            Err(SampleError::NotFinite { t })
        }
    }

    /// uncond + w (cond - uncond), of both halves; what is not guided stays.
    fn guide(&self, mut both: Vec<f64>, guided: bool) -> Vec<f64> {
        if guided {
            let half = both.len() / 2;
            let (conditional, unconditional) = both.split_at_mut(half);
            for (c, u) in conditional.iter_mut().zip(unconditional) {
                *c = *u + self.config.cfg_scale * (*c - *u);
            }
            both.truncate(half);
        }
        both
    }
}

/// grad log p_t from the velocity (`get_score_from_velocity` of the reference).
struct Score {
    reverse_alpha_ratio: f64,
    variance: f64,
}

impl Score {
    fn at(path: Path, t: f64) -> Self {
        let (alpha, d_alpha, sigma, d_sigma) = match path {
            Path::Linear => (1.0 - t, -1.0, t, 1.0),
            Path::Cosine => {
                let quarter = std::f64::consts::FRAC_PI_2;
                let (sin, cos) = libm::sincos(t * quarter);
                (cos, -quarter * sin, sin, quarter * cos)
            }
        };
        let reverse_alpha_ratio = alpha / d_alpha;
        Self { reverse_alpha_ratio, variance: sigma * sigma - reverse_alpha_ratio * d_sigma * sigma }
    }

    fn of_velocity(&self, velocity: f64, x: f64) -> f64 {
        (self.reverse_alpha_ratio * velocity - x) / self.variance
    }
}

#[cfg(test)]
#[path = "solver_tests.rs"]
mod tests;
