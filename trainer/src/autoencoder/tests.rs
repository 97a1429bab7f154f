use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::{Device, Tensor};
use safetensors::Dtype;

use super::kl::KlConfig;
use super::taesd::TaesdConfig;
use super::{Autoencoder, Kind, by_id, quickstart};
use crate::data::emoji;
use crate::images;
use crate::params::Layout;
use crate::weights::{RawTensor, Weights};

fn weights_of(layout: &Layout, seed: u64) -> Weights {
    let flat = layout.initial_values(seed);
    let tensors = layout
        .entries()
        .iter()
        .map(|e| {
            let bytes = flat[e.offset..e.offset + e.len()].iter().flat_map(|v| v.to_le_bytes()).collect();
            (e.name.clone(), RawTensor { dtype: Dtype::F32, shape: e.shape.clone(), bytes })
        })
        .collect();
    Weights { path: "planted.safetensors".into(), tensors, metadata: BTreeMap::new() }
}

fn renamed(weights: &Weights, rename: impl Fn(&str) -> String) -> Weights {
    let tensors = weights.tensors.iter().map(|(n, t)| (rename(n), t.clone())).collect();
    Weights { tensors, ..weights.clone() }
}

fn picture() -> Tensor<4> {
    let values: Vec<f32> = (0..2 * 3 * 16 * 16).map(|i| ((i * 37 % 101) as f32) / 50.5 - 1.0).collect();
    Tensor::<1>::from_data(values.as_slice(), &Device::flex()).reshape([2, 3, 16, 16])
}

fn values(tensor: Tensor<4>) -> Vec<f32> {
    tensor.into_data().try_to_vec().expect("float32")
}

fn small_kl() -> KlConfig {
    KlConfig { block_out_channels: vec![32, 64], layers_per_block: 2, ..KlConfig::default() }
}

fn error(weights: &Weights) -> String {
    Autoencoder::from_weights(weights, None, &Device::flex()).expect_err("foreign weights").to_string()
}

#[test]
fn the_family_is_inferred_from_names_and_shapes() {
    let small = TaesdConfig {
        latent_channels: 5,
        widths: vec![8, 12, 16],
        encoder_blocks: vec![0, 1, 2],
        decoder_blocks: vec![2, 1, 3],
        mid_group_norm: false,
    };
    let published = [(4, false), (16, false), (32, true)].map(|(c, norm)| TaesdConfig::published(c, norm));
    for config in published.into_iter().chain([small]) {
        let inferred = TaesdConfig::infer(&weights_of(&config.layout(), 1)).expect("its own layout");
        assert_eq!(inferred, config);
    }
}

#[test]
fn the_published_shape_has_the_published_numbers_of_parameters() {
    // TAESD's README gives 1.22 M parameters for each half.
    let layout = TaesdConfig::published(4, false).layout();
    let count = |half: &str| {
        layout.entries().iter().filter(|e| e.name.starts_with(half)).map(|e| e.len()).sum::<usize>()
    };
    assert_eq!((count("encoder."), count("decoder.")), (1_222_532, 1_222_531));
}

#[test]
fn diffusers_names_of_the_family_give_the_same() {
    let config = TaesdConfig {
        latent_channels: 4,
        widths: vec![8, 8],
        encoder_blocks: vec![1, 1],
        decoder_blocks: vec![1, 1],
        mid_group_norm: true,
    };
    let own = weights_of(&config.layout(), 2);
    let foreign = renamed(&own, |name| {
        let (half, rest) = name.split_once('.').expect("half");
        let (number, rest) = rest.split_once('.').expect("number");
        let number: usize = number.parse().expect("number");
        format!("{half}.layers.{}.{rest}", number - usize::from(half == "decoder"))
    });
    let device = Device::flex();
    let [a, b] = [own, foreign].map(|w| Autoencoder::from_weights(&w, None, &device).expect("weights"));
    assert_eq!(a.info(), b.info());
    assert_eq!((a.info().kind, a.info().channels, a.info().downsample), (Kind::Latents, 4, 2));
    let latents = a.encode(picture());
    assert_eq!(latents.dims(), [2, 4, 8, 8]);
    assert_eq!(values(latents.clone()), values(b.encode(picture())));
    assert_eq!(values(a.decode(latents.clone())), values(b.decode(latents)));
}

#[test]
fn a_kl_configuration_is_inferred_from_names_and_shapes() {
    for (quant, attention, latent_channels) in [(true, true, 4), (false, false, 16)] {
        let config = KlConfig {
            use_quant_conv: quant,
            use_post_quant_conv: quant,
            mid_block_add_attention: attention,
            latent_channels,
            ..small_kl()
        };
        assert_eq!(KlConfig::infer(&weights_of(&config.layout(), 3)).expect("its own layout"), config);
    }
}

#[test]
fn the_published_kl_has_the_published_number_of_parameters() {
    let config =
        KlConfig { block_out_channels: vec![128, 256, 512, 512], layers_per_block: 2, ..KlConfig::default() };
    assert_eq!(config.layout().total_len(), 83_653_863);
}

