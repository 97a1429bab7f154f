//! `repa-dist report`.

use std::path::{Path, PathBuf};

use clap::Args;
use repa_trainer::figures::{Panel, Series, loss_curves, write_png};
use repa_trainer::telemetry::progress::duration;
use repa_trainer::telemetry::record::StepRecord;

use crate::exit::{Failure, Outcome};
use crate::report::{self, Summary};
use crate::run::{Run, names};

#[derive(Debug, Args)]
pub struct Arguments {
    /// Run folders; several are drawn side by side
    #[arg(value_name = "RUN", default_value = "runs/quickstart")]
    runs: Vec<PathBuf>,
    /// Page to write; by default report.html in the run folder, or for several runs in the current one.
    /// The loss curves go beside it as a picture
    #[arg(long, value_name = "FILE.html")]
    out: Option<PathBuf>,
    /// Most pictures of samples of a run, spread over its steps
    #[arg(long, value_name = "N", default_value_t = 8)]
    samples: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    let runs = arguments.runs.iter().map(|run| Run::open(run)).collect::<Result<Vec<_>, _>>()?;
    let folder = match &runs[..] {
        [only] => only.folder.as_path(),
        _ => Path::new(""),
    };
    let page = arguments.out.clone().unwrap_or_else(|| folder.join("report.html"));
    report::write(&page, &runs, arguments.samples)?;
    let curves = page.with_file_name("loss-curves.png");
    draw(&curves, &runs)?;

    let summaries: Vec<Summary> = runs.iter().map(Summary::of).collect();
    if arguments.json {
        let text = serde_json::json!({ "page": page, "loss_curves": curves, "runs": summaries });
        println!("{text:#}");
        return Ok(Outcome::Done);
    }
    for (run, summary) in runs.iter().zip(&summaries) {
        tell(run, summary);
    }
    println!("report       {}", page.display());
    println!("loss curves  {}", curves.display());
    if let [only] = &runs[..] {
        next(only);
    }
    Ok(Outcome::Done)
}

fn draw(path: &Path, runs: &[Run]) -> Result<(), Failure> {
    type Value = fn(&StepRecord) -> f64;
    let quantities: [(&str, Value); 2] =
        [("denoising loss", |r| r.denoising_loss), ("alignment loss", |r| r.alignment_loss)];
    let names = names(runs);
    let points = quantities.map(|(_, value)| {
        let of = |run: &Run| run.steps.iter().map(|r| (r.step, value(r))).collect::<Vec<_>>();
        runs.iter().map(of).collect::<Vec<_>>()
    });
    let series: Vec<Vec<Series>> = points
        .iter()
        .map(|runs| runs.iter().zip(&names).map(|(points, name)| Series { name, points }).collect())
        .collect();
    let panels: Vec<Panel> =
        quantities.iter().zip(&series).map(|((name, _), series)| Panel { name, series }).collect();
    let title = match runs {
        [run] => format!("{}: {} steps", run.folder.display(), run.last().step),
        _ => format!("{} runs, means", runs.len()),
    };
    Ok(write_png(path, &loss_curves(&title, &panels)?)?)
}

fn tell(run: &Run, summary: &Summary) {
    let last = run.last();
    println!("run          {} ({}, {})", run.folder.display(), summary.model, summary.state.word());
    println!(
        "steps        {} in {}, {:.0} images/s",
        last.step,
        duration(summary.seconds),
        summary.images_per_second
    );
    println!(
        "last {:<7} denoising loss {:.4}, alignment loss {:.4}",
        summary.mean_over, summary.denoising_loss, summary.alignment_loss
    );
    if let Some(distance) = summary.frechet_distance {
        println!("distance     {distance:.2} (Fréchet, samples to data)");
    }
    if let Some(scores) = run.scores.last() {
        println!(
            "FID          {:.2} (step {}, {})",
            scores.fid,
            scores.step.unwrap_or_default(),
            scores.reference
        );
    }
}

/// Where the rest is, and what to try next.
fn next(run: &Run) {
    let dir = run.folder.display();
    if let Some(sample) = run.samples.last() {
        println!("samples      {}", sample.path.display());
    }
    println!("metrics      {dir}/prometheus-targets.json while it trains, for Prometheus' file_sd");
    println!("\nNext:");
    let me = std::env::args().next().unwrap_or_else(|| "repa-dist".into());
    println!("  {me} sample --run {dir} --per-class 20 sample.solver.cfg_scale=3");
    println!(
        "  mpirun -n 2 {me} run.dir={dir} train.steps={}    (goes on from the checkpoint)",
        2 * run.last().step
    );
    println!("  {me} config > mine.toml && mpirun -n 2 {me} --config mine.toml run.dir=runs/mine");
}
