//! Training end to end, under real mpirun. Some 90 s on two cores.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use repa_tests::{Running, learned, log, loss_difference, mpirun, repa_dist, small_model, small_store};

const DEADLINE: Duration = Duration::from_secs(120);

fn start(ranks: usize, arguments: &[String]) -> Running {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    Running::start(&mut mpirun(ranks, &arguments))
}

fn train(ranks: usize, store: &Path, run: &Path, more: &[&str]) {
    let mut arguments = small_model(store, run);
    arguments.extend(more.iter().map(|&a| a.to_owned()));
    start(ranks, &arguments).wait(DEADLINE).expect_code(0);
}

/// All shards of a run's newest checkpoint, by name.
fn shards(run: &Path) -> Vec<(String, Vec<u8>)> {
    let folder = run.join("checkpoints");
    let newest = std::fs::read_dir(&folder).expect("checkpoints").map(|e| e.expect("entry").path()).max();
    let mut shards: Vec<_> = std::fs::read_dir(newest.expect("a checkpoint"))
        .expect("its files")
        .map(|e| e.expect("entry").path())
        .filter(|p| p.extension().is_some_and(|e| e == "safetensors"))
        .map(|p| {
            (p.file_name().expect("a name").to_string_lossy().into_owned(), std::fs::read(&p).expect("bytes"))
        })
        .collect();
    shards.sort();
    assert!(!shards.is_empty());
    shards
}

/// A batch of 10 over 1, 2, 3 and 4 ranks (of which 3 and 4 divide it unevenly), and in micro-batches.
#[test]
fn the_world_size_changes_no_loss() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = folder.path().join("store");
    small_store(&store, 23);
    let run = |name: &str| folder.path().join(name);
    train(1, &store, &run("1"), &[]);
    let one = log(&run("1"));
    assert_eq!(one.len(), 12);
    for ranks in [2, 3, 4] {
        train(ranks, &store, &run(&ranks.to_string()), &[]);
        let difference = loss_difference(&one, &log(&run(&ranks.to_string())));
        assert!(difference < 1e-4, "{ranks} ranks: losses differ by {difference:.2e}");
    }
    train(2, &store, &run("micro"), &["train.micro_batch=2"]);
    let difference = loss_difference(&one, &log(&run("micro")));
    assert!(difference < 1e-4, "micro-batches: losses differ by {difference:.2e}");
    // Another seed is another run: the comparison above can fail.
    train(2, &store, &run("seed"), &["train.seed=1"]);
    assert!(loss_difference(&one, &log(&run("seed"))) > 1e-3);
}

#[test]
fn the_same_layout_gives_the_same_bits_also_when_stopped_and_resumed() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = folder.path().join("store");
    small_store(&store, 23);
    let run = |name: &str| folder.path().join(name);
    train(2, &store, &run("a"), &[]);
    train(2, &store, &run("b"), &[]);
    assert!(shards(&run("a")) == shards(&run("b")), "two runs of the same layout differ");
    train(2, &store, &run("c"), &["train.steps=5"]);
    train(2, &store, &run("c"), &[]);
    assert!(shards(&run("a")) == shards(&run("c")), "a resumed run differs from one that was not stopped");
    let losses = |name: &str| log(&run(name)).iter().map(|r| (r.step, r.loss)).collect::<Vec<_>>();
    assert_eq!(losses("a"), losses("c"));
    // On another world size it goes on along the same curve.
    train(3, &store, &run("d"), &["train.steps=5"]);
    train(1, &store, &run("d"), &[]);
    let difference = loss_difference(&log(&run("a")), &log(&run("d")));
    assert!(difference < 1e-4, "resumed on another world size: losses differ by {difference:.2e}");
}

/// The bits of what a run has learned.
fn bits(run: &Path) -> Vec<Vec<u32>> {
    learned(run).iter().map(|array| array.iter().map(|value| value.to_bits()).collect()).collect()
}

