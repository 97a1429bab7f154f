//! Several hosts on one machine: network namespaces on a bridge, each with its own host name and shared
//! memory, for mpirun to start ranks on without ssh. All of it goes away with the value.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// Hosts `h1`, `h2`, ... at 10.77.0.1, 10.77.0.2, ... They see each other and nothing else.
#[derive(Debug)]
pub struct Hosts {
    /// What their namespaces begin with: other tests may have hosts of their own.
    prefix: String,
    count: usize,
    folder: tempfile::TempDir,
}

static NUMBER: AtomicU32 = AtomicU32::new(0);

impl Hosts {
    /// So many hosts, or None where this machine cannot have them, and why not is printed.
    pub fn or_skip(count: usize) -> Option<Self> {
        match Self::new(count) {
            Ok(hosts) => Some(hosts),
            Err(reason) => {
                eprintln!("skipped: no network namespaces here ({reason})");
                None
            }
        }
    }

    /// Makes `count` hosts.
    ///
    /// # Errors
    /// Why this machine cannot: it takes root, network namespaces and the packages iproute2 and util-linux.
    pub fn new(count: usize) -> Result<Self, String> {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("rd{}-{number}-", std::process::id());
        let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
        let hosts = Self { prefix, count, folder };
        hosts.write_files().map_err(|e| e.to_string())?;
        let head = format!("{}head", hosts.prefix);
        ip(&["netns", "add", &head])?;
        ip(&["-n", &head, "link", "set", "lo", "up"])?;
        ip(&["-n", &head, "link", "add", "br0", "type", "bridge"])?;
        ip(&["-n", &head, "link", "set", "br0", "up"])?;
        for i in 1..=count {
            let (name, far) = (hosts.namespace(i), format!("v{i}"));
            ip(&["netns", "add", &name])?;
            ip(&[
                "link", "add", "eth0", "netns", &name, "type", "veth", "peer", "name", &far, "netns", &head,
            ])?;
            ip(&["-n", &head, "link", "set", &far, "master", "br0", "up"])?;
            ip(&["-n", &name, "addr", "add", &format!("10.77.0.{i}/24"), "dev", "eth0"])?;
            ip(&["-n", &name, "link", "set", "eth0", "up"])?;
            ip(&["-n", &name, "link", "set", "lo", "up"])?;
        }
        Ok(hosts)
    }

    fn namespace(&self, host: usize) -> String {
        format!("{}{host}", self.prefix)
    }

    /// The agent that mpirun takes for ssh, and the hosts file.
    /// Like ssh, it cannot reach hosts that are not there or whose link is down.
    fn write_files(&self) -> std::io::Result<()> {
        let names: String = (1..=self.count).map(|i| format!("10.77.0.{i} h{i}\n")).collect();
        fs::write(self.folder.path().join("hosts"), format!("127.0.0.1 localhost\n{names}"))?;
        let agent = self.agent();
        let folder = self.folder.path();
        // Each host's own disk is mounted at one place.
        for disk in (1..=self.count).map(|i| folder.join(format!("disks/h{i}"))).chain([self.disk()]) {
            fs::create_dir_all(disk)?;
        }
        let script = format!(
            "#!/bin/bash\nhost=$1; shift\nspace={prefix}${{host#h}}\n\
             ip -n $space -o link show dev eth0 2>/dev/null | grep -q 'state UP' || {{\n\
             echo \"connect to host $host: No route to host\" >&2; exit 255; }}\n\
             exec ip netns exec $space unshare --uts --mount bash -c '\n\
             hostname \"$0\"\nmount -t tmpfs shm /dev/shm\nmount --bind {hosts} /etc/hosts\n\
             mount --bind {folder}/disks/$0 {disk}\nexec bash -c \"$*\"' \"$host\" \"$@\"\n",
            prefix = self.prefix,
            hosts = folder.join("hosts").display(),
            folder = folder.display(),
            disk = self.disk().display()
        );
        fs::write(&agent, script)?;
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(&agent, fs::Permissions::from_mode(0o755))
    }

    /// What starts commands on hosts in place of ssh.
    #[must_use]
    pub fn agent(&self) -> PathBuf {
        self.folder.path().join("agent")
    }

