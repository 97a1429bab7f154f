//! What the ranks put in, what has to come out, and how near.

use half::bf16;

/// Whether sums have to be the definition's to the bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// In rank order, as defined.
    Ranks,
    /// In any order: equal up to rounding.
    #[cfg_attr(not(feature = "nccl"), expect(dead_code, reason = "only NCCL has no order"))]
    Any,
}

/// A number that looks random, from a place: the ranks make each other's inputs without talking.
pub fn noise(seed: u64, rank: usize, index: usize) -> f32 {
    let mut state = seed ^ ((rank as u64) << 40) ^ (index as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    for _ in 0..3 {
        state = (state ^ (state >> 31)).wrapping_mul(0xD6E8_FEB8_6659_FD93);
    }
    // Magnitudes over many powers of two, so that the order of the additions shows in the bits.
    let magnitude = f32::powi(2.0, (state % 41) as i32 - 20);
    magnitude * (((state >> 40) as f32) / f32::powi(2.0, 23) - 1.0)
}

pub fn input(seed: u64, rank: usize, len: usize) -> Vec<f32> {
    (0..len).map(|index| noise(seed, rank, index)).collect()
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// A sum over the ranks.
pub struct Sum {
    order: Order,
    pub values: Vec<f32>,
    /// How far each may be off where the order is open.
    slack: Vec<f32>,
}

impl Sum {
    /// The definition: rank 0's values, and each next rank's added to them in float32.
    pub fn new(order: Order, seed: u64, size: usize, len: usize) -> Self {
        Self::of(order, (0..size).map(|rank| input(seed, rank, len)), f32::EPSILON)
    }

    /// Of values that travel as bfloat16: the sum of what was rounded, in float32, rounded once. (In any order: rounded
    /// after every addition.)
    pub fn rounded(order: Order, seed: u64, size: usize, len: usize) -> Self {
        let rounded = |values: Vec<f32>| -> Vec<f32> {
            values.into_iter().map(|value| bf16::from_f32(value).to_f32()).collect()
        };
        let inputs = (0..size).map(|rank| rounded(input(seed, rank, len)));
        let sum = Self::of(order, inputs, bf16::EPSILON.to_f32());
        Self { values: rounded(sum.values), ..sum }
    }

    fn of(order: Order, inputs: impl ExactSizeIterator<Item = Vec<f32>>, epsilon: f32) -> Self {
        let each = epsilon * inputs.len() as f32;
        let sums = inputs.map(|input| (input.iter().map(|value| each * value.abs()).collect(), input));
        let sum = sums.reduce(|(mut slack, mut values): (Vec<f32>, Vec<f32>), (more_slack, more)| {
            values.iter_mut().zip(more).for_each(|(total, value)| *total += value);
            slack.iter_mut().zip(more_slack).for_each(|(total, value)| *total += value);
            (slack, values)
        });
        let (slack, values) = sum.expect("at least one rank");
        Self { order, values, slack }
    }

    /// Judges a part of the sum.
    pub fn check(&self, found: &[f32], range: std::ops::Range<usize>, what: &str) {
        let expected = &self.values[range.clone()];
        if self.order == Order::Ranks {
            assert_eq!(bits(found), bits(expected), "{what}");
            return;
        }
        assert_eq!(found.len(), expected.len(), "length of {what}");
        for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
            let slack = self.slack[range.start + i];
            assert!(
                (found - expected).abs() <= slack,
                "{found} is not {expected} +- {slack} at {i} of {what}"
            );
        }
    }

    pub fn check_all(&self, found: &[f32], what: &str) {
        self.check(found, 0..self.values.len(), what);
    }
}
