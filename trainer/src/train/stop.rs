//! Requests to stop: SIGUSR1, SIGTERM, or a file `STOP` in the run folder.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGTERM, SIGUSR1};

/// Whether this rank has been asked to stop. Ranks agree on the step through the control word.
#[derive(Debug, Clone)]
pub struct StopRequest {
    signalled: Arc<AtomicBool>,
    file: Option<PathBuf>,
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
        Ok(Self { signalled, file: None })
    }

    /// Watches for the file `STOP` in a run folder as well. One left over from an earlier run is
    /// removed.
    ///
    /// # Errors
    /// The old file cannot be removed.
    pub fn watch(&mut self, run: &Path) -> io::Result<()> {
        let file = run.join("STOP");
        match std::fs::remove_file(&file) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => self.file = Some(file),
        }
        Ok(())
    }

    /// Whether this rank has been asked to stop.
    pub fn requested(&self) -> bool {
        self.signalled.load(Ordering::Relaxed) || self.file.as_ref().is_some_and(|f| f.exists())
    }
}
