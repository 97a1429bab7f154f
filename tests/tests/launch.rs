//! `repa-dist launch` with real mpirun: what fails is started again and comes out with the same bits, what cannot be
//! mended is told once, and no process is left behind. Some 90 s on two cores.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use repa_tests::hosts::Hosts;
use repa_tests::{Ended, Running, binary, log, mpirun, repa_dist, small_model, small_store};

const DEADLINE: Duration = Duration::from_secs(120);

struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        small_store(&folder.path().join("store"), 23);
        Self { folder }
    }

    fn run(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn train(&self, run: &str, more: &[&str]) -> Vec<String> {
        let mut arguments = small_model(&self.folder.path().join("store"), &self.run(run));
        arguments.extend(more.iter().map(|&a| a.to_owned()));
        arguments
    }

    /// Launches a run.
    fn launch(&self, options: &[&str], run: &str, more: &[&str]) -> Running {
        let train = self.train(run, more);
        let train: Vec<&str> = train.iter().map(String::as_str).collect();
        Running::start(&mut repa_dist(&[&["launch"], options, &["--", "train"], &train].concat()))
    }

    /// Launches a run that is to fail: one message, and nothing left behind.
    #[track_caller]
    fn fails(&self, options: &[&str], run: &str, more: &[&str], code: i32, message: &[&str]) -> Ended {
        let started = Instant::now();
        let ended = self.launch(options, run, more).wait(DEADLINE).expect_code(code).expect_error(message);
        assert_eq!(errors(&ended), 1, "one cause, one message:\n{}", ended.stderr);
        assert!(!ended.stderr.contains("starting again"), "{}", ended.stderr);
        assert!(started.elapsed() < Duration::from_secs(20), "only after {:?}", started.elapsed());
        nothing_is_left(&self.run(run));
        ended
    }
}

fn errors(ended: &Ended) -> usize {
    ended.stderr.lines().filter(|line| line.starts_with("error: ")).count()
}

/// The records of a run's attempts.
fn attempts(run: &Path) -> Vec<serde_json::Value> {
    let mut paths: Vec<PathBuf> =
        fs::read_dir(run.join("attempts")).into_iter().flatten().flatten().map(|e| e.path()).collect();
    // A record that is being written has another name for a moment.
    paths.retain(|path| path.extension().is_some_and(|e| e == "json"));
    paths.sort();
    let read = |path: &PathBuf| serde_json::from_slice(&fs::read(path).expect("a record")).expect("JSON");
    paths.iter().map(read).collect()
}

/// What has the mark of a run's launches, by its arguments.
fn processes(run: &Path) -> Vec<String> {
    let records = attempts(run);
    let Some(command) = records.last().and_then(|record| record["command"].as_array()) else {
        return Vec::new();
    };
    let Some(at) = command.iter().position(|word| word == "repa_launch_job") else { return Vec::new() };
    let mark = command[at + 1].as_str().expect("a mark");
    let all = fs::read_dir("/proc").expect("processes").flatten().map(|entry| entry.path());
    let text = |path: &Path, file| {
        String::from_utf8_lossy(&fs::read(path.join(file)).unwrap_or_default()).replace('\0', " ")
    };
    all.filter(|path| path.join("environ").exists())
        .filter(|path| text(path, "environ").contains(mark) || text(path, "cmdline").contains(mark))
        .map(|path| format!("{} {}", path.display(), text(&path, "cmdline")))
        .collect()
}

#[track_caller]
fn nothing_is_left(run: &Path) {
    let left = processes(run);
    assert!(left.is_empty(), "left behind: {left:#?}");
}

#[track_caller]
fn until(what: &str, running: &mut Running, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < DEADLINE && !running.has_ended(), "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn last_step(run: &Path) -> u64 {
    log(run).last().map_or(0, |record| record.step)
}

