//! Work of all ranks that takes each as long as it takes.

use std::time::Duration;

use burn::backend::StreamId;
use repa_comm::{CommError, Communicator, ReduceOp};

/// Longest pause between questions.
const PAUSE: Duration = Duration::from_millis(20);

/// Does this rank's part on a thread of its own, while this one asks the other ranks whether they are done: so neither a
/// large model nor a rank without work runs into a deadline, and a rank that is lost is still noticed by one. Called by
/// all ranks.
///
/// # Errors
/// The ranks could not talk.
pub(crate) fn together<T: Send>(
    comm: &dyn Communicator,
    work: impl FnOnce() -> T + Send,
) -> Result<T, CommError> {
    // On a GPU every thread has a stream with memory of its own, which stays when the thread ends.
    let stream = StreamId::current();
    std::thread::scope(|scope| {
        let working = scope.spawn(move || stream.executes(work));
        let mut pause = Duration::from_millis(1);
        loop {
            let mut busy = [f64::from(u8::from(!working.is_finished()))];
            comm.all_reduce_f64(&mut busy, ReduceOp::Sum)?;
            if busy == [0.0] {
                break;
            }
            std::thread::sleep(pause);
            pause = (2 * pause).min(PAUSE);
        }
        Ok(working.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}
