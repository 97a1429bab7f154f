//! The TAESD family with real weights, `taef2_encoder.pth` and `taef2_decoder.pth` beside the case.

use repa_trainer::autoencoder::{Autoencoder, Kind};
use repa_trainer::{Device, Tensor};

use crate::case::{Case, device};
use crate::compare::close_relative;

/// Checks one case. Where the weights are absent it says so and passes: they are not the project's to
/// give away.
pub fn check(case: &Case) -> Result<(), String> {
    let device = device();
    let encoder = case.path.with_file_name("taef2_encoder.pth");
    if !encoder.is_file() || !case.path.with_file_name("taef2_decoder.pth").is_file() {
        println!("skipped: {} or its decoder is not there", encoder.display());
        return Ok(());
    }
    let autoencoder = Autoencoder::open(&encoder, &device).map_err(|e| e.to_string())?;
    let info = autoencoder.info();
    if (info.kind, info.channels) != (Kind::Latents, case.usize("latent_channels", 4)) {
        return Err(format!("inferred {info:?}"));
    }
    let floats = |t: Tensor<4>| t.into_data().try_to_vec::<f32>().expect("float32");
    let latent = floats(autoencoder.encode(image(case, &device) * 2.0 - 1.0));
    close_relative("latent", &latent, &case.f32s("latent"), 1e-5)?;
    let decoded = floats((autoencoder.decode(case.tensor("latent", &device)) + 1.0) * 0.5);
    close_relative("decoded", &decoded, &case.f32s("decoded"), 1e-5)
}

/// The case's uint8 image in [0, 1].
pub fn image(case: &Case, device: &Device) -> Tensor<4> {
    let values: Vec<f32> = case.u8s("image").iter().map(|&p| f32::from(p) / 255.0).collect();
    let shape: [usize; 4] = case.shape("image").try_into().expect("rank");
    Tensor::<1>::from_data(values.as_slice(), device).reshape(shape)
}
