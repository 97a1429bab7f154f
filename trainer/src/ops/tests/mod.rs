//! Every fused operation against its composite: results and gradients, on odd sizes and on views.

use burn::tensor::{Device, FloatDType, Tensor, TensorData};

use super::*;

mod formulas;

/// Reproducible values in [-scale, scale).
fn values(seed: u64, len: usize, scale: f32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next() * scale).collect()
}

/// `REPA_TEST_DEVICE`, or the CPU.
fn device() -> Device {
    let name = std::env::var("REPA_TEST_DEVICE").unwrap_or_else(|_| "cpu".into());
    crate::train::device(&name, 0).unwrap_or_else(|e| panic!("REPA_TEST_DEVICE: {e}"))
}

fn leaf<const D: usize>(seed: u64, shape: [usize; D], scale: f32) -> Tensor<D> {
    let data = TensorData::new(values(seed, shape.iter().product(), scale), shape);
    Tensor::from_data(data, &device().autodiff()).require_grad()
}

fn host<const D: usize>(x: Tensor<D>) -> Vec<f32> {
    x.into_data().try_to_vec().expect("float32")
}

/// The result and the gradients by three leaves, for the loss sum(result * fixed weights).
fn run<const A: usize, const B: usize, const C: usize, const D: usize>(
    leaves: (&Tensor<A>, &Tensor<B>, &Tensor<C>),
    f: impl Fn(Tensor<A>, Tensor<B>, Tensor<C>) -> Tensor<D>,
) -> [Vec<f32>; 4] {
    let (a, b, c) = leaves;
    let y = f(a.clone(), b.clone(), c.clone());
    let weights = TensorData::new(values(99, y.shape().num_elements(), 1.0), y.shape());
    let loss = (y.clone() * Tensor::from_data(weights, &y.device())).sum();
    let grads = loss.backward();
    let none = Vec::new;
    [
        host(y.inner()),
        a.grad(&grads).map_or_else(none, host),
        b.grad(&grads).map_or_else(none, host),
        c.grad(&grads).map_or_else(none, host),
    ]
}

/// Largest difference, relative to the largest expected value where that is above 1.
#[track_caller]
fn same(fused: [Vec<f32>; 4], composite: [Vec<f32>; 4], tolerance: f32) {
    for (i, (fused, expected)) in fused.iter().zip(&composite).enumerate() {
        assert_eq!(fused.len(), expected.len(), "part {i}");
        let scale = expected.iter().fold(1.0f32, |m, x| m.max(x.abs()));
        for (j, (a, b)) in fused.iter().zip(expected).enumerate() {
            assert!((a - b).abs() <= tolerance * scale, "part {i}, element {j}: {a}, composite {b}");
        }
    }
}

fn unused() -> Tensor<1> {
    leaf(0, [1], 1.0)
}

#[test]
fn activations_match_their_composites() {
    for shape in [[1, 1, 1], [3, 5, 7], [2, 33, 300]] {
        let x = leaf(1, shape, 6.0);
        let leaves = (&x, &unused(), &unused());
        same(run(leaves, |x, _, _| gelu_tanh(x)), run(leaves, |x, _, _| composite::gelu_tanh(x)), 1e-6);
        same(run(leaves, |x, _, _| silu(x)), run(leaves, |x, _, _| composite::silu(x)), 1e-6);
        let view = |x: Tensor<3>| x.swap_dims(0, 2);
        same(
            run(leaves, |x, _, _| gelu_tanh(view(x))),
            run(leaves, |x, _, _| composite::gelu_tanh(view(x))),
            1e-6,
        );
    }
}

