//! `repa-dist data info` and `verify`.

use std::path::Path;

use repa_trainer::data;

use crate::cli::bar;
use crate::exit::{Failure, Outcome};

pub fn info(store: &Path, json: bool) -> Result<Outcome, Failure> {
    let store = data::open(store)?;
    let index = store.index();
    if json {
        println!("{:#}", serde_json::to_value(index).map_err(Failure::runtime)?);
        return Ok(Outcome::Done);
    }
    println!("store        {}", store.dir().display());
    print!("{}", index.summary());
    Ok(Outcome::Done)
}

pub fn verify(store: &Path, json: bool) -> Result<Outcome, Failure> {
    let store = data::open(store)?;
    let progress = bar("verifying", "samples");
    progress.set_length(store.len() as u64);
    let report = store.verify(&|done| progress.set_position(done));
    progress.finish_and_clear();
    if json {
        println!("{:#}", serde_json::to_value(&report).map_err(Failure::runtime)?);
    } else {
        for finding in &report.findings {
            eprintln!("{finding}");
        }
    }
    if report.findings.is_empty() {
        if !json {
            println!("{}: {} samples, all sound", store.dir().display(), store.len());
        }
        return Ok(Outcome::Done);
    }
    Err(Failure::data(format!(
        "{} has {} faults, listed above: make the store again",
        store.dir().display(),
        report.findings.len()
    )))
}
