//! Kernels that have been compiled on this host before, and which of several was the fastest: kept, so that a start on a
//! GPU does not compile and time them all anew.
//!
//! CubeCL keeps both in a database. Each local rank has one of its own, on the host's own disk: NVRTC and the timing go
//! on in all ranks at once in any case, and nothing depends on locks of a shared file system.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use burn_std::config::RuntimeConfig;
use cubecl_runtime::config::CubeClRuntimeConfig;
use rustix::fs::{FlockOperation, flock};

/// The environment variable that names another folder; `off` for none.
const VARIABLE: &str = "REPA_KERNEL_CACHE";

/// The rank's database is its own as long as this file is open.
static LOCK: OnceLock<File> = OnceLock::new();

/// Tells CubeCL where to keep kernels. Does nothing where the process has used it already.
pub(super) fn keep(local_rank: usize) {
    let folder = match std::env::var(VARIABLE) {
        Ok(folder) if folder == "off" => None,
        Ok(folder) if !folder.is_empty() => Some(PathBuf::from(folder)),
        _ => own_folder()
            .inspect_err(|error| tracing::warn!("kernels are compiled anew at each start: {error}"))
            .ok(),
    };
    let folder = folder.and_then(|folder| {
        let folder = folder.join(format!("rank-{local_rank}"));
        claim(&folder)
            .inspect_err(|error| tracing::warn!("kernels are compiled anew: {}: {error}", folder.display()))
            .ok()?
            .then_some(folder)
    });
    let config = match folder {
        Some(folder) => {
            let name = name();
            clear(&folder, &name);
            serde_json::json!({
                "compilation": { "cache": true },
                "environment": { "name": name, "path": { "directory": folder } },
            })
        }
        None => serde_json::json!({ "autotune": { "disable_cache": true } }),
    };
    let config: CubeClRuntimeConfig =
        serde_json::from_value(config).expect("what else there is has defaults");
    // The first device of the process sets it.
    CubeClRuntimeConfig::try_set(config.override_from_env());
}

/// A database that nobody has opened for so long is of a program, compiler or driver that is gone.
const FORGOTTEN: Duration = Duration::from_secs(30 * 24 * 3600);

/// Removes old databases of a folder that this process holds. What cannot be removed is in nobody's way.
fn clear(folder: &Path, name: &str) {
    for entry in folder.read_dir().into_iter().flatten().flatten() {
        let other = entry
            .file_name()
            .to_str()
            .is_some_and(|file| file.starts_with("kernels-") && !file.starts_with(name));
        let age = entry
            .metadata()
            .and_then(|found| found.modified())
            .map(|time| time.elapsed().unwrap_or_default());
        if other && age.is_ok_and(|age| age > FORGOTTEN) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// The database: kernels of another program, compiler or driver are none of ours. (CubeCL tells programs apart by their
/// build id, which not every linker writes, and keeps what a driver has refused.)
fn name() -> String {
    let program = std::env::current_exe().and_then(|path| path.metadata());
    let program = program.map_or((0, 0, 0), |found| (found.len(), found.mtime(), found.mtime_nsec()));
    let digest = xxhash_rust::xxh3::xxh3_64(format!("{program:?}").as_bytes());
    let (compiler, driver) = versions();
    format!("kernels-{digest:016x}-nvrtc-{compiler}-driver-{driver}")
}

/// NVRTC's version and the driver's, or the newest CUDA that it knows where it does not tell its own.
fn versions() -> (String, String) {
    let (mut major, mut minor, mut driver) = (0, 0, 0);
    // SAFETY: looking for a library runs its initialisers, as using it would; cudarc panics where it is missing. The
    // addresses are live for the calls, and what fails leaves them as they are.
    unsafe {
        if cudarc::nvrtc::sys::is_culib_present() {
            cudarc::nvrtc::sys::nvrtcVersion(&mut major, &mut minor);
        }
        if cudarc::driver::sys::is_culib_present() {
            cudarc::driver::sys::cuDriverGetVersion(&mut driver);
        }
    }
    let own = nvml_wrapper::Nvml::init().and_then(|nvml| nvml.sys_driver_version());
    (format!("{major}.{minor}"), own.unwrap_or_else(|_| format!("cuda-{driver}")))
}

/// A folder of this user's on the host's own disk. What is in it is run, so that nobody else may write there.
fn own_folder() -> io::Result<PathBuf> {
    let user = rustix::process::geteuid();
    let folder = std::env::temp_dir().join(format!("repa-dist-{}", user.as_raw()));
    match DirBuilder::new().mode(0o700).create(&folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(named(&folder, &error)),
        _ => {}
    }
    let found = folder.symlink_metadata().map_err(|error| named(&folder, &error))?;
    if !found.is_dir() || found.uid() != user.as_raw() || found.mode() & 0o022 != 0 {
        let problem =
            io::Error::other(format!("others can write there; set {VARIABLE} to a folder of your own"));
        return Err(named(&folder, &problem));
    }
    Ok(folder.join("kernels"))
}

fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Takes a folder for this process; false where another has it (a second run on the host), which goes without then.
fn claim(folder: &Path) -> io::Result<bool> {
    DirBuilder::new().mode(0o700).recursive(true).create(folder)?;
    let lock = File::create(folder.join("lock"))?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        // In a process that has taken one before, this is closed again with no harm done.
        Ok(()) => drop(LOCK.set(lock)),
        Err(rustix::io::Errno::WOULDBLOCK) => return Ok(false),
        Err(error) => return Err(error.into()),
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_process_at_a_time_has_a_rank_s_kernels() {
        let folder = tempfile::tempdir().expect("a folder");
        let own = folder.path().join("deep/rank-0");
        assert!(claim(&own).expect("made"));
        assert!(!claim(&own).expect("looked at"), "it is held by now");
        assert!(claim(&folder.path().join("deep/rank-1")).expect("made"));
    }

    #[test]
    fn databases_have_makers_and_an_age() {
        let (name, again) = (name(), name());
        assert_eq!(name, again);
        assert!(
            name.starts_with("kernels-") && name.contains("-nvrtc-") && name.contains("-driver-"),
            "{name}"
        );
        let folder = tempfile::tempdir().expect("a folder");
        let old = std::time::SystemTime::now() - 2 * FORGOTTEN;
        let made = |file: &str, time: std::time::SystemTime| {
            let path = folder.path().join(file);
            File::create(&path).expect("made").set_modified(time).expect("set");
            path
        };
        let own = made(&format!("{name}.db"), old);
        let gone = ["kernels-0.db", "kernels-0.db-wal"].map(|file| made(file, old));
        let others = [made("kernels-1.db", std::time::SystemTime::now()), made("lock", old)];
        clear(folder.path(), &name);
        assert!(
            own.exists() && others.iter().all(|path| path.exists()) && !gone.iter().any(|path| path.exists())
        );
    }

    #[test]
    fn the_user_s_folder_is_the_user_s() {
        let folder = own_folder().expect("a folder");
        let parent = folder.parent().expect("a parent").metadata().expect("there");
        assert_eq!(parent.uid(), rustix::process::geteuid().as_raw());
        assert_eq!(parent.mode() & 0o022, 0);
    }
}
