//! Where things lie in a shard: the safetensors header, written with room to spare so that a shard
//! can be filled sample by sample, and read back against what the index promises.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::Deserialize;
use serde_json::json;

use super::{Kind, Precision, StoreError, StoreSpec};

/// Longest header that is believed; the real ones have well under 10 KB.
const MAX_HEADER: u64 = 1 << 20;

/// One tensor of a shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Field {
    pub name: String,
    pub dtype: &'static str,
    /// Shape of one sample.
    pub shape: Vec<usize>,
    /// Bytes of one sample.
    pub item: u64,
}

/// Positions in [`fields`], before the encoders' features.
pub(super) const DIGESTS: usize = 0;
pub(super) const LABELS: usize = 1;
pub(super) const IMAGE_ENDS: usize = 2;

/// The tensors of a shard but for the images' bytes, in the order they lie in (widest type first,
/// so that each is aligned to its elements).
pub(super) fn fields(spec: &StoreSpec) -> Vec<Field> {
    let field = |name: &str, dtype: &'static str, element: usize, shape: Vec<usize>| {
        let item = (shape.iter().product::<usize>() * element) as u64;
        Field { name: name.to_owned(), dtype, shape, item }
    };
    let mut fields = vec![field("digests", "I64", 8, vec![]), field("labels", "I64", 8, vec![])];
    if spec.images {
        fields.push(field("image_ends", "I64", 8, vec![]));
    }
    let (name, channels) = match spec.kind {
        Kind::Moments => ("moments", 2 * spec.channels),
        Kind::Latents => ("latents", spec.channels),
    };
    let (dtype, element) = match spec.precision {
        Precision::F32 => ("F32", 4),
        Precision::F16 => ("F16", 2),
    };
    for flipped in if spec.flips { &["", "_flipped"][..] } else { &[""] } {
        let shape = vec![channels, spec.height, spec.width];
        fields.push(field(&format!("{name}{flipped}"), dtype, element, shape));
        for encoder in &spec.encoders {
            let name = format!("features{flipped}.{}", encoder.id);
            fields.push(field(&name, "F16", 2, vec![encoder.tokens, encoder.dim]));
        }
    }
    fields
}

/// Position of the latents in [`fields`]; the encoders' features come next, then the same of the
/// mirrored image.
pub(super) fn latent_field(spec: &StoreSpec) -> usize {
    if spec.images { IMAGE_ENDS + 1 } else { LABELS + 1 }
}

/// The header of a shard of `samples`, padded to its greatest length; data begin at its end.
pub(super) fn header(spec: &StoreSpec, samples: u64, image_bytes: u64) -> Vec<u8> {
    let json = header_json(spec, samples, image_bytes);
    let mut bytes = (header_len(spec) - 8).to_le_bytes().to_vec();
    bytes.extend_from_slice(json.as_bytes());
    bytes.resize(header_len(spec) as usize, b' ');
    bytes
}

/// Length of a shard's header with its length word: the same for every shard of a store.
pub(super) fn header_len(spec: &StoreSpec) -> u64 {
    // Offsets of a shard far larger than any disk, so that no real one has more digits.
    let json = header_json(spec, u64::from(u32::MAX), 1 << 62);
    (8 + json.len() as u64).next_multiple_of(64)
}

fn header_json(spec: &StoreSpec, samples: u64, image_bytes: u64) -> String {
    let mut header = BTreeMap::new();
    header.insert("__metadata__".to_owned(), json!({ "format": "repa-dist latent store" }));
    let mut begin = 0;
    for field in fields(spec) {
        let end = begin + field.item * samples;
        let shape: Vec<u64> = std::iter::once(samples).chain(field.shape.iter().map(|&d| d as u64)).collect();
        header.insert(
            field.name,
            json!({ "dtype": field.dtype, "shape": shape, "data_offsets": [begin, end] }),
        );
        begin = end;
    }
    if spec.images {
        let end = begin + image_bytes;
        header.insert(
            "images".to_owned(),
            json!({ "dtype": "U8", "shape": [image_bytes], "data_offsets": [begin, end] }),
        );
    }
    serde_json::to_string(&header).expect("strings and numbers serialise")
}

/// Where the tensors of a shard lie, from its header.
#[derive(Debug)]
pub(super) struct Places {
    /// First byte of each field, in the file.
    pub offsets: Vec<u64>,
    /// First byte of the images; the end of the data where there are none.
    pub images: u64,
    /// Size of all images.
    pub image_bytes: u64,
    /// Whether labels are U32 (other people's stores) instead of I64.
    pub short_labels: bool,
}

