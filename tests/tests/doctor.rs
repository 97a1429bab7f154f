//! `repa-dist doctor`: a page for hosts that are well, and a line with what to do for each thing that is not. Some 50 s
//! on two cores. What takes namespaces is skipped, with a reason, where the tests do not run as root.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use repa_tests::hosts::Hosts;
use repa_tests::{Ended, Running, binary, mpirun, repa_dist, run_in, small_model, small_store};
use serde_json::Value;

const DEADLINE: Duration = Duration::from_secs(100);

struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        small_store(&folder.path().join("store"), 12);
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn arguments(&self, more: &[&str]) -> Vec<String> {
        let mut arguments = vec!["doctor".to_owned(), "--quick".to_owned()];
        arguments.extend(small_model(&self.path("store"), &self.path("run")));
        arguments.extend(more.iter().map(|&a| a.to_owned()));
        arguments
    }

    fn command(&self, more: &[&str]) -> Command {
        let arguments = self.arguments(more);
        repa_dist(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn doctor(&self, more: &[&str]) -> Ended {
        Running::start(&mut self.command(more)).wait(DEADLINE)
    }

    /// Runs doctor on a host that something is wrong with: exit code 4, and an error that says this and what to do.
    #[track_caller]
    fn fails(&self, more: &[&str], topic: &str, found: &str) -> Value {
        let mut command = self.command(more);
        is_told(&mut command, "error", topic, found)
    }
}

/// Runs doctor: one line of a topic says this, and what to do about it.
#[track_caller]
fn is_told(command: &mut Command, state: &str, topic: &str, found: &str) -> Value {
    let code = if state == "error" { 4 } else { 0 };
    let ended = Running::start(command.arg("--json")).wait(DEADLINE).expect_code(code);
    let page = read(&ended);
    let line = line(&page, topic, found);
    assert_eq!(line["state"], state, "{line}");
    assert!(line["fix"].as_str().is_some_and(|fix| fix.len() > 10), "{line}");
    if code != 0 {
        assert!(ended.stderr.contains("error: doctor has found"), "{}", ended.stderr);
    }
    page
}

#[track_caller]
fn read(ended: &Ended) -> Value {
    serde_json::from_str(&ended.stdout).unwrap_or_else(|e| panic!("{e}:\n{}\n{}", ended.stdout, ended.stderr))
}

#[track_caller]
fn line(page: &Value, topic: &str, found: &str) -> Value {
    let lines = page["lines"].as_array().expect("lines");
    let is_it = |line: &&Value| {
        line["topic"] == topic && line["found"].as_str().is_some_and(|text| text.contains(found))
    };
    lines.iter().find(is_it).unwrap_or_else(|| panic!("no {topic:?} with {found:?} in\n{page:#}")).clone()
}

fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0)
}

/// Doctor in a mount namespace of its own, after a shell line as root; None, with a reason, elsewhere.
fn apart(before: &str, doctor: &Command) -> Option<Command> {
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &format!("{before} && exec \"$@\"")]);
    command.arg("sh").arg(doctor.get_program()).args(doctor.get_args());
    let can =
        || Command::new("unshare").args(["--mount", "true"]).status().is_ok_and(|status| status.success());
    if is_root() && can() {
        return Some(command);
    }
    eprintln!("skipped: mount namespaces take root");
    None
}

#[test]
fn a_host_that_is_well_has_a_page_without_errors() {
    let place = Place::new();
    let page = place.doctor(&[]).expect_code(0).stdout;
    for part in [
        "ok       MPI",
        "thread level MULTIPLE; mpirun ",
        "mpirun -n 2: started and ended in",
        "summed 4 MiB in",
        "run (not there yet) on",
        "a checkpoint:",
        "12 samples in 1 shard, ",
        "2 ranks will take some",
        "/dev/shm: ",
        "127.0.0.1:",
    ] {
        assert!(page.contains(part), "no {part:?} in\n{page}");
    }
    let last = page.lines().last().expect("a last line");
    assert!(last == "all is well" || last.starts_with("no errors, "), "{page}");
    assert!(page.lines().all(|line| line.chars().count() <= 100), "too wide:\n{page}");
    assert!(!page.contains('\x1b'), "colours in a file:\n{page}");
    assert!(!place.path("run").exists(), "it makes no run folder");
    assert_eq!(fs::read_dir(place.folder.path()).expect("read").count(), 1, "only the store is there");
}

