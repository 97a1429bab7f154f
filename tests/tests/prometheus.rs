//! The ranks' metrics, our Prometheus configuration, rules and dashboards, under a real Prometheus. Some 40 s on two
//! cores. Without Debian's package prometheus the tests are skipped, and say so.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use repa_tests::prometheus::{Prometheus, exchange, get, missing, status};
use repa_tests::{Running, log, mpirun, repa_dist, run_in, small_model, small_store};
use serde_json::Value;

const DEADLINE: Duration = Duration::from_secs(180);
const RANKS: usize = 4;
/// Window over which throughput is compared.
const WINDOW: Duration = Duration::from_secs(20);

/// What is empty in a run on CPUs in float32 that goes well, and why. An expression may be empty if it holds one of
/// these.
const EMPTY_IN_THIS_RUN: [(&str, &str); 7] = [
    ("repa_gpu_", "no GPU"),
    ("repa_mfu_ratio", "telemetry.peak_tflops is not set"),
    ("repa_loss_scale", "float32 needs none"),
    ("repa_encoder_seconds", "the store holds the features"),
    ("ALERTS{", "no alert fires"),
    ("repa_checkpoint_failures", "no save fails"),
    ("repa_node_ranks_missing", "each rank has an endpoint of its own"),
];

fn may_be_empty(expression: &str) -> bool {
    EMPTY_IN_THIS_RUN.iter().any(|(part, _)| expression.contains(part))
}

fn dashboards() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../dashboards")
}

/// Waits until there is something.
#[track_caller]
fn wait_for<T>(what: &str, deadline: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begun.elapsed() < deadline, "no {what} after {deadline:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn promtool(folder: &Path, arguments: &[&str]) {
    let mut command = Command::new("promtool");
    command.args(arguments);
    run_in(folder, command, DEADLINE);
}

#[test]
fn rules_are_sound_and_alerts_fire_where_they_should() {
    if let Some(reason) = missing() {
        return println!("skipped: {reason}");
    }
    let folder = dashboards().join("prometheus");
    promtool(&folder, &["check", "config", "prometheus.yml"]);
    promtool(&folder, &["check", "rules", "rules.yml", "alerts.yml"]);
    promtool(&folder, &["test", "rules", "tests.yml"]);
}

#[test]
fn the_command_keeps_what_was_changed() {
    let folder = tempfile::tempdir().expect("a folder");
    let write = |more: &[&str]| {
        let mut command = repa_dist(&["dashboards", "monitoring", "--run", "runs/mine"]);
        Running::start(command.args(more).current_dir(&folder)).wait(DEADLINE)
    };
    let said = write(&[]).expect_code(0).stdout;
    assert!(said.contains("wrote 11 files to monitoring"), "{said}");
    write(&[]).expect_code(0);
    let config = folder.path().join("monitoring/prometheus/prometheus.yml");
    let text = std::fs::read_to_string(&config).expect("a configuration");
    assert!(text.contains("/runs/mine/prometheus-targets.json\"\n"), "{text}");
    std::fs::write(&config, "scrape_configs: []\n").expect("written");
    write(&[]).expect_code(2).expect_error(&["prometheus.yml", "--force"]);
    assert_eq!(std::fs::read_to_string(&config).expect("text"), "scrape_configs: []\n");
    write(&["--force"]).expect_code(0);
    assert_eq!(std::fs::read_to_string(&config).expect("text"), text);
}

/// A run of four ranks that goes on until it is stopped, seen by a Prometheus with the files that `repa-dist
/// dashboards` writes.
struct Watched {
    folder: tempfile::TempDir,
    run: PathBuf,
    training: Running,
    prometheus: Prometheus,
}

