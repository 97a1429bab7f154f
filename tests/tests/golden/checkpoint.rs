//! A checkpoint of the reference: into ours, and out again, without a changed bit.

use std::path::Path;

use repa_trainer::checkpoint::reference::{Contents, MAX_FILE_BYTES, Options, export, import};
use repa_trainer::checkpoint::{Array, Checkpoint};
use repa_trainer::weights::Weights;

use crate::case::Case;
use crate::train::model_config;

/// Imports the case's `.pt`, compares all that a run goes on from, exports, and compares again.
pub fn check(case: &Case) -> Result<(), String> {
    let scratch = tempfile::tempdir().map_err(|e| e.to_string())?;
    let file = case.path.with_file_name(case.str("file", ""));
    let options = Options {
        num_heads: Some(case.usize("num_heads", 16)),
        encoder_depth: Some(case.usize("encoder_depth", 8)),
        ..Options::default()
    };
    let imported = import(&file, &scratch.path().join("checkpoints"), &options, &mut |_, _| ())
        .map_err(|e| e.to_string())?;
    let expected = model_config(case);
    if imported.config.sit() != expected {
        return Err(format!("inferred {:?}, not {expected:?}", imported.config.sit()));
    }
    let steps = case.i64s("steps");
    if [imported.progress.step as i64] != *steps {
        return Err(format!("step is {} where the reference has {steps:?}", imported.progress.step));
    }
    let checkpoint = Checkpoint::open(&imported.path).map_err(|e| e.to_string())?;
    let layout = expected.layout();
    for array in Array::ALL {
        let flat = checkpoint.read(&layout, array).map_err(|e| e.to_string())?;
        for entry in layout.entries().iter().filter(|entry| entry.trainable) {
            let name = format!("{}.{}", array.prefix(), entry.name);
            let ours = &flat[entry.offset..entry.offset + entry.len()];
            same(&name, ours, &case.f32s(&name))?;
        }
    }
    let out = scratch.path().join("all.safetensors");
    check_export(case, &checkpoint, &out, MAX_FILE_BYTES)?;
    // As several files with an index.
    check_export(case, &checkpoint, &scratch.path().join("split.safetensors"), 10_000)
}

fn check_export(case: &Case, checkpoint: &Checkpoint, out: &Path, max_bytes: usize) -> Result<(), String> {
    let file =
        export(checkpoint, Contents::All, out, max_bytes, &mut |_, _| ()).map_err(|e| e.to_string())?;
    let mut exported = Weights::open(&file).map_err(|e| e.to_string())?;
    for (name, reference) in &case.weights.tensors {
        let ours = exported.tensors.remove(name).ok_or_else(|| format!("the export lacks {name}"))?;
        if ours != *reference {
            return Err(format!("{name} differs after the export"));
        }
    }
    // AdamW's own count is ours to add.
    exported.tensors.remove("updates");
    match exported.tensors.keys().next() {
        None => Ok(()),
        Some(name) => Err(format!("the export has {name}, which the reference lacks")),
    }
}

fn same(name: &str, ours: &[f32], reference: &[f32]) -> Result<(), String> {
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    if bits(ours) == bits(reference) { Ok(()) } else { Err(format!("{name} differs after the import")) }
}
