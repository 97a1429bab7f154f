//! Checkpoints end to end: when they are saved, what is kept, where runs go on from, and what happens when the disk or
//! a rank does not hold. Some 60 s on two cores, half of it for the ranks that are killed: 20 times, and 200 times by
//! `make soak`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use repa_tests::hosts::Hosts;
use repa_tests::{Ended, Running, log, mpirun, repa_dist, small_model, small_store};

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

    fn start(&self, ranks: usize, run: &str, more: &[&str]) -> Running {
        let mut arguments = small_model(&self.folder.path().join("store"), &self.run(run));
        arguments.extend(more.iter().map(|&a| a.to_owned()));
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        Running::start(&mut mpirun(ranks, &arguments))
    }

    #[track_caller]
    fn train(&self, ranks: usize, run: &str, more: &[&str]) -> Ended {
        self.start(ranks, run, more).wait(DEADLINE).expect_code(0)
    }
}

/// Steps of a run's complete checkpoints.
fn steps(run: &Path) -> Vec<u64> {
    let entries = fs::read_dir(run.join("checkpoints")).expect("checkpoints");
    let names = entries.map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned());
    let mut steps: Vec<u64> = names.filter_map(|n| n.strip_prefix("step-")?.parse().ok()).collect();
    steps.sort_unstable();
    steps
}

fn losses(run: &Path) -> Vec<(u64, f64)> {
    log(run).iter().map(|r| (r.step, r.loss)).collect()
}

