//! Sample images while a run trains: grids of the same noise and classes every so many steps, by the averaged weights.
//!
//! All ranks draw their part of a grid.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use repa_comm::{CommError, Communicator, shard_range};

use super::TrainError;
use crate::Device;
use crate::autoencoder::Autoencoder;
use crate::config::{Config, ConfigError};
use crate::data::store::Index;
use crate::figures::{labelled_grid, write_png};
use crate::generate::{Generator, autoencoder, class_rows, together};
use crate::images::Image;
use crate::params::Layout;

/// The grids of a run.
#[derive(Debug)]
pub(super) struct Samples {
    /// The run's, with the solver of grids.
    config: Config,
    index: Index,
    autoencoder: Autoencoder,
    device: Device,
    layout: Arc<Layout>,
    /// The class of each image.
    labels: Vec<usize>,
}

/// A grid, where it is, and what is wrong with it if there is none. On rank 0.
pub(super) type Drawn = Result<(PathBuf, Image), String>;

impl Samples {
    /// None where none are asked for, or the store's autoencoder is not at hand and none is named, which is `said`: the
    /// quickstart's settings are to do for other data too.
    ///
    /// # Errors
    /// The autoencoder that is named cannot be used.
    pub(super) fn open(
        config: &Config,
        index: &Index,
        layout: &Arc<Layout>,
        device: &Device,
        said: &mut Vec<String>,
    ) -> Result<Option<Self>, TrainError> {
        let training = &config.sample.training;
        if training.every == 0 {
            return Ok(None);
        }
        let autoencoder = match autoencoder(config, index, device) {
            Ok(autoencoder) => autoencoder,
            Err(error) if config.sample.autoencoder.as_os_str().is_empty() => {
                said.push(format!("no sample images while training (sample.training.every): {error}"));
                return Ok(None);
            }
            Err(error) => {
                let path = config.sample.autoencoder.display();
                return Err(ConfigError::value("sample.autoencoder", path, error.to_string()).into());
            }
        };
        let all = index.contents.classes;
        let classes = training.classes.min(all);
        let labels = (0..classes).flat_map(|i| std::iter::repeat_n(i * all / classes, training.per_class));
        let labels = labels.collect();
        let mut config = config.clone();
        config.sample.solver = training.solver(&config.sample.solver);
        Ok(Some(Self {
            config,
            index: index.clone(),
            autoencoder,
            device: device.clone(),
            layout: layout.clone(),
            labels,
        }))
    }

    /// The run's configuration, with the solver of grids.
    pub(super) fn config(&self) -> &Config {
        &self.config
    }

    /// Whether a grid is due after this step.
    pub(super) fn due(&self, step: u64) -> bool {
        step.is_multiple_of(self.config.sample.training.every)
    }

    /// Draws the grid of a step by these weights, the whole flat array, and writes it to the run folder. Called by all
    /// ranks; rank 0 gets what has come of it.
    ///
    /// # Errors
    /// The ranks could not talk.
    pub(super) fn draw(
        &self,
        weights: &[f32],
        step: u64,
        comm: &dyn Communicator,
    ) -> Result<Option<Drawn>, CommError> {
        let part = together(comm, || self.part(weights, step, comm.rank(), comm.size()))?;
        let parts = comm.all_gather_bytes(&packed(part))?;
        if comm.rank() != 0 {
            return Ok(None);
        }
        let all = parts.iter().zip(&comm.topology().hosts).enumerate().try_fold(
            Vec::with_capacity(self.labels.len()),
            |mut all, (rank, (bytes, host))| match unpacked(bytes) {
                Ok(images) => {
                    all.extend(images);
                    Ok(all)
                }
                Err(problem) => Err(format!("rank {rank} on {host}: {problem}")),
            },
        );
        Ok(Some(all.and_then(|images| self.write(images, step).map_err(|e| e.to_string()))))
    }

    /// This rank's images.
    fn part(&self, weights: &[f32], step: u64, rank: usize, world: usize) -> Result<Vec<Image>, String> {
        let mine = shard_range(self.labels.len(), rank, world);
        if mine.is_empty() {
            return Ok(Vec::new());
        }
        let generator = Generator::of_weights(
            &self.config,
            self.index.clone(),
            self.autoencoder.clone(),
            &self.device,
            &self.layout,
            weights,
            step,
        );
        let first = mine.start as u64;
        generator.images(&self.labels[mine], first, |_| {}).map_err(|error| error.to_string())
    }

    fn write(&self, images: Vec<Image>, step: u64) -> Result<(PathBuf, Image), crate::figures::FigureError> {
        let rows = class_rows(&self.index.contents, &self.labels, images);
        let grid = labelled_grid(&rows, &format!("step {step}"))?;
        let path = path(&self.config.run.dir, step);
        let folder = path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder)
            .map_err(|source| crate::figures::FigureError::Write { path: folder.to_owned(), source })?;
        write_png(&path, &grid)?;
        Ok((path, grid))
    }
}

/// Where a run keeps the grid of a step.
pub(super) fn path(run: &Path, step: u64) -> PathBuf {
    run.join("samples").join(format!("step-{step:08}.png"))
}

/// What a rank sends: width, height and pixels of its images behind a 0, or what went wrong behind a 1.
fn packed(part: Result<Vec<Image>, String>) -> Vec<u8> {
    let mut bytes;
    match part {
        Ok(images) => {
            bytes = vec![0];
            if let Some(first) = images.first() {
                bytes.extend([first.width, first.height].iter().flat_map(|&n| (n as u32).to_le_bytes()));
            }
            images.iter().for_each(|image| bytes.extend_from_slice(&image.pixels));
        }
        Err(problem) => {
            bytes = vec![1];
            bytes.extend_from_slice(problem.as_bytes());
        }
    }
    bytes
}

fn unpacked(bytes: &[u8]) -> Result<Vec<Image>, String> {
    match bytes {
        [0] => Ok(Vec::new()),
        [0, a, b, c, d, e, f, g, h, pixels @ ..] => {
            let [width, height] =
                [[*a, *b, *c, *d], [*e, *f, *g, *h]].map(|n| u32::from_le_bytes(n) as usize);
            let each = pixels.chunks_exact((3 * width * height).max(1));
            Ok(each.map(|pixels| Image { width, height, pixels: pixels.to_vec() }).collect())
        }
        [_, problem @ ..] => Err(String::from_utf8_lossy(problem).into_owned()),
        [] => Err("it sent nothing".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_and_problems_travel() {
        let image = |value| Image { width: 3, height: 2, pixels: vec![value; 18] };
        for part in [Ok(Vec::new()), Ok(vec![image(1), image(255)]), Err("no numbers".to_owned())] {
            assert_eq!(unpacked(&packed(part.clone())), part);
        }
    }
}
