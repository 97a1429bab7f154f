//! The stand-in for CUDA's driver, NVRTC and NCCL (`tests/stand_in`).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The libraries, built, and the kernels that have been compiled for them.
#[derive(Debug)]
pub struct StandIn {
    folder: PathBuf,
}

impl StandIn {
    /// Builds the libraries in a folder of `temporary` (`CARGO_TARGET_TMPDIR`), unless they are there.
    #[must_use]
    pub fn build(temporary: &str) -> Self {
        let folder = Path::new(temporary).join("stand-in");
        fs::create_dir_all(folder.join("kernels")).expect("a folder");
        // Tests run side by side, and one of them builds.
        let lock = fs::File::create(folder.join("lock")).expect("a file");
        lock.lock().expect("a lock");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("stand_in/build.sh");
        let output = Command::new("sh").arg(script).arg(folder.join("libraries")).output().expect("sh");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Self { folder }
    }

    /// The folder of the driver and NCCL.
    #[must_use]
    pub fn libraries(&self) -> PathBuf {
        self.folder.join("libraries")
    }

    /// Gives a command two GPUs of CUDA whose kernels run on this host.
    pub fn give(&self, command: &mut Command) {
        let libraries = self.libraries();
        command
            .env("LD_LIBRARY_PATH", format!("{}:{}", libraries.join("nvrtc").display(), libraries.display()))
            .env("CUDA_PATH", &self.folder)
            .env("STAND_IN_GPUS", "2")
            .env("STAND_IN_CAPABILITY", "75")
            .env("STAND_IN_KERNELS", self.folder.join("kernels"))
            // Tests run side by side, and each sees what it does itself.
            .env("REPA_KERNEL_CACHE", "off");
    }
}
