//! mpirun's own words, as OpenMPI 4.1.4 prints them.

use super::*;

const ABORT: &str = "--------------------------------------------------------------------------\n\
    MPI_ABORT was invoked on rank 1 in communicator MPI_COMM_WORLD\nwith errorcode 4.\n\n\
    NOTE: invoking MPI_ABORT causes Open MPI to kill all MPI processes.\n";
const EXIT: &str = "Primary job  terminated normally, but 1 process returned\na non-zero exit code.\n\
    mpirun detected that one or more processes exited with non-zero status, thus causing\n\
    the job to be terminated. The first process to do so was:\n\n  Process name: [[25846,1],3]\n  Exit code:    2\n";
const SIGNAL: &str =
    "mpirun noticed that process rank 2 with PID 0 on node vm exited on signal 9 (Killed).\n";

fn placement() -> Placement {
    Placement::from_list(&["a:2".into(), "b:2".into()]).expect("hosts")
}

fn error(rank: usize, text: &str) -> RankError {
    RankError { rank, text: text.to_owned() }
}

/// As the system reports it: an exit code, or a signal.
fn exit(code: i32) -> Option<ExitStatus> {
    Some(ExitStatus::from_raw(code << 8))
}

fn signal(signal: i32) -> Option<ExitStatus> {
    Some(ExitStatus::from_raw(signal))
}

fn verdict(status: Option<ExitStatus>, errors: &[RankError], words: &str) -> Verdict {
    judge(status, None, (errors, words), &placement())
}

#[test]
fn the_rank_that_aborted_is_the_cause_even_if_mpirun_crashes() {
    let errors = [error(0, "rank 0 on a: too"), error(1, "rank 1 on a: it broke\n")];
    for status in [exit(4), signal(11), None] {
        let found = verdict(status, &errors, ABORT);
        assert_eq!((found.why, found.code, found.rank), (Why::Failed, Some(4), Some(1)));
        assert_eq!((found.message.as_str(), found.host.as_deref()), ("rank 1 on a: it broke", Some("a")));
    }
    // Without mpirun's words, the first error counts, and its code is that of a failure.
    let found = verdict(signal(11), &errors, "");
    assert_eq!((found.why, found.code, found.rank), (Why::Failed, Some(4), Some(0)));
}

#[test]
fn exit_codes_of_ranks_are_final_or_not() {
    let found = verdict(signal(11), &[error(3, "no such key")], EXIT);
    assert_eq!((found.why, found.code, found.rank), (Why::Config, Some(2), Some(3)));
    assert_eq!((found.message.as_str(), found.host.as_deref()), ("no such key", Some("b")));
    assert_eq!(verdict(exit(3), &[error(0, "bad data")], "").why, Why::Data);
    let silent = verdict(exit(2), &[], EXIT);
    assert_eq!(silent.message, "rank 3 ended with exit code 2 and no message");
    assert_eq!(verdict(exit(0), &[], "").why, Why::Done);
    assert_eq!(verdict(exit(75), &[], &EXIT.replace("   2", "   75")).why, Why::Stopped);
    assert_eq!(verdict(exit(77), &[], "a word\n---\n").message, "mpirun ended with exit code 77: a word");
}

#[test]
fn signals_are_told_with_their_rank() {
    let found = verdict(exit(137), &[error(0, "rank 0 on a: lost rank 2")], SIGNAL);
    assert_eq!((found.why, found.signal, found.rank), (Why::Killed, Some(9), Some(2)));
    assert_eq!(found.message, "rank 2 on b was ended by signal 9 (Killed)");
    let found = verdict(signal(9), &[], "");
    assert_eq!((found.why, found.signal), (Why::Mpirun, Some(9)));
    assert_eq!(found.message, "mpirun was ended by signal 9");
}

#[test]
fn what_launch_did_is_told() {
    let stuck = Stuck { rank: 3, host: "b".into(), text: "no answer".into() };
    let forced = Forced::Hung { seconds: 30.2, stepped: true, option: "--hang-seconds", stuck: Some(stuck) };
    let found = judge(exit(1), Some(&forced), (&[], ""), &placement());
    assert_eq!((found.why, found.rank), (Why::Hung, Some(3)));
    assert_eq!(found.message, "no new step for 30 s (--hang-seconds); rank 3 on b: no answer");
    // A rank that has found out the cause knows more.
    let errors = [error(0, "rank 0 on a: gave up waiting for rank 3")];
    assert_eq!(judge(signal(9), Some(&Forced::Lingering), (&errors, ""), &placement()).why, Why::Failed);
    assert_eq!(judge(signal(9), Some(&Forced::Lingering), (&[], ""), &placement()).why, Why::Mpirun);
    assert_eq!(judge(None, Some(&Forced::Again(2)), (&[], ""), &placement()).signal, Some(2));
}

#[test]
fn what_keeps_mpirun_from_starting_is_told() {
    let message = |words: &str| verdict(exit(1), &[], words).message;
    let program = "mpirun was unable to launch the specified application as it could not access\nor execute an \
                   executable:\n\nExecutable: /x/repa-dist\nNode: b\n";
    assert!(message(program).starts_with("b cannot run /x/repa-dist"), "{}", message(program));
    let daemon = "ssh: connect to host b port 22: Connection refused\n-----\nORTE was unable to reliably start one or \
                  more daemons.\n";
    assert!(message(daemon).contains("port 22: Connection refused. OpenMPI has to be installed"));
    assert!(message("There are not enough slots available in the system").contains("--hosts NAME:RANKS"));
}
