//! Making data on several ranks and training from every form of it, under real mpirun. Some 40 s on two
//! cores.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use repa_tests::{Running, log, loss_difference, mpirun, repa_dist, run_in, small_model, small_store};

const DEADLINE: Duration = Duration::from_secs(120);

/// A folder a class: three classes, PNG and JPEG of several sizes.
fn image_folder(root: &Path, count: usize) {
    for i in 0..count {
        let folder = root.join(["ant", "bee", "cat"][i % 3]);
        fs::create_dir_all(&folder).expect("a class");
        let (width, height) = [(64, 64), (150, 90), (70, 133)][i / 3 % 3];
        let seed = i as u32;
        let picture = image::RgbImage::from_fn(width, height, |x, y| {
            image::Rgb(
                [(x * 3 + seed) % 256, (y * 2 + seed * 7) % 256, (x + y + seed * 31) % 256].map(|v| v as u8),
            )
        });
        let ending = if i % 2 == 0 { "png" } else { "jpg" };
        picture.save(folder.join(format!("{i:04}.{ending}"))).expect("an image");
    }
}

/// All files of a folder, by name.
fn files(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = fs::read_dir(dir)
        .unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
        .map(|entry| entry.expect("entry").path())
        .map(|p| {
            (p.file_name().expect("a name").to_string_lossy().into_owned(), fs::read(&p).expect("bytes"))
        })
        .collect();
    files.sort();
    files
}

const ENCODE: [&str; 13] = [
    "data",
    "encode",
    "images",
    "--autoencoder",
    "quickstart",
    "--encoder",
    "quickstart-teacher",
    "--resolution",
    "64",
    "--images",
    "--flips",
    "--shard-len",
    "16",
];

fn encode<'a>(out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&ENCODE[..], &["--out", out], more].concat()
}

#[test]
fn encoding_gives_the_same_bytes_on_any_number_of_ranks_and_after_a_kill() {
    let folder = tempfile::tempdir().expect("a folder");
    let here = folder.path();
    image_folder(&here.join("images"), 90);
    let alone = run_in(here, repa_dist(&encode("1", &["--batch", "8"])), DEADLINE);
    assert!(alone.stdout.contains("data: 90 samples in 1"), "{}", alone.stdout);
    let one = files(&here.join("1"));
    assert_eq!(one.len(), 7, "six shards and the index");
    for (ranks, out) in [(2, "2"), (4, "4")] {
        run_in(here, mpirun(ranks, &encode(out, &["--batch", "8"])), DEADLINE);
        assert!(files(&here.join(out)) == one, "{ranks} ranks make other bytes");
    }
    let info = run_in(here, repa_dist(&["data", "info", "1"]), DEADLINE);
    for part in [
        "90 in 6 shards",
        "ant, bee, cat",
        "quickstart-teacher: 64 tokens of 96",
        "mirrored",
        "64 pixels, stored",
    ] {
        assert!(info.stdout.contains(part), "no {part:?} in\n{}", info.stdout);
    }
    run_in(here, repa_dist(&["data", "verify", "1"]), DEADLINE);

    // Killed after its first shard, and gone on with by two ranks.
    let slow = encode("killed", &["--batch", "8", "--threads", "1"]);
    let running = Running::start(repa_dist(&slow).current_dir(here));
    let (first, started) = (here.join("killed.partial/shard-00000.json"), Instant::now());
    while !first.exists() {
        assert!(started.elapsed() < DEADLINE, "no shard is finished");
        std::thread::sleep(Duration::from_millis(2));
    }
    running.signal("KILL");
    assert_eq!(running.wait(DEADLINE).code, None);
    assert!(!here.join("killed").exists(), "killed too late to test anything");
    let before = fs::metadata(here.join("killed.partial/shard-00000.safetensors")).and_then(|m| m.modified());
    run_in(here, mpirun(2, &encode("killed", &["--batch", "8"])), DEADLINE);
    assert!(files(&here.join("killed")) == one);
    let after = fs::metadata(here.join("killed/shard-00000.safetensors")).and_then(|m| m.modified());
    assert_eq!(before.expect("a time"), after.expect("a time"), "the finished shard was made again");
}

