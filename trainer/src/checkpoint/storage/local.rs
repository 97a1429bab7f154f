//! A folder of a file system.
//!
//! A checkpoint grows in `step-00050000.partial/`. Its files are brought to disk one by one, the folder after the
//! last of them, then the folder is renamed, and its parent brought to disk: under its final name it is complete.

use std::fs::{self, File};
use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{Advice, fadvise};
use rustix::io::Errno;

use super::local_sink::LocalSink;
use super::{Listed, Sink, Source, Storage, name, step_of};

const PARTIAL: &str = ".partial";
const OLD: &str = ".old";
const ASIDE: &str = ".set-aside";

/// Checkpoints as folders of one folder.
#[derive(Debug, Clone)]
pub struct Local {
    folder: PathBuf,
}

impl Local {
    /// The folder need not exist.
    #[must_use]
    pub fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    fn complete(&self, step: u64) -> PathBuf {
        self.folder.join(name(step))
    }

    fn growing(&self, step: u64) -> PathBuf {
        self.folder.join(name(step) + PARTIAL)
    }

    /// Brings the list of the folder's entries to disk.
    fn sync(&self) -> io::Result<()> {
        File::open(&self.folder)?.sync_all()
    }
}

impl Storage for Local {
    fn path(&self, part: &str) -> PathBuf {
        self.folder.join(part)
    }

    fn folder(&self) -> Option<&Path> {
        Some(&self.folder)
    }

    fn list(&self) -> io::Result<Listed> {
        let entries = match fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Listed::default()),
            Err(e) => return Err(e),
        };
        let mut listed = Listed::default();
        for entry in entries {
            let entry = entry?.file_name();
            let Some(entry) = entry.to_str() else { continue };
            // Other names, such as copies that somebody made, are nobody's business.
            let cut_short = [PARTIAL, OLD].iter().find_map(|end| step_of(entry.strip_suffix(end)?));
            match step_of(entry) {
                Some(step) => listed.steps.push(step),
                None if cut_short.is_some() => listed.unfinished.push(entry.to_owned()),
                None => {}
            }
        }
        listed.steps.sort_unstable();
        listed.unfinished.sort();
        Ok(listed)
    }

    fn create(&self, step: u64, file: &str) -> io::Result<Box<dyn Sink>> {
        let growing = self.growing(step);
        fs::create_dir_all(&growing)?;
        Ok(Box::new(LocalSink::create(&growing.join(file))?))
    }

    fn commit(&self, step: u64, _shards: &[&str], files: &[(&str, &[u8])]) -> io::Result<()> {
        let (growing, complete) = (self.growing(step), self.complete(step));
        for (file, bytes) in files {
            let mut file = File::create(growing.join(file))?;
            file.write_all(bytes)?;
            file.sync_all()?;
        }
        File::open(&growing)?.sync_all()?;
        // The same step may have been saved by a run that was gone on with from an earlier one.
        let old = self.folder.join(name(step) + OLD);
        if complete.exists() {
            fs::rename(&complete, &old)?;
        }
        fs::rename(&growing, &complete)?;
        self.sync()?;
        if old.exists() { fs::remove_dir_all(&old) } else { Ok(()) }
    }

    fn open(&self, step: u64, file: &str) -> io::Result<Box<dyn Source>> {
        Ok(Box::new(LocalSource { file: File::open(self.complete(step).join(file))? }))
    }

    fn remove(&self, step: u64) -> io::Result<()> {
        // Out of the list first: a removal that is cut short must not leave half a checkpoint under a good name.
        let (complete, growing) = (self.complete(step), self.growing(step));
        fs::rename(&complete, &growing)?;
        fs::remove_dir_all(&growing)
    }

    fn discard(&self, unfinished: &str) -> io::Result<()> {
        match fs::remove_dir_all(self.folder.join(unfinished)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            done => done,
        }
    }

    fn set_aside(&self, step: u64) -> io::Result<PathBuf> {
        let free = (1..).map(|n| self.folder.join(format!("{}.{n}{ASIDE}", name(step))));
        let to = { free }.find(|path| !path.exists()).expect("some number is free");
        fs::rename(self.complete(step), &to)?;
        self.sync()?;
        Ok(to)
    }

    fn changed(&self, entry: &str) -> Option<SystemTime> {
        fs::metadata(self.folder.join(entry)).ok()?.modified().ok()
    }
}

struct LocalSource {
    file: File,
}

impl Source for LocalSource {
    fn size(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(out, offset)
    }

    fn read_new<'a>(&self, out: &'a mut [MaybeUninit<u8>], offset: u64) -> io::Result<&'a mut [u8]> {
        let mut filled = 0;
        while filled < out.len() {
            match rustix::io::pread(&self.file, &mut out[filled..], offset + filled as u64) {
                Ok(([], _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok((read, _)) => filled += read.len(),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        // SAFETY: pread has given a value to each byte.
        Ok(unsafe { out.assume_init_mut() })
    }

    fn read_through(&self) {
        // The kernel reads further ahead then; a file system that does not care loses nothing.
        let _ = fadvise(&self.file, 0, None, Advice::Sequential);
    }

    fn at_once(&self) -> usize {
        // What was read is still in the processor's own cache when its digest is taken.
        256 << 10
    }
}
