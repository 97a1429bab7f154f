//! `repa-dist train`, on every rank.

use clap::Args;
use repa_comm::{Options, all_or_first_error, end_with};
use repa_trainer::config::Loaded;
use repa_trainer::train::{StopRequest, communicator, train};

use super::Settings;
use crate::exit::{Failure, Outcome};

/// What `train` takes.
#[derive(Debug, Clone, Args)]
pub struct Arguments {
    #[command(flatten)]
    settings: Settings,
    /// Where to go on from, as run.resume=...: the newest checkpoint (auto, the default), nothing (never), the
    /// checkpoint of a step, or another run's folder or checkpoint
    #[arg(long, value_name = "auto|never|STEP|PATH")]
    resume: Option<String>,
}

impl Arguments {
    /// The merged configuration.
    pub fn load(&self) -> Result<Loaded, Failure> {
        let mut settings = self.settings.clone();
        settings.values.extend(self.resume.iter().map(|resume| format!("run.resume={resume}")));
        settings.load()
    }
}

pub fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    let mpi = repa_comm::init(&Options::default()).map_err(Failure::runtime)?;
    repa_comm::install_panic_hook(crate::exit::explain);
    // Every rank reads its own configuration; a mistake in it is reported once.
    let local = arguments.load().map_err(|e| e.of_rank());
    let loaded = all_or_first_error(mpi.as_ref(), local).unwrap_or_else(|e| end_with(mpi.as_ref(), &e));
    crate::log::to_stderr(mpi.rank(), loaded.config.telemetry.log);
    let shared = communicator(&loaded.config, mpi.clone()).unwrap_or_else(|e| end_with(mpi.as_ref(), &e));
    let comm = shared.as_ref();
    let mut stop =
        StopRequest::listen().map_err(|e| Failure::runtime(format!("cannot listen for signals: {e}")))?;
    let outcome = train(&loaded, &shared, &mut stop).unwrap_or_else(|e| end_with(comm, &e));
    if comm.rank() == 0 {
        conclude(outcome, &loaded.config.run.dir);
    }
    comm.finalize().map_err(Failure::runtime)?;
    Ok(outcome)
}

fn conclude(outcome: Outcome, run: &std::path::Path) {
    match outcome {
        Outcome::Done => println!("trained: {} (`repa-dist report {}`)", run.display(), run.display()),
        Outcome::Stopped => println!("stopped on request, saved: the same command goes on from there"),
    }
}
