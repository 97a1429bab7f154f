//! `repa-dist watch`.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::exit::{Failure, Outcome};
use crate::watch::{once, watch};

#[derive(Debug, Args)]
pub struct Arguments {
    /// Run folder
    #[arg(value_name = "RUN", default_value = "runs/quickstart")]
    run: PathBuf,
    /// Seconds between looks
    #[arg(long, value_name = "S", default_value_t = 1.0, value_parser = seconds)]
    every: f64,
    /// Print one picture as text, and end; so it is where the output is no terminal
    #[arg(long)]
    once: bool,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.1..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("give seconds between 0.1 and 3600".into()),
    }
}

/// Columns where the output is no terminal.
const WIDTH: u16 = 110;

pub fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    if arguments.once || !std::io::stdout().is_terminal() {
        let asked = rustix::termios::tcgetwinsize(std::io::stdout()).ok().map(|size| size.ws_col);
        print!("{}", once(&arguments.run, asked.filter(|&columns| columns > 0).unwrap_or(WIDTH))?);
    } else {
        watch(&arguments.run, Duration::from_secs_f64(arguments.every))?;
    }
    Ok(Outcome::Done)
}
