//! `repa-dist slurm`: a batch script, and its submission.

use std::path::{Path, PathBuf};

use clap::Args;
use repa_trainer::config::Config;

use super::Settings;
use crate::exit::{Failure, Outcome};
use crate::slurm::{Argument, Job, Launch, TimeLimit, points, script, submit};

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    settings: Settings,
    /// Nodes of the job
    #[arg(long, value_name = "N", default_value_t = 1)]
    nodes: usize,
    /// GPUs of each node, and ranks on it; 0 trains on the CPU
    #[arg(long, value_name = "N", default_value_t = 0)]
    gpus_per_node: usize,
    /// Ranks on each node: one for each GPU, or one on the CPU, if not given
    #[arg(long, value_name = "N")]
    ranks_per_node: Option<usize>,
    /// Cores of each rank
    #[arg(long, value_name = "N", default_value_t = 8)]
    cpus_per_task: usize,
    /// Time limit, after which the job is started again and goes on: hours:minutes:seconds, days-hours or
    /// minutes
    #[arg(long, value_name = "LIMIT", default_value = "24:00:00")]
    time: String,
    /// Seconds before the time limit at which the ranks save and stop [default: 300, or a quarter of a
    /// short limit]
    #[arg(long, value_name = "SECONDS")]
    notice: Option<u32>,
    /// Partition, as SLURM names it
    #[arg(long, value_name = "NAME")]
    partition: Option<String>,
    /// Account that pays
    #[arg(long, value_name = "NAME")]
    account: Option<String>,
    /// Quality of service
    #[arg(long, value_name = "NAME")]
    qos: Option<String>,
    /// Name of the job; without it, that of the run folder
    #[arg(long, value_name = "NAME")]
    job_name: Option<String>,
    /// A run for each of these values (of every combination, if given more than once), such as
    /// --array optimizer.learning_rate=1e-4,2e-4
    #[arg(long, value_name = "KEY=VALUE,VALUE,...")]
    array: Vec<String>,
    /// How many runs of a sweep train at a time
    #[arg(long, value_name = "N", requires = "array")]
    at_once: Option<usize>,
    /// What starts the ranks
    #[arg(long, value_enum, default_value = "srun")]
    mpi: Launch,
    /// Network interface between the nodes, for NCCL and OpenMPI; they look for one if it is not named
    #[arg(long, value_name = "NAME")]
    interface: Option<String>,
    /// Failures in a row, with no checkpoint saved, after which the job is not started again
    #[arg(long, value_name = "N", default_value_t = 3)]
    max_failures: u32,
    /// Another option for sbatch, such as --sbatch --constraint=a100
    #[arg(long, value_name = "OPTION", allow_hyphen_values = true)]
    sbatch: Vec<String>,
    /// A shell line before the launch, such as --setup 'module load openmpi'
    #[arg(long, value_name = "LINE")]
    setup: Vec<String>,
    /// The program that the job runs; without it, this one
    #[arg(long, value_name = "PATH")]
    program: Option<String>,
    /// Where to write the script; without it, to standard output
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Hand the script in (it is kept in the run folder as job.sbatch, if --out names no other file)
    #[arg(long)]
    submit: bool,
}

pub fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    let job = arguments.job()?;
    if job.gpus > 0 && arguments.program.is_none() && cfg!(not(feature = "cuda-untuned")) {
        eprintln!(
            "warning: this repa-dist is built without GPU support and the job would end with an error: build it with \
             --features cuda, or name another one by --program"
        );
    }
    let text = script(&job);
    let file = match (&arguments.out, arguments.submit) {
        (Some(file), _) => file.clone(),
        (None, true) => job.run.join("job.sbatch"),
        (None, false) => {
            print!("{text}");
            return Ok(Outcome::Done);
        }
    };
    if !arguments.submit {
        write(&file, &text)?;
        println!("written: {}", file.display());
        return Ok(Outcome::Done);
    }
    let logs = job.logs();
    std::fs::create_dir_all(&logs)
        .map_err(|e| Failure::usage(format!("cannot make the folder {}: {e}", logs.display())))?;
    write(&file, &text)?;
    let id = submit(&file)?;
    println!("submitted job {id} ({})", file.display());
    println!("  its log      tail -F {}", job.log(&id).display());
    println!("  its state    squeue --jobs={id}");
    match job.sweep.is_empty() {
        true => println!(
            "  stop it      touch {} (saves, and is not started again)",
            job.run.join("STOP").display()
        ),
        false => println!(
            "  stop a run   touch {} (saves, and is not started again)",
            job.run.join("RUN/STOP").display()
        ),
    }
    println!(
        "  restart it   scancel --batch --signal=USR1 {id} (saves, and goes on when SLURM starts it again)"
    );
    println!("  cancel it    scancel {id}");
    Ok(Outcome::Done)
}

fn write(file: &Path, text: &str) -> Result<(), Failure> {
    std::fs::write(file, text).map_err(|e| Failure::usage(format!("cannot write {}: {e}", file.display())))
}