#[test]
fn gelu_is_accurate_over_its_whole_range() {
    let x: Vec<f32> = (-120_000..120_000).map(|i| i as f32 * 1e-4).collect();
    let y = gelu_tanh(Tensor::<1>::from_data(TensorData::new(x.clone(), [x.len()]), &Device::flex()));
    for (&x, y) in x.iter().zip(host(y)) {
        let wide = f64::from(x);
        let inner = (2.0 / std::f64::consts::PI).sqrt() * (wide + 0.044715 * wide.powi(3));
        let expected = 0.5 * wide * (1.0 + inner.tanh());
        assert!((f64::from(y) - expected).abs() <= 2e-7 * wide.abs().max(1e-3), "{x}: {y}, {expected}");
    }
}

#[test]
fn extreme_and_broken_values_stay_what_they_are() {
    let x = Tensor::<1>::from_floats([f32::NAN, 1e20, -1e20, 90.0, -90.0], &Device::flex().autodiff());
    let x = x.require_grad();
    for f in [gelu_tanh::<1>, silu::<1>] {
        let y = f(x.clone());
        let slope = host(x.grad(&y.clone().sum().backward()).expect("a leaf"));
        let y = host(y.inner());
        assert!(y[0].is_nan() && slope[0].is_nan());
        assert_eq!([y[1], y[3]], [1e20, 90.0]);
        assert!(y[2].abs() < 1e-16 && y[4].abs() < 1e-30);
        assert!((slope[1] - 1.0).abs() < 1e-6 && (slope[3] - 1.0).abs() < 1e-6);
        assert!(slope[2].abs() < 1e-15 && slope[4].abs() < 1e-30, "{slope:?}");
    }
    let mut broken = values(1, 2 * 3 * 4 * 5, 1.0);
    broken[7] = f32::NAN;
    let q = Tensor::<4>::from_data(TensorData::new(broken, [2, 3, 4, 5]), &Device::flex());
    let y = host(attention(q.clone(), q.ones_like(), q.ones_like()));
    assert!(y[5..10].iter().all(|x| x.is_nan()) && y[10..].iter().all(|x| x.is_finite()));
}

#[test]
fn normalisations_match_their_composites() {
    for (n, t, h) in [(1, 1, 8), (2, 5, 7), (3, 70, 130), (2, 64, 128)] {
        let x = leaf(1, [n, t, h], 3.0);
        let leaves = (&x, &leaf(2, [h], 1.0), &leaf(3, [h], 1.0));
        same(
            run(leaves, |x, _, _| layer_norm(x, 1e-6)),
            run(leaves, |x, _, _| composite::layer_norm(x, 1e-6)),
            1e-5,
        );
        same(
            run(leaves, |x, w, b| layer_norm_affine(x, w, b, 1e-5)),
            run(leaves, |x, w, b| composite::layer_norm_affine(x, w, b, 1e-5)),
            1e-5,
        );
        let leaves = (&x, &leaf(2, [n, 2, h], 1.0), &leaf(3, [h, 1, n], 1.0));
        let rows = |x: Tensor<3>| x.narrow(1, 1, 1);
        same(
            run(leaves, |x, a, b| modulate(x, rows(a), b.swap_dims(0, 2), 1e-6, DType::F32)),
            run(leaves, |x, a, b| composite::modulate(x, rows(a), b.swap_dims(0, 2), 1e-6)),
            1e-5,
        );
        let across = leaf(4, [t, n, h], 1.0);
        let leaves = (&x, &across, &leaf(3, [n, 1, h], 1.0));
        same(
            run(leaves, |x, y, gate| gated_add(x, y.swap_dims(0, 1), gate)),
            run(leaves, |x, y, gate| composite::gated_add(x, y.swap_dims(0, 1), gate)),
            1e-5,
        );
        same(
            run(leaves, |x, y, gate| modulate(y.swap_dims(0, 1), gate.clone(), gate, 1e-6, DType::F32) + x),
            run(leaves, |x, y, gate| composite::modulate(y.swap_dims(0, 1), gate.clone(), gate, 1e-6) + x),
            1e-5,
        );
    }
}

