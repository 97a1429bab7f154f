//! What one rank of a job under test does.

use crate::sums::{Order, Sum, bits, input, noise};
use half::{bf16, f16};
use repa_comm::{
    Background, Communicator, Failure, Options, Phases, ReduceOp, Wire, abort, all_gather,
    all_or_first_error, end_with, init, install_panic_hook, shard_range,
};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The transport under test.
fn way() -> String {
    std::env::var("REPA_COMM_TEST_WAY").unwrap_or_default()
}

/// Plays the role and ends the process.
pub fn run(role: &str) -> ! {
    let options = Options {
        shared_memory: way() != "messages",
        deadline: Some(Duration::from_secs(if role == "absent" { 1 } else { 60 })),
        // Small, so that even moderate vectors take many steps.
        chunk_bytes: 64 << 10,
        expected: (role == "expects-three").then_some(3),
    };
    if role == "absent" && std::env::var("OMPI_COMM_WORLD_RANK").is_ok_and(|rank| rank == "1") {
        // A rank that hangs when MPI has come up.
        let _mpi = mpi::initialize();
        std::thread::sleep(Duration::from_secs(60));
    }
    let comm = match init(&options) {
        Ok(comm) => comm,
        Err(error) => {
            eprintln!("error: {error}");
            std::process::exit(if role == "absent" { 4 } else { 2 })
        }
    };
    install_panic_hook(|_| None);
    #[cfg(feature = "nccl")]
    if way() == "nccl" {
        let comm = crate::gpu::start(comm);
        if !crate::gpu::play(role, &comm) {
            play(role, &comm, Order::Any);
        }
        finish(&comm);
    }
    play(role, comm.as_ref(), Order::Ranks);
    finish(comm.as_ref())
}

fn finish(comm: &dyn Communicator) -> ! {
    if let Err(error) = comm.finalize() {
        abort(4, &error.to_string());
    }
    println!("all checks passed");
    std::process::exit(0)
}

fn play(role: &str, comm: &dyn Communicator, order: Order) {
    match role {
        "collectives" => collectives(comm, order),
        "deadline" => {
            comm.set_deadline(Some(Duration::from_secs(1)));
            comm.set_step(120);
            leave_out(comm, comm.size() - 1, 0, || {
                let how = Background { phases: Phases::Reduce, wire: Wire::F32, bucket: 7 };
                comm.start_f32(vec![1.0; 100_000], how).wait().map(drop)
            });
        }
        "by-messages" => assert!(comm.describe().ends_with(", messages"), "{}", comm.describe()),
        "closed-stderr" => {
            if comm.rank() == 1 {
                // As where the terminal is gone.
                let (_, closed) = std::io::pipe().expect("a pipe");
                // SAFETY: both are open files of this process.
                assert_ne!(unsafe { libc::dup2(std::os::fd::AsRawFd::as_raw_fd(&closed), 2) }, -1);
                let _ = std::thread::spawn(|| abort(4, "the disk is full")).join();
                println!("the thread came back");
            }
            let _ = comm.barrier();
        }
        "broadcast-deadline" => {
            comm.set_deadline(Some(Duration::from_secs(1)));
            leave_out(comm, 0, 1, || comm.broadcast_bytes(&mut Vec::new(), 0));
        }
        "abort" => {
            if comm.rank() == 1 || comm.size() == 1 {
                abort(4, "the disk is full");
            }
            let _ = comm.barrier();
        }
        "panic" => {
            if comm.rank() + 1 == comm.size() {
                let thread = std::thread::spawn(|| panic!("index 7 is bad"));
                let _ = thread.join();
            }
            let _ = comm.barrier();
        }
        "agreed-error" => {
            // Ranks 1 and 3 fail: all report rank 1's error, and one of them prints it.
            let local = match comm.rank() {
                rank @ (1 | 3) => {
                    Err(Failure { message: format!("shard {rank} is truncated"), code: 2 + rank as i32 })
                }
                rank => Ok(rank),
            };
            let error = all_or_first_error(comm, local).expect_err("two ranks failed");
            assert_eq!((error.rank, error.code, error.broken), (1, 3, false));
            end_with(comm, &error)
        }
        "other-length" => {
            if let Err(error) = comm.all_reduce_f32(&mut vec![0.0; 10 + comm.rank()]) {
                abort(4, &error.to_string());
            }
        }
        other => crate::board::run(other, comm),
    }
}

