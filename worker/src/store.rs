//! The run folder: one object-store prefix that is the whole truth of a run.
//!
//! ```text
//! config.toml                              the resolved config, written once
//! environment.json                         where the run was started, written once
//! events/00000001.json …                   what happened, one numbered record each, created and never changed
//! metrics/0000000001-0000000050.parquet …  one row a step, for the steps in the name
//! checkpoints/0000001200/part-00000-00000001.safetensors …, manifest.json (last)
//! ```
//!
//! Calls block; they run on a small runtime of the store's own, so that any thread may call them.

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutPayload};
use tokio::runtime::Runtime;

use crate::error::{Error, Result};

/// A run's prefix in an object store.
#[derive(Clone)]
pub struct RunStore {
    store: Arc<dyn ObjectStore>,
    runtime: Arc<Runtime>,
    place: String,
    /// The folder, when that is where it is.
    folder: Option<PathBuf>,
}

impl std::fmt::Debug for RunStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("RunStore").field(&self.place).finish()
    }
}

impl RunStore {
    /// The run at `place`: a path or `file://` URL of a folder, made when missing.
    pub fn open(place: &str) -> Result<Self> {
        if let Some((scheme, _)) = place.split_once("://").filter(|(scheme, _)| *scheme != "file") {
            let fact = format!("runs cannot live in {scheme}:// yet");
            return Err(Error::config(fact, "give a path or a file:// URL"));
        }
        let path = PathBuf::from(place.strip_prefix("file://").unwrap_or(place));
        std::fs::create_dir_all(&path)
            .map_err(|source| Error::System { action: "making the run folder", source })?;
        let local = LocalFileSystem::new_with_prefix(&path).map_err(|source| Error::Store {
            action: "opening",
            what: place.to_owned(),
            source,
        })?;
        // Durable before visible: a manifest must not outlive the power cut that its parts did not.
        let local = local.with_fsync(true).with_automatic_cleanup(true);
        let store = Self::new(Arc::new(local), path.display().to_string())?;
        Ok(Self { folder: Some(path), ..store })
    }

    /// A run in memory, gone with the process.
    pub fn memory() -> Result<Self> {
        Self::new(Arc::new(InMemory::new()), "memory".to_owned())
    }

    /// A run at the root of any store; `place` is its name for people.
    pub fn new(store: Arc<dyn ObjectStore>, place: String) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("run-store")
            .enable_all()
            .build()
            .map_err(|source| Error::System { action: "starting the store's runtime", source })?;
        Ok(Self { store, runtime: Arc::new(runtime), place, folder: None })
    }

    /// Where it is, for people.
    pub fn place(&self) -> &str {
        &self.place
    }

    fn failed(&self, action: &'static str, path: &str, source: object_store::Error) -> Error {
        Error::Store { action, what: format!("{}/{path}", self.place), source }
    }

    /// The bytes of an object; `None` when it does not exist.
    pub fn get(&self, path: &str) -> Result<Option<Bytes>> {
        let got = self.runtime.block_on(async { self.store.get(&Path::from(path)).await?.bytes().await });
        match got {
            Ok(bytes) => Ok(Some(bytes)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(source) => Err(self.failed("reading", path, source)),
        }
    }

    /// Writes an object, over an old one if there is one.
    pub fn put(&self, path: &str, bytes: impl Into<Bytes>) -> Result<()> {
        let payload = PutPayload::from_bytes(bytes.into());
        let put = self.runtime.block_on(self.store.put(&Path::from(path), payload));
        put.map(|_| ()).map_err(|source| self.failed("writing", path, source))
    }

    /// Creates an object. `false`: it was there, and is as it was.
    pub fn create(&self, path: &str, bytes: impl Into<Bytes>) -> Result<bool> {
        let payload = PutPayload::from_bytes(bytes.into());
        let location = Path::from(path);
        let put = self.store.put_opts(&location, payload, PutMode::Create.into());
        match self.runtime.block_on(put) {
            Ok(_) => Ok(true),
            Err(object_store::Error::AlreadyExists { .. }) => Ok(false),
            Err(source) => Err(self.failed("creating", path, source)),
        }
    }

    /// Deletes an object; one that is not there is fine.
    pub fn delete(&self, path: &str) -> Result<()> {
        match self.runtime.block_on(self.store.delete(&Path::from(path))) {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(source) => Err(self.failed("deleting", path, source)),
        }
    }

    /// Removes what a killed process had not finished to write. In a folder an object is written as `NAME#N` and then
    /// renamed, so a kill can leave such a file, which no list shows; other stores leave nothing.
    pub fn sweep(&self) {
        let mut open: Vec<PathBuf> = self.folder.iter().cloned().collect();
        while let Some(folder) = open.pop() {
            for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
                let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
                if is_folder {
                    open.push(entry.path());
                } else if is_unfinished(&entry.file_name().to_string_lossy()) {
                    // One that has gone meanwhile is as good, and one that cannot be removed costs only its space.
                    // The folder goes with its last file, as when the store deletes.
                    let _ = std::fs::remove_file(entry.path()).and_then(|()| std::fs::remove_dir(&folder));
                }
            }
        }
    }

    /// Paths of all objects under `prefix`, sorted.
    pub fn list(&self, prefix: &str) -> Result<Vec<String>> {
        let prefix_path = Path::from(prefix);
        let listed = self.store.list(Some(&prefix_path)).map_ok(|meta| meta.location.to_string());
        let mut paths: Vec<String> = self
            .runtime
            .block_on(listed.try_collect())
            .map_err(|source| self.failed("listing", prefix, source))?;
        paths.sort_unstable();
        Ok(paths)
    }
}

fn is_unfinished(name: &str) -> bool {
    let number = name.rsplit_once('#').map(|(_, number)| number);
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}
