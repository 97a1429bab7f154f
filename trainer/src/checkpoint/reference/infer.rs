//! The configuration of a foreign checkpoint, from the shapes of its tensors and from its arguments.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::Value as Json;

use super::source::{Foreign, Slot};
use super::{Options, ReferenceError};
use crate::config::{Config, WeightingName};
use crate::model::{PRESETS, Precision, SitConfig};
use crate::objective;

/// The configuration, and a sentence about everything in it that had to be assumed. The tensors are
/// yet to be checked against its layout.
pub(super) fn config(
    path: &Path,
    foreign: &Foreign,
    options: &Options,
) -> Result<(Config, Vec<String>), ReferenceError> {
    foreign.check_size()?;
    if let Some(config) = &foreign.config {
        let sit = config.sit();
        sit.validate().map_err(|problem| ReferenceError::Model { path: path.to_owned(), problem })?;
        // The layout allocates a position embedding of this size.
        let [_, tokens, hidden] = shape(path, &foreign.model, "pos_embed")?;
        if (tokens, hidden) != (sit.tokens(), sit.hidden_size) {
            let problem =
                format!("its configuration makes a pos_embed of [1, {}, {}]", sit.tokens(), sit.hidden_size);
            return Err(ReferenceError::foreign(path, problem));
        }
        return Ok((config.clone(), Vec::new()));
    }
    let mut assumed = Vec::new();
    let options = &Options { encoder_depth: options.encoder_depth.or(foreign.encoder_depth), ..*options };
    let sit = model(path, &foreign.model, &foreign.args, options, &mut assumed)?;
    let mut config = Config::default();
    // The file says nothing of the data.
    config.data.dir = PathBuf::new();
    let (model, alignment) = (&mut config.model, &mut config.alignment);
    model.input_size = sit.input_size;
    model.in_channels = sit.in_channels;
    model.patch_size = sit.patch_size;
    model.hidden_size = sit.hidden_size;
    model.depth = sit.depth;
    model.num_heads = sit.num_heads;
    model.mlp_ratio = sit.mlp_ratio;
    model.num_classes = sit.num_classes;
    model.qk_norm = sit.qk_norm;
    alignment.encoder_depth = sit.encoder_depth;
    alignment.projector_dim = sit.projector_dim;
    alignment.z_dims = sit.z_dims;
    from_args(&mut config, &foreign.args, &mut assumed);
    Ok((config, assumed))
}

/// Settings that the reference's arguments name. What decides no tensor takes the default where a value
/// cannot be used.
fn from_args(config: &mut Config, args: &Json, assumed: &mut Vec<String>) {
    let number = |key: &str, wanted: fn(f64) -> bool, out: &mut f64| {
        if let Some(value) = args.get(key).and_then(Json::as_f64).filter(|v| wanted(*v)) {
            *out = value;
        }
    };
    let positive = |v: f64| v > 0.0;
    let natural = |v: f64| v >= 0.0;
    let fraction = |v: f64| (0.0..1.0).contains(&v);
    let optimizer = &mut config.optimizer;
    number("learning_rate", positive, &mut optimizer.learning_rate);
    number("adam_beta1", fraction, &mut optimizer.beta1);
    number("adam_beta2", fraction, &mut optimizer.beta2);
    number("adam_epsilon", positive, &mut optimizer.epsilon);
    number("adam_weight_decay", natural, &mut optimizer.weight_decay);
    number("max_grad_norm", positive, &mut optimizer.max_grad_norm);
    number("proj_coeff", natural, &mut config.alignment.coefficient);
    config.objective.label_drop = label_drop(args, assumed);
    let whole = |key: &str| args.get(key).and_then(Json::as_u64).filter(|&n| n > 0 && n < 1 << 32);
    if let Some(steps) = whole("max_train_steps") {
        config.train.steps = steps;
    }
    // A step of the reference is of so many passes, each over batch_size images of all ranks.
    let passes = whole("gradient_accumulation_steps").unwrap_or(1);
    match whole("batch_size").and_then(|batch| batch.checked_mul(passes)).filter(|&n| n < 1 << 32) {
        Some(batch) => config.train.global_batch = batch as usize,
        None => assumed.push(format!(
            "the file does not say the batch size: train.global_batch is {}",
            config.train.global_batch
        )),
    }
    if let Some(seed) = args.get("seed").and_then(Json::as_u64).filter(|&seed| seed < 1 << 63) {
        config.train.seed = seed;
    }
    let text = |key: &str| args.get(key).and_then(Json::as_str);
    match text("mixed_precision") {
        Some("fp16") => config.train.precision = Precision::F16,
        Some("bf16") => config.train.precision = Precision::Bf16,
        _ => {}
    }
    match text("path_type") {
        Some("linear") => config.objective.path = objective::Path::Linear,
        Some("cosine") => config.objective.path = objective::Path::Cosine,
        None => {}
        Some(other) => assumed.push(format!("args.path_type {other:?} is unknown: objective.path is linear")),
    }
    match text("weighting") {
        Some("uniform") => config.objective.weighting = WeightingName::Uniform,
        Some("lognormal") => config.objective.weighting = WeightingName::Lognormal,
        None => {}
        Some(other) => {
            assumed.push(format!("args.weighting {other:?} is unknown: objective.weighting is uniform"))
        }
    }
}

