//! `repa-dist doctor`.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use repa_comm::{CommError, Communicator, Launcher, Options, all_or_first_error, end_with};
use repa_trainer::config::Config;
use repa_trainer::exit::Kind;

use super::Settings;
use crate::doctor::{
    Line, Page, StartWatch, State, Subject, broken, examine, examine_mpi, gather, gpus, names, probe,
};
use crate::exit::{Failure, Outcome};
use crate::launch::this_host;

/// Marks the process that is the rank.
const RANK: &str = "REPA_DOCTOR_RANK";

/// Exit codes of a rank that has said all there is to say.
const PRINTED: [i32; 3] = [0, 2, 4];

/// Exit code of a rank that has found no others.
const NO_RANKS: i32 = 5;

/// How long MPI may take to start all ranks of a job.
const START: Duration = Duration::from_secs(60);

/// What `doctor` takes.
#[derive(Debug, Args)]
#[command(
    after_help = "Exit codes: 0 no errors (warnings do not count), 2 bad usage or configuration, 4 errors, each with \
    what to do.\n\nExamples:\n  repa-dist doctor --config run.toml --ranks 8\n  repa-dist doctor runs/quickstart\n  \
    mpirun -n 16 repa-dist doctor   all hosts of a job on one page\n  srun --mpi=pmix repa-dist doctor --json"
)]
pub struct Arguments {
    /// TOML file; without it, the quickstart's built-in configuration
    #[arg(long, short, value_name = "FILE")]
    config: Option<PathBuf>,
    /// A run folder, whose configuration is taken, or values that win over the file, such as run.dir=PATH
    #[arg(value_name = "RUN|KEY=VALUE")]
    values: Vec<String>,
    /// Ranks that this host is to run [default: those of the job; one for each GPU; or 2 on the CPU]
    #[arg(long, value_name = "N")]
    ranks: Option<usize>,
    /// Measure disks on 32 MiB, in place of 256
    #[arg(long)]
    quick: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What the hidden command of the ranks that `doctor` starts takes.
#[derive(Debug, Args)]
pub struct Probe {}

pub fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    if arguments.ranks == Some(0) {
        return Err(Failure::usage("--ranks must be above 0"));
    }
    match Launcher::detect() {
        Launcher::Bare => alone(arguments),
        // Each task would print the same page.
        Launcher::SlurmWithoutPmix(_) if !is_first() => Ok(Outcome::Done),
        Launcher::SlurmWithoutPmix(_) => alone(arguments),
        _ => of_job(arguments),
    }
}

/// The hidden command.
pub fn run_probe(_: &Probe) -> Result<Outcome, Failure> {
    probe().map_err(Failure::runtime)?;
    Ok(Outcome::Done)
}

/// A process that no launcher started.
fn alone(arguments: &Arguments) -> Result<Outcome, Failure> {
    let config = arguments.load()?;
    let count = arguments.ranks.unwrap_or_else(|| usual_ranks(&config));
    let subject = Arc::new(Subject::alone(config, count, arguments.quick));
    let spinner = spinner();
    let tell = |topic: &str| spinner.set_message(topic.to_owned());
    let mut lines = examine_mpi(&subject, &tell);
    lines.extend(examine(&subject, &tell));
    spinner.finish_and_clear();
    conclude(arguments, &subject, vec![this_host()], lines)
}

/// A rank of a job. MPI may end a process that it does not start in, so that a process of its own is the rank: where
/// that one is gone without a page, this one says so.
fn of_job(arguments: &Arguments) -> Result<Outcome, Failure> {
    if std::env::var_os(RANK).is_some() {
        return rank(arguments);
    }
    // mpirun ends the other processes of a job whose MPI does not start, and kills them a second later: time enough.
    let _ = signal_hook::flag::register(signal_hook::consts::SIGTERM, Arc::default());
    let program = std::env::current_exe().map_err(|e| Failure::runtime(format!("this program: {e}")))?;
    let status = Command::new(program).args(std::env::args_os().skip(1)).env(RANK, "1").status();
    let problem = match status.map(|status| status.code()) {
        Ok(Some(code)) if PRINTED.contains(&code) => std::process::exit(code),
        // The page says it, once.
        _ if !is_first() => return Ok(Outcome::Done),
        Ok(Some(NO_RANKS)) => "the ranks do not find each other".to_owned(),
        Ok(Some(code)) => format!("MPI does not start (exit code {code})"),
        Ok(None) => "MPI does not start (it was killed)".to_owned(),
        Err(error) => format!("cannot start a rank: {error}"),
    };
    let config = arguments.load()?;
    let ranks = match Launcher::detect() {
        Launcher::OpenMpi(ranks) | Launcher::Pmi(Some(ranks)) => ranks,
        _ => arguments.ranks.unwrap_or(1),
    };
    let subject = Subject::alone(config, ranks, arguments.quick);
    conclude(arguments, &subject, vec![this_host()], broken(&problem))
}

