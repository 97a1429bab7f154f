use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use half::f16;
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::data::bench::synthetic_store;

/// Moments 2x[3, 2, 2], one encoder [3, 4], images.
fn spec() -> StoreSpec {
    StoreSpec {
        kind: Kind::Moments,
        spread: Spread::Std,
        precision: Precision::F32,
        channels: 3,
        height: 2,
        width: 2,
        resolution: 16,
        autoencoder: "test".to_owned(),
        normalisation: None,
        classes: 5,
        class_names: ["a", "b", "c", "d", "e"].map(str::to_owned).to_vec(),
        encoders: vec![EncoderSpec { id: "eye".to_owned(), tokens: 3, dim: 4 }],
        images: true,
        flips: false,
        source: "made up".to_owned(),
    }
}

fn store(samples: usize) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("store");
    synthetic_store(&dir, spec(), samples, 1).unwrap();
    (folder, dir)
}

fn message(result: Result<impl std::fmt::Debug, StoreError>) -> String {
    result.unwrap_err().to_string()
}

#[track_caller]
fn says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{message:?} does not say {part:?}");
    }
}

struct Made {
    latent: Vec<f32>,
    label: u32,
    features: Vec<Vec<f16>>,
    image: Vec<u8>,
}

fn made(i: usize) -> Made {
    Made {
        latent: (0..24).map(|k| (i * 24 + k) as f32 * 0.25).collect(),
        label: (i * 7 % 5) as u32,
        features: vec![(0..12).map(|k| f16::from_f32((i + k) as f32)).collect()],
        image: vec![i as u8; 1 + i * 3 % 11],
    }
}

fn push(shard: &mut ShardWriter, m: &Made) -> Result<(), StoreError> {
    let view = View { latent: &m.latent, features: &m.features };
    shard.push(&Sample { label: m.label, view, flipped: None, image: &m.image })
}

/// Writes samples 0.. in shards of the given capacities and fills.
fn write_shards(dir: &Path, shards: &[(usize, usize)]) -> Index {
    let writer = StoreWriter::create(dir, spec()).unwrap();
    let mut i = 0;
    for (number, &(capacity, fill)) in shards.iter().enumerate() {
        let mut shard = writer.shard(number, capacity).unwrap();
        for _ in 0..fill {
            push(&mut shard, &made(i)).unwrap();
            i += 1;
        }
        shard.finish().unwrap();
    }
    writer.commit(shards.len()).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn what_is_written_is_read_again(fills in prop::collection::vec((0usize..9, 1usize..4), 1..5)) {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("store");
        let mut shards: Vec<(usize, usize)> = fills.iter().map(|&(fill, room)| (fill + room, fill)).collect();
        shards.push((2, 2));
        let index = write_shards(&dir, &shards);
        let store = LatentStore::open(&dir).unwrap();
        prop_assert_eq!(store.index(), &index);
        prop_assert_eq!(store.len(), shards.iter().map(|s| s.1).sum::<usize>());
        let (mut latent, mut features, mut image) = (vec![0.0; 24], vec![f16::ZERO; 12], vec![9; 99]);
        for i in (0..store.len()).rev() {
            let m = made(i);
            store.latent(i, false, &mut latent).unwrap();
            store.features(0, i, false, &mut features).unwrap();
            store.image(i, &mut image).unwrap();
            prop_assert_eq!((&latent, &features, &image), (&m.latent, &m.features[0], &m.image));
            prop_assert_eq!(store.label(i).unwrap(), m.label);
        }
        prop_assert_eq!(store.verify(&|_| ()).findings, vec![]);
        let files = fs::read_dir(&dir).unwrap().count();
        prop_assert_eq!(files, index.shards.len() + 1, "the index and the shards, and nothing else");
    }
}

#[test]
fn a_shard_with_room_left_over_has_the_bytes_of_an_exact_one() {
    let folder = tempfile::tempdir().unwrap();
    let [a, b] = ["a", "b"].map(|n| folder.path().join(n));
    assert_eq!(write_shards(&a, &[(7, 7)]), write_shards(&b, &[(4000, 7)]));
}

