//! Weight files, our own and other people's, as named tensors on the host.
//!
//! [`Weights::open`] reads whatever it is given: safetensors (one file, or shards with an index) and
//! PyTorch's `.pt`/`.pth` (zip archives and the older pickles), decided by content. No pickle is ever
//! executed. No file, however damaged, makes it panic or take memory out of proportion to the file.

pub mod pickle;
mod safetensors_file;
mod torch;

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
pub use safetensors::Dtype;
use safetensors::SafeTensors;
pub use safetensors_file::{
    Header, SafetensorsFile, Written, open_sharded, write_safetensors, write_sharded,
};
pub use torch::TorchFile;

use crate::params::Layout;

/// Why a weight file cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WeightsError {
    /// The file cannot be opened or read.
    #[error("cannot read weights {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The file is not what its name says, or is damaged.
    #[error("{path} is not a readable weight file: {problem}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The file is sound but holds other tensors than the model has.
    #[error("{path} does not fit the model: {problem}")]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// The missing, unexpected and misshapen tensors.
        problem: String,
    },
}

/// One tensor of a weight file: little-endian elements, outermost dimension first.
#[derive(Debug, Clone, PartialEq)]
pub struct RawTensor {
    /// Element type.
    pub dtype: Dtype,
    /// Shape.
    pub shape: Vec<usize>,
    /// Elements, contiguous, little-endian.
    pub bytes: Vec<u8>,
}

/// Named tensors and the file they came from.
#[derive(Debug, Clone, Default)]
pub struct Weights {
    /// Where the tensors came from, for messages.
    pub path: PathBuf,
    /// The tensors.
    pub tensors: BTreeMap<String, RawTensor>,
    /// safetensors' string metadata.
    pub metadata: BTreeMap<String, String>,
}

