//! libnccl: where it is found, and its functions.
//!
//! cudarc declares NCCL's types and these are used; its functions are not, because they look for `libnccl.so` only
//! (packages install `libnccl.so.2`; the other name comes with the development package), and panic where a library
//! or a function is missing.

use cudarc::nccl::sys::{ncclComm_t, ncclConfig_t, ncclDataType_t, ncclRedOp_t, ncclUniqueId};
use libloading::os::unix::{Library as Handle, RTLD_LOCAL, RTLD_NOW};
use std::ffi::{CStr, c_char, c_int, c_void};

/// Names that packages give the library.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// Names the file to load instead.
const VARIABLE: &str = "REPA_NCCL_LIBRARY";

/// Non-blocking communicators and their orderly end came with 2.14, the layout of the configuration that is used here
/// with 2.18.
const OLDEST: Version = Version(21800);

/// NCCL's result codes that are not errors.
pub(super) const SUCCESS: c_int = 0;
pub(super) const IN_PROGRESS: c_int = 7;

pub(super) type Stream = *mut c_void;

/// A version as NCCL counts: 2.30.3 is 23003.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Version(pub(super) u32);

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.0 / 10_000, self.0 / 100 % 100, self.0 % 100)
    }
}

macro_rules! functions {
    ($($name:ident: $symbol:literal, ($($argument:ty),*) -> $result:ty;)*) => {
        /// The functions of nccl.h that are used. Result codes are taken as the integers that they are, since a newer
        /// library may return others than cudarc's enumeration has.
        pub(super) struct Functions {
            $(pub(super) $name: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl Functions {
            fn load(library: &Handle) -> Result<Self, String> {
                Ok(Self {
                    $($name: {
                        type Function = unsafe extern "C" fn($($argument),*) -> $result;
                        // SAFETY: nccl.h declares the symbol with this type.
                        let symbol = unsafe { library.get::<Function>($symbol) };
                        *symbol.map_err(|error| error.to_string())?
                    },)*
                })
            }
        }
    };
}

functions! {
    get_unique_id: "ncclGetUniqueId", (*mut ncclUniqueId) -> c_int;
    init: "ncclCommInitRankConfig", (*mut ncclComm_t, c_int, ncclUniqueId, c_int, *mut ncclConfig_t) -> c_int;
    finalize: "ncclCommFinalize", (ncclComm_t) -> c_int;
    destroy: "ncclCommDestroy", (ncclComm_t) -> c_int;
    abort: "ncclCommAbort", (ncclComm_t) -> c_int;
    async_error: "ncclCommGetAsyncError", (ncclComm_t, *mut c_int) -> c_int;
    error_string: "ncclGetErrorString", (c_int) -> *const c_char;
    last_error: "ncclGetLastError", (ncclComm_t) -> *const c_char;
    group_start: "ncclGroupStart", () -> c_int;
    group_end: "ncclGroupEnd", () -> c_int;
    all_reduce: "ncclAllReduce",
        (*const c_void, *mut c_void, usize, ncclDataType_t, ncclRedOp_t, ncclComm_t, Stream) -> c_int;
    reduce_scatter: "ncclReduceScatter",
        (*const c_void, *mut c_void, usize, ncclDataType_t, ncclRedOp_t, ncclComm_t, Stream) -> c_int;
    all_gather: "ncclAllGather",
        (*const c_void, *mut c_void, usize, ncclDataType_t, ncclComm_t, Stream) -> c_int;
    reduce: "ncclReduce",
        (*const c_void, *mut c_void, usize, ncclDataType_t, ncclRedOp_t, c_int, ncclComm_t, Stream) -> c_int;
    broadcast: "ncclBroadcast",
        (*const c_void, *mut c_void, usize, ncclDataType_t, c_int, ncclComm_t, Stream) -> c_int;
}

/// A loaded libnccl. It stays loaded for the life of the process, since it has threads of its own.
pub(super) struct Library {
    pub(super) functions: Functions,
    pub(super) version: Version,
}

impl Library {
    /// Loads the library that the environment names, or that the loader finds.
    pub(super) fn find() -> Result<&'static Self, String> {
        match std::env::var(VARIABLE) {
            Ok(path) if !path.is_empty() => Self::load(&path).map_err(|problem| {
                format!("{problem} (the environment variable {VARIABLE} names this file)")
            }),
            _ => Self::find_by_name(),
        }
    }

    fn find_by_name() -> Result<&'static Self, String> {
        let mut problems = Vec::new();
        for name in NAMES {
            match Self::load(name) {
                Ok(library) => return Ok(library),
                Err(problem) => problems.push(problem),
            }
        }
        Err(format!(
            "{}. Install the distribution's libnccl2, or PyPI's nvidia-nccl-cu12 with its folder \
             nvidia/nccl/lib in LD_LIBRARY_PATH, or set {VARIABLE} to the path of libnccl.so.2",
            problems.join("; ")
        ))
    }

    fn load(name: &str) -> Result<&'static Self, String> {
        // SAFETY: the library's initialisers are NVIDIA's, and run in any program that uses NCCL.
        let handle = unsafe { Handle::open(Some(name), RTLD_NOW | RTLD_LOCAL) };
        let handle = handle.map_err(|error| {
            // What the loader says is the error's source; mostly it begins with the name.
            let text = std::error::Error::source(&error).unwrap_or(&error).to_string();
            if text.contains(name) { text } else { format!("{name}: {text}") }
        })?;
        let version = version(&handle).map_err(|problem| format!("{name} is not NCCL: {problem}"))?;
        if version < OLDEST {
            return Err(format!("{name} is NCCL {version}, and {OLDEST} is the oldest that works"));
        }
        let functions = Functions::load(&handle).map_err(|problem| format!("{name}: {problem}"))?;
        std::mem::forget(handle);
        Ok(Box::leak(Box::new(Self { functions, version })))
    }

    /// NCCL's name for a result code.
    pub(super) fn error_text(&self, code: c_int) -> String {
        // SAFETY: any code is allowed; the text is a constant of the library.
        text(unsafe { (self.functions.error_string)(code) })
    }
}

