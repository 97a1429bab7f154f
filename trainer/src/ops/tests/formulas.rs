//! What GPUs compute by formula, against the composites, on any device.

use super::*;
use crate::ops::formulas;

/// A result and gradients by formulas, for the loss of [`run`].
fn by_formulas<const N: usize, const D: usize>(
    y: Tensor<D>,
    gradients: impl Fn(Tensor<D>) -> [Vec<f32>; N],
) -> [Vec<f32>; 4] {
    let weights = TensorData::new(values(99, y.shape().num_elements(), 1.0), y.shape());
    let mut found = gradients(Tensor::from_data(weights, &y.device())).into_iter();
    [host(y), found.next().unwrap(), found.next().unwrap_or_default(), found.next().unwrap_or_default()]
}

/// Attention's pieces as they are defined.
struct Plain;

impl formulas::Pieces for Plain {}

/// What GPUs take for the gradients, on any device.
#[test]
fn formulas_are_the_gradients_of_the_composites() {
    let x = leaf(1, [2000], 6.0);
    let leaves = (&x, &unused(), &unused());
    let plain = x.clone().inner();
    let found = by_formulas(formulas::gelu_tanh(plain.clone()), |g| {
        [host(formulas::gelu_tanh_backward(plain.clone(), g))]
    });
    same(found, run(leaves, |x, _, _| composite::gelu_tanh(x)), 1e-6);
    let found =
        by_formulas(formulas::swish(plain.clone()), |g| [host(formulas::swish_backward(plain.clone(), g))]);
    same(found, run(leaves, |x, _, _| composite::silu(x)), 1e-6);

    let x = leaf(1, [17, 70], 3.0);
    let plain = x.clone().inner();
    let found = by_formulas(formulas::normalise(plain.clone(), 1e-6), |g| {
        [host(formulas::normalise_backward(plain.clone(), g, 1e-6))]
    });
    same(found, run((&x, &unused(), &unused()), |x, _, _| composite::layer_norm(x, 1e-6)), 1e-5);

    let (q, k, v) = (leaf(1, [2, 3, 17, 8], 2.0), leaf(2, [2, 3, 33, 8], 2.0), leaf(3, [2, 3, 33, 8], 2.0));
    let plain = [&q, &k, &v].map(|x| x.clone().inner());
    let [a, b, c] = plain.clone();
    let [y, probabilities] = formulas::attention::<Plain>(a, b, c);
    let found = by_formulas(y, |g| {
        formulas::attention_backward::<Plain>(plain.clone(), probabilities.clone(), g).map(host)
    });
    same(found, run((&q, &k, &v), composite::attention), 1e-5);

    let qkv = leaf(5, [2, 17, 3 * 24], 2.0);
    let (y, saved) = formulas::packed_attention::<Plain>(qkv.clone().inner(), 3);
    let found = by_formulas(y, |g| [host(formulas::packed_attention_backward::<Plain>(saved.clone(), 3, g))]);
    let leaves = (&qkv, &unused(), &unused());
    same(found, run(leaves, |qkv, _, _| composite::attention_qkv(qkv, 3)), 1e-5);
}

/// A tensor in half precision, and the same numbers in float32.
fn rounded<const D: usize>(seed: u64, shape: [usize; D], scale: f32, dtype: FloatDType) -> [Tensor<D>; 2] {
    let half = leaf(seed, shape, scale).inner().cast(dtype);
    [half.clone(), half.cast(FloatDType::F32)]
}

/// A result in the type that it has to have, as float32.
#[track_caller]
fn typed<const D: usize>(x: Tensor<D>, dtype: DType) -> Vec<f32> {
    assert_eq!(x.dtype(), dtype);
    host(x.cast(FloatDType::F32))
}

/// With `train.precision = "bf16"` (or f16), GPUs take the formulas in it.
#[test]
fn formulas_in_half_precision_follow_float32() {
    for (half, tolerance) in [(FloatDType::BF16, 0.02), (FloatDType::F16, 0.0025)] {
        if !device().supports_dtype(half) {
            println!("skipped: the device has no {half:?}");
            continue;
        }
        let near = |[found, expected]: [Vec<Vec<f32>>; 2], what: &str| {
            for (part, (found, expected)) in found.iter().zip(&expected).enumerate() {
                let square = |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>();
                let error = square(&mut found.iter().zip(expected).map(|(a, b)| a - b));
                let error = (error / square(&mut expected.iter().copied())).sqrt();
                assert!(error < tolerance, "{half:?} {what}, part {part}: off by {error}");
                assert_ne!(found, expected, "{half:?} {what}, part {part}: not in half precision");
            }
        };

        let (x, g) = (rounded(1, [2000], 6.0, half), rounded(2, [2000], 1.0, half));
        let both = [0, 1].map(|i| {
            let (x, g) = (x[i].clone(), g[i].clone());
            let dtype = x.dtype();
            let results =
                [formulas::gelu_tanh(x.clone()), formulas::gelu_tanh_backward(x.clone(), g.clone())];
            let more = [formulas::swish(x.clone()), formulas::swish_backward(x, g)];
            results.into_iter().chain(more).map(|y| typed(y, dtype)).collect()
        });
        near(both, "gelu and swish");

        let (x, g) = (rounded(1, [17, 70], 3.0, half), rounded(2, [17, 70], 1.0, half));
        let both = [0, 1].map(|i| {
            let (x, g) = (x[i].clone(), g[i].clone());
            let dtype = x.dtype();
            vec![
                typed(formulas::normalise(x.clone(), 1e-6), dtype),
                typed(formulas::normalise_backward(x, g, 1e-6), dtype),
            ]
        });
        near(both, "normalisation");

        let qkv = rounded(5, [2, 17, 3 * 24], 2.0, half);
        let g = rounded(6, [2, 17, 24], 1.0, half);
        let both = [0, 1].map(|i| {
            let (qkv, g) = (qkv[i].clone(), g[i].clone());
            let dtype = qkv.dtype();
            let (y, saved) = formulas::packed_attention::<Plain>(qkv, 3);
            let by_qkv = formulas::packed_attention_backward::<Plain>(saved.clone(), 3, g);
            let [.., probabilities] = saved;
            vec![typed(y, dtype), typed(probabilities, dtype), typed(by_qkv, dtype)]
        });
        near(both, "attention");
    }
}
