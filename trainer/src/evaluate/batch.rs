//! Batches as ADM's evaluator reads them (`.npz`): images, `arr_0` uint8 [N, H, W, 3], and, in reference batches, the
//! mean and covariance of their features: `mu` and `sigma`, pooled, and `mu_s` and `sigma_s`, spatial.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, sync_channel};

use zip::ZipArchive;
use zip::result::ZipError;

use super::inception::Inception;
use super::{EvaluationError, Gaussian};
use crate::data::source::npy;
use crate::images::Image;

/// Images that are read ahead.
const AHEAD: usize = 64;

/// Largest side of an image, in pixels.
const LARGEST: usize = 1 << 14;

/// A batch's file.
#[derive(Debug)]
pub struct Batch {
    path: PathBuf,
    /// Of the images: how many, height, width.
    shape: Option<[usize; 3]>,
    /// Of pooled features.
    pub(super) pooled: Option<Gaussian>,
    /// Of spatial features.
    pub(super) spatial: Option<Gaussian>,
}

impl Batch {
    /// Opens a file; images are read later.
    ///
    /// # Errors
    /// It is no `.npz`, or holds neither such images nor such statistics.
    pub fn open(path: &Path) -> Result<Self, EvaluationError> {
        Self::read(path).map_err(|problem| wrong(path, &problem))
    }

    fn read(path: &Path) -> Result<Self, String> {
        let mut archive = archive(path)?;
        let shape = images(&mut archive)?.map(|(shape, _)| shape);
        let pooled = statistics(&mut archive, "mu", "sigma", Inception::POOLED)?;
        let spatial = statistics(&mut archive, "mu_s", "sigma_s", Inception::SPATIAL)?;
        if shape.is_none() && pooled.is_none() {
            return Err("holds neither images (arr_0) nor statistics (mu and sigma)".to_owned());
        }
        Ok(Self { path: path.to_owned(), shape, pooled, spatial })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many images it has.
    pub fn count(&self) -> usize {
        self.shape.map_or(0, |[count, ..]| count)
    }

    /// Reads those images of the batch whose number modulo `ranks` is `rank`, in order, on a thread of its own.
    pub(super) fn images(&self, rank: usize, ranks: usize) -> Images {
        let (send, images) = sync_channel(AHEAD);
        let path = self.path.clone();
        std::thread::spawn(move || {
            // Who no longer listens has what it wanted, or has failed.
            let tell = |image| send.send(image).is_ok();
            if let Err(problem) = read_images(&path, rank, ranks, |image| tell(Ok(image))) {
                tell(Err(problem));
            }
        });
        Images { path: self.path.clone(), images }
    }
}

/// Images of a batch, in order.
pub(super) struct Images {
    path: PathBuf,
    images: Receiver<Result<Image, String>>,
}

impl Images {
    /// The next ones.
    pub fn take(&mut self, count: usize) -> Result<Vec<Image>, EvaluationError> {
        let ended = || Err("ends before its last image".to_owned());
        let next =
            |_| self.images.recv().unwrap_or_else(|_| ended()).map_err(|problem| wrong(&self.path, &problem));
        (0..count).map(next).collect()
    }
}

fn wrong(path: &Path, problem: &str) -> EvaluationError {
    EvaluationError::Batch { path: path.to_owned(), problem: problem.to_owned() }
}

type Archive = ZipArchive<BufReader<File>>;

fn archive(path: &Path) -> Result<Archive, String> {
    let file = File::open(path).map_err(|error| format!("cannot be read: {error}"))?;
    ZipArchive::new(BufReader::new(file))
        .map_err(|error| format!("is no .npz, as numpy.savez writes them: {error}"))
}

/// A file of the archive, if it is there.
fn find<'a>(archive: &'a mut Archive, name: &str) -> Result<Option<impl Read + use<'a>>, String> {
    match archive.by_name(&format!("{name}.npy")) {
        Ok(file) => Ok(Some(BufReader::new(file))),
        Err(ZipError::FileNotFound) => Ok(None),
        Err(error) => Err(format!("{name} cannot be read: {error}")),
    }
}

/// The shape of `arr_0`, and the rest of it, pixels alone.
fn images(archive: &mut Archive) -> Result<Option<([usize; 3], impl Read)>, String> {
    let Some(mut file) = find(archive, "arr_0")? else { return Ok(None) };
    let header = npy::read_header(&mut file).map_err(|problem| format!("arr_0 {problem}"))?;
    match (header.shape.as_slice(), header.descr.as_str(), header.fortran) {
        (&[count, height, width, 3], "|u1", false)
            if (1..=LARGEST).contains(&height) && (1..=LARGEST).contains(&width) =>
        {
            Ok(Some(([count, height, width], file)))
        }
        (shape, descr, _) => {
            Err(format!("arr_0 is {descr} {shape:?}, not the pixels of images: |u1 [N, H, W, 3] in C order"))
        }
    }
}

fn read_images(
    path: &Path,
    rank: usize,
    ranks: usize,
    mut tell: impl FnMut(Image) -> bool,
) -> Result<(), String> {
    let mut archive = archive(path)?;
    let Some(([count, height, width], mut file)) = images(&mut archive)? else { return Ok(()) };
    let mut pixels = vec![0; 3 * height * width];
    for number in 0..count {
        let failed = |error| format!("image {number} cannot be read: {error}");
        file.read_exact(&mut pixels).map_err(failed)?;
        // Only at its end is the checksum of the whole compared.
        if number + 1 == count && file.read(&mut [0]).map_err(failed)? > 0 {
            return Err("arr_0 holds more than its shape says".to_owned());
        }
        if number % ranks == rank && !tell(Image { width, height, pixels: pixels.clone() }) {
            break;
        }
    }
    Ok(())
}

