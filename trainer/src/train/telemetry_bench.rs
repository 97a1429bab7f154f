//! The figures of `repa-dist bench telemetry`: what a step's metrics cost beside the step, and what clients of the
//! endpoint that never read cost it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use repa_comm::{Communicator, ReduceOp};
use serde::Serialize;

use super::bench::{Stepper, median};
use super::compute::Details;
use super::saver::Word;
use super::{TrainError, session};
use crate::config::Config;
use crate::telemetry::exporter;
use crate::telemetry::record::{RankRecord, StepRecord};

/// Steps before the clock starts.
const WARM_UP: usize = 2;

/// What to measure.
#[derive(Debug, Clone, Copy)]
pub struct TelemetryBenchOptions {
    /// Steps whose metrics are published, one after another.
    pub records: usize,
    /// Steps that are timed in each turn.
    pub steps: usize,
    /// Turns without and with clients.
    pub turns: usize,
    /// Clients that ask for metrics and never read the answer.
    pub clients: usize,
}

/// What was measured, on the slowest rank.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TelemetryBench {
    /// Number of ranks.
    pub ranks: usize,
    /// Seconds that publishing all metrics of a step takes, mean, while the endpoint is read all the time.
    pub publish_seconds: f64,
    /// Their 99th percentile.
    pub publish_p99_seconds: f64,
    /// Pages that were read meanwhile.
    pub pages: u64,
    /// Seconds of a step, its metrics included; median.
    pub step_seconds: f64,
    /// The mean over that.
    pub share: f64,
    /// Seconds of a step with the clients; median.
    pub crowded_seconds: f64,
    /// How many there were, at each rank.
    pub clients: usize,
}

/// Measures a configuration, on all ranks.
///
/// # Errors
/// The device or the endpoint cannot be used, or the ranks cannot talk.
pub fn run(
    config: &Config,
    comm: &Arc<dyn Communicator>,
    options: TelemetryBenchOptions,
) -> Result<TelemetryBench, TrainError> {
    let mut stepper = Stepper::new(config, comm)?;
    let exporter = exporter::start(&config.telemetry, &session::identity(config, comm.as_ref()))?;
    let address =
        exporter.local_address().ok_or_else(|| setup("the endpoint", "it has no address of its own"))?;
    let facts = session::facts(config);
    let (record, rank) = records(config, comm.as_ref());

    let mut times = Vec::with_capacity(options.records);
    let pages = {
        let reader = Reader::start(address)?;
        // The first page is slower, for there is nothing yet.
        reader.wait_for_a_page();
        let before = reader.pages();
        for _ in 0..options.records {
            let begun = Instant::now();
            record.publish(&rank, &facts);
            times.push(begun.elapsed().as_secs_f64());
            // As between steps: the reader gets its turn.
            std::thread::sleep(Duration::from_micros(200));
        }
        reader.pages() - before
    };
    let publish_seconds = times.iter().sum::<f64>() / times.len() as f64;
    times.sort_by(f64::total_cmp);
    let publish_p99_seconds = times[times.len() * 99 / 100];

    let timed = |stepper: &mut Stepper, steps: usize| -> Result<Vec<f64>, TrainError> {
        let each = |_| {
            comm.barrier()?;
            let begun = Instant::now();
            stepper.step(config, comm, Word::default())?;
            record.publish(&rank, &facts);
            Ok(begun.elapsed().as_secs_f64())
        };
        (0..steps).map(each).collect()
    };
    timed(&mut stepper, WARM_UP)?;
    let (mut alone, mut crowded) = (Vec::new(), Vec::new());
    for _ in 0..options.turns {
        alone.extend(timed(&mut stepper, options.steps)?);
        let crowd = crowd(address, options.clients).map_err(|error| setup("clients", &error.to_string()))?;
        crowded.extend(timed(&mut stepper, options.steps)?);
        drop(crowd);
    }
    let mut figures = [publish_seconds, publish_p99_seconds, median(alone), median(crowded)];
    comm.all_reduce_f64(&mut figures, ReduceOp::Max)?;
    let [publish_seconds, publish_p99_seconds, step_seconds, crowded_seconds] = figures;
    Ok(TelemetryBench {
        ranks: comm.size(),
        publish_seconds,
        publish_p99_seconds,
        pages,
        step_seconds,
        share: publish_seconds / step_seconds,
        crowded_seconds,
        clients: options.clients,
    })
}

