//! What to say when a GPU fails. burn's operations are queued, and give no errors: what has failed shows where results are
//! read, as a panic, with a chain of causes of which the last one says it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::config::{Config, Sharding};
use crate::estimate::{self, Job};
use crate::exit::Kind;

/// CubeCL's words, before the number of bytes.
const OUT_OF_MEMORY: &str = "out of device memory allocating ";
/// burn's words for what has failed, for what has made the GPU unusable, and those of our own.
const FAILURES: [&str; 3] =
    ["An error happened during execution", "The device is poisoned", "the GPU has failed: "];
/// CubeCL's words for an error of the driver.
const DRIVER: &str = "failed with status";
/// Characters of a cause: a kernel that cannot be compiled comes with its source.
const LONGEST: usize = 300;

/// What to do when the GPU's memory is full.
static ADVICE: Mutex<String> = Mutex::new(String::new());
/// Whether it was enough once for what is done: to start again may help then.
static WORKED: AtomicBool = AtomicBool::new(false);
/// The same of a training run's sample images.
static DREW: AtomicBool = AtomicBool::new(false);

fn advice() -> MutexGuard<'static, String> {
    ADVICE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Training of this configuration on so many ranks begins.
pub(crate) fn training(config: &Config, ranks: usize) {
    let zero1 = config.optimizer.sharding == Sharding::Zero1;
    let job = Job { ranks, shards: if zero1 { ranks } else { 1 }, threads: 1 };
    let needs = estimate::estimate(config, &job);
    let mut ways = Vec::new();
    if needs.micro_batch > 1 {
        ways.push(format!("make train.micro_batch smaller than {}", needs.micro_batch));
    }
    if !zero1 && ranks > 1 {
        ways.push("set optimizer.sharding=zero1".to_owned());
    }
    if ways.is_empty() {
        ways.push("take a smaller model, or GPUs with more".to_owned());
    }
    *advice() = format!(
        " `repa-dist estimate` puts this configuration at {:.1} GiB a GPU: {}.",
        needs.device_bytes as f64 / f64::from(1 << 30),
        ways.join(", or ")
    );
}

/// Drawing images of a run begins.
pub fn drawing(config: &Config) {
    *advice() = match config.sample.batch {
        1 => " Take device=cpu, or a GPU with more.".to_owned(),
        batch => format!(" Make sample.batch smaller than {batch}, or take device=cpu."),
    };
}

/// What there is to do has been done once.
pub(crate) fn has_worked() {
    WORKED.store(true, Ordering::Relaxed);
}

/// Draws sample images between steps of training, which takes memory beside what training has.
pub(crate) fn between_steps<T>(config: &Config, work: impl FnOnce() -> T) -> T {
    let smaller = match config.sample.batch {
        1 => String::new(),
        batch => format!("make sample.batch smaller than {batch}, or "),
    };
    let other = format!(" That was for sample images: {smaller}set sample.training.every=0.");
    let before = std::mem::replace(&mut *advice(), other);
    let worked = WORKED.swap(DREW.load(Ordering::Relaxed), Ordering::Relaxed);
    let drawn = work();
    DREW.store(true, Ordering::Relaxed);
    WORKED.store(worked, Ordering::Relaxed);
    *advice() = before;
    drawn
}

/// The kind and the message of an error that a panic's text is about; None where it is about no GPU.
pub fn explain(panic: &str) -> Option<(Kind, String)> {
    if let Some((_, after)) = panic.split_once(OUT_OF_MEMORY) {
        let bytes: String = after.chars().take_while(char::is_ascii_digit).collect();
        let wanted = bytes.parse().map_or(0.0, |bytes: f64| bytes / f64::from(1 << 20));
        let kind = if WORKED.load(Ordering::Relaxed) { Kind::Runtime } else { Kind::Usage };
        let message = format!(
            "the GPU's memory is full ({wanted:.0} MiB more were wanted).{} `nvidia-smi` shows who else uses it",
            advice()
        );
        return Some((kind, message));
    }
    let (_, chain) = FAILURES.iter().find_map(|words| panic.split_once(words))?;
    let cause = chain.rsplit("Caused by:").next().unwrap_or(chain);
    let ends = ["No backtrace", "Backtrace:", "Asked at:", "[Source]"];
    let end = ends.into_iter().filter_map(|mark| cause.find(mark)).min();
    let cause = cause[..end.unwrap_or(cause.len())].split_whitespace().collect::<Vec<_>>().join(" ");
    let cause: String = cause.chars().take(LONGEST).collect();
    let look = if cause.contains(DRIVER) { "; see `nvidia-smi` and `dmesg`" } else { "" };
    Some((Kind::Runtime, format!("an operation on the GPU has failed: {cause}{look}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_cause_is_told() {
        let chain = "Error while reading data: use `try_into_data` instead: An error happened during execution\n\
                     Caused by:\n  Several failures at once\nCaused by:\n  An IO error happened\nCaused by:\n  ";
        let full =
            format!("{chain}out of device memory allocating 13631488 bytes\nNo backtrace available\nAsked");
        let mut config = Config::default();
        config.sample.batch = 7;
        drawing(&config);
        let (kind, message) = explain(&full).expect("explained");
        assert_eq!(kind, Kind::Usage);
        assert_eq!(
            message,
            "the GPU's memory is full (13 MiB more were wanted). Make sample.batch smaller than 7, or take device=cpu. \
             `nvidia-smi` shows who else uses it"
        );
        has_worked();
        assert_eq!(explain(&full).expect("explained").0, Kind::Runtime);
        // The first grid of a run that trains may be what is too much.
        for expected in [Kind::Usage, Kind::Runtime] {
            let (kind, message) = between_steps(&config, || explain(&full)).expect("explained");
            assert!(kind == expected && message.contains("sample.training.every=0"), "{message}");
        }
        assert!(explain(&full).expect("explained").1.contains("device=cpu"));

        // An illegal access, as CubeCL says it.
        let broken = "Error while reading data: The device is poisoned\nCaused by:\n  The service is poisoned\n\
                      Caused by:\n  cuEventSynchronize failed with status 700\nNo backtrace available\n";
        let said = "an operation on the GPU has failed: cuEventSynchronize failed with status 700; see `nvidia-smi` \
                    and `dmesg`";
        assert_eq!(explain(broken), Some((Kind::Runtime, said.to_owned())));
        let source = format!("{chain}[Compilation Error] line 3\n[Source] {}", "x ".repeat(1000));
        let said = "an operation on the GPU has failed: [Compilation Error] line 3";
        assert_eq!(explain(&source), Some((Kind::Runtime, said.to_owned())));
        assert!(explain("index out of bounds").is_none());
    }
}
