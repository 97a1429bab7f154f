//! What a run has learned so far.

use std::ops::Range;

use burn::tensor::Tensor;

use crate::checkpoint::Progress;
use crate::config::Config;
use crate::flat::{self, Flat};
use crate::objective::LossScaler;
use crate::optim::{AdamW, clip_coefficient, ema_update};
use crate::params::Layout;

/// The parts of the flat array whose optimizer state a rank keeps: everything, or with a sharded optimizer its shard
/// of every bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owned {
    ranges: Vec<Range<usize>>,
    /// Where each begins in the rank's own arrays.
    starts: Vec<usize>,
    len: usize,
}

impl Owned {
    /// These ranges, ascending and apart.
    pub fn new(ranges: impl IntoIterator<Item = Range<usize>>) -> Self {
        let mut owned = Self { ranges: Vec::new(), starts: Vec::new(), len: 0 };
        for range in ranges.into_iter().filter(|range| !range.is_empty()) {
            owned.len += range.len();
            match owned.ranges.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => {
                    owned.starts.push(owned.len - range.len());
                    owned.ranges.push(range);
                }
            }
        }
        owned
    }

    /// All of an array.
    pub fn whole(len: usize) -> Self {
        Self::new(std::iter::once(0..len))
    }

    /// The ranges, neighbours joined.
    pub fn ranges(&self) -> &[Range<usize>] {
        &self.ranges
    }

    /// Elements in all of them.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where the rank's own arrays hold a range of the flat array that is part of one of the owned ones.
    pub fn local(&self, range: &Range<usize>) -> Range<usize> {
        let number = self.ranges.partition_point(|owned| owned.end <= range.start);
        let start = self.starts[number] + range.start - self.ranges[number].start;
        start..start + range.len()
    }

    /// The owned elements of a whole array.
    fn of(&self, whole: &[f32]) -> Flat {
        let mut room = flat::Room::new(self.len);
        let mut own = room.part();
        for range in &self.ranges {
            own.take(range.len()).copy_from_slice(&whole[range.clone()]);
        }
        room.finish()
    }
}

/// Flat arrays in layout order, and where the run stands.
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    /// Optimizer steps done, skipped ones included.
    pub step: u64,
    /// Samples seen, over all ranks: where the data order goes on.
    pub samples: u64,
    /// Steps that AdamW has made; its bias correction counts these.
    pub updates: u64,
    /// Weights, all of them. Empty during a pass, which holds them; and this and the three arrays below where training on
    /// a GPU has them there.
    pub params: Flat,
    /// What the next three hold.
    pub owned: Owned,
    /// Moving average of the owned weights.
    pub ema: Flat,
    /// AdamW's first moment of the owned weights.
    pub exp_avg: Flat,
    /// AdamW's second moment of the owned weights.
    pub exp_avg_sq: Flat,
    /// Loss scaling of float16.
    pub scaler: LossScaler,
}

/// A step that is being taken.
#[derive(Debug, Clone, Copy)]
pub(super) struct Update {
    adamw: AdamW,
    grad_scale: f32,
    ema_decay: f64,
    /// Counts from 1.
    number: u64,
}

impl Update {
    /// Weights and both moments on a device, moved by gradients there.
    pub(super) fn moved(&self, arrays: [Tensor<1>; 3], gradients: Tensor<1>) -> [Tensor<1>; 3] {
        self.adamw.step_on_device(self.number, arrays, gradients, self.grad_scale)
    }

    /// Decay of the weights' moving average.
    pub(super) fn ema_decay(&self) -> f64 {
        self.ema_decay
    }
}

/// Why a step left the weights as they were.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Skipped {
    /// The gradient overflowed while the loss scale is still being found.
    Overflowed,
    /// The gradient was not finite, for no such reason.
    NotFinite,
}

impl State {
    /// The state before the first step, of a rank that keeps the optimizer's state of `owned`.
    pub fn new(layout: &Layout, seed: u64, owned: Owned) -> Self {
        Self::starting_at(&layout.initial_values(seed), owned)
    }

    /// The state before the first step, with these weights.
    pub fn starting_at(params: &[f32], owned: Owned) -> Self {
        let zeros = || flat::zeros(owned.len());
        Self {
            step: 0,
            samples: 0,
            updates: 0,
            ema: owned.of(params),
            exp_avg: zeros(),
            exp_avg_sq: zeros(),
            owned,
            params: flat::copied(params),
            scaler: LossScaler::default(),
        }
    }

    /// Gives away weights, average and moments.
    pub(super) fn take_arrays(&mut self) -> [Flat; 4] {
        [&mut self.params, &mut self.ema, &mut self.exp_avg, &mut self.exp_avg_sq]
            .map(|array| std::mem::replace(array, flat::zeros(0)))
    }

