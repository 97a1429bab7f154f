//! A SLURM cluster on one machine: real slurmctld, munged and one slurmd for each node, in namespaces of their own.
//! Nothing of the machine's own services is touched, and all of it, jobs included, ends with the value, or with the
//! process that holds it.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use crate::{Ended, Running};

/// How long a command of SLURM may take.
const COMMAND: Duration = Duration::from_secs(30);

/// Nodes `n1`, `n2`, ... at 10.78.0.1, 10.78.0.2, ..., each with host name, network and shared memory of its own. Two
/// partitions: `low`, whose jobs `high` preempts.
#[derive(Debug)]
pub struct Slurm {
    folder: tempfile::TempDir,
    /// `unshare`, which waits for the first process of the cluster.
    child: Child,
    /// The cluster ends when this is closed.
    hold: Option<ChildStdin>,
    /// The first process, as this machine numbers it.
    first: u32,
}

/// The first process of the cluster: munged, slurmctld, and the network.
const FIRST: &str = r#"
set -e
hostname head
mount -t tmpfs shm /dev/shm
# munge and slurmctld keep sockets and process numbers under /run.
mount -t tmpfs run /run
mkdir -m 755 /run/munge
mount --bind "$D/hosts" /etc/hosts
ip link set lo up
ip link add br0 type bridge
ip addr add 10.78.0.100/24 dev br0
ip link set br0 up
munged --foreground --num-threads=4 --key-file="$D/munge.key" --pid-file=/run/munge/munged.pid \
    --log-file="$D/log/munged.log" --seed-file=/run/munge/seed >"$D/log/munged.out" 2>&1 &
