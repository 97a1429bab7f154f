//! What the host is to be good for.

use repa_comm::Topology;
use repa_trainer::config::{Config, Sharding};
use repa_trainer::estimate::{Estimate, Job, Part, estimate};

/// A run, and the ranks that it would have.
#[derive(Debug)]
pub struct Subject {
    /// Its configuration.
    pub config: Config,
    /// Ranks in all.
    pub ranks: usize,
    /// Of which on this host.
    pub here: usize,
    /// Hosts.
    pub nodes: usize,
    /// Ranks that share this one's processors, and the number of those, where a launcher has started it.
    pub placed: Option<(usize, usize)>,
    /// Whether disk speeds are measured on less.
    pub quick: bool,
    /// What a rank takes.
    pub estimate: Estimate,
}

impl Subject {
    /// A run on this host alone, of `ranks` ranks.
    pub fn alone(config: Config, ranks: usize, quick: bool) -> Self {
        Self::new(config, ranks, ranks, 1, None, quick)
    }

    /// A run on the hosts of a job.
    pub fn of_job(config: Config, topology: &Topology, quick: bool) -> Self {
        let placed = Some((topology.sharers, topology.processors));
        Self::new(config, topology.size, topology.local_size, topology.nodes, placed, quick)
    }

    fn new(
        config: Config,
        ranks: usize,
        here: usize,
        nodes: usize,
        placed: Option<(usize, usize)>,
        quick: bool,
    ) -> Self {
        let shards = if config.optimizer.sharding == Sharding::Zero1 { ranks } else { 1 };
        let threads = match config.train.threads {
            0 => (processors() / here.max(1)).max(1),
            threads => threads,
        };
        let estimate = estimate(&config, &Job { ranks, shards, threads });
        Self { config, ranks, here, nodes, placed, quick, estimate }
    }

    /// Whether it trains on NVIDIA GPUs.
    pub fn on_gpus(&self) -> bool {
        self.config.device.is_cuda()
    }

    /// Bytes of a checkpoint.
    pub fn checkpoint_bytes(&self) -> u64 {
        let of_a_rank = self.estimate.lines.iter().find(|line| line.part == Part::Snapshot);
        of_a_rank.map_or(0, |line| line.bytes.saturating_mul(self.ranks as u64))
    }

    /// Host memory of the ranks on this host.
    pub fn memory_bytes(&self) -> u64 {
        self.estimate.host_bytes.saturating_mul(self.here as u64)
    }
}

/// Processors that this process may use.
pub fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// `1 rank`, `2 ranks`.
pub fn plural(count: usize, what: &str) -> String {
    if count == 1 { format!("1 {what}") } else { format!("{count} {what}s") }
}

/// Bytes as people read them.
pub fn size(bytes: u64) -> String {
    const KIB: f64 = 1024.0;
    match bytes as f64 / KIB {
        kib if kib < KIB => format!("{kib:.0} KiB"),
        kib if kib < KIB * KIB => format!("{:.0} MiB", kib / KIB),
        kib if kib < KIB * KIB * KIB => format!("{:.1} GiB", kib / (KIB * KIB)),
        kib => format!("{:.1} TiB", kib / (KIB * KIB * KIB)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_their_unit() {
        let read = |bytes: u64| size(bytes);
        assert_eq!(read(0), "0 KiB");
        assert_eq!(read(200 << 10), "200 KiB");
        assert_eq!(read(512 << 20), "512 MiB");
        assert_eq!(read(3 << 29), "1.5 GiB");
        assert_eq!(read(5 << 40), "5.0 TiB");
    }

    #[test]
    fn a_checkpoint_has_four_arrays() {
        let subject = Subject::alone(Config::default(), 2, true);
        let arrays = 16 * subject.config.sit().layout().trainable_len() as u64;
        assert!(subject.checkpoint_bytes().abs_diff(arrays) < 64, "{}", subject.checkpoint_bytes());
        assert!(!subject.on_gpus() && subject.memory_bytes() > 2 * arrays);
    }
}
