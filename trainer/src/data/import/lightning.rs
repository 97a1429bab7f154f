//! LightningDiT's layout: `*.safetensors` with `latents` [N, C, h, w], `latents_flip` of the mirrored images
//! and `labels` [N], and `latents_stats.pt` with mean and std by channel.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use half::{bf16, f16};

use super::ImportOptions;
use crate::data::build::{BuildError, Fault, Made, MadeView, Source};
use crate::data::store::{Kind, Normalisation, Spread, StoreSpec};
use crate::weights::{Dtype, RawTensor, SafetensorsFile, Weights};

/// A folder in LightningDiT's layout.
#[derive(Debug)]
pub struct LightningFolder {
    files: Vec<Latents>,
    /// First sample of each file, and the number of all.
    starts: Vec<usize>,
    spec: StoreSpec,
}

/// One file: where its rows lie.
#[derive(Debug)]
struct Latents {
    file: File,
    name: String,
    dtype: Dtype,
    labels: Vec<i64>,
    latents: u64,
    flipped: Option<u64>,
    shape: [usize; 3],
}

impl LightningFolder {
    /// Whether the folder looks like this layout.
    #[must_use]
    pub fn is_at(root: &Path) -> bool {
        file_names(root).is_ok_and(|names| !names.is_empty())
            && !root.join(crate::data::store::INDEX_FILE).exists()
    }

    /// Opens all files, in the order of their names, which is that of LightningDiT's own data set.
    ///
    /// # Errors
    /// [`BuildError::Layout`] names the file and what is not as it should be.
    pub fn open(root: &Path, options: &ImportOptions) -> Result<Self, BuildError> {
        let layout = |path: &Path, problem: String| BuildError::Layout { path: path.to_owned(), problem };
        if options.images {
            return Err(layout(root, "LightningDiT's layout holds no images: leave --images out".to_owned()));
        }
        let names = file_names(root).map_err(|e| layout(root, format!("cannot be listed: {e}")))?;
        if names.is_empty() {
            return Err(layout(root, "holds no .safetensors file".to_owned()));
        }
        let mut files: Vec<Latents> = Vec::new();
        let mut starts = vec![0];
        for name in names {
            let path = root.join(&name);
            let file = Latents::open(&path, name).map_err(|problem| layout(&path, problem))?;
            if let Some(first) = files.first()
                && (first.shape != file.shape || first.flipped.is_some() != file.flipped.is_some())
            {
                let kind = |f: &Latents| if f.flipped.is_some() { "with flipped copies" } else { "without" };
                let problem = format!(
                    "holds latents of {:?} {}, and {} has {:?} {}: they are not of one data set",
                    file.shape,
                    kind(&file),
                    first.name,
                    first.shape,
                    kind(first)
                );
                return Err(layout(&path, problem));
            }
            starts.push(starts[starts.len() - 1] + file.labels.len());
            files.push(file);
        }
        let [channels, height, width] = files[0].shape;
        let greatest = files.iter().flat_map(|f| &f.labels).copied().max().unwrap_or(0);
        let scale = options.scale.unwrap_or(1.0);
        let samples = starts[starts.len() - 1];
        let spec = StoreSpec {
            kind: Kind::Latents,
            spread: Spread::Std,
            precision: options.precision,
            channels,
            height,
            width,
            resolution: height * options.downsample.unwrap_or(16),
            autoencoder: options.autoencoder.clone().unwrap_or_else(|| "vavae-f16d32".to_owned()),
            normalisation: statistics(root, channels, scale)?,
            classes: options.classes.unwrap_or(usize::try_from(greatest).unwrap_or(0) + 1),
            class_names: Vec::new(),
            encoders: Vec::new(),
            images: false,
            flips: files[0].flipped.is_some(),
            source: format!("LightningDiT layout, {samples} samples in {} files", files.len()),
        };
        Ok(Self { files, starts, spec })
    }

    /// What an import makes of it.
    #[must_use]
    pub fn spec(&self) -> &StoreSpec {
        &self.spec
    }

    fn locate(&self, i: usize) -> (&Latents, usize) {
        let number = self.starts.partition_point(|&start| start <= i) - 1;
        (&self.files[number], i - self.starts[number])
    }
}

impl Source for LightningFolder {
    type Raw = Made;

    fn len(&self) -> usize {
        self.starts[self.files.len()]
    }

    fn name(&self, i: usize) -> String {
        let (file, row) = self.locate(i);
        format!("{} row {row}", file.name)
    }

    fn load(&self, i: usize) -> Result<Made, Fault> {
        let (file, row) = self.locate(i);
        let label =
            u32::try_from(file.labels[row]).map_err(|_| format!("has the label {}", file.labels[row]))?;
        let view = |begin: u64| -> Result<MadeView, Fault> {
            Ok(MadeView { latent: file.row(begin, row)?, features: Vec::new() })
        };
        Ok(Made {
            label,
            view: view(file.latents)?,
            flipped: file.flipped.map(view).transpose()?,
            image: Vec::new(),
        })
    }
}

