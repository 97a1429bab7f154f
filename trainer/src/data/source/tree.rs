//! A tree of files: a folder, or a zip archive of one. EDM2's tools write either.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use zip::ZipArchive;

/// A tree of files, read by any number of threads.
#[derive(Debug, Clone)]
pub struct Tree {
    path: PathBuf,
    archive: Option<ZipArchive<Reader>>,
}

impl Tree {
    /// Opens the folder at `path`, or the archive at `path` or `path.zip`.
    ///
    /// # Errors
    /// There is neither, or the archive is damaged.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut zipped = path.as_os_str().to_owned();
        zipped.push(".zip");
        let path = if !path.exists() && Path::new(&zipped).is_file() {
            PathBuf::from(zipped)
        } else {
            path.to_owned()
        };
        if fs::metadata(&path)?.is_dir() {
            return Ok(Self { path, archive: None });
        }
        let file = File::open(&path)?;
        let reader = Reader { length: file.metadata()?.len(), file: Arc::new(file), position: 0 };
        let archive = ZipArchive::new(reader).map_err(|e| {
            io::Error::new(io::ErrorKind::InvalidData, format!("not a folder or zip archive: {e}"))
        })?;
        Ok(Self { path, archive: Some(archive) })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The path of a file of it, for messages.
    #[must_use]
    pub fn path_of(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Reads a file into `out`, in place of what that held.
    ///
    /// # Errors
    /// There is no such file ([`io::ErrorKind::NotFound`]), or it cannot be read.
    pub fn read(&self, name: &str, out: &mut Vec<u8>) -> io::Result<()> {
        out.clear();
        let Some(archive) = &self.archive else {
            let mut file = File::open(self.path.join(name))?;
            let length = file.metadata()?.len() as usize;
            // One byte more, so that the end shows without another call.
            out.reserve(length + 1);
            file.read_to_end(out)?;
            return Ok(());
        };
        let mut archive = archive.clone();
        let mut member = archive.by_name(name).map_err(|e| match e {
            zip::result::ZipError::FileNotFound => io::Error::from(io::ErrorKind::NotFound),
            other => io::Error::new(io::ErrorKind::InvalidData, other.to_string()),
        })?;
        out.reserve(usize::try_from(member.size()).unwrap_or(0).min(1 << 28));
        member.read_to_end(out)?;
        Ok(())
    }

    /// Files with one of these endings (lower case, without the dot; any case in the name), by path from
    /// the top, sorted by their bytes.
    ///
    /// # Errors
    /// A folder cannot be listed.
    pub fn list(&self, endings: &[&str]) -> io::Result<Vec<String>> {
        let wanted = |name: &str| {
            name.rsplit_once('.').is_some_and(|(_, end)| endings.iter().any(|e| end.eq_ignore_ascii_case(e)))
        };
        let mut names = Vec::new();
        match &self.archive {
            Some(archive) => {
                for name in archive.file_names() {
                    let name = name.map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e.to_string()))?;
                    names.extend(wanted(&name).then(|| name.into_owned()));
                }
            }
            None => {
                let mut folders = vec![String::new()];
                while let Some(folder) = folders.pop() {
                    for item in fs::read_dir(self.path.join(&folder))? {
                        let item = item?;
                        let name = format!("{folder}{}", item.file_name().to_string_lossy());
                        let kind = item.file_type()?;
                        // A link to a folder of images is how people put data sets together.
                        let is_dir = kind.is_dir() || (kind.is_symlink() && item.path().is_dir());
                        if is_dir {
                            folders.push(format!("{name}/"));
                        } else if wanted(&name) {
                            names.push(name);
                        }
                    }
                }
            }
        }
        names.sort_unstable();
        Ok(names)
    }
}

/// A file read by position, so that threads share it.
#[derive(Debug, Clone)]
struct Reader {
    file: Arc<File>,
    length: u64,
    position: u64,
}

impl Read for Reader {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read_at(out, self.position)?;
        self.position += n as u64;
        Ok(n)
    }
}

impl Seek for Reader {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let target = match to {
            SeekFrom::Start(offset) => Some(offset),
            SeekFrom::End(offset) => self.length.checked_add_signed(offset),
            SeekFrom::Current(offset) => self.position.checked_add_signed(offset),
        };
        self.position = target.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(self.position)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// The same three files as a folder and as an archive.
    fn trees(root: &Path) -> [Tree; 2] {
        let mut archive = zip::ZipWriter::new(File::create(root.join("b.zip")).unwrap());
        let stored =
            zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
        for (name, text) in [("x/2.PNG", "two"), ("1.png", "one"), ("x/y/labels.json", "{}")] {
            let path = root.join("a").join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
            archive.start_file(name, stored).unwrap();
            archive.write_all(text.as_bytes()).unwrap();
        }
        archive.finish().unwrap();
        ["a", "b"].map(|name| Tree::open(&root.join(name)).unwrap())
    }

    #[test]
    fn a_folder_and_an_archive_read_the_same() {
        let root = tempfile::tempdir().unwrap();
        for tree in trees(root.path()) {
            assert_eq!(tree.list(&["png", "jpg"]).unwrap(), ["1.png", "x/2.PNG"], "{tree:?}");
            let mut bytes = b"old".to_vec();
            tree.read("x/2.PNG", &mut bytes).unwrap();
            assert_eq!(bytes, b"two");
            let missing = tree.read("x/3.png", &mut bytes).unwrap_err();
            assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        }
    }

    #[test]
    fn threads_share_an_archive() {
        let root = tempfile::tempdir().unwrap();
        let [_, tree] = trees(root.path());
        std::thread::scope(|scope| {
            for name in ["1.png", "x/2.PNG"] {
                let (tree, expected) = (&tree, if name == "1.png" { "one" } else { "two" });
                scope.spawn(move || {
                    let mut bytes = Vec::new();
                    for _ in 0..200 {
                        tree.read(name, &mut bytes).unwrap();
                        assert_eq!(bytes, expected.as_bytes());
                    }
                });
            }
        });
    }

    #[test]
    fn what_is_neither_is_an_error() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(Tree::open(&root.path().join("c")).unwrap_err().kind(), io::ErrorKind::NotFound);
        fs::write(root.path().join("d"), "junk").unwrap();
        assert!(Tree::open(&root.path().join("d")).unwrap_err().to_string().contains("zip archive"));
    }
}
