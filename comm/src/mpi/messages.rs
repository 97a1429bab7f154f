//! Collectives by point-to-point messages: any ranks, on any nodes.

use super::raw::{self, Request, check};
use crate::CommError;
use crate::communicator::ReduceOp;
use crate::reduce::{Element, Phases, Pieces, fold};
use crate::waiter::Waiter;
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

/// Staging buffers of one exchange. Users' slices are never given to MPI, so that a missed deadline leaves no
/// operation behind that would still write into them.
#[derive(Default)]
struct Lane {
    send: Vec<u64>,
    receive: Vec<u64>,
    /// Operations that have been started on the buffers, and perhaps not ended.
    requests: Vec<Request>,
}

impl Lane {
    fn reserve(&mut self, send: usize, receive: usize) {
        self.send.resize(send.div_ceil(8).max(self.send.len()), 0);
        self.receive.resize(receive.div_ceil(8).max(self.receive.len()), 0);
    }

    fn sending(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(&mut self.send)
    }

    fn received(&self) -> &[u8] {
        bytemuck::cast_slice(&self.receive)
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        // SAFETY: a constant of the library.
        let null = unsafe { ffi::RSMPI_REQUEST_NULL };
        if self.requests.iter().any(|request| request.handle != null) {
            // Unfinished operations may still read and write these.
            std::mem::forget(std::mem::take(&mut self.send));
            std::mem::forget(std::mem::take(&mut self.receive));
        }
    }
}

/// The communicator and its buffers. The steps of a long vector are a pipeline: while the sums of one step go
/// out, the next step's inputs are already on their way. So inputs and results have two lanes each, by turns.
pub(super) struct Messages {
    comm: ffi::MPI_Comm,
    rank: usize,
    size: usize,
    /// Numbers of the ranks in the job, for messages.
    members: Vec<usize>,
    chunk_bytes: usize,
    inputs: [Lane; 2],
    results: [Lane; 2],
}

impl Messages {
    /// `comm` must be a communicator that nothing else uses, with errors returned. This rank is number `rank` of it;
    /// `members` are its ranks' numbers in the job.
    pub(super) fn new(comm: ffi::MPI_Comm, rank: usize, members: Vec<usize>, chunk_bytes: usize) -> Self {
        let size = members.len();
        let (inputs, results) = Default::default();
        Self { comm, rank, size, members, chunk_bytes, inputs, results }
    }

    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let (rank, size) = (self.rank, self.size);
        // Starting at the next rank spreads the load over the receivers.
        (1..size).map(move |step| (rank + step) % size)
    }

    /// Starts to send parts of the lane's buffer and to receive into parts of its other one, all at the same
    /// time. The receiving ranges must not overlap, and nothing else may go on in the lane. Messages between two
    /// ranks arrive in the order in which they were started.
    fn start(
        comm: ffi::MPI_Comm,
        lane: &mut Lane,
        sends: &[Transfer],
        receives: &[Transfer],
        waiter: &Waiter,
    ) -> Result<(), CommError> {
        debug_assert!(lane.requests.is_empty(), "the lane is in use");
        let receiving: &mut [u8] = bytemuck::cast_slice_mut(&mut lane.receive);
        for transfer in receives {
            for piece in cut(&transfer.bytes) {
                let bytes = &mut receiving[piece];
                // SAFETY: a static of the library serves as the first value; MPI_Irecv overwrites it.
                let mut handle = unsafe { ffi::RSMPI_REQUEST_NULL };
                // SAFETY: the bytes are exclusively ours, not touched by Rust until the request is complete, and
                // leaked by `Lane::drop` if it never is; the count fits (LONGEST_MESSAGE).
                let code = unsafe {
                    ffi::MPI_Irecv(
                        bytes.as_mut_ptr().cast(),
                        bytes.len() as c_int,
                        ffi::RSMPI_UINT8_T,
                        transfer.peer as c_int,
                        TAG,
                        comm,
                        &mut handle,
                    )
                };
                lane.requests.push(Request { handle, peer: transfer.peer });
                check(code, waiter.call, waiter.rank, waiter.size)?;
            }
        }
        let sending: &[u8] = bytemuck::cast_slice(&lane.send);
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
                        comm,
                        &mut handle,
                    )
                };
                lane.requests.push(Request { handle, peer: transfer.peer });
                check(code, waiter.call, waiter.rank, waiter.size)?;
            }
        }
        Ok(())
    }

    /// Waits for what was started in a lane.
    fn end(lane: &mut Lane, members: &[usize], waiter: &mut Waiter) -> Result<(), CommError> {
        raw::complete(&mut lane.requests, members, waiter)?;
        lane.requests.clear();
        Ok(())
    }

    /// One exchange in the first lane of inputs.
    fn exchange(
        &mut self,
        sends: &[Transfer],
        receives: &[Transfer],
        waiter: &mut Waiter,
    ) -> Result<(), CommError> {
        let lane = &mut self.inputs[0];
        Self::start(self.comm, lane, sends, receives, waiter)?;
        Self::end(lane, &self.members, waiter)
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
        let others: Vec<usize> = self.others().collect();
        let slot = pieces.piece * size_of::<T>();
        let all = slot * self.size;
        for lane in self.inputs.iter_mut().chain(&mut self.results) {
            lane.reserve(all, all);
        }
        let plan = Step { others: &others, pieces: &pieces, slot, rank: self.rank, size: self.size };
        let comm = self.comm;
        if phases.reduces() {
            plan.start_inputs(comm, &mut self.inputs[0], data, 0, waiter)?;
        }
        for step in 0..pieces.steps {
            let (now, next) = (step % 2, (step + 1) % 2);
            let mine = pieces.of(self.rank, step);
            if phases.reduces() {
                Self::end(&mut self.inputs[now], &self.members, waiter)?;
                if step + 1 < pieces.steps {
                    plan.start_inputs(comm, &mut self.inputs[next], data, step + 1, waiter)?;
                }
                let received = self.inputs[now].received();
                let other =
                    |peer: usize| bytemuck::cast_slice::<u8, T>(&received[plan.at::<T>(peer, mine.len())]);
                fold(op, self.rank, self.size, &mut data[mine.clone()], other, |_, _| ());
            }
            if phases.gathers() {
                plan.start_results(comm, &mut self.results[now], data, step, waiter)?;
                if step > 0 {
                    Self::end(&mut self.results[next], &self.members, waiter)?;
                    plan.take_results(&self.results[next], data, step - 1);
                }
            }
        }
        if phases.gathers() {
            let last = pieces.steps - 1;
            Self::end(&mut self.results[last % 2], &self.members, waiter)?;
            plan.take_results(&self.results[last % 2], data, last);
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
        self.inputs[0].reserve(bytes, slot * self.size);
        self.inputs[0].sending()[..bytes].copy_from_slice(bytemuck::cast_slice(data));
        let at = |peer: usize| peer * slot..peer * slot + bytes;
        let sends: Vec<_> = self.others().map(|peer| Transfer { peer, bytes: 0..bytes }).collect();
        let receives: Vec<_> = self.others().map(|peer| Transfer { peer, bytes: at(peer) }).collect();
        self.exchange(&sends, &receives, waiter)?;
        let received = self.inputs[0].received();
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
        self.inputs[0].reserve(mine.len(), total);
        self.inputs[0].sending()[..mine.len()].copy_from_slice(mine);
        let at = |peer: usize| starts[peer]..starts[peer] + lengths[peer] as usize;
        let sends: Vec<_> = self.others().map(|peer| Transfer { peer, bytes: 0..mine.len() }).collect();
        let receives: Vec<_> = self.others().map(|peer| Transfer { peer, bytes: at(peer) }).collect();
        self.exchange(&sends, &receives, waiter)?;
        let received = self.inputs[0].received();
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
            self.inputs[0].reserve(0, 8);
            self.exchange(&[], &[Transfer { peer: parent, bytes: 0..8 }], waiter)?;
            let length = self.inputs[0].receive[0] as usize;
            self.inputs[0].reserve(0, length);
            self.exchange(&[], &[Transfer { peer: parent, bytes: 0..length }], waiter)?;
            data.clear();
            data.extend_from_slice(&self.inputs[0].received()[..length]);
        }
        let to_children = |bytes: Range<usize>| -> Vec<Transfer> {
            children.iter().map(|&peer| Transfer { peer, bytes: bytes.clone() }).collect()
        };
        self.inputs[0].reserve(8.max(data.len()), 0);
        self.inputs[0].send[0] = data.len() as u64;
        self.exchange(&to_children(0..8), &[], waiter)?;
        self.inputs[0].sending()[..data.len()].copy_from_slice(data);
        self.exchange(&to_children(0..data.len()), &[], waiter)
    }
}

