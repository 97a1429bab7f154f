use super::*;
use crate::run::tests_support::record;

/// A run of so many steps.
pub fn run(steps: u64) -> Run {
    Run {
        folder: "runs/a".into(),
        config_text: "model.preset = \"SiT-S/2\"  # file <a.toml>\n".into(),
        config: [("model.preset".to_owned(), "SiT-S/2".to_owned())].into(),
        steps: (1..=steps).map(record).collect(),
        status: None,
        environment: serde_json::json!({ "ranks": 2, "hosts": ["a", "b"] }),
        events: Vec::new(),
        attempts: Vec::new(),
        checkpoints: Vec::new(),
        samples: Vec::new(),
        evaluation: None,
        scores: Vec::new(),
    }
}

#[test]
fn a_summary_takes_means_and_counts() {
    let mut run = run(400);
    run.steps[7].skipped = true;
    run.steps[399].denoising_loss = f64::NAN;
    let summary = Summary::of(&run);
    assert_eq!((summary.step, summary.mean_over, summary.skipped_steps), (400, 20, 1));
    assert_eq!((summary.ranks, summary.state, summary.steps), (Some(2), Stand::Interrupted, None));
    assert!((summary.seconds - 100.0).abs() < 1e-9 && (summary.images_per_second - 200.0).abs() < 1e-9);
    let expected = run.steps[380..399].iter().map(|r| r.denoising_loss).sum::<f64>() / 19.0;
    assert!((summary.denoising_loss - expected).abs() < 1e-12);
}

#[test]
fn a_page_holds_everything_and_nothing_that_breaks_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut first = run(30);
    first.config.insert("alignment.coefficient".into(), "0.5".into());
    first.events.push(repa_trainer::telemetry::events::Event {
        time: 0.0,
        step: 7,
        kind: repa_trainer::telemetry::events::EventKind::SaveFailed,
        text: "</script><b>full</b>".into(),
    });
    let mut second = run(20);
    second.folder = "runs/b".into();
    second.config.insert("alignment.coefficient".into(), "0".into());
    let picture = folder.path().join("step-00000020.png");
    std::fs::write(&picture, b"picture").expect("written");
    second.samples.push(crate::run::Sample { step: Some(20), path: picture });
    let out = folder.path().join("page.html");
    write(&out, &[first, second], 8).expect("written");
    let page = std::fs::read_to_string(&out).expect("text");
    for part in [
        "<title>Runs a, b",
        "data:image/png;base64,cGljdHVyZQ==",
        "file &lt;a.toml&gt;",
        "<th>alignment.coefficient</th><td>0.5</td><td>0</td>",
        "&lt;/script&gt;&lt;b&gt;full",
        "<\\/script><b>full",
        "1970-01-01 00:00:00",
    ] {
        assert!(page.contains(part), "no {part}");
    }
    // Only keys that differ are compared.
    assert!(!page.contains("<th>model.preset</th>"));
    assert_eq!(page.matches("</script>").count(), 3);
    assert_eq!(page.matches("http").count(), page.matches("https://github.com/leeoniya/uPlot").count());
}

#[test]
fn a_page_that_cannot_be_written_is_named() {
    let error = write(Path::new("/nowhere/at/all.html"), &[run(3)], 8).expect_err("no folder").to_string();
    assert!(error.contains("/nowhere/at/all.html") && error.contains("--out"), "{error}");
}
