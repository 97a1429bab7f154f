use std::sync::Arc;

use burn::tensor::{Device, TensorData};

use super::*;
use crate::data::draws::{Draws, Purpose};
use crate::objective::{Path, alignment_loss, denoising_loss, interpolate};

fn small() -> SitConfig {
    SitConfig {
        input_size: 8,
        patch_size: 2,
        in_channels: 4,
        hidden_size: 64,
        depth: 3,
        num_heads: 4,
        mlp_ratio: 4.0,
        num_classes: 5,
        encoder_depth: 2,
        projector_dim: 48,
        z_dims: vec![24, 16],
        qk_norm: true,
    }
}

/// Initial values with noise on top, so that gates and the last layer are not zero.
fn stirred(layout: &Layout) -> Vec<f32> {
    let mut noise = vec![0.0f32; layout.trainable_len()];
    Draws::new(9, Purpose::Noise).normal(1000, &mut noise);
    layout.initial_values(9).iter().zip(noise).map(|(v, n)| v + 0.05 * n).collect()
}

fn random<const D: usize>(shape: [usize; D], number: u64, device: &Device) -> Tensor<D> {
    let mut x = vec![0.0f32; shape.iter().product()];
    Draws::new(9, Purpose::Noise).normal(number, &mut x);
    Tensor::from_data(TensorData::new(x, shape), device)
}

fn times(device: &Device) -> Tensor<1> {
    Tensor::from_data(TensorData::new(vec![0.1f32, 0.45, 0.9], [3]), device)
}

/// Two labels and the null class.
fn labels(device: &Device) -> Tensor<1, Int> {
    Tensor::from_data(TensorData::new(vec![3i64, 0, 5], [3]), device)
}

fn values<const D: usize>(x: Tensor<D>) -> Vec<f32> {
    x.into_data().try_to_vec().unwrap()
}

fn relative(a: &[f32], b: &[f32]) -> f64 {
    let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt();
    norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied())
}

/// Loss and gradients of one batch.
fn loss_and_gradients(config: &SitConfig, precision: Precision, scale: f64) -> (f32, Vec<f32>) {
    run_batch(config, scale, |params| Sit::bind_mixed(config, params, precision))
}

/// The same with a model bound by `bind`: the loss, and the gradients that it leaves on the parameters.
fn run_batch(config: &SitConfig, scale: f64, bind: impl Fn(&Params) -> Sit) -> (f32, Vec<f32>) {
    run_batch_on(Device::flex(), config, scale, bind)
}

fn run_batch_on(
    device: Device,
    config: &SitConfig,
    scale: f64,
    bind: impl Fn(&Params) -> Sit,
) -> (f32, Vec<f32>) {
    let device = device.autodiff();
    let layout = Arc::new(config.layout());
    let params = Params::from_flat(&layout, &stirred(&layout), &device);
    let model = bind(&params);
    let t = times(&device);
    let (state, target) = interpolate(
        Path::Linear,
        random([3, 4, 8, 8], 0, &device),
        random([3, 4, 8, 8], 1, &device),
        t.clone(),
    );
    let output = model.forward(state, t, labels(&device));
    let features = [random([3, 16, 24], 2, &device), random([3, 16, 16], 3, &device)];
    let loss = denoising_loss(output.velocity, target).mean()
        + alignment_loss(output.projected, &features).mean() * 0.5;
    assert_eq!(loss.dtype(), DType::F32);
    let gradients = (loss.clone() * scale).backward();
    let mut flat = vec![0.0; layout.trainable_len()];
    params.gradients(&gradients, &mut flat);
    (loss.into_scalar(), flat)
}

#[test]
fn half_precision_follows_float32_in_loss_and_gradients() {
    let config = small();
    let (expected, gradients) = loss_and_gradients(&config, Precision::F32, 1.0);
    for (precision, scale, tolerance) in [(Precision::Bf16, 1.0, 0.05), (Precision::F16, 1024.0, 0.01)] {
        let (loss, mut scaled) = loss_and_gradients(&config, precision, scale);
        assert_ne!(loss, expected, "{precision:?} changed nothing");
        assert!((loss / expected - 1.0).abs() < 0.02, "{precision:?}: {loss}, not {expected}");
        scaled.iter_mut().for_each(|g| *g /= scale as f32);
        let error = relative(&scaled, &gradients);
        assert!(error < tolerance, "{precision:?}: gradients off by {error}");
    }
}

#[test]
fn weights_in_half_precision_give_float32_outputs_near_the_mixed_ones() {
    let (config, device) = (small(), Device::flex());
    let layout = Arc::new(config.layout());
    let params = Params::from_flat(&layout, &stirred(&layout), &device);
    for precision in [Precision::Bf16, Precision::F16] {
        let run =
            |model: Sit| model.forward(random([3, 4, 8, 8], 0, &device), times(&device), labels(&device));
        let mixed = run(Sit::bind_mixed(&config, &params, precision));
        let half = run(Sit::bind(&config, &params.cast(precision.dtype())));
        for output in [&mixed, &half] {
            assert_eq!(output.velocity.dtype(), DType::F32);
            assert!(output.projected.iter().all(|p| p.dtype() == DType::F32));
        }
        let error = relative(&values(half.velocity), &values(mixed.velocity));
        assert!(error < 0.03, "{precision:?}: {error}");
    }
}

