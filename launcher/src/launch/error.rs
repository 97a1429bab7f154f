//! What can be wrong before a rank runs.

use std::io;
use std::path::PathBuf;

use repa_trainer::exit::Kind;

/// Why nothing was started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// A word of `--hosts`, or of a line of the host file.
    #[error("{origin}: \"{text}\" is no host: write NAME or NAME:RANKS, such as node1:8")]
    Host {
        /// Where it stands.
        origin: String,
        /// The word.
        text: String,
    },
    /// A host without room for a rank.
    #[error("{origin}: {host} has no slots: give it at least one rank ({host}:1), or leave it out")]
    NoSlots {
        /// Where it stands.
        origin: String,
        /// The host.
        host: String,
    },
    /// No hosts at all.
    #[error("{origin} names no host: write NAME:RANKS, such as node1:8,node2:8")]
    NoHosts {
        /// What should name some.
        origin: String,
    },
    /// The host file.
    #[error("cannot read the host file {path}: {source}")]
    HostFile {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The agent's words.
    #[error("--rsh-agent \"{text}\": {problem}")]
    Agent {
        /// What was given.
        text: String,
        /// What is wrong with it.
        problem: String,
    },
    /// `launch` is a rank itself.
    #[error(
        "launch starts mpirun itself, once for all ranks: run `repa-dist launch` without mpirun around it"
    )]
    Nested,
    /// `launch` is one of several tasks.
    #[error(
        "srun has started {tasks} tasks of launch, which starts the ranks itself: run `repa-dist launch` without srun \
         around it, once in the job's script or shell"
    )]
    Tasks {
        /// How many.
        tasks: usize,
    },
    /// The job of SLURM around launch does not say where ranks are to run.
    #[error(
        "SLURM job {job}: {problem}: name the hosts with --hosts NAME:RANKS,..., or --local RANKS for this one"
    )]
    Allocation {
        /// Its number.
        job: String,
        /// What is wrong.
        problem: String,
    },
    /// There is no mpirun.
    #[error(
        "cannot start {program}: {source}: install OpenMPI (apt-get install openmpi-bin), or name its mpirun with \
         --mpirun PATH"
    )]
    Mpirun {
        /// What was tried.
        program: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Hosts that cannot run a rank.
    #[error("{problems}")]
    Hosts {
        /// What each of them said.
        problems: String,
        /// Whether starting again cannot help.
        wrong: bool,
    },
    /// Another `launch` has the run.
    #[error(
        "{path} is supervised by another launch ({holder}): stop that one first, or choose another folder with \
         run.dir=PATH"
    )]
    InUse {
        /// The run folder.
        path: PathBuf,
        /// Who has it.
        holder: String,
    },
    /// The run folder.
    #[error("cannot write to {path}: {source}: choose a folder for the run with run.dir=PATH")]
    Folder {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Signal handlers.
    #[error("cannot listen for signals: {0}")]
    Signals(io::Error),
}

impl LaunchError {
    /// What kind of error it is, for the exit code.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Hosts { wrong: false, .. } | Self::Signals(_) => Kind::Runtime,
            _ => Kind::Usage,
        }
    }
}
