//! Finding and reading golden cases.

use std::path::{Path, PathBuf};

use repa_trainer::weights::Weights;
use repa_trainer::{Device, Tensor};
use serde_json::Value;

/// One golden file.
pub struct Case {
    /// File name without extension.
    pub name: String,
    /// The file.
    pub path: PathBuf,
    /// Metadata `kind`.
    pub kind: String,
    /// Metadata `config`.
    pub config: Value,
    /// All tensors.
    pub weights: Weights,
}

impl Case {
    /// An integer of the config; keys that a case lacks take the reference's default.
    pub fn usize(&self, key: &str, default: usize) -> usize {
        self.config
            .get(key)
            .map_or(default, |v| v.as_u64().unwrap_or_else(|| panic!("{key} is {v}")) as usize)
    }

    /// A number of the config.
    pub fn f64(&self, key: &str, default: f64) -> f64 {
        self.config.get(key).map_or(default, |v| v.as_f64().unwrap_or_else(|| panic!("{key} is {v}")))
    }

    /// A flag of the config.
    pub fn bool(&self, key: &str, default: bool) -> bool {
        self.config.get(key).map_or(default, |v| v.as_bool().unwrap_or_else(|| panic!("{key} is {v}")))
    }

    /// A string of the config.
    pub fn str<'a>(&'a self, key: &str, default: &'a str) -> &'a str {
        self.config.get(key).map_or(default, |v| v.as_str().unwrap_or_else(|| panic!("{key} is {v}")))
    }

    /// A list of integers of the config.
    pub fn usizes(&self, key: &str, default: &[usize]) -> Vec<usize> {
        self.config.get(key).map_or_else(
            || default.to_vec(),
            |v| {
                v.as_array()
                    .expect("a list")
                    .iter()
                    .map(|v| v.as_u64().expect("an integer") as usize)
                    .collect()
            },
        )
    }

    /// A tensor's elements as float32.
    pub fn f32s(&self, name: &str) -> Vec<f32> {
        self.weights.f32(name).unwrap_or_else(|e| panic!("{e}"))
    }

    /// A float64 tensor's elements.
    pub fn f64s(&self, name: &str) -> Vec<f64> {
        let raw = self.weights.tensor(name).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(raw.dtype, repa_trainer::weights::Dtype::F64, "{name}");
        raw.bytes.as_chunks().0.iter().map(|c| f64::from_le_bytes(*c)).collect()
    }

    /// An int64 tensor's elements.
    pub fn i64s(&self, name: &str) -> Vec<i64> {
        let raw = self.weights.tensor(name).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(raw.dtype, repa_trainer::weights::Dtype::I64, "{name}");
        raw.bytes.as_chunks().0.iter().map(|c| i64::from_le_bytes(*c)).collect()
    }

    /// A uint8 tensor's elements.
    pub fn u8s(&self, name: &str) -> &[u8] {
        let raw = self.weights.tensor(name).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(raw.dtype, repa_trainer::weights::Dtype::U8, "{name}");
        &raw.bytes
    }

    /// A tensor's shape.
    pub fn shape(&self, name: &str) -> &[usize] {
        &self.weights.tensor(name).unwrap_or_else(|e| panic!("{e}")).shape
    }

    /// A tensor on the device under test, as float32.
    pub fn tensor<const D: usize>(&self, name: &str, device: &Device) -> Tensor<D> {
        let shape: [usize; D] = self.shape(name).try_into().expect("rank");
        Tensor::<1>::from_data(self.f32s(name).as_slice(), device).reshape(shape)
    }
}

/// The device under test: `REPA_TEST_DEVICE` (such as `cuda:0`, in a build with the feature `cuda`), or
/// the CPU.
pub fn device() -> Device {
    let name = std::env::var("REPA_TEST_DEVICE").unwrap_or_else(|_| "cpu".into());
    repa_trainer::train::device(&name, 0).unwrap_or_else(|e| panic!("REPA_TEST_DEVICE: {e}"))
}

/// The same for so many images through Inception, each some ten billion operations. A GPU that the CPU plays takes seconds
/// for one (llvmpipe 7, the stand-in for CUDA more).
pub fn device_for(images: usize) -> Device {
    let played =
        is_stand_in() || std::env::var("REPA_TEST_DEVICE").is_ok_and(|name| name == "wgpu" && images > 3);
    if played {
        println!("computed on the CPU: a GPU that is played would take too long");
        return Device::flex();
    }
    device()
}

fn is_stand_in() -> bool {
    std::env::var_os("REPA_TEST_GPU").is_some_and(|name| name == "stand-in")
}

/// What the tolerances of the golden README are multiplied by. They are for float32; a GPU multiplies
/// matrices in TF32, whose 10 bits of fraction are 2^13 times coarser than float32's 23, and errors of
/// random sign average out over a sum: two orders of magnitude are allowed. The stand-in for CUDA (`tests/stand_in`)
/// multiplies in float32.
pub fn slack() -> f64 {
    match std::env::var("REPA_TEST_DEVICE") {
        Ok(name) if name.starts_with("cuda") && !is_stand_in() => 100.0,
        _ => 1.0,
    }
}

/// The folder of cases.
pub fn folder() -> PathBuf {
    std::env::var_os("REPA_GOLDEN_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("golden"), PathBuf::from)
}

/// Every safetensors file of the folder, sorted by name.
pub fn find_all() -> Vec<Case> {
    let folder = folder();
    let mut paths: Vec<PathBuf> = std::fs::read_dir(&folder)
        .unwrap_or_else(|e| panic!("cannot list {}: {e}", folder.display()))
        .map(|entry| entry.expect("directory entry").path())
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    paths.sort();
    assert!(!paths.is_empty(), "no golden cases in {}", folder.display());
    paths.into_iter().map(read).collect()
}

fn read(path: PathBuf) -> Case {
    let weights = Weights::open_safetensors(&path).unwrap_or_else(|e| panic!("{e}"));
    let kind =
        weights.metadata.get("kind").unwrap_or_else(|| panic!("{} names no kind", path.display())).clone();
    let config =
        weights.metadata.get("config").map_or(Value::Null, |c| serde_json::from_str(c).expect("JSON"));
    let name = path.file_stem().expect("a file name").to_string_lossy().into_owned();
    Case { name, path, kind, config, weights }
}
