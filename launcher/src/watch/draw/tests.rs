use std::path::Path;

use ratatui::Terminal;
use ratatui::backend::TestBackend;
use repa_trainer::telemetry::record::{RunLog, log_path};
use repa_trainer::train::Status;

use super::*;
use crate::run::now;
use crate::run::tests_support::record;

fn rank(rank: usize, seconds: f64) -> RankLine {
    RankLine {
        rank,
        host: format!("node{}", rank / 4),
        state: "running".into(),
        pid: Some(1),
        step: Some(301),
        phase: Some("computing".into()),
        in_phase_seconds: Some(0.1),
        step_seconds: Some(seconds),
    }
}

/// A run of 300 steps on so many ranks, the third of which is slow.
fn view(run: &Path, ranks: usize) -> View {
    let mut log = RunLog::open(&log_path(run), 0).expect("new");
    (1..=300).for_each(|step| log.write(&record(step)).expect("written"));
    let status = Status {
        time: now(),
        state: "training".into(),
        step: 301,
        steps: 500,
        durable: Some(250),
        between_steps: false,
        ranks: (0..ranks).map(|n| rank(n, if n == 2 { 0.4 } else { 0.2 })).collect(),
    };
    std::fs::write(run.join("status.json"), serde_json::to_string(&status).expect("text")).expect("written");
    let mut view = View::new(run);
    view.look().expect("read");
    view
}

fn drawn(view: &View, width: u16, height: u16) -> String {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("a terminal");
    terminal.draw(|frame| draw(frame, view)).expect("drawn");
    let buffer = terminal.backend().buffer().clone();
    let line = |y| (0..width).map(|x| buffer[(x, y)].symbol().to_owned()).collect::<String>();
    (0..height).map(line).collect::<Vec<_>>().join("\n")
}

#[test]
fn everything_is_on_the_picture() {
    let run = tempfile::tempdir().expect("a folder");
    let text = drawn(&view(run.path(), 4), 120, 40);
    for part in [
        "training",
        "200 images/s",
        "250 ms a step",
        "50 s left",
        "checkpoint of step 250",
        "step 300 of 500",
        "denoising loss 0.8",
        "alignment loss -0.400",
        "gradient norm",
        "node0",
        "400.0 ms",
        "computing",
        "communication 8.0 %",
    ] {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }
    assert!(text.chars().any(|c| ('\u{2801}'..='\u{28ff}').contains(&c)), "a curve");
    // The slow rank's bar is full, the others' half of it.
    let bar = |rank: &str| {
        let line = text.lines().find(|line| line.contains(rank)).expect("a line");
        line.matches('█').count()
    };
    assert_eq!(bar("400.0 ms"), 2 * bar("   0 node0"));
}

#[test]
fn of_many_ranks_the_slowest_are_shown() {
    let run = tempfile::tempdir().expect("a folder");
    let text = drawn(&view(run.path(), 64), 100, 40);
    let lines: Vec<&str> = text.lines().filter(|line| line.contains("node")).collect();
    assert!(lines[0].contains("400.0 ms") && lines[0].contains("    2 node0"), "{}", lines[0]);
    assert!(text.contains("and 57 more"), "{text}");
}

#[test]
fn any_size_can_be_drawn_and_any_run() {
    let run = tempfile::tempdir().expect("a folder");
    let empty = View::new(run.path());
    let full = view(run.path(), 9);
    for (width, height) in [(1, 1), (20, 5), (40, 12), (59, 24), (80, 24), (300, 100)] {
        drawn(&empty, width, height);
        drawn(&full, width, height);
    }
}

#[test]
fn groups_are_means_and_ranges_leave_spikes_out() {
    let point = |step, denoising| Point {
        step,
        denoising,
        alignment: 0.0,
        grad_norm: 0.0,
        images_per_second: 0.0,
        seconds: 0.0,
        data_wait: 0.0,
        communication: 0.0,
        loss_is_skipped: false,
    };
    let points: Vec<Point> = (1..=6).map(|n| point(n, n as f32)).collect();
    assert_eq!(grouped(&points, |p| p.denoising, 3), [(2.0, 1.5), (4.0, 3.5), (6.0, 5.5)]);
    assert_eq!(grouped(&[point(1, f32::NAN)], |p| p.denoising, 3), []);
    let mut data: Vec<(f64, f64)> = (0..200).map(|n| (f64::from(n), f64::from(n % 10))).collect();
    data[50].1 = 1e9;
    let (low, high) = range(&data);
    assert!(low < 0.0 && high > 9.0 && high < 10.0, "{low} {high}");
    assert_eq!(
        [0.0, 1234.5, 12.34, 0.1234, 1e-5, 2e6].map(short),
        ["0", "1234", "12.3", "0.123", "1.0e-5", "2.0e6"]
    );
}
