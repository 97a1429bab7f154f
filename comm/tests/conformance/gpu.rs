//! The suite over NCCL: on this host's GPU where there is one, and everywhere on a driver and an NCCL that are only
//! pretended (`tests/stand_in`), which tells nothing about GPUs but runs all of the communicator.

use crate::job::{self, Job};
use crate::rank::leave_out;
use crate::sums::{Order, Sum, input};
use cudarc::driver::result::{self, DriverError, stream::StreamKind};
use libtest_mimic::{Failed, Trial};
use repa_comm::nccl::{After, CUdeviceptr, CUstream, DeviceType, DeviceValues, available};
use repa_comm::{Board, Communicator, Nccl, Phases, abort};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

/// Two ranks on one GPU.
const SHARING: [(&str, &str); 3] =
    [("NCCL_MULTI_RANK_GPU_ENABLE", "1"), ("NCCL_NVLS_ENABLE", "0"), ("NCCL_MAX_CTAS", "4")];

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![
        Trial::test("nccl::a_missing_library_is_said", || {
            let mut job = nccl(1, "collectives");
            job.variables(&[("REPA_NCCL_LIBRARY", "/nowhere/libnccl.so.2")]);
            job.expect_failure(2, "/nowhere/libnccl.so.2")?.expect("REPA_NCCL_LIBRARY").map(drop)
        }),
        Trial::test("nccl::a_missing_library_is_said::by_all_ranks", || {
            let mut job = nccl(2, "collectives");
            job.variables(&[("REPA_NCCL_LIBRARY", "/nowhere/libnccl.so.2")]);
            job.expect_failure(2, "error: rank 0 on ")?.expect("/nowhere/libnccl.so.2").map(drop)
        }),
    ];
    trials.extend(on_gpus());
    trials.extend(on_stand_in());
    trials
}

/// With the real libraries. Ignored, and the reason printed, where something is missing.
fn on_gpus() -> Vec<Trial> {
    let found = available();
    let mut trials = Vec::new();
    for ranks in [1, 2] {
        let reason = match &found {
            Err(error) => Some(error.to_string()),
            Ok(found) if found.gpus < ranks && !found.shares_gpus => {
                Some(format!("NCCL {} cannot have two ranks on one GPU", found.version))
            }
            Ok(_) => None,
        };
        if let Some(reason) = &reason {
            eprintln!("skipped: NCCL on GPUs with {ranks} ranks: {reason}");
        }
        let skipped = reason.is_some();
        for role in ["collectives", "device"] {
            let test = move || with(&SHARING, nccl(ranks, role)).expect_success(ranks);
            trials.push(
                Trial::test(format!("nccl::gpu::{role}::{ranks}_ranks"), test).with_ignored_flag(skipped),
            );
        }
        if ranks == 2 {
            let test = || missed_deadline(with(&SHARING, nccl(2, "deadline")));
            trials.push(Trial::test("nccl::gpu::missed_deadline", test).with_ignored_flag(skipped));
        }
    }
    trials
}

fn missed_deadline(job: Job) -> Result<(), Failed> {
    job.expect_failure(4, "reduce-scatter of bucket 7 in step 120 on rank 0 of 2 gave up after 1.")?
        .expect("waiting for the other ranks")
        .map(drop)
}

fn on_stand_in() -> Vec<Trial> {
    let mut trials = Vec::new();
    for ranks in 1..=4 {
        for role in ["collectives", "device"] {
            let test = move || stand_in(ranks, role, &[])?.expect_success(ranks);
            trials.push(Trial::test(format!("nccl::stand_in::{role}::{ranks}_ranks"), test));
        }
    }
    let one_gpu = ("STAND_IN_GPUS", "1");
    trials.extend([
        Trial::test("nccl::stand_in::missed_deadline", || missed_deadline(stand_in(2, "deadline", &[])?)),
        Trial::test("nccl::stand_in::missed_deadline_on_device", || {
            stand_in(2, "device-deadline", &[])?
                .expect_failure(4, "all-reduce of bucket 5 in step 9 on rank 0 of 2 gave up after 1.")?
                // As the board has it.
                .expect("waiting for the other ranks (rank 1 on ")
                .map(drop)
        }),
        Trial::test("nccl::stand_in::an_error_of_nccl_is_told", || {
            stand_in(2, "collectives", &[("STAND_IN_FAILURE", "3")])?
                .expect_failure(4, "NCCL error 6: remote error (said by the stand-in)")
                .map(drop)
        }),
        Trial::test("nccl::stand_in::a_shared_gpu_is_refused", move || {
            stand_in(2, "collectives", &[one_gpu])?
                .expect_failure(2, "rank 1 are on the same GPU")?
                .expect("NCCL_MULTI_RANK_GPU_ENABLE=1")
                .map(drop)
        }),
        Trial::test("nccl::stand_in::a_shared_gpu_is_refused::to_an_old_nccl", move || {
            stand_in(2, "collectives", &[one_gpu, SHARING[0], ("STAND_IN_VERSION", "22705")])?
                .expect_failure(2, "needs NCCL 2.30.0 or later, and this is NCCL 2.27.5")
                .map(drop)
        }),
        Trial::test("nccl::stand_in::a_shared_gpu_is_allowed", move || {
            stand_in(2, "device", &[one_gpu, SHARING[0]])?.expect_success(2)
        }),
        Trial::test("nccl::stand_in::an_ancient_nccl_is_refused", || {
            stand_in(1, "collectives", &[("STAND_IN_VERSION", "21602")])?
                .expect_failure(2, "is NCCL 2.16.2, and 2.18.0 is the oldest that works")
                .map(drop)
        }),
    ]);
    trials
}