slurmctld -D >"$D/log/slurmctld.out" 2>&1 &
for i in $(seq "$N"); do
    unshare --net --uts --mount bash -e -c "$NODE" "$i" &
    # The node's end of the wire has to go into its own network, not into this one.
    until [ "$(readlink /proc/$!/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.01; done
    ip link add "v$i" type veth peer name eth0 netns $!
    ip link set "v$i" master br0 up
done
# Until the test closes its end.
cat >/dev/null
"#;

/// A node.
const NODE: &str = r#"
hostname "n$0"
mount -t tmpfs shm /dev/shm
ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.01; done
ip addr add "10.78.0.$0/24" dev eth0
ip link set eth0 up
exec slurmd -D -N "n$0" >"$D/log/slurmd-n$0.out" 2>&1
"#;

impl Slurm {
    /// Brings a cluster up: a second or two.
    ///
    /// # Errors
    /// Why this machine cannot: it takes root, namespaces and packages.
    pub fn start(nodes: usize) -> Result<Self, String> {
        for program in ["slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter"] {
            if !found(program) {
                return Err(format!("{program} is missing: sh launcher/setup.sh test"));
            }
        }
        if !Path::new("/proc/self/ns/net").exists() || !is_root() {
            return Err("namespaces take root".to_owned());
        }
        let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
        write_files(folder.path(), nodes).map_err(|e| e.to_string())?;
        let mut child = Command::new("unshare")
            .args(["--mount", "--pid", "--net", "--uts", "--fork", "--mount-proc", "--kill-child"])
            .args(["bash", "-c", FIRST])
            .env("D", folder.path())
            .env("N", nodes.to_string())
            .env("NODE", NODE)
            .env("SLURM_CONF", folder.path().join("slurm.conf"))
            .env("PATH", with_sbin())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(fs::File::create(folder.path().join("log/first.out")).map_err(|e| e.to_string())?)
            .spawn()
            .map_err(|e| format!("unshare: {e}"))?;
        let hold = child.stdin.take();
        let mut slurm = Self { folder, child, hold, first: 0 };
        slurm.wait_until_up(nodes)?;
        Ok(slurm)
    }

    fn wait_until_up(&mut self, nodes: usize) -> Result<(), String> {
        let started = Instant::now();
        loop {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(format!("namespaces cannot be made ({status}): {}", self.log("first.out")));
            }
            if self.first == 0 {
                self.first = child_of(self.child.id()).unwrap_or(0);
            } else {
                // Before slurmctld listens, sinfo would wait.
                let listens = self.log("slurmctld.log").contains("Running as primary controller");
                let idle = if listens {
                    self.run(&["sinfo", "-h", "-N", "-p", "low", "-t", "idle"]).stdout
                } else {
                    String::new()
                };
                if idle.lines().count() == nodes {
                    return Ok(());
                }
            }
            if started.elapsed() > Duration::from_secs(20) {
                return Err(format!(
                    "the cluster is not up after 20 s: {}{}",
                    self.log("first.out"),
                    self.log("slurmctld.log")
                ));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// A command on the cluster's login node.
    #[must_use]
    pub fn command(&self, program: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args(["-t", &self.first.to_string(), "--mount", "--pid", "--net", "--uts"])
            .arg(format!("--wd={}", self.folder().display()))
            .arg(program)
            .args(arguments)
            .current_dir(self.folder())
            .env("SLURM_CONF", self.folder.path().join("slurm.conf"))
            .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
            .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
            // More ranks than cores, as a rule.
            .env("OMPI_MCA_mpi_yield_when_idle", "1");
        command
    }

    /// A command of SLURM, to its end.
    #[track_caller]
    pub fn run(&self, arguments: &[&str]) -> Ended {
        Running::start(&mut self.command(Path::new(arguments[0]), &arguments[1..])).wait(COMMAND)
    }

    /// A field of a job, as `scontrol show job` names it, such as `JobState` or `Restarts`.
    #[track_caller]
    pub fn field(&self, job: &str, name: &str) -> String {
        let shown = self.run(&["scontrol", "show", "job", "--oneliner", job]).stdout;
        let start = format!("{name}=");
        let found = shown.split_whitespace().find_map(|word| word.strip_prefix(&start));
        found.unwrap_or_default().to_owned()
    }

    /// Whether a job has begun and not ended.
    #[must_use]
    pub fn runs(&self, job: &str) -> bool {
        self.field(job, "JobState") == "RUNNING"
    }

    /// Process numbers, on this machine, of the ranks that train into a run folder.
    #[must_use]
    pub fn ranks(&self, run: &Path) -> Vec<u32> {
        let argument = format!("run.dir={}", run.display());
        let trains = |pid: &u32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let words: Vec<&[u8]> = line.split(|&byte| byte == 0).collect();
            // What launches them has the same arguments.
            words.get(1) != Some(&&b"launch"[..]) && words.contains(&argument.as_bytes())
        };
        self.processes("repa-dist").into_iter().filter(trains).collect()
    }

    /// Ends the cluster, and returns the names of its processes that are left.
    #[must_use]
    pub fn end(self) -> Vec<String> {
        let space = process_namespace(self.first);
        let before = self.processes("");
        drop(self);
        let left = before.into_iter().filter(|&pid| process_namespace(pid).is_some_and(|s| Some(s) == space));
        left.filter_map(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).ok()).collect()
    }

    /// Process numbers, on this machine, of the cluster's programs of a name; of all without one.
    #[must_use]
    pub fn processes(&self, name: &str) -> Vec<u32> {
        let Some(cluster) = process_namespace(self.first) else { return Vec::new() };
        let all = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let named = |pid: &u32| {
            let comm = fs::read_to_string(format!("/proc/{pid}/comm"));
            comm.is_ok_and(|comm| name.is_empty() || comm.trim_end() == name)
        };
        pids.filter(|pid| named(pid) && process_namespace(*pid).as_ref() == Some(&cluster)).collect()
    }

    /// A log of the cluster, for messages.
    #[must_use]
    pub fn log(&self, name: &str) -> String {
        fs::read_to_string(self.folder.path().join("log").join(name)).unwrap_or_default()
    }

    /// A folder that all nodes see.
    #[must_use]
    pub fn folder(&self) -> PathBuf {
        self.folder.path().join("shared")
    }
}

impl Drop for Slurm {
    fn drop(&mut self) {
        // The first process ends when it reads the end, and with it every other one of its process namespace.
        drop(self.hold.take());
        let started = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) {
            if started.elapsed() > Duration::from_secs(5) {
                // --kill-child takes the first process along.
                let _ = self.child.kill();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// What tells the cluster's processes from the machine's own.
fn process_namespace(pid: u32) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/ns/pid")).ok()
}

/// Signals that wait for a process, as a bit mask of which bit N - 1 is signal N.
#[must_use]
pub fn pending_signals(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("ShdPnd:"));
    line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

/// Whether a process is held by SIGSTOP.
#[must_use]
pub fn is_stopped(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/status")).is_ok_and(|status| status.contains("State:\tT"))
}

fn found(program: &str) -> bool {
    std::env::split_paths(&with_sbin()).any(|folder| folder.join(program).exists())
}

/// The path with the folders of Debian's daemons, which are not on everybody's.
fn with_sbin() -> std::ffi::OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/sbin:/sbin");
    path
}

fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0)
}

