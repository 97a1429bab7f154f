//! What happens to a run, in words: the run folder's `events.jsonl`. Unlike the log of steps it is only ever added to,
//! so that it tells of every start, and of steps that were made again.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// Where a run keeps its events.
pub fn events_path(run: &Path) -> PathBuf {
    run.join("events.jsonl")
}

/// What kind of event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum EventKind {
    /// The ranks begin to train.
    Start,
    /// A checkpoint is durable.
    Durable,
    /// A save has failed, and training goes on.
    SaveFailed,
    /// A step's gradient was not finite.
    Skipped,
    /// A rank is persistently slower than the others.
    Straggler,
    /// A stop was asked for.
    Stop,
    /// The run has come to its end in good order.
    End,
    /// One that a newer program has written.
    #[serde(other)]
    Other,
}

/// One line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Seconds since 1970.
    pub time: f64,
    /// The step at which it happened.
    pub step: u64,
    /// What kind.
    pub kind: EventKind,
    /// In words.
    pub text: String,
}

/// Adds to a run's events, from any thread. Training does not depend on them: what cannot be written is said once.
#[derive(Debug, Clone)]
pub struct Events(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    file: File,
    path: PathBuf,
    complained: AtomicBool,
}

impl Events {
    /// Opens a run's events. A line that a kill has cut short is ended.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn open(run: &Path) -> io::Result<Self> {
        let path = events_path(run);
        let mut file = OpenOptions::new().create(true).read(true).append(true).open(&path)?;
        if file.metadata()?.len() > 0 {
            file.seek(SeekFrom::End(-1))?;
            let mut last = [0];
            file.read_exact(&mut last)?;
            if last != *b"\n" {
                file.write_all(b"\n")?;
            }
        }
        Ok(Self(Arc::new(Shared { file, path, complained: AtomicBool::new(false) })))
    }

    /// Adds one.
    pub fn tell(&self, kind: EventKind, step: u64, text: &str) {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |t| t.as_secs_f64());
        let event = Event { time, step, kind, text: text.to_owned() };
        let mut line = serde_json::to_string(&event).expect("an event serialises");
        line.push('\n');
        // One write to a file opened for appending: lines of two threads do not mix.
        if let Err(error) = (&self.0.file).write_all(line.as_bytes())
            && !self.0.complained.swap(true, Ordering::Relaxed)
        {
            tracing::warn!("cannot write {}: {error}", self.0.path.display());
        }
    }
}

/// The events in a text; lines that are none are left out.
pub fn parse_events(text: &str) -> Vec<Event> {
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_of_all_starts_are_kept_and_a_cut_line_harms_no_other() {
        let run = tempfile::tempdir().expect("a folder");
        let events = Events::open(run.path()).expect("new");
        events.tell(EventKind::Start, 0, "2 ranks");
        events.tell(EventKind::Durable, 10, "checkpoint of step 10");
        let mut file = OpenOptions::new().append(true).open(events_path(run.path())).expect("there");
        file.write_all(b"{\"time\":1,\"st").expect("written");
        let events = Events::open(run.path()).expect("again");
        events.clone().tell(EventKind::Start, 10, "going on");
        file.write_all(b"{\"time\":1.5,\"step\":11,\"kind\":\"flood\",\"text\":\"\"}\n").expect("written");
        let read = parse_events(&std::fs::read_to_string(events_path(run.path())).expect("text"));
        let told: Vec<_> = read.iter().map(|event| (event.kind, event.step)).collect();
        let expected =
            [(EventKind::Start, 0), (EventKind::Durable, 10), (EventKind::Start, 10), (EventKind::Other, 11)];
        assert_eq!(told, expected);
        assert!(read[0].time > 1.6e9);
    }
}
