mod weights;

use std::io::Write;
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::*;
use crate::checkpoint::{About, Array, Arrays, Checkpoint, Checkpoints, Progress};
use crate::config::Config;
use crate::model::SitConfig;
use crate::objective::LossScaler;
use crate::params::Layout;
use crate::weights::Weights;

/// What a pickle is made of here.
#[derive(Clone)]
enum Py {
    Dict(Vec<(Py, Py)>),
    List(Vec<Py>),
    Str(String),
    Int(i32),
    Float(f64),
    Bool(bool),
    Tensor(Vec<usize>, Vec<f32>),
    Namespace(Vec<(Py, Py)>),
}

fn text(s: impl Into<String>) -> Py {
    Py::Str(s.into())
}

/// Protocol 2, as `torch.save` writes it; storages go to `storages`, keyed by position.
fn pickle(value: &Py, out: &mut Vec<u8>, storages: &mut Vec<Vec<f32>>) {
    let string = |s: &str, out: &mut Vec<u8>| {
        out.push(b'X');
        out.extend((s.len() as u32).to_le_bytes());
        out.extend(s.as_bytes());
    };
    let int = |i: i32, out: &mut Vec<u8>| {
        out.push(b'J');
        out.extend(i.to_le_bytes());
    };
    match value {
        Py::Dict(entries) => {
            out.extend(b"}(");
            for (key, value) in entries {
                pickle(key, out, storages);
                pickle(value, out, storages);
            }
            out.push(b'u');
        }
        Py::List(items) => {
            out.extend(b"](");
            items.iter().for_each(|item| pickle(item, out, storages));
            out.push(b'e');
        }
        Py::Str(s) => string(s, out),
        Py::Int(i) => int(*i, out),
        Py::Float(f) => {
            out.push(b'G');
            out.extend(f.to_be_bytes());
        }
        Py::Bool(b) => out.push(if *b { 0x88 } else { 0x89 }),
        Py::Tensor(shape, values) => {
            out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
            string("storage", out);
            out.extend(b"ctorch\nFloatStorage\n");
            string(&storages.len().to_string(), out);
            string("cpu", out);
            int(values.len() as i32, out);
            out.extend(b"NtQ");
            int(0, out);
            out.push(b'(');
            shape.iter().for_each(|&d| int(d as i32, out));
            out.extend(b"t(");
            (0..shape.len()).for_each(|d| int(shape[d + 1..].iter().product::<usize>() as i32, out));
            out.extend(b"t\x89ccollections\nOrderedDict\n)RtR");
            storages.push(values.clone());
        }
        Py::Namespace(attributes) => {
            out.extend(b"cargparse\nNamespace\n)\x81");
            pickle(&Py::Dict(attributes.clone()), out, storages);
            out.push(b'b');
        }
    }
}

fn save_torch(folder: &Path, object: &Py, legacy: bool) -> PathBuf {
    let path = folder.join(if legacy { "legacy.pt" } else { "zip.pt" });
    let (mut body, mut storages) = (b"\x80\x02".to_vec(), Vec::new());
    pickle(object, &mut body, &mut storages);
    body.push(b'.');
    let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let mut file = std::fs::File::create(&path).expect("created");
    if legacy {
        let mut out = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M\xe9\x03.".to_vec();
        out.extend(b"\x80\x02}X\x0d\x00\x00\x00little_endian\x88s.");
        out.extend(body);
        let keys = (0..storages.len()).map(|key| text(key.to_string())).collect();
        out.extend(b"\x80\x02");
        pickle(&Py::List(keys), &mut out, &mut Vec::new());
        out.push(b'.');
        for storage in &storages {
            out.extend((storage.len() as u64).to_le_bytes());
            out.extend(bytes(storage));
        }
        file.write_all(&out).expect("written");
        return path;
    }
    let mut zip = zip::ZipWriter::new(file);
    let stored = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    let named = |key: usize| format!("archive/data/{key}");
    let entries = storages.iter().enumerate().map(|(key, storage)| (named(key), bytes(storage)));
    for (name, contents) in std::iter::once(("archive/data.pkl".to_owned(), body)).chain(entries) {
        zip.start_file(name, stored).expect("started");
        zip.write_all(&contents).expect("written");
    }
    zip.finish().expect("finished");
    path
}

fn sit() -> SitConfig {
    SitConfig {
        input_size: 4,
        patch_size: 2,
        in_channels: 3,
        hidden_size: 8,
        depth: 2,
        num_heads: 2,
        mlp_ratio: 3.0,
        num_classes: 3,
        encoder_depth: 2,
        projector_dim: 5,
        z_dims: vec![6, 7],
        qk_norm: false,
    }
}

