//! Collectives by point-to-point messages: any ranks, on any nodes.

use super::raw::{self, Request, check};
use super::waiter::Waiter;
use crate::CommError;
use crate::communicator::ReduceOp;
use crate::reduce::{Element, Phases, Pieces, fold};
use mpi::ffi;
use std::ffi::c_int;
use std::ops::Range;

/// Longer messages are cut: MPI counts are 32-bit, and libraries do best well below that.
const LONGEST_MESSAGE: usize = 16 << 20;
/// Up to this many bytes for all ranks together, everybody sends everything to everybody: one exchange, not two.
const SMALL: usize = 64 << 10;
const TAG: c_int = 7;

/// A message to or from a peer: these bytes of the staging buffer.
pub(super) struct Transfer {
    peer: usize,
    bytes: Range<usize>,
}

/// Staging buffers and the communicator they are sent through. Users' slices are never given to MPI, so that a
/// missed deadline leaves no operation behind that would still write into them.
pub(super) struct Messages {
    comm: ffi::MPI_Comm,
    rank: usize,
    size: usize,
    chunk_bytes: usize,
    send: Vec<u64>,
    receive: Vec<u64>,
}

impl Messages {
    /// `comm` must be a communicator of `size` ranks that nothing else uses, with errors returned.
    pub(super) fn new(comm: ffi::MPI_Comm, rank: usize, size: usize, chunk_bytes: usize) -> Self {
        Self { comm, rank, size, chunk_bytes, send: Vec::new(), receive: Vec::new() }
    }

    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let (rank, size) = (self.rank, self.size);
        // Starting at the next rank spreads the load over the receivers.
        (1..size).map(move |step| (rank + step) % size)
    }

    fn reserve(&mut self, send: usize, receive: usize) {
        self.send.resize(send.div_ceil(8).max(self.send.len()), 0);
        self.receive.resize(receive.div_ceil(8).max(self.receive.len()), 0);
    }

    /// Sends parts of `self.send` and receives into parts of `self.receive`, all at the same time. The receiving
    /// ranges must not overlap.
    fn exchange(
        &mut self,
        sends: &[Transfer],
        receives: &[Transfer],
        waiter: &mut Waiter,
    ) -> Result<(), CommError> {
        let result = self.try_exchange(sends, receives, waiter);
        if result.is_err() {
            // Unfinished operations may still read and write these.
            std::mem::forget(std::mem::take(&mut self.send));
            std::mem::forget(std::mem::take(&mut self.receive));
        }
        result
    }

    fn try_exchange(
        &mut self,
        sends: &[Transfer],
        receives: &[Transfer],
        waiter: &mut Waiter,
    ) -> Result<(), CommError> {
        let mut requests = Vec::with_capacity(sends.len() + receives.len());
        let receiving: &mut [u8] = bytemuck::cast_slice_mut(&mut self.receive);
        for transfer in receives {
            for piece in cut(&transfer.bytes) {
                let bytes = &mut receiving[piece];
                // SAFETY: a static of the library serves as the first value; MPI_Irecv overwrites it.
                let mut handle = unsafe { ffi::RSMPI_REQUEST_NULL };
                // SAFETY: the bytes are exclusively ours, not touched by Rust until the request is complete, and
                // leaked by `exchange` if it never is; the count fits (LONGEST_MESSAGE).
                let code = unsafe {
                    ffi::MPI_Irecv(
                        bytes.as_mut_ptr().cast(),
                        bytes.len() as c_int,
                        ffi::RSMPI_UINT8_T,
                        transfer.peer as c_int,
                        TAG,
                        self.comm,
                        &mut handle,
                    )
                };
                requests.push(Request { handle, peer: transfer.peer });
                check(code, waiter.collective, self.rank, self.size)?;
            }
        }
        let sending: &[u8] = bytemuck::cast_slice(&self.send);
        for transfer in sends {
            for piece in cut(&transfer.bytes) {
                let bytes = &sending[piece];
                // SAFETY: as above.
                let mut handle = unsafe { ffi::RSMPI_REQUEST_NULL };
                // SAFETY: the bytes are not written until the request is complete, else leaked as above.
                let code = unsafe {
                    ffi::MPI_Isend(
                        bytes.as_ptr().cast(),
                        bytes.len() as c_int,
                        ffi::RSMPI_UINT8_T,
                        transfer.peer as c_int,
                        TAG,
                        self.comm,
                        &mut handle,
                    )
                };
                requests.push(Request { handle, peer: transfer.peer });
                check(code, waiter.collective, self.rank, self.size)?;
            }
        }
        raw::complete(&mut requests, waiter)
    }

    /// All-reduce or one of its halves (see [`Phases`]), in place.
    pub(super) fn run<T: Element>(
        &mut self,
        data: &mut [T],
        op: ReduceOp,
        phases: Phases,
        waiter: &mut Waiter,
    ) -> Result<(), CommError> {
        if phases == Phases::ReduceAndGather && size_of_val(data) * self.size <= SMALL {
            return self.run_small(data, op, waiter);
        }
        let pieces = Pieces::new::<T>(data.len(), self.size, self.chunk_bytes);
        let width = size_of::<T>();
        let slot = pieces.piece * width;
        self.reserve(slot * self.size, slot * self.size);
        let (rank, size) = (self.rank, self.size);
        let at = |peer: usize, elements: usize| peer * slot..peer * slot + elements * width;
        let others: Vec<usize> = self.others().collect();
        for step in 0..pieces.steps {
            let mine = pieces.of(rank, step);
            if phases.reduces() {
                let send: &mut [u8] = bytemuck::cast_slice_mut(&mut self.send);
                for &peer in &others {
                    let theirs = pieces.of(peer, step);
                    send[at(peer, theirs.len())].copy_from_slice(bytemuck::cast_slice(&data[theirs]));
                }
                let sends: Vec<_> = others
                    .iter()
                    .map(|&peer| Transfer { peer, bytes: at(peer, pieces.of(peer, step).len()) })
                    .collect();
                let receives: Vec<_> =
                    others.iter().map(|&peer| Transfer { peer, bytes: at(peer, mine.len()) }).collect();
                self.exchange(&sends, &receives, waiter)?;
                let received: &[u8] = bytemuck::cast_slice(&self.receive);
                let other = |peer: usize| bytemuck::cast_slice::<u8, T>(&received[at(peer, mine.len())]);
                fold(op, rank, size, &mut data[mine.clone()], other, |_, _| ());
            }
            if phases.gathers() {
                let send: &mut [u8] = bytemuck::cast_slice_mut(&mut self.send);
                send[at(rank, mine.len())].copy_from_slice(bytemuck::cast_slice(&data[mine.clone()]));
                let sends: Vec<_> =
                    others.iter().map(|&peer| Transfer { peer, bytes: at(rank, mine.len()) }).collect();
                let receives: Vec<_> = others
                    .iter()
                    .map(|&peer| Transfer { peer, bytes: at(peer, pieces.of(peer, step).len()) })
                    .collect();
                self.exchange(&sends, &receives, waiter)?;
                let received: &[u8] = bytemuck::cast_slice(&self.receive);
                for &peer in &others {
                    let theirs = pieces.of(peer, step);
                    let bytes = &received[at(peer, theirs.len())];
                    data[theirs].copy_from_slice(bytemuck::cast_slice(bytes));
                }
            }
        }
        Ok(())
    }

    fn run_small<T: Element>(
        &mut self,
        data: &mut [T],
        op: ReduceOp,
        waiter: &mut Waiter,
    ) -> Result<(), CommError> {
        let bytes = size_of_val(data);
        let slot = bytes.next_multiple_of(8);
        self.reserve(bytes, slot * self.size);
        let send: &mut [u8] = bytemuck::cast_slice_mut(&mut self.send);
        send[..bytes].copy_from_slice(bytemuck::cast_slice(data));
        let at = |peer: usize| peer * slot..peer * slot + bytes;
        let sends: Vec<_> = self.others().map(|peer| Transfer { peer, bytes: 0..bytes }).collect();
        let receives: Vec<_> = self.others().map(|peer| Transfer { peer, bytes: at(peer) }).collect();
        self.exchange(&sends, &receives, waiter)?;
        let received: &[u8] = bytemuck::cast_slice(&self.receive);
        let other = |peer: usize| bytemuck::cast_slice::<u8, T>(&received[at(peer)]);
        fold(op, self.rank, self.size, data, other, |_, _| ());
        Ok(())
    }

    /// Every rank's bytes, by rank.
    pub(super) fn all_gather_bytes(
        &mut self,
        mine: &[u8],
        waiter: &mut Waiter,
    ) -> Result<Vec<Vec<u8>>, CommError> {
        let mut lengths = vec![0i64; self.size];
        lengths[self.rank] = mine.len() as i64;
        self.run_small(&mut lengths, ReduceOp::Max, waiter)?;
        let mut starts = Vec::with_capacity(self.size);
        let mut total = 0;
        for &length in &lengths {
            starts.push(total);
            total += length as usize;
        }
        self.reserve(mine.len(), total);
        let send: &mut [u8] = bytemuck::cast_slice_mut(&mut self.send);
        send[..mine.len()].copy_from_slice(mine);
        let at = |peer: usize| starts[peer]..starts[peer] + lengths[peer] as usize;
        let sends: Vec<_> = self.others().map(|peer| Transfer { peer, bytes: 0..mine.len() }).collect();
        let receives: Vec<_> = self.others().map(|peer| Transfer { peer, bytes: at(peer) }).collect();
        self.exchange(&sends, &receives, waiter)?;
        let received: &[u8] = bytemuck::cast_slice(&self.receive);
        let part = |peer| if peer == self.rank { mine.to_vec() } else { received[at(peer)].to_vec() };
        Ok((0..self.size).map(part).collect())
    }

    /// `root`'s bytes to all, along a binomial tree.
    pub(super) fn broadcast_bytes(
        &mut self,
        data: &mut Vec<u8>,
        root: usize,
        waiter: &mut Waiter,
    ) -> Result<(), CommError> {
        // Numbered from the root, a rank's parent is itself without its lowest bit.
        let place = (self.rank + self.size - root) % self.size;
        let rank_of = |place: usize| (place + root) % self.size;
        let lowest = if place == 0 { self.size.next_power_of_two() } else { place & place.wrapping_neg() };
        let children: Vec<usize> = std::iter::successors(Some(lowest >> 1), |bit| Some(bit >> 1))
            .take_while(|&bit| bit > 0)
            .map(|bit| place + bit)
            .filter(|&child| child < self.size)
            .map(rank_of)
            .collect();
        let parent = (place != 0).then(|| rank_of(place - lowest));
        if let Some(parent) = parent {
            self.reserve(0, 8);
            self.exchange(&[], &[Transfer { peer: parent, bytes: 0..8 }], waiter)?;
            let length = self.receive[0] as usize;
            self.reserve(0, length);
            self.exchange(&[], &[Transfer { peer: parent, bytes: 0..length }], waiter)?;
            data.clear();
            data.extend_from_slice(&bytemuck::cast_slice::<u64, u8>(&self.receive)[..length]);
        }
        let to_children = |bytes: Range<usize>| -> Vec<Transfer> {
            children.iter().map(|&peer| Transfer { peer, bytes: bytes.clone() }).collect()
        };
        self.reserve(8.max(data.len()), 0);
        self.send[0] = data.len() as u64;
        self.exchange(&to_children(0..8), &[], waiter)?;
        bytemuck::cast_slice_mut::<u64, u8>(&mut self.send)[..data.len()].copy_from_slice(data);
        self.exchange(&to_children(0..data.len()), &[], waiter)
    }
}

/// The ranges of at most `LONGEST_MESSAGE` bytes that make up `bytes`; at least one, so that a message is sent for
/// nothing too and the ranks stay together.
fn cut(bytes: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
    let Range { start, end } = *bytes;
    let pieces = (end - start).div_ceil(LONGEST_MESSAGE).max(1);
    (0..pieces).map(move |piece| {
        let from = start + piece * LONGEST_MESSAGE;
        from..(from + LONGEST_MESSAGE).min(end)
    })
}
