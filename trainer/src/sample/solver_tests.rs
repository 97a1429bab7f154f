use std::cell::RefCell;

use burn::tensor::Int;

use super::*;
use crate::sample::{DrawnNoise, GivenNoise, draw_labels, draw_latents};

const NULL_CLASS: usize = 3;

/// A velocity by formula, which notes the times and batch sizes that it is asked for.
struct Formula<F> {
    velocity: F,
    asked: RefCell<Vec<(f32, usize)>>,
}

impl<F: Fn(f64, f64, f64) -> f64> Formula<F> {
    fn new(velocity: F) -> Self {
        Self { velocity, asked: RefCell::default() }
    }
}

impl<F: Fn(f64, f64, f64) -> f64> VelocityModel for Formula<F> {
    fn velocity(&self, x: Tensor<4>, t: Tensor<1>, labels: Tensor<1, Int>) -> Tensor<4> {
        let shape = x.dims();
        let device = x.device();
        let t: Vec<f32> = t.into_data().try_to_vec().expect("f32 times");
        let labels: Vec<f32> = labels.float().into_data().try_to_vec().expect("f32 labels");
        let x: Vec<f32> = x.into_data().try_to_vec().expect("f32 states");
        self.asked.borrow_mut().push((t[0], t.len()));
        let size = x.len() / t.len();
        let values: Vec<f32> = x
            .iter()
            .enumerate()
            .map(|(i, &x)| {
                let sample = i / size;
                (self.velocity)(f64::from(x), f64::from(t[sample]), f64::from(labels[sample])) as f32
            })
            .collect();
        Tensor::from_data(TensorData::new(values, shape), &device)
    }
}

/// dx/dt of x_t = alpha x + sigma eps for data of this mean and deviation.
fn gaussian(path: Path, mean: f64, deviation: f64) -> impl Fn(f64, f64, f64) -> f64 {
    move |x, t, _| {
        let (alpha, d_alpha, sigma, d_sigma) = coefficients(path, t);
        let variance = (alpha * deviation).powi(2) + sigma * sigma;
        let centred = (x - alpha * mean) / variance;
        d_alpha * (mean + alpha * deviation * deviation * centred) + d_sigma * sigma * centred
    }
}

fn coefficients(path: Path, t: f64) -> (f64, f64, f64, f64) {
    let half_pi = std::f64::consts::FRAC_PI_2;
    match path {
        Path::Linear => (1.0 - t, -1.0, t, 1.0),
        Path::Cosine => {
            let (sin, cos) = (half_pi * t).sin_cos();
            (cos, -half_pi * sin, sin, half_pi * cos)
        }
    }
}

fn config(mode: Mode, num_steps: usize, cfg_scale: f64, low: f64, high: f64) -> SamplerConfig {
    SamplerConfig { mode, num_steps, cfg_scale, guidance_low: low, guidance_high: high }
}

struct Setup {
    latents: Vec<f64>,
    shape: [usize; 4],
    labels: Vec<usize>,
    device: Device,
}

impl Setup {
    fn run(
        &self,
        model: &dyn VelocityModel,
        config: &SamplerConfig,
        path: Path,
        noise: &dyn Noise,
    ) -> Result<Vec<f64>, SampleError> {
        let batch = Batch {
            latents: &self.latents,
            shape: self.shape,
            labels: &self.labels,
            null_class: NULL_CLASS,
            path,
            device: &self.device,
        };
        let mut done = 0;
        let result = sample(model, config, &batch, noise, |step| {
            done += 1;
            assert_eq!(step, done);
        });
        assert!(result.is_err() || done == config.num_steps);
        result
    }
}

fn small() -> Setup {
    let latents = vec![-1.25, -0.5, 0.25, 1.0];
    Setup { latents, shape: [2, 1, 1, 2], labels: vec![0, 2], device: Device::flex() }
}

fn drawn(samples: &[u64], size: usize) -> Setup {
    let shape = [samples.len(), 1, 1, size];
    let labels = draw_labels(1, samples, NULL_CLASS);
    Setup { latents: draw_latents(1, samples, size), shape, labels, device: Device::flex() }
}