/// A tree in REPA's layout for `small_model` without alignment: latents [4, 8, 8] in 3 classes.
fn repa_tree(root: &Path, count: usize) {
    let mut labels = Vec::new();
    fs::create_dir_all(root.join("vae-sd/00000")).expect("a folder");
    for i in 0..count {
        let name = format!("00000/img-mean-std-{i:08}.npy");
        let values: Vec<f32> =
            (0..8 * 8 * 8).map(|k| ((k * 7 + i * 13) as f32 * 0.1).sin().abs() * 3.0).collect();
        let bytes = repa_trainer::data::source::npy::to_bytes(&[8, 8, 8], &values);
        fs::write(root.join("vae-sd").join(&name), bytes).expect("written");
        labels.push(serde_json::json!([name, i % 3]));
    }
    let json = serde_json::json!({ "labels": labels });
    fs::write(root.join("vae-sd/dataset.json"), json.to_string()).expect("written");
}

fn without_alignment(data: &Path, run: &Path, more: &[&str]) -> Vec<String> {
    let mut arguments = small_model(data, run);
    arguments.retain(|a| !a.starts_with("alignment."));
    arguments.extend(["alignment.z_dims=[]", "alignment.encoder_depth=1"].map(str::to_owned));
    arguments.extend(more.iter().map(|&a| a.to_owned()));
    arguments
}

fn start(ranks: usize, arguments: &[String]) -> Running {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    Running::start(&mut mpirun(ranks, &arguments))
}

#[test]
fn repas_layout_trains_in_place_as_its_store_does_and_a_file_that_vanishes_ends_all_ranks() {
    let folder = tempfile::tempdir().expect("a folder");
    let here = folder.path();
    repa_tree(&here.join("tree"), 23);
    let imported =
        run_in(here, mpirun(2, &["data", "import", "tree", "--out", "store", "--shard-len", "7"]), DEADLINE);
    assert!(imported.stdout.contains("data: 23 samples in store"), "{}", imported.stdout);
    let losses = |data: &str| {
        let run = here.join(format!("run-{data}"));
        start(2, &without_alignment(&here.join(data), &run, &[])).wait(DEADLINE).expect_code(0);
        log(&run).iter().map(|r| r.loss).collect::<Vec<_>>()
    };
    let in_place = losses("tree");
    assert_eq!(in_place.len(), 12);
    assert_eq!(in_place, losses("store"), "the same bits");

    // One file goes away, and one shard is cut short, in the middle of a run.
    let vanished = here.join("tree/vae-sd/00000/img-mean-std-00000011.npy");
    fail_during_training(
        &here.join("tree"),
        &here.join("vanished"),
        &|| fs::remove_file(&vanished).expect("removed"),
        &["img-mean-std-00000011.npy is listed but missing"],
    );
    let shard = here.join("store/shard-00001.safetensors");
    let cut = || fs::OpenOptions::new().write(true).open(&shard).and_then(|f| f.set_len(2000)).expect("cut");
    fail_during_training(
        &here.join("store"),
        &here.join("cut"),
        &cut,
        &["shard-00001.safetensors: is cut short"],
    );
}

/// Trains on two ranks, does harm to the data once it runs, and expects one message and exit code 3.
#[track_caller]
fn fail_during_training(data: &Path, run: &Path, harm: &dyn Fn(), message: &[&str]) {
    let mut running = start(2, &without_alignment(data, run, &["train.steps=1000000"]));
    let started = Instant::now();
    while log_len(run) < 5 {
        assert!(started.elapsed() < DEADLINE && !running.has_ended(), "it does not get going");
        std::thread::sleep(Duration::from_millis(20));
    }
    harm();
    let harmed = Instant::now();
    let ended = running.wait(DEADLINE).expect_error(message);
    assert!(harmed.elapsed() < Duration::from_secs(30), "the ranks took {:?} to end", harmed.elapsed());
    // Debian's OpenMPI sometimes crashes while it aborts, and its exit code with it.
    if !ended.stderr.contains("PMIx_server_finalize") {
        assert_eq!(ended.code, Some(3), "{}", ended.stderr);
    }
}

