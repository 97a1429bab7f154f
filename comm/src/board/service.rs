//! Answers the readers of other nodes, on a thread of its own.
//!
//! One thread and no blocking call but `poll`, so that a slow or silent connection costs the others nothing. Who does
//! not know the job's token gets no answer.

use super::memory::Table;
use super::process::Identity;
use super::record;
use super::wire::{MAGIC, QUESTION, Token, answer, question};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Connections at a time; one more pushes out the oldest.
const MOST: usize = 64;

/// How long one may take from beginning to end.
const LIFE: Duration = Duration::from_secs(2);

/// Runs until it is dropped.
pub(super) struct Service {
    address: SocketAddr,
    /// Its end is what the thread waits for.
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

/// What is answered.
pub(super) struct Answers {
    pub(super) table: Arc<Table>,
    pub(super) token: Token,
    pub(super) node: usize,
    /// The process that answers.
    pub(super) here: Identity,
}

impl Service {
    /// Listens at any free port of `listen`.
    pub(super) fn start(listen: IpAddr, answers: Answers) -> io::Result<Self> {
        let listener = TcpListener::bind((listen, 0))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let (stop, stopped) = UnixStream::pair()?;
        let thread = std::thread::Builder::new()
            .name("board".to_owned())
            .stack_size(256 << 10)
            .spawn(move || serve(&listener, &stopped, &answers))?;
        Ok(Self { address, stop: Some(stop), thread: Some(thread) })
    }

