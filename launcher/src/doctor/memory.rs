//! The host's memory against what its ranks will take.

use std::fs;
use std::path::Path;

use super::Line;
use super::subject::{Subject, plural, size};

const TOPIC: &str = "memory";

/// What there is, in bytes.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Memory {
    total: u64,
    /// Free, or held by caches that give way.
    available: u64,
    /// What the control group of this process may have.
    limit: Option<u64>,
}

/// The line about memory.
pub fn lines(subject: &Subject) -> Vec<Line> {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limit = limit(&groups, Path::new("/sys/fs/cgroup"));
    match of_text(&text, limit) {
        Some(memory) => vec![judge(memory, subject)],
        None => vec![Line::absent(TOPIC, "not known: /proc/meminfo does not say")],
    }
}

fn of_text(text: &str, limit: Option<u64>) -> Option<Memory> {
    let field = |name: &str| -> Option<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        let kib: u64 = line.trim_start_matches(':').trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(kib << 10)
    };
    let total = field("MemTotal")?;
    let available = field("MemAvailable").unwrap_or(total);
    Some(Memory { total, available, limit: limit.filter(|&limit| limit < total) })
}

/// The lowest limit of the control groups that this process is in. `groups` is /proc/self/cgroup.
fn limit(groups: &str, mount: &Path) -> Option<u64> {
    let mut lowest: Option<u64> = None;
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let (root, file) = match controllers {
            // Version 2 has one hierarchy, whose number is 0 and whose list is empty.
            "" => (mount.to_owned(), "memory.max"),
            list if list.split(',').any(|name| name == "memory") => {
                (mount.join("memory"), "memory.limit_in_bytes")
            }
            _ => continue,
        };
        // Those above count as well. In a container, the path may be the host's; then the root is our own.
        let below = Path::new(path.trim_start_matches('/'));
        for group in below.ancestors() {
            let text = fs::read_to_string(root.join(group).join(file)).unwrap_or_default();
            if let Ok(bytes) = text.trim().parse::<u64>() {
                lowest = Some(lowest.map_or(bytes, |known| known.min(bytes)));
            }
        }
    }
    lowest
}

fn judge(memory: Memory, subject: &Subject) -> Line {
    let needed = subject.memory_bytes();
    let mut found = format!("{} of {} available", size(memory.available), size(memory.total));
    if let Some(limit) = memory.limit {
        found.push_str(&format!(", limited to {} (control group)", size(limit)));
    }
    found.push_str(&format!("; {} will take some {}", plural(subject.here, "rank"), size(needed)));
    let most = memory.limit.unwrap_or(memory.total);
    let fix = "fewer ranks on a host, a lower train.micro_batch, or optimizer.sharding=zero1; `repa-dist estimate` shows \
               the parts";
    match needed {
        needed if needed > most => match memory.limit {
            Some(_) => {
                let fix =
                    format!("ask the scheduler or the container for more memory (SLURM: --mem); or {fix}");
                Line::error(TOPIC, found, fix)
            }
            None => Line::error(TOPIC, found, fix),
        },
        needed if needed > memory.available => {
            Line::warning(TOPIC, found, format!("end what uses it; or {fix}"))
        }
        _ => Line::ok(TOPIC, found),
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;
    use repa_trainer::config::Config;

    const TEXT: &str = "MemTotal:       16384000 kB\nMemFree:  100 kB\nMemAvailable:    8192000 kB\n";

    #[test]
    fn the_kernel_is_read() {
        let memory = of_text(TEXT, Some(1 << 30)).expect("figures");
        let expected = Memory { total: 16_384_000 << 10, available: 8_192_000 << 10, limit: Some(1 << 30) };
        assert_eq!(memory, expected);
        // "No limit" is a huge number in version 1.
        assert_eq!(of_text(TEXT, Some(u64::MAX >> 1)).expect("figures").limit, None);
        assert_eq!(of_text("nothing", None), None);
    }

    #[test]
    fn the_lowest_limit_of_all_groups_counts() {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |path: &str, text: &str| {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().expect("a folder")).expect("made");
            fs::write(path, text).expect("written");
        };
        write("a/memory.max", "4096\n");
        write("a/b/memory.max", "max\n");
        assert_eq!(limit("0::/a/b\n", folder.path()), Some(4096));
        write("memory/job/memory.limit_in_bytes", "2048\n");
        assert_eq!(limit("4:memory:/job\n3:cpuset:/\n0::/a/b\n", folder.path()), Some(2048));
        assert_eq!(limit("4:cpu,memory:/elsewhere\n", folder.path()), None);
        assert_eq!(limit("", folder.path()), None);
    }

    #[test]
    fn ranks_have_to_fit() {
        let subject = Subject::alone(Config::default(), 2, true);
        let needed = subject.memory_bytes();
        let state = |total, available, limit| judge(Memory { total, available, limit }, &subject).state;
        assert_eq!(state(4 * needed, 2 * needed, None), State::Ok);
        assert_eq!(state(4 * needed, needed / 2, None), State::Warning);
        assert_eq!(state(needed / 2, needed / 2, None), State::Error);
        let line =
            judge(Memory { total: 4 * needed, available: 4 * needed, limit: Some(needed / 2) }, &subject);
        assert!(line.state == State::Error && line.fix.is_some_and(|fix| fix.contains("--mem")));
    }
}
