//! How rank 0 shows that it is getting on: a bar where a person watches, lines elsewhere.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle, TermLike};

use super::record::StepRecord;
use crate::config::Progress as Mode;

/// Variable by which `launch` says that a person watches what it passes on, and the width of the terminal.
pub const TERMINAL: &str = "REPA_LAUNCH_TERMINAL";

/// Seconds between lines.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Progress of training, on rank 0.
#[derive(Debug)]
pub struct Progress {
    shown: Shown,
    started: Instant,
    first_step: u64,
    steps: u64,
}

#[derive(Debug)]
enum Shown {
    Bar(ProgressBar),
    Lines { last: Option<Instant> },
    Nothing,
}

impl Progress {
    /// Progress from `first_step` steps done to `steps`.
    pub fn new(mode: Mode, first_step: u64, steps: u64) -> Self {
        let shown = match mode {
            Mode::Off => Shown::Nothing,
            Mode::Lines => Shown::Lines { last: None },
            Mode::Bar => {
                Shown::Bar(bar(first_step, steps, ProgressDrawTarget::term_like(Box::new(Forwarded::new()))))
            }
            Mode::Auto => match watcher() {
                Watcher::Terminal => Shown::Bar(bar(first_step, steps, ProgressDrawTarget::stderr())),
                Watcher::TerminalOfMpirun => Shown::Bar(bar(
                    first_step,
                    steps,
                    ProgressDrawTarget::term_like(Box::new(Forwarded::new())),
                )),
                Watcher::Nobody => Shown::Lines { last: None },
            },
        };
        Self { shown, started: Instant::now(), first_step, steps }
    }

    /// Shows a step.
    pub fn step(&mut self, record: &StepRecord) {
        let left = self.time_left(record.step);
        match &mut self.shown {
            Shown::Bar(bar) => {
                bar.set_message(format!(
                    "loss {:.4}  align {:.4}  |g| {:.3}  {:.0} img/s  {} left",
                    record.loss, record.alignment_loss, record.grad_norm, record.images_per_second, left
                ));
                bar.set_position(record.step);
            }
            Shown::Lines { last } => {
                let due = last.is_none_or(|t| t.elapsed() >= LINE_INTERVAL) || record.step == self.steps;
                if due {
                    *last = Some(Instant::now());
                    eprintln!(
                        "step {}/{}  loss {:.4}  denoising {:.4}  alignment {:.4}  |g| {:.3}  {:.0} images/s  {} left",
                        record.step,
                        self.steps,
                        record.loss,
                        record.denoising_loss,
                        record.alignment_loss,
                        record.grad_norm,
                        record.images_per_second,
                        left
                    );
                }
            }
            Shown::Nothing => {}
        }
    }

    /// Prints a line without tearing the bar.
    pub fn line(&self, text: &str) {
        match &self.shown {
            Shown::Bar(bar) => bar.suspend(|| eprintln!("{text}")),
            _ => eprintln!("{text}"),
        }
    }

    /// Leaves the last state standing.
    pub fn finish(self) {
        if let Shown::Bar(bar) = self.shown {
            bar.abandon();
        }
    }

    fn time_left(&self, step: u64) -> String {
        let done = step.saturating_sub(self.first_step).max(1);
        let each = self.started.elapsed().as_secs_f64() / done as f64;
        duration(each * self.steps.saturating_sub(step) as f64)
    }
}

fn bar(position: u64, steps: u64, target: ProgressDrawTarget) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(steps), target).with_position(position);
    let style = ProgressStyle::with_template("{wide_bar:.cyan/blue} {pos}/{len}  {msg}")
        .expect("the template is well formed");
    bar.set_style(style);
    bar
}

/// Seconds as people write them.
pub fn duration(seconds: f64) -> String {
    let s = seconds.round() as u64;
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {:02} s", s / 60, s % 60),
        3600..86_400 => format!("{} h {:02} min", s / 3600, s % 3600 / 60),
        _ => format!("{} d {} h", s / 86_400, s % 86_400 / 3600),
    }
}

enum Watcher {
    Terminal,
    TerminalOfMpirun,
    Nobody,
}

/// Under mpirun our own stderr is a pipe to it; whether a person watches is a matter of mpirun's.
fn watcher() -> Watcher {
    if io::stderr().is_terminal() {
        return Watcher::Terminal;
    }
    if std::env::var_os(TERMINAL).is_some() {
        return Watcher::TerminalOfMpirun;
    }
    let parent = rustix::process::getppid().map_or(0, |p| p.as_raw_nonzero().get());
    let through_mpirun = std::env::var_os("OMPI_COMM_WORLD_RANK").is_some();
    match std::fs::read_link(format!("/proc/{parent}/fd/2")) {
        Ok(target) if through_mpirun && target.starts_with("/dev/pts") => Watcher::TerminalOfMpirun,
        _ => Watcher::Nobody,
    }
}

/// A terminal that another process forwards our stderr to.
#[derive(Debug)]
struct Forwarded {
    width: u16,
}

impl Forwarded {
    fn new() -> Self {
        let told = std::env::var(TERMINAL).ok().and_then(|width| width.parse().ok());
        let asked = || {
            let tty = std::fs::File::open("/dev/tty").ok()?;
            rustix::termios::tcgetwinsize(tty).ok().map(|size| size.ws_col)
        };
        let width = told
            .or_else(asked)
            // Some terminals, such as recorders, do not know their width.
            .filter(|&columns| columns > 0)
            .unwrap_or(100);
        Self { width }
    }
}

impl TermLike for Forwarded {
    fn width(&self) -> u16 {
        self.width
    }
    fn move_cursor_up(&self, n: usize) -> io::Result<()> {
        if n > 0 { self.write_str(&format!("\x1b[{n}A")) } else { Ok(()) }
    }
    fn move_cursor_down(&self, n: usize) -> io::Result<()> {
        if n > 0 { self.write_str(&format!("\x1b[{n}B")) } else { Ok(()) }
    }
    fn move_cursor_right(&self, n: usize) -> io::Result<()> {
        if n > 0 { self.write_str(&format!("\x1b[{n}C")) } else { Ok(()) }
    }
    fn move_cursor_left(&self, n: usize) -> io::Result<()> {
        if n > 0 { self.write_str(&format!("\x1b[{n}D")) } else { Ok(()) }
    }
    fn write_line(&self, s: &str) -> io::Result<()> {
        self.write_str(s)?;
        self.write_str("\n")
    }
    fn write_str(&self, s: &str) -> io::Result<()> {
        io::stderr().write_all(s.as_bytes())
    }
    fn clear_line(&self) -> io::Result<()> {
        self.write_str("\r\x1b[2K")
    }
    fn flush(&self) -> io::Result<()> {
        io::stderr().flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_naturally() {
        assert_eq!(duration(0.4), "0 s");
        assert_eq!(duration(59.0), "59 s");
        assert_eq!(duration(61.2), "1 min 01 s");
        assert_eq!(duration(3660.0), "1 h 01 min");
        assert_eq!(duration(200_000.0), "2 d 7 h");
    }
}