#[test]
fn a_new_model_predicts_zero_velocity_from_any_input() {
    let (config, device) = (small(), Device::flex());
    let layout = Arc::new(config.layout());
    let params = Params::from_flat(&layout, &layout.initial_values(1), &device);
    let output = Sit::bind(&config, &params).forward(
        random([3, 4, 8, 8], 0, &device),
        times(&device),
        labels(&device),
    );
    assert_eq!(output.velocity.dims(), [3, 4, 8, 8]);
    assert!(values(output.velocity).iter().all(|&v| v == 0.0));
    assert_eq!(output.projected.iter().map(|p| p.dims()).collect::<Vec<_>>(), [[3, 16, 24], [3, 16, 16]]);
}

#[test]
fn velocity_alone_is_the_forward_pass_without_projectors() {
    let (config, device) = (small(), Device::flex());
    let layout = Arc::new(config.layout());
    let params = Params::from_flat(&layout, &stirred(&layout), &device);
    let model = Sit::bind(&config, &params);
    let x = || random([3, 4, 8, 8], 0, &device);
    let output = model.forward(x(), times(&device), labels(&device));
    let velocity = VelocityModel::velocity(&model, x(), times(&device), labels(&device));
    assert_eq!(values(output.velocity), values(velocity));
}

/// Samples do not see each other: a batch of three is three batches of one.
#[test]
fn samples_of_a_batch_are_independent() {
    let (config, device) = (small(), Device::flex());
    let layout = Arc::new(config.layout());
    let params = Params::from_flat(&layout, &stirred(&layout), &device);
    let model = Sit::bind(&config, &params);
    let x = random([3, 4, 8, 8], 0, &device);
    let all = model.velocity(x.clone(), times(&device), labels(&device));
    for i in 0..3 {
        let one = model.velocity(
            x.clone().narrow(0, i, 1),
            times(&device).narrow(0, i, 1),
            labels(&device).narrow(0, i, 1),
        );
        assert!(relative(&values(one), &values(all.clone().narrow(0, i, 1))) < 1e-5, "sample {i}");
    }
}

/// The loss must reach every trainable parameter but one: a key bias moves all of a query's scores by
/// the same amount, which the softmax does not see (behind qk-norm it does).
#[test]
fn gradients_reach_every_parameter() {
    let config = small();
    let layout = config.layout();
    let (_, gradients) = loss_and_gradients(&config, Precision::F32, 1.0);
    for entry in layout.entries().iter().filter(|e| e.trainable) {
        let part = &gradients[entry.offset..entry.offset + entry.len()];
        // The key norm's bias is such a shift too.
        if !entry.name.ends_with("k_norm.bias") {
            assert!(part.iter().any(|&g| g.abs() > 1e-7), "{} has no gradient", entry.name);
        }
    }
}

/// Keeps gradients, and the order in which they came.
#[derive(Debug)]
struct Keep(std::sync::Mutex<(Vec<f32>, Vec<usize>)>);

impl crate::ops::GradientSink for Keep {
    fn gradient(&self, offset: usize, values: &[f32]) {
        let mut kept = self.0.lock().unwrap();
        kept.0[offset..offset + values.len()].copy_from_slice(values);
        kept.1.push(offset);
    }
}

/// The watched form gives the plain form's gradients, each once, block by block from the output to the input.
#[test]
fn watched_gradients_are_the_plain_ones_and_come_in_the_order_promised() {
    let mut cases = vec![(Device::flex(), Precision::F32), (Device::flex(), Precision::Bf16)];
    if cfg!(feature = "wgpu") {
        cases.push((crate::train::device("wgpu", 0).unwrap(), Precision::F32));
    }
    for (device, precision) in cases {
        let config = SitConfig { depth: 5, ..small() };
        let (loss, expected) = loss_and_gradients(&config, precision, 1.0);
        let layout = Arc::new(config.layout());
        let keep = Arc::new(Keep(std::sync::Mutex::new((vec![0.0; layout.trainable_len()], Vec::new()))));
        let sink: Arc<dyn crate::ops::GradientSink> = keep.clone();
        let (watched_loss, left) =
            run_batch_on(device, &config, 1.0, |params| Sit::bind_watched(&config, params, precision, &sink));
        assert!((loss - watched_loss).abs() <= 1e-6 * loss.abs(), "{loss} {watched_loss}");
        assert!(left.iter().all(|&g| g == 0.0), "nothing is left on the leaves");
        let (gradients, order) = &*keep.0.lock().unwrap();
        let difference = relative(gradients, &expected);
        assert!(difference < 1e-5, "{precision:?}: {difference:.2e}");
        assert_eq!(order.len(), layout.entries().iter().filter(|e| e.trainable).count());
        let positions: Vec<usize> = order
            .iter()
            .map(|&offset| {
                let entry = layout.entries().iter().find(|e| e.trainable && e.offset == offset).unwrap();
                config.backward_position(&entry.name)
            })
            .collect();
        assert!(positions.is_sorted(), "{positions:?}");
    }
}
