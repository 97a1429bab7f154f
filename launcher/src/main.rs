//! `repa-dist`: distributed training of diffusion transformers with representation alignment.
//!
//! `mpirun -n 2 repa-dist` trains the quickstart; `repa-dist --help` lists the rest.

mod cli;
mod doctor;
mod exit;
mod launch;
mod log;
mod program;
mod report;
mod run;
mod slurm;
mod watch;

use clap::Parser;

fn main() -> std::process::ExitCode {
    let arguments = cli::Arguments::parse();
    repa_trainer::ops::allocator::tune_allocator();
    exit::report(cli::run(arguments))
}
