//! The end of a job that cannot go on: every rank, quickly, with one message.

use std::io::Write;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Exit code of a failure at run time, worth a restart (see the exit codes in the design).
pub const RUNTIME_FAILURE: i32 = 4;

/// How long other ranks leave the word to the first one.
const MEANWHILE: Duration = Duration::from_secs(5);

/// This rank as messages name it; empty in a job of one.
static NAME: OnceLock<String> = OnceLock::new();
/// Whether there is a rank before this one.
static LATER: AtomicBool = AtomicBool::new(false);
static UNDER_WAY: AtomicBool = AtomicBool::new(false);

/// Remembers who this process is, for the message.
pub(crate) fn set_name(rank: usize, size: usize, host: &str) {
    LATER.store(rank > 0, Ordering::Relaxed);
    if size > 1 {
        // A second communicator in one process is refused earlier, so the first name stands.
        let _ = NAME.set(format!("rank {rank} on {host}: "));
    }
}

/// Ends all ranks at once: prints `message` (with this rank and host) on standard error and makes the job exit with
/// `code`. For errors that the other ranks cannot learn of by themselves. Callable from any thread; the first
/// caller's message is the one printed.
///
/// Bare mpirun adds its own words to the message.
pub fn abort(code: i32, message: &str) -> ! {
    let name = NAME.get().map_or("", String::as_str);
    end_all(code, Some(&format!("error: {name}{message}")))
}

/// Prints on standard error, as far as there is one: `eprintln!` panics where it is closed, and the end must come.
pub(crate) fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

fn end_all(code: i32, line: Option<&str>) -> ! {
    if UNDER_WAY.swap(true, Ordering::SeqCst) {
        // Another thread is ending the process: its message and code stand.
        loop {
            std::thread::park();
        }
    }
    if let Some(line) = line {
        say(line);
    }
    // The process ends next: there is nobody to tell that the flush failed.
    let _ = std::io::stdout().flush();
    crate::mpi::abort_world(code);
    std::process::exit(code)
}

/// What a panic's text says to the user, if that is no bug: an exit code and a message.
pub type Explain = fn(&str) -> Option<(i32, String)>;

/// Makes a panic on any thread of this rank end the whole job, instead of leaving the other ranks waiting: with what
/// `explain` makes of it, or else with exit code 4 after the usual panic message (and the rank's name). Call once, in a
/// job after `init`.
pub fn install_panic_hook(explain: Explain) {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if UNDER_WAY.load(Ordering::SeqCst) {
            return;
        }
        let payload = panic.payload();
        let text = payload.downcast_ref::<&str>().copied();
        let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
        if let Some((code, message)) = text.and_then(explain) {
            tracing::debug!("{panic}");
            if LATER.load(Ordering::Relaxed) {
                // What all ranks run into at once, the first one tells, and ends the others meanwhile.
                std::thread::sleep(MEANWHILE);
            }
            abort(code, &message);
        }
        print(panic);
        let line = NAME.get().map(|name| format!("error: {name}panicked (see above): ending all ranks"));
        end_all(RUNTIME_FAILURE, line.as_deref())
    }));
}
