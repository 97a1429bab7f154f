//! What an attempt leaves behind: `attempts/attempt-0001.json` in the run folder, and its log files.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::hosts::Host;
use super::verdict::Why;

/// The record of an attempt. What is not known yet, or never will be, is null.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    /// From 1 in a run folder.
    pub attempt: usize,
    /// Unix time.
    pub started: f64,
    /// Unix time.
    pub ended: Option<f64>,
    /// Ranks.
    pub world_size: usize,
    /// Where they ran.
    pub hosts: Vec<Host>,
    /// The mpirun line.
    pub command: Vec<String>,
    /// Why it ended, in a word.
    pub why: Option<Why>,
    /// Exit code of the ranks.
    pub exit_code: Option<i32>,
    /// Signal that ended a rank, or mpirun.
    pub signal: Option<i32>,
    /// The rank that it began with.
    pub rank: Option<usize>,
    /// Its host.
    pub host: Option<String>,
    /// The first step of this attempt.
    pub first_step: Option<u64>,
    /// The last one that was seen.
    pub last_step: Option<u64>,
    /// The newest durable checkpoint at its end.
    pub durable_step: Option<u64>,
    /// The whole message.
    pub message: Option<String>,
}

/// Where attempts of a run are kept.
#[derive(Debug, Clone)]
pub struct Attempts {
    run: PathBuf,
}

impl Attempts {
    /// Of a run.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn open(run: &Path) -> io::Result<Self> {
        fs::create_dir_all(run.join("attempts"))?;
        Ok(Self { run: run.to_owned() })
    }

    /// The number of the next one.
    pub fn next(&self) -> usize {
        let entries = fs::read_dir(self.run.join("attempts")).into_iter().flatten().flatten();
        let number = |name: &str| name.strip_prefix("attempt-")?.strip_suffix(".json")?.parse::<usize>().ok();
        entries.filter_map(|entry| number(entry.file_name().to_str()?)).max().unwrap_or(0) + 1
    }

    /// The records of a run, by ascending number; one that cannot be read is left out.
    pub fn read(run: &Path) -> Vec<Record> {
        let entries = fs::read_dir(run.join("attempts")).into_iter().flatten().flatten();
        let read = |path: PathBuf| serde_json::from_slice::<Record>(&fs::read(path).ok()?).ok();
        let mut records: Vec<Record> = entries.filter_map(|entry| read(entry.path())).collect();
        records.sort_by_key(|record| record.attempt);
        records
    }

    /// The folder of an attempt's log files, made where it is missing.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn logs(&self, attempt: usize) -> io::Result<PathBuf> {
        let folder = self.run.join(format!("logs/attempt-{attempt:04}"));
        fs::create_dir_all(&folder)?;
        Ok(folder)
    }

    /// Writes a record; readers see the old one or the new one.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, record: &Record) -> io::Result<()> {
        let path = self.run.join(format!("attempts/attempt-{:04}.json", record.attempt));
        let text = serde_json::to_string_pretty(record).map_err(io::Error::other)?;
        let part = path.with_extension("json.part");
        fs::write(&part, text + "\n")?;
        fs::rename(&part, path)
    }
}
