//! What is known of the run, and how the person wants to see it.

use std::path::{Path, PathBuf};

use repa_trainer::telemetry::events::{Event, EventKind, events_path, parse_events};
use repa_trainer::telemetry::record::StepRecord;
use repa_trainer::train::Status;

use crate::exit::Failure;
use crate::launch::Attempts;
use crate::run::{Follow, News, Stand, now};

/// Steps that the present speed is taken from.
const RECENT: usize = 100;

/// How much of a run the curves show.
const WINDOWS: [Option<usize>; 4] = [None, Some(10_000), Some(1000), Some(100)];

/// What is kept of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    pub step: u64,
    pub denoising: f32,
    pub alignment: f32,
    pub grad_norm: f32,
    pub images_per_second: f32,
    pub seconds: f32,
    pub data_wait: f32,
    pub communication: f32,
    pub loss_is_skipped: bool,
}

impl Point {
    fn of(r: &StepRecord) -> Self {
        Self {
            step: r.step,
            denoising: r.denoising_loss as f32,
            alignment: r.alignment_loss as f32,
            grad_norm: r.grad_norm as f32,
            images_per_second: r.images_per_second as f32,
            seconds: (r.step_seconds + r.snapshot_seconds) as f32,
            data_wait: r.data_wait_seconds as f32,
            communication: r.communication_seconds as f32,
            loss_is_skipped: r.skipped,
        }
    }
}

/// A run that is watched.
#[derive(Debug)]
pub struct View {
    pub run: PathBuf,
    pub points: Vec<Point>,
    pub status: Option<Status>,
    /// By ascending time.
    pub events: Vec<Event>,
    /// Whether the slowest ranks come first.
    pub sorted: bool,
    /// When it was looked at last.
    pub time: f64,
    window: usize,
    follow: Follow,
}

impl View {
    /// Of a run, of which nothing is known yet.
    pub fn new(run: &Path) -> Self {
        Self {
            run: run.to_owned(),
            points: Vec::new(),
            status: None,
            events: Vec::new(),
            sorted: false,
            time: now(),
            window: 0,
            follow: Follow::new(run),
        }
    }

    /// Looks at the folder again.
    ///
    /// # Errors
    /// There is no such folder, or its log cannot be read.
    pub fn look(&mut self) -> Result<(), Failure> {
        if !self.run.is_dir() {
            return Err(Failure::usage(format!("{} is no run folder: there is none", self.run.display())));
        }
        let news = self.follow.read();
        let news =
            news.map_err(|e| Failure::data(format!("cannot read the log of {}: {e}", self.run.display())))?;
        match news {
            News::More(steps) => self.points.extend(steps.iter().map(Point::of)),
            News::Anew(steps) => self.points = steps.iter().map(Point::of).collect(),
        }
        // Rank 0 may be writing it: the last one stays.
        self.status = Status::read(&self.run).or(self.status.take());
        let text = std::fs::read_to_string(events_path(&self.run)).unwrap_or_default();
        self.events = parse_events(&text);
        self.events.extend(attempts(&self.run));
        self.events.sort_by(|a, b| a.time.total_cmp(&b.time));
        self.time = now();
        Ok(())
    }

    /// Where the run stands; None before its first word.
    pub fn stand(&self) -> Option<Stand> {
        Some(Stand::of(self.status.as_ref()?, self.time))
    }

    /// The steps that the curves show.
    pub fn shown(&self) -> &[Point] {
        let length = WINDOWS[self.window].unwrap_or(usize::MAX).min(self.points.len());
        &self.points[self.points.len() - length..]
    }

    /// What of the run they show, in words.
    pub fn window(&self) -> String {
        WINDOWS[self.window].map_or_else(|| "the whole run".into(), |steps| format!("the last {steps} steps"))
    }

    /// Shows more, or less.
    pub fn next_window(&mut self) {
        self.window = (self.window + 1) % WINDOWS.len();
    }

    /// The last steps, for figures of the present.
    pub fn recent(&self) -> &[Point] {
        &self.points[self.points.len().saturating_sub(RECENT)..]
    }

    /// Seconds until the last step, at the present speed.
    pub fn time_left(&self) -> Option<f64> {
        let recent = self.recent();
        let each = mean(recent, |p| p.seconds)?;
        let left = self.status.as_ref()?.steps.saturating_sub(recent.last()?.step);
        (left > 0).then_some(each * left as f64)
    }
}

/// Mean of what is finite.
pub fn mean(points: &[Point], value: fn(&Point) -> f32) -> Option<f64> {
    let finite: Vec<f64> = points.iter().map(|p| f64::from(value(p))).filter(|x| x.is_finite()).collect();
    (!finite.is_empty()).then(|| finite.iter().sum::<f64>() / finite.len() as f64)
}

/// What `launch` has to tell: how attempts ended.
fn attempts(run: &Path) -> Vec<Event> {
    let ended = |record: crate::launch::Record| {
        let text = match &record.message {
            Some(message) => format!("start {} ended: {message}", record.attempt),
            None => format!("start {} ended", record.attempt),
        };
        // One that ended well has said so itself.
        let bad = record.exit_code != Some(0) && record.exit_code != Some(75);
        bad.then_some(Event {
            time: record.ended?,
            step: record.last_step.unwrap_or(0),
            kind: EventKind::Other,
            text,
        })
    };
    Attempts::read(run).into_iter().filter_map(ended).collect()
}

#[cfg(test)]
mod tests {
    use repa_trainer::telemetry::events::Events;
    use repa_trainer::telemetry::record::{RunLog, log_path};

    use super::*;
    use crate::run::tests_support::record;

    #[test]
    fn a_view_follows_the_run() {
        let run = tempfile::tempdir().expect("a folder");
        let mut view = View::new(run.path());
        view.look().expect("an empty folder is a run that has not begun");
        assert!(view.points.is_empty() && view.stand().is_none() && view.time_left().is_none());
        let mut log = RunLog::open(&log_path(run.path()), 0).expect("new");
        (1..=300).for_each(|step| log.write(&record(step)).expect("written"));
        let status = Status {
            time: now(),
            state: "training".into(),
            step: 301,
            steps: 500,
            durable: Some(250),
            between_steps: false,
            ranks: Vec::new(),
        };
        let text = serde_json::to_string(&status).expect("text");
        std::fs::write(run.path().join("status.json"), text).expect("written");
        Events::open(run.path()).expect("new").tell(EventKind::Start, 0, "hello");
        view.look().expect("read");
        assert_eq!((view.points.len(), view.stand()), (300, Some(Stand::Training)));
        assert!((view.time_left().expect("a time") - 50.0).abs() < 1e-3);
        assert_eq!(view.events[0].text, "hello");
        assert_eq!((view.shown().len(), view.window().as_str()), (300, "the whole run"));
        (0..3).for_each(|_| view.next_window());
        assert_eq!((view.shown().len(), view.shown()[0].step), (100, 201));
        let error = View::new(Path::new("/nowhere")).look().expect_err("no folder").to_string();
        assert!(error.contains("/nowhere"), "{error}");
    }
}
