//! `repa-dist evaluate`.

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use indicatif::ProgressBar;
use repa_comm::{Communicator, RemoteError, all_or_first_error};
use repa_trainer::config::Config;
use repa_trainer::encoder::{self, VisionEncoder};
use repa_trainer::evaluate::{Batch, Evaluation, Inception, Samples, Scores, evaluate_run, score};
use repa_trainer::generate::{Classes, Generator, Which, each_rank, run_config, same_step};
use serde::Serialize;

use super::{Settings, bar};
use crate::exit::{Failure, Outcome};
use crate::run::{EVALUATION, SCORES};

/// Samples that are compared in an encoder's features, and that ADM's evaluator is given.
const FEW: usize = 1000;
const MANY: usize = 50_000;

#[derive(Debug, Args)]
pub struct Arguments {
    /// Run folder
    #[arg(long, value_name = "DIR", default_value = "runs/quickstart")]
    run: PathBuf,
    /// A checkpoint's folder (step-N), in place of the run's newest
    #[arg(long, value_name = "DIR")]
    checkpoint: Option<PathBuf>,
    /// Samples to draw [default: 1000, with --inception 50000]
    #[arg(long, value_name = "N")]
    samples: Option<usize>,
    /// Encoder whose features are compared, as alignment.encoders names them; by default the quickstart's teacher
    #[arg(long, value_name = "FILE")]
    encoder: Option<PathBuf>,
    /// Compute what ADM's evaluator does (FID, sFID, inception score, precision, recall) with these weights of
    /// Inception v3, pt_inception-2015-12-05-6726825d.pth
    #[arg(long, value_name = "FILE", requires = "reference", conflicts_with = "encoder")]
    inception: Option<PathBuf>,
    /// Reference batch of --inception, such as ADM's VIRTUAL_imagenet256_labeled.npz
    #[arg(long, value_name = "FILE", requires = "inception")]
    reference: Option<PathBuf>,
    /// Images for --inception (arr_0 of an .npz, uint8 [N, H, W, 3]), in place of a run's samples; computed on the CPU
    /// unless device=... says otherwise, and not kept
    #[arg(long, value_name = "FILE", requires = "inception", conflicts_with_all = ["run", "checkpoint", "samples"])]
    images: Option<PathBuf>,
    /// As many samples of each class with --inception, instead of random classes
    #[arg(long, requires = "inception", conflicts_with = "images")]
    even_classes: bool,
    /// Print JSON; a run's folder keeps evaluation.json, or a line of scores.jsonl with --inception, in any case
    #[arg(long)]
    json: bool,
    /// Values that win over the run's configuration, such as sample.solver.cfg_scale=1
    #[arg(value_name = "KEY=VALUE")]
    values: Vec<String>,
}

impl Arguments {
    fn config(&self) -> Result<Config, Failure> {
        let mut config = run_config(&self.run, &self.values)?;
        config.run.dir.clone_from(&self.run);
        Ok(config)
    }

    /// How many samples, of which the figures take at least so many.
    fn count(&self, usual: usize, least: usize) -> Result<usize, Failure> {
        match self.samples.unwrap_or(usual) {
            few if few < least => {
                Err(Failure::usage(format!("--samples {few} is too few: give {least} or more")))
            }
            enough => Ok(enough),
        }
    }

    /// Prints figures and then has them kept, so that a run folder that cannot be written loses nothing; says where.
    fn tell<T: Serialize>(
        &self,
        figures: &T,
        text: impl FnOnce(),
        keep: impl FnOnce() -> Result<Option<PathBuf>, Failure>,
    ) -> Result<(), Failure> {
        match self.json {
            true => println!("{:#}", serde_json::to_value(figures).map_err(Failure::runtime)?),
            false => text(),
        }
        match keep()? {
            Some(path) if !self.json => println!("kept in {}", path.display()),
            _ => {}
        }
        Ok(())
    }

    /// Keeps an evaluation, the last one alone.
    fn keep(&self, figures: &Evaluation) -> Result<Option<PathBuf>, Failure> {
        let path = self.run.join(EVALUATION);
        let json = serde_json::to_value(figures).map_err(Failure::runtime)?;
        std::fs::write(&path, format!("{json:#}\n")).map_err(|error| unkept(&path, &error))?;
        Ok(Some(path))
    }

    /// Keeps scores as a line below those of other checkpoints and settings; none where they are of no run.
    fn keep_scores(&self, scores: &Scores) -> Result<Option<PathBuf>, Failure> {
        if self.images.is_some() {
            return Ok(None);
        }
        let path = self.run.join(SCORES);
        let line = format!("{}\n", serde_json::to_string(scores).map_err(Failure::runtime)?);
        let mut options = std::fs::OpenOptions::new();
        let file = options.create(true).append(true).open(&path);
        file.and_then(|mut file| file.write_all(line.as_bytes())).map_err(|error| unkept(&path, &error))?;
        Ok(Some(path))
    }
}

fn unkept(path: &Path, error: &std::io::Error) -> Failure {
    Failure::usage(format!("cannot write {}: {error}", path.display()))
}

pub fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    super::on_all_ranks(|comm| match (&arguments.inception, &arguments.reference) {
        (Some(inception), Some(reference)) => compare(comm, arguments, inception, reference),
        _ => evaluate(comm, arguments),
    })
}