#[test]
fn programs_read_the_page_as_json() {
    let page = read(&Place::new().doctor(&["--json", "--ranks", "3"]).expect_code(0));
    assert_eq!(page["ranks"], 3);
    assert_eq!(page["errors"], 0);
    assert_eq!(page["hosts"].as_array().expect("hosts").len(), 1);
    let lines = page["lines"].as_array().expect("lines");
    assert!(lines.len() > 12, "{page:#}");
    for line in lines {
        let state = line["state"].as_str().expect("a state");
        assert!(["ok", "warning", "error", "absent"].contains(&state), "{line}");
        assert_eq!(line["fix"].is_string(), ["warning", "error"].contains(&state), "{line}");
    }
}

#[test]
fn what_is_wrong_with_folders_is_told() {
    let place = Place::new();
    place.fails(&["run.dir=/proc/run"], "run folder", "/proc/run cannot be written");
    place.fails(&["checkpoint.dir=/proc/saved"], "checkpoints", "/proc/saved cannot be written");
    let inside = format!("run.dir={}", place.path("store/index.json/run").display());
    place.fails(&[&inside], "run folder", "is a file");
    // What is missing can still be made; what is damaged cannot be used.
    let nowhere = place.path("nowhere");
    let missing = format!("data.dir={}", nowhere.display());
    is_told(&mut place.command(&[&missing]), "warning", "data", "no data set at");
    fs::create_dir(&nowhere).expect("made");
    fs::write(nowhere.join("index.json"), "{").expect("written");
    place.fails(&[&missing], "data", "nowhere");
}

#[test]
fn a_small_disk_is_told() {
    let place = Place::new();
    let run = place.path("run");
    fs::create_dir(&run).expect("made");
    for (options, found) in [("size=1m", "a checkpoint takes"), ("nr_inodes=6", "free inodes")] {
        let mount = format!("mount -t tmpfs -o {options} tmpfs {}", run.display());
        let Some(mut doctor) = apart(&mount, &place.command(&[])) else { return };
        is_told(&mut doctor, "error", "run folder", found);
    }
    // Room for one checkpoint, and not for those that are kept.
    let mount = format!("mount -t tmpfs -o size=3m tmpfs {}", run.display());
    let Some(mut doctor) = apart(&mount, &place.command(&["checkpoint.keep=20"])) else { return };
    is_told(&mut doctor, "warning", "run folder", "the checkpoints that are kept will take");
}

#[test]
fn segments_of_ranks_that_are_gone_are_told() {
    let place = Place::new();
    let before = "mount -t tmpfs tmpfs /dev/shm && head -c 1000000 /dev/zero >/dev/shm/vader_segment.h.0.abc0001.0 && \
                  touch -d '1 hour ago' /dev/shm/vader_segment.h.0.abc0001.0";
    let Some(mut doctor) = apart(before, &place.command(&[])) else { return };
    let page =
        is_told(&mut doctor, "warning", "shared memory", "1 segment in /dev/shm of processes that are gone");
    let fix = line(&page, "shared memory", "gone")["fix"].clone();
    assert_eq!(fix, "rm /dev/shm/vader_segment.h.0.abc0001.*");
    let before = "mount -t tmpfs -o size=4m tmpfs /dev/shm";
    let Some(mut doctor) = apart(before, &place.command(&["--ranks=4"])) else { return };
    is_told(&mut doctor, "error", "shared memory", "4 ranks share some");
}

#[test]
fn ports_that_are_taken_are_told() {
    let place = Place::new();
    // An address that no other test listens on. Whatever cannot be bound here is taken already.
    let bind = "127.83.19.4";
    let _one = TcpListener::bind((bind, 9400));
    let at = format!("telemetry.bind={bind}");
    is_told(&mut place.command(&[&at]), "warning", "metrics ports", "ranks will take 9401 to 9402");
    let _rest: Vec<_> = (9401..9480).map(|port| TcpListener::bind((bind, port))).collect();
    place.fails(&[&at], "metrics ports", "none of 127.83.19.4:9400 to 9464 is free");
    place.fails(&["telemetry.bind=192.0.2.77"], "metrics ports", "192.0.2.77:9400");
}

#[test]
fn limits_that_are_set_are_told() {
    let place = Place::new();
    let limited = |limits: &str| {
        let doctor = place.command(&[]);
        let mut command = Command::new("sh");
        command.args(["-c", &format!("{limits} && exec \"$@\""), "sh"]);
        command.arg(doctor.get_program()).args(doctor.get_args());
        command
    };
    // In blocks of 512 bytes: less than half of a checkpoint.
    is_told(&mut limited("ulimit -f 400"), "error", "file size", "limited to 200 KiB");
    is_told(&mut limited("ulimit -n 200"), "error", "open files", "a rank needs some");
    is_told(&mut limited("ulimit -n 1000"), "warning", "open files", "1000");
}

