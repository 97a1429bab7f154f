//! Time limits as SLURM writes them.

use std::str::FromStr;

/// A time limit: how it was written, and how long it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TimeLimit {
    text: String,
    seconds: Option<u64>,
}

impl TimeLimit {
    /// As it was written.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// How long; None without a limit.
    pub fn seconds(&self) -> Option<u64> {
        self.seconds
    }
}

impl FromStr for TimeLimit {
    type Err = String;

    /// Minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes,
    /// days-hours:minutes:seconds, or UNLIMITED.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "{text:?} is no time limit: write hours:minutes:seconds (24:00:00), days-hours (2-12), minutes (90) \
                 or UNLIMITED"
            )
        };
        let of = |seconds| Self { text: text.to_owned(), seconds };
        if ["UNLIMITED", "INFINITE"].iter().any(|word| text.eq_ignore_ascii_case(word)) {
            return Ok(of(None));
        }
        let (days, rest) = match text.split_once('-') {
            Some((days, rest)) => (Some(number(days).ok_or_else(wrong)?), rest),
            None => (None, text),
        };
        let parts: Option<Vec<u64>> = rest.split(':').map(number).collect();
        let parts = parts.ok_or_else(wrong)?;
        let (hours, minutes, seconds) = match (days, parts.as_slice()) {
            (Some(_), [hours]) => (*hours, 0, 0),
            (Some(_), [hours, minutes]) => (*hours, *minutes, 0),
            (None, [minutes]) => (0, *minutes, 0),
            (None, [minutes, seconds]) => (0, *minutes, *seconds),
            (_, [hours, minutes, seconds]) => (*hours, *minutes, *seconds),
            _ => return Err(wrong()),
        };
        match ((days.unwrap_or(0) * 24 + hours) * 60 + minutes) * 60 + seconds {
            0 => Err(wrong()),
            seconds => Ok(of(Some(seconds))),
        }
    }
}

/// Digits only, and few enough that sums of them cannot overflow.
fn number(text: &str) -> Option<u64> {
    (text.len() <= 9 && text.bytes().all(|b| b.is_ascii_digit())).then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_slurm_is_read_and_nothing_else() {
        for (text, seconds) in [
            ("90", 5400),
            ("5:30", 330),
            ("24:00:00", 86_400),
            ("2-12", 216_000),
            ("1-0:30", 88_200),
            ("1-00:00:01", 86_401),
        ] {
            assert_eq!(text.parse::<TimeLimit>().expect(text).seconds(), Some(seconds), "{text}");
        }
        assert_eq!("unlimited".parse::<TimeLimit>().expect("known").seconds(), None);
        for text in ["", "soon", "24h", "0", "1:2:3:4", "-5", "1-", "1-2:3:4:5", "+5", "1.5", "99999999999"] {
            assert!(text.parse::<TimeLimit>().expect_err(text).contains("24:00:00"), "{text}");
        }
    }
}
