//! What is imported: a `.pt` of the reference, or an export of our own with everything in it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value as Json;

use super::ReferenceError;
use crate::checkpoint::Array;
use crate::config::Config;
use crate::params::Layout;
use crate::weights::pickle::{TensorRef, Value};
use crate::weights::{Dtype, RawTensor, TorchFile, Weights};

/// A tensor of the file that has not been taken out yet.
#[derive(Debug, Clone)]
pub(super) struct Slot {
    pub name: String,
    pub shape: Vec<usize>,
    dtype: Option<Dtype>,
    place: Place,
}

#[derive(Debug, Clone)]
enum Place {
    Torch(Arc<TensorRef>),
    /// Full name in a safetensors file.
    Safetensors(String),
}

/// A file to import.
pub(super) struct Foreign {
    path: PathBuf,
    /// How many bytes it has: no model in it has more.
    bytes: u64,
    content: Content,
    /// Weights in the file's order.
    pub model: Vec<Slot>,
    /// Their moving average.
    pub ema: Vec<Slot>,
    /// Steps that the run had made, where the file says it.
    pub steps: Option<u64>,
    /// Whether AdamW's state is there too, and the run can go on as if it had not been moved.
    pub whole: bool,
    /// The block after which the projectors read, where the names of the blocks show it.
    pub encoder_depth: Option<usize>,
    /// The run's arguments; an empty object where the file has none.
    pub args: Json,
    /// Our own configuration, in our own exports.
    pub config: Option<Config>,
}

enum Content {
    Torch(TorchFile),
    Safetensors(Weights),
}

/// AdamW's state.
pub(super) struct Moments {
    pub exp_avg: Vec<Slot>,
    pub exp_avg_sq: Vec<Slot>,
    /// Steps that AdamW has made.
    pub updates: u64,
}

impl Moments {
    /// Of an AdamW that has made no step.
    pub fn none() -> Self {
        Self { exp_avg: Vec::new(), exp_avg_sq: Vec::new(), updates: 0 }
    }
}

impl Foreign {
    pub fn open(path: &Path) -> Result<Self, ReferenceError> {
        let safetensors = path.is_dir()
            || path.to_string_lossy().ends_with(".index.json")
            || path.extension().is_some_and(|e| e == "safetensors");
        if safetensors { Self::safetensors(path) } else { Self::torch(path) }
    }

    fn torch(path: &Path) -> Result<Self, ReferenceError> {
        let foreign = |problem: String| ReferenceError::foreign(path, problem);
        let file = TorchFile::open(path)?;
        let bytes = std::fs::metadata(path).map_or(0, |m| m.len());
        let part = |key: &str, value: &Value| -> Result<Vec<Slot>, ReferenceError> {
            let slots: Vec<Slot> = value
                .entries()
                .map(|(name, value)| match (name, value) {
                    (Value::Str(name), Value::Tensor(tensor)) => Ok(slot(name, tensor)),
                    (Value::Str(name), other) => {
                        Err(foreign(format!("{key}.{name} is {}, where a tensor belongs", other.kind())))
                    }
                    (other, _) => {
                        Err(foreign(format!("a key of {key} is {}, where a name belongs", other.kind())))
                    }
                })
                .collect::<Result<_, _>>()?;
            if slots.is_empty() { Err(foreign(format!("{key} holds no tensors"))) } else { Ok(slots) }
        };
        let found = |key: &str| file.find(&[key]);
        // The published models are the average's state dictionary alone, by itself or as `ema`.
        let (mut model, mut ema) = match (found("model"), found("ema")) {
            (Some(model), Some(ema)) => (part("model", model)?, part("ema", ema)?),
            (Some(only), None) => (part("model", only)?, part("model", only)?),
            (None, Some(only)) => (part("ema", only)?, part("ema", only)?),
            (None, None) if found(PATCHES).is_some() => {
                (part("the file", file.root())?, part("the file", file.root())?)
            }
            (None, None) => return Err(foreign(format!("it has no model, no ema and no {PATCHES}"))),
        };
        let encoder_depth = number_blocks(&mut model);
        number_blocks(&mut ema);
        let steps = match found("steps") {
            None => None,
            Some(steps) => {
                Some(steps.as_int().and_then(|steps| u64::try_from(steps).ok()).ok_or_else(|| {
                    foreign(format!("steps is {}, where a natural number belongs", steps.kind()))
                })?)
            }
        };
        let whole = ["model", "ema", "opt"].into_iter().all(|key| found(key).is_some());
        let args = match file.find(&["args"]) {
            None => Json::Object(Default::default()),
            Some(args) => args.to_json().map_err(|e| foreign(format!("args: {e}")))?,
        };
        let content = Content::Torch(file);
        Ok(Self {
            path: path.to_owned(),
            bytes,
            content,
            model,
            ema,
            steps,
            whole,
            encoder_depth,
            args,
            config: None,
        })
    }

