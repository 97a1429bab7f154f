//! The status board: what every rank does at the moment, for the others to read without MPI.
//!
//! Each rank writes its step, its phase and the collectives that it enters and leaves into a record in memory that the
//! ranks of its node share; that takes nanoseconds and waits for nobody. The lowest two ranks of each node answer the
//! readers of other nodes by TCP (two, because the one that is stuck may be one of them). So a rank that waits in vain
//! can say for whom, and what that one does, when MPI can no longer be asked.
//!
//! Nothing here is needed to go on: where shared memory or TCP is not to be had, the board knows less.

mod ask;
mod interfaces;
mod memory;
mod process;
mod record;
mod service;
mod status;
#[cfg(test)]
mod tests;
mod wire;

pub use interfaces::host_addresses;
pub use process::Process;
pub use status::{Phase, Progress, RankState, RankStatus, describe_late};

use crate::{Call, CommError, Communicator, Topology};
use ask::{Node, ask, ask_all};
use interfaces::{Interface, in_order, reachable};
use memory::Table;
use process::Identity;
use record::{Reading, Record};
use service::{Answers, Service};
use std::ffi::OsStr;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use wire::Token;

/// How long to read other nodes at a missed deadline, and at the start.
const READING: Duration = Duration::from_secs(1);

/// Ranks of a node that answer other nodes.
const SERVERS: usize = 2;

/// Which ranks share memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Grouping {
    /// Those of a node.
    #[default]
    ByNode,
    /// None: each is read through TCP, as if it were alone on a host. To test that way on one host.
    Apart,
}

/// This rank's place on the board, and its view of the others'.
pub struct Board {
    rank: usize,
    hosts: Vec<String>,
    /// This rank's node and its place there.
    node: usize,
    slot: usize,
    /// The ranks of each node, ascending.
    members: Vec<Vec<usize>>,
    table: Arc<Table>,
    here: Identity,
    token: Token,
    /// Where other nodes answer, by node.
    servers: Vec<Vec<Vec<SocketAddr>>>,
    /// Answers until the board goes.
    _service: Option<Service>,
    own_addresses: Vec<SocketAddr>,
}

impl Board {
    /// Makes the board and gives it to the communicator, which tells it of collectives from here on: a collective.
    /// In the phase [`Phase::Starting`] at first.
    ///
    /// # Errors
    /// Those of the communication. Where the memory or the network of a host does not allow it, the board knows less,
    /// and a warning is logged.
    pub fn start(comm: &dyn Communicator) -> Result<Arc<Self>, CommError> {
        Self::start_with(comm, Grouping::default())
    }

    /// As [`Board::start`], with a choice of which ranks share memory; the same on all ranks.
    ///
    /// # Errors
    /// See [`Board::start`].
    pub fn start_with(comm: &dyn Communicator, grouping: Grouping) -> Result<Arc<Self>, CommError> {
        let topology = comm.topology();
        let rank = topology.rank;
        let members = members(topology, grouping);
        let node = members.iter().position(|ranks| ranks.contains(&rank)).expect("every rank is on a node");
        let slot = members[node].iter().position(|&other| other == rank).expect("this rank is on its node");
        let here = Identity::here();

        // What rank 0 says of the token counts, and what each node's first rank says of the memory.
        let ranks = members[node].len();
        let created = (slot == 0 && ranks > 1).then(|| Table::create(ranks));
        let (mut table, mut name) = (None, None);
        match created {
            Some(Ok((made, file))) => (table, name) = (Some(made), Some(file)),
            Some(Err(error)) => {
                tracing::warn!("the status board has no memory shared on {}: {error}", comm.host())
            }
            None => {}
        }
        let token = [random().to_le_bytes(), random().to_le_bytes()].concat();
        let path = name.as_ref().map_or(Path::new(""), |name| name.path());
        let told = comm.all_gather_bytes(&[&token, path.as_os_str().as_bytes()].concat())?;
        let token: Token = told[0].first_chunk().copied().unwrap_or_default();
        let path = told[members[node][0]].get(size_of::<Token>()..).unwrap_or_default();
        if slot > 0 && !path.is_empty() {
            match Table::open(Path::new(OsStr::from_bytes(path)), ranks) {
                Ok(opened) => table = Some(opened),
                Err(error) => tracing::warn!(
                    "the status board of rank {rank} on {} is not shared with its host's: {error}",
                    comm.host()
                ),
            }
        }
        let table = Arc::new(table.unwrap_or_else(|| Table::own(ranks)));
        table.records()[slot].claim(here);

        let interfaces = Interface::all();
        let (mut service, mut own_addresses) = (None, Vec::new());
        if members.len() > 1 && slot < SERVERS {
            let (listen, addresses) = reachable(&interfaces);
            let answers = Answers { table: Arc::clone(&table), token, node, here };
            match Service::start(listen, answers) {
                Ok(started) => {
                    own_addresses = addresses.iter().map(|&ip| SocketAddr::new(ip, started.port())).collect();
                    service = Some(started);
                }
                Err(error) => {
                    tracing::warn!(
                        "the status board of {} cannot be read from other hosts: {error}",
                        comm.host()
                    );
                }
            }
        }
        let text: Vec<String> = own_addresses.iter().map(ToString::to_string).collect();
        let told = comm.all_gather_bytes(text.join(" ").as_bytes())?;
        // All ranks of the node have mapped the memory by now.
        drop(name);
        let servers = members
            .iter()
            .map(|ranks| ranks.iter().map(|&rank| addresses(&told[rank], &interfaces)).collect::<Vec<_>>())
            .map(|servers| servers.into_iter().filter(|addresses| !addresses.is_empty()).collect())
            .collect();
        let hosts = topology.hosts.clone();
        let board = Arc::new(Self {
            rank,
            hosts,
            node,
            slot,
            members,
            table,
            here,
            token,
            servers,
            _service: service,
            own_addresses,
        });
        board.try_neighbour();
        comm.set_board(Arc::clone(&board));
        Ok(board)
    }

