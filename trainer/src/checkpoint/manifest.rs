//! `manifest.json`: what a checkpoint holds and where.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Array;
use crate::objective::LossScaler;

pub(super) const FORMAT: &str = "repa-dist checkpoint";
pub(super) const MANIFEST: &str = "manifest.json";
pub(super) const MANIFEST_DIGEST: &str = "manifest.xxh3";
pub(super) const VERSION: u32 = 1;

/// Where a run stands.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// Optimizer steps done.
    pub step: u64,
    /// Samples seen, over all ranks: where the data order goes on.
    pub samples: u64,
    /// Steps that AdamW has made (steps that were left out do not count).
    pub updates: u64,
    /// Loss scaling of float16.
    pub scaler: LossScaler,
}

/// What a run trained on, as far as going on depends on it: its place in the data is of no meaning in others, and other
/// encoders are other targets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataRecord {
    /// Samples of the data.
    pub samples: u64,
    /// The ids of the encoders that the run aligns to, whether features are stored or not.
    pub encoders: Vec<String>,
}

impl DataRecord {
    /// What a run that goes on has otherwise: a key for `run.allow_changed`, what was and what is. Of encoders the kind
    /// counts, and not the digest behind it: files of one model differ.
    pub fn differences(&self, now: &Self) -> Vec<(&'static str, String, String)> {
        let kinds = |encoders: &[String]| {
            let digest = |end: &str| end.len() == 8 && end.bytes().all(|b| b.is_ascii_hexdigit());
            let kind = |id: &String| match id.rsplit_once('-') {
                Some((kind, end)) if digest(end) => kind.to_owned(),
                _ => id.clone(),
            };
            encoders.iter().map(kind).collect::<Vec<_>>()
        };
        let mut found = Vec::new();
        if self.samples != now.samples {
            found.push(("data.samples", self.samples.to_string(), now.samples.to_string()));
        }
        if kinds(&self.encoders) != kinds(&now.encoders) {
            found.push(("alignment.encoders", self.encoders.join(", "), now.encoders.join(", ")));
        }
        found
    }
}

/// What a checkpoint says of the run, besides its tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct About {
    /// Where the run stands.
    pub progress: Progress,
    /// Its merged configuration.
    pub config: serde_json::Value,
    /// Means since the save before, by name.
    pub metrics: BTreeMap<String, f64>,
    /// The step that the run was sent back to last, if it was.
    pub branch: Option<u64>,
    /// Whether each node keeps its own ranks' shards only.
    pub node_local: bool,
    /// What the run trains on, where that is known.
    pub data: Option<DataRecord>,
}

/// One contiguous part of a tensor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Piece {
    /// Number of the shard file that holds it.
    pub shard: usize,
    /// Where it begins in that file, in bytes.
    pub offset: u64,
    /// Its first element in the flattened tensor.
    pub start: usize,
    /// One past its last element.
    pub end: usize,
}

/// One tensor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorRecord {
    /// Element type; `F32`.
    pub dtype: String,
    /// Shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// Its parts, by ascending start; together they are the whole tensor.
    pub pieces: Vec<Piece>,
}

/// One shard file, as its writer reports it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardRecord {
    /// File name.
    pub file: String,
    /// Its size.
    pub bytes: u64,
    /// xxh3 of the file, 64 bits, hexadecimal.
    pub xxh3: String,
    /// What it holds: array, index of the parameter in the layout, piece.
    pub pieces: Vec<(Array, usize, Piece)>,
}

/// A checkpoint's `manifest.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Always `repa-dist checkpoint`.
    pub format: String,
    /// Version of the format.
    pub version: u32,
    /// Version of the program that wrote it.
    pub program: String,
    /// Where the run stood.
    pub progress: Progress,
    /// Ranks that wrote it.
    pub world_size: usize,
    /// Whether each node has only its own ranks' shards, on a disk of its own.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub node_local: bool,
    /// The step that the run was sent back to last, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch: Option<u64>,
    /// What the run trained on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<DataRecord>,
    /// Means since the save before.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metrics: BTreeMap<String, f64>,
    /// The run's merged configuration.
    pub config: serde_json::Value,
    /// The shard files.
    pub shards: Vec<Shard>,
    /// Tensors by array and name.
    pub tensors: BTreeMap<Array, BTreeMap<String, TensorRecord>>,
}

/// One shard file in the manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shard {
    /// File name.
    pub file: String,
    /// Its size.
    pub bytes: u64,
    /// xxh3 of the file, 64 bits, hexadecimal.
    pub xxh3: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_data_and_other_encoders_are_told_by_their_keys() {
        let of = |samples, encoders: &[&str]| DataRecord {
            samples,
            encoders: encoders.iter().map(|&id| id.to_owned()).collect(),
        };
        let keys = |a: &DataRecord, b: &DataRecord| a.differences(b).iter().map(|d| d.0).collect::<Vec<_>>();
        let first = of(7, &["dinov2-vit-b-0123abcd"]);
        assert!(
            first.differences(&of(7, &["dinov2-vit-b-ffffffff"])).is_empty(),
            "another file of the model"
        );
        assert_eq!(keys(&first, &of(8, &["dinov2-vit-b-0123abcd"])), ["data.samples"]);
        assert_eq!(keys(&first, &of(7, &["mae-vit-b-0123abcd"])), ["alignment.encoders"]);
        assert_eq!(keys(&first, &of(9, &[])), ["data.samples", "alignment.encoders"]);
        assert_eq!(keys(&of(7, &["emoji-small"]), &of(7, &["emoji-large"])), ["alignment.encoders"]);
    }
}
