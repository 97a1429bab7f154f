//! Collectives on host memory: through pinned buffers and device buffers, in steps that overlap.

use super::device::DeviceType;
use super::driver::{Event, Memory, Pinned, Stream};
use super::plan::{Part, Plan, Step};
use super::thread::{Engine, Manner};
use super::who::Who;
use crate::CommError;
use crate::reduce::Phases;
use crate::waiter::Waiter;
use cudarc::driver::result::DriverError;
use half::{bf16, f16};
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

/// Staging buffers: while one goes to the device and one comes back, NCCL works on the third.
const LANES: usize = 3;

/// Bytes of one. Long enough that NCCL and the bus are at their speed, short enough that a bucket takes several.
const LANE_BYTES: usize = 8 << 20;

/// How a value of the vector lies in the staging buffers, and travels.
pub(super) trait Carries<T>: bytemuck::Pod {
    const KIND: DeviceType;
    fn lay(from: &[T], to: &mut [Self]);
    fn take(from: &[Self], to: &mut [T]);
}

impl Carries<f32> for f32 {
    const KIND: DeviceType = DeviceType::F32;
    fn lay(from: &[f32], to: &mut [f32]) {
        to.copy_from_slice(from);
    }
    fn take(from: &[f32], to: &mut [f32]) {
        to.copy_from_slice(from);
    }
}

macro_rules! carries {
    ($wire:ty, $kind:expr, $value:ty, $lay:expr, $take:expr) => {
        impl Carries<$value> for $wire {
            const KIND: DeviceType = $kind;
            fn lay(from: &[$value], to: &mut [$wire]) {
                to.iter_mut().zip(from).for_each(|(to, &from)| *to = $lay(from));
            }
            fn take(from: &[$wire], to: &mut [$value]) {
                to.iter_mut().zip(from).for_each(|(to, &from)| *to = $take(from));
            }
        }
    };
}
carries!(bf16, DeviceType::Bf16, f32, bf16::from_f32, bf16::to_f32);
carries!(f32, DeviceType::F32, f16, f16::to_f32, f16::from_f32);
carries!(f32, DeviceType::F32, bf16, bf16::to_f32, bf16::from_f32);

/// A staging buffer on both sides, and how far its step has come.
struct Lane {
    host: Pinned,
    device: Memory,
    uploaded: Event,
    summed: Event,
    back: Arc<Event>,
}

impl Lane {
    fn new() -> Result<Self, DriverError> {
        let (uploaded, summed, back) = (Event::new()?, Event::new()?, Arc::new(Event::new()?));
        Ok(Self { host: Pinned::new(LANE_BYTES)?, device: Memory::new(LANE_BYTES)?, uploaded, summed, back })
    }
}

/// The buffers, and the streams of the copies.
pub(super) struct Staging {
    lanes: [Lane; LANES],
    upload: Stream,
    download: Stream,
}

impl Staging {
    /// On this thread's device.
    pub(super) fn new() -> Result<Self, DriverError> {
        let lanes = [Lane::new()?, Lane::new()?, Lane::new()?];
        Ok(Self { lanes, upload: Stream::new()?, download: Stream::new()? })
    }
}

impl Engine {
    /// A collective on a vector in host memory, whose values travel as `W`.
    pub(super) fn staged<T, W: Carries<T>>(
        &mut self,
        data: &mut [T],
        phases: Phases,
        manner: Manner,
    ) -> Result<(), CommError> {
        let (rank, size, bytes) = (self.topology.rank, self.topology.size, size_of_val(data));
        let started = Instant::now();
        let result = self.call(manner, |engine, waiter| {
            let plan = Plan::new::<W>(phases, data.len(), rank, size, LANE_BYTES);
            for number in 0..plan.steps() + LANES {
                // The lane's last step has to be out of it before the next goes in.
                if let Some(before) = number.checked_sub(LANES)
                    && before < plan.steps()
                {
                    engine.end_step::<T, W>(data, before, plan.step(before), waiter)?;
                }
                if number < plan.steps() {
                    engine.begin_step::<T, W>(data, phases, number, plan.step(number), waiter)?;
                }
            }
            Ok(())
        });
        self.count(started, bytes);
        result
    }

    /// Sends a step through its lane.
    fn begin_step<T, W: Carries<T>>(
        &mut self,
        data: &[T],
        phases: Phases,
        number: usize,
        step: Step,
        waiter: &mut Waiter,
    ) -> Result<(), CommError> {
        let who = Who::from(&*waiter);
        let bytes = |range: Range<usize>| range.start * size_of::<W>()..range.end * size_of::<W>();
        let Staging { lanes, upload, download } = &mut self.staging;
        let lane = &mut lanes[number % LANES];
        for Part { vector, at } in step.takes {
            W::lay(&data[vector.clone()], lane.host.values(at..at + vector.len()));
        }
        // SAFETY: the lane is not used again before the device has passed `back`, see `end_step`; after an error, never.
        who.cuda(unsafe { upload.upload(&lane.host, &lane.device, bytes(step.upload)) })?;
        who.cuda(lane.uploaded.record(upload))?;
        who.cuda(self.stream.wait(&lane.uploaded))?;
        // SAFETY: as above.
        unsafe { self.handle.even(phases, (lane.device.at(0), W::KIND, step.count), &self.stream, who) }?;
        // The stream has NCCL's part of the step only when NCCL says so.
        let handle = &self.handle;
        waiter.until(|| handle.settled(who), Vec::new)?;
        who.cuda(lane.summed.record(&self.stream))?;
        who.cuda(download.wait(&lane.summed))?;
        // SAFETY: as above.
        who.cuda(unsafe { download.download(&lane.device, &lane.host, bytes(step.download)) })?;
        who.cuda(lane.back.record(download))
    }

    /// Waits for a step to come back, and takes its result.
    fn end_step<T, W: Carries<T>>(
        &mut self,
        data: &mut [T],
        number: usize,
        step: Step,
        waiter: &mut Waiter,
    ) -> Result<(), CommError> {
        let back = Arc::clone(&self.staging.lanes[number % LANES].back);
        self.until_passed(&back, waiter)?;
        let host = &mut self.staging.lanes[number % LANES].host;
        for Part { vector, at } in step.gives {
            let len = vector.len();
            W::take(host.values(at..at + len), &mut data[vector]);
        }
        Ok(())
    }
}
