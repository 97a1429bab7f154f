//! Batch scripts and real SLURM: three nodes on this machine (`repa_tests::slurm`), skipped with a reason where the
//! packages are missing or the tests do not run as root. Some 80 s on two cores, much of it for SLURM, which looks at
//! time limits every 30 s.

mod cluster;
mod launch;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use cluster::{Cluster, DEADLINE, cluster, send, steps, text};
use repa_tests::{Ended, Running, binary, log, repa_dist, small_model};

/// Under the launch of srun and of mpirun: the time limit comes near, all ranks save at the same step, the job is
/// requeued and ends as the one that had time.
#[test]
fn a_time_limit_costs_nothing() {
    let Some(cluster) = cluster() else { return };
    let steps = steps();
    let jobs = ["srun", "mpirun"].map(|form| {
        let id = cluster.submit(form, &[&format!("--mpi={form}"), "--time=60", "--notice=120"], &[&steps]);
        (form, id)
    });
    for (form, id) in &jobs {
        let ranks = cluster.hold(form, id);
        if *form == "srun" {
            let environment = fs::read(format!("/proc/{}/environ", ranks[0])).expect("a rank's environment");
            let fence = b"SLURM_PMIX_FENCE=ring";
            assert!(
                environment.split(|&byte| byte == 0).any(|line| line == fence),
                "ranks may start too early"
            );
        }
        // SLURM looks at time limits every 30 s.
        let minutes = 2 + elapsed_minutes(&cluster.slurm.field(id, "RunTime"));
        let limit = format!("TimeLimit={minutes}");
        cluster.slurm.run(&["scontrol", "update", &format!("JobId={id}"), &limit]).expect_code(0);
    }
    // Meanwhile, a run that is not stopped.
    let whole = cluster.submit("whole", &[], &[&steps]);
    cluster.finish("whole", &whole, "COMPLETED");
    jobs.iter().for_each(|(form, id)| cluster.release(form, id));
    jobs.iter().for_each(|(form, id)| cluster.start_again(form, id));
    for (form, id) in &jobs {
        cluster.finish(form, id, "COMPLETED");
        cluster.went_on(form, id, "whole");
    }
    cluster.end();
}

/// A job of a higher partition takes the nodes: the ranks save in the time that SLURM gives them.
#[test]
fn preemption_costs_nothing() {
    let Some(cluster) = cluster() else { return };
    let steps = steps();
    let whole = cluster.submit("whole", &[], &[&steps]);
    cluster.finish("whole", &whole, "COMPLETED");
    for form in ["srun", "mpirun", "launch"] {
        let id = cluster.submit(form, &[&format!("--mpi={form}"), "--partition=low"], &[&steps]);
        cluster.hold(form, &id);
        let wanted = cluster.preempt();
        cluster.release_preempted(form, &id);
        cluster.start_again(form, &id);
        cluster.finish(form, &id, "COMPLETED");
        cluster.went_on(form, &id, "whole");
        assert_eq!(cluster.slurm.field(&wanted, "JobState"), "COMPLETED");
    }
    // On one node mpirun starts no step that SLURM could signal.
    let options = ["--nodes=1", "--ranks-per-node=2", "--mpi=mpirun", "--partition=low"];
    let id = cluster.submit("one", &options, &["train.steps=1000000"]);
    let run = cluster.run("one");
    cluster.until("it trains", "one", &id, || run.join("metrics.jsonl").exists() && log(&run).len() > 3);
    cluster.preempt();
    cluster.until("it is requeued", "one", &id, || cluster.slurm.field(&id, "Restarts") == "1");
    let said = cluster.said("one", &id);
    assert!(said.contains("stop asked for") && said.contains("stopped on request, saved"), "{said}");
    cluster.end();
}

