//! Reads the records of other nodes: all nodes at the same time, none for longer than asked.

use super::record::Reading;
use super::wire::{Token, answer_length, question, read_answer};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

/// Where a node's records can be had.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) number: usize,
    pub(super) ranks: usize,
    /// The addresses of each rank that answers, in the order in which to try them.
    pub(super) servers: Vec<Vec<SocketAddr>>,
}

/// Nodes asked at the same time.
const TOGETHER: usize = 64;

/// What each node said, and its time; None where it did not answer.
pub(super) fn ask_all(nodes: Vec<Node>, token: Token, until: Instant) -> Vec<Option<(u64, Vec<Reading>)>> {
    let mut answers = vec![None; nodes.len()];
    if nodes.is_empty() {
        return answers;
    }
    let (told, heard) = channel();
    let work = Arc::new((nodes, AtomicUsize::new(0)));
    for _ in 0..work.0.len().min(TOGETHER) {
        let (work, told) = (Arc::clone(&work), told.clone());
        let ask_each = move || {
            let (nodes, next) = &*work;
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(node) = nodes.get(index) else { return };
                // Nobody listens any more if it took too long.
                if told.send((index, ask(node, &token, until))).is_err() {
                    return;
                }
            }
        };
        // Not waited for: it has the same time limit, but a connection may come back from the system late.
        let thread = std::thread::Builder::new().name("board-reader".to_owned()).stack_size(128 << 10);
        if thread.spawn(ask_each).is_err() {
            // Those that did start do the work of all.
            break;
        }
    }
    drop(told);
    for _ in 0..answers.len() {
        let Ok((index, answer)) = heard.recv_timeout(until.saturating_duration_since(Instant::now())) else {
            break;
        };
        answers[index] = answer;
    }
    answers
}

/// One node's answer: of the first of its servers that gives one.
pub(super) fn ask(node: &Node, token: &Token, until: Instant) -> Option<(u64, Vec<Reading>)> {
    for (index, addresses) in node.servers.iter().enumerate() {
        let until = share(until, node.servers.len() - index)?;
        for (index, address) in addresses.iter().enumerate() {
            let until = share(until, addresses.len() - index)?;
            match ask_at(*address, node, token, until) {
                Ok(answer) => return Some(answer),
                Err(error) => tracing::debug!("no answer from node {} at {address}: {error}", node.number),
            }
        }
    }
    None
}

/// The end of an equal part of what is left until `until`; None if nothing is.
fn share(until: Instant, parts: usize) -> Option<Instant> {
    let now = Instant::now();
    let left = until.checked_duration_since(now).filter(|left| *left >= Duration::from_micros(1))?;
    Some(now + left / parts as u32)
}

fn ask_at(
    address: SocketAddr,
    node: &Node,
    token: &Token,
    until: Instant,
) -> io::Result<(u64, Vec<Reading>)> {
    let left = || match until.checked_duration_since(Instant::now()) {
        // A limit of zero would be none.
        Some(left) if left >= Duration::from_micros(1) => Ok(left),
        _ => Err(io::Error::from(ErrorKind::TimedOut)),
    };
    let mut stream = TcpStream::connect_timeout(&address, left()?)?;
    stream.set_write_timeout(Some(left()?))?;
    stream.write_all(&question(token, node.number))?;
    let mut bytes = vec![0; answer_length(node.ranks)];
    let mut read = 0;
    while read < bytes.len() {
        stream.set_read_timeout(Some(left()?))?;
        match stream.read(&mut bytes[read..]) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(more) => read += more,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    read_answer(&bytes, node.number, node.ranks)
        .ok_or_else(|| io::Error::other("it is not the node that was asked"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn nobody_is_waited_for_longer_than_asked() {
        // Listens and says nothing, sends without end one byte at a time, and does not exist.
        let silent = TcpListener::bind("127.0.0.1:0").expect("loopback");
        let dripping = TcpListener::bind("127.0.0.1:0").expect("loopback");
        let gone = TcpListener::bind("127.0.0.1:0").expect("loopback").local_addr().expect("an address");
        let addresses = [silent.local_addr(), dripping.local_addr()].map(|a| a.expect("an address"));
        let drip = std::thread::spawn(move || {
            let (mut stream, _) = dripping.accept().expect("it is asked");
            while stream.write_all(b"r").is_ok() {
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        let node = |servers| Node { number: 0, ranks: 100, servers };
        let nodes = vec![
            node(vec![vec![addresses[0]]]),
            node(vec![vec![addresses[1]]]),
            node(vec![vec![gone], vec![gone]]),
            node(vec![]),
        ];
        let started = Instant::now();
        let answers = ask_all(nodes, [0; 16], started + Duration::from_millis(300));
        let took = started.elapsed();
        assert!(answers.iter().all(Option::is_none));
        assert!(took >= Duration::from_millis(290) && took < Duration::from_secs(2), "{took:?}");
        drip.join().expect("hung up on");
    }
}
