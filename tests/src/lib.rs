//! Helpers for the end-to-end tests: running real commands with a deadline, and small data to run
//! them on.

pub mod hosts;
pub mod inception;
pub mod prometheus;
pub mod python;
pub mod s3;
pub mod slurm;
pub mod stand_in;

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use half::f16;
use repa_trainer::checkpoint::{Array, Checkpoints};
use repa_trainer::config::Config;
use repa_trainer::data::draws::{Draws, Purpose};
use repa_trainer::data::store::{EncoderSpec, Kind, Precision, Sample, Spread, StoreSpec, StoreWriter, View};
use repa_trainer::flat::Flat;
use repa_trainer::params::Layout;
use repa_trainer::telemetry::record::{StepRecord, log_path, read_log};

/// The binary under test.
pub fn binary() -> PathBuf {
    // Tests lie in target/release/deps (examples beside it); the binary, which this package's build brings along, above.
    let mut path = std::env::current_exe().expect("the test's own path");
    path.pop();
    if path.ends_with("deps") || path.ends_with("examples") {
        path.pop();
    }
    let path = path.join("repa-dist");
    assert!(
        path.exists(),
        "{} is missing: build the workspace first (cargo build --release)",
        path.display()
    );
    path
}

/// How a command ended.
#[derive(Debug)]
pub struct Ended {
    /// Exit code; None where a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Ended {
    /// Panics with all output unless the exit code is this one.
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self
    }

    /// Panics with all output unless standard error holds each of these texts.
    #[track_caller]
    pub fn expect_error(self, parts: &[&str]) -> Self {
        for part in parts {
            assert!(self.stderr.contains(part), "no {part:?} in stderr:\n{}", self.stderr);
        }
        self
    }
}

/// A command that is running, in a process group of its own. Dropping it ends the group.
#[derive(Debug)]
pub struct Running {
    child: Child,
    stdout: Option<JoinHandle<String>>,
    stderr: Option<JoinHandle<String>>,
}

impl Running {
    /// Starts a command.
    pub fn start(command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .unwrap_or_else(|e| panic!("cannot start {command:?}: {e}"));
        let stdout = Some(collect(child.stdout.take().expect("piped")));
        let stderr = Some(collect(child.stderr.take().expect("piped")));
        Self { child, stdout, stderr }
    }

    /// Process number of the command.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("waiting works").is_some()
    }

    /// Waits for its end; past the deadline it is ended and the test fails.
    #[track_caller]
    pub fn wait(mut self, deadline: Duration) -> Ended {
        let started = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("waiting works") {
                break Some(status);
            }
            if started.elapsed() > deadline {
                break None;
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        self.end();
        let text = |reader: Option<JoinHandle<String>>| reader.expect("taken once").join().expect("no panic");
        let (stdout, stderr) = (text(self.stdout.take()), text(self.stderr.take()));
        match status {
            Some(status) => Ended { code: status.code(), stdout, stderr },
            None => panic!("not done after {deadline:?}\nstdout:\n{stdout}\nstderr:\n{stderr}"),
        }
    }

    /// Sends a signal by name to the command itself.
    pub fn signal(&self, name: &str) {
        let status =
            Command::new("kill").args(["-s", name, &self.id().to_string()]).status().expect("kill runs");
        assert!(status.success(), "cannot send {name}");
    }

    fn end(&mut self) {
        // The group is gone already in the normal case.
        let _ = Command::new("kill")
            .args(["-s", "KILL", "--", &format!("-{}", self.child.id())])
            .stderr(Stdio::null())
            .status();
        let _ = self.child.wait();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
    }
}