fn child_of(pid: u32) -> Option<u32> {
    fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))
        .ok()?
        .split_whitespace()
        .next()?
        .parse()
        .ok()
}

fn write_files(folder: &Path, nodes: usize) -> std::io::Result<()> {
    let make = |name: &str| fs::create_dir_all(folder.join(name));
    for name in ["log", "state", "shared"] {
        make(name)?;
    }
    let mut hosts = "127.0.0.1 localhost\n10.78.0.100 head\n".to_owned();
    for i in 1..=nodes {
        make(&format!("spool/n{i}"))?;
        make(&format!("tmp/n{i}"))?;
        hosts.push_str(&format!("10.78.0.{i} n{i}\n"));
    }
    fs::write(folder.join("hosts"), hosts)?;
    use std::os::unix::fs::OpenOptionsExt;
    let key: [u8; 128] = std::array::from_fn(|i| i as u8 ^ std::process::id() as u8);
    let options =
        fs::OpenOptions::new().write(true).create_new(true).mode(0o400).open(folder.join("munge.key"));
    options?.write_all(&key)?;
    let d = folder.display();
    // GraceTime is what a preempted job has to save; KillWait what it has after its time limit.
    let text = format!(
        "ClusterName=test\nSlurmctldHost=head(10.78.0.100)\nAuthType=auth/munge\nSlurmUser=root\nSlurmdUser=root\n\
         StateSaveLocation={d}/state\nSlurmctldPidFile=/run/slurmctld.pid\nSlurmdPidFile=/run/slurmd-%n.pid\n\
         SlurmdSpoolDir={d}/spool/%n\nTmpFS={d}/tmp/%n\nSlurmctldLogFile={d}/log/slurmctld.log\n\
         SlurmdLogFile={d}/log/slurmd-%n.log\nProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\n\
         JobAcctGatherType=jobacct_gather/none\nAccountingStorageType=accounting_storage/none\n\
         SelectType=select/cons_tres\nSelectTypeParameters=CR_Core\nSchedulerType=sched/backfill\n\
         SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2\n\
         PreemptType=preempt/partition_prio\nPreemptMode=REQUEUE\nMpiDefault=none\nReturnToService=2\nKillWait=10\n\
         SwitchType=switch/none\nSlurmdParameters=config_overrides\n\
         NodeName=n[1-{nodes}] NodeAddr=10.78.0.[1-{nodes}] CPUs=4 RealMemory=1000 State=UNKNOWN\n\
         PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE \
         GraceTime=30\n\
         PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF\n"
    );
    fs::write(folder.join("slurm.conf"), text)
}
