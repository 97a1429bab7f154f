//! What `repa-dist estimate` predicts against what training takes. Some 20 s on two cores, and 2.5 GB.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use repa_tests::{Running, mpirun, repa_dist};

const DEADLINE: Duration = Duration::from_secs(120);

/// What a command prints as JSON.
#[track_caller]
fn json(mut command: Command) -> serde_json::Value {
    let printed = Running::start(&mut command).wait(DEADLINE).expect_code(0).stdout;
    serde_json::from_str(&printed).expect("JSON")
}

#[test]
fn the_estimate_is_what_steps_of_sit_s_2_take() {
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/sit-s2-repa.toml");
    let config = config.to_str().expect("a path in UTF-8");
    for (ranks, batch, micro) in [(1, 4, 0), (1, 2, 1), (2, 2, 0)] {
        let settings = [
            "--config".to_owned(),
            config.to_owned(),
            "train.precision=f32".to_owned(),
            "train.threads=1".to_owned(),
            format!("train.global_batch={batch}"),
            format!("train.micro_batch={micro}"),
        ];
        let with = |command: &[&str]| -> Vec<String> {
            command.iter().map(|&a| a.to_owned()).chain(settings.clone()).collect()
        };
        let (ranks_text, steps) = (ranks.to_string(), with(&["bench", "step", "--json", "--steps", "1"]));
        let steps: Vec<&str> = steps.iter().map(String::as_str).collect();
        let steps = if ranks == 1 { repa_dist(&steps) } else { mpirun(ranks, &steps) };
        let measured = json(steps)["peak_memory_bytes"].as_f64().expect("bytes");
        let estimate = with(&["estimate", "--json", "--ranks", &ranks_text]);
        let estimate: Vec<&str> = estimate.iter().map(String::as_str).collect();
        // `bench step` saves nothing, so it has no copy for a checkpoint.
        let estimated = json(repa_dist(&estimate));
        let snapshot = estimated["lines"].as_array().expect("lines").iter().find(|l| l["part"] == "snapshot");
        let snapshot = snapshot.expect("a line of the checkpoint's")["bytes"].as_f64().expect("bytes");
        let estimated = estimated["host_bytes"].as_f64().expect("bytes") - snapshot;
        let ratio = estimated / measured;
        assert!(
            (0.9..1.1).contains(&ratio),
            "{ranks} ranks, batch {batch}, micro-batch {micro}: {estimated:.3e} estimated, {measured:.3e} measured"
        );
    }
}
