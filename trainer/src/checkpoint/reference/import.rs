//! The reference's checkpoint into ours.

use std::path::{Path, PathBuf};

use super::source::{Foreign, Moments, Slot};
use super::{ReferenceError, infer};
use crate::checkpoint::{About, Array, Arrays, Checkpoints, Frozen, Progress};
use crate::config::Config;
use crate::objective::LossScaler;
use crate::params::{Entry, Layout};

/// What a file may not say of its model; these win over what it does say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Options {
    /// Attention heads.
    pub num_heads: Option<usize>,
    /// The block after which the projectors read.
    pub encoder_depth: Option<usize>,
    /// Steps behind the weights.
    pub steps: Option<u64>,
    /// To leave AdamW's state out where there is one.
    pub weights_only: bool,
}

/// A checkpoint that has been imported.
#[derive(Debug, Clone)]
pub struct Imported {
    /// Its folder.
    pub path: PathBuf,
    /// Where the run stood.
    pub progress: Progress,
    /// Whether AdamW's state came along.
    pub whole: bool,
    /// The run's configuration, as far as the file says; defaults for the rest.
    pub config: Config,
    /// A sentence about each setting that matters and that the file does not say.
    pub assumed: Vec<String>,
}

impl Imported {
    /// The configuration as a TOML file that trains on in the run folder `run`.
    pub fn config_toml(&self, run: &Path) -> String {
        let mut config = self.config.clone();
        config.run.dir = run.to_owned();
        toml::to_string_pretty(&config).expect("a configuration is made of what TOML has")
    }
}

/// How far a frozen parameter may be from the layout's own. Float32 rounds the values, all within 1, at
/// 6e-8; other libraries' sines differ by about as much.
const FROZEN_TOLERANCE: f32 = 1e-5;

/// Imports a checkpoint of the reference's (`.pt`, zip archive or old pickle) or an export of our own, as the
/// first checkpoint of `folder`, a run's folder of checkpoints. Weights alone, such as the published models,
/// become both model and average, and AdamW begins anew. The arrays are in memory at once: 16 bytes a
/// parameter. `progress` is called with tensors done and to do.
///
/// # Errors
/// The file is damaged, no such checkpoint, or of a model that is not known here; nothing says the number
/// of heads; the folder holds checkpoints already, or cannot be written.
pub fn import(
    file: &Path,
    folder: &Path,
    options: &Options,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Imported, ReferenceError> {
    let checkpoints = Checkpoints::at(folder);
    if let Some(step) = checkpoints.list()?.steps.last() {
        return Err(ReferenceError::Occupied { path: folder.to_owned(), step: *step });
    }
    let mut foreign = Foreign::open(file)?;
    let (config, assumed) = infer::config(file, &foreign, options)?;
    let layout = config.sit().layout();
    let (model, ema) = (foreign.model.clone(), foreign.ema.clone());
    foreign.check(Array::Model, &model, &layout)?;
    foreign.check(Array::Ema, &ema, &layout)?;
    let whole = foreign.whole && !options.weights_only;
    let mut assumed = assumed;
    if !whole {
        assumed.push(
            "only weights are taken: AdamW begins anew, and the order of the data at its beginning"
                .to_owned(),
        );
    }
    let Moments { exp_avg, exp_avg_sq, updates } =
        if whole { foreign.moments(&layout)? } else { Moments::none() };
    let trained = trainable(&layout);
    // A run that has made no step yet has no moments.
    let fresh = exp_avg.is_empty() && exp_avg_sq.is_empty() && updates == 0;
    if !fresh {
        foreign.check(Array::ExpAvg, &exp_avg, &trained)?;
        foreign.check(Array::ExpAvgSq, &exp_avg_sq, &trained)?;
    }

    let total = model.len() + ema.len() + exp_avg.len() + exp_avg_sq.len();
    let mut done = 0;
    let mut frozen: Vec<(Array, usize, Vec<f32>)> = Vec::new();
    let mut flats = Vec::with_capacity(4);
    for (array, slots) in Array::ALL.into_iter().zip([&model, &ema, &exp_avg, &exp_avg_sq]) {
        let mut flat = vec![0.0; layout.trainable_len()];
        for slot in slots {
            let (number, entry) = find(&layout, slot);
            if entry.trainable {
                foreign.take(slot, &mut flat[entry.offset..entry.offset + entry.len()])?;
            } else {
                let mut values = vec![0.0; entry.len()];
                foreign.take(slot, &mut values)?;
                frozen.push((array, number, values));
            }
            done += 1;
            progress(done, total);
        }
        flats.push(flat);
    }
    for (array, number, values) in &frozen {
        check_frozen(file, *array, &layout.entries()[*number], values)?;
    }

    let step = options.steps.or(foreign.steps).or_else(|| named_step(file));
    let step = match step {
        Some(step) => step,
        None if whole => return Err(ReferenceError::foreign(file, "it has no steps".to_owned())),
        None => 0,
    };
    let progress = Progress {
        step,
        samples: if whole { step.saturating_mul(config.train.global_batch as u64) } else { 0 },
        updates,
        scaler: LossScaler::default(),
    };
    let arrays = Arrays { model: &flats[0], ema: &flats[1], exp_avg: &flats[2], exp_avg_sq: &flats[3] };
    let frozen: Vec<Frozen> = frozen
        .iter()
        .map(|(array, number, values)| Frozen { array: *array, number: *number, values })
        .collect();
    checkpoints.discard_unfinished()?;
    let record = checkpoints.write_shard(progress.step, &layout, &arrays.parts(0, 1), &frozen, (0, 1))?;
    let about = About {
        progress,
        config: serde_json::to_value(&config).expect("the configuration serialises"),
        metrics: Default::default(),
        branch: None,
        node_local: false,
        data: None,
    };
    checkpoints.commit(&layout, about, vec![record])?;
    let path = checkpoints.path(progress.step);
    Ok(Imported { path, progress, whole, config, assumed })
}

/// The step that the reference names a file by: `0400000.pt`.
fn named_step(file: &Path) -> Option<u64> {
    let stem = file.file_stem()?.to_str()?;
    if stem.bytes().all(|b| b.is_ascii_digit()) { stem.parse().ok() } else { None }
}

/// The trainable part of a layout, for checks of names and shapes.
fn trainable(layout: &Layout) -> Layout {
    let mut trained = Layout::default();
    for entry in layout.entries().iter().filter(|entry| entry.trainable) {
        trained.add(entry.name.clone(), &entry.shape, entry.init.clone());
    }
    trained
}

fn find<'a>(layout: &'a Layout, slot: &Slot) -> (usize, &'a Entry) {
    let found = layout.entries().iter().enumerate().find(|(_, entry)| entry.name == slot.name);
    found.expect("checked against the layout before")
}

/// Training and sampling here take frozen parameters from the model's description, so a file's must be
/// those. The moving average of one drifts by rounding and is only kept.
fn check_frozen(path: &Path, array: Array, entry: &Entry, values: &[f32]) -> Result<(), ReferenceError> {
    if array != Array::Model {
        return Ok(());
    }
    let mut own = vec![0.0; entry.len()];
    entry.init.fill(&mut own, 0, 0);
    // A NaN is off too.
    let near = |(own, value): (&f32, &f32)| (own - value).abs() <= FROZEN_TOLERANCE;
    match own.iter().zip(values).position(|pair| !near(pair)) {
        None => Ok(()),
        Some(at) => Err(ReferenceError::foreign(
            path,
            format!(
                "model.{} is not the reference's fixed one: element {at} is {} where {} belongs",
                entry.name, values[at], own[at]
            ),
        )),
    }
}
