//! Folders of the run: whether they can be written, what room they have, and how fast they are.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use repa_trainer::checkpoint::storage::is_url;
use repa_trainer::config::Config;
use repa_trainer::data;
use repa_trainer::data::store::StoreError;
use repa_trainer::train::checkpoints;
use rustix::process::{Resource, getrlimit};

use super::Line;
use super::disk::{Place, Speed, measure, measure_read, try_writing};
use super::subject::{Subject, plural, size};

const RUN: &str = "run folder";
const CHECKPOINTS: &str = "checkpoints";
/// The topic of what training reads.
pub const DATA: &str = "data";
const TEMPORARY: &str = "temporary";

/// What speeds are measured on.
const BYTES: u64 = 256 << 20;
const QUICK_BYTES: u64 = 32 << 20;

/// Slower than this is worth a word, in bytes a second.
const SLOW: f64 = 20e6;

/// What a run folder takes beside checkpoints: logs, samples, and the like.
const LOGS: u64 = 64 << 20;

/// How long an object store may take.
const REMOTE: Duration = Duration::from_secs(20);

/// Every line about storage.
pub fn lines(subject: &Subject) -> Vec<Line> {
    let config = &subject.config;
    let mut measured = Measured { bytes: if subject.quick { QUICK_BYTES } else { BYTES }, known: Vec::new() };
    let apart = !config.checkpoint.dir.as_os_str().is_empty();
    let mut lines = vec![writable(RUN, &config.run.dir, subject, &mut measured, !apart)];
    if is_url(&config.checkpoint.dir) {
        lines.push(remote(config));
    } else if apart {
        lines.push(writable(CHECKPOINTS, &config.checkpoint.dir, subject, &mut measured, true));
    }
    lines.push(store(&config.data.dir, &mut measured));
    lines.push(temporary());
    lines
}

/// Speeds by file system.
struct Measured {
    bytes: u64,
    known: Vec<(u64, Speed)>,
}

impl Measured {
    fn of(&mut self, place: &Place) -> std::io::Result<Speed> {
        if let Some((_, speed)) = self.known.iter().find(|(device, _)| *device == place.device) {
            return Ok(*speed);
        }
        // Leaves a full disk what it has. A file beyond the limit of its size would end this process.
        let largest = getrlimit(Resource::Fsize).current.unwrap_or(u64::MAX);
        let speed = measure(&place.folder, self.bytes.min(place.free / 2).min(largest))?;
        self.known.push((place.device, speed));
        Ok(speed)
    }
}

const ELSEWHERE: &str =
    "free space there, or use another disk: run.dir=PATH, or checkpoint.dir=PATH for checkpoints";

/// A folder that a run writes to; `saves` if checkpoints go there.
fn writable(topic: &str, path: &Path, subject: &Subject, measured: &mut Measured, saves: bool) -> Line {
    let name = path.display();
    let key = if topic == RUN { "run.dir" } else { "checkpoint.dir" };
    let cannot = |error: std::io::Error| {
        let fix = format!("make it writable for this user, or set {key} to another folder");
        Line::error(topic, format!("{name} cannot be written: {error}"), fix)
    };
    let place = match Place::at(path) {
        Ok(place) => place,
        Err(error) => return cannot(error),
    };
    if place.read_only {
        return cannot(std::io::Error::from(std::io::ErrorKind::ReadOnlyFilesystem));
    }
    if let Err(error) = try_writing(&place.folder) {
        return cannot(error);
    }
    if let Some(line) = crowded(topic, path, &place, subject, saves) {
        return line;
    }
    let speed = match measured.of(&place) {
        Ok(speed) => speed,
        Err(error) => return cannot(error),
    };
    judge(topic, path, &place, subject, speed, saves)
}

/// Bytes of all checkpoints that there may be at a time, the one that is being written included.
fn kept(config: &Config, each: u64) -> u64 {
    let checkpoint = &config.checkpoint;
    // Those that are kept for ever.
    let ever = config.train.steps.checked_div(checkpoint.keep_every).unwrap_or(0);
    let count = (checkpoint.keep + checkpoint.keep_best + 1) as u64 + ever;
    each.saturating_mul(count)
}

/// What files take that are there already: a run that goes on writes over them in time.
fn taken(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| Some((entry.metadata().ok()?, entry.path())))
        .map(|(meta, path)| if meta.is_dir() { taken(&path) } else { meta.len() })
        .sum()
}

/// No room for even one checkpoint, or for the logs.
fn crowded(topic: &str, path: &Path, place: &Place, subject: &Subject, saves: bool) -> Option<Line> {
    let on = format!("{} on {}", path.display(), place.kind);
    let (needed, what) = match saves {
        true => (subject.checkpoint_bytes() + (1 << 20), "a checkpoint"),
        false => (1 << 20, "the log"),
    };
    if place.free < needed {
        let found = format!("{on}: {} free, and {what} takes {}", size(place.free), size(needed));
        return Some(Line::error(topic, found, ELSEWHERE));
    }
    let files = subject.ranks as u64 + 16;
    match place.free_files {
        Some(free) if free < files => {
            let found = format!("{on}: {free} free inodes, and {what} takes up to {files} files");
            Some(Line::error(topic, found, ELSEWHERE))
        }
        _ => None,
    }
}

