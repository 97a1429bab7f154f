use std::collections::BTreeMap;

use super::*;
use crate::data::emoji::{self, CLASSES, RESOLUTION};
use crate::weights::{Dtype, RawTensor};

const SMALL: VitConfig = VitConfig {
    family: Family::DinoV2,
    embed_dim: 16,
    depth: 2,
    num_heads: 2,
    patch_size: 4,
    registers: 4,
    swiglu: false,
    mlp_hidden: 40,
    grid: 5,
};

/// A model's first values as a weight file in the official layout.
fn official(config: &VitConfig) -> Weights {
    let layout = config.layout();
    let flat = layout.initial_values(5);
    let tensors = layout
        .entries()
        .iter()
        .map(|entry| {
            // Scaled up, so that attention is far from uniform.
            let values = &flat[entry.offset..entry.offset + entry.len()];
            let bytes = values.iter().flat_map(|x| (x * 5.0).to_le_bytes()).collect();
            (entry.name.clone(), RawTensor { dtype: Dtype::F32, shape: entry.shape.clone(), bytes })
        })
        .collect();
    let metadata = BTreeMap::from([("num_heads".to_owned(), config.num_heads.to_string())]);
    Weights { path: "small.safetensors".into(), tensors, metadata }
}

/// The same tensors under other names; a function gives each one's new names and pieces.
fn renamed(weights: &Weights, rename: impl Fn(&str) -> Vec<String>) -> Weights {
    let mut tensors = BTreeMap::new();
    for (name, tensor) in &weights.tensors {
        let names = rename(name);
        let piece = tensor.bytes.len() / names.len();
        for (name, bytes) in names.iter().zip(tensor.bytes.chunks(piece)) {
            let mut shape = tensor.shape.clone();
            shape[0] /= names.len();
            let part = RawTensor { dtype: tensor.dtype, shape, bytes: bytes.to_vec() };
            assert!(tensors.insert(name.clone(), part).is_none());
        }
    }
    Weights { tensors, ..weights.clone() }
}

/// Hugging Face's names for an official one; `newer` for those without `attention.attention`.
fn hugging_face(name: &str, newer: bool) -> Vec<String> {
    let top = match name {
        "cls_token" => "embeddings.cls_token",
        "pos_embed" => "embeddings.position_embeddings",
        "register_tokens" => "embeddings.register_tokens",
        "patch_embed.proj.weight" => "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias" => "embeddings.patch_embeddings.projection.bias",
        "norm.weight" => "layernorm.weight",
        "norm.bias" => "layernorm.bias",
        _ => "",
    };
    if !top.is_empty() {
        return vec![top.to_owned()];
    }
    let name = name.replace("blocks.", "encoder.layer.");
    if name.contains("attn.qkv") {
        let names = if newer {
            ["attention.q_proj", "attention.k_proj", "attention.v_proj"]
        } else {
            ["attention.attention.query", "attention.attention.key", "attention.attention.value"]
        };
        return names.map(|part| name.replace("attn.qkv", part)).to_vec();
    }
    let out = if newer { "attention.o_proj" } else { "attention.output.dense" };
    let name = name.replace("attn.proj", out).replace("mlp.w12", "mlp.weights_in");
    let name = name.replace("mlp.w3", "mlp.weights_out");
    let name = name.replace("ls1.gamma", "layer_scale1.lambda1").replace("ls2.gamma", "layer_scale2.lambda1");
    vec![name]
}

fn open(weights: &Weights) -> Result<VisionEncoder, EncoderError> {
    VisionEncoder::from_weights(weights, None, &Device::flex())
}

fn images(count: usize, size: usize) -> Vec<Image> {
    let pixels = |i: usize| (0..size * size * 3).map(|p| (p * (i + 3) * 7 % 251) as u8).collect();
    (0..count).map(|i| Image { width: size, height: size, pixels: pixels(i) }).collect()
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().unwrap()
}

fn outputs(weights: &Weights) -> Vec<f32> {
    let features = open(weights).unwrap_or_else(|e| panic!("{e}")).features(&images(2, 32)).unwrap();
    [values(features.patch_tokens), values(features.cls.expect("a class token"))].concat()
}

#[test]
fn the_published_models_have_the_published_numbers_of_parameters() {
    // As Hugging Face's model cards count them, the mask token included.
    for (size, count) in [('s', 22_056_576), ('b', 86_580_480), ('l', 304_368_640), ('g', 1_136_480_768)] {
        let config = VitConfig::published(size, false).unwrap();
        assert_eq!(config.layout().total_len() + config.embed_dim, count, "{size}");
        let with_registers = VitConfig::published(size, true).unwrap();
        assert_eq!(with_registers.layout().total_len(), config.layout().total_len() + 4 * config.embed_dim);
    }
    let giant = VitConfig::published('g', false).unwrap().layout();
    assert_eq!(giant.find("blocks.39.mlp.w12.weight").unwrap().shape, [8192, 1536]);
    assert_eq!(giant.find("blocks.39.mlp.w3.weight").unwrap().shape, [1536, 4096]);
}

