//! Collectives through shared memory, between ranks on one node.
//!
//! Each rank has a segment in an MPI shared-memory window: two counters, and two slots each for inputs and for
//! results. In step k a rank writes its values of the others' pieces into input slot k mod 2 and counts up; when all
//! have, it adds up its own piece in rank order, writes the sum into result slot k mod 2 and counts up; when all
//! have, it reads the others' sums. The next step's inputs are written before waiting, so that no rank stands still
//! for another that is a little behind.

use super::raw::check;
use crate::communicator::ReduceOp;
use crate::copy;
use crate::reduce::{Element, Phases, Pieces, fold};
use crate::waiter::Waiter;
use crate::{Collective, CommError};
use mpi::ffi;
use std::ffi::c_int;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

/// Offsets in a segment. The counters have cache lines (and prefetched neighbours) of their own.
const INPUT_READY: usize = 0;
const RESULT_READY: usize = 128;
const SIGNATURE: usize = 256;
const HEADER: usize = 512;
const ALIGNMENT: usize = 128;

/// This rank's view of all segments.
pub(super) struct SharedMemory {
    window: ffi::MPI_Win,
    /// Start of each rank's segment.
    segments: Vec<NonNull<u8>>,
    /// Numbers of the ranks in the job, for messages.
    members: Vec<usize>,
    rank: usize,
    size: usize,
    chunk_bytes: usize,
    /// Steps done since the start, over all calls.
    steps: u64,
}

/// Bytes of a chunk and of a segment, between so many ranks.
fn sizes(ranks: usize, chunk_bytes: usize) -> (usize, usize) {
    // A multiple of 64 for every element type and rank number.
    let chunk_bytes = chunk_bytes.next_multiple_of(4096).max(ranks * 128);
    // MPI promises no alignment. Mappings start at pages, so all ranks find the same next multiple of 128.
    (chunk_bytes, HEADER + 4 * chunk_bytes + ALIGNMENT)
}

/// Where MPI libraries lay shared memory on Linux.
const PLACE: &str = "/dev/shm";

impl SharedMemory {
    /// Whether this node has room for the segments of its ranks, as far as can be seen.
    pub(super) fn room(ranks: usize, chunk_bytes: usize) -> Result<(), CommError> {
        // A host without it has them somewhere else, on a disk.
        let Ok(system) = rustix::fs::statvfs(PLACE) else { return Ok(()) };
        let (_, bytes) = sizes(ranks, chunk_bytes);
        // OpenMPI asks for a twentieth more than it takes.
        let needed = (ranks * bytes) as u64 / 20 * 21;
        let free = system.f_bavail.saturating_mul(system.f_frsize);
        if free < needed {
            return Err(CommError::Start(format!(
                "{PLACE} has {} MiB free where {ranks} ranks take {} MiB: make it larger (docker run --shm-size)",
                free >> 20,
                needed.div_ceil(1 << 20)
            )));
        }
        Ok(())
    }

    /// Takes the memory of this rank's segment now: where others have it by the time it is needed, the first write
    /// there would end the process without a word.
    pub(super) fn reserve(&mut self) -> Result<(), CommError> {
        // SAFETY: the call only reads a constant of the system.
        let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
        let start = self.segments[self.rank].as_ptr();
        let length = HEADER + 4 * self.chunk_bytes;
        let before = start.addr() % page;
        let length = (before + length).next_multiple_of(page);
        // SAFETY: the pages of this rank's segment, which are mapped to be written; their contents stay.
        let code = unsafe { libc::madvise(start.sub(before).cast(), length, libc::MADV_POPULATE_WRITE) };
        if code == 0 {
            return Ok(());
        }
        match std::io::Error::last_os_error() {
            error if [Some(libc::EFAULT), Some(libc::ENOMEM)].contains(&error.raw_os_error()) => {
                Err(CommError::Start(format!("{PLACE} is full: {error}")))
            }
            // Kernels before 5.14 do not know the advice.
            _ => Ok(()),
        }
    }

