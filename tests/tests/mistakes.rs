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
