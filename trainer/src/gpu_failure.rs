//! What to say when a GPU fails. burn's operations are queued, and give no errors: what has failed shows where results are
//! read, as a panic, with a chain of causes of which the last one says it.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::config::{Config, Sharding};
use crate::estimate::{self, Job};
use crate::exit::Kind;

/// CubeCL's words, before the number of bytes.
const OUT_OF_MEMORY: &str = "out of device memory allocating ";
/// burn's words, and those of our own.
const FAILURES: [&str; 2] = ["An error happened during execution", "the GPU has failed: "];
/// Characters of a cause: a kernel that cannot be compiled comes with its source.
const LONGEST: usize = 300;

static ADVICE: Mutex<Option<String>> = Mutex::new(None);
static WORKED: AtomicBool = AtomicBool::new(false);

/// What to do when the GPU has too little memory for a step of this configuration on so many ranks.
pub fn advise_training(config: &Config, ranks: usize) {
    let zero1 = config.optimizer.sharding == Sharding::Zero1;
    let job = Job { ranks, shards: if zero1 { ranks } else { 1 }, threads: 1 };
    let needs = estimate::estimate(config, &job);
    let mut advice = format!(
        "`repa-dist estimate` puts this configuration at {:.1} GiB a GPU: make train.micro_batch smaller than {}",
        needs.device_bytes as f64 / f64::from(1 << 30),
        needs.micro_batch
    );
    if !zero1 && ranks > 1 {
        advice += ", or set optimizer.sharding=zero1";
    }
    advise(advice);
}

/// What to do when the GPU has too little memory.
pub fn advise(text: String) {
    *ADVICE.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(text);
}

/// The GPU has had memory enough for a step: when it has not any more, to start again may help.
pub(crate) fn has_worked() {
    WORKED.store(true, Ordering::Relaxed);
}

/// The kind and the message of an error that a panic's text is about; None where it is about no GPU.
pub fn explain(panic: &str) -> Option<(Kind, String)> {
    if let Some((_, after)) = panic.split_once(OUT_OF_MEMORY) {
        let bytes: String = after.chars().take_while(char::is_ascii_digit).collect();
        let wanted = bytes.parse().map_or(0.0, |bytes: f64| bytes / f64::from(1 << 20));
        let kind = if WORKED.load(Ordering::Relaxed) { Kind::Runtime } else { Kind::Usage };
        let advice = ADVICE.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        let advice = advice.map_or_else(String::new, |advice| format!(" {advice}."));
        let message = format!(
            "the GPU's memory is full ({wanted:.0} MiB more were wanted).{advice} `nvidia-smi` shows who else uses it"
        );
        return Some((kind, message));
    }
    let (_, chain) = FAILURES.iter().find_map(|words| panic.split_once(words))?;
    let cause = chain.rsplit("Caused by:").next().unwrap_or(chain);
    let end = ["No backtrace", "Backtrace:", "Asked at:", "[Source]"]
        .into_iter()
        .filter_map(|mark| cause.find(mark));
    let cause = &cause[..end.min().unwrap_or(cause.len())];
    let cause: String =
        cause.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(LONGEST).collect();
    Some((Kind::Runtime, format!("the GPU has failed: {cause}; see `nvidia-smi` and `dmesg`")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_cause_is_told() {
        let chain = "Error while reading data: use `try_into_data` instead: An error happened during execution\n\
                     Caused by:\n  Several failures at once\nCaused by:\n  An IO error happened\nCaused by:\n  ";
        let full = format!(
            "{chain}out of device memory allocating 13631488 bytes\nNo backtrace available\nAsked at:\n"
        );
        advise("Take less".into());
        let (kind, message) = explain(&full).expect("explained");
        assert_eq!(kind, Kind::Usage);
        assert_eq!(
            message,
            "the GPU's memory is full (13 MiB more were wanted). Take less. `nvidia-smi` shows who else uses it"
        );
        has_worked();
        assert_eq!(explain(&full).expect("explained").0, Kind::Runtime);

        let broken =
            format!("{chain}CUDA_ERROR_ILLEGAL_ADDRESS,\n  \"an illegal access\"\nNo backtrace available");
        let (kind, message) = explain(&broken).expect("explained");
        assert_eq!(kind, Kind::Runtime);
        assert_eq!(
            message,
            "the GPU has failed: CUDA_ERROR_ILLEGAL_ADDRESS, \"an illegal access\"; see `nvidia-smi` and `dmesg`"
        );
        let source = format!("{chain}[Compilation Error] line 3\n[Source] {}", "x ".repeat(1000));
        assert!(explain(&source).expect("explained").1.len() < 150);
        assert!(explain("index out of bounds").is_none());
    }
}
