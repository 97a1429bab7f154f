//! A folder's file system: what it is, what room it has, and how fast it writes and reads.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::fs::{Advice, StatVfsMountFlags, fadvise, statfs, statvfs};

/// How long writing, and reading, may take; a slow disk is measured on less.
const TIME: Duration = Duration::from_secs(4);

/// Written at a time, and made durable.
const BLOCK: usize = 16 << 20;

/// A folder, or where it would be.
#[derive(Debug, Clone)]
pub struct Place {
    /// The folder, or the nearest one above it that exists.
    pub folder: PathBuf,
    /// Whether it is the folder itself.
    pub exists: bool,
    /// Which file system.
    pub device: u64,
    /// Its kind: "ext4", "NFS", ...
    pub kind: String,
    /// Bytes that a user may still write.
    pub free: u64,
    /// Files that a user may still make; None where there is no such limit.
    pub free_files: Option<u64>,
    /// Whether nothing can be written.
    pub read_only: bool,
}

impl Place {
    /// Looks at a path.
    ///
    /// # Errors
    /// A file is in its way, or it cannot be reached.
    pub fn at(path: &Path) -> io::Result<Self> {
        let path = std::path::absolute(path)?;
        for folder in path.ancestors() {
            let meta = match fs::metadata(folder) {
                Ok(meta) => meta,
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) =>
                {
                    continue;
                }
                Err(error) => return Err(error),
            };
            if !meta.is_dir() {
                return Err(io::Error::other(format!("{} is a file", folder.display())));
            }
            let room = statvfs(folder)?;
            return Ok(Self {
                exists: folder == path,
                device: meta.dev(),
                kind: kind(statfs(folder)?.f_type as u64),
                free: room.f_bavail.saturating_mul(room.f_frsize),
                free_files: (room.f_files > 0).then_some(room.f_favail),
                read_only: room.f_flag.contains(StatVfsMountFlags::RDONLY),
                folder: folder.to_owned(),
            });
        }
        Err(io::ErrorKind::NotFound.into())
    }

    /// Whether what is in it goes with the host's next start.
    pub fn is_memory(&self) -> bool {
        ["tmpfs", "ramfs"].contains(&self.kind.as_str())
    }
}

/// The name of a kind of file system, by Linux' number of it.
fn kind(number: u64) -> String {
    const KINDS: [(u64, &str); 19] = [
        (0xEF53, "ext4"),
        (0x5846_5342, "XFS"),
        (0x9123_683E, "Btrfs"),
        (0x2FC1_2FC1, "ZFS"),
        (0xF2F5_2010, "F2FS"),
        (0xCA45_1A4E, "bcachefs"),
        (0x794C_7630, "overlay"),
        (0x0102_1994, "tmpfs"),
        (0x8584_58F6, "ramfs"),
        (0x6969, "NFS"),
        (0x0BD0_0BD0, "Lustre"),
        (0x4750_4653, "GPFS"),
        (0x1983_0326, "BeeGFS"),
        (0x00C3_6400, "CephFS"),
        (0xFE53_4D42, "SMB"),
        (0xFF53_4D42, "SMB"),
        (0x0102_1997, "9p"),
        (0x6573_5546, "FUSE"),
        (0x9FA0, "proc"),
    ];
    // The kernel's numbers have 32 bits, and come with a sign on some machines.
    let number = number & 0xFFFF_FFFF;
    let known = KINDS.iter().find(|(known, _)| *known == number);
    known.map_or_else(|| format!("file system {number:#x}"), |(_, name)| (*name).to_owned())
}

/// Bytes a second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Speed {
    /// Until durable.
    pub write: f64,
    /// From the disk, as far as the system lets its cache be emptied.
    pub read: f64,
}

