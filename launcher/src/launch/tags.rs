//! Who said what: mpirun's output with `--tag-output`, taken apart.
//!
//! mpirun writes `[JOB,RANK]<stderr>:` before every piece that it read from a rank, and after every newline within one.
//! A piece may end anywhere in a line. What follows a newline without a tag is mpirun's own.

/// Where a piece of output comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// mpirun itself, or one of its daemons.
    Mpirun,
    /// A rank's standard output.
    Stdout(usize),
    /// A rank's standard error.
    Stderr(usize),
}

/// Takes one of mpirun's two streams apart.
#[derive(Debug)]
pub struct Splitter {
    origin: Origin,
    at_line_start: bool,
    /// What may be the beginning of a tag.
    held: Vec<u8>,
}

/// Tags are no longer than this.
const LONGEST: usize = 100;

impl Default for Splitter {
    fn default() -> Self {
        Self { origin: Origin::Mpirun, at_line_start: true, held: Vec::new() }
    }
}

impl Splitter {
    /// Passes on what came, piece by piece.
    pub fn feed(&mut self, bytes: &[u8], tell: &mut dyn FnMut(Origin, &[u8])) {
        let mut all = std::mem::take(&mut self.held);
        all.extend_from_slice(bytes);
        let mut rest = &all[..];
        while !rest.is_empty() {
            if rest[0] == b'[' {
                match tag(rest) {
                    Tag::Whole(origin, length) => {
                        (self.origin, self.at_line_start) = (origin, false);
                        rest = &rest[length..];
                        continue;
                    }
                    Tag::Partial => {
                        self.held = rest.to_vec();
                        return;
                    }
                    Tag::None => {}
                }
            }
            if self.at_line_start {
                self.origin = Origin::Mpirun;
            }
            // To the end of the line, or to the next that may be a tag.
            let newline = rest.iter().position(|&b| b == b'\n').map(|at| at + 1);
            let bracket = rest[1..].iter().position(|&b| b == b'[').map(|at| at + 1);
            let length = [newline, bracket].into_iter().flatten().min().unwrap_or(rest.len());
            tell(self.origin, &rest[..length]);
            self.at_line_start = rest[length - 1] == b'\n';
            rest = &rest[length..];
        }
    }

    /// Passes on what was held back.
    pub fn finish(&mut self, tell: &mut dyn FnMut(Origin, &[u8])) {
        let held = std::mem::take(&mut self.held);
        if !held.is_empty() {
            tell(if self.at_line_start { Origin::Mpirun } else { self.origin }, &held);
        }
    }
}

enum Tag {
    Whole(Origin, usize),
    Partial,
    None,
}

/// The tag that bytes begin with.
fn tag(bytes: &[u8]) -> Tag {
    let part = &bytes[..bytes.len().min(LONGEST)];
    let mut at = 1;
    for ends in [b',', b']'] {
        let digits = part[at..].iter().take_while(|b| b.is_ascii_digit()).count();
        match part.get(at + digits) {
            None => return Tag::Partial,
            Some(&byte) if byte == ends && digits > 0 => at += digits + 1,
            Some(_) => return Tag::None,
        }
    }
    let number = part[..at - 1].rsplit(|&b| b == b',').next().unwrap_or_default();
    let Some(rank) = std::str::from_utf8(number).ok().and_then(|text| text.parse().ok()) else {
        return Tag::None;
    };
    for (name, origin) in [(&b"<stdout>:"[..], Origin::Stdout(rank)), (b"<stderr>:", Origin::Stderr(rank))] {
        let rest = &part[at..];
        if rest.starts_with(name) {
            return Tag::Whole(origin, at + name.len());
        }
        if rest.len() < name.len() && name.starts_with(rest) {
            return Tag::Partial;
        }
    }
    Tag::None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What each origin said, fed in pieces of a size.
    fn split(text: &str, size: usize) -> Vec<(Origin, String)> {
        let mut said: Vec<(Origin, String)> = Vec::new();
        let mut tell = |origin, bytes: &[u8]| {
            let text = std::str::from_utf8(bytes).expect("ASCII");
            match said.iter_mut().find(|(o, _)| *o == origin) {
                Some((_, all)) => all.push_str(text),
                None => said.push((origin, text.to_owned())),
            }
        };
        let mut splitter = Splitter::default();
        for piece in text.as_bytes().chunks(size) {
            splitter.feed(piece, &mut tell);
        }
        splitter.finish(&mut tell);
        said
    }

    #[test]
    fn pieces_find_their_ranks_wherever_they_are_cut() {
        let text = "[1,0]<stderr>:one\n[1,0]<stderr>:part [1,12]<stderr>:twelve[1,12]<stderr>:\n\
                    [1,0]<stderr>:rest [3] [1,2] a[0]\n[h1:0042] a word of mpirun\n-----\n[1,1]<stdout>:out\n[1,";
        for size in 1..text.len() {
            let said = split(text, size);
            let of = |origin| said.iter().find(|(o, _)| *o == origin).map(|(_, text)| text.as_str());
            assert_eq!(of(Origin::Stderr(0)), Some("one\npart rest [3] [1,2] a[0]\n"), "{size}");
            assert_eq!(of(Origin::Stderr(12)), Some("twelve\n"), "{size}");
            assert_eq!(of(Origin::Stdout(1)), Some("out\n"), "{size}");
            assert_eq!(of(Origin::Mpirun), Some("[h1:0042] a word of mpirun\n-----\n[1,"), "{size}");
        }
    }
}
