//! Whole training steps: model, losses, gradients, clipping, AdamW and EMA.

use std::sync::Arc;

use repa_trainer::Tensor;
use repa_trainer::model::{Sit, SitConfig};
use repa_trainer::objective::{Path, Weighting, alignment_loss, denoising_loss, interpolate};
use repa_trainer::optim::{AdamW, clip_coefficient, ema_update, global_norm};
use repa_trainer::params::{Layout, Params};

use crate::case::{Case, device};
use crate::compare::{close, close_relative, distance, norm};

/// The model that a case's config describes.
pub fn model_config(case: &Case) -> SitConfig {
    let config = SitConfig {
        input_size: case.usize("input_size", 32),
        patch_size: case.usize("patch_size", 2),
        in_channels: case.usize("in_channels", 4),
        hidden_size: case.usize("hidden_size", 1152),
        depth: case.usize("depth", 28),
        num_heads: case.usize("num_heads", 16),
        mlp_ratio: case.f64("mlp_ratio", 4.0),
        num_classes: case.usize("num_classes", 1000),
        encoder_depth: case.usize("encoder_depth", 8),
        projector_dim: case.usize("projector_dim", 2048),
        z_dims: case.usizes("z_dims", &[768]),
        qk_norm: case.bool("qk_norm", false),
    };
    config.validate().unwrap_or_else(|e| panic!("{e}"));
    config
}

/// The trainable parameters under `prefix.` as one flat array.
fn flat(case: &Case, layout: &Layout, prefix: &str) -> Vec<f32> {
    let trainable = layout.entries().iter().filter(|e| e.trainable);
    trainable.flat_map(|entry| case.f32s(&format!("{prefix}.{}", entry.name))).collect()
}

/// Training state on the host.
struct State {
    params: Vec<f32>,
    ema: Vec<f32>,
    exp_avg: Vec<f32>,
    exp_avg_sq: Vec<f32>,
}

/// Replays the case's steps.
pub fn check(case: &Case) -> Result<(), String> {
    let config = model_config(case);
    let layout = Arc::new(config.layout());
    case.weights.under("init").check(&layout).map_err(|e| e.to_string())?;
    let init = flat(case, &layout, "init");
    let zeros = vec![0.0; init.len()];
    let mut state =
        State { params: init.clone(), ema: init.clone(), exp_avg: zeros.clone(), exp_avg_sq: zeros };
    for k in 0..case.usize("steps", 1) {
        step(case, &config, &layout, &mut state, k).map_err(|e| format!("step {k}: {e}"))?;
    }
    let expected = flat(case, &layout, "final");
    close("parameters", &state.params, &expected, 1e-4, distance(&expected, &init))?;
    for entry in layout.entries() {
        let reference = case.f32s(&format!("ema.{}", entry.name));
        let ours = if entry.trainable {
            state.ema[entry.offset..entry.offset + entry.len()].to_vec()
        } else {
            frozen(case, &layout, &entry.name)?
        };
        close_relative(&format!("ema.{}", entry.name), &ours, &reference, 1e-6)?;
    }
    Ok(())
}

/// Our value of a frozen parameter, after a check that the reference's neither began nor ended
/// elsewhere.
fn frozen(case: &Case, layout: &Arc<Layout>, name: &str) -> Result<Vec<f32>, String> {
    let params = Params::from_flat(layout, &vec![0.0; layout.trainable_len()], &device());
    let ours = host(params.get::<3>(name));
    close_relative(name, &ours, &case.f32s(&format!("init.{name}")), 1e-6)?;
    close_relative(name, &ours, &case.f32s(&format!("final.{name}")), 1e-6)?;
    Ok(ours)
}

