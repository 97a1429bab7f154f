//! `repa-dist data`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use repa_trainer::Device;
use repa_trainer::data::store::LatentStore;
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

pub fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    match &arguments.command {
        Command::Quickstart { out } => make_quickstart(out),
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
