//! A run's curves and sample images for TensorBoard.

mod wire;

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::record::StepRecord;
use wire::What;

/// Longest time for which steps are held back.
const FLUSH: Duration = Duration::from_secs(10);

/// What TensorBoard knows event files by.
const PREFIX: &str = "events.out.tfevents.";

/// A figure of a step.
type Value = fn(&StepRecord) -> f64;

/// The curves, by name.
const SCALARS: [(&str, Value); 13] = [
    ("loss/total", |r| r.loss),
    ("loss/denoising", |r| r.denoising_loss),
    ("loss/alignment", |r| r.alignment_loss),
    ("optimizer/learning_rate", |r| r.learning_rate),
    ("optimizer/gradient_norm", |r| r.grad_norm),
    ("optimizer/skipped", |r| f64::from(u8::from(r.skipped))),
    ("speed/images_per_second", |r| r.images_per_second),
    ("seconds/step", |r| r.step_seconds),
    ("seconds/data_wait", |r| r.data_wait_seconds),
    ("seconds/compute", |r| r.compute_seconds),
    ("seconds/communication", |r| r.communication_seconds),
    ("seconds/communication_busy", |r| r.communication_busy_seconds),
    ("seconds/optimizer", |r| r.optimizer_seconds),
];

/// Where a run keeps its event files, one for each start.
pub fn folder(run: &Path) -> PathBuf {
    run.join("tensorboard")
}

/// The event file of one start of a run. What has been written survives a kill but for some seconds, and a record that
/// was cut short, which readers leave out.
#[derive(Debug)]
pub struct EventFile {
    file: BufWriter<File>,
    flushed: Instant,
}

impl EventFile {
    /// Begins the file of a run that goes on after `step`, from this host. It tells TensorBoard to forget what earlier
    /// files hold of later steps, which come again.
    ///
    /// # Errors
    /// The folder cannot be made, or the file not written.
    pub fn create(folder: &Path, host: &str, step: u64) -> io::Result<Self> {
        std::fs::create_dir_all(folder)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        // Files are read in the order of their names: this one comes last, also after a start in the same second, or
        // on a host whose clock is ahead.
        let time = newest(folder)?.map_or(now, |newest| now.max(newest + 1));
        let path = folder.join(format!("{PREFIX}{time:010}.{host}"));
        let mut file = Self { file: BufWriter::new(File::create_new(path)?), flushed: Instant::now() };
        file.write(0, &What::Version)?;
        file.write(step + 1, &What::Start)?;
        file.flush()?;
        Ok(file)
    }

    /// Adds a step to the curves.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn step(&mut self, record: &StepRecord) -> io::Result<()> {
        let scalars = SCALARS.map(|(name, value)| (name, value(record)));
        self.write(record.step, &What::Scalars(&scalars))?;
        if self.flushed.elapsed() >= FLUSH { self.flush() } else { Ok(()) }
    }

    /// Adds an image, a PNG of `width` x `height` pixels.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn image(
        &mut self,
        step: u64,
        name: &str,
        (width, height): (usize, usize),
        png: &[u8],
    ) -> io::Result<()> {
        self.write(step, &What::Image { name, width, height, png })?;
        self.flush()
    }

    /// Hands all that there is to the system.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn flush(&mut self) -> io::Result<()> {
        self.flushed = Instant::now();
        self.file.flush()
    }

    fn write(&mut self, step: u64, what: &What) -> io::Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64());
        self.file.write_all(&wire::record(&wire::event(now, step, what)))
    }
}

/// The latest time in the names of event files.
fn newest(folder: &Path) -> io::Result<Option<u64>> {
    let time = |name: &OsStr| name.to_str()?.strip_prefix(PREFIX)?.split('.').next()?.parse().ok();
    let mut newest = None;
    for entry in std::fs::read_dir(folder)? {
        newest = newest.max(time(&entry?.file_name()));
    }
    Ok(newest)
}

#[cfg(test)]
mod tests;