/// How often training hides a label. The reference's model does so with probability 0.1 by itself
/// (`class_dropout_prob` of models/sit.py). Its train.py did it besides, with `cfg_prob`, before there was `--legacy`
/// and does so with that now.
fn label_drop(args: &Json, assumed: &mut Vec<String>) -> f32 {
    const MODEL: f64 = 0.1;
    let besides = args.get("cfg_prob").and_then(Json::as_f64).filter(|p| (0.0..1.0).contains(p));
    let twice = args.get("legacy").and_then(Json::as_bool).unwrap_or(true);
    match besides {
        Some(besides) if twice && besides > 0.0 => {
            let dropped = 1.0 - (1.0 - MODEL) * (1.0 - besides);
            assumed.push(format!(
                "labels were dropped twice, by the model ({MODEL}) and by train.py (cfg_prob = {besides}), as the \
                 reference does without --no-legacy: objective.label_drop is {dropped:.2}"
            ));
            // Of few digits, as people would write it.
            format!("{dropped:.4}").parse().unwrap_or(dropped as f32)
        }
        _ => MODEL as f32,
    }
}

fn model(
    path: &Path,
    model: &[Slot],
    args: &Json,
    options: &Options,
    assumed: &mut Vec<String>,
) -> Result<SitConfig, ReferenceError> {
    let foreign = |problem: String| ReferenceError::foreign(path, problem);
    let [hidden, in_channels, patch, _] = shape(path, model, "x_embedder.proj.weight")?;
    let [_, tokens, width] = shape(path, model, "pos_embed")?;
    let [rows, _] = shape(path, model, "y_embedder.embedding_table.weight")?;
    let [mlp, _] = shape(path, model, "blocks.0.mlp.fc1.weight")?;
    if width != hidden {
        return Err(foreign(format!(
            "pos_embed is {width} wide where x_embedder makes tokens of width {hidden}"
        )));
    }
    let grid = tokens.isqrt();
    if grid * grid != tokens {
        return Err(foreign(format!("pos_embed has {tokens} tokens, which is no square")));
    }
    let num_classes = rows.saturating_sub(1);
    match args.get("num_classes").and_then(Json::as_u64) {
        Some(classes) if classes != num_classes as u64 => {
            return Err(foreign(format!(
                "y_embedder has {rows} rows, where {classes} classes and the null class of classifier-free \
                 guidance have {}",
                classes.saturating_add(1)
            )));
        }
        _ => {}
    }
    let numbered = |prefix: &str| -> usize {
        let number = |slot: &Slot| slot.name.strip_prefix(prefix)?.split('.').next()?.parse::<usize>().ok();
        model.iter().filter_map(number).collect::<BTreeSet<_>>().len()
    };
    let z_dims = (0..numbered("projectors."))
        .map(|i| shape(path, model, &format!("projectors.{i}.4.weight")).map(|[z, _]| z))
        .collect::<Result<Vec<_>, _>>()?;
    let mut sit = SitConfig {
        input_size: grid.saturating_mul(patch),
        patch_size: patch,
        in_channels,
        hidden_size: hidden,
        depth: numbered("blocks."),
        num_heads: 1,
        mlp_ratio: mlp as f64 / hidden.max(1) as f64,
        num_classes,
        encoder_depth: 1,
        projector_dim: 2048,
        qk_norm: model.iter().any(|slot| slot.name == "blocks.0.attn.q_norm.weight"),
        z_dims,
    };
    if !sit.z_dims.is_empty() {
        [sit.projector_dim, _] = shape(path, model, "projectors.0.0.weight")?;
    }
    // The width is the product rounded down.
    if sit.mlp_hidden() < mlp {
        sit.mlp_ratio = sit.mlp_ratio.next_up();
    }
    let preset = preset(&sit, args);
    sit.num_heads = num_heads(path, model, args, options, &preset, hidden)?;
    sit.encoder_depth = encoder_depth(&sit, args, options, &preset, assumed);
    sit.validate().map_err(|problem| ReferenceError::Model { path: path.to_owned(), problem })?;
    Ok(sit)
}

