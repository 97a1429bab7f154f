//! What a rank writes of a checkpoint, copied out of the way of the next step, and the thread that writes it.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use repa_comm::{copy, shard_range};

use super::{Owned, State};
use crate::checkpoint::{About, Array, CheckpointError, Checkpoints, Part, Retention, ShardRecord};
use crate::flat::{self, Flat};
use crate::params::Layout;

/// The ranges of each array that a rank writes: an even part of what all ranks have, and of a sharded optimizer's
/// state what it has.
fn written(
    len: usize,
    owned: &Owned,
    sharded: bool,
    (rank, world): (usize, usize),
) -> [(Array, Vec<Range<usize>>); 4] {
    let even = vec![even_part(len, rank, world)];
    let own = if sharded { owned.ranges().to_vec() } else { even.clone() };
    [(Array::Model, even), (Array::Ema, own.clone()), (Array::ExpAvg, own.clone()), (Array::ExpAvgSq, own)]
}

/// An even part of an array, cut between whole cache lines: so that what a rank writes of one array ends where the next
/// can begin as it does in memory.
fn even_part(len: usize, rank: usize, world: usize) -> Range<usize> {
    const LINE: usize = 64 / size_of::<f32>();
    let lines = shard_range(len.div_ceil(LINE), rank, world);
    len.min(lines.start * LINE)..len.min(lines.end * LINE)
}

/// Where a rank's arrays are.
pub(super) trait Source {
    /// Copies a range of the flat array, which is part of one of those that the rank owns unless it is of the weights.
    fn copy(&self, array: Array, range: &Range<usize>, out: &mut [f32]);
}

impl Source for State {
    fn copy(&self, array: Array, range: &Range<usize>, out: &mut [f32]) {
        let source = match array {
            Array::Model => return copy::past_caches(&self.params[range.clone()], out),
            Array::Ema => &self.ema,
            Array::ExpAvg => &self.exp_avg,
            Array::ExpAvgSq => &self.exp_avg_sq,
        };
        copy::past_caches(&source[self.owned.local(range)], out);
    }
}

/// A rank's part of a checkpoint, in memory of its own.
#[derive(Debug)]
pub(super) struct Snapshot {
    parts: Vec<(Array, Vec<Range<usize>>, Flat)>,
}

impl Snapshot {
    /// Room for these ranges, with every page of it in memory: the first copy into fresh pages would take several
    /// times as long as the next.
    fn new(ranges: &[(Array, Vec<Range<usize>>); 4]) -> Self {
        let room = |ranges: &[Range<usize>]| flat::zeros(ranges.iter().map(Range::len).sum());
        let parts = ranges.iter().map(|(array, ranges)| (*array, ranges.clone(), room(ranges)));
        Self { parts: parts.collect() }
    }

    /// Copies what is to be written.
    fn take(&mut self, source: &dyn Source) {
        for (array, ranges, values) in &mut self.parts {
            let mut at = 0;
            for range in ranges {
                source.copy(*array, range, &mut values[at..at + range.len()]);
                at += range.len();
            }
        }
    }

    /// A copy of a state's part.
    #[cfg(test)]
    pub(super) fn of(state: &State, sharded: bool, place: (usize, usize)) -> Self {
        let mut snapshot = Self::new(&written(state.params.len(), &state.owned, sharded, place));
        snapshot.take(state);
        snapshot
    }

    pub(super) fn parts(&self) -> Vec<Part<'_>> {
        self.parts
            .iter()
            .map(|(array, ranges, values)| Part { array: *array, ranges: ranges.clone(), values })
            .collect()
    }
}

/// What the writing thread is asked to do.
enum Order {
    Write(u64, Snapshot),
    Commit(Box<About>, Vec<ShardRecord>),
    Prune,
    Discard,
}