fn judge(topic: &str, path: &Path, place: &Place, subject: &Subject, speed: Speed, saves: bool) -> Line {
    let each = subject.checkpoint_bytes();
    let there = if place.exists { "" } else { " (not there yet)" };
    let mut found = format!(
        "{}{there} on {}: {} free, writes {}, reads {}",
        path.display(),
        place.kind,
        size(place.free),
        rate(speed.write),
        rate(speed.read)
    );
    if saves {
        found.push_str(&format!("; a checkpoint: {}, {}", size(each), seconds(each as f64 / speed.write)));
    }
    let folder = if topic == RUN { path.join(CHECKPOINTS) } else { path.to_owned() };
    let all = if saves { kept(&subject.config, each).saturating_sub(taken(&folder)) } else { LOGS };
    if place.free < all {
        let what = if saves { "the checkpoints that are kept" } else { "logs and samples" };
        let found = format!("{found}; {what} will take {}", size(all));
        let fix =
            if saves { format!("{ELSEWHERE}; or keep fewer (checkpoint.keep)") } else { ELSEWHERE.into() };
        return Line::warning(topic, found, fix);
    }
    if place.is_memory() {
        let fix = "use a disk: this takes the host's memory and is gone when the host starts anew";
        return Line::warning(topic, found, fix);
    }
    if saves && speed.write < SLOW {
        let fix = "checkpoint.dir=PATH on a faster disk, or rarer saves (checkpoint.every); see `repa-dist bench checkpoint`";
        return Line::warning(topic, found, fix);
    }
    Line::ok(topic, found)
}

fn rate(bytes: f64) -> String {
    match bytes / 1e6 {
        mb if mb < 10.0 => format!("{mb:.1} MB/s"),
        mb if mb < 1000.0 => format!("{mb:.0} MB/s"),
        mb => format!("{:.1} GB/s", mb / 1e3),
    }
}

fn seconds(time: f64) -> String {
    match time {
        t if t < 0.1 => "under 0.1 s".into(),
        t if t < 10.0 => format!("{t:.1} s"),
        t if t < 120.0 => format!("{t:.0} s"),
        t => format!("{:.0} min", t / 60.0),
    }
}

/// Checkpoints in an object store. Only asked, not written to.
fn remote(config: &Config) -> Line {
    let places = checkpoints(config);
    let name = places.location().display().to_string();
    let (send, receive) = mpsc::channel();
    // Its client tries for minutes.
    std::thread::spawn(move || send.send(places.list().map(|listed| listed.steps.len())));
    let fix = "see the variables AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and, for servers other than \
               Amazon's, AWS_ENDPOINT_URL, on all hosts (docs/operating.md)";
    match receive.recv_timeout(REMOTE) {
        Ok(Ok(count)) => {
            Line::ok(CHECKPOINTS, format!("{name} answers, {count} there (writing is not tried)"))
        }
        Ok(Err(error)) => Line::error(CHECKPOINTS, error.to_string(), fix),
        Err(_) => Line::error(CHECKPOINTS, format!("{name}: no answer within {} s", REMOTE.as_secs()), fix),
    }
}

/// What training reads.
fn store(path: &Path, measured: &mut Measured) -> Line {
    let store = match data::open(path) {
        Ok(store) => store,
        // Most likely it is yet to be made, on this host or another.
        Err(StoreError::Missing { .. }) => {
            let fix =
                "`repa-dist data quickstart`, `data encode` or `data import` makes one; or set data.dir";
            return Line::warning(DATA, format!("no data set at {} yet", path.display()), fix);
        }
        Err(error) => {
            return Line::error(DATA, error.to_string(), "make it again, or set data.dir to another one");
        }
    };
    let kind = Place::at(path).map_or_else(|_| "?".to_owned(), |place| place.kind);
    let mut found = format!("{} on {kind}: {} samples", path.display(), store.len());
    let shards = &store.index().shards;
    if let Some(largest) = shards.iter().max_by_key(|shard| shard.bytes) {
        let bytes: u64 = shards.iter().map(|shard| shard.bytes).sum();
        found.push_str(&format!(" in {}, {}", plural(shards.len(), "shard"), size(bytes)));
        match measure_read(&path.join(&largest.file), measured.bytes) {
            // Small ones come from the system's cache.
            Ok(Some(speed)) if bytes > measured.bytes => found.push_str(&format!(", reads {}", rate(speed))),
            Ok(_) => {}
            Err(error) => {
                let fix = "make its files readable for this user";
                return Line::error(DATA, format!("{}: {error}", path.display()), fix);
            }
        }
    }
    Line::ok(DATA, found)
}

