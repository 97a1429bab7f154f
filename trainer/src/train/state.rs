//! What a run has learned so far.

use std::ops::Range;

use crate::config::Config;
use crate::objective::LossScaler;
use crate::optim::{AdamW, clip_coefficient, ema_update};
use crate::params::Layout;

/// Flat arrays in layout order, and where the run stands.
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    /// Optimizer steps done, skipped ones included.
    pub step: u64,
    /// Steps that AdamW has made; its bias correction counts these.
    pub updates: u64,
    /// Weights.
    pub params: Vec<f32>,
    /// Moving average of the weights.
    pub ema: Vec<f32>,
    /// AdamW's first moment.
    pub exp_avg: Vec<f32>,
    /// AdamW's second moment.
    pub exp_avg_sq: Vec<f32>,
    /// Loss scaling of float16.
    pub scaler: LossScaler,
}

/// What became of a step's gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// The weights moved.
    Taken,
    /// The gradient overflowed while the loss scale is still being found.
    Overflowed,
    /// The gradient was not finite, for no such reason.
    NotFinite,
}

impl State {
    /// The state before the first step.
    pub fn new(layout: &Layout, seed: u64) -> Self {
        let params = layout.initial_values(seed);
        let zeros = vec![0.0; params.len()];
        Self {
            step: 0,
            updates: 0,
            ema: params.clone(),
            params,
            exp_avg: zeros.clone(),
            exp_avg_sq: zeros,
            scaler: LossScaler::default(),
        }
    }

    /// What the loss is multiplied by before the backward pass.
    pub(super) fn loss_scale(&self, config: &Config) -> f32 {
        if config.train.precision.needs_loss_scaling() { self.scaler.scale() } else { 1.0 }
    }

    /// Learning rate of the next step.
    pub(super) fn learning_rate(&self, config: &Config) -> f64 {
        let optimizer = &config.optimizer;
        let warm = (self.step + 1) as f64 / optimizer.warmup_steps.max(1) as f64;
        optimizer.learning_rate * warm.min(1.0)
    }

    /// Takes a step by the all-reduced gradients, in pieces of the flat array, which carry
    /// [`State::loss_scale`]; `norm` is theirs without it. A gradient that is not finite moves nothing.
    pub(super) fn advance(
        &mut self,
        config: &Config,
        gradients: &[(Range<usize>, &[f32])],
        norm: f64,
    ) -> Step {
        let scaling = config.train.precision.needs_loss_scaling();
        let (scale, learning_rate) = (self.loss_scale(config), self.learning_rate(config));
        self.step += 1;
        if !norm.is_finite() {
            let expected = scaling && self.scaler.record_overflow();
            return if expected { Step::Overflowed } else { Step::NotFinite };
        }
        if scaling {
            self.scaler.record_success();
        }
        let optimizer = &config.optimizer;
        let adamw = AdamW {
            lr: learning_rate,
            beta1: optimizer.beta1,
            beta2: optimizer.beta2,
            eps: optimizer.epsilon,
            weight_decay: optimizer.weight_decay,
        };
        let grad_scale = clip_coefficient(norm, optimizer.max_grad_norm) / scale;
        self.updates += 1;
        for (range, gradients) in gradients {
            adamw.step(
                self.updates,
                &mut self.params[range.clone()],
                gradients,
                grad_scale,
                &mut self.exp_avg[range.clone()],
                &mut self.exp_avg_sq[range.clone()],
            );
        }
        ema_update(&mut self.ema, &self.params, optimizer.ema_decay);
        Step::Taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Precision;
    use crate::params::Init;

    fn start(precision: Precision) -> (Config, State) {
        let mut config = Config::default();
        config.train.precision = precision;
        let mut layout = Layout::default();
        layout.add("w", &[3], Init::Ones);
        (config, State::new(&layout, 0))
    }

    #[test]
    fn a_gradient_that_is_not_finite_moves_nothing() {
        let (config, mut state) = start(Precision::F32);
        let before = state.clone();
        assert_eq!(state.advance(&config, &[(0..3, &[1.0, f32::NAN, 0.0])], f64::NAN), Step::NotFinite);
        assert_eq!(state, State { step: 1, ..before });
        assert_eq!(state.advance(&config, &[(0..3, &[1.0, 2.0, 2.0])], 3.0), Step::Taken);
        assert!(state.params.iter().all(|&w| w < 1.0) && state.updates == 1);
    }

    /// An overflow planted in float16: the step is left out, the scale halved, and training goes on.
    #[test]
    fn an_overflow_in_float16_lowers_the_loss_scale() {
        let (config, mut state) = start(Precision::F16);
        let scale = state.loss_scale(&config);
        assert_eq!(scale, 65_536.0);
        let before = state.params.clone();
        assert_eq!(
            state.advance(&config, &[(0..3, &[f32::INFINITY, 0.0, 0.0])], f64::INFINITY),
            Step::Overflowed
        );
        assert_eq!(state.params, before);
        assert_eq!(state.loss_scale(&config), scale / 2.0);
        // Gradients carry the scale; what reaches AdamW does not.
        let scaled: Vec<f32> = [0.1f32, -0.2, 0.0].iter().map(|g| g * scale / 2.0).collect();
        assert_eq!(state.advance(&config, &[(0..3, &scaled)], 0.05f64.sqrt()), Step::Taken);
        assert!((state.exp_avg[0] - 0.01).abs() < 1e-6 && (state.exp_avg[1] + 0.02).abs() < 1e-6);
    }
}
