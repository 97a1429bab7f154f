//! Starts this program again as a job of ranks and judges how it ended.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

type Outcome<T> = Result<T, libtest_mimic::Failed>;

/// A job longer than this is killed, and its test fails.
const LIMIT_SECONDS: u64 = 100;

pub struct Job {
    command: Command,
}

/// What is left of a finished job.
pub struct Ended {
    output: String,
}

/// This program alone, in the given role.
pub fn bare(role: &str) -> Job {
    let program = std::env::current_exe().expect("this program has a path");
    let mut command = limited();
    command.arg(program);
    Job::new(command, role)
}

/// `ranks` of this program under mpirun; `way` is "shared", "messages" or "nccl".
pub fn mpirun(ranks: usize, role: &str, way: &str) -> Job {
    mpirun_by(&[], ranks, role, way)
}

/// The same with ranks that ignore SIGTERM: when one is lost, mpirun sends that to the others, and SIGKILL a second
/// later, so they have this second.
pub fn mpirun_stubborn(ranks: usize, role: &str, way: &str) -> Job {
    mpirun_by(&["sh", "-c", "trap '' TERM; exec \"$0\""], ranks, role, way)
}

/// The same where /dev/shm has room for 256 KiB; None where this process may not mount.
pub fn mpirun_without_room(ranks: usize, role: &str) -> Option<Job> {
    const SCRIPT: &str = "mount -t tmpfs -o size=256k none /dev/shm && exec \"$@\"";
    let inside = ["unshare", "--mount", "sh", "-c", SCRIPT, "sh"];
    let tried = Command::new(inside[0]).args(&inside[1..]).arg("true").output();
    if !tried.is_ok_and(|output| output.status.success()) {
        return None;
    }
    let program = std::env::current_exe().expect("this program has a path");
    let mut command = limited();
    command.args(inside).args(["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]);
    // OpenMPI's own messages would go through that memory too.
    command.args(["--mca", "btl", "self,tcp", "-n", &ranks.to_string()]).arg(program);
    command.env("REPA_COMM_TEST_WAY", "shared");
    Some(Job::new(command, role))
}

fn mpirun_by(wrapper: &[&str], ranks: usize, role: &str, way: &str) -> Job {
    let program = std::env::current_exe().expect("this program has a path");
    let mut command = limited();
    command.args(["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]);
    command.args(["--mca", "mpi_yield_when_idle", "1", "-n", &ranks.to_string()]);
    command.args(wrapper).arg(program);
    command.env("REPA_COMM_TEST_WAY", way);
    Job::new(command, role)
}

/// `timeout` ends mpirun, and mpirun its ranks, whatever happens to this process's own patience.
fn limited() -> Command {
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", &LIMIT_SECONDS.to_string()]);
    command
}

impl Job {
    fn new(mut command: Command, role: &str) -> Self {
        for (name, _) in std::env::vars() {
            if ["OMPI_", "PMIX_", "PMI_", "SLURM_"].iter().any(|prefix| name.starts_with(prefix)) {
                command.env_remove(name);
            }
        }
        command.env("REPA_COMM_TEST", role).stdin(Stdio::null());
        Self { command }
    }

    pub fn variables(&mut self, variables: &[(&str, &str)]) {
        self.command.envs(variables.iter().copied());
    }

    #[cfg(feature = "nccl")]
    pub fn remove_variables(&mut self, names: &[&str]) {
        for name in names {
            self.command.env_remove(name);
        }
    }

    fn run(mut self) -> Outcome<(Option<i32>, Duration, String)> {
        let started = Instant::now();
        let output =
            self.command.output().map_err(|error| format!("cannot start {:?}: {error}", self.command))?;
        let text = [output.stdout, output.stderr].concat();
        Ok((output.status.code(), started.elapsed(), String::from_utf8_lossy(&text).into_owned()))
    }

    /// Exit code 0, and every rank said that it had finished all checks.
    pub fn expect_success(self, ranks: usize) -> Outcome<()> {
        let (code, took, output) = self.run()?;
        let finished = output.matches("all checks passed").count();
        if code == Some(0) && finished == ranks {
            return Ok(());
        }
        Err(format!("exit code {code:?}, {finished} of {ranks} ranks finished, after {took:?}:\n{output}")
            .into())
    }

    /// However it ends, it does so within 15 seconds, and leaves this text.
    pub fn expect_end(self, text: &str) -> Outcome<Ended> {
        let (_, took, output) = self.run()?;
        let ended = Ended { output };
        ended.check(took < Duration::from_secs(15), &format!("took {took:?}"))?;
        ended.check(ended.output.contains(text), &format!("no '{text}'"))?;
        Ok(ended)
    }

    /// This exit code within 15 seconds, and this text in the output.
    pub fn expect_failure(self, code: i32, text: &str) -> Outcome<Ended> {
        let (found, took, output) = self.run()?;
        let ended = Ended { output };
        // OpenMPI 4.1.4 of Debian sometimes crashes in its own last cleanup after an abort, when all ranks have
        // ended; its exit code is lost then, and everything else still has to hold.
        let mpirun_crashed = ended.output.contains("PMIx_server_finalize");
        if found != Some(code) && !mpirun_crashed {
            return Err(format!("exit code {found:?}, expected {code}:\n{}", ended.output).into());
        }
        if took > Duration::from_secs(15) {
            return Err(format!("took {took:?} to end:\n{}", ended.output).into());
        }
        ended.check(ended.output.contains(text), &format!("no '{text}'"))?;
        Ok(ended)
    }
}

impl Ended {
    fn check(&self, holds: bool, what: &str) -> Outcome<()> {
        if holds { Ok(()) } else { Err(format!("{what} in:\n{}", self.output).into()) }
    }

    pub fn expect(self, text: &str) -> Outcome<Self> {
        self.check(self.output.contains(text), &format!("no '{text}'"))?;
        Ok(self)
    }

    pub fn expect_once(self, text: &str) -> Outcome<Self> {
        let found = self.output.matches(text).count();
        self.check(found == 1, &format!("{found} times '{text}'"))?;
        Ok(self)
    }

    pub fn expect_no(self, text: &str) -> Outcome<Self> {
        self.check(!self.output.contains(text), &format!("an unexpected '{text}'"))?;
        Ok(self)
    }
}
