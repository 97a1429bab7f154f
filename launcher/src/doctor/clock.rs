//! Whether the clock is kept right: logs of several hosts are read side by side, and certificates have dates.

use super::Line;
use super::subject::Subject;

/// The topic of a host's clock.
pub const TOPIC: &str = "clock";

/// Hosts whose clocks differ by more than this are told of.
const APART_SECONDS: f64 = 0.5;

const FIX: &str =
    "run a time service (Debian: `apt-get install chrony`); of a virtual machine or container, on its host";

/// The line about this host's clock.
pub fn lines(_subject: &Subject) -> Vec<Line> {
    vec![judge(kernel().as_ref())]
}

/// What the kernel says of its clock.
#[derive(Debug, Clone, Copy)]
struct Kernel {
    /// Whether a time service sets it.
    kept: bool,
    /// How wrong it may be, by the service's word, in microseconds.
    most: i64,
}

fn kernel() -> Result<Kernel, std::io::Error> {
    // SAFETY: all zero is a value of the structure, and asks for nothing to be changed.
    let mut state: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: the address is live for the call.
    if unsafe { libc::adjtimex(&mut state) } < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(Kernel { kept: state.status & libc::STA_UNSYNC == 0, most: state.maxerror })
}

fn judge(kernel: Result<&Kernel, &std::io::Error>) -> Line {
    match kernel {
        Err(error) => Line::absent(TOPIC, format!("not known: {error}")),
        Ok(Kernel { kept: true, most }) => {
            Line::ok(TOPIC, format!("kept by a time service, to {:.0} ms or better", *most as f64 / 1e3))
        }
        Ok(Kernel { kept: false, .. }) => Line::warning(TOPIC, "no time service keeps it", FIX),
    }
}

/// How far other hosts' clocks are from the first one's, in seconds.
pub fn judge_offsets(offsets: &[(String, f64)]) -> Option<Line> {
    let (host, largest) = offsets.iter().max_by(|a, b| a.1.abs().total_cmp(&b.1.abs()))?;
    let direction = if *largest < 0.0 { "behind" } else { "ahead of" };
    let first = &offsets[0].0;
    match largest.abs() {
        apart if apart > APART_SECONDS => {
            let found = format!("{host} is {apart:.1} s {direction} {first}");
            Some(Line::warning("clocks", found, FIX))
        }
        // What the ranks' own waiting blurs.
        _ => Some(Line::ok("clocks", format!("the hosts' clocks agree within {APART_SECONDS} s"))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn a_clock_is_kept_or_not() {
        assert_eq!(
            judge(Ok(&Kernel { kept: true, most: 2500 })).found,
            "kept by a time service, to 2 ms or better"
        );
        assert_eq!(judge(Ok(&Kernel { kept: false, most: 16_000_000 })).state, State::Warning);
        assert_eq!(judge(Err(&std::io::Error::other("no"))).state, State::Absent);
        // Whatever it is, it is known or not, and the call comes back.
        assert!(!lines(&super::super::Subject::alone(Default::default(), 1, true))[0].found.is_empty());
    }

    #[test]
    fn clocks_are_compared_with_the_first() {
        let hosts = |offsets: [f64; 3]| -> Vec<(String, f64)> {
            ["a", "b", "c"].iter().map(|name| (*name).to_owned()).zip(offsets).collect()
        };
        let line = judge_offsets(&hosts([0.0, 0.01, -3.0])).expect("a line");
        assert_eq!((line.state, line.found.as_str()), (State::Warning, "c is 3.0 s behind a"));
        assert_eq!(judge_offsets(&hosts([0.0, 0.01, -0.02])).expect("a line").state, State::Ok);
        assert_eq!(judge_offsets(&[]), None);
    }
}
