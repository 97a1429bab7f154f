//! MPI: the library, what starts ranks, and whether they find each other.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use repa_comm::{Communicator, Launcher};

use super::Line;
use super::probe::{DEADLINE, Probe};
use super::subject::{Subject, plural, processors};
use crate::launch::{MARK, reap};
use crate::program::{self, Ended, ask, find};

const TOPIC: &str = "MPI";
const RANKS: &str = "ranks";
const TRANSPORTS: &str = "transports";

/// How long mpirun may take to start two ranks and to end.
const LAUNCH: Duration = Duration::from_secs(20);

const PMIX: &str = "srun --mpi=pmix, or mpirun inside the allocation";
const INSTALL: &str = "install OpenMPI (Debian: openmpi-bin), or load your cluster's module";

/// For a process that no launcher started.
pub fn alone(_subject: &Subject) -> Vec<Line> {
    let mpirun = find("mpirun");
    let version = mpirun.as_ref().and_then(|path| version_of(path));
    let trial = match (Launcher::detect(), &mpirun) {
        // An mpirun in here would ask SLURM for another step.
        (Launcher::SlurmWithoutPmix(tasks), _) => Err(vec![Line::error(
            RANKS,
            format!("srun started {tasks} tasks that cannot find each other (no PMIx)"),
            PMIX,
        )]),
        (_, None) => Err(Vec::new()),
        (_, Some(mpirun)) => Ok(two_ranks(mpirun)),
    };
    let (ranks, known) = match trial {
        Ok(ended) => judge_trial(&ended),
        Err(lines) => (lines, None),
    };
    // Where ranks cannot be started, the library still says what it is.
    let known = known.or_else(|| read(&itself().ok()?.stdout));
    let mut lines = vec![library(known.as_ref(), mpirun.as_deref(), version.as_deref())];
    lines.extend(ranks);
    lines.push(transports());
    lines
}

/// For a rank of a job, of which `probe` is known.
pub fn of_job(comm: &dyn Communicator, probe: &Probe) -> Vec<Line> {
    let starter = match Launcher::detect() {
        Launcher::OpenMpi(_) => "mpirun",
        Launcher::Pmix(_) => "a PMIx launcher, such as srun --mpi=pmix",
        Launcher::Pmi(_) => "a PMI launcher",
        Launcher::Bare | Launcher::SlurmWithoutPmix(_) => "nobody",
    };
    let on = plural(comm.topology().nodes, "host");
    let found =
        format!("{} on {on}, started by {starter}; {}", plural(comm.size(), "rank"), probe.describe());
    let ranks = match probe.is_right {
        true => Line::ok(RANKS, found),
        false => Line::error(RANKS, format!("{found}: the sum is wrong"), WRONG_SUM),
    };
    let mut lines = vec![library(Some(probe), None, None), ranks];
    if comm.topology().nodes > 1 && matches!(Launcher::detect(), Launcher::Pmix(_)) {
        lines.extend(fence_of(|name| std::env::var(name).ok()));
    }
    lines
}

/// Steps of SLURM on several nodes start with a barrier that is none: where a step has fewer nodes than slurm.conf's
/// `TreeWidth`, each node of PMIx's fence `tree` (the one without data, unless told otherwise) takes itself for the root
/// and waits for nobody (SLURM 22.05, `reverse_tree_info`). A rank then sends to another that is still in `MPI_Init`,
/// and OpenMPI crashes there. The fence `ring` waits.
fn fence_of(environment: impl Fn(&str) -> Option<String>) -> Option<Line> {
    environment("SLURM_STEP_ID")?;
    if environment("SLURM_PMIX_FENCE").as_deref() == Some("ring") {
        return None;
    }
    Some(Line::warning(
        "fence",
        "SLURM_PMIX_FENCE is not ring: with SLURM 22.05 ranks may start before others listen, which crash then",
        "export SLURM_PMIX_FENCE=ring before srun (`repa-dist slurm` does), or PMIxCollFence=ring in SLURM's mpi.conf",
    ))
}

/// For a rank whose communicator did not start.
pub fn broken(problem: &str) -> Vec<Line> {
    let start = match std::env::var_os("SLURM_STEP_ID") {
        Some(_) => PMIX,
        None => INSTALL_ALIKE,
    };
    let fix = format!("{start}; see what MPI says. `repa-dist doctor` by itself looks at the rest of a host");
    vec![Line::error(RANKS, problem, fix)]
}

const WRONG_SUM: &str =
    "check the network and the memory of the hosts, and try another transport (OMPI_MCA_btl)";
const INSTALL_ALIKE: &str = "start ranks with the mpirun of the MPI that this program is linked with (`ldd`)";

