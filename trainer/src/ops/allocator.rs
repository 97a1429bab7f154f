//! The C allocator's settings for tensors that come and go each step.

/// Tells glibc's malloc to keep memory that is freed. By default a large tensor is mapped afresh each
/// time it is made, and its first write pays a page fault every 4 KiB: about a sixth of a training
/// step on the CPU. From here on tensors come from a heap that grows in large steps and never
/// shrinks, so a process holds on to its largest footprint.
///
/// To be called once, first thing in `main`. Settings from the environment (`GLIBC_TUNABLES` or
/// `MALLOC_*_`) win: where there are some, nothing is changed. Returns whether the allocator took the
/// settings; on other C libraries there is nothing to set and the answer is false.
pub fn tune_allocator() -> bool {
    let chosen = std::env::vars_os().any(|(name, value)| {
        let name = name.to_string_lossy();
        (name.starts_with("MALLOC_") && name.ends_with('_'))
            || (name == "GLIBC_TUNABLES" && value.to_string_lossy().contains("glibc.malloc."))
    });
    !chosen && set()
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn set() -> bool {
    use std::ffi::c_int;

    unsafe extern "C" {
        fn mallopt(parameter: c_int, value: c_int) -> c_int;
    }
    // From <malloc.h>.
    const TRIM_THRESHOLD: c_int = -1;
    const TOP_PAD: c_int = -2;
    const MMAP_MAX: c_int = -4;
    [(MMAP_MAX, 0), (TRIM_THRESHOLD, -1), (TOP_PAD, 64 << 20)].into_iter().all(|(parameter, value)| {
        // SAFETY: glibc's function of this signature, which takes any parameter and value and locks
        // against other threads.
        unsafe { mallopt(parameter, value) == 1 }
    })
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn set() -> bool {
    false
}

#[cfg(test)]
mod tests {
    #[test]
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    fn glibc_takes_the_settings_and_memory_still_works() {
        assert!(super::set());
        let blocks: Vec<Vec<u8>> = (0..8).map(|i| vec![i; 40 << 20]).collect();
        assert!(blocks.iter().zip(0..).all(|(block, i)| block.iter().all(|&x| x == i)));
    }
}