    /// `mpirun repa-dist`, `each` ranks on every host, started from the first.
    #[must_use]
    pub fn mpirun(&self, each: usize, arguments: &[&str]) -> Command {
        let list: Vec<String> = (1..=self.count).map(|i| format!("h{i}:{each}")).collect();
        let quoted: Vec<String> = arguments.iter().map(|a| format!("'{a}'")).collect();
        let line = format!(
            "cd '{}' && mpirun --allow-run-as-root --bind-to none --mca plm_rsh_agent {} \
             --mca plm_rsh_no_tree_spawn 1 --mca btl self,vader,tcp --mca btl_tcp_if_include eth0 \
             --mca oob_tcp_if_include eth0 --mca mpi_yield_when_idle 1 -H {} {} {}",
            std::env::current_dir().unwrap_or_default().display(),
            self.agent().display(),
            list.join(","),
            crate::binary().display(),
            quoted.join(" ")
        );
        self.on(1, &line)
    }

    /// A shell command on a host.
    #[must_use]
    pub fn on(&self, host: usize, line: &str) -> Command {
        let mut command = Command::new(self.agent());
        command.args([&format!("h{host}"), line]);
        command
    }

    /// Shapes what leaves a host: `rate` such as `1gbit`.
    ///
    /// # Errors
    /// This kernel cannot.
    pub fn shape(&self, host: usize, rate: &str) -> Result<(), String> {
        let name = self.namespace(host);
        let arguments =
            ["qdisc", "add", "dev", "eth0", "root", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms"];
        run(Command::new("tc").args(["-n", &name]).args(arguments))
    }

    /// Takes a host's link down.
    ///
    /// # Errors
    /// `ip` says why not.
    pub fn cut(&self, host: usize) -> Result<(), String> {
        ip(&["-n", &self.namespace(host), "link", "set", "eth0", "down"])
    }

    /// Brings a host's link up again.
    ///
    /// # Errors
    /// `ip` says why not.
    pub fn mend(&self, host: usize) -> Result<(), String> {
        ip(&["-n", &self.namespace(host), "link", "set", "eth0", "up"])
    }

    /// `repa-dist launch` on the first host, `each` ranks on every host.
    #[must_use]
    pub fn launch(&self, each: usize, options: &[&str], train: &[&str]) -> Command {
        let list: Vec<String> = (1..=self.count).map(|i| format!("h{i}:{each}")).collect();
        let quoted: Vec<String> = train.iter().map(|a| format!("'{a}'")).collect();
        let line = format!(
            "cd '{}' && exec {} launch --hosts {} --rsh-agent {} --interface eth0 {} -- train {}",
            self.folder.path().display(),
            crate::binary().display(),
            list.join(","),
            self.agent().display(),
            options.join(" "),
            quoted.join(" ")
        );
        self.on(1, &line)
    }

    /// All processes on a host, by number and name.
    #[must_use]
    pub fn processes(&self, host: usize) -> Vec<String> {
        let pids = self.pids(&self.namespace(host));
        let name = |pid| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            format!("{pid} {}", name.trim())
        };
        pids.split_whitespace().map(name).collect()
    }

    /// Process numbers of the binary under test on a host.
    #[must_use]
    pub fn ranks(&self, host: usize) -> Vec<String> {
        let is_rank = |pid: &&str| {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|c| c.trim() == "repa-dist")
        };
        let pids = self.pids(&self.namespace(host));
        pids.split_whitespace().filter(is_rank).map(str::to_owned).collect()
    }

    fn pids(&self, namespace: &str) -> String {
        let output = Command::new("ip").args(["netns", "pids", namespace]).output();
        output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default()
    }

    /// A folder under whose name each host sees a disk of its own, `disks/h1` and so on of [`Hosts::folder`].
    #[must_use]
    pub fn disk(&self) -> PathBuf {
        self.folder.path().join("disk")
    }

    /// A folder that all hosts see.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        // Whatever still runs in a namespace ends with it.
        for name in (1..=self.count).map(|i| self.namespace(i)).chain([format!("{}head", self.prefix)]) {
            for pid in self.pids(&name).split_whitespace() {
                let _ = Command::new("kill").args(["-s", "KILL", pid]).status();
            }
            let _ = ip(&["netns", "del", &name]);
        }
    }
}

fn ip(arguments: &[&str]) -> Result<(), String> {
    run(Command::new("ip").args(arguments))
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|e| format!("{command:?}: {e} (install iproute2)"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}