#[test]
fn a_gpu_that_is_not_there_is_told() {
    if Path::new("/proc/driver/nvidia").exists() {
        eprintln!("skipped: there is a GPU here");
        return;
    }
    Place::new().fails(&["device=cuda:0"], "GPU", "device=cuda:0, and there is no NVIDIA GPU");
}

/// NVIDIA's management library, as far as it is asked: two GPUs, of which the second is at work.
const DRIVER: &str = r#"
#include <string.h>
struct memory { unsigned version; unsigned long long total, reserved, free, used; };
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned length) { strncpy(text, "550.54.15", length); return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 12040; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = (void *)(index + 1L); return 0; }
int nvmlDeviceGetName(void *device, char *text, unsigned length) { strncpy(text, "Stand-in", length); return 0; }
int nvmlDeviceGetMemoryInfo_v2(void *device, struct memory *m) {
    m->total = 80ULL << 30; m->used = 3ULL << 30; m->free = 77ULL << 30; return 0;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, char *processes) {
    if (device == (void *)1) { *count = 0; return 0; }
    if (!processes) { *count = 1; return 7; }
    memset(processes, 0, 24); *count = 1; return 0;
}
"#;

#[test]
fn gpus_of_a_pretended_driver_are_told() {
    let place = Place::new();
    let (source, folder) = (place.path("driver.c"), place.path("lib"));
    fs::write(&source, DRIVER).expect("written");
    fs::create_dir(&folder).expect("made");
    let mut compile = Command::new("cc");
    compile.args(["-shared", "-fPIC", "-o"]).arg(folder.join("libnvidia-ml.so.1")).arg(&source);
    run_in(place.folder.path(), compile, DEADLINE);
    let doctor = |more: &[&str]| {
        let mut command = place.command(more);
        command.env("LD_LIBRARY_PATH", &folder);
        command
    };
    let busy = "2 x Stand-in (80.0 GiB), driver 550.54.15, CUDA up to 12.4; used already: GPU 1 by 1 process (3.0 GiB)";
    is_told(&mut doctor(&[]), "warning", "GPU", busy);
    // The binary under test is built without CUDA.
    is_told(&mut doctor(&[]), "warning", "CUDA", "built without CUDA");
    let page = is_told(&mut doctor(&["device=cuda"]), "error", "CUDA", "built without CUDA");
    assert_eq!(page["ranks"], 2, "one for each GPU");
    is_told(
        &mut doctor(&["device=cuda", "--ranks=3"]),
        "error",
        "device",
        "3 ranks on this host, and 2 GPUs",
    );
}

#[test]
fn an_object_store_that_does_not_answer_is_told() {
    let place = Place::new();
    let mut command = place.command(&["checkpoint.dir=s3://bucket/run"]);
    command
        .env("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        .env("AWS_ALLOW_HTTP", "true")
        .env("AWS_ACCESS_KEY_ID", "a")
        .env("AWS_SECRET_ACCESS_KEY", "b")
        .env("AWS_REGION", "us-east-1");
    let started = Instant::now();
    is_told(&mut command, "error", "checkpoints", "s3://bucket/run");
    assert!(started.elapsed() < Duration::from_secs(40), "{:?}", started.elapsed());
}

/// A folder that stands in for the path, with an mpirun that is this script.
fn path_with(place: &Place, script: &str) -> String {
    let folder = place.path("bin");
    fs::create_dir_all(&folder).expect("made");
    let file = folder.join("mpirun");
    fs::write(&file, format!("#!/bin/sh\n{script}\n")).expect("written");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).expect("set");
    folder.display().to_string()
}

#[test]
fn an_mpi_that_does_not_start_ranks_is_told() {
    let place = Place::new();
    let empty = place.path("empty");
    fs::create_dir(&empty).expect("made");
    let page = is_told(place.command(&[]).env("PATH", &empty), "error", "MPI", "mpirun is not on the PATH");
    assert_eq!(line(&page, "transports", "")["state"], "absent");

    // MPI's start ends its process.
    is_told(place.command(&[]).env("OMPI_MCA_pml", "nonsense"), "error", "ranks", "mpirun -n 2: ");

    let other = path_with(
        &place,
        "[ $1 = --version ] && { echo 'HYDRA build details: Version: 4.2'; exit; }\nexit 1",
    );
    let page = is_told(place.command(&[]).env("PATH", other), "error", "ranks", "exit code 1");
    assert_eq!(line(&page, "MPI", "they differ")["state"], "warning");
}