fn newest(run: &Path) -> u64 {
    let entries = fs::read_dir(run.join("checkpoints")).into_iter().flatten().flatten();
    let step = |name: &str| name.strip_prefix("step-")?.parse().ok();
    entries.filter_map(|entry| step(entry.file_name().to_str()?)).max().unwrap_or(0)
}

fn children(process: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let text = tasks.map(|task| fs::read_to_string(task.path().join("children")).unwrap_or_default());
    text.collect::<String>().split_whitespace().filter_map(|word| word.parse().ok()).collect()
}

/// The mpirun of a launch, and the ranks that it started here.
fn mpirun_of(launch: &Running) -> (u32, Vec<u32>) {
    let named = |name: &'static str| {
        move |process: &u32| {
            fs::read_to_string(format!("/proc/{process}/comm")).is_ok_and(|comm| comm.trim() == name)
        }
    };
    let mpirun = children(launch.id()).into_iter().find(named("mpirun")).expect("an mpirun");
    (mpirun, children(mpirun).into_iter().filter(named("repa-dist")).collect())
}

fn send(signal: &str, process: u32) {
    let status = Command::new("kill").args(["-s", signal, &process.to_string()]).status().expect("kill runs");
    assert!(status.success(), "cannot send {signal}");
}

fn same_weights(a: &Path, b: &Path) {
    let arguments = ["checkpoint", "diff", a.to_str().expect("UTF-8"), b.to_str().expect("UTF-8")];
    let said = Running::start(&mut repa_dist(&arguments)).wait(DEADLINE).expect_code(0).stdout;
    assert!(said.contains("are the same to the bit, 0 differ"), "{said}");
}

/// The file of a run's log: each attempt begins another.
fn log_file(run: &Path) -> u64 {
    fs::metadata(run.join("metrics.jsonl")).expect("a log").ino()
}

/// Waits until an attempt after the one that wrote to the log file has made a step, beyond the checkpoint that it goes
/// on from.
#[track_caller]
fn until_it_trains_again(running: &mut Running, run: &Path, old: u64) {
    until("it trains again", running, || {
        let durable = |record: &serde_json::Value| record["durable_step"].as_u64();
        let from = attempts(run).iter().rev().find_map(durable);
        log_file(run) != old && from.is_some_and(|from| last_step(run) > from)
    });
}

