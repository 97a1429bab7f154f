//! Gradient norms and clipping.

use rayon::prelude::*;

use super::CHUNK;

/// Sum of squares in float64. Chunks of a fixed size are summed each in a fixed order, then together
/// in their order: the number of threads changes no bit. Anything non-finite makes the sum so.
pub fn squared_norm(x: &[f32]) -> f64 {
    let partial: Vec<f64> = x.par_chunks(CHUNK).map(chunk_sum).collect();
    partial.iter().sum()
}

/// Euclidean norm; see [`squared_norm`].
pub fn global_norm(x: &[f32]) -> f64 {
    squared_norm(x).sqrt()
}

/// [`squared_norm`] of an array in pieces. Where all pieces but the last are whole chunks, it has the bits of
/// the whole array's.
pub fn squared_norm_of<'a>(pieces: impl IntoIterator<Item = &'a [f32]>) -> f64 {
    pieces.into_iter().flat_map(|x| x.par_chunks(CHUNK).map(chunk_sum).collect::<Vec<f64>>()).sum()
}

/// The factor that `torch.nn.utils.clip_grad_norm_` applies: `max_norm / (norm + 1e-6)`, at most 1.
/// NaN for a NaN norm, so that it cannot pass for a good step.
pub fn clip_coefficient(norm: f64, max_norm: f64) -> f32 {
    let coefficient = max_norm / (norm + 1e-6);
    // Not `min`, which turns NaN into 1.
    if coefficient > 1.0 { 1.0 } else { coefficient as f32 }
}

/// Independent sums, so that the compiler can keep them in vector registers.
fn chunk_sum(x: &[f32]) -> f64 {
    const LANES: usize = 16;
    let (blocks, rest) = x.as_chunks::<LANES>();
    let mut sums = [0.0f64; LANES];
    for block in blocks {
        for (sum, &v) in sums.iter_mut().zip(block) {
            *sum += f64::from(v) * f64::from(v);
        }
    }
    sums.iter().sum::<f64>() + rest.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::draws::{Draws, Purpose};

    #[test]
    fn the_norm_is_exact_to_float64_over_many_chunks() {
        let mut x = vec![0.0f32; 3 * CHUNK + 11];
        Draws::new(2, Purpose::Noise).normal(0, &mut x);
        let expected = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
        assert!((global_norm(&x) / expected - 1.0).abs() < 1e-12);
        assert_eq!(global_norm(&[]), 0.0);
        // Squares that float32 cannot hold.
        assert!((global_norm(&[3e30, 4e30]) / 5e30 - 1.0).abs() < 1e-6);
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        let mut x = vec![0.0f32; 7 * CHUNK + 5];
        Draws::new(2, Purpose::Noise).normal(1, &mut x);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| squared_norm(&x)).to_bits()
        };
        assert_eq!(run(1), run(3));
    }

    #[test]
    fn pieces_of_whole_chunks_change_no_bit() {
        let mut x = vec![0.0f32; 7 * CHUNK + 5];
        Draws::new(2, Purpose::Noise).normal(3, &mut x);
        for cut in [CHUNK, 3 * CHUNK, 10 * CHUNK] {
            assert_eq!(squared_norm_of(x.chunks(cut)).to_bits(), squared_norm(&x).to_bits(), "{cut}");
        }
    }

    #[test]
    fn one_bad_element_spoils_the_norm() {
        for bad in [f32::NAN, f32::INFINITY] {
            for place in [0, CHUNK, CHUNK + 20] {
                let mut x = vec![1.0f32; CHUNK + 21];
                x[place] = bad;
                assert!(!global_norm(&x).is_finite(), "{bad} at {place}");
            }
        }
    }

    #[test]
    fn clipping_is_pytorchs() {
        assert_eq!(clip_coefficient(0.5, 1.0), 1.0);
        assert_eq!(clip_coefficient(0.0, 1.0), 1.0);
        assert_eq!(clip_coefficient(4.0, 1.0), (1.0 / 4.000001f64) as f32);
        // A norm of exactly the limit is scaled too, by just less than 1.
        assert_eq!(clip_coefficient(1.0, 1.0), (1.0 / 1.000001f64) as f32);
        assert!(clip_coefficient(f64::NAN, 1.0).is_nan());
        assert_eq!(clip_coefficient(f64::INFINITY, 1.0), 0.0);
    }
}
