//! `repa-dist data`.

mod encode;
mod import;
mod look;

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use indicatif::ProgressBar;
use repa_comm::Communicator;
use repa_trainer::data::build::{BuildProgress, Built};
use repa_trainer::data::{stage, store::LEFT_OUT_FILE};
use repa_trainer::{data, quickstart};

use super::{bar, on_all_ranks};
use crate::exit::{Failure, Outcome};

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make the quickstart's data: emoji, through the autoencoder and the teacher, into a store
    Quickstart {
        /// Folder of the store
        #[arg(long, value_name = "DIR", default_value = "data/quickstart")]
        out: PathBuf,
        /// Keep the images as well, for alignment.encoders
        #[arg(long)]
        images: bool,
    },
    /// Make a store from the latents of REPA's (EDM2's) or LightningDiT's layout
    Import(import::Arguments),
    /// Make a store from images, through an autoencoder and vision encoders, on all ranks of mpirun
    Encode(encode::Arguments),
    /// Copy a store to every node's own disk, and check the copy: mpirun -n NODES --map-by node ...
    Stage {
        /// Folder of the store
        #[arg(value_name = "STORE")]
        store: PathBuf,
        /// Folder of the copy, on each node
        #[arg(long, value_name = "DIR")]
        to: PathBuf,
    },
    /// Say what a store holds
    Info {
        /// Folder of the store
        #[arg(value_name = "DIR", default_value = "data/quickstart")]
        store: PathBuf,
        /// Print the store's index as JSON
        #[arg(long)]
        json: bool,
    },
    /// Read all of a store and check digests, shapes, values and labels
    Verify {
        /// Folder of the store
        #[arg(value_name = "DIR", default_value = "data/quickstart")]
        store: PathBuf,
        /// Print what was found as JSON
        #[arg(long)]
        json: bool,
    },
}

pub fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    match &arguments.command {
        Command::Quickstart { out, images } => make_quickstart(out, *images),
        Command::Import(arguments) => import::run(arguments),
        Command::Encode(arguments) => encode::run(arguments),
        Command::Stage { store, to } => run_stage(store, to),
        Command::Info { store, json } => look::info(store, *json),
        Command::Verify { store, json } => look::verify(store, *json),
    }
}

fn make_quickstart(out: &Path, images: bool) -> Result<Outcome, Failure> {
    if let Ok(store) = data::open(out) {
        if images && !store.index().contents.images {
            return Err(Failure::data(format!(
                "{} is there already, without images: remove it, or name another folder with --out",
                out.display()
            )));
        }
        println!("data: {} is there already", out.display());
        return Ok(Outcome::Done);
    }
    on_all_ranks(|comm| {
        let device = repa_trainer::Device::flex();
        let mut bar = BuildBar::new(comm, "encoding emoji", "images");
        let samples = quickstart::make_data(comm, out, images, &device, &mut |p| bar.show(p))?;
        bar.done();
        if comm.rank() == 0 {
            println!("data: {samples} labelled emoji (Twemoji, CC-BY 4.0) in {}", out.display());
        }
        Ok(())
    })
}

fn run_stage(store: &Path, to: &Path) -> Result<Outcome, Failure> {
    on_all_ranks(|comm| {
        let progress = if comm.rank() == 0 { bar("copying", "bytes") } else { ProgressBar::hidden() };
        let staged = stage::stage(comm, store, to, &mut |done, total| {
            progress.set_length(total);
            progress.set_position(done);
        })?;
        progress.finish_and_clear();
        if comm.rank() == 0 {
            println!(
                "data: {:.2} GB in {} on {} (digests checked); train with data.dir={}",
                staged.bytes as f64 / 1e9,
                to.display(),
                match comm.topology().nodes {
                    1 => "this node".to_owned(),
                    nodes => format!("each of {nodes} nodes"),
                },
                to.display()
            );
        }
        Ok(())
    })
}

/// How far a store has come: a bar where a person watches, a line now and then elsewhere.
struct BuildBar {
    bar: ProgressBar,
    what: &'static str,
    unit: &'static str,
    said: std::time::Instant,
    begun: std::time::Instant,
    lines: bool,
}

/// Seconds between lines where there is no terminal.
const LINE_EVERY: u64 = 10;

impl BuildBar {
    fn new(comm: &dyn Communicator, what: &'static str, unit: &'static str) -> Self {
        let lead = comm.rank() == 0;
        let bar = if lead { bar(what, unit) } else { ProgressBar::hidden() };
        let now = std::time::Instant::now();
        Self { lines: lead && bar.is_hidden(), bar, what, unit, said: now, begun: now }
    }

    fn show(&mut self, progress: BuildProgress) {
        let fresh = progress.done - progress.resumed;
        if self.bar.length() != Some(progress.total as u64) {
            self.bar.set_length(progress.total as u64);
        }
        self.bar.set_position(progress.done as u64);
        if fresh == 0 {
            // What an earlier attempt has done says nothing about the speed.
            self.bar.reset_eta();
            self.begun = std::time::Instant::now();
        }
        if self.lines && self.said.elapsed().as_secs() >= LINE_EVERY {
            self.said = std::time::Instant::now();
            let rate = fresh as f64 / self.begun.elapsed().as_secs_f64();
            let left = (progress.total - progress.done) as f64 / rate.max(1e-9);
            eprintln!(
                "{}: {} of {} {}, {rate:.1}/s, {} left",
                self.what,
                progress.done,
                progress.total,
                self.unit,
                repa_trainer::telemetry::progress::duration(left)
            );
        }
    }

    fn done(&self) {
        self.bar.finish_and_clear();
    }
}

/// Says what became of a store, on rank 0: members left out one by one where they are few.
fn say_built(out: &Path, built: &Built) {
    const FEW: usize = 10;
    for member in built.left_out.iter().take(FEW) {
        eprintln!("left out: {member}");
    }
    if built.left_out.len() > FEW {
        let file = out.join(LEFT_OUT_FILE);
        eprintln!("left out: {} more, all listed in {}", built.left_out.len() - FEW, file.display());
    }
    println!("data: {} samples in {}", built.index.samples, out.display());
}
