//! Batches as ADM's evaluator reads them (`.npz`): images, `arr_0` uint8 [N, H, W, 3], and, in reference batches, the
//! mean and covariance of their features: `mu` and `sigma`, pooled, and `mu_s` and `sigma_s`, spatial.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, sync_channel};

use zip::result::ZipError;
use zip::{CompressionMethod, ZipArchive};

use super::inception::Inception;
use super::neighbours::NEIGHBOUR;
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
    pooled: Option<Gaussian>,
    /// Of spatial features.
    spatial: Option<Gaussian>,
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
        let size = archive.by_name("arr_0.npy").map_or(0, |file| file.size());
        let shape = match find(&mut archive, "arr_0")? {
            Some(mut file) => Some(pixels(&mut file)?),
            None => None,
        };
        let pooled = statistics(&mut archive, "mu", "sigma", Inception::POOLED)?;
        let spatial = statistics(&mut archive, "mu_s", "sigma_s", Inception::SPATIAL)?;
        match shape {
            None if pooled.is_none() => {
                return Err("holds neither images (arr_0) nor statistics (mu and sigma)".to_owned());
            }
            Some([few @ 0..=NEIGHBOUR, ..]) => {
                return Err(format!("holds {few} images: it takes {} or more", NEIGHBOUR + 1));
            }
            Some([count, height, width]) if size < (3 * count * height * width) as u64 => {
                return Err(format!(
                    "is cut short: arr_0 has {size} bytes for {count} images of {height} x {width}"
                ));
            }
            _ => {}
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

    /// The statistics that it holds: of pooled and of spatial features.
    pub fn given(&self) -> [Option<&Gaussian>; 2] {
        [self.pooled.as_ref(), self.spatial.as_ref()]
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

/// Reads the shape of `arr_0` up to its first pixel: how many images, height, width.
fn pixels(file: &mut impl Read) -> Result<[usize; 3], String> {
    let header = npy::read_header(file).map_err(|problem| format!("arr_0 {problem}"))?;
    match (header.shape.as_slice(), header.descr.as_str(), header.fortran) {
        (&[count, height, width, 3], "|u1", false)
            if (1..=LARGEST).contains(&height) && (1..=LARGEST).contains(&width) =>
        {
            Ok([count, height, width])
        }
        (shape, descr, _) => {
            Err(format!("arr_0 is {descr} {shape:?}, not the pixels of images: |u1 [N, H, W, 3] in C order"))
        }
    }
}

/// Gives `tell` those images whose number modulo `ranks` is `rank`, until it has enough. Rank 0 reads all of the file
/// and compares its checksum; the others pass over what is not theirs where the file is not compressed.
fn read_images(
    path: &Path,
    rank: usize,
    ranks: usize,
    mut tell: impl FnMut(Image) -> bool,
) -> Result<(), String> {
    let mut archive = archive(path)?;
    let plain =
        archive.by_name("arr_0.npy").is_ok_and(|file| file.compression() == CompressionMethod::Stored);
    if rank > 0 && plain {
        let file =
            archive.by_name_seek("arr_0.npy").map_err(|error| format!("arr_0 cannot be read: {error}"))?;
        let mut file = BufReader::new(file);
        let [count, height, width] = pixels(&mut file)?;
        let each = 3 * height * width;
        for number in (rank..count).step_by(ranks) {
            let pass = if number == rank { rank } else { ranks - 1 } * each;
            let failed = |error| format!("image {number} cannot be read: {error}");
            file.seek_relative(pass as i64).map_err(failed)?;
            let mut pixels = vec![0; each];
            file.read_exact(&mut pixels).map_err(failed)?;
            if !tell(Image { width, height, pixels }) {
                break;
            }
        }
        return Ok(());
    }
    let Some(mut file) = find(&mut archive, "arr_0")? else { return Ok(()) };
    let [count, height, width] = pixels(&mut file)?;
    let mut pixels = vec![0; 3 * height * width];
    // The last of ours waits for the checksum, which is compared at the end.
    let mut last = None;
    for number in 0..count {
        let failed = |error| format!("image {number} cannot be read: {error}");
        file.read_exact(&mut pixels).map_err(failed)?;
        if number % ranks == rank
            && let Some(image) = last.replace(Image { width, height, pixels: pixels.clone() })
            && !tell(image)
        {
            return Ok(());
        }
        if number + 1 == count && file.read(&mut [0]).map_err(failed)? > 0 {
            return Err("arr_0 holds more than its shape says".to_owned());
        }
    }
    last.map(tell);
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
        for (rank, own) in [vec![0, 3, 6], vec![1, 4], vec![2, 5]].into_iter().enumerate() {
            let own: Vec<Image> = own.into_iter().map(|i| pictures(7)[i].clone()).collect();
            assert_eq!(batch.images(rank, 3).take(own.len()).expect("its own"), own, "{rank}");
        }
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
        let header = |count: usize| npy::header("|u1", &[count, 1, 1, 3]);
        fails(&[("arr_0.npy", header(300_000_000_000))], "is cut short");
        fails(&[("arr_0.npy", [header(3), vec![0; 9]].concat())], "holds 3 images: it takes 4 or more");
        std::fs::write(folder.path().join("text"), "no archive").expect("written");
        assert!(Batch::open(&folder.path().join("text")).expect_err("text").to_string().contains("no .npz"));
    }

    #[test]
    fn damaged_pixels_are_noticed() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("samples.npz");
        let mut writer = NpzWriter::create(&path, 5, 2, 3).expect("created");
        pictures(5).iter().for_each(|image| writer.push(image).expect("pushed"));
        writer.finish().expect("finished");
        let mut bytes = std::fs::read(&path).expect("read");
        let at = bytes.windows(18).position(|pixels| pixels == [2; 18]).expect("an image");
        bytes[at + 17] = 7;
        std::fs::write(&path, bytes).expect("written");
        // By rank 0 alone, whose images are others here.
        let mut images = Batch::open(&path).expect("a batch").images(0, 4);
        let error = images.take(2).expect_err("damaged").to_string();
        assert!(error.contains("image 4 cannot be read"), "{error}");
    }
}
