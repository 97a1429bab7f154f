//! The communicator of NCCL, with errors as values.
//!
//! It is a non-blocking one: a function may return before its work is handed to the device, and the next may only be
//! called when [`Handle::settled`] has said so.

use super::device::DeviceType;
use super::driver::Stream;
use super::library::{IN_PROGRESS, Library, SUCCESS, text};
use super::who::Who;
use crate::reduce::Phases;
use crate::{CommError, shard_range};
use cudarc::driver::sys::CUdeviceptr;
use cudarc::nccl::sys::{ncclComm_t, ncclConfig_t, ncclRedOp_t, ncclUniqueId};
use std::ffi::{c_int, c_void};
use std::mem::{MaybeUninit, offset_of};
use std::sync::mpsc::channel;
use std::time::Duration;

/// Bytes of a unique id.
const ID: usize = size_of::<ncclUniqueId>();

/// How long to wait for ncclCommAbort, which may wait for other ranks that have ended without a word.
const ABORT: Duration = Duration::from_secs(10);

pub(super) struct Handle {
    library: &'static Library,
    /// Null before the start and after the end.
    raw: ncclComm_t,
}

/// What a new job is known by; rank 0 makes it.
///
/// # Errors
/// NCCL's text.
pub(super) fn unique_id(library: &Library) -> Result<Vec<u8>, String> {
    let mut id = ncclUniqueId { internal: [0; ID] };
    // SAFETY: the address is live for the call.
    let code = unsafe { (library.functions.get_unique_id)(&mut id) };
    if code != SUCCESS {
        return Err(format!("ncclGetUniqueId: NCCL error {code}: {}", library.error_text(code)));
    }
    Ok(id.internal.iter().map(|&byte| byte as u8).collect())
}

impl Handle {
    /// No communicator yet.
    pub(super) fn new(library: &'static Library) -> Self {
        Self { library, raw: std::ptr::null_mut() }
    }

    pub(super) fn is_live(&self) -> bool {
        !self.raw.is_null()
    }

    /// Begins to start the communicator on this thread's device: a collective.
    pub(super) fn init(&mut self, id: &[u8], who: Who) -> Result<(), CommError> {
        let mut unique = ncclUniqueId { internal: [0; ID] };
        unique.internal.iter_mut().zip(id).for_each(|(to, &from)| *to = from as _);
        let mut config = config();
        let (rank, size) = (who.rank as c_int, who.size as c_int);
        // SAFETY: the addresses are live for the call; NCCL copies the configuration.
        let code = unsafe { (self.library.functions.init)(&mut self.raw, size, unique, rank, &mut config) };
        self.check(code, who)
    }

    /// Whether the last call is done, as far as this rank and the handing over to the device go.
    ///
    /// # Errors
    /// That of the communicator, if it has one: the last call's, or one that came up on the way.
    pub(super) fn settled(&self, who: Who) -> Result<bool, CommError> {
        let mut state = SUCCESS;
        // SAFETY: the communicator is live; the address, too.
        let code = unsafe { (self.library.functions.async_error)(self.raw, &mut state) };
        self.check(code, who)?;
        self.check(state, who)?;
        Ok(state != IN_PROGRESS)
    }

    /// A collective in place on the device. `count` elements in all for an all-reduce, of each rank's slot otherwise.
    ///
    /// # Safety
    /// The elements are in device memory that nobody else uses until the stream is past the call.
    pub(super) unsafe fn even(
        &self,
        phases: Phases,
        (start, kind, count): (CUdeviceptr, DeviceType, usize),
        stream: &Stream,
        who: Who,
    ) -> Result<(), CommError> {
        let functions = &self.library.functions;
        let all = start as *mut c_void;
        let mine = (start + (who.rank * count * kind.bytes()) as CUdeviceptr) as *mut c_void;
        let (kind, op, stream) = (kind.nccl(), ncclRedOp_t::ncclSum, stream.for_nccl());
        // SAFETY: the caller's word for the memory; the communicator and the stream are live. A rank's own slot is where
        // NCCL wants it for work in place.
        let code = unsafe {
            match phases {
                Phases::ReduceAndGather => {
                    (functions.all_reduce)(all, all, count, kind, op, self.raw, stream)
                }
                Phases::Reduce => (functions.reduce_scatter)(all, mine, count, kind, op, self.raw, stream),
                Phases::Gather => (functions.all_gather)(mine, all, count, kind, self.raw, stream),
            }
        };
        self.check(code, who)
    }

