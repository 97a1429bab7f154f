//! The layouts in which encoders' weights are published, all read into the names of DINOv2's release.

use std::collections::BTreeMap;

use super::EncoderError;
use super::family::Family;
use super::vit::VitConfig;
use crate::weights::{RawTensor, Weights};

/// What the patches' projection is called, by which a layout is known.
const PROJECTIONS: [(&str, &str); 4] = [
    ("patch_embed.proj.weight", "official names"),
    ("embeddings.patch_embeddings.projection.weight", "Hugging Face's"),
    ("embeddings.patch_embedding.weight", "Hugging Face's for CLIP"),
    ("conv1.weight", "OpenAI's for CLIP, beside class_embedding"),
];

/// The tensors under the official names, and whose model they are, from any of these layouts: official
/// (`blocks.3.attn.qkv.weight`, or in chunks `blocks.0.3.attn.qkv.weight`), Hugging Face's
/// (`encoder.layer.3.attention.attention.query.weight`, `...attention.q_proj.weight`, for CLIP
/// `encoder.layers.3.self_attn.q_proj.weight`) and OpenAI's (`transformer.resblocks.3.attn.in_proj_weight`),
/// at the top or under a common prefix such as `teacher.backbone.` (what lies beside is left out, as are heads,
/// decoders and `mask_token`). Names that are in no layout stay as they are.
///
/// # Errors
/// There is no projection of patches, by which layouts are known; or no family was asked for, and the
/// weights do not show it.
pub fn official(weights: &Weights, asked: Option<Family>) -> Result<(Family, Weights), EncoderError> {
    let unknown = |problem: String| EncoderError::Unknown { path: weights.path.clone(), problem };
    let prefix = find_prefix(weights).ok_or_else(|| {
        unknown(format!(
            "none of {} is among its {} tensors, which begin with {}",
            PROJECTIONS.map(|(name, whose)| format!("{name} ({whose})")).join(", "),
            weights.tensors.len(),
            weights.tensors.keys().take(4).cloned().collect::<Vec<_>>().join(", ")
        ))
    })?;
    let mut tensors = BTreeMap::new();
    for (name, tensor) in &weights.tensors {
        if let Some(inner) = name.strip_prefix(&prefix)
            && !beside(inner)
        {
            tensors.insert(rename(inner), tensor.clone());
        }
    }
    fuse_qkv(&mut tensors);
    // CLIP's lack the dimension of the batch.
    for name in ["cls_token", "pos_embed"] {
        if let Some(tensor) = tensors.get_mut(name) {
            while tensor.shape.len() < 3 {
                tensor.shape.insert(0, 1);
            }
        }
    }
    let family = asked.or_else(|| shown(&tensors)).ok_or_else(|| {
        let path = weights.path.display();
        unknown(format!(
            "its tensors are named alike in DINO's, MoCo v3's and MAE's models: say whose it is by dinov1:{path}, \
             mocov3:{path} or mae:{path}"
        ))
    })?;
    if !family.final_norm() {
        tensors.retain(|name, _| !matches!(name.as_str(), "norm.weight" | "norm.bias"));
    }
    Ok((family, Weights { path: weights.path.clone(), tensors, metadata: weights.metadata.clone() }))
}

/// What stands before the name of the patches' projection; the shortest, if several do.
fn find_prefix(weights: &Weights) -> Option<String> {
    let before = |name: &String| {
        let (suffix, _) = PROJECTIONS.iter().find(|(suffix, _)| name.ends_with(suffix))?;
        let rest = name.strip_suffix(suffix)?;
        let is_clip = || weights.tensors.contains_key(&format!("{rest}class_embedding"));
        let fits = (rest.is_empty() || rest.ends_with('.')) && (*suffix != "conv1.weight" || is_clip());
        fits.then(|| rest.to_owned())
    };
    weights.tensors.keys().filter_map(before).min_by_key(String::len)
}

/// Whether a tensor is no part of what gives features: it is used in training only, or for classes.
fn beside(name: &str) -> bool {
    let first = name.split('.').next().unwrap_or(name);
    matches!(name, "mask_token" | "embeddings.mask_token" | "embeddings.position_ids" | "proj")
        || matches!(first, "head" | "fc" | "pooler" | "ln_post" | "post_layernorm")
        || first.starts_with("decoder")
}

