//! Requests to stop: SIGUSR1, SIGTERM, or a file `STOP` in the run folder; and to save and go on: a file `SAVE`.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGTERM, SIGUSR1};

/// Whether this rank has been asked to stop. Ranks agree on the step through the control word.
#[derive(Debug, Clone)]
pub struct StopRequest {
    signalled: Arc<AtomicBool>,
    /// The run folder, on the rank that watches it.
    run: Option<PathBuf>,
}

impl StopRequest {
    /// Listens for the signals, once per process. A second SIGTERM or SIGUSR1 after the first ends
    /// the process at once.
    ///
    /// # Errors
    /// The handlers cannot be set.
    pub fn listen() -> io::Result<Self> {
        let signalled = Arc::new(AtomicBool::new(false));
        for signal in [SIGUSR1, SIGTERM] {
            signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, signalled.clone())?;
            signal_hook::flag::register(signal, signalled.clone())?;
        }
        Ok(Self { signalled, run: None })
    }

    /// Watches for the files `STOP` and `SAVE` in a run folder as well. Ones left over from an earlier run are removed.
    ///
    /// # Errors
    /// An old file cannot be removed.
    pub fn watch(&mut self, run: &Path) -> io::Result<()> {
        for file in [STOP, SAVE] {
            remove(&run.join(file))?;
        }
        self.run = Some(run.to_owned());
        Ok(())
    }

    /// Whether this rank has been asked to stop.
    pub fn requested(&self) -> bool {
        self.signalled.load(Ordering::Relaxed) || self.asked_by(STOP)
    }

    /// Whether this rank has been asked to save and go on.
    pub fn save_requested(&self) -> bool {
        self.asked_by(SAVE)
    }

    /// Takes the request to save away, so that the next one is seen.
    ///
    /// # Errors
    /// The file cannot be removed.
    pub fn save_begun(&self) -> io::Result<()> {
        self.run.as_ref().map_or(Ok(()), |run| remove(&run.join(SAVE)))
    }

    fn asked_by(&self, file: &str) -> bool {
        self.run.as_ref().is_some_and(|run| run.join(file).exists())
    }
}

const STOP: &str = "STOP";
const SAVE: &str = "SAVE";

fn remove(file: &Path) -> io::Result<()> {
    match std::fs::remove_file(file) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}