    /// Says at the start, and not when it is needed, that another host's board cannot be read. One host asks one
    /// other, so that the start takes no longer with more of them.
    fn try_neighbour(&self) {
        let next = (self.node + 1) % self.members.len();
        if self.slot > 0 || next == self.node {
            return;
        }
        if ask(&self.node(next), &self.token, Instant::now() + READING).is_none() {
            let (here, there) = (&self.hosts[self.rank], &self.hosts[self.members[next][0]]);
            tracing::warn!(
                "the status board of {there} cannot be read from {here} (a firewall?): a missed deadline will not \
                 say what its ranks do"
            );
        }
    }

    fn node(&self, number: usize) -> Node {
        Node { number, ranks: self.members[number].len(), servers: self.servers[number].clone() }
    }

    fn record(&self) -> &Record {
        &self.table.records()[self.slot]
    }

    /// What this rank does from now on. Like all that publishes, this costs less than a microsecond, never waits, and
    /// may be called from any thread.
    pub fn publish_phase(&self, phase: Phase) {
        self.record().set_phase(phase);
    }

    /// The training step that begins now.
    pub fn publish_step(&self, step: u64) {
        self.record().set_step(step);
    }

    /// How long the last step took, without waiting for other ranks, so that ranks can be compared.
    pub fn publish_step_time(&self, time: Duration) {
        self.record().set_step_time(time);
    }

    /// A collective begins. The communicator says so by itself.
    pub fn entered(&self, call: Call) {
        self.record().enter(call);
    }

    /// The collective is over. The communicator says so by itself.
    pub fn left(&self) {
        self.record().leave();
    }

    /// Collectives that this rank has begun since the board's start.
    pub fn collectives(&self) -> u64 {
        self.record().entered()
    }

    /// Where this rank answers readers of other nodes; empty if it does not.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.own_addresses
    }

    /// What is known of every rank, by rank. Takes microseconds for this node, and up to `timeout` for the others;
    /// nodes that have not answered by then are [`RankState::NoAnswer`].
    pub fn snapshot(&self, timeout: Duration) -> Vec<RankStatus> {
        // A time far enough off for all, and one that the clock has.
        let until = Instant::now() + timeout.min(Duration::from_secs(3600));
        let others: Vec<Node> =
            (0..self.members.len()).filter(|&node| node != self.node).map(|node| self.node(node)).collect();
        let numbers: Vec<usize> = others.iter().map(|node| node.number).collect();
        let mut found: Vec<Option<RankStatus>> = vec![None; self.hosts.len()];
        let mut note = |node: usize, answer: Option<(u64, Vec<Reading>)>| {
            for (slot, &rank) in self.members[node].iter().enumerate() {
                let state = match &answer {
                    None => RankState::NoAnswer,
                    Some((now, readings)) => {
                        readings[slot].progress(*now).map_or(RankState::NotShared, RankState::Known)
                    }
                };
                found[rank] = Some(RankStatus { rank, host: self.hosts[rank].clone(), state });
            }
        };
        for (node, answer) in numbers.into_iter().zip(ask_all(others, self.token, until)) {
            note(node, answer);
        }
        let readings = self.table.records().iter().map(|record| record.read(self.here)).collect();
        note(self.node, Some((record::now(), readings)));
        found.into_iter().flatten().collect()
    }

    /// Which ranks this one waits for, for the message of a missed deadline: see [`describe_late`]. Takes up to a
    /// second.
    pub fn late(&self, waited_for: &[usize]) -> String {
        let mut snapshot = self.snapshot(READING);
        snapshot.retain(|status| status.rank != self.rank);
        describe_late(&snapshot, self.collectives(), waited_for)
    }
}

impl Drop for Board {
    fn drop(&mut self) {
        self.publish_phase(Phase::Ended);
    }
}

/// The ranks of each node.
fn members(topology: &Topology, grouping: Grouping) -> Vec<Vec<usize>> {
    match grouping {
        Grouping::Apart => (0..topology.size).map(|rank| vec![rank]).collect(),
        Grouping::ByNode => {
            let on = |node| (0..topology.size).filter(|&rank| topology.node_of[rank] == node).collect();
            (0..topology.nodes).map(on).collect()
        }
    }
}

/// What a rank told of its addresses, in the order to try them from here.
fn addresses(told: &[u8], here: &[Interface]) -> Vec<SocketAddr> {
    let text = String::from_utf8_lossy(told);
    in_order(text.split_whitespace().filter_map(|address| address.parse().ok()).collect(), here)
}

/// A number that nobody can guess: the standard library takes the keys of its hash tables from the system.
fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}