fn log_len(run: &Path) -> usize {
    fs::read_to_string(run.join("metrics.jsonl")).map_or(0, |text| text.lines().count())
}

/// The quickstart's model on 20 steps: features as stored, and from the teacher run on stored images.
#[test]
fn features_computed_as_training_goes_are_the_stored_ones() {
    let folder = tempfile::tempdir().expect("a folder");
    let here = folder.path();
    run_in(here, mpirun(2, &["data", "quickstart", "--images", "--out", "data"]), DEADLINE);
    let train = |name: &str, more: &[&str]| {
        let dir = format!("run.dir={name}");
        let arguments = ["data.dir=data", &dir, "train.steps=20", "checkpoint.every=0", "data.threads=2"];
        run_in(here, mpirun(2, &[&arguments[..], more].concat()), DEADLINE);
        log(&here.join(name))
    };
    let teacher = "alignment.encoders=[\"quickstart-teacher\"]";
    let stored = train("stored", &[]);
    let online = train("online", &[teacher]);
    let difference = loss_difference(&stored, &online);
    assert!(stored.len() == 20 && difference < 1e-3, "losses differ by {difference:.2e}");
    let alignment = stored.iter().zip(&online).map(|(a, b)| (a.alignment_loss - b.alignment_loss).abs());
    let worst = alignment.fold(0.0, f64::max);
    assert!(worst < 1e-3, "alignment losses differ by {worst:.2e}");
    // Features of nothing in particular would show.
    assert!((stored[19].alignment_loss - stored[0].alignment_loss).abs() > 0.02);

    let fails = |more: &[&str], code: i32, parts: &[&str]| {
        let arguments = [&["data.dir=data", "run.dir=wrong"][..], more].concat();
        let mut command = mpirun(2, &arguments);
        Running::start(command.current_dir(here)).wait(DEADLINE).expect_code(code).expect_error(parts);
    };
    fails(&[teacher, "alignment.z_dims=[96, 96]"], 2, &["alignment.encoders = 1", "[96, 96]"]);
    fails(&[teacher, "alignment.z_dims=[48]"], 2, &["alignment.z_dims=[96]"]);
    fails(&["alignment.encoders=[\"nowhere.pth\"]"], 2, &["nowhere.pth"]);
    fails(&["data.flip=true"], 3, &["data.flip", "--flips"]);
    run_in(here, repa_dist(&["data", "quickstart", "--out", "bare"]), DEADLINE);
    fails(&[teacher, "data.dir=bare"], 2, &["alignment.encoders", "--images"]);
}

#[test]
fn flipped_copies_are_trained_on_whatever_the_world_size() {
    let folder = tempfile::tempdir().expect("a folder");
    let here = folder.path();
    image_folder(&here.join("images"), 30);
    run_in(here, repa_dist(&encode("data", &[])), DEADLINE);
    let train = |ranks: usize, name: &str, more: &[&str]| {
        let dir = format!("run.dir={name}");
        let arguments = ["data.dir=data", &dir, "model.num_classes=3", "train.steps=6", "checkpoint.every=0"];
        run_in(here, mpirun(ranks, &[&arguments[..], more].concat()), DEADLINE);
        log(&here.join(name))
    };
    let flip = "data.flip=true";
    let one = train(1, "one", &[flip]);
    assert!(loss_difference(&one, &train(2, "two", &[flip])) < 1e-4);
    assert!(loss_difference(&one, &train(1, "straight", &[])) > 1e-3, "flips change what is seen");
    // Online, the image is mirrored before the teacher sees it.
    let teacher = "alignment.encoders=[\"quickstart-teacher\"]";
    let online = train(2, "online", &[flip, teacher]);
    assert!(loss_difference(&one, &online) < 1e-3, "{:.2e}", loss_difference(&one, &online));
}