fn collect(mut from: impl Read + Send + 'static) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // What came before an error is what there is to show.
        let _ = from.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// `repa-dist` by itself.
pub fn repa_dist(arguments: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command.args(arguments);
    command
}

/// `mpirun -n RANKS repa-dist`, as root as well and on few cores.
pub fn mpirun(ranks: usize, arguments: &[&str]) -> Command {
    let mut command = Command::new("mpirun");
    command
        .args(["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"])
        .args(["--mca", "mpi_yield_when_idle", "1", "-n", &ranks.to_string()])
        .arg(binary())
        .args(arguments);
    command
}

/// A store of random latents [4, 8, 8] in 3 classes with features [16, 12], for models of patch 2.
pub fn small_store(dir: &Path, samples: usize) {
    let spec = StoreSpec {
        kind: Kind::Latents,
        spread: Spread::Std,
        precision: Precision::F32,
        channels: 4,
        height: 8,
        width: 8,
        resolution: 32,
        autoencoder: "none".into(),
        normalisation: None,
        classes: 3,
        class_names: Vec::new(),
        encoders: vec![EncoderSpec { id: "random".into(), tokens: 16, dim: 12 }],
        images: false,
        flips: false,
        source: "random numbers".into(),
    };
    let draws = Draws::new(1, Purpose::Noise);
    let writer = StoreWriter::create(dir, spec).expect("a store");
    let mut shard = writer.shard(0, samples).expect("a shard");
    for i in 0..samples {
        let mut latents = vec![0.0; 4 * 8 * 8];
        let mut features = vec![0.0; 16 * 12];
        draws.normal(2 * i as u64, &mut latents);
        draws.normal(2 * i as u64 + 1, &mut features);
        let features = [features.into_iter().map(f16::from_f32).collect()];
        let view = View { latent: &latents, features: &features };
        shard.push(&Sample { label: (i % 3) as u32, view, flipped: None, image: &[] }).expect("pushed");
    }
    shard.finish().expect("a finished shard");
    writer.commit(1).expect("a finished store");
}

/// Arguments for a model that fits [`small_store`], small enough to train in milliseconds.
pub fn small_model(store: &Path, run: &Path) -> Vec<String> {
    [
        format!("data.dir={}", store.display()),
        format!("run.dir={}", run.display()),
        "model.input_size=8".into(),
        "model.hidden_size=32".into(),
        "model.depth=2".into(),
        "model.num_heads=2".into(),
        "model.num_classes=3".into(),
        "alignment.encoder_depth=1".into(),
        "alignment.projector_dim=24".into(),
        "alignment.z_dims=[12]".into(),
        "train.global_batch=10".into(),
        "train.steps=12".into(),
        "train.threads=1".into(),
        "checkpoint.every=0".into(),
    ]
    .to_vec()
}

/// Writes random weights of a layout as a safetensors file: a model of a published shape, untrained.
pub fn random_weights(path: &Path, layout: &Layout, metadata: &[(&str, &str)]) {
    let draws = Draws::new(2, Purpose::Init);
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = layout
        .entries()
        .iter()
        .zip(0..)
        .map(|(entry, i)| {
            let mut values = vec![0.0f32; entry.len()];
            draws.normal(i, &mut values);
            let fan_in = entry.shape.iter().skip(1).product::<usize>().max(1) as f32;
            // Vectors are biases and the scales of normalisations: near 1 does for both.
            let (mean, scale) = if entry.shape.len() < 2 { (1.0, 0.1) } else { (0.0, fan_in.sqrt().recip()) };
            let bytes = values.iter().flat_map(|v| (mean + scale * v).to_le_bytes()).collect();
            (entry.name.clone(), entry.shape.clone(), bytes)
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes);
        (name.as_str(), view.expect("a float32 tensor"))
    });
    let metadata = metadata.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect();
    safetensors::serialize_to_file(views, Some(metadata), path).expect("written");
}

/// Runs a command to its end in a folder, and expects success.
#[track_caller]
pub fn run_in(folder: &Path, mut command: Command, deadline: Duration) -> Ended {
    Running::start(command.current_dir(folder)).wait(deadline).expect_code(0)
}

/// Weights, average and moments of a run's newest checkpoint.
pub fn learned(run: &Path) -> Vec<Flat> {
    let found = Checkpoints::at(&run.join("checkpoints")).latest().expect("readable");
    let found = found.checkpoint.expect("a checkpoint");
    let config: Config = serde_json::from_value(found.manifest().config.clone()).expect("a configuration");
    let layout = config.sit().layout();
    Array::ALL.into_iter().map(|array| found.read(&layout, array).expect("readable")).collect()
}

/// The steps that a run has logged.
pub fn log(run: &Path) -> Vec<StepRecord> {
    read_log(&log_path(run)).expect("a readable log")
}

/// The largest relative difference of the losses of two runs; infinite where they have other steps.
pub fn loss_difference(a: &[StepRecord], b: &[StepRecord]) -> f64 {
    if a.len() != b.len() || a.is_empty() {
        return f64::INFINITY;
    }
    a.iter()
        .zip(b)
        .map(|(a, b)| if a.step == b.step { ((a.loss - b.loss) / a.loss).abs() } else { f64::INFINITY })
        .fold(0.0, f64::max)
}