    pub(super) fn port(&self) -> u16 {
        self.address.port()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        drop(self.stop.take());
        // A panic of the thread has been reported by the hook.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

struct Connection {
    stream: TcpStream,
    since: Instant,
    question: [u8; QUESTION],
    asked: usize,
    /// Empty while the question comes in.
    answer: Vec<u8>,
    answered: usize,
}

fn serve(listener: &TcpListener, stopped: &UnixStream, answers: &Answers) {
    let expected = question(&answers.token, answers.node);
    let mut connections: Vec<Connection> = Vec::new();
    loop {
        let mut waited: Vec<PollFd> =
            vec![PollFd::new(stopped, PollFlags::IN), PollFd::new(listener, PollFlags::IN)];
        waited.extend(connections.iter().map(|connection| {
            let what = if connection.answer.is_empty() { PollFlags::IN } else { PollFlags::OUT };
            PollFd::new(&connection.stream, what)
        }));
        let longest = connections.first().map(|oldest| LIFE.saturating_sub(oldest.since.elapsed()));
        let longest = longest.map(|time| Timespec {
            tv_sec: time.as_secs() as i64,
            // Rounded up to a millisecond more, so as not to come back too early again and again.
            tv_nsec: (i64::from(time.subsec_nanos()) + 1_000_000).min(999_999_999),
        });
        match poll(&mut waited, longest.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            // Out of memory, at most; it may pass.
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
        if !waited[0].revents().is_empty() {
            return;
        }
        let knocked = !waited[1].revents().is_empty();
        drop(waited);
        connections.retain_mut(|connection| {
            connection.since.elapsed() < LIFE && connection.advance(&expected, answers).unwrap_or(false)
        });
        if knocked {
            accept(listener, &mut connections);
        }
    }
}

/// Takes in who waits outside, up to so many.
fn accept(listener: &TcpListener, connections: &mut Vec<Connection>) {
    for _ in 0..MOST {
        match listener.accept() {
            Ok((stream, _)) => {
                if stream.set_nonblocking(true).is_err() {
                    continue;
                }
                if connections.len() == MOST {
                    connections.remove(0);
                }
                connections.push(Connection {
                    stream,
                    since: Instant::now(),
                    question: [0; QUESTION],
                    asked: 0,
                    answer: Vec::new(),
                    answered: 0,
                });
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => {}
            Err(_) => {
                // Out of descriptors, perhaps: it knocks again at once, and there is nothing to do but wait.
                std::thread::sleep(Duration::from_millis(50));
                return;
            }
        }
    }
}

impl Connection {
    /// Goes on as far as it can without waiting; whether more is to come.
    fn advance(&mut self, expected: &[u8; QUESTION], answers: &Answers) -> io::Result<bool> {
        let would_block =
            |error: &io::Error| matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted);
        if self.answer.is_empty() {
            match self.stream.read(&mut self.question[self.asked..]) {
                Ok(0) => return Ok(false),
                Ok(read) => self.asked += read,
                Err(error) if would_block(&error) => return Ok(true),
                Err(error) => return Err(error),
            }
            // Who speaks another language can go at once. The token is compared as a whole, so that nobody finds it
            // out byte by byte.
            let compared = if self.asked == QUESTION { QUESTION } else { self.asked.min(MAGIC.len()) };
            if self.question[..compared] != expected[..compared] {
                return Ok(false);
            }
            if self.asked < QUESTION {
                return Ok(true);
            }
            let readings: Vec<_> =
                answers.table.records().iter().map(|record| record.read(answers.here)).collect();
            self.answer = answer(answers.node, record::now(), &readings);
        }
        match self.stream.write(&self.answer[self.answered..]) {
            Ok(written) => self.answered += written,
            Err(error) if would_block(&error) => {}
            Err(error) => return Err(error),
        }
        Ok(self.answered < self.answer.len())
    }
}

#[cfg(test)]
mod tests {
    use super::super::ask::{Node, ask};
    use super::*;

    fn service() -> (Service, Node, Token) {
        let here = Identity::here();
        let token = *b"0123456789abcdef";
        let table = Arc::new(Table::own(2));
        table.records()[1].claim(here);
        let answers = Answers { table, token, node: 3, here };
        let service = Service::start("127.0.0.1".parse().expect("an address"), answers).expect("loopback");
        let address = service.address;
        (service, Node { number: 3, ranks: 2, servers: vec![vec![address]] }, token)
    }

    fn in_a_second() -> Instant {
        Instant::now() + Duration::from_secs(1)
    }

    #[test]
    fn strangers_get_nothing_and_disturb_nobody() {
        let (service, node, token) = service();
        let address = service.address;
        let mut held = Vec::new();
        for garbage in
            [&[][..], b"GET / HTTP/1.1\r\n\r\n", &[255; 5000], &question(&[0; 16], 3), &question(&token, 2)]
        {
            let mut stream = TcpStream::connect(address).expect("it listens");
            stream.set_read_timeout(Some(LIFE + Duration::from_secs(2))).expect("a time limit");
            // It may have hung up by now.
            let _ = stream.write_all(garbage);
            held.push(stream);
            let (_, readings) = ask(&node, &token, in_a_second()).expect("an answer to who may ask");
            assert_eq!(readings.len(), 2);
        }
        for mut stream in held {
            let mut heard = Vec::new();
            // Hung up, in order or not, within the time that a connection has.
            let ended = stream.read_to_end(&mut heard);
            let reset = ended.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionReset);
            assert!((ended.is_ok() || reset) && heard.is_empty(), "{ended:?} {heard:?}");
        }
        assert!(ask(&node, &[0; 16], in_a_second()).is_none());
        assert!(ask(&Node { number: 2, ..node }, &token, in_a_second()).is_none());
    }

    #[test]
    fn a_server_that_is_stuck_is_passed_over() {
        let (_service, mut node, token) = service();
        let stuck = TcpListener::bind("127.0.0.1:0").expect("loopback");
        node.servers.insert(0, vec![stuck.local_addr().expect("an address")]);
        assert!(ask(&node, &token, in_a_second()).is_some());
    }

    #[test]
    fn slow_ones_are_not_waited_for() {
        let (service, node, token) = service();
        let slow: Vec<_> = (0..3 * MOST)
            .map(|_| {
                let mut stream = TcpStream::connect(service.address).expect("it listens");
                let _ = stream.write_all(&question(&token, 3)[..QUESTION - 1]);
                stream
            })
            .collect();
        for _ in 0..20 {
            let (now, readings) = ask(&node, &token, in_a_second()).expect("an answer");
            assert!(readings[0].progress(now).is_none());
            assert!(readings[1].progress(now).is_some());
        }
        drop(slow);
        let started = Instant::now();
        drop(service);
        assert!(started.elapsed() < Duration::from_secs(1), "it ends when it is told to");
        assert!(ask(&node, &token, in_a_second()).is_none());
    }
}