#[test]
fn a_store_is_staged_by_all_ranks_of_a_node() {
    let folder = tempfile::tempdir().expect("a folder");
    let here = folder.path();
    small_store(&here.join("store"), 23);
    let staged = run_in(here, mpirun(2, &["data", "stage", "store", "--to", "copy"]), DEADLINE);
    assert!(staged.stdout.contains("digests checked"), "{}", staged.stdout);
    assert!(files(&here.join("store")) == files(&here.join("copy")));
    let again = Running::start(mpirun(2, &["data", "stage", "store", "--to", "copy"]).current_dir(here));
    again.wait(DEADLINE).expect_code(3).expect_error(&["holds a data set already"]);
}

fn fails_in(here: &Path, ranks: usize, arguments: &[&str], code: i32, parts: &[&str]) {
    let mut command = if ranks == 1 { repa_dist(arguments) } else { mpirun(ranks, arguments) };
    let ended =
        Running::start(command.current_dir(here)).wait(DEADLINE).expect_code(code).expect_error(parts);
    let said = ended.stderr.lines().filter(|line| line.starts_with("error: ")).count();
    assert!(said == 1 && !ended.stderr.contains("panicked"), "{}", ended.stderr);
}

#[test]
fn mistakes_get_one_message_and_leave_no_store() {
    let folder = tempfile::tempdir().expect("a folder");
    let here = folder.path();
    image_folder(&here.join("images"), 12);
    fails_in(here, 2, &["data", "encode", "images", "--out", "s"], 2, &["--autoencoder is missing"]);
    fails_in(here, 2, &encode("s", &["--device", "cuda:0"]), 2, &["cuda:0"]);
    fails_in(here, 1, &["data", "encode", "images", "--out", "s", "--autoencoder", "no.pt"], 3, &["no.pt"]);
    fails_in(
        here,
        2,
        &["data", "encode", "nowhere", "--out", "s", "--autoencoder", "quickstart"],
        3,
        &["nowhere"],
    );
    fails_in(
        here,
        2,
        &["data", "import", "images", "--out", "s"],
        3,
        &["neither REPA's layout", "data encode"],
    );
    let loose = here.join("images/loose.png");
    fs::copy(here.join("images/ant/0000.png"), &loose).expect("copied");
    fails_in(here, 2, &encode("s", &[]), 3, &["loose.png lies in no class folder", "--labels"]);
    fs::remove_file(&loose).expect("removed");

    fs::write(here.join("images/bee/0001.jpg"), "no image at all").expect("written");
    let parts =
        ["1 members cannot be used", "bee/0001.jpg is not a readable PNG or JPEG", "s.partial/left-out.json"];
    fails_in(here, 2, &encode("s", &[]), 3, &parts);
    assert!(!here.join("s").exists());
    let allowed = run_in(here, mpirun(2, &encode("s", &["--max-bad", "1"])), DEADLINE);
    assert!(allowed.stdout.contains("11 samples"), "{}", allowed.stdout);
    assert!(allowed.stderr.contains("left out: bee/0001.jpg"), "{}", allowed.stderr);
    assert!(here.join("s/left-out.json").exists());
    fails_in(here, 2, &encode("s", &[]), 3, &["holds a data set already"]);
}

/// In a file system of 2 MiB, which takes root and a mount of its own.
#[test]
fn a_full_disk_is_one_message_and_no_half_store() {
    let folder = tempfile::tempdir().expect("a folder");
    let here: PathBuf = folder.path().to_owned();
    repa_tree(&here.join("tree"), 600);
    fs::create_dir(here.join("small")).expect("a folder");
    let script = format!(
        "mount -t tmpfs -o size=768k small small && {} data import tree --out small/store; code=$?; ls small; exit $code",
        repa_tests::binary().display()
    );
    let probe = Command::new("unshare").args(["--mount", "true"]).output();
    if !probe.is_ok_and(|p| p.status.success()) {
        eprintln!("skipped: making a small file system takes root and `unshare --mount`");
        return;
    }
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &script]).current_dir(&here);
    let ended = Running::start(&mut command).wait(DEADLINE).expect_code(3);
    let ended =
        ended.expect_error(&["the disk is full", "small/store.partial", "run the same command again"]);
    assert_eq!(
        ended.stderr.lines().filter(|line| line.starts_with("error: ")).count(),
        1,
        "{}",
        ended.stderr
    );
    assert_eq!(ended.stdout.trim(), "store.partial", "no store that looks whole");
}
