//! The few things of the CUDA driver that are used, each owned by a value.

use super::library::Stream as RawStream;
use cudarc::driver::result::{self, DriverError, stream::StreamKind};
use cudarc::driver::sys::{self, CUcontext, CUdeviceptr, CUevent, CUresult, CUstream};
use std::ffi::c_void;
use std::ops::Range;
use std::ptr::NonNull;

/// The driver's code and text of an error.
pub(super) fn describe(error: DriverError) -> (i32, String) {
    let text = error.error_string().map(|text| text.to_string_lossy().into_owned());
    (error.0 as i32, text.unwrap_or_else(|_| "unknown error".to_owned()))
}

/// How many GPUs this process may use.
///
/// # Errors
/// There is no driver, or it does not start; the text says so.
pub(super) fn devices() -> Result<usize, String> {
    // SAFETY: looking for the driver library runs its initialisers, as using it would; cudarc's functions panic where
    // it is missing.
    if !unsafe { sys::is_culib_present() } {
        return Err("this host has no NVIDIA driver (libcuda.so.1)".to_owned());
    }
    let count = result::init().and_then(|()| result::device::get_count());
    match count.map_err(describe) {
        Ok(count) => Ok(usize::try_from(count).unwrap_or(0)),
        Err((code, text)) => Err(format!("the NVIDIA driver does not start: CUDA error {code}: {text}")),
    }
}

/// A GPU and its primary context, which is the one that CubeCL and the CUDA runtime use. The context is kept for the
/// life of the process.
#[derive(Debug, Clone)]
pub(super) struct Device {
    pub(super) ordinal: usize,
    pub(super) name: String,
    /// Tells GPUs (or parts of one that count as GPUs) apart, on all hosts.
    pub(super) uuid: String,
    context: CUcontext,
}

// SAFETY: a context may be used from any thread.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

impl Device {
    pub(super) fn open(ordinal: usize) -> Result<Self, String> {
        let count = devices()?;
        if ordinal >= count {
            return Err(format!("there is no GPU {ordinal}: this process sees {count}"));
        }
        let open = || {
            let device = result::device::get(ordinal as i32)?;
            let name = result::device::get_name(device)?;
            let uuid = result::device::get_uuid(device)?;
            // SAFETY: the device is from `get`. The context is never released.
            let context = unsafe { result::primary_ctx::retain(device) }?;
            let uuid = uuid.bytes.iter().map(|&byte| format!("{:02x}", byte as u8)).collect();
            Ok(Self { ordinal, name, uuid, context })
        };
        open().map_err(|error| {
            let (code, text) = describe(error);
            format!("GPU {ordinal} cannot be used: CUDA error {code}: {text}")
        })
    }

    /// Whether the driver can mark all streams of a context at once: version 555 (CUDA 12.5) and later.
    pub(super) fn marks_contexts() -> bool {
        type Function = unsafe extern "C" fn(CUcontext, CUevent) -> CUresult;
        // SAFETY: the driver is loaded, as a device has been opened; the symbol is only looked for.
        unsafe { sys::culib().get::<Function>(b"cuCtxRecordEvent\0") }.is_ok()
    }

    /// Puts the mark after all that is in any stream of the device's context.
    pub(super) fn mark(&self, event: &Event) -> Result<(), DriverError> {
        // SAFETY: the context and the event live.
        unsafe { sys::cuCtxRecordEvent(self.context, event.raw) }.result()
    }

    /// Makes the device this thread's, for good.
    pub(super) fn enter(&self) -> Result<(), DriverError> {
        // SAFETY: the context lives as long as the process.
        unsafe { result::ctx::set_current(self.context) }
    }

    /// Runs `work` with the device as this thread's, and gives the thread its former one back.
    pub(super) fn within<R>(&self, work: impl FnOnce() -> Result<R, DriverError>) -> Result<R, DriverError> {
        // SAFETY: the context lives as long as the process.
        unsafe { sys::cuCtxPushCurrent_v2(self.context) }.result()?;
        let result = work();
        let mut former = std::ptr::null_mut();
        // SAFETY: takes back what was pushed above; the address is live for the call.
        unsafe { sys::cuCtxPopCurrent_v2(&mut former) }.result()?;
        result
    }
}

/// A stream of this module's own, which does not wait for the default stream. Those of the highest priority, so that
/// a collective, for which other ranks wait, starts ahead of this rank's next kernels.
pub(super) struct Stream {
    raw: CUstream,
}

impl Stream {
    /// On this thread's device.
    pub(super) fn new() -> Result<Self, DriverError> {
        let (_, highest) = result::stream::get_priority_range()?;
        Ok(Self { raw: result::stream::create_with_priority(StreamKind::NonBlocking, highest)? })
    }

    pub(super) fn for_nccl(&self) -> RawStream {
        self.raw.cast::<c_void>()
    }

    /// What is put in from now on starts after the event.
    pub(super) fn wait(&self, event: &Event) -> Result<(), DriverError> {
        // SAFETY: the stream lives.
        unsafe { event.before(self.raw) }
    }