impl Weights {
    /// Reads all tensors of a weight file of any known kind: a safetensors file, a
    /// `*.safetensors.index.json`, a folder with either, or a PyTorch file, whose nested dictionaries
    /// become names joined by dots (`ema.blocks.0.attn.qkv.weight`).
    ///
    /// # Errors
    /// The file cannot be read, is of no known kind, or is damaged.
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        Self::open_part(path, &[])
    }

    /// As [`Weights::open`]; of a PyTorch file only what is under the first of these keys that it has at the
    /// top, without the key in the names, and all of it where it has none of them.
    ///
    /// # Errors
    /// As for [`Weights::open`].
    pub fn open_part(path: &Path, keys: &[&str]) -> Result<Self, WeightsError> {
        let io = |source| WeightsError::Io { path: path.to_owned(), source };
        if path.is_dir() {
            return Self::open_part(&find_in_folder(path)?, keys);
        }
        if path.to_string_lossy().ends_with(".index.json") {
            return open_sharded(path);
        }
        let mut start = [0; 9];
        let mut file = std::fs::File::open(path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        // A safetensors file begins with the length of a JSON object and that object. As a length, the
        // start of an archive or of a pickle is far beyond any file.
        let safetensors = file.read_exact(&mut start).is_ok() && {
            let [size @ .., first] = start;
            first == b'{' && u64::from_le_bytes(size) <= length
        };
        if safetensors || path.extension().is_some_and(|e| e == "safetensors") {
            Self::open_safetensors(path)
        } else {
            let mut file = TorchFile::open(path)?;
            match keys.iter().find(|key| file.find(&[key]).is_some()) {
                Some(key) => file.tensors_at(&[key]),
                None => file.tensors_at(&[]),
            }
        }
    }

    /// Reads a safetensors file.
    ///
    /// # Errors
    /// The file cannot be read, or is not safetensors.
    pub fn open_safetensors(path: &Path) -> Result<Self, WeightsError> {
        SafetensorsFile::open(path)?.read_all()
    }

    /// Reads safetensors from memory; `path` is for messages.
    ///
    /// # Errors
    /// The bytes are not safetensors.
    pub fn from_safetensors(path: &Path, bytes: &[u8]) -> Result<Self, WeightsError> {
        let format = |e: safetensors::SafeTensorError| WeightsError::Format {
            path: path.to_owned(),
            problem: e.to_string(),
        };
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(format)?;
        let metadata = header.metadata().clone().unwrap_or_default().into_iter().collect();
        let file = SafeTensors::deserialize(bytes).map_err(format)?;
        let tensors = file
            .iter()
            .map(|(name, view)| {
                let tensor = RawTensor {
                    dtype: view.dtype(),
                    shape: view.shape().to_vec(),
                    bytes: view.data().to_vec(),
                };
                (name.to_owned(), tensor)
            })
            .collect();
        Ok(Self { path: path.to_owned(), tensors, metadata })
    }

    /// A tensor by name.
    ///
    /// # Errors
    /// [`WeightsError::Mismatch`] where the file lacks it.
    pub fn tensor(&self, name: &str) -> Result<&RawTensor, WeightsError> {
        self.tensors.get(name).ok_or_else(|| self.mismatch(format!("tensor {name} is missing")))
    }

    /// A tensor's elements as float32, whatever float type it is stored in.
    ///
    /// # Errors
    /// The tensor is missing, or is not of a float type.
    pub fn f32(&self, name: &str) -> Result<Vec<f32>, WeightsError> {
        let tensor = self.tensor(name)?;
        let b = &tensor.bytes;
        Ok(match tensor.dtype {
            Dtype::F32 => b.as_chunks().0.iter().map(|c| f32::from_le_bytes(*c)).collect(),
            Dtype::F64 => b.as_chunks().0.iter().map(|c| f64::from_le_bytes(*c) as f32).collect(),
            Dtype::F16 => b.as_chunks().0.iter().map(|c| f16::from_le_bytes(*c).to_f32()).collect(),
            Dtype::BF16 => b.as_chunks().0.iter().map(|c| bf16::from_le_bytes(*c).to_f32()).collect(),
            other => return Err(self.mismatch(format!("tensor {name} is {other:?}, not a float type"))),
        })
    }

    /// The tensors under `prefix.`, without the prefix.
    #[must_use]
    pub fn under(&self, prefix: &str) -> Self {
        let tensors = self
            .tensors
            .iter()
            .filter_map(|(name, t)| {
                Some((name.strip_prefix(prefix)?.strip_prefix('.')?.to_owned(), t.clone()))
            })
            .collect();
        Self { path: self.path.clone(), tensors, metadata: self.metadata.clone() }
    }

    /// Checks that the names and shapes are exactly a layout's.
    ///
    /// # Errors
    /// [`WeightsError::Mismatch`] lists the missing, unexpected and misshapen tensors.
    pub fn check(&self, layout: &Layout) -> Result<(), WeightsError> {
        let missing: Vec<String> = layout
            .entries()
            .iter()
            .filter(|e| !self.tensors.contains_key(&e.name))
            .map(|e| e.name.clone())
            .collect();
        let unexpected: Vec<String> =
            self.tensors.keys().filter(|n| layout.find(n).is_none()).cloned().collect();
        let misshapen: Vec<String> = layout
            .entries()
            .iter()
            .filter_map(|e| {
                let found = &self.tensors.get(&e.name)?.shape;
                (*found != e.shape).then(|| format!("{} is {found:?} where {:?} belongs", e.name, e.shape))
            })
            .collect();
        let problems: Vec<String> =
            [("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)]
                .into_iter()
                .filter(|(_, names)| !names.is_empty())
                .map(|(what, names)| format!("{what}: {}", abbreviate(&names)))
                .collect();
        if problems.is_empty() { Ok(()) } else { Err(self.mismatch(problems.join("; "))) }
    }

    /// An error that names this file.
    pub fn mismatch(&self, problem: String) -> WeightsError {
        WeightsError::Mismatch { path: self.path.clone(), problem }
    }
}

/// The index, or else the only safetensors file, of a folder.
fn find_in_folder(folder: &Path) -> Result<PathBuf, WeightsError> {
    let io = |source| WeightsError::Io { path: folder.to_owned(), source };
    let mut files: Vec<PathBuf> = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io)? {
        files.push(entry.map_err(io)?.path());
    }
    for suffix in [".safetensors.index.json", ".safetensors"] {
        let mut found = files.iter().filter(|f| f.to_string_lossy().ends_with(suffix));
        match (found.next(), found.next()) {
            (Some(file), None) => return Ok(file.clone()),
            (None, _) => {}
            (Some(_), Some(_)) => {
                let problem = format!("the folder has several *{suffix}; name one of them");
                return Err(WeightsError::Format { path: folder.to_owned(), problem });
            }
        }
    }
    let problem = "the folder has no *.safetensors".to_owned();
    Err(WeightsError::Format { path: folder.to_owned(), problem })
}

/// The first names of a list, and how many more there are.
fn abbreviate(names: &[String]) -> String {
    const SHOWN: usize = 8;
    let shown = names.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN { format!("{shown} and {} more", names.len() - SHOWN) } else { shown }
}