/// Plain srun starts N jobs of one rank: each of them says so, and what to do. `doctor` says so as well.
#[test]
fn srun_without_pmix_is_refused() {
    let Some(cluster) = cluster() else { return };
    let mut arguments = small_model(&cluster.run("store"), &cluster.run("alone"));
    arguments.insert(0, text(&binary()).to_owned());
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let refused = cluster.slurm.run(&[&["srun", "--mpi=none", "-N3", "-n3"], &arguments[..]].concat());
    refused
        .expect_code(4)
        .expect_error(&["srun started 3 tasks that cannot find each other", "srun --mpi=pmix"]);
    assert!(!cluster.run("alone").exists(), "it has begun to train");
    doctor_knows(&cluster);
    cluster.end();
}

/// `doctor` on the login node, as ranks, and as the tasks of a plain srun.
fn doctor_knows(cluster: &Cluster) {
    let mut arguments = vec![text(&binary()).to_owned(), "doctor".into(), "--quick".into()];
    arguments.extend(small_model(&cluster.run("store"), &cluster.run("examined")));
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let says = |before: &[&str], code: i32, parts: &[&str]| {
        let said = cluster.slurm.run(&[before, &arguments[..]].concat()).expect_code(code).stdout;
        for part in parts {
            assert_eq!(said.matches(part).count(), 1, "{part:?} in\n{said}");
        }
        said
    };
    says(&[], 0, &["partitions low (3 nodes, 3 idle), high (3 nodes, 3 idle)", "srun --mpi=pmix (srun has"]);
    let ranks =
        ["3 ranks on 3 hosts, started by a PMIx launcher", "on 3 nodes (n[1-3]), 3 tasks", "time left"];
    // Without the fence that waits ranks may crash, so where `doctor` shall miss it, srun has it and the ranks have not.
    let srun = ["srun", "--mpi=pmix", "-N3", "-n3", "--time=5", "--export=ALL,SLURM_PMIX_FENCE=ring"];
    assert!(!says(&srun, 0, &ranks).contains("SLURM_PMIX_FENCE"));
    let unaware = [&srun[..], &["env", "-u", "SLURM_PMIX_FENCE"]].concat();
    says(&unaware, 0, &["warning  fence"]);
    let alone = ["error    ranks", "job ", "srun started 3 tasks that cannot find each other (no PMIx)"];
    says(&["srun", "--mpi=none", "-N3", "-n3"], 4, &alone);
    // OpenMPI does not speak it.
    says(&["srun", "--mpi=pmi2", "-N3", "-n3"], 4, &["error    ranks", "MPI does not start"]);
}

/// What a person asks for by the file STOP is not undone; wrong settings are not tried again; a lost rank is, so many
/// times.
#[test]
fn starts_again_only_where_that_can_help() {
    let Some(cluster) = cluster() else { return };
    let id = cluster.submit("data", &[], &["data.dir=/nowhere"]);
    cluster.finish("data", &id, "FAILED");
    assert_eq!(cluster.slurm.field(&id, "ExitCode"), "3:0", "{}", cluster.said("data", &id));
    assert!(cluster.said("data", &id).contains("starting again cannot help"));

    let endless = "train.steps=1000000";
    let id = cluster.submit("stop", &["--mpi=mpirun"], &[endless]);
    let run = cluster.run("stop");
    cluster.until("it trains", "stop", &id, || run.join("metrics.jsonl").exists() && log(&run).len() > 3);
    fs::write(run.join("STOP"), "").expect("written");
    cluster.finish("stop", &id, "FAILED");
    assert_eq!(cluster.slurm.field(&id, "ExitCode"), "75:0");
    assert!(cluster.said("stop", &id).contains("not started again"), "{}", cluster.said("stop", &id));

    let id = cluster.submit("lost", &["--max-failures=1"], &[endless]);
    for restarts in ["0", "1"] {
        cluster.until("it trains", "lost", &id, || {
            cluster.slurm.field(&id, "Restarts") == restarts
                && cluster.slurm.ranks(&cluster.run("lost")).len() == 3
                && cluster.said("lost", &id).matches("3 ranks on 3 hosts").count()
                    > usize::from(restarts == "1")
        });
        send("KILL", &cluster.slurm.ranks(&cluster.run("lost"))[..1]);
        if restarts == "0" {
            cluster.start_again("lost", &id);
        }
    }
    cluster.finish("lost", &id, "FAILED");
    assert!(cluster.said("lost", &id).contains("given up"), "{}", cluster.said("lost", &id));
    cluster.end();
}

