//! `repa-dist bench`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use repa_comm::bench::{BenchOptions, BenchReport};
use repa_comm::{Options, all_or_first_error, end_with};
use repa_trainer::data::bench::{self as data_bench, DataBenchOptions, Images};
use repa_trainer::train::checkpoint_bench::{self, CheckpointBench, CheckpointBenchOptions};
use repa_trainer::train::telemetry_bench::{self, TelemetryBenchOptions};
use repa_trainer::train::{bench as step_bench, communicator};

use super::Settings;

use crate::exit::{Failure, Outcome};

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Time sums over the ranks that mpirun started, beside a plain copy in memory
    AllReduce {
        /// What sums: mpi, or nccl between GPUs
        #[arg(long, value_enum, default_value_t = BackendName::Mpi)]
        backend: BackendName,
        /// Also time the MPI library's own MPI_Allreduce
        #[arg(long)]
        against_mpi: bool,
        /// Largest vector, in MiB
        #[arg(long, value_name = "MIB", default_value_t = 128)]
        max_mib: usize,
        /// Seconds to spend on a size
        #[arg(long, default_value_t = 1.0)]
        seconds: f64,
        /// Bytes that are handled at a time, in KiB (64 to 8192); changes no bit
        #[arg(long, value_name = "KIB")]
        chunk_kib: Option<usize>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Write and read checkpoints of random weights on the ranks that mpirun started, against dd and plain reads on
    /// the same disk, and time training steps meanwhile
    Checkpoint {
        #[command(flatten)]
        settings: Settings,
        /// Where to write; needs four times the checkpoint's size
        #[arg(long, value_name = "DIR", default_value = "/tmp/repa-dist-bench")]
        dir: PathBuf,
        /// Turns; medians count
        #[arg(long, default_value_t = 5)]
        turns: usize,
        /// Steps to time with and without a save going on; 0 leaves them out
        #[arg(long, default_value_t = 0)]
        steps: usize,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Time training steps on random data, on the ranks that mpirun started, and the memory they take
    Step {
        #[command(flatten)]
        settings: Settings,
        /// Steps that are timed
        #[arg(long, default_value_t = 10)]
        steps: usize,
        /// Take turns with steps by which each rank trains by itself, and tell the weak scaling
        #[arg(long)]
        alone: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Time what a step's metrics cost, with the endpoint read all the time, and steps among clients that never read
    /// their answer
    Telemetry {
        #[command(flatten)]
        settings: Settings,
        /// Steps whose metrics are published
        #[arg(long, default_value_t = 1000)]
        records: usize,
        /// Steps that are timed in each turn, without clients and with them
        #[arg(long, default_value_t = 20)]
        steps: usize,
        /// Turns
        #[arg(long, default_value_t = 3)]
        turns: usize,
        /// Clients
        #[arg(long, default_value_t = 50)]
        clients: usize,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Time the loader, beside plain reads of the same files
    Data(DataArguments),
    /// Time opening a store of a million samples (sparse files), and the memory it takes
    Start {
        /// Folder for the synthetic store, which is removed afterwards
        #[arg(long, value_name = "DIR", default_value = ".")]
        dir: PathBuf,
        /// Samples of it: moments [8, 32, 32]
        #[arg(long, default_value_t = 1_000_000)]
        samples: usize,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Time importing a synthetic tree in REPA's layout, beside copying its files into one
    Import {
        /// Folder for the tree and the store, which are removed afterwards
        #[arg(long, value_name = "DIR", default_value = ".")]
        dir: PathBuf,
        /// Samples of it: a .npy of moments [8, 32, 32] each
        #[arg(long, default_value_t = 20_000)]
        samples: usize,
        /// How often each is timed, in turns
        #[arg(long, default_value_t = 5)]
        turns: usize,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Args)]
struct DataArguments {
    /// A store, or a folder in REPA's layout; by default a synthetic store is made
    #[arg(value_name = "STORE")]
    store: Option<PathBuf>,
    /// Folder for the synthetic store, which is removed afterwards
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    dir: PathBuf,
    /// Samples of the synthetic store: moments [8, 32, 32] and features [256, 768]
    #[arg(long, default_value_t = 2000)]
    samples: usize,
    /// What is done with the images that STORE keeps
    #[arg(long, value_enum, default_value_t = ImagesName::None)]
    images: ImagesName,
    /// Samples of a batch
    #[arg(long, default_value_t = 64)]
    batch: usize,
    /// Loader threads
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Seconds to spend on a figure
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What sums.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum BackendName {
    Mpi,
    Nccl,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ImagesName {
    /// They are not read
    None,
    /// They are read
    Bytes,
    /// They are read and decoded
    Decode,
}

pub fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    match &arguments.command {
        Command::AllReduce { backend, against_mpi, max_mib, seconds, chunk_kib, json } => {
            let mut start = Options::default();
            if let Some(kib) = chunk_kib {
                start.chunk_bytes = kib << 10;
            }
            all_reduce(&start, *backend, *against_mpi, *max_mib, *seconds, *json)
        }
        Command::Step { settings, steps, alone, json } => step(settings, *steps, *alone, *json),
        Command::Checkpoint { settings, dir, turns, steps, json } => {
            let options = CheckpointBenchOptions { dir: dir.clone(), turns: *turns, steps: *steps };
            checkpoint(settings, &options, *json)
        }
        Command::Telemetry { settings, records, steps, turns, clients, json } => {
            let (records, steps, turns, clients) = (*records, *steps, *turns, *clients);
            telemetry(settings, TelemetryBenchOptions { records, steps, turns, clients }, *json)
        }
        Command::Data(arguments) => data(arguments),
        Command::Start { dir, samples, json } => {
            let figures = data_bench::run_start(dir, *samples, 256).map_err(Failure::data)?;
            if *json {
                return print_json(&figures);
            }
            println!("samples            {:8}", figures.samples);
            println!("first batch after  {:8.3} s", figures.first_batch_seconds);
            println!("100 batches after  {:8.3} s", figures.next_batches_seconds);
            println!("peak memory        {:8.1} MB", figures.peak_memory_bytes as f64 / 1e6);
            Ok(Outcome::Done)
        }
        Command::Import { dir, samples, turns, json } => {
            if *samples == 0 || *turns == 0 {
                return Err(Failure::usage("--samples and --turns must be above 0"));
            }
            let figures = data_bench::run_import(dir, *samples, *turns).map_err(Failure::data)?;
            if *json {
                return print_json(&figures);
            }
            let seconds = |all: &[f64]| all.iter().map(|s| format!("{s:.2}")).collect::<Vec<_>>().join(" ");
            println!("samples  {}, {:.2} GB", figures.samples, figures.bytes as f64 / 1e9);
            println!("copy     {} s", seconds(&figures.copy_seconds));
            println!("import   {} s", seconds(&figures.import_seconds));
            println!("ratio    {:.2} (of medians)", figures.ratio);
            Ok(Outcome::Done)
        }
    }
}

fn print_json(figures: &impl serde::Serialize) -> Result<Outcome, Failure> {
    println!("{:#}", serde_json::to_value(figures).map_err(Failure::runtime)?);
    Ok(Outcome::Done)
}

fn data(arguments: &DataArguments) -> Result<Outcome, Failure> {
    if arguments.batch == 0
        || arguments.threads == 0
        || arguments.seconds.is_nan()
        || arguments.seconds <= 0.0
    {
        return Err(Failure::usage("--batch, --threads and --seconds must be above 0"));
    }
    let options = DataBenchOptions {
        batch: arguments.batch,
        threads: arguments.threads,
        images: match arguments.images {
            ImagesName::None => Images::None,
            ImagesName::Bytes => Images::Bytes,
            ImagesName::Decode => Images::Decode,
        },
        seconds: arguments.seconds,
    };
    let figures = match &arguments.store {
        Some(store) => data_bench::measure(store, &options),
        None => data_bench::run(&arguments.dir, arguments.samples, &options),
    };
    let figures = figures.map_err(Failure::data)?;
    if arguments.json {
        return print_json(&figures);
    }
    let giga = |rate: f64| rate / 1e9;
    if let Some(pread) = figures.pread_bytes_per_second {
        println!("pread              {:8.2} GB/s", giga(pread));
    }
    println!(
        "loader             {:8.2} GB/s, {:.0} samples/s",
        giga(figures.loader_bytes_per_second),
        figures.loader_samples_per_second
    );
    println!("with random draws  {:8.0} samples/s", figures.training_samples_per_second);
    println!("first batch after  {:8.3} s", figures.first_batch_seconds);
    Ok(Outcome::Done)
}

fn step(settings: &Settings, steps: usize, alone: bool, json: bool) -> Result<Outcome, Failure> {
    if steps == 0 {
        return Err(Failure::usage("--steps must be above 0"));
    }
    let mpi = repa_comm::init(&Options::default()).map_err(Failure::runtime)?;
    repa_comm::install_panic_hook(crate::exit::explain);
    let loaded = all_or_first_error(mpi.as_ref(), settings.load().map_err(|e| e.of_rank()))
        .unwrap_or_else(|e| end_with(mpi.as_ref(), &e));
    let comm = communicator(&loaded.config, mpi.clone()).unwrap_or_else(|e| end_with(mpi.as_ref(), &e));
    let figures = step_bench::run(&loaded.config, &comm, steps, alone)
        .unwrap_or_else(|e| repa_comm::abort(i32::from(e.kind().code()), &e.to_string()));
    if comm.rank() == 0 && json {
        println!("{:#}", serde_json::to_value(&figures).map_err(Failure::runtime)?);
    } else if comm.rank() == 0 {
        let milliseconds = |what: &str, seconds: f64| println!("{what:<24} {:10.1} ms", 1e3 * seconds);
        println!(
            "{} ranks, {:.1} M parameters, batches of {}: {:.1} images/s",
            figures.ranks,
            figures.parameters as f64 / 1e6,
            figures.global_batch,
            figures.images_per_second
        );
        milliseconds("step", figures.step_seconds);
        milliseconds("  forward and backward", figures.compute_seconds);
        milliseconds("  exposed communication", figures.exposed_communication_seconds);
        milliseconds("  clip, AdamW, EMA", figures.optimizer_seconds);
        if let Some(alone) = &figures.alone {
            milliseconds("step of ranks alone", alone.step_seconds);
            println!("{:<24} {:10.1} %", "weak scaling", 100.0 * alone.scaling);
        }
        println!("{:<24} {:>13}", "peak memory of a rank", super::size(figures.peak_memory_bytes));
    }
    comm.finalize().map_err(Failure::runtime)?;
    Ok(Outcome::Done)
}

fn checkpoint(settings: &Settings, options: &CheckpointBenchOptions, json: bool) -> Result<Outcome, Failure> {
    if options.turns == 0 {
        return Err(Failure::usage("--turns must be above 0"));
    }
    let comm = repa_comm::init(&Options::default()).map_err(Failure::runtime)?;
    repa_comm::install_panic_hook(crate::exit::explain);
    let loaded = all_or_first_error(comm.as_ref(), settings.load().map_err(|e| e.of_rank()))
        .unwrap_or_else(|e| end_with(comm.as_ref(), &e));
    let figures =
        checkpoint_bench::run(&loaded.config, &comm, options).unwrap_or_else(|e| end_with(comm.as_ref(), &e));
    if comm.rank() == 0 && json {
        println!("{:#}", serde_json::to_value(&figures).map_err(Failure::runtime)?);
    } else if comm.rank() == 0 {
        print_checkpoint(&figures);
    }
    comm.finalize().map_err(Failure::runtime)?;
    Ok(Outcome::Done)
}

fn telemetry(settings: &Settings, options: TelemetryBenchOptions, json: bool) -> Result<Outcome, Failure> {
    if options.records == 0 || options.steps == 0 || options.turns == 0 {
        return Err(Failure::usage("--records, --steps and --turns must be above 0"));
    }
    let mpi = repa_comm::init(&Options::default()).map_err(Failure::runtime)?;
    repa_comm::install_panic_hook(crate::exit::explain);
    let loaded = all_or_first_error(mpi.as_ref(), settings.load().map_err(|e| e.of_rank()))
        .unwrap_or_else(|e| end_with(mpi.as_ref(), &e));
    let comm = communicator(&loaded.config, mpi.clone()).unwrap_or_else(|e| end_with(mpi.as_ref(), &e));
    let figures = telemetry_bench::run(&loaded.config, &comm, options)
        .unwrap_or_else(|e| repa_comm::abort(i32::from(e.kind().code()), &e.to_string()));
    if comm.rank() == 0 && json {
        println!("{:#}", serde_json::to_value(&figures).map_err(Failure::runtime)?);
    } else if comm.rank() == 0 {
        println!(
            "metrics    {:8.1} us a step, 99 % below {:.1} us; {} pages were read meanwhile",
            1e6 * figures.publish_seconds,
            1e6 * figures.publish_p99_seconds,
            figures.pages
        );
        println!(
            "step       {:8.1} ms on {} ranks, of which metrics {:.4} %",
            1e3 * figures.step_seconds,
            figures.ranks,
            100.0 * figures.share
        );
        println!(
            "crowded    {:8.1} ms with {} clients that never read: {:+.1} %",
            1e3 * figures.crowded_seconds,
            figures.clients,
            100.0 * (figures.crowded_seconds / figures.step_seconds - 1.0)
        );
    }
    comm.finalize().map_err(Failure::runtime)?;
    Ok(Outcome::Done)
}

fn print_checkpoint(figures: &CheckpointBench) {
    let giga = |rate: f64| rate / 1e9;
    println!("{} ranks, {} to write", figures.ranks, super::size(figures.bytes));
    println!(
        "write      {:8.3} s to durable, {:6.2} GB/s; dd with fsync {:6.2} GB/s: {:.0} %",
        figures.write_seconds,
        giga(figures.write_bytes_per_second),
        giga(figures.dd_bytes_per_second),
        100.0 * figures.write_share
    );
    println!(
        "read       {:8.3} s, {:6.2} GB/s; plain read {:6.2} GB/s: {:.0} %",
        figures.read_seconds,
        giga(figures.read_bytes_per_second),
        giga(figures.plain_bytes_per_second),
        100.0 * figures.read_share
    );
    println!(
        "snapshot   {:8.1} ms; a copy of as many bytes {:.1} ms: {:.2} times",
        1e3 * figures.snapshot_seconds,
        1e3 * figures.memcpy_seconds,
        figures.snapshot_seconds / figures.memcpy_seconds
    );
    if let Some(steps) = &figures.steps {
        println!(
            "step       {:8.1} ms, {:.1} ms while a save goes on: {:+.1} %; {} steps, {} saves",
            1e3 * steps.without_seconds,
            1e3 * steps.with_seconds,
            100.0 * (steps.with_seconds / steps.without_seconds - 1.0),
            steps.steps,
            steps.saves
        );
    }
}

fn all_reduce(
    start: &Options,
    backend: BackendName,
    against_mpi: bool,
    max_mib: usize,
    seconds: f64,
    json: bool,
) -> Result<Outcome, Failure> {
    if !(seconds > 0.0 && seconds.is_finite()) || max_mib == 0 {
        return Err(Failure::usage("--seconds and --max-mib must be above 0"));
    }
    let mpi = repa_comm::init(start).map_err(Failure::runtime)?;
    repa_comm::install_panic_hook(crate::exit::explain);
    let mut config = repa_trainer::config::Config::default();
    if let BackendName::Nccl = backend {
        config.comm.backend = repa_trainer::config::Backend::Nccl;
        config.device.0 = "cuda".to_owned();
    }
    let comm = communicator(&config, mpi.clone()).unwrap_or_else(|e| end_with(mpi.as_ref(), &e));
    let sizes = [1 << 10, 16 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20, 128 << 20, 512 << 20];
    let options = BenchOptions {
        sizes: sizes.into_iter().filter(|&bytes| bytes <= max_mib << 20).collect(),
        against_library: against_mpi,
        time_per_size: Duration::from_secs_f64(seconds),
    };
    let report = repa_comm::bench::all_reduce(comm.as_ref(), &options).unwrap_or_else(|e| {
        repa_comm::abort(i32::from(repa_trainer::exit::Kind::Runtime.code()), &e.to_string())
    });
    if comm.rank() == 0 {
        if json {
            println!("{:#}", serde_json::to_value(&report).map_err(Failure::runtime)?);
        } else {
            print(&report);
        }
    }
    comm.finalize().map_err(Failure::runtime)?;
    Ok(Outcome::Done)
}

fn print(report: &BenchReport) {
    let giga = |rate: f64| rate / 1e9;
    println!(
        "{} ranks on {} nodes, {}; memcpy {:.1} GB/s",
        report.ranks,
        report.nodes,
        report.transport,
        giga(report.memcpy_bytes_per_second)
    );
    println!("{:>12} {:>14} {:>14} {:>18}", "bytes", "algorithm GB/s", "bus GB/s", "MPI_Allreduce GB/s");
    for row in &report.rows {
        let library = row
            .library
            .as_ref()
            .map_or_else(|| "-".into(), |b| format!("{:.2}", giga(b.algorithm_bytes_per_second)));
        println!(
            "{:>12} {:>14.2} {:>14.2} {library:>18}",
            row.bytes,
            giga(row.ours.algorithm_bytes_per_second),
            giga(row.ours.bus_bytes_per_second)
        );
    }
}
