//! PyTorch's `.pt` and `.pth` files: the zip archives of `torch.save` since 1.6, and the older
//! pickles followed by raw storages.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use zip::{CompressionMethod, ZipArchive};

use super::pickle::{Loaded, TensorRef, Value};
use super::{RawTensor, Weights, WeightsError};

/// The number that an old file begins with: 0x1950a86a20f9469cfc6c, little-endian.
const MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
/// Tensors may share storages and repeat elements (stride 0); together they may take up to this many
/// times the file's size.
const MAX_GROWTH: u64 = 4;

/// An open PyTorch file. Opening reads its pickle; tensors are read when asked for.
#[derive(Debug)]
pub struct TorchFile {
    path: PathBuf,
    length: u64,
    root: Value,
    source: Source,
}

#[derive(Debug)]
enum Source {
    /// A zip archive and the folder within it.
    Zip { archive: ZipArchive<BufReader<File>>, folder: String },
    /// A file, and where in it each storage is: first byte and length in bytes.
    Legacy { file: File, storages: HashMap<Arc<str>, (u64, u64)> },
}

impl TorchFile {
    /// Opens a `.pt` or `.pth` file.
    ///
    /// # Errors
    /// The file cannot be read, is no file of `torch.save`, is damaged, or is big-endian.
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let io = |source| WeightsError::Io { path: path.to_owned(), source };
        let mut file = File::open(path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        let mut start = [0; 4];
        let _ = file.read(&mut start).map_err(io)?;
        file.seek(SeekFrom::Start(0)).map_err(io)?;
        let opened = if start == *b"PK\x03\x04" { zip(file, length) } else { legacy(file, length) };
        let (root, source) =
            opened.map_err(|problem| WeightsError::Format { path: path.to_owned(), problem })?;
        Ok(Self { path: path.to_owned(), length, root, source })
    }

    /// What the file holds, tensors by reference.
    pub fn root(&self) -> &Value {
        &self.root
    }

    /// The value under a path of dictionary keys or attributes, if there.
    pub fn find(&self, path: &[&str]) -> Option<&Value> {
        path.iter().try_fold(&self.root, |value, key| value.get(key))
    }

    /// Reads the tensors under a path of keys, such as `["ema"]`; keys further down are joined by
    /// dots. An empty path reads all tensors of the file.
    ///
    /// # Errors
    /// Nothing is there, it holds no tensor, or a tensor's type or storage is not as it should be.
    pub fn tensors_at(&mut self, path: &[&str]) -> Result<Weights, WeightsError> {
        let file = self.path.clone();
        let format = |problem| WeightsError::Format { path: file.clone(), problem };
        let what = if path.is_empty() { "the file".to_owned() } else { path.join(".") };
        let value = self.find(path).ok_or_else(|| format(format!("it has no {what}")))?;
        let found = value.tensors().map_err(format)?;
        if found.is_empty() {
            return Err(format(format!("{what} holds no tensors (it is {})", value.kind())));
        }
        let tensors = self.read(found).map_err(format)?;
        Ok(Weights { path: file.clone(), tensors, metadata: Default::default() })
    }

    /// Reads one tensor of [`TorchFile::root`]'s tree.
    ///
    /// # Errors
    /// As for [`TorchFile::tensors_at`].
    pub fn tensor(&mut self, tensor: &Arc<TensorRef>) -> Result<RawTensor, WeightsError> {
        let tensors = self.read(vec![("a tensor".to_owned(), tensor.clone())]);
        tensors
            .map_err(|problem| WeightsError::Format { path: self.path.clone(), problem })
            .map(|mut tensors| tensors.pop_first().expect("as many tensors come out as go in").1)
    }

