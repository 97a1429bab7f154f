//! One page for the hosts of a job: rank 0 hears what the first rank of each host has found.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use repa_comm::{CommError, Communicator, all_gather};

use super::probe::Probe;
use super::{Line, State, Subject, clock, examine, mpi, storage};

/// How often clocks are compared; the middle one counts.
const TURNS: usize = 7;

/// Names shown of hosts that share a finding.
const SHOWN: usize = 4;

/// Looks at all hosts of a job. Called by all ranks, and the same on all.
///
/// # Errors
/// Those of the communication.
pub fn gather(
    comm: &dyn Communicator,
    subject: &Arc<Subject>,
    tell: &dyn Fn(&str),
) -> Result<Vec<Line>, CommError> {
    let topology = comm.topology();
    tell("MPI");
    let probe = Probe::of(comm)?;
    let offsets = offsets(comm)?;
    let mine = if comm.local_rank() == 0 { examine(subject, tell) } else { Vec::new() };
    let mine = serde_json::to_vec(&mine).map_err(|error| CommError::Start(error.to_string()))?;
    let told = comm.all_gather_bytes(&mine)?;
    let first_of = |node: usize| topology.node_of.iter().position(|&n| n == node);
    let firsts: Vec<usize> = (0..topology.nodes).filter_map(first_of).collect();
    let hosts: Vec<(String, Vec<Line>)> = firsts
        .iter()
        .map(|&rank| {
            let lines = serde_json::from_slice(&told[rank]).unwrap_or_else(|error| {
                let fix = "the same repa-dist on all hosts";
                vec![Line::error("host", format!("its report cannot be read: {error}"), fix)]
            });
            (topology.hosts[rank].clone(), lines)
        })
        .collect();
    let mut lines = mpi::of_job(comm, &probe);
    lines.push(mpi::transports());
    lines.extend(merge(&hosts));
    if topology.nodes > 1 {
        let named = firsts.iter().map(|&rank| (topology.hosts[rank].clone(), offsets[rank]));
        let after =
            lines.iter().rposition(|line| line.topic == clock::TOPIC).map_or(lines.len(), |at| at + 1);
        lines.splice(after..after, clock::judge_offsets(&named.collect::<Vec<_>>()));
    }
    Ok(lines)
}

/// How far each rank's clock is from rank 0's, in seconds.
fn offsets(comm: &dyn Communicator) -> Result<Vec<f64>, CommError> {
    let mut turns = Vec::new();
    for _ in 0..TURNS {
        comm.barrier()?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64());
        turns.push(all_gather(comm, &[now])?);
    }
    let middle = |rank: usize| {
        let mut apart: Vec<f64> = turns.iter().map(|turn| turn[rank][0] - turn[0][0]).collect();
        apart.sort_by(f64::total_cmp);
        apart[TURNS / 2]
    };
    Ok((0..comm.size()).map(middle).collect())
}

/// The lines of all hosts: once where hosts differ in figures alone (then with those of the first), and otherwise with
/// the hosts' names.
fn merge(hosts: &[(String, Vec<Line>)]) -> Vec<Line> {
    let mut groups: Vec<(Line, String, Vec<&str>)> = Vec::new();
    for (host, lines) in hosts {
        for line in lines {
            let shape = shape(&line.found, host);
            let same = |group: &&mut (Line, String, Vec<&str>)| {
                let (known, its_shape, its_hosts) = &**group;
                known.topic == line.topic
                    && known.state == line.state
                    && *its_shape == shape
                    && !its_hosts.contains(&host.as_str())
            };
            if let Some((.., its_hosts)) = groups.iter_mut().find(same) {
                its_hosts.push(host);
                continue;
            }
            // Beside the others of its topic, so that the page keeps its order.
            let after = groups.iter().rposition(|(known, ..)| known.topic == line.topic);
            let at = after.map_or(groups.len(), |at| at + 1);
            groups.insert(at, (line.clone(), shape, vec![host]));
        }
    }
    let named = |(line, _, its_hosts): (Line, String, Vec<&str>)| {
        let all = its_hosts.len() == hosts.len();
        let names = if all { Vec::new() } else { its_hosts.iter().map(|&host| host.to_owned()).collect() };
        Line { hosts: names, ..line }
    };
    groups.into_iter().map(named).map(not_yet_is_too_late).collect()
}