/// The Gaussian of these names.
fn statistics(
    archive: &mut Archive,
    mean: &str,
    covariance: &str,
    dimensions: usize,
) -> Result<Option<Gaussian>, String> {
    let mut values = |name: &str, shape: &[usize]| -> Result<Option<Vec<f64>>, String> {
        let Some(file) = find(archive, name)? else { return Ok(None) };
        // A header, and float64.
        let most = 8 * shape.iter().product::<usize>() as u64 + (1 << 16);
        let mut bytes = Vec::new();
        file.take(most).read_to_end(&mut bytes).map_err(|error| format!("{name} cannot be read: {error}"))?;
        let array = npy::parse(&bytes).map_err(|problem| format!("{name} {problem}"))?;
        if array.shape != shape {
            return Err(format!("{name} is {:?}, not {shape:?}: statistics of other features", array.shape));
        }
        let values = array.values_f64();
        match values.iter().find(|value| !value.is_finite()) {
            Some(value) => Err(format!("{name} holds {value}")),
            None => Ok(Some(values)),
        }
    };
    match (values(mean, &[dimensions])?, values(covariance, &[dimensions, dimensions])?) {
        (Some(mean), Some(covariance)) => Ok(Some(Gaussian::new(mean, covariance))),
        (None, None) => Ok(None),
        _ => Err(format!("holds one of {mean} and {covariance} without the other")),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use zip::ZipWriter;
    use zip::write::SimpleFileOptions;

    use super::*;
    use crate::figures::NpzWriter;

    fn pictures(count: usize) -> Vec<Image> {
        (0..count).map(|i| Image { width: 3, height: 2, pixels: vec![i as u8; 18] }).collect()
    }

    /// An archive of these files.
    fn file(folder: &Path, files: &[(&str, Vec<u8>)], compressed: bool) -> PathBuf {
        let path = folder.join("batch.npz");
        let mut zip = ZipWriter::new(File::create(&path).expect("created"));
        let method =
            if compressed { zip::CompressionMethod::Deflated } else { zip::CompressionMethod::Stored };
        for (name, bytes) in files {
            zip.start_file(*name, SimpleFileOptions::default().compression_method(method)).expect("begun");
            zip.write_all(bytes).expect("written");
        }
        zip.finish().expect("finished");
        path
    }

    #[test]
    fn each_rank_reads_its_own_images() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("samples.npz");
        let mut writer = NpzWriter::create(&path, 7, 2, 3).expect("created");
        pictures(7).iter().for_each(|image| writer.push(image).expect("pushed"));
        writer.finish().expect("finished");
        let batch = Batch::open(&path).expect("a batch");
        assert_eq!((batch.count(), batch.pooled.is_none()), (7, true));
        let mut second = batch.images(1, 3);
        assert_eq!(second.take(1).expect("one"), pictures(7)[1..2]);
        assert_eq!(second.take(1).expect("one"), pictures(7)[4..5]);
        let error = second.take(1).expect_err("the end").to_string();
        assert!(error.contains("samples.npz") && error.contains("ends before"), "{error}");
        assert_eq!(batch.images(0, 1).take(7).expect("all"), pictures(7));
    }

    #[test]
    fn compressed_statistics_are_read_and_others_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let d = Inception::POOLED;
        let mean = npy::to_bytes(&[d], &vec![0.5; d]);
        let covariance = npy::to_bytes(&[d, d], &vec![0.25; d * d]);
        let both = [("mu.npy", mean.clone()), ("sigma.npy", covariance)];
        let batch = Batch::open(&file(folder.path(), &both, true)).expect("a batch");
        assert_eq!((batch.count(), batch.spatial.is_none()), (0, true));
        assert_eq!(batch.pooled.expect("given"), Gaussian::new(vec![0.5; d], vec![0.25; d * d]));

        let fails = |files: &[(&str, Vec<u8>)], part: &str| {
            let error = Batch::open(&file(folder.path(), files, false)).expect_err(part).to_string();
            assert!(error.contains("batch.npz") && error.contains(part), "{error}");
        };
        fails(&both[..1], "one of mu and sigma without the other");
        fails(&[("x.npy", mean.clone())], "neither images (arr_0) nor statistics");
        fails(&[("mu.npy", npy::to_bytes(&[3], &[0.0; 3]))], "statistics of other features");
        fails(&[("arr_0.npy", mean)], "arr_0 is <f4 [2048]");
        fails(&[("arr_0.npy", b"GIF".to_vec())], "arr_0 is not a .npy file");
        std::fs::write(folder.path().join("text"), "no archive").expect("written");
        assert!(Batch::open(&folder.path().join("text")).expect_err("text").to_string().contains("no .npz"));
    }

    #[test]
    fn damaged_pixels_are_noticed() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("samples.npz");
        let mut writer = NpzWriter::create(&path, 3, 2, 3).expect("created");
        pictures(3).iter().for_each(|image| writer.push(image).expect("pushed"));
        writer.finish().expect("finished");
        let mut bytes = std::fs::read(&path).expect("read");
        let at = bytes.windows(18).position(|pixels| pixels == [2; 18]).expect("the last image");
        bytes[at + 17] = 7;
        std::fs::write(&path, bytes).expect("written");
        let error =
            Batch::open(&path).expect("a batch").images(0, 1).take(3).expect_err("damaged").to_string();
        assert!(error.contains("image 2 cannot be read"), "{error}");
    }
}