/// Whose model it is, where the tensors show that.
fn shown(tensors: &BTreeMap<String, RawTensor>) -> Option<Family> {
    let has = |name: &str| tensors.contains_key(name);
    if has("blocks.0.ls1.gamma") {
        Some(Family::DinoV2)
    } else if has("norm_pre.weight") {
        Some(Family::Clip)
    } else if !has("cls_token") {
        Some(Family::IJepa)
    } else {
        None
    }
}

/// The official name; queries, keys and values stay apart as `attn.{q,k,v}` until they are fused.
fn rename(name: &str) -> String {
    let top = match name {
        "embeddings.cls_token" | "class_embedding" | "embeddings.class_embedding" => "cls_token",
        "embeddings.position_embeddings"
        | "positional_embedding"
        | "embeddings.position_embedding.weight" => "pos_embed",
        "embeddings.register_tokens" => "register_tokens",
        "embeddings.patch_embeddings.projection.weight"
        | "conv1.weight"
        | "embeddings.patch_embedding.weight" => "patch_embed.proj.weight",
        "embeddings.patch_embeddings.projection.bias" => "patch_embed.proj.bias",
        "layernorm.weight" => "norm.weight",
        "layernorm.bias" => "norm.bias",
        // The second is Hugging Face's spelling.
        "ln_pre.weight" | "pre_layrnorm.weight" => "norm_pre.weight",
        "ln_pre.bias" | "pre_layrnorm.bias" => "norm_pre.bias",
        _ => "",
    };
    if !top.is_empty() {
        return top.to_owned();
    }
    if let Some(rest) = name.strip_prefix("blocks.") {
        // In chunks: the second number is the block's, counted over all chunks.
        let mut parts = rest.splitn(3, '.');
        if let (Some(_), Some(block), Some(inner)) = (parts.next(), parts.next(), parts.next())
            && block.bytes().all(|b| b.is_ascii_digit())
        {
            return format!("blocks.{block}.{inner}");
        }
        return mended(rest).map_or_else(|| name.to_owned(), |rest| format!("blocks.{rest}"));
    }
    let layer = ["encoder.layer.", "encoder.layers.", "layer.", "layers.", "transformer.resblocks."]
        .iter()
        .find_map(|prefix| name.strip_prefix(prefix))
        .and_then(|rest| rest.split_once('.'));
    layer
        .and_then(|(block, inner)| Some(format!("blocks.{block}.{}", rename_inner(inner)?)))
        .unwrap_or_else(|| name.to_owned())
}

/// A large model of MoCo v3 is in circulation with some names wrong, which the reference mends
/// (`fix_mocov3_state_dict`).
fn mended(rest: &str) -> Option<String> {
    const WRONG: [(&str, &str); 4] = [
        ("13.norm13.", "13.norm1."),
        ("13.mlp.fc13.", "13.mlp.fc1."),
        ("14.norm14.", "14.norm2."),
        ("14.mlp.fc14.", "14.mlp.fc2."),
    ];
    WRONG.iter().find_map(|(wrong, right)| Some(format!("{right}{}", rest.strip_prefix(wrong)?)))
}

/// Within a layer of Hugging Face's or OpenAI's.
fn rename_inner(name: &str) -> Option<String> {
    match name {
        "attn.in_proj_weight" => return Some("attn.qkv.weight".to_owned()),
        "attn.in_proj_bias" => return Some("attn.qkv.bias".to_owned()),
        _ => {}
    }
    let (module, kind) = name.rsplit_once('.')?;
    let module = match module {
        "norm1" | "norm2" | "mlp.fc1" | "mlp.fc2" => module,
        "layernorm_before" | "layer_norm1" | "ln_1" => "norm1",
        "layernorm_after" | "layer_norm2" | "ln_2" => "norm2",
        "attention.attention.query"
        | "attention.attention.q_proj"
        | "attention.q_proj"
        | "self_attn.q_proj" => "attn.q",
        "attention.attention.key"
        | "attention.attention.k_proj"
        | "attention.k_proj"
        | "self_attn.k_proj" => "attn.k",
        "attention.attention.value"
        | "attention.attention.v_proj"
        | "attention.v_proj"
        | "self_attn.v_proj" => "attn.v",
        "attention.output.dense"
        | "attention.o_proj"
        | "attention.out_proj"
        | "self_attn.out_proj"
        | "attn.out_proj" => "attn.proj",
        "layer_scale1" if kind == "lambda1" => return Some("ls1.gamma".to_owned()),
        "layer_scale2" if kind == "lambda1" => return Some("ls2.gamma".to_owned()),
        "intermediate.dense" | "mlp.c_fc" => "mlp.fc1",
        "output.dense" | "mlp.c_proj" => "mlp.fc2",
        "mlp.weights_in" => "mlp.w12",
        "mlp.weights_out" => "mlp.w3",
        _ => return None,
    };
    Some(format!("{module}.{kind}"))
}