/// A job whose ranks use NCCL.
fn nccl(ranks: usize, role: &str) -> Job {
    let way = ("REPA_COMM_TEST_WAY", "nccl");
    with(&[way], if ranks == 1 { job::bare(role) } else { job::mpirun(ranks, role, way.1) })
}

fn with(variables: &[(&str, &str)], mut job: Job) -> Job {
    job.variables(variables);
    job
}

/// The same with the libraries that are only pretended.
fn stand_in(ranks: usize, role: &str, variables: &[(&str, &str)]) -> Result<Job, Failed> {
    let folder = stand_in_folder()?;
    let folder = folder.to_str().ok_or("the folder's name is no text")?;
    let found = [("LD_LIBRARY_PATH", folder), ("STAND_IN_GPUS", "4")];
    let mut job = nccl(ranks, role);
    job.remove_variables(&["REPA_NCCL_LIBRARY", SHARING[0].0]);
    Ok(with(variables, with(&found, job)))
}

/// Compiles the libraries into a folder of this process's own, once.
fn stand_in_folder() -> Result<PathBuf, Failed> {
    static FOLDER: std::sync::OnceLock<Result<PathBuf, String>> = std::sync::OnceLock::new();
    let compile = || {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("stand-in-{}", std::process::id()));
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/stand_in/build.sh");
        let output = Command::new("sh").arg(script).arg(&folder).output();
        let output = output.map_err(|error| format!("sh: {error}"))?;
        if !output.status.success() {
            return Err(format!("tests/stand_in/build.sh: {}", String::from_utf8_lossy(&output.stderr)));
        }
        Ok(folder)
    };
    FOLDER.get_or_init(compile).clone().map_err(Failed::from)
}

/// Removes what `stand_in_folder` has made.
pub fn clean_up() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("stand-in-{}", std::process::id()));
    // Most runs have made none.
    let _ = std::fs::remove_dir_all(folder);
}

/// Starts NCCL in a rank under test.
pub fn start(comm: Arc<dyn Communicator>) -> Nccl {
    let gpu = available().map_or(0, |found| comm.local_rank() % found.gpus);
    match Nccl::start(Arc::clone(&comm), gpu, Some(Duration::from_secs(60))) {
        Ok(nccl) => nccl,
        Err(error) => {
            eprintln!("error: {error}");
            let _ = comm.finalize();
            std::process::exit(2)
        }
    }
}

/// Plays a role that is NCCL's alone; false if it is another.
pub fn play(role: &str, comm: &Nccl) -> bool {
    match role {
        "device" => device(comm).expect("the driver works"),
        "device-deadline" => {
            comm.set_deadline(Some(Duration::from_secs(1)));
            comm.set_step(9);
            let _board = Board::start(comm).expect("a board");
            leave_out(comm, 1, 0, || {
                let vector = OnDevice::new(comm, &[1.0; 1000]).expect("the driver works");
                // SAFETY: the vector lives until the end of the process.
                let pending = unsafe {
                    comm.all_reduce_device(vector.values(1000), Some(5), After::Stream(vector.stream))
                }?;
                std::mem::forget(vector);
                pending.wait()
            });
        }
        "collectives" if std::env::var_os("STAND_IN_FAILURE").is_some() => {
            for _ in 0..10 {
                if let Err(error) = comm.all_reduce_f32(&mut [1.0; 10]) {
                    abort(4, &error.to_string());
                }
            }
        }
        _ => return false,
    }
    true
}

