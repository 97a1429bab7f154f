//! `repa-dist launch`.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, ValueEnum};
use repa_trainer::train::checkpoints;

use super::train;
use crate::exit::{Failure, Outcome};
use crate::launch::{
    Agent, Allocation, Daemons, Deadlines, Job, LaunchError, Line, Placement, Settings, mark, supervise,
    tasks_of_step, usual_stop,
};

/// What `launch` takes. What comes after its own options is for `train`.
#[derive(Debug, Args)]
#[command(
    after_help = "Exit codes: 0 done, 2 bad usage or configuration, 3 bad data or checkpoint, 4 gave up, \
    75 stopped on request and saved (the same command goes on).\n\n\
    Inside a SLURM job (sbatch, salloc), ranks run on the job's hosts, one for each of its tasks, unless hosts are \
    named; SLURM starts them, without ssh.\n\n\
    Examples:\n  repa-dist launch --local 4 -- train --config configs/sit-b2-repa.toml\n  \
    repa-dist launch --hosts node1:8,node2:8 --elastic -- train --config run.toml train.steps=400000"
)]
pub struct Arguments {
    /// Hosts and the ranks of each; without a number, one
    #[arg(long, value_name = "HOST:RANKS,...", value_delimiter = ',', group = "where")]
    hosts: Option<Vec<String>>,
    /// The same from a file in mpirun's format (node1 slots=8)
    #[arg(long, value_name = "FILE", group = "where")]
    hostfile: Option<PathBuf>,
    /// Ranks on this host alone; by default as many as it has cores, or a SLURM job's tasks on its hosts
    #[arg(long, value_name = "RANKS", group = "where")]
    local: Option<usize>,
    /// Print the mpirun line and start nothing
    #[arg(long)]
    dry_run: bool,
    /// Restarts until one has brought a newer checkpoint, which gives all of them back
    #[arg(long, value_name = "N", default_value_t = 10)]
    max_restarts: usize,
    /// Restart when no step was made for this long
    #[arg(long, value_name = "S", default_value_t = 900.0)]
    hang_seconds: f64,
    /// The same for the first step and for the end, and while all ranks save or draw sample images; by default twice
    /// --hang-seconds, and 600 at least
    #[arg(long, value_name = "S")]
    start_seconds: Option<f64>,
    /// How long ranks may take to save when asked to stop
    #[arg(long, value_name = "S", default_value_t = 300.0)]
    grace_seconds: f64,
    /// Save and stop (exit code 75) before this many hours are over
    #[arg(long, value_name = "H")]
    max_hours: Option<f64>,
    /// Go on with the hosts that still answer
    #[arg(long)]
    elastic: bool,
    /// Show what ranks above 0 say on standard error, or leave it to their log files
    #[arg(long, value_enum, default_value_t = Logs::Prefix)]
    logs: Logs,
    /// What mpirun reaches other hosts with, in place of ssh (in a SLURM job, of srun): a program with its options
    #[arg(long, value_name = "COMMAND")]
    rsh_agent: Option<String>,
    /// Network interface between hosts, for MPI and NCCL (eth0), or for MPI alone the addresses (10.0.0.0/8)
    #[arg(long, value_name = "NAME")]
    interface: Option<String>,
    /// mpirun's --bind-to
    #[arg(long, value_name = "WHAT", default_value = "none")]
    bind_to: String,
    /// mpirun's --map-by
    #[arg(long, value_name = "WHAT")]
    map_by: Option<String>,
    /// The mpirun to use
    #[arg(long, value_name = "PATH", default_value = "mpirun")]
    mpirun: PathBuf,
    /// `train` and its arguments; the word may be left out
    #[arg(value_name = "train ARGUMENTS", trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Logs {
    /// Show it, each line with its rank
    Prefix,
    /// Only the log files have it
    Files,
}

/// The arguments of the ranks, as they will read them.
#[derive(Debug, Parser)]
#[command(name = "repa-dist train")]
struct Train {
    #[command(flatten)]
    arguments: train::Arguments,
}

pub fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    if std::env::var_os("OMPI_COMM_WORLD_SIZE").is_some() {
        return Err(LaunchError::Nested.into());
    }
    // A shell that srun has started (--pty) may well start it.
    if let Some(tasks) = tasks_of_step().filter(|_| !std::io::stdin().is_terminal()) {
        return Err(LaunchError::Tasks { tasks }.into());
    }
    let around = Allocation::around();
    let placement = arguments.placement(around.as_ref())?;
    let job = job(&arguments.command)?;
    if let Some(around) = around.as_ref().filter(|_| !arguments.names_hosts()) {
        eprintln!("launch: in SLURM job {}: its allocation is {}", around.job, placement.describe());
    }
    let settings = arguments.settings(placement, around.as_ref(), &job)?;
    if arguments.dry_run {
        println!("{}", settings.dry_run(&job));
        return Ok(Outcome::Done);
    }
    supervise(&settings, &job)
}

