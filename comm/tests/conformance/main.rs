//! One suite for every communicator: the same checks run on a single process and under real mpirun with 1 to 4
//! ranks, by shared memory and by messages, and over NCCL where the feature is on. This program is both the test runner
//! and, when started by itself under mpirun with REPA_COMM_TEST set, a rank of the job under test.

mod board;
#[cfg(feature = "nccl")]
mod gpu;
mod job;
mod rank;
mod sums;

use libtest_mimic::{Arguments, Trial};

fn main() {
    if let Ok(role) = std::env::var("REPA_COMM_TEST") {
        rank::run(&role);
    }
    let mut trials = vec![
        Trial::test("single::collectives", || job::bare("collectives").expect_success(1)),
        Trial::test("single::abort", || {
            job::bare("abort").expect_failure(4, "error: the disk is full").map(drop)
        }),
        Trial::test("single::panic", || job::bare("panic").expect_failure(4, "index 7 is bad").map(drop)),
        Trial::test("srun_without_pmix_is_refused", || {
            let mut job = job::bare("collectives");
            job.variables(&[("SLURM_PROCID", "0"), ("SLURM_STEP_ID", "0"), ("SLURM_STEP_NUM_TASKS", "3")]);
            job.expect_failure(2, "srun --mpi=pmix").map(drop)
        }),
    ];
    for ranks in 1..=4 {
        for way in ["shared", "messages"] {
            trials.push(Trial::test(format!("mpi::collectives::{way}::{ranks}_ranks"), move || {
                job::mpirun(ranks, "collectives", way).expect_success(ranks)
            }));
        }
    }
    for way in ["shared", "messages"] {
        trials.extend([
            Trial::test(format!("mpi::missed_deadline::{way}"), move || {
                let job = job::mpirun(3, "deadline", way);
                job.expect_failure(
                    4,
                    "reduce-scatter of bucket 7 in step 120 on rank 0 of 3 gave up after 1.",
                )?
                .expect("waiting for rank 2")
                .map(drop)
            }),
            Trial::test(format!("mpi::missed_deadline_of_a_broadcast::{way}"), move || {
                let job = job::mpirun(2, "broadcast-deadline", way);
                job.expect_failure(4, "broadcast on rank 1 of 2 gave up after 1.")?
                    .expect("waiting for rank 0")
                    .map(drop)
            }),
            Trial::test(format!("mpi::abort_ends_all::{way}"), move || {
                let job = job::mpirun(3, "abort", way);
                job.expect_failure(4, "error: rank 1 on ")?.expect_once(": the disk is full").map(drop)
            }),
            Trial::test(format!("mpi::panic_ends_all::{way}"), move || {
                let job = job::mpirun(2, "panic", way);
                job.expect_failure(4, "index 7 is bad")?.expect("panicked (see above)").map(drop)
            }),
        ]);
    }
    trials.extend([
        Trial::test("mpi::an_agreed_error_is_said_once", || {
            let job = job::mpirun(4, "agreed-error", "shared");
            job.expect_failure(3, "error: rank 1 on ")?
                .expect_once("shard 1 is truncated")?
                .expect_no("shard 3")
                .map(drop)
        }),
        Trial::test("mpi::a_rank_that_hangs_in_the_start_is_not_waited_for", || {
            job::mpirun(2, "absent", "shared")
                .expect_failure(4, "the ranks did not find each other within 6 s")
                .map(drop)
        }),
        Trial::test("mpi::without_room_ranks_talk_by_messages", || {
            match job::mpirun_without_room(3, "by-messages") {
                Some(job) => job.expect_success(3).and_then(|()| {
                    let again =
                        job::mpirun_without_room(3, "by-messages").ok_or("it could be mounted before")?;
                    again.expect_end("no shared memory between the ranks")?.expect("--shm-size").map(drop)
                }),
                None => {
                    println!("skipped: this process may not mount a small /dev/shm");
                    Ok(())
                }
            }
        }),
        Trial::test("mpi::the_end_comes_without_standard_error_too", || {
            job::mpirun(2, "closed-stderr", "shared").expect_failure(4, "")?.expect_no("came back").map(drop)
        }),
        Trial::test("mpi::another_number_of_ranks_is_refused", || {
            let job = job::mpirun(2, "expects-three", "shared");
            job.expect_failure(2, "3 ranks were asked for and 2 started: start with `mpirun -n 3`").map(drop)
        }),
        Trial::test("mpi::ranks_that_come_apart_are_told", || {
            job::mpirun(2, "other-length", "shared")
                .expect_failure(4, "all-reduce on rank ")?
                .expect("come apart")
                .map(drop)
        }),
    ]);
    trials.extend(board::trials());
    #[cfg(feature = "nccl")]
    trials.extend(gpu::trials());
    let conclusion = libtest_mimic::run(&Arguments::from_args(), trials);
    #[cfg(feature = "nccl")]
    gpu::clean_up();
    conclusion.exit();
}