/// Writes and reads `bytes` (less on a slow disk) in a folder. The file has no name while it is there, so that nothing
/// stays behind however this ends.
///
/// # Errors
/// It cannot be written or read.
pub fn measure(folder: &Path, bytes: u64) -> io::Result<Speed> {
    let mut file = nameless(folder)?;
    // Not all the same, for those that compress.
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let mut block = vec![0u8; BLOCK.min(bytes.max(1) as usize)];
    for piece in block.chunks_mut(8) {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        piece.copy_from_slice(&state.to_le_bytes()[..piece.len()]);
    }
    let (started, mut written) = (Instant::now(), 0u64);
    while written < bytes && (written == 0 || started.elapsed() < TIME) {
        let next = block.len().min((bytes - written) as usize);
        file.write_all(&block[..next])?;
        file.sync_data()?;
        written += next as u64;
    }
    let write = written as f64 / started.elapsed().as_secs_f64();
    // File systems without a cache need none emptied.
    let _ = fadvise(&file, 0, None, Advice::DontNeed);
    file.rewind()?;
    Ok(Speed { write, read: read(&mut file, written, &mut block)? })
}

/// How fast a file of others is read; None where it is empty.
///
/// # Errors
/// It cannot be read.
pub fn measure_read(path: &Path, bytes: u64) -> io::Result<Option<f64>> {
    let mut file = File::open(path)?;
    let bytes = bytes.min(file.metadata()?.len());
    let mut block = vec![0u8; BLOCK.min(bytes as usize)];
    Ok(if bytes == 0 { None } else { Some(read(&mut file, bytes, &mut block)?) })
}

fn read(file: &mut File, bytes: u64, block: &mut [u8]) -> io::Result<f64> {
    let (started, mut done) = (Instant::now(), 0u64);
    while done < bytes && (done == 0 || started.elapsed() < TIME) {
        match file.read(block)? {
            0 => break,
            n => done += n as u64,
        }
    }
    Ok(done as f64 / started.elapsed().as_secs_f64())
}

/// A new file, whose name goes at once.
fn nameless(folder: &Path) -> io::Result<File> {
    // Other hosts may do the same in the same folder.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos());
    let path = folder.join(format!(".repa-doctor-{}-{now:x}", std::process::id()));
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create_new(true).mode(0o600).open(&path)?;
    fs::remove_file(&path)?;
    Ok(file)
}

/// Whether a file can be made and written in a folder.
///
/// # Errors
/// The system's reason why not.
pub fn try_writing(folder: &Path) -> io::Result<()> {
    nameless(folder)?.write_all(&[0; 4096])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_have_names() {
        assert_eq!(kind(0xEF53), "ext4");
        assert_eq!(kind(0x0BD0_0BD0), "Lustre");
        assert_eq!(kind(0xFFFF_FFFF_9123_683E), "Btrfs");
        assert_eq!(kind(0x1234), "file system 0x1234");
    }

    #[test]
    fn folders_that_are_not_there_yet_are_judged_by_those_above() {
        let folder = tempfile::tempdir().expect("a folder");
        let here = Place::at(folder.path()).expect("there");
        let below = Place::at(&folder.path().join("a/b")).expect("its folder is there");
        assert!(here.exists && !below.exists && below.folder == folder.path());
        assert_eq!((here.device, &here.kind), (below.device, &below.kind));
        assert!(here.free > 0 && !here.read_only);
        std::fs::write(folder.path().join("file"), "").expect("written");
        let error = Place::at(&folder.path().join("file/run")).expect_err("no folder");
        assert!(error.to_string().contains("is a file"), "{error}");
    }

    #[test]
    fn measuring_leaves_nothing() {
        let folder = tempfile::tempdir().expect("a folder");
        let speed = measure(folder.path(), 1 << 20).expect("written");
        assert!(speed.write > 0.0 && speed.read > 0.0, "{speed:?}");
        try_writing(folder.path()).expect("written");
        assert_eq!(std::fs::read_dir(folder.path()).expect("read").count(), 0);
        assert!(measure(Path::new("/proc"), 1 << 20).is_err());
        let file = folder.path().join("file");
        std::fs::write(&file, vec![1; 5000]).expect("written");
        assert!(measure_read(&file, 1 << 20).expect("read").is_some_and(|rate| rate > 0.0));
        std::fs::write(&file, "").expect("written");
        assert_eq!(measure_read(&file, 1 << 20).expect("read"), None);
    }
}
