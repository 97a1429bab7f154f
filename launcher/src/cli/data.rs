//! `repa-dist data`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use repa_trainer::Device;
use repa_trainer::data::import::{ImportOptions, import_repa};
use repa_trainer::data::store::{LatentStore, Precision};
use repa_trainer::quickstart;

use super::bar;
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
    },
    /// Make a store from REPA's (EDM2's) layout: vae-sd/dataset.json, vae-sd/*/*.npy and images/
    Import(Import),
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
    },
}

#[derive(Debug, Args)]
struct Import {
    /// Folder that holds vae-sd/ (and images/)
    #[arg(value_name = "ROOT")]
    root: PathBuf,
    /// Folder of the store
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Keep the images as well
    #[arg(long)]
    images: bool,
    /// Store latents in float16: half the size
    #[arg(long)]
    f16: bool,
    /// Number of classes; by default one more than the greatest label
    #[arg(long, value_name = "N")]
    classes: Option<usize>,
    /// Bad members that are left out and reported, before it is an error
    #[arg(long, value_name = "N", default_value_t = 0)]
    max_bad: usize,
}

pub fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    match &arguments.command {
        Command::Quickstart { out } => make_quickstart(out),
        Command::Import(arguments) => import(arguments),
        Command::Info { store, json } => info(store, *json),
        Command::Verify { store } => verify(store),
    }
}

fn make_quickstart(out: &std::path::Path) -> Result<Outcome, Failure> {
    if LatentStore::open(out).is_ok() {
        println!("data: {} is there already", out.display());
        return Ok(Outcome::Done);
    }
    let progress = bar("encoding emoji", "images");
    let samples = quickstart::make_data(out, &Device::flex(), &mut |done, total| {
        progress.set_length(total as u64);
        progress.set_position(done as u64);
    })
    .map_err(Failure::data)?;
    progress.finish_and_clear();
    println!("data: {samples} labelled emoji (Twemoji, CC-BY 4.0) in {}", out.display());
    Ok(Outcome::Done)
}

fn import(arguments: &Import) -> Result<Outcome, Failure> {
    let options = ImportOptions {
        classes: arguments.classes,
        images: arguments.images,
        precision: if arguments.f16 { Precision::F16 } else { Precision::F32 },
        max_bad: arguments.max_bad,
        ..ImportOptions::default()
    };
    let progress = bar("importing", "samples");
    let report = import_repa(&arguments.root, &arguments.out, &options, &mut |done, total| {
        progress.set_length(total as u64);
        progress.set_position(done as u64);
    })
    .map_err(Failure::data)?;
    progress.finish_and_clear();
    for member in &report.bad {
        eprintln!("left out: {} {}", member.name, member.problem);
    }
    list_some("latents that dataset.json does not list", &report.unlisted);
    list_some("images without latents", &report.images_without_latents);
    println!("data: {} samples in {}", report.samples, arguments.out.display());
    Ok(Outcome::Done)
}

/// Names a few of many.
fn list_some(what: &str, names: &[String]) {
    if !names.is_empty() {
        let some = names.iter().take(5).map(String::as_str).collect::<Vec<_>>().join(", ");
        eprintln!("{} {what}: {some}{}", names.len(), if names.len() > 5 { ", ..." } else { "" });
    }
}

fn info(store: &std::path::Path, json: bool) -> Result<Outcome, Failure> {
    let store = LatentStore::open(store)?;
    let index = store.index();
    if json {
        println!("{:#}", serde_json::to_value(index).map_err(Failure::runtime)?);
        return Ok(Outcome::Done);
    }
    let contents = &index.contents;
    println!("store       {}", store.dir().display());
    println!("samples     {} in {} shards", index.samples, index.shards.len());
    println!(
        "latents     {:?} [{}, {}, {}] of {} x {} pixel images, by {}",
        contents.kind,
        contents.channels,
        contents.height,
        contents.width,
        contents.resolution,
        contents.resolution,
        contents.autoencoder
    );
    println!("classes     {} {}", contents.classes, contents.class_names.join(", "));
    for encoder in &contents.encoders {
        println!("features    {} [{}, {}]", encoder.id, encoder.tokens, encoder.dim);
    }
    println!("images      {}", if contents.images { "stored" } else { "not stored" });
    println!("source      {}", contents.source);
    Ok(Outcome::Done)
}

fn verify(store: &std::path::Path) -> Result<Outcome, Failure> {
    let store = LatentStore::open(store)?;
    let progress = bar("verifying", "samples");
    progress.set_length(store.len() as u64);
    let report = store.verify(&|done| progress.set_position(done));
    progress.finish_and_clear();
    for finding in &report.findings {
        eprintln!("{finding}");
    }
    if report.findings.is_empty() {
        println!("{}: {} samples, all sound", store.dir().display(), store.len());
        Ok(Outcome::Done)
    } else {
        Err(Failure::data(format!(
            "{} has {} faults, listed above: make the store again",
            store.dir().display(),
            report.findings.len()
        )))
    }
}
