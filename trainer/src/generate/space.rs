//! The latents that a run's model makes: their shape, how they are normalised, what decodes them.

use std::path::{Path, PathBuf};

use burn::tensor::Device;

use super::{GenerateError, autoencoder};
use crate::autoencoder::{Autoencoder, AutoencoderInfo};
use crate::config::{Config, ConfigError};
use crate::data;
use crate::data::store::{Index, Normalisation, StoreError, StoreSpec};

/// Where a run keeps what its data were: the store's index without its shards, so that images can be drawn where the
/// data are not.
pub(crate) fn kept(run: &Path) -> PathBuf {
    run.join("latents.json")
}

/// What is kept of a run's data.
pub(crate) fn text(index: &Index) -> String {
    let index = Index { shards: Vec::new(), ..index.clone() };
    serde_json::to_string_pretty(&index).expect("an index serialises") + "\n"
}

/// What the run trained on and the autoencoder that goes with it: from the store; where that is not here, from what the
/// run keeps of it; where it keeps nothing (it was imported), from the model's shape and the autoencoder's own scale.
pub(super) fn find(config: &Config, device: &Device) -> Result<(Index, Autoencoder), GenerateError> {
    let index = match data::open(&config.data.dir) {
        Ok(store) => store.index().clone(),
        Err(StoreError::Missing { dir }) => match read(&kept(&config.run.dir))? {
            Some(index) => index,
            None if config.sample.autoencoder.as_os_str().is_empty() => {
                return Err(GenerateError::NoData { dir });
            }
            None => {
                let autoencoder = Autoencoder::open(&config.sample.autoencoder, device)?;
                return Ok((of_model(config, autoencoder.info())?, autoencoder));
            }
        },
        Err(error) => return Err(error.into()),
    };
    let autoencoder = autoencoder(config, &index, device)?;
    Ok((index, autoencoder))
}

fn read(path: &Path) -> Result<Option<Index>, GenerateError> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(GenerateError::Kept { path: path.to_owned(), problem: error.to_string() }),
    };
    let index = serde_json::from_str(&text);
    index.map(Some).map_err(|e| GenerateError::Kept { path: path.to_owned(), problem: e.to_string() })
}

/// Latents as an autoencoder makes them, of a model's shape.
fn of_model(config: &Config, info: &AutoencoderInfo) -> Result<Index, GenerateError> {
    let model = &config.model;
    if info.channels != model.in_channels {
        let problem = format!(
            "its latents have {} channels where the model takes {}",
            info.channels, model.in_channels
        );
        return Err(
            ConfigError::value("sample.autoencoder", config.sample.autoencoder.display(), problem).into()
        );
    }
    let normalisation = Normalisation { shift: info.shift.clone(), scale: info.scale.clone() };
    let contents = StoreSpec {
        channels: model.in_channels,
        height: model.input_size,
        width: model.input_size,
        autoencoder: info.id.clone(),
        normalisation: Some(normalisation.clone()),
        ..StoreSpec::of_images(model.input_size * info.downsample, model.num_classes)
    };
    Ok(Index::in_place(contents, 0, normalisation))
}
