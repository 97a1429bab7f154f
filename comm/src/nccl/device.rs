//! Collectives on vectors that are on the device, ordered with the caller's stream.

use super::driver::{Device, Event};
use super::who::Who;
use crate::CommError;
use cudarc::driver::sys::{CUdeviceptr, CUstream};
use cudarc::nccl::sys::ncclDataType_t;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

/// Type of the elements of a vector on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceType {
    /// float32.
    F32,
    /// float16; added up by NCCL in its way, which rounds in between.
    F16,
    /// bfloat16; as for float16.
    Bf16,
}

impl DeviceType {
    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    pub(super) fn nccl(self) -> ncclDataType_t {
        match self {
            Self::F32 => ncclDataType_t::ncclFloat32,
            Self::F16 => ncclDataType_t::ncclFloat16,
            Self::Bf16 => ncclDataType_t::ncclBfloat16,
        }
    }
}

/// A vector on the device.
#[derive(Debug, Clone, Copy)]
pub struct DeviceValues {
    /// Address of the first element.
    pub start: CUdeviceptr,
    /// Number of elements.
    pub len: usize,
    /// Their type.
    pub kind: DeviceType,
}

/// What a collective on the device has to come after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum After {
    /// Nothing: the values are there.
    Nothing,
    /// What has been put into this stream so far; null is the default stream.
    Stream(CUstream),
    /// What has been put into any stream of the device's primary context so far, for callers that do not know the
    /// stream. Needs a driver for which [`super::Nccl::marks_contexts`] holds.
    Context,
}

/// A collective on the device that is on its way. Dropping it abandons the news of it; the operation still takes place.
pub struct DevicePending {
    pub(super) device: Device,
    pub(super) enqueued: Receiver<Result<Arc<Event>, CommError>>,
    pub(super) done: Option<Arc<Event>>,
    pub(super) finished: Receiver<Result<(), CommError>>,
    pub(super) who: Who,
}

impl DevicePending {
    /// Makes what is put into `stream` from now on wait for the result, on the device. Returns when that is arranged,
    /// not when the result is there; the first time, that may take until the other ranks have called, too.
    ///
    /// # Errors
    /// Those of the operation up to there. (After a later one the stream is let go and finds garbage: only
    /// [`DevicePending::wait`] says that the result is good.)
    ///
    /// # Safety
    /// `stream` is a live stream of the communicator's device, or null for the default stream.
    pub unsafe fn order(&mut self, stream: CUstream) -> Result<(), CommError> {
        let done = match &self.done {
            Some(done) => done,
            None => {
                let done = self.enqueued.recv().unwrap_or_else(|_| Err(self.who.ended(None)))?;
                self.done.insert(done)
            }
        };
        // SAFETY: the caller's word.
        self.who.cuda(self.device.within(|| unsafe { done.before(stream) }))
    }

    /// Blocks until the operation is done on the device.
    ///
    /// # Errors
    /// Those of the operation.
    pub fn wait(self) -> Result<(), CommError> {
        self.finished.recv().unwrap_or_else(|_| Err(self.who.ended(None)))
    }
}