/// mpirun keeps its sockets there.
fn temporary() -> Line {
    let path: PathBuf = std::env::temp_dir();
    let written = Place::at(&path).and_then(|place| try_writing(&path).map(|()| place));
    let fix = "make it writable, free space there, or set TMPDIR to another folder: mpirun needs it";
    match written {
        Ok(place) if !place.exists => {
            Line::error(TEMPORARY, format!("{} does not exist", path.display()), fix)
        }
        Ok(place) if place.free < 64 << 20 => {
            Line::warning(TEMPORARY, format!("{}: {} free", path.display(), size(place.free)), fix)
        }
        Ok(place) => {
            Line::ok(TEMPORARY, format!("{} on {}: {} free", path.display(), place.kind, size(place.free)))
        }
        Err(error) => Line::error(TEMPORARY, format!("{} cannot be written: {error}", path.display()), fix),
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    const FAST: Speed = Speed { write: 5e8, read: 9e8 };

    fn place(kind: &str, free: u64) -> Place {
        Place {
            folder: "/somewhere".into(),
            exists: true,
            device: 1,
            kind: kind.into(),
            free,
            free_files: Some(1_000_000),
            read_only: false,
        }
    }

    fn subject() -> Subject {
        Subject::alone(Config::default(), 2, true)
    }

    #[test]
    fn room_is_judged_by_the_checkpoints_to_come() {
        let (subject, path) = (subject(), Path::new("/somewhere"));
        let each = subject.checkpoint_bytes();
        assert_eq!(kept(&subject.config, each), 3 * each, "two are kept, and one is being written");
        let line = |free| judge(RUN, path, &place("ext4", free), &subject, FAST, true);
        assert_eq!(line(4 * each).state, State::Ok);
        let tight = line(2 * each);
        assert!(tight.state == State::Warning && tight.found.contains("will take"), "{tight:?}");
        let full = crowded(RUN, path, &place("ext4", each / 2), &subject, true).expect("no room");
        assert!(full.state == State::Error && full.found.contains("a checkpoint takes"), "{full:?}");
        assert_eq!(crowded(RUN, path, &place("ext4", each / 2), &subject, false), None);
        let no_inodes = Place { free_files: Some(3), ..place("ext4", u64::MAX) };
        let full = crowded(RUN, path, &no_inodes, &subject, true).expect("no room");
        assert!(full.found.contains("3 free inodes"), "{full:?}");
        let unlimited = Place { free_files: None, ..place("Btrfs", u64::MAX) };
        assert_eq!(crowded(RUN, path, &unlimited, &subject, true), None);
    }

    #[test]
    fn checkpoints_that_are_kept_for_ever_count() {
        let mut config = Config::default();
        config.checkpoint.keep_every = 100_000;
        assert_eq!(kept(&config, 10), 10 * (2 + 1 + 4));
        config.checkpoint.keep_best = 1;
        assert_eq!(kept(&config, 10), 10 * (2 + 1 + 4 + 1));
    }

    #[test]
    fn memory_and_slow_disks_are_warned_of() {
        let (subject, path) = (subject(), Path::new("/somewhere"));
        let line = |kind, speed| judge(RUN, path, &place(kind, u64::MAX), &subject, speed, true).state;
        assert_eq!(line("NFS", FAST), State::Ok);
        assert_eq!(line("tmpfs", FAST), State::Warning);
        assert_eq!(line("NFS", Speed { write: 5e6, read: 9e8 }), State::Warning);
    }

    #[test]
    fn folders_are_tried() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut measured = Measured { bytes: 1 << 20, known: Vec::new() };
        let mut line = |path: &Path| writable(RUN, path, &subject(), &mut measured, false);
        let good = line(&folder.path().join("runs/new"));
        assert!(good.found.contains("(not there yet)") && good.state != State::Error, "{good:?}");
        let bad = line(Path::new("/proc/run"));
        assert!(bad.state == State::Error && bad.found.contains("/proc/run cannot be written"), "{bad:?}");
        let in_a_file = line(Path::new("/proc/version/run"));
        assert!(in_a_file.found.contains("is a file"), "{in_a_file:?}");
        assert_eq!(std::fs::read_dir(folder.path()).expect("read").count(), 0);
    }

    #[test]
    fn data_that_is_not_made_yet_is_no_error() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut measured = Measured { bytes: 1 << 20, known: Vec::new() };
        let line = store(&folder.path().join("nowhere"), &mut measured);
        assert!(line.state == State::Warning && line.fix.is_some(), "{line:?}");
        std::fs::write(folder.path().join("index.json"), "{").expect("written");
        assert_eq!(store(folder.path(), &mut measured).state, State::Error);
    }

    #[test]
    fn figures_have_units() {
        assert_eq!([rate(5e6), rate(512e6), rate(2.2e9)], ["5.0 MB/s", "512 MB/s", "2.2 GB/s"]);
        assert_eq!([0.01, 1.23, 61.0, 600.0].map(seconds), ["under 0.1 s", "1.2 s", "61 s", "10 min"]);
    }
}