/// Expected values: the reference's `samplers.py` restated in PyTorch 2.15 with this velocity and noise.
#[test]
fn every_mode_gives_the_values_of_pytorch() {
    let model = Formula::new(|x, t, label| x * (0.5 + t) + 0.25 * label);
    let values = (0..24).map(|k| ((5 * (k / 4) + 3 * (k % 4)) % 7 - 3) as f64 * 0.5).collect();
    let noise = GivenNoise { values };
    let check = |config: SamplerConfig, path, expected: [f64; 4]| {
        let ours = small().run(&model, &config, path, &noise).expect("samples");
        for (a, b) in ours.iter().zip(expected) {
            assert!((a - b).abs() < 2e-6, "{config:?} {path:?}: {ours:?}, expected {expected:?}");
        }
    };
    let ode = config(Mode::Ode, 10, 2.5, 0.2, 0.9);
    check(ode, Path::Linear, [0.215386628, 0.461453481, -0.056776854, 0.189289987]);
    let heun = config(Mode::OdeHeun, 10, 2.5, 0.2, 0.9);
    check(heun, Path::Cosine, [0.156686189, 0.431287655, -0.04639892, 0.228202556]);
    let sde = config(Mode::Sde, 7, 1.8, 0.2, 0.84);
    check(sde.clone(), Path::Linear, [0.556627691, 0.031326923, -0.180419222, -0.042155112]);
    check(sde, Path::Cosine, [0.536440286, 0.105194159, -0.187196083, -0.098994589]);
    let plain = config(Mode::Sde, 7, 1.0, 0.0, 1.0);
    check(plain, Path::Cosine, [0.150114658, -0.281131467, -0.315971287, -0.227769805]);
}

#[test]
fn guidance_acts_on_both_bounds_of_its_interval_and_nowhere_else() {
    let noise = GivenNoise { values: vec![0.0; 4 * 50] };
    let guided = |config: SamplerConfig| {
        let model = Formula::new(|x, _, _| -x);
        small().run(&model, &config, Path::Linear, &noise).expect("samples");
        let asked = model.asked.into_inner();
        assert!(asked.iter().all(|(_, rows)| [2, 4].contains(rows)));
        asked.into_iter().filter(|(_, rows)| *rows == 4).map(|(t, _)| t).collect::<Vec<_>>()
    };
    assert_eq!(guided(config(Mode::Ode, 10, 1.5, 0.2, 0.5)), [0.5, 0.4, 0.3, 0.2]);
    let fifty = guided(config(Mode::Ode, 50, 1.5, 0.2, 0.7));
    assert_eq!((fifty[0], fifty.len(), *fifty.last().expect("some")), (0.7, 26, 0.2));
    assert_eq!(guided(config(Mode::Sde, 7, 1.5, 0.2, 0.52)), [0.52, 0.36, 0.2]);
    assert_eq!(guided(config(Mode::Sde, 7, 1.5, 0.0, 0.1)), [0.04]);
    // Both evaluations of a step are guided by the time at which it begins; the last step has one.
    assert_eq!(guided(config(Mode::OdeHeun, 10, 1.5, 0.2, 0.35)), [0.3, 0.2, 0.2, 0.1]);
    assert_eq!(guided(config(Mode::OdeHeun, 10, 1.5, 0.0, 0.1)), [0.1]);
    assert!(guided(config(Mode::Ode, 10, 1.0, 0.0, 1.0)).is_empty());
}

/// The flow of a Gaussian is x(0) = mean + deviation x(1).
#[test]
fn eulers_error_falls_with_the_step_and_heuns_with_its_square() {
    let model = Formula::new(gaussian(Path::Linear, 0.5, 0.4));
    let setup = drawn(&[0, 1], 8);
    let error = |mode, steps| {
        let noise = GivenNoise { values: vec![] };
        let ours = setup.run(&model, &config(mode, steps, 1.0, 0.0, 1.0), Path::Linear, &noise);
        let ours = ours.expect("samples");
        ours.iter().zip(&setup.latents).map(|(x, z)| (x - (0.5 + 0.4 * z)).powi(2)).sum::<f64>().sqrt()
    };
    let ratio = |mode| error(mode, 20) / error(mode, 40);
    let (euler, heun) = (ratio(Mode::Ode), ratio(Mode::OdeHeun));
    assert!((1.8..2.3).contains(&euler), "halving the step divides Euler's error by {euler}");
    assert!((3.4..4.6).contains(&heun), "halving the step divides Heun's error by {heun}");
    assert!(error(Mode::OdeHeun, 40) < 0.1 * error(Mode::Ode, 40));
}

