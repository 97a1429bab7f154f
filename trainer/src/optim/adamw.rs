//! AdamW (Loshchilov and Hutter, arXiv 1711.05101) as `torch.optim.AdamW` computes it.

use burn::tensor::Tensor;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::CHUNK;

/// Hyperparameters. The defaults are REPA's recipe.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay: a step multiplies parameters by 1 - lr * weight_decay.
    pub weight_decay: f64,
}

impl Default for AdamW {
    fn default() -> Self {
        Self { lr: 1e-4, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
    }
}

/// A step's scalars, rounded to float32 once, as PyTorch's kernels receive them.
#[derive(Clone, Copy)]
struct Scalars {
    grad_scale: f32,
    keep: f32,
    weight1: f32,
    beta2: f32,
    weight2: f32,
    inverse_root_correction: f32,
    eps: f32,
    negative_step: f32,
}

impl AdamW {
    /// One update of `params` from `grads * grad_scale` (the factor carries clipping, loss scaling and
    /// the division by the batch). `step_number` counts from 1. The moments begin as zeros. All
    /// slices have one length; anything else is a programming error and panics.
    pub fn step(
        &self,
        step_number: u64,
        params: &mut [f32],
        grads: &[f32],
        grad_scale: f32,
        exp_avg: &mut [f32],
        exp_avg_sq: &mut [f32],
    ) {
        let lengths = [grads.len(), exp_avg.len(), exp_avg_sq.len()];
        assert_eq!(lengths, [params.len(); 3], "gradients and moments as long as the parameters");
        let scalars = self.scalars(step_number, grad_scale);
        params
            .par_chunks_mut(CHUNK)
            .zip(grads.par_chunks(CHUNK))
            .zip(exp_avg.par_chunks_mut(CHUNK).zip(exp_avg_sq.par_chunks_mut(CHUNK)))
            .for_each(|((p, g), (m, v))| update(scalars, p, g, m, v));
    }

    /// The same update of vectors on any device: parameters and moments, as they are and as they become.
    #[must_use]
    pub fn step_on_device(
        &self,
        step_number: u64,
        [params, exp_avg, exp_avg_sq]: [Tensor<1>; 3],
        grads: Tensor<1>,
        grad_scale: f32,
    ) -> [Tensor<1>; 3] {
        let s = self.scalars(step_number, grad_scale);
        let g = grads * s.grad_scale;
        let m = exp_avg.clone() + (g.clone() - exp_avg) * s.weight1;
        let v = exp_avg_sq * s.beta2 + g.clone() * g * s.weight2;
        let denominator = v.clone().sqrt() * s.inverse_root_correction + s.eps;
        let p = params * s.keep + m.clone() * s.negative_step / denominator;
        [p, m, v]
    }