#[test]
fn flipped_copies_lie_beside_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("store");
    let spec = StoreSpec { flips: true, ..spec() };
    let writer = StoreWriter::create(&dir, spec).unwrap();
    let mut shard = writer.shard(0, 5).unwrap();
    let view = |m: &'static Made| View { latent: &m.latent, features: &m.features };
    let all: &'static [Made] = Box::leak((0..8).map(made).collect::<Vec<_>>().into_boxed_slice());
    for i in 0..4 {
        let (m, f) = (&all[i], &all[i + 4]);
        let sample = Sample { label: m.label, view: view(m), flipped: Some(view(f)), image: &m.image };
        let alone = shard.push(&Sample { flipped: None, ..sample });
        says(&message(alone), &["its flipped copy is missing"]);
        shard.push(&sample).unwrap();
    }
    shard.finish().unwrap();
    writer.commit(1).unwrap();
    let store = LatentStore::open(&dir).unwrap();
    assert_eq!(store.verify(&|_| ()).findings, vec![]);
    let (mut latent, mut features) = (vec![0.0; 24], vec![f16::ZERO; 12]);
    for i in 0..4 {
        for (flipped, m) in [(false, &all[i]), (true, &all[i + 4])] {
            store.latent(i, flipped, &mut latent).unwrap();
            store.features(0, i, flipped, &mut features).unwrap();
            assert_eq!((&latent, &features), (&m.latent, &m.features[0]), "{i} {flipped}");
        }
    }
    damage(&dir, "shard-00000.safetensors", "features_flipped.eye", 2, 1, &[0x7c]);
    let findings = LatentStore::open(&dir).unwrap().verify(&|_| ()).findings;
    assert!(findings.iter().any(|f| f.sample == Some(2) && f.problem.contains("digest")), "{findings:?}");
}

#[test]
fn others_can_read_a_shard() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("store");
    write_shards(&dir, &[(4, 3)]);
    let bytes = fs::read(dir.join("shard-00000.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let shape = |name: &str| file.tensor(name).unwrap().shape().to_vec();
    assert_eq!(shape("moments"), [3, 6, 2, 2]);
    assert_eq!(shape("labels"), [3]);
    assert_eq!(shape("features.eye"), [3, 3, 4]);
    assert_eq!(shape("image_ends"), [3]);
    let moments: Vec<f32> = bytemuck::pod_collect_to_vec(file.tensor("moments").unwrap().data());
    assert_eq!(moments[24..48], made(1).latent);
}

#[test]
fn statistics_and_measured_normalisation_are_the_latents() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("store");
    let index = write_shards(&dir, &[(4, 4), (4, 3)]);
    for c in 0..3 {
        let (mut sum, mut square, mut n) = (0.0, 0.0, 0.0);
        for i in 0..7 {
            let m = made(i);
            for k in c * 4..c * 4 + 4 {
                let (mean, std) = (f64::from(m.latent[k]), f64::from(m.latent[12 + k]));
                (sum, square, n) = (sum + mean, square + mean * mean + std * std, n + 1.0);
            }
        }
        let std = (square / n - (sum / n) * (sum / n)).sqrt();
        assert!((index.statistics.mean[c] - sum / n).abs() < 1e-9);
        assert!((index.statistics.std[c] - std).abs() < 1e-9);
        assert!((f64::from(index.normalisation.scale[c]) * std - 1.0).abs() < 1e-6);
    }
    let mut latent = made(3).latent[..12].to_vec();
    index.normalisation.apply(&mut latent, 4);
    let expected = (f64::from(made(3).latent[11]) - index.statistics.mean[2]) / index.statistics.std[2];
    assert!((f64::from(latent[11]) - expected).abs() < 1e-5);
    index.normalisation.invert(&mut latent, 4);
    for (a, b) in latent.iter().zip(&made(3).latent) {
        assert!((a - b).abs() < 1e-4);
    }
}

