//! `repa-dist sample`.

use std::path::{Path, PathBuf};

use clap::Args;
use indicatif::ProgressBar;
use repa_trainer::config::Config;
use repa_trainer::figures::{check_place, labelled_grid, write_png};
use repa_trainer::generate::{
    Classes, Generator, Which, class_rows, each_rank, run_config, same_step, write_many,
};

use super::bar;
use crate::exit::{Failure, Outcome};

#[derive(Debug, Args)]
pub struct Arguments {
    /// Run folder
    #[arg(long, value_name = "DIR", default_value = "runs/quickstart")]
    run: PathBuf,
    /// Images of each class
    #[arg(long, value_name = "N", default_value_t = 10)]
    per_class: usize,
    /// Most classes in the grid
    #[arg(long, value_name = "N", default_value_t = 20)]
    classes: usize,
    /// A checkpoint's folder (step-N), in place of the run's newest
    #[arg(long, value_name = "DIR")]
    checkpoint: Option<PathBuf>,
    /// Use the weights themselves instead of their moving average
    #[arg(long)]
    raw_weights: bool,
    /// PNG to write; by default samples/step-N.png in the run folder
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Instead of a grid, draw --samples images for ADM's evaluator (arr_0, uint8 [N, H, W, 3]), on all ranks that mpirun
    /// or srun started
    #[arg(long, value_name = "FILE", conflicts_with_all = ["per_class", "classes", "out"])]
    npz: Option<PathBuf>,
    /// Images of --npz
    #[arg(long, value_name = "N", default_value_t = 50_000, requires = "npz")]
    samples: usize,
    /// As many images of each class in --npz, instead of random classes
    #[arg(long, requires = "npz")]
    even_classes: bool,
    /// Values that win over the run's configuration, such as sample.solver.cfg_scale=2.5
    #[arg(value_name = "KEY=VALUE")]
    values: Vec<String>,
}

impl Arguments {
    fn config(&self) -> Result<Config, Failure> {
        let mut config = run_config(&self.run, &self.values)?;
        config.run.dir.clone_from(&self.run);
        Ok(config)
    }

    fn which(&self) -> Which {
        if self.raw_weights { Which::Model } else { Which::Ema }
    }
}

pub fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    if let Some(path) = &arguments.npz {
        return many(arguments, path);
    }
    let config = arguments.config()?;
    super::use_threads(config.train.threads)?;
    let device = super::device_of_run(&config)?;
    let generator = Generator::open(&config, arguments.which(), arguments.checkpoint.as_deref(), &device)?;
    let contents = &generator.index().contents;
    let classes = contents.classes.min(arguments.classes);
    let labels: Vec<usize> = (0..classes).flat_map(|c| std::iter::repeat_n(c, arguments.per_class)).collect();
    let progress = bar("sampling", "images");
    progress.set_length(labels.len() as u64);
    let images = generator.images(&labels, 0, |done| progress.set_position(done as u64))?;
    progress.finish_and_clear();

    let rows = class_rows(contents, &labels, images);
    let solver = &config.sample.solver;
    let title = format!(
        "step {}, {} steps of {:?}, guidance {}",
        generator.step(),
        solver.num_steps,
        solver.mode,
        solver.cfg_scale
    );
    let out = arguments
        .out
        .clone()
        .unwrap_or_else(|| arguments.run.join("samples").join(format!("step-{:08}.png", generator.step())));
    make_folder(&out)?;
    write_png(&out, &labelled_grid(&rows, &title)?)?;
    println!("samples: {}", out.display());
    Ok(Outcome::Done)
}

/// Draws on all ranks, for an evaluator.
fn many(arguments: &Arguments, path: &Path) -> Result<Outcome, Failure> {
    super::on_all_ranks(|comm| {
        let open = || -> Result<_, Failure> {
            if arguments.samples == 0 {
                return Err(Failure::usage("--samples 0 is none: give 1 or more"));
            }
            let config = arguments.config()?;
            super::rank_threads(comm, config.train.threads)?;
            let device = super::device_of_rank(&config, comm.local_rank())?;
            make_folder(path)?;
            if comm.rank() == 0 {
                check_place(path).map_err(Failure::usage)?;
            }
            Ok(Generator::open(&config, arguments.which(), arguments.checkpoint.as_deref(), &device)?)
        };
        let generator = each_rank(comm, || open().map_err(|error| error.of_rank()))?;
        same_step(comm, generator.step())?;
        let progress = if comm.rank() == 0 { bar("sampling", "images") } else { ProgressBar::hidden() };
        progress.set_length(arguments.samples as u64);
        let classes = if arguments.even_classes { Classes::Even } else { Classes::Random };
        let what = (arguments.samples, classes);
        write_many(comm, &generator, what, path, |done| progress.set_position(done as u64))?;
        progress.finish_and_clear();
        if comm.rank() == 0 {
            println!("{} samples of step {}: {}", arguments.samples, generator.step(), path.display());
        }
        Ok(())
    })
}

/// Makes the folder of a file.
fn make_folder(path: &Path) -> Result<(), Failure> {
    let Some(folder) = path.parent() else { return Ok(()) };
    std::fs::create_dir_all(folder)
        .map_err(|e| Failure::usage(format!("cannot make {}: {e}", folder.display())))
}
