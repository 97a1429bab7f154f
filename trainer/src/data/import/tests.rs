use std::fs;

use repa_comm::Single;

use super::*;
use crate::data::source::npy;
use crate::data::store::{Kind, LatentStore, Spread};
use crate::weights::{Dtype, RawTensor, Weights};

/// A tree of `count` samples: moments 2x[1, 2, 2] of the value i, images of 16 pixels.
fn tree(root: &Path, count: usize) {
    let mut labels = Vec::new();
    for i in 0..count {
        let folder = format!("{:05}", i / 10);
        for top in ["vae-sd", "images"] {
            fs::create_dir_all(root.join(top).join(&folder)).unwrap();
        }
        let name = format!("{folder}/img-mean-std-{i:08}.npy");
        fs::write(root.join("vae-sd").join(&name), npy::to_bytes(&[2, 2, 2], &[i as f32; 8])).unwrap();
        let picture = image::RgbImage::from_pixel(16, 16, image::Rgb([i as u8; 3]));
        picture.save(root.join("images").join(format!("{folder}/img{i:08}.png"))).unwrap();
        labels.push((name, (i % 4) as u32));
    }
    // The order of the list is the store's, and not that of the names.
    labels.reverse();
    let json = serde_json::json!({ "labels": labels });
    fs::write(root.join("vae-sd/dataset.json"), json.to_string()).unwrap();
}

/// The same tree as two archives.
fn zipped(root: &Path, to: &Path) {
    for top in ["vae-sd", "images"] {
        let mut archive = zip::ZipWriter::new(fs::File::create(to.join(format!("{top}.zip"))).unwrap());
        let stored =
            zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
        let folder = crate::data::source::tree::Tree::open(&root.join(top)).unwrap();
        for name in folder.list(&["npy", "png", "json"]).unwrap() {
            archive.start_file(&name, stored).unwrap();
            let mut bytes = Vec::new();
            folder.read(&name, &mut bytes).unwrap();
            std::io::Write::write_all(&mut archive, &bytes).unwrap();
        }
        archive.finish().unwrap();
    }
}

fn options() -> ImportOptions {
    ImportOptions { images: true, shard_len: 8, ..ImportOptions::default() }
}

fn run(root: &Path, options: &ImportOptions) -> Result<(Built, ImportReport), String> {
    import(&Single::new(), root, &root.join("store"), options, &mut |_| ()).map_err(|e| e.message)
}

fn check_store(store: &LatentStore, expected: impl Iterator<Item = usize>) {
    assert!(store.verify(&|_| ()).findings.is_empty());
    let (mut latent, mut image) = ([0.0; 8], Vec::new());
    let mut count = 0;
    for (sample, i) in expected.enumerate() {
        store.latent(sample, false, &mut latent).unwrap();
        assert_eq!((latent, store.label(sample).unwrap()), ([i as f32; 8], (i % 4) as u32));
        store.image(sample, &mut image).unwrap();
        let pixel = image::load_from_memory(&image).unwrap().to_rgb8().into_raw()[0];
        assert_eq!(usize::from(pixel), i, "the image goes with its latents");
        count += 1;
    }
    assert_eq!(store.len(), count);
}

#[test]
fn a_whole_tree_becomes_a_store_from_folders_and_from_archives() {
    let folder = tempfile::tempdir().unwrap();
    tree(folder.path(), 29);
    let archives = tempfile::tempdir().unwrap();
    zipped(folder.path(), archives.path());
    let mut indices = Vec::new();
    for root in [folder.path(), archives.path()] {
        let (built, report) = run(root, &options()).unwrap();
        assert_eq!((built.index.samples, built.left_out.len()), (29, 0));
        assert_eq!(report, ImportReport::default());
        let store = LatentStore::open(&root.join("store")).unwrap();
        check_store(&store, (0..29).rev());
        let c = &store.index().contents;
        assert_eq!((c.channels, c.height, c.resolution, c.classes), (1, 2, 16, 4));
        assert_eq!(store.index().normalisation.scale, [0.18215]);
        indices.push(built.index);
    }
    assert_eq!(indices[0], indices[1], "digests and all");
}

#[test]
fn a_tree_is_read_in_place_as_its_import_would_be() {
    let root = tempfile::tempdir().unwrap();
    tree(root.path(), 29);
    let archives = tempfile::tempdir().unwrap();
    zipped(root.path(), archives.path());
    for root in [root.path(), archives.path()] {
        let store = crate::data::open(root).unwrap();
        assert!(store.is_foreign() && store.index().contents.images);
        check_store(&store, (0..29).rev());
        assert!(store.index().summary().contains("read in place"), "{}", store.index().summary());
    }
    // What is wrong with a file is said when it is read.
    let store = crate::data::open(root.path()).unwrap();
    let path = root.path().join("vae-sd/00000/img-mean-std-00000007.npy");
    let mut latent = [0.0; 8];
    for (values, part) in [([-1.0; 8], "--logvar"), ([f32::NAN; 8], "not finite")] {
        fs::write(&path, npy::to_bytes(&[2, 2, 2], &values)).unwrap();
        let error = store.latent(29 - 1 - 7, false, &mut latent).unwrap_err().to_string();
        assert!(error.contains("img-mean-std-00000007.npy") && error.contains(part), "{error}");
    }
    let findings = store.verify(&|_| ()).findings;
    assert_eq!(findings.iter().map(|f| f.sample).collect::<Vec<_>>(), [Some(21)]);
    fs::remove_file(&path).unwrap();
    let error = store.latent(21, false, &mut latent).unwrap_err().to_string();
    assert!(error.contains("is listed but missing") && error.contains("repa-dist data import"), "{error}");
}

