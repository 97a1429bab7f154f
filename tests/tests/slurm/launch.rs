//! `repa-dist launch` inside an allocation.

use std::fs;
use std::path::Path;
use std::process::Command;

use repa_tests::{Running, binary, log, repa_dist, small_model};

use crate::cluster::{Cluster, DEADLINE, cluster, send, text};

/// Steps of a run: enough that it is still under way after a restart.
const STEPS: usize = 400;

/// The records of a run's attempts.
fn attempts(run: &Path) -> Vec<serde_json::Value> {
    let mut paths: Vec<_> = fs::read_dir(run.join("attempts"))
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect();
    paths.retain(|path| path.extension().is_some_and(|e| e == "json"));
    paths.sort();
    let read = |path: &_| serde_json::from_slice(&fs::read(path).expect("a record")).expect("JSON");
    paths.iter().map(read).collect()
}

/// A rank is killed: launch goes on inside the job. A stop is asked for: the job is requeued, and ends as the one that
/// was left alone.
#[test]
fn launch_goes_on_inside_the_job_and_in_the_next() {
    let Some(cluster) = cluster() else { return };
    let steps = format!("train.steps={STEPS}");
    let run = cluster.run("launched");
    let id = cluster.submit("launched", &["--mpi=launch"], &[&steps, "checkpoint.every=20"]);
    cluster.until("it saves", "launched", &id, || {
        // One that is still written has another name.
        let whole = |name: &str| name.strip_prefix("step-").is_some_and(|n| n.parse::<u64>().is_ok());
        let mut entries = fs::read_dir(run.join("checkpoints")).into_iter().flatten().flatten();
        entries.any(|entry| entry.file_name().to_str().is_some_and(whole))
    });
    let ranks = cluster.slurm.ranks(&run);
    assert_eq!(ranks.len(), 3, "{}", cluster.said("launched", &id));
    send("KILL", &ranks[2..]);
    cluster.until("it goes on", "launched", &id, || {
        cluster.said("launched", &id).contains("going on from step ") && cluster.slurm.ranks(&run).len() == 3
    });
    let held = cluster.slurm.ranks(&run);
    send("STOP", &held);
    assert!(log(&run).len() < STEPS, "the run was over before it could be held");
    assert_eq!(cluster.slurm.processes("orted").len(), 2, "daemons of the first attempt are left");
    cluster.slurm.run(&["scancel", "--batch", "--signal=USR1", &id]).expect_code(0);
    // A stop that takes its time is asked for by a file as well. It is not taken for a person's, which would keep the job
    // from starting again.
    cluster.until("it asks again", "launched", &id, || run.join("STOP").exists());
    cluster.release("launched", &id);
    // Meanwhile, a run that is not stopped.
    let whole = cluster.submit("whole", &[], &[&steps]);
    cluster.start_again("launched", &id);
    cluster.finish("whole", &whole, "COMPLETED");
    cluster.finish("launched", &id, "COMPLETED");
    let said = cluster.said("launched", &id);
    for part in [
        &format!("launch: in SLURM job {id}: its allocation is 3 ranks on 3 hosts (n1:1,n2:1,n3:1)") as &str,
        "(restart 1 of 10)",
        "SIGUSR1: asking the ranks to save and stop",
        "exit code 75, with a checkpoint to go on from: to be started again",
        "launch: done in 1 attempt, 0 restarts",
    ] {
        assert!(said.contains(part), "no {part:?} in\n{said}");
    }
    let records = attempts(&run);
    let words: Vec<_> = records.iter().map(|record| record["why"].as_str().expect("a word")).collect();
    assert_eq!(words, ["killed", "stopped", "done"], "{said}");
    assert_eq!((&records[0]["signal"], &records[0]["world_size"]), (&9.into(), &3.into()), "{}", records[0]);
    assert_eq!(log(&run).len(), STEPS);
    cluster.same("launched", "whole");
    nothing_is_left(&cluster, &id);
    cluster.end();
}

