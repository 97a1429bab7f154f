//! The exponential moving average of the weights.

use burn::tensor::Tensor;
use rayon::prelude::*;

use super::CHUNK;

/// `ema = decay * ema + (1 - decay) * params`, the reference's `update_ema`. It runs after the
/// optimizer's step; the average begins as a copy of the first weights. Slices of different lengths
/// are a programming error and panic.
pub fn ema_update(ema: &mut [f32], params: &[f32], decay: f64) {
    assert_eq!(ema.len(), params.len(), "an average as long as the parameters");
    let (keep, take) = (decay as f32, (1.0 - decay) as f32);
    ema.par_chunks_mut(CHUNK).zip(params.par_chunks(CHUNK)).for_each(|(ema, params)| {
        for (e, p) in ema.iter_mut().zip(params) {
            *e = *e * keep + p * take;
        }
    });
}

/// [`ema_update`] of a vector on any device.
#[must_use]
pub fn ema_update_on_device(ema: Tensor<1>, params: Tensor<1>, decay: f64) -> Tensor<1> {
    let (keep, take) = (decay as f32, (1.0 - decay) as f32);
    ema * keep + params * take
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_constant_is_approached_geometrically() {
        let n = CHUNK + 5;
        let mut ema = vec![1.0f32; n];
        let params = vec![3.0f32; n];
        for _ in 0..10 {
            ema_update(&mut ema, &params, 0.9);
        }
        let expected = 3.0 - 2.0 * 0.9f32.powi(10);
        assert!(ema.iter().all(|e| (e - expected).abs() < 1e-5), "{} {expected}", ema[0]);
    }

    #[test]
    fn a_vector_on_a_device_moves_as_one_in_memory() {
        let (mut ema, params) = ([7.0f32, -1.0, 0.25], [1.0f32, -2.5, 0.1]);
        let tensor = |x: &[f32]| Tensor::<1>::from_floats(x, &burn::tensor::Device::flex());
        let there = ema_update_on_device(tensor(&ema), tensor(&params), 0.99);
        ema_update(&mut ema, &params, 0.99);
        assert_eq!(there.into_data().try_to_vec::<f32>().unwrap(), ema);
    }

    #[test]
    fn decay_zero_copies() {
        let mut ema = vec![7.0f32; 3];
        ema_update(&mut ema, &[1.0, -2.5, 0.1], 0.0);
        assert_eq!(ema, [1.0, -2.5, 0.1]);
    }
}