/// Joins `attn.q`, `attn.k`, `attn.v` to `attn.qkv` where all three are there and fit together.
fn fuse_qkv(tensors: &mut BTreeMap<String, RawTensor>) {
    let found: Vec<(String, String)> = tensors
        .keys()
        .filter_map(|n| n.rsplit_once(".attn.q."))
        .map(|(block, kind)| (block.to_owned(), kind.to_owned()))
        .collect();
    for (block, kind) in found {
        let name = |part: &str| format!("{block}.attn.{part}.{kind}");
        let parts: Vec<&RawTensor> = ["q", "k", "v"].iter().filter_map(|p| tensors.get(&name(p))).collect();
        let [q, k, v] = parts[..] else { continue };
        if q.shape.is_empty() || [k, v].iter().any(|t| t.shape != q.shape || t.dtype != q.dtype) {
            continue;
        }
        let mut shape = q.shape.clone();
        shape[0] *= 3;
        let fused =
            RawTensor { dtype: q.dtype, shape, bytes: [&q.bytes[..], &k.bytes[..], &v.bytes[..]].concat() };
        for part in ["q", "k", "v"] {
            tensors.remove(&name(part));
        }
        tensors.insert(name("qkv"), fused);
    }
}

/// The model's shape, from its tensors' (official names).
///
/// # Errors
/// A tensor that tells the shape is missing or has an impossible shape.
pub fn infer(weights: &Weights, family: Family) -> Result<VitConfig, EncoderError> {
    let unknown = |problem: String| EncoderError::Unknown { path: weights.path.clone(), problem };
    let shape = |name: &str, rank: usize| {
        let shape = &weights
            .tensors
            .get(name)
            .ok_or_else(|| unknown(format!("{name} is missing, from which its shape would follow")))?
            .shape;
        if shape.len() == rank && shape.iter().all(|&s| s > 0) {
            Ok(shape.clone())
        } else {
            Err(unknown(format!("{name} has shape {shape:?} where {rank} dimensions belong")))
        }
    };
    let projection = shape("patch_embed.proj.weight", 4)?;
    let (embed_dim, patch_size) = (projection[0], projection[3]);
    if family == Family::Clip && embed_dim > 1024 {
        // Those of LAION are as wide: their GELU is another, which no tensor tells, and their heads are wider.
        return Err(unknown(format!(
            "OpenAI has no CLIP of width {embed_dim}, and others' differ in ways not read here"
        )));
    }
    let positions = shape("pos_embed", 3)?[1].saturating_sub(usize::from(family.class_token()));
    let grid = positions.isqrt();
    if grid == 0 || grid * grid != positions {
        return Err(unknown(format!("pos_embed holds {positions} patch positions, which is no square grid")));
    }
    let registers =
        if weights.tensors.contains_key("register_tokens") { shape("register_tokens", 3)?[1] } else { 0 };
    let depth = weights
        .tensors
        .keys()
        .filter_map(|n| n.strip_prefix("blocks.")?.split('.').next()?.parse::<usize>().ok())
        .max()
        // A stray huge number must not make a huge layout: no more blocks than tensors.
        .map_or(0, |last| last.saturating_add(1).min(weights.tensors.len()));
    let swiglu = weights.tensors.contains_key("blocks.0.mlp.w12.weight");
    let mlp_hidden = if swiglu {
        shape("blocks.0.mlp.w12.weight", 2)?[0] / 2
    } else {
        shape("blocks.0.mlp.fc1.weight", 2)?[0]
    };
    let num_heads = match weights.metadata.get("num_heads") {
        Some(text) => {
            text.parse().map_err(|_| unknown(format!("its metadata num_heads is {text:?}, not a number")))?
        }
        None => family.heads(embed_dim),
    };
    if num_heads == 0 || !embed_dim.is_multiple_of(num_heads) {
        return Err(unknown(format!(
            "a width of {embed_dim} does not divide into {num_heads} heads; a model that is none of the published \
             needs safetensors metadata num_heads"
        )));
    }
    Ok(VitConfig { family, embed_dim, depth, num_heads, patch_size, registers, swiglu, mlp_hidden, grid })
}
