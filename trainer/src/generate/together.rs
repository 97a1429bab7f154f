//! Work of all ranks that takes each as long as it takes.

use std::time::Duration;

use burn::backend::StreamId;
use repa_comm::{CommError, Communicator, Failure, ReduceOp, RemoteError, all_gather, all_or_first_error};

use crate::exit::Kind;

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

/// Has every rank do its part, however long that takes, and passes on what went wrong on the lowest rank that failed.
///
/// # Errors
/// That, or the ranks could not talk: the same on all ranks.
pub fn each_rank<T: Send, E: Into<Failure>>(
    comm: &dyn Communicator,
    work: impl FnOnce() -> Result<T, E> + Send,
) -> Result<T, RemoteError>
where
    Result<T, E>: Send,
{
    let done = together(comm, work).map_err(of_talk);
    all_or_first_error(comm, done.and_then(|done| done.map_err(Into::into)))
}

/// What has to be the same on all ranks, which have each looked for themselves: its name, its value, and what to do
/// where it differs.
pub(crate) type Fact<'a> = (&'a str, u64, &'a str);

/// Checks that all ranks have found what rank 0 has.
///
/// # Errors
/// What differs, the same on all ranks.
pub(crate) fn same_on_all(comm: &dyn Communicator, facts: &[Fact]) -> Result<(), RemoteError> {
    let mine: Vec<u64> = facts.iter().map(|(_, value, _)| *value).collect();
    let checked = all_gather(comm, &mine).map_err(of_talk).and_then(|all| {
        match facts.iter().zip(&all[0]).find(|((_, own, _), first)| own != *first) {
            Some(((what, own, advice), first)) => Err(Failure {
                message: format!("{what}: {own} on rank {}, {first} on rank 0; {advice}", comm.rank()),
                code: i32::from(Kind::Data.code()),
            }),
            None => Ok(()),
        }
    });
    all_or_first_error(comm, checked)
}

/// The ranks could not talk.
pub(crate) fn of_talk(error: CommError) -> Failure {
    Failure { message: error.to_string(), code: i32::from(Kind::Runtime.code()) }
}

/// Checks that all ranks draw from the same checkpoint.
///
/// # Errors
/// As for [`same_on_all`].
pub fn same_step(comm: &dyn Communicator, step: u64) -> Result<(), RemoteError> {
    let advice =
        "a run that is saving right now has one more for some: try again, or name one with --checkpoint";
    same_on_all(comm, &[("step of the newest checkpoint", step, advice)])
}
