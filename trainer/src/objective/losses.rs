//! The two losses, per sample and in float32, so that a mean over any split of a batch is a sum of
//! these divided by the global batch.

use burn::tensor::{DType, Tensor};

/// The smallest norm that a vector is divided by (`F.normalize`'s epsilon).
const NORM_EPSILON: f64 = 1e-12;

/// Mean squared error over channels and pixels: [N, C, H, W] twice -> [N].
pub fn denoising_loss(velocity: Tensor<4>, target: Tensor<4>) -> Tensor<1> {
    let error = velocity.cast(DType::F32) - target.cast(DType::F32);
    let [n, c, h, w] = error.dims();
    let error = error.reshape([n, c * h * w]);
    (error.clone() * error).mean_dim(1).reshape([n])
}

/// Minus the cosine similarity of projected tokens and features, averaged over tokens and encoders:
/// for each encoder [N, T, D] twice -> [N]. Normalisation is in float32 whatever type comes in: half
/// precision loses it after long training.
///
/// At least one encoder, and equal shapes, are taken for granted: anything else panics.
pub fn alignment_loss(projected: Vec<Tensor<3>>, features: &[Tensor<3>]) -> Tensor<1> {
    alignment_of(&similarities(projected, features))
}

/// Each encoder's part: the cosine similarity of its tokens, averaged over tokens, [N].
pub fn similarities(projected: Vec<Tensor<3>>, features: &[Tensor<3>]) -> Vec<Tensor<1>> {
    assert_eq!(projected.len(), features.len(), "projected tokens and features of as many encoders");
    projected.into_iter().zip(features).map(|(p, f)| mean_similarity(p, f.clone())).collect()
}

/// The loss from its parts.
pub fn alignment_of(similarities: &[Tensor<1>]) -> Tensor<1> {
    let encoders = similarities.len() as f64;
    let sum = similarities.iter().cloned().reduce(|a, b| a + b).expect("alignment with at least one encoder");
    sum * (-1.0 / encoders)
}

/// Cosine similarity of the tokens of two [N, T, D], averaged over tokens: [N].
fn mean_similarity(a: Tensor<3>, b: Tensor<3>) -> Tensor<1> {
    assert_eq!(a.dims(), b.dims(), "projected tokens and features have one shape");
    let (a, b) = (a.cast(DType::F32), b.cast(DType::F32));
    let [n, tokens, _] = a.dims();
    // The products of the norms, not normalised copies of the tokens: fewer passes over memory.
    let products = (a.clone() * b.clone()).sum_dim(2);
    let cosines = products / (norm(a) * norm(b));
    cosines.reshape([n, tokens]).mean_dim(1).reshape([n])
}

/// Euclidean norm over the last dimension, at least epsilon. The bound is inside the root, where its
/// gradient at zero is zero, not NaN.
fn norm(x: Tensor<3>) -> Tensor<3> {
    (x.clone() * x).sum_dim(2).clamp_min(NORM_EPSILON * NORM_EPSILON).sqrt()
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, FloatDType, TensorData};

    use super::*;
    use crate::data::draws::{Draws, Purpose};

    fn random<const D: usize>(shape: [usize; D], number: u64, device: &Device) -> Tensor<D> {
        let mut x = vec![0.0f32; shape.iter().product()];
        Draws::new(5, Purpose::Noise).normal(number, &mut x);
        Tensor::from_data(TensorData::new(x, shape), device)
    }

    fn values<const D: usize>(x: Tensor<D>) -> Vec<f32> {
        x.into_data().try_to_vec().unwrap()
    }

    #[test]
    fn the_denoising_loss_is_a_mean_square_per_sample() {
        let device = Device::flex();
        let (a, b) = (random([3, 2, 4, 4], 0, &device), random([3, 2, 4, 4], 1, &device));
        let (x, y) = (values(a.clone()), values(b.clone()));
        let ours = values(denoising_loss(a, b));
        for (i, loss) in ours.iter().enumerate() {
            let part = 32 * i..32 * (i + 1);
            let expected =
                x[part.clone()].iter().zip(&y[part]).map(|(a, b)| (a - b).powi(2)).sum::<f32>() / 32.0;
            assert!((loss - expected).abs() < 1e-5 * expected, "{loss} {expected}");
        }
    }

    #[test]
    fn alignment_is_minus_one_for_parallel_and_averages_encoders() {
        let device = Device::flex();
        let a = random([2, 5, 8], 0, &device);
        let parallel = values(alignment_loss(vec![a.clone()], &[a.clone() * 7.0]));
        assert!(parallel.iter().all(|v| (v + 1.0).abs() < 1e-6), "{parallel:?}");
        // The second encoder has another width; its tokens are opposed.
        let b = random([2, 5, 12], 1, &device);
        let both = values(alignment_loss(vec![a.clone(), b.clone()], &[a, -b]));
        assert!(both.iter().all(|v| v.abs() < 1e-6), "{both:?}");
    }

    /// What half precision does to the reference: squares of ordinary activations overflow.
    #[test]
    fn alignment_of_half_precision_tokens_is_computed_in_float32() {
        let device = Device::flex();
        let a = random([1, 4, 16], 0, &device) * 300.0;
        let b = random([1, 4, 16], 1, &device);
        let half = a.clone().cast(FloatDType::F16);
        let expected =
            values(alignment_loss(vec![half.clone().cast(FloatDType::F32)], std::slice::from_ref(&b)));
        let loss = alignment_loss(vec![half], &[b]);
        assert_eq!(loss.dtype(), DType::F32);
        assert_eq!(values(loss), expected);
    }

    #[test]
    fn zero_tokens_have_zero_similarity_and_a_finite_gradient() {
        let device = Device::flex().autodiff();
        let a = Tensor::<3>::zeros([1, 2, 4], &device).require_grad();
        let loss = alignment_loss(vec![a.clone()], &[Tensor::zeros([1, 2, 4], &device)]);
        let gradients = loss.clone().sum().backward();
        assert_eq!(values(loss), [0.0]);
        assert!(values(a.grad(&gradients).unwrap()).iter().all(|g| g.is_finite()));
    }

    /// The gradient of -cos(a, b) is -(b/|b| - cos a/|a|) / |a|.
    #[test]
    fn the_alignment_gradient_is_the_analytic_one() {
        let device = Device::flex().autodiff();
        let a = random([1, 1, 6], 2, &device).require_grad();
        let b = random([1, 1, 6], 3, &device);
        let gradients = alignment_loss(vec![a.clone()], std::slice::from_ref(&b)).sum().backward();
        let ours = values(a.grad(&gradients).unwrap());
        let (x, y) = (values(a), values(b));
        let length = |v: &[f32]| v.iter().map(|v| v * v).sum::<f32>().sqrt();
        let cosine = x.iter().zip(&y).map(|(a, b)| a * b).sum::<f32>() / (length(&x) * length(&y));
        for i in 0..6 {
            let expected = -(y[i] / length(&y) - cosine * x[i] / length(&x)) / length(&x);
            assert!((ours[i] - expected).abs() < 1e-5, "{} {expected}", ours[i]);
        }
    }
}
