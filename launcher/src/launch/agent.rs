//! Commands on other hosts, through what mpirun starts its daemons with: ssh, or another agent.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

use super::command::quoted;
use super::error::LaunchError;

/// How long a host may take to answer.
pub const ANSWER: Duration = Duration::from_secs(10);

/// The agent's words, before the host's name.
#[derive(Debug, Clone)]
pub struct Agent {
    words: Vec<String>,
}

impl Agent {
    /// From the option; ssh without it.
    pub fn new(option: Option<&str>) -> Result<Self, LaunchError> {
        let words: Vec<String> = match option {
            None => "ssh -x -o BatchMode=yes -o ConnectTimeout=8".split(' ').map(str::to_owned).collect(),
            Some(text) => text.split_whitespace().map(str::to_owned).collect(),
        };
        match words.is_empty() {
            true => Err(LaunchError::Agent {
                text: option.unwrap_or_default().to_owned(),
                problem: "name a program such as ssh, with its options".into(),
            }),
            false => Ok(Self { words }),
        }
    }

    /// Runs a command on a host, and waits for its end: what it printed.
    ///
    /// # Errors
    /// What to say of it, and whether the host answered at all.
    pub fn run(&self, host: &str, command: &[String]) -> Result<String, Refusal> {
        let name = &self.words[0];
        let mut child = Command::new(name)
            .args(&self.words[1..])
            .arg(host)
            .arg(quoted(command))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .map_err(|e| Refusal {
                text: format!("cannot start {name}: {e}"),
                answered: false,
                wrong: true,
            })?;
        let stdout = collect(child.stdout.take());
        let stderr = collect(child.stderr.take());
        let started = Instant::now();
        let status = loop {
            match child.try_wait() {
                Ok(Some(status)) => break Some(status),
                Ok(None) if started.elapsed() < ANSWER => std::thread::sleep(Duration::from_millis(10)),
                _ => break None,
            }
        };
        if status.is_none() {
            if let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
                // The agent may have started others, which hold the pipes.
                let _ = kill_process_group(group, Signal::KILL);
            }
            let _ = child.wait();
        }
        let text =
            |from: &mpsc::Receiver<String>| from.recv_timeout(Duration::from_millis(500)).unwrap_or_default();
        let (out, err) = (text(&stdout), text(&stderr));
        let last = err.trim().lines().next_back().unwrap_or("no message").trim().to_owned();
        match status.and_then(|status| status.code()) {
            Some(0) => Ok(out),
            // A shell's words for a command that it cannot find or run; 255 and others are ssh's and the agents'.
            Some(code @ (126 | 127)) => Err(Refusal { text: last, answered: true, wrong: code > 0 }),
            Some(code) => {
                let unknown = ["Could not resolve", "not known", "Unknown host", "unknown host"];
                let wrong = unknown.iter().any(|words| err.contains(words));
                Err(Refusal { text: format!("{last} (exit code {code} of {name})"), answered: false, wrong })
            }
            None => Err(Refusal {
                text: format!("no answer through {name} within {} s", ANSWER.as_secs()),
                answered: false,
                wrong: false,
            }),
        }
    }
}

/// Why a command did not run on a host.
#[derive(Debug, Clone)]
pub struct Refusal {
    /// What was said.
    pub text: String,
    /// Whether the host could be reached.
    pub answered: bool,
    /// Whether trying again cannot help.
    pub wrong: bool,
}

/// Reads to the end on a thread of its own: something the agent has left behind may keep the pipe open.
fn collect(from: Option<impl Read + Send + 'static>) -> mpsc::Receiver<String> {
    let (send, receive) = mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut from) = from {
            // What came before an error is what there is to show.
            let _ = from.read_to_end(&mut bytes);
        }
        let _ = send.send(String::from_utf8_lossy(&bytes).into_owned());
    });
    receive
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn agents_answer_or_say_why_not() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("agent");
        let script =
            "#!/bin/sh\n[ $1 = nowhere ] && { echo no route >&2; exit 255; }\nshift; exec sh -c \"$*\"\n";
        std::fs::write(&path, script).expect("written");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("set");
        let agent = Agent::new(path.to_str()).expect("an agent");
        let words = |words: &[&str]| words.iter().map(|&w| w.to_owned()).collect::<Vec<_>>();
        assert_eq!(agent.run("a", &words(&["echo", "two words"])).expect("an answer"), "two words\n");
        let missing = agent.run("a", &words(&["/nonexistent/x"])).expect_err("no program");
        assert!(missing.answered && missing.wrong && missing.text.contains("not found"), "{missing:?}");
        let gone = agent.run("nowhere", &words(&["true"])).expect_err("no host");
        assert!(!gone.answered && !gone.wrong && gone.text.contains("no route"), "{gone:?}");
        let none = Agent::new(Some("/nonexistent/agent")).expect("words").run("a", &words(&["true"]));
        assert!(none.expect_err("no agent").text.contains("cannot start"));
        assert!(Agent::new(Some("  ")).is_err());
    }
}
