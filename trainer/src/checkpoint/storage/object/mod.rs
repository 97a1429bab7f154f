//! A prefix of a bucket in S3, or in what speaks its language.
//!
//! Nothing can be renamed there, so a checkpoint grows where it will be, under `PREFIX/step-00050000/`, and is there
//! if its `manifest.json` is: shards come first, the manifest last, and of an older checkpoint it is the first to go.
//! The manifest is written on the condition that there is none, so that of two runs that save to the same place by
//! mistake one is told.
//!
//! A checkpoint that is set aside stays where it is, and only its manifest has another name (copying it could take as
//! long as saving it did): until a run saves that step again, renaming the manifest brings it back.
//!
//! Parts of uploads that were cut short are no objects, yet are paid for. Each upload has an object with its number
//! beside the shard while it goes on, by which a later start takes it back.

mod connect;
mod error;
mod sink;
mod source;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use futures_util::stream::{self, StreamExt, TryStreamExt};
use object_store::path::Path as Key;
use object_store::{Error, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutPayload, Result};

pub(crate) use connect::Backend;
use connect::Server;
pub use error::ObjectError;

use super::{Listed, Sink, Source, Storage, name, step_of};
use crate::checkpoint::manifest::MANIFEST;

/// Name of the manifest of a checkpoint that is set aside.
const SET_ASIDE: &str = "manifest.json.set-aside";

/// End of the name of an object that holds the number of an upload that goes on.
const UPLOAD: &str = ".upload";

/// Steps that are looked at, at the same time.
const LOOK: usize = 8;

const SCHEME: &str = "s3://";

/// Checkpoints under one prefix of a bucket.
#[derive(Debug, Clone)]
pub struct ObjectStorage {
    place: Arc<Place>,
}

#[derive(Debug)]
struct Place {
    /// As messages call it, without a slash at its end.
    url: String,
    prefix: Key,
    server: Server,
    /// Or why there can be none.
    backend: std::result::Result<Arc<dyn Backend>, ObjectError>,
    /// Whether the server is known to keep to the conditions of a write.
    conditional: AtomicBool,
}

/// The part of an object store's URL after its scheme; None for a path.
fn after_scheme(location: &Path) -> Option<&str> {
    location.to_str()?.strip_prefix(SCHEME)
}

/// Whether a location is an object store's URL, and no path.
#[must_use]
pub fn is_url(location: &Path) -> bool {
    after_scheme(location).is_some()
}

/// Checks the form of a location that may be a URL.
///
/// # Errors
/// Says what is wrong with the URL.
pub fn check_url(location: &Path) -> std::result::Result<(), String> {
    if location.starts_with("s3:") && !is_url(location) {
        return Err("it must be s3://BUCKET/PREFIX".into());
    }
    after_scheme(location).map_or(Ok(()), |rest| connect::parse(rest).map(drop))
}

impl ObjectStorage {
    /// What a URL `s3://BUCKET/PREFIX` names, reached as the `AWS_*` variables of the environment say; None for a
    /// path. What is wrong with either, the first use tells.
    #[must_use]
    pub fn at(location: &Path) -> Option<Self> {
        let rest = after_scheme(location)?;
        let url = format!("{SCHEME}{}", rest.trim_end_matches('/'));
        let place = match connect::parse(rest) {
            Ok((bucket, prefix)) => {
                let (server, backend) = connect::connect(&bucket);
                Place { url, prefix, server, backend, conditional: AtomicBool::new(false) }
            }
            Err(problem) => {
                let server =
                    Server { bucket: rest.into(), endpoint: String::new(), instance_credentials: false };
                let backend = Err(ObjectError::settings(problem));
                Place { url, prefix: Key::default(), server, backend, conditional: AtomicBool::new(false) }
            }
        };
        Some(Self { place: Arc::new(place) })
    }

    /// In any store.
    #[cfg(test)]
    pub(crate) fn of(backend: Arc<dyn Backend>, prefix: &str) -> Self {
        let server = Server { bucket: "test".into(), endpoint: "memory".into(), instance_credentials: false };
        let (prefix, url) = (Key::from(prefix), format!("{SCHEME}test/{prefix}"));
        let place = Place { url, prefix, server, backend: Ok(backend), conditional: AtomicBool::new(false) };
        Self { place: Arc::new(place) }
    }
}

impl Place {
    fn backend(&self) -> io::Result<&Arc<dyn Backend>> {
        self.backend.as_ref().map_err(|error| error.clone().into())
    }

    fn folder(&self, name: &str) -> Key {
        self.prefix.clone().join(name)
    }

    fn key(&self, step: u64, file: &str) -> Key {
        self.folder(&name(step)).join(file)
    }

    fn explain(&self, error: &Error, key: &Key) -> io::Error {
        error::explain(error, &self.server, key.as_ref())
    }