/// ZeRO-1 gives the weights, moments and average of the whole optimizer to the bit, also when a run goes back and
/// forth between the two, and bytes are spread evenly.
#[test]
fn a_sharded_optimizer_changes_no_bit() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = folder.path().join("store");
    small_store(&store, 23);
    let run = |name: &str| folder.path().join(name);
    // Small buckets and wide layers, so that tensors lie in several.
    let train = |ranks, run: &Path, more: &[&str]| {
        let model = ["comm.bucket_mib=1", "model.hidden_size=128"];
        train(ranks, &store, run, &[&model, more].concat());
    };
    let zero1 = "optimizer.sharding=zero1";
    for ranks in [2, 3] {
        let (plain, sharded) = (run(&format!("plain{ranks}")), run(&format!("sharded{ranks}")));
        train(ranks, &plain, &[]);
        train(ranks, &sharded, &[zero1, "train.steps=5"]);
        train(ranks, &sharded, &["train.steps=8"]);
        train(ranks, &sharded, &["comm.overlap=false", zero1]);
        assert!(bits(&plain) == bits(&sharded), "{ranks} ranks");
        let sizes: Vec<usize> = shards(&sharded).iter().map(|(_, bytes)| bytes.len()).collect();
        let (least, most) = (sizes.iter().min().expect("shards"), sizes.iter().max().expect("shards"));
        assert!(sizes.len() == ranks && *most as f64 <= 1.05 * *least as f64, "{sizes:?}");
    }
}

/// Gradients rounded to bfloat16 on their way: other bits, nearly the same losses.
#[test]
fn half_the_bytes_on_the_wire_give_nearly_the_same_losses() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = folder.path().join("store");
    small_store(&store, 23);
    let run = |name: &str| folder.path().join(name);
    train(2, &store, &run("f32"), &[]);
    train(2, &store, &run("bf16"), &["comm.wire=bf16"]);
    let difference = loss_difference(&log(&run("f32")), &log(&run("bf16")));
    assert!(difference > 0.0 && difference < 1e-2, "{difference:.2e}");
    assert!(log(&run("f32")).iter().all(|r| r.communication_busy_seconds > 0.0));
}

/// Alignment that ends at a step is the run up to there, gone on with without alignment.
#[test]
fn alignment_ends_when_it_is_told_to() {
    let folder = tempfile::tempdir().expect("a folder");
    let (store, at) = (folder.path().join("store"), |name: &str| folder.path().join(name));
    small_store(&store, 23);
    train(2, &store, &at("ends"), &["alignment.until_step=5"]);
    train(2, &store, &at("by-hand"), &["train.steps=5"]);
    let changed = "run.allow_changed=[\"alignment.coefficient\"]";
    train(2, &store, &at("by-hand"), &["alignment.coefficient=0", changed]);
    assert!(bits(&at("ends")) == bits(&at("by-hand")));
    let steps = log(&at("ends"));
    assert_eq!(steps.len(), 12);
    for record in steps {
        let aligned = record.denoising_loss + 0.5 * record.alignment_loss;
        let expected = if record.step <= 5 { aligned } else { record.denoising_loss };
        assert!((record.loss - expected).abs() < 1e-6 && record.alignment_loss != 0.0, "{record:?}");
    }
}