/// A vector on the device and a stream of the "caller's".
struct OnDevice {
    start: CUdeviceptr,
    stream: CUstream,
}

impl OnDevice {
    fn new(comm: &Nccl, data: &[f32]) -> Result<Self, DriverError> {
        let device = result::device::get(comm.device() as i32)?;
        // SAFETY: the device is from `get`; the context is kept. The memory is as long as the data, or longer.
        unsafe {
            result::ctx::set_current(result::primary_ctx::retain(device)?)?;
            let start = result::malloc_sync(size_of_val(data).max(4))?;
            let vector = Self { start, stream: result::stream::create(StreamKind::NonBlocking)? };
            result::memcpy_htod_async(vector.start, data, vector.stream)?;
            result::stream::synchronize(vector.stream)?;
            Ok(vector)
        }
    }

    /// In the stream, and not waited for: what comes next has to be ordered after it.
    fn upload(&self, data: &'static [f32]) -> Result<(), DriverError> {
        // SAFETY: the data is as long as that of `new`, and stays.
        unsafe { result::memcpy_htod_async(self.start, data, self.stream) }
    }

    fn download(&self, data: &mut [f32]) -> Result<(), DriverError> {
        // SAFETY: as for `upload`.
        unsafe {
            result::memcpy_dtoh_async(data, self.start, self.stream)?;
            result::stream::synchronize(self.stream)
        }
    }

    fn values(&self, len: usize) -> DeviceValues {
        DeviceValues { start: self.start, len, kind: DeviceType::F32 }
    }
}

impl Drop for OnDevice {
    fn drop(&mut self) {
        // SAFETY: made by `new`, freed once; the stream is empty.
        unsafe {
            let _ = result::free_sync(self.start);
            let _ = result::stream::destroy(self.stream);
        }
    }
}

/// Vectors that are on the device, ordered with a stream; several on their way.
fn device(comm: &Nccl) -> Result<(), DriverError> {
    let (rank, size) = (comm.rank(), comm.size());
    for (case, len) in [0, 1, 5, 16, 1000, 12 * 1000, 100_003].into_iter().enumerate() {
        let seed = 50 + case as u64;
        let sum = Sum::new(Order::Any, seed, size, len);
        let mut data = vec![f32::NAN; len];
        let vector = OnDevice::new(comm, &data)?;
        // A few kilobytes that the process keeps.
        let given: &'static [f32] = input(seed, rank, len).leak();
        let after = match case % 2 == 0 && comm.marks_contexts() {
            true => After::Context,
            false => After::Stream(vector.stream),
        };
        let start = |phases| {
            // SAFETY: the vector is freed after the operations, and used in between only in its stream, which waits.
            let mut pending = unsafe { comm.start_device(vector.values(len), phases, Some(case), after) }
                .expect("the driver works");
            // SAFETY: the stream lives.
            unsafe { pending.order(vector.stream) }.expect("NCCL works");
            pending
        };
        vector.upload(given)?;
        let pending = start(Phases::ReduceAndGather);
        vector.download(&mut data)?;
        pending.wait().expect("NCCL works");
        sum.check_all(&data, &format!("all-reduce of {len} on the device"));

        // The halves, one after the other without a wait on the host.
        vector.upload(given)?;
        let pending = [start(Phases::Reduce), start(Phases::Gather)];
        vector.download(&mut data)?;
        sum.check_all(&data, &format!("the halves for {len} on the device"));
        pending.into_iter().for_each(|pending| pending.wait().expect("NCCL works"));
    }
    many_buckets(comm)?;
    let traffic = comm.traffic();
    assert!(traffic.bytes > 0 && !traffic.busy.is_zero());
    Ok(())
}

/// More buckets than may be under way at a time.
fn many_buckets(comm: &Nccl) -> Result<(), DriverError> {
    let (rank, size, len) = (comm.rank(), comm.size(), 300 * 7);
    let sum = Sum::new(Order::Any, 3, size, len);
    let mut data = input(3, rank, len);
    let vector = OnDevice::new(comm, &data)?;
    let pending: Vec<_> = (0..300)
        .map(|bucket| {
            let start = vector.start + (bucket * 7 * size_of::<f32>()) as CUdeviceptr;
            let values = DeviceValues { start, len: 7, kind: DeviceType::F32 };
            // SAFETY: as in `device`; the parts are apart.
            unsafe { comm.all_reduce_device(values, Some(bucket), After::Nothing) }.expect("the driver works")
        })
        .collect();
    for pending in pending {
        pending.wait().expect("NCCL works");
    }
    vector.download(&mut data)?;
    sum.check_all(&data, "300 buckets on the device");
    Ok(())
}