#[test]
fn the_sde_draws_from_the_data_distribution() {
    let samples: Vec<u64> = (0..64).collect();
    let setup = drawn(&samples, 256);
    for path in [Path::Linear, Path::Cosine] {
        let model = Formula::new(gaussian(path, 0.5, 0.4));
        let noise = DrawnNoise::new(1, &samples);
        let ours = setup.run(&model, &config(Mode::Sde, 250, 1.0, 0.0, 1.0), path, &noise);
        let ours = ours.expect("samples");
        let n = ours.len() as f64;
        let mean = ours.iter().sum::<f64>() / n;
        let deviation = (ours.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n).sqrt();
        assert!((mean - 0.5).abs() < 0.015, "{path:?}: mean {mean}");
        assert!((deviation - 0.4).abs() < 0.015, "{path:?}: deviation {deviation}");
        // Without the noise the drift would shrink the samples onto the mean's neighbourhood.
        let none = GivenNoise { values: vec![0.0; 250 * ours.len()] };
        let still = setup.run(&model, &config(Mode::Sde, 250, 1.0, 0.0, 1.0), path, &none);
        let spread = still.expect("samples").iter().map(|x| (x - 0.5).powi(2)).sum::<f64>() / n;
        assert!(spread.sqrt() < 0.3, "{path:?}: {spread}");
    }
}

#[test]
fn the_score_of_a_gaussian_follows_from_its_velocity() {
    for path in [Path::Linear, Path::Cosine] {
        for t in [1.0, 0.7, 0.3, 0.04] {
            let (alpha, _, sigma, _) = coefficients(path, t);
            let x = 0.9;
            let exact = -(x - alpha * 0.5) / ((alpha * 0.4).powi(2) + sigma * sigma);
            let ours = Score::at(path, t).of_velocity(gaussian(path, 0.5, 0.4)(x, t, 0.0), x);
            assert!((ours - exact).abs() < 1e-9 * exact.abs().max(1.0), "{path:?} {t}: {ours} {exact}");
        }
    }
}

#[test]
fn a_sample_does_not_depend_on_its_batch() {
    let model = Formula::new(|x, t, label| x * (0.5 + t) + 0.25 * label);
    let config = config(Mode::Sde, 7, 1.8, 0.0, 0.7);
    let run = |samples: &[u64]| {
        let noise = DrawnNoise::new(9, samples);
        drawn(samples, 6).run(&model, &config, Path::Linear, &noise).expect("samples")
    };
    let whole = run(&[0, 1, 2, 3, 4]);
    assert_eq!(whole, [run(&[0, 1]), run(&[2, 3, 4])].concat());
    assert_ne!(whole[..6], whole[6..12]);
}

#[test]
fn labels_are_drawn_from_all_classes() {
    let labels = draw_labels(3, &(0..900).collect::<Vec<_>>(), 9);
    for class in 0..9 {
        let count = labels.iter().filter(|&&l| l == class).count();
        assert!((60..140).contains(&count), "class {class}: {count}");
    }
}

#[test]
fn what_cannot_be_sampled_is_an_error() {
    let good = config(Mode::Ode, 2, 1.5, 0.2, 0.7);
    let none = GivenNoise { values: vec![] };
    let run = |config: &SamplerConfig, setup: Setup, velocity: fn(f64, f64, f64) -> f64| {
        let result = setup.run(&Formula::new(velocity), config, Path::Linear, &none);
        result.map(|_| ()).map_err(|e| e.to_string())
    };
    let message = |config| run(&config, small(), |x, _, _| x).expect_err("wrong settings");
    assert_eq!(run(&good, small(), |x, _, _| x), Ok(()));
    assert!(message(SamplerConfig { num_steps: 0, ..good.clone() }).contains("num_steps = 0"));
    assert!(message(SamplerConfig { cfg_scale: f64::NAN, ..good.clone() }).contains("cfg_scale = NaN"));
    assert!(message(SamplerConfig { cfg_scale: 0.5, ..good.clone() }).contains("at least 1"));
    assert!(message(SamplerConfig { guidance_low: 0.8, ..good.clone() }).contains("at most guidance_high"));
    assert!(message(SamplerConfig { guidance_high: 1.5, ..good.clone() }).contains("guidance_high = 1.5"));
    let label = run(&good, Setup { labels: vec![0, 4], ..small() }, |x, _, _| x);
    assert!(label.expect_err("no such class").contains("class 4"));
    assert_eq!(run(&good, Setup { labels: vec![0, NULL_CLASS], ..small() }, |x, _, _| x), Ok(()));
    assert!(run(&good, small(), |_, _, _| f64::NAN).expect_err("NaN").contains("not finite"));
    assert!(serde_json::from_str::<SamplerConfig>(r#"{"mode": "ode-heun", "num_steps": 20}"#).is_ok());
    assert!(serde_json::from_str::<SamplerConfig>(r#"{"steps": 20}"#).is_err());
}