/// Grids come at their steps, the same ones whoever keeps the average and however often a run is stopped; and losses and
/// weights are those of a run without them.
#[test]
fn sample_images_change_no_bit() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = folder.path().join("store");
    small_store(&store, 23);
    let run = |name: &str| folder.path().join(name);
    let autoencoder =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../trainer/assets/quickstart-autoencoder.safetensors");
    let autoencoder = format!("sample.autoencoder={}", autoencoder.display());
    let grids = [
        "sample.training.every=4",
        "sample.training.per_class=1",
        "sample.training.num_steps=2",
        &autoencoder,
    ];
    let with = |more: &[&'static str]| [&grids[..], more].concat();
    let names = |name: &str| {
        let entries = std::fs::read_dir(run(name).join("samples")).expect("a folder");
        let mut names: Vec<String> =
            entries.map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    };
    let png = |name: &str, step: u64| {
        std::fs::read(run(name).join(format!("samples/step-{step:08}.png"))).expect("a grid")
    };
    let losses = |name: &str| {
        log(&run(name)).iter().map(|r| (r.step, r.loss.to_bits(), r.grad_norm.to_bits())).collect::<Vec<_>>()
    };

    train(2, &store, &run("without"), &[]);
    assert!(!run("without").join("samples").exists());
    train(2, &store, &run("with"), &with(&[]));
    assert_eq!(losses("without"), losses("with"));
    assert!(shards(&run("without")) == shards(&run("with")), "the weights differ");
    assert_eq!(names("with"), ["step-00000004.png", "step-00000008.png", "step-00000012.png"]);
    let grid = image::load_from_memory(&png("with", 12)).expect("a PNG").into_rgb8();
    assert!(grid.height() > 3 * 100 && png("with", 8) != png("with", 12), "{} pixels", grid.height());

    // Four ranks of which one has no image; and the average in parts.
    train(4, &store, &run("four"), &with(&[]));
    assert_eq!(names("four"), names("with"));
    train(2, &store, &run("parts"), &with(&["optimizer.sharding=zero1"]));
    assert!(png("with", 12) == png("parts", 12), "the average in parts gives other images");

    // Stopped at a step of a grid: it is there, and not drawn again.
    train(2, &store, &run("resumed"), &with(&["train.steps=8"]));
    let written = |name: &str| {
        let path = run(name).join("samples/step-00000008.png");
        std::fs::metadata(path).and_then(|m| m.modified()).expect("a time")
    };
    let before = written("resumed");
    train(2, &store, &run("resumed"), &with(&[]));
    assert_eq!((written("resumed"), names("resumed")), (before, names("with")));
    assert!(png("with", 12) == png("resumed", 12), "a resumed run draws other images");

    // Without the store's autoencoder there are none, and one that is named has to be there.
    let mut arguments = small_model(&store, &run("none"));
    arguments.push("sample.training.every=4".into());
    let said = start(2, &arguments).wait(DEADLINE).expect_code(0).expect_error(&["sample.autoencoder=PATH"]);
    assert_eq!(said.stderr.matches("no sample images").count(), 1, "{}", said.stderr);
    arguments.push("sample.autoencoder=nowhere.safetensors".into());
    let ended = start(2, &arguments).wait(DEADLINE).expect_code(2).expect_error(&["nowhere.safetensors"]);
    assert_eq!(ended.stderr.matches("error: ").count(), 1, "{}", ended.stderr);
}

#[test]
fn a_single_process_and_plain_mpirun_train_too() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = folder.path().join("store");
    small_store(&store, 23);
    let bare = folder.path().join("bare");
    let arguments = small_model(&store, &bare);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    Running::start(&mut repa_dist(&arguments)).wait(DEADLINE).expect_code(0);
    assert_eq!(log(&bare).len(), 12);

    // mpirun without a number takes one rank a core, and binds each to its core.
    let plain = folder.path().join("plain");
    let arguments = small_model(&store, &plain);
    let mut command = Command::new("mpirun");
    command.args(["--allow-run-as-root"]).arg(repa_tests::binary()).args(&arguments);
    Running::start(&mut command).wait(DEADLINE).expect_code(0);
    assert!(loss_difference(&log(&bare), &log(&plain)) < 1e-4);
}

#[test]
fn ranks_serve_metrics_and_a_stop_request_saves_on_all() {
    let folder = tempfile::tempdir().expect("a folder");
    let (store, run) = (folder.path().join("store"), folder.path().join("run"));
    small_store(&store, 23);
    let mut arguments = small_model(&store, &run);
    arguments.extend(["train.steps=1000000".into(), "telemetry.port=19400".into()]);
    let mut running = start(2, &arguments);
    let started = Instant::now();
    while log(&run).len() < 5 {
        assert!(started.elapsed() < DEADLINE && !running.has_ended(), "it does not get going");
        std::thread::sleep(Duration::from_millis(50));
    }
    let targets: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(run.join("prometheus-targets.json")).expect("targets"))
            .expect("JSON");
    let targets: Vec<&str> =
        targets[0]["targets"].as_array().expect("a list").iter().filter_map(|t| t.as_str()).collect();
    assert_eq!(targets.len(), 2);
    for (rank, target) in targets.iter().enumerate() {
        let page = get(target, "/metrics");
        assert!(page.contains(&format!("repa_images_total{{rank=\"{rank}\"}}")), "{page}");
        assert!(page.contains("# HELP repa_loss"), "{page}");
        assert!(page.contains("repa_step_seconds_bucket"), "histograms have buckets\n{page}");
    }
    // Started again in the same folder meanwhile, it is turned away and harms nothing.
    start(1, &arguments).wait(DEADLINE).expect_code(2).expect_error(&["in use", "run.dir"]);

    std::fs::write(run.join("STOP"), "").expect("a stop request");
    running.wait(DEADLINE).expect_code(75);
    let records = log(&run);
    let last = records.last().expect("steps").step;
    assert!(
        run.join(format!("checkpoints/step-{last:08}/manifest.json")).exists(),
        "no checkpoint of step {last}"
    );
    assert_eq!(std::fs::read_to_string(run.join("prometheus-targets.json")).expect("targets").trim(), "[]");
}

