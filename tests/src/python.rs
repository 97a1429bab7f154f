//! Packages from PyPI that tests use, in the user's cache.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::Running;

/// How long packages may take to come.
const INSTALL: Duration = Duration::from_secs(240);

/// The folder that pip has installed into with these arguments, which name exact versions; `name` tells it from others'.
/// It comes on the first call, and stays.
///
/// # Errors
/// Why it cannot be had, as a reason to skip a test.
pub fn package(name: &str, arguments: &[&str]) -> Result<PathBuf, String> {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))
        .ok_or("there is no cache folder: set HOME")?
        .join("repa-dist")
        .join(name);
    let failed = |problem: std::io::Error| format!("{} cannot be written: {problem}", cache.display());
    fs::create_dir_all(&cache).map_err(failed)?;
    // Tests run side by side, and one of them installs.
    let lock = File::create(cache.join("lock")).map_err(failed)?;
    lock.lock().map_err(failed)?;
    let folder = cache.join(arguments.last().unwrap_or(&"package"));
    if folder.exists() {
        return Ok(folder);
    }
    let part = cache.join("part");
    // What an attempt that was cut short has left.
    let _ = fs::remove_dir_all(&part);
    pip(&part, arguments)?;
    fs::rename(&part, &folder).map_err(failed)?;
    Ok(folder)
}

fn pip(target: &Path, arguments: &[&str]) -> Result<(), String> {
    let python = Command::new("python3").args(["-m", "pip", "--version"]).output();
    if !python.is_ok_and(|ended| ended.status.success()) {
        return Err(format!("python3 with pip is missing, which brings {}", arguments.join(" ")));
    }
    let mut command = Command::new("python3");
    command.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"]);
    command.arg("--target").arg(target).args(arguments);
    let ended = Running::start(&mut command).wait(INSTALL);
    match ended.code {
        Some(0) => Ok(()),
        _ => Err(format!(
            "pip cannot install {}: {}",
            arguments.join(" "),
            ended.stderr.lines().last().unwrap_or_default()
        )),
    }
}
