//! The mpirun line.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::hosts::{Host, Placement, is_here};

/// Names a launch to the processes that belong to it: a variable of mpirun and of the ranks.
pub const MARK: &str = "REPA_LAUNCH_JOB";
/// The same on the command lines of mpirun's daemons on other hosts, which get no variables. mpirun passes on
/// parameters that it does not know.
pub const MARK_PARAMETER: &str = "repa_launch_job";

/// Variable that tells the ranks how often they have been started again, for their metrics.
pub const RESTARTS: &str = "REPA_RESTARTS";
/// Tells rank 0 that a person watches, and the width of the terminal.
pub use repa_trainer::telemetry::progress::TERMINAL;

/// What starts mpirun's daemons on other hosts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Daemons {
    /// ssh, or another agent, as given.
    Agent(Option<String>),
    /// The same although a job of SLURM is around us, which mpirun would ask.
    AgentInJob(Option<String>),
    /// The job of SLURM around us: mpirun's srun, which is given these options besides.
    Slurm(String),
}

/// What stays the same from attempt to attempt.
#[derive(Debug, Clone)]
pub struct Line {
    /// mpirun.
    pub mpirun: PathBuf,
    /// This binary.
    pub program: PathBuf,
    /// The folder that ranks run in.
    pub folder: PathBuf,
    /// The launch's mark.
    pub job: String,
    /// `--bind-to`.
    pub bind_to: String,
    /// `--map-by`.
    pub map_by: Option<String>,
    /// Network interface, or addresses (10.0.0.0/8), for MPI between hosts.
    pub interface: Option<String>,
    /// What starts mpirun's daemons.
    pub daemons: Daemons,
    /// Cores of a host.
    pub cores: usize,
    /// Whether we are root, which mpirun refuses unless told.
    pub root: bool,
}

impl Line {
    /// mpirun's arguments, itself first, for a placement and the arguments of the ranks. `names` are the variables of
    /// our environment.
    pub fn words(&self, placement: &Placement, train: &[String], names: &[String]) -> Vec<String> {
        let mut words = vec![text(&self.mpirun)];
        let mut add = |more: &[&str]| words.extend(more.iter().map(|&word| word.to_owned()));
        if self.root {
            add(&["--allow-run-as-root"]);
        }
        // Who said what is told from these tags.
        add(&["--tag-output", "--mca", MARK_PARAMETER, &self.job]);
        add(&["--bind-to", &self.bind_to]);
        if let Some(map_by) = &self.map_by {
            add(&["--map-by", map_by]);
        }
        let crowded = match placement {
            Placement::Local(ranks) => *ranks > self.cores,
            // Other hosts are taken to have as many cores as this one.
            Placement::Hosts(hosts) => hosts.iter().any(|host| host.ranks > self.cores),
        };
        if crowded {
            // A rank that waits leaves its core to another.
            add(&["--mca", "mpi_yield_when_idle", "1"]);
        }
        if let Some(interface) = &self.interface {
            add(&["--mca", "btl_tcp_if_include", interface, "--mca", "oob_tcp_if_include", interface]);
        }
        if !matches!(self.daemons, Daemons::Agent(_)) {
            // Hosts and slots are those that we name; mpirun would count all of the job's.
            add(&["--mca", "ras", "^slurm"]);
        }
        if let Placement::Hosts(hosts) = placement {
            match &self.daemons {
                Daemons::Agent(agent) | Daemons::AgentInJob(agent) => {
                    if let Daemons::AgentInJob(_) = self.daemons {
                        add(&["--mca", "plm", "rsh"]);
                    }
                    if let Some(agent) = agent {
                        add(&["--mca", "plm_rsh_agent", agent]);
                    }
                    // Hosts need not reach each other by ssh, only be reached from here.
                    add(&["--mca", "plm_rsh_no_tree_spawn", "1"]);
                }
                Daemons::Slurm(given) => add(&["--mca", "plm_slurm_args", &srun_options(given, hosts)]),
            }
            let list: Vec<String> = hosts.iter().map(|h| format!("{}:{}", h.host, h.ranks)).collect();
            add(&["-H", &list.join(",")]);
        } else {
            // mpirun would count cores where processors are threads of them.
            add(&["--oversubscribe"]);
        }
        for name in exported(names) {
            add(&["-x", name]);
        }
        add(&["--wdir", &text(&self.folder), "-n", &placement.ranks().to_string()]);
        add(&[&text(&self.program), "train"]);
        words.extend(train.iter().cloned());
        words
    }

    /// NCCL takes a name where MPI also takes addresses.
    pub fn nccl_interface(&self) -> Option<&str> {
        self.interface.as_deref().filter(|interface| !interface.contains('/'))
    }
}

