//! What one rank tells: a fixed layout of atomics in memory that other processes read, and as numbers on the wire.

use super::process::{Identity, Process};
use super::status::{Phase, Progress};
use crate::{Call, Collective};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// One rank's record. What the training thread writes and what the communication thread writes have cache lines (and
/// prefetched neighbours) of their own, so that neither waits for the other's line, nor for another rank's.
///
/// Every field stands for itself. What belongs together (a phase and its begin, a collective and its begin) is one
/// word: a tag in the highest byte and unix time in microseconds below it.
#[derive(Debug, Default)]
#[repr(C)]
pub(super) struct Record {
    training: Training,
    calls: Calls,
}

#[derive(Debug, Default)]
#[repr(C, align(128))]
struct Training {
    /// Written last at the start: a record with process number 0 says nothing.
    pid: AtomicU64,
    /// When the process started, and its namespace: see [`Identity`].
    started: AtomicU64,
    namespace: AtomicU64,
    step: AtomicU64,
    stepped: AtomicU64,
    phase: AtomicU64,
    step_nanoseconds: AtomicU64,
}

#[derive(Debug, Default)]
#[repr(C, align(128))]
struct Calls {
    entered: AtomicU64,
    left: AtomicU64,
    /// Tag 0 between calls.
    call: AtomicU64,
    bucket: AtomicU64,
}

/// "None" among numbers.
const NOTHING: u64 = u64::MAX;
const TIME: u64 = (1 << 56) - 1;

/// Unix time in microseconds: in 56 bits until the year 4253.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64 & TIME)
}

fn tagged(tag: u8) -> u64 {
    u64::from(tag) << 56 | now()
}

fn tag(word: u64) -> u8 {
    (word >> 56) as u8
}

fn collective_code(collective: Collective) -> u8 {
    match collective {
        Collective::Start => 1,
        Collective::AllReduce => 2,
        Collective::ReduceScatter => 3,
        Collective::AllGather => 4,
        Collective::Broadcast => 5,
        Collective::Barrier => 6,
        Collective::LibraryAllReduce => 7,
        Collective::Finalize => 8,
    }
}

fn collective(code: u8) -> Option<Collective> {
    Some(match code {
        1 => Collective::Start,
        2 => Collective::AllReduce,
        3 => Collective::ReduceScatter,
        4 => Collective::AllGather,
        5 => Collective::Broadcast,
        6 => Collective::Barrier,
        7 => Collective::LibraryAllReduce,
        8 => Collective::Finalize,
        _ => return None,
    })
}

impl Record {
    /// This process's first words.
    pub(super) fn claim(&self, identity: Identity) {
        self.training.step.store(NOTHING, Ordering::Relaxed);
        self.training.stepped.store(now(), Ordering::Relaxed);
        self.calls.bucket.store(NOTHING, Ordering::Relaxed);
        self.calls.call.store(tagged(0), Ordering::Relaxed);
        self.set_phase(Phase::Starting);
        self.training.started.store(identity.started, Ordering::Relaxed);
        self.training.namespace.store(identity.namespace, Ordering::Relaxed);
        self.training.pid.store(identity.pid, Ordering::Release);
    }

    pub(super) fn set_phase(&self, phase: Phase) {
        self.training.phase.store(tagged(phase as u8), Ordering::Relaxed);
    }

    pub(super) fn set_step(&self, step: u64) {
        self.training.step.store(step, Ordering::Relaxed);
        self.training.stepped.store(now(), Ordering::Relaxed);
    }

    pub(super) fn set_step_time(&self, time: Duration) {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.training.step_nanoseconds.store(nanoseconds, Ordering::Relaxed);
    }

    pub(super) fn enter(&self, call: Call) {
        let bucket = call.bucket.map_or(NOTHING, |bucket| bucket as u64);
        self.calls.bucket.store(bucket, Ordering::Relaxed);
        self.calls.call.store(tagged(collective_code(call.collective)), Ordering::Relaxed);
        self.calls.entered.fetch_add(1, Ordering::Release);
    }

    pub(super) fn leave(&self) {
        self.calls.call.store(tagged(0), Ordering::Relaxed);
        self.calls.left.fetch_add(1, Ordering::Release);
    }

    pub(super) fn entered(&self) -> u64 {
        self.calls.entered.load(Ordering::Acquire)
    }