    fn safetensors(path: &Path) -> Result<Self, ReferenceError> {
        let weights = Weights::open(path)?;
        let path = weights.path.clone();
        let has = |array: Array| !stored(&weights, array).is_empty();
        let whole = has(Array::Model) && has(Array::Ema);
        let steps = match whole || weights.tensors.contains_key("steps") {
            true => Some(count(&path, &weights, "steps")?),
            false => weights.metadata.get("steps").and_then(|steps| steps.parse().ok()),
        };
        // An export of one array has the reference's bare names.
        let only = || match (has(Array::Ema), has(Array::Model)) {
            (true, _) => stored(&weights, Array::Ema),
            (_, true) => stored(&weights, Array::Model),
            _ => bare(&weights),
        };
        let (mut model, mut ema) = match whole {
            true => (stored(&weights, Array::Model), stored(&weights, Array::Ema)),
            false => (only(), only()),
        };
        if model.iter().all(|slot| slot.name != PATCHES) {
            return Err(ReferenceError::foreign(&path, format!("it has no {PATCHES}")));
        }
        let encoder_depth = number_blocks(&mut model);
        number_blocks(&mut ema);
        let json: Json = weights
            .metadata
            .get("config")
            .and_then(|text| serde_json::from_str(text).ok())
            .unwrap_or_default();
        Ok(Self {
            bytes: weights.tensors.values().map(|t| t.bytes.len() as u64).sum(),
            model,
            ema,
            steps,
            whole,
            encoder_depth,
            config: serde_json::from_value(json.clone()).ok(),
            args: json,
            content: Content::Safetensors(weights),
            path,
        })
    }

    /// AdamW's state for a layout's trainable parameters. PyTorch numbers them as `parameters()` does,
    /// frozen ones included, which is a layout's order.
    pub fn moments(&mut self, layout: &Layout) -> Result<Moments, ReferenceError> {
        let path = self.path.clone();
        let file = match &mut self.content {
            Content::Safetensors(weights) => {
                let updates = if weights.tensors.contains_key("updates") {
                    count(&path, weights, "updates")?
                } else {
                    self.steps.unwrap_or(0)
                };
                let (exp_avg, exp_avg_sq) =
                    (stored(weights, Array::ExpAvg), stored(weights, Array::ExpAvgSq));
                return Ok(Moments { exp_avg, exp_avg_sq, updates });
            }
            Content::Torch(file) => file,
        };
        let foreign = |problem: String| ReferenceError::foreign(&path, problem);
        let missing = |what: &str| foreign(format!("it has no {what}"));
        in_layout_order(&self.model, layout).map_err(&foreign)?;
        let groups = file.find(&["opt", "param_groups"]).ok_or_else(|| missing("opt.param_groups"))?;
        let numbers: Vec<_> = groups
            .items()
            .iter()
            .flat_map(|group| group.get("params").map_or(&[][..], Value::items))
            .map(Value::as_int)
            .collect();
        if !numbers.iter().copied().eq((0..layout.entries().len() as i64).map(Some)) {
            return Err(foreign(format!(
                "opt.param_groups does not list the model's {} parameters as 0, 1, 2 and so on",
                layout.entries().len()
            )));
        }
        let state = file.find(&["opt", "state"]).ok_or_else(|| missing("opt.state"))?;
        let mut moments = Moments::none();
        let mut steps = Vec::new();
        for (key, value) in state.entries() {
            let entry =
                key.as_int().and_then(|k| usize::try_from(k).ok()).and_then(|k| layout.entries().get(k));
            let entry = entry
                .ok_or_else(|| foreign("opt.state has a key that is no parameter's number".to_owned()))?;
            for (part, value) in value.entries() {
                let what = || format!("opt.state of {}: {}", entry.name, part.as_str().unwrap_or("a key"));
                match (part.as_str(), value) {
                    (Some("exp_avg"), Value::Tensor(t)) => moments.exp_avg.push(slot(&entry.name, t)),
                    (Some("exp_avg_sq"), Value::Tensor(t)) => moments.exp_avg_sq.push(slot(&entry.name, t)),
                    (Some("step"), step) => steps.push((entry.name.clone(), step.clone())),
                    _ => {
                        return Err(foreign(format!(
                            "{} ({}) is nothing that AdamW keeps in the reference (step, exp_avg, exp_avg_sq)",
                            what(),
                            value.kind()
                        )));
                    }
                }
            }
        }
        // All have made the same number of steps, or one number would not do.
        let mut first: Option<(String, u64)> = None;
        for (name, step) in steps {
            let step = step_count(file, &step)?
                .ok_or_else(|| foreign(format!("opt.state of {name}: step is no natural number")))?;
            match &first {
                None => first = Some((name, step)),
                Some((_, other)) if *other == step => {}
                Some((other_name, other)) => {
                    return Err(foreign(format!(
                        "opt.state has made {other} steps for {other_name} and {step} for {name}, and they must \
                         be the same for all parameters"
                    )));
                }
            }
        }
        moments.updates = first.map_or(0, |(_, step)| step);
        Ok(moments)
    }

