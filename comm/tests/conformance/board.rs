//! The status board in real jobs: by shared memory, and by TCP with ranks that take each other for other hosts.

use crate::job::{Job, mpirun, mpirun_stubborn};
use libtest_mimic::{Failed, Trial};
use repa_comm::board::{Board, Grouping, Phase, Process, Progress};
use repa_comm::{Communicator, abort, all_gather};
use rustix::process::{Signal, getpid, kill_process};
use std::fs;
use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

const GROUPINGS: [&str; 2] = ["by_node", "apart"];

fn with(grouping: &str, mut job: Job) -> Job {
    job.variables(&[("REPA_COMM_TEST_BOARD", grouping)]);
    job
}

/// Names whose ranks are gone: files of running jobs go away while one waits.
fn nothing_is_left() -> Result<(), Failed> {
    let since = Instant::now();
    let names = || -> Vec<_> {
        let entries = fs::read_dir("/dev/shm").into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.filter(|name| name.starts_with("repa-board-")).collect()
    };
    let mut left = names();
    while !left.is_empty() {
        if since.elapsed() > Duration::from_secs(10) {
            return Err(format!("left in /dev/shm: {left:?}").into());
        }
        std::thread::sleep(Duration::from_millis(20));
        let now = names();
        left.retain(|name| now.contains(name));
    }
    Ok(())
}

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for grouping in GROUPINGS {
        for ranks in 1..=3 {
            trials
                .push(Trial::test(format!("board::shows_all_ranks::{grouping}::{ranks}_ranks"), move || {
                    with(grouping, mpirun(ranks, "board", "shared")).expect_success(ranks)
                }));
        }
        trials.push(Trial::test(format!("board::late_rank_is_described::{grouping}"), move || {
            with(grouping, mpirun(3, "board-late", "shared"))
                .expect_failure(4, "all-reduce in step 120 on rank 0 of 3 gave up after 1.")?
                .expect("waiting for rank 2 (rank 2 on ")?
                .expect(": step 120, computing for ")?
                .expect_no("ranks 1, 2")?;
            nothing_is_left()
        }));
        let stopped = match grouping {
            "apart" => ": host does not answer)",
            _ => ": its process is stopped; step 120, computing for ",
        };
        trials.push(Trial::test(format!("board::stopped_rank_is_described::{grouping}"), move || {
            with(grouping, mpirun(3, "board-stopped", "shared"))
                .expect_failure(4, "waiting for rank 2 (rank 2 on ")?
                .expect(stopped)?;
            nothing_is_left()
        }));
    }
    trials.extend([
        Trial::test("board::killed_rank_is_described", || {
            // mpirun's own message and code for a killed rank stand beside ours.
            mpirun_stubborn(3, "board-killed", "shared")
                .expect_end("waiting for rank 2 (rank 2 on ")?
                .expect(": its process has ended; step 120, computing for ")?;
            nothing_is_left()
        }),
        Trial::test("board::strangers_at_the_port_disturb_nobody", || {
            with("apart", mpirun(3, "board-strangers", "messages")).expect_success(3)
        }),
        Trial::test("board::background_collectives_count", || {
            mpirun(2, "board-late-bucket", "shared")
                .expect_failure(4, "reduce-scatter of bucket 1 in step 120 on rank 0 of 2 gave up after 1.")?
                .expect("waiting for rank 1 (rank 1 on ")?
                .expect(": step 119, waiting for data for ")
                .map(drop)
        }),
    ]);
    trials
}

/// Plays the role.
pub fn run(role: &str, comm: &dyn Communicator) {
    let apart = std::env::var("REPA_COMM_TEST_BOARD").as_deref() == Ok("apart");
    let grouping = if apart { Grouping::Apart } else { Grouping::ByNode };
    let board = Board::start_with(comm, grouping).expect("all ranks are there");
    match role {
        "board" => shows_all_ranks(comm, &board, apart),
        "board-strangers" => strangers(comm, &board),
        "board-late" => waits_for_last(comm, &board, || std::thread::sleep(Duration::from_secs(30))),
        "board-stopped" => waits_for_last(comm, &board, || signal_self(Signal::STOP)),
        "board-killed" => waits_for_last(comm, &board, || signal_self(Signal::KILL)),
        "board-late-bucket" => late_bucket(comm, &board),
        other => panic!("no role {other}"),
    }
}

fn signal_self(signal: Signal) {
    kill_process(getpid(), signal).expect("one may signal oneself");
    // The signal may take effect a little later.
    std::thread::sleep(Duration::from_secs(30));
}

/// All of them, which have to be known.
fn progress(board: &Board) -> Vec<Progress> {
    let known = |status: repa_comm::board::RankStatus| {
        status.progress().cloned().unwrap_or_else(|| panic!("{status} in time"))
    };
    board.snapshot(Duration::from_secs(20)).into_iter().map(known).collect()
}