#[track_caller]
fn nothing_is_left(cluster: &Cluster, id: &str) {
    cluster.until("its processes have gone", "launched", id, || {
        ["repa-dist", "mpirun", "orted", "srun"].iter().all(|name| cluster.slurm.processes(name).is_empty())
    });
}

/// What is given wins, hosts of the job are reached through SLURM, and others by ssh.
#[test]
fn launch_asks_the_job_where_ranks_run() {
    let Some(cluster) = cluster() else { return };
    let train = small_model(&cluster.run("store"), &cluster.run("run"));
    let train: Vec<&str> = train.iter().map(String::as_str).collect();
    let program = binary();
    let in_job = |job: &[&str], options: &[&str]| {
        let job = [&["salloc", "--quiet"], job].concat();
        let launch = [&[text(&program), "launch"], options, &["--", "train"], &train].concat();
        cluster.slurm.run(&[job, launch].concat())
    };
    let says = |job: &[&str], options: &[&str], line: &str| {
        let said = in_job(job, &[&["--dry-run"], options].concat()).expect_code(0);
        assert!(said.stdout.contains(&format!(" --mca ras '^slurm' {line} ")), "{}", said.stdout);
        said.stderr
    };
    let (five, slurm) = (["-N3", "-n5"], "--mca plm_slurm_args '--overlap --nodelist=");
    let first = says(&five, &[], &format!("{slurm}n1,n2,n3' -H n1:3,n2:1,n3:1"));
    assert!(first.contains(": its allocation is 5 ranks on 3 hosts (n1:3,n2:1,n3:1)"), "{first}");
    let first = says(&five, &["--hosts", "n3:2,n1"], &format!("{slurm}n3,n1' -H n3:2,n1:1"));
    assert!(!first.contains("allocation"), "{first}");
    says(&five, &["--hosts", "n3,h9"], "--mca plm rsh --mca plm_rsh_no_tree_spawn 1 -H n3:1,h9:1");
    says(&five, &["--local", "2"], "--oversubscribe -x");
    // Through SLURM, two of the hosts, more ranks than it counts tasks.
    let said = in_job(&["-N3", "-n3"], &["--hosts", "n2:2,n3:1"]).expect_code(0);
    assert!(
        said.stderr.contains("3 ranks on 2 hosts") || said.stdout.contains("3 ranks on 2 hosts"),
        "{said:?}"
    );
    // Once for each task would be too often.
    let launch = [&["srun", "-N2", "-n2", text(&program), "launch", "--", "train"], &train[..]].concat();
    let refused = cluster.slurm.run(&launch).expect_code(2);
    refused.expect_error(&["srun has started 2 tasks of launch", "without srun around it"]);
    cluster.end();
}

/// A job that does not say where ranks are to run; this takes no SLURM.
#[test]
fn a_job_that_cannot_be_read_gets_one_message() {
    let fails = |tasks: &str, path: &str, parts: &[&str]| {
        let mut command: Command = repa_dist(&["launch", "--dry-run", "--", "train"]);
        command.env("SLURM_JOB_ID", "12").env("SLURM_JOB_NODELIST", "n[1-3]");
        command.env("SLURM_TASKS_PER_NODE", tasks).env("PATH", path);
        let ended = Running::start(&mut command).wait(DEADLINE).expect_code(2).expect_error(parts);
        assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
    };
    let folder = tempfile::tempdir().expect("a folder");
    fails(
        "1(x3)",
        text(folder.path()),
        &["SLURM job 12: cannot run `scontrol show hostnames n[1-3]`", "--hosts"],
    );
    let scontrol = folder.path().join("scontrol");
    fs::write(&scontrol, "#!/bin/sh\necho n1; echo n2; echo n3\n").expect("written");
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(&scontrol, fs::Permissions::from_mode(0o755)).expect("set");
    fails("2(x", text(folder.path()), &["SLURM_TASKS_PER_NODE=2(x does not count", "2(x3),1", "--hosts"]);
    fails("2", text(folder.path()), &["counts tasks of 1 hosts, and it has 3 (n[1-3])", "--hosts"]);
}
