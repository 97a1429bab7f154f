use super::*;
use crate::data::store::LatentStore;

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

fn options() -> ImportOptions {
    ImportOptions { images: true, shard_len: 8, ..ImportOptions::default() }
}

fn import(root: &Path, options: &ImportOptions) -> Result<ImportReport, ImportError> {
    import_repa(root, &root.join("store"), options, &mut |_, _| ())
}

fn check_store(root: &Path, expected: impl Iterator<Item = usize>) {
    let store = LatentStore::open(&root.join("store")).unwrap();
    assert!(store.verify(&|_| ()).findings.is_empty());
    let (mut latent, mut image) = ([0.0; 8], Vec::new());
    let mut count = 0;
    for (sample, i) in expected.enumerate() {
        store.latent(sample, &mut latent).unwrap();
        assert_eq!((latent, store.label(sample).unwrap()), ([i as f32; 8], (i % 4) as u32));
        store.image(sample, &mut image).unwrap();
        let pixel = image::load_from_memory(&image).unwrap().to_rgb8().into_raw()[0];
        assert_eq!(usize::from(pixel), i, "the image goes with its latents");
        count += 1;
    }
    assert_eq!(store.len(), count);
}

#[test]
fn a_whole_tree_becomes_a_store() {
    let root = tempfile::tempdir().unwrap();
    tree(root.path(), 29);
    let mut seen = Vec::new();
    let store = root.path().join("store");
    let report = import_repa(root.path(), &store, &options(), &mut |n, all| seen.push((n, all))).unwrap();
    let nothing = Vec::<String>::new();
    assert_eq!((report.samples, report.bad.len()), (29, 0));
    assert_eq!((report.unlisted, report.images_without_latents), (nothing.clone(), nothing));
    assert_eq!(seen.last(), Some(&(29, 29)));
    check_store(root.path(), (0..29).rev());
    let open = LatentStore::open(&store).unwrap();
    let c = &open.index().contents;
    assert_eq!((c.channels, c.height, c.resolution, c.classes), (1, 2, 16, 4));
    assert_eq!(open.index().normalisation.scale, [0.18215]);
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

    let error = import(path, &ImportOptions { max_bad: 6, ..options() }).unwrap_err().to_string();
    assert!(error.ends_with("00000003.npy is listed but missing (6 bad members are allowed)"), "{error}");
    // Begun anew, so that the report is of all shards.
    fs::remove_dir_all(path.join("store.partial")).unwrap();
    let report = import(path, &ImportOptions { max_bad: 7, ..options() }).unwrap();
    let bad: Vec<String> = report.bad.iter().map(|b| format!("{} {}", b.name, b.problem)).collect();
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
    assert_eq!((report.bad.len(), report.samples), (7, 22));
    assert_eq!(report.unlisted, ["00000/img-mean-std-00000099.npy"]);
    assert_eq!(report.images_without_latents, ["00000/img00000098.png"]);
    check_store(path, (0..29).rev().filter(|i| ![3, 5, 7, 11, 13, 17, 19].contains(i)));
}

#[test]
fn an_import_that_was_stopped_goes_on() {
    let root = tempfile::tempdir().unwrap();
    tree(root.path(), 29);
    let broken = root.path().join("vae-sd/00000/img-mean-std-00000009.npy");
    let good = fs::read(&broken).unwrap();
    fs::write(&broken, b"junk").unwrap();
    import(root.path(), &options()).unwrap_err();
    fs::write(&broken, good).unwrap();
    let mut first = None;
    let store = root.path().join("store");
    import_repa(root.path(), &store, &options(), &mut |n, _| first = first.or(Some(n))).unwrap();
    assert_eq!(first, Some(8), "the shards before the broken member's are not made again");
    check_store(root.path(), (0..29).rev());
}

#[test]
fn a_folder_of_another_layout_is_named() {
    let root = tempfile::tempdir().unwrap();
    let says = |part: &str| {
        let error = import(root.path(), &options()).unwrap_err().to_string();
        assert!(error.contains("vae-sd") && error.contains(part), "{error}");
    };
    says("cannot be read");
    tree(root.path(), 3);
    let json = root.path().join("vae-sd/dataset.json");
    for (text, part) in [
        ("{\"labels\": null}", "lists no labels"),
        ("{\"labels\": [[\"a.npy\"]]}", "is not {\"labels\""),
        ("{\"labels\": [[\"../a.npy\", 1]]}", "not a path below its folder"),
        ("{\"labels\": [[\"a.npy\", 1], [\"a.npy\", 2]]}", "lists \"a.npy\" twice"),
        ("{\"labels\": [[\"a.npy\", 1]]}", "none of the listed files can be read"),
    ] {
        fs::write(&json, text).unwrap();
        says(part);
    }
}
