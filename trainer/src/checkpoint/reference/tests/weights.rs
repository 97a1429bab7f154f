//! Files that are less than a checkpoint of the reference, and what its arguments meant.

use super::*;
use crate::model::Precision;

/// What became of a file: its checkpoint's step, and whether an array is the expected one.
fn imported_from(root: &Py, options: &Options, array: Array, expected: Array) -> (Imported, bool) {
    let folder = tempfile::tempdir().expect("a folder");
    let file = save_torch(folder.path(), root, false);
    let imported =
        import(&file, &folder.path().join("c"), options, &mut quiet).unwrap_or_else(|e| panic!("{e}"));
    let layout = sit().layout();
    assert_eq!(imported.config.sit(), sit());
    let flat = Checkpoint::open(&imported.path).expect("whole").read(&layout, array).expect("readable");
    let same = layout.entries().iter().filter(|entry| entry.trainable).all(|entry| {
        let ours = &flat[entry.offset..entry.offset + entry.len()];
        bits(ours) == bits(&values(&layout, expected, &entry.name))
    });
    (imported, same)
}

#[test]
fn weights_alone_are_imported_too() {
    let options = Options { num_heads: Some(2), encoder_depth: Some(2), ..Options::default() };
    let only = |keys: &[&str]| {
        let parts = reference(&sit(), args());
        object(parts.into_iter().filter(|(key, _)| keys.contains(key)).collect())
    };
    // As the reference's generate.py reads it.
    let (imported, same) = imported_from(&only(&["ema"]), &options, Array::Model, Array::Ema);
    assert!(same && !imported.whole && imported.progress.step == 0 && imported.progress.updates == 0);
    let (_, same) = imported_from(&only(&["ema"]), &options, Array::Ema, Array::Ema);
    assert!(same);
    // As the published model is: the state dictionary by itself.
    let Py::Dict(mut parts) = only(&["ema"]) else { panic!("no dictionary") };
    let bare = parts.remove(0).1;
    let at = Options { steps: Some(4_000_000), ..options };
    let (imported, same) = imported_from(&bare, &at, Array::Ema, Array::Ema);
    assert!(same && imported.progress.step == 4_000_000);
    assert!(imported.assumed.iter().any(|text| text.contains("AdamW")), "{:?}", imported.assumed);
    // With AdamW's state, which is left out when asked to.
    let all = object(reference(&sit(), args()));
    let (imported, same) = imported_from(&all, &Options::default(), Array::Model, Array::Model);
    assert!(same && imported.whole && imported.progress.updates == 6);
    let without = Options { weights_only: true, ..Options::default() };
    let (imported, same) = imported_from(&all, &without, Array::Model, Array::Model);
    assert!(same && !imported.whole && (imported.progress.step, imported.progress.updates) == (7, 0));
}

#[test]
fn blocks_of_early_models_are_numbered_on() {
    let Py::Dict(mut parts) = object(reference(&sit(), args())) else { panic!("no dictionary") };
    let Py::Dict(mut ema) = parts.remove(1).1 else { panic!("no dictionary") };
    for (name, _) in &mut ema {
        let Py::Str(text) = name else { panic!("no name") };
        *text = text.replacen("blocks.1.", "decoder_blocks.0.", 1);
    }
    assert!(
        ema.iter().any(|(name, _)| matches!(name, Py::Str(text) if text.starts_with("decoder_blocks.0.")))
    );
    // Where the projectors read follows from the names.
    let folder = tempfile::tempdir().expect("a folder");
    let file = save_torch(folder.path(), &Py::Dict(ema), false);
    let options = Options { num_heads: Some(2), ..Options::default() };
    let imported = import(&file, &folder.path().join("c"), &options, &mut quiet).expect("imported");
    assert_eq!(imported.config.alignment.encoder_depth, 1);
    assert!(!imported.assumed.iter().any(|text| text.contains("projectors read")), "{:?}", imported.assumed);
    let layout = imported.config.sit().layout();
    let flat = Checkpoint::open(&imported.path).expect("whole").read(&layout, Array::Ema).expect("readable");
    let entry = layout.find("blocks.1.attn.qkv.weight").expect("known");
    let ours = &flat[entry.offset..entry.offset + entry.len()];
    assert_eq!(bits(ours), bits(&values(&layout, Array::Ema, &entry.name)));
}

#[test]
fn settings_come_along_as_they_took_effect() {
    let config = |more: &[(&str, Py)]| {
        let mut args = args();
        args.extend(more.iter().map(|(key, value)| (text(*key), value.clone())));
        imported_from(&object(reference(&sit(), args)), &Options::default(), Array::Ema, Array::Ema).0
    };
    // Dropped by the model alone, whatever cfg_prob says; and twice, by the model and by train.py.
    let dropped = |more: &[(&str, Py)]| config(more).config.objective.label_drop;
    assert_eq!(dropped(&[]), 0.1);
    assert_eq!(dropped(&[("cfg_prob", Py::Float(0.0)), ("legacy", Py::Bool(false))]), 0.1);
    assert_eq!(dropped(&[("cfg_prob", Py::Float(0.1)), ("legacy", Py::Bool(false))]), 0.1);
    assert_eq!(dropped(&[("cfg_prob", Py::Float(0.1)), ("legacy", Py::Bool(true))]), 0.19);
    let early = config(&[("cfg_prob", Py::Float(0.1))]);
    assert_eq!(early.config.objective.label_drop, 0.19);
    assert!(early.assumed.iter().any(|text| text.contains("dropped twice")), "{:?}", early.assumed);
    let accumulated =
        config(&[("gradient_accumulation_steps", Py::Int(4)), ("mixed_precision", text("bf16"))]);
    assert_eq!(accumulated.config.train.global_batch, 256);
    assert_eq!(accumulated.progress.samples, 7 * 256);
    assert_eq!(accumulated.config.train.precision, Precision::Bf16);
}

#[test]
fn an_export_of_one_array_is_imported_as_weights() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = save_torch(folder.path(), &object(reference(&sit(), args())), false);
    let whole = import(&file, &folder.path().join("a"), &Options::default(), &mut quiet).expect("imported");
    let out = folder.path().join("ema.safetensors");
    let checkpoint = Checkpoint::open(&whole.path).expect("whole");
    export(&checkpoint, Contents::Ema, &out, MAX_FILE_BYTES, &mut quiet).expect("exported");
    let options = Options { num_heads: Some(2), encoder_depth: Some(2), ..Options::default() };
    let again = import(&out, &folder.path().join("b"), &options, &mut quiet).expect("imported");
    let layout = sit().layout();
    let flat = |imported: &Imported| {
        Checkpoint::open(&imported.path).expect("whole").read(&layout, Array::Ema).expect("readable")
    };
    assert_eq!(bits(&flat(&again)), bits(&flat(&whole)));
    assert!(!again.whole);
}
