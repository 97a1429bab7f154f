//! Requests to stop: signals to launch, and the end of the time that it was given.

use std::io;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;

/// What has been asked for so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// To go on.
    Nothing,
    /// To save and stop.
    Stop,
    /// To end at once: the signal that came second.
    End(i32),
}

/// Listens for signals.
#[derive(Debug)]
pub struct Requests {
    signals: Signals,
    first: Option<i32>,
    second: Option<i32>,
    /// When all should be over.
    until: Option<Instant>,
    /// The time is nearly over.
    timed_out: bool,
}

impl Requests {
    /// Begins to listen; `limit` is the time that launch may take in all.
    ///
    /// # Errors
    /// The handlers cannot be set.
    pub fn listen(limit: Option<Duration>) -> io::Result<Self> {
        let mut heard = vec![SIGINT, SIGTERM, SIGUSR1];
        if !is_ignored(SIGHUP) {
            // Otherwise nohup has started this: it is to go on when the terminal is gone.
            heard.push(SIGHUP);
        }
        Ok(Self {
            signals: Signals::new(heard)?,
            first: None,
            second: None,
            until: limit.and_then(|limit| Instant::now().checked_add(limit)),
            timed_out: false,
        })
    }

    /// Looks again.
    pub fn look(&mut self) -> Asked {
        for signal in self.signals.pending() {
            match self.first {
                None => self.first = Some(signal),
                Some(_) => self.second = self.second.or(Some(signal)),
            }
        }
        match (self.first, self.second) {
            (_, Some(second)) => Asked::End(second),
            (Some(_), None) => Asked::Stop,
            (None, None) if self.timed_out => Asked::Stop,
            (None, None) => Asked::Nothing,
        }
    }

    /// Asks for a stop where what is left of the time is only just enough for it.
    pub fn time_for(&mut self, stopping: Duration) {
        self.timed_out |=
            self.until.is_some_and(|until| until.saturating_duration_since(Instant::now()) < stopping);
    }

    /// What asked for the stop, for a message.
    pub fn cause(&self) -> String {
        match self.first {
            Some(signal) => signal_hook::low_level::signal_name(signal).unwrap_or("a signal").to_owned(),
            None => "--max-hours".to_owned(),
        }
    }
}

/// Whether this process was started with a signal ignored.
fn is_ignored(signal: i32) -> bool {
    let mut now = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: with no new action the call only writes the present one to `now`, which is live and zeroed.
    unsafe {
        libc::sigaction(signal, std::ptr::null(), now.as_mut_ptr()) == 0
            && now.assume_init().sa_sigaction == libc::SIG_IGN
    }
}

/// What a stop takes where nothing is known of it yet: a tenth of the whole time, a minute at most.
pub fn usual_stop(limit: Option<Duration>) -> Duration {
    limit.map_or(Duration::ZERO, |limit| (limit / 10).min(Duration::from_secs(60)))
}