fn shown(comm: &dyn Communicator, unit: &'static str, length: usize) -> ProgressBar {
    let progress = if comm.rank() == 0 { bar("evaluating", unit) } else { ProgressBar::hidden() };
    progress.set_length(length as u64);
    progress
}

/// Fréchet distances to the run's data, in an encoder's features.
fn evaluate(comm: &dyn Communicator, arguments: &Arguments) -> Result<(), RemoteError> {
    let open = || -> Result<_, Failure> {
        let count = arguments.count(FEW, 2)?;
        let config = arguments.config()?;
        super::rank_threads(comm, config.train.threads)?;
        let device = super::device_of_rank(&config, comm.local_rank())?;
        let encoder = match &arguments.encoder {
            Some(name) => VisionEncoder::named(name, &device).map_err(Failure::data)?,
            None => encoder::quickstart(&device),
        };
        Ok((count, config, device, encoder))
    };
    let (count, config, device, encoder) = each_rank(comm, || open().map_err(|error| error.of_rank()))?;
    let progress = shown(comm, "samples", count);
    let of = (arguments.checkpoint.as_deref(), count);
    let found =
        evaluate_run(comm, &config, &encoder, of, &device, |done| progress.set_position(done as u64))?;
    progress.finish_and_clear();
    let told = match &found {
        Some(figures) => {
            arguments.tell(figures, || say(arguments, &encoder, figures), || arguments.keep(figures))
        }
        None => Ok(()),
    };
    all_or_first_error(comm, told.map_err(|error| error.of_rank()))
}

fn say(arguments: &Arguments, encoder: &VisionEncoder, figures: &Evaluation) {
    let whose = if arguments.encoder.is_some() { encoder.id() } else { "the teacher" };
    println!("Fréchet distance to the data in {whose}'s features, {} samples:", figures.samples);
    println!("  this model, step {:<9} {:>10.3}", figures.step, figures.trained);
    println!("  untrained model           {:>10.3}", figures.untrained);
    println!("  decoded class means       {:>10.3}", figures.class_means);
    println!("  data, half against half   {:>10.3}   (the floor)", figures.floor);
}

/// The scores of ADM's evaluator.
fn compare(
    comm: &dyn Communicator,
    arguments: &Arguments,
    inception: &Path,
    reference: &Path,
) -> Result<(), RemoteError> {
    let open = || -> Result<_, Failure> {
        let count = arguments.count(MANY, 4)?;
        let reference = Batch::open(reference).map_err(Failure::data)?;
        let config = match &arguments.images {
            // Of a configuration, only where to compute and on how many threads.
            Some(_) => {
                let mut config = Settings { config: None, values: arguments.values.clone() }.load()?.config;
                // Nothing is drawn: to a GPU that is full, a smaller batch is no help.
                config.sample.batch = 1;
                config
            }
            None => arguments.config()?,
        };
        super::rank_threads(comm, config.train.threads)?;
        let device = super::device_of_rank(&config, comm.local_rank())?;
        let inception = Inception::open(inception, &device)?;
        let samples = match &arguments.images {
            Some(path) => Chosen::Stored(pictures(path)?),
            None => {
                let checkpoint = arguments.checkpoint.as_deref();
                let generator = Generator::open(&config, Which::Ema, checkpoint, &device)?;
                Chosen::Drawn(Box::new(generator), count)
            }
        };
        Ok((reference, inception, samples))
    };
    let (reference, inception, chosen) = each_rank(comm, || open().map_err(|error| error.of_rank()))?;
    if let Chosen::Drawn(generator, _) = &chosen {
        same_step(comm, generator.step())?;
    }
    let classes = if arguments.even_classes { Classes::Even } else { Classes::Random };
    let samples = match &chosen {
        Chosen::Drawn(generator, count) => Samples::Drawn(generator, *count, classes),
        Chosen::Stored(images) => Samples::Stored(images),
    };
    let progress = shown(comm, "images", reference.count() + samples.count());
    let found = score(comm, &inception, &reference, &samples, |done| progress.set_position(done as u64))?;
    progress.finish_and_clear();
    let told = match &found {
        Some(scores) => {
            arguments.tell(scores, || say_scores(arguments, scores), || arguments.keep_scores(scores))
        }
        None => Ok(()),
    };
    all_or_first_error(comm, told.map_err(|error| error.of_rank()))
}

/// What is compared.
enum Chosen {
    Drawn(Box<Generator>, usize),
    Stored(Batch),
}

fn pictures(path: &Path) -> Result<Batch, Failure> {
    let images = Batch::open(path).map_err(Failure::data)?;
    match images.count() {
        0 => Err(Failure::data(format!("{} holds no images (arr_0)", path.display()))),
        _ => Ok(images),
    }
}

fn say_scores(arguments: &Arguments, scores: &Scores) {
    let of = match (&arguments.images, scores.step) {
        (Some(path), _) => format!("images of {}", path.display()),
        (None, step) => format!("samples of step {}", step.unwrap_or_default()),
    };
    println!("{} {of} against {}, {} images:", scores.samples, scores.reference, scores.reference_images);
    let line = |name: &str, value: Option<f64>, digits: usize| match value {
        Some(value) => println!("  {name:<16} {value:>9.digits$}"),
        None => println!("  {name:<16} {:>9}", "-"),
    };
    line("FID", Some(scores.fid), 3);
    line("sFID", scores.sfid, 3);
    line("inception score", Some(scores.inception_score), 2);
    line("precision", scores.precision, 4);
    line("recall", scores.recall, 4);
}