/// Everybody but `absent` calls `work`, and `witness` ends the job with the error it gets.
pub fn leave_out(
    comm: &dyn Communicator,
    absent: usize,
    witness: usize,
    work: impl FnOnce() -> Result<(), repa_comm::CommError>,
) {
    if comm.rank() == absent {
        std::thread::sleep(Duration::from_secs(30));
        return;
    }
    let error = work().expect_err("one rank never comes");
    let later = comm.barrier().expect_err("a communicator that failed refuses work").to_string();
    assert!(later.contains("has ended (earlier error: "), "{later}");
    if comm.rank() == witness {
        abort(4, &error.to_string());
    }
    std::thread::sleep(Duration::from_secs(30));
}

fn collectives(comm: &dyn Communicator, order: Order) {
    let (rank, size) = (comm.rank(), comm.size());
    assert_eq!((comm.local_rank(), comm.local_size(), comm.node()), (rank, size, 0));
    assert!(comm.topology().threads_per_rank() >= 1);
    if size > 1 {
        let how = if way() == "messages" { "messages" } else { "shared memory" };
        assert!(comm.describe().ends_with(how), "{} where {how} was to be tested", comm.describe());
    }
    assert_eq!(comm.describe().starts_with("NCCL "), way() == "nccl", "{}", comm.describe());
    let mut lengths = vec![0, 1, 2, 3, 15, 16, 17, 1000, 4096, 16_384, 16_385, 65_537, 1_000_003];
    if way() == "nccl" && size <= 2 {
        // So long that each staging buffer is used several times.
        lengths.push(8_000_003);
    }
    lengths.extend((0..40).map(|case| (noise(11, 0, case).to_bits() % 50_000) as usize));
    for (case, &len) in lengths.iter().enumerate() {
        let seed = case as u64;
        let sum = Sum::new(order, seed, size, len);
        let whole = input(seed, rank, len);

        let mut data = whole.clone();
        comm.all_reduce_f32(&mut data).unwrap();
        sum.check_all(&data, &format!("all-reduce of {len}"));

        // However the vector is cut into buckets, and with several on their way.
        let bucket = 1 + len / 3;
        let how = |number, wire| Background { phases: Phases::ReduceAndGather, wire, bucket: number };
        let in_buckets = |wire| -> Vec<f32> {
            let start = |(number, part): (usize, &[f32])| comm.start_f32(part.to_vec(), how(number, wire));
            let pending: Vec<_> = whole.chunks(bucket).enumerate().map(start).collect();
            pending.into_iter().flat_map(|part| part.wait().unwrap()).collect()
        };
        let parts = in_buckets(Wire::F32);
        sum.check_all(&parts, &format!("all-reduce of {len} in buckets of {bucket}"));

        if size > 1 {
            let sum = Sum::rounded(order, seed, size, len);
            sum.check_all(&in_buckets(Wire::Bf16), &format!("bfloat16 all-reduce of {len}"));
        }

        // The halves, one after the other, make a whole; on the caller's time and in the background.
        let mine = comm.shard(len);
        assert_eq!(mine, shard_range(len, rank, size));
        let mut data = whole.clone();
        comm.reduce_scatter_f32(&mut data).unwrap();
        sum.check(&data[mine.clone()], mine.clone(), &format!("reduce-scatter of {len}"));
        comm.all_gather_shards_f32(&mut data).unwrap();
        sum.check_all(&data, &format!("all-gather of the shards of {len}"));
        let half = |data, phases| comm.start_f32(data, Background { phases, ..how(0, Wire::F32) }).wait();
        let data = half(half(whole.clone(), Phases::Reduce).unwrap(), Phases::Gather).unwrap();
        sum.check_all(&data, &format!("the halves for {len} in the background"));

        // Other lengths on every rank, nothing on one of them.
        let part_of = |rank: usize| input(seed, rank, if rank == 1 { 0 } else { len / (rank + 1) });
        let parts = all_gather(comm, &part_of(rank)).unwrap();
        assert_eq!(parts.len(), size);
        for (other, part) in parts.iter().enumerate() {
            assert_eq!(bits(part), bits(&part_of(other)), "all-gather around {len}, rank {other}'s");
        }

        let root = case % size;
        let message = |root: usize| bytemuck::cast_slice(&input(seed, root, len)).to_vec();
        let mut bytes: Vec<u8> = if rank == root { message(root) } else { vec![9; case] };
        comm.broadcast_bytes(&mut bytes, root).unwrap();
        assert!(bytes == message(root), "broadcast of {len} from {root}");
    }
    small_kinds(comm, order);
    late_ranks(comm);
    let agreed = all_or_first_error(comm, Ok(rank)).unwrap();
    assert_eq!(agreed, rank);
}

