//! safetensors files: a reader that takes only what is asked for, sharded sets with an index, and a
//! writer that streams.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Metadata, TensorInfo};
use xxhash_rust::xxh3::Xxh3Default;

use super::{Dtype, RawTensor, Weights, WeightsError};

/// Longest header that is read, as in the safetensors library.
const MAX_HEADER: u64 = 100_000_000;

/// An open safetensors file, its header checked against its length.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    file: File,
    header: Metadata,
    data: u64,
}

impl SafetensorsFile {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// The file cannot be read, its header is damaged, or its length is not what the header says.
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let io = |source| WeightsError::Io { path: path.to_owned(), source };
        let format = |problem: String| WeightsError::Format { path: path.to_owned(), problem };
        let file = File::open(path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        if length < 8 {
            return Err(format(format!("{length} bytes are too few for a safetensors file")));
        }
        let mut size = [0; 8];
        file.read_exact_at(&mut size, 0).map_err(io)?;
        let size = u64::from_le_bytes(size);
        if size > MAX_HEADER || size > length - 8 {
            return Err(format(format!(
                "it claims a header of {size} bytes in a file of {length}: truncated, or not safetensors"
            )));
        }
        let mut json = vec![0; size as usize];
        file.read_exact_at(&mut json, 8).map_err(io)?;
        let header: Metadata = serde_json::from_slice(&json)
            .map_err(|e| format(format!("its safetensors header is damaged: {e}")))?;
        let data = 8 + size;
        let expected = data + header.data_len() as u64;
        if expected != length {
            return Err(format(format!("it has {length} bytes where its header says {expected}")));
        }
        Ok(Self { path: path.to_owned(), file, header, data })
    }

    /// The tensors' names, in the order of their bytes.
    pub fn names(&self) -> Vec<String> {
        self.header.offset_keys()
    }

    /// The string metadata.
    pub fn metadata(&self) -> BTreeMap<String, String> {
        self.header.metadata().clone().unwrap_or_default().into_iter().collect()
    }

    /// Type and shape of a tensor.
    ///
    /// # Errors
    /// [`WeightsError::Mismatch`] where the file lacks it.
    pub fn info(&self, name: &str) -> Result<(Dtype, &[usize]), WeightsError> {
        let info = self.find(name)?;
        Ok((info.dtype, &info.shape))
    }

    /// Where a tensor's bytes lie in the file.
    ///
    /// # Errors
    /// [`WeightsError::Mismatch`] where the file lacks it.
    pub fn position(&self, name: &str) -> Result<Range<u64>, WeightsError> {
        let (start, end) = self.find(name)?.data_offsets;
        Ok(self.data + start as u64..self.data + end as u64)
    }

    fn find(&self, name: &str) -> Result<&TensorInfo, WeightsError> {
        self.header.info(name).ok_or_else(|| WeightsError::Mismatch {
            path: self.path.clone(),
            problem: format!("tensor {name} is missing"),
        })
    }

    /// Reads a tensor.
    ///
    /// # Errors
    /// The file lacks it, or cannot be read.
    pub fn read(&self, name: &str) -> Result<RawTensor, WeightsError> {
        let info = self.find(name)?;
        let position = self.position(name)?;
        let mut bytes = vec![0; (position.end - position.start) as usize];
        self.file
            .read_exact_at(&mut bytes, position.start)
            .map_err(|source| WeightsError::Io { path: self.path.clone(), source })?;
        Ok(RawTensor { dtype: info.dtype, shape: info.shape.clone(), bytes })
    }

    /// Reads all tensors.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn read_all(&self) -> Result<Weights, WeightsError> {
        let tensors = self
            .names()
            .into_iter()
            .map(|name| self.read(&name).map(|tensor| (name, tensor)))
            .collect::<Result<_, _>>()?;
        Ok(Weights { path: self.path.clone(), tensors, metadata: self.metadata() })
    }
}

/// Reads a sharded set through its `*.safetensors.index.json`.
///
/// # Errors
/// The index is damaged, names a file outside its folder or a tensor that its shard lacks, or a
/// shard cannot be read.
pub fn open_sharded(index: &Path) -> Result<Weights, WeightsError> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let format = |problem: String| WeightsError::Format { path: index.to_owned(), problem };
    let text = std::fs::read(index).map_err(|source| WeightsError::Io { path: index.to_owned(), source })?;
    let map: Index =
        serde_json::from_slice(&text).map_err(|e| format(format!("no safetensors index: {e}")))?;
    let mut shards: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (tensor, shard) in map.weight_map {
        if Path::new(&shard).file_name().is_none_or(|name| name != shard.as_str()) {
            return Err(format(format!(
                "it places tensor {tensor} in {shard:?}, which is no plain file name"
            )));
        }
        shards.entry(shard).or_default().push(tensor);
    }
    let folder = index.parent().unwrap_or(Path::new("."));
    let mut weights = Weights { path: index.to_owned(), ..Default::default() };
    for (shard, names) in shards {
        let file = SafetensorsFile::open(&folder.join(&shard))?;
        weights.metadata.extend(file.metadata());
        for name in names {
            let tensor = file.read(&name)?;
            weights.tensors.insert(name, tensor);
        }
    }
    Ok(weights)
}

/// What a tensor of a file to be written is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape.
    pub shape: Vec<usize>,
}