    /// The state that a checkpoint holds: weights, and of `owned` the moving average and both moments.
    pub(super) fn resumed(progress: &Progress, owned: Owned, arrays: [Flat; 4]) -> Self {
        let [params, ema, exp_avg, exp_avg_sq] = arrays;
        let Progress { step, samples, updates, scaler } = *progress;
        Self { step, samples, updates, params, owned, ema, exp_avg, exp_avg_sq, scaler }
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

    /// Begins a step by gradients that carry [`State::loss_scale`]; `norm` is theirs without it. A gradient that is
    /// not finite moves nothing.
    ///
    /// # Errors
    /// Why the step is left out.
    pub(super) fn begin(&mut self, config: &Config, norm: f64) -> Result<Update, Skipped> {
        let scaling = config.train.precision.needs_loss_scaling();
        let (scale, learning_rate) = (self.loss_scale(config), self.learning_rate(config));
        self.step += 1;
        self.samples += config.train.global_batch as u64;
        if !norm.is_finite() {
            let expected = scaling && self.scaler.record_overflow();
            return Err(if expected { Skipped::Overflowed } else { Skipped::NotFinite });
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
        Ok(Update { adamw, grad_scale, ema_decay: optimizer.ema_decay, number: self.updates })
    }

    /// Moves the weights of an owned range by their gradients.
    pub(super) fn apply(&mut self, update: &Update, range: &Range<usize>, gradients: &[f32]) {
        let local = self.owned.local(range);
        update.adamw.step(
            update.number,
            &mut self.params[range.clone()],
            gradients,
            update.grad_scale,
            &mut self.exp_avg[local.clone()],
            &mut self.exp_avg_sq[local],
        );
    }

    /// Takes the moved weights into their average.
    pub(super) fn average(&mut self, update: &Update) {
        let mut rest = &mut self.ema[..];
        for range in &self.owned.ranges {
            let (ema, after) = rest.split_at_mut(range.len());
            ema_update(ema, &self.params[range.clone()], update.ema_decay);
            rest = after;
        }
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
        (config, State::new(&layout, 0, Owned::whole(3)))
    }

    fn advance(state: &mut State, config: &Config, gradients: &[f32], norm: f64) -> Result<(), Skipped> {
        let update = state.begin(config, norm)?;
        state.apply(&update, &(0..3), gradients);
        state.average(&update);
        Ok(())
    }

    #[test]
    fn neighbours_are_joined_and_every_element_has_its_place() {
        let owned = Owned::new([2..5, 5..5, 5..7, 10..11, 20..24]);
        assert_eq!((owned.ranges(), owned.len()), (&[2..7, 10..11, 20..24][..], 10));
        assert_eq!(owned.local(&(5..7)), 3..5);
        assert_eq!(owned.local(&(21..24)), 7..10);
        let whole: Vec<f32> = (0..30).map(|i| i as f32).collect();
        assert_eq!(owned.of(&whole)[..], [2.0, 3.0, 4.0, 5.0, 6.0, 10.0, 20.0, 21.0, 22.0, 23.0]);
    }

    #[test]
    fn a_gradient_that_is_not_finite_moves_nothing() {
        let (config, mut state) = start(Precision::F32);
        let before = state.clone();
        let outcome = advance(&mut state, &config, &[1.0, f32::NAN, 0.0], f64::NAN);
        assert_eq!(outcome, Err(Skipped::NotFinite));
        assert_eq!(state, State { step: 1, samples: config.train.global_batch as u64, ..before });
        assert_eq!(advance(&mut state, &config, &[1.0, 2.0, 2.0], 3.0), Ok(()));
        assert!(state.params.iter().all(|&w| w < 1.0) && state.updates == 1);
    }

    /// An overflow planted in float16: the step is left out, the scale halved, and training goes on.
    #[test]
    fn an_overflow_in_float16_lowers_the_loss_scale() {
        let (config, mut state) = start(Precision::F16);
        let scale = state.loss_scale(&config);
        assert_eq!(scale, 65_536.0);
        let before = state.params.clone();
        let outcome = advance(&mut state, &config, &[f32::INFINITY, 0.0, 0.0], f64::INFINITY);
        assert_eq!(outcome, Err(Skipped::Overflowed));
        assert_eq!(state.params, before);
        assert_eq!(state.loss_scale(&config), scale / 2.0);
        // Gradients carry the scale; what reaches AdamW does not.
        let scaled: Vec<f32> = [0.1f32, -0.2, 0.0].iter().map(|g| g * scale / 2.0).collect();
        assert_eq!(advance(&mut state, &config, &scaled, 0.05f64.sqrt()), Ok(()));
        assert!((state.exp_avg[0] - 0.01).abs() < 1e-6 && (state.exp_avg[1] + 0.02).abs() < 1e-6);
    }
}
