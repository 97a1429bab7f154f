//! Training by the GPU's code, under real mpirun, on GPUs that the CPU plays: by Vulkan, where Mesa's llvmpipe is one, and
//! by CUDA, whose driver, NVRTC and NCCL `tests/stand_in` stands in for. In a build with the features `wgpu` and `cuda`
//! (`make check-gpu`). Some ten minutes on two cores.
#![cfg(any(feature = "wgpu", feature = "cuda"))]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use repa_tests::{Running, learned, log, loss_difference, mpirun, small_model, small_store};

const DEADLINE: Duration = Duration::from_secs(400);

#[cfg(feature = "wgpu")]
const VULKAN: &str = "device=wgpu";
#[cfg(feature = "cuda")]
const CUDA: &str = "device=cuda";

/// A store, and runs that train on it.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        small_store(&folder.path().join("store"), 23);
        // As little tuning as there can be: each candidate is a kernel to compile, and slow to run.
        let tuning = "[autotune]\nlevel = \"minimal\"\n[autotune.bench]\nmin_samples = 1\nmax_samples = 1\n";
        std::fs::write(folder.path().join("cubecl.toml"), tuning).expect("a file");
        Self { folder }
    }

    fn run(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, ranks: usize, name: &str, more: &[&str]) -> Command {
        let mut arguments = small_model(&self.folder.path().join("store"), &self.run(name));
        // Small buckets and wide layers, so that tensors lie in several.
        let model = ["comm.bucket_mib=1", "model.hidden_size=128"];
        arguments.extend(model.iter().chain(more).map(|&a| a.to_owned()));
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut command = mpirun(ranks, &arguments);
        command.current_dir(self.folder.path());
        stand_in(&mut command, &self.run(name));
        command
    }

    fn train(&self, ranks: usize, name: &str, more: &[&str]) {
        Running::start(&mut self.command(ranks, name, more)).wait(DEADLINE).expect_code(0);
    }

    #[track_caller]
    fn same(&self, a: &str, b: &str) {
        let (a, b) = (self.run(a), self.run(b));
        let losses = loss_difference(&log(&a), &log(&b));
        let arrays = differences(&a, &b);
        eprintln!("{} against {}: losses {losses:.2e}, arrays {arrays:?}", b.display(), a.display());
        assert!(losses < 1e-4 && arrays.iter().all(|&difference| difference < 1e-3));
    }
}

/// Gives a command GPUs of CUDA, and a report of theirs in `run`. Nothing else sees them.
fn stand_in(command: &mut Command, run: &Path) {
    let made = Path::new(env!("CARGO_TARGET_TMPDIR")).join("stand-in");
    // Processes run side by side, and one of them builds.
    std::fs::create_dir_all(made.join("kernels")).expect("a folder");
    let lock = std::fs::File::create(made.join("lock")).expect("a file");
    lock.lock().expect("a lock");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("stand_in/build.sh");
    let output = Command::new("sh").arg(script).arg(made.join("libraries")).output().expect("sh");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let libraries = made.join("libraries");
    let path = format!("{}:{}", libraries.join("nvrtc").display(), libraries.display());
    command
        .env("LD_LIBRARY_PATH", path)
        .env("CUDA_PATH", &made)
        .env("STAND_IN_GPUS", "2")
        .env("STAND_IN_CAPABILITY", "75")
        .env("STAND_IN_KERNELS", made.join("kernels"))
        .env("STAND_IN_REPORT", format!("{}-%d", run.display()));
}

/// What the stand-in has counted in a rank of a run.
#[cfg(feature = "cuda")]
fn counted(run: &Path, rank: usize, what: &str) -> u64 {
    let path = format!("{}-{rank}", run.display());
    let report = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let value = report.lines().find_map(|line| line.strip_prefix(what)?.trim().parse().ok());
    value.unwrap_or_else(|| panic!("no {what} in {report}"))
}

/// By how much arrays differ: the norm of the difference, of the norm.
fn differences(a: &Path, b: &Path) -> Vec<f64> {
    let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    let pairs = learned(a).into_iter().zip(learned(b));
    pairs
        .map(|(a, b)| norm(&mut a.iter().zip(b.iter()).map(|(a, b)| a - b)) / norm(&mut a.iter().copied()))
        .collect()
}

#[cfg(feature = "wgpu")]
#[test]
fn a_gpu_learns_what_the_cpu_learns() {
    let place = Place::new();
    place.train(1, "cpu", &[]);
    place.train(1, "gpu", &[VULKAN]);
    place.same("cpu", "gpu");
    // Several ranks, which here talk by way of the host.
    for (name, more) in [
        ("ranks", &["train.micro_batch=2"][..]),
        ("at-end", &["comm.overlap=false"]),
        ("zero1", &["optimizer.sharding=zero1"]),
    ] {
        place.train(2, name, &[more, &[VULKAN]].concat());
        place.same("cpu", name);
    }
}