fn setup(what: &'static str, problem: &str) -> TrainError {
    TrainError::Setup { what, problem: problem.to_owned() }
}

/// A step that has something to say of everything.
fn records(config: &Config, comm: &dyn Communicator) -> (StepRecord, RankRecord) {
    let record = StepRecord {
        step: 1,
        loss: 1.0,
        denoising_loss: 1.2,
        alignment_loss: -0.4,
        grad_norm: 0.5,
        skipped: false,
        learning_rate: 1e-4,
        images_per_second: 250.0,
        step_seconds: 0.12,
        data_wait_seconds: 0.001,
        compute_seconds: 0.11,
        communication_seconds: 0.005,
        communication_busy_seconds: 0.02,
        optimizer_seconds: 0.003,
        snapshot_seconds: 0.0,
    };
    let rank = RankRecord {
        images: (config.train.global_batch / comm.size()).max(1) as u64,
        communicated: 8_000_000,
        details: Details {
            encoders: vec![-0.4; config.alignment.z_dims.len()],
            timesteps: [(1.0, 4); super::TIMESTEP_PARTS],
            upload: Duration::from_millis(2),
            forward: Duration::from_millis(40),
            backward: Duration::from_millis(70),
        },
        loss_scale: Some(65_536.0),
        has_aligned: true,
    };
    (record, rank)
}

const REQUEST: &[u8] = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";

/// Clients that have asked and do not read. They go with the value.
fn crowd(address: SocketAddr, clients: usize) -> std::io::Result<Vec<TcpStream>> {
    let client = |_| {
        let mut stream = TcpStream::connect(address)?;
        stream.write_all(REQUEST)?;
        Ok(stream)
    };
    (0..clients).map(client).collect()
}

/// Reads the endpoint all the time, until it is dropped.
struct Reader {
    ended: Arc<AtomicBool>,
    pages: Arc<AtomicU64>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Reader {
    fn start(address: SocketAddr) -> Result<Self, TrainError> {
        let (ended, pages) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (told, counted) = (ended.clone(), pages.clone());
        let read = move || {
            while !told.load(Ordering::Relaxed) {
                let page = || -> std::io::Result<Vec<u8>> {
                    let mut stream = crowd(address, 1)?.remove(0);
                    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
                    let mut page = Vec::new();
                    stream.read_to_end(&mut page)?;
                    Ok(page)
                };
                if page().is_ok_and(|page| page.starts_with(b"HTTP/1.1 200")) {
                    counted.fetch_add(1, Ordering::Relaxed);
                }
            }
        };
        let thread = std::thread::Builder::new().name("reader".into()).spawn(read);
        let thread = thread.map_err(|error| setup("a thread", &error.to_string()))?;
        Ok(Self { ended, pages, thread: Some(thread) })
    }

    fn pages(&self) -> u64 {
        self.pages.load(Ordering::Relaxed)
    }

    fn wait_for_a_page(&self) {
        let begun = Instant::now();
        while self.pages() == 0 && begun.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic there has been reported by its hook.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::bench::tests::small;
    use repa_comm::Single;

    #[test]
    fn metrics_and_steps_are_timed() {
        let mut config = small();
        // Any.
        config.telemetry.port = 0;
        let comm: Arc<dyn Communicator> = Arc::new(Single::new());
        let options = TelemetryBenchOptions { records: 100, steps: 3, turns: 1, clients: 5 };
        let figures = run(&config, &comm, options).unwrap();
        assert!(
            figures.publish_seconds > 0.0 && figures.publish_seconds <= figures.publish_p99_seconds * 2.0
        );
        assert!(figures.pages > 0 && figures.step_seconds > figures.publish_seconds, "{figures:?}");
        assert_eq!((figures.ranks, figures.clients), (1, 5));
    }
}
