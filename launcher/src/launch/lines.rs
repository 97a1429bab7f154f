//! Lines of a log out of what was meant for a terminal.

/// Longer lines are cut.
const LONGEST: usize = 64 << 10;

/// Collects bytes into lines. What a progress bar draws over itself counts once, and escape sequences go.
#[derive(Debug, Default)]
pub struct Lines {
    text: Vec<u8>,
    state: State,
    /// A carriage return came, and nothing after it yet.
    returned: bool,
    /// The line has been drawn over.
    redrawn: bool,
}

#[derive(Debug, Default, Clone, Copy, PartialEq)]
enum State {
    #[default]
    Text,
    Escape,
    Sequence,
}

impl Lines {
    /// Takes bytes in, and passes on the lines that are whole.
    pub fn feed(&mut self, bytes: &[u8], tell: &mut dyn FnMut(&str)) {
        for &byte in bytes {
            match (self.state, byte) {
                (_, b'\n') => self.finish_line(tell),
                (State::Escape, b'[') => self.state = State::Sequence,
                (State::Sequence, 0x20..0x40) => {}
                (State::Escape | State::Sequence, _) => self.state = State::Text,
                (State::Text, 0x1b) => self.state = State::Escape,
                (State::Text, b'\r') => self.returned = true,
                (State::Text, _) => {
                    if std::mem::take(&mut self.returned) {
                        self.text.clear();
                        self.redrawn = true;
                    }
                    if self.text.len() < LONGEST {
                        self.text.push(byte);
                    }
                }
            }
        }
    }

    /// Passes on what has no end of line.
    pub fn finish(&mut self, tell: &mut dyn FnMut(&str)) {
        if !self.text.is_empty() {
            self.finish_line(tell);
        }
    }

    /// Whether nothing of a line has come yet.
    pub fn at_start(&self) -> bool {
        self.text.is_empty() && !self.redrawn
    }

    /// Whether the line is one that is drawn over, such as a progress bar.
    pub fn is_redrawn(&self) -> bool {
        self.redrawn || self.returned
    }

    fn finish_line(&mut self, tell: &mut dyn FnMut(&str)) {
        let text = std::mem::take(&mut self.text);
        *self = Self::default();
        tell(&String::from_utf8_lossy(&text));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_leave_one_line() {
        let text = b"plain\r\n\r\x1b[2K\x1b[36mbar 1\x1b[0m\r\x1b[2Kbar 2\nlast";
        for size in 1..text.len() {
            let (mut lines, mut found) = (Lines::default(), Vec::new());
            text.chunks(size).for_each(|piece| lines.feed(piece, &mut |line| found.push(line.to_owned())));
            lines.finish(&mut |line| found.push(line.to_owned()));
            assert_eq!(found, ["plain", "bar 2", "last"]);
        }
    }
}
