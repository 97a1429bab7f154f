//! Metrics that ranks push, to a server that keeps what it gets, to none, and to a real Pushgateway where Debian's
//! package prometheus-pushgateway is installed (its test is skipped otherwise, and says so). Some 5 s on two cores.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use repa_tests::prometheus::get;
use repa_tests::{Ended, Running, mpirun, small_model, small_store};

const DEADLINE: Duration = Duration::from_secs(120);

/// Trains 12 steps on two ranks, without endpoints.
fn train(folder: &Path, url: &str) -> Ended {
    let (store, run) = (folder.join("store"), folder.join("runs/pushed"));
    small_store(&store, 23);
    let mut arguments = small_model(&store, &run);
    arguments.extend(["telemetry.metrics=false", "telemetry.push_seconds=0.2"].map(str::to_owned));
    arguments.push(format!("telemetry.push_url={url}"));
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    Running::start(&mut mpirun(2, &arguments)).wait(DEADLINE)
}

/// Bodies of PUT requests, by path.
type Kept = Arc<Mutex<BTreeMap<String, Vec<String>>>>;

/// A server that keeps what it is sent, as long as the process lives.
fn keeper() -> (SocketAddr, Kept) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let address = listener.local_addr().expect("an address");
    let kept = Kept::default();
    let keeping = kept.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let kept = keeping.clone();
            std::thread::spawn(move || {
                let mut reader = BufReader::new(stream);
                loop {
                    let (mut first, mut length) = (String::new(), 0);
                    if reader.read_line(&mut first).unwrap_or(0) == 0 {
                        return;
                    }
                    loop {
                        let mut line = String::new();
                        reader.read_line(&mut line).expect("a header");
                        let line = line.trim().to_ascii_lowercase();
                        if line.is_empty() {
                            break;
                        }
                        if let Some(number) = line.strip_prefix("content-length: ") {
                            length = number.parse().expect("a number");
                        }
                    }
                    let mut body = vec![0; length];
                    reader.read_exact(&mut body).expect("a body");
                    let path =
                        first.strip_prefix("PUT ").and_then(|rest| rest.split(' ').next()).unwrap_or(&first);
                    let body = String::from_utf8(body).expect("text");
                    kept.lock().expect("no panic").entry(path.to_owned()).or_default().push(body);
                    reader
                        .get_mut()
                        .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                        .expect("sent");
                }
            });
        }
    });
    (address, kept)
}

#[test]
fn every_rank_pushes_and_the_last_push_has_the_last_step() {
    let folder = tempfile::tempdir().expect("a folder");
    let (address, kept) = keeper();
    let said = train(folder.path(), &format!("http://{address}/prefix/")).expect_code(0);
    assert!(!said.stderr.contains("cannot be pushed"), "{}", said.stderr);
    assert!(!said.stderr.contains("metrics: http"), "{}", said.stderr);
    let kept = kept.lock().expect("no panic");
    assert_eq!(kept.len(), 2, "{:?}", kept.keys());
    for (rank, (path, bodies)) in kept.iter().enumerate() {
        assert!(path.starts_with("/prefix/metrics/job/repa-dist/instance/"), "{path}");
        assert!(path.ends_with(&format!(":pushed/rank/{rank}")), "{path}");
        let last = bodies.last().expect("a push");
        assert!(last.contains(&format!("repa_step{{rank=\"{rank}\"}} 12\n")), "{last}");
        assert!(last.contains("# HELP repa_loss "), "{last}");
    }
}

/// Nobody listens, or answers; training goes on, and says so once.
#[test]
fn failing_pushes_change_nothing() {
    for answers in [false, true] {
        let folder = tempfile::tempdir().expect("a folder");
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        let address = listener.local_addr().expect("an address");
        let listener = answers.then_some(listener);
        let begun = Instant::now();
        let said = train(folder.path(), &format!("http://{address}")).expect_code(0);
        assert_eq!(
            said.stderr.matches("metrics cannot be pushed to 127.0.0.1").count(),
            1,
            "{}",
            said.stderr
        );
        assert!(begun.elapsed() < Duration::from_secs(60), "it took {:?}", begun.elapsed());
        drop(listener);
    }
}

#[test]
fn a_pushgateway_takes_what_ranks_push() {
    const PROGRAM: &str = "prometheus-pushgateway";
    let there = Command::new(PROGRAM).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if there.is_err() {
        return println!("skipped: {PROGRAM} not found: install Debian's package {PROGRAM}");
    }
    let folder = tempfile::tempdir().expect("a folder");
    let free = TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| listener.local_addr());
    let address = free.expect("a free port");
    let mut gateway = Running::start(Command::new(PROGRAM).arg(format!("--web.listen-address={address}")));
    let begun = Instant::now();
    while get(address, "/-/ready", Duration::from_secs(1)).is_err() {
        assert!(!gateway.has_ended() && begun.elapsed() < DEADLINE, "the gateway is not ready");
        std::thread::sleep(Duration::from_millis(50));
    }
    let said = train(folder.path(), &format!("http://{address}")).expect_code(0);
    assert!(!said.stderr.contains("cannot be pushed"), "{}", said.stderr);
    let page = get(address, "/metrics", Duration::from_secs(5)).expect("a page");
    for rank in 0..2 {
        let shown = page.lines().find(|line| {
            line.starts_with("repa_step{")
                && line.contains(&format!("rank=\"{rank}\""))
                && line.ends_with(" 12")
        });
        assert!(shown.is_some_and(|line| line.contains("job=\"repa-dist\"")), "{page}");
    }
}
