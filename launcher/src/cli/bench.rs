//! `repa-dist bench`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use repa_comm::Options;
use repa_comm::bench::{BenchOptions, BenchReport};
use repa_trainer::data::bench as data_bench;

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
        /// Also time the MPI library's own MPI_Allreduce
        #[arg(long)]
        against_mpi: bool,
        /// Largest vector, in MiB
        #[arg(long, value_name = "MIB", default_value_t = 128)]
        max_mib: usize,
        /// Seconds to spend on a size
        #[arg(long, default_value_t = 1.0)]
        seconds: f64,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Time the loader on a store of synthetic samples, beside plain reads of the same files
    Data {
        /// Folder for the synthetic store, which is removed afterwards
        #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
        dir: PathBuf,
        /// Samples of it: moments [8, 32, 32] and features [256, 768]
        #[arg(long, default_value_t = 2000)]
        samples: usize,
        /// Samples of a batch
        #[arg(long, default_value_t = 64)]
        batch: usize,
        /// Seconds to spend on a figure
        #[arg(long, default_value_t = 3.0)]
        seconds: f64,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

pub fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    match &arguments.command {
        Command::AllReduce { against_mpi, max_mib, seconds, json } => {
            all_reduce(*against_mpi, *max_mib, *seconds, *json)
        }
        Command::Data { dir, samples, batch, seconds, json } => {
            let figures = data_bench::run(dir, *samples, *batch, *seconds).map_err(Failure::data)?;
            if *json {
                println!("{:#}", serde_json::to_value(&figures).map_err(Failure::runtime)?);
                return Ok(Outcome::Done);
            }
            let giga = |rate: f64| rate / 1e9;
            println!("pread, 2 threads   {:8.2} GB/s", giga(figures.pread_bytes_per_second));
            println!(
                "loader             {:8.2} GB/s, {:.0} samples/s",
                giga(figures.loader_bytes_per_second),
                figures.loader_samples_per_second
            );
            println!("with random draws  {:8.0} samples/s", figures.training_samples_per_second);
            Ok(Outcome::Done)
        }
    }
}

fn all_reduce(against_mpi: bool, max_mib: usize, seconds: f64, json: bool) -> Result<Outcome, Failure> {
    if !(seconds > 0.0 && seconds.is_finite()) || max_mib == 0 {
        return Err(Failure::usage("--seconds and --max-mib must be above 0"));
    }
    let comm = repa_comm::init(&Options::default()).map_err(Failure::runtime)?;
    repa_comm::install_panic_hook();
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
