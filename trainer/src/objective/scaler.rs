//! Dynamic loss scaling for float16 gradients (Micikevicius et al., arXiv 1710.03740, section 3.2).

use serde::{Deserialize, Serialize};

/// The factor on the loss that keeps small float16 gradients from underflowing. It doubles after
/// [`LossScaler::INTERVAL`] good steps in a row and halves when gradients overflow, as PyTorch's
/// `GradScaler` does; its state belongs in the checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LossScaler {
    scale: f32,
    good_steps: u32,
}

impl Default for LossScaler {
    fn default() -> Self {
        Self { scale: Self::START, good_steps: 0 }
    }
}

impl LossScaler {
    /// The first scale.
    pub const START: f32 = 65_536.0;
    /// Good steps before the scale is doubled.
    pub const INTERVAL: u32 = 2000;
    /// The scale is not halved below this: gradients that overflow here are not the scale's doing.
    pub const SMALLEST: f32 = 1.0;
    /// The scale is not doubled above this (2^24), so that it stays finite however small gradients are.
    pub const LARGEST: f32 = 16_777_216.0;

    /// The factor to multiply the loss with; gradients are to be divided by it. A power of two, so
    /// that both are exact.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// Takes note of a step whose gradients were finite.
    pub fn record_success(&mut self) {
        self.good_steps += 1;
        if self.good_steps >= Self::INTERVAL {
            self.good_steps = 0;
            self.scale = (self.scale * 2.0).min(Self::LARGEST);
        }
    }

    /// Takes note of a step whose gradients overflowed, and that is to be skipped. Returns whether
    /// the scale could be lowered: if not, the gradients are broken whatever the scale, and the step
    /// counts as non-finite.
    #[must_use]
    pub fn record_overflow(&mut self) -> bool {
        self.good_steps = 0;
        let lowered = self.scale > Self::SMALLEST;
        self.scale = (self.scale * 0.5).max(Self::SMALLEST);
        lowered
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_after_two_thousand_good_steps_in_a_row() {
        let mut scaler = LossScaler::default();
        for _ in 0..1999 {
            scaler.record_success();
        }
        assert_eq!(scaler.scale(), 65_536.0);
        scaler.record_success();
        assert_eq!(scaler.scale(), 131_072.0);
        // The count begins anew, after growth and after an overflow.
        (0..1999).for_each(|_| scaler.record_success());
        assert!(scaler.record_overflow());
        assert_eq!(scaler.scale(), 65_536.0);
        (0..1999).for_each(|_| scaler.record_success());
        assert_eq!(scaler.scale(), 65_536.0);
        scaler.record_success();
        assert_eq!(scaler.scale(), 131_072.0);
    }

    #[test]
    fn overflows_halve_down_to_one_and_then_are_no_longer_expected() {
        let mut scaler = LossScaler::default();
        for _ in 0..16 {
            assert!(scaler.record_overflow());
        }
        assert_eq!(scaler.scale(), 1.0);
        assert!(!scaler.record_overflow());
        assert_eq!(scaler.scale(), 1.0);
    }

    #[test]
    fn growth_ends_at_the_largest_scale() {
        let mut scaler = LossScaler::default();
        (0..40 * LossScaler::INTERVAL).for_each(|_| scaler.record_success());
        assert_eq!(scaler.scale(), LossScaler::LARGEST);
    }

    #[test]
    fn the_state_survives_serialisation() {
        let mut scaler = LossScaler::default();
        (0..777).for_each(|_| scaler.record_success());
        let text = serde_json::to_string(&scaler).unwrap();
        assert_eq!(serde_json::from_str::<LossScaler>(&text).unwrap(), scaler);
    }
}
