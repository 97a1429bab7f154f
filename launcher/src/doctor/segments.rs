//! /dev/shm: its size against what ranks on one host share, and what ranks that were killed have left there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use repa_comm::Options;
use rustix::fs::statvfs;

use super::Line;
use super::subject::{Subject, plural, size};

const TOPIC: &str = "shared memory";
const FOLDER: &str = "/dev/shm";

/// What OpenMPI takes beside, for each rank: its segment for messages (4 MiB), rounded up.
const OPENMPI: u64 = 8 << 20;

/// What NCCL wants for the ranks of a host that have no direct way between their GPUs, for each rank.
const NCCL: u64 = 128 << 20;

/// How the names of segments begin: OpenMPI's (two versions), NCCL's, and the status board's.
const NAMES: [&str; 4] = ["vader_segment.", "sm_segment.", "nccl-", "repa-board-"];

/// A younger segment may be one whose process has not mapped it yet.
const YOUNG: Duration = Duration::from_secs(60);

/// Every line about shared memory.
pub fn lines(subject: &Subject) -> Vec<Line> {
    let room = statvfs(FOLDER).map(|room| {
        let of = |blocks: u64| blocks.saturating_mul(room.f_frsize);
        (of(room.f_blocks), of(room.f_bavail))
    });
    let mut lines = vec![match room {
        Ok((total, free)) => judge(total, free, subject),
        Err(error) => {
            let fix = "mount it: `mount -t tmpfs tmpfs /dev/shm`";
            Line::error(TOPIC, format!("{FOLDER}: {error}"), fix)
        }
    }];
    lines.extend(left_behind(Path::new(FOLDER), &mapped()));
    lines
}

fn judge(total: u64, free: u64, subject: &Subject) -> Line {
    let here = subject.here as u64;
    let own = Options::default().shared_memory_bytes() as u64 + OPENMPI;
    let needed = if subject.here > 1 { here * own } else { 0 };
    let wanted = if subject.on_gpus() && subject.here > 1 { needed + here * NCCL } else { needed };
    let mut found = format!("{FOLDER}: {} of {} free", size(free), size(total));
    if wanted > 0 {
        found.push_str(&format!("; {} share some {}", plural(subject.here, "rank"), size(wanted)));
    }
    let fix = "make it larger: `mount -o remount,size=16G /dev/shm`; docker: --shm-size=16g or --ipc=host; \
               Kubernetes: an emptyDir of medium Memory";
    match free {
        free if free < needed => Line::error(TOPIC, found, fix),
        free if free < wanted => Line::warning(TOPIC, found, fix),
        _ => Line::ok(TOPIC, found),
    }
}

/// Paths of segments that some process has mapped, as far as this user may know.
fn mapped() -> BTreeSet<String> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbers = processes.filter(|entry| entry.file_name().to_string_lossy().parse::<u32>().is_ok());
    let mut paths = BTreeSet::new();
    for process in numbers {
        // Others' processes keep theirs to themselves.
        let maps = fs::read_to_string(process.path().join("maps")).unwrap_or_default();
        for line in maps.lines() {
            if let Some(at) = line.find(FOLDER) {
                paths.insert(line[at..].to_owned());
            }
        }
    }
    paths
}

/// Segments that no process has any more.
fn left_behind(folder: &Path, mapped: &BTreeSet<String>) -> Option<Line> {
    let me = rustix::process::geteuid();
    let mut bytes = 0;
    let mut groups: BTreeMap<String, usize> = BTreeMap::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let (true, Ok(meta)) = (NAMES.iter().any(|start| name.starts_with(start)), entry.metadata()) else {
            continue;
        };
        let young = meta.modified().ok().and_then(|time| time.elapsed().ok()).is_none_or(|age| age < YOUNG);
        // Whether others' are in use cannot be known.
        let ours = me.is_root() || meta.uid() == me.as_raw();
        if !meta.is_file() || young || !ours || mapped.contains(&*entry.path().to_string_lossy()) {
            continue;
        }
        // Blocks have 512 bytes.
        bytes += meta.blocks() * 512;
        *groups.entry(group(&name)).or_default() += 1;
    }
    if groups.is_empty() {
        return None;
    }
    let count: usize = groups.values().sum();
    let found =
        format!("{} in {FOLDER} of processes that are gone: {}", plural(count, "segment"), size(bytes));
    let patterns: Vec<String> =
        groups.keys().take(3).map(|group| format!("{}/{group}", folder.display())).collect();
    let more = if groups.len() > 3 { ", and others" } else { "" };
    Some(Line::warning(TOPIC, found, format!("rm {}{more}", patterns.join(" "))))
}

/// What belongs to one job: OpenMPI's names end in the job's number and the rank's.
fn group(name: &str) -> String {
    match name.rsplit_once('.') {
        Some((job, _)) if !name.starts_with("nccl-") => format!("{job}.*"),
        _ => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;
    use repa_trainer::config::Config;

    #[test]
    fn ranks_need_room_to_share() {
        let mut config = Config::default();
        let state = |config: &Config, ranks, free| {
            judge(1 << 34, free, &Subject::alone(config.clone(), ranks, true)).state
        };
        assert_eq!(state(&config, 2, 64 << 20), State::Ok);
        assert_eq!(state(&config, 8, 64 << 20), State::Error);
        assert_eq!(state(&config, 1, 0), State::Ok);
        config.device.0 = "cuda".into();
        assert_eq!(state(&config, 4, 64 << 20), State::Warning);
        assert_eq!(state(&config, 4, 1 << 30), State::Ok);
    }

    #[test]
    fn only_what_nobody_has_mapped_is_left_behind() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name);
        let old = std::time::SystemTime::now() - 2 * YOUNG;
        let make = |name: &str, time| {
            fs::write(path(name), vec![1; 8192]).expect("written");
            fs::File::options().write(true).open(path(name)).expect("open").set_modified(time).expect("set");
        };
        make("vader_segment.vm.0.aa0001.0", old);
        make("vader_segment.vm.0.aa0001.1", old);
        make("vader_segment.vm.0.bb0001.0", std::time::SystemTime::now());
        make("other", old);
        make("nccl-abc", old);
        let mapped = BTreeSet::from([path("nccl-abc").display().to_string()]);
        let line = left_behind(folder.path(), &mapped).expect("two");
        assert!(line.found.starts_with("2 segments in /dev/shm"), "{line:?}");
        let fix = format!("rm {}", path("vader_segment.vm.0.aa0001.*").display());
        assert_eq!(line.fix, Some(fix));
        fs::remove_file(path("vader_segment.vm.0.aa0001.0")).expect("removed");
        fs::remove_file(path("vader_segment.vm.0.aa0001.1")).expect("removed");
        assert_eq!(left_behind(folder.path(), &mapped), None);
    }
}