    fn read(
        &mut self,
        mut wanted: Vec<(String, Arc<TensorRef>)>,
    ) -> Result<std::collections::BTreeMap<String, RawTensor>, String> {
        let mut left = self.length.saturating_mul(MAX_GROWTH);
        // Each storage is read once, whatever the number of tensors in it.
        wanted.sort_by(|a, b| a.1.storage.key.cmp(&b.1.storage.key));
        let mut tensors = std::collections::BTreeMap::new();
        for group in wanted.chunk_by(|a, b| a.1.storage.key == b.1.storage.key) {
            let storage = self.storage(&group[0].1.storage.key)?;
            for (name, tensor) in group {
                let raw = gather(tensor, &storage, &mut left).map_err(|e| format!("tensor {name}: {e}"))?;
                tensors.insert(name.clone(), raw);
            }
        }
        Ok(tensors)
    }

    fn storage(&mut self, key: &str) -> Result<Vec<u8>, String> {
        match &mut self.source {
            Source::Zip { archive, folder } => {
                read_entry(archive, &format!("{folder}/data/{key}"), self.length)
            }
            Source::Legacy { file, storages } => {
                let &(offset, length) =
                    storages.get(key).ok_or_else(|| format!("storage {key} is not in the file"))?;
                let mut bytes = vec![0; length as usize];
                file.read_exact_at(&mut bytes, offset).map_err(|e| format!("storage {key}: {e}"))?;
                Ok(bytes)
            }
        }
    }
}

fn zip(file: File, length: u64) -> Result<(Value, Source), String> {
    let mut archive = ZipArchive::new(BufReader::new(file)).map_err(|e| format!("zip archive: {e}"))?;
    let folder = archive
        .file_names()
        .filter_map(Result::ok)
        .find_map(|name| Some(name.strip_suffix("/data.pkl")?.to_owned()).filter(|f| !f.contains('/')))
        .ok_or("a zip archive without a folder with data.pkl, so not written by torch.save")?;
    let order = format!("{folder}/byteorder");
    if archive.index_for_name(&order).is_some() {
        match read_entry(&mut archive, &order, length)?.as_slice() {
            b"little" => {}
            b"big" => return Err(BIG_ENDIAN.to_owned()),
            _ => return Err("its byteorder is neither little nor big".to_owned()),
        }
    }
    let pickle = read_entry(&mut archive, &format!("{folder}/data.pkl"), length)?;
    let loaded = Loaded::read(pickle.as_slice()).map_err(|e| e.to_string())?;
    Ok((loaded.value, Source::Zip { archive, folder }))
}

const BIG_ENDIAN: &str = "it was written on a big-endian machine; load and save it on a little-endian one";

fn read_entry(archive: &mut ZipArchive<BufReader<File>>, name: &str, limit: u64) -> Result<Vec<u8>, String> {
    let mut entry = archive.by_name(name).map_err(|e| format!("{name}: {e}"))?;
    if entry.compression() != CompressionMethod::Stored {
        return Err(format!("{name} is compressed; torch.save never does that"));
    }
    let size = entry.size();
    if size > limit {
        return Err(format!("{name} claims {size} bytes of a file of {limit}"));
    }
    let mut bytes = Vec::with_capacity(size as usize);
    // Reading to the end checks the archive's CRC as well.
    entry.read_to_end(&mut bytes).map_err(|e| format!("{name}: {e}"))?;
    if bytes.len() as u64 != size {
        return Err(format!("{name} has {} bytes where {size} belong", bytes.len()));
    }
    Ok(bytes)
}

