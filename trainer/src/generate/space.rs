//! The latents that a run's model makes: their shape, how they are normalised, what decodes them.

use std::path::{Path, PathBuf};

use burn::tensor::Device;

use super::{GenerateError, autoencoder};
use crate::autoencoder::{Autoencoder, AutoencoderInfo};
use crate::config::{Config, ConfigError};
use crate::data;
use crate::data::store::{Expected, Index, Normalisation, StoreError, StoreSpec};

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
/// run keeps of it; where there never was one (`data.dir` is empty, as in an imported run), from the model's shape and
/// the autoencoder's own scale.
pub(super) fn find(config: &Config, device: &Device) -> Result<(Index, Autoencoder), GenerateError> {
    let dir = &config.data.dir;
    let index = match data::open(dir) {
        Ok(store) => store.index().clone(),
        Err(StoreError::Missing { dir }) => match read(&kept(&config.run.dir))? {
            Some(index) => index,
            None if dir.as_os_str().is_empty() && !config.sample.autoencoder.as_os_str().is_empty() => {
                let autoencoder = Autoencoder::open(&config.sample.autoencoder, device)?;
                return Ok((of_model(config, autoencoder.info())?, autoencoder));
            }
            None => return Err(GenerateError::NoData { dir }),
        },
        Err(error) => return Err(error.into()),
    };
    let sit = config.sit();
    let expected = Expected {
        channels: sit.in_channels,
        input_size: sit.input_size,
        classes: sit.num_classes,
        tokens: sit.tokens(),
        z_dims: Vec::new(),
    };
    index.expect(dir, &expected)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    fn config(run: &Path) -> Config {
        let mut config = Config::default();
        config.run.dir = run.to_owned();
        config.data.dir = PathBuf::new();
        (config.model.in_channels, config.model.input_size, config.model.num_classes) = (4, 8, 3);
        let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets");
        config.sample.autoencoder = assets.join("quickstart-autoencoder.safetensors");
        config
    }

    #[test]
    fn a_run_without_data_has_the_autoencoder_s_own_latents() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut config = config(folder.path());
        let (index, autoencoder) = find(&config, &Device::flex()).expect("found");
        let (contents, info) = (&index.contents, autoencoder.info());
        assert_eq!((contents.channels, contents.height, contents.classes), (4, 8, 3));
        assert_eq!(contents.resolution, 8 * info.downsample);
        assert_eq!((&index.normalisation.scale, &index.normalisation.shift), (&info.scale, &info.shift));
        config.model.in_channels = 16;
        let error = find(&config, &Device::flex()).expect_err("another autoencoder's").to_string();
        assert!(error.contains("sample.autoencoder") && error.contains("4 channels"), "{error}");
        // Data that are gone may have been normalised otherwise.
        config.data.dir = folder.path().join("gone");
        let error = find(&config, &Device::flex()).expect_err("no data").to_string();
        assert!(error.contains("gone") && error.contains("keeps no latents.json"), "{error}");
    }

    #[test]
    fn what_a_run_keeps_is_what_its_data_were() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut config = config(folder.path());
        config.data.dir = folder.path().join("gone");
        let normalisation = Normalisation { shift: vec![0.5; 4], scale: vec![2.0; 4] };
        let spec = StoreSpec { channels: 4, height: 8, width: 8, ..StoreSpec::of_images(64, 3) };
        let index = Index::in_place(spec, 77, normalisation);
        std::fs::write(kept(folder.path()), text(&index)).expect("written");
        assert_eq!(find(&config, &Device::flex()).expect("found").0, index);
        config.model.num_classes = 9;
        let error = find(&config, &Device::flex()).expect_err("another model's").to_string();
        assert!(error.contains("3 classes and the model 9"), "{error}");
        std::fs::write(kept(folder.path()), "{").expect("written");
        let error = find(&config, &Device::flex()).expect_err("half a file").to_string();
        assert!(error.contains("latents.json"), "{error}");
    }
}