/// As in a step in half precision: the residual stream is float32, what goes into a matrix product and comes out is not.
#[test]
fn half_precision_beside_float32_rounds_only_where_it_has_to() {
    for (half, tolerance) in [(FloatDType::BF16, 0.01), (FloatDType::F16, 0.002)] {
        if !device().supports_dtype(half) {
            println!("skipped: the device has no {half:?}");
            continue;
        }
        let (x, gain, shift) =
            (leaf(1, [3, 300, 72], 3.0), leaf(2, [3, 1, 72], 1.0), leaf(3, [3, 1, 72], 1.0));
        let leaves = (&x, &gain, &shift);
        let dtype = DType::from(half);
        same(
            run(leaves, |x, gain, shift| {
                let y = modulate(x, shift, gain, 1e-6, dtype);
                assert_eq!(y.dtype(), dtype);
                y.cast(DType::F32)
            }),
            run(leaves, |x, gain, shift| composite::modulate(x, shift, gain, 1e-6)),
            tolerance,
        );
        let leaves = (&x, &leaf(4, [3, 300, 72], 1.0), &gain);
        let rounded = |y: Tensor<3>| y.cast(half);
        same(
            run(leaves, |x, y, gate| {
                let y = gated_add(x, rounded(y), gate);
                assert_eq!(y.dtype(), DType::F32);
                y
            }),
            run(leaves, |x, y, gate| composite::gated_add(x, rounded(y).cast(DType::F32), gate)),
            tolerance,
        );
    }
}

#[test]
fn parts_have_the_gradients_of_narrow() {
    let x = leaf(1, [3, 2, 12], 1.0);
    let leaves = (&x, &leaf(2, [3, 2, 3], 1.0), &unused());
    let used = |[a, b, _, d]: [Tensor<3>; 4], other: Tensor<3>| a.clone() * b + d * other + a;
    same(
        run(leaves, |x, other, _| used(parts(x), other)),
        run(leaves, |x, other, _| used(std::array::from_fn(|i| x.clone().narrow(2, i * 3, 3)), other)),
        0.0,
    );
    // What else follows from the tensor keeps its own gradient, and parts of what is not tracked are plain.
    same(
        run(leaves, |x, other, _| used(parts(x.clone()), other) + x.narrow(2, 0, 3)),
        run(leaves, |x, other, _| {
            used(std::array::from_fn(|i| x.clone().narrow(2, i * 3, 3)), other) + x.narrow(2, 0, 3)
        }),
        0.0,
    );
    let [first, _] = parts(x.clone().inner());
    assert_eq!(host(first), host(x.inner().narrow(2, 0, 6)));
}

#[test]
fn vectors_of_any_type_are_joined_in_memory_of_their_own() {
    let plain = |seed, len| leaf(seed, [len], 3.0).inner();
    for lens in [vec![1], vec![8, 16, 4], vec![3, 1, 2000, 5], vec![300_000, 7]] {
        let mut vectors: Vec<Tensor<1>> = lens.iter().zip(1..).map(|(&len, seed)| plain(seed, len)).collect();
        // Not all begin where their memory does.
        vectors.push(plain(77, 50).narrow(0, 9, 30));
        if device().supports_dtype(FloatDType::BF16) {
            vectors.push(plain(78, 60).cast(FloatDType::BF16));
        }
        let expected: Vec<f32> = vectors.iter().flat_map(|v| host(v.clone().cast(DType::F32))).collect();
        let whole = joined(vectors.clone());
        assert_eq!(host(whole.clone()), expected);
        let sum: f64 = expected.iter().map(|&x| f64::from(x).powi(2)).sum();
        let found = || host(squares(whole.clone()));
        let total: f64 = found().iter().map(|&x| f64::from(x)).sum();
        assert!((total - sum).abs() < 1e-6 * sum, "{total}, not {sum}");
        assert_eq!(found(), found(), "the same bits each time");
        drop(whole * 0.0);
        assert_eq!(host(vectors[0].clone()), expected[..lens[0]], "nobody else's memory");
    }
}

