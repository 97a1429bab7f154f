//! SLURM: the job that this is part of, or the cluster that jobs could be handed to.

use super::Line;
use super::subject::{Subject, plural};
use crate::program::{Ended, ask};

const TOPIC: &str = "SLURM";
const PMIX: &str = "SLURM's PMIx";

/// Every line about SLURM.
pub fn lines(_subject: &Subject) -> Vec<Line> {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let first = match variable("SLURM_JOB_ID") {
        Some(job) => in_job(&job, &variable),
        None => match ask("sinfo", &["--noheader", "--format=%R %a %D %T"]) {
            Err(_) => return vec![Line::absent(TOPIC, "not here (no sinfo), and not needed")],
            Ok(ended) => cluster(&ended),
        },
    };
    // Where no cluster answers, there is nothing more to ask.
    let answers = first.state == super::State::Ok;
    let mut lines = vec![first];
    if answers {
        lines.extend(pmix());
    }
    lines
}

fn in_job(job: &str, variable: &dyn Fn(&str) -> Option<String>) -> Line {
    let number = |name: &str| variable(name).and_then(|value| value.parse::<usize>().ok());
    let nodes = number("SLURM_JOB_NUM_NODES").or_else(|| number("SLURM_NNODES"));
    let tasks = number("SLURM_STEP_NUM_TASKS").or_else(|| number("SLURM_NTASKS"));
    let mut found = format!("job {job}");
    if let Some(list) = variable("SLURM_JOB_NODELIST") {
        found.push_str(&format!(" on {}", nodes.map_or(String::new(), |n| plural(n, "node") + " ")));
        found.push_str(&format!("({list})"));
    }
    if let Some(tasks) = tasks {
        found.push_str(&format!(", {}", plural(tasks, "task")));
    }
    if let Some(partition) = variable("SLURM_JOB_PARTITION") {
        found.push_str(&format!(", partition {partition}"));
    }
    if let Some(left) = time_left(job) {
        found.push_str(&format!(", time left {left}"));
    }
    // Whether its tasks find each other, the line about ranks says.
    Line::ok(TOPIC, found)
}

fn time_left(job: &str) -> Option<String> {
    let ended = ask("squeue", &["--noheader", "--jobs", job, "--format=%L"]).ok().filter(Ended::is_good)?;
    let text = ended.stdout.lines().next()?.trim().to_owned();
    (!text.is_empty()).then_some(text)
}

/// What `sinfo` says: a line for each state of a partition's nodes.
fn cluster(ended: &Ended) -> Line {
    if !ended.is_good() {
        let said = ended.complaint();
        // Its programs are installed, and no cluster is.
        let none = ["configuration source", "DNS SRV", "slurm.conf"];
        return match none.iter().any(|words| ended.stderr.contains(words)) {
            true => Line::absent(TOPIC, "its programs are here, and no cluster is configured"),
            false => Line::warning(
                TOPIC,
                format!("the cluster does not answer: {said}"),
                "see `scontrol ping`, and whether slurmctld and munged run",
            ),
        };
    }
    let mut partitions: Vec<(&str, usize, usize)> = Vec::new();
    for line in ended.stdout.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [name, up, nodes, state] = words[..] else { continue };
        let nodes: usize = nodes.parse().unwrap_or(0);
        let idle = if up == "up" && state.starts_with("idle") { nodes } else { 0 };
        match partitions.iter_mut().find(|(known, ..)| *known == name) {
            Some((_, all, free)) => (*all, *free) = (*all + nodes, *free + idle),
            None => partitions.push((name, nodes, idle)),
        }
    }
    if partitions.is_empty() {
        return Line::warning(
            TOPIC,
            "the cluster has no partition for you",
            "see `sinfo`, or ask who runs it",
        );
    }
    let list: Vec<String> = partitions
        .iter()
        .take(6)
        .map(|(name, nodes, idle)| format!("{name} ({}, {idle} idle)", plural(*nodes, "node")))
        .collect();
    let more = if partitions.len() > 6 { ", ..." } else { "" };
    Line::ok(TOPIC, format!("partitions {}{more}", list.join(", ")))
}

