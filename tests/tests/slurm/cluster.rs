//! The cluster that the tests share the code of, and what they do with its jobs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use repa_tests::slurm::{Slurm, is_stopped, pending_signals};
use repa_tests::{Running, binary, log, repa_dist, small_model, small_store};

pub const DEADLINE: Duration = Duration::from_secs(100);

const SIGUSR1: u32 = 10;

/// A cluster with a small store, or why there is none.
pub fn cluster() -> Option<Cluster> {
    let started = Instant::now();
    match Slurm::start(3) {
        Ok(slurm) => {
            eprintln!("three nodes are up after {:.1} s", started.elapsed().as_secs_f64());
            small_store(&slurm.folder().join("store"), 23);
            Some(Cluster { slurm })
        }
        Err(reason) => {
            eprintln!("skipped: no SLURM here ({reason})");
            None
        }
    }
}

pub struct Cluster {
    pub slurm: Slurm,
}

impl Cluster {
    pub fn run(&self, name: &str) -> PathBuf {
        self.slurm.folder().join(name)
    }

    /// `repa-dist slurm --submit` of the small model on three nodes; gives the number of the job.
    #[track_caller]
    pub fn submit(&self, run: &str, options: &[&str], more: &[&str]) -> String {
        let nodes = if options.contains(&"--nodes=1") { None } else { Some("--nodes=3") };
        let mut arguments: Vec<String> = ["slurm", "--cpus-per-task=1", "--interface=eth0", "--submit"]
            .iter()
            .copied()
            .chain(nodes)
            .chain(options.iter().copied())
            .map(str::to_owned)
            .collect();
        arguments.extend(small_model(&self.run("store"), &self.run(run)));
        arguments.extend(more.iter().map(|&a| a.to_owned()));
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let ended =
            Running::start(&mut self.slurm.command(&binary(), &arguments)).wait(DEADLINE).expect_code(0);
        let id = ended.stdout.split_whitespace().nth(2).expect("a number").to_owned();
        assert!(ended.stdout.starts_with(&format!("submitted job {id} ")), "{}", ended.stdout);
        assert!(
            ended.stdout.contains(&format!("tail -F {}", self.log_of(run, &id).display())),
            "{}",
            ended.stdout
        );
        id
    }

    pub fn log_of(&self, run: &str, id: &str) -> PathBuf {
        self.run(run).join(format!("logs/{run}-{id}.out"))
    }

    /// What a job has printed.
    pub fn said(&self, run: &str, id: &str) -> String {
        fs::read_to_string(self.log_of(run, id)).unwrap_or_default()
    }

