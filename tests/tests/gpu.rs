//! Training by the GPU's code, under real mpirun, on whatever Vulkan finds: Mesa's llvmpipe plays a GPU on the CPU where
//! there is none. What is special to NVIDIA's, CUDA and NCCL, it does not see. In a build with the feature `wgpu`
//! (`make check-gpu`). Some three minutes on two cores.
#![cfg(feature = "wgpu")]

use std::path::Path;
use std::time::Duration;

use repa_tests::{Running, learned, log, loss_difference, mpirun, small_model, small_store};

const DEADLINE: Duration = Duration::from_secs(240);

const GPU: &str = "device=wgpu";

fn train(ranks: usize, store: &Path, run: &Path, more: &[&str]) {
    let mut arguments = small_model(store, run);
    // Small buckets and wide layers, so that tensors lie in several.
    let model = ["comm.bucket_mib=1", "model.hidden_size=128"];
    arguments.extend(model.iter().chain(more).map(|&a| a.to_owned()));
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    Running::start(&mut mpirun(ranks, &arguments)).wait(DEADLINE).expect_code(0);
}

/// By how much arrays differ: the norm of the difference, of the norm.
fn differences(a: &Path, b: &Path) -> Vec<f64> {
    let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    let pairs = learned(a).into_iter().zip(learned(b));
    pairs
        .map(|(a, b)| norm(&mut a.iter().zip(b.iter()).map(|(a, b)| a - b)) / norm(&mut a.iter().copied()))
        .collect()
}

#[track_caller]
fn same(a: &Path, b: &Path) {
    let losses = loss_difference(&log(a), &log(b));
    let arrays = differences(a, b);
    eprintln!("{} against {}: losses {losses:.2e}, arrays {arrays:?}", b.display(), a.display());
    assert!(losses < 1e-4 && arrays.iter().all(|&difference| difference < 1e-3));
}

#[test]
fn a_gpu_learns_what_the_cpu_learns() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = folder.path().join("store");
    small_store(&store, 23);
    let run = |name: &str| folder.path().join(name);
    train(1, &store, &run("cpu"), &[]);
    train(1, &store, &run("gpu"), &[GPU]);
    same(&run("cpu"), &run("gpu"));
    // Several ranks, which here talk by way of the host.
    for (name, more) in [
        ("ranks", &["train.micro_batch=2"][..]),
        ("at-end", &["comm.overlap=false"]),
        ("zero1", &["optimizer.sharding=zero1"]),
    ] {
        train(2, &store, &run(name), &[more, &[GPU]].concat());
        same(&run("cpu"), &run(name));
    }
}

#[test]
fn a_run_moves_between_cpu_and_gpu() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = folder.path().join("store");
    small_store(&store, 23);
    let run = |name: &str| folder.path().join(name);
    train(2, &store, &run("cpu"), &[]);
    train(2, &store, &run("moved"), &["train.steps=4"]);
    train(2, &store, &run("moved"), &["train.steps=8", "optimizer.sharding=zero1", GPU]);
    train(1, &store, &run("moved"), &[]);
    same(&run("cpu"), &run("moved"));
}

#[test]
fn grids_are_drawn_on_a_gpu() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = folder.path().join("store");
    small_store(&store, 23);
    let autoencoder =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../trainer/assets/quickstart-autoencoder.safetensors");
    let autoencoder = format!("sample.autoencoder={}", autoencoder.display());
    let grids = [
        "sample.training.every=12",
        "sample.training.per_class=1",
        "sample.training.num_steps=2",
        &autoencoder,
    ];
    let [cpu, gpu] = [("cpu", "device=cpu"), ("gpu", GPU)].map(|(name, device)| {
        let run = folder.path().join(name);
        train(2, &store, &run, &[&grids[..], &[device]].concat());
        let grid = image::open(run.join("samples/step-00000012.png")).expect("a PNG");
        grid.into_rgb8().into_raw()
    });
    let most = cpu.iter().zip(&gpu).map(|(a, b)| a.abs_diff(*b)).max();
    assert!(cpu.len() == gpu.len() && most <= Some(2), "pixels differ by {most:?}");
}
