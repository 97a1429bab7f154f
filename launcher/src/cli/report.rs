//! `repa-dist report`.

use std::path::PathBuf;

use clap::Args;
use repa_trainer::figures::{Series, loss_curves, write_png};
use repa_trainer::telemetry::progress::duration;
use repa_trainer::telemetry::record::{StepRecord, log_path, read_log};

use crate::exit::{Failure, Outcome};

#[derive(Debug, Args)]
pub struct Arguments {
    /// Run folder
    #[arg(value_name = "RUN", default_value = "runs/quickstart")]
    run: PathBuf,
}

pub fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    let run = &arguments.run;
    let log = read_log(&log_path(run))
        .map_err(|e| Failure::data(format!("cannot read {}: {e}", log_path(run).display())))?;
    let Some(last) = log.last() else {
        return Err(Failure::data(format!(
            "{} holds no metrics: train first, or name another run folder",
            run.display()
        )));
    };
    let curves = run.join("loss-curves.png");
    let points = |value: fn(&StepRecord) -> f64| log.iter().map(|r| (r.step, value(r))).collect::<Vec<_>>();
    let (denoising, alignment) = (points(|r| r.denoising_loss), points(|r| r.alignment_loss));
    let series = [
        Series { name: "denoising loss", points: &denoising },
        Series { name: "alignment loss", points: &alignment },
    ];
    write_png(&curves, &loss_curves(&format!("{}: {} steps", run.display(), last.step), &series)?)?;
    let seconds: f64 = log.iter().map(|r| r.step_seconds).sum();
    let images = last.images_per_second * last.step_seconds * log.len() as f64;
    println!("run          {}", run.display());
    println!("steps        {} in {}, {:.0} images/s", last.step, duration(seconds), images / seconds);
    println!(
        "last step    loss {:.4}, denoising {:.4}, alignment {:.4}",
        last.loss, last.denoising_loss, last.alignment_loss
    );
    println!("loss curves  {}", curves.display());
    if let Some(samples) = newest(&run.join("samples")) {
        println!("samples      {}", samples.display());
    }
    println!(
        "metrics      {} while it trains, for Prometheus' file_sd",
        run.join("prometheus-targets.json").display()
    );
    println!("\nNext:");
    let me = std::env::args().next().unwrap_or_else(|| "repa-dist".into());
    println!("  {me} sample --run {} --per-class 20 sample.solver.cfg_scale=3", run.display());
    println!(
        "  mpirun -n 2 {me} run.dir={} train.steps={}    (goes on from the checkpoint)",
        run.display(),
        2 * last.step
    );
    println!("  {me} config > mine.toml && mpirun -n 2 {me} --config mine.toml run.dir=runs/mine");
    Ok(Outcome::Done)
}

/// The last file of a folder by name.
fn newest(folder: &std::path::Path) -> Option<PathBuf> {
    std::fs::read_dir(folder).ok()?.filter_map(|entry| Some(entry.ok()?.path())).max()
}