/// The values of an array in a made-up run; every bit pattern must survive, NaNs' too.
fn values(layout: &Layout, array: Array, name: &str) -> Vec<f32> {
    let entry = layout.find(name).expect("known");
    let mut values = vec![0.0; entry.len()];
    if entry.trainable {
        let salt = array as usize as f32 * 100.0 + entry.offset as f32;
        values.iter_mut().enumerate().for_each(|(i, v)| *v = (salt + i as f32).sin());
        values[0] = f32::from_bits(0x7fc0_1234);
    } else {
        entry.init.fill(&mut values, 0, 0);
        if array == Array::Ema {
            values.iter_mut().for_each(|v| *v = f32::from_bits(v.to_bits() ^ 1));
        }
    }
    values
}

/// A checkpoint as the reference saves it, by top-level key.
fn reference(sit: &SitConfig, args: Vec<(Py, Py)>) -> Vec<(&'static str, Py)> {
    let layout = sit.layout();
    let tensor = |array: Array, name: &str| {
        Py::Tensor(layout.find(name).expect("known").shape.clone(), values(&layout, array, name))
    };
    let dictionary = |array: Array| {
        let entries = layout.entries().iter();
        Py::Dict(entries.map(|e| (text(e.name.clone()), tensor(array, &e.name))).collect())
    };
    let state = |name: &str| {
        Py::Dict(vec![
            (text("step"), Py::Tensor(vec![], vec![6.0])),
            (text("exp_avg"), tensor(Array::ExpAvg, name)),
            (text("exp_avg_sq"), tensor(Array::ExpAvgSq, name)),
        ])
    };
    let numbered = layout.entries().iter().enumerate();
    let states =
        numbered.filter(|(_, e)| e.trainable).map(|(i, e)| (Py::Int(i as i32), state(&e.name))).collect();
    let numbers = (0..layout.entries().len() as i32).map(Py::Int).collect();
    let group = Py::Dict(vec![(text("lr"), Py::Float(1e-4)), (text("params"), Py::List(numbers))]);
    let opt =
        Py::Dict(vec![(text("state"), Py::Dict(states)), (text("param_groups"), Py::List(vec![group]))]);
    vec![
        ("model", dictionary(Array::Model)),
        ("ema", dictionary(Array::Ema)),
        ("opt", opt),
        ("args", Py::Namespace(args)),
        ("steps", Py::Int(7)),
    ]
}