/// Several ranks sum over NCCL, in the GPU's memory: nothing but losses, norms and checkpoints comes to the host.
#[cfg(feature = "cuda")]
#[test]
fn cuda_learns_what_the_cpu_learns() {
    let place = Place::new();
    place.train(1, "cpu", &[]);
    place.train(1, "gpu", &[CUDA]);
    place.same("cpu", "gpu");
    let parameters: u64 = learned(&place.run("cpu"))[0].len() as u64;
    for (name, ranks, more) in [
        ("ranks", 2, &["train.micro_batch=2"][..]),
        ("at-end", 2, &["comm.overlap=false"]),
        ("zero1", 2, &["optimizer.sharding=zero1"]),
    ] {
        place.train(ranks, name, &[more, &[CUDA]].concat());
        place.same("cpu", name);
        let steps = 12;
        for rank in 0..ranks {
            let of = |what| counted(&place.run(name), rank, what);
            let shares = if name == "zero1" { ranks as u64 } else { 1 };
            // Parts of buckets are rounded up.
            let near = |found: u64, expected: u64| found >= expected && found < expected + expected / 20;
            let (reduced, gathered) = (of("reduced"), of("gathered"));
            assert!(near(reduced, steps * parameters / shares), "{name}: {reduced} summed, of {parameters}");
            let expected = if name == "zero1" { steps * parameters / shares } else { 0 };
            assert!(near(gathered, expected) || gathered == expected, "{name}: {gathered} gathered");
            // A checkpoint has four arrays, float32; a step has less than a tenth of one.
            let downloaded = of("downloaded");
            assert!(downloaded < 4 * (4 * parameters + parameters), "{name}: {downloaded} bytes came down");
        }
    }
}

/// All that training, its optimizer and its sample grids launch compiles for a Hopper GPU, by NVIDIA's own compiler; it
/// does not run.
#[cfg(feature = "cuda")]
#[test]
fn cuda_kernels_compile() {
    let versions = ["runtime==13.0.96", "crt==13.0.88", "cccl==13.0.85", "nvrtc==13.0.88"];
    let mut packages = vec!["--no-deps".to_owned()];
    packages.extend(versions.map(|version| format!("nvidia-cuda-{version}")));
    let packages: Vec<&str> = packages.iter().map(String::as_str).collect();
    let toolkit = match repa_tests::python::package("nvrtc", &packages) {
        Ok(folder) => folder.join("nvidia/cu13"),
        Err(reason) => {
            println!("skipped: {reason}");
            return;
        }
    };
    let place = Place::new();
    let autoencoder = autoencoder();
    for (name, precision) in [("float32", "f32"), ("bfloat16", "bf16"), ("float16", "f16")] {
        let precision = format!("train.precision={precision}");
        let more = [CUDA, "optimizer.sharding=zero1", "train.steps=3", &precision];
        let mut command =
            place.command(2, name, &[&more[..], &grids("sample.training.every=3", &autoencoder)].concat());
        let libraries = Path::new(env!("CARGO_TARGET_TMPDIR")).join("stand-in/libraries");
        let path = format!("{}:{}", toolkit.join("lib").display(), libraries.display());
        command.env("LD_LIBRARY_PATH", path).env("CUDA_PATH", &toolkit).env("STAND_IN_EMPTY", "1");
        command.env_remove("STAND_IN_CAPABILITY").env_remove("STAND_IN_KERNELS");
        Running::start(&mut command).wait(DEADLINE).expect_code(0);
        for rank in 0..2 {
            let of = |what| counted(&place.run(name), rank, what);
            println!("{name}, rank {rank}: {} kernels, {} launches", of("kernels"), of("launches"));
            assert!(of("kernels") > 50 && of("launches") > of("kernels"));
        }
    }
}

/// Matrix products in bfloat16, sums in bfloat16 between ranks.
#[cfg(feature = "cuda")]
#[test]
fn cuda_in_half_precision_learns_what_the_cpu_learns() {
    let place = Place::new();
    let half = "train.precision=bf16";
    place.train(2, "cpu", &[half]);
    for (name, more) in [("plain", &[][..]), ("wire", &["comm.wire=bf16"])] {
        place.train(2, name, &[&[half, CUDA], more].concat());
        let losses = loss_difference(&log(&place.run("cpu")), &log(&place.run(name)));
        eprintln!("{name}: {losses:.2e}");
        assert!(losses < 2e-3, "{name}: losses differ by {losses}");
        assert!(losses > 1e-8, "{name}: CPU and GPU do not round alike");
    }
}

#[cfg(feature = "wgpu")]
#[test]
fn a_run_moves_between_cpu_and_gpu() {
    let place = Place::new();
    place.train(2, "cpu", &[]);
    place.train(2, "moved", &["train.steps=4"]);
    place.train(2, "moved", &["train.steps=8", "optimizer.sharding=zero1", VULKAN]);
    place.train(1, "moved", &[]);
    place.same("cpu", "moved");
}

#[cfg(feature = "wgpu")]
#[test]
fn grids_are_drawn_on_a_gpu() {
    let place = Place::new();
    let autoencoder = autoencoder();
    let [cpu, gpu] = [("cpu", "device=cpu"), ("gpu", VULKAN)].map(|(name, device)| {
        place.train(2, name, &[&grids("sample.training.every=12", &autoencoder)[..], &[device]].concat());
        let grid = image::open(place.run(name).join("samples/step-00000012.png")).expect("a PNG");
        grid.into_rgb8().into_raw()
    });
    let most = cpu.iter().zip(&gpu).map(|(a, b)| a.abs_diff(*b)).max();
    assert!(cpu.len() == gpu.len() && most <= Some(2), "pixels differ by {most:?}");
}

/// The setting that names the quickstart's.
fn autoencoder() -> String {
    let path = "../trainer/assets/quickstart-autoencoder.safetensors";
    format!("sample.autoencoder={}", Path::new(env!("CARGO_MANIFEST_DIR")).join(path).display())
}

/// Settings for small grids as often as `every` says.
fn grids<'a>(every: &'a str, autoencoder: &'a str) -> Vec<&'a str> {
    vec![every, "sample.training.per_class=1", "sample.training.num_steps=2", autoencoder]
}
