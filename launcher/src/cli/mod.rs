//! The command line: raw arguments here, what they come to in each command's file.

mod bench;
mod checkpoint;
mod config;
mod dashboards;
mod data;
mod doctor;
mod estimate;
mod evaluate;
mod launch;
mod reap;
mod report;
mod sample;
mod slurm;
mod train;
mod watch;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressState, ProgressStyle};
use repa_comm::{Communicator, RemoteError, end_with};
use repa_trainer::Device;
use repa_trainer::config::{Config, Loaded, Source, Sources, load};

use crate::exit::{Failure, Outcome};

/// The quickstart's configuration, which commands use where no file is named.
const QUICKSTART: &str = include_str!("../../../configs/quickstart.toml");

/// Distributed training of diffusion transformers with representation alignment (REPA).
///
/// Without a command, trains: `mpirun -n 2 repa-dist` trains the quickstart on two ranks.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100, args_conflicts_with_subcommands = true)]
pub struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    train: train::Arguments,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train, on every rank that mpirun or srun started (the default command)
    Train(train::Arguments),
    /// Start the ranks with mpirun, watch them, and start them again from the last checkpoint when they fail
    Launch(launch::Arguments),
    /// Write a batch script for SLURM, and hand it in
    Slurm(slurm::Arguments),
    /// Make, look at and check the data that training reads
    Data(data::Arguments),
    /// Draw images from a run's averaged weights, as a labelled grid
    Sample(sample::Arguments),
    /// Measure how far a run's samples are from its data: Fréchet distances in encoder features, or ADM's scores (FID)
    Evaluate(evaluate::Arguments),
    /// List, verify, export and import checkpoints
    Checkpoint(checkpoint::Arguments),
    /// Show a run at a terminal while it goes on: curves, ranks, what happened
    Watch(watch::Arguments),
    /// Write one HTML page about a run, or several side by side, and say where everything of it is
    Report(report::Arguments),
    /// Write Grafana dashboards, Prometheus rules and alerts to a folder
    Dashboards(dashboards::Arguments),
    /// Measure the speed of parts
    Bench(bench::Arguments),
    /// Predict the memory that a rank needs, without training
    Estimate(estimate::Arguments),
    /// Print the merged configuration, and where each value came from
    Config(config::Arguments),
    /// Look for what a run needs of its hosts (MPI, GPUs, disks, memory, limits, network, SLURM), and say what to do
    Doctor(doctor::Arguments),
    /// End what a launch has left on this host
    #[command(hide = true)]
    Reap(reap::Arguments),
    /// Say that a rank is there: doctor starts two of them
    #[command(hide = true)]
    DoctorProbe(doctor::Probe),
}

/// What a run is configured from.
#[derive(Debug, Clone, Args)]
pub struct Settings {
    /// TOML file; without it, the quickstart's built-in configuration
    #[arg(long, short, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Values that win over the file and over REPA_<SECTION>__<KEY> environment variables, such as
    /// train.steps=100
    #[arg(value_name = "KEY=VALUE")]
    values: Vec<String>,
}

impl Settings {
    /// The merged configuration.
    pub fn load(&self) -> Result<Loaded, Failure> {
        let source = match &self.config {
            Some(path) => Source::File(path.clone()),
            None => Source::Embedded("quickstart.toml", QUICKSTART),
        };
        let environment = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect();
        Ok(load(&Sources { source: Some(source), environment, arguments: self.values.clone() })?)
    }
}

/// Runs a command.
pub fn run(arguments: Arguments) -> Result<Outcome, Failure> {
    if arguments.command.as_ref().is_some_and(Command::only_tells) {
        end_with_the_reader();
    }
    match arguments.command {
        None => train::run(&arguments.train),
        Some(Command::Train(arguments)) => train::run(&arguments),
        Some(Command::Launch(arguments)) => launch::run(&arguments),
        Some(Command::Reap(arguments)) => reap::run(&arguments),
        Some(Command::Slurm(arguments)) => slurm::run(&arguments),
        Some(Command::Data(arguments)) => data::run(&arguments),
        Some(Command::Sample(arguments)) => sample::run(&arguments),
        Some(Command::Evaluate(arguments)) => evaluate::run(&arguments),
        Some(Command::Checkpoint(arguments)) => checkpoint::run(&arguments),
        Some(Command::Dashboards(arguments)) => dashboards::run(&arguments),
        Some(Command::Bench(arguments)) => bench::run(&arguments),
        Some(Command::Estimate(arguments)) => estimate::run(&arguments),
        Some(Command::Watch(arguments)) => watch::run(&arguments),
        Some(Command::Report(arguments)) => report::run(&arguments),
        Some(Command::Config(arguments)) => config::run(&arguments),
        Some(Command::Doctor(arguments)) => doctor::run(&arguments),
        Some(Command::DoctorProbe(arguments)) => doctor::run_probe(&arguments),
    }
}

