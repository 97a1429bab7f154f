//! Batch scripts for SLURM: what a job is, the script that comes of it, and how it is handed in.

mod script;
mod submit;
mod sweep;
mod time;

use std::path::{Path, PathBuf};

pub use script::script;
pub use submit::submit;
pub use sweep::{Point, points};
pub use time::TimeLimit;

/// What starts the ranks inside the allocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Launch {
    /// SLURM's own, through its PMIx plugin
    Srun,
    /// OpenMPI's, where SLURM has no PMIx
    Mpirun,
    /// `repa-dist launch`: OpenMPI's, started again inside the job when a rank fails
    #[value(name = "launch")]
    Supervised,
}

/// A training job.
#[derive(Debug, Clone)]
pub struct Job {
    /// Name, in letters that a path can hold.
    pub name: String,
    /// Nodes, ranks on each, and GPUs of each.
    pub nodes: usize,
    /// Ranks on each node.
    pub ranks: usize,
    /// GPUs of each node; 0 trains on the CPU.
    pub gpus: usize,
    /// Cores of each rank.
    pub cores: usize,
    /// Time limit.
    pub time: TimeLimit,
    /// How long before the time limit the ranks are told to save.
    pub notice_seconds: u32,
    /// Further options of sbatch, such as `--partition=gpu`.
    pub options: Vec<String>,
    /// Shell lines that come before the launch, such as `module load openmpi`.
    pub setup: Vec<String>,
    /// What starts the ranks.
    pub launch: Launch,
    /// Network interface between the nodes, where it has to be named.
    pub interface: Option<String>,
    /// Starts in a row without a checkpoint after which the job is not started again.
    pub max_failures: u32,
    /// The program to run.
    pub program: String,
    /// The run folder; of a sweep, the folder of its run folders.
    pub run: PathBuf,
    /// The folder of the checkpoints, where it is not in the run folder.
    pub checkpoints: Option<PathBuf>,
    /// What `train` is given.
    pub arguments: Vec<Argument>,
    /// The runs of a sweep; empty for one run.
    pub sweep: Vec<Point>,
    /// How many runs of a sweep train at a time.
    pub at_once: Option<usize>,
    /// Whether only programs on the same node can read the ranks' metrics.
    pub metrics_stay_local: bool,
    /// The command that this job comes from.
    pub made_by: Vec<String>,
}

/// An argument of `train`, and what the script says of it.
#[derive(Debug, Clone)]
pub struct Argument {
    /// The argument.
    pub text: String,
    /// Why it is there; empty for what the user gave.
    pub why: &'static str,
}

impl Job {
    /// Where SLURM writes what the job prints.
    pub fn logs(&self) -> PathBuf {
        self.run.join("logs")
    }

    /// The log of a job of this number, as SLURM names it.
    pub fn log(&self, id: &str) -> PathBuf {
        let name = if self.sweep.is_empty() { id.to_owned() } else { format!("{id}_*") };
        self.logs().join(format!("{}-{name}.out", self.name))
    }
}

/// A word as the shell has to read it.
pub fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_./:=,@%+-".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// [`quoted`], of a path.
fn quoted_path(path: &Path) -> String {
    quoted(&path.to_string_lossy())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_the_shell() {
        for word in ["plain", "a b", "it's", "$HOME", "z=[1,2]", "", "a\"b\\"] {
            let output = std::process::Command::new("bash")
                .args(["-c", &format!("printf %s {}", quoted(word))])
                .output()
                .expect("bash runs");
            assert_eq!(String::from_utf8_lossy(&output.stdout), word);
        }
        assert_eq!(quoted("train.steps=5"), "train.steps=5");
    }
}
