//! `repa-dist estimate`.

use clap::Args;
use repa_trainer::config::Sharding;
use repa_trainer::estimate::{Estimate, Job, Line, Place, estimate};

use super::{Settings, size};
use crate::exit::{Failure, Outcome};

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    settings: Settings,
    /// Ranks that train together
    #[arg(long, value_name = "N", default_value_t = 1)]
    ranks: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    let ranks = arguments.ranks;
    if ranks == 0 {
        return Err(Failure::usage("--ranks must be above 0"));
    }
    let config = arguments.settings.load()?.config;
    let threads = match config.train.threads {
        // As training would on this machine, with all of its ranks here.
        0 => std::thread::available_parallelism().map_or(1, |cores| (cores.get() / ranks).max(1)),
        threads => threads,
    };
    let shards = if config.optimizer.sharding == Sharding::Zero1 { ranks } else { 1 };
    let figures = estimate(&config, &Job { ranks, shards, threads });
    if arguments.json {
        println!("{:#}", serde_json::to_value(&figures).map_err(Failure::runtime)?);
    } else {
        print(&figures);
    }
    Ok(Outcome::Done)
}

fn print(figures: &Estimate) {
    println!(
        "each of {} rank{} on {}: {:.1} M parameters, {} samples of a step, {} at once",
        figures.ranks,
        if figures.ranks == 1 { "" } else { "s" },
        figures.device,
        figures.parameters as f64 / 1e6,
        figures.rank_batch,
        figures.micro_batch
    );
    let on_host = |line: &&Line| line.place == Place::Host;
    let row = |name: &str, bytes: u64, what: &str| {
        println!("{}", format!("{name:<20} {:>12}  {what}", size(bytes)).trim_end());
    };
    for line in figures.lines.iter().filter(on_host) {
        row(line.part.name(), line.bytes, &line.what);
    }
    let rest = if figures.device_bytes > 0 { "in the host's memory" } else { "" };
    row("total", figures.host_bytes, rest);
    if figures.device_bytes > 0 {
        println!();
        for line in figures.lines.iter().filter(|line| !on_host(line)) {
            row(line.part.name(), line.bytes, &line.what);
        }
        row("total", figures.device_bytes, "in the GPU's memory");
    }
    println!();
    let saved = size(figures.sharding_saves_bytes);
    let percent = 100.0 * figures.sharding_saves_fraction;
    match (figures.ranks, figures.shards) {
        (1, _) => println!("one rank has nothing to share: sharding saves nothing"),
        (_, 1) => {
            println!(
                "sharding moments and EMA over the ranks (optimizer.sharding=zero1) would save {saved}, {percent:.1} %"
            )
        }
        _ => println!("sharding moments and EMA over the ranks saves {saved}, {percent:.1} %"),
    }
    for note in &figures.notes {
        println!("note: {note}");
    }
}
