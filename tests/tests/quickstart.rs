//! The quickstart's whole line, shortened: real data, real models, 20 steps on 1 to 4 ranks, samples,
//! evaluation, report, half precision. Some 2 minutes on two cores.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use repa_tests::{Ended, Running, log, loss_difference, mpirun, repa_dist};

const DEADLINE: Duration = Duration::from_secs(240);

fn run(folder: &Path, mut command: Command) -> Ended {
    Running::start(command.current_dir(folder)).wait(DEADLINE).expect_code(0)
}

#[test]
fn the_quickstart_runs_and_is_the_same_on_one_to_four_ranks() {
    let folder = tempfile::tempdir().expect("a folder");
    let here = folder.path();
    let made = run(here, repa_dist(&["data", "quickstart"]));
    assert!(made.stdout.contains("1694 labelled emoji"), "{}", made.stdout);
    let again = run(here, repa_dist(&["data", "quickstart"]));
    assert!(again.stdout.contains("is there already"), "{}", again.stdout);
    let info = run(here, repa_dist(&["data", "info"]));
    assert!(info.stdout.contains("flags") && info.stdout.contains("quickstart-teacher"), "{}", info.stdout);
    run(here, repa_dist(&["data", "verify"]));

    let train = |ranks: usize, name: &str| {
        let dir = format!("run.dir=runs/{name}");
        let arguments = [&dir, "train.steps=20", "train.threads=1", "checkpoint.every=0"];
        run(here, mpirun(ranks, &arguments));
        log(&here.join("runs").join(name))
    };
    let one = train(1, "one");
    assert!(one[19].loss < one[0].loss, "the loss falls: {} to {}", one[0].loss, one[19].loss);
    for (ranks, name) in [(2, "two"), (3, "three"), (4, "four")] {
        let difference = loss_difference(&one, &train(ranks, name));
        assert!(difference < 1e-4, "{ranks} ranks: losses differ by {difference:.2e}");
    }
    let losses = |name: &str| log(&here.join("runs").join(name)).iter().map(|r| r.loss).collect::<Vec<_>>();
    train(2, "two-again");
    assert_eq!(losses("two"), losses("two-again"));
    let shard = |name: &str| {
        let shard = format!("runs/{name}/checkpoints/step-00000020/rank-00001-of-00002.safetensors");
        std::fs::read(here.join(shard)).expect("a shard")
    };
    assert!(shard("two") == shard("two-again"), "the same layout gives the same bits");

    // Half precision follows float32 over 200 steps.
    let long = |precision: &str| {
        let (dir, precision) = (format!("run.dir=runs/{precision}"), format!("train.precision={precision}"));
        let batch = "train.global_batch=16";
        run(
            here,
            mpirun(2, &[&dir, &precision, batch, "train.steps=200", "train.threads=1", "checkpoint.every=0"]),
        );
    };
    long("f32");
    long("bf16");
    let worst =
        losses("f32").iter().zip(losses("bf16")).map(|(a, b)| ((a - b) / a).abs()).fold(0.0, f64::max);
    assert!(losses("f32").len() == 200 && worst < 0.02, "bfloat16's losses differ by {worst:.4}");

    let few = "sample.solver.num_steps=3";
    let sampled = run(here, repa_dist(&["sample", "--run", "runs/two", "--per-class", "2", few]));
    assert!(sampled.stdout.contains("samples/step-00000020.png"), "{}", sampled.stdout);
    let size = std::fs::metadata(here.join("runs/two/samples/step-00000020.png")).expect("a picture").len();
    assert!(size > 10_000, "the grid has {size} bytes");
    let evaluated =
        run(here, repa_dist(&["evaluate", "--run", "runs/two", "--samples", "120", "--json", few]));
    let figures: serde_json::Value = serde_json::from_str(&evaluated.stdout).expect("JSON");
    let figure = |key: &str| figures[key].as_f64().unwrap_or_else(|| panic!("no {key} in {figures}"));
    assert!(figure("floor") < 0.1 * figure("class_means"), "{figures}");
    assert!(figure("floor") < 0.1 * figure("untrained"), "{figures}");
    assert!(figure("trained") != figure("untrained"), "{figures}");
    let kept = std::fs::read_to_string(here.join("runs/two/evaluation.json")).expect("kept");
    assert_eq!(serde_json::from_str::<serde_json::Value>(&kept).expect("JSON"), figures);
    let report = run(here, repa_dist(&["report", "runs/two"]));
    assert!(report.stdout.contains("loss-curves.png"), "{}", report.stdout);
    assert!(here.join("runs/two/loss-curves.png").exists());
}