/// Minutes of a time such as 0:42, 1:02:03 or 00:00:42, rounded down.
fn elapsed_minutes(time: &str) -> u64 {
    time.split(':').filter_map(|part| part.parse::<u64>().ok()).fold(0, |sum, part| sum * 60 + part) / 60
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().expect("the repository")
}

/// The examples are what the command in their head makes, and bash reads them.
#[test]
fn the_examples_are_made_by_the_command_that_they_name() {
    let folder = repository().join("configs/slurm");
    let mut seen = 0;
    for entry in fs::read_dir(folder).expect("examples") {
        let path = entry.expect("an entry").path();
        if path.extension().is_none_or(|e| e != "sbatch") {
            continue;
        }
        seen += 1;
        let example = fs::read_to_string(&path).expect("readable");
        let made_by: String = example
            .lines()
            .skip_while(|line| !line.ends_with("Made by"))
            .skip(2)
            .take_while(|line| *line != "#")
            .map(|line| format!("{}\n", line.trim_start_matches('#').trim_start()))
            .collect();
        assert!(made_by.starts_with("repa-dist slurm "), "{}: {made_by:?}", path.display());
        let folder_of_binary = binary().parent().expect("a folder").to_owned();
        let search = format!("{}:{}", folder_of_binary.display(), std::env::var("PATH").unwrap_or_default());
        let mut command = Command::new("bash");
        command.args(["-c", &made_by]).current_dir(repository()).env("PATH", search);
        let made = Running::start(&mut command).wait(DEADLINE).expect_code(0).stdout;
        assert_eq!(made, example, "{} is not up to date: run its command with --out", path.display());
        Running::start(Command::new("bash").arg("-n").arg(&path)).wait(DEADLINE).expect_code(0);
    }
    assert!(seen >= 6, "{seen} examples");
}

/// A batch script, and programs in place of SLURM's: the launcher does what a test tells it.
struct Stub {
    folder: tempfile::TempDir,
}

impl Stub {
    fn new(settings: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let options =
            ["slurm", "--nodes", "2", "--ranks-per-node", "1", "--time", "1:00:00", "--max-failures", "1"];
        let run = format!("run.dir={}", folder.path().join("run").display());
        let made = Running::start(&mut repa_dist(&[&options[..], settings, &[&run]].concat())).wait(DEADLINE);
        // Of the five seconds there the test knows nothing.
        let script = made.expect_code(0).stdout.replace("sleep 5", "sleep 0");
        fs::write(folder.path().join("script"), script).expect("written");
        fs::create_dir_all(folder.path().join("run/logs")).expect("a folder");
        for (name, does) in [("srun", "eval \"$LAUNCHED\""), ("scontrol", "echo started again")] {
            let path = folder.path().join(name);
            fs::write(&path, format!("#!/bin/bash\n{does}\n")).expect("written");
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("a program");
        }
        Self { folder }
    }

    /// How the start of this number ends, and what it says.
    fn start(&self, number: u32, launched: &str) -> (Option<i32>, String) {
        let search =
            format!("{}:{}", self.folder.path().display(), std::env::var("PATH").unwrap_or_default());
        let mut command = Command::new("bash");
        command.arg(self.folder.path().join("script")).current_dir(self.folder.path()).env("PATH", search);
        command
            .env("SLURM_JOB_ID", "7")
            .env("SLURM_NTASKS", "2")
            .env("SLURM_RESTART_COUNT", number.to_string());
        let ended = Running::start(command.env("LAUNCHED", launched)).wait(DEADLINE);
        (ended.code, ended.stdout + &ended.stderr)
    }
}