/// Two ranks of the hidden command, under mpirun.
fn two_ranks(mpirun: &Path) -> Result<Ended, String> {
    let mut words = vec!["--oversubscribe", "--bind-to", "none"];
    if rustix::process::geteuid().is_root() {
        words.push("--allow-run-as-root");
    }
    if processors() < 2 {
        words.extend(["--mca", "mpi_yield_when_idle", "1"]);
    }
    words.extend(["-n", "2"]);
    let mark = format!("doctor-{}", std::process::id());
    let program = std::env::current_exe().map_err(|error| format!("this program: {error}"))?;
    let mut command = Command::new(mpirun);
    command.args(words).arg(program).arg("doctor-probe").env(MARK, &mark);
    let ended = program::run(&mut command, LAUNCH);
    // mpirun's ranks have process groups of their own, and may outlive it.
    if ended.as_ref().is_ok_and(|ended| !ended.is_good()) {
        reap(&mark);
    }
    ended
}

/// The hidden command by itself.
fn itself() -> Result<Ended, String> {
    let program = std::env::current_exe().map_err(|error| format!("this program: {error}"))?;
    let mut command = Command::new(program);
    // A SLURM step without PMIx would be refused again.
    let command = command.arg("doctor-probe").env_remove("SLURM_STEP_NUM_TASKS");
    program::run(command, DEADLINE + Duration::from_secs(5))
}

fn read(stdout: &str) -> Option<Probe> {
    stdout.lines().find_map(|line| serde_json::from_str(line).ok())
}

fn judge_trial(ended: &Result<Ended, String>) -> (Vec<Line>, Option<Probe>) {
    let ended = match ended {
        Ok(ended) => ended,
        Err(problem) => return (vec![Line::error(RANKS, problem, INSTALL)], None),
    };
    let took = ended.took.as_secs_f64();
    let probe = read(&ended.stdout).filter(|_| ended.is_good());
    let line = match &probe {
        Some(probe) if probe.ranks == 2 && probe.is_right => {
            Line::ok(RANKS, format!("mpirun -n 2: started and ended in {took:.1} s, {}", probe.describe()))
        }
        Some(probe) if probe.ranks == 2 => {
            Line::error(RANKS, "mpirun -n 2: the sum over the ranks is wrong", WRONG_SUM)
        }
        Some(_) => Line::error(
            RANKS,
            "mpirun -n 2: each rank sees itself alone (another MPI's mpirun)",
            INSTALL_ALIKE,
        ),
        None if ended.late => Line::error(
            RANKS,
            format!("mpirun -n 2: two ranks on this host were not done within {took:.0} s"),
            "try `mpirun -n 2 hostname`; if that works, name the network interface: \
             OMPI_MCA_btl_tcp_if_include=eth0 and OMPI_MCA_oob_tcp_if_include=eth0 in the environment",
        ),
        None => Line::error(
            RANKS,
            format!("mpirun -n 2: {}", ended.complaint()),
            "try `mpirun -n 2 hostname`: if that fails as well, it is OpenMPI's installation; else see the message",
        ),
    };
    (vec![line], probe)
}

/// The library, and whether mpirun is of the same kind.
fn library(probe: Option<&Probe>, mpirun: Option<&Path>, version: Option<&str>) -> Line {
    let Some(probe) = probe else {
        let fix = "see `ldd` of this program for the libmpi that it loads, and that library's installation";
        return Line::error(TOPIC, "the library does not say what it is", fix);
    };
    let mut found = probe.library.clone();
    if let Some(level) = &probe.thread_level {
        found.push_str(&format!(", thread level {level}"));
    }
    if let (Some(path), Some(version)) = (mpirun, version) {
        found.push_str(&format!("; mpirun {version} at {}", path.display()));
    }
    match (mpirun, version) {
        // Of a job: the ranks have been started.
        (None, None) if probe.ranks > 1 || Launcher::detect() != Launcher::Bare => {}
        (None, _) => {
            let fix =
                format!("{INSTALL}, and have it on the PATH; `srun --mpi=pmix` starts ranks without it");
            let needed = find("srun").is_none();
            return Line::problem(TOPIC, needed, format!("{found}; mpirun is not on the PATH"), fix);
        }
        (Some(path), None) => {
            let found = format!("{found}; {} does not say its version", path.display());
            return Line::warning(TOPIC, found, INSTALL_ALIKE);
        }
        (Some(_), Some(version)) if !is_alike(&probe.library, version) => {
            return Line::warning(TOPIC, format!("{found}: they differ"), INSTALL_ALIKE);
        }
        (Some(_), Some(_)) => {}
    }
    match probe.thread_level.as_deref() {
        Some("MULTIPLE") | None => Line::ok(TOPIC, found),
        Some(_) => Line::warning(
            TOPIC,
            format!("{found}: a rank that fails cannot end the others through MPI"),
            "an MPI built for MPI_THREAD_MULTIPLE",
        ),
    }
}

