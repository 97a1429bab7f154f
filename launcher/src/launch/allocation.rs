//! The hosts that SLURM has given the job that launch runs in.

use super::error::LaunchError;
use super::hosts::{Host, Placement, is_here, valid};
use crate::program;

/// More ranks than any job has: a slip in a count makes no list without end.
const MOST: usize = 1 << 20;

/// A job of SLURM around this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allocation {
    /// Its number.
    pub job: String,
    /// Its hosts, as SLURM writes them: n[1-3].
    nodes: String,
    /// Tasks of the hosts, as SLURM writes them: 2(x3),1.
    tasks: Option<String>,
}

impl Allocation {
    /// The job around us, if there is one.
    pub fn around() -> Option<Self> {
        Self::of(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    fn of(variable: impl Fn(&str) -> Option<String>) -> Option<Self> {
        Some(Self {
            job: variable("SLURM_JOB_ID")?,
            nodes: variable("SLURM_JOB_NODELIST")?,
            tasks: variable("SLURM_TASKS_PER_NODE"),
        })
    }

    /// All its hosts, each with a rank for each of its tasks.
    pub fn placement(&self) -> Result<Placement, LaunchError> {
        let placement = self.place(&self.names()?)?;
        // One host needs nobody to start daemons.
        match &placement {
            Placement::Hosts(hosts) if hosts.len() == 1 && is_here(&hosts[0].host) => {
                Ok(Placement::Local(hosts[0].ranks))
            }
            _ => Ok(placement),
        }
    }

    /// Whether all of these hosts are the job's; not so if SLURM does not tell.
    pub fn has(&self, hosts: &[Host]) -> bool {
        self.names().is_ok_and(|names| hosts.iter().all(|host| names.contains(&host.host)))
    }

    /// Names of its hosts.
    fn names(&self) -> Result<Vec<String>, LaunchError> {
        let command = format!("scontrol show hostnames {}", self.nodes);
        let ended = program::ask("scontrol", &["show", "hostnames", &self.nodes]).map_err(|problem| {
            self.problem(format!("cannot run `{command}`, which tells its hosts ({problem})"))
        })?;
        if !ended.is_good() {
            let problem = format!("`{command}` does not tell its hosts ({})", ended.complaint());
            return Err(self.problem(problem));
        }
        Ok(ended.stdout.split_whitespace().map(str::to_owned).collect())
    }

    fn place(&self, names: &[String]) -> Result<Placement, LaunchError> {
        let Some(tasks) = &self.tasks else {
            let problem =
                "SLURM_TASKS_PER_NODE is not set (ask SLURM for tasks with --ntasks-per-node=RANKS)";
            return Err(self.problem(problem.into()));
        };
        let Some(counts) = counts(tasks) else {
            let problem =
                format!("SLURM_TASKS_PER_NODE={tasks} does not count tasks as SLURM does, such as 2(x3),1");
            return Err(self.problem(problem));
        };
        if let Some(name) = names.iter().find(|name| !valid(name)) {
            return Err(self.problem(format!("\"{name}\" in SLURM_JOB_NODELIST is no host's name")));
        }
        // In a step on some of a job's hosts, SLURM counts the step's tasks.
        if counts.len() != names.len() {
            let problem = format!(
                "SLURM_TASKS_PER_NODE={tasks} counts tasks of {} hosts, and it has {} ({})",
                counts.len(),
                names.len(),
                self.nodes
            );
            return Err(self.problem(problem));
        }
        let hosts = names.iter().zip(counts).map(|(name, ranks)| Host { host: name.clone(), ranks });
        Ok(Placement::Hosts(hosts.collect()))
    }

    fn problem(&self, problem: String) -> LaunchError {
        LaunchError::Allocation { job: self.job.clone(), problem }
    }
}

/// Tasks of each host: "2(x3),1" is 2, 2, 2 and 1.
fn counts(text: &str) -> Option<Vec<usize>> {
    let number = |text: &str| -> Option<usize> {
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        text.parse().ok().filter(|n| digits && (1..=MOST).contains(n))
    };
    let mut counts = Vec::new();
    for part in text.split(',') {
        let (tasks, hosts) = match part.split_once("(x") {
            Some((tasks, hosts)) => (number(tasks)?, number(hosts.strip_suffix(')')?)?),
            None => (number(part)?, 1),
        };
        if counts.len() + hosts > MOST {
            return None;
        }
        counts.resize(counts.len() + hosts, tasks);
    }
    Some(counts)
}

/// Tasks of the step that this process is one of, where srun has started several.
pub fn tasks_of_step() -> Option<usize> {
    std::env::var("SLURM_STEP_NUM_TASKS").ok()?.parse().ok().filter(|&tasks| tasks > 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allocation(tasks: Option<&str>) -> Allocation {
        let variables = [("SLURM_JOB_ID", Some("12")), ("SLURM_JOB_NODELIST", Some("n[1-3]"))];
        let all = [&variables[..], &[("SLURM_TASKS_PER_NODE", tasks)]].concat();
        let variable = |name: &str| all.iter().find(|(key, _)| *key == name)?.1.map(str::to_owned);
        Allocation::of(variable).expect("a job")
    }

    fn place(tasks: Option<&str>, names: &str) -> Result<String, String> {
        let names: Vec<String> = names.split(' ').map(str::to_owned).collect();
        allocation(tasks).place(&names).map(|placement| placement.describe()).map_err(|e| e.to_string())
    }

    #[test]
    fn counts_are_read_as_slurm_writes_them() {
        for (text, expected) in [
            ("4", &[4][..]),
            ("2(x3)", &[2, 2, 2]),
            ("2(x3),1", &[2, 2, 2, 1]),
            ("1,12(x1),3(x2)", &[1, 12, 3, 3]),
        ] {
            assert_eq!(counts(text).as_deref(), Some(expected), "{text}");
        }
        for text in [
            "",
            ",",
            "2,",
            "x",
            "2(x",
            "2(x3",
            "2(3)",
            "2x3",
            "2(x0)",
            "0",
            "-1",
            "+1",
            "2(x3)1",
            "(x3)",
            "2 ",
            "1(x99999999999999999999)",
            "1(x1048576),1",
            "1(x999999999)",
            "２",
        ] {
            assert_eq!(counts(text), None, "{text}");
        }
    }

    #[test]
    fn hosts_get_their_tasks_or_say_why_not() {
        assert_eq!(place(Some("2(x2),1"), "n1 n2 n3").expect("hosts"), "5 ranks on 3 hosts (n1:2,n2:2,n3:1)");
        let fix = "--hosts NAME:RANKS,...";
        for (tasks, names, part) in [
            (None, "n1 n2 n3", "--ntasks-per-node"),
            (Some("2(x"), "n1 n2 n3", "SLURM_TASKS_PER_NODE=2(x does not count"),
            (Some("1"), "n1 n2 n3", "SLURM_TASKS_PER_NODE=1 counts tasks of 1 hosts, and it has 3 (n[1-3])"),
            (Some("1"), "n$1", "\"n$1\" in SLURM_JOB_NODELIST"),
        ] {
            let error = place(tasks, names).expect_err(part);
            assert!(error.contains("SLURM job 12") && error.contains(part) && error.contains(fix), "{error}");
        }
        assert_eq!(Allocation::of(|_| None), None);
    }
}