impl Header {
    /// Length in bytes.
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// A file that has been written and is on the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Its length in bytes.
    pub bytes: u64,
    /// XXH3-128 of its contents.
    pub digest: u128,
    /// Where each tensor's bytes begin in the file, in the order given.
    pub offsets: Vec<u64>,
}

struct Digesting<W> {
    inner: W,
    digest: Xxh3Default,
    bytes: u64,
}

impl<W: Write> Write for Digesting<W> {
    fn write(&mut self, buffer: &[u8]) -> std::io::Result<usize> {
        let n = self.inner.write(buffer)?;
        self.digest.update(&buffer[..n]);
        self.bytes += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

/// Writes a safetensors file and waits until it is on the disk. `fill(i, writer)` writes the bytes
/// of tensor i, so that no more than one tensor needs to be in memory; it is called in order.
/// Tensors are laid out by falling element size (readers want them aligned), then as given.
///
/// # Errors
/// The file cannot be written, or `fill` fails or writes another number of bytes than the header
/// says. What has been written stays.
pub fn write_safetensors(
    path: &Path,
    tensors: &[Header],
    metadata: &BTreeMap<String, String>,
    mut fill: impl FnMut(usize, &mut dyn Write) -> std::io::Result<()>,
) -> std::io::Result<Written> {
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(tensors[i].dtype.bitsize()));
    let mut json = serde_json::Map::new();
    if !metadata.is_empty() {
        json.insert("__metadata__".to_owned(), serde_json::json!(metadata));
    }
    let mut end = 0;
    let mut offsets = vec![0; tensors.len()];
    for &i in &order {
        let tensor = &tensors[i];
        let start = end;
        offsets[i] = start as u64;
        end += tensor.bytes();
        let info =
            TensorInfo { dtype: tensor.dtype, shape: tensor.shape.clone(), data_offsets: (start, end) };
        if json.insert(tensor.name.clone(), serde_json::to_value(info)?).is_some() {
            return Err(std::io::Error::other(format!("tensor {} is there twice", tensor.name)));
        }
    }
    let mut header = serde_json::to_vec(&json)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let data = 8 + header.len() as u64;
    offsets.iter_mut().for_each(|offset| *offset += data);

    let file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    let mut writer = Digesting { inner: file, digest: Xxh3Default::new(), bytes: 0 };
    writer.write_all(&(header.len() as u64).to_le_bytes())?;
    writer.write_all(&header)?;
    for &i in &order {
        fill(i, &mut writer)?;
        let expected = offsets[i] + tensors[i].bytes() as u64;
        if writer.bytes != expected {
            let name = &tensors[i].name;
            return Err(std::io::Error::other(format!(
                "tensor {name} ended at byte {} where {expected} was promised",
                writer.bytes
            )));
        }
    }
    let Digesting { inner, digest, bytes } = writer;
    inner.into_inner().map_err(|e| e.into_error())?.sync_all()?;
    Ok(Written { bytes, digest: digest.digest128(), offsets })
}

/// Writes tensors as `{stem}.safetensors` in a folder, or, where they are larger than `max_bytes`
/// together, as `{stem}-00001-of-00003.safetensors` and so on beside `{stem}.safetensors.index.json`
/// (the layout of the Hugging Face hub). Each file is written under a temporary name and renamed once
/// it is on the disk; the index comes last. Returns the file to open.
///
/// # Errors
/// A file cannot be written, or `fill` fails.
pub fn write_sharded(
    folder: &Path,
    stem: &str,
    tensors: &[Header],
    metadata: &BTreeMap<String, String>,
    max_bytes: usize,
    mut fill: impl FnMut(usize, &mut dyn Write) -> std::io::Result<()>,
) -> std::io::Result<PathBuf> {
    let mut shards: Vec<Vec<usize>> = vec![Vec::new()];
    let mut size = 0;
    for (i, tensor) in tensors.iter().enumerate() {
        if size > 0 && size + tensor.bytes() > max_bytes {
            shards.push(Vec::new());
            size = 0;
        }
        size += tensor.bytes();
        shards.last_mut().expect("begun with one").push(i);
    }
    let mut map = BTreeMap::new();
    let mut last = PathBuf::new();
    for (number, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => format!("{stem}.safetensors"),
            n => format!("{stem}-{:05}-of-{n:05}.safetensors", number + 1),
        };
        let headers: Vec<Header> = shard.iter().map(|&i| tensors[i].clone()).collect();
        last = folder.join(&name);
        let temporary = folder.join(format!("{name}.partial"));
        write_safetensors(&temporary, &headers, metadata, |i, writer| fill(shard[i], writer))?;
        std::fs::rename(&temporary, &last)?;
        map.extend(headers.into_iter().map(|h| (h.name, name.clone())));
    }
    if shards.len() > 1 {
        let total: usize = tensors.iter().map(Header::bytes).sum();
        let index = serde_json::json!({"metadata": {"total_size": total}, "weight_map": map});
        last = folder.join(format!("{stem}.safetensors.index.json"));
        let temporary = folder.join(format!("{stem}.safetensors.index.json.partial"));
        let mut file = File::create(&temporary)?;
        file.write_all(&serde_json::to_vec_pretty(&index)?)?;
        file.sync_all()?;
        std::fs::rename(&temporary, &last)?;
    }
    File::open(folder)?.sync_all()?;
    Ok(last)
}
