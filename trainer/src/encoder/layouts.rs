//! The layouts in which DINOv2 weights are published, all read into the official names.

use std::collections::BTreeMap;

use super::EncoderError;
use super::dinov2::DinoV2Config;
use crate::weights::{RawTensor, Weights};

/// Heads are 64 wide in every published model; a file says otherwise in metadata `num_heads`.
const HEAD_DIM: usize = 64;

/// The tensors under the official names, from any of the layouts:
/// official (`blocks.3.attn.qkv.weight`, or in chunks `blocks.0.3.attn.qkv.weight`), and Hugging
/// Face's (`encoder.layer.3.attention.attention.query.weight`, or `...attention.q_proj.weight`),
/// at the top or under a common prefix such as `teacher.backbone.` (what lies beside is left out,
/// as is `mask_token`). Names that are in no layout stay as they are.
///
/// # Errors
/// There is no class token, by which both layouts are known.
pub fn official(weights: &Weights) -> Result<Weights, EncoderError> {
    let prefix = find_prefix(weights).ok_or_else(|| EncoderError::Unknown {
        path: weights.path.clone(),
        problem: format!(
            "neither cls_token (official names) nor embeddings.cls_token (Hugging Face's) is among its {} \
             tensors, which begin with {}",
            weights.tensors.len(),
            weights.tensors.keys().take(4).cloned().collect::<Vec<_>>().join(", ")
        ),
    })?;
    let mut tensors = BTreeMap::new();
    for (name, tensor) in &weights.tensors {
        if let Some(inner) = name.strip_prefix(&prefix)
            && !matches!(inner, "mask_token" | "embeddings.mask_token")
        {
            tensors.insert(rename(inner), tensor.clone());
        }
    }
    fuse_qkv(&mut tensors);
    Ok(Weights { path: weights.path.clone(), tensors, metadata: weights.metadata.clone() })
}

/// What stands before `cls_token` or `embeddings.cls_token`; the shortest, if several do.
fn find_prefix(weights: &Weights) -> Option<String> {
    let before = |name: &String| {
        let rest = name.strip_suffix("cls_token")?;
        let rest = rest.strip_suffix("embeddings.").unwrap_or(rest);
        (rest.is_empty() || rest.ends_with('.')).then(|| rest.to_owned())
    };
    weights.tensors.keys().filter_map(before).min_by_key(String::len)
}

/// The official name; queries, keys and values stay apart as `attn.{q,k,v}` until they are fused.
fn rename(name: &str) -> String {
    let top = match name {
        "embeddings.cls_token" => "cls_token",
        "embeddings.position_embeddings" => "pos_embed",
        "embeddings.register_tokens" => "register_tokens",
        "embeddings.patch_embeddings.projection.weight" => "patch_embed.proj.weight",
        "embeddings.patch_embeddings.projection.bias" => "patch_embed.proj.bias",
        "layernorm.weight" => "norm.weight",
        "layernorm.bias" => "norm.bias",
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
        return name.to_owned();
    }
    let layer = ["encoder.layer.", "encoder.layers.", "layer.", "layers."]
        .iter()
        .find_map(|prefix| name.strip_prefix(prefix))
        .and_then(|rest| rest.split_once('.'));
    layer
        .and_then(|(block, inner)| Some(format!("blocks.{block}.{}", rename_inner(inner)?)))
        .unwrap_or_else(|| name.to_owned())
}

/// Within a Hugging Face layer.
fn rename_inner(name: &str) -> Option<String> {
    let (module, kind) = name.rsplit_once('.')?;
    let module = match module {
        "norm1" | "norm2" => module,
        "attention.attention.query" | "attention.attention.q_proj" | "attention.q_proj" => "attn.q",
        "attention.attention.key" | "attention.attention.k_proj" | "attention.k_proj" => "attn.k",
        "attention.attention.value" | "attention.attention.v_proj" | "attention.v_proj" => "attn.v",
        "attention.output.dense" | "attention.o_proj" | "attention.out_proj" => "attn.proj",
        "layer_scale1" if kind == "lambda1" => return Some("ls1.gamma".to_owned()),
        "layer_scale2" if kind == "lambda1" => return Some("ls2.gamma".to_owned()),
        "mlp.fc1" | "mlp.fc2" => module,
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
pub fn infer(weights: &Weights) -> Result<DinoV2Config, EncoderError> {
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
    let embed_dim = shape("cls_token", 3)?[2];
    let patch_size = shape("patch_embed.proj.weight", 4)?[3];
    let positions = shape("pos_embed", 3)?[1] - 1;
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
        None => embed_dim / HEAD_DIM,
    };
    if num_heads == 0 || !embed_dim.is_multiple_of(num_heads) {
        return Err(unknown(format!(
            "a width of {embed_dim} does not divide into {num_heads} heads; a model whose heads are not \
             {HEAD_DIM} wide needs safetensors metadata num_heads"
        )));
    }
    Ok(DinoV2Config { embed_dim, depth, num_heads, patch_size, registers, swiglu, mlp_hidden, grid })
}