    /// Waits for what is to be done with an object.
    fn wait<T>(&self, key: &Key, request: impl AsyncFnOnce(&Arc<dyn Backend>) -> Result<T>) -> io::Result<T> {
        let backend = self.backend()?;
        connect::runtime()?.block_on(request(backend)).map_err(|error| self.explain(&error, key))
    }

    /// What lies directly in a step's folder.
    fn objects(&self, name: &str) -> io::Result<Vec<ObjectMeta>> {
        let folder = self.folder(name);
        self.wait(&folder, async |store| look(store.as_ref(), &folder).await)
    }

    fn put(&self, key: &Key, bytes: &[u8], mode: PutMode) -> Result<(), PutError> {
        let payload = PutPayload::from(bytes.to_vec());
        let backend = self.backend().map_err(PutError::Failed)?;
        let runtime = connect::runtime().map_err(|error| PutError::Failed(error.into()))?;
        match runtime.block_on(backend.put_opts(key, payload, mode.into())) {
            Ok(_) => Ok(()),
            Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) => Err(PutError::Taken),
            Err(error) => Err(PutError::Failed(self.explain(&error, key))),
        }
    }

    fn get(&self, key: &Key) -> io::Result<Vec<u8>> {
        self.wait(key, async |store| store.get(key).await?.bytes().await).map(|bytes| bytes.to_vec())
    }

    /// Deletes objects; one that is gone already is as good.
    fn delete(&self, keys: Vec<Key>) -> io::Result<()> {
        let Some(first) = keys.first().cloned() else { return Ok(()) };
        self.wait(&first, async |store| {
            let gone = store.delete_stream(stream::iter(keys).map(Ok).boxed());
            gone.map(|one| match one {
                Ok(_) | Err(Error::NotFound { .. }) => Ok(()),
                Err(error) => Err(error),
            })
            .try_collect::<()>()
            .await
        })
    }

    /// Deletes objects of a step's folder, and what has come of the uploads that they name.
    fn clear(&self, folder: &str, keys: Vec<Key>) -> io::Result<()> {
        for mark in &keys {
            let Some(shard) = mark.filename().and_then(|file| file.strip_suffix(UPLOAD)) else { continue };
            let key = self.folder(folder).join(shard);
            let id = String::from_utf8_lossy(&self.get(mark)?).into_owned();
            match self.wait(&key, async |store| store.abort_multipart(&key, &id).await) {
                // Done with, or given up, already.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                done => done?,
            }
        }
        self.delete(keys)
    }

    /// Makes sure that the server refuses to write what is there on the condition that it is not: one that knows no
    /// conditions would write over another run's checkpoint without a word. `key` has just been written.
    fn check_conditions(&self, key: &Key, bytes: &[u8]) -> io::Result<()> {
        if self.conditional.load(Ordering::Relaxed) {
            return Ok(());
        }
        let advice = "checkpoints need them to be whole or absent. Use a server that has them (AWS S3 does), or save \
                      to a file system with checkpoint.dir=PATH";
        match self.put(key, bytes, PutMode::Create) {
            Err(PutError::Taken) => {
                self.conditional.store(true, Ordering::Relaxed);
                Ok(())
            }
            Ok(()) => Err(ObjectError::settings(format!(
                "{} pays no heed to conditional writes (If-None-Match): {advice}",
                self.server.endpoint
            ))
            .into()),
            Err(PutError::Failed(error)) => match ObjectError::of(&error) {
                Some(refused) if refused.kind == crate::exit::Kind::Usage => {
                    Err(ObjectError::settings(format!(
                        "{} refuses conditional writes (If-None-Match; {refused}): {advice}",
                        self.server.endpoint
                    ))
                    .into())
                }
                _ => Err(error),
            },
        }
    }
}

/// Why a small object was not written.
enum PutError {
    /// There is one.
    Taken,
    Failed(io::Error),
}

/// What lies directly in a folder.
async fn look(store: &dyn Backend, folder: &Key) -> Result<Vec<ObjectMeta>> {
    let mut objects = store.list_with_delimiter(Some(folder)).await?.objects;
    // Some servers and consoles make objects for folders themselves.
    objects.retain(|object| object.location != *folder);
    Ok(objects)
}

/// Whether a folder has an object.
fn has(objects: &[ObjectMeta], file: &str) -> bool {
    objects.iter().any(|object| object.location.filename() == Some(file))
}

impl Storage for ObjectStorage {
    fn path(&self, part: &str) -> PathBuf {
        PathBuf::from(&self.place.url).join(part)
    }

    fn folder(&self) -> Option<&Path> {
        None
    }

