//! ADM's scores of a run's samples, by all ranks, under real mpirun. Some twenty seconds.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use repa_tests::{Ended, Running, mpirun, random_weights, repa_dist, small_model, small_store};
use repa_trainer::evaluate::Inception;
use serde_json::Value;

const DEADLINE: Duration = Duration::from_secs(240);

fn code(command: &mut Command, code: i32) -> Ended {
    Running::start(command).wait(DEADLINE).expect_code(code)
}

/// Fails unless the figures are equal, but for rounding.
#[track_caller]
fn same(ours: &Value, others: &Value) {
    for key in ["fid", "sfid", "inception_score", "precision", "recall"] {
        let [a, b] = [ours, others].map(|of| of[key].as_f64().unwrap_or_else(|| panic!("no {key} in {of}")));
        assert!((a - b).abs() <= 1e-4 * b.abs(), "{key}: {a} and {b}");
    }
}

#[test]
fn any_number_of_ranks_gives_the_same_scores() {
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| folder.path().join(name);
    let file = |option: &str, name: &str| format!("--{option}={}", at(name).display());
    small_store(&at("store"), 23);
    let settings = small_model(&at("store"), &at("run"));
    let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
    code(&mut mpirun(1, &settings), 0);
    random_weights(&at("inception"), &Inception::layout(), &[]);

    let path = "../trainer/assets/quickstart-autoencoder.safetensors";
    let autoencoder =
        format!("sample.autoencoder={}", Path::new(env!("CARGO_MANIFEST_DIR")).join(path).display());
    let run = file("run", "run");
    let few = [&autoencoder, "sample.batch=4", "sample.solver.num_steps=2", "train.threads=1"];
    let draw = |name: &str, samples: &str, more: &[&str]| {
        let npz = file("npz", name);
        code(&mut repa_dist(&[&["sample", &run, &npz, samples], &few[..], more].concat()), 0);
    };
    draw("reference.npz", "--samples=12", &["sample.seed=9"]);
    draw("samples.npz", "--samples=17", &[]);

    let (inception, reference) = (file("inception", "inception"), file("reference", "reference.npz"));
    let evaluate = |ranks: usize, more: &[&str], expected: i32| {
        let arguments = [&["evaluate", &inception, &reference, "--json"], more].concat();
        let mut command = if ranks == 0 { repa_dist(&arguments) } else { mpirun(ranks, &arguments) };
        code(&mut command, expected)
    };
    let scores = |ranks: usize, more: &[&str]| -> Value {
        serde_json::from_str(&evaluate(ranks, more, 0).stdout).expect("JSON")
    };
    let stored = scores(0, &[&file("images", "samples.npz"), "train.threads=1"]);
    assert_eq!((&stored["samples"], &stored["reference_images"]), (&17.into(), &12.into()));
    assert!(stored["fid"].as_f64() > Some(0.0) && stored["step"].is_null(), "{stored}");
    let of_run = [&[run.as_str(), "--samples=17"], &few[..]].concat();
    let drawn = scores(2, &of_run);
    same(&drawn, &stored);
    assert_eq!(drawn["step"], 12);
    assert_eq!(drawn["sampler"]["num_steps"], 2);
    let kept = std::fs::read_to_string(at("run/scores.jsonl")).expect("kept");
    assert_eq!(serde_json::from_str::<Value>(kept.trim_end()).expect("one line of JSON"), drawn);
    let report = code(&mut repa_dist(&["report", &at("run").display().to_string(), "--json"]), 0);
    assert!(report.stdout.contains("\"fid\""), "{}", report.stdout);
    let page = std::fs::read_to_string(at("run/report.html")).expect("a page");
    assert!(page.contains("<th>sFID</th>") && page.contains("2 steps, "), "no table of scores");

    // As people read it, of the reference batch itself.
    let itself = file("images", "reference.npz");
    let said =
        code(&mut mpirun(3, &["evaluate", &inception, &reference, &itself, "train.threads=1"]), 0).stdout;
    assert!(said.contains("12 images of ") && said.contains("precision           1.0000"), "{said}");
    assert_eq!(said.matches("FID").count(), 2, "one rank tells: {said}");

    // One rank tells what cannot be used.
    let wrong = |more: &[&str], expected: i32, parts: &[&str]| {
        let ended = evaluate(2, &[more, &["train.threads=1"]].concat(), expected).expect_error(parts);
        assert_eq!(ended.stderr.matches(parts[0]).count(), 1, "{}", ended.stderr);
    };
    wrong(&[&run, "--samples=3"], 2, &["--samples 3 is too few"]);
    wrong(&[&file("images", "inception")], 3, &["is no .npz"]);
    let other = [&["evaluate", "--inception", path, &reference], &of_run[..]].concat();
    let ended = code(&mut mpirun(2, &other), 3);
    ended.expect_error(&["quickstart-autoencoder", "pt_inception-2015-12-05-6726825d.pth"]);
    code(&mut repa_dist(&["evaluate", &run, &reference]), 2).expect_error(&["--inception"]);
}