impl Arguments {
    /// The job, with everything checked that can be known here.
    fn job(&self) -> Result<Job, Failure> {
        let ranks = self.ranks_per_node.unwrap_or(self.gpus_per_node.max(1));
        for (option, value) in
            [("--nodes", self.nodes), ("--ranks-per-node", ranks), ("--cpus-per-task", self.cpus_per_task)]
        {
            if value == 0 {
                return Err(Failure::usage(format!("{option} must be above 0")));
            }
        }
        if self.at_once == Some(0) {
            return Err(Failure::usage("--at-once must be above 0"));
        }
        if self.gpus_per_node > 0 && ranks > self.gpus_per_node {
            return Err(Failure::usage(format!(
                "--ranks-per-node {ranks} on --gpus-per-node {}: each rank needs a GPU of its own",
                self.gpus_per_node
            )));
        }
        let time: TimeLimit =
            self.time.parse().map_err(|problem| Failure::usage(format!("--time: {problem}")))?;
        let notice_seconds = self.notice_seconds(&time)?;
        let sweep = if self.array.is_empty() { Vec::new() } else { points(&self.array)? };
        let config = self.settings.load()?.config;
        // A mistake in any run of the sweep is said here, not hours later in a log.
        for point in &sweep {
            let mut settings = self.settings.clone();
            settings.values.extend(point.values.iter().cloned());
            settings.load()?;
        }
        Ok(Job {
            name: self.name(&config)?,
            nodes: self.nodes,
            ranks,
            gpus: self.gpus_per_node,
            cores: self.cpus_per_task,
            time,
            notice_seconds,
            options: self.options()?,
            setup: self.setup.iter().map(|line| one_line("--setup", line)).collect::<Result<_, _>>()?,
            launch: self.mpi,
            interface: self.interface.clone(),
            max_failures: self.max_failures,
            program: self.program()?,
            run: config.run.dir.clone(),
            checkpoints: Some(config.checkpoint.dir.clone()).filter(|dir| !dir.as_os_str().is_empty()),
            arguments: self.train(&config),
            sweep,
            at_once: self.at_once,
            metrics_stay_local: config.telemetry.metrics && config.telemetry.bind.is_loopback(),
            made_by: made_by(std::env::args().skip(1)),
        })
    }

    fn notice_seconds(&self, time: &TimeLimit) -> Result<u32, Failure> {
        // SLURM's own bound.
        const MOST: u32 = 65_535;
        let limit = time.seconds().unwrap_or(u64::from(MOST) + 1);
        let notice =
            self.notice.unwrap_or(u32::try_from(limit / 4).map_or(300, |quarter| quarter.clamp(1, 300)));
        if notice == 0 || notice > MOST || u64::from(notice) >= limit {
            return Err(Failure::usage(format!(
                "--notice {notice}: it must be above 0, below the time limit ({}) and at most {MOST} s",
                time.text()
            )));
        }
        Ok(notice)
    }

    fn name(&self, config: &Config) -> Result<String, Failure> {
        let run = config.run.dir.file_name().map_or_else(|| "repa-dist".into(), |n| n.to_string_lossy());
        let name = self.job_name.as_deref().unwrap_or(&run);
        // It becomes part of the log's name.
        let keep = |c: char| if c.is_alphanumeric() || "._-".contains(c) { c } else { '-' };
        let kept: String = name.chars().map(keep).collect();
        if self.job_name.is_some() && (kept != name || name.is_empty()) {
            return Err(Failure::usage(format!(
                "--job-name {name:?}: use letters, digits, '.', '_' and '-'"
            )));
        }
        Ok(kept)
    }

    fn options(&self) -> Result<Vec<String>, Failure> {
        let mut options = Vec::new();
        for (option, value) in
            [("partition", &self.partition), ("account", &self.account), ("qos", &self.qos)]
        {
            let Some(value) = value else { continue };
            if value.is_empty() || value.contains(char::is_whitespace) {
                return Err(Failure::usage(format!("--{option} {value:?} is no name")));
            }
            options.push(format!("--{option}={value}"));
        }
        for option in &self.sbatch {
            if !option.starts_with('-') {
                let problem = "write an option of sbatch, such as --sbatch --constraint=a100";
                return Err(Failure::usage(format!("--sbatch {option}: {problem}")));
            }
            options.push(one_line("--sbatch", option)?);
        }
        Ok(options)
    }

    fn program(&self) -> Result<String, Failure> {
        if let Some(program) = &self.program {
            return Ok(program.clone());
        }
        let own = std::env::current_exe().map_err(|e| {
            Failure::runtime(format!("cannot tell where this program is ({e}): name it by --program"))
        })?;
        Ok(own.to_string_lossy().into_owned())
    }

    fn train(&self, config: &Config) -> Vec<Argument> {
        let given = |text: String| Argument { text, why: "" };
        let mut arguments = Vec::new();
        if let Some(file) = &self.settings.config {
            arguments.push(given(format!("--config={}", file.display())));
        }
        arguments.extend(self.settings.values.iter().cloned().map(given));
        if self.gpus_per_node > 0 && config.device.is_cpu() {
            arguments.push(Argument {
                text: "device=cuda".into(),
                why: "each rank takes the GPU of its number on the node",
            });
        }
        if config.train.threads == 0 {
            let text = format!("train.threads={}", self.cpus_per_task);
            arguments.push(Argument { text, why: "the cores of a rank, as --cpus-per-task above" });
        }
        arguments
    }
}

/// The command line without what decides only where the script goes.
fn made_by(arguments: impl Iterator<Item = String>) -> Vec<String> {
    let mut words = vec!["repa-dist".to_owned()];
    let mut skip = false;
    for word in arguments {
        match word.as_str() {
            _ if skip => skip = false,
            "--submit" => {}
            "--out" => skip = true,
            other if other.starts_with("--out=") => {}
            // A comment line holds no line break.
            _ => words.push(word.replace('\n', " ")),
        }
    }
    words
}

fn one_line(option: &str, text: &str) -> Result<String, Failure> {
    match text.contains('\n') {
        true => Err(Failure::usage(format!(
            "{option}: one line at a time, please; give the option again for another"
        ))),
        false => Ok(text.to_owned()),
    }
}
