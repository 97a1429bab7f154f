//! What the system grants a process: open files, locked memory, processors.

use repa_trainer::data;
use rustix::process::{Resource, Rlimit, getrlimit};

use super::Line;
use super::mpi::fabric;
use super::subject::{Subject, plural, processors, size};

const FILES: &str = "open files";
const PROCESSORS: &str = "processors";

/// Fewer open files than this are soon used up by shards, sockets and libraries.
const FEW_FILES: u64 = 4096;

/// Every line about limits.
pub fn lines(subject: &Subject) -> Vec<Line> {
    // What cannot be opened has a line of its own.
    let shards = data::open(&subject.config.data.dir).map_or(0, |store| store.index().shards.len() as u64);
    let mut lines = vec![files(getrlimit(Resource::Nofile), shards, subject.ranks as u64)];
    lines.extend(locked(getrlimit(Resource::Memlock), &fabric()));
    let of_a_rank = subject.estimate.host_bytes;
    lines.extend(limited("address space", "v", getrlimit(Resource::As), of_a_rank));
    let shard = subject.checkpoint_bytes() / subject.ranks.max(1) as u64;
    lines.extend(limited("file size", "f", getrlimit(Resource::Fsize), shard));
    lines.push(cores(subject, processors()));
    lines
}

fn count(limit: Option<u64>) -> String {
    limit.map_or_else(|| "unlimited".into(), |limit| limit.to_string())
}

/// Programs raise the limit as far as they may, so that the higher one counts.
fn files(limit: Rlimit, shards: u64, ranks: u64) -> Line {
    // Shards stay open; MPI and the status board have sockets to other ranks.
    let needed = shards + 4 * ranks + 256;
    let most = limit.maximum.unwrap_or(u64::MAX);
    let mut found = count(limit.current);
    if limit.current != limit.maximum {
        found.push_str(&format!(", and up to {} on demand", count(limit.maximum)));
    }
    let fix = "raise it: LimitNOFILE= of the service, `nofile` in /etc/security/limits.conf, or the container's --ulimit";
    match most {
        most if most < needed => {
            Line::error(FILES, format!("{found}; a rank needs some {needed} ({shards} shards)"), fix)
        }
        most if most < FEW_FILES => Line::warning(FILES, found, fix),
        _ => Line::ok(FILES, found),
    }
}

/// Locked memory matters to InfiniBand alone.
fn locked(limit: Rlimit, fabric: &[String]) -> Option<Line> {
    const TOPIC: &str = "locked memory";
    if fabric.is_empty() {
        return None;
    }
    let Some(bytes) = limit.current else { return Some(Line::ok(TOPIC, "unlimited")) };
    let found = format!("{}, and {} needs more to send without copies", size(bytes), fabric.join(", "));
    let fix = "`memlock unlimited` in /etc/security/limits.conf and LimitMEMLOCK=infinity for slurmd (SLURM: \
               PropagateResourceLimitsExcept=MEMLOCK); of a container: --ulimit memlock=-1";
    Some(Line::warning(TOPIC, found, fix))
}

/// A limit that is seldom set; no line where it is not.
fn limited(topic: &str, letter: &str, limit: Rlimit, needed: u64) -> Option<Line> {
    let bytes = limit.current?;
    let found = format!("limited to {}; a rank needs some {}", size(bytes), size(needed));
    let fix = format!("`ulimit -{letter} unlimited` before the start");
    Some(match bytes {
        bytes if bytes < needed => Line::error(topic, found, fix),
        bytes if bytes / 2 < needed => Line::warning(topic, found, fix),
        _ => Line::ok(topic, found),
    })
}

/// `usable` is what this process may use.
fn cores(subject: &Subject, usable: usize) -> Line {
    let online = online(&std::fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default());
    judge_cores(subject, usable, online.unwrap_or(usable))
}

/// The number of processors in a list such as `0-3,8`.
fn online(list: &str) -> Option<usize> {
    let number = |text: &str| text.trim().parse::<usize>().ok();
    let mut count = 0;
    for part in list.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        count += (number(last)? + 1).checked_sub(number(first)?)?;
    }
    Some(count)
}