fn version_of(mpirun: &Path) -> Option<String> {
    let ended = ask(&mpirun.to_string_lossy(), &["--version"]).ok()?;
    first_version(&ended.stdout).map(str::to_owned)
}

/// `4.1.4` of `mpirun (Open MPI) 4.1.4` or `Version: 4.0`.
fn first_version(text: &str) -> Option<&str> {
    let is_version = |word: &&str| {
        word.contains('.') && word.starts_with(|c: char| c.is_ascii_digit()) && !word.ends_with('.')
    };
    text.split(|c: char| c.is_whitespace() || c == ',')
        .map(|word| word.trim_start_matches('v'))
        .find(is_version)
}

/// Whether a library's words have this version.
fn is_alike(library: &str, version: &str) -> bool {
    first_version(library).is_none_or(|known| known == version)
}

/// What OpenMPI can send through.
pub fn transports() -> Line {
    let hardware = fabric();
    match ask("ompi_info", &["--parsable"]) {
        Ok(ended) if ended.is_good() => judge_transports(&ended.stdout, &hardware, wanted().as_deref()),
        Ok(ended) => Line::absent(TRANSPORTS, format!("not known: ompi_info: {}", ended.complaint())),
        Err(_) => Line::absent(TRANSPORTS, "not known: ompi_info is not on the PATH"),
    }
}

fn wanted() -> Option<String> {
    std::env::var("OMPI_MCA_btl").ok()
}

