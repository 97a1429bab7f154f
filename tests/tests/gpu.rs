//! Training by the GPU's code, under real mpirun, on GPUs that the CPU plays: by Vulkan, where Mesa's llvmpipe is one, and
//! by CUDA, whose driver, NVRTC and NCCL `tests/stand_in` stands in for. In a build with the features `wgpu` and `cuda`
//! (`make check-gpu`). Some seven minutes on two cores. With `REPA_TEST_GPU=nvidia` (`make check-nvidia`) CUDA is the
//! real one, and the quickstart is trained as well.
#![cfg(any(feature = "wgpu", feature = "cuda"))]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use repa_tests::stand_in::StandIn;
use repa_tests::{Running, learned, log, loss_difference, mpirun, small_model, small_store};

const DEADLINE: Duration = Duration::from_secs(400);

#[cfg(feature = "wgpu")]
const VULKAN: &str = "device=wgpu";
#[cfg(feature = "cuda")]
const CUDA: &str = "device=cuda";

/// Whether CUDA is NVIDIA's, and not the stand-in's.
fn nvidia() -> bool {
    std::env::var_os("REPA_TEST_GPU").is_some_and(|name| name == "nvidia")
}

/// Settings by which so many ranks train by CUDA. Real GPUs may be fewer than ranks: NCCL 2.30 and later have several on
/// one, and with an older one they sum by way of the host.
#[cfg(feature = "cuda")]
fn cuda(ranks: usize) -> Vec<&'static str> {
    if !nvidia() {
        return vec![CUDA];
    }
    let found = repa_comm::nccl::available();
    eprintln!("{found:?}");
    match found {
        Ok(found) if found.gpus >= ranks => vec![CUDA],
        Ok(found) if found.shares_gpus => vec!["device=cuda:0"],
        _ => vec!["device=cuda:0", "comm.backend=mpi"],
    }
}

/// A store, and runs that train on it.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        small_store(&folder.path().join("store"), 23);
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
        // NVIDIA's tensor cores multiply float32 with ten bits of fraction.
        let (of_losses, of_arrays) = if nvidia() { (1e-3, 0.05) } else { (1e-4, 1e-3) };
        assert!(losses < of_losses && arrays.iter().all(|&difference| difference < of_arrays));
    }
}

fn built() -> StandIn {
    StandIn::build(env!("CARGO_TARGET_TMPDIR"))
}

/// Gives a command two GPUs of CUDA, and a report of theirs beside `run`. Only `device=cuda` sees them. Real ones are there.
fn stand_in(command: &mut Command, run: &Path) {
    if nvidia() {
        return;
    }
    built().give(command);
    command.env("STAND_IN_REPORT", format!("{}-%d", run.display()));
}

/// Ways in which several ranks learn what one does.
const WAYS: [(&str, &str); 3] = [
    ("ranks", "train.micro_batch=2"),
    ("at-end", "comm.overlap=false"),
    ("zero1", "optimizer.sharding=zero1"),
];

/// What the stand-in has counted in a rank of a run.
#[cfg(feature = "cuda")]
fn counted(run: &Path, rank: usize, what: &str) -> u64 {
    let path = format!("{}-{rank}", run.display());
    let report = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let value = report.lines().find_map(|line| line.strip_prefix(what)?.trim().parse().ok());
    value.unwrap_or_else(|| panic!("no {what} in {report}"))
}