/// Data that are on some hosts and not on others are not to be made yet: they are missing there.
fn not_yet_is_too_late(line: Line) -> Line {
    if line.topic != storage::DATA || line.state != State::Warning || line.hosts.is_empty() {
        return line;
    }
    let fix =
        "`repa-dist data stage` copies a store to every host; or set data.dir to a folder that all hosts see";
    Line { state: State::Error, fix: Some(fix.into()), ..line }
}

/// A finding without its figures and its host's name.
fn shape(found: &str, host: &str) -> String {
    let mut shape = String::new();
    // As a word of its own: a host may be called "a".
    let words = found.split_inclusive(|c: char| !(c.is_alphanumeric() || "-._".contains(c)));
    let without = words.map(|word| match word.strip_prefix(host) {
        Some(rest) if rest.chars().count() < 2 && !rest.ends_with(char::is_alphanumeric) => {
            format!("HOST{rest}")
        }
        _ => word.to_owned(),
    });
    for c in without.collect::<String>().chars() {
        match c {
            '0'..='9' if shape.ends_with('#') => {}
            '0'..='9' => shape.push('#'),
            _ => shape.push(c),
        }
    }
    let mut shape = shape.replace("#.#", "#");
    for unit in ["KiB", "MiB", "GiB", "TiB"] {
        shape = shape.replace(unit, "B");
    }
    shape.replace("MB/s", "B/s").replace("GB/s", "B/s")
}

/// `n1, n2 and 5 more`.
pub fn names(hosts: &[String]) -> String {
    let shown = hosts.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
    match hosts.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_that_differ_in_figures_share_a_line() {
        let host = |name: &str, free: &str, clock: Line| {
            let disk = Line::ok("run folder", format!("runs on ext4: {free} free, writes 1.2 GB/s"));
            (name.to_owned(), vec![disk, Line::ok("host name", format!("{name} is 10.0.0.1")), clock])
        };
        let bad = || Line::warning("clock", "no time service keeps it", "chrony");
        let good = || Line::ok("clock", "kept by a time service, to 3 ms or better");
        let lines = merge(&[
            host("n1", "1.5 GiB", good()),
            host("n2", "900 MiB", bad()),
            host("n3", "2.0 TiB", good()),
        ]);
        let shown: Vec<(&str, Vec<String>)> =
            lines.iter().map(|line| (line.topic.as_str(), line.hosts.clone())).collect();
        let some = |names: &[&str]| names.iter().map(|&n| n.to_owned()).collect::<Vec<_>>();
        let expected = [
            ("run folder", some(&[])),
            ("host name", some(&[])),
            ("clock", some(&["n1", "n3"])),
            ("clock", some(&["n2"])),
        ];
        assert_eq!(shown, expected);
        assert!(lines[0].found.contains("1.5 GiB"), "those of the first");
    }

    #[test]
    fn data_have_to_be_on_all_hosts_or_none() {
        let missing = || Line::warning("data", "no data set at data yet", "make one");
        let merged = |b: Line| merge(&[("a".into(), vec![missing()]), ("b".into(), vec![b])]);
        assert_eq!(merged(missing())[0].state, State::Warning);
        let lines = merged(Line::ok("data", "data on ext4: 12 samples"));
        assert_eq!((lines[0].state, &lines[0].hosts[..]), (State::Error, &["a".to_owned()][..]));
        assert!(lines[0].fix.as_ref().is_some_and(|fix| fix.contains("data stage")));
    }

    #[test]
    fn a_host_may_say_the_same_twice() {
        let line = Line::ok("shared memory", "8 GiB");
        let lines = merge(&[("a".into(), vec![line.clone(), line.clone()]), ("b".into(), vec![line])]);
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[1].hosts, ["a"]);
    }

    #[test]
    fn the_name_of_a_host_is_no_difference() {
        assert_eq!(shape("n1 is 10.0.0.1", "n1"), shape("n22 is 10.0.0.22", "n22"));
        assert_eq!(shape("a data set (a)", "a"), "HOST data set (HOST)");
        assert_eq!(shape("n1x, n1", "n1"), "n#x, HOST");
        assert_eq!(shape("1.5 GiB at 900 MB/s", "h"), shape("20 MiB at 1.2 GB/s", "h"));
    }

    #[test]
    fn one_rank_has_no_offset() {
        assert_eq!(offsets(&repa_comm::Single::new()).expect("nothing to fail"), [0.0]);
        let hosts: Vec<String> = (1..=7).map(|i| format!("n{i}")).collect();
        assert_eq!(names(&hosts), "n1, n2, n3, n4 and 3 more");
        assert_eq!(names(&hosts[..2]), "n1, n2");
    }
}
