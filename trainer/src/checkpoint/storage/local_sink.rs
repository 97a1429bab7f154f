//! Writing large files past the page cache.
//!
//! What the cache holds, such as the data that training reads, is worth more than a checkpoint that nobody reads soon;
//! and copying it there takes time from the steps that go on meanwhile, most of all where the kernel has to find free
//! pages first. A file system that has no direct writes gets plain ones.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use aligned_vec::{AVec, ConstAlign};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;

use super::Sink;
use crate::flat::PAGE;

/// Bytes of a write. The buffers stay in a processor's cache at this size: four times as much was a quarter slower, and
/// with a quarter of it the disk waits between writes (`bench checkpoint`).
const AT_ONCE: usize = 1 << 20;

/// Buffers of a file: one is filled while others are written.
const BUFFERS: usize = 3;

/// Direct writes are of whole blocks, from memory that is aligned as they are.
type Buffer = AVec<u8, ConstAlign<PAGE>>;

/// A file that is being written, by a thread of its own: the disk has its next bytes while their digest is computed.
pub(super) struct LocalSink {
    filling: Buffer,
    empty: Receiver<Buffer>,
    full: Option<SyncSender<Buffer>>,
    /// Ends when `full` is dropped, or with an error.
    writing: Option<JoinHandle<io::Result<File>>>,
}

impl LocalSink {
    /// Creates a file, or empties it.
    pub(super) fn create(path: &Path) -> io::Result<Self> {
        let mut target = Target::create(path)?;
        let (full, inbox) = sync_channel::<Buffer>(BUFFERS);
        let (back, empty) = sync_channel(BUFFERS);
        for _ in 1..BUFFERS {
            let _ = back.try_send(AVec::with_capacity(PAGE, AT_ONCE));
        }
        let write_all = move || {
            for mut buffer in inbox {
                target.write(&buffer)?;
                buffer.clear();
                // Nobody wants it at the end.
                let _ = back.try_send(buffer);
            }
            Ok(target.file)
        };
        let writing = std::thread::Builder::new().name("checkpoint disk".into()).spawn(write_all)?;
        let filling = AVec::with_capacity(PAGE, AT_ONCE);
        Ok(Self { filling, empty, full: Some(full), writing: Some(writing) })
    }

    /// Waits until all that was handed over is written.
    fn end(&mut self) -> io::Result<File> {
        self.full = None;
        let written = self.writing.take().map(JoinHandle::join);
        // A panic there has been reported by its hook, which ends the process.
        written.and_then(Result::ok).unwrap_or_else(|| Err(ErrorKind::BrokenPipe.into()))
    }
}

impl Sink for LocalSink {
    fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(AT_ONCE - self.filling.len()));
            self.filling.extend_from_slice(now);
            bytes = later;
            if self.filling.len() == AT_ONCE {
                let Ok(next) = self.empty.recv() else { return self.end().map(drop) };
                let full = std::mem::replace(&mut self.filling, next);
                if self.full.as_ref().is_none_or(|sender| sender.send(full).is_err()) {
                    return self.end().map(drop);
                }
            }
        }
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> io::Result<()> {
        let last = std::mem::replace(&mut self.filling, AVec::new(PAGE));
        if let Some(sender) = &self.full {
            // Where nobody takes it, the reason follows.
            let _ = sender.send(last);
        }
        self.end()?.sync_all()
    }
}

impl Drop for LocalSink {
    fn drop(&mut self) {
        if self.writing.is_some() {
            // Given up: whatever is wrong with it is of no interest any more.
            let _ = self.end();
        }
    }
}

/// The file itself.
struct Target {
    file: File,
    direct: bool,
}

impl Target {
    fn create(path: &Path) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true);
        match options.clone().custom_flags(OFlags::DIRECT.bits().cast_signed()).open(path) {
            Ok(file) => Ok(Self { file, direct: true }),
            Err(e) if refuses_direct(&e) => Ok(Self { file: options.open(path)?, direct: false }),
            Err(e) => Err(e),
        }
    }

    fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            if self.direct && !bytes.len().is_multiple_of(PAGE) {
                self.use_cache()?;
            }
            match self.file.write(bytes) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(written) => bytes = &bytes[written..],
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                // Its blocks are larger than pages.
                Err(e) if self.direct && refuses_direct(&e) => self.use_cache()?,
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn use_cache(&mut self) -> io::Result<()> {
        fcntl_setfl(&self.file, fcntl_getfl(&self.file)? - OFlags::DIRECT)?;
        self.direct = false;
        Ok(())
    }
}

/// Whether an error means that a file system has no direct writes, or not this one.
fn refuses_direct(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::INVAL | Errno::OPNOTSUPP))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever the length and the pieces, on disks and in memory (which has no direct writes on older kernels).
    #[test]
    fn a_file_has_the_bytes_that_were_written() {
        // Where the program was built is a disk, if any of them is.
        let program = std::env::current_exe().unwrap();
        let places = [program.parent().unwrap(), Path::new("/dev/shm"), &std::env::temp_dir()];
        for place in places.into_iter().filter(|place| place.is_dir()) {
            let folder = tempfile::tempdir_in(place).unwrap();
            for len in [0, 1, PAGE, PAGE + 1, AT_ONCE, AT_ONCE + PAGE, 5 * AT_ONCE + 12_345] {
                let bytes: Vec<u8> = (0..len).map(|i| (i * 31 % 251) as u8).collect();
                for piece in [1 << 20, 3 * AT_ONCE + 7] {
                    let path = folder.path().join("file");
                    let mut sink = Box::new(LocalSink::create(&path).unwrap());
                    bytes.chunks(piece).for_each(|piece| sink.write(piece).unwrap());
                    sink.finish().unwrap();
                    assert!(std::fs::read(&path).unwrap() == bytes, "{len} bytes in {}", place.display());
                }
            }
        }
    }

    #[test]
    fn a_sink_that_is_given_up_leaves_no_thread_behind() {
        let folder = tempfile::tempdir().unwrap();
        let mut sink = LocalSink::create(&folder.path().join("file")).unwrap();
        sink.write(&vec![1; 2 * AT_ONCE + 5]).unwrap();
        drop(sink);
        let written = std::fs::read(folder.path().join("file")).unwrap();
        assert_eq!(written.len(), 2 * AT_ONCE);
    }

    /// /dev/full takes nothing.
    #[test]
    fn a_full_disk_is_an_error() {
        let full = Path::new("/dev/full");
        if !full.exists() {
            eprintln!("skipped: there is no /dev/full here");
            return;
        }
        let written = |bytes: usize| {
            let mut sink = Box::new(LocalSink::create(full)?);
            sink.write(&vec![1; bytes])?;
            sink.finish()
        };
        for bytes in [10, 20 * AT_ONCE] {
            assert_eq!(written(bytes).unwrap_err().kind(), ErrorKind::StorageFull);
        }
    }
}
