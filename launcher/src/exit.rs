//! The one place that turns errors into exit codes and messages.

use std::process::ExitCode;

use repa_trainer::checkpoint::CheckpointError;
use repa_trainer::config::ConfigError;
use repa_trainer::data::store::StoreError;
use repa_trainer::exit::Kind;
pub use repa_trainer::exit::Outcome;
use repa_trainer::figures::FigureError;
use repa_trainer::generate::GenerateError;
use repa_trainer::train::TrainError;
use repa_trainer::weights::WeightsError;

use crate::launch::LaunchError;

/// An error with its exit code.
#[derive(Debug)]
pub struct Failure {
    code: u8,
    message: String,
}

impl Failure {
    /// Any exit code: one that other processes gave.
    pub fn with_code(code: u8, message: impl std::fmt::Display) -> Self {
        Self { code, message: message.to_string() }
    }

    /// A wrong command line.
    pub fn usage(message: impl std::fmt::Display) -> Self {
        Self::with_code(Kind::Usage.code(), message)
    }

    /// Data that cannot be used.
    pub fn data(message: impl std::fmt::Display) -> Self {
        Self::with_code(Kind::Data.code(), message)
    }

    /// A failure while running.
    pub fn runtime(message: impl std::fmt::Display) -> Self {
        Self::with_code(Kind::Runtime.code(), message)
    }

    /// An error of a kind that is known.
    pub fn of(kind: Kind, error: &dyn std::error::Error) -> Self {
        Self::with_code(kind.code(), error)
    }

    /// The same for all ranks to agree on.
    pub fn of_rank(&self) -> repa_comm::Failure {
        repa_comm::Failure { message: self.to_string(), code: i32::from(self.code()) }
    }

    /// The exit code.
    pub fn code(&self) -> u8 {
        self.code
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self::usage(error)
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::data(error)
    }
}

impl From<CheckpointError> for Failure {
    fn from(error: CheckpointError) -> Self {
        Self::of(error.kind(), &error)
    }
}

impl From<WeightsError> for Failure {
    fn from(error: WeightsError) -> Self {
        Self::data(error)
    }
}

impl From<FigureError> for Failure {
    fn from(error: FigureError) -> Self {
        Self::runtime(error)
    }
}

impl From<TrainError> for Failure {
    fn from(error: TrainError) -> Self {
        Self::with_code(error.kind().code(), error)
    }
}

impl From<LaunchError> for Failure {
    fn from(error: LaunchError) -> Self {
        Self::of(error.kind(), &error)
    }
}

impl From<GenerateError> for Failure {
    fn from(error: GenerateError) -> Self {
        Self::of(error.kind(), &error)
    }
}

/// What a panic says to the user.
pub fn explain(panic: &str) -> Option<(i32, String)> {
    repa_trainer::gpu_failure::explain(panic).map(|(kind, message)| (i32::from(kind.code()), message))
}

/// Prints the error, if there is one, and gives the exit code.
pub fn report(result: Result<Outcome, Failure>) -> ExitCode {
    match result {
        Ok(outcome) => ExitCode::from(outcome.code()),
        Err(failure) => {
            eprintln!("error: {failure}");
            ExitCode::from(failure.code())
        }
    }
}
