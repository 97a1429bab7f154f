//! The few MPI calls that are used, with errors as values.

use crate::waiter::Waiter;
use crate::{Call, CommError};
use mpi::ffi;
use std::ffi::c_int;

pub(super) const SUCCESS: c_int = ffi::MPI_SUCCESS as c_int;

/// MPI's text for an error code.
pub(super) fn error_text(code: c_int) -> String {
    let mut text = [0u8; ffi::MPI_MAX_ERROR_STRING as usize + 1];
    let mut len: c_int = 0;
    // SAFETY: the buffer has the length the standard asks for; the call reads the code only.
    let found = unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast(), &mut len) };
    if found != SUCCESS {
        return "unknown error".to_owned();
    }
    String::from_utf8_lossy(&text[..usize::try_from(len).unwrap_or(0).min(text.len())]).into_owned()
}

/// Turns a return code into a result.
pub(super) fn check(code: c_int, call: Call, rank: usize, size: usize) -> Result<(), CommError> {
    if code == SUCCESS {
        return Ok(());
    }
    Err(CommError::Mpi { call, rank, size, code, text: error_text(code) })
}

/// A non-blocking operation with its peer.
pub(super) struct Request {
    pub(super) handle: ffi::MPI_Request,
    pub(super) peer: usize,
}

/// Polls all requests to their end. `members` are the peers' numbers in the job.
///
/// On an error some may be unfinished: their buffers must then stay where they are for the life of the process.
pub(super) fn complete(
    requests: &mut [Request],
    members: &[usize],
    waiter: &mut Waiter,
) -> Result<(), CommError> {
    let (call, rank, size) = (waiter.call, waiter.rank, waiter.size);
    let mut done = 0;
    let cell = std::cell::RefCell::new(requests);
    waiter.until(
        || {
            let mut requests = cell.borrow_mut();
            let mut left = false;
            for request in requests.iter_mut().skip(done) {
                left |= !test(request, call, rank, size)?;
            }
            // A finished prefix need not be polled again.
            // SAFETY: RSMPI_REQUEST_NULL is a constant of the library.
            while done < requests.len() && requests[done].handle == unsafe { ffi::RSMPI_REQUEST_NULL } {
                done += 1;
            }
            Ok(!left)
        },
        || {
            // SAFETY: as above.
            let null = unsafe { ffi::RSMPI_REQUEST_NULL };
            let mut missing: Vec<usize> = cell
                .borrow()
                .iter()
                .filter(|request| request.handle != null)
                .map(|request| members[request.peer])
                .collect();
            missing.sort_unstable();
            missing.dedup();
            missing
        },
    )
}

fn test(request: &mut Request, call: Call, rank: usize, size: usize) -> Result<bool, CommError> {
    let mut flag: c_int = 0;
    // SAFETY: the handle is a live or null request that this thread made; statuses are not wanted.
    let code = unsafe { ffi::MPI_Test(&mut request.handle, &mut flag, ffi::RSMPI_STATUS_IGNORE) };
    check(code, call, rank, size)?;
    Ok(flag != 0)
}
