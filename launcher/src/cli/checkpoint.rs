//! `repa-dist checkpoint`.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use clap::{Args, Subcommand};
use repa_trainer::checkpoint::reference::{self, Contents, Options, ReferenceError};
use repa_trainer::checkpoint::{Checkpoint, Checkpoints, diff, name, split};
use repa_trainer::exit::Kind;
use repa_trainer::telemetry::progress::duration;
use repa_trainer::train::{RunFolder, checkpoints_of};

use super::bar;
use crate::exit::{Failure, Outcome};

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List a run's checkpoints: step, size, age, ranks that wrote it, state
    List {
        /// Run folder, or s3://BUCKET/PREFIX
        #[arg(value_name = "RUN", default_value = "runs/quickstart")]
        run: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Read all of one checkpoint, or of all of a run's, and compare every digest
    Verify {
        /// Run folder, or a checkpoint's folder (step-N); s3://BUCKET/PREFIX and s3://BUCKET/PREFIX/step-N too
        #[arg(value_name = "RUN|CHECKPOINT", default_value = "runs/quickstart")]
        path: PathBuf,
    },
    /// Write a checkpoint's weights as safetensors, under the reference's parameter names
    Export(Export),
    /// Say which tensors of two checkpoints differ, and by how much
    Diff(Diff),
    /// Make a checkpoint of the reference's train.py (.pt), or an export with --all, the first checkpoint
    /// of a new run
    Import(Import),
}

#[derive(Debug, Args)]
struct Export {
    /// Run folder, or s3://BUCKET/PREFIX, whose newest good checkpoint is taken
    #[arg(long, value_name = "DIR", default_value = "runs/quickstart")]
    run: PathBuf,
    /// A checkpoint's folder (step-N), in place of the run's newest
    #[arg(long, value_name = "DIR", conflicts_with = "run")]
    checkpoint: Option<PathBuf>,
    #[command(flatten)]
    contents: Which,
    /// File to write; by default step-N-ema.safetensors and so on in the current folder
    #[arg(long, value_name = "FILE.safetensors")]
    out: Option<PathBuf>,
    /// Largest file in GB (10^9 bytes); more is split over several, with an index
    #[arg(long, value_name = "GB", default_value_t = 5.0)]
    max_file: f64,
}

#[derive(Debug, Args)]
#[group(multiple = false)]
struct Which {
    /// The moving average of the weights (the default)
    #[arg(long)]
    ema: bool,
    /// The weights themselves
    #[arg(long)]
    model: bool,
    /// Everything, AdamW's state included; `checkpoint import` reads it back
    #[arg(long)]
    all: bool,
}

#[derive(Debug, Args)]
struct Diff {
    /// A checkpoint's folder (step-N), or a run folder, whose newest good one is taken
    #[arg(value_name = "A")]
    first: PathBuf,
    /// The other
    #[arg(value_name = "B")]
    second: PathBuf,
    /// Tell all tensors that differ, not the ten that differ most
    #[arg(long)]
    all: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct Import {
    /// The file
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Folder of the new run
    #[arg(long, value_name = "DIR")]
    run: PathBuf,
    /// Attention heads, where the file does not say
    #[arg(long, value_name = "N")]
    num_heads: Option<usize>,
    /// Block after which the projectors read, where the file does not say
    #[arg(long, value_name = "N")]
    encoder_depth: Option<usize>,
    /// Steps behind the weights, where neither the file nor its name says it
    #[arg(long, value_name = "N")]
    step: Option<u64>,
    /// Leave AdamW's state out where the file has it
    #[arg(long)]
    weights_only: bool,
}

pub fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    match &arguments.command {
        Command::List { run, json } => show(run, *json),
        Command::Verify { path } => verify(path),
        Command::Export(arguments) => export(arguments),
        Command::Diff(arguments) => compare(arguments),
        Command::Import(arguments) => import(arguments),
    }
}

fn failure(error: ReferenceError) -> Failure {
    match error.kind() {
        Kind::Usage => Failure::usage(error),
        Kind::Data => Failure::data(error),
        Kind::Runtime => Failure::runtime(error),
    }
}

