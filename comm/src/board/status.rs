//! What the board says of the ranks, for people and for programs.

use super::process::Process;
use crate::Call;
use std::fmt;
use std::time::Duration;

/// What a rank's training thread does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// All that comes before the first step.
    Starting = 1,
    /// Waits for the next batch.
    WaitingForData = 2,
    /// Forward and backward pass.
    Computing = 3,
    /// Waits for sums over the ranks.
    Communicating = 4,
    /// Updates the weights.
    Optimizing = 5,
    /// Writes a checkpoint.
    Saving = 6,
    /// Anything else between steps, such as writing logs or images.
    Idle = 7,
    /// Has nothing more to do.
    Ended = 8,
    /// Draws sample images.
    Sampling = 9,
}

impl Phase {
    const ALL: [Self; 9] = [
        Self::Starting,
        Self::WaitingForData,
        Self::Computing,
        Self::Communicating,
        Self::Optimizing,
        Self::Saving,
        Self::Idle,
        Self::Ended,
        Self::Sampling,
    ];

    pub(super) fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|phase| *phase as u8 == code)
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Starting => "starting",
            Self::WaitingForData => "waiting for data",
            Self::Computing => "computing",
            Self::Communicating => "communicating",
            Self::Optimizing => "in the optimizer",
            Self::Saving => "saving",
            Self::Idle => "between steps",
            Self::Ended => "done",
            Self::Sampling => "drawing sample images",
        })
    }
}

/// What one rank has told. Times are as of the reading, by the clock of the rank's own host.
#[derive(Debug, Clone, PartialEq)]
pub struct Progress {
    /// Its process number.
    pub pid: u32,
    /// Whether the process runs.
    pub process: Process,
    /// The training step; None before the first.
    pub step: Option<u64>,
    /// What the training thread does.
    pub phase: Phase,
    /// For how long.
    pub in_phase: Duration,
    /// Collectives begun since the board's start. A rank with fewer than another is behind it.
    pub entered: u64,
    /// Collectives ended since then.
    pub left: u64,
    /// The collective that it is in (without its step), and for how long.
    pub call: Option<(Call, Duration)>,
    /// Time since the last change of any kind.
    pub unchanged: Duration,
    /// How long the last step took, if that was told.
    pub step_time: Option<Duration>,
}

/// What a reader knows of a rank.
#[derive(Debug, Clone, PartialEq)]
pub enum RankState {
    /// What it told.
    Known(Progress),
    /// Its host did not answer in time.
    NoAnswer,
    /// Its host answers for its other ranks, and shares no memory with this one.
    NotShared,
}

/// One rank, as the board has it.
#[derive(Debug, Clone, PartialEq)]
pub struct RankStatus {
    /// Its number.
    pub rank: usize,
    /// Its host.
    pub host: String,
    /// What is known.
    pub state: RankState,
}

impl RankStatus {
    /// What the rank told, if that is known.
    pub fn progress(&self) -> Option<&Progress> {
        match &self.state {
            RankState::Known(progress) => Some(progress),
            RankState::NoAnswer | RankState::NotShared => None,
        }
    }

    /// Without rank and host.
    fn said(&self) -> Said {
        let progress = match &self.state {
            RankState::Known(progress) => progress,
            RankState::NoAnswer => return Said::plain("host does not answer"),
            RankState::NotShared => return Said::plain("unknown (no shared memory with it)"),
        };
        let step = progress.step.map_or_else(String::new, |step| format!("step {step}, "));
        let words = match &progress.call {
            Some((call, time)) if progress.phase == Phase::Communicating => {
                Said::over(format!("{step}in {call} for "), *time)
            }
            Some((call, time)) => Said {
                before: format!("{step}{} for ", progress.phase),
                time: Some(progress.in_phase),
                between: format!(", in {call} for "),
                call_time: Some(*time),
            },
            None => Said::over(format!("{step}{} for ", progress.phase), progress.in_phase),
        };
        let process = match progress.process {
            Process::Running => return words,
            Process::Stopped => "its process is stopped; ",
            Process::Ended => "its process has ended; ",
        };
        Said { before: format!("{process}{}", words.before), ..words }
    }

