//! What started this process, and the communicator that goes with it.

use crate::{CommError, Communicator, Mpi, Single, abort};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// What started this process, by its environment variables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Launcher {
    /// Nobody: a bare process.
    Bare,
    /// OpenMPI's mpirun, with this many ranks.
    OpenMpi(usize),
    /// A PMIx host, such as `srun --mpi=pmix`, with this many ranks where SLURM says it.
    Pmix(Option<usize>),
    /// A launcher that speaks PMI (MPICH's family), with this many ranks if it says so.
    Pmi(Option<usize>),
    /// A SLURM step of several tasks without PMIx or PMI: MPI would see as many jobs of one rank.
    SlurmWithoutPmix(usize),
}

impl Launcher {
    /// From the process's environment.
    pub fn detect() -> Self {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    /// From any variables (for tests).
    fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Self {
        let number = |name: &str| variable(name).and_then(|value| value.trim().parse::<usize>().ok());
        if let Some(size) = number("OMPI_COMM_WORLD_SIZE") {
            return Self::OpenMpi(size);
        }
        if variable("PMIX_RANK").is_some() {
            return Self::Pmix(number("SLURM_STEP_NUM_TASKS"));
        }
        if variable("PMI_RANK").is_some() {
            return Self::Pmi(number("PMI_SIZE"));
        }
        // The step's own count: SLURM_NTASKS is also set in a batch script, which is one process.
        match (variable("SLURM_PROCID"), number("SLURM_STEP_NUM_TASKS")) {
            (Some(_), Some(tasks)) if tasks > 1 => Self::SlurmWithoutPmix(tasks),
            _ => Self::Bare,
        }
    }
}

/// How to start.
#[derive(Debug, Clone)]
pub struct Options {
    /// Refuse any other number of ranks.
    pub expected: Option<usize>,
    /// How long one collective may take, waiting for the other ranks included; None for ever.
    pub deadline: Option<Duration>,
    /// Use shared memory between the ranks of a job on one node.
    pub shared_memory: bool,
    /// Bytes handled at a time by the large collectives (64 KiB to 8 MiB; shared memory holds about four times
    /// this per rank). Changes the speed and never the bits.
    pub chunk_bytes: usize,
}

impl Options {
    /// Bytes of a node's shared memory that a rank takes, rounded up.
    #[must_use]
    pub fn shared_memory_bytes(&self) -> usize {
        // Four slots of a chunk, and the counters before them.
        4 * self.chunk_bytes + (64 << 10)
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            expected: None,
            deadline: Some(Duration::from_secs(600)),
            shared_memory: true,
            chunk_bytes: 1 << 20,
        }
    }
}

static STARTED: AtomicBool = AtomicBool::new(false);

/// Starts the communicator that fits what started the process: MPI under mpirun or srun with PMIx, [`Single`]
/// otherwise (MPI is then not touched). Once per process.
///
/// MPI ends the process by itself when it cannot start (its own words, no error here).
///
/// # Errors
/// N jobs of one rank where one job of N ranks was meant (srun without PMIx, or the mpirun of another MPI), another
/// number of ranks than expected, or a second call.
pub fn init(options: &Options) -> Result<Arc<dyn Communicator>, CommError> {
    let launcher = Launcher::detect();
    if let Launcher::SlurmWithoutPmix(tasks) = launcher {
        return Err(CommError::Start(format!(
            "srun started {tasks} tasks that cannot find each other (no PMIx): use `srun --mpi=pmix` \
             (`srun --mpi=list` shows what this SLURM has), or `mpirun` inside the allocation"
        )));
    }
    if STARTED.swap(true, Ordering::SeqCst) {
        return Err(CommError::Start("the communicator was started twice in one process (a bug)".to_owned()));
    }
    let comm: Arc<dyn Communicator> = match launcher {
        Launcher::Bare | Launcher::SlurmWithoutPmix(_) => Arc::new(Single::new()),
        _ => Arc::new(Mpi::start(options)?),
    };
    let size = comm.size();
    let meant = match launcher {
        Launcher::OpenMpi(meant) | Launcher::Pmi(Some(meant)) => meant,
        // Parts of a heterogeneous job count their own tasks only; alone in a step of several is never meant.
        Launcher::Pmix(Some(tasks)) if size == 1 => tasks,
        _ => size,
    };
    let problem = if meant != size {
        Some(format!(
            "the launcher started {meant} ranks but MPI sees {size}: mpirun, or srun's PMIx, belongs to another MPI than \
             the one this program is linked with; use the mpirun of {}",
            crate::mpi::library_version()
        ))
    } else {
        options.expected.filter(|&expected| expected != size).map(|expected| {
            format!("{expected} ranks were asked for and {size} started: start with `mpirun -n {expected}`")
        })
    };
    if let Some(problem) = problem {
        comm.finalize()?;
        return Err(CommError::Start(problem));
    }
    abort::set_name(comm.rank(), size, comm.host());
    Ok(comm)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn detect(variables: &[(&str, &str)]) -> Launcher {
        Launcher::from_variables(|name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn launchers_are_told_apart() {
        assert_eq!(detect(&[]), Launcher::Bare);
        // mpirun inside a SLURM job: the SLURM variables are the daemon's.
        let under_both = [
            ("SLURM_PROCID", "0"),
            ("SLURM_STEP_NUM_TASKS", "3"),
            ("OMPI_COMM_WORLD_SIZE", "6"),
            ("PMIX_RANK", "4"),
        ];
        assert_eq!(detect(&under_both), Launcher::OpenMpi(6));
        let step = [("SLURM_PROCID", "1"), ("SLURM_STEP_ID", "0"), ("SLURM_STEP_NUM_TASKS", "3")];
        assert_eq!(detect(&step), Launcher::SlurmWithoutPmix(3));
        assert_eq!(detect(&[step[0], step[1], step[2], ("PMIX_RANK", "1")]), Launcher::Pmix(Some(3)));
        // A batch script of a job of several tasks is one process.
        assert_eq!(detect(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4")]), Launcher::Bare);
        assert_eq!(detect(&[("SLURM_PROCID", "0"), ("SLURM_STEP_NUM_TASKS", "1")]), Launcher::Bare);
        assert_eq!(detect(&[("PMI_RANK", "0"), ("PMI_SIZE", "2")]), Launcher::Pmi(Some(2)));
    }
}
