//! The hosts of a run, and how many ranks each has.

use std::net::{ToSocketAddrs, UdpSocket};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::error::LaunchError;

/// A host that ranks run on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// As mpirun and the agent know it.
    pub host: String,
    /// Its ranks.
    pub ranks: usize,
}

/// Where ranks run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Placement {
    /// All of them here.
    Local(usize),
    /// On these hosts, in the order of the ranks.
    Hosts(Vec<Host>),
}

impl Placement {
    /// From the words of `--hosts`.
    pub fn from_list(words: &[String]) -> Result<Self, LaunchError> {
        let origin = "--hosts";
        let mut hosts = Vec::new();
        for word in words.iter().map(|word| word.trim()).filter(|word| !word.is_empty()) {
            let bad = || LaunchError::Host { origin: origin.into(), text: word.into() };
            let (name, ranks) = match word.rsplit_once(':') {
                Some((name, ranks)) => (name, ranks.parse().map_err(|_| bad())?),
                None => (word, 1),
            };
            add(&mut hosts, origin, name, ranks)?;
        }
        Self::of(hosts, origin)
    }

    /// From a host file as mpirun reads them: `node1 slots=8`, and comments after #.
    pub fn from_file(path: &Path) -> Result<Self, LaunchError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| LaunchError::HostFile { path: path.to_owned(), source })?;
        Self::from_text(&text, &path.display().to_string())
    }

    fn from_text(text: &str, origin: &str) -> Result<Self, LaunchError> {
        let mut hosts = Vec::new();
        for (number, line) in text.lines().enumerate() {
            let line = line.split('#').next().unwrap_or_default().trim();
            let origin = format!("{origin}, line {}", number + 1);
            let bad = || LaunchError::Host { origin: origin.clone(), text: line.into() };
            // Spaces may stand around the sign.
            let joined = line.replace(" =", "=").replace("= ", "=");
            let mut words = joined.split_whitespace();
            let Some(first) = words.next() else { continue };
            let (name, mut ranks) = match first.rsplit_once(':') {
                Some((name, ranks)) => (name, ranks.parse().map_err(|_| bad())?),
                None => (first, 1),
            };
            for word in words {
                match word.split_once('=') {
                    Some(("slots", value)) => ranks = value.parse().map_err(|_| bad())?,
                    // A limit of oversubscription, which launch does not do on other hosts.
                    Some(("max_slots" | "max-slots", _)) => {}
                    _ => return Err(bad()),
                }
            }
            add(&mut hosts, &origin, name, ranks)?;
        }
        Self::of(hosts, origin)
    }

    fn of(hosts: Vec<Host>, origin: &str) -> Result<Self, LaunchError> {
        match hosts.is_empty() {
            true => Err(LaunchError::NoHosts { origin: origin.into() }),
            false => Ok(Self::Hosts(hosts)),
        }
    }

    /// Ranks in all.
    pub fn ranks(&self) -> usize {
        match self {
            Self::Local(ranks) => *ranks,
            Self::Hosts(hosts) => hosts.iter().map(|host| host.ranks).sum(),
        }
    }

    /// The hosts by name.
    pub fn hosts(&self) -> Vec<Host> {
        match self {
            Self::Local(ranks) => vec![Host { host: this_host(), ranks: *ranks }],
            Self::Hosts(hosts) => hosts.clone(),
        }
    }

    /// The host of a rank, where mpirun fills one after the other.
    pub fn host_of(&self, rank: usize) -> Option<String> {
        let mut first = 0;
        self.hosts().into_iter().find_map(|host| {
            first += host.ranks;
            (rank < first).then_some(host.host)
        })
    }

    /// As people read it.
    pub fn describe(&self) -> String {
        let ranks = plural(self.ranks(), "rank");
        match self {
            Self::Local(_) => format!("{ranks} on this host"),
            Self::Hosts(hosts) => {
                let names: Vec<String> = hosts.iter().map(|h| format!("{}:{}", h.host, h.ranks)).collect();
                format!("{ranks} on {} ({})", plural(hosts.len(), "host"), names.join(","))
            }
        }
    }
}

/// A number of things.
pub fn plural(n: usize, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

/// Adds ranks on a host; one that is named twice has those of both.
fn add(hosts: &mut Vec<Host>, origin: &str, name: &str, ranks: usize) -> Result<(), LaunchError> {
    if !valid(name) {
        return Err(LaunchError::Host { origin: origin.into(), text: name.into() });
    }
    if ranks == 0 {
        return Err(LaunchError::NoSlots { origin: origin.into(), host: name.into() });
    }
    match hosts.iter_mut().find(|host| host.host == name) {
        Some(host) => host.ranks += ranks,
        None => hosts.push(Host { host: name.into(), ranks }),
    }
    Ok(())
}

/// Whether a name can be a host's, so that a slip is not sent to a shell.
pub fn valid(name: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || "-._@".contains(c);
    !name.is_empty() && !name.starts_with('-') && name.chars().all(fits)
}

/// This host's name.
pub fn this_host() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map_or_else(|_| "localhost".into(), |name| name.trim().into())
}

/// Whether a name means this host. May ask the name servers.
pub fn is_here(name: &str) -> bool {
    let here = this_host();
    let short = |name: &str| name.split('.').next().unwrap_or_default().to_owned();
    if name == "localhost" || name == here || (!name.contains('.') && name == short(&here)) {
        return true;
    }
    // SLURM may know it by another name.
    if std::env::var("SLURMD_NODENAME").is_ok_and(|own| own == name) {
        return true;
    }
    // An address that a socket can be bound to is one of ours.
    (name, 0).to_socket_addrs().is_ok_and(|mut found| found.any(|address| UdpSocket::bind(address).is_ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(text: &str) -> Result<Placement, String> {
        let words: Vec<String> = text.split(',').map(str::to_owned).collect();
        Placement::from_list(&words).map_err(|e| e.to_string())
    }

    #[test]
    fn hosts_are_read_from_lists_and_files() {
        let three = list("a:8,b,a:2").expect("hosts");
        assert_eq!(three.describe(), "11 ranks on 2 hosts (a:10,b:1)");
        assert_eq!([0, 9, 10].map(|rank| three.host_of(rank).expect("a host")), ["a", "a", "b"]);
        assert_eq!(three.host_of(11), None);
        let text = "# ours\na slots=8 max_slots=8\n\nb slots = 2 # slow\nc:3\n";
        assert_eq!(Placement::from_text(text, "f").expect("hosts"), list("a:8,b:2,c:3").expect("hosts"));
    }

    #[test]
    fn slips_are_told() {
        assert!(list("a:x").expect_err("no number").contains("\"a:x\" is no host"));
        assert!(list("a b:2").expect_err("a space").contains("\"a b\" is no host"));
        assert!(list("-a:2").is_err() && list(":2").is_err());
        assert!(list("a:0").expect_err("no slots").contains("a has no slots"));
        assert!(list("").expect_err("nothing").contains("names no host"));
        let error = Placement::from_text("a slots=8\nb cores=2\n", "f").expect_err("a word").to_string();
        assert!(error.contains("f, line 2"), "{error}");
    }

    #[test]
    fn this_host_is_here() {
        assert!(is_here("localhost") && is_here("127.0.0.1") && is_here(&this_host()));
        assert!(!is_here("192.0.2.7"));
    }
}