/// Magic number, protocol version, system information, the object, the keys of the storages; then
/// each storage as its length in elements (int64) and its bytes.
fn legacy(file: File, length: u64) -> Result<(Value, Source), String> {
    const NOT: &str =
        "not a file of torch.save: neither a zip archive nor a pickle with PyTorch's magic number";
    let mut reader = BufReader::new(file);
    let mut at = 0;
    let mut next = || -> Result<Loaded, String> {
        let loaded = Loaded::read(&mut reader).map_err(|e| format!("{e} (pickle begins at byte {at})"))?;
        at += loaded.bytes;
        Ok(loaded)
    };
    let magic = next().map_err(|e| format!("{NOT} ({e})"))?.value;
    if !matches!(&magic, Value::BigInt(bytes) if **bytes == MAGIC) {
        return Err(NOT.to_owned());
    }
    let protocol = next()?.value;
    if protocol.as_int() != Some(1001) {
        return Err("its protocol version is not 1001".to_owned());
    }
    let system = next()?.value;
    if system.get("little_endian") != Some(&Value::Bool(true)) {
        return Err(BIG_ENDIAN.to_owned());
    }
    let object = next()?;
    let keys = next()?.value;
    let file = reader.into_inner();
    let mut storages = HashMap::new();
    for key in keys.items() {
        let key = key.as_str().ok_or("the key of a storage is not a string")?;
        let storage =
            object.storages.get(key).ok_or_else(|| format!("nothing says what storage {key} holds"))?;
        let size = storage
            .dtype
            .ok_or_else(|| format!("storage {key} is a {}, which is not supported", storage.class))?
            .bitsize() as u64
            / 8;
        let mut elements = [0; 8];
        file.read_exact_at(&mut elements, at).map_err(|e| format!("storage {key}: {e}"))?;
        let bytes = storage.elements.checked_mul(size).ok_or("a storage is too large")?;
        if u64::from_le_bytes(elements) != storage.elements {
            let found = u64::from_le_bytes(elements);
            return Err(format!("storage {key} has {found} elements where {} belong", storage.elements));
        }
        let end = at.checked_add(8).and_then(|start| start.checked_add(bytes));
        match end {
            Some(end) if end <= length => {
                storages.insert(Arc::from(key), (at + 8, bytes));
                at = end;
            }
            _ => return Err(format!("the file ends within storage {key}")),
        }
    }
    Ok((object.value, Source::Legacy { file, storages }))
}

/// The elements of a tensor in row-major order.
fn gather(tensor: &TensorRef, storage: &[u8], left: &mut u64) -> Result<RawTensor, String> {
    let dtype = tensor.dtype.ok_or_else(|| {
        format!("its elements ({}) are of a type that is not supported", tensor.storage.class)
    })?;
    let size = dtype.bitsize() / 8;
    let overflow = "its shape is too large";
    let elements = tensor.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).ok_or(overflow)?;
    let bytes = elements.checked_mul(size).ok_or(overflow)?;
    *left = left
        .checked_sub(bytes as u64)
        .ok_or_else(|| format!("with it the tensors take more than {MAX_GROWTH} times the file's size"))?;
    let shape = tensor.shape.clone();
    if elements == 0 {
        return Ok(RawTensor { dtype, shape, bytes: Vec::new() });
    }
    let last = tensor
        .shape
        .iter()
        .zip(&tensor.stride)
        .try_fold(tensor.offset, |last, (&d, &s)| last.checked_add((d as u64 - 1).checked_mul(s)?));
    let end = last.and_then(|last| last.checked_add(1)?.checked_mul(size as u64)).ok_or(overflow)?;
    if end > storage.len() as u64 {
        return Err(format!("it reaches byte {end} of a storage of {}", storage.len()));
    }
    let start = tensor.offset as usize * size;
    let mut row_major = 1;
    let contiguous = tensor.shape.iter().zip(&tensor.stride).rev().all(|(&d, &s)| {
        let fits = d == 1 || s == row_major;
        row_major *= d as u64;
        fits
    });
    if contiguous {
        return Ok(RawTensor { dtype, shape, bytes: storage[start..start + bytes].to_vec() });
    }
    let mut out = Vec::with_capacity(bytes);
    let mut index = vec![0; shape.len()];
    let mut position = tensor.offset as usize;
    for _ in 0..elements {
        out.extend_from_slice(&storage[position * size..(position + 1) * size]);
        for dimension in (0..shape.len()).rev() {
            let stride = tensor.stride[dimension] as usize;
            index[dimension] += 1;
            position += stride;
            if index[dimension] < shape[dimension] {
                break;
            }
            // One step past the end: back to the start of this dimension, on in the next.
            position -= stride * shape[dimension];
            index[dimension] = 0;
        }
    }
    Ok(RawTensor { dtype, shape, bytes: out })
}
