//! What users get wrong: one clear message on any number of ranks, the right exit code, nothing lost.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use repa_tests::{Ended, Running, mpirun, repa_dist, small_model, small_store};

const DEADLINE: Duration = Duration::from_secs(60);

/// Runs two ranks and checks the exit code, and that the message stands there once.
#[track_caller]
fn fails(arguments: &[String], code: i32, message: &[&str]) -> Ended {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let ended =
        Running::start(&mut mpirun(2, &arguments)).wait(DEADLINE).expect_code(code).expect_error(message);
    let said = ended.stderr.lines().filter(|line| line.starts_with("error: ")).count();
    assert_eq!(said, 1, "one cause, one message:\n{}", ended.stderr);
    assert!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
    ended
}

struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        small_store(&folder.path().join("store"), 12);
        Self { folder }
    }

    fn arguments(&self, more: &[&str]) -> Vec<String> {
        let mut arguments = small_model(&self.folder.path().join("store"), &self.folder.path().join("run"));
        arguments.extend(more.iter().map(|&a| a.to_owned()));
        arguments
    }
}

#[test]
fn wrong_keys_and_values() {
    let place = Place::new();
    fails(&place.arguments(&["train.step=5"]), 2, &["unknown key \"train.step\"", "train.steps"]);
    fails(&place.arguments(&["train.steps=soon"]), 2, &["train.steps cannot be", "soon"]);
    fails(&place.arguments(&["model.num_heads=5"]), 2, &["model.num_heads = 5", "hidden_size"]);
    fails(&place.arguments(&["device=cuda:0"]), 2, &["device = cuda:0", "cpu"]);
    fails(&place.arguments(&["device=wgpu"]), 2, &["device = wgpu", "--features wgpu"]);
    let half = place.arguments(&["device=wgpu", "train.precision=bf16"]);
    fails(&half, 2, &["train.precision = bf16", "f32 only"]);
    fails(&place.arguments(&["device=tpu"]), 2, &["device = tpu", "wgpu"]);
    fails(&["--config".into(), "/nonexistent.toml".into()], 2, &["/nonexistent.toml"]);
    // The store has 3 classes, 4 channels and tokens of width 12.
    fails(&place.arguments(&["model.num_classes=2"]), 3, &["classes"]);
    fails(&place.arguments(&["alignment.z_dims=[13]"]), 3, &["12"]);
    fails(&place.arguments(&["model.patch_size=4"]), 2, &["2 x 2", "4 x 4", "alignment.resample"]);
}

#[test]
fn missing_and_half_written_data() {
    let place = Place::new();
    let missing = place.folder.path().join("nowhere");
    fails(
        &place.arguments(&[&format!("data.dir={}", missing.display())]),
        3,
        &["nowhere", "repa-dist data quickstart"],
    );
    let store = place.folder.path().join("store");
    let shard = std::fs::read_dir(&store)
        .expect("the store")
        .map(|e| e.expect("entry").path())
        .find(|p| p.extension().is_some_and(|e| e == "safetensors"))
        .expect("a shard");
    let bytes = std::fs::read(&shard).expect("bytes");
    std::fs::write(&shard, &bytes[..bytes.len() / 2]).expect("cut");
    let name = shard.file_name().expect("a name").to_string_lossy().into_owned();
    fails(&place.arguments(&[]), 3, &[&name]);
    std::fs::write(&shard, &bytes).expect("mended");
    // A store that was cut short while it was made lies beside its place.
    std::fs::rename(&store, place.folder.path().join("store.partial")).expect("renamed");
    fails(&place.arguments(&[]), 3, &["not finished"]);
}

#[test]
fn a_run_folder_of_another_run() {
    let place = Place::new();
    let arguments = place.arguments(&["train.steps=2"]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    Running::start(&mut mpirun(2, &arguments)).wait(DEADLINE).expect_code(0);
    fails(&place.arguments(&["train.seed=9"]), 2, &["train.seed was 0 and is 9", "run.dir"]);
    fails(&place.arguments(&["run.resume=never"]), 2, &["run.resume = never", "step 2"]);

    // The only checkpoint is damaged: nothing is begun anew over it.
    let shard = place.folder.path().join("run/checkpoints/step-00000002/rank-00001-of-00002.safetensors");
    let mut bytes = std::fs::read(&shard).expect("a shard");
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&shard, &bytes).expect("damaged");
    fails(&place.arguments(&[]), 3, &["rank-00001-of-00002.safetensors"]);
    assert!(shard.exists(), "the damaged checkpoint is left as it is");
}

#[test]
fn help_and_version_read_well() {
    for arguments in [
        &["--help"][..],
        &["train", "--help"],
        &["data", "--help"],
        &["data", "quickstart", "--help"],
        &["data", "encode", "--help"],
        &["data", "import", "--help"],
        &["data", "stage", "--help"],
        &["bench", "data", "--help"],
        &["bench", "step", "--help"],
        &["estimate", "--help"],
        &["launch", "--help"],
        &["slurm", "--help"],
        &["sample", "--help"],
        &["evaluate", "--help"],
        &["report", "--help"],
        &["watch", "--help"],
        &["config", "--help"],
        &["doctor", "--help"],
        &["--version"],
    ] {
        let ended = Running::start(&mut repa_dist(arguments)).wait(DEADLINE).expect_code(0);
        assert!(ended.stdout.contains("repa-dist"), "{}", ended.stdout);
        assert!(ended.stdout.lines().all(|line| line.chars().count() <= 100), "too wide:\n{}", ended.stdout);
    }
    Running::start(&mut repa_dist(&["frobnicate"]))
        .wait(DEADLINE)
        .expect_code(2)
        .expect_error(&["frobnicate"]);
}