/// A command on checkpoints, and what it says.
#[track_caller]
fn checkpoint(arguments: &[&str], code: i32) -> Ended {
    let arguments = [&["checkpoint"], arguments].concat();
    Running::start(&mut repa_dist(&arguments)).wait(DEADLINE).expect_code(code)
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

#[track_caller]
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < DEADLINE, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn the_last_the_milestones_and_the_best_are_kept() {
    let place = Place::new();
    let keep =
        ["checkpoint.every=1", "checkpoint.keep=2", "checkpoint.keep_every=5", "checkpoint.keep_best=1"];
    place.train(2, "run", &keep);
    let all = log(&place.run("run"));
    let best = all.iter().min_by(|a, b| a.loss.total_cmp(&b.loss)).expect("steps").step;
    let mut expected = vec![5, 10, 11, 12, best];
    expected.sort_unstable();
    expected.dedup();
    assert_eq!(steps(&place.run("run")), expected);
    let listed = checkpoint(&["list", "--json", text(&place.run("run"))], 0).stdout;
    let listed: serde_json::Value = serde_json::from_str(&listed).expect("JSON");
    for row in listed.as_array().expect("rows") {
        assert_eq!(row["state"], "complete");
        let step = row["step"].as_u64().expect("a step");
        let loss = row["metrics"]["loss"].as_f64().expect("a mean of one step");
        assert!((loss - all[step as usize - 1].loss).abs() < 1e-8, "{row}");
    }
}

#[test]
fn a_file_saves_and_goes_on_and_another_saves_and_stops() {
    let place = Place::new();
    let running = place.start(2, "run", &["train.steps=1000000"]);
    let run = place.run("run");
    until("it trains", || log(&run).len() > 3);
    fs::write(run.join("SAVE"), "").expect("written");
    until("it has saved", || run.join("checkpoints").is_dir() && !steps(&run).is_empty());
    assert!(!run.join("SAVE").exists());
    let saved = steps(&run)[0];
    until("it goes on", || log(&run).last().is_some_and(|r| r.step > saved + 3));
    fs::write(run.join("STOP"), "").expect("written");
    running.wait(DEADLINE).expect_code(75);
    let last = log(&run).last().expect("steps").step;
    assert_eq!(steps(&run), [saved, last]);
    checkpoint(&["verify", text(&run)], 0);
}

/// Back to an earlier step, once; another run's checkpoint; other weights.
#[test]
fn runs_go_on_from_where_they_are_told_to() {
    let place = Place::new();
    let every = ["checkpoint.every=4", "checkpoint.keep=9"];
    place.train(2, "a", &every);
    let whole = losses(&place.run("a"));
    assert_eq!(steps(&place.run("a")), [4, 8, 12]);

    // To step 4 and on to 6: what came after it is set aside. The same command again goes on from 6.
    let back = ["--resume=4", "train.steps=6", "checkpoint.every=4", "checkpoint.keep=9"];
    let ended = place.train(2, "a", &back);
    assert!(ended.stderr.contains("going on from step 4 to 6"), "{}", ended.stderr);
    assert!(ended.stderr.contains("set aside a later checkpoint"), "{}", ended.stderr);
    assert_eq!(steps(&place.run("a")), [4, 6]);
    let again = ["--resume=4", "checkpoint.every=4", "checkpoint.keep=9"];
    let ended = place.train(2, "a", &again);
    assert!(ended.stderr.contains("going on from step 6 to 12"), "{}", ended.stderr);
    assert_eq!(losses(&place.run("a")), whole);
    place
        .start(2, "a", &["--resume=5"])
        .wait(DEADLINE)
        .expect_code(2)
        .expect_error(&["run.resume = 5", "there are: 4, 6, 8, 12"]);

    // Another run's, and of a run of its own once there is one.
    let from = format!("--resume={}", place.run("a/checkpoints/step-00000008").display());
    let ended = place.train(2, "b", &[&from]);
    assert!(ended.stderr.contains("going on from step 8 to 12"), "{}", ended.stderr);
    assert_eq!(losses(&place.run("b")), whole[8..]);
    let ended = place.train(2, "b", &[&from, "train.steps=13"]);
    assert!(ended.stderr.contains("going on from step 12 to 13"), "{}", ended.stderr);
    place
        .start(2, "c", &["--resume=atuo"])
        .wait(DEADLINE)
        .expect_code(2)
        .expect_error(&["run.resume = atuo", "neither auto nor never"]);

    // Settings that would make it another run, unless they are named. The data goes on from the samples seen.
    let wider = ["train.global_batch=20", "train.steps=14"];
    place
        .start(2, "b", &wider)
        .wait(DEADLINE)
        .expect_code(2)
        .expect_error(&["train.global_batch was 10 and is 20", "run.allow_changed"]);
    place.train(2, "b", &[&wider[..], &["run.allow_changed=[\"train.global_batch\"]"]].concat());
    let listed = checkpoint(&["list", "--json", text(&place.run("b"))], 0).stdout;
    let listed: serde_json::Value = serde_json::from_str(&listed).expect("JSON");
    let samples = listed.as_array().and_then(|rows| rows.last()).map(|row| row["samples"].clone());
    assert_eq!(samples, Some(serde_json::json!(150)));

    // Weights only, into a deeper model: the new block starts anew.
    let from = format!("run.init_from={}", place.run("a").display());
    let ended =
        place.train(2, "d", &[&from, "model.depth=3", "train.steps=1", "optimizer.learning_rate=1e-9"]);
    let said = &ended.stderr;
    assert!(said.contains("these keep their first values: blocks.2.attn.qkv.weight"), "{said}");
    let first = place.run("a/checkpoints/step-00000012");
    let difference = checkpoint(&["diff", "--json", text(&first), text(&place.run("d"))], 0).stdout;
    let difference: serde_json::Value = serde_json::from_str(&difference).expect("JSON");
    let ema: Vec<f64> = difference["differing"]
        .as_array()
        .expect("rows")
        .iter()
        .filter(|row| row["name"].as_str().is_some_and(|n| n.starts_with("ema.")))
        .map(|row| row["relative"].as_f64().expect("a number"))
        .collect();
    assert!(ema.iter().all(|&relative| relative < 1e-5), "{ema:?}");
    let new = difference["only_second"].as_array().expect("names");
    assert!(new.iter().any(|name| name == "ema.blocks.2.attn.qkv.weight"), "{new:?}");
}

#[test]
fn diff_tells_what_differs() {
    let place = Place::new();
    place.train(2, "a", &[]);
    place.train(1, "b", &["train.steps=11"]);
    place.train(2, "c", &["optimizer.sharding=zero1"]);
    let (a, b, c) = (place.run("a"), place.run("b"), place.run("c"));
    let same = checkpoint(&["diff", text(&a), text(&c)], 0).stdout;
    assert!(same.contains("are the same to the bit, 0 differ"), "{same}");
    let other = checkpoint(&["diff", text(&a), text(&b)], 0).stdout;
    assert!(other.contains("steps 12 and 11, samples 120 and 110") && other.contains("relative"), "{other}");
    assert!(other.contains("more (--all)"), "{other}");
}

/// A small disk, if this machine lets us mount one. It goes away with the value.
struct Disk {
    folder: tempfile::TempDir,
}

impl Disk {
    fn new(kib: usize) -> Option<Self> {
        let folder = tempfile::tempdir().expect("a folder");
        let size = format!("size={kib}k");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "tmpfs"])
            .arg(folder.path())
            .output()
            .is_ok_and(|output| output.status.success());
        if !mounted {
            eprintln!("skipped: mounting a small disk takes root");
        }
        mounted.then_some(Self { folder })
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("checkpoints")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.folder.path()).status();
    }
}

