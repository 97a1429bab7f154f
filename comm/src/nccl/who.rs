//! Errors, each with the call that met it.

use super::driver::describe;
use crate::waiter::Waiter;
use crate::{Call, CommError};
use cudarc::driver::result::DriverError;
use std::time::Duration;

/// Who is in which call.
#[derive(Debug, Clone, Copy)]
pub(super) struct Who {
    pub(super) call: Call,
    pub(super) rank: usize,
    pub(super) size: usize,
}

impl From<&Waiter> for Who {
    fn from(waiter: &Waiter) -> Self {
        Self { call: waiter.call, rank: waiter.rank, size: waiter.size }
    }
}

impl Who {
    /// The driver's error as the call's.
    pub(super) fn cuda<R>(self, result: Result<R, DriverError>) -> Result<R, CommError> {
        let Self { call, rank, size } = self;
        result.map_err(|error| {
            let (code, text) = describe(error);
            CommError::Cuda { call, rank, size, code, text }
        })
    }

    pub(super) fn nccl(self, code: i32, text: String) -> CommError {
        let Self { call, rank, size } = self;
        CommError::Nccl { call, rank, size, code, text }
    }

    /// NCCL does not say for whom it waits.
    pub(super) fn deadline(self, waited: Duration) -> CommError {
        let Self { call, rank, size } = self;
        CommError::Deadline { call, rank, size, waited, missing: Vec::new(), board: None }
    }

    /// The communicator is no more, because of an earlier error if one is known.
    pub(super) fn ended(self, cause: Option<&CommError>) -> CommError {
        let Self { call, rank, size } = self;
        CommError::Ended { call, rank, size, cause: cause.map(ToString::to_string) }
    }
}