/// Text of the library's; empty where it has none.
pub(super) fn text(pointer: *const c_char) -> String {
    if pointer.is_null() {
        return String::new();
    }
    // SAFETY: NCCL's texts end in zero; it is copied at once.
    unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned()
}

fn version(library: &Handle) -> Result<Version, String> {
    type Function = unsafe extern "C" fn(*mut c_int) -> c_int;
    // SAFETY: nccl.h declares the symbol with this type, in every version.
    let symbol = unsafe { library.get::<Function>("ncclGetVersion") };
    let get_version = symbol.map_err(|error| error.to_string())?;
    let mut version = 0;
    // SAFETY: the address is live for the call, which needs no device.
    let code = unsafe { get_version(&mut version) };
    match u32::try_from(version) {
        Ok(version) if code == SUCCESS => Ok(Version(version)),
        _ => Err(format!("ncclGetVersion returns {code}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_read_as_nccl_writes_them() {
        assert_eq!(Version(23003).to_string(), "2.30.3");
        assert_eq!(Version(21805).to_string(), "2.18.5");
        // Before 2.9 the numbers were built otherwise, and were smaller.
        assert!(Version(2804) < OLDEST);
    }

    #[test]
    fn what_is_no_library_is_said_to_be_none() {
        let problem = Library::load("/nowhere/libnccl.so.2").err().expect("no such file");
        assert!(problem.contains("/nowhere/libnccl.so.2"), "{problem}");
        let problem = Library::load("libc.so.6").err().expect("another library");
        assert!(problem.contains("libc.so.6 is not NCCL"), "{problem}");
    }
}