    /// Smaller is more telling.
    fn order(&self) -> (u8, u64) {
        match &self.state {
            RankState::Known(Progress { process: Process::Ended, .. }) => (0, 0),
            RankState::NoAnswer => (1, 0),
            RankState::Known(Progress { process: Process::Stopped, .. }) => (2, 0),
            RankState::Known(progress) => (3, progress.entered),
            RankState::NotShared => (4, 0),
        }
    }
}

impl fmt::Display for RankStatus {
    /// "rank 3 on h2: step 120, computing for 12.3 s".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} on {}: {}", self.rank, self.host, self.said())
    }
}

/// Words with times in them: ranks that say the same but for the times are told together.
#[derive(Debug, Clone, PartialEq)]
struct Said {
    before: String,
    time: Option<Duration>,
    between: String,
    call_time: Option<Duration>,
}

impl Said {
    fn plain(words: &str) -> Self {
        Self { before: words.to_owned(), time: None, between: String::new(), call_time: None }
    }

    fn over(words: String, time: Duration) -> Self {
        Self { before: words, time: Some(time), between: String::new(), call_time: None }
    }

    /// Takes the longer times where all else is the same.
    fn join(&mut self, other: &Self) -> bool {
        let same = self.before == other.before && self.between == other.between;
        if same {
            self.time = self.time.max(other.time);
            self.call_time = self.call_time.max(other.call_time);
        }
        same
    }
}

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (words, time) in [(&self.before, self.time), (&self.between, self.call_time)] {
            f.write_str(words)?;
            if let Some(time) = time {
                write!(f, "{:.1} s", time.as_secs_f64())?;
            }
        }
        Ok(())
    }
}

/// Lines at most, for a terminal.
const LINES: usize = 8;

/// Which ranks another waits for, a line for those of a host that are in the same state, the most telling first: those
/// whose process has ended, hosts that do not answer, stopped processes, then those that have begun the fewest
/// collectives. Eight lines at most.
///
/// `entered` is how many collectives the waiting rank has begun. Ranks that have begun as many wait themselves and
/// are left out; where that leaves nobody, those `waited_for` are told.
pub fn describe_late(snapshot: &[RankStatus], entered: u64, waited_for: &[usize]) -> String {
    let late = |status: &&RankStatus| match &status.state {
        RankState::Known(progress) => progress.process != Process::Running || progress.entered < entered,
        RankState::NoAnswer => true,
        RankState::NotShared => waited_for.contains(&status.rank),
    };
    let mut told: Vec<&RankStatus> = snapshot.iter().filter(late).collect();
    if told.is_empty() {
        told = snapshot.iter().filter(|status| waited_for.contains(&status.rank)).collect();
    }
    told.sort_by_key(|status| (status.order(), status.rank));
    let mut groups: Vec<(&str, Vec<usize>, Said)> = Vec::new();
    for status in told {
        let said = status.said();
        let same = groups
            .iter_mut()
            .find_map(|(host, ranks, group)| (*host == status.host && group.join(&said)).then_some(ranks));
        match same {
            Some(ranks) => ranks.push(status.rank),
            None => groups.push((&status.host, vec![status.rank], said)),
        }
    }
    let shown = if groups.len() > LINES { LINES - 1 } else { groups.len() };
    let mut lines: Vec<String> = groups[..shown]
        .iter()
        .map(|(host, ranks, said)| format!("{} on {host}: {said}", name(ranks)))
        .collect();
    if shown < groups.len() {
        let more: usize = groups[shown..].iter().map(|(_, ranks, _)| ranks.len()).sum();
        lines.push(format!("and {more} more ranks"));
    }
    lines.join("\n")
}