    /// Makes the window: a collective over `comm`, whose ranks must be on one node. This rank is number `rank` of
    /// them; `members` are their numbers in the job.
    pub(super) fn new(
        comm: ffi::MPI_Comm,
        rank: usize,
        members: Vec<usize>,
        chunk_bytes: usize,
    ) -> Result<Self, CommError> {
        let size = members.len();
        let (chunk_bytes, bytes) = sizes(size, chunk_bytes);
        let mut base: *mut u8 = std::ptr::null_mut();
        // SAFETY: a constant of the library, overwritten by the call below.
        let mut window: ffi::MPI_Win = unsafe { std::mem::zeroed() };
        // SAFETY: `base` and `window` outlive the call, which writes an address and a handle to them.
        let code = unsafe {
            ffi::MPI_Win_allocate_shared(
                bytes as ffi::MPI_Aint,
                1,
                ffi::RSMPI_INFO_NULL,
                comm,
                (&raw mut base).cast(),
                &mut window,
            )
        };
        check(code, Collective::Start.into(), rank, size)?;
        // SAFETY: the window is live; NOCHECK because no other kind of lock is ever taken on it.
        let code = unsafe { ffi::MPI_Win_lock_all(ffi::MPI_MODE_NOCHECK as c_int, window) };
        check(code, Collective::Start.into(), rank, size)?;
        let mut segments = Vec::with_capacity(size);
        for peer in 0..size {
            let mut length: ffi::MPI_Aint = 0;
            let mut unit: c_int = 0;
            let mut start: *mut u8 = std::ptr::null_mut();
            // SAFETY: the window is live and `peer` is one of its ranks.
            let code = unsafe {
                ffi::MPI_Win_shared_query(
                    window,
                    peer as c_int,
                    &mut length,
                    &mut unit,
                    (&raw mut start).cast(),
                )
            };
            check(code, Collective::Start.into(), rank, size)?;
            // SAFETY: the segment is ALIGNMENT bytes longer than what is used of it.
            let start = NonNull::new(start)
                .filter(|_| length as usize >= bytes)
                .map(|start| unsafe { start.add(start.align_offset(ALIGNMENT)) });
            segments.push(start.ok_or_else(|| {
                CommError::Start(format!(
                    "rank {peer}'s part of the shared memory has {length} bytes, not {bytes}"
                ))
            })?);
        }
        // The counters start at zero: the pages of a new window are zero, but MPI does not promise it. Each rank
        // clears its own before anybody waits on them (a barrier follows in the caller).
        let memory = Self { window, segments, members, rank, size, chunk_bytes, steps: 0 };
        for offset in [INPUT_READY, RESULT_READY, SIGNATURE] {
            memory.counter(rank, offset).store(0, Ordering::Release);
        }
        Ok(memory)
    }

    fn counter(&self, rank: usize, offset: usize) -> &AtomicU64 {
        // SAFETY: the header lies within the segment, is aligned to 64, is accessed atomically only, and lives until
        // `free`, which consumes self.
        unsafe { &*self.segments[rank].as_ptr().add(offset).cast::<AtomicU64>() }
    }

    fn slot_address(&self, rank: usize, step: u64, kind: usize, piece_bytes: usize, index: usize) -> *mut u8 {
        let slot = 2 * kind + (step % 2) as usize;
        let offset = HEADER + slot * self.chunk_bytes + index * piece_bytes;
        debug_assert!((index + 1) * piece_bytes <= self.chunk_bytes);
        // SAFETY: `Pieces` makes `size` pieces fit into chunk_bytes, and the segment holds four chunks.
        unsafe { self.segments[rank].as_ptr().add(offset) }
    }

    /// Where `from` puts its values of `to`'s piece.
    fn input(&self, from: usize, to: usize, step: u64, piece_bytes: usize) -> *mut u8 {
        self.slot_address(from, step, 0, piece_bytes, to)
    }

    /// Where `rank` puts the sums of its piece.
    fn result(&self, rank: usize, step: u64, piece_bytes: usize) -> *mut u8 {
        self.slot_address(rank, step, 1, piece_bytes, 0)
    }

    /// Waits until all ranks' counters have reached `target`.
    fn wait(&self, offset: usize, target: u64, waiter: &mut Waiter) -> Result<(), CommError> {
        let behind = |rank: &usize| self.counter(*rank, offset).load(Ordering::Acquire) < target;
        let mut next = 0;
        waiter.until(
            || {
                while next < self.size && !behind(&next) {
                    next += 1;
                }
                Ok(next == self.size)
            },
            || (0..self.size).filter(behind).map(|rank| self.members[rank]).collect(),
        )
    }

