//! The findings on one page, or as JSON.

use serde_json::{Value, json};

use super::gather::names;
use super::subject::plural;
use super::{Line, State};

/// Width of the states' column.
const STATES: usize = 9;

/// Least and most width of the page.
const WIDTHS: (usize, usize) = (60, 120);

/// All there is to say.
#[derive(Debug)]
pub struct Page {
    /// What was looked at, on one line.
    pub about: String,
    /// The hosts.
    pub hosts: Vec<String>,
    /// Ranks that the run has, or would have.
    pub ranks: usize,
    /// The findings.
    pub lines: Vec<Line>,
}

impl Page {
    /// How many lines have a state.
    pub fn count(&self, state: State) -> usize {
        self.lines.iter().filter(|line| line.state == state).count()
    }

    /// For people: columns within `width`, in colour or not.
    pub fn text(&self, width: usize, colour: bool) -> String {
        let width = width.clamp(WIDTHS.0, WIDTHS.1);
        let topics = self.lines.iter().map(|line| line.topic.chars().count()).max().unwrap_or(0) + 2;
        let indent = " ".repeat(STATES + topics);
        let room = width.saturating_sub(STATES + topics);
        let mut text = format!("{}\n\n", wrap(&self.about, width).join("\n"));
        let mut before = "";
        for line in &self.lines {
            // The column stays empty where a topic has another line.
            let topic = if line.topic == before { "" } else { line.topic.as_str() };
            before = &line.topic;
            let found = match line.hosts.is_empty() {
                true => line.found.clone(),
                false => format!("{}: {}", names(&line.hosts), line.found),
            };
            let state = format!("{:<STATES$}", line.state.word());
            let state = if colour { format!("\x1b[{}m{state}\x1b[0m", line.state.colour()) } else { state };
            text.push_str(&format!("{state}{topic:<topics$}"));
            text.push_str(&wrap(&found, room).join(&format!("\n{indent}")));
            text.push('\n');
            if let Some(fix) = &line.fix {
                let rest = format!("\n{indent}     ");
                text.push_str(&format!("{indent}fix: {}\n", wrap(fix, room.saturating_sub(5)).join(&rest)));
            }
        }
        format!("{text}\n{}\n", self.verdict())
    }

    /// The last line.
    fn verdict(&self) -> String {
        match (self.count(State::Error), self.count(State::Warning)) {
            (0, 0) => "all is well".into(),
            (0, warnings) => format!("no errors, {}", plural(warnings, "warning")),
            (errors, 0) => plural(errors, "error"),
            (errors, warnings) => format!("{}, {}", plural(errors, "error"), plural(warnings, "warning")),
        }
    }

    /// For programs: `{"hosts": [...], "ranks": 2, "errors": 0, "warnings": 1, "lines": [{"topic", "state", "found",
    /// "fix"}, ...]}`; a line that does not hold for all hosts has `"hosts"` as well.
    ///
    /// # Errors
    /// None that a finding can cause.
    pub fn json(&self) -> serde_json::Result<Value> {
        Ok(json!({
            "hosts": self.hosts,
            "ranks": self.ranks,
            "errors": self.count(State::Error),
            "warnings": self.count(State::Warning),
            "lines": serde_json::to_value(&self.lines)?,
        }))
    }
}

impl State {
    fn word(self) -> &'static str {
        match self {
            State::Ok => "ok",
            State::Warning => "warning",
            State::Error => "error",
            State::Absent => "-",
        }
    }

    /// Green, yellow, bold red, faint.
    fn colour(self) -> &'static str {
        match self {
            State::Ok => "32",
            State::Warning => "33",
            State::Error => "1;31",
            State::Absent => "2",
        }
    }
}

/// Lines of at most `width` characters, where words allow it.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    let mut used = 0;
    for word in text.split_whitespace() {
        let length = word.chars().count();
        if used > 0 && used + 1 + length > width {
            lines.push(String::new());
            used = 0;
        }
        // There is always a last one.
        if let Some(line) = lines.last_mut() {
            if used > 0 {
                line.push(' ');
                used += 1;
            }
            line.push_str(word);
            used += length;
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page() -> Page {
        let long = "a finding that goes on for longer than one line of a narrow page has room for";
        let mut apart =
            Line::warning("clock", long, "a time service, such as chrony, on that host and its like");
        apart.hosts = vec!["n2".into()];
        Page {
            about: "repa-dist on n1".into(),
            hosts: vec!["n1".into(), "n2".into()],
            ranks: 2,
            lines: vec![
                Line::ok("MPI", "Open MPI v4.1.4"),
                Line::ok("clock", "kept"),
                apart,
                Line::absent("SLURM", "not here"),
                Line::error("run folder", "full", "free space"),
            ],
        }
    }

    #[test]
    fn columns_stand_under_each_other() {
        let expected = "\
repa-dist on n1

ok       MPI         Open MPI v4.1.4
ok       clock       kept
warning              n2: a finding that goes on for longer
                     than one line of a narrow page has room
                     for
                     fix: a time service, such as chrony, on
                          that host and its like
-        SLURM       not here
error    run folder  full
                     fix: free space

1 error, 1 warning
";
        assert_eq!(page().text(61, false), expected);
        let coloured = page().text(61, true);
        assert!(coloured.contains("\x1b[32mok       \x1b[0mMPI"), "{coloured:?}");
        assert!(page().text(0, false).lines().all(|line| line.len() <= WIDTHS.0));
    }

    #[test]
    fn the_last_line_counts() {
        let of = |lines| Page { lines, ..page() }.verdict();
        assert_eq!(of(Vec::new()), "all is well");
        assert_eq!(of(vec![Line::warning("a", "b", "c"); 2]), "no errors, 2 warnings");
        assert_eq!(of(vec![Line::error("a", "b", "c")]), "1 error");
    }

    #[test]
    fn programs_read_the_same() {
        let json = page().json().expect("JSON");
        assert_eq!((&json["errors"], &json["warnings"]), (&1.into(), &1.into()));
        let line = &json["lines"][2];
        assert_eq!((&line["state"], &line["hosts"][0]), (&"warning".into(), &"n2".into()));
        assert!(json["lines"][0].get("hosts").is_none() && json["lines"][0]["fix"].is_null());
    }
}