#[test]
fn old_attention_names_give_the_same() {
    let own = weights_of(&small_kl().layout(), 4);
    let mut old = renamed(&own, |name| {
        name.replace("to_q", "query")
            .replace("to_k", "key")
            .replace("to_v", "value")
            .replace("to_out.0", "proj_attn")
    });
    let linear = renamed(&old, str::to_owned);
    for (name, tensor) in &mut old.tensors {
        if name.contains(".attentions.0.") && name.ends_with(".weight") && tensor.shape.len() == 2 {
            tensor.shape.extend([1, 1]);
        }
    }
    assert_ne!(old.tensors, linear.tensors);
    let device = Device::flex();
    let encode = |weights: &Weights| {
        let autoencoder = Autoencoder::from_weights(weights, None, &device).expect("weights");
        assert_eq!((autoencoder.info().kind, autoencoder.info().scale[0]), (Kind::Moments, 0.18215));
        let moments = autoencoder.encode(picture());
        assert_eq!(moments.dims(), [2, 8, 8, 8]);
        values(moments)
    };
    let expected = encode(&own);
    assert_eq!(encode(&linear), expected);
    assert_eq!(encode(&old), expected);
}

#[test]
fn foreign_weights_are_told_what_they_lack() {
    let own = weights_of(&small_kl().layout(), 5);
    let mut lacking = own.clone();
    lacking.tensors.remove("decoder.conv_out.bias");
    let message = error(&lacking);
    assert!(message.contains("missing: decoder.conv_out.bias") && message.contains("planted"), "{message}");

    let taesd = weights_of(&TaesdConfig::published(4, false).layout(), 6);
    let mut misshapen = taesd.clone();
    misshapen.tensors.get_mut("encoder.1.conv.2.bias").expect("a bias").shape = vec![63];
    assert!(error(&misshapen).contains("encoder.1.conv.2.bias is [63] where [64] belongs"));

    let mut half = taesd.clone();
    half.tensors.retain(|name, _| name.starts_with("encoder."));
    assert!(error(&half).contains("no tensors under decoder."));
    assert!(error(&Weights::default()).contains("no tensors under encoder."));
}

#[test]
fn a_config_beside_the_weights_is_checked() {
    let path = Path::new("vae/config.json");
    let config = KlConfig::from_json(
        path,
        r#"{"_class_name": "AutoencoderKL", "block_out_channels": [128, 256], "layers_per_block": 2,
            "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159,
            "use_quant_conv": false, "use_post_quant_conv": false}"#,
    )
    .expect("a configuration");
    assert_eq!(
        (config.latent_channels, config.shift_factor, config.use_quant_conv),
        (16, Some(0.1159), false)
    );
    for (text, named) in [
        ("{\"latent_channels\": \"four\"}", "config.json"),
        ("[]", "config.json"),
        ("{\"block_out_channels\": [100]}", "norm_num_groups = 32"),
        ("{\"block_out_channels\": []}", "block_out_channels"),
        ("{\"norm_num_groups\": 0}", "norm_num_groups = 0"),
    ] {
        let message = KlConfig::from_json(path, text).expect_err(text).to_string();
        assert!(message.contains(named), "{message}");
    }
}

#[test]
fn metadata_of_another_length_is_refused() {
    let mut weights = weights_of(&TaesdConfig::published(4, false).layout(), 7);
    weights.metadata.insert("scale".into(), "[1, 2]".into());
    assert!(error(&weights).contains("a JSON list of 4 numbers"));
}

#[test]
fn only_built_in_autoencoders_are_found_by_id() {
    let device = Device::flex();
    let id = quickstart(&device).info().id.clone();
    assert_eq!(by_id(&id, &device).expect("built in").info().id, id);
    let message = by_id("sd-vae-ft-ema", &device).expect_err("not built in").to_string();
    assert!(message.contains("sd-vae-ft-ema") && message.contains("sample.autoencoder=PATH"), "{message}");
}

#[test]
fn the_quickstart_autoencoder_keeps_unseen_images() {
    let device = Device::flex();
    let autoencoder = quickstart(&device);
    let info = autoencoder.info();
    assert_eq!((info.kind, info.channels, info.downsample), (Kind::Latents, 4, 4));
    let unseen: Vec<_> = emoji::all().iter().filter(|e| emoji::held_out(e)).map(|e| e.image()).collect();
    let every_third: Vec<_> = unseen.into_iter().step_by(3).take(40).collect();
    assert_eq!(every_third.len(), 40);
    let latents = autoencoder.encode(images::to_tensor(&every_third, &device));
    let decoded = images::from_tensor(autoencoder.decode(latents.clone()));
    let error: f64 =
        every_third.iter().zip(&decoded).map(|(a, b)| images::mean_squared_error(a, b)).sum::<f64>() / 40.0;
    assert!(images::psnr(error) >= 24.0, "{:.2} dB", images::psnr(error));

    // Scale and shift make the latents about standard, which the diffusion model relies on.
    for (channel, plane) in latents.chunk(4, 1).into_iter().enumerate() {
        let scaled = values((plane - info.shift[channel]) * info.scale[channel]);
        let mean = scaled.iter().map(|&v| f64::from(v)).sum::<f64>() / scaled.len() as f64;
        let square = scaled.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / scaled.len() as f64;
        assert!(mean.abs() < 0.3 && (0.5..2.0).contains(&square), "channel {channel}: {mean} {square}");
    }
}