#[test]
fn half_precision_and_log_variances_are_read_as_float32_and_std() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("store");
    let bare = StoreSpec { encoders: vec![], images: false, ..spec() };
    let spec = StoreSpec { spread: Spread::Logvar, precision: Precision::F16, ..bare };
    let writer = StoreWriter::create(&dir, spec).unwrap();
    let mut shard = writer.shard(0, 1).unwrap();
    let stored: Vec<f32> = (0..24).map(|i| if i < 12 { i as f32 / 3.0 } else { i as f32 - 18.0 }).collect();
    let view = View { latent: &stored, features: &[] };
    shard.push(&Sample { label: 0, view, flipped: None, image: &[] }).unwrap();
    shard.finish().unwrap();
    writer.commit(1).unwrap();
    let mut read = vec![0.0; 24];
    LatentStore::open(&dir).unwrap().latent(0, false, &mut read).unwrap();
    for (i, (&read, &stored)) in read.iter().zip(&stored).enumerate() {
        let expected = if i < 12 { stored } else { (0.5 * stored).exp() };
        assert!((read - expected).abs() <= 1e-3 * expected.abs(), "{i}: {read} for {expected}");
    }
}

#[test]
fn a_store_is_whole_or_absent() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("store");
    says(&message(LatentStore::open(&dir)), &["no data set at", "repa-dist data quickstart"]);
    let writer = StoreWriter::create(&dir, spec()).unwrap();
    let mut shard = writer.shard(0, 3).unwrap();
    push(&mut shard, &made(0)).unwrap();
    shard.finish().unwrap();
    drop(writer.shard(1, 3).unwrap());
    says(&message(LatentStore::open(&dir)), &["is not finished", "store.partial"]);
    says(&message(writer.commit(2)), &["is not finished", "shard-00001.safetensors is missing"]);
    assert!(!dir.exists());

    // A second attempt goes on; one with other settings is told which.
    let other = StoreWriter::create(&dir, StoreSpec { autoencoder: "new".to_owned(), ..spec() });
    says(&message(other), &["other settings", "autoencoder was \"test\" and is \"new\" now"]);
    let again = StoreWriter::create(&dir, spec()).unwrap();
    assert_eq!(again.finished(0).unwrap().entry.samples, 1);
    assert!(again.finished(1).is_none());
    again.commit(1).unwrap();
    assert_eq!(LatentStore::open(&dir).unwrap().len(), 1);
    says(&message(StoreWriter::create(&dir, spec())), &["holds a data set already"]);
}

#[test]
fn a_store_of_no_samples_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let writer = StoreWriter::create(&folder.path().join("store"), spec()).unwrap();
    writer.shard(0, 3).unwrap().finish().unwrap();
    says(&message(writer.commit(1)), &["samples", "no sample was written"]);
}

#[test]
fn bad_samples_are_named_and_not_stored() {
    let folder = tempfile::tempdir().unwrap();
    let writer = StoreWriter::create(&folder.path().join("store"), spec()).unwrap();
    let mut shard = writer.shard(0, 9).unwrap();
    push(&mut shard, &made(0)).unwrap();
    let mut refused = |change: &dyn Fn(&mut Made), parts: &[&str]| {
        let mut m = made(1);
        change(&mut m);
        says(&message(push(&mut shard, &m)), &[&["sample 1 for", "shard-00000"], parts].concat());
    };
    refused(&|m| m.latent[3] = f32::NAN, &["latent value 3 is NaN"]);
    refused(&|m| m.latent[13] = -0.5, &["standard deviation 1 is -0.5", "log variances"]);
    refused(&|m| m.label = 5, &["label 5", "number of classes, 5"]);
    refused(&|m| m.latent.truncate(12), &["12 latent values where 24 belong"]);
    refused(&|m| m.features[0][2] = f16::INFINITY, &["feature 2 of eye is inf"]);
    refused(&|m| m.features[0].truncate(3), &["3 features of eye where 12 belong"]);
    refused(&|m| m.image.clear(), &["image is missing"]);
    assert_eq!(shard.len(), 1);
    assert_eq!(shard.finish().unwrap().samples, 1);
}

