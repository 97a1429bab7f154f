//! `repa-dist reap`: ends what a launch has left on this host. `launch` calls it on the other hosts.

use clap::Args;

use crate::exit::{Failure, Outcome};
use crate::launch;

#[derive(Debug, Args)]
pub struct Arguments {
    /// The launch's mark
    job: String,
}

#[expect(clippy::unnecessary_wraps, reason = "all commands return the same")]
pub fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    launch::reap(&arguments.job);
    Ok(Outcome::Done)
}