fn pmix() -> Option<Line> {
    let ended = ask("srun", &["--mpi=list"]).ok()?;
    Some(judge_pmix(&(ended.stdout + "\n" + &ended.stderr)))
}

/// `text` is what `srun --mpi=list` prints.
fn judge_pmix(text: &str) -> Line {
    let known = ["none", "pmi2", "openmpi", "cray_shasta"];
    let words = text.split(|c: char| c.is_whitespace() || ",:".contains(c)).filter(|word| !word.is_empty());
    let mut kinds: Vec<&str> =
        words.filter(|word| word.starts_with("pmix") || known.contains(word)).collect();
    kinds.sort_unstable();
    kinds.dedup();
    let list = kinds.join(", ");
    match kinds.iter().any(|kind| kind.starts_with("pmix")) {
        true => Line::ok(PMIX, format!("srun --mpi=pmix (srun has {list})")),
        false => Line::warning(
            PMIX,
            format!(
                "srun has {}: ranks of OpenMPI cannot find each other",
                if list.is_empty() { "none" } else { &list }
            ),
            "mpirun inside the allocation (`repa-dist slurm --mpi mpirun`), or SLURM's plugin mpi_pmix (Debian 12: \
             slurm-wlm-basic-plugins)",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;
    use std::time::Duration;

    fn ended(code: i32, stdout: &str, stderr: &str) -> Ended {
        let (stdout, stderr) = (stdout.into(), stderr.into());
        Ended { code: Some(code), late: false, stdout, stderr, took: Duration::ZERO }
    }

    #[test]
    fn partitions_are_summed_up() {
        let text = "gpu up 3 idle\ngpu up 5 allocated\nlow up 2 idle~\nold down 1 idle\n";
        let line = cluster(&ended(0, text, ""));
        assert_eq!(
            line.found,
            "partitions gpu (8 nodes, 3 idle), low (2 nodes, 2 idle), old (1 node, 0 idle)"
        );
        assert_eq!(cluster(&ended(0, "", "")).state, State::Warning);
        let none = "sinfo: fatal: Could not establish a configuration source\n";
        assert_eq!(cluster(&ended(1, "", none)).state, State::Absent);
        let down = "slurm_load_partitions: Unable to contact slurm controller (connect failure)\n";
        let line = cluster(&ended(1, "", down));
        assert!(line.state == State::Warning && line.found.contains("Unable to contact"), "{line:?}");
    }

    #[test]
    fn pmix_is_looked_for_in_both_forms_of_the_list() {
        let new = "MPI plugin types are...\n\tpmix\n\tnone\n\tpmi2\nspecific pmix plugin versions available: pmix_v4\n";
        let line = judge_pmix(new);
        assert_eq!(line.state, State::Ok);
        assert_eq!(line.found, "srun --mpi=pmix (srun has none, pmi2, pmix, pmix_v4)");
        assert_eq!(judge_pmix("srun: MPI types are...\nsrun: none\nsrun: pmix_v2\n").state, State::Ok);
        let line = judge_pmix("srun: MPI types are...\nsrun: none\nsrun: pmi2\n");
        assert!(line.state == State::Warning && line.found.contains("none, pmi2"), "{line:?}");
        assert_eq!(judge_pmix("").state, State::Warning);
    }

    #[test]
    fn a_job_is_described_by_its_variables() {
        let variables = [
            ("SLURM_JOB_NUM_NODES", "3"),
            ("SLURM_JOB_NODELIST", "n[1-3]"),
            ("SLURM_STEP_NUM_TASKS", "6"),
            ("SLURM_JOB_PARTITION", "gpu"),
        ];
        let variable = |name: &str| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        };
        let line = in_job("0", &variable);
        assert!(line.found.starts_with("job 0 on 3 nodes (n[1-3]), 6 tasks, partition gpu"), "{line:?}");
        assert!(in_job("0", &|_| None).found.starts_with("job 0"));
    }
}
