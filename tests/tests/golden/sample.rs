//! Samplers: the reference's latents from given weights, first states and noise.

use std::sync::Arc;

use repa_trainer::model::Sit;
use repa_trainer::objective::Path;
use repa_trainer::params::Params;
use repa_trainer::sample::{Batch, GivenNoise, Mode, SamplerConfig, sample};

use crate::case::{Case, device};
use crate::compare::close_relative;
use crate::train::model_config;

/// Samples a case's latents.
pub fn check(case: &Case) -> Result<(), String> {
    let config = model_config(case);
    let device = device();
    let layout = Arc::new(config.layout());
    let params =
        Params::from_weights(&layout, &case.weights.under("weights"), &device).map_err(|e| e.to_string())?;
    let model = Sit::bind(&config, &params);

    let mode = match (case.str("mode", "ode"), case.bool("heun", false)) {
        ("ode", false) => Mode::Ode,
        ("ode", true) => Mode::OdeHeun,
        ("sde", _) => Mode::Sde,
        other => return Err(format!("mode {other:?} is unknown")),
    };
    let path = match case.str("path_type", "linear") {
        "linear" => Path::Linear,
        "cosine" => Path::Cosine,
        other => return Err(format!("path_type {other:?} is unknown")),
    };
    let sampler = SamplerConfig {
        mode,
        num_steps: case.usize("num_steps", 20),
        // The reference takes every scale up to 1 for "without guidance".
        cfg_scale: case.f64("cfg_scale", 1.0).max(1.0),
        guidance_low: case.f64("guidance_low", 0.0),
        guidance_high: case.f64("guidance_high", 1.0),
    };
    let shape: [usize; 4] = case.shape("latents").try_into().map_err(|_| "latents are no [N, C, H, W]")?;
    let latents: Vec<f64> = case.f32s("latents").into_iter().map(f64::from).collect();
    let labels: Vec<usize> = case.i64s("labels").into_iter().map(|label| label as usize).collect();
    let batch = Batch {
        latents: &latents,
        shape,
        labels: &labels,
        null_class: config.null_class(),
        path,
        device: &device,
    };
    let noise = GivenNoise { values: if mode == Mode::Sde { case.f64s("noise") } else { Vec::new() } };
    let ours = sample(&model, &sampler, &batch, &noise, |_| {}).map_err(|e| e.to_string())?;

    let single = |values: &[f64]| values.iter().map(|&v| v as f32).collect::<Vec<f32>>();
    close_relative("samples", &single(&ours), &single(&case.f64s("samples")), 1e-4)
}