/// A rank is killed, then mpirun, then a rank is stopped: each time the run goes on from the last checkpoint, and it
/// ends with the weights of one that nobody touched.
#[test]
fn a_run_survives_its_ranks_and_mpirun() {
    let place = Place::new();
    let settings = ["train.steps=2500", "checkpoint.every=50", "checkpoint.keep=2"];
    let arguments = place.train("whole", &[settings[0]]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    Running::start(&mut mpirun(2, &arguments)).wait(DEADLINE).expect_code(0);

    let run = place.run("run");
    let mut running = place.launch(&["--local", "2", "--hang-seconds", "3"], "run", &settings);
    let disasters = [("a rank killed", "KILL"), ("mpirun killed", "KILL"), ("a rank stopped", "STOP")];
    for (number, (name, signal)) in disasters.into_iter().enumerate() {
        let begun = newest(&run);
        until("it saves", &mut running, || newest(&run) > begun && attempts(&run).len() == number + 1);
        let (mpirun, ranks) = mpirun_of(&running);
        assert_eq!(ranks.len(), 2, "{name}");
        let (happened, file) = (Instant::now(), log_file(&run));
        send(signal, if name.starts_with("mpirun") { mpirun } else { ranks[1] });
        until_it_trains_again(&mut running, &run, file);
        println!("{name}: training again after {:.1} s", happened.elapsed().as_secs_f64());
        assert!(happened.elapsed() < Duration::from_secs(15), "{name}: {:?}", happened.elapsed());
    }
    let ended = running.wait(DEADLINE).expect_code(0);
    assert!(ended.stderr.contains("launch: done in 4 attempts, 3 restarts, "), "{}", ended.stderr);
    assert_eq!(errors(&ended), 0, "{}", ended.stderr);
    assert!(ended.stdout.contains("trained: "), "{}", ended.stdout);
    nothing_is_left(&run);
    same_weights(&run, &place.run("whole"));

    let records = attempts(&run);
    let words: Vec<_> = records.iter().map(|record| record["why"].as_str().expect("a word")).collect();
    assert_eq!(words, ["killed", "mpirun", "hung", "done"]);
    let (killed, hung) = (&records[0], &records[2]);
    assert_eq!((&killed["signal"], &killed["rank"]), (&9.into(), &1.into()), "{killed}");
    assert_eq!((&killed["first_step"], &killed["world_size"]), (&1.into(), &2.into()), "{killed}");
    assert_eq!(hung["rank"], 1, "{hung}");
    assert!(hung["message"].as_str().is_some_and(|m| m.contains("stopped by a signal")), "{hung}");
    assert_eq!((&records[3]["exit_code"], &records[3]["last_step"]), (&0.into(), &2500.into()));
    for (earlier, later) in records.iter().zip(&records[1..]) {
        let durable = earlier["durable_step"].as_u64().expect("a checkpoint");
        assert_eq!(later["first_step"], durable + 1, "{earlier} {later}");
    }
    let said = fs::read_to_string(run.join("logs/attempt-0001/rank-0000.log")).expect("a log");
    assert!(said.contains("2 ranks on 1 host") && !said.contains("[1,0]"), "{said}");
}

/// A host's link goes down. Without `--elastic` the run waits until the host is back; with it, it goes on with the
/// two that are left.
#[test]
fn a_host_that_is_lost_is_waited_for_or_left_out() {
    let Some(hosts) = Hosts::or_skip(3) else { return };
    let here = hosts.folder();
    small_store(&here.join("store"), 23);
    for elastic in [false, true] {
        let name = if elastic { "elastic" } else { "fixed" };
        let run = here.join(name);
        let mut train = small_model(&here.join("store"), &run);
        train.extend(["train.steps=600", "checkpoint.every=50", "comm.timeout_seconds=2"].map(str::to_owned));
        let train: Vec<&str> = train.iter().map(String::as_str).collect();
        let options: &[&str] = if elastic { &["--elastic"] } else { &[] };
        let mut running = Running::start(&mut hosts.launch(1, options, &train));
        until("it saves", &mut running, || newest(&run) > 0);
        hosts.cut(3).expect("cut");
        let (happened, file) = (Instant::now(), log_file(&run));
        until("the first attempt is over", &mut running, || attempts(&run)[0]["ended"].is_f64());
        println!("{name}: over {:.1} s after the link", happened.elapsed().as_secs_f64());
        if !elastic {
            until("the host is missed", &mut running, || {
                attempts(&run).iter().any(|record| record["why"] == "unreachable")
            });
            hosts.mend(3).expect("mended");
        }
        until_it_trains_again(&mut running, &run, file);
        println!("{name}: training again {:.1} s after the link", happened.elapsed().as_secs_f64());
        let ended = running.wait(DEADLINE).expect_code(0);
        let records = attempts(&run);
        let last = records.last().expect("attempts");
        assert_eq!(last["world_size"], if elastic { 2 } else { 3 }, "{}", ended.stderr);
        assert_eq!((&last["why"], &last["last_step"]), (&"done".into(), &600.into()), "{last}");
        assert_eq!(records[0]["why"], "failed", "{}", records[0]);
        let lost = records[0]["message"].as_str().expect("a message");
        assert!(lost.contains("rank 2 on h3: host does not answer"), "{lost}");
        let missed =
            if elastic { "going on with 2 of 3 hosts: h3 does not answer" } else { "h3 does not answer" };
        assert!(ended.stderr.contains(missed), "{}", ended.stderr);
        assert_eq!(errors(&ended), 0, "{}", ended.stderr);
        for host in [1, 2] {
            assert_eq!(hosts.processes(host), [""; 0], "left on h{host}");
        }
        // On a host that cannot be reached, mpirun's daemon waits until its link is up; ranks have ended.
        assert_eq!(hosts.ranks(3), [""; 0]);
    }
}

#[test]
fn what_cannot_be_mended_is_told_once() {
    let place = Place::new();
    let two = ["--local", "2"];
    // Found before anything is started.
    place.fails(&two, "a", &["train.step=5"], 2, &["unknown key \"train.step\"", "train.steps"]);
    place.fails(&[&two[..], &["--hang-seconds", "0"]].concat(), "a", &[], 2, &["--hang-seconds"]);
    place.fails(&["--hosts", "a:8,b:x"], "a", &[], 2, &["\"b:x\" is no host"]);
    place.fails(&["--hosts", "a:0"], "a", &[], 2, &["a has no slots"]);
    place.fails(&["--hostfile", "/nonexistent"], "a", &[], 2, &["/nonexistent"]);
    let refused = place.fails(&["--hosts", "h9:2", "--rsh-agent", "/bin/false"], "a", &[], 4, &[]);
    assert!(refused.stderr.contains("h9 does not answer"), "{}", refused.stderr);
    assert!(!place.run("a").exists(), "nothing was started, so nothing is left");
    place.fails(&[&two[..], &["--mpirun", "/no/mpirun"]].concat(), "m", &[], 2, &["/no/mpirun", "install"]);
    // Hosts on which the binary is not at its place, and without OpenMPI.
    let agent = |name: &str, script: &str| {
        let path = place.run(name);
        fs::write(&path, format!("#!/bin/sh\nshift\n{script}\n")).expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("set");
        path.to_str().expect("UTF-8").to_owned()
    };
    let nowhere = agent("nowhere", "exec sh -c \"/elsewhere$*\"");
    let message = ["h9 cannot run ", "at the same path on every host"];
    place.fails(&["--hosts", "h9:2", "--rsh-agent", &nowhere], "a", &[], 2, &message);
    let bare = agent(
        "bare",
        "case \"$*\" in *orted*) echo 'orted: not found' >&2; exit 127; esac\nexec sh -c \"$*\"",
    );
    let message = ["(orted) on every host: orted: not found", "OpenMPI has to be installed"];
    place.fails(&["--hosts", "h9:2", "--rsh-agent", &bare], "o", &[], 4, &message);

    // Found by the ranks.
    place.fails(&two, "c", &["device=cuda:0"], 2, &["device = cuda:0"]);
    assert_eq!(attempts(&place.run("c")).len(), 1);
    place.fails(&two, "d", &["data.dir=/nonexistent"], 3, &["/nonexistent"]);
    assert_eq!(attempts(&place.run("d"))[0]["why"], "data");
    // Arguments of `train` need neither its name nor the two dashes.
    let mut bare = repa_dist(&["launch", "--local", "2", "--config", "/nonexistent.toml"]);
    let ended = Running::start(&mut bare).wait(DEADLINE).expect_code(2);
    assert!(errors(&ended) == 1 && ended.stderr.contains("/nonexistent.toml"), "{}", ended.stderr);
    let mut other = repa_dist(&["launch", "--", "sample"]);
    Running::start(&mut other).wait(DEADLINE).expect_code(2).expect_error(&["launch runs `train`"]);
}

/// A rank that fails where no restart is allowed, and a run that somebody else launches already.
#[test]
fn restarts_are_counted() {
    let place = Place::new();
    let run = place.run("run");
    let endless = ["train.steps=1000000"];
    let mut running = place.launch(&["--local", "2", "--max-restarts", "0"], "run", &endless);
    until("it trains", &mut running, || last_step(&run) > 5);
    place
        .launch(&["--local", "2"], "run", &endless)
        .wait(DEADLINE)
        .expect_code(2)
        .expect_error(&["supervised by another launch"]);
    send("KILL", mpirun_of(&running).1[0]);
    let ended = running.wait(DEADLINE).expect_code(4);
    let expected = "error: rank 0 on ";
    assert!(ended.stderr.contains(expected) && ended.stderr.contains("--max-restarts 0"), "{}", ended.stderr);
    assert_eq!((errors(&ended), attempts(&run).len()), (1, 1), "{}", ended.stderr);
    nothing_is_left(&run);

    // Without a newer checkpoint, restarts are used up.
    let ended = place
        .launch(&["--local", "2", "--max-restarts", "1"], "bad", &["telemetry.bind=192.0.2.1"])
        .wait(DEADLINE)
        .expect_code(4)
        .expect_error(&[
            "starting again from the beginning in 1 s (restart 1 of 1)",
            "gave up after 1 restart",
        ]);
    assert_eq!((errors(&ended), attempts(&place.run("bad")).len()), (1, 2), "{}", ended.stderr);
}

#[test]
fn a_request_to_stop_saves_and_the_same_command_goes_on() {
    let place = Place::new();
    let run = place.run("run");
    let options = ["--local", "2"];
    let mut running = place.launch(&options, "run", &["train.steps=1000000"]);
    until("it trains", &mut running, || last_step(&run) > 5);
    running.signal("TERM");
    let ended = running.wait(DEADLINE).expect_code(75);
    assert_eq!(errors(&ended), 0, "{}", ended.stderr);
    nothing_is_left(&run);
    let stopped = last_step(&run);
    assert_eq!(newest(&run), stopped);
    assert_eq!(attempts(&run)[0]["why"], "stopped");

    // On in time: the rest of a minute is more than it takes.
    let total = format!("train.steps={}", stopped + 20);
    place
        .launch(&[&options[..], &["--max-hours", "0.02"]].concat(), "run", &[&total])
        .wait(DEADLINE)
        .expect_code(0);
    assert_eq!((last_step(&run), attempts(&run).len()), (stopped + 20, 2));

    // Out of time.
    let started = Instant::now();
    let ended = place
        .launch(&[&options[..], &["--max-hours", "0.0035"]].concat(), "run", &["train.steps=1000000"])
        .wait(DEADLINE)
        .expect_code(75);
    assert!(ended.stderr.contains("--max-hours: asking the ranks to save"), "{}", ended.stderr);
    assert!(started.elapsed() < Duration::from_secs(13), "{:?}", started.elapsed());
    assert_eq!(newest(&run), last_step(&run));

    // Asked before there are ranks, or before they listen: nothing is lost.
    for pause in [0, 100, 300, 600] {
        let running = place.launch(&options, "early", &["train.steps=1000000"]);
        std::thread::sleep(Duration::from_millis(pause));
        running.signal("TERM");
        let ended = running.wait(DEADLINE);
        // A signal before launch itself listens ends it, as it would any program.
        assert!(ended.code == Some(75) || (pause == 0 && ended.code.is_none()), "{pause} ms: {ended:?}");
        nothing_is_left(&place.run("early"));
    }

    // Launch itself is killed: mpirun ends the ranks.
    let mut running = place.launch(&options, "run", &["train.steps=1000000"]);
    let from = last_step(&run);
    until("it trains", &mut running, || last_step(&run) > from + 5);
    running.signal("KILL");
    assert_eq!(running.wait(DEADLINE).code, None);
    let killed = Instant::now();
    while !processes(&run).is_empty() {
        assert!(killed.elapsed() < Duration::from_secs(5), "left: {:#?}", processes(&run));
        std::thread::sleep(Duration::from_millis(50));
    }

    // Twice: at once.
    let mut running = place.launch(&options, "run", &["train.steps=1000000"]);
    let from = last_step(&run);
    until("it trains", &mut running, || last_step(&run) > from + 5);
    let (_, ranks) = mpirun_of(&running);
    send("STOP", ranks[0]);
    running.signal("INT");
    std::thread::sleep(Duration::from_millis(300));
    assert!(!running.has_ended());
    running.signal("INT");
    let asked = Instant::now();
    let ended = running.wait(DEADLINE).expect_code(130).expect_error(&["ended by a second signal"]);
    assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
    assert_eq!(errors(&ended), 1, "{}", ended.stderr);
    nothing_is_left(&run);
}

#[test]
fn a_dry_run_shows_the_line() {
    let place = Place::new();
    let line = |options: &[&str]| {
        let train = place.train("run", &[]);
        let train: Vec<&str> = train.iter().take(1).map(String::as_str).collect();
        let mut command = repa_dist(&[&["launch", "--dry-run"], options, &["--", "train"], &train].concat());
        // As a user has them, whatever the tests run in.
        let foreign =
            |name: &str| ["REPA_", "NCCL_", "OMPI_", "AWS_", "RUST_"].iter().any(|p| name.starts_with(p));
        for (name, _) in std::env::vars().filter(|(name, _)| foreign(name)) {
            command.env_remove(name);
        }
        command.env("REPA_TRAIN__SEED", "7").env("NCCL_DEBUG", "WARN").env("HOME_OF_MINE", "x");
        command.current_dir("/");
        let said = Running::start(&mut command).wait(DEADLINE).expect_code(0).stdout;
        let words: Vec<&str> = said.split_whitespace().collect();
        let mark = words.iter().position(|word| *word == "repa_launch_job").expect("a mark") + 1;
        let said = said
            .replace(words[mark], "MARK")
            .replace(binary().to_str().expect("UTF-8"), "REPA")
            .replace(place.folder.path().to_str().expect("UTF-8"), "DIR");
        said.replace("mpirun --allow-run-as-root", "mpirun").trim_end().to_owned()
    };
    assert_eq!(
        line(&["--local", "1"]),
        "mpirun --tag-output --mca repa_launch_job MARK --bind-to none --oversubscribe -x NCCL_DEBUG -x REPA_LAUNCH_JOB -x \
         REPA_RESTARTS -x REPA_TRAIN__SEED --wdir / -n 1 REPA train data.dir=DIR/store"
    );
    assert_eq!(
        line(&["--hosts", "a:500,b", "--interface", "eth0", "--rsh-agent", "my-ssh -q", "--bind-to", "core"]),
        "mpirun --tag-output --mca repa_launch_job MARK --bind-to core --mca mpi_yield_when_idle 1 --mca \
         btl_tcp_if_include eth0 --mca oob_tcp_if_include eth0 --mca plm_rsh_agent 'my-ssh -q' --mca \
         plm_rsh_no_tree_spawn 1 -H a:500,b:1 -x NCCL_DEBUG -x NCCL_SOCKET_IFNAME -x REPA_LAUNCH_JOB -x REPA_RESTARTS -x \
         REPA_TRAIN__SEED --wdir / -n 501 REPA train data.dir=DIR/store"
    );
    assert!(!place.run("run").exists());
}

/// Rank 0's bar passes through to a terminal, and what others say stands on lines of its own.
#[test]
fn a_terminal_shows_the_bar() {
    let place = Place::new();
    let train = place.train("run", &["train.steps=300"]).join(" ");
    let line = format!("stty cols 90; {} launch --local 2 -- train {train}", binary().display());
    let mut command = Command::new("script");
    command.args(["-qec", &line, "/dev/null"]).env("SHELL", "/bin/sh");
    if Command::new("script").arg("--version").output().is_err() {
        eprintln!("skipped: there is no program `script` here to make a terminal");
        return;
    }
    let said = Running::start(&mut command).wait(DEADLINE).expect_code(0).stdout;
    assert!(said.contains("\r\u{1b}[2K") && said.contains("300/300"), "{said}");
    assert!(said.contains("launch: done in 1 attempt, 0 restarts, 0 s lost"), "{said}");
    let text = fs::read_to_string(place.run("run/logs/attempt-0001/rank-0000.log")).expect("a log");
    assert!(!text.contains('\u{1b}') && text.contains("300/300"), "{text}");
}