/// The other element types and operations.
fn small_kinds(comm: &dyn Communicator, order: Order) {
    let (rank, size) = (comm.rank(), comm.size());
    for len in [0usize, 1, 7, 30_000] {
        let own = |rank: usize| -> Vec<i64> {
            (0..len).map(|i| (i as i64 * 7919) % 101 - rank as i64 * 13).collect()
        };
        type Combine = fn(i64, i64) -> i64;
        let kinds: [(ReduceOp, Combine); 3] = [
            (ReduceOp::Sum, |a, b| a + b),
            (ReduceOp::Min, |a, b| a.min(b)),
            (ReduceOp::Max, |a, b| a.max(b)),
        ];
        for (op, combine) in kinds {
            let mut expected = own(0);
            for other in 1..size {
                expected
                    .iter_mut()
                    .zip(own(other))
                    .for_each(|(total, value)| *total = combine(*total, value));
            }
            let mut data = own(rank);
            comm.all_reduce_i64(&mut data, op).unwrap();
            assert_eq!(data, expected, "{op:?} of {len} integers");
            let mut data: Vec<f64> = own(rank).iter().map(|&value| value as f64 / 8.0).collect();
            comm.all_reduce_f64(&mut data, op).unwrap();
            let expected: Vec<f64> = expected.iter().map(|&value| value as f64 / 8.0).collect();
            assert_eq!(data, expected, "{op:?} of {len} float64");
            half_precision(comm, order, op, len);
        }
    }
    let mut bytes = vec![200u8, rank as u8];
    comm.all_reduce((&mut bytes[..]).into(), ReduceOp::Sum).unwrap();
    assert_eq!(bytes, [200u8.wrapping_mul(size as u8), (0..size as u8).sum()]);
    // A sum that starts from rank 0's value keeps its sign, and a bad value on one rank shows on all.
    let mut data = [-0.0, if rank == 0 { f32::NAN } else { 1.0 }];
    comm.all_reduce_f32(&mut data).unwrap();
    assert!(data[0].is_sign_negative() && data[1].is_nan());
}

/// Sums of half precision are taken in float32 and rounded once; extremes are exact.
fn half_precision(comm: &dyn Communicator, order: Order, op: ReduceOp, len: usize) {
    let own = |rank: usize, i: usize| noise(5, rank, i).clamp(-300.0, 300.0);
    let combine = |i: usize, round: &dyn Fn(f32) -> f32| {
        let values = (0..comm.size()).map(|rank| round(own(rank, i)));
        let combined = values.reduce(|a, b| match op {
            ReduceOp::Sum => a + b,
            ReduceOp::Min => a.min(b),
            ReduceOp::Max => a.max(b),
        });
        round(combined.expect("at least one rank"))
    };
    // In another order the sum in float32 may come to the other side of a number in the middle of two.
    let slack = |expected: f32, epsilon: f32, smallest: f32| match (order, op) {
        (Order::Any, ReduceOp::Sum) => epsilon * expected.abs() + smallest + 300.0 * f32::EPSILON,
        _ => 0.0,
    };
    let mut data: Vec<f16> = (0..len).map(|i| f16::from_f32(own(comm.rank(), i))).collect();
    comm.all_reduce((&mut data[..]).into(), op).unwrap();
    let right = |(i, v): (usize, &f16)| {
        let expected = combine(i, &|x| f16::from_f32(x).to_f32());
        let slack = slack(expected, f16::EPSILON.to_f32(), f16::MIN_POSITIVE_SUBNORMAL.to_f32());
        (v.to_f32() - expected).abs() <= slack
    };
    assert!(data.iter().enumerate().all(right), "{op:?} of {len} float16");
    let mut data: Vec<bf16> = (0..len).map(|i| bf16::from_f32(own(comm.rank(), i))).collect();
    comm.all_reduce((&mut data[..]).into(), op).unwrap();
    let right = |(i, v): (usize, &bf16)| {
        let expected = combine(i, &|x| bf16::from_f32(x).to_f32());
        (v.to_f32() - expected).abs() <= slack(expected, bf16::EPSILON.to_f32(), 0.0)
    };
    assert!(data.iter().enumerate().all(right), "{op:?} of {len} bfloat16");
}

/// Nobody leaves a barrier before everybody has come, whoever is late.
fn late_ranks(comm: &dyn Communicator) {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_micros() as u64;
    for late in 0..comm.size() {
        if comm.rank() == late {
            std::thread::sleep(Duration::from_millis(30));
        }
        let came = now();
        comm.barrier().unwrap();
        let left = now();
        for (other, came) in all_gather(comm, &[came]).unwrap().into_iter().enumerate() {
            assert!(came[0] <= left, "left the barrier before rank {other} came");
        }
    }
}