/// The preset that `args.model` names, or else the one of this width and depth.
fn preset(sit: &SitConfig, args: &Json) -> Option<SitConfig> {
    let named = args.get("model").and_then(Json::as_str);
    let fits = |preset: &SitConfig| (preset.hidden_size, preset.depth) == (sit.hidden_size, sit.depth);
    named.into_iter().chain(PRESETS).filter_map(|name| SitConfig::preset(name).ok()).find(fits)
}

fn num_heads(
    path: &Path,
    model: &[Slot],
    args: &Json,
    options: &Options,
    preset: &Option<SitConfig>,
    hidden: usize,
) -> Result<usize, ReferenceError> {
    let said = args.get("num_heads").and_then(Json::as_u64).map(|heads| heads as usize);
    // The norms of queries and keys are as wide as a head.
    let norm = model.iter().find(|slot| slot.name == "blocks.0.attn.q_norm.weight");
    let by_norm = norm.and_then(|slot| hidden.checked_div(*slot.shape.first()?));
    let found = options.num_heads.or(said).or(by_norm).or(preset.as_ref().map(|preset| preset.num_heads));
    found.ok_or_else(|| ReferenceError::NumHeads {
        path: path.to_owned(),
        model: args.get("model").map_or("missing".to_owned(), Json::to_string),
        hidden,
    })
}

/// Where the projectors read, which no tensor shows. The reference's default is 8.
fn encoder_depth(
    sit: &SitConfig,
    args: &Json,
    options: &Options,
    preset: &Option<SitConfig>,
    assumed: &mut Vec<String>,
) -> usize {
    let said = args.get("encoder_depth").and_then(Json::as_u64).map(|depth| depth as usize);
    if let Some(depth) = options.encoder_depth.or(said) {
        return depth;
    }
    let depth = preset.as_ref().map_or(8, |preset| preset.encoder_depth).min(sit.depth);
    if !sit.z_dims.is_empty() {
        assumed.push(format!(
            "the file does not say after which block the projectors read: alignment.encoder_depth is {depth} \
             (--encoder-depth N says otherwise)"
        ));
    }
    depth
}

/// The shape of a tensor that every SiT has.
fn shape<const D: usize>(path: &Path, model: &[Slot], name: &str) -> Result<[usize; D], ReferenceError> {
    let slot = model
        .iter()
        .find(|slot| slot.name == name)
        .ok_or_else(|| ReferenceError::foreign(path, format!("model has no {name}, which every SiT has")))?;
    slot.shape.as_slice().try_into().map_err(|_| {
        ReferenceError::foreign(
            path,
            format!("model.{name} is {:?}, where {D} dimensions belong", slot.shape),
        )
    })
}