fn show(run: &Path, json: bool) -> Result<Outcome, Failure> {
    let checkpoints = checkpoints_of(run);
    let listed = checkpoints.list()?;
    let mut rows = Vec::new();
    for &step in &listed.steps {
        let path = &checkpoints.path(step);
        let age = age(&checkpoints, &name(step));
        let row = match checkpoints.open(step) {
            Ok(checkpoint) => serde_json::json!({
                "step": step,
                "state": "complete",
                "bytes": checkpoint.bytes(),
                "age_seconds": age,
                "world_size": checkpoint.manifest().world_size,
                "samples": checkpoint.progress().samples,
                "metrics": checkpoint.manifest().metrics,
                "path": path,
            }),
            Err(error) => serde_json::json!({
                "step": step,
                "state": "damaged",
                "problem": error.to_string(),
                "age_seconds": age,
                "path": path,
            }),
        };
        rows.push(row);
    }
    rows.extend(listed.unfinished.iter().map(|entry| {
        let path = checkpoints.location().join(entry);
        serde_json::json!({ "state": "unfinished", "age_seconds": age(&checkpoints, entry), "path": path })
    }));
    if json {
        println!("{:#}", serde_json::Value::Array(rows));
        return Ok(Outcome::Done);
    }
    if rows.is_empty() {
        println!("{} holds no checkpoints", run.display());
        return Ok(Outcome::Done);
    }
    println!("{:>10}  {:>10}  {:>12}  {:>5}  {:>8}  state", "step", "size", "age", "ranks", "loss");
    for row in &rows {
        let number = |key: &str| row[key].as_u64().map_or("-".to_owned(), |n| n.to_string());
        let size = row["bytes"].as_u64().map_or("-".to_owned(), |n| format!("{:.1} MB", n as f64 / 1e6));
        let age = row["age_seconds"].as_f64().map_or("-".to_owned(), duration);
        let state = match row["state"].as_str() {
            Some("damaged") => format!("damaged: {}", row["problem"].as_str().unwrap_or_default()),
            Some("unfinished") => {
                format!(
                    "unfinished (being saved now, or cut short): {}",
                    row["path"].as_str().unwrap_or_default()
                )
            }
            _ => "complete".to_owned(),
        };
        let loss = row["metrics"]["loss"].as_f64().map_or("-".to_owned(), |loss| format!("{loss:.4}"));
        let (step, ranks) = (number("step"), number("world_size"));
        println!("{step:>10}  {size:>10}  {age:>12}  {ranks:>5}  {loss:>8}  {state}");
    }
    Ok(Outcome::Done)
}

/// Seconds since a checkpoint was last changed, where its place tells.
fn age(checkpoints: &Checkpoints, entry: &str) -> Option<f64> {
    SystemTime::now().duration_since(checkpoints.changed(entry)?).ok().map(|age| age.as_secs_f64())
}

fn verify(path: &Path) -> Result<Outcome, Failure> {
    let paths = if split(path).is_some() {
        vec![path.to_owned()]
    } else {
        let checkpoints = checkpoints_of(path);
        checkpoints.list()?.steps.into_iter().map(|step| checkpoints.path(step)).collect()
    };
    if paths.is_empty() {
        return Err(Failure::data(format!("{} holds no checkpoints", path.display())));
    }
    let opened: Vec<_> = paths.iter().map(|path| Checkpoint::open(path)).collect();
    let progress = bar("verifying", "MB");
    let total: u64 = opened.iter().flatten().map(Checkpoint::bytes).sum();
    progress.set_length(total / 1_000_000);
    let done = std::sync::atomic::AtomicU64::new(0);
    let read = |bytes: u64| {
        let before = done.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed);
        progress.set_position((before + bytes) / 1_000_000);
    };
    let mut damaged = 0;
    for (path, checkpoint) in paths.iter().zip(opened) {
        let faults = match checkpoint {
            Ok(checkpoint) => checkpoint.faults(&read),
            Err(error) => vec![error],
        };
        // A place that cannot be reached says nothing of what is there.
        let (faults, unreached): (Vec<_>, Vec<_>) = faults.into_iter().partition(|f| f.kind() == Kind::Data);
        if let Some(error) = unreached.into_iter().next() {
            progress.finish_and_clear();
            return Err(error.into());
        }
        damaged += usize::from(!faults.is_empty());
        progress.suspend(|| match faults.is_empty() {
            true => println!("{}: sound", path.display()),
            false => faults.iter().for_each(|fault| eprintln!("{fault}")),
        });
    }
    progress.finish_and_clear();
    match damaged {
        0 => Ok(Outcome::Done),
        _ => Err(Failure::data(format!(
            "{damaged} of {} checkpoints cannot be used, as said above: remove them, or bring them back \
             from a copy",
            paths.len()
        ))),
    }
}

