//! Writing an object, in parts that travel while the next is made.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use object_store::multipart::PartId;
use object_store::path::Path as Key;
use object_store::{MultipartId, ObjectStoreExt, PutPayload, Result};
use tokio::task::JoinHandle;

use super::error::ObjectError;
use super::{MANIFEST, Place, SET_ASIDE, UPLOAD};
use crate::checkpoint::storage::Sink;

/// Bytes of a part. With those in flight a sink holds 80 MiB at most.
pub(super) const PART: usize = 16 << 20;

/// Parts that travel at the same time, besides the one that is filled.
const IN_FLIGHT: usize = 4;

/// What S3 takes of one object; of this size, 156 GiB.
const MAX_PARTS: usize = 10_000;

/// How long an upload that was given up may take to be taken back.
const ABORT: Duration = Duration::from_secs(5);

/// An object that is being written. It is not there until it is finished.
pub(super) struct ObjectSink {
    place: Arc<Place>,
    key: Key,
    /// Names the upload in an object, so that a later start can take back what this process may leave.
    mark: Key,
    /// Keys of what an older checkpoint of the same step is found by.
    old: Vec<Key>,
    buffer: Vec<u8>,
    upload: Option<Upload>,
}

struct Upload {
    id: MultipartId,
    travelling: VecDeque<JoinHandle<Result<PartId>>>,
    arrived: Vec<PartId>,
}

impl ObjectSink {
    pub(super) fn new(place: Arc<Place>, step: u64, file: &str) -> Self {
        let (key, mark) = (place.key(step, file), place.key(step, &format!("{file}{UPLOAD}")));
        let old = vec![place.key(step, MANIFEST), place.key(step, SET_ASIDE)];
        Self { place, key, mark, old, buffer: Vec::new(), upload: None }
    }

    /// Sends the buffer on its way as a part.
    fn send(&mut self) -> io::Result<()> {
        let Self { place, key, .. } = &*self;
        let (store, runtime) = (place.backend()?.clone(), super::connect::runtime()?);
        if self.upload.is_none() {
            let id = place.wait(key, async |store| store.create_multipart(key).await)?;
            // From here on, dropping takes it back.
            let upload = Upload { id: id.clone(), travelling: VecDeque::new(), arrived: Vec::new() };
            self.upload = Some(upload);
            let mark = &self.mark;
            self.place.wait(mark, async |store| store.put(mark, PutPayload::from(id)).await)?;
        }
        let Self { place, key, buffer, upload: Some(upload), .. } = self else {
            unreachable!("begun above");
        };
        let number = upload.arrived.len() + upload.travelling.len();
        if number == MAX_PARTS {
            let most = (MAX_PARTS * PART) >> 30;
            return Err(ObjectError::settings(format!(
                "a shard can have {most} GiB at most: use more ranks"
            ))
            .into());
        }
        let part = PutPayload::from(std::mem::take(buffer));
        let (target, id) = (key.clone(), upload.id.clone());
        let sent = async move { store.put_part(&target, &id, number, part).await };
        upload.travelling.push_back(runtime.spawn(sent));
        upload.arrive(place, key, IN_FLIGHT)
    }
}

impl Upload {
    /// Waits until no more than so many parts travel.
    fn arrive(&mut self, place: &Place, key: &Key, most: usize) -> io::Result<()> {
        while self.travelling.len() > most
            && let Some(part) = self.travelling.pop_front()
        {
            self.arrived.push(place.wait(key, async |_| part.await?)?);
        }
        Ok(())
    }
}

impl Sink for ObjectSink {
    fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            if self.buffer.capacity() == 0 {
                // Small models have small shards.
                self.buffer.reserve_exact(if self.upload.is_some() { PART } else { bytes.len().min(PART) });
            }
            let (now, later) = bytes.split_at(bytes.len().min(PART - self.buffer.len()));
            self.buffer.extend_from_slice(now);
            bytes = later;
            // The last part stays for `finish`: one that is all there is needs no upload in parts.
            if self.buffer.len() == PART && !bytes.is_empty() {
                self.send()?;
            }
        }
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> io::Result<()> {
        let whole = self.upload.is_none();
        if !whole {
            self.send()?;
        }
        let Self { place, key, old, buffer, upload, .. } = &mut *self;
        if let Some(upload) = upload {
            upload.arrive(place, key, 0)?;
        }
        // Readers must not take the new file for one of an older checkpoint of the step, so that one ends here. It has
        // stood until now: had this save failed, it would stand still.
        place.delete(std::mem::take(old))?;
        match upload {
            None => {
                let all = PutPayload::from(std::mem::take(buffer));
                place.wait(key, async |store| store.put(key, all).await)?;
            }
            Some(upload) => {
                let parts = std::mem::take(&mut upload.arrived);
                place.wait(key, async |store| store.complete_multipart(key, &upload.id, parts).await)?;
            }
        }
        if self.upload.take().is_some() {
            // One that stays is cleared away when the checkpoint is complete.
            let _ = self.place.delete(vec![self.mark.clone()]);
        }
        Ok(())
    }
}

impl Drop for ObjectSink {
    fn drop(&mut self) {
        let Some(upload) = self.upload.take() else { return };
        upload.travelling.iter().for_each(JoinHandle::abort);
        // At best: what stays is named by the mark, and the next start clears it away.
        if let (Ok(store), Ok(runtime)) = (self.place.backend(), super::connect::runtime()) {
            let _ = runtime.block_on(async {
                tokio::time::timeout(ABORT, async {
                    store.abort_multipart(&self.key, &upload.id).await?;
                    store.delete(&self.mark).await
                })
                .await
            });
        }
    }
}
