//! All ranks of a host behind one port, under a real Prometheus. Some 15 s on two cores. Without Debian's package
//! prometheus the test is skipped, and says so.

use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use repa_tests::prometheus::{Prometheus, get, missing};
use repa_tests::{Running, mpirun, repa_dist, run_in, small_model, small_store};
use serde_json::Value;

const DEADLINE: Duration = Duration::from_secs(120);
const RANKS: usize = 3;

/// Waits until there is something.
#[track_caller]
fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begun.elapsed() < DEADLINE, "no {what} after {DEADLINE:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn json(path: &Path) -> Option<Value> {
    serde_json::from_str(&std::fs::read_to_string(path).ok()?).ok()
}

#[test]
fn one_port_shows_all_ranks_of_a_host() {
    if let Some(reason) = missing() {
        return println!("skipped: {reason}");
    }
    let folder = tempfile::tempdir().expect("a folder");
    let (store, run) = (folder.path().join("store"), folder.path().join("runs/small"));
    small_store(&store, 23);
    let mut arguments = small_model(&store, &run);
    let more = ["train.steps=100000000", "telemetry.node_port=19800", "telemetry.port=19700"];
    arguments.extend(more.map(str::to_owned));
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let training = Running::start(&mut mpirun(RANKS, &arguments));

    let targets = run.join("prometheus-targets.json");
    let targets = wait_for("target file", || json(&targets)?[0]["targets"].as_array().cloned());
    assert_eq!(targets.len(), 1, "{targets:?}");
    let address: SocketAddr = targets[0].as_str().expect("text").parse().expect("an address");
    let page = || get(address, "/metrics", Duration::from_secs(5)).expect("a page");
    let shows = |page: &str, rank: usize| page.contains(&format!("\nrepa_images_total{{rank=\"{rank}\"}}"));
    let missing = |page: &str| -> usize {
        let line = page.lines().find_map(|line| line.strip_prefix("repa_node_ranks_missing{rank=\"0\"} "));
        line.and_then(|number| number.parse().ok()).expect("a number of missing ranks")
    };
    let whole =
        wait_for("all ranks on the page", || Some(page()).filter(|p| (0..RANKS).all(|r| shows(p, r))));
    assert_eq!((whole.matches("# HELP repa_images_total ").count(), missing(&whole)), (1, 0));
    let path = folder.path().join("metrics.txt");
    std::fs::write(&path, &whole).expect("written");
    let mut promtool = Command::new("sh");
    promtool.arg("-c").arg("promtool check metrics < \"$0\"").arg(&path);
    let said = Running::start(&mut promtool).wait(DEADLINE);
    assert_eq!(said.code, Some(0), "{}{}", said.stdout, said.stderr);
    for port in 19700..19700 + RANKS as u16 {
        assert!(TcpStream::connect(("127.0.0.1", port)).is_err(), "port {port} is open");
    }

    // Rules join by rank, since all ranks are one instance.
    let written = folder.path().join("monitoring");
    let mut command = repa_dist(&["dashboards"]);
    command.arg(&written).arg("--run").arg(&run);
    run_in(folder.path(), command, DEADLINE);
    let config = written.join("prometheus/prometheus.yml");
    let text = std::fs::read_to_string(&config).expect("a configuration");
    std::fs::write(&config, text.replace("interval: 5s", "interval: 1s")).expect("written");
    let prometheus = Prometheus::start(&config, &folder.path().join("tsdb"));
    let value = |expression: &str, wanted: f64| {
        wait_for(expression, || prometheus.value(expression).filter(|&value| value == wanted));
    };
    value("count(up == 1)", 1.0);
    value("run:repa_ranks:count{run=\"small\"}", RANKS as f64);
    value("count(run_rank:repa_images:rate1m{run=\"small\"} > 0)", RANKS as f64);
    let groups = prometheus.api("rules").expect("rules");
    for rule in groups["groups"]
        .as_array()
        .expect("groups")
        .iter()
        .flat_map(|g| g["rules"].as_array().expect("rules"))
    {
        assert_eq!(rule["health"], "ok", "{rule:#}");
    }

    // A rank that stands still is left out, in time, and comes back.
    let status = json(&run.join("status.json")).expect("a status");
    let victim = status["ranks"][2]["pid"].as_u64().expect("a process number").to_string();
    let send = |signal: &str| {
        assert!(Command::new("kill").args(["-s", signal, &victim]).status().expect("kill runs").success());
    };
    send("STOP");
    let begun = Instant::now();
    let partial = page();
    let took = begun.elapsed();
    send("CONT");
    assert!(took < Duration::from_secs(3), "the page took {took:?}");
    assert!(shows(&partial, 1) && !shows(&partial, 2) && missing(&partial) == 1, "{partial}");
    wait_for("the rank again", || Some(page()).filter(|p| shows(p, 2) && missing(p) == 0));

    std::fs::write(run.join("STOP"), "").expect("written");
    training.wait(DEADLINE).expect_code(75);
}
