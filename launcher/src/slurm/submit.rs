//! Handing a batch script in.

use std::path::Path;
use std::process::Command;

use crate::exit::Failure;

/// Hands a script to sbatch, and returns the job's number.
///
/// # Errors
/// sbatch is missing, or refuses; what it says is passed on.
pub fn submit(script: &Path) -> Result<String, Failure> {
    let output = Command::new("sbatch").arg("--parsable").arg(script).output().map_err(|error| {
        let problem = match error.kind() {
            std::io::ErrorKind::NotFound => {
                "it is not here: run this on a login node of the cluster".to_owned()
            }
            _ => error.to_string(),
        };
        Failure::usage(format!(
            "--submit needs SLURM's sbatch, and {problem}, or hand the script in by hand: sbatch {}",
            super::quoted_path(script)
        ))
    })?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        let reason = said.trim().trim_start_matches("sbatch: ").trim_start_matches("error: ");
        return Err(Failure::usage(format!(
            "sbatch did not take {}: {}",
            script.display(),
            reason.replace('\n', "; ")
        )));
    }
    if !said.trim().is_empty() {
        eprintln!("{}", said.trim());
    }
    // "NUMBER", or "NUMBER;CLUSTER".
    let printed = String::from_utf8_lossy(&output.stdout);
    let id = printed.trim().split(';').next().unwrap_or_default();
    if id.is_empty() || !id.bytes().all(|b| b.is_ascii_digit()) {
        return Err(Failure::runtime(format!(
            "sbatch gave no job number but {:?}: see squeue --me",
            printed.trim()
        )));
    }
    Ok(id.to_owned())
}