/// The system itself says that the disk is full: the shard is a link to /dev/full.
#[test]
fn a_full_disk_is_one_clear_error() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("store");
    let writer = StoreWriter::create(&dir, spec()).unwrap();
    let torn = folder.path().join("store.partial/shard-00000.safetensors.tmp");
    std::os::unix::fs::symlink("/dev/full", &torn).unwrap();
    let mut shard = writer.shard(0, 3).unwrap();
    let error = push(&mut shard, &made(0)).unwrap_err();
    assert!(matches!(error, StoreError::Full { .. }), "{error:?}");
    says(&error.to_string(), &["the disk is full", "shard-00000", "run the same command again"]);
    drop(shard);
    assert!(!torn.is_symlink(), "the torn shard is gone");
    says(&message(LatentStore::open(&dir)), &["is not finished"]);
}

/// Overwrites bytes of a shard at sample `row` of the tensor `name`.
fn damage(dir: &Path, shard: &str, name: &str, row: usize, at: usize, bytes: &[u8]) {
    let path = dir.join(shard);
    let content = fs::read(&path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&content).unwrap();
    let tensor = file.tensor(name).unwrap();
    let offset = tensor.data().as_ptr() as usize - content.as_ptr() as usize;
    let item = tensor.data().len() / tensor.shape()[0];
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(bytes, (offset + row * item + at) as u64).unwrap();
}

#[test]
fn verify_names_the_shard_and_sample_of_every_damage() {
    let cases: [(&str, usize, Vec<u8>, &str); 5] = [
        ("features.eye", 5, vec![0x77], "digest"),
        ("images", 3, vec![0], "digest"),
        ("moments", 48, (-1.0f32).to_le_bytes().to_vec(), "below 0"),
        ("moments", 0, f32::NAN.to_le_bytes().to_vec(), "not a finite number"),
        ("labels", 0, 5i64.to_le_bytes().to_vec(), "label 5 is not one of the 5 classes (0 to 4)"),
    ];
    for (tensor, at, bytes, problem) in cases {
        let (_folder, dir) = store(40);
        // Sample 12 is row 2 of the second of four shards; images are one tensor of bytes, 24 each.
        let (row, at) = if tensor == "images" { (0, 2 * 24 + at) } else { (2, at) };
        damage(&dir, "shard-00001.safetensors", tensor, row, at, &bytes);
        let store = LatentStore::open(&dir).unwrap();
        let report = store.verify(&|_| ());
        let of_sample: Vec<_> = report.findings.iter().filter(|f| f.sample == Some(12)).collect();
        assert!(of_sample.iter().any(|f| f.problem.contains(problem)), "{tensor}: {report:?}");
        assert!(of_sample.iter().any(|f| f.problem.contains("digest")), "{tensor}: {report:?}");
        assert!(report.findings.iter().all(|f| f.shard == "shard-00001.safetensors"));
        assert!(report.findings.iter().all(|f| f.sample.is_none_or(|s| s == 12)), "{report:?}");
        assert!(report.findings.iter().any(|f| f.sample.is_none()), "the file's digest: {report:?}");
        if tensor == "labels" {
            says(&message(store.label(12)), &["shard-00001", "label 5", "5 classes"]);
        }
    }
}

#[test]
fn progress_of_verify_ends_at_all_samples() {
    let (_folder, dir) = store(40);
    let seen = std::sync::Mutex::new(Vec::new());
    let report = LatentStore::open(&dir).unwrap().verify(&|n| seen.lock().unwrap().push(n));
    assert_eq!((report.samples, report.findings.len()), (40, 0));
    assert_eq!(seen.into_inner().unwrap().iter().max(), Some(&40));
}

#[test]
fn shards_that_are_missing_or_cut_short_are_named() {
    let (_folder, dir) = store(8);
    let path = dir.join("shard-00002.safetensors");
    let open = LatentStore::open(&dir).unwrap();
    let late = LatentStore::open(&dir).unwrap();
    // The end of the second row of moments is gone, with all features and images.
    let size = fs::metadata(&path).unwrap().len();
    let cut = format!("{} bytes", size - 100);
    let mut latent = vec![0.0; 24];
    open.latent(5, false, &mut latent).unwrap();
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(size - 100).unwrap();
    says(&message(open.latent(5, false, &mut latent)), &["shard-00002", "cut short", &cut]);
    says(&message(late.latent(5, false, &mut latent)), &["shard-00002", "cut short"]);
    let (size, findings) = (format!("index says {size}"), late.verify(&|_| ()).findings);
    assert_eq!(findings.len(), 1);
    says(&findings[0].to_string(), &["shard-00002", "cut short"]);
    says(&message(LatentStore::open(&dir)), &["shard-00002", &cut, &size]);
    fs::write(&path, b"junk that is no shard").unwrap();
    says(&message(late.open_shard(2)), &["not a safetensors file"]);
    fs::remove_file(&path).unwrap();
    says(&message(LatentStore::open(&dir)), &["shard-00002", "is missing", "copy the data set again"]);
    says(&message(late.open_shard(2)), &["shard-00002", "is missing"]);
}

