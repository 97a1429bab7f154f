//! What every place has to keep to, checked on all kinds of them.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use async_trait::async_trait;
use futures_util::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path as Key;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartId, MultipartUpload, ObjectMeta, ObjectStore,
    PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

use super::object::Backend;
use super::*;
use crate::checkpoint::tests::about;
use crate::checkpoint::{Array, Arrays, Checkpoints};
use crate::params::{Init, Layout};

/// A store in memory that counts reads, and may know no conditional writes or lose its answers.
#[derive(Debug)]
struct Memory {
    inner: InMemory,
    reads: AtomicUsize,
    heedless: AtomicBool,
    /// Writes of manifests do their work and fail.
    mute: AtomicBool,
}

impl Memory {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            inner: InMemory::new(),
            reads: AtomicUsize::new(0),
            heedless: AtomicBool::new(false),
            mute: AtomicBool::new(false),
        })
    }
}

impl std::fmt::Display for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("memory")
    }
}

#[async_trait]
impl ObjectStore for Memory {
    async fn put_opts(&self, to: &Key, payload: PutPayload, mut options: PutOptions) -> Result<PutResult> {
        if self.heedless.load(Ordering::Relaxed) {
            options.mode = PutMode::Overwrite;
        }
        let done = self.inner.put_opts(to, payload, options).await;
        if self.mute.load(Ordering::Relaxed) && to.filename() == Some("manifest.json") {
            return Err(object_store::Error::Generic { store: "memory", source: "no answer".into() });
        }
        done
    }

    async fn put_multipart_opts(
        &self,
        to: &Key,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(to, options).await
    }

    async fn get_opts(&self, from: &Key, options: GetOptions) -> Result<GetResult> {
        self.reads.fetch_add(usize::from(!options.head), Ordering::Relaxed);
        self.inner.get_opts(from, options).await
    }