    /// Refuses weights whose shapes stand for more bytes than the file has.
    pub fn check_size(&self) -> Result<(), ReferenceError> {
        let size = |slot: &Slot| slot.shape.iter().try_fold(4u64, |n, &d| n.checked_mul(d as u64));
        let total = self.model.iter().try_fold(0u64, |n, slot| n.checked_add(size(slot)?));
        match total {
            Some(total) if total <= self.bytes => Ok(()),
            _ => Err(ReferenceError::foreign(
                &self.path,
                format!("the shapes of its tensors stand for more than its {} bytes", self.bytes),
            )),
        }
    }

    /// Checks that the tensors of `array` are a layout's, by name, shape and type.
    pub fn check(&self, array: Array, slots: &[Slot], layout: &Layout) -> Result<(), ReferenceError> {
        let what = array.prefix();
        // The check needs names and shapes only.
        let bare = |slot: &Slot| {
            let dtype = slot.dtype.unwrap_or(Dtype::F32);
            (slot.name.clone(), RawTensor { dtype, shape: slot.shape.clone(), bytes: Vec::new() })
        };
        let bare = Weights {
            path: self.path.clone(),
            tensors: slots.iter().map(bare).collect(),
            ..Weights::default()
        };
        if bare.tensors.len() != slots.len() {
            return Err(ReferenceError::foreign(&self.path, format!("{what} has a tensor twice")));
        }
        bare.check(layout).map_err(|error| match error {
            crate::weights::WeightsError::Mismatch { problem, .. } => {
                ReferenceError::foreign(&self.path, format!("{what}: {problem}"))
            }
            other => other.into(),
        })?;
        match slots.iter().find(|slot| slot.dtype != Some(Dtype::F32)) {
            None => Ok(()),
            Some(slot) => Err(ReferenceError::foreign(
                &self.path,
                format!("{what}.{} is not of float32, as the reference's are", slot.name),
            )),
        }
    }

    /// Reads a float32 tensor into `out`, bit by bit; in our own exports with everything it is gone thereafter.
    pub fn take(&mut self, slot: &Slot, out: &mut [f32]) -> Result<(), ReferenceError> {
        let raw = match (&mut self.content, &slot.place) {
            (Content::Torch(file), Place::Torch(tensor)) => file.tensor(tensor)?,
            (Content::Safetensors(weights), Place::Safetensors(name)) => {
                let found = match self.whole {
                    true => weights.tensors.remove(name),
                    // The model and its average are the same.
                    false => weights.tensors.get(name).cloned(),
                };
                found.ok_or_else(|| ReferenceError::foreign(&self.path, format!("{name} is missing")))?
            }
            _ => unreachable!("a slot is taken from the file that it was made for"),
        };
        let (elements, rest) = raw.bytes.as_chunks::<4>();
        if elements.len() != out.len() || !rest.is_empty() {
            let problem =
                format!("{} has {} bytes where {} belong", slot.name, raw.bytes.len(), 4 * out.len());
            return Err(ReferenceError::foreign(&self.path, problem));
        }
        out.iter_mut().zip(elements).for_each(|(out, bytes)| *out = f32::from_le_bytes(*bytes));
        Ok(())
    }
}