/// What came of an order.
#[derive(Debug)]
pub(super) enum Report {
    /// This rank's shard is durable, or not.
    Written(Result<ShardRecord, CheckpointError>),
    /// The checkpoint is complete here, or not.
    Committed(Result<(), CheckpointError>),
    /// What a failed save has left is gone, or not.
    Discarded(Result<(), CheckpointError>),
}

/// The thread that writes this rank's part of checkpoints.
#[derive(Debug)]
pub(super) struct Writer {
    orders: Option<Sender<Order>>,
    reports: Receiver<Report>,
    /// Where snapshots come back from.
    free: Receiver<Snapshot>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// What a writer works with.
pub(super) struct Setting {
    pub(super) checkpoints: Checkpoints,
    pub(super) layout: Arc<Layout>,
    pub(super) retention: Retention,
    pub(super) metric: String,
    pub(super) sharded: bool,
    pub(super) place: (usize, usize),
}

/// Nice value of the writing thread: where it competes with computing threads, it gets about a tenth of a core.
const NICE: i32 = 10;

impl Writer {
    /// Starts the thread, which makes room for the snapshots of a rank that owns this first.
    pub(super) fn start(setting: Setting, owned: &Owned) -> std::io::Result<Self> {
        let (orders, inbox) = channel::<Order>();
        let (outbox, reports) = channel();
        let (back, free) = channel();
        let ranges = written(setting.layout.trainable_len(), owned, setting.sharded, setting.place);
        let thread = std::thread::Builder::new().name("checkpoint".into()).spawn(move || {
            // On Linux a thread's own. Without it things are as they were.
            let _ = rustix::process::nice(NICE);
            if back.send(Snapshot::new(&ranges)).is_err() {
                return;
            }
            for order in inbox {
                let Some(report) = setting.carry_out(order, &back) else { continue };
                if outbox.send(report).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self { orders: Some(orders), reports, free, thread: Some(thread) })
    }

    fn order(&self, order: Order) {
        // The thread ends before its inbox only by a panic, which ends the process.
        if let Some(orders) = &self.orders {
            let _ = orders.send(order);
        }
    }

    /// Copies the state, and lets the copy be written. One save at a time: the report of the last one has to have
    /// come.
    pub(super) fn write(&self, step: u64, source: &dyn Source) {
        if let Ok(mut snapshot) = self.free.recv() {
            snapshot.take(source);
            self.order(Order::Write(step, snapshot));
        }
    }

    /// Completes the checkpoint.
    pub(super) fn commit(&self, about: About, records: Vec<ShardRecord>) {
        self.order(Order::Commit(Box::new(about), records));
    }

    /// Removes what is too old. Nothing is reported of it.
    pub(super) fn prune(&self) {
        self.order(Order::Prune);
    }

    /// Clears away what a failed save has left.
    pub(super) fn discard(&self) {
        self.order(Order::Discard);
    }

    /// What has come of the last order, once.
    pub(super) fn report(&self) -> Option<Report> {
        self.reports.try_recv().ok()
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            // A panic there has been reported by its hook.
            let _ = thread.join();
        }
    }
}

impl Setting {
    fn carry_out(&self, order: Order, back: &Sender<Snapshot>) -> Option<Report> {
        let checkpoints = &self.checkpoints;
        Some(match order {
            Order::Write(step, snapshot) => {
                let written = checkpoints.write_shard(step, &self.layout, &snapshot.parts(), &[], self.place);
                // Nobody waits for it if training is over.
                let _ = back.send(snapshot);
                Report::Written(written)
            }
            Order::Commit(about, records) => {
                Report::Committed(checkpoints.commit(&self.layout, *about, records))
            }
            Order::Prune => {
                if let Err(error) = checkpoints.prune(&self.retention, &self.metric) {
                    tracing::warn!("an old checkpoint stays where it is: {error}");
                }
                return None;
            }
            Order::Discard => Report::Discarded(checkpoints.discard_unfinished().map(drop)),
        })
    }
}