/// The second start on a host finds the kernels of the first; a rank on its own, each in its place.
#[cfg(feature = "cuda")]
#[test]
fn kernels_are_compiled_once_on_a_host() {
    if nvidia() {
        println!("skipped: only the stand-in counts what it compiles");
        return;
    }
    let place = Place::new();
    let compiled = |name: &str, ranks: usize| {
        let count = place.run(&format!("compiled-{name}"));
        let mut command = place.command(ranks, name, &cuda(ranks));
        command.env("REPA_KERNEL_CACHE", place.run("kernels")).env("STAND_IN_COMPILED", &count);
        Running::start(&mut command).wait(DEADLINE).expect_code(0);
        std::fs::read_to_string(count).unwrap_or_default().lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let first = compiled("first", 1);
    assert!(first.len() > 30, "{first:?}");
    let second = compiled("second", 1);
    assert!(!second.iter().any(|name| first.contains(name)), "{second:?} again, of {first:?}");
    // Where burn cuts a chain depends a little on when its threads meet: another cut, another kernel.
    assert!(second.len() < first.len() / 10, "{second:?} beside {first:?}");
    place.same("first", "second");
    // Of two ranks the second has none yet, and the first lacks what only several ranks need.
    let two = compiled("two", 2).len();
    assert!(
        (first.len() / 2..2 * first.len()).contains(&two),
        "{two} programs of two ranks, {} of one",
        first.len()
    );
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
    for (name, way) in WAYS {
        place.train(2, name, &[way, VULKAN]);
        place.same("cpu", name);
    }
}

/// Several ranks sum over NCCL, in the GPU's memory: nothing but losses, norms and checkpoints comes to the host.
#[cfg(feature = "cuda")]
#[test]
fn cuda_learns_what_the_cpu_learns() {
    let place = Place::new();
    place.train(1, "cpu", &[]);
    place.train(1, "gpu", &cuda(1));
    place.same("cpu", "gpu");
    let parameters: u64 = learned(&place.run("cpu"))[0].len() as u64;
    let (ranks, steps) = (2, 12);
    for (name, way) in WAYS {
        place.train(ranks, name, &[&[way][..], &cuda(ranks)].concat());
        place.same("cpu", name);
        // Only the stand-in counts.
        for rank in if nvidia() { 0..0 } else { 0..ranks } {
            let of = |what| counted(&place.run(name), rank, what);
            let sharded = name == "zero1";
            // Parts of buckets are rounded up.
            let near = |found: u64, expected: u64| (expected..=expected + expected / 20).contains(&found);
            let (reduced, gathered, downloaded) = (of("reduced"), of("gathered"), of("downloaded"));
            let part = steps * parameters / if sharded { ranks as u64 } else { 1 };
            assert!(near(reduced, part), "{name}: {reduced} summed, of {parameters} parameters");
            assert!(near(gathered, if sharded { part } else { 0 }), "{name}: {gathered} gathered");
            // A checkpoint has four arrays of float32, and all steps together bring less than a fifth; gradients would be
            // one each step.
            assert!(downloaded < 4 * 5 * parameters, "{name}: {downloaded} bytes came down");
        }
    }
}

/// NVIDIA's own compiler and its headers for the stand-in, or None and the reason printed.
#[cfg(feature = "cuda")]
fn toolkit() -> Option<PathBuf> {
    if nvidia() {
        println!("skipped: only the stand-in counts");
        return None;
    }
    cuda_packages("nvrtc", &["runtime==13.0.96", "crt==13.0.88", "cccl==13.0.85", "nvrtc==13.0.88"])
}

/// Parts of NVIDIA's CUDA toolkit, in one folder.
#[cfg(feature = "cuda")]
fn cuda_packages(name: &str, versions: &[&str]) -> Option<PathBuf> {
    let mut packages = vec!["--no-deps".to_owned()];
    packages.extend(versions.iter().map(|version| format!("nvidia-cuda-{version}")));
    let packages: Vec<&str> = packages.iter().map(String::as_str).collect();
    match repa_tests::python::package(name, &packages) {
        Ok(folder) => Some(folder.join("nvidia/cu13")),
        Err(reason) => {
            println!("skipped: {reason}");
            None
        }
    }
}

/// Has the stand-in's kernels compiled for a Hopper GPU by the toolkit; they do nothing then.
#[cfg(feature = "cuda")]
fn compile_for_hopper(command: &mut Command, toolkit: &Path) {
    let libraries = built().libraries();
    let path = format!("{}:{}", toolkit.join("lib").display(), libraries.display());
    command.env("LD_LIBRARY_PATH", path).env("CUDA_PATH", toolkit).env("STAND_IN_EMPTY", "1");
    command.env_remove("STAND_IN_CAPABILITY").env_remove("STAND_IN_KERNELS");
}

/// All that training, its optimizer and its sample grids launch compiles for a Hopper GPU, by NVIDIA's own compiler and
/// assembler; it does not run.
#[cfg(feature = "cuda")]
#[test]
fn cuda_kernels_compile() {
    let Some(toolkit) = toolkit() else { return };
    let (place, ptx) = (Place::new(), tempfile::tempdir().expect("a folder"));
    let autoencoder = autoencoder();
    for (name, precision) in [("float32", "f32"), ("bfloat16", "bf16"), ("float16", "f16")] {
        let precision = format!("train.precision={precision}");
        let more = [CUDA, "optimizer.sharding=zero1", "train.steps=3", &precision];
        let mut command =
            place.command(2, name, &[&more[..], &grids("sample.training.every=3", &autoencoder)].concat());
        compile_for_hopper(&mut command, &toolkit);
        command.env("STAND_IN_PTX", ptx.path());
        Running::start(&mut command).wait(DEADLINE).expect_code(0);
        for rank in 0..2 {
            let of = |what| counted(&place.run(name), rank, what);
            let [kernels, tensor, launches] = ["kernels ", "tensor_kernels", "launches"].map(of);
            println!(
                "{name}, rank {rank}: {kernels} kernels, {tensor} with tensor cores, {launches} launches"
            );
            assert!(kernels > 50 && tensor > 0 && launches > kernels);
        }
    }
    if let Some(assembler) = cuda_packages("ptxas", &["nvcc==13.0.88"]) {
        assemble(ptx.path(), &assembler.join("bin/ptxas"));
    }
}

/// Has kernels assembled for a Hopper GPU, as the driver does it. Those of our own keep all they have in registers.
#[cfg(feature = "cuda")]
fn assemble(folder: &Path, assembler: &Path) {
    let ours = [
        "modulate_",
        "gated_",
        "softmax_",
        "split_heads",
        "merge_heads",
        "place_",
        "squares_",
        "sum_columns",
    ];
    let (mut kernels, mut of_ours) = (0, vec![0; ours.len()]);
    for file in std::fs::read_dir(folder).expect("a folder") {
        let path = file.expect("a file").path();
        let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
        let mut command = Command::new(assembler);
        command.args(["-v", "-arch=sm_90a", "-o", "/dev/null"]).arg(&path);
        let ended = Running::start(&mut command).wait(DEADLINE);
        assert_eq!(ended.code, Some(0), "{name}: {}", ended.stderr);
        kernels += 1;
        if let Some(number) = ours.iter().position(|start| name.starts_with(start)) {
            of_ours[number] += 1;
            let said = [ended.stdout, ended.stderr].concat();
            assert!(said.contains("0 bytes spill stores, 0 bytes spill loads"), "{name}: {said}");
        }
    }
    println!("{kernels} kernels assembled, of {ours:?} {of_ours:?}");
    assert!(of_ours.iter().all(|&count| count > 0), "not all have run: {of_ours:?}");
}

/// What CubeCL asks of the driver for a model of the paper, spare memory of its pools included.
#[cfg(feature = "cuda")]
#[test]
fn a_gpu_needs_the_memory_that_is_estimated() {
    let Some(toolkit) = toolkit() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/sit-s2-repa.toml");
    let config = format!("--config={}", config.display());
    let settings = [&config, "--json", "device=cuda:0", "train.global_batch=4", "train.precision=f32"];
    let run = |command: &[&str]| {
        let mut command = repa_tests::repa_dist(&[command, &settings].concat());
        stand_in(&mut command, &folder.path().join("counts"));
        compile_for_hopper(&mut command, &toolkit);
        Running::start(&mut command).wait(DEADLINE).expect_code(0).stdout
    };
    let estimate: serde_json::Value = serde_json::from_str(&run(&["estimate"])).expect("JSON");
    let estimated = estimate["device_bytes"].as_u64().expect("bytes");
    run(&["bench", "step", "--steps=8"]);
    let taken = counted(&folder.path().join("counts"), 0, "peak");
    let ratio = taken as f64 / estimated as f64;
    println!("{taken} bytes taken, {estimated} estimated: {ratio:.2}");
    assert!((0.9..1.2).contains(&ratio), "{taken} bytes taken, {estimated} estimated: {ratio:.2}");
}

/// Every thread has memory of its own on a GPU, and grids are drawn on one that ends with them.
#[cfg(feature = "cuda")]
#[test]
fn grids_take_no_more_memory_each_time() {
    let Some(toolkit) = toolkit() else { return };
    let (place, autoencoder) = (Place::new(), autoencoder());
    let [few, many] = [("few", "train.steps=3"), ("many", "train.steps=9")].map(|(name, steps)| {
        let more = [&[CUDA, steps][..], &grids("sample.training.every=1", &autoencoder)].concat();
        let mut command = place.command(1, name, &more);
        compile_for_hopper(&mut command, &toolkit);
        Running::start(&mut command).wait(DEADLINE).expect_code(0);
        counted(&place.run(name), 0, "peak")
    });
    println!("{few} bytes for three grids, {many} for nine");
    assert!(many as f64 <= 1.05 * few as f64, "{few} bytes for three grids, {many} for nine");
}

/// Matrix products in bfloat16, sums in bfloat16 between ranks.
#[cfg(feature = "cuda")]
#[test]
fn cuda_in_half_precision_learns_what_the_cpu_learns() {
    let place = Place::new();
    let half = "train.precision=bf16";
    place.train(2, "cpu", &[half]);
    for (name, more) in [("plain", &[][..]), ("wire", &["comm.wire=bf16"])] {
        place.train(2, name, &[&[half], more, &cuda(2)].concat());
        let losses = loss_difference(&log(&place.run("cpu")), &log(&place.run(name)));
        eprintln!("{name}: {losses:.2e}");
        assert!(losses < 2e-3, "{name}: losses differ by {losses}");
        assert!(losses > 1e-8, "{name}: CPU and GPU do not round alike");
    }
}

/// The quickstart's first 200 steps. Not for the stand-in, whose kernels this host runs.
#[cfg(feature = "cuda")]
#[test]
fn the_quickstart_learns_on_cuda_what_it_learns_on_the_cpu() {
    if !nvidia() {
        println!("skipped: takes a real GPU (make check-nvidia)");
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    repa_tests::run_in(folder.path(), repa_tests::repa_dist(&["data", "quickstart"]), DEADLINE);
    let train = |ranks: usize, name: &str, more: &[&str]| {
        let run = format!("run.dir=runs/{name}");
        let command = mpirun(ranks, &[&[&run[..], "train.steps=200", "checkpoint.every=0"], more].concat());
        repa_tests::run_in(folder.path(), command, DEADLINE);
        log(&folder.path().join("runs").join(name))
    };
    let cpu = train(1, "cpu", &[]);
    for (ranks, name) in [(1, "gpu"), (2, "gpus")] {
        let losses = loss_difference(&cpu, &train(ranks, name, &cuda(ranks)));
        println!("{ranks} ranks: losses differ by {losses:.2e}");
        assert!(losses < 1e-3, "{ranks} ranks: losses differ by {losses:.2e}");
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
    alike(&cpu, &gpu);
    // Drawn afterwards: where the run was trained, unless the command says otherwise.
    let [cpu, gpu] = [("cpu.png", &["device=cpu"][..]), ("gpu.png", &[])].map(|(name, more)| {
        let (run, out) = (place.run("gpu"), place.run(name));
        let (run, out) = (format!("--run={}", run.display()), format!("--out={}", out.display()));
        let sample = ["sample", &run, &out, "--per-class=1", "sample.solver.num_steps=3", &autoencoder];
        let mut command = repa_tests::repa_dist(&[&sample[..], more].concat());
        Running::start(&mut command).wait(DEADLINE).expect_code(0);
        image::open(place.run(name)).expect("a PNG").into_rgb8().into_raw()
    });
    alike(&cpu, &gpu);
}

#[cfg(feature = "wgpu")]
#[track_caller]
fn alike(a: &[u8], b: &[u8]) {
    let most = a.iter().zip(b).map(|(a, b)| a.abs_diff(*b)).max();
    assert!(a.len() == b.len() && most <= Some(2), "pixels differ by {most:?}");
}

/// All ranks run out of memory at once, in the first step.
#[cfg(feature = "cuda")]
#[test]
fn a_gpu_that_is_full_is_told_in_one_message() {
    if nvidia() {
        println!("skipped: only the stand-in can be made small");
        return;
    }
    let place = Place::new();
    // With its kernels compiled, so that no rank is far behind.
    place.train(2, "fits", &[CUDA, "train.global_batch=12", "train.steps=1"]);
    let full = |name: &str| {
        let mut command = place.command(2, name, &[CUDA, "train.global_batch=12"]);
        command.env("STAND_IN_MEMORY", (24 << 20).to_string()).env("RUST_BACKTRACE", "0");
        // Nobody who starts this again gets further.
        let ended = Running::start(&mut command).wait(DEADLINE).expect_code(2);
        let told = ended.stderr.lines().filter(|line| line.contains("memory is full"));
        let told: Vec<String> = told.map(str::to_owned).collect();
        (ended, told)
    };
    let (mut ended, mut told) = full("full");
    if told.len() > 1 {
        // A busy host may have had the ranks just so far apart as the later ones wait for the first.
        (ended, told) = full("again");
    }
    assert_eq!(told.len(), 1, "{}", ended.stderr);
    assert!(told[0].starts_with("error: rank "), "{}", told[0]);
    for part in
        ["MiB more were wanted", "GiB a GPU", "train.micro_batch smaller than 6", "optimizer.sharding=zero1"]
    {
        assert!(told[0].contains(part), "no {part:?}: {}", told[0]);
    }
    for noise in ["panicked", "backtrace", "Caused by"] {
        assert!(!ended.stderr.contains(noise), "{}", ended.stderr);
    }
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
