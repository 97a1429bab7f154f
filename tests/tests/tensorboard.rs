//! A run's event files as TensorBoard itself reads them. Some 10 s on two cores, and the time that the package (some 100
//! MB with what it needs) takes to come the first time. Skipped where it cannot be had; a reason is printed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use repa_tests::{Running, log, mpirun, python, run_in, small_model, small_store};
use serde::Deserialize;

const DEADLINE: Duration = Duration::from_secs(120);

/// Prints what TensorBoard sees in a folder: steps and values by curve, steps and sizes by image.
const READ: &str = r#"
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
seen = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0, "images": 0})
seen.Reload()
print(json.dumps({
    "scalars": {tag: [(e.step, e.value) for e in seen.Scalars(tag)] for tag in seen.Tags()["scalars"]},
    "images": {tag: [(e.step, e.width, e.height, len(e.encoded_image_string)) for e in seen.Images(tag)]
               for tag in seen.Tags()["images"]},
}))
"#;

#[derive(Debug, Deserialize)]
struct Seen {
    scalars: BTreeMap<String, Vec<(u64, f64)>>,
    images: BTreeMap<String, Vec<(u64, u32, u32, u64)>>,
}

fn files(run: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(run.join("tensorboard")).expect("a folder");
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    files.sort();
    files
}

#[test]
fn tensorboard_sees_each_step_once() {
    let packages = match python::package("tensorboard", &["tensorboard==2.21.0"]) {
        Ok(packages) => packages,
        Err(reason) => return println!("skipped: {reason}"),
    };
    let folder = tempfile::tempdir().expect("a folder");
    let (store, run) = (folder.path().join("store"), folder.path().join("run"));
    small_store(&store, 23);
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("../trainer/assets");
    let autoencoder = assets.join("quickstart-autoencoder.safetensors");
    let train = |more: &[&str]| {
        let mut arguments = small_model(&store, &run);
        let grids = ["telemetry.tensorboard=true", "sample.training.every=4", "sample.training.num_steps=1"];
        arguments.extend(grids.iter().chain(more).map(|&argument| argument.to_owned()));
        arguments.push(format!("sample.autoencoder={}", autoencoder.display()));
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        Running::start(&mut mpirun(2, &arguments)).wait(DEADLINE).expect_code(0);
    };
    train(&["train.steps=8", "checkpoint.every=5"]);
    // As a kill leaves it.
    let first = &files(&run)[0];
    let written = std::fs::read(first).expect("bytes");
    std::fs::write(first, &written[..written.len() - 5]).expect("written");
    // Goes back: steps 6 to 8 come again.
    train(&["--resume", "5", "train.steps=10"]);
    train(&["train.steps=12"]);
    assert_eq!(files(&run).len(), 3);

    let mut python = Command::new("python3");
    python.args(["-c", READ]).arg(run.join("tensorboard")).env("PYTHONPATH", &packages);
    let said = run_in(folder.path(), python, DEADLINE);
    let line = said.stdout.lines().last().expect("a line");
    let seen: Seen = serde_json::from_str(line).expect("JSON");
    let records = log(&run);
    assert_eq!(records.len(), 12);
    let steps: Vec<u64> = (1..=12).collect();
    for (name, points) in &seen.scalars {
        assert_eq!(points.iter().map(|point| point.0).collect::<Vec<_>>(), steps, "{name}");
    }
    for (record, (_, loss)) in records.iter().zip(&seen.scalars["loss/total"]) {
        assert_eq!(record.loss as f32, *loss as f32, "step {}", record.step);
    }
    for (record, (_, rate)) in records.iter().zip(&seen.scalars["speed/images_per_second"]) {
        assert_eq!(record.images_per_second as f32, *rate as f32, "step {}", record.step);
    }
    let grids = &seen.images["samples"];
    assert_eq!(grids.iter().map(|grid| grid.0).collect::<Vec<_>>(), [4, 8, 12]);
    for &(step, width, height, bytes) in grids {
        let path = run.join(format!("samples/step-{step:08}.png"));
        let png = image::open(&path).expect("a PNG");
        let size = std::fs::metadata(&path).expect("a file").len();
        assert_eq!((png.width(), png.height(), size), (width, height, bytes), "step {step}");
    }
}
