//! Reading an object.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use futures_util::stream::{self, StreamExt, TryStreamExt};
use object_store::path::Path as Key;
use object_store::{GetOptions, GetRange, ObjectStore, ObjectStoreExt};

use super::Place;
use super::error::ObjectError;
use crate::checkpoint::storage::Source;

/// Bytes of one request: at a server's usual latency and 100 MB/s, most of the time goes into bytes.
const PART: usize = 8 << 20;

/// Requests of one read that go on at the same time.
const IN_FLIGHT: usize = 4;

/// An object that is read by ranges.
pub(super) struct ObjectSource {
    pub(super) place: Arc<Place>,
    pub(super) key: Key,
}

impl ObjectSource {
    /// Fills `out` with a range of the object.
    async fn fetch(&self, store: &dyn ObjectStore, range: Range<u64>, out: &mut [u8]) -> io::Result<()> {
        let failed = |error| self.place.explain(&error, &self.key);
        let options = GetOptions { range: Some(GetRange::Bounded(range)), ..GetOptions::default() };
        let mut chunks = store.get_opts(&self.key, options).await.map_err(failed)?.into_stream();
        let mut rest = out;
        while let Some(chunk) = chunks.try_next().await.map_err(failed)? {
            let (part, after) = rest.split_at_mut(chunk.len().min(rest.len()));
            part.copy_from_slice(&chunk[..part.len()]);
            rest = after;
        }
        if rest.is_empty() {
            return Ok(());
        }
        let error = ObjectError::data(format!("the object {} ends {} bytes before", self.key, rest.len()));
        Err(io::Error::new(io::ErrorKind::UnexpectedEof, error))
    }
}

impl Source for ObjectSource {
    fn size(&self) -> io::Result<u64> {
        self.place.wait(&self.key, async |store| store.head(&self.key).await).map(|meta| meta.size)
    }

    fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        let store = self.place.backend()?.as_ref();
        let parts = out.chunks_mut(PART).scan(offset, |next, part| {
            let begin = *next;
            *next += part.len() as u64;
            Some(self.fetch(store, begin..*next, part))
        });
        let all = stream::iter(parts).buffer_unordered(IN_FLIGHT).try_collect::<()>();
        super::connect::runtime()?.block_on(all)
    }

    fn worth(&self) -> usize {
        2 * PART
    }
}