#[test]
fn an_mpirun_that_hangs_is_ended() {
    let place = Place::new();
    let script = "[ \"$1\" = --version ] && { echo 'mpirun (Open MPI) 4.1.4'; exit; }\n\
                  /usr/bin/setsid /bin/sleep 9876 &\nexec /bin/sleep 9876";
    let path = path_with(&place, script);
    is_told(place.command(&[]).env("PATH", path), "error", "ranks", "were not done within");
    let left = fs::read_dir("/proc").expect("processes").flatten().filter(|entry| {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        line == b"/bin/sleep\x009876\x00"
    });
    assert_eq!(left.count(), 0, "what it started is left");
}

#[test]
fn ranks_of_a_job_print_one_page() {
    let place = Place::new();
    let arguments = place.arguments(&[]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let page = Running::start(&mut mpirun(2, &arguments)).wait(DEADLINE).expect_code(0).stdout;
    assert_eq!(page.matches("2 ranks on 1 host, started by mpirun; summed").count(), 1, "{page}");
    assert_eq!(page.matches("run folder").count(), 1, "{page}");
    assert!(!page.contains('\x1b') && (page.contains("no errors") || page.contains("all is well")), "{page}");

    // MPI's start ends its process, and mpirun the others; the page comes first.
    let ended = Running::start(mpirun(2, &arguments).env("OMPI_MCA_pml", "nonsense")).wait(DEADLINE);
    assert!(ended.code != Some(0) && ended.stdout.matches("MPI does not start").count() == 1, "{ended:?}");

    let bad = [&arguments[..], &["run.dir=/proc/run"]].concat();
    let ended = Running::start(&mut mpirun(2, &bad)).wait(DEADLINE).expect_code(4);
    assert_eq!(ended.stdout.matches("/proc/run cannot be written").count(), 1, "{}", ended.stdout);
    assert_eq!(ended.stderr.matches("error: doctor has found").count(), 1, "{}", ended.stderr);
}

#[test]
fn hosts_of_a_job_share_a_page() {
    let Some(hosts) = Hosts::or_skip(2) else { return };
    small_store(&hosts.folder().join("store"), 12);
    let mut arguments = vec!["doctor".to_owned(), "--quick".into(), "--json".into()];
    arguments.extend(small_model(&hosts.folder().join("store"), &hosts.folder().join("run")));
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut command = hosts.mpirun(2, &arguments);
    let ended = Running::start(command.current_dir(hosts.folder())).wait(DEADLINE).expect_code(0);
    let page = read(&ended);
    assert_eq!(page["hosts"], serde_json::json!(["h1", "h2"]));
    assert_eq!(line(&page, "ranks", "4 ranks on 2 hosts")["state"], "ok");
    assert_eq!(line(&page, "clocks", "agree")["state"], "ok");
    assert!(
        line(&page, "interfaces", "eth0 10.77.0.1").get("hosts").is_none(),
        "they differ in figures alone"
    );
    assert_eq!(line(&page, "host name", "h1 is 10.77.0.1")["state"], "ok");
    assert_eq!(line(&page, "metrics ports", "for itself alone")["state"], "warning");
    let once =
        page["lines"].as_array().expect("lines").iter().filter(|line| line["topic"] == "memory").count();
    assert_eq!(once, 1, "{page:#}");
}

#[test]
fn a_run_folder_brings_its_settings() {
    let place = Place::new();
    let mut train = small_model(&place.path("store"), &place.path("run"));
    train.push("train.steps=2".into());
    run_in(place.folder.path(), repa_dist(&train.iter().map(String::as_str).collect::<Vec<_>>()), DEADLINE);
    let moved = place.path("moved run");
    fs::rename(place.path("run"), &moved).expect("moved");
    let doctor = |more: &[&str]| {
        let mut command = Command::new(binary());
        Running::start(command.arg("doctor").arg("--quick").args(more)).wait(DEADLINE)
    };
    let text = moved.to_str().expect("UTF-8");
    let page = doctor(&[text]).expect_code(0).stdout;
    assert!(page.contains(&format!("run.dir={text}")) && page.contains("12 samples"), "{page}");
    assert!(!page.contains("not there yet"), "{page}");
    let nowhere = place.path("store");
    doctor(&[nowhere.to_str().expect("UTF-8")])
        .expect_code(2)
        .expect_error(&["no run folder", "config.toml"]);
    doctor(&[text, "--config", "x.toml"]).expect_code(2).expect_error(&["leave --config out"]);
    doctor(&["train.step=5"]).expect_code(2).expect_error(&["unknown key \"train.step\""]);
    doctor(&["--ranks=0"]).expect_code(2).expect_error(&["--ranks must be above 0"]);
}