/// A save that fails for want of space is told, the last good checkpoint stays, and training goes on; when there is
/// space again, saving succeeds again.
#[test]
fn a_full_disk_costs_a_save_and_not_the_run() {
    let place = Place::new();
    place.train(2, "whole", &["train.steps=40"]);
    let bytes: u64 = fs::read_dir(place.run("whole/checkpoints/step-00000040"))
        .expect("a checkpoint")
        .map(|e| e.expect("an entry").metadata().expect("metadata").len())
        .sum();
    let kib = bytes as usize / 1024;
    let Some(disk) = Disk::new(4 * kib) else { return };
    let dir = format!("checkpoint.dir={}", disk.path().display());
    place.train(2, "run", &[&dir, "train.steps=5"]);
    // Room for half a checkpoint.
    let filler = disk.folder.path().join("filler");
    fs::write(&filler, vec![1u8; (4 * kib - kib - kib / 2) * 1024]).expect("written");
    let settings = ["train.steps=40", "checkpoint.every=5"];
    let ended =
        place.start(2, "run", &[&[dir.as_str()], &settings[..]].concat()).wait(DEADLINE).expect_code(4);
    let said = &ended.stderr;
    assert!(
        said.contains("a checkpoint could not be saved (1 of checkpoint.max_failed = 3 in a row): rank "),
        "{said}"
    );
    assert!(said.contains("No space left on device"), "{said}");
    assert!(said.contains("Training goes on; the last good one is that of step 5"), "{said}");
    assert_eq!(said.matches("error: ").count(), 1, "{said}");
    assert!(said.contains("4 saves in a row have failed") && said.contains("make room there"), "{said}");
    let left = checkpoint(&["list", "--json", text(&place.run("run"))], 0).stdout;
    let left: serde_json::Value = serde_json::from_str(&left).expect("JSON");
    assert_eq!(left[0]["step"], 5);

    // There is space again in the middle of the run.
    let running = place.start(
        2,
        "run",
        &[&[dir.as_str(), "checkpoint.max_failed=100000"], &settings[..], &["train.steps=100000"]].concat(),
    );
    until("it trains", || log(&place.run("run")).last().is_some_and(|r| r.step > 12));
    fs::remove_file(&filler).expect("removed");
    until("it has saved", || fs::read_dir(disk.path()).is_ok_and(|e| e.count() >= 2));
    until("it is beyond the other", || log(&place.run("run")).last().is_some_and(|r| r.step > 45));
    fs::write(place.run("run/STOP"), "").expect("written");
    running.wait(DEADLINE).expect_code(75);
    assert_eq!(losses(&place.run("run"))[..40], losses(&place.run("whole")));
    checkpoint(&["verify", text(&place.run("run"))], 0);
}

/// Hosts with disks of their own: each keeps its ranks' shards, and a run goes on from them together, also on another
/// number of ranks, to the bits of a shared disk.
#[test]
fn hosts_with_their_own_disks_save_and_go_on() {
    let Some(hosts) = Hosts::or_skip(2) else { return };
    let here = hosts.folder();
    small_store(&here.join("store"), 23);
    let dir = format!("checkpoint.dir={}", hosts.disk().join("checkpoints").display());
    let train = |run: &str, each: usize, more: &[&str], code: i32| {
        let mut arguments = small_model(&here.join("store"), &here.join(run));
        arguments.extend(more.iter().map(|&a| a.to_owned()));
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut command = hosts.mpirun(each, &arguments);
        Running::start(command.current_dir(here)).wait(DEADLINE).expect_code(code)
    };
    train("shared", 2, &[], 0);
    for sharding in ["optimizer.sharding=none", "optimizer.sharding=zero1"] {
        let run = sharding.rsplit('=').next().expect("a name");
        let own = [&dir, sharding, "checkpoint.every=3"];
        train(run, 2, &[&own[..], &["train.steps=7"]].concat(), 0);
        for host in ["h1", "h2"] {
            let files =
                fs::read_dir(here.join(format!("disks/{host}/checkpoints/step-00000007"))).expect("its part");
            assert_eq!(files.count(), 4, "two shards, the manifest and its digest");
        }
        train(run, 2, &own, 0);
        assert_eq!(losses(&here.join(run)), losses(&here.join("shared")));
        // On half as many ranks.
        train(run, 1, &[&own[..], &["train.steps=15"]].concat(), 0);
        // A damaged shard on one host: the checkpoint before is used, on both.
        let shard = here.join("disks/h2/checkpoints/step-00000015/rank-00001-of-00002.safetensors");
        let mut bytes = fs::read(&shard).expect("a shard");
        let middle = bytes.len() / 2;
        bytes[middle] ^= 4;
        fs::write(&shard, &bytes).expect("damaged");
        let said = train(run, 2, &[&own[..], &["train.steps=16"]].concat(), 0).stderr;
        assert!(
            said.contains("passed over a checkpoint") && said.contains("going on from step 12"),
            "{said}"
        );
        for host in ["h1", "h2"] {
            fs::remove_dir_all(here.join(format!("disks/{host}/checkpoints"))).expect("removed");
        }
    }
}