    #[track_caller]
    pub fn until(&self, what: &str, run: &str, id: &str, mut holds: impl FnMut() -> bool) {
        let started = Instant::now();
        while !holds() {
            assert!(
                started.elapsed() < DEADLINE,
                "waited in vain until {what}; the job is {} and said:\n{}\nslurmctld:\n{}",
                self.slurm.field(id, "JobState"),
                self.said(run, id),
                self.slurm.log("slurmctld.log")
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until a job has done some steps, holds its ranks there, and gives their process numbers.
    #[track_caller]
    pub fn hold(&self, run: &str, id: &str) -> Vec<u32> {
        let folder = self.run(run);
        self.until("it trains", run, id, || {
            fs::read_to_string(folder.join("metrics.jsonl")).is_ok_and(|text| text.lines().count() > 3)
        });
        let ranks = self.slurm.ranks(&folder);
        assert_eq!(ranks.len(), 3, "{}", self.said(run, id));
        send("STOP", &ranks);
        assert!(log(&folder).len() < STEPS, "the run was over before it could be held");
        ranks
    }

    /// Waits until SIGUSR1 has come to all ranks, and lets them go on.
    #[track_caller]
    pub fn release(&self, run: &str, id: &str) {
        let held = self.slurm.ranks(&self.run(run));
        self.until("the ranks are signalled", run, id, || {
            held.iter().all(|&pid| pending_signals(pid) & (1 << (SIGUSR1 - 1)) != 0)
        });
        send("CONT", &held);
    }

    /// Waits until SLURM has preempted a job whose ranks are held (it lets them go on before it sends SIGTERM), and lets
    /// the others go on, too.
    #[track_caller]
    pub fn release_preempted(&self, run: &str, id: &str) {
        let held = self.slurm.ranks(&self.run(run));
        self.until("the ranks are signalled", run, id, || held.iter().any(|&pid| !is_stopped(pid)));
        held.iter().filter(|&&pid| is_stopped(pid)).for_each(|&pid| send("CONT", &[pid]));
    }

    /// Waits until SLURM has put a job back in its queue, and has it start again at once.
    #[track_caller]
    pub fn start_again(&self, run: &str, id: &str) {
        self.until("the job is requeued", run, id, || {
            self.slurm.field(id, "Restarts") == "1"
                && self.slurm.field(id, "JobState") == "PENDING"
                && self.slurm.run(&["sinfo", "-h", "-N", "-t", "completing"]).stdout.is_empty()
        });
        // slurmd refuses a start in the second in which the last one ended.
        std::thread::sleep(Duration::from_millis(1200));
        self.slurm
            .run(&["scontrol", "update", &format!("JobId={id}"), "StartTime=now", "TimeLimit=60"])
            .expect_code(0);
    }

    /// Hands in a short job that needs all nodes, in the higher partition.
    #[track_caller]
    pub fn preempt(&self) -> String {
        let all =
            ["--partition=high", "--nodes=3", "--ntasks-per-node=4", "--output=/dev/null", "--wrap=true"];
        let printed = self.slurm.run(&[&["sbatch", "--parsable"], &all[..]].concat()).expect_code(0).stdout;
        printed.trim().to_owned()
    }

    /// Ends the cluster: nothing of it is left, with its jobs.
    #[track_caller]
    pub fn end(self) {
        let left = self.slurm.end();
        assert!(left.is_empty(), "processes are left: {left:?}");
    }

    #[track_caller]
    pub fn finish(&self, run: &str, id: &str, state: &str) {
        self.until("it has ended", run, id, || {
            ["COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL"]
                .contains(&self.slurm.field(id, "JobState").as_str())
        });
        assert_eq!(self.slurm.field(id, "JobState"), state, "{}", self.said(run, id));
        assert!(self.slurm.ranks(&self.run(run)).is_empty(), "ranks are left");
    }

    /// Two runs have the same weights, averages and moments.
    #[track_caller]
    pub fn same(&self, a: &str, b: &str) {
        let (a, b) = (self.run(a), self.run(b));
        let arguments = ["checkpoint", "diff", text(&a), text(&b)];
        let said = Running::start(&mut repa_dist(&arguments)).wait(DEADLINE).expect_code(0).stdout;
        assert!(said.contains("same to the bit, 0 differ"), "{said}");
    }

    /// A stopped and resumed run is the one that was not stopped.
    #[track_caller]
    pub fn went_on(&self, run: &str, id: &str, whole: &str) {
        let said = self.said(run, id);
        for part in
            ["3 ranks on 3 hosts", "going on from step ", &format!("to {STEPS}"), "to be started again"]
        {
            assert!(said.contains(part), "no {part:?} in\n{said}");
        }
        assert_eq!(said.matches("to be started again").count(), 1, "{said}");
        assert_eq!(log(&self.run(run)).len(), STEPS);
        self.same(run, whole);
    }
}

/// Steps of a run: enough that it is still under way when it is first looked at.
pub const STEPS: usize = 200;

pub fn steps() -> String {
    format!("train.steps={STEPS}")
}

pub fn send(signal: &str, pids: &[u32]) {
    let pids: Vec<String> = pids.iter().map(u32::to_string).collect();
    let status = Command::new("kill").args(["-s", signal, "--"]).args(&pids).status().expect("kill runs");
    assert!(status.success(), "cannot send {signal} to {pids:?}");
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}
