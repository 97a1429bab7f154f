//! Our checkpoint to safetensors under the reference's names.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::ReferenceError;
use crate::checkpoint::{Array, Checkpoint, CheckpointError, Tensors};
use crate::config::Config;
use crate::params::Entry;
use crate::weights::{Dtype, Header, write_sharded};

/// Largest file of an export by default: what the Hugging Face hub's own tools keep to.
pub const MAX_FILE_BYTES: usize = 5_000_000_000;

/// What an export holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contents {
    /// The weights, under the reference's names as they are.
    Model,
    /// Their moving average, likewise.
    Ema,
    /// Everything: `model.`, `ema.`, `exp_avg.` and `exp_avg_sq.` before the names (no moments for frozen
    /// parameters), and int64 tensors of one element `steps` and `updates` (AdamW's own count).
    /// [`super::import`] reads it back.
    All,
}

impl Contents {
    fn arrays(self) -> &'static [Array] {
        match self {
            Contents::Model => &[Array::Model],
            Contents::Ema => &[Array::Ema],
            Contents::All => &Array::ALL,
        }
    }
}

/// One tensor to write.
enum Part<'a> {
    Tensor(Array, &'a Entry),
    Count(u64),
}

/// Writes a checkpoint's weights to `out`, a file ending in `.safetensors`; where they are larger than
/// `max_bytes`, to several files beside it with an index. Digests are checked before. The run's
/// configuration goes into the metadata, as JSON under `config`. Returns the file to open. `progress` is
/// called with tensors done and to do.
///
/// # Errors
/// The checkpoint is damaged or by a version with another configuration; the file cannot be written.
pub fn export(
    checkpoint: &Checkpoint,
    contents: Contents,
    out: &Path,
    max_bytes: usize,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<PathBuf, ReferenceError> {
    let name = || ReferenceError::Name { path: out.to_owned() };
    let stem = out.file_name().and_then(|n| n.to_str()).and_then(|n| n.strip_suffix(".safetensors"));
    let stem = stem.filter(|stem| !stem.is_empty()).ok_or_else(name)?;
    let folder = match out.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    checkpoint.verify()?;
    let config = serde_json::from_value::<Config>(checkpoint.manifest().config.clone())
        .map_err(|e| e.to_string())
        .and_then(|config| config.sit().validate().map(|()| config).map_err(|e| e.to_string()));
    let config = config.map_err(|problem| {
        CheckpointError::damaged(&checkpoint.dir(), format!("its configuration cannot be read: {problem}"))
    })?;
    let layout = config.sit().layout();
    for &array in contents.arrays() {
        checkpoint.check(&layout, array)?;
    }

    let mut parts = Vec::new();
    let mut headers = Vec::new();
    if contents == Contents::All {
        let progress = checkpoint.progress();
        for (name, count) in [("steps", progress.step), ("updates", progress.updates)] {
            headers.push(Header { name: name.into(), dtype: Dtype::I64, shape: vec![1] });
            parts.push(Part::Count(count));
        }
    }
    for &array in contents.arrays() {
        let moments = matches!(array, Array::ExpAvg | Array::ExpAvgSq);
        for entry in layout.entries().iter().filter(|entry| entry.trainable || !moments) {
            let name = match contents {
                Contents::All => format!("{}.{}", array.prefix(), entry.name),
                Contents::Model | Contents::Ema => entry.name.clone(),
            };
            headers.push(Header { name, dtype: Dtype::F32, shape: entry.shape.clone() });
            parts.push(Part::Tensor(array, entry));
        }
    }
    let metadata = BTreeMap::from([
        ("format".to_owned(), "pt".to_owned()),
        ("program".to_owned(), format!("repa-dist {}", env!("CARGO_PKG_VERSION"))),
        ("step".to_owned(), checkpoint.progress().step.to_string()),
        ("config".to_owned(), checkpoint.manifest().config.to_string()),
    ]);

    let write = |source| ReferenceError::Write { path: out.to_owned(), source };
    std::fs::create_dir_all(folder).map_err(write)?;
    let mut tensors = Tensors::of(checkpoint);
    let mut unreadable = None;
    let mut done = 0;
    let total = parts.len();
    let written = write_sharded(folder, stem, &headers, &metadata, max_bytes, |i, writer| {
        match &parts[i] {
            Part::Count(count) => writer.write_all(&count.to_le_bytes())?,
            Part::Tensor(array, entry) => match values(&mut tensors, *array, entry) {
                Ok(values) => writer.write_all(bytemuck::cast_slice(&values))?,
                Err(error) => {
                    unreadable = Some(error);
                    return Err(std::io::ErrorKind::Other.into());
                }
            },
        }
        done += 1;
        progress(done, total);
        Ok(())
    });
    match unreadable {
        Some(error) => Err(error.into()),
        None => written.map_err(write),
    }
}

/// A parameter's elements. Frozen ones that the checkpoint leaves out follow from the model.
fn values(tensors: &mut Tensors, array: Array, entry: &Entry) -> Result<Vec<f32>, CheckpointError> {
    if let Some(values) = tensors.tensor(array, &entry.name)? {
        return Ok(values);
    }
    let mut values = vec![0.0; entry.len()];
    entry.init.fill(&mut values, 0, 0);
    Ok(values)
}