#[test]
fn every_layout_gives_the_same_features() {
    for swiglu in [false, true] {
        let config = VitConfig { swiglu, ..SMALL };
        let file = official(&config);
        let expected = outputs(&file);
        assert!(expected.iter().all(|x| x.is_finite()));
        for newer in [false, true] {
            assert_eq!(outputs(&renamed(&file, |name| hugging_face(name, newer))), expected, "newer {newer}");
        }
        let chunks = renamed(&file, |name| {
            vec![name.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.1.1.")]
        });
        assert_eq!(outputs(&chunks), expected);

        let mut trained = renamed(&file, |name| vec![format!("teacher.backbone.{name}")]);
        let extra = RawTensor { dtype: Dtype::F32, shape: vec![1, 16], bytes: vec![0; 64] };
        trained.tensors.insert("teacher.backbone.mask_token".to_owned(), extra.clone());
        trained.tensors.insert("teacher.dino_head.last_layer.weight".to_owned(), extra);
        assert_eq!(outputs(&trained), expected);
    }
}

/// A small model of a family.
fn of_family(family: Family) -> VitConfig {
    VitConfig { family, registers: 0, ..SMALL }
}

fn tokens(weights: &Weights, family: Option<Family>) -> Result<Vec<f32>, EncoderError> {
    let encoder = VisionEncoder::from_weights(weights, family, &Device::flex())?;
    Ok(values(encoder.features(&images(2, 32))?.patch_tokens))
}

/// OpenAI's names for CLIP's, without the dimension of the batch.
fn openai(weights: &Weights) -> Weights {
    let mut file = renamed(weights, |name| {
        let name = name.replace("blocks.", "transformer.resblocks.").replace("norm_pre", "ln_pre");
        let name = name.replace("attn.qkv.", "attn.in_proj_").replace("attn.proj", "attn.out_proj");
        let name = name.replace("norm1", "ln_1").replace("norm2", "ln_2");
        let name = name.replace("fc1", "c_fc").replace("fc2", "c_proj").replace("patch_embed.proj", "conv1");
        let name = name.replace("cls_token", "class_embedding").replace("pos_embed", "positional_embedding");
        vec![format!("visual.{name}")]
    });
    for (name, shape) in [("class_embedding", vec![16]), ("positional_embedding", vec![26, 16])] {
        file.tensors.get_mut(&format!("visual.{name}")).unwrap().shape = shape;
    }
    let norm = file.tensors["visual.ln_pre.bias"].clone();
    for beside in
        ["visual.ln_post.weight", "visual.ln_post.bias", "visual.proj", "transformer.resblocks.0.ln_1.bias"]
    {
        file.tensors.insert(beside.to_owned(), norm.clone());
    }
    file
}

/// Hugging Face's names for CLIP's.
fn hugging_face_clip(weights: &Weights) -> Weights {
    renamed(weights, |name| {
        if name.contains("attn.qkv") {
            let name = name.replace("blocks.", "vision_model.encoder.layers.");
            return ["q", "k", "v"]
                .map(|p| name.replace("attn.qkv", &format!("self_attn.{p}_proj")))
                .to_vec();
        }
        let name = name.replace("blocks.", "encoder.layers.").replace("norm_pre", "pre_layrnorm");
        let name = name.replace("attn.proj", "self_attn.out_proj").replace("norm", "layer_norm");
        let name = name.replace("pre_layrlayer_norm", "pre_layrnorm");
        let name = name.replace("patch_embed.proj", "embeddings.patch_embedding");
        let name = name.replace("cls_token", "embeddings.class_embedding");
        vec![format!("vision_model.{}", name.replace("pos_embed", "embeddings.position_embedding.weight"))]
    })
}

/// Hugging Face's names for a plain vision transformer's.
fn hugging_face_vit(weights: &Weights) -> Weights {
    renamed(weights, |name| {
        let names = hugging_face(name, false);
        let renamed = |name: &String| {
            let name = name.replace("norm1", "layernorm_before").replace("norm2", "layernorm_after");
            let name = name.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense");
            format!("vit.{name}")
        };
        names.iter().map(renamed).collect()
    })
}

#[test]
fn families_are_read_in_their_own_layouts() {
    for family in Family::ALL {
        let file = official(&of_family(family));
        let expected = tokens(&file, Some(family)).unwrap_or_else(|e| panic!("{family}: {e}"));
        let layouts = match family {
            Family::DinoV2 => continue,
            Family::Clip => vec![openai(&file), hugging_face_clip(&file)],
            _ => vec![hugging_face_vit(&file)],
        };
        for layout in layouts {
            assert_eq!(tokens(&layout, Some(family)).unwrap_or_else(|e| panic!("{family}: {e}")), expected);
        }
        let shown = matches!(family, Family::IJepa | Family::Clip);
        match tokens(&file, None) {
            Ok(tokens) => assert!(shown && tokens == expected, "{family}"),
            Err(error) => assert!(!shown && error.to_string().contains("mae:small.safetensors"), "{error}"),
        }
    }
}

#[test]
fn what_only_training_needs_is_left_out() {
    let file = official(&of_family(Family::MoCoV3));
    let expected = tokens(&file, Some(Family::MoCoV3)).unwrap();
    // As MoCo's checkpoint names them, with the head that it trained, and its momentum encoder.
    let mut trained = renamed(&file, |name| vec![format!("module.base_encoder.{name}")]);
    let other = trained.tensors["module.base_encoder.norm.bias"].clone();
    for name in
        ["base_encoder.head.0.weight", "momentum_encoder.patch_embed.proj.weight", "predictor.0.weight"]
    {
        trained.tensors.insert(format!("module.{name}"), other.clone());
    }
    assert_eq!(tokens(&trained, Some(Family::MoCoV3)).unwrap(), expected);

    // MAE's features are those before the final norm, which its files have.
    let mut file = official(&of_family(Family::DinoV1));
    let decoder = file.tensors["norm.bias"].clone();
    for name in ["decoder_embed.bias", "decoder_blocks.0.norm1.bias", "mask_token"] {
        file.tensors.insert(name.to_owned(), decoder.clone());
    }
    let before = tokens(&file, Some(Family::Mae)).unwrap();
    assert_ne!(before, tokens(&file, Some(Family::DinoV1)).unwrap());
    *file.tensors.get_mut("norm.bias").unwrap() = RawTensor { bytes: [1; 64].to_vec(), ..decoder };
    assert_eq!(tokens(&file, Some(Family::Mae)).unwrap(), before);
}

#[test]
fn wrong_names_of_a_published_moco_are_mended() {
    let config = VitConfig { depth: 15, ..of_family(Family::MoCoV3) };
    let file = official(&config);
    let published = renamed(&file, |name| {
        let name = name.replace("13.norm1.", "13.norm13.").replace("13.mlp.fc1.", "13.mlp.fc13.");
        vec![name.replace("14.norm2.", "14.norm14.").replace("14.mlp.fc2.", "14.mlp.fc14.")]
    });
    assert_ne!(published.tensors, file.tensors);
    assert_eq!(
        tokens(&published, Some(Family::MoCoV3)).unwrap(),
        tokens(&file, Some(Family::MoCoV3)).unwrap()
    );
}

#[test]
fn heads_are_those_of_the_published_models() {
    let of = |family: Family, widths: &[usize]| widths.iter().map(|&w| family.heads(w)).collect::<Vec<_>>();
    assert_eq!(of(Family::DinoV2, &[384, 768, 1024, 1536]), [6, 12, 16, 24]);
    assert_eq!(of(Family::DinoV1, &[384, 768]), [6, 12]);
    assert_eq!(of(Family::MoCoV3, &[384, 768, 1024]), [12, 12, 16]);
    assert_eq!(of(Family::Mae, &[768, 1024, 1280]), [12, 16, 16]);
    assert_eq!(of(Family::IJepa, &[1280, 1408]), [16, 16]);
    assert_eq!(of(Family::Clip, &[768, 1024]), [12, 16]);
}

#[test]
fn the_shape_is_read_from_the_tensors() {
    for config in [SMALL, VitConfig { registers: 0, swiglu: true, mlp_hidden: 24, grid: 8, ..SMALL }] {
        assert_eq!(*open(&official(&config)).unwrap().config(), config);
    }
}

#[test]
fn registers_change_the_features_but_not_their_number() {
    let file = official(&SMALL);
    let mut without = file.clone();
    without.tensors.remove("register_tokens");
    let (with, without) = (open(&file).unwrap(), open(&without).unwrap());
    let tokens = |encoder: &VisionEncoder| encoder.features(&images(1, 32)).unwrap().patch_tokens;
    assert_eq!(tokens(&with).dims(), [1, 49, 16]);
    assert_eq!(tokens(&without).dims(), [1, 49, 16]);
    let difference = (tokens(&with) - tokens(&without)).abs().max().into_scalar::<f32>();
    assert!(difference > 1e-2, "{difference}");
}

#[test]
fn showing_all_patches_is_the_plain_forward_pass() {
    let encoder = open(&official(&SMALL)).unwrap();
    let input = encoder.preprocess(preprocess::to_tensor(&images(2, 32), &Device::flex()).unwrap()).unwrap();
    let visible = |numbers: &[i32]| {
        let numbers = Tensor::from_data(numbers, &Device::flex());
        encoder.model.forward_visible(input.clone(), numbers).patch_tokens
    };
    let all: Vec<i32> = (0..49).collect();
    let plain = encoder.model.forward(input.clone()).patch_tokens;
    assert_eq!(values(visible(&all)), values(plain.clone()));
    let some = visible(&[3, 40]);
    assert_eq!(some.dims(), [2, 2, 16]);
    let difference = (some - plain.narrow(1, 3, 2)).abs().max().into_scalar::<f32>();
    assert!(difference > 1e-3, "fewer patches to attend to: {difference}");
}

#[test]
fn an_image_has_the_same_features_in_any_batch() {
    let encoder = open(&official(&SMALL)).unwrap();
    let set = images(3, 32);
    let together = encoder.features(&set).unwrap().patch_tokens;
    let alone = encoder.features(&set[2..]).unwrap().patch_tokens;
    let difference = (together.narrow(0, 2, 1) - alone).abs().max().into_scalar::<f32>();
    assert!(difference < 1e-5, "{difference}");
}

#[test]
fn the_wrong_file_is_named_with_what_is_wrong() {
    let message = |change: &dyn Fn(&mut Weights)| {
        let mut file = official(&SMALL);
        change(&mut file);
        open(&file).expect_err("a wrong file").to_string()
    };
    let expect = |text: String, parts: &[&str]| {
        assert!(text.contains("small.safetensors") && parts.iter().all(|p| text.contains(p)), "{text}");
    };
    expect(
        message(&|f| {
            f.tensors.remove("blocks.1.attn.proj.bias");
            f.tensors.get_mut("norm.weight").unwrap().shape = vec![4, 4];
            let extra = f.tensors["norm.bias"].clone();
            f.tensors.insert("classifier.weight".to_owned(), extra);
        }),
        &[
            "missing: blocks.1.attn.proj.bias",
            "unexpected: classifier.weight",
            "misshapen: norm.weight is [4, 4] where [16] belongs",
        ],
    );
    expect(
        message(&|f| drop(f.tensors.remove("patch_embed.proj.weight"))),
        &["none of patch_embed.proj.weight", "blocks.0.attn.proj.bias"],
    );
    expect(message(&|f| drop(f.tensors.remove("cls_token"))), &["missing: cls_token"]);
    expect(
        message(&|f| drop(f.tensors.remove("blocks.0.mlp.fc1.weight"))),
        &["blocks.0.mlp.fc1.weight is missing"],
    );
    expect(
        message(&|f| f.tensors.get_mut("pos_embed").unwrap().shape = vec![1, 28, 16]),
        &["27 patch positions", "no square grid"],
    );
    expect(message(&|f| drop(f.metadata.remove("num_heads"))), &["0 heads", "metadata num_heads"]);
    expect(message(&|f| drop(f.metadata.insert("num_heads".to_owned(), "two".to_owned()))), &["\"two\""]);
    // One of the three projections is missing: the other two are said to be left over.
    let mut file = renamed(&official(&SMALL), |name| hugging_face(name, false));
    file.tensors.remove("encoder.layer.0.attention.attention.key.weight");
    let text = open(&file).expect_err("a missing key").to_string();
    expect(text, &["missing: blocks.0.attn.qkv.weight", "unexpected: blocks.0.attn.q.weight"]);
}

#[test]
fn a_stray_block_number_makes_no_huge_model() {
    let mut file = official(&SMALL);
    let extra = file.tensors["norm.bias"].clone();
    file.tensors.insert(format!("blocks.{}.norm1.bias", usize::MAX), extra);
    assert!(open(&file).is_err());
}

#[test]
fn images_that_do_not_fit_are_refused() {
    let encoder = open(&official(&SMALL)).unwrap();
    assert_eq!(encoder.grid(32).unwrap(), (7, 7));
    assert_eq!(encoder.tokens(32), (7, 7));
    let refused = |images: &[Image]| encoder.features(images).expect_err("refused").to_string();
    assert!(refused(&[]).contains("no images"));
    assert!(refused(&images(1, 30)).contains("30 pixels"), "{}", refused(&images(1, 30)));
    assert!(refused(&images(1, 40)).contains("35 pixels"), "{}", refused(&images(1, 40)));
    let mixed = [images(1, 32), images(1, 64)].concat();
    assert!(refused(&mixed).contains("image 1 is (64, 64)"), "{}", refused(&mixed));
    let wide = Image { width: 8, height: 4, pixels: vec![0; 96] };
    assert!(refused(&[wide]).contains("square"));
}

#[test]
fn dinov2_sees_256_pixels_at_224() {
    assert_eq!(Preprocess::DINOV2.input_size(256), Some(224));
    assert_eq!(Preprocess::DINOV2.input_size(512), Some(448));
    assert_eq!(Preprocess::DINOV2.input_size(0), None);
    let white = Image { width: 8, height: 8, pixels: vec![255; 192] };
    let input = Preprocess::DINOV2.apply(preprocess::to_tensor(&[white], &Device::flex()).unwrap()).unwrap();
    assert_eq!(input.dims(), [1, 3, 7, 7]);
    assert!((values(input)[0] - (1.0 - 0.485) / 0.229).abs() < 1e-5);
}

/// The images of the quickstart, to train on and held out, with their labels.
fn split() -> [(Vec<Image>, Vec<usize>); 2] {
    let (test, train): (Vec<_>, Vec<_>) = emoji::all().into_iter().partition(emoji::held_out);
    [train, test]
        .map(|set| (set.iter().map(emoji::Emoji::image).collect(), set.iter().map(|e| e.label).collect()))
}

#[test]
fn the_shipped_teacher_tells_classes_better_than_pixels_do() {
    let device = Device::flex();
    let teacher = quickstart(&device);
    assert_eq!(teacher.tokens(RESOLUTION), (8, 8));
    let random = {
        let config = teacher.config().clone();
        let flat = config.layout().initial_values(0);
        let data = Params::from_flat(&Arc::new(config.layout()), &flat, &device);
        VisionEncoder { model: Vit::bind(&config, &data), ..teacher.clone() }
    };
    let [(train, train_labels), (test, test_labels)] = split();
    let features = |encoder: &VisionEncoder, set: &[Image]| {
        let parts = set.chunks(64).map(|images| encoder.features(images).unwrap().patch_tokens);
        Tensor::cat(parts.collect(), 0)
    };
    let mean = |tokens: &Tensor<3>| tokens.clone().mean_dim(1).reshape([-1, 96]);
    let all = |tokens: &Tensor<3>| tokens.clone().reshape([-1, 64 * 96]);
    let half = RESOLUTION / 2;
    let pixels = |set: &[Image]| {
        let x = preprocess::to_tensor(set, &device).unwrap().reshape([set.len(), 3, half, 2, half, 2]);
        x.mean_dim(5).mean_dim(3).reshape([set.len(), 3 * half * half])
    };
    let probe = |train: Tensor<2>, test: Tensor<2>| {
        probe::accuracy(train, &train_labels, test, &test_labels, CLASSES.len())
    };
    let trained = [features(&teacher, &train), features(&teacher, &test)];
    let random = [features(&random, &train), features(&random, &test)];
    let pixels = probe(pixels(&train), pixels(&test));
    let by_mean = probe(mean(&trained[0]), mean(&trained[1]));
    let by_all = probe(all(&trained[0]), all(&trained[1]));
    let random = probe(mean(&random[0]), mean(&random[1]));
    assert!(by_mean > pixels + 0.03, "mean patch token {by_mean}, pixels {pixels}");
    assert!(by_mean > random + 0.05, "mean patch token {by_mean}, of random weights {random}");
    assert!(by_all > pixels + 0.05, "all patch tokens {by_all}, pixels {pixels}");
}

#[test]
fn a_pytorch_file_of_another_model_is_refused() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/reference-checkpoint.pt");
    let text = VisionEncoder::open(&path, None, &Device::flex()).expect_err("a SiT checkpoint").to_string();
    assert!(
        text.contains("reference-checkpoint.pt") && text.contains("none of patch_embed.proj.weight"),
        "{text}"
    );
}

#[test]
fn the_shipped_teacher_is_small() {
    assert!(QUICKSTART.len() < 3 << 20, "{} bytes", QUICKSTART.len());
    let weights = Weights::from_safetensors("teacher".as_ref(), QUICKSTART).unwrap();
    assert!(weights.tensors.values().all(|t| t.dtype == Dtype::F16));
    for name in weights.tensors.keys() {
        assert!(weights.f32(name).unwrap().iter().all(|x| x.is_finite()), "{name}");
    }
}