    /// Copies the first part of a host buffer to the same place in a device buffer.
    ///
    /// # Safety
    /// Until an event put in after this is over, nobody writes the bytes of `from`, nobody else uses those of `to`, and
    /// both stay where they are.
    pub(super) unsafe fn upload(
        &self,
        from: &Pinned,
        to: &Memory,
        bytes: Range<usize>,
    ) -> Result<(), DriverError> {
        assert!(bytes.end <= from.bytes && bytes.end <= to.bytes, "copy past the end of a buffer");
        // SAFETY: in bounds, as was just checked; the rest is the caller's word.
        unsafe {
            let source = from.start.as_ptr().add(bytes.start).cast();
            sys::cuMemcpyHtoDAsync_v2(to.at(bytes.start), source, bytes.len(), self.raw).result()
        }
    }

    /// The way back.
    ///
    /// # Safety
    /// As for [`Stream::upload`], with the roles changed: nobody uses the bytes of `to`, nobody writes those of `from`.
    pub(super) unsafe fn download(
        &self,
        from: &Memory,
        to: &Pinned,
        bytes: Range<usize>,
    ) -> Result<(), DriverError> {
        assert!(bytes.end <= from.bytes && bytes.end <= to.bytes, "copy past the end of a buffer");
        // SAFETY: as above.
        unsafe {
            let target = to.start.as_ptr().add(bytes.start).cast();
            sys::cuMemcpyDtoHAsync_v2(target, from.at(bytes.start), bytes.len(), self.raw).result()
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once. What is still in it goes on to its end.
        let _ = unsafe { result::stream::destroy(self.raw) };
    }
}

/// A mark in a stream.
#[derive(Debug)]
pub(super) struct Event {
    raw: CUevent,
}

// SAFETY: an event may be used from any thread, and by several at a time.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// On this thread's device.
    pub(super) fn new() -> Result<Self, DriverError> {
        let flags = sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING;
        Ok(Self { raw: result::event::create(flags)? })
    }

    /// Puts the mark after all that is in the stream.
    pub(super) fn record(&self, stream: &Stream) -> Result<(), DriverError> {
        // SAFETY: the stream lives.
        unsafe { self.after(stream.raw) }
    }

    /// Puts the mark after all that is in somebody else's stream.
    ///
    /// # Safety
    /// `stream` is a live stream of the event's device, or null for the default stream.
    pub(super) unsafe fn after(&self, stream: CUstream) -> Result<(), DriverError> {
        // SAFETY: the event lives; the caller's word for the stream.
        unsafe { result::event::record(self.raw, stream) }
    }

    /// Makes somebody else's stream wait for the mark before what is put in from now on.
    ///
    /// # Safety
    /// As for [`Event::after`].
    pub(super) unsafe fn before(&self, stream: CUstream) -> Result<(), DriverError> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: the event lives; the caller's word for the stream.
        unsafe { result::stream::wait_event(stream, self.raw, flags) }
    }

    /// Whether the device has come to the mark. Never blocks.
    pub(super) fn passed(&self) -> Result<bool, DriverError> {
        // SAFETY: the event lives.
        match unsafe { result::event::query(self.raw) } {
            Ok(()) => Ok(true),
            Err(DriverError(CUresult::CUDA_ERROR_NOT_READY)) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once; allowed before the mark is passed, and streams that wait for it do.
        let _ = unsafe { result::event::destroy(self.raw) };
    }
}

/// Host memory that the device copies from and to by itself.
pub(super) struct Pinned {
    start: NonNull<u8>,
    bytes: usize,
}

impl Pinned {
    /// So many bytes, all zero.
    pub(super) fn new(bytes: usize) -> Result<Self, DriverError> {
        // SAFETY: what comes back is owned here; it is filled before it is read as anything.
        let start = unsafe { result::malloc_host(bytes, 0) }?;
        let start =
            NonNull::new(start.cast::<u8>()).ok_or(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY))?;
        // SAFETY: the memory has this length.
        unsafe { start.as_ptr().write_bytes(0, bytes) };
        Ok(Self { start, bytes })
    }

    /// Values of the buffer, counted in values of this type. No copy from or to them may be under way.
    pub(super) fn values<T: bytemuck::Pod>(&mut self, range: Range<usize>) -> &mut [T] {
        assert!(range.end * size_of::<T>() <= self.bytes, "values past the end of a buffer");
        // SAFETY: in bounds; page-aligned, initialised by `new`, any bytes are a value; borrowed as self is.
        unsafe {
            std::slice::from_raw_parts_mut(self.start.as_ptr().cast::<T>().add(range.start), range.len())
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: from `malloc_host`, freed once.
        let _ = unsafe { result::free_host(self.start.as_ptr().cast()) };
    }
}

/// Device memory.
pub(super) struct Memory {
    start: CUdeviceptr,
    bytes: usize,
}

impl Memory {
    /// On this thread's device.
    pub(super) fn new(bytes: usize) -> Result<Self, DriverError> {
        // SAFETY: what comes back is owned here; only NCCL and copies use it, as plain numbers.
        Ok(Self { start: unsafe { result::malloc_sync(bytes) }?, bytes })
    }

    pub(super) fn at(&self, offset: usize) -> CUdeviceptr {
        self.start + offset as CUdeviceptr
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: from `malloc_sync`, freed once.
        let _ = unsafe { result::free_sync(self.start) };
    }
}