/// What mpirun's srun is given: it waits for no other step of the job, such as what an attempt has left, and starts
/// daemons where mpirun needs some.
fn srun_options(given: &str, hosts: &[Host]) -> String {
    let others: Vec<&str> =
        hosts.iter().map(|host| host.host.as_str()).filter(|name| !is_here(name)).collect();
    format!("{given} --overlap --nodelist={}", others.join(",")).trim_start().to_owned()
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// Of the variables of our environment, those that ranks on other hosts should have.
fn exported(names: &[String]) -> Vec<&str> {
    const NAMES: [&str; 3] = ["RUST_LOG", "RUST_BACKTRACE", MARK];
    // Checkpoints in S3 take theirs from AWS_*.
    const PREFIXES: [&str; 4] = ["REPA_", "NCCL_", "OMPI_", "AWS_"];
    // What an mpirun around us has left is of another job.
    const OF_A_JOB: [&str; 5] =
        ["OMPI_COMM_WORLD_", "OMPI_UNIVERSE_", "OMPI_APP_", "OMPI_MCA_orte_", "OMPI_MCA_ess_"];
    let begins = |name: &str, with: &[&str]| with.iter().any(|prefix| name.starts_with(prefix));
    let mut found: Vec<&str> = names
        .iter()
        .map(String::as_str)
        .filter(|name| NAMES.contains(name) || begins(name, &PREFIXES))
        .filter(|name| !begins(name, &OF_A_JOB))
        .collect();
    found.sort_unstable();
    found.dedup();
    found
}

/// Names of the variables of this process.
pub fn environment() -> Vec<String> {
    std::env::vars_os().filter_map(|(name, _): (OsString, _)| name.into_string().ok()).collect()
}

/// A line that a shell reads back as these words.
pub fn quoted(words: &[String]) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./,:=@%+".contains(c);
    let quote = |word: &String| match !word.is_empty() && word.chars().all(plain) {
        true => word.clone(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    };
    words.iter().map(quote).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line() -> Line {
        Line {
            mpirun: "mpirun".into(),
            program: "/bin/repa-dist".into(),
            folder: "/here".into(),
            job: "j".into(),
            bind_to: "none".into(),
            map_by: None,
            interface: None,
            daemons: Daemons::Agent(None),
            cores: 4,
            root: false,
        }
    }

    #[test]
    fn lines_for_one_host_and_for_several() {
        let train = ["train.steps=5".to_owned(), "run.dir=my run".to_owned()];
        let one = line().words(&Placement::Local(2), &train, &[]);
        assert_eq!(
            quoted(&one),
            "mpirun --tag-output --mca repa_launch_job j --bind-to none --oversubscribe --wdir /here -n 2 \
             /bin/repa-dist train train.steps=5 'run.dir=my run'"
        );
        let crowded = quoted(&line().words(&Placement::Local(5), &[], &[]));
        assert!(crowded.contains("mpi_yield_when_idle 1 --oversubscribe"), "{crowded}");
        let hosts = Placement::from_list(&["a:4".into(), "b:2".into()]).expect("hosts");
        let line = Line {
            interface: Some("eth0".into()),
            daemons: Daemons::Agent(Some("/my agent".into())),
            map_by: Some("node".into()),
            root: true,
            ..line()
        };
        let names = ["HOME", "REPA_DEVICE", "NCCL_DEBUG", "RUST_LOG", "OMPI_MCA_btl", "OMPI_COMM_WORLD_RANK"];
        let several = quoted(&line.words(&hosts, &[], &names.map(str::to_owned)));
        assert_eq!(
            several,
            "mpirun --allow-run-as-root --tag-output --mca repa_launch_job j --bind-to none --map-by node --mca \
             btl_tcp_if_include eth0 --mca oob_tcp_if_include eth0 --mca plm_rsh_agent '/my agent' --mca \
             plm_rsh_no_tree_spawn 1 -H a:4,b:2 -x NCCL_DEBUG -x OMPI_MCA_btl -x REPA_DEVICE -x RUST_LOG --wdir \
             /here -n 6 /bin/repa-dist train"
        );
    }

    #[test]
    fn inside_a_job_the_line_says_what_starts_daemons() {
        let hosts = ["localhost:4", "192.0.2.7:2", "192.0.2.8"].map(str::to_owned);
        let hosts = Placement::from_list(&hosts).expect("hosts");
        let words = |daemons, placement| {
            let words = quoted(&Line { daemons, ..line() }.words(placement, &[], &[]));
            let (_, rest) = words.split_once("--bind-to none ").expect("the option");
            rest.split_once(" --wdir").expect("the option").0.to_owned()
        };
        let list = "-H localhost:4,192.0.2.7:2,192.0.2.8:1";
        let slurm = |given: &str| Daemons::Slurm(given.into());
        assert_eq!(
            words(slurm(""), &hosts),
            format!(
                "--mca ras '^slurm' --mca plm_slurm_args '--overlap --nodelist=192.0.2.7,192.0.2.8' {list}"
            )
        );
        assert!(words(slurm("-v"), &hosts).contains("plm_slurm_args '-v --overlap --nodelist=192"));
        assert_eq!(words(slurm(""), &Placement::Local(2)), "--mca ras '^slurm' --oversubscribe");
        assert_eq!(
            words(Daemons::AgentInJob(Some("x".into())), &hosts),
            format!(
                "--mca ras '^slurm' --mca plm rsh --mca plm_rsh_agent x --mca plm_rsh_no_tree_spawn 1 {list}"
            )
        );
    }
}