impl Command {
    /// Whether all it does is to tell something: nothing is lost where nobody listens any more.
    fn only_tells(&self) -> bool {
        matches!(self, Self::Watch(_) | Self::Report(_) | Self::Estimate(_) | Self::Config(_))
    }
}

/// Lets a pipe whose reader has gone end this process, as it ends others (`repa-dist config | head`); Rust's own way is
/// an error, on which printing panics.
fn end_with_the_reader() {
    // SAFETY: no handler is installed, only the system's own way taken, and no other thread runs yet.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

/// A progress bar on standard error; where that is no terminal, nothing.
fn bar(what: &'static str, unit: &'static str) -> ProgressBar {
    let template = format!("{what} {{wide_bar:.cyan/blue}} {{pos}}/{{len}} {unit}, {{rate}}, {{eta}} left");
    let style = ProgressStyle::with_template(&template).expect("the template is well formed");
    let style = style.with_key("rate", |state: &ProgressState, out: &mut dyn std::fmt::Write| {
        // A bar that cannot be written is no error.
        let _ = match state.per_sec() {
            rate if rate < 10.0 => write!(out, "{rate:.1}/s"),
            rate => write!(out, "{rate:.0}/s"),
        };
    });
    let bar = ProgressBar::new(0).with_style(style);
    bar.enable_steady_tick(Duration::from_millis(500));
    bar
}

/// Bytes as people read them.
fn size(bytes: u64) -> String {
    const MIB: f64 = (1u64 << 20) as f64;
    match bytes as f64 / MIB {
        mib if mib < 1024.0 => format!("{mib:.1} MiB"),
        mib => format!("{:.2} GiB", mib / 1024.0),
    }
}

/// Runs a command on every rank that mpirun or srun started; alone where none did.
fn on_all_ranks(work: impl FnOnce(&dyn Communicator) -> Result<(), RemoteError>) -> Result<Outcome, Failure> {
    let comm = repa_comm::init(&repa_comm::Options::default()).map_err(Failure::runtime)?;
    repa_comm::install_panic_hook(crate::exit::explain);
    crate::log::to_stderr(comm.rank(), repa_trainer::config::LogFormat::Text);
    let comm = comm.as_ref();
    work(comm).unwrap_or_else(|e| end_with(comm, &e));
    comm.finalize().map_err(Failure::runtime)?;
    Ok(Outcome::Done)
}

/// Sets the threads of a rank: what was asked for, or its share of the processors.
fn rank_threads(comm: &dyn Communicator, asked: usize) -> Result<(), Failure> {
    let threads = if asked == 0 { comm.topology().threads_per_rank() } else { asked };
    Ok(repa_trainer::train::use_threads(threads)?)
}

/// The device of a command that draws images from a run: the run's own, unless `device=...` says otherwise.
fn device_of_run(config: &Config) -> Result<Device, Failure> {
    if !config.device.is_cpu() {
        repa_comm::install_panic_hook(crate::exit::explain);
    }
    device_of_rank(config, 0)
}

/// The same of a rank.
fn device_of_rank(config: &Config, local_rank: usize) -> Result<Device, Failure> {
    repa_trainer::gpu_failure::drawing(config);
    Ok(repa_trainer::train::device(&config.device.0, local_rank)?)
}

/// Sets the number of threads of a command that is no rank; 0 takes all cores.
fn use_threads(threads: usize) -> Result<(), Failure> {
    match threads {
        0 => Ok(()),
        threads => Ok(repa_trainer::train::use_threads(threads)?),
    }
}