fn judge_cores(subject: &Subject, usable: usize, online: usize) -> Line {
    let here = subject.here;
    // Ranks that are bound to processors of their own have those of all of them together.
    let (sharers, each) = subject.placed.unwrap_or((here, usable));
    let together = (each * here.div_ceil(sharers.max(1))).min(online.max(each));
    let threads = match subject.config.train.threads {
        0 => (each / sharers.max(1)).max(1),
        threads => threads,
    };
    let ranks = plural(here, "rank");
    let mut found = format!("{together} of {online} usable; {ranks} x {}", plural(threads, "thread"));
    if here * threads > together {
        let fix = if subject.config.train.threads > 0 {
            "a lower train.threads (0 divides the processors), or fewer ranks on a host"
        } else {
            "fewer ranks on a host: they wait for each other's time slices"
        };
        return Line::warning(PROCESSORS, found, fix);
    }
    // Threads that nobody has chosen are few because the launcher has bound the ranks.
    let bound = subject.placed.is_some() && subject.config.train.threads == 0;
    if bound && !subject.on_gpus() && here * threads * 2 <= online {
        found.push_str(": most of the host stays idle");
        let fix = "mpirun --bind-to none, or --map-by slot:PE=N; srun --cpus-per-task=N";
        return Line::warning(PROCESSORS, found, fix);
    }
    Line::ok(PROCESSORS, found)
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;
    use repa_trainer::config::Config;

    fn limit(current: Option<u64>, maximum: Option<u64>) -> Rlimit {
        Rlimit { current, maximum }
    }

    #[test]
    fn few_open_files_are_told() {
        assert_eq!(files(limit(Some(1024), Some(1 << 20)), 10, 2).state, State::Ok);
        assert_eq!(files(limit(Some(1024), None), 10, 2).found, "1024, and up to unlimited on demand");
        assert_eq!(files(limit(Some(1024), Some(1024)), 10, 2).state, State::Warning);
        let line = files(limit(Some(1024), Some(1024)), 2000, 2);
        assert!(line.state == State::Error && line.found.contains("2000 shards"), "{line:?}");
    }

    #[test]
    fn locked_memory_matters_to_infiniband() {
        let fabric = ["mlx5_0".to_owned()];
        assert_eq!(locked(limit(Some(1), Some(1)), &[]), None);
        assert_eq!(locked(limit(None, None), &fabric).expect("a line").state, State::Ok);
        assert_eq!(locked(limit(Some(1 << 23), None), &fabric).expect("a line").state, State::Warning);
    }

    #[test]
    fn limits_that_are_set_are_compared() {
        let state = |current| limited("file size", "f", limit(current, None), 100).map(|line| line.state);
        assert_eq!(state(None), None);
        assert_eq!(state(Some(50)), Some(State::Error));
        assert_eq!(state(Some(150)), Some(State::Warning));
        assert_eq!(state(Some(500)), Some(State::Ok));
    }

    #[test]
    fn processors_are_counted() {
        assert_eq!([online("0-1\n"), online("0-3,8"), online("")], [Some(2), Some(5), None]);
        let of = |ranks, threads, placed| {
            let mut config = Config::default();
            config.train.threads = threads;
            Subject { placed, ..Subject::alone(config, ranks, true) }
        };
        assert_eq!(judge_cores(&of(2, 0, None), 4, 4).found, "4 of 4 usable; 2 ranks x 2 threads");
        assert_eq!(judge_cores(&of(2, 8, None), 4, 4).state, State::Warning);
        assert_eq!(judge_cores(&of(5, 0, None), 4, 4).state, State::Warning);
        // Two ranks, each bound to a processor of its own.
        assert_eq!(judge_cores(&of(2, 0, Some((1, 1))), 1, 2).state, State::Ok);
        let bound = judge_cores(&of(2, 0, Some((1, 1))), 1, 16);
        assert!(bound.state == State::Warning && bound.found.contains("idle"), "{bound:?}");
        assert_eq!(judge_cores(&of(2, 0, Some((2, 16))), 16, 16).state, State::Ok);
    }
}