/// How the pieces of a vector travel in each step.
struct Step<'a> {
    others: &'a [usize],
    pieces: &'a Pieces,
    /// Bytes of a buffer that belong to one rank.
    slot: usize,
    rank: usize,
    size: usize,
}

impl Step<'_> {
    /// Where the buffer holds `elements` elements of a peer.
    fn at<T>(&self, peer: usize, elements: usize) -> Range<usize> {
        debug_assert!(peer < self.size);
        peer * self.slot..peer * self.slot + elements * size_of::<T>()
    }

    fn theirs<T>(&self, step: usize) -> Vec<Transfer> {
        let transfer =
            |&peer: &usize| Transfer { peer, bytes: self.at::<T>(peer, self.pieces.of(peer, step).len()) };
        self.others.iter().map(transfer).collect()
    }

    /// This rank's values of the others' pieces go to them, theirs of its own come.
    fn start_inputs<T: Element>(
        &self,
        comm: ffi::MPI_Comm,
        lane: &mut Lane,
        data: &[T],
        step: usize,
        waiter: &Waiter,
    ) -> Result<(), CommError> {
        for &peer in self.others {
            let values = &data[self.pieces.of(peer, step)];
            lane.sending()[self.at::<T>(peer, values.len())].copy_from_slice(bytemuck::cast_slice(values));
        }
        let mine = self.pieces.of(self.rank, step).len();
        let receives: Vec<_> =
            self.others.iter().map(|&peer| Transfer { peer, bytes: self.at::<T>(peer, mine) }).collect();
        Messages::start(comm, lane, &self.theirs::<T>(step), &receives, waiter)
    }

    /// This rank's sums go to the others, theirs come.
    fn start_results<T: Element>(
        &self,
        comm: ffi::MPI_Comm,
        lane: &mut Lane,
        data: &[T],
        step: usize,
        waiter: &Waiter,
    ) -> Result<(), CommError> {
        let values = &data[self.pieces.of(self.rank, step)];
        let place = self.at::<T>(self.rank, values.len());
        lane.sending()[place.clone()].copy_from_slice(bytemuck::cast_slice(values));
        let sends: Vec<_> = self.others.iter().map(|&peer| Transfer { peer, bytes: place.clone() }).collect();
        Messages::start(comm, lane, &sends, &self.theirs::<T>(step), waiter)
    }

    fn take_results<T: Element>(&self, lane: &Lane, data: &mut [T], step: usize) {
        for &peer in self.others {
            let theirs = self.pieces.of(peer, step);
            let bytes = &lane.received()[self.at::<T>(peer, theirs.len())];
            data[theirs].copy_from_slice(bytemuck::cast_slice(bytes));
        }
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
