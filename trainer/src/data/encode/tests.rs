use std::path::Path;

use repa_comm::Single;

use super::*;
use crate::data::bench::imagenet_spec;
use crate::data::store::LatentStore;

/// Plain pictures; some are of another size.
struct Plain(Vec<Picture>);

impl ImageSource for Plain {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn name(&self, i: usize) -> String {
        format!("picture {i}")
    }

    fn get(&self, i: usize) -> Result<Picture, Fault> {
        Ok(self.0[i].clone())
    }
}

fn spec() -> StoreSpec {
    StoreSpec {
        kind: Kind::Latents,
        channels: 1,
        height: 2,
        width: 2,
        resolution: 4,
        normalisation: None,
        encoders: vec![EncoderSpec { id: "eye".to_owned(), tokens: 1, dim: 2 }],
        images: true,
        ..imagenet_spec(false)
    }
}

/// Pictures whose left half has one level and whose right half another.
fn pictures(count: usize) -> Plain {
    let picture = |i: usize| {
        let row = [[i as u8; 6], [100 + i as u8; 6]].concat();
        let image = Image { width: 4, height: 4, pixels: row.repeat(4) };
        Picture { image, label: (i % 10) as u32, encoded: None, latent: None }
    };
    Plain((0..count).map(picture).collect())
}

/// The first pixel's level: that of the left half.
fn models(images: &[Image]) -> Result<Encoded, String> {
    let value = |image: &Image| f32::from(image.pixels[0]);
    Ok(Encoded {
        latents: Some(images.iter().flat_map(|i| [value(i); 4]).collect()),
        features: vec![images.iter().flat_map(|i| [f16::from_f32(value(i)), f16::ONE]).collect()],
    })
}

fn run(source: &Plain, dir: &Path, spec: &StoreSpec) -> Result<Built, RemoteError> {
    let options = BuildOptions { batch: 3, shard_len: 8, max_bad: 0 };
    encode(&Single::new(), source, dir, spec, &options, &models, &mut |_| ())
}

#[test]
fn images_become_latents_features_and_stored_images() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("store");
    let source = pictures(29);
    run(&source, &dir, &spec()).unwrap();
    let store = LatentStore::open(&dir).unwrap();
    assert!(store.verify(&|_| ()).findings.is_empty());
    let (mut latent, mut features, mut image) = ([0.0; 4], [f16::ZERO; 2], Vec::new());
    for (i, picture) in source.0.iter().enumerate() {
        store.latent(i, false, &mut latent).unwrap();
        store.features(0, i, false, &mut features).unwrap();
        store.image(i, &mut image).unwrap();
        assert_eq!((latent, store.label(i).unwrap()), ([i as f32; 4], picture.label));
        assert_eq!(features[0].to_f32(), i as f32);
        assert_eq!(Image::from_bytes(&image).unwrap(), picture.image);
    }
}

#[test]
fn flipped_copies_are_of_the_mirrored_image() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("store");
    run(&pictures(11), &dir, &StoreSpec { flips: true, ..spec() }).unwrap();
    let store = LatentStore::open(&dir).unwrap();
    let (mut latent, mut features) = ([0.0; 4], [f16::ZERO; 2]);
    for i in 0..11 {
        for (flipped, level) in [(false, i as f32), (true, 100.0 + i as f32)] {
            store.latent(i, flipped, &mut latent).unwrap();
            store.features(0, i, flipped, &mut features).unwrap();
            assert_eq!((latent, features[0].to_f32()), ([level; 4], level));
        }
    }
}

#[test]
fn bytes_and_latents_of_the_source_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("store");
    let mut source = pictures(3);
    let own = png(&source.0[1].image);
    let marked = [own.clone(), b"as it was".to_vec()].concat();
    source.0.iter_mut().for_each(|p| p.latent = Some(vec![0.5; 4]));
    source.0[1].encoded = Some(marked.clone());
    let only_features = |images: &[Image]| Ok(Encoded { latents: None, ..models(images)? });
    let options = BuildOptions::default();
    encode(&Single::new(), &source, &dir, &spec(), &options, &only_features, &mut |_| ()).unwrap();
    let store = LatentStore::open(&dir).unwrap();
    let (mut latent, mut image) = ([0.0; 4], Vec::new());
    store.latent(1, false, &mut latent).unwrap();
    store.image(1, &mut image).unwrap();
    assert_eq!((latent, image), ([0.5; 4], marked));
}

#[test]
fn images_of_another_size_and_models_that_give_too_little_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("store");
    let mut source = pictures(12);
    source.0[2].image = Image { width: 3, height: 4, pixels: vec![0; 36] };
    let error = run(&source, &dir, &spec()).unwrap_err().message;
    assert!(error.contains("picture 2 is 3x4 pixels where 4x4 belong"), "{error}");
    let short = |images: &[Image]| Ok(Encoded { features: Vec::new(), ..models(images)? });
    let options = BuildOptions::default();
    let dir = folder.path().join("other");
    let error = encode(&Single::new(), &pictures(4), &dir, &spec(), &options, &short, &mut |_| ())
        .unwrap_err()
        .message;
    assert_eq!(error, "encoding members 0 to 4: features of 0 encoders where 1 belong");
}

#[test]
fn the_models_complete_the_spec() {
    let device = Device::flex();
    let own = Models {
        autoencoder: Some(autoencoder::quickstart(&device)),
        encoders: vec![VisionEncoder::quickstart(&device)],
        device: device.clone(),
    };
    let given = StoreSpec { resolution: 64, channels: 0, height: 0, width: 0, ..spec() };
    let whole = own.complete(given.clone()).unwrap();
    assert_eq!((whole.kind, whole.channels, whole.height, whole.width), (Kind::Latents, 4, 16, 16));
    let teacher = EncoderSpec { id: "quickstart-teacher".to_owned(), tokens: 64, dim: 96 };
    assert_eq!(whole.encoders, [teacher]);
    let message = |models: &Models, spec| models.complete(spec).unwrap_err().to_string();
    assert!(message(&own, StoreSpec { resolution: 66, ..given.clone() }).contains("66 pixels do not divide"));
    let keep = Models { autoencoder: None, encoders: Vec::new(), device };
    assert!(message(&keep, StoreSpec { flips: true, ..given }).contains("--flips needs --autoencoder"));
}