#[test]
fn the_shipped_configurations_load() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs");
    let mut seen = 0;
    // Its folders are for schedulers.
    let entries = std::fs::read_dir(folder).expect("the configurations").map(|e| e.expect("entry").path());
    for path in entries.filter(|path| path.extension().is_some_and(|e| e == "toml")) {
        let arguments = ["config", "--config", path.to_str().expect("UTF-8")];
        let printed = Running::start(&mut repa_dist(&arguments)).wait(DEADLINE).expect_code(0).stdout;
        let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
        if let Some(size) = name.strip_suffix("2-repa").and_then(|n| n.strip_prefix("sit-")) {
            assert!(
                printed.contains(&format!("model.preset = \"SiT-{}/2\"", size.to_uppercase())),
                "{printed}"
            );
            assert!(printed.contains("train.global_batch = 256"), "{printed}");
        }
        seen += 1;
    }
    assert!(seen >= 5, "{seen} configurations");
}

/// What `config` prints is a configuration.
#[test]
fn the_printed_configuration_can_be_read_back() {
    let folder = tempfile::tempdir().expect("a folder");
    let print =
        |arguments: &[&str]| Running::start(&mut repa_dist(arguments)).wait(DEADLINE).expect_code(0).stdout;
    let first = print(&["config", "train.steps=77", "optimizer.learning_rate=3e-4"]);
    assert!(first.contains("train.steps = 77") && first.contains("argument train.steps=77"), "{first}");
    let path = folder.path().join("mine.toml");
    std::fs::write(&path, &first).expect("written");
    let again = print(&["config", "--config", &path.display().to_string()]);
    let values = |text: &str| {
        text.lines().map(|l| l.split("  #").next().unwrap_or(l).trim_end().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(values(&first), values(&again));
}

/// `repa-dist config | head`: the reader goes, and nothing is said of it.
#[test]
fn a_closed_pipe_is_no_panic() {
    let script = format!("set -o pipefail; {} config | true", repa_tests::binary().display());
    let ended = Running::start(Command::new("bash").args(["-c", &script])).wait(DEADLINE);
    assert!(ended.stderr.is_empty(), "{}", ended.stderr);
    // Ended by the signal, or done before the reader went.
    assert!(ended.code == Some(141) || ended.code == Some(0), "{:?}", ended.code);
}

/// Two hosts with copies of their own, of which one is stale: each rank here has a folder of its own.
#[test]
fn ranks_that_see_other_data_or_weights() {
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| folder.path().join(name);
    small_store(&at("a/store"), 12);
    small_store(&at("b/store"), 13);
    let two = |more: &[&str]| {
        let mut arguments = small_model(Path::new("store"), &at("run"));
        arguments.extend(more.iter().map(|&a| a.to_owned()));
        let mut command = Command::new("mpirun");
        command.args(["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]);
        for (n, name) in ["a", "b"].iter().enumerate() {
            command.args(if n > 0 { &[":"][..] } else { &[] }).args(["-n", "1", "--wdir"]).arg(at(name));
            command.arg(repa_tests::binary()).args(&arguments);
        }
        Running::start(&mut command).wait(DEADLINE)
    };
    let differs = &["rank 1", "data.dir = store", "13 samples, and 12 there"];
    two(&[]).expect_code(2).expect_error(differs);
    // The same data, and other weights to begin with.
    std::fs::remove_dir_all(at("b/store")).expect("removed");
    small_store(&at("b/store"), 12);
    for (seed, name) in [("1", "a"), ("2", "b")] {
        let run = format!("run.dir={}", at(name).join("before").display());
        let mut arguments = small_model(&at("a/store"), &at("run"));
        arguments.extend([run, format!("train.seed={seed}"), "train.steps=1".to_owned()]);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        Running::start(&mut mpirun(1, &arguments)).wait(DEADLINE).expect_code(0);
    }
    let differs = &["rank 1", "run.init_from = before", "other weights than on rank 0"];
    two(&["run.init_from=before"]).expect_code(2).expect_error(differs);
    two(&[]).expect_code(0);
}

#[test]
fn other_data_in_a_run_that_goes_on() {
    let place = Place::new();
    let train = |more: &[&str]| {
        let arguments = place.arguments(more);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        Running::start(&mut mpirun(2, &arguments)).wait(DEADLINE)
    };
    train(&["train.steps=2"]).expect_code(0);
    let other = place.folder.path().join("other");
    small_store(&other, 14);
    let other = format!("data.dir={}", other.display());
    fails(
        &place.arguments(&[&other]),
        2,
        &["data.samples was 12 and is 14", "run.allow_changed=[\"data.samples\"]"],
    );
    train(&[&other, "train.steps=4", "run.allow_changed=[\"data.samples\"]"]).expect_code(0);
}

#[test]
fn checkpoints_of_another_run() {
    let place = Place::new();
    let shared = place.folder.path().join("shared");
    std::fs::create_dir(&shared).expect("a folder");
    // As a run that goes on holds it.
    let lock = std::fs::File::create(shared.join("lock")).expect("a file");
    lock.lock().expect("a lock");
    std::fs::write(shared.join("lock"), "process 7 on elsewhere\n").expect("written");
    let dir = format!("checkpoint.dir={}", shared.display());
    fails(
        &place.arguments(&[&dir]),
        2,
        &["are those of another run, process 7 on elsewhere", "checkpoint.dir=PATH"],
    );
    drop(lock);
    // In the run folder itself they are nobody else's.
    let run = format!("checkpoint.dir={}", place.folder.path().join("run").display());
    for steps in ["train.steps=2", "train.steps=4"] {
        let arguments = place.arguments(&[steps, &run]);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        Running::start(&mut mpirun(2, &arguments)).wait(DEADLINE).expect_code(0);
    }
}
