//! Looking at runs: `watch` and `report`. Some 15 s.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use repa_tests::{Running, binary, mpirun, repa_dist, run_in, small_model, small_store};
use repa_trainer::telemetry::events::{EventKind, events_path, parse_events};

const DEADLINE: Duration = Duration::from_secs(60);

fn train(store: &Path, run: &Path, more: &[&str]) {
    let arguments = small_model(store, run);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).chain(more.iter().copied()).collect();
    Running::start(&mut mpirun(2, &arguments)).wait(DEADLINE).expect_code(0);
}

fn events(run: &Path) -> Vec<(EventKind, u64)> {
    let text = std::fs::read_to_string(events_path(run)).expect("events");
    parse_events(&text).iter().map(|event| (event.kind, event.step)).collect()
}

#[test]
fn two_runs_on_one_page() {
    let folder = tempfile::tempdir().expect("a folder");
    let here = folder.path();
    let store = here.join("store");
    small_store(&store, 23);
    train(&store, &here.join("runs/repa"), &[]);
    train(&store, &here.join("runs/repa"), &["train.steps=20"]);
    train(&store, &here.join("runs/plain"), &["alignment.coefficient=0"]);
    assert_eq!(
        events(&here.join("runs/repa")),
        [
            (EventKind::Start, 0),
            (EventKind::Durable, 12),
            (EventKind::End, 12),
            (EventKind::Start, 12),
            (EventKind::Durable, 20),
            (EventKind::End, 20),
        ]
    );

    let report = run_in(here, repa_dist(&["report", "runs/repa"]), DEADLINE);
    assert!(report.stdout.contains("runs/repa/report.html"), "{}", report.stdout);
    let page = std::fs::read_to_string(here.join("runs/repa/report.html")).expect("a page");
    for part in ["complete", "20 of 20", "from a checkpoint: 2 ranks on 1 host", "train.global_batch = 10"] {
        assert!(page.contains(part), "no {part} in the page");
    }

    let both = run_in(
        here,
        repa_dist(&["report", "runs/repa", "runs/plain", "--json", "--out", "both.html"]),
        DEADLINE,
    );
    let told: serde_json::Value = serde_json::from_str(&both.stdout).expect("JSON");
    assert_eq!(told["runs"][0]["step"], 20);
    assert_eq!(told["runs"][1]["state"], "complete");
    assert!(told["runs"][0]["denoising_loss"].as_f64().expect("a loss") > 0.0);
    let page = std::fs::read_to_string(here.join("both.html")).expect("a page");
    // The keys that differ, and no others.
    assert!(page.contains("<th>alignment.coefficient</th><td>0.5</td><td>0.0</td>"), "not compared");
    assert!(!page.contains("<th>train.global_batch</th>"));
    assert!(here.join("loss-curves.png").exists());

    Running::start(repa_dist(&["report", "runs/none"]).current_dir(here))
        .wait(DEADLINE)
        .expect_code(3)
        .expect_error(&["runs/none"]);
    Running::start(repa_dist(&["watch", "runs/none"]).current_dir(here))
        .wait(DEADLINE)
        .expect_code(2)
        .expect_error(&["runs/none"]);
}

/// While it trains, after a kill, and on a terminal (that of `script`, which passes keys on).
#[test]
fn a_run_is_watched() {
    let folder = tempfile::tempdir().expect("a folder");
    let (store, run) = (folder.path().join("store"), folder.path().join("run"));
    small_store(&store, 23);
    let mut arguments = small_model(&store, &run);
    arguments.extend(["train.steps=1000000".to_owned(), "checkpoint.every=50".to_owned()]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let training = Running::start(&mut mpirun(2, &arguments));
    let run_text = run.display().to_string();
    let look = || Running::start(&mut repa_dist(&["watch", &run_text])).wait(DEADLINE);
    // Both ranks with a bar: their status is replaced every second.
    let bars = |text: &str| text.lines().filter(|line| line.contains(" ms ") && line.contains('█')).count();
    let begun = Instant::now();
    let seen = loop {
        assert!(begun.elapsed() < DEADLINE, "nothing to see");
        std::thread::sleep(Duration::from_millis(300));
        let looked = look();
        // The folder is not there at first.
        if looked.code == Some(0) && looked.stdout.contains("is durable") && bars(&looked.stdout) == 2 {
            break looked.stdout;
        }
    };
    for part in ["training", "of 1000000", "images/s", "denoising loss", "checkpoint of step"] {
        assert!(seen.contains(part), "no {part:?} in\n{seen}");
    }

    if Command::new("script").arg("--version").output().is_ok_and(|output| output.status.success()) {
        let keys = format!(
            "(sleep 1; printf w; sleep 1; printf q) | script -qec 'stty rows 40 cols 110; {} watch {run_text}' /dev/null",
            binary().display()
        );
        let watched = Running::start(Command::new("sh").args(["-c", &keys])).wait(DEADLINE).expect_code(0);
        // The other screen is taken, and given back.
        let (taken, given) = (watched.stdout.find("\u{1b}[?1049h"), watched.stdout.rfind("\u{1b}[?1049l"));
        assert!(taken.is_some() && taken < given, "{:?}", watched.stdout);
        assert!(watched.stdout.contains("last 10000"), "the key w was not heard");
    } else {
        println!("the terminal was not tried: there is no `script` (Debian's package is bsdutils)");
    }

    training.signal("KILL");
    drop(training);
    std::thread::sleep(Duration::from_secs(17));
    assert!(look().expect_code(0).stdout.contains("interrupted"));
}
