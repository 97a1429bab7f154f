//! The MPIJob manifest, against Kubernetes' schemas and the MPI operator's fields, by `tests/kubernetes/check.py`;
//! skipped with a reason where pip cannot bring the package that has the schemas. Some 3 s once it is there.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use repa_tests::{Ended, Running, python, repa_dist};

const DEADLINE: Duration = Duration::from_secs(60);

const PACKAGE: &str = "kubernetes-validate==1.37.0";

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_owned()
}

fn check(packages: &Path, manifest: &Path) -> Ended {
    let script = repository().join("tests/kubernetes/check.py");
    let mut command = Command::new("python3");
    Running::start(command.arg(script).arg(manifest).env("PYTHONPATH", packages)).wait(DEADLINE)
}

#[test]
fn the_manifest_fits_the_schemas_and_slips_are_found() {
    let packages = match python::package("kubernetes-validate", &[PACKAGE]) {
        Ok(packages) => packages,
        Err(reason) => {
            eprintln!("skipped: no schemas of Kubernetes ({reason})");
            return;
        }
    };
    let manifest = repository().join("configs/kubernetes/mpijob.yaml");
    let checked = check(&packages, &manifest).expect_code(0);

    // What the ranks are told is what `train` takes.
    let words: Vec<String> = checked
        .stdout
        .lines()
        .skip_while(|line| *line != "train")
        .skip(1)
        .map(|word| word.replace("/runs/configs", &repository().join("configs").display().to_string()))
        .collect();
    assert!(words.len() > 2, "{}", checked.stdout);
    let words: Vec<&str> = std::iter::once("config").chain(words.iter().map(String::as_str)).collect();
    let config = Running::start(&mut repa_dist(&words)).wait(DEADLINE).expect_code(0);
    assert!(config.stdout.contains("run.dir = \"/runs/sit-xl2-repa\""), "{}", config.stdout);

    let text = std::fs::read_to_string(&manifest).expect("text");
    let folder = tempfile::tempdir().expect("a folder");
    for (right, slip) in [
        ("slotsPerWorker: 8", "slotPerWorker: 8"),
        ("slotsPerWorker: 8", "slotsPerWorker: 4"),
        ("cleanPodPolicy: Running", "cleanPodPolicy: Run"),
        ("emptyDir: {medium", "emptyDir: {medum"),
        ("accessModes", "accesModes"),
        ("restartPolicy: OnFailure", "restartPolicy: OnFail"),
        ("{name: shm, mountPath", "{name: shmem, mountPath"),
    ] {
        assert!(text.contains(right), "no {right} in the manifest");
        let path = folder.path().join("mpijob.yaml");
        std::fs::write(&path, text.replacen(right, slip, 1)).expect("written");
        assert_eq!(check(&packages, &path).code, Some(1), "{slip} was not found");
    }
}