/// "rank 3", "ranks 0, 4-7".
fn name(ranks: &[usize]) -> String {
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    let mut sorted = ranks.to_vec();
    sorted.sort_unstable();
    for rank in sorted {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == rank => *last = rank,
            _ => ranges.push((rank, rank)),
        }
    }
    let range = |&(first, last): &(usize, usize)| match last - first {
        0 => format!("{first}"),
        1 => format!("{first}, {last}"),
        _ => format!("{first}-{last}"),
    };
    let all: Vec<String> = ranges.iter().map(range).collect();
    format!("{} {}", if ranks.len() == 1 { "rank" } else { "ranks" }, all.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Collective;

    fn known(rank: usize, entered: u64, change: impl FnOnce(&mut Progress)) -> RankStatus {
        let mut progress = Progress {
            pid: 1000 + rank as u32,
            process: Process::Running,
            step: Some(120),
            phase: Phase::Computing,
            in_phase: Duration::from_millis(12_300 + rank as u64),
            entered,
            left: entered,
            call: None,
            unchanged: Duration::ZERO,
            step_time: None,
        };
        change(&mut progress);
        RankStatus { rank, host: format!("h{}", rank / 4), state: RankState::Known(progress) }
    }

    fn silent(rank: usize) -> RankStatus {
        RankStatus { rank, host: format!("h{}", rank / 4), state: RankState::NoAnswer }
    }

    #[test]
    fn a_rank_says_what_it_does() {
        let reduce = Call { collective: Collective::AllReduce, bucket: Some(7), step: None };
        let in_call = |p: &mut Progress| p.call = Some((reduce, Duration::from_secs(3)));
        assert_eq!(known(3, 5, |_| ()).to_string(), "rank 3 on h0: step 120, computing for 12.3 s");
        assert_eq!(
            known(3, 5, in_call).to_string(),
            "rank 3 on h0: step 120, computing for 12.3 s, in all-reduce of bucket 7 for 3.0 s"
        );
        let waits = |p: &mut Progress| {
            in_call(p);
            p.phase = Phase::Communicating;
        };
        assert_eq!(
            known(3, 5, waits).to_string(),
            "rank 3 on h0: step 120, in all-reduce of bucket 7 for 3.0 s"
        );
        let ended = |p: &mut Progress| {
            (p.step, p.phase, p.process) = (None, Phase::Starting, Process::Ended);
        };
        assert_eq!(
            known(4, 5, ended).to_string(),
            "rank 4 on h1: its process has ended; starting for 12.3 s"
        );
        assert_eq!(silent(4).to_string(), "rank 4 on h1: host does not answer");
    }

    #[test]
    fn those_behind_are_named_together() {
        let stopped = |p: &mut Progress| p.process = Process::Stopped;
        let mut snapshot: Vec<_> =
            [7, 6, 6, 7].into_iter().enumerate().map(|(r, n)| known(r, n, |_| ())).collect();
        snapshot.extend((4..8).map(silent));
        snapshot.extend([known(8, 7, stopped), known(9, 3, |_| ()), known(10, 9, |_| ())]);
        assert_eq!(
            describe_late(&snapshot, 7, &[1, 2, 4]).lines().collect::<Vec<_>>(),
            [
                "ranks 4-7 on h1: host does not answer",
                "rank 8 on h2: its process is stopped; step 120, computing for 12.3 s",
                "rank 9 on h2: step 120, computing for 12.3 s",
                "ranks 1, 2 on h0: step 120, computing for 12.3 s",
            ]
        );
    }

    #[test]
    fn where_nobody_is_behind_those_waited_for_are_named() {
        let snapshot: Vec<_> = (0..3).map(|rank| known(rank, 7, |_| ())).collect();
        let expected = "rank 2 on h0: step 120, computing for 12.3 s";
        assert_eq!(describe_late(&snapshot, 7, &[2]), expected);
        assert_eq!(describe_late(&snapshot, 7, &[]), "");
    }

    #[test]
    fn many_take_eight_lines() {
        let snapshot: Vec<_> = (0..200).map(silent).collect();
        let told = describe_late(&snapshot, 1, &[]);
        assert_eq!(told.lines().count(), 8);
        assert!(told.ends_with("and 172 more ranks"), "{told}");
    }
}
