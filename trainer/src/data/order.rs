//! Which sample of the data set the run's sample number `s` is: an own permutation for every epoch,
//! computed from (seed, epoch) in O(1), without an array of all indices and without state to save.
//!
//! A position in an epoch is a pair (left, right) of digits in the bases a and b with a*b just above
//! the length; rounds of a generalised Feistel network (Black and Rogaway, "Ciphers with arbitrary
//! finite domains", CT-RSA 2002) add a keyed hash of one digit to the other; a result beyond the length is put
//! through the rounds again (cycle walking), which keeps it a bijection.

use super::draws::{Draws, Purpose};

const ROUNDS: usize = 12;

/// The order of a data set of `len` samples under a seed. The same for every world size.
#[derive(Debug, Clone)]
pub struct Order {
    draws: Draws,
    len: u64,
    bases: [u64; 2],
}

impl Order {
    /// The order of `len` samples (at least one) for `seed`.
    ///
    /// # Panics
    /// If `len` is 0: an empty data set is refused where the store is opened.
    #[must_use]
    pub fn new(seed: u64, len: usize) -> Self {
        assert!(len > 0, "an order of no samples");
        let len = len as u64;
        let mut left = len.isqrt().max(1);
        if left * left < len {
            left += 1;
        }
        Self { draws: Draws::new(seed, Purpose::Order), len, bases: [left, len.div_ceil(left)] }
    }

    /// Number of samples of the data set.
    #[must_use]
    pub fn epoch_len(&self) -> u64 {
        self.len
    }

    /// The epoch that sample number `sample` of the run lies in, from 0.
    #[must_use]
    pub fn epoch(&self, sample: u64) -> u64 {
        sample / self.len
    }

    /// Index into the data set of the run's sample number `sample`.
    #[must_use]
    pub fn index(&self, sample: u64) -> usize {
        let keys = self.round_keys(sample / self.len);
        let mut position = sample % self.len;
        loop {
            position = self.rounds(&keys, position);
            if position < self.len {
                return position as usize;
            }
        }
    }

    fn round_keys(&self, epoch: u64) -> [u64; ROUNDS] {
        let mut keys = [0; ROUNDS];
        for (block, pair) in keys.as_chunks_mut::<2>().0.iter_mut().enumerate() {
            let [a, b, c, d] = self.draws.words(epoch, block as u32).map(u64::from);
            *pair = [a << 32 | b, c << 32 | d];
        }
        keys
    }

    fn rounds(&self, keys: &[u64; ROUNDS], position: u64) -> u64 {
        let [a, b] = self.bases;
        let mut digits = [position % a, position / a];
        for (round, key) in keys.iter().enumerate() {
            let side = round % 2;
            let base = self.bases[side];
            digits[side] = (digits[side] + below(mix(digits[1 - side], *key), base)) % base;
        }
        debug_assert!(digits[1] < b);
        digits[1] * a + digits[0]
    }
}

/// A keyed hash of a digit: the finaliser of SplitMix64 (Steele, Lea, Flood 2014), twice.
fn mix(value: u64, key: u64) -> u64 {
    let finalise = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    };
    finalise(finalise(value ^ key).wrapping_add(key))
}

/// `word` scaled to 0..`bound` (Lemire's multiplication; its bias is below bound / 2^64).
fn below(word: u64, bound: u64) -> u64 {
    ((u128::from(word) * u128::from(bound)) >> 64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn epoch(seed: u64, len: usize, epoch: u64) -> Vec<usize> {
        let order = Order::new(seed, len);
        (0..len as u64).map(|i| order.index(epoch * len as u64 + i)).collect()
    }

    proptest! {
        #[test]
        fn every_sample_comes_once_an_epoch(seed: u64, len in 1usize..3000, number in 0u64..1 << 40) {
            let mut seen = epoch(seed, len, number);
            seen.sort_unstable();
            prop_assert!(seen.iter().copied().eq(0..len));
        }

        #[test]
        fn a_large_data_set_stays_in_range_without_collisions(seed: u64, len in 1usize..1 << 50) {
            let order = Order::new(seed, len);
            let count = 200.min(len as u64);
            let mut seen: Vec<usize> = (len as u64 - count..len as u64).map(|s| order.index(s)).collect();
            prop_assert!(seen.iter().all(|&i| i < len));
            seen.sort_unstable();
            seen.dedup();
            prop_assert_eq!(seen.len() as u64, count);
        }

        #[test]
        fn epochs_and_seeds_differ(seed: u64, len in 40usize..500, number in 0u64..1 << 40) {
            let here = epoch(seed, len, number);
            prop_assert_ne!(&here, &epoch(seed, len, number + 1));
            prop_assert_ne!(&here, &epoch(seed.wrapping_add(1), len, number));
            prop_assert_ne!(here, (0..len).collect::<Vec<_>>());
        }
    }

    /// Chi-square over `cells` equally likely cells; its mean is cells - 1, its variance about twice that.
    fn chi_square_is_plausible(counts: &[u64]) -> Result<(), String> {
        let total: u64 = counts.iter().sum();
        let expected = total as f64 / counts.len() as f64;
        let chi: f64 = counts.iter().map(|&c| (c as f64 - expected).powi(2) / expected).sum();
        let freedom = counts.len() as f64 - 1.0;
        let z = (chi - freedom) / (2.0 * freedom).sqrt();
        if z.abs() < 5.0 { Ok(()) } else { Err(format!("chi-square {chi} for {freedom} degrees: z {z}")) }
    }

    #[test]
    fn a_position_is_any_index_equally_often() {
        for len in [2usize, 3, 7, 10, 97, 128] {
            for position in [0, len as u64 / 2, len as u64 - 1] {
                let order = Order::new(11, len);
                let mut counts = vec![0u64; len];
                for number in 0..400 * len as u64 {
                    counts[order.index(number * len as u64 + position)] += 1;
                }
                chi_square_is_plausible(&counts).unwrap_or_else(|e| panic!("length {len}: {e}"));
            }
        }
    }

    #[test]
    fn neighbours_are_any_pair_equally_often() {
        for len in [5u64, 6, 11, 16] {
            let order = Order::new(3, len as usize);
            let mut counts = vec![0u64; (len * len) as usize];
            for number in 0..200 * len * len {
                let (a, b) = (order.index(number * len), order.index(number * len + 1));
                counts[a * len as usize + b] += 1;
            }
            let pairs: Vec<u64> = (0..counts.len())
                .filter(|i| i / len as usize != i % len as usize)
                .map(|i| counts[i])
                .collect();
            assert_eq!(pairs.iter().sum::<u64>(), counts.iter().sum::<u64>());
            chi_square_is_plausible(&pairs).unwrap_or_else(|e| panic!("length {len}: {e}"));
        }
    }

    #[test]
    fn the_order_never_changes_between_versions() {
        // A run resumed by a later version must go on with the same samples.
        assert_eq!(epoch(0, 10, 0), KNOWN_FIRST);
        assert_eq!(epoch(0, 10, 1), KNOWN_SECOND);
    }

    // Computed by a second implementation, in Python, of what the module's head describes.
    const KNOWN_FIRST: [usize; 10] = [2, 1, 4, 5, 7, 8, 9, 0, 6, 3];
    const KNOWN_SECOND: [usize; 10] = [8, 4, 2, 7, 1, 5, 6, 0, 3, 9];
}