impl Watched {
    fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let (store, run) = (folder.path().join("store"), folder.path().join("runs/small"));
        small_store(&store, 23);
        let mut arguments = small_model(&store, &run);
        // Larger than others, so that little of the time is between steps; saves by the clock, however slow the steps.
        let more = ["train.steps=100000000", "train.global_batch=40", "checkpoint.every_minutes=0.05"];
        arguments.extend(more.map(str::to_owned));
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let training = Running::start(&mut mpirun(RANKS, &arguments));
        let written = folder.path().join("monitoring");
        let mut command = repa_dist(&["dashboards"]);
        command.arg(&written).arg("--run").arg(&run);
        run_in(folder.path(), command, DEADLINE);
        // Every second, so that a short run gives enough samples.
        let config = written.join("prometheus/prometheus.yml");
        let text = std::fs::read_to_string(&config).expect("a configuration");
        let faster = text.replace("interval: 5s", "interval: 1s");
        assert_eq!(faster.matches("interval: 1s").count(), 3, "{faster}");
        std::fs::write(&config, faster).expect("written");
        let prometheus = Prometheus::start(&config, &folder.path().join("tsdb"));
        Self { folder, run, training, prometheus }
    }

    /// Where a rank serves its metrics.
    fn address(&self, rank: usize) -> SocketAddr {
        let text = std::fs::read_to_string(self.run.join("prometheus-targets.json")).expect("a target file");
        let groups: Value = serde_json::from_str(&text).expect("JSON");
        groups[0]["targets"][rank].as_str().expect("an address").parse().expect("an address")
    }

    /// The median step time while something is done.
    fn step_time(&self, during: impl FnOnce()) -> f64 {
        let before = log(&self.run).len();
        during();
        let mut times: Vec<f64> = log(&self.run)[before..].iter().map(|r| r.step_seconds).collect();
        assert!(times.len() > 10, "only {} steps", times.len());
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    }

    /// The expressions and names that have no data yet, though they should.
    fn empty<'a>(&self, expressions: impl Iterator<Item = &'a String>) -> Vec<String> {
        let asked = |expression: &String| match self.prometheus.query(expression) {
            Ok(samples) if samples.is_empty() && !may_be_empty(expression) => Some(expression.clone()),
            Ok(_) => None,
            Err(error) => panic!("{expression}\n{error}"),
        };
        expressions.filter_map(asked).collect()
    }
}

/// Every expression of the dashboards, with values in place of variables.
fn panel_expressions() -> Vec<String> {
    let mut found = Vec::new();
    for name in ["training", "cluster", "reliability"] {
        let path = dashboards().join("grafana/dashboards").join(name).with_extension("json");
        let board: Value = serde_json::from_str(&std::fs::read_to_string(path).expect("text")).expect("JSON");
        for panel in board["panels"].as_array().expect("panels").iter().filter(|panel| panel["type"] != "row")
        {
            for target in panel["targets"].as_array().expect("targets") {
                let mut expression = target["expr"].as_str().expect("an expression").to_owned();
                let values = [
                    ("job", "repa-dist"),
                    ("run", "small"),
                    ("rank", ".+"),
                    ("__rate_interval", "20s"),
                    ("__range", "1m"),
                ];
                for (variable, value) in values {
                    expression = expression.replace(&format!("${variable}"), value);
                }
                let unknown =
                    expression.match_indices('$').any(|(at, _)| !expression[at + 1..].starts_with('1'));
                assert!(!unknown, "an unknown variable in {expression}");
                found.push(expression);
            }
        }
    }
    assert!(found.len() > 60, "only {} expressions", found.len());
    found
}

/// Names of metrics in an expression.
fn names(expression: &str) -> BTreeSet<String> {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    expression
        .split(|c| !word(c))
        .filter(|name| {
            *name == "up"
                || ["repa_", "process_", "run"].iter().any(|p| name.starts_with(p)) && name.contains('_')
        })
        .map(str::to_owned)
        .collect()
}

#[test]
fn prometheus_sees_a_run_and_the_run_minds_nobody() {
    if let Some(reason) = missing() {
        return println!("skipped: {reason}");
    }
    let mut watched = Watched::start();
    let prometheus = &watched.prometheus;
    wait_for("four ranks under Prometheus", DEADLINE, || {
        (prometheus.value("count(rate(repa_images_total[5s]) > 0)") == Some(RANKS as f64)).then_some(())
    });

    std::thread::sleep(WINDOW);
    throughput_agrees(&watched);
    wait_for("run that a rule has joined", DEADLINE, || {
        (prometheus.value("run:repa_ranks:count{run=\"small\"}") == Some(RANKS as f64)).then_some(())
    });

    everything_has_data(&watched);
    metrics_are_well_named(&watched);
    garbage_gets_an_error(&watched);
    slow_clients_slow_nothing(&watched);

    assert!(!watched.training.has_ended(), "training has ended by itself");
    std::fs::write(watched.run.join("STOP"), "").expect("written");
    watched.training.wait(DEADLINE).expect_code(75);
    wait_for("end of the ranks' series", DEADLINE, || {
        watched.prometheus.query("repa_step").expect("sound").is_empty().then_some(())
    });
}

/// Counters that Prometheus scraped against the log of the same steps, time for snapshots included.
fn throughput_agrees(watched: &Watched) {
    let history = |name: &str| {
        let asked = format!("{name}[{}s]", WINDOW.as_secs());
        watched.prometheus.history(&asked).expect("samples")
    };
    let ends = |samples: &[(f64, f64)]| (samples[0], samples[samples.len() - 1]);
    let rate = |samples: &Vec<(f64, f64)>| {
        let (first, last) = ends(samples);
        (last.1 - first.1) / (last.0 - first.0)
    };
    let images = history("repa_images_total");
    assert_eq!(images.len(), RANKS);
    let seen: f64 = images.iter().map(rate).sum();
    let (first, last) = ends(&history("repa_step{rank=\"0\"}")[0]);
    let records = log(&watched.run);
    let records = records.iter().filter(|r| r.step as f64 > first.1 && r.step as f64 <= last.1);
    let (images, seconds) = records.fold((0.0, 0.0), |(images, seconds), r| {
        (images + r.images_per_second * r.step_seconds, seconds + r.step_seconds + r.snapshot_seconds)
    });
    let own = images / seconds;
    assert!((seen / own - 1.0).abs() < 0.05, "Prometheus sees {seen:.1} images/s, the run {own:.1}");
}