#[test]
fn long_rows_keep_their_precision() {
    let mut x = values(5, 100_000, 1.0);
    x.iter_mut().for_each(|x| *x += 30.0);
    let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / 1e5;
    let variance = x.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / 1e5;
    let y =
        layer_norm(Tensor::<2>::from_data(TensorData::new(x.clone(), [1, x.len()]), &Device::flex()), 1e-6);
    for (x, y) in x.iter().zip(host(y)) {
        let expected = (f64::from(*x) - mean) / (variance + 1e-6).sqrt();
        assert!((f64::from(y) - expected).abs() < 1e-5, "{y}, {expected}");
    }
}

#[test]
fn attention_matches_its_composite() {
    for (n, heads, queries, keys, d) in
        [(1, 1, 1, 1, 1), (2, 3, 5, 5, 4), (2, 2, 17, 33, 7), (1, 2, 64, 64, 32), (1, 1, 300, 257, 16)]
    {
        let q = leaf(1, [n, heads, queries, d], 2.0);
        let k = leaf(2, [n, heads, keys, d], 2.0);
        let v = leaf(3, [n, heads, keys, d], 2.0);
        same(run((&q, &k, &v), attention), run((&q, &k, &v), composite::attention), 1e-5);
        // Heads and tokens swapped, and one tensor in two places.
        let q = leaf(1, [n, queries, heads, d], 2.0);
        let k = leaf(2, [n, keys, heads, d], 2.0);
        let turn = |x: Tensor<4>| x.swap_dims(1, 2);
        same(
            run((&q, &k, &unused()), |q, k, _| attention(turn(q), turn(k.clone()), turn(k)).swap_dims(1, 2)),
            run((&q, &k, &unused()), |q, k, _| {
                composite::attention(turn(q), turn(k.clone()), turn(k)).swap_dims(1, 2)
            }),
            1e-5,
        );
    }
}

#[test]
fn packed_attention_matches_its_composite() {
    for (n, t, heads, d) in [(1, 1, 1, 1), (2, 5, 3, 4), (3, 64, 4, 32), (1, 300, 2, 8)] {
        let qkv = leaf(1, [n, t, 3 * heads * d], 2.0);
        let leaves = (&qkv, &unused(), &unused());
        same(
            run(leaves, |x, _, _| attention_qkv(x, heads)),
            run(leaves, |x, _, _| composite::attention_qkv(x, heads)),
            1e-5,
        );
        let turned = leaf(1, [t, n, 3 * heads * d], 2.0);
        let leaves = (&turned, &unused(), &unused());
        same(
            run(leaves, |x, _, _| attention_qkv(x.swap_dims(0, 1), heads).swap_dims(0, 2)),
            run(leaves, |x, _, _| composite::attention_qkv(x.swap_dims(0, 1), heads).swap_dims(0, 2)),
            1e-5,
        );
    }
}

#[test]
fn linear_matches_its_composite() {
    for (n, t, inputs, outputs) in
        [(1, 1, 1, 1), (2, 5, 7, 3), (3, 70, 33, 130), (4, 64, 128, 512), (5, 103, 16, 34), (2, 4_000, 2, 3)]
    {
        let x = leaf(1, [n, t, inputs], 1.0);
        let weight = leaf(2, [outputs, inputs], 1.0);
        let bias = leaf(3, [outputs], 1.0);
        let leaves = (&x, &weight, &bias);
        same(
            run(leaves, |x, w, b| linear(x, w, Some(b))),
            run(leaves, |x, w, b| composite::linear(x, w, Some(b))),
            1e-5,
        );
        same(
            run(leaves, |x, w, _| linear(x, w, None)),
            run(leaves, |x, w, _| composite::linear(x, w, None)),
            1e-5,
        );
        let turned = (&leaf(1, [t, n, inputs], 1.0), &leaf(2, [inputs, outputs], 1.0), &bias);
        let view = |x: Tensor<3>, w: Tensor<2>| (x.swap_dims(0, 1), w.transpose());
        same(
            run(turned, |x, w, b| {
                let (x, w) = view(x, w);
                linear(x, w, Some(b)).swap_dims(1, 2)
            }),
            run(turned, |x, w, b| {
                let (x, w) = view(x, w);
                composite::linear(x, w, Some(b)).swap_dims(1, 2)
            }),
            1e-5,
        );
    }
}