#[test]
fn bad_and_unpaired_members_are_reported_by_name() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path();
    tree(path, 29);
    let npy = |i: usize| path.join(format!("vae-sd/{:05}/img-mean-std-{i:08}.npy", i / 10));
    let png = |i: usize| path.join(format!("images/{:05}/img{i:08}.png", i / 10));
    fs::remove_file(npy(3)).unwrap();
    fs::remove_file(png(5)).unwrap();
    fs::write(npy(7), b"junk").unwrap();
    fs::write(npy(11), npy::to_bytes(&[2, 2, 1], &[1.0; 4])).unwrap();
    fs::write(npy(13), npy::to_bytes(&[2, 2, 2], &[-1.0; 8])).unwrap();
    fs::write(png(17), b"junk").unwrap();
    image::RgbImage::new(8, 8).save(png(19)).unwrap();
    fs::copy(npy(0), path.join("vae-sd/00000/img-mean-std-00000099.npy")).unwrap();
    fs::copy(png(0), path.join("images/00000/img00000098.png")).unwrap();

    let error = run(path, &ImportOptions { max_bad: 6, ..options() }).unwrap_err();
    assert!(error.starts_with("7 members cannot be used, where --max-bad allows 6"), "{error}");
    let (built, report) = run(path, &ImportOptions { max_bad: 7, ..options() }).unwrap();
    let bad: Vec<String> = built.left_out.iter().map(ToString::to_string).collect();
    for (bad, (name, problem)) in bad.iter().zip([
        ("images/00001/img00000019.png", "is 8x8 pixels where 16x16 belong"),
        ("images/00001/img00000017.png", "is not an image"),
        ("vae-sd/00001/img-mean-std-00000013.npy", "below 0"),
        ("vae-sd/00001/img-mean-std-00000011.npy", "has the shape [2, 2, 1] where [2, 2, 2] belongs"),
        ("vae-sd/00000/img-mean-std-00000007.npy", "is not a .npy file"),
        ("vae-sd/00000/img-mean-std-00000005.npy", "has no image of its number"),
        ("vae-sd/00000/img-mean-std-00000003.npy", "is listed but missing"),
    ]) {
        assert!(bad.starts_with(name) && bad.contains(problem), "{bad}");
    }
    assert_eq!((bad.len(), built.index.samples), (7, 22));
    assert_eq!(report.unlisted, ["00000/img-mean-std-00000099.npy"]);
    assert_eq!(report.images_without_latents, ["00000/img00000098.png"]);
    let store = LatentStore::open(&path.join("store")).unwrap();
    check_store(&store, (0..29).rev().filter(|i| ![3, 5, 7, 11, 13, 17, 19].contains(i)));
}

#[test]
fn log_variances_are_imported_as_such() {
    let root = tempfile::tempdir().unwrap();
    tree(root.path(), 3);
    let path = root.path().join("vae-sd/00000/img-mean-std-00000001.npy");
    fs::write(path, npy::to_bytes(&[2, 2, 2], &[-2.0; 8])).unwrap();
    let (built, _) = run(root.path(), &ImportOptions { logvar: true, ..options() }).unwrap();
    assert_eq!(built.index.contents.spread, Spread::Logvar);
    let mut latent = [0.0; 8];
    LatentStore::open(&root.path().join("store")).unwrap().latent(1, false, &mut latent).unwrap();
    assert_eq!(latent[0], -2.0);
    assert!((latent[4] - (-1.0f32).exp()).abs() < 1e-6, "{latent:?}");
}

#[test]
fn a_folder_of_another_layout_is_named() {
    let root = tempfile::tempdir().unwrap();
    let says = |part: &str| {
        let error = run(root.path(), &options()).unwrap_err();
        assert!(error.contains(part), "{error}");
    };
    says("holds neither REPA's layout");
    tree(root.path(), 3);
    let json = root.path().join("vae-sd/dataset.json");
    for (text, part) in [
        ("{\"labels\": null}", "lists no labels"),
        ("{\"labels\": [[\"a.npy\", 1]]}", "none of the listed files can be read"),
    ] {
        fs::write(&json, text).unwrap();
        says(part);
    }
    fs::remove_file(&json).unwrap();
    says("dataset.json: cannot be read");
    fs::remove_dir_all(root.path().join("images")).unwrap();
    fs::write(&json, "{\"labels\": [[\"00000/img-mean-std-00000000.npy\", 1]]}").unwrap();
    says("images: cannot be opened as a folder or as images.zip");
}