#[derive(Deserialize)]
struct TensorEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// Reads and checks a shard's header.
pub(super) fn read_places(
    file: &File,
    path: &Path,
    spec: &StoreSpec,
    samples: u64,
) -> Result<Places, StoreError> {
    let size = file.metadata().map_err(StoreError::io("read", path))?.len();
    let bad = |problem: String| StoreError::shard(path, problem);
    let mut word = [0; 8];
    read_exact(file, path, &mut word, 0)?;
    let length = u64::from_le_bytes(word);
    if length > MAX_HEADER || length + 8 > size {
        return Err(bad(format!("is not a safetensors file: its header claims {length} bytes")));
    }
    let mut text = vec![0; length as usize];
    read_exact(file, path, &mut text, 8)?;
    let mut header: BTreeMap<String, serde_json::Value> = serde_json::from_slice(&text)
        .map_err(|e| bad(format!("is not a safetensors file: its header is not JSON ({e})")))?;
    let mut take = |name: &str| -> Result<TensorEntry, StoreError> {
        let value = header.remove(name).ok_or_else(|| bad(format!("lacks the tensor {name}")))?;
        let entry: TensorEntry =
            serde_json::from_value(value).map_err(|e| bad(format!("has a damaged header: {name}: {e}")))?;
        let [begin, end] = entry.data_offsets;
        if begin > end || length + 8 + end > size {
            return Err(bad(format!(
                "is cut short: {name} ends at byte {} and the file has {size}",
                (length + 8).saturating_add(end)
            )));
        }
        Ok(entry)
    };
    let mut places = Places { offsets: Vec::new(), images: length + 8, image_bytes: 0, short_labels: false };
    for (i, field) in fields(spec).into_iter().enumerate() {
        let entry = take(&field.name)?;
        let [begin, end] = entry.data_offsets;
        let shape: Vec<u64> = std::iter::once(samples).chain(field.shape.iter().map(|&d| d as u64)).collect();
        places.short_labels |= i == LABELS && entry.dtype == "U32";
        let item = if i == LABELS && entry.dtype == "U32" { 4 } else { field.item };
        if entry.shape != shape
            || (entry.dtype != field.dtype && item == field.item)
            || Some(end - begin) != item.checked_mul(samples)
        {
            return Err(bad(format!(
                "holds {} as {} {:?} where the index says {} {shape:?}",
                field.name, entry.dtype, entry.shape, field.dtype
            )));
        }
        places.offsets.push(length + 8 + begin);
    }
    if spec.images {
        let [begin, end] = take("images")?.data_offsets;
        (places.images, places.image_bytes) = (length + 8 + begin, end - begin);
    }
    Ok(places)
}

/// Reads exactly `out.len()` bytes at `offset`; a file that ends early is told apart.
pub(super) fn read_exact(file: &File, path: &Path, out: &mut [u8], offset: u64) -> Result<(), StoreError> {
    file.read_exact_at(out, offset).map_err(|source| {
        if source.kind() == std::io::ErrorKind::UnexpectedEof {
            let size = file.metadata().map_or(0, |m| m.len());
            StoreError::shard(
                path,
                format!("is cut short: it has {size} bytes, and {} at {offset} were needed", out.len()),
            )
        } else {
            StoreError::io("read", path)(source)
        }
    })
}

/// xxh3 (64 bits) of a whole file, read in pieces.
pub(super) fn file_digest(file: &File, path: &Path) -> Result<u64, StoreError> {
    let mut hasher = xxhash_rust::xxh3::Xxh3::new();
    let mut buffer = vec![0; 1 << 20];
    let mut offset = 0;
    loop {
        let n = file.read_at(&mut buffer, offset).map_err(StoreError::io("read", path))?;
        if n == 0 {
            return Ok(hasher.digest());
        }
        hasher.update(&buffer[..n]);
        offset += n as u64;
    }
}

/// A digest as the index writes it.
pub(super) fn hex(digest: u64) -> String {
    format!("{digest:016x}")
}

/// Bytes of float16 values.
pub(super) fn f16_bytes(values: &[half::f16]) -> &[u8] {
    use half::slice::HalfFloatSliceExt as _;
    bytemuck::cast_slice(values.reinterpret_cast())
}

/// Bytes of float16 values, to be written to.
pub(super) fn f16_bytes_mut(values: &mut [half::f16]) -> &mut [u8] {
    use half::slice::HalfFloatSliceExt as _;
    bytemuck::cast_slice_mut(values.reinterpret_cast_mut())
}