/// Every panel and recording rule, and every metric that an alert asks for.
fn everything_has_data(watched: &Watched) {
    let groups = watched.prometheus.api("rules").expect("rules");
    let rules: Vec<&Value> = groups["groups"]
        .as_array()
        .expect("groups")
        .iter()
        .flat_map(|group| group["rules"].as_array().expect("rules"))
        .collect();
    let mut asked = panel_expressions();
    for rule in rules {
        assert_eq!(rule["health"], "ok", "{rule:#}");
        let expression = rule["query"].as_str().expect("a query");
        asked.extend(names(expression));
        if rule["type"] == "recording" {
            asked.push(expression.to_owned());
            asked.push(rule["name"].as_str().expect("a name").to_owned());
        }
    }
    assert!(asked.iter().filter(|e| e.contains(':')).count() > 20, "rules are missing");
    // Some come with the first checkpoint or after some steps.
    let begun = Instant::now();
    let mut empty = watched.empty(asked.iter());
    while !empty.is_empty() && begun.elapsed() < DEADLINE {
        std::thread::sleep(Duration::from_secs(1));
        empty = watched.empty(empty.iter());
    }
    assert!(empty.is_empty(), "no data for\n{}", empty.join("\n"));
}

fn metrics_are_well_named(watched: &Watched) {
    for rank in [0, RANKS - 1] {
        let page = get(watched.address(rank), "/metrics", Duration::from_secs(5)).expect("metrics");
        let path = watched.folder.path().join("metrics.txt");
        std::fs::write(&path, &page).expect("written");
        let mut promtool = Command::new("sh");
        promtool.arg("-c").arg("promtool check metrics < \"$0\"").arg(&path);
        let said = Running::start(&mut promtool).wait(DEADLINE);
        assert_eq!(said.code, Some(0), "rank {rank}:\n{}{}", said.stdout, said.stderr);
    }
}

fn garbage_gets_an_error(watched: &Watched) {
    let long = [b"GET / HTTP/1.1\r\nX: ".to_vec(), vec![b'x'; 1 << 20], b"\r\n\r\n".to_vec()].concat();
    let many: Vec<u8> = (0..2000).fold(b"GET / HTTP/1.1\r\n".to_vec(), |mut text, i| {
        let _ = write!(text, "X{i}: 1\r\n");
        text
    });
    let requests: [&[u8]; 6] = [
        b"garbage\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET\x00/ HTTP/1.1\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        &long,
        &many,
    ];
    for request in requests {
        let beginning = String::from_utf8_lossy(&request[..request.len().min(30)]).into_owned();
        let answer = exchange(watched.address(1), request, Duration::from_secs(5));
        let code = answer.as_deref().and_then(status);
        assert!(code.is_some_and(|code| (400..600).contains(&code)), "{beginning:?} got {code:?}");
    }
    get(watched.address(1), "/metrics", Duration::from_secs(5)).expect("metrics still");
}

/// Half of them send a request bit by bit, half never read the answer.
fn slow_clients_slow_nothing(watched: &Watched) {
    let pause = || std::thread::sleep(Duration::from_secs(4));
    let alone = watched.step_time(pause);
    let address = watched.address(0);
    let crowded = watched.step_time(|| {
        let mut clients: Vec<TcpStream> =
            (0..50).map(|_| TcpStream::connect(address).expect("a connection")).collect();
        let request = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n";
        for client in clients.iter_mut().skip(25) {
            client.write_all(request).expect("sent");
        }
        for byte in &request[..20] {
            for client in clients.iter_mut().take(25) {
                client.write_all(&[*byte]).expect("sent");
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        get(address, "/metrics", Duration::from_secs(5)).expect("metrics for one more");
        // They are answered in the end.
        let mut first = [0; 12];
        clients[49].set_read_timeout(Some(Duration::from_secs(5))).expect("set");
        clients[49].read_exact(&mut first).expect("an answer");
        assert_eq!(&first, b"HTTP/1.1 200");
    });
    // Coarse: other tests share the cores.
    assert!(
        crowded < 3.0 * alone + 0.02,
        "a step takes {crowded:.4} s among slow clients, {alone:.4} s without"
    );
}