/// What is to be trained. A mistake in it is told here, before anything is started.
fn job(command: &[String]) -> Result<Job, Failure> {
    let words = match command.first().map(String::as_str) {
        Some("train") => &command[1..],
        Some(word) if !word.contains('=') && !word.starts_with('-') => {
            return Err(Failure::usage(format!(
                "launch runs `train`, not \"{word}\": write `repa-dist launch OPTIONS -- train ARGUMENTS`"
            )));
        }
        _ => command,
    };
    let train = Train::try_parse_from([&["repa-dist train".to_owned()], words].concat());
    // Says what is wrong as it would for `train`; or prints the help that was asked for.
    let train = train.unwrap_or_else(|error| error.exit());
    let config = train.arguments.load()?.config;
    Ok(Job {
        train: words.to_vec(),
        run: config.run.dir.clone(),
        checkpoints: checkpoints(&config),
        steps: config.train.steps,
        patience: Duration::from_secs_f64(config.comm.timeout_seconds.clamp(0.0, 3600.0)),
    })
}

impl Arguments {
    /// Whether an option says where ranks run.
    fn names_hosts(&self) -> bool {
        self.hosts.is_some() || self.hostfile.is_some() || self.local.is_some()
    }

    fn placement(&self, around: Option<&Allocation>) -> Result<Placement, LaunchError> {
        match (&self.hosts, &self.hostfile, self.local) {
            (Some(words), ..) => Placement::from_list(words),
            (_, Some(file), _) => Placement::from_file(file),
            (.., Some(0)) => {
                Err(LaunchError::NoSlots { origin: "--local 0".into(), host: "this host".into() })
            }
            (.., Some(ranks)) => Ok(Placement::Local(ranks)),
            (.., None) => around.map_or_else(|| Ok(Placement::Local(cores())), Allocation::placement),
        }
    }

    /// How other hosts are reached, by mpirun and by launch itself.
    fn reach(
        &self,
        placement: &Placement,
        around: Option<&Allocation>,
    ) -> Result<(Daemons, Agent), LaunchError> {
        let agent = Agent::new(self.rsh_agent.as_deref())?;
        let Some(around) = around else { return Ok((Daemons::Agent(self.rsh_agent.clone()), agent)) };
        let by_slurm = match placement {
            _ if self.rsh_agent.is_some() => false,
            Placement::Hosts(hosts) => around.has(hosts),
            Placement::Local(_) => true,
        };
        Ok(match by_slurm {
            true => {
                // The line's own would hide it.
                let given = std::env::var("OMPI_MCA_plm_slurm_args").unwrap_or_default();
                (Daemons::Slurm(given), Agent::srun(&around.job))
            }
            false => (Daemons::AgentInJob(self.rsh_agent.clone()), agent),
        })
    }

    fn settings(
        &self,
        placement: Placement,
        around: Option<&Allocation>,
        job: &Job,
    ) -> Result<Settings, Failure> {
        let problem =
            |what, problem| move |e: std::io::Error| Failure::usage(format!("{what}: {problem}: {e}"));
        let hang = seconds("--hang-seconds", self.hang_seconds)?;
        let start = match self.start_seconds {
            Some(start) => seconds("--start-seconds", start)?,
            None => (2 * hang).max(Duration::from_secs(600)),
        };
        let limit = self.max_hours.map(|hours| seconds("--max-hours", 3600.0 * hours)).transpose()?;
        let (daemons, agent) = self.reach(&placement, around)?;
        Ok(Settings {
            placement,
            line: Line {
                mpirun: self.mpirun.clone(),
                program: std::env::current_exe().map_err(problem("this program", "its path is not known"))?,
                folder: std::env::current_dir().map_err(problem("the current folder", "it is not there"))?,
                job: mark(&job.run),
                bind_to: self.bind_to.clone(),
                map_by: self.map_by.clone(),
                interface: self.interface.clone(),
                daemons,
                cores: cores(),
                root: rustix::process::geteuid().is_root(),
            },
            agent,
            max_restarts: self.max_restarts,
            elastic: self.elastic,
            shows_others: self.logs == Logs::Prefix,
            deadlines: Deadlines {
                hang,
                start,
                grace: seconds("--grace-seconds", self.grace_seconds)?,
                usual_stop: usual_stop(limit),
            },
            limit,
        })
    }
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// A time that is more than none.
fn seconds(option: &str, seconds: f64) -> Result<Duration, Failure> {
    // Longer than this counts as for ever.
    const LONGEST: f64 = 1e9;
    match seconds > 0.0 {
        true => Ok(Duration::from_secs_f64(seconds.min(LONGEST))),
        false => Err(Failure::usage(format!("{option} has to be above 0"))),
    }
}