/// What is a rank: rank 0 prints the page of all hosts.
fn rank(arguments: &Arguments) -> Result<Outcome, Failure> {
    let watch = StartWatch::new(START);
    let comm = repa_comm::init(&Options::default()).map_err(|e| Failure::with_code(NO_RANKS as u8, e))?;
    drop(watch);
    repa_comm::install_panic_hook(crate::exit::explain);
    let local = arguments.load().map_err(|e| e.of_rank());
    let config = all_or_first_error(comm.as_ref(), local).unwrap_or_else(|e| end_with(comm.as_ref(), &e));
    let subject = Arc::new(Subject::of_job(config, comm.topology(), arguments.quick));
    let end = |error: CommError| repa_comm::abort(i32::from(Kind::Runtime.code()), &error.to_string());
    let lines = gather(comm.as_ref(), &subject, &|_| ()).unwrap_or_else(end);
    let (rank, hosts) = (comm.rank(), hosts(comm.as_ref()));
    comm.finalize().map_err(Failure::runtime)?;
    match rank {
        0 => conclude(arguments, &subject, hosts, lines),
        _ => Ok(Outcome::Done),
    }
}

fn conclude(
    arguments: &Arguments,
    subject: &Subject,
    hosts: Vec<String>,
    lines: Vec<Line>,
) -> Result<Outcome, Failure> {
    let config = &subject.config;
    let on = match &hosts[..] {
        [one] => one.clone(),
        several => format!("{} (figures are those of {})", names(several), several[0]),
    };
    let about = format!(
        "repa-dist {} on {on}: {} rank{}, device={}, run.dir={}",
        env!("CARGO_PKG_VERSION"),
        subject.ranks,
        if subject.ranks == 1 { "" } else { "s" },
        config.device.0,
        config.run.dir.display()
    );
    let page = Page { about, hosts, ranks: subject.ranks, lines };
    let text = match arguments.json {
        true => format!("{:#}\n", page.json().map_err(Failure::runtime)?),
        false => page.text(width(), colourful()),
    };
    match std::io::stdout().write_all(text.as_bytes()) {
        // A pager, or `head`, has seen enough.
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => return Err(Failure::runtime(error)),
        _ => {}
    }
    match page.count(State::Error) {
        0 => Ok(Outcome::Done),
        1 => Err(Failure::runtime("doctor has found an error: see above for what to do")),
        errors => {
            Err(Failure::runtime(format!("doctor has found {errors} errors: see above for what to do")))
        }
    }
}

impl Arguments {
    /// The configuration: that of a run folder, or as `train` would merge it.
    fn load(&self) -> Result<Config, Failure> {
        let (mut values, folders): (Vec<String>, Vec<String>) =
            self.values.iter().cloned().partition(|word| word.contains('='));
        let mut config = self.config.clone();
        match &folders[..] {
            [] => {}
            [_] if config.is_some() => {
                return Err(Failure::usage("a run folder brings its configuration: leave --config out"));
            }
            [folder] => {
                let file = Path::new(folder).join("config.toml");
                if !file.is_file() {
                    return Err(Failure::usage(format!(
                        "\"{folder}\" is no run folder, as it has no config.toml: name one, or settings as KEY=VALUE"
                    )));
                }
                config = Some(file);
                // It may have been moved. JSON's strings are TOML's.
                values.insert(0, format!("run.dir={}", serde_json::Value::from(folder.as_str())));
            }
            _ => return Err(Failure::usage("one run folder at a time, please")),
        }
        Ok(Settings { config, values }.load()?.config)
    }
}

/// Ranks that this host would have.
fn usual_ranks(config: &Config) -> usize {
    // "2(x3)" is two on each of three nodes.
    let of_slurm = std::env::var("SLURM_TASKS_PER_NODE").ok();
    let of_slurm = of_slurm.and_then(|text| text.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok());
    match (of_slurm, config.device.0.as_str()) {
        (Some(ranks), _) if ranks > 0 => ranks,
        (_, "cpu") => 2,
        (_, "cuda") => gpus().max(1),
        _ => 1,
    }
}

/// Whether this is rank 0, by the launcher's word.
fn is_first() -> bool {
    let names = ["OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID"];
    names.iter().find_map(|name| std::env::var(name).ok()).is_none_or(|rank| rank.trim() == "0")
}

/// The hosts of a job, each once, in the order of their first ranks.
fn hosts(comm: &dyn Communicator) -> Vec<String> {
    let topology = comm.topology();
    let first_of = |node: usize| topology.node_of.iter().position(|&n| n == node);
    (0..topology.nodes).filter_map(first_of).map(|rank| topology.hosts[rank].clone()).collect()
}

/// What is being looked at, on standard error, where a person watches.
fn spinner() -> ProgressBar {
    let style =
        ProgressStyle::with_template("{spinner} looking at {msg}").expect("the template is well formed");
    let spinner = ProgressBar::new_spinner().with_style(style);
    spinner.enable_steady_tick(Duration::from_millis(100));
    spinner
}

/// Columns of the page.
fn width() -> usize {
    let stdout = std::io::stdout();
    let columns = rustix::termios::tcgetwinsize(&stdout).map_or(0, |size| size.ws_col.into());
    // Some terminals do not know their width, and files have none.
    if columns > 0 { columns } else { 100 }
}

/// See no-color.org.
fn colourful() -> bool {
    let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
    // mpirun gives ranks a terminal of their own, wherever its output goes.
    let direct = Launcher::detect() == Launcher::Bare;
    direct && std::io::stdout().is_terminal() && !plain && !dumb
}
