//! Commands on other hosts, through what mpirun starts its daemons with: ssh, another agent, or SLURM's srun.

use std::process::Command;
use std::time::Duration;

use super::command::quoted;
use super::error::LaunchError;
use crate::program;

/// How long a host may take to answer.
const ANSWER: Duration = Duration::from_secs(10);
/// The same through SLURM, whose controller may have many steps to start.
const ANSWER_OF_SLURM: Duration = Duration::from_secs(30);

/// What runs a command on a host.
#[derive(Debug, Clone)]
pub struct Agent {
    /// Its words, before the host's name.
    words: Vec<String>,
    /// What stands before the host's name in the same word.
    before_host: &'static str,
    /// Words before the command, which is one word for a shell.
    shell: &'static [&'static str],
    answer: Duration,
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
            false => Ok(Self { words, before_host: "", shell: &[], answer: ANSWER }),
        }
    }

    /// A step of a SLURM job for each command. It waits for no other step's processors, mpirun's among them.
    pub fn srun(job: &str) -> Self {
        let words = [
            "srun",
            &format!("--jobid={job}"),
            "--overlap",
            "--quiet",
            "--mpi=none",
            "--nodes=1",
            "--ntasks=1",
            "--cpus-per-task=1",
            "--input=none",
        ];
        Self {
            words: words.map(str::to_owned).to_vec(),
            before_host: "--nodelist=",
            shell: &["sh", "-c"],
            answer: ANSWER_OF_SLURM,
        }
    }

    /// Runs a command on a host, and waits for its end: what it printed.
    ///
    /// # Errors
    /// What to say of it, and whether the host answered at all.
    pub fn run(&self, host: &str, command: &[String]) -> Result<String, Refusal> {
        let name = &self.words[0];
        let mut agent = Command::new(name);
        agent.args(&self.words[1..]).arg(format!("{}{host}", self.before_host));
        agent.args(self.shell).arg(quoted(command));
        let ended = program::run(&mut agent, self.answer).map_err(|text| Refusal {
            text,
            answered: false,
            wrong: true,
        })?;
        let last = last_line(&ended.stderr).unwrap_or("no message").to_owned();
        match ended.code {
            Some(0) => Ok(ended.stdout),
            // A shell's words for a command that it cannot find or run; 255 and others are ssh's and the agents'.
            Some(126 | 127) => Err(Refusal { text: last, answered: true, wrong: true }),
            Some(code) => {
                let unknown = ["Could not resolve", "not known", "Unknown host", "unknown host"];
                let wrong = unknown.iter().any(|words| ended.stderr.contains(words));
                Err(Refusal { text: format!("{last} (exit code {code} of {name})"), answered: false, wrong })
            }
            None => Err(Refusal {
                text: match ended.late {
                    true => format!("no answer through {name} within {} s", self.answer.as_secs()),
                    false => format!("{last} ({name} was killed)"),
                },
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

/// The last line that says something: srun adds the exit code of a command, which is known.
fn last_line(text: &str) -> Option<&str> {
    let lines = || text.lines().map(str::trim).filter(|line| !line.is_empty());
    let adds = |line: &&str| line.starts_with("srun: error: ") && line.contains(": Exited with exit code ");
    lines().rfind(|line| !adds(line)).or_else(|| lines().next_back())
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
        assert!(none.expect_err("no agent").text.contains("does not start"));
        assert!(Agent::new(Some("  ")).is_err());
    }

    #[test]
    fn what_srun_adds_is_no_message() {
        let added = "srun: error: n2: task 0: Exited with exit code 127\n";
        let text = format!("sh: 1: /x: not found\n{added}");
        assert_eq!(last_line(&text), Some("sh: 1: /x: not found"));
        assert_eq!(last_line(added), Some(added.trim()));
        assert_eq!(last_line("\n"), None);
    }
}