    fn list(&self) -> io::Result<Listed> {
        let place = &self.place;
        let all = place.wait(&place.prefix, async |store| {
            let folders = store.list_with_delimiter(Some(&place.prefix)).await?.common_prefixes;
            let steps = folders.into_iter().filter(|f| f.filename().is_some_and(|n| step_of(n).is_some()));
            let look = async |folder: Key| look(store.as_ref(), &folder).await.map(|found| (folder, found));
            stream::iter(steps).map(look).buffered(LOOK).try_collect::<Vec<_>>().await
        })?;
        let mut listed = Listed::default();
        for (folder, objects) in all {
            let name = folder.filename().unwrap_or_default();
            match step_of(name) {
                Some(step) if has(&objects, MANIFEST) => listed.steps.push(step),
                // Some servers show folders that have lost their last object, for a while.
                Some(_) if !objects.is_empty() && !has(&objects, SET_ASIDE) => {
                    listed.unfinished.push(name.to_owned())
                }
                _ => {}
            }
        }
        listed.steps.sort_unstable();
        listed.unfinished.sort();
        Ok(listed)
    }

    fn create(&self, step: u64, file: &str) -> io::Result<Box<dyn Sink>> {
        self.place.backend()?;
        Ok(Box::new(sink::ObjectSink::new(self.place.clone(), step, file)))
    }

    fn commit(&self, step: u64, shards: &[&str], files: &[(&str, &[u8])]) -> io::Result<()> {
        let place = &self.place;
        let Some(((manifest, bytes), others)) = files.split_last() else { return Ok(()) };
        for (file, bytes) in others {
            let key = place.key(step, file);
            match place.put(&key, bytes, PutMode::Overwrite) {
                Ok(()) => place.check_conditions(&key, bytes)?,
                Err(PutError::Failed(error)) => return Err(error),
                Err(PutError::Taken) => unreachable!("without a condition"),
            }
        }
        let key = place.key(step, manifest);
        if let Err(problem) = place.put(&key, bytes, PutMode::Create) {
            // The answer may have been lost on its way, and the request have done its work.
            let there = place.get(&key).is_ok_and(|there| there == *bytes);
            match problem {
                _ if there => {}
                PutError::Failed(error) => return Err(error),
                PutError::Taken => {
                    let problem = "another run has saved the same step to the same place meanwhile: give each run \
                                   a checkpoint.dir of its own";
                    return Err(ObjectError::settings(problem).into());
                }
            }
        }
        // Of an older checkpoint of the step, or of a save that was cut short. The new one is good with them beside it.
        let known = |file: &str| shards.contains(&file) || files.iter().any(|(name, _)| *name == file);
        let cleared = place.objects(&name(step)).and_then(|objects| {
            let keys = objects.into_iter().map(|object| object.location);
            place.clear(&name(step), keys.filter(|key| !key.filename().is_some_and(known)).collect())
        });
        if let Err(error) = cleared {
            tracing::warn!("what is left of an older save of step {step} stays in {}: {error}", place.url);
        }
        Ok(())
    }

    fn open(&self, step: u64, file: &str) -> io::Result<Box<dyn Source>> {
        self.place.backend()?;
        Ok(Box::new(source::ObjectSource { place: self.place.clone(), key: self.place.key(step, file) }))
    }

    fn remove(&self, step: u64) -> io::Result<()> {
        // Out of the list first: a removal that is cut short must not leave half a checkpoint under a good name.
        self.place.delete(vec![self.place.key(step, MANIFEST)])?;
        let objects = self.place.objects(&name(step))?;
        self.place.delete(objects.into_iter().map(|object| object.location).collect())
    }

    fn discard(&self, unfinished: &str) -> io::Result<()> {
        let place = &self.place;
        let objects = place.objects(unfinished)?;
        if has(&objects, MANIFEST) {
            // Complete after all.
            return Ok(());
        }
        place.clear(unfinished, objects.into_iter().map(|object| object.location).collect())
    }

    fn set_aside(&self, step: u64) -> io::Result<PathBuf> {
        let place = &self.place;
        let (from, to) = (place.key(step, MANIFEST), place.key(step, SET_ASIDE));
        let manifest = place.get(&from)?;
        match place.put(&to, &manifest, PutMode::Overwrite) {
            Ok(()) => {}
            Err(PutError::Failed(error)) => return Err(error),
            Err(PutError::Taken) => unreachable!("without a condition"),
        }
        place.delete(vec![from])?;
        Ok(self.path(&name(step)).join(SET_ASIDE))
    }

    fn changed(&self, entry: &str) -> Option<SystemTime> {
        let objects = self.place.objects(entry).ok()?;
        let manifest = objects.iter().find(|object| object.location.filename() == Some(MANIFEST));
        let newest = objects.iter().max_by_key(|object| object.last_modified);
        manifest.or(newest).map(|object| object.last_modified.into())
    }
}
