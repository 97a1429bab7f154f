//! Weight files, our own and other people's, as named tensors on the host.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
pub use safetensors::Dtype;
use safetensors::SafeTensors;

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
    /// Reads a safetensors file.
    ///
    /// # Errors
    /// The file cannot be read, or is not safetensors.
    pub fn open_safetensors(path: &Path) -> Result<Self, WeightsError> {
        let bytes =
            std::fs::read(path).map_err(|source| WeightsError::Io { path: path.to_owned(), source })?;
        Self::from_safetensors(path, &bytes)
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

/// The first names of a list, and how many more there are.
fn abbreviate(names: &[String]) -> String {
    const SHOWN: usize = 8;
    let shown = names.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN { format!("{shown} and {} more", names.len() - SHOWN) } else { shown }
}