impl Latents {
    fn open(path: &Path, name: String) -> Result<Self, String> {
        let tensors = SafetensorsFile::open(path).map_err(|e| e.to_string())?;
        let wanted = "latents [N, C, h, w] and labels [N] belong in it";
        let latents = tensors.info("latents").map_err(|_| format!("lacks the tensor latents; {wanted}"))?;
        let (dtype, &[samples, channels, height, width]) = latents else {
            return Err(format!("holds latents of shape {:?}; {wanted}", latents.1));
        };
        if !matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            return Err(format!("holds latents as {dtype:?}; they are float32, float16 or bfloat16"));
        }
        let labels = tensors.read("labels").map_err(|_| format!("lacks the tensor labels; {wanted}"))?;
        let labels = integers(&labels)?;
        if labels.len() != samples {
            return Err(format!("holds {samples} latents and {} labels", labels.len()));
        }
        let flipped = match tensors.info("latents_flip") {
            Ok(info) if info == (dtype, &[samples, channels, height, width][..]) => {
                Some(tensors.position("latents_flip").map_err(|e| e.to_string())?.start)
            }
            Ok((dtype, shape)) => {
                return Err(format!("holds latents_flip as {dtype:?} {shape:?}, unlike latents"));
            }
            Err(_) => None,
        };
        Ok(Self {
            latents: tensors.position("latents").map_err(|e| e.to_string())?.start,
            file: File::open(path).map_err(|e| format!("cannot be opened: {e}"))?,
            name,
            dtype,
            labels,
            flipped,
            shape: [channels, height, width],
        })
    }

    /// Row `row` of the tensor whose bytes begin at `begin`.
    fn row(&self, begin: u64, row: usize) -> Result<Vec<f32>, String> {
        let count: usize = self.shape.iter().product();
        let element = if self.dtype == Dtype::F32 { 4 } else { 2 };
        let offset = begin + (row * count * element) as u64;
        let mut values = vec![0.0f32; count];
        let mut bytes = vec![0; if element == 4 { 0 } else { count * element }];
        let into = if element == 4 { bytemuck::cast_slice_mut(&mut values) } else { &mut bytes[..] };
        self.file.read_exact_at(into, offset).map_err(|e| format!("cannot be read: {e}"))?;
        for (to, from) in values.iter_mut().zip(bytes.as_chunks::<2>().0) {
            *to = if self.dtype == Dtype::F16 {
                f16::from_le_bytes(*from).to_f32()
            } else {
                bf16::from_le_bytes(*from).to_f32()
            };
        }
        Ok(values)
    }
}

fn integers(tensor: &RawTensor) -> Result<Vec<i64>, String> {
    match tensor.dtype {
        Dtype::I64 => Ok(tensor.bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect()),
        Dtype::I32 => {
            Ok(tensor.bytes.as_chunks().0.iter().map(|b| i64::from(i32::from_le_bytes(*b))).collect())
        }
        other => Err(format!("holds labels as {other:?}, not integers")),
    }
}

/// Normalisation to mean 0 and standard deviation `scale`, from `latents_stats.pt`; where that is missing, as
/// measured over all samples.
fn statistics(root: &Path, channels: usize, scale: f32) -> Result<Option<Normalisation>, BuildError> {
    let path = root.join("latents_stats.pt");
    if !path.exists() {
        return Ok(None);
    }
    let layout = |problem: String| BuildError::Layout { path: path.clone(), problem };
    let weights = Weights::open(&path).map_err(|e| layout(e.to_string()))?;
    let read = |name: &str| -> Result<Vec<f32>, BuildError> {
        let values =
            weights.tensor(name).and_then(|_| weights.f32(name)).map_err(|e| layout(e.to_string()))?;
        if values.len() == channels {
            Ok(values)
        } else {
            Err(layout(format!("holds {} numbers as {name} for {channels} channels", values.len())))
        }
    };
    let std = read("std")?;
    if let Some(bad) = std.iter().find(|s| !(s.is_finite() && **s > 0.0)) {
        return Err(layout(format!("holds the standard deviation {bad}")));
    }
    Ok(Some(Normalisation { shift: read("mean")?, scale: std.iter().map(|s| scale / s).collect() }))
}

fn file_names(root: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for item in fs::read_dir(root)? {
        let path: PathBuf = item?.path();
        if path.extension().is_some_and(|e| e == "safetensors")
            && let Some(name) = path.file_name()
        {
            names.push(name.to_string_lossy().into_owned());
        }
    }
    names.sort_unstable();
    Ok(names)
}