    /// What is told here, by a reader on the same node.
    pub(super) fn read(&self, reader: Identity) -> Reading {
        let numbers = || {
            let Training { pid, step, stepped, phase, step_nanoseconds, .. } = &self.training;
            let Calls { entered, left, call, bucket } = &self.calls;
            [pid, entered, left, call, bucket, step, stepped, phase, step_nanoseconds]
                .map(|field| field.load(Ordering::Acquire))
        };
        // Fields of one moment, where the writer leaves one; each is right by itself in any case.
        let mut found = numbers();
        for _ in 0..4 {
            let again = numbers();
            if again == found {
                break;
            }
            found = again;
        }
        let writer = Identity {
            pid: found[0],
            started: self.training.started.load(Ordering::Relaxed),
            namespace: self.training.namespace.load(Ordering::Relaxed),
        };
        let process = if writer.pid == 0 { Process::Running } else { writer.process(reader) };
        Reading { numbers: found, process }
    }
}

const NUMBERS: usize = 9;

/// A record's contents at some time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reading {
    numbers: [u64; NUMBERS],
    process: Process,
}

impl Reading {
    /// Bytes on the wire.
    pub(super) const BYTES: usize = 8 * (NUMBERS + 1);

    pub(super) fn encode(&self, to: &mut Vec<u8>) {
        self.numbers.iter().for_each(|number| to.extend(number.to_le_bytes()));
        to.extend((self.process as u64).to_le_bytes());
    }

    /// The inverse of `encode`; None if another program wrote it.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let (words, []) = bytes.as_chunks::<8>() else { return None };
        let (process, numbers) = words.split_last()?;
        let mut reading =
            Self { numbers: [0; NUMBERS], process: Process::from_code(u64::from_le_bytes(*process))? };
        if numbers.len() != NUMBERS {
            return None;
        }
        for (number, word) in reading.numbers.iter_mut().zip(numbers) {
            *number = u64::from_le_bytes(*word);
        }
        Some(reading)
    }

    /// What it means at `now`, a time of the clock that the rank itself reads. None if the rank has told nothing.
    pub(super) fn progress(&self, now: u64) -> Option<Progress> {
        let [pid, entered, left, call, bucket, step, stepped, phase, step_nanoseconds] = self.numbers;
        let since = |word: u64| Duration::from_micros(now.saturating_sub(word & TIME));
        let some = |number: u64| (number != NOTHING).then_some(number);
        let phase_word = phase;
        let phase = Phase::from_code(tag(phase_word)).filter(|_| pid != 0)?;
        let bucket = some(bucket).map(|bucket| bucket as usize);
        let told = |collective| (Call { collective, bucket, step: None }, since(call));
        Some(Progress {
            pid: pid as u32,
            process: self.process,
            step: some(step),
            phase,
            in_phase: since(phase_word),
            entered,
            left,
            call: collective(tag(call)).map(told),
            unchanged: since(stepped).min(since(phase_word)).min(since(call)),
            step_time: (step_nanoseconds != 0).then(|| Duration::from_nanos(step_nanoseconds)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_is_read() {
        let record = Record::default();
        assert_eq!(record.read(Identity::here()).progress(now()), None);
        record.claim(Identity::here());
        let read = || record.read(Identity::here()).progress(now()).expect("told");
        let first = read();
        assert_eq!((first.step, first.phase, first.call), (None, Phase::Starting, None));
        assert_eq!((first.pid, first.process), (std::process::id(), Process::Running));
        record.set_step(120);
        record.set_phase(Phase::Computing);
        record.set_step_time(Duration::from_millis(250));
        record.enter(Call { collective: Collective::ReduceScatter, bucket: Some(7), step: Some(120) });
        std::thread::sleep(Duration::from_millis(20));
        let later = read();
        assert_eq!((later.step, later.phase, later.entered, later.left), (Some(120), Phase::Computing, 1, 0));
        assert_eq!(later.step_time, Some(Duration::from_millis(250)));
        let (call, time) = later.call.expect("in a call");
        assert_eq!((call.collective, call.bucket), (Collective::ReduceScatter, Some(7)));
        for time in [time, later.in_phase, later.unchanged] {
            assert!(time >= Duration::from_millis(19) && time < Duration::from_secs(5), "{time:?}");
        }
        record.leave();
        let left = read();
        assert_eq!((left.call, left.entered, left.left), (None, 1, 1));
        assert!(left.unchanged < time);
    }

    #[test]
    fn a_reading_survives_the_wire() {
        let record = Record::default();
        record.claim(Identity::here());
        record.enter(Collective::Barrier.into());
        let reading = record.read(Identity::here());
        let mut bytes = Vec::new();
        reading.encode(&mut bytes);
        assert_eq!(bytes.len(), Reading::BYTES);
        assert_eq!(Reading::decode(&bytes), Some(reading));
        assert_eq!(Reading::decode(&bytes[8..]), None);
        assert_eq!(Reading::decode(&[255; Reading::BYTES]), None);
    }

    #[test]
    fn every_collective_has_a_code() {
        for code in 1..=8 {
            assert_eq!(collective(code).map(collective_code), Some(code));
        }
        assert_eq!((collective(0), collective(9)), (None, None));
    }
}
