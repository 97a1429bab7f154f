//! Random numbers that follow from (seed, purpose, sample number, element) alone: Philox4x32-10
//! (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). There is no state to
//! save, and the world size changes no draw. Transcendentals come from the `libm` crate, so that
//! every host draws the same bits.

/// What a draw is for. Each purpose has its own stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// First values of parameters; the sample number is the parameter's.
    Init = 1,
    /// The posterior draw behind a latent (mean + std eps).
    Posterior = 2,
    /// The noise that the interpolant mixes in.
    Noise = 3,
    /// The time t.
    Time = 4,
    /// Whether a label is dropped.
    LabelDrop = 5,
    /// The first state of a sampler, and its labels.
    Sample = 6,
    /// The noise of a stochastic sampler; the element index counts on over its steps.
    SampleNoise = 7,
    /// The order of samples within an epoch.
    Order = 8,
    /// Augmentations, when a small model is trained on images.
    Augment = 9,
    /// Whether the mirrored image is taken.
    Flip = 10,
}

/// One stream of draws.
#[derive(Debug, Clone, Copy)]
pub struct Draws {
    key: [u32; 2],
    purpose: u32,
}

impl Draws {
    /// The stream of `purpose` for `seed`.
    pub fn new(seed: u64, purpose: Purpose) -> Self {
        Self { key: [seed as u32, (seed >> 32) as u32], purpose: purpose as u32 }
    }

    /// Four random words: block `block` (below 2^32) of sample `sample` (below 2^56).
    pub fn words(&self, sample: u64, block: u32) -> [u32; 4] {
        let high = (sample >> 32) as u32;
        philox(self.key, [block, sample as u32, high, self.purpose])
    }

    /// One number in [0, 1): element `element` of sample `sample`.
    pub fn uniform_one(&self, sample: u64, element: u32) -> f32 {
        unit(self.words(sample, element / 4)[(element % 4) as usize])
    }

    /// Fills `out` with uniform numbers in [0, 1), 24 bits each.
    pub fn uniform(&self, sample: u64, out: &mut [f32]) {
        for (block, chunk) in out.chunks_mut(4).enumerate() {
            let words = self.words(sample, block as u32);
            for (x, word) in chunk.iter_mut().zip(words) {
                *x = unit(word);
            }
        }
    }

    /// Fills `out` with standard normal numbers, beginning at element 0.
    pub fn normal(&self, sample: u64, out: &mut [f32]) {
        self.normal_from(sample, 0, out);
    }

    /// Fills `out` with standard normal numbers, beginning at block `first_block` (4 numbers each).
    pub fn normal_from(&self, sample: u64, first_block: u32, out: &mut [f32]) {
        for (block, chunk) in out.chunks_mut(4).enumerate() {
            let w = self.words(sample, first_block + block as u32);
            let (a, b) = box_muller(w[0], w[1]);
            let (c, d) = box_muller(w[2], w[3]);
            for (x, value) in chunk.iter_mut().zip([a, b, c, d]) {
                *x = value;
            }
        }
    }
}

fn unit(word: u32) -> f32 {
    (word >> 8) as f32 * (1.0 / 16_777_216.0)
}

/// Two standard normal numbers from two words (Box and Muller 1958), in float64 inside.
fn box_muller(a: u32, b: u32) -> (f32, f32) {
    let u = (f64::from(a) + 0.5) * (1.0 / 4_294_967_296.0);
    let angle = std::f64::consts::TAU * (f64::from(b) * (1.0 / 4_294_967_296.0));
    let radius = (-2.0 * libm::log(u)).sqrt();
    let (sin, cos) = libm::sincos(angle);
    ((radius * cos) as f32, (radius * sin) as f32)
}

fn philox(mut key: [u32; 2], mut counter: [u32; 4]) -> [u32; 4] {
    const M0: u64 = 0xD251_1F53;
    const M1: u64 = 0xCD9E_8D57;
    for _ in 0..10 {
        let p0 = M0 * u64::from(counter[0]);
        let p1 = M1 * u64::from(counter[2]);
        counter = [
            (p1 >> 32) as u32 ^ counter[1] ^ key[0],
            p1 as u32,
            (p0 >> 32) as u32 ^ counter[3] ^ key[1],
            p0 as u32,
        ];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of the Random123 distribution (kat_vectors, philox4x32 10 rounds).
    #[test]
    fn philox_gives_the_published_vectors() {
        assert_eq!(philox([0, 0], [0; 4]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox([u32::MAX; 2], [u32::MAX; 4]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox([0xa409_3822, 0x299f_31d0], [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn normal_draws_have_the_moments_of_a_standard_normal() {
        let mut x = vec![0.0f32; 200_000];
        Draws::new(7, Purpose::Noise).normal(3, &mut x);
        let mean = x.iter().map(|&v| f64::from(v)).sum::<f64>() / x.len() as f64;
        let moment = |p: i32| x.iter().map(|&v| f64::from(v).powi(p)).sum::<f64>() / x.len() as f64;
        assert!(mean.abs() < 0.01, "mean {mean}");
        assert!((moment(2) - 1.0).abs() < 0.02, "variance {}", moment(2));
        assert!((moment(4) - 3.0).abs() < 0.1, "fourth moment {}", moment(4));
    }

    #[test]
    fn streams_differ_by_seed_purpose_and_sample() {
        let first = |seed, purpose, sample| Draws::new(seed, purpose).words(sample, 0);
        let base = first(1, Purpose::Noise, 0);
        assert_ne!(base, first(2, Purpose::Noise, 0));
        assert_ne!(base, first(1, Purpose::Posterior, 0));
        assert_ne!(base, first(1, Purpose::Noise, 1));
        assert_ne!(base, first(1, Purpose::Noise, 1 << 32));
    }
}