/// InfiniBand and RoCE devices of this host.
pub fn fabric() -> Vec<String> {
    let entries = std::fs::read_dir("/sys/class/infiniband").into_iter().flatten().flatten();
    let mut names: Vec<String> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// `text` is what `ompi_info --parsable` prints.
fn judge_transports(text: &str, hardware: &[String], chosen: Option<&str>) -> Line {
    let has = |framework: &str, name: &str| {
        let start = format!("mca:{framework}:{name}:version:");
        text.lines().any(|line| line.starts_with(&start))
    };
    let mut names = Vec::new();
    let known = [
        ("btl", "vader", "shared memory"),
        ("btl", "sm", "shared memory"),
        ("btl", "tcp", "TCP"),
        ("pml", "ucx", "UCX"),
        ("mtl", "ofi", "libfabric"),
        ("mtl", "psm2", "Omni-Path (PSM2)"),
        ("btl", "openib", "InfiniBand verbs"),
    ];
    for (framework, name, what) in known {
        if has(framework, name) && !names.contains(&what) {
            names.push(what);
        }
    }
    if names.is_empty() {
        return Line::absent(TRANSPORTS, "not known: ompi_info does not list any");
    }
    let mut found = names.join(", ");
    if let Some(chosen) = chosen {
        found.push_str(&format!("; OMPI_MCA_btl={chosen}"));
    }
    if !hardware.is_empty() {
        found.push_str(&format!("; InfiniBand or RoCE: {}", hardware.join(", ")));
        let uses_it = ["UCX", "libfabric", "Omni-Path (PSM2)", "InfiniBand verbs"];
        if !names.iter().any(|name| uses_it.contains(name)) {
            let fix = "an OpenMPI with UCX: gradients on the CPU go between hosts by TCP now (NCCL has its own way)";
            return Line::warning(TRANSPORTS, found, fix);
        }
    }
    if !names.contains(&"shared memory") {
        let fix = "an OpenMPI with btl vader (4.x) or sm (5.x): ranks of a host talk by TCP now";
        return Line::warning(TRANSPORTS, found, fix);
    }
    Line::ok(TRANSPORTS, found)
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    fn ended(code: i32, stdout: &str, stderr: &str) -> Result<Ended, String> {
        Ok(Ended {
            code: Some(code),
            late: false,
            stdout: stdout.into(),
            stderr: stderr.into(),
            took: Duration::from_millis(700),
        })
    }

    fn probe(ranks: usize, is_right: bool) -> Probe {
        Probe {
            library: "Open MPI v4.1.4".into(),
            thread_level: Some("MULTIPLE".into()),
            transport: "Open MPI v4.1.4, shared memory".into(),
            ranks,
            nodes: 1,
            sum_seconds: 0.002,
            is_right,
        }
    }

    #[test]
    fn a_step_of_slurm_has_to_have_a_fence_that_waits() {
        let of = |fence: &'static str, step: bool| {
            fence_of(move |name| match name {
                "SLURM_STEP_ID" => step.then(|| "0".to_owned()),
                "SLURM_PMIX_FENCE" => (!fence.is_empty()).then(|| fence.to_owned()),
                _ => None,
            })
        };
        assert!(of("ring", true).is_none() && of("", false).is_none());
        for other in ["", "tree", "mixed"] {
            let line = of(other, true).expect("a line");
            assert_eq!(line.state, State::Warning, "{line:?}");
            assert!(line.fix.expect("advice").contains("export SLURM_PMIX_FENCE=ring"));
        }
    }

    #[test]
    fn two_ranks_are_judged_by_what_they_say() {
        let judge = |probe: &Probe| {
            let text = format!("noise\n{}\n", serde_json::to_string(probe).expect("JSON"));
            judge_trial(&ended(0, &text, "")).0.remove(0)
        };
        let good = judge(&probe(2, true));
        assert_eq!(good.state, State::Ok);
        assert_eq!(
            good.found,
            "mpirun -n 2: started and ended in 0.7 s, summed 4 MiB in 2.0 ms (shared memory)"
        );
        assert_eq!(judge(&probe(2, false)).state, State::Error);
        assert!(judge(&probe(1, true)).found.contains("alone"));
        let stderr = "----------\nThere are not enough slots available\n----------\n";
        let bad = judge_trial(&ended(1, "", stderr)).0.remove(0);
        assert!(bad.state == State::Error && bad.found.contains("not enough slots"), "{bad:?}");
        let late = Ended { code: None, late: true, ..ended(0, "", "").expect("ended") };
        let late = judge_trial(&Ok(late)).0.remove(0);
        assert!(late.found.contains("not done within") && late.fix.is_some(), "{late:?}");
        assert_eq!(judge_trial(&Err("no".into())).0[0].state, State::Error);
    }

    #[test]
    fn mpirun_has_to_be_the_librarys() {
        assert_eq!(first_version("mpirun (Open MPI) 4.1.4\n\nReport bugs"), Some("4.1.4"));
        assert_eq!(first_version("HYDRA build details:\n    Version:    4.0.2\n"), Some("4.0.2"));
        assert_eq!(first_version("none."), None);
        assert!(is_alike("Open MPI v4.1.4", "4.1.4") && !is_alike("Open MPI v5.0.1", "4.1.4"));
        let path = Path::new("/usr/bin/mpirun");
        let line = |version: &str| library(Some(&probe(2, true)), Some(path), Some(version));
        assert_eq!(
            line("4.1.4").found,
            "Open MPI v4.1.4, thread level MULTIPLE; mpirun 4.1.4 at /usr/bin/mpirun"
        );
        assert_eq!(line("4.1.4").state, State::Ok);
        assert_eq!(line("5.0.1").state, State::Warning);
        assert_eq!(library(None, Some(path), Some("4.1.4")).state, State::Error);
        let alone = library(Some(&probe(1, true)), None, None);
        assert!(alone.fix.is_some() && alone.found.contains("not on the PATH"), "{alone:?}");
        let few = Probe { thread_level: Some("FUNNELED".into()), ..probe(2, true) };
        assert_eq!(library(Some(&few), Some(path), Some("4.1.4")).state, State::Warning);
    }

    #[test]
    fn transports_are_named() {
        let list = |names: &[&str]| {
            let lines = names.iter().map(|name| format!("mca:{name}:version:\"component:4.1.4\"\n"));
            lines.collect::<String>()
        };
        let usual = list(&["btl:self", "btl:tcp", "btl:vader", "pml:ob1"]);
        let line = judge_transports(&usual, &[], None);
        assert_eq!((line.state, line.found.as_str()), (State::Ok, "shared memory, TCP"));
        let fabric = ["mlx5_0".to_owned()];
        let line = judge_transports(&usual, &fabric, None);
        assert!(line.state == State::Warning && line.fix.expect("a fix").contains("UCX"));
        let line = judge_transports(&list(&["btl:sm", "btl:tcp", "pml:ucx"]), &fabric, Some("self,tcp"));
        assert_eq!(line.state, State::Ok);
        assert_eq!(line.found, "shared memory, TCP, UCX; OMPI_MCA_btl=self,tcp; InfiniBand or RoCE: mlx5_0");
        assert_eq!(judge_transports(&list(&["btl:tcp"]), &[], None).state, State::Warning);
        assert_eq!(judge_transports("", &[], None).state, State::Absent);
    }
}
