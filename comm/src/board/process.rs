//! Whether another process on this host still runs.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;

/// What the kernel says of a rank's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Process {
    /// It runs, as far as one can see.
    Running = 0,
    /// A signal or a debugger has stopped it.
    Stopped = 1,
    /// There is no such process any more.
    Ended = 2,
}

impl Process {
    pub(super) fn from_code(code: u64) -> Option<Self> {
        [Self::Running, Self::Stopped, Self::Ended].into_iter().find(|state| *state as u64 == code)
    }
}

/// Names one process: numbers are used again, and mean something only within their namespace (a container has one
/// of its own).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) pid: u64,
    /// In clock ticks since the boot; 0 where the kernel does not say.
    pub(super) started: u64,
    pub(super) namespace: u64,
}

impl Identity {
    /// This process.
    pub(super) fn here() -> Self {
        let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
        Self {
            pid: u64::from(std::process::id()),
            started: parse(&stat).map_or(0, |(_, started)| started),
            namespace: fs::metadata("/proc/self/ns/pid").map_or(0, |file| file.ino()),
        }
    }

    /// What has become of this process, seen by `reader`, another on the same host. Running where in doubt.
    pub(super) fn process(self, reader: Self) -> Process {
        if self.namespace != reader.namespace || self.started == 0 || reader.started == 0 {
            return Process::Running;
        }
        match fs::read_to_string(format!("/proc/{}/stat", self.pid)) {
            Ok(stat) => match parse(&stat) {
                Some((_, started)) if started != self.started => Process::Ended,
                Some(('Z' | 'X', _)) => Process::Ended,
                Some(('T' | 't', _)) => Process::Stopped,
                _ => Process::Running,
            },
            // The second where it ended between the opening and the reading.
            Err(error) if error.kind() == ErrorKind::NotFound || error.raw_os_error() == Some(3) => {
                Process::Ended
            }
            Err(_) => Process::Running,
        }
    }
}

/// State and start time of `/proc/*/stat`. The name, in brackets, may hold anything.
fn parse(stat: &str) -> Option<(char, u64)> {
    let mut fields = stat[stat.rfind(')')? + 1..].split_whitespace();
    let state = fields.next()?.chars().next()?;
    // The third field is the state, and the 22nd the start time.
    Some((state, fields.nth(18)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;
    use std::time::{Duration, Instant};

    #[test]
    fn a_process_is_seen_to_stop_and_end() {
        let here = Identity::here();
        assert_eq!(here.process(here), Process::Running);
        // Ends by itself, whatever becomes of this test.
        let mut child = Command::new("sleep").arg("20").spawn().expect("sleep starts");
        let stat = fs::read_to_string(format!("/proc/{}/stat", child.id())).expect("it runs");
        let (_, started) = parse(&stat).expect("a state");
        let identity = Identity { pid: u64::from(child.id()), started, namespace: here.namespace };
        assert_eq!(identity.process(here), Process::Running);
        let signal = |name: &str| {
            let status = Command::new("kill").args(["-s", name, &child.id().to_string()]).status();
            assert!(status.expect("kill runs").success());
        };
        let becomes = |state: Process| {
            let since = Instant::now();
            while identity.process(here) != state {
                assert!(since.elapsed() < Duration::from_secs(10), "never {state:?}");
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        signal("STOP");
        becomes(Process::Stopped);
        signal("KILL");
        // Not waited for yet: a zombie.
        becomes(Process::Ended);
        child.wait().expect("ended");
        assert_eq!(identity.process(here), Process::Ended);
        // The same number, used again or of another container.
        let other = Identity { started: started + 1, pid: here.pid, ..here };
        assert_eq!(other.process(here), Process::Ended);
        assert_eq!(Identity { namespace: 1, ..identity }.process(here), Process::Running);
    }

    #[test]
    fn names_may_hold_anything() {
        let stat = format!("7 (a) b (c) S {}99 0", "1 ".repeat(18));
        assert_eq!(parse(&stat), Some(('S', 99)));
        assert_eq!(parse("7 (a"), None);
        assert_eq!(parse(""), None);
    }
}