/// Opens the store after a change to its index.
fn with_index(dir: &Path, from: &str, to: &str) -> Result<LatentStore, StoreError> {
    let path = dir.join(INDEX_FILE);
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{text}");
    fs::write(&path, text.replacen(from, to, 1)).unwrap();
    let result = LatentStore::open(dir);
    fs::write(&path, text).unwrap();
    result
}

#[test]
fn an_index_that_makes_no_sense_is_named_by_key() {
    let (_folder, dir) = store(8);
    for (from, to, parts) in [
        ("\"samples\": 8", "\"samples\": 9", ["samples: is 9", "hold 8"]),
        ("\"version\": 1", "\"version\": 2", ["version: is 2", "this program reads 1"]),
        ("repa-dist latent store", "zip", ["format: is \"zip\"", "another kind of data"]),
        ("shard-00001.safetensors", "../x", ["shards: \"../x\"", "plain file name"]),
        ("shard-00001.safetensors", "shard-00000.safetensors", ["shards", "listed twice"]),
        ("\"classes\": 5", "\"classes\": 0", ["contents.classes", "0 is not a size"]),
        ("\"classes\": 5", "\"classes\": 6", ["contents.class_names", "5 names for 6 classes"]),
        ("\"kind\": \"moments\"", "\"kind\": \"pixels\"", ["pixels", "moments"]),
        ("\"images\": true", "\"imagse\": true", ["imagse", "line"]),
        ("{", "", ["not the index of a latent store", "line 2"]),
    ] {
        says(&message(with_index(&dir, from, to)), &[&["index.json"], &parts[..]].concat());
    }
    // The shards are fine and the index is plausible, but they are not of one store.
    let other = with_index(&dir, "\"height\": 2", "\"height\": 1").unwrap();
    let mut latent = vec![0.0; 12];
    says(
        &message(other.latent(0, false, &mut latent)),
        &["shard-00000", "holds moments as F32 [2, 6, 2, 2] where the index says F32 [2, 6, 1, 2]"],
    );
}

#[test]
fn a_store_for_another_model_is_refused() {
    let (_folder, dir) = store(8);
    let store = LatentStore::open(&dir).unwrap();
    let fits = Expected { channels: 3, input_size: 2, classes: 5, tokens: 3, z_dims: vec![4] };
    store.expect(&fits).unwrap();
    store.expect(&Expected { tokens: 9, z_dims: vec![], ..fits.clone() }).unwrap();
    for (expected, part) in [
        (Expected { channels: 4, ..fits.clone() }, "have 3 channels and the model takes 4"),
        (
            Expected { input_size: 32, ..fits.clone() },
            "are 2x2 (images of 16 pixels) and the model takes 32x32",
        ),
        (Expected { classes: 1000, ..fits.clone() }, "5 classes and the model 1000"),
        (Expected { tokens: 256, ..fits.clone() }, "of eye have 3 tokens an image and the model has 256"),
        (Expected { z_dims: vec![768], ..fits }, "widths [4] and the projectors aim at [768]"),
    ] {
        says(&message(store.expect(&expected)), &["does not fit the configuration", part]);
    }
}

#[test]
fn the_summary_names_what_a_user_asks_for() {
    let (_folder, dir) = store(8);
    let summary = LatentStore::open(&dir).unwrap().index().summary();
    says(&summary, &["8 in 4 shards", "3 x 2 x 2", "eye: 3 tokens of 4", "16 pixels", "made up"]);
}
