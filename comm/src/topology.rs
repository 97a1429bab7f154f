//! Who is where, and how many threads each rank may use.

/// The ranks of a job, their nodes, and the processors this rank may run on.
#[derive(Debug, Clone)]
pub struct Topology {
    /// This process's number, 0 .. size.
    pub rank: usize,
    /// Number of processes.
    pub size: usize,
    /// This process's number on its node.
    pub local_rank: usize,
    /// Number of processes on this node.
    pub local_size: usize,
    /// This node's number; nodes are numbered by their lowest rank.
    pub node: usize,
    /// Number of nodes.
    pub nodes: usize,
    /// Node of every rank.
    pub node_of: Vec<usize>,
    /// Host name of every rank.
    pub hosts: Vec<String>,
    /// Processors this process may run on (affinity mask and cgroup limit).
    pub processors: usize,
    /// Ranks on this node (this one included) whose affinity masks overlap this one's: they share processors.
    pub sharers: usize,
}

impl Topology {
    /// One process alone.
    pub(crate) fn single() -> Self {
        Self {
            rank: 0,
            size: 1,
            local_rank: 0,
            local_size: 1,
            node: 0,
            nodes: 1,
            node_of: vec![0],
            hosts: vec![host_name()],
            processors: processors(),
            sharers: 1,
        }
    }

    /// From what all ranks told: the lowest rank on the teller's node, its host name and affinity mask.
    pub(crate) fn new(rank: usize, told: &[Told]) -> Self {
        let mut leaders: Vec<usize> = told.iter().map(|told| told.leader).collect();
        leaders.sort_unstable();
        leaders.dedup();
        let node_of: Vec<usize> = told
            .iter()
            .map(|told| leaders.binary_search(&told.leader).expect("every leader is in the list"))
            .collect();
        let node = node_of[rank];
        let here: Vec<usize> = (0..told.len()).filter(|&other| node_of[other] == node).collect();
        let overlaps = |other: &usize| masks_overlap(&told[rank].mask, &told[*other].mask);
        Self {
            rank,
            size: told.len(),
            local_rank: here.iter().filter(|&&other| other < rank).count(),
            local_size: here.len(),
            node,
            nodes: leaders.len(),
            hosts: told.iter().map(|told| told.host.clone()).collect(),
            processors: processors(),
            sharers: here.iter().filter(|other| overlaps(other)).count().max(1),
            node_of,
        }
    }

    /// Compute threads for this rank so that the ranks of a node do not fight: the processors this process may
    /// use over the ranks that share them, at least 1. (Ranks bound to processors of their own share with nobody.)
    pub fn threads_per_rank(&self) -> usize {
        (self.processors / self.sharers).max(1)
    }

    /// More ranks here than processors: waiting must not burn time that another rank needs.
    pub(crate) fn oversubscribed(&self) -> bool {
        self.sharers > self.processors
    }
}

/// What every rank tells the others at the start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Told {
    pub(crate) leader: usize,
    pub(crate) host: String,
    pub(crate) mask: String,
}

impl Told {
    pub(crate) fn here(leader: usize) -> Self {
        Self { leader, host: host_name(), mask: affinity_mask() }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        format!("{}\n{}\n{}", self.leader, self.host, self.mask).into_bytes()
    }

    /// The inverse of `encode`; text of another program version gives a rank alone on its node.
    pub(crate) fn decode(rank: usize, bytes: &[u8]) -> Self {
        let text = String::from_utf8_lossy(bytes);
        let mut lines = text.lines();
        Self {
            leader: lines.next().and_then(|line| line.parse().ok()).unwrap_or(rank),
            host: lines.next().unwrap_or("unknown").to_owned(),
            mask: lines.next().unwrap_or("").to_owned(),
        }
    }
}

fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// This host's name as the kernel has it.
pub(crate) fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim();
    if name.is_empty() { "localhost".to_owned() } else { name.to_owned() }
}

/// The affinity mask as the kernel prints it (hexadecimal, most significant first); empty where unknown.
fn affinity_mask() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed:"));
    line.unwrap_or("").trim().replace(',', "")
}

/// Whether two hexadecimal masks have a bit in common; unknown masks count as overlapping.
fn masks_overlap(a: &str, b: &str) -> bool {
    if a.is_empty() || b.is_empty() {
        return true;
    }
    let digit = |c: char| c.to_digit(16).unwrap_or(15);
    a.chars().rev().zip(b.chars().rev()).any(|(a, b)| digit(a) & digit(b) != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(leader: usize, host: &str, mask: &str) -> Told {
        Told { leader, host: host.to_owned(), mask: mask.to_owned() }
    }

    #[test]
    fn nodes_are_numbered_by_their_lowest_rank() {
        let ranks = [told(0, "b", "3"), told(1, "a", "3"), told(0, "b", "3"), told(1, "a", "c")];
        let topology = Topology::new(2, &ranks);
        assert_eq!((topology.node, topology.nodes, topology.local_rank, topology.local_size), (0, 2, 1, 2));
        assert_eq!(topology.sharers, 2);
        let topology = Topology::new(3, &ranks);
        assert_eq!((topology.node, topology.local_rank, topology.sharers), (1, 1, 1));
        assert_eq!(topology.node_of, [0, 1, 0, 1]);
    }

    #[test]
    fn masks_of_other_lengths_are_compared_from_the_right() {
        assert!(masks_overlap("f0", "10"));
        assert!(!masks_overlap("f0", "f"));
        assert!(masks_overlap("00000001", "1"));
        assert!(masks_overlap("", "1"));
    }

    #[test]
    fn told_survives_the_wire() {
        let here = Told::here(3);
        assert_eq!(Told::decode(5, &here.encode()), here);
    }
}