    fn scalars(&self, step_number: u64, grad_scale: f32) -> Scalars {
        assert!(step_number > 0, "steps count from 1");
        let correction1 = 1.0 - libm::pow(self.beta1, step_number as f64);
        let correction2 = 1.0 - libm::pow(self.beta2, step_number as f64);
        Scalars {
            grad_scale,
            keep: (1.0 - self.lr * self.weight_decay) as f32,
            weight1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            weight2: (1.0 - self.beta2) as f32,
            inverse_root_correction: (1.0 / correction2.sqrt()) as f32,
            eps: self.eps as f32,
            negative_step: (-self.lr / correction1) as f32,
        }
    }
}

/// The arithmetic of `_single_tensor_adamw`, one pass over memory.
fn update(s: Scalars, params: &mut [f32], grads: &[f32], exp_avg: &mut [f32], exp_avg_sq: &mut [f32]) {
    for (((p, g), m), v) in params.iter_mut().zip(grads).zip(exp_avg).zip(exp_avg_sq) {
        let g = g * s.grad_scale;
        *m += (g - *m) * s.weight1;
        *v = *v * s.beta2 + g * g * s.weight2;
        let denominator = v.sqrt() * s.inverse_root_correction + s.eps;
        *p = *p * s.keep + s.negative_step * *m / denominator;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::draws::{Draws, Purpose};

    fn random(n: usize, number: u64) -> Vec<f32> {
        let mut x = vec![0.0; n];
        Draws::new(1, Purpose::Noise).normal(number, &mut x);
        x
    }

    /// Loshchilov and Hutter's algorithm 2 in float64, element by element.
    #[test]
    fn follows_the_paper_over_several_chunks_and_steps() {
        let n = 2 * CHUNK + 17;
        let adamw = AdamW { lr: 3e-3, weight_decay: 0.1, ..AdamW::default() };
        let mut params = random(n, 0);
        let mut reference: Vec<(f64, f64, f64)> = params.iter().map(|&p| (f64::from(p), 0.0, 0.0)).collect();
        let (mut m, mut v) = (vec![0.0; n], vec![0.0; n]);
        let begin = params.clone();
        for step in 1..=5 {
            let grads = random(n, step);
            adamw.step(step, &mut params, &grads, 0.5, &mut m, &mut v);
            for ((p, m, v), g) in reference.iter_mut().zip(&grads) {
                let g = 0.5 * f64::from(*g);
                *m = 0.9 * *m + 0.1 * g;
                *v = 0.999 * *v + 0.001 * g * g;
                let m_hat = *m / (1.0 - 0.9f64.powi(step as i32));
                let v_hat = *v / (1.0 - 0.999f64.powi(step as i32));
                *p -= 3e-3 * (m_hat / (v_hat.sqrt() + 1e-8) + 0.1 * *p);
            }
        }
        let norm = |f: &dyn Fn(usize) -> f64| (0..n).map(|i| f(i).powi(2)).sum::<f64>().sqrt();
        let error = norm(&|i| f64::from(params[i]) - reference[i].0);
        let moved = norm(&|i| f64::from(params[i]) - f64::from(begin[i]));
        assert!(error < 1e-4 * moved, "off by {error} of {moved}");
    }

    /// By hand: the first step moves each parameter by lr against its gradient's sign.
    #[test]
    fn the_first_step_is_the_learning_rate_and_decay_is_decoupled() {
        let adamw = AdamW { lr: 0.01, weight_decay: 0.5, ..AdamW::default() };
        let mut params = [2.0f32, 2.0, 2.0];
        let (mut m, mut v) = ([0.0; 3], [0.0; 3]);
        adamw.step(1, &mut params, &[4.0, -1e-3, 0.0], 1.0, &mut m, &mut v);
        for (p, expected) in params.iter().zip([1.99 - 0.01, 1.99 + 0.01, 1.99]) {
            assert!((p - expected).abs() < 1e-6, "{p} {expected}");
        }
    }

    #[test]
    fn vectors_on_a_device_move_as_those_in_memory() {
        let n = 1000;
        let adamw = AdamW { lr: 3e-3, weight_decay: 0.1, ..AdamW::default() };
        let mut host = [random(n, 0), vec![0.0; n], vec![0.0; n]];
        let device = burn::tensor::Device::flex();
        let tensor = |x: &[f32]| Tensor::<1>::from_floats(x, &device);
        let mut there = host.each_ref().map(|x| tensor(x));
        for step in 1..=5 {
            let grads = random(n, step);
            let [p, m, v] = &mut host;
            adamw.step(step, p, &grads, 0.5, m, v);
            there = adamw.step_on_device(step, there, tensor(&grads), 0.5);
        }
        for (host, there) in host.iter().zip(there) {
            let there: Vec<f32> = there.into_data().try_to_vec().unwrap();
            let largest = host.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            assert!(host.iter().zip(&there).all(|(a, b)| (a - b).abs() <= 1e-6 * largest));
        }
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        let n = 5 * CHUNK + 3;
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let (mut params, mut m, mut v) = (random(n, 0), vec![0.0; n], vec![0.0; n]);
            let grads = random(n, 1);
            pool.install(|| AdamW::default().step(1, &mut params, &grads, 1.0, &mut m, &mut v));
            (params, m, v)
        };
        assert_eq!(run(1), run(3));
    }
}