fn get(address: &str, path: &str) -> String {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(address).expect("a connection");
    stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a deadline");
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").expect("sent");
    let mut page = String::new();
    stream.read_to_string(&mut page).expect("an answer");
    page
}

#[test]
fn targets_on_another_grid_are_resampled_when_asked_to() {
    let folder = tempfile::tempdir().expect("a folder");
    let (store, run) = (folder.path().join("store"), folder.path().join("run"));
    small_store(&store, 23);
    let more = [
        "model.patch_size=4",
        "alignment.resample=bilinear",
        "optimizer.learning_rate=3e-3",
        "train.steps=120",
    ];
    train(2, &store, &run, &more);
    let losses: Vec<f64> = log(&run).iter().map(|r| r.alignment_loss).collect();
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    let (first, last) = (mean(&losses[..20]), mean(&losses[100..]));
    assert!(losses.iter().all(|loss| loss.abs() <= 1.0) && last < first - 0.02, "{first} to {last}");
}

/// Half precision follows float32's losses, and float16's loss scale finds its place.
#[test]
fn half_precision_follows_float32() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = folder.path().join("store");
    small_store(&store, 23);
    let run = |name: &str| folder.path().join(name);
    let more = ["train.steps=200", "optimizer.learning_rate=3e-4"];
    train(2, &store, &run("f32"), &more);
    let expected = log(&run("f32"));
    for precision in ["bf16", "f16"] {
        let argument = format!("train.precision={precision}");
        train(2, &store, &run(precision), &[more[0], more[1], &argument]);
        let records = log(&run(precision));
        let taken = records.iter().filter(|r| !r.skipped).count();
        assert!(taken >= 190, "{precision}: only {taken} of 200 steps were taken");
        let worst = expected
            .iter()
            .zip(&records)
            .map(|(a, b)| ((a.loss - b.loss) / a.loss).abs())
            .fold(0.0, f64::max);
        assert!(worst < 0.02, "{precision}: losses differ by {worst:.4}");
    }
}

/// A rank that stands still is named, and the run ends; nothing else would have ended it.
#[test]
fn a_step_that_never_ends_ends_the_run() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = folder.path().join("store");
    small_store(&store, 23);
    let run = folder.path().join("run");
    let mut arguments = small_model(&store, &run);
    arguments.extend(["train.steps=1000000", "train.step_timeout_seconds=2"].map(str::to_owned));
    let running = start(2, &arguments);
    let status = || -> Option<serde_json::Value> {
        serde_json::from_str(&std::fs::read_to_string(run.join("status.json")).ok()?).ok()
    };
    let begun = Instant::now();
    let victim = loop {
        assert!(begun.elapsed() < DEADLINE, "no status");
        let found = status().filter(|s| s["step"].as_u64() > Some(5) && s["ranks"][1]["state"] == "running");
        if let Some(found) = found {
            break found["ranks"][1]["pid"].as_u64().expect("a process number").to_string();
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(Command::new("kill").args(["-s", "STOP", &victim]).status().expect("kill runs").success());
    let ended = running.wait(Duration::from_secs(30));
    let said = &ended.stderr;
    assert!(
        said.contains("no step has been made for ") && said.contains("(train.step_timeout_seconds)"),
        "{said}"
    );
    assert!(said.contains(": its process is stopped; step "), "{said}");
    assert_ne!(ended.code, Some(0));
}
