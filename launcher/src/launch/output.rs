//! Where the ranks' output goes: a log file each, rank 0's also to the terminal as it is, and what the others say on
//! standard error line by line. Errors are kept for the one message at the end.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::lines::Lines;
use super::tags::Origin;

/// Bytes of mpirun's own words, and of a rank's error, that are kept.
const KEPT: usize = 64 << 10;

/// How errors begin on standard error.
const ERROR: &str = "error: ";

/// Standard error, which rank 0 and launch share.
#[derive(Debug, Clone)]
pub struct Terminal {
    state: Arc<Mutex<Cursor>>,
}

#[derive(Debug)]
struct Cursor {
    is_terminal: bool,
    /// Something stands on the line, such as a progress bar.
    mid_line: bool,
}

impl Terminal {
    /// Of this process.
    pub fn new() -> Self {
        let cursor = Cursor { is_terminal: io::stderr().is_terminal(), mid_line: false };
        Self { state: Arc::new(Mutex::new(cursor)) }
    }

    /// The columns, where a person watches.
    pub fn width(&self) -> Option<u16> {
        let watched = lock(&self.state).is_terminal;
        // Some terminals do not know their width.
        let columns = || {
            rustix::termios::tcgetwinsize(io::stderr())
                .ok()
                .map(|size| size.ws_col)
                .filter(|&columns| columns > 0)
        };
        watched.then(|| columns().unwrap_or(100))
    }

    /// Prints a line; a progress bar makes room, and draws itself again with the next step.
    pub fn line(&self, text: &str) {
        let mut cursor = lock(&self.state);
        let before = match (cursor.mid_line, cursor.is_terminal) {
            (false, _) => "",
            (true, true) => "\r\x1b[2K",
            (true, false) => "\n",
        };
        cursor.mid_line = false;
        write(&mut io::stderr(), format!("{before}{text}\n").as_bytes());
    }

    fn raw(&self, bytes: &[u8]) {
        if let Some(last) = bytes.last() {
            let mut cursor = lock(&self.state);
            cursor.mid_line = *last != b'\n';
            write(&mut io::stderr(), bytes);
        }
    }
}

/// Nobody can be told that the terminal has gone; the log files have it all.
fn write(to: &mut dyn Write, bytes: &[u8]) {
    let _ = to.write_all(bytes).and_then(|()| to.flush());
}

/// A thread that panicked in here has left nothing half done that matters.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a rank said last: `error: ` and what followed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankError {
    /// Who.
    pub rank: usize,
    /// Without the `error: `.
    pub text: String,
}

/// One attempt's output.
#[derive(Debug)]
pub struct Output {
    folder: PathBuf,
    /// Whether the other ranks' standard error is shown.
    shows_others: bool,
    terminal: Terminal,
    ranks: BTreeMap<usize, Rank>,
    mpirun: Lines,
    words: String,
    errors: Vec<RankError>,
    /// When the first sign of a failure came.
    failed: Option<Instant>,
    /// When rank 0 last said something.
    heard: Option<Instant>,
    /// Whether a log file could not be written, which is said once.
    warned: bool,
}

#[derive(Debug, Default)]
struct Rank {
    stdout: Lines,
    stderr: Lines,
    /// It has begun an error: what follows is part of it.
    failing: bool,
}

impl Output {
    /// Into a folder for the log files.
    pub fn new(folder: &Path, shows_others: bool, terminal: Terminal) -> Self {
        Self {
            folder: folder.to_owned(),
            shows_others,
            terminal,
            ranks: BTreeMap::new(),
            mpirun: Lines::default(),
            words: String::new(),
            errors: Vec::new(),
            failed: None,
            heard: None,
            warned: false,
        }
    }

    /// Takes a piece of output.
    pub fn take(&mut self, origin: Origin, bytes: &[u8]) {
        match origin {
            Origin::Mpirun => self.take_mpirun(bytes),
            Origin::Stdout(rank) => self.take_stdout(rank, bytes),
            Origin::Stderr(rank) => {
                bytes.split_inclusive(|&b| b == b'\n').for_each(|p| self.take_stderr(rank, p))
            }
        }
    }

    fn take_mpirun(&mut self, bytes: &[u8]) {
        const SIGNS: [&str; 4] = [
            "MPI_ABORT was invoked",
            "mpirun noticed that process",
            "mpirun detected that one or more processes",
            "lost communication with a remote daemon",
        ];
        let mut lines = Vec::new();
        self.mpirun.feed(bytes, &mut |line| lines.push(line.to_owned()));
        for line in lines {
            if SIGNS.iter().any(|sign| line.contains(sign)) {
                self.failed.get_or_insert_with(Instant::now);
            }
            if self.words.len() < KEPT {
                self.words.push_str(&line);
                self.words.push('\n');
            }
            self.log("mpirun.log", &line);
        }
    }

    fn take_stdout(&mut self, rank: usize, bytes: &[u8]) {
        if rank == 0 {
            self.heard = Some(Instant::now());
            write(&mut io::stdout(), bytes);
        }
        let mut lines = Vec::new();
        self.ranks.entry(rank).or_default().stdout.feed(bytes, &mut |line| lines.push(line.to_owned()));
        lines.iter().for_each(|line| self.log(&log_name(rank), line));
    }

