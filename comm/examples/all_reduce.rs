//! Prints the all-reduce's speed: `mpirun -n 2 all_reduce [chunk KiB] [messages]`, one line for each size.

use repa_comm::bench::{BenchOptions, all_reduce};
use repa_comm::{CommError, Options, init};

fn main() -> Result<(), CommError> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut options = Options::default();
    if let Some(chunk) = arguments.first().and_then(|argument| argument.parse::<usize>().ok()) {
        options.chunk_bytes = chunk << 10;
    }
    options.shared_memory = !arguments.iter().any(|argument| argument == "messages");
    let comm = init(&options)?;
    let sizes = vec![1 << 10, 64 << 10, 1 << 20, 16 << 20, 128 << 20];
    let bench = BenchOptions { sizes, against_library: true, ..BenchOptions::default() };
    let report = all_reduce(comm.as_ref(), &bench)?;
    if comm.rank() == 0 {
        println!(
            "{} ranks, {}, memcpy {:.1} GB/s",
            report.ranks,
            report.transport,
            report.memcpy_bytes_per_second / 1e9
        );
        for row in &report.rows {
            let rate = |bandwidth: &repa_comm::bench::Bandwidth| bandwidth.algorithm_bytes_per_second / 1e9;
            let library = row.library.as_ref().map_or(f64::NAN, rate);
            println!("{:>10} bytes: {:7.3} GB/s, library {library:7.3} GB/s", row.bytes, rate(&row.ours));
        }
    }
    comm.finalize()
}