/// Numbers that look random, from a seed that is printed.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// Process numbers of the ranks that an mpirun has started.
fn ranks_of(mpirun: u32) -> Vec<String> {
    let children = fs::read_to_string(format!("/proc/{mpirun}/task/{mpirun}/children")).unwrap_or_default();
    let is_rank =
        |pid: &&str| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|c| c.trim() == "repa-dist");
    children.split_whitespace().filter(is_rank).map(str::to_owned).collect()
}

/// A random rank is killed at a random moment, most often while a checkpoint is being saved, again and again: every
/// checkpoint that is listed can be read, no more than a few are there, and the run comes out with the bits of one
/// that nobody touched.
#[test]
fn killed_ranks_lose_nothing_but_time() {
    let kills: usize = std::env::var("REPA_KILLS").map_or(20, |n| n.parse().expect("REPA_KILLS is a number"));
    let seed = std::env::var("REPA_SEED").map_or(0x9E37_79B9_7F4A_7C15, |n| n.parse().expect("a number"));
    println!("seed {seed} (REPA_SEED)");
    let mut random = Random(seed);
    let place = Place::new();
    // A kill leaves some three steps done, on a slow machine five.
    let last = 300 + 4 * kills;
    let total = format!("train.steps={last}");
    let settings = [
        "model.hidden_size=64",
        "checkpoint.every=2",
        "checkpoint.keep=2",
        "optimizer.sharding=zero1",
        total.as_str(),
    ];
    place.train(2, "whole", &[&settings[..], &["checkpoint.every=0"]].concat());
    let run = place.run("run");
    let partial = || {
        fs::read_dir(run.join("checkpoints")).is_ok_and(|mut e| {
            e.any(|e| e.is_ok_and(|e| e.file_name().to_string_lossy().ends_with("partial")))
        })
    };
    let mut slowest = Duration::ZERO;
    for kill in 0..kills {
        let before = log(&run).last().map_or(0, |r| r.step);
        let started = Instant::now();
        let mut running = place.start(2, "run", &settings);
        until("it gets on", || running.has_ended() || log(&run).last().map_or(0, |r| r.step) > before + 1);
        slowest = slowest.max(started.elapsed());
        if kill % 4 == 0 {
            std::thread::sleep(Duration::from_millis(random.below(150)));
        } else {
            until("it saves", || running.has_ended() || partial());
            std::thread::sleep(Duration::from_micros(random.below(3000)));
        }
        let ranks = ranks_of(running.id());
        assert!(
            !running.has_ended() && ranks.len() == 2,
            "it ended before it was killed: fewer steps a kill?"
        );
        let victim = &ranks[random.below(2) as usize];
        assert!(Command::new("kill").args(["-s", "KILL", victim]).status().expect("kill runs").success());
        assert_ne!(running.wait(Duration::from_secs(20)).code, Some(0));

        let found = steps(&run);
        if !found.is_empty() {
            checkpoint(&["verify", text(&run)], 0);
        }
        // Those that are kept, one that is being removed, one that is new, and one that is not complete.
        let entries = fs::read_dir(run.join("checkpoints")).map_or(0, Iterator::count);
        assert!(found.len() <= 3 && entries <= 5, "{entries} entries, complete are {found:?}");
    }
    println!("slowest start after a kill: {slowest:?} to the second step");
    place.train(2, "run", &settings);
    assert_eq!(losses(&run), losses(&place.run("whole")));
    let newest = |run: &Path| run.join(format!("checkpoints/step-{last:08}"));
    let same = checkpoint(&["diff", text(&newest(&run)), text(&newest(&place.run("whole")))], 0).stdout;
    assert!(same.contains("are the same to the bit, 0 differ"), "{same}");
}