fn shows_all_ranks(comm: &dyn Communicator, board: &Arc<Board>, apart: bool) {
    let (rank, size) = (comm.rank(), comm.size());
    let answers = size > 1 && (apart || comm.topology().nodes > 1 && comm.local_rank() < 2);
    assert_eq!(!board.addresses().is_empty(), answers, "{:?}", board.addresses());
    board.publish_step(100 + rank as u64);
    board.publish_phase(Phase::Saving);
    board.publish_step_time(Duration::from_millis(10 * rank as u64 + 10));
    let pids = all_gather(comm, &[std::process::id()]).expect("all ranks are there");
    comm.barrier().expect("all ranks are there");
    // Its name went when all had mapped it.
    let left = fs::read_dir("/dev/shm").expect("this host has it").flatten().any(|entry| {
        let name = entry.file_name();
        pids.iter().any(|pid| name.to_string_lossy().starts_with(&format!("repa-board-{}-", pid[0])))
    });
    assert!(!left, "a file is left in /dev/shm");
    let before = progress(board);
    for (other, seen) in before.iter().enumerate() {
        assert_eq!((seen.pid, seen.process, seen.phase), (pids[other][0], Process::Running, Phase::Saving));
        assert_eq!(seen.step, Some(100 + other as u64));
        assert_eq!(seen.step_time, Some(Duration::from_millis(10 * other as u64 + 10)));
        assert!(seen.unchanged < Duration::from_secs(30), "{seen:?}");
        // The gathering and the barrier; others may be in the next one by now.
        let (entered, left) = if size > 1 { (2, 2) } else { (seen.entered, seen.left) };
        assert!(seen.entered >= entered && seen.left <= seen.entered, "{seen:?}");
        assert!(other != rank || (seen.entered, seen.left) == (entered, left), "{seen:?}");
    }
    comm.barrier().expect("all ranks are there");
    assert!(size == 1 || board.collectives() == 3, "{} collectives", board.collectives());
}

/// The last rank does something else, and never comes; rank 0 ends the job with what it knows of that.
fn waits_for_last(comm: &dyn Communicator, board: &Board, absent: impl FnOnce()) {
    comm.set_step(120);
    board.publish_step(120);
    board.publish_phase(Phase::Computing);
    comm.barrier().expect("all ranks are there");
    comm.set_deadline(Some(Duration::from_millis(1000)));
    if comm.rank() + 1 == comm.size() {
        return absent();
    }
    if std::env::var("REPA_COMM_TEST").as_deref() == Ok("board-killed") {
        // Before mpirun's second is over.
        comm.set_deadline(Some(Duration::from_millis(300)));
    }
    board.publish_phase(Phase::Communicating);
    let error = comm.all_reduce_f32(&mut [0.0; 1000]).expect_err("one rank never comes");
    if comm.rank() == 0 {
        abort(4, &error.to_string());
    }
    std::thread::sleep(Duration::from_secs(30));
}

/// Rank 1 hands in fewer buckets than rank 0.
fn late_bucket(comm: &dyn Communicator, board: &Board) {
    use repa_comm::{Background, Phases, Wire};
    comm.set_deadline(Some(Duration::from_millis(1500)));
    comm.set_step(120 - comm.rank() as u64);
    board.publish_step(120 - comm.rank() as u64);
    board.publish_phase(Phase::WaitingForData);
    let start = |bucket| {
        comm.start_f32(vec![1.0; 10_000], Background { phases: Phases::Reduce, wire: Wire::F32, bucket })
    };
    start(0).wait().expect("all ranks are there");
    if comm.rank() == 0 {
        abort(4, &start(1).wait().expect_err("rank 1 never comes").to_string());
    }
    std::thread::sleep(Duration::from_secs(30));
}

/// Rank 1 throws at rank 0's port what it can think of, while the others read the board.
fn strangers(comm: &dyn Communicator, board: &Board) {
    let own: Vec<String> = board.addresses().iter().map(ToString::to_string).collect();
    let told = comm.all_gather_bytes(own.join(" ").as_bytes()).expect("all ranks are there");
    let target: SocketAddr = String::from_utf8_lossy(&told[0])
        .split_whitespace()
        .next()
        .and_then(|address| address.parse().ok())
        .expect("rank 0 listens");
    let until = Instant::now() + Duration::from_secs(2);
    if comm.rank() == 1 {
        let mut held = Vec::new();
        let noise: Vec<u8> = (0..100_000u32).map(|i| (i * 31 % 251) as u8).collect();
        while Instant::now() < until {
            for garbage in [&[][..], b"GET / HTTP/1.1\r\n\r\n", b"repaBRD1", &noise] {
                if let Ok(mut stream) = TcpStream::connect_timeout(&target, Duration::from_secs(1)) {
                    // Hung up on in the middle, mostly.
                    let _ = stream.write_all(garbage);
                    held.push(stream);
                }
            }
            // Most are left open, and silent.
            if held.len() > 500 {
                held.drain(..400);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    } else {
        while Instant::now() < until {
            assert_eq!(progress(board).len(), 3);
        }
    }
    comm.barrier().expect("all ranks are there");
}