fn step(
    case: &Case,
    config: &SitConfig,
    layout: &Arc<Layout>,
    state: &mut State,
    k: usize,
) -> Result<(), String> {
    let device = device().autodiff();
    let name = |what: &str| format!("step{k}.{what}");
    let params = Params::from_flat(layout, &state.params, &device);
    let model = Sit::bind(config, &params);

    let moments = case.tensor::<4>(&name("moments"), &device);
    let channels = config.in_channels;
    let (mean, std) = (moments.clone().narrow(1, 0, channels), moments.narrow(1, channels, channels));
    let eps = case.tensor::<4>(&name("posterior_eps"), &device);
    let latent = (mean + std * eps) * case.f64("latents_scale", 0.18215);

    let path = match case.str("path_type", "linear") {
        "linear" => Path::Linear,
        "cosine" => Path::Cosine,
        other => return Err(format!("path_type {other:?} is unknown")),
    };
    let t = times(case, path, k)?;
    let t = Tensor::<1>::from_data(t.as_slice(), &device);
    let labels = Tensor::from_data(case.i64s(&name("labels")).as_slice(), &device);
    let (x, target) = interpolate(path, latent, case.tensor(&name("noise"), &device), t.clone());
    let output = model.forward(x, t, labels);
    let features: Vec<Tensor<3>> =
        (0..config.z_dims.len()).map(|i| case.tensor(&name(&format!("z{i}")), &device)).collect();
    if k == 0 {
        let reference = case.f32s("step0.model_output");
        close_relative("model_output", &host(output.velocity.clone()), &reference, 1e-5)?;
        for (i, projected) in output.projected.iter().enumerate() {
            let what = format!("step0.z_tilde{i}");
            close_relative(&what, &host(projected.clone()), &case.f32s(&what), 1e-5)?;
        }
    }

    let denoising = denoising_loss(output.velocity, target);
    let alignment = alignment_loss(output.projected, &features).mean();
    let loss = denoising.clone().mean() + alignment.clone() * case.f64("proj_coeff", 0.5);
    close_relative("denoising_loss", &host(denoising), &case.f32s(&name("denoising_loss")), 1e-5)?;
    close_relative("proj_loss", &host(alignment), &case.f32s(&name("proj_loss")), 1e-5)?;
    close_relative("loss", &host(loss.clone()), &case.f32s(&name("loss")), 1e-5)?;

    let mut gradients = vec![0.0; layout.trainable_len()];
    params.gradients(&loss.backward(), &mut gradients);
    if k == 0 {
        check_gradients(case, layout, &gradients)?;
    }
    let total = global_norm(&gradients);
    close_relative("grad_norm", &[total as f32], &case.f32s(&name("grad_norm")), 1e-4)?;

    let betas = case.config.get("betas").and_then(|b| Some((b.get(0)?.as_f64()?, b.get(1)?.as_f64()?)));
    let (beta1, beta2) = betas.unwrap_or((0.9, 0.999));
    let adamw = AdamW {
        lr: case.f64("learning_rate", 1e-4),
        beta1,
        beta2,
        eps: case.f64("adam_epsilon", 1e-8),
        weight_decay: case.f64("weight_decay", 0.0),
    };
    let clip = clip_coefficient(total, case.f64("max_grad_norm", 1.0));
    let State { params, ema, exp_avg, exp_avg_sq } = state;
    adamw.step(k as u64 + 1, params, &gradients, clip, exp_avg, exp_avg_sq);
    ema_update(ema, params, case.f64("ema_decay", 0.9999));
    Ok(())
}

/// The step's times; where the case holds the normal draws behind them, ours must be the same.
fn times(case: &Case, path: Path, k: usize) -> Result<Vec<f32>, String> {
    let t = case.f32s(&format!("step{k}.t"));
    match case.str("weighting", "uniform") {
        "uniform" => {}
        "lognormal" => {
            let draws = case.f32s(&format!("step{k}.t_normal"));
            let ours: Vec<f32> = draws.iter().map(|&n| Weighting::Lognormal.time(path, 0.0, n)).collect();
            close_relative("t", &ours, &t, 1e-6)?;
        }
        other => return Err(format!("weighting {other:?} is unknown")),
    }
    Ok(t)
}

fn check_gradients(case: &Case, layout: &Layout, ours: &[f32]) -> Result<(), String> {
    let all = norm(&flat(case, layout, "step0.grad"));
    for entry in layout.entries().iter().filter(|e| e.trainable) {
        let name = format!("step0.grad.{}", entry.name);
        let reference = case.f32s(&name);
        let scale = norm(&reference).max(1e-5 * all);
        close(&name, &ours[entry.offset..entry.offset + entry.len()], &reference, 1e-4, scale)?;
    }
    Ok(())
}

fn host<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().expect("float32")
}
