//! Reads a run's log of steps while it grows.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use repa_trainer::telemetry::record::{StepRecord, log_path};

/// What has become of a log since it was read last.
#[derive(Debug, PartialEq)]
pub enum News {
    /// Steps were added, or none.
    More(Vec<StepRecord>),
    /// The run was started again, and goes on after the last of these.
    Anew(Vec<StepRecord>),
}

/// A reader of one run's log. It reads every line once.
#[derive(Debug)]
pub struct Follow {
    path: PathBuf,
    /// Device and number of the file that was read: a run that starts again replaces it.
    file: Option<(u64, u64)>,
    offset: u64,
    /// The beginning of a line whose end has not been written yet.
    rest: Vec<u8>,
}

impl Follow {
    /// Of a run.
    pub fn new(run: &Path) -> Self {
        Self { path: log_path(run), file: None, offset: 0, rest: Vec::new() }
    }

    /// Reads what is new. A log that is missing has nothing new.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn read(&mut self) -> io::Result<News> {
        let mut file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(News::More(Vec::new())),
            Err(error) => return Err(error),
        };
        let metadata = file.metadata()?;
        let identity = (metadata.dev(), metadata.ino());
        let anew = self.file != Some(identity) || metadata.len() < self.offset;
        if anew {
            (self.file, self.offset) = (Some(identity), 0);
            self.rest.clear();
        }
        file.seek(SeekFrom::Start(self.offset))?;
        self.offset += file.read_to_end(&mut self.rest)? as u64;
        let whole = self.rest.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        let lines: Vec<u8> = self.rest.drain(..whole).collect();
        let steps = lines.split(|&byte| byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok());
        let steps = steps.collect();
        Ok(if anew { News::Anew(steps) } else { News::More(steps) })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use repa_trainer::telemetry::record::RunLog;

    use super::*;
    use crate::run::tests_support::record;

    fn steps(news: &News) -> (bool, Vec<u64>) {
        match news {
            News::More(steps) => (false, steps.iter().map(|r| r.step).collect()),
            News::Anew(steps) => (true, steps.iter().map(|r| r.step).collect()),
        }
    }

    #[test]
    fn every_step_is_read_once_and_a_new_start_is_told() {
        let run = tempfile::tempdir().expect("a folder");
        let mut follow = Follow::new(run.path());
        assert_eq!(steps(&follow.read().expect("nothing")), (false, vec![]));
        let mut log = RunLog::open(&log_path(run.path()), 0).expect("new");
        (1..=3).for_each(|step| log.write(&record(step)).expect("written"));
        assert_eq!(steps(&follow.read().expect("read")), (true, vec![1, 2, 3]));
        assert_eq!(steps(&follow.read().expect("read")), (false, vec![]));
        // A line in two pieces.
        let line = serde_json::to_string(&record(4)).expect("text") + "\n";
        let mut file = std::fs::OpenOptions::new().append(true).open(log_path(run.path())).expect("there");
        file.write_all(&line.as_bytes()[..40]).expect("written");
        assert_eq!(steps(&follow.read().expect("read")), (false, vec![]));
        file.write_all(&line.as_bytes()[40..]).expect("written");
        assert_eq!(steps(&follow.read().expect("read")), (false, vec![4]));
        // Sent back to step 2.
        let mut log = RunLog::open(&log_path(run.path()), 2).expect("again");
        log.write(&record(3)).expect("written");
        assert_eq!(steps(&follow.read().expect("read")), (true, vec![1, 2, 3]));
    }
}