fn slot(name: &str, tensor: &Arc<TensorRef>) -> Slot {
    Slot {
        name: name.to_owned(),
        shape: tensor.shape.clone(),
        dtype: tensor.dtype,
        place: Place::Torch(tensor.clone()),
    }
}

/// The tensors of an array in a safetensors file.
fn stored(weights: &Weights, array: Array) -> Vec<Slot> {
    let tensors = weights.tensors.iter();
    tensors
        .filter_map(|(full, tensor)| {
            let name = full.strip_prefix(array.prefix())?.strip_prefix('.')?.to_owned();
            let place = Place::Safetensors(full.clone());
            Some(Slot { name, shape: tensor.shape.clone(), dtype: Some(tensor.dtype), place })
        })
        .collect()
}

/// The tensors of a safetensors file under their own names.
fn bare(weights: &Weights) -> Vec<Slot> {
    let slot = |(name, tensor): (&String, &RawTensor)| Slot {
        name: name.clone(),
        shape: tensor.shape.clone(),
        dtype: Some(tensor.dtype),
        place: Place::Safetensors(name.clone()),
    };
    weights.tensors.iter().map(slot).collect()
}

/// The weight by which a state dictionary of the reference's model is known.
const PATCHES: &str = "x_embedder.proj.weight";

/// Earlier models of the reference (`--legacy` there) call the blocks after the projectors' `decoder_blocks`, counted
/// from 0 again. Numbers them on from the others, and gives how many those are.
fn number_blocks(slots: &mut [Slot]) -> Option<usize> {
    let number = |slot: &Slot| slot.name.strip_prefix("blocks.")?.split('.').next()?.parse::<usize>().ok();
    let first = slots.iter().filter_map(number).max().map_or(0, |last| last.saturating_add(1));
    let mut found = false;
    for slot in slots.iter_mut() {
        let rest = slot.name.strip_prefix("decoder_blocks.").and_then(|rest| rest.split_once('.'));
        if let Some((number, rest)) = rest
            && let Ok(number) = number.parse::<usize>()
        {
            slot.name = format!("blocks.{}.{rest}", number.saturating_add(first));
            found = true;
        }
    }
    found.then_some(first)
}

/// A count that an export holds as an int64 tensor of one element.
fn count(path: &Path, weights: &Weights, name: &str) -> Result<u64, ReferenceError> {
    let tensor = weights.tensors.get(name).filter(|t| t.dtype == Dtype::I64);
    tensor
        .and_then(|t| Some(i64::from_le_bytes(t.bytes.as_slice().try_into().ok()?)))
        .and_then(|n| u64::try_from(n).ok())
        .ok_or_else(|| ReferenceError::foreign(path, format!("it has no {name} (export with --all)")))
}

/// The reference's numbers follow the order of its state dictionary. Another order would give moments
/// to the wrong parameters.
fn in_layout_order(model: &[Slot], layout: &Layout) -> Result<(), String> {
    match model.iter().zip(layout.entries()).find(|(slot, entry)| slot.name != entry.name) {
        None => Ok(()),
        Some((slot, entry)) => Err(format!(
            "model.{} stands where the reference has {}, so that the numbers in opt.state cannot be relied on \
             (--weights-only leaves them out)",
            slot.name, entry.name
        )),
    }
}

/// AdamW's `step`: a tensor of one element, or a number in older files.
fn step_count(file: &mut TorchFile, step: &Value) -> Result<Option<u64>, ReferenceError> {
    let number = match step {
        Value::Tensor(tensor) => {
            let raw = if tensor.shape.iter().all(|&d| d == 1) { Some(file.tensor(tensor)?) } else { None };
            raw.and_then(|raw| {
                let bytes = raw.bytes.as_slice();
                match raw.dtype {
                    Dtype::F32 => Some(f64::from(f32::from_le_bytes(bytes.try_into().ok()?))),
                    Dtype::F64 => Some(f64::from_le_bytes(bytes.try_into().ok()?)),
                    Dtype::I64 => Some(i64::from_le_bytes(bytes.try_into().ok()?) as f64),
                    _ => None,
                }
            })
        }
        other => other.as_f64(),
    };
    Ok(number.filter(|n| *n >= 0.0 && *n < 2f64.powi(53) && n.fract() == 0.0).map(|n| n as u64))
}
