//! `repa-dist sample`.

use std::path::PathBuf;

use clap::Args;
use repa_trainer::figures::{labelled_grid, write_png};
use repa_trainer::generate::{Generator, Which, class_rows, run_config};

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
    /// Use the weights themselves instead of their moving average
    #[arg(long)]
    raw_weights: bool,
    /// PNG to write; by default samples/step-N.png in the run folder
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Values that win over the run's configuration, such as sample.solver.cfg_scale=2.5
    #[arg(value_name = "KEY=VALUE")]
    values: Vec<String>,
}

pub fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    let mut config = run_config(&arguments.run, &arguments.values)?;
    config.run.dir.clone_from(&arguments.run);
    super::use_threads(config.train.threads)?;
    let which = if arguments.raw_weights { Which::Model } else { Which::Ema };
    let device = super::device_of_run(&config)?;
    let generator = Generator::open(&config, which, &device)?;
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
    if let Some(folder) = out.parent() {
        std::fs::create_dir_all(folder)
            .map_err(|e| Failure::usage(format!("cannot make {}: {e}", folder.display())))?;
    }
    write_png(&out, &labelled_grid(&rows, &title)?)?;
    println!("samples: {}", out.display());
    Ok(Outcome::Done)
}
