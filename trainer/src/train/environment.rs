//! What a run ran on, for those who look at its folder later.

use std::time::{SystemTime, UNIX_EPOCH};

use repa_comm::Communicator;
use serde_json::{Value, json};

/// The program, its command, and the hosts of all ranks; the same on all ranks, and written by one.
pub(super) fn describe(comm: &dyn Communicator) -> Value {
    let topology = comm.topology();
    let system = rustix::system::uname();
    let text = |text: &std::ffi::CStr| text.to_string_lossy().into_owned();
    json!({
        "program": env!("CARGO_PKG_VERSION"),
        "commit": option_env!("REPA_COMMIT").unwrap_or("unknown"),
        "features": if cfg!(feature = "cuda") { vec!["cuda"] } else { Vec::new() },
        "command": std::env::args().collect::<Vec<_>>(),
        "started": SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |t| t.as_secs_f64()),
        "working_directory": std::env::current_dir().ok(),
        "ranks": topology.size,
        "nodes": topology.nodes,
        "hosts": topology.hosts,
        "communicator": comm.describe(),
        "threads": rayon::current_num_threads(),
        "processor": processor(),
        "system": format!("{} {} {}", text(system.sysname()), text(system.release()), text(system.machine())),
        "job": std::env::vars().filter(|(name, _)| name.starts_with("SLURM_JOB")).collect::<std::collections::BTreeMap<_, _>>(),
    })
}

/// The processor's name, as Linux gives it.
fn processor() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}