    /// A collective in place on a vector of so many elements, cut by [`shard_range`].
    ///
    /// # Safety
    /// As for [`Handle::even`].
    pub(super) unsafe fn on_shards(
        &self,
        phases: Phases,
        (start, kind, len): (CUdeviceptr, DeviceType, usize),
        stream: &Stream,
        who: Who,
    ) -> Result<(), CommError> {
        if phases == Phases::ReduceAndGather {
            // SAFETY: the caller's word.
            return unsafe { self.even(phases, (start, kind, len), stream, who) };
        }
        if len.is_multiple_of(who.size) {
            // SAFETY: the caller's word.
            return unsafe { self.even(phases, (start, kind, len / who.size), stream, who) };
        }
        // Shards of two lengths: one reduction to each rank or one broadcast from each, which NCCL does together.
        let functions = &self.library.functions;
        // SAFETY: the library is loaded.
        self.check(unsafe { (functions.group_start)() }, who)?;
        let mut result = Ok(());
        for root in 0..who.size {
            let shard = shard_range(len, root, who.size);
            let at = (start + (shard.start * kind.bytes()) as CUdeviceptr) as *mut c_void;
            let (count, kind, root, stream) = (shard.len(), kind.nccl(), root as c_int, stream.for_nccl());
            // SAFETY: the caller's word for the memory; the communicator and the stream are live.
            let code = unsafe {
                if phases.reduces() {
                    (functions.reduce)(at, at, count, kind, ncclRedOp_t::ncclSum, root, self.raw, stream)
                } else {
                    (functions.broadcast)(at, at, count, kind, root, self.raw, stream)
                }
            };
            result = result.and_then(|()| self.check(code, who));
        }
        // A group has to be ended even after an error.
        // SAFETY: the library is loaded, and the group was started above.
        let code = unsafe { (functions.group_end)() };
        result.and_then(|()| self.check(code, who))
    }

    /// Begins the orderly end: a collective. To be followed by [`Handle::destroy`] when it is settled.
    pub(super) fn finalize(&self, who: Who) -> Result<(), CommError> {
        // SAFETY: the communicator is live.
        self.check(unsafe { (self.library.functions.finalize)(self.raw) }, who)
    }

    /// Frees what is left after [`Handle::finalize`].
    pub(super) fn destroy(&mut self, who: Who) -> Result<(), CommError> {
        let raw = std::mem::replace(&mut self.raw, std::ptr::null_mut());
        // SAFETY: the communicator was live and finalized, and is not used again. No check of its last error: it is gone.
        match unsafe { (self.library.functions.destroy)(raw) } {
            SUCCESS | IN_PROGRESS => Ok(()),
            code => Err(who.nccl(code, self.library.error_text(code))),
        }
    }

    /// Ends the communicator at once, with what is under way on the device. Gives up waiting for that after a while.
    pub(super) fn abort(&mut self) {
        let raw = std::mem::replace(&mut self.raw, std::ptr::null_mut());
        if raw.is_null() {
            return;
        }
        let (abort, address) = (self.library.functions.abort, raw.expose_provenance());
        let (done, wait) = channel();
        let thread = std::thread::Builder::new().name("nccl-abort".to_owned()).spawn(move || {
            // SAFETY: the communicator was live, and is used by nobody else from now on.
            let code = unsafe { abort(std::ptr::with_exposed_provenance_mut(address)) };
            // Nobody listens if it has taken too long.
            let _ = done.send(code);
        });
        match thread.map(|_| wait.recv_timeout(ABORT)) {
            Ok(Ok(SUCCESS | IN_PROGRESS)) => {}
            Ok(Ok(code)) => tracing::debug!("ncclCommAbort: NCCL error {code}"),
            Ok(Err(_)) => tracing::warn!("ncclCommAbort has not returned after {} s", ABORT.as_secs()),
            Err(error) => tracing::warn!("no thread for ncclCommAbort: {error}"),
        }
    }

    fn check(&self, code: c_int, who: Who) -> Result<(), CommError> {
        if code == SUCCESS || code == IN_PROGRESS {
            return Ok(());
        }
        // SAFETY: a live communicator, or null, for which NCCL gives the last message of any.
        let last = text(unsafe { (self.library.functions.last_error)(self.raw) });
        let name = self.library.error_text(code);
        let last = last.trim();
        Err(who.nccl(code, if last.is_empty() { name } else { format!("{name} ({last})") }))
    }
}

/// Asks for a non-blocking communicator, as a program built against NCCL 2.18 does: every later library takes that.
fn config() -> ncclConfig_t {
    const UNDEFINED: c_int = c_int::MIN;
    // SAFETY: integers and pointers, all of which may be zero.
    let mut config: ncclConfig_t = unsafe { MaybeUninit::zeroed().assume_init() };
    // The first field that 2.18 had not; what lies before it there fills up to the alignment.
    config.size = offset_of!(ncclConfig_t, trafficClass).next_multiple_of(align_of::<ncclConfig_t>());
    config.magic = 0xcafe_beef;
    config.version = 21800;
    config.blocking = 0;
    config.cgaClusterSize = UNDEFINED;
    config.minCTAs = UNDEFINED;
    config.maxCTAs = UNDEFINED;
    config.splitShare = UNDEFINED;
    config.trafficClass = UNDEFINED;
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_has_the_layout_of_2_18() {
        assert_eq!((config().size, offset_of!(ncclConfig_t, blocking)), (48, 16));
        assert_eq!(offset_of!(ncclConfig_t, splitShare), 40);
    }
}