fn export(arguments: &Export) -> Result<Outcome, Failure> {
    let max_bytes = arguments.max_file * 1e9;
    if max_bytes.is_nan() || max_bytes < 1.0 {
        return Err(Failure::usage(format!("--max-file {} must be above 0", arguments.max_file)));
    }
    let checkpoint = match &arguments.checkpoint {
        Some(path) => Checkpoint::open(path)?,
        None => {
            let found = checkpoints_of(&arguments.run).latest()?;
            found.passed_over.iter().for_each(|problem| eprintln!("passed over a checkpoint: {problem}"));
            found.checkpoint.ok_or_else(|| {
                Failure::data(format!(
                    "{} holds no checkpoint: name a run with --run",
                    arguments.run.display()
                ))
            })?
        }
    };
    let (contents, word) = match &arguments.contents {
        Which { model: true, .. } => (Contents::Model, "model"),
        Which { all: true, .. } => (Contents::All, "all"),
        Which { .. } => (Contents::Ema, "ema"),
    };
    let step = checkpoint.progress().step;
    let out = match &arguments.out {
        Some(out) => out.clone(),
        None => PathBuf::from(format!("step-{step:08}-{word}.safetensors")),
    };
    let progress = bar("exporting", "tensors");
    let written = reference::export(&checkpoint, contents, &out, max_bytes as usize, &mut |done, total| {
        progress.set_length(total as u64);
        progress.set_position(done as u64);
    })
    .map_err(failure)?;
    progress.finish_and_clear();
    println!("exported step {step} ({word}) to {}", written.display());
    Ok(Outcome::Done)
}

fn compare(arguments: &Diff) -> Result<Outcome, Failure> {
    let open = |path: &Path| -> Result<Checkpoint, Failure> {
        if split(path).is_some() {
            let checkpoint = Checkpoint::open(path)?;
            checkpoint.verify()?;
            return Ok(checkpoint);
        }
        let found = checkpoints_of(path).latest()?;
        found.checkpoint.ok_or_else(|| Failure::data(format!("{} holds no checkpoint", path.display())))
    };
    let (first, second) = (open(&arguments.first)?, open(&arguments.second)?);
    let progress = bar("comparing", "tensors");
    let found = diff(&first, &second, &mut |done, total| {
        progress.set_length(total as u64);
        progress.set_position(done as u64);
    })?;
    progress.finish_and_clear();
    if arguments.json {
        let report = serde_json::to_string_pretty(&found).expect("it serialises");
        println!("{report}");
        return Ok(Outcome::Done);
    }
    let (a, b) = (first.progress(), second.progress());
    if a != b {
        println!("steps {} and {}, samples {} and {}", a.step, b.step, a.samples, b.samples);
    }
    for (what, names) in
        [("only in the first", &found.only_first), ("only in the second", &found.only_second)]
    {
        names.iter().for_each(|name| println!("{what}: {name}"));
    }
    found.misshapen.iter().for_each(|(name, a, b)| println!("{name}: {a:?} and {b:?}"));
    println!("{} tensors are the same to the bit, {} differ", found.same, found.differing.len());
    let shown = if arguments.all { usize::MAX } else { 10 };
    if !found.differing.is_empty() {
        println!("{:>12} {:>12} {:>12}  tensor", "elements", "largest", "relative");
    }
    for row in found.differing.iter().take(shown) {
        println!("{:>12} {:>12.3e} {:>12.3e}  {}", row.elements, row.largest, row.relative, row.name);
    }
    if found.differing.len() > shown {
        println!("and {} more (--all)", found.differing.len() - shown);
    }
    Ok(Outcome::Done)
}

fn import(arguments: &Import) -> Result<Outcome, Failure> {
    let run = &arguments.run;
    // Held until the end, so that no run trains into the folder meanwhile.
    let folder = RunFolder::claim(run, "this host")?;
    let options = Options {
        num_heads: arguments.num_heads,
        encoder_depth: arguments.encoder_depth,
        steps: arguments.step,
        weights_only: arguments.weights_only,
    };
    let progress = bar("importing", "tensors");
    let checkpoints = run.join("checkpoints");
    let imported = reference::import(&arguments.file, &checkpoints, &options, &mut |done, total| {
        progress.set_length(total as u64);
        progress.set_position(done as u64);
    })
    .map_err(failure)?;
    progress.finish_and_clear();
    folder.write("config.toml", &imported.config_toml(run))?;
    let config = run.join("config.toml");
    println!("imported step {} to {}", imported.progress.step, imported.path.display());
    println!("its settings, as far as the file says: {}", config.display());
    for sentence in &imported.assumed {
        println!("assumed: {sentence}");
    }
    let run = run.display();
    println!("\nDraw images with:");
    println!("  repa-dist sample --run {run} --per-class 1 sample.autoencoder=AUTOENCODER");
    println!("Go on training with:");
    println!("  mpirun -n 2 repa-dist --config {} data.dir=STORE", config.display());
    if !imported.config.alignment.z_dims.is_empty() {
        println!("  and 'alignment.encoders=[\"FILE\"]' where STORE has images and no features");
    }
    Ok(Outcome::Done)
}
