//! How a process ends: one list of exit codes for ranks, commands and schedulers.

/// How a command ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All done.
    Done,
    /// Stopped on request, with a durable checkpoint to go on from: start me again.
    Stopped,
}

/// What kind of thing went wrong, as a scheduler or a script needs to know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The command line or the configuration is wrong: starting again cannot help.
    Usage,
    /// Data or a checkpoint is missing, damaged or does not fit.
    Data,
    /// Something failed while running: starting again may help.
    Runtime,
}

impl Outcome {
    /// The process's exit code.
    pub fn code(self) -> u8 {
        match self {
            Outcome::Done => 0,
            Outcome::Stopped => 75,
        }
    }
}

impl Kind {
    /// The process's exit code.
    pub fn code(self) -> u8 {
        match self {
            Kind::Usage => 2,
            Kind::Data => 3,
            Kind::Runtime => 4,
        }
    }
}
