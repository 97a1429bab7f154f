//! Ranks on several hosts: network namespaces, real TCP between them. Takes root; skipped with a reason
//! elsewhere. Some 15 s on two cores.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use repa_tests::hosts::Hosts;
use repa_tests::{Running, log, loss_difference, mpirun, run_in, small_model, small_store};

const DEADLINE: Duration = Duration::from_secs(120);

#[test]
fn three_hosts_train_to_the_losses_of_one() {
    let Some(hosts) = Hosts::or_skip(3) else { return };
    let here = hosts.folder();
    small_store(&here.join("store"), 23);
    let train = |name: &str, command: &dyn Fn(&[&str]) -> Command, more: &[&str]| {
        let mut arguments = small_model(&here.join("store"), &here.join(name));
        arguments.extend(more.iter().map(|&a| a.to_owned()));
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let ended = run_in(here, command(&arguments), DEADLINE);
        (log(&here.join(name)), ended.stdout + &ended.stderr)
    };
    let (one, _) = train("one", &|a| mpirun(6, a), &[]);
    let (three, said) = train("three", &|a| hosts.mpirun(2, a), &[]);
    assert!(said.contains("6 ranks on 3 hosts"), "{said}");
    assert!(one.len() == 12 && loss_difference(&one, &three) < 1e-6, "{:.2e}", loss_difference(&one, &three));
    // Neither overlap nor the bucket's size changes a bit, also between hosts.
    let (plain, _) = train("plain", &|a| hosts.mpirun(2, a), &["comm.overlap=false", "comm.bucket_mib=1"]);
    let losses = |records: &[repa_trainer::telemetry::record::StepRecord]| {
        records.iter().map(|r| r.loss).collect::<Vec<_>>()
    };
    assert_eq!(losses(&three), losses(&plain));
    // Without two levels, sums are taken in rank order wherever the ranks are: one host's bits. A sharded optimizer
    // changes none.
    let (flat, _) = train("flat", &|a| hosts.mpirun(2, a), &["comm.hierarchical=false"]);
    assert_eq!(losses(&one), losses(&flat));
    let zero1 = ["optimizer.sharding=zero1"];
    let (sharded, _) = train("zero1", &|a| hosts.mpirun(2, a), &zero1);
    assert_eq!(losses(&three), losses(&sharded));
}

/// Starts a run without end on two hosts, a rank each, and waits until it has made some steps.
fn endless(hosts: &Hosts) -> Running {
    let here = hosts.folder();
    small_store(&here.join("store"), 23);
    let run = here.join("run");
    let mut arguments = small_model(&here.join("store"), &run);
    arguments.extend(["train.steps=1000000", "comm.timeout_seconds=5"].map(str::to_owned));
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut running = Running::start(hosts.mpirun(1, &arguments).current_dir(here));
    let started = Instant::now();
    while fs::read_to_string(run.join("metrics.jsonl")).map_or(0, |text| text.lines().count()) < 5 {
        assert!(started.elapsed() < DEADLINE && !running.has_ended(), "it does not get going");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!([1, 2].map(|host| hosts.ranks(host).len()), [1, 1]);
    running
}

/// mpirun sees it and ends the others.
#[test]
fn a_rank_that_is_killed_ends_the_job() {
    let Some(hosts) = Hosts::or_skip(2) else { return };
    let running = endless(&hosts);
    let killed = Instant::now();
    let status = Command::new("kill").args(["-s", "KILL", &hosts.ranks(2)[0]]).status().expect("kill runs");
    assert!(status.success());
    let ended = running.wait(Duration::from_secs(30));
    assert!(killed.elapsed() < Duration::from_secs(5 + 5), "{:?} after the kill", killed.elapsed());
    assert_ne!(ended.code, Some(0), "{}", ended.stderr);
    assert_eq!([1, 2].map(|host| hosts.ranks(host).len()), [0, 0]);
}

/// A host goes away in the middle of a run: within the deadline and a little, every rank has ended, and the
/// one that mpirun still hears has said whom it waited for. mpirun itself waits on for the lost host, for
/// minutes: what starts it has to end it.
#[test]
fn a_link_that_goes_down_ends_all_ranks() {
    let Some(hosts) = Hosts::or_skip(2) else { return };
    let running = endless(&hosts);
    hosts.cut(2).expect("cut");
    let cut = Instant::now();
    while [1, 2].iter().any(|&host| !hosts.ranks(host).is_empty()) {
        assert!(cut.elapsed() < Duration::from_secs(5 + 5), "ranks are left after {:?}", cut.elapsed());
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(cut.elapsed() > Duration::from_secs(4), "they ended for another reason");
    running.signal("KILL");
    let ended = running.wait(DEADLINE);
    let said = &ended.stderr;
    // Which bucket it was depends on the moment.
    assert!(said.contains("error: rank 0 on h1: all-reduce") && said.contains(" in step "), "{said}");
    assert!(
        said.contains(
            " on rank 0 of 2 gave up after 5.0 s waiting for rank 1 (rank 1 on h2: host does not answer"
        ),
        "{said}"
    );
}