fn object(parts: Vec<(&'static str, Py)>) -> Py {
    Py::Dict(parts.into_iter().map(|(key, value)| (text(key), value)).collect())
}

fn args() -> Vec<(Py, Py)> {
    vec![
        (text("model"), text("tiny")),
        (text("num_heads"), Py::Int(2)),
        (text("encoder_depth"), Py::Int(2)),
        (text("path_type"), text("cosine")),
        (text("learning_rate"), Py::Float(3e-4)),
        (text("batch_size"), Py::Int(64)),
        (text("seed"), Py::Int(5)),
    ]
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn quiet(_: usize, _: usize) {}

/// Every tensor of an export with everything in it.
fn check_export(path: &Path, layout: &Layout) {
    let exported = Weights::open(path).expect("readable");
    for entry in layout.entries() {
        for array in Array::ALL {
            let name = format!("{}.{}", array.prefix(), entry.name);
            if !entry.trainable && matches!(array, Array::ExpAvg | Array::ExpAvgSq) {
                assert!(!exported.tensors.contains_key(&name), "{name}");
                continue;
            }
            assert_eq!(exported.tensor(&name).expect("there").shape, entry.shape);
            let expected = values(layout, array, &entry.name);
            assert_eq!(bits(&exported.f32(&name).expect("float32")), bits(&expected), "{name}");
        }
    }
    assert_eq!(exported.tensors["steps"].bytes, 7i64.to_le_bytes());
    assert_eq!(exported.tensors["updates"].bytes, 6i64.to_le_bytes());
}

#[test]
fn a_reference_checkpoint_goes_there_and_back_without_a_changed_bit() {
    let sit = sit();
    let layout = sit.layout();
    for legacy in [false, true] {
        let folder = tempfile::tempdir().expect("a folder");
        let file = save_torch(folder.path(), &object(reference(&sit, args())), legacy);
        let imported =
            import(&file, &folder.path().join("a"), &Options::default(), &mut quiet).expect("imported");
        assert_eq!(imported.config.sit(), sit);
        assert_eq!(imported.config.objective.path, crate::objective::Path::Cosine);
        assert_eq!(imported.config.optimizer.learning_rate, 3e-4);
        assert_eq!((imported.config.train.seed, imported.config.train.global_batch), (5, 64));
        let progress = imported.progress;
        assert_eq!((progress.step, progress.updates, progress.samples), (7, 6, 448));
        assert!(imported.assumed.is_empty(), "{:?}", imported.assumed);

        let checkpoint = Checkpoint::open(&imported.path).expect("whole");
        // What a run goes on from.
        for array in Array::ALL {
            let flat = checkpoint.read(&layout, array).expect("of this model");
            for entry in layout.entries().iter().filter(|e| e.trainable) {
                let part = &flat[entry.offset..entry.offset + entry.len()];
                assert_eq!(bits(part), bits(&values(&layout, array, &entry.name)), "{}", entry.name);
            }
        }
        let out = folder.path().join("out/all.safetensors");
        let first = export(&checkpoint, Contents::All, &out, MAX_FILE_BYTES, &mut quiet).expect("exported");
        assert_eq!(first, out);
        check_export(&out, &layout);

        // Our own export in again, through several files with an index.
        let split = folder.path().join("split/all.safetensors");
        let index = export(&checkpoint, Contents::All, &split, 4000, &mut quiet).expect("exported");
        assert!(index.ends_with("all.safetensors.index.json"), "{}", index.display());
        let again =
            import(&index, &folder.path().join("b"), &Options::default(), &mut quiet).expect("imported");
        assert_eq!((&again.config, again.progress), (&imported.config, progress));
        let checkpoint = Checkpoint::open(&again.path).expect("whole");
        let out = folder.path().join("out/again.safetensors");
        export(&checkpoint, Contents::All, &out, MAX_FILE_BYTES, &mut quiet).expect("exported");
        assert_eq!(std::fs::read(&first).expect("read"), std::fs::read(&out).expect("read"));
    }
}

#[test]
fn weights_alone_carry_the_reference_names_and_the_frozen_ones() {
    let folder = tempfile::tempdir().expect("a folder");
    let layout = sit().layout();
    let mut config = Config::default();
    let sit = sit();
    (config.model.input_size, config.model.in_channels, config.model.hidden_size) = (4, 3, 8);
    (config.model.depth, config.model.num_heads, config.model.mlp_ratio) = (2, 2, 3.0);
    config.model.num_classes = 3;
    (config.alignment.encoder_depth, config.alignment.projector_dim) = (2, 5);
    config.alignment.z_dims = vec![6, 7];
    assert_eq!(config.sit(), sit);
    // A save of our own, by three ranks, without frozen parameters.
    let flat = |salt: f32| (0..layout.trainable_len()).map(|i| salt + i as f32).collect::<Vec<f32>>();
    let (model, ema, zeros) = (flat(0.5), flat(0.25), vec![0.0; layout.trainable_len()]);
    let arrays = Arrays { model: &model, ema: &ema, exp_avg: &zeros, exp_avg_sq: &zeros };
    let checkpoints = Checkpoints::at(folder.path());
    let write =
        |rank| checkpoints.write_shard(9, &layout, &arrays.parts(rank, 3), &[], (rank, 3)).expect("written");
    let records = (0..3).map(write).collect();
    let about = About {
        progress: Progress { step: 9, samples: 0, updates: 9, scaler: LossScaler::default() },
        config: serde_json::to_value(&config).expect("JSON"),
        metrics: Default::default(),
        branch: None,
        node_local: false,
        data: None,
    };
    checkpoints.commit(&layout, about, records).expect("committed");
    let checkpoint = Checkpoint::open(&checkpoints.path(9)).expect("whole");
    for (contents, expected) in [(Contents::Model, &model), (Contents::Ema, &ema)] {
        let out = folder.path().join("weights.safetensors");
        export(&checkpoint, contents, &out, MAX_FILE_BYTES, &mut quiet).expect("exported");
        let weights = Weights::open(&out).expect("readable");
        weights.check(&layout).expect("exactly the model's tensors");
        let entry = layout.find("blocks.1.attn.qkv.weight").expect("known");
        let part = &expected[entry.offset..entry.offset + entry.len()];
        assert_eq!(weights.f32(&entry.name).expect("there"), part);
        let positions = values(&layout, Array::Model, "pos_embed");
        assert_eq!(weights.f32("pos_embed").expect("there"), positions);
        let other = folder.path().join(format!("other-{contents:?}"));
        let imported = import(&out, &other, &Options::default(), &mut quiet).expect("imported");
        assert!(!imported.whole && imported.config.sit() == sit);
    }
    let error = export(&checkpoint, Contents::Ema, &folder.path().join("x.pt"), 1, &mut quiet);
    assert!(error.expect_err("no name").to_string().contains(".safetensors"));
}

#[test]
fn what_the_file_does_not_say_is_asked_for_or_told() {
    let folder = tempfile::tempdir().expect("a folder");
    let file =
        save_torch(folder.path(), &object(reference(&sit(), vec![(text("model"), text("tiny"))])), false);
    let run = folder.path().join("checkpoints");
    let error = import(&file, &run, &Options::default(), &mut quiet).expect_err("heads unknown");
    assert_eq!(error.kind(), Kind::Usage);
    for part in ["zip.pt", "\"tiny\"", "--num-heads", "width 8"] {
        assert!(error.to_string().contains(part), "{error}");
    }
    let heads = |n| Options { num_heads: Some(n), ..Options::default() };
    let error = import(&file, &run, &heads(3), &mut quiet).expect_err("3 does not divide 8").to_string();
    assert!(error.contains("num_heads = 3"), "{error}");
    let imported = import(&file, &run, &heads(4), &mut quiet).expect("imported");
    assert_eq!((imported.config.model.num_heads, imported.config.alignment.encoder_depth), (4, 2));
    let assumed = imported.assumed.join("\n");
    assert!(assumed.contains("encoder_depth is 2") && assumed.contains("global_batch"), "{assumed}");
    let error = import(&file, &run, &heads(4), &mut quiet).expect_err("occupied");
    assert!(error.to_string().contains("up to step 7"), "{error}");
    let toml: Config = toml::from_str(&imported.config_toml(Path::new("runs/x"))).expect("TOML");
    assert_eq!((toml.run.dir, toml.model), (PathBuf::from("runs/x"), imported.config.model));
}

#[test]
fn norms_of_queries_tell_the_heads_and_a_preset_tells_the_rest() {
    let folder = tempfile::tempdir().expect("a folder");
    let normed = SitConfig { qk_norm: true, z_dims: vec![], projector_dim: 2048, encoder_depth: 2, ..sit() };
    let file = save_torch(folder.path(), &object(reference(&normed, Vec::new())), false);
    let imported = import(&file, folder.path(), &Options::default(), &mut quiet).expect("imported");
    assert_eq!(imported.config.sit(), normed);

    // A published width and depth, small otherwise.
    let base = SitConfig {
        input_size: 2,
        in_channels: 1,
        num_classes: 2,
        mlp_ratio: 0.01,
        z_dims: vec![],
        ..SitConfig::preset("SiT-S/2").expect("a preset")
    };
    let layout = base.layout();
    let slots = |name: &str| layout.find(name).expect("known").shape.clone();
    assert_eq!(slots("blocks.0.mlp.fc1.weight"), [3, 384]);
    let file = save_torch(folder.path(), &object(reference(&base, Vec::new())), true);
    let run = folder.path().join("preset");
    let imported = import(&file, &run, &Options::default(), &mut quiet).expect("imported");
    assert_eq!((imported.config.model.num_heads, imported.config.alignment.encoder_depth), (6, 4));
}

/// A change that spoils a checkpoint.
type Spoil = fn(&mut Vec<(&'static str, Py)>);

fn dict<'a>(parts: &'a mut [(&'static str, Py)], key: &str) -> &'a mut Vec<(Py, Py)> {
    match &mut parts.iter_mut().find(|(k, _)| *k == key).expect("there").1 {
        Py::Dict(entries) => entries,
        _ => panic!("{key} is no dictionary"),
    }
}

fn inner(value: &mut Py) -> &mut Vec<(Py, Py)> {
    if let Py::Dict(entries) = value { entries } else { panic!("no dictionary") }
}

/// AdamW's state of the n-th trainable parameter.
fn state<'a>(parts: &'a mut [(&'static str, Py)], n: usize) -> &'a mut Vec<(Py, Py)> {
    inner(&mut inner(&mut dict(parts, "opt")[0].1)[n].1)
}

#[test]
fn what_is_no_checkpoint_of_the_reference_is_refused_by_name() {
    let cases: [(&str, Spoil); 15] = [
        ("it has no opt.param_groups", |p| drop(dict(p, "opt").remove(1))),
        ("it has no model, no ema and no x_embedder.proj.weight", |p| p.retain(|(k, _)| *k == "opt")),
        ("it has no steps", |p| p.retain(|(k, _)| *k != "steps")),
        ("model holds no tensors", |p| dict(p, "model").clear()),
        ("ema: missing: final_layer.linear.bias", |p| {
            dict(p, "ema").retain(|(k, _)| !matches!(k, Py::Str(s) if s == "final_layer.linear.bias"));
        }),
        ("model.pos_embed is not the reference's fixed one: element 2", |p| {
            if let Py::Tensor(_, values) = &mut dict(p, "model")[0].1 {
                values[2] = f32::NAN;
            }
        }),
        ("model has no x_embedder.proj.weight", |p| drop(dict(p, "model").remove(1))),
        ("model.x_embedder.proj.bias stands where the reference has x_embedder.proj.weight", |p| {
            dict(p, "model").swap(1, 2);
        }),
        ("exp_avg: missing: x_embedder.proj.weight", |p| drop(state(p, 0).remove(1))),
        ("exp_avg: unexpected: pos_embed", |p| {
            let entry =
                (Py::Int(0), Py::Dict(vec![(text("exp_avg"), Py::Tensor(vec![1, 4, 8], vec![0.0; 32]))]));
            inner(&mut dict(p, "opt")[0].1).push(entry);
        }),
        ("exp_avg_sq: misshapen: x_embedder.proj.bias is [2] where [8] belongs", |p| {
            state(p, 1)[2].1 = Py::Tensor(vec![2], vec![0.0; 2]);
        }),
        ("has made 6 steps for x_embedder.proj.weight and 5 for t_embedder.mlp.0.weight", |p| {
            state(p, 2)[0].1 = Py::Tensor(vec![], vec![5.0]);
        }),
        ("step is no natural number", |p| state(p, 2)[0].1 = Py::Float(5.5)),
        ("is nothing that AdamW keeps", |p| {
            state(p, 2).push((text("max_exp_avg_sq"), Py::Tensor(vec![1], vec![0.0])));
        }),
        ("opt.param_groups does not list the model's", |p| {
            let group = &mut dict(p, "opt")[1].1;
            let Py::List(groups) = group else { panic!("no list") };
            let Py::List(numbers) = &mut inner(&mut groups[0])[1].1 else { panic!("no list") };
            numbers.remove(0);
        }),
    ];
    let folder = tempfile::tempdir().expect("a folder");
    let run = folder.path().join("checkpoints");
    for (expected, spoil) in cases {
        let mut parts = reference(&sit(), args());
        spoil(&mut parts);
        let file = save_torch(folder.path(), &object(parts), false);
        let error = import(&file, &run, &Options::default(), &mut quiet).expect_err(expected);
        assert_eq!(error.kind(), Kind::Data, "{error}");
        let message = error.to_string();
        assert!(message.contains(expected) && message.contains("zip.pt"), "{message:?}, not {expected:?}");
        assert!(!run.exists(), "nothing is left behind");
    }
}

#[test]
fn shapes_beyond_the_file_are_refused_before_anything_is_made_of_them() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut parts = reference(&sit(), args());
    let Py::Tensor(shape, _) = &mut dict(&mut parts, "model")[0].1 else { panic!("no tensor") };
    *shape = vec![1, 1 << 26, 8];
    let file = save_torch(folder.path(), &object(parts), false);
    let error = import(&file, &folder.path().join("c"), &Options::default(), &mut quiet).expect_err("huge");
    assert!(error.to_string().contains("stand for more than"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever a file's bytes, there is an error or a checkpoint that can be exported.
    #[test]
    fn damaged_files_do_not_panic(legacy: bool, at in any::<prop::sample::Index>(), byte: u8, cut: bool) {
        let folder = tempfile::tempdir().expect("a folder");
        let file = save_torch(folder.path(), &object(reference(&sit(), args())), legacy);
        let mut bytes = std::fs::read(&file).expect("read");
        let at = at.index(bytes.len());
        if cut { bytes.truncate(at) } else { bytes[at] = byte }
        std::fs::write(&file, bytes).expect("written");
        if let Ok(imported) = import(&file, &folder.path().join("c"), &Options::default(), &mut quiet) {
            let checkpoint = Checkpoint::open(&imported.path).expect("whole");
            let out = folder.path().join("out.safetensors");
            export(&checkpoint, Contents::All, &out, MAX_FILE_BYTES, &mut quiet).expect("exported");
        }
    }
}