    /// All-reduce or one of its halves (see [`Phases`]), in place.
    pub(super) fn run<T: Element>(
        &mut self,
        data: &mut [T],
        op: ReduceOp,
        phases: Phases,
        waiter: &mut Waiter,
    ) -> Result<(), CommError> {
        let pieces = Pieces::new::<T>(data.len(), self.size, self.chunk_bytes);
        let width = pieces.piece * size_of::<T>();
        let (rank, size, base) = (self.rank, self.size, self.steps);
        let past = copy::pays(size_of_val(&data[pieces.of(0, 0)]));
        let others = || (1..size).map(move |step| (rank + step) % size);

        let put_inputs = |data: &[T], step: usize| {
            if phases.reduces() {
                for peer in others() {
                    let values = &data[pieces.of(peer, step)];
                    let slot = self.input(rank, peer, base + step as u64, width).cast::<T>();
                    // SAFETY: the slot holds a piece; only this rank writes it, and its readers of two steps ago are
                    // done (all results of the last step but one were waited for).
                    unsafe { copy::copy(values.as_ptr(), slot, values.len(), past) };
                }
            }
            self.counter(rank, INPUT_READY).store(base + step as u64 + 1, Ordering::Release);
        };
        let take_results = |data: &mut [T], step: usize| {
            if phases.gathers() {
                for peer in others() {
                    let values = &mut data[pieces.of(peer, step)];
                    let slot = self.result(peer, base + step as u64, width).cast::<T>();
                    // SAFETY: the peer has counted this result (waited for), and overwrites it only after this rank
                    // has counted its inputs of two steps on.
                    unsafe { std::ptr::copy_nonoverlapping(slot, values.as_mut_ptr(), values.len()) };
                }
            }
        };

        let kind = (waiter.call.collective as u64) << 8 | (op as u64) << 4 | T::CODE;
        let signature = (data.len() as u64) << 16 | kind;
        self.counter(rank, SIGNATURE).store(signature, Ordering::Relaxed);
        put_inputs(data, 0);
        for step in 0..pieces.steps {
            let now = base + step as u64;
            if step > 0 {
                self.wait(RESULT_READY, now, waiter)?;
                take_results(data, step - 1);
            }
            if step + 1 < pieces.steps {
                put_inputs(data, step + 1);
            }
            self.wait(INPUT_READY, now + 1, waiter)?;
            if step == 0 {
                // Written before the input counter, and kept until all have counted a result.
                let differs =
                    |peer: &usize| self.counter(*peer, SIGNATURE).load(Ordering::Relaxed) != signature;
                if let Some(other) = (0..size).find(differs) {
                    return Err(waiter.mismatch(self.members[other]));
                }
            }
            let mine: Range<usize> = pieces.of(rank, step);
            let result = self.result(rank, now, width).cast::<T>();
            let length = mine.len();
            let publish = |offset: usize, values: &[T]| {
                if phases.gathers() {
                    // SAFETY: within this rank's result slot; its readers of two steps ago have since counted
                    // inputs that were waited for.
                    unsafe { copy::copy(values.as_ptr(), result.add(offset), values.len(), past) };
                }
            };
            if phases.reduces() {
                let other = |peer: usize| {
                    let slot = self.input(peer, rank, now, width).cast::<T>();
                    // SAFETY: `length` initialised values, aligned (slots start at multiples of 64), not written
                    // while this rank has not counted its result.
                    unsafe { std::slice::from_raw_parts(slot.cast_const(), length) }
                };
                fold(op, rank, size, &mut data[mine], other, publish);
            } else {
                publish(0, &data[mine]);
            }
            self.counter(rank, RESULT_READY).store(now + 1, Ordering::Release);
        }
        self.wait(RESULT_READY, base + pieces.steps as u64, waiter)?;
        take_results(data, pieces.steps - 1);
        self.steps += pieces.steps as u64;
        Ok(())
    }

    /// Gives the window back: a collective.
    pub(super) fn free(mut self) {
        // SAFETY: the window is live and locked; nothing refers to it after this (self is consumed).
        unsafe {
            ffi::MPI_Win_unlock_all(self.window);
            ffi::MPI_Win_free(&mut self.window);
        }
    }
}
