//! docs/imagenet.md, command by command, on a tree of the same shape: 256-pixel images, a VAE that halves
//! them three times and an encoder as wide as DINOv2-B, both shallow and random. Some 15 s on two cores.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use repa_tests::{Running, binary, random_weights};
use repa_trainer::autoencoder::kl::KlConfig;
use repa_trainer::encoder::vit::VitConfig;
use repa_trainer::evaluate::Inception;
use repa_trainer::figures::NpzWriter;
use repa_trainer::images::Image;

const GUIDE: &str = include_str!("../../docs/imagenet.md");
const DEADLINE: Duration = Duration::from_secs(120);

/// A model that trains in no time, where the guide trains XL/2. Everything else is the guide's.
const SMALL: &str = " model.hidden_size=32 model.depth=2 model.num_heads=2 alignment.encoder_depth=1 \
                     alignment.projector_dim=16 model.num_classes=3 train.global_batch=4 train.steps=2 \
                     checkpoint.every=0 train.precision=f32";

/// The commands of all fenced shell blocks, continued lines joined.
fn commands() -> Vec<String> {
    let blocks = GUIDE.split("```sh\n").skip(1).map(|rest| rest.split("```").next().unwrap_or(rest));
    blocks
        .flat_map(|block| block.replace("\\\n", " ").lines().map(str::to_owned).collect::<Vec<_>>())
        .filter(|line| !line.trim().is_empty())
        .collect()
}

fn image(width: u32, height: u32, seed: u32) -> image::RgbImage {
    image::RgbImage::from_fn(width, height, |x, y| {
        image::Rgb([x * seed % 251, y * 3 % 253, (x + y) * 5 % 247].map(|v| v as u8))
    })
}

/// ImageNet's tree with three classes of two images each, and the weights.
fn lay_out(root: &Path) {
    let train = root.join("ILSVRC/Data/CLS-LOC/train");
    for (class, size) in [("n01440764", (500, 375)), ("n01443537", (280, 400)), ("n01484850", (256, 256))] {
        std::fs::create_dir_all(train.join(class)).expect("a class");
        for i in 0..2 {
            let path = train.join(class).join(format!("{class}_{i}.JPEG"));
            image(size.0, size.1, 7 + i).save_with_format(path, image::ImageFormat::Jpeg).expect("an image");
        }
    }
    let weights = root.join("weights/sd-vae-ft-ema");
    std::fs::create_dir_all(&weights).expect("a folder");
    let config = r#"{"block_out_channels": [4, 4, 8, 8], "layers_per_block": 1, "norm_num_groups": 4}"#;
    std::fs::write(weights.join("config.json"), config).expect("written");
    let kl = KlConfig::from_json(Path::new("config.json"), config).expect("a configuration");
    random_weights(&weights.join("diffusion_pytorch_model.safetensors"), &kl.layout(), &[]);
    let published = VitConfig::published('b', false).expect("published");
    let shallow = VitConfig { depth: 1, ..published };
    random_weights(&root.join("weights/dinov2_vitb14_pretrain.pth"), &shallow.layout(), &[]);
    random_weights(&root.join("weights/pt_inception-2015-12-05-6726825d.pth"), &Inception::layout(), &[]);
    let batch = root.join("weights/VIRTUAL_imagenet256_labeled.npz");
    let mut batch = NpzWriter::create(&batch, 4, 256, 256).expect("created");
    for seed in 1..5 {
        let pixels = image(256, 256, seed).into_raw();
        batch.push(&Image { width: 256, height: 256, pixels }).expect("pushed");
    }
    batch.finish().expect("finished");
    let configs = root.join("configs");
    std::fs::create_dir_all(&configs).expect("a folder");
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/sit-xl2-repa.toml");
    std::fs::copy(here, configs.join("sit-xl2-repa.toml")).expect("copied");
}

/// REPA's preprocessed tree of the same images.
fn lay_out_repa(root: &Path) {
    let mut labels = Vec::new();
    for i in 0..6u32 {
        for top in ["vae-sd", "images"] {
            std::fs::create_dir_all(root.join("data/repa").join(top).join("00000")).expect("a folder");
        }
        let name = format!("00000/img-mean-std-{i:08}.npy");
        let moments: Vec<f32> = (0..8 * 32 * 32).map(|k| (k as f32 * 0.01 + i as f32).sin().abs()).collect();
        let bytes = repa_trainer::data::source::npy::to_bytes(&[8, 32, 32], &moments);
        std::fs::write(root.join("data/repa/vae-sd").join(&name), bytes).expect("written");
        let picture = root.join(format!("data/repa/images/00000/img{i:08}.png"));
        image(256, 256, i + 1).save(picture).expect("an image");
        labels.push(serde_json::json!([name, i % 3]));
    }
    let json = serde_json::json!({ "labels": labels });
    std::fs::write(root.join("data/repa/vae-sd/dataset.json"), json.to_string()).expect("written");
}

#[test]
fn every_command_of_the_guide_works() {
    let folder = tempfile::tempdir().expect("a folder");
    let root = folder.path();
    lay_out(root);
    lay_out_repa(root);
    let mut seen = Vec::new();
    for command in commands() {
        let small = if command.contains(" train ") { SMALL } else { "" };
        let scratch = root.join("scratch").display().to_string();
        // What a machine without GPUs, of two cores, and a test's folder make different.
        let here = format!("{command}{small}")
            .replace(" --device cuda", "")
            .replace("device=cuda ", "")
            .replace("device=cuda", "")
            .replace("-n 8", "-n 2")
            .replace("-n 4", "-n 2")
            .replace("/scratch", &scratch)
            .replace("--per-class 1", "--per-class 1 sample.solver.num_steps=2")
            .replace("--samples 50000", "--samples 4")
            .replace("evaluate --run", "evaluate --samples 4 --run")
            .replace("num_steps=250", "num_steps=2")
            .replace("repa-dist", &binary().display().to_string())
            .replace("mpirun", "mpirun --allow-run-as-root --oversubscribe --bind-to none");
        let mut shell = Command::new("sh");
        shell.args(["-ec", &here]).current_dir(root);
        let ended = Running::start(&mut shell).wait(DEADLINE);
        assert_eq!(ended.code, Some(0), "{here}\nstdout:\n{}\nstderr:\n{}", ended.stdout, ended.stderr);
        seen.push(command);
    }
    assert!(seen.len() >= 9, "{seen:#?}");
    for word in [
        "data encode",
        "data info",
        "data verify",
        "data import",
        "data stage",
        "train",
        "sample",
        "evaluate",
    ] {
        assert!(seen.iter().any(|c| c.contains(word)), "the guide has no {word}");
    }
}