    fn delete_stream(&self, keys: BoxStream<'static, Result<Key>>) -> BoxStream<'static, Result<Key>> {
        self.inner.delete_stream(keys)
    }

    fn list(&self, prefix: Option<&Key>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Key>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Key, to: &Key, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

#[async_trait]
impl MultipartStore for Memory {
    async fn create_multipart(&self, to: &Key) -> Result<MultipartId> {
        self.inner.create_multipart(to).await
    }

    async fn put_part(&self, to: &Key, id: &MultipartId, n: usize, data: PutPayload) -> Result<PartId> {
        self.inner.put_part(to, id, n, data).await
    }

    async fn complete_multipart(&self, to: &Key, id: &MultipartId, parts: Vec<PartId>) -> Result<PutResult> {
        self.inner.complete_multipart(to, id, parts).await
    }

    async fn abort_multipart(&self, to: &Key, id: &MultipartId) -> Result<()> {
        self.inner.abort_multipart(to, id).await
    }
}

fn object(memory: &Arc<Memory>) -> Arc<dyn Storage> {
    Arc::new(ObjectStorage::of(memory.clone() as Arc<dyn Backend>, "runs/one"))
}

/// Calls `check` for each kind of place, empty.
fn everywhere(check: impl Fn(&Arc<dyn Storage>)) {
    let folder = tempfile::tempdir().expect("a folder");
    check(&(Arc::new(Local::new(&folder.path().join("deep"))) as Arc<dyn Storage>));
    check(&object(&Memory::new()));
}

fn write(storage: &dyn Storage, step: u64, file: &str, bytes: &[u8]) {
    let mut sink = storage.create(step, file).expect("begun");
    for part in bytes.chunks(1 << 20) {
        sink.write(part).expect("written");
    }
    sink.finish().expect("durable");
}

const SHARDS: [&str; 2] = ["rank-0", "rank-1"];

fn save(storage: &dyn Storage, step: u64, salt: u8) {
    for file in SHARDS {
        write(storage, step, file, &[salt; 1000]);
    }
    storage
        .commit(step, &SHARDS, &[("manifest.xxh3", &[salt]), ("manifest.json", &[salt; 10])])
        .expect("committed");
}

fn steps(storage: &dyn Storage) -> Vec<u64> {
    storage.list().expect("listed").steps
}

#[test]
fn a_checkpoint_is_there_from_its_commit_on() {
    everywhere(|storage| {
        let storage = storage.as_ref();
        assert_eq!(storage.list().expect("listed"), Listed::default());
        write(storage, 7, "rank-0", b"learned");
        // Another rank's file that is being written.
        let mut other = storage.create(7, "rank-1").expect("begun");
        other.write(b"more").expect("written");
        let listed = storage.list().expect("listed");
        assert!(listed.steps.is_empty() && listed.unfinished.len() == 1, "{listed:?}");
        other.finish().expect("durable");
        let files: [(&str, &[u8]); 2] = [("manifest.xxh3", b"digest"), ("manifest.json", b"text")];
        storage.commit(7, &SHARDS, &files).expect("committed");
        assert_eq!(storage.list().expect("listed"), Listed { steps: vec![7], unfinished: vec![] });
        assert_eq!(read_small(storage, 7, "rank-0").expect("read"), b"learned");
        assert_eq!(read_small(storage, 7, "rank-1").expect("read"), b"more");
        assert_eq!(read_small(storage, 7, "manifest.json").expect("read"), b"text");
        assert!(storage.changed(&name(7)).is_some() && storage.changed(&name(8)).is_none());
        let missing = storage.open(7, "rank-2").and_then(|source| source.size()).expect_err("none");
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    });
}

#[test]
fn files_are_read_from_any_place_in_them() {
    // Three parts and a bit, and no part of it alike.
    let bytes: Vec<u8> = (0..(50u32 << 20)).map(|i| (i ^ (i >> 11) ^ (i >> 19)) as u8).collect();
    everywhere(|storage| {
        let storage = storage.as_ref();
        write(storage, 1, "rank-0", &bytes);
        storage.commit(1, &["rank-0"], &[("manifest.json", b"m")]).expect("committed");
        let source = storage.open(1, "rank-0").expect("open");
        assert_eq!(source.size().expect("its size"), bytes.len() as u64);
        let check = |range: Range<usize>| {
            let mut out = vec![0; range.len()];
            source.read_at(&mut out, range.start as u64).expect("read");
            assert!(out == bytes[range.clone()], "{range:?}");
        };
        [0..1, 0..bytes.len(), 8_388_607..8_388_610, 5..33_554_437, bytes.len() - 3..bytes.len(), 9..9]
            .into_iter()
            .for_each(check);
        let mut out = [0; 8];
        assert!(source.read_at(&mut out, bytes.len() as u64 - 4).is_err(), "past the end");
        assert!(source.read_at(&mut out, bytes.len() as u64 + 4).is_err(), "past the end");
    });
}

#[test]
fn what_was_cut_short_is_discarded() {
    everywhere(|storage| {
        let storage = storage.as_ref();
        save(storage, 1, 1);
        // Killed between a shard and the manifest.
        write(storage, 2, "rank-0", &[2; 100]);
        let listed = storage.list().expect("listed");
        assert_eq!((listed.steps, listed.unfinished.len()), (vec![1], 1));
        storage.discard(&listed.unfinished[0]).expect("discarded");
        storage.discard(&listed.unfinished[0]).expect("nothing is left to discard");
        assert_eq!(storage.list().expect("listed"), Listed { steps: vec![1], unfinished: vec![] });
    });
}

#[test]
fn a_step_that_is_saved_again_takes_the_older_ones_place() {
    everywhere(|storage| {
        let storage = storage.as_ref();
        write(storage, 4, "rank-0-of-another-world", &[0; 10]);
        save(storage, 4, 1);
        // Until a shard of the new one is durable, the old one stands.
        let mut sink = storage.create(4, "rank-0").expect("begun");
        sink.write(&[2; 1000]).expect("written");
        assert_eq!(read_small(storage, 4, "manifest.json").expect("read"), [1; 10]);
        drop(sink);
        save(storage, 4, 2);
        assert_eq!(storage.list().expect("listed"), Listed { steps: vec![4], unfinished: vec![] });
        assert_eq!(read_small(storage, 4, "manifest.json").expect("read"), [2; 10]);
        assert_eq!(read_small(storage, 4, "rank-1").expect("read"), [2; 1000]);
        // Nothing is left of it to be taken for a part of the new one.
        save(storage, 4, 3);
        storage
            .commit(4, &SHARDS, &[("manifest.json", &[4; 10])])
            .expect_err("no shards, or another's manifest");
    });
}

#[test]
fn checkpoints_are_removed_and_set_aside() {
    everywhere(|storage| {
        let storage = storage.as_ref();
        (1..=4).for_each(|step| save(storage, step, step as u8));
        storage.remove(2).expect("removed");
        assert_eq!(steps(storage), [1, 3, 4]);
        assert!(storage.changed(&name(2)).is_none(), "its files are gone");
        let aside = storage.set_aside(3).expect("set aside");
        assert!(aside.starts_with(storage.path("")), "{}", aside.display());
        assert_eq!(storage.list().expect("listed"), Listed { steps: vec![1, 4], unfinished: vec![] });
        // The run comes to that step again.
        save(storage, 3, 9);
        assert_eq!(steps(storage), [1, 3, 4]);
        assert_eq!(read_small(storage, 3, "manifest.json").expect("read"), [9; 10]);
    });
}

#[test]
fn a_store_without_conditional_writes_is_refused() {
    let memory = Memory::new();
    memory.heedless.store(true, Ordering::Relaxed);
    let storage = object(&memory);
    write(storage.as_ref(), 1, "rank-0", b"x");
    let files: [(&str, &[u8]); 2] = [("manifest.xxh3", b"digest"), ("manifest.json", b"text")];
    let error = storage.commit(1, &["rank-0"], &files).expect_err("refused").to_string();
    assert!(error.contains("If-None-Match") && error.contains("checkpoint.dir"), "{error}");
    assert!(steps(storage.as_ref()).is_empty());
}

#[test]
fn another_runs_manifest_is_not_written_over_and_a_lost_answer_is_no_failure() {
    let memory = Memory::new();
    let (mine, other) = (object(&memory), object(&memory));
    write(mine.as_ref(), 1, "rank-0", b"x");
    save(other.as_ref(), 1, 5);
    let error = mine.commit(1, &["rank-0"], &[("manifest.json", b"mine")]).expect_err("taken").to_string();
    assert!(error.contains("another run"), "{error}");
    assert_eq!(read_small(mine.as_ref(), 1, "manifest.json").expect("read"), [5; 10]);
    memory.mute.store(true, Ordering::Relaxed);
    save(mine.as_ref(), 2, 6);
    assert_eq!(steps(mine.as_ref()), [1, 2]);
}

/// As after a kill: the upload is on the server, and nothing but its mark tells of it.
#[test]
fn parts_of_an_upload_that_was_cut_short_are_taken_back() {
    let memory = Memory::new();
    let storage = object(&memory);
    let mut sink = storage.create(3, "rank-0").expect("begun");
    for _ in 0..40 {
        sink.write(&[1; 1 << 20]).expect("written");
    }
    let mark = Key::from("runs/one/step-00000003/rank-0.upload");
    let read = |key: &Key| read_small(storage.as_ref(), 3, key.filename().expect("a name"));
    let id = String::from_utf8(read(&mark).expect("a mark")).expect("a number");
    std::mem::forget(sink);
    assert_eq!(storage.list().expect("listed").unfinished, [name(3)]);
    storage.discard(&name(3)).expect("discarded");
    assert_eq!(storage.list().expect("listed"), Listed::default());
    let shard = Key::from("runs/one/step-00000003/rank-0");
    let abort = memory.inner.complete_multipart(&shard, &id, Vec::new());
    futures_util::FutureExt::now_or_never(abort).expect("at once").expect_err("the upload is gone");
    // One that is given up takes itself back.
    let mut sink = storage.create(4, "rank-0").expect("begun");
    for _ in 0..40 {
        sink.write(&[1; 1 << 20]).expect("written");
    }
    drop(sink);
    assert_eq!(storage.list().expect("listed"), Listed::default());
}

/// A model of many tensors: reading it takes few requests, whatever the worlds that wrote and read it.
#[test]
fn reading_many_tensors_takes_few_requests() {
    let mut layout = Layout::default();
    for block in 0..200 {
        layout.add(format!("{block}.weight"), &[160, 160], Init::Zeros);
        layout.add(format!("{block}.bias"), &[160], Init::Zeros);
    }
    let len = layout.trainable_len();
    let values: Vec<Vec<f32>> = (0..4).map(|a| (0..len).map(|i| (a * len + i) as f32).collect()).collect();
    let [model, ema, exp_avg, exp_avg_sq] = [&values[0][..], &values[1], &values[2], &values[3]];
    let arrays = Arrays { model, ema, exp_avg, exp_avg_sq };
    let memory = Memory::new();
    let checkpoints = Checkpoints::of(object(&memory));
    let write =
        |rank| checkpoints.write_shard(5, &layout, &arrays.parts(rank, 4), &[], (rank, 4)).expect("written");
    checkpoints.commit(&layout, about(5), (0..4).map(write).collect()).expect("committed");
    let checkpoint = checkpoints.latest().expect("good").checkpoint.expect("one");
    memory.reads.store(0, Ordering::Relaxed);
    for (array, values) in Array::ALL.into_iter().zip(&values) {
        assert!(checkpoint.read(&layout, array).expect("read")[..] == values[..], "{array:?}");
    }
    let requests = memory.reads.swap(0, Ordering::Relaxed);
    assert!(requests <= 4 * 4 * 2, "{requests} requests for {} tensors", 4 * layout.entries().len());
    // A sharded optimizer's part: a piece of every bucket.
    let ranges: Vec<Range<usize>> =
        (0..len).step_by(40_000).map(|begin| begin..(begin + 9_000).min(len)).collect();
    let read = checkpoint.read_ranges(&layout, Array::Ema, &ranges).expect("read");
    let expected: Vec<f32> = ranges.into_iter().flat_map(|range| ema[range].to_vec()).collect();
    assert!(read[..] == expected[..]);
    let requests = memory.reads.load(Ordering::Relaxed);
    assert!(requests <= 4 * 2, "{requests} requests for pieces");
}
