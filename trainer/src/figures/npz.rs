//! Samples as ADM's evaluator reads them: an `.npz` with `arr_0`, uint8 [N, H, W, 3].

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::FigureError;
use super::output::PendingFile;
use crate::data::source::npy;
use crate::images::Image;

/// Writes images one by one into an `.npz`, stored without compression as `numpy.savez` does. Only one
/// image is in memory at a time. The file appears with [`NpzWriter::finish`]; dropped before that, it
/// leaves nothing.
pub struct NpzWriter {
    pending: PendingFile,
    zip: ZipWriter<BufWriter<File>>,
    count: usize,
    height: usize,
    width: usize,
    written: usize,
}

impl NpzWriter {
    /// Begins a file of `count` images of one size.
    ///
    /// # Errors
    /// [`FigureError::Write`] where the file cannot be made.
    pub fn create(path: &Path, count: usize, height: usize, width: usize) -> Result<Self, FigureError> {
        let (pending, file) = PendingFile::create(path)?;
        let mut zip = ZipWriter::new(BufWriter::new(file));
        // 50,000 images of 256 x 256 are beyond the 4 GiB of a plain zip entry.
        let options =
            SimpleFileOptions::default().compression_method(CompressionMethod::Stored).large_file(true);
        zip.start_file("arr_0.npy", options)
            .map_err(io::Error::from)
            .and_then(|()| zip.write_all(&npy::header("|u1", &[count, height, width, 3])))
            .map_err(|source| pending.error(source))?;
        Ok(Self { pending, zip, count, height, width, written: 0 })
    }

    /// Adds the next image.
    ///
    /// # Errors
    /// [`FigureError::Images`] for an image of another size or one too many; [`FigureError::Write`]
    /// where the disk is full.
    pub fn push(&mut self, image: &Image) -> Result<(), FigureError> {
        if (image.height, image.width) != (self.height, self.width) {
            return Err(FigureError::Images(format!(
                "image {} is {} x {}, not {} x {}",
                self.written, image.width, image.height, self.width, self.height
            )));
        }
        if self.written == self.count {
            return Err(FigureError::Images(format!("more than the {} announced", self.count)));
        }
        self.zip.write_all(&image.pixels).map_err(|source| self.pending.error(source))?;
        self.written += 1;
        Ok(())
    }

    /// Completes the file and gives it its name.
    ///
    /// # Errors
    /// [`FigureError::Images`] where images are missing; [`FigureError::Write`] as for `push`.
    pub fn finish(self) -> Result<(), FigureError> {
        if self.written < self.count {
            return Err(FigureError::Images(format!("{} of {}", self.written, self.count)));
        }
        let pending = self.pending;
        let buffered = self.zip.finish().map_err(io::Error::from).map_err(|source| pending.error(source))?;
        let file = buffered.into_inner().map_err(|error| pending.error(error.into_error()))?;
        pending.commit(&file)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn image(value: u8) -> Image {
        Image { width: 3, height: 2, pixels: vec![value; 18] }
    }

    #[test]
    fn the_archive_holds_the_images_behind_numpys_header() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("samples.npz");
        let mut writer = NpzWriter::create(&path, 2, 2, 3).expect("created");
        writer.push(&image(7)).expect("pushed");
        writer.push(&image(9)).expect("pushed");
        assert!(!path.exists());
        writer.finish().expect("finished");

        let mut archive = zip::ZipArchive::new(File::open(&path).expect("opened")).expect("a zip");
        assert_eq!(archive.len(), 1);
        let mut bytes = Vec::new();
        archive.by_name("arr_0.npy").expect("arr_0").read_to_end(&mut bytes).expect("read");
        let (header, data) = bytes.split_at(128);
        assert_eq!(&header[..10], b"\x93NUMPY\x01\x00\x76\x00");
        let text = std::str::from_utf8(&header[10..]).expect("ASCII");
        let dictionary = "{'descr': '|u1', 'fortran_order': False, 'shape': (2, 2, 3, 3), }";
        assert_eq!(text.trim_end_matches([' ', '\n']), dictionary);
        assert!(text.ends_with('\n'));
        assert_eq!(data, [[7; 18], [9; 18]].concat());
    }

    #[test]
    fn wrong_images_are_refused_and_an_unfinished_file_vanishes() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("samples.npz");
        let mut writer = NpzWriter::create(&path, 1, 2, 3).expect("created");
        let turned = Image { width: 2, height: 3, pixels: vec![0; 18] };
        assert!(writer.push(&turned).expect_err("turned").to_string().contains("2 x 3, not 3 x 2"));
        writer.push(&image(1)).expect("pushed");
        assert!(writer.push(&image(2)).is_err(), "one too many");
        drop(writer);
        let short = NpzWriter::create(&path, 1, 2, 3).expect("created");
        assert!(short.finish().expect_err("short").to_string().contains("0 of 1"));
        assert_eq!(std::fs::read_dir(folder.path()).expect("listed").count(), 0);
    }
}