/// A start that saved is no failure, also where nobody was left to write that down.
#[test]
fn starts_that_saved_are_not_counted_as_failures() {
    // As a lost node ends it: the script goes with the ranks.
    const LOST: &str = "kill -9 $PPID";
    let local = "mkdir -p run/checkpoints/step-00000005; touch run/checkpoints/step-00000005/manifest.json";
    let remote = r#"echo '{"time":1.5,"step":5,"kind":"durable","text":""}' >>run/events.jsonl"#;
    for (settings, saves) in [(&[][..], local), (&["checkpoint.dir=s3://bucket/run"][..], remote)] {
        let stub = Stub::new(settings);
        for number in 0..3 {
            assert_ne!(stub.start(number, &format!("sleep 1; {saves}; {LOST}")).0, Some(0), "it is lost");
        }
        // One that saves nothing is the first failure, and this script bears none.
        let (code, said) = stub.start(3, "exit 4");
        assert_eq!(code, Some(0), "{said}");
        assert!(
            said.contains("exit code 4: to be started again") && said.contains("started again"),
            "{said}"
        );
        let (code, said) = stub.start(4, "exit 4");
        assert!(code == Some(4) && said.contains("saved nothing: given up"), "{code:?} {said}");
        // And one that saves before it fails.
        let (code, said) = stub.start(5, &format!("sleep 1; {saves}; exit 4"));
        assert!(code == Some(0) && said.contains("with a checkpoint to go on from"), "{code:?} {said}");
    }
}

/// The runs of a sweep have checkpoints of their own, also where all are in one place.
#[test]
fn a_sweep_s_runs_do_not_share_checkpoints() {
    let sweep = ["--array", "optimizer.learning_rate=1e-4,2e-4"];
    let stub = Stub::new(&[&sweep[..], &["checkpoint.dir=/shared/here"]].concat());
    let script = fs::read_to_string(stub.folder.path().join("script")).expect("a script");
    for point in ["learning_rate-1e-4", "learning_rate-2e-4"] {
        assert!(script.contains(&format!("checkpoints=/shared/here/{point} ")), "{script}");
    }
    assert!(
        script.contains("\"checkpoint.dir=$checkpoints\"") && script.contains("find \"$checkpoints\""),
        "{script}"
    );
    fails(&["--array=checkpoint.dir=a,b"], &["checkpoint.dir", "each run has a folder of its own"]);
}

fn fails(arguments: &[&str], message: &[&str]) -> Ended {
    let arguments = [&["slurm"], arguments].concat();
    let ended =
        Running::start(&mut repa_dist(&arguments)).wait(DEADLINE).expect_code(2).expect_error(message);
    assert_eq!(
        ended.stderr.lines().filter(|line| !line.starts_with("warning")).count(),
        1,
        "{}",
        ended.stderr
    );
    ended
}

#[test]
fn wrong_options_get_one_message() {
    fails(&["--time=soon"], &["--time", "\"soon\" is no time limit", "24:00:00"]);
    fails(&["--nodes=0"], &["--nodes must be above 0"]);
    fails(&["--config=/nonexistent.toml"], &["/nonexistent.toml"]);
    fails(&["--gpus-per-node=2", "--ranks-per-node=3"], &["each rank needs a GPU of its own"]);
    fails(&["--notice=600", "--time=5"], &["--notice 600", "below the time limit"]);
    fails(&["--job-name=a/b"], &["--job-name \"a/b\"", "letters"]);
    fails(&["--sbatch=exclusive"], &["--sbatch exclusive", "--constraint=a100"]);
    fails(&["--array=train.sed=1,2"], &["unknown key \"train.sed\"", "train.seed"]);
    fails(&["--array=train.seed=1", "--array=train.seed=2"], &["twice"]);
    fails(&["--out=/nonexistent/job"], &["cannot write /nonexistent/job"]);
    let folder = tempfile::tempdir().expect("a folder");
    let run = format!("run.dir={}", folder.path().join("run").display());
    let mut alone = repa_dist(&["slurm", "--submit", &run]);
    let ended = Running::start(alone.env("PATH", folder.path())).wait(DEADLINE).expect_code(2);
    ended.expect_error(&["--submit needs SLURM's sbatch", "login node"]);
}
