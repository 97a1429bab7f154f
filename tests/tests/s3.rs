//! Checkpoints in S3, end to end, under real mpirun and against a real server (SeaweedFS). Some 25 s on two cores, and
//! the time that the package takes to come the first time. Skipped where it cannot be had; a reason is printed.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use repa_tests::s3::{BUCKET, Server};
use repa_tests::{Ended, Running, log, loss_difference, mpirun, repa_dist, small_model, small_store};

const DEADLINE: Duration = Duration::from_secs(120);

struct Place {
    folder: tempfile::TempDir,
    server: Server,
}

impl Place {
    fn new() -> Option<Self> {
        let server = Server::start()?;
        let folder = tempfile::tempdir().expect("a folder");
        small_store(&folder.path().join("store"), 23);
        Some(Self { folder, server })
    }

    fn run(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Trains, with the environment that `change` makes of the right one.
    fn start(&self, ranks: usize, run: &Path, more: &[&str], change: impl Fn(&mut Command)) -> Ended {
        let mut arguments = small_model(&self.folder.path().join("store"), run);
        arguments.extend(more.iter().map(|&argument| argument.to_owned()));
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut command = mpirun(ranks, &arguments);
        change(self.server.reached_by(&mut command));
        Running::start(&mut command).wait(DEADLINE)
    }

    fn train(&self, ranks: usize, run: &Path, more: &[&str]) -> Ended {
        self.start(ranks, run, more, |_| ()).expect_code(0)
    }

    fn checkpoint(&self, arguments: &[&str]) -> Ended {
        let mut command = repa_dist(&["checkpoint"]);
        command.args(arguments).current_dir(self.folder.path());
        Running::start(self.server.reached_by(&mut command)).wait(DEADLINE)
    }

    /// Steps of the complete checkpoints that `checkpoint list` tells of.
    fn steps(&self, location: &str) -> Vec<u64> {
        let listed = self.checkpoint(&["list", location, "--json"]).expect_code(0);
        let rows: serde_json::Value = serde_json::from_str(&listed.stdout).expect("JSON");
        let rows = rows.as_array().expect("a list");
        assert!(
            rows.iter().all(|row| row["state"] == "complete" && row["age_seconds"].is_number()),
            "{rows:?}"
        );
        rows.iter().filter_map(|row| row["step"].as_u64()).collect()
    }
}

#[test]
fn a_run_is_saved_resumed_and_repaired_in_s3() {
    let Some(place) = Place::new() else { return };
    let url = format!("s3://{BUCKET}/runs/one");
    let (dir, one) = (format!("checkpoint.dir={url}"), place.run("one"));
    place.train(2, &place.run("local"), &[]);
    place.train(2, &one, &[&dir, "train.steps=5", "checkpoint.every=2"]);
    assert_eq!(place.steps(&url), [4, 5], "checkpoint.keep = 2");
    // On another world size it goes on along the same curve.
    place.train(3, &one, &[&dir, "checkpoint.every=5"]);
    let difference = loss_difference(&log(&place.run("local")), &log(&one));
    assert!(difference < 1e-4, "losses differ by {difference:.2e}");
    assert!(!one.join("checkpoints").exists());
    assert_eq!(place.steps(&url), [10, 12]);
    assert_eq!(place.steps(one.to_str().expect("a path")), [10, 12], "the run's config.toml says where");
    let keys = place.server.keys("runs/one/");
    assert_eq!(keys.len(), 2 * (3 + 2), "nothing else is left: {keys:?}");
    let sound = place.checkpoint(&["verify", &url]).expect_code(0);
    assert_eq!(sound.stdout.matches("sound").count(), 2, "{}", sound.stdout);

    // What else takes a checkpoint takes it from there.
    let newest = format!("{url}/step-00000012");
    place.checkpoint(&["export", "--checkpoint", &newest, "--out", "w.safetensors"]).expect_code(0);
    let same = place.checkpoint(&["diff", &newest, &url]).expect_code(0);
    assert!(same.stdout.contains(" 0 differ"), "{}", same.stdout);
    let from = format!("{url}/step-00000010");
    place.train(2, &place.run("two"), &["--resume", &from]);
    assert_eq!(log(&place.run("two")).iter().map(|r| r.step).collect::<Vec<_>>(), [11, 12]);
    let init = format!("run.init_from={url}");
    let said = place.train(2, &place.run("three"), &[&init, "train.steps=1"]);
    assert!(said.stderr.contains("start from"), "{}", said.stderr);

    // A bit flips on the server.
    let shard = "runs/one/step-00000012/rank-00001-of-00003.safetensors";
    let mut bytes = place.server.get(shard);
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    place.server.put(shard, &bytes);
    place.checkpoint(&["verify", &newest]).expect_code(3).expect_error(&["rank-00001-of-00003", "digest"]);
    let passed = place.train(2, &one, &[&dir, "train.steps=14"]);
    assert!(passed.stderr.contains("passed over"), "{}", passed.stderr);
    assert_eq!(log(&one).last().map(|r| r.step), Some(14));
    place.checkpoint(&["verify", &format!("{url}/step-00000014")]).expect_code(0);
}

/// The process dies between its shards and the manifest, and comes to the same step again.
#[test]
fn what_a_killed_save_has_left_is_cleared_away() {
    let Some(place) = Place::new() else { return };
    let url = format!("s3://{BUCKET}/run");
    let (dir, run) = (format!("checkpoint.dir={url}"), place.run("run"));
    place.train(2, &run, &[&dir, "train.steps=4", "checkpoint.every=2"]);
    place.server.delete("run/step-00000004/manifest.json");
    place.server.put("run/step-00000004/rank-00000-of-00005.safetensors.upload", b"an upload that is gone");
    let listed = place.checkpoint(&["list", &url]).expect_code(0);
    assert!(listed.stdout.contains("unfinished"), "{}", listed.stdout);
    let said = place.train(2, &run, &[&dir, "train.steps=4"]);
    assert!(said.stderr.contains("cleared away"), "{}", said.stderr);
    assert_eq!(place.steps(&url), [2, 4]);
    assert_eq!(place.server.keys("run/").len(), 2 * (2 + 2));
    // Back to a step: the later one is out of the list until the run comes there again.
    let said = place.train(2, &run, &[&dir, "--resume", "2", "train.steps=3"]);
    assert!(said.stderr.contains("manifest.json.set-aside"), "{}", said.stderr);
    assert_eq!(place.steps(&url), [2, 3]);
    place.train(2, &run, &[&dir, "train.steps=4"]);
    assert_eq!(place.steps(&url), [3, 4]);
    assert_eq!(place.server.keys("run/").len(), 2 * (2 + 2));
}

#[test]
fn what_cannot_be_reached_is_said_once() {
    let Some(place) = Place::new() else { return };
    let fails = |dir: &str, code: i32, message: &[&str], change: &dyn Fn(&mut Command)| {
        let dir = format!("checkpoint.dir={dir}");
        let ended =
            place.start(2, &place.run("run"), &[&dir], change).expect_code(code).expect_error(message);
        let said = ended.stderr.lines().filter(|line| line.starts_with("error: ")).count();
        assert_eq!(said, 1, "one cause, one message:\n{}", ended.stderr);
        assert!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
    };
    let url = format!("s3://{BUCKET}/x");
    fails(&url, 4, &["no connection to http://127.0.0.1:1", "AWS_ENDPOINT_URL"], &|command| {
        command.env("AWS_ENDPOINT_URL", "http://127.0.0.1:1");
    });
    fails("s3://missing/x", 2, &["no bucket \"missing\"", "create it"], &|_| ());
    fails(&url, 2, &["AWS_SECRET_ACCESS_KEY", BUCKET], &|command| {
        command.env("AWS_SECRET_ACCESS_KEY", "wrong");
    });
    fails(&url, 2, &["AWS_ALLOW_HTTP=true"], &|command| {
        command.env_remove("AWS_ALLOW_HTTP");
    });
    fails("s3:/test/x", 2, &["checkpoint.dir", "s3://BUCKET/PREFIX"], &|_| ());
    fails("s3://", 2, &["checkpoint.dir", "s3://BUCKET/PREFIX"], &|_| ());
    place.checkpoint(&["list", "s3://missing/x"]).expect_code(2).expect_error(&["no bucket"]);
    place.checkpoint(&["verify", &url]).expect_code(3).expect_error(&["holds no checkpoints"]);
}