/// A file of `count` latents [2, 2, 2] of the value `first` + i, their mirrored copies of the negative.
fn lightning_file(path: &Path, first: usize, count: usize, flips: bool, dtype: Dtype) {
    let values =
        |sign: f32| -> Vec<f32> { (0..count).flat_map(|i| [sign * (first + i) as f32; 8]).collect() };
    let latents = |sign: f32| -> RawTensor {
        let bytes = match dtype {
            Dtype::F32 => bytemuck::cast_slice(&values(sign)).to_vec(),
            Dtype::F16 => values(sign).iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect(),
            _ => values(sign).iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect(),
        };
        RawTensor { dtype, shape: vec![count, 2, 2, 2], bytes }
    };
    let labels: Vec<u8> = (0..count).flat_map(|i| ((first + i) as i64 % 3).to_le_bytes()).collect();
    let labels = RawTensor { dtype: Dtype::I64, shape: vec![count], bytes: labels };
    let mut tensors = vec![("labels".to_owned(), labels), ("latents".to_owned(), latents(1.0))];
    if flips {
        tensors.push(("latents_flip".to_owned(), latents(-1.0)));
    }
    let weights = Weights { tensors: tensors.into_iter().collect(), ..Weights::default() };
    write_weights(path, &weights);
}

fn write_weights(path: &Path, weights: &Weights) {
    let views: Vec<(&str, safetensors::tensor::TensorView)> = weights
        .tensors
        .iter()
        .map(|(name, t)| {
            (name.as_str(), safetensors::tensor::TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap())
        })
        .collect();
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

#[test]
fn lightning_dits_files_become_a_store_with_flipped_copies() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
        let root = tempfile::tempdir().unwrap();
        lightning_file(&root.path().join("latents_rank00_shard001.safetensors"), 5, 4, true, dtype);
        lightning_file(&root.path().join("latents_rank00_shard000.safetensors"), 0, 5, true, dtype);
        let options = ImportOptions { shard_len: 3, ..ImportOptions::default() };
        let (built, _) = run(root.path(), &options).unwrap();
        let c = &built.index.contents;
        assert_eq!((c.kind, c.channels, c.height, c.resolution, c.classes), (Kind::Latents, 2, 2, 32, 3));
        assert!(c.flips && c.normalisation.is_none());
        let store = LatentStore::open(&root.path().join("store")).unwrap();
        assert!(store.verify(&|_| ()).findings.is_empty());
        let mut latent = [0.0; 8];
        for i in 0..9 {
            for (flipped, sign) in [(false, 1.0), (true, -1.0)] {
                store.latent(i, flipped, &mut latent).unwrap();
                assert_eq!(latent, [sign * i as f32; 8]);
            }
            assert_eq!(store.label(i).unwrap(), i as u32 % 3);
        }
    }
}

#[test]
fn lightning_dits_statistics_normalise() {
    let root = tempfile::tempdir().unwrap();
    lightning_file(&root.path().join("a.safetensors"), 0, 4, false, Dtype::F32);
    // The loader goes by the content, so that safetensors do for PyTorch's format here.
    let floats = |v: [f32; 2]| RawTensor {
        dtype: Dtype::F32,
        shape: vec![1, 2, 1, 1],
        bytes: bytemuck::cast_slice(&v).to_vec(),
    };
    let statistics = |std: [f32; 2]| {
        let tensors = [("mean".to_owned(), floats([1.0, -2.0])), ("std".to_owned(), floats(std))];
        let weights = Weights { tensors: tensors.into_iter().collect(), ..Weights::default() };
        write_weights(&root.path().join("latents_stats.pt"), &weights);
    };
    statistics([0.0, 1.0]);
    let error = run(root.path(), &ImportOptions::default()).unwrap_err();
    assert!(error.contains("latents_stats.pt: holds the standard deviation 0"), "{error}");
    statistics([2.0, 4.0]);
    let (built, _) =
        run(root.path(), &ImportOptions { scale: Some(0.5), ..ImportOptions::default() }).unwrap();
    let n = built.index.normalisation;
    assert_eq!((n.shift, n.scale), (vec![1.0, -2.0], vec![0.25, 0.125]));
    assert!(!built.index.contents.flips);
}

#[test]
fn files_that_are_not_lightning_dits_are_named() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("b.safetensors");
    let says = |part: &str| {
        let error = run(root.path(), &ImportOptions::default()).unwrap_err();
        assert!(error.contains("b.safetensors") && error.contains(part), "{error}");
    };
    fs::write(&path, "junk").unwrap();
    says("not a readable weight file");
    let tensor = RawTensor { dtype: Dtype::F32, shape: vec![2], bytes: vec![0; 8] };
    let tensors = [("x".to_owned(), tensor)].into_iter().collect();
    write_weights(&path, &Weights { tensors, ..Weights::default() });
    says("lacks the tensor latents");
    lightning_file(&root.path().join("a.safetensors"), 0, 4, true, Dtype::F32);
    lightning_file(&path, 4, 4, false, Dtype::F32);
    says("they are not of one data set");
}
