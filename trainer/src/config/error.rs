//! What can be wrong with a configuration.

use std::path::PathBuf;

/// A configuration that cannot be used. Every message names the key or file, the value, and what
/// to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("{path} is not valid TOML: {problem}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The parser's words, with line and column.
        problem: String,
    },
    /// An argument is not of the form key=value.
    #[error("argument {0:?} is not of the form key=value, such as train.steps=1000")]
    Argument(String),
    /// A key that no setting has.
    #[error("unknown key {key:?} in {origin}{}", nearest.as_ref().map_or(String::new(), |n| format!("; did you mean {n:?}?")))]
    UnknownKey {
        /// The key.
        key: String,
        /// Where it stands.
        origin: String,
        /// The known key that is most like it.
        nearest: Option<String>,
    },
    /// A value of the wrong type.
    #[error("{key} cannot be {value} (from {origin}): {problem}")]
    Type {
        /// The key.
        key: String,
        /// The value, as written.
        value: String,
        /// Where it stands.
        origin: String,
        /// What was expected.
        problem: String,
    },
    /// A value that is of the right type and cannot work.
    #[error("{key} = {value} cannot work: {problem}")]
    Value {
        /// The key, or keys that disagree.
        key: String,
        /// The value.
        value: String,
        /// Why, and what to do.
        problem: String,
    },
}

impl ConfigError {
    /// A value that cannot work.
    pub fn value(key: &str, value: impl std::fmt::Display, problem: impl Into<String>) -> Self {
        Self::Value { key: key.into(), value: value.to_string(), problem: problem.into() }
    }
}