    /// A line, or a piece of one.
    fn take_stderr(&mut self, number: usize, piece: &[u8]) {
        let rank = self.ranks.entry(number).or_default();
        let was_failing = rank.failing;
        if number == 0 {
            self.heard = Some(Instant::now());
            let error = error_in(piece, &rank.stderr).filter(|_| !rank.failing);
            rank.failing |= error.is_some();
            match (error, was_failing) {
                (_, true) => {}
                (Some(at), _) => self.terminal.raw(&piece[..at]),
                (None, _) => self.terminal.raw(piece),
            }
        }
        let mut lines = Vec::new();
        rank.stderr.feed(piece, &mut |line| lines.push(line.to_owned()));
        lines.iter().for_each(|line| self.stderr_line(number, line));
    }

    fn stderr_line(&mut self, number: usize, line: &str) {
        self.log(&log_name(number), line);
        let failing = &mut self.ranks.entry(number).or_default().failing;
        *failing |= line.starts_with(ERROR);
        if *failing {
            self.failed.get_or_insert_with(Instant::now);
            match self.errors.iter_mut().find(|error| error.rank == number) {
                Some(error) if error.text.len() < KEPT => {
                    error.text.push('\n');
                    error.text.push_str(line);
                }
                Some(_) => {}
                None => {
                    // A progress bar may stand before it.
                    let text = line.split_once(ERROR).map_or(line, |(_, text)| text).to_owned();
                    self.errors.push(RankError { rank: number, text });
                }
            }
        } else if number > 0 && self.shows_others {
            self.terminal.line(&format!("[rank {number}] {line}"));
        }
    }

    fn log(&mut self, name: &str, line: &str) {
        // Opened each time: thousands of ranks would be more files than a process may hold.
        let written = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.folder.join(name))
            .and_then(|mut file| file.write_all(format!("{line}\n").as_bytes()));
        match written {
            Ok(()) => self.warned = false,
            Err(_) if self.warned => {}
            Err(error) => {
                self.warned = true;
                let place = self.folder.display();
                self.terminal
                    .line(&format!("launch: cannot write logs to {place}: {error}; the run goes on"));
            }
        }
    }

    /// What is left without an end of line.
    pub fn finish(&mut self) {
        self.take_mpirun(b"\n");
        for rank in self.ranks.keys().copied().collect::<Vec<_>>() {
            let streams = self.ranks.entry(rank).or_default();
            let (mut out, mut err) = (Vec::new(), Vec::new());
            streams.stdout.finish(&mut |line| out.push(line.to_owned()));
            streams.stderr.finish(&mut |line| err.push(line.to_owned()));
            out.iter().for_each(|line| self.log(&log_name(rank), line));
            err.iter().for_each(|line| self.stderr_line(rank, line));
        }
    }

    /// Shows the errors after all, where the attempt has ended well in spite of them.
    pub fn show_errors(&self) {
        self.errors
            .iter()
            .for_each(|error| self.terminal.line(&format!("[rank {}] {}", error.rank, error.text)));
    }

    /// When the first sign of a failure came.
    pub fn failed(&self) -> Option<Instant> {
        self.failed
    }

    /// A step was seen now: what came well before it was no failure.
    pub fn saw_step(&mut self) {
        // The step itself may have been a little before it was seen.
        self.failed = self.failed.filter(|failed| failed.elapsed() < Duration::from_secs(1));
    }

    /// When rank 0 last said something.
    pub fn heard(&self) -> Option<Instant> {
        self.heard
    }

    /// What ranks ended with, in the order in which it came, and mpirun's own words.
    pub fn last_words(&self) -> (&[RankError], &str) {
        (&self.errors, &self.words)
    }
}

/// The file of a rank's output.
fn log_name(rank: usize) -> String {
    format!("rank-{rank:04}.log")
}

/// Where an error begins in a piece of a line: at the line's start, or after a progress bar.
fn error_in(piece: &[u8], line: &Lines) -> Option<usize> {
    let sign = ERROR.as_bytes();
    if line.at_start() && piece.starts_with(sign) {
        return Some(0);
    }
    let drawn = line.is_redrawn() || piece.contains(&b'\r');
    drawn.then(|| piece.windows(sign.len()).position(|window| window == sign)).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_kept_and_everything_is_logged() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut output = Output::new(folder.path(), false, Terminal::new());
        output.take(Origin::Stderr(1), b"a warning\nerror: rank 1 on h: it bro");
        output.take(Origin::Stdout(1), b"printed");
        assert_eq!(output.failed(), None);
        output.take(Origin::Stderr(1), b"ke\nmore of it\n");
        output.take(Origin::Stderr(0), b"\r\x1b[2Kbar 5error: rank 0 on h: too\n");
        output.take(Origin::Mpirun, b"MPI_ABORT was invoked on rank 1\n");
        output.finish();
        let error = |rank, text: &str| RankError { rank, text: text.into() };
        let (errors, words) = output.last_words();
        let told = [error(1, "rank 1 on h: it broke\nmore of it"), error(0, "rank 0 on h: too")];
        assert_eq!(errors, told);
        assert!(output.failed().is_some() && words.starts_with("MPI_ABORT was invoked on rank 1\n"));
        let text = |name| std::fs::read_to_string(folder.path().join(name)).expect("a log");
        assert_eq!(text("rank-0001.log"), "a warning\nerror: rank 1 on h: it broke\nmore of it\nprinted\n");
        assert_eq!(text("rank-0000.log"), "bar 5error: rank 0 on h: too\n");
    }
}
