//! Other programs, each with a deadline.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

/// How long a program that only answers a question may take.
pub const ANSWER: Duration = Duration::from_secs(10);

/// How a program ended.
#[derive(Debug, Clone)]
pub struct Ended {
    /// Exit code; None where a signal or the deadline ended it.
    pub code: Option<i32>,
    /// Whether the deadline ended it.
    pub late: bool,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// How long it took.
    pub took: Duration,
}

impl Ended {
    /// Whether it says that all went well.
    pub fn is_good(&self) -> bool {
        self.code == Some(0)
    }

    /// What it says of its failure: its first sentence that is no ornament.
    pub fn complaint(&self) -> String {
        if self.late {
            return format!("no answer within {:.0} s", self.took.as_secs_f64());
        }
        match (first_sentence(&self.stderr).or_else(|| first_sentence(&self.stdout)), self.code) {
            (Some(said), _) => said,
            (None, Some(code)) => format!("exit code {code}"),
            (None, None) => "it was killed".to_owned(),
        }
    }
}

/// The first sentence of a text, or its first paragraph, between rules and empty lines.
fn first_sentence(text: &str) -> Option<String> {
    const LONGEST: usize = 240;
    let is_said = |line: &&str| line.chars().filter(|c| c.is_alphanumeric()).count() > 2;
    let lines = text.lines().map(str::trim).skip_while(|line| !is_said(line)).take_while(is_said);
    let paragraph = lines.collect::<Vec<_>>().join(" ");
    let sentence = paragraph.split_once(". ").map_or(paragraph.as_str(), |(first, _)| first);
    let short: String = sentence.trim_end_matches('.').chars().take(LONGEST).collect();
    (!short.is_empty()).then_some(short)
}

/// Where a program of the path lies.
pub fn find(program: &str) -> Option<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    let runs = |path: &PathBuf| {
        std::fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    std::env::split_paths(&std::env::var_os("PATH")?).map(|folder| folder.join(program)).find(runs)
}

/// Asks a program a question.
///
/// # Errors
/// It cannot be started; the text says why not.
pub fn ask(program: &str, arguments: &[&str]) -> Result<Ended, String> {
    run(Command::new(program).args(arguments), ANSWER)
}

/// Runs a program to its end, or to a deadline, when it is killed with what it has started in its process group.
///
/// # Errors
/// It cannot be started; the text says why not.
pub fn run(command: &mut Command, deadline: Duration) -> Result<Ended, String> {
    let started = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .map_err(|error| format!("{} does not start: {error}", command.get_program().to_string_lossy()))?;
    let (stdout, stderr) = (collect(child.stdout.take()), collect(child.stderr.take()));
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break Some(status),
            Ok(None) if started.elapsed() < deadline => std::thread::sleep(Duration::from_millis(5)),
            _ => break None,
        }
    };
    let took = started.elapsed();
    if status.is_none() {
        if let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
            // One that has ended meanwhile is as good.
            let _ = kill_process_group(group, Signal::KILL);
        }
        let _ = child.wait();
    }
    // What it has left behind may hold the pipes.
    let text = |from: &mpsc::Receiver<String>| from.recv_timeout(Duration::from_secs(1)).unwrap_or_default();
    Ok(Ended {
        code: status.and_then(|status| status.code()),
        late: status.is_none(),
        stdout: text(&stdout),
        stderr: text(&stderr),
        took,
    })
}

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

    #[test]
    fn programs_end_one_way_or_another() {
        let shell = |line: &str, deadline| run(Command::new("sh").args(["-c", line]), deadline);
        let good = shell("echo out; echo err >&2", ANSWER).expect("started");
        assert!(good.is_good() && good.stdout == "out\n" && good.stderr == "err\n", "{good:?}");
        let bad = shell("echo -------- >&2; echo '  no such thing ' >&2; exit 3", ANSWER).expect("started");
        assert!(!bad.is_good() && bad.complaint() == "no such thing", "{bad:?}");
        let wordy = shell(
            "printf -- '---\\nNo room in\\n/dev/x.y (it is full). Then\\nmore.\\n\\nEnd\\n'; exit 1",
            ANSWER,
        );
        assert_eq!(wordy.expect("started").complaint(), "No room in /dev/x.y (it is full)");
        assert_eq!(shell("exit 3", ANSWER).expect("started").complaint(), "exit code 3");
        let late = shell("sleep 60 & sleep 60", Duration::from_millis(100)).expect("started");
        assert!(
            late.late && late.took < ANSWER && late.complaint().starts_with("no answer within"),
            "{late:?}"
        );
        assert!(run(&mut Command::new("/nonexistent/program"), ANSWER).is_err());
    }

    #[test]
    fn programs_are_found_on_the_path() {
        assert!(find("sh").is_some_and(|path| path.is_absolute()));
        assert_eq!(find("no-such-program-here"), None);
    }
}
