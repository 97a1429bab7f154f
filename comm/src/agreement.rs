//! One cause, one message: how all ranks learn that one of them failed.

use crate::abort::{RUNTIME_FAILURE, say};
use crate::{CommError, Communicator, ReduceOp, abort};

/// What a rank has to say about its own error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The whole message, with what to do.
    pub message: String,
    /// The exit code the job should end with (see the design).
    pub code: i32,
}

/// The error of the lowest failing rank, as all ranks see it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("rank {rank} on {host}: {message}")]
pub struct RemoteError {
    /// The rank that failed.
    pub rank: usize,
    /// Its host.
    pub host: String,
    /// Its message.
    pub message: String,
    /// The exit code it asks for.
    pub code: i32,
    /// Whether the ranks can no longer talk, so that the end has to be `abort`.
    pub broken: bool,
}

/// A collective: returns every rank's own value if no rank failed; otherwise the same error, that of the lowest
/// failing rank, on every rank. An error of the communication itself counts as this rank's failure with code 4.
///
/// # Errors
/// The lowest failing rank's.
pub fn all_or_first_error<T>(comm: &dyn Communicator, local: Result<T, Failure>) -> Result<T, RemoteError> {
    let own = local.as_ref().err().cloned();
    let broken = |error: CommError| {
        // What this rank had to say comes first: it may be why the others are gone.
        let (message, code) = match &own {
            Some(own) => (format!("{} (and the others could not be told: {error})", own.message), own.code),
            None => (error.to_string(), RUNTIME_FAILURE),
        };
        RemoteError { rank: comm.rank(), host: comm.host().to_owned(), message, code, broken: true }
    };
    let mut lowest = [if local.is_err() { comm.rank() } else { comm.size() } as i64];
    comm.all_reduce_i64(&mut lowest, ReduceOp::Min).map_err(&broken)?;
    let failed = lowest[0] as usize;
    if failed == comm.size() {
        // No rank failed, so this one did not either.
        return local.map_err(|failure| RemoteError {
            rank: comm.rank(),
            host: comm.host().to_owned(),
            message: failure.message,
            code: failure.code,
            broken: false,
        });
    }
    let mut bytes = match &local {
        Err(failure) => [&failure.code.to_le_bytes(), failure.message.as_bytes()].concat(),
        Ok(_) => Vec::new(),
    };
    comm.broadcast_bytes(&mut bytes, failed).map_err(broken)?;
    let (code, message) = bytes
        .split_first_chunk::<4>()
        .map_or((RUNTIME_FAILURE, &bytes[..]), |(code, text)| (i32::from_le_bytes(*code), text));
    Err(RemoteError {
        rank: failed,
        host: comm.topology().hosts[failed].clone(),
        message: String::from_utf8_lossy(message).into_owned(),
        code,
        broken: false,
    })
}

/// Ends the process after an agreed error: the failing rank prints the message, all finalize and exit with its code.
/// Where the ranks can no longer talk, the job is aborted.
pub fn end_with(comm: &dyn Communicator, error: &RemoteError) -> ! {
    if error.broken {
        abort(error.code, &error.message);
    }
    if error.rank == comm.rank() {
        if comm.size() == 1 {
            say(&format!("error: {}", error.message));
        } else {
            say(&format!("error: {error}"));
        }
    }
    if let Err(late) = comm.finalize() {
        tracing::debug!("finalize after an error: {late}");
    }
    std::process::exit(error.code)
}
