//! Files that appear whole or not at all.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use image::codecs::png::PngEncoder;
use image::{ExtendedColorType, ImageEncoder};

use super::FigureError;
use crate::images::Image;

/// A file under a temporary name beside its place; dropped before [`PendingFile::commit`], it is removed.
#[derive(Debug)]
pub(super) struct PendingFile {
    path: PathBuf,
    temporary: PathBuf,
    committed: bool,
}

impl PendingFile {
    /// Creates the temporary file.
    pub(super) fn create(path: &Path) -> Result<(Self, File), FigureError> {
        let mut name = path.file_name().unwrap_or_default().to_os_string();
        name.push(format!(".{}.tmp", std::process::id()));
        let temporary = path.with_file_name(name);
        let pending = Self { path: path.to_owned(), temporary, committed: false };
        let file = File::create(&pending.temporary).map_err(|source| pending.error(source))?;
        Ok((pending, file))
    }

    /// Makes the file durable and gives it its name.
    pub(super) fn commit(mut self, file: &File) -> Result<(), FigureError> {
        file.sync_all()
            .and_then(|()| std::fs::rename(&self.temporary, &self.path))
            .map_err(|source| self.error(source))?;
        self.committed = true;
        Ok(())
    }

    /// An error that names the file.
    pub(super) fn error(&self, source: io::Error) -> FigureError {
        FigureError::Write { path: self.path.clone(), source }
    }
}

impl Drop for PendingFile {
    fn drop(&mut self) {
        if !self.committed {
            // What cannot be removed stays behind under its temporary name.
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}

/// Whether a file can be written here, before what goes into it is made.
///
/// # Errors
/// [`FigureError::Write`] names the file and the reason.
pub fn check_place(path: &Path) -> Result<(), FigureError> {
    let (pending, _) = PendingFile::create(path)?;
    if path.is_dir() {
        return Err(pending.error(io::Error::from(io::ErrorKind::IsADirectory)));
    }
    Ok(())
}

/// Writes a PNG. The file appears whole or not at all.
///
/// # Errors
/// [`FigureError::Write`] names the file and the system's reason.
pub fn write_png(path: &Path, image: &Image) -> Result<(), FigureError> {
    let (pending, file) = PendingFile::create(path)?;
    let mut writer = BufWriter::new(file);
    let (width, height) = (image.width as u32, image.height as u32);
    PngEncoder::new(&mut writer)
        .write_image(&image.pixels, width, height, ExtendedColorType::Rgb8)
        .map_err(|error| pending.error(io::Error::other(error)))?;
    writer.flush().map_err(|source| pending.error(source))?;
    let file = writer.into_inner().map_err(|error| pending.error(error.into_error()))?;
    pending.commit(&file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_png_reads_back_and_leaves_nothing_else() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.png");
        let image = Image { width: 3, height: 2, pixels: (0..18).map(|i| i * 13).collect() };
        write_png(&path, &image).expect("written");
        write_png(&path, &image).expect("written over itself");
        assert_eq!(image::open(&path).expect("a PNG").to_rgb8().into_raw(), image.pixels);
        assert_eq!(std::fs::read_dir(folder.path()).expect("listed").count(), 1);
    }

    #[test]
    fn a_place_is_checked_before_the_work() {
        let folder = tempfile::tempdir().expect("a folder");
        check_place(&folder.path().join("a.npz")).expect("writable");
        for place in [folder.path().to_owned(), folder.path().join("none/a.npz")] {
            let error = check_place(&place).expect_err("no file").to_string();
            assert!(error.contains(&place.display().to_string()), "{error}");
        }
        assert_eq!(std::fs::read_dir(folder.path()).expect("listed").count(), 0);
    }

    #[test]
    fn a_missing_folder_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("none/a.png");
        let image = Image { width: 1, height: 1, pixels: vec![0; 3] };
        let error = write_png(&path, &image).expect_err("no folder").to_string();
        assert!(error.contains("none/a.png"), "{error}");
    }
}