#[test]
fn convolution_matches_its_composite() {
    for (n, inputs, outputs, height, width) in
        [(1, 1, 1, 1, 1), (2, 3, 5, 4, 7), (3, 24, 3, 17, 1), (2, 16, 24, 20, 33), (1, 40, 40, 64, 64)]
    {
        let x = leaf(1, [n, inputs, height, width], 1.0);
        let weight = leaf(2, [outputs, inputs, 3, 3], 0.3);
        let bias = leaf(3, [outputs], 1.0);
        let leaves = (&x, &weight, &bias);
        same(
            run(leaves, |x, w, b| conv2d(x, w, Some(b), 1, 1)),
            run(leaves, |x, w, b| composite::conv2d(x, w, Some(b), 1, 1)),
            1e-5,
        );
        let turned = (&leaf(1, [n, height, width, inputs], 1.0), &weight, &bias);
        let planar = |x: Tensor<4>| x.swap_dims(1, 3).swap_dims(2, 3);
        same(
            run(turned, |x, w, _| conv2d(planar(x), w, None, 1, 1).swap_dims(2, 3)),
            run(turned, |x, w, _| composite::conv2d(planar(x), w, None, 1, 1).swap_dims(2, 3)),
            1e-5,
        );
    }
    let (x, weight) = (leaf(1, [2, 3, 8, 8], 1.0), leaf(2, [4, 3, 3, 3], 1.0));
    assert_eq!(conv2d(x.clone(), weight.clone(), None, 2, 1).dims(), [2, 4, 4, 4]);
    assert_eq!(conv2d(x, weight, None, 1, 0).dims(), [2, 4, 6, 6]);
}

#[test]
fn inputs_that_need_no_gradient_are_left_alone() {
    let device = device().autodiff();
    let x = Tensor::<3>::from_data(TensorData::new(values(1, 30, 1.0), [2, 3, 5]), &device);
    let weight = leaf(2, [4, 5], 1.0);
    let gate = leaf(3, [2, 1, 4], 1.0);
    let y = linear(x.clone(), weight.clone(), None);
    let y = gated_add(y.clone().detach(), y, gate.clone());
    let grads = layer_norm(y, 1e-6).powf_scalar(3.0).sum().backward();
    assert!(x.grad(&grads).is_none());
    assert!(weight.grad(&grads).is_some() && gate.grad(&grads).is_some());
    let plain = linear(x.inner(), weight.inner(), None);
    assert!(!plain.device().is_autodiff());
}

#[test]
fn half_precision_takes_the_composite() {
    let x = Tensor::<3>::from_data(TensorData::new(values(1, 48, 1.0), [2, 3, 8]), &Device::flex());
    for dtype in [FloatDType::F16, FloatDType::BF16] {
        let half = x.clone().cast(dtype);
        assert_eq!(gelu_tanh(half.clone()).dtype(), half.dtype());
        assert_eq!(layer_norm(half.clone(), 1e-6).dtype(), half.dtype());
    }
}

#[test]
fn thread_count_does_not_change_the_bits() {
    let step = || {
        let x = leaf(1, [3, 150, 96], 1.0);
        let weight = leaf(2, [288, 96], 0.2);
        let shift = leaf(3, [3, 1, 96], 1.0);
        run((&x, &weight, &shift), |x, w, shift| {
            let y = modulate(x.clone(), shift.clone(), shift.clone(), 1e-6, DType::F32);
            let y = attention_qkv(linear(y, w, None), 6);
            gated_add(x, gelu_tanh(y), shift)
        })
    };
    let pool = |n| rayon::ThreadPoolBuilder::new().num_threads(n).build().expect("a pool");
    assert_eq!(pool(1).install(step), pool(3).install(step));
}
