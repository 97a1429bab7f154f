//! `repa-dist evaluate`.

use std::path::PathBuf;

use clap::Args;
use repa_trainer::encoder::{self, VisionEncoder};
use repa_trainer::evaluate::evaluate_run;
use repa_trainer::generate::run_config;

use super::bar;
use crate::exit::{Failure, Outcome};

#[derive(Debug, Args)]
pub struct Arguments {
    /// Run folder
    #[arg(long, value_name = "DIR", default_value = "runs/quickstart")]
    run: PathBuf,
    /// A checkpoint's folder (step-N), in place of the run's newest
    #[arg(long, value_name = "DIR")]
    checkpoint: Option<PathBuf>,
    /// Samples to draw
    #[arg(long, value_name = "N", default_value_t = 1000)]
    samples: usize,
    /// Encoder whose features are compared, as alignment.encoders names them; by default the quickstart's teacher
    #[arg(long, value_name = "FILE")]
    encoder: Option<PathBuf>,
    /// Print JSON; it is kept as evaluation.json in the run folder in any case
    #[arg(long)]
    json: bool,
    /// Values that win over the run's configuration, such as sample.solver.cfg_scale=1
    #[arg(value_name = "KEY=VALUE")]
    values: Vec<String>,
}

pub fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    if arguments.samples < 2 {
        return Err(Failure::usage(format!("--samples {} is too few: give 2 or more", arguments.samples)));
    }
    let mut config = run_config(&arguments.run, &arguments.values)?;
    config.run.dir.clone_from(&arguments.run);
    super::use_threads(config.train.threads)?;
    let device = super::device_of_run(&config)?;
    let encoder = match &arguments.encoder {
        Some(name) => VisionEncoder::named(name, &device).map_err(Failure::data)?,
        None => encoder::quickstart(&device),
    };
    let progress = bar("sampling", "images");
    progress.set_length(arguments.samples as u64);
    let of = (arguments.checkpoint.as_deref(), arguments.samples);
    let evaluation = evaluate_run(&config, &encoder, of, &device, |done| progress.set_position(done as u64))?;
    progress.finish_and_clear();

    let json = format!("{:#}\n", serde_json::to_value(&evaluation).map_err(Failure::runtime)?);
    let path = arguments.run.join("evaluation.json");
    std::fs::write(&path, &json)
        .map_err(|e| Failure::usage(format!("cannot write {}: {e}", path.display())))?;
    if arguments.json {
        print!("{json}");
        return Ok(Outcome::Done);
    }
    let whose = if arguments.encoder.is_some() { encoder.id() } else { "the teacher" };
    println!("Fréchet distance to the data in {whose}'s features, {} samples:", evaluation.samples);
    println!("  this model, step {:<9} {:>10.3}", evaluation.step, evaluation.trained);
    println!("  untrained model           {:>10.3}", evaluation.untrained);
    println!("  decoded class means       {:>10.3}", evaluation.class_means);
    println!("  data, half against half   {:>10.3}   (the floor)", evaluation.floor);
    println!("kept in {}", path.display());
    Ok(Outcome::Done)
}
