use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::local::LocalFileSystem;
use object_store::path::{Path, PathPart};
use object_store::{GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutPayload};
use tokio::runtime::Runtime;

use crate::{Error, Result};

/// A folder or bucket prefix, read and written from plain threads.
///
/// Every method blocks the calling thread; none may be called on a thread of an async runtime.
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<dyn ObjectStore>,
    prefix: Path,
    url: String,
    runtime: Arc<Runtime>,
}

/// An object below a [`Store`]'s prefix.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Object {
    /// Path below the prefix, `/` between its parts.
    pub path: String,
    /// Size, bytes.
    pub bytes: u64,
}

impl Store {
    /// The store at `url`: a path, `file:///…`, or any scheme that `object_store` serves in this build.
    pub fn open(url: &str) -> Result<Self> {
        let bad = |detail: String| Error::Url { url: url.to_owned(), detail };
        let (inner, prefix): (Arc<dyn ObjectStore>, Path) = match url.split_once("://") {
            None => local(PathBuf::from(url)).map_err(bad)?,
            Some(("file", _)) => {
                let parsed = url::Url::parse(url).map_err(|e| bad(e.to_string()))?;
                let path = parsed
                    .to_file_path()
                    .map_err(|()| bad("not an absolute path; write file:///folder".to_owned()))?;
                local(path).map_err(bad)?
            }
            Some((scheme, _)) => {
                let parsed = url::Url::parse(url).map_err(|e| bad(e.to_string()))?;
                // Credentials and endpoints, under the names that the clouds' own tools use.
                let environment = std::env::vars_os().filter_map(|(key, value)| {
                    Some((key.into_string().ok()?.to_ascii_lowercase(), value.into_string().ok()?))
                });
                let (store, path) = object_store::parse_url_opts(&parsed, environment).map_err(|e| {
                    bad(format!("this build cannot open {scheme}:// ({e}); build with `--features cloud`, or copy the folder and give its path"))
                })?;
                (Arc::from(store), path)
            }
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("anello-store")
            .enable_all()
            .build()
            .map_err(|e| bad(format!("cannot start its I/O thread: {e}")))?;
        Ok(Self { inner, prefix, url: url.trim_end_matches('/').to_owned(), runtime: Arc::new(runtime) })
    }

    /// The URL it was opened with.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// URL of the object at `path`, for messages.
    pub fn place(&self, path: &str) -> String {
        format!("{}/{path}", self.url)
    }

    /// Everything below the prefix, ordered by path.
    pub fn list(&self) -> Result<Vec<Object>> {
        let listing = self.inner.list(Some(&self.prefix)).try_collect::<Vec<_>>();
        let found = self.runtime.block_on(listing).map_err(|e| self.error("", e))?;
        let mut objects: Vec<Object> = found
            .into_iter()
            .filter_map(|meta| {
                let parts = meta.location.prefix_match(&self.prefix)?;
                let path = parts.map(|part| part.as_ref().to_owned()).collect::<Vec<_>>().join("/");
                (!path.is_empty()).then_some(Object { path, bytes: meta.size })
            })
            .collect();
        objects.sort();
        Ok(objects)
    }

    /// The object's bytes, or `None` where there is none.
    pub fn get(&self, path: &str) -> Result<Option<Bytes>> {
        let at = self.at(path);
        let read = async { self.inner.get(&at).await?.bytes().await };
        match self.runtime.block_on(read) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(self.error(path, e)),
        }
    }

    /// The last `length` bytes of the object, or all of it if it is shorter.
    pub fn tail(&self, path: &str, length: u64) -> Result<Bytes> {
        let at = self.at(path);
        let options = GetOptions { range: Some(GetRange::Suffix(length)), ..Default::default() };
        let read = async { self.inner.get_opts(&at, options).await?.bytes().await };
        self.runtime.block_on(read).map_err(|e| self.error(path, e))
    }

    /// The bytes of each range.
    pub fn ranges(&self, path: &str, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        let at = self.at(path);
        self.runtime.block_on(self.inner.get_ranges(&at, ranges)).map_err(|e| self.error(path, e))
    }

    /// Writes the object, whole or not at all.
    pub fn put(&self, path: &str, bytes: impl Into<Bytes>) -> Result<()> {
        let at = self.at(path);
        let payload = PutPayload::from(bytes.into());
        self.runtime.block_on(self.inner.put(&at, payload)).map_err(|e| self.error(path, e))?;
        Ok(())
    }

    fn at(&self, path: &str) -> Path {
        // What a listing gave is taken as it is; `join` on a string would encode a `%` in it once more.
        path.split('/').filter(|part| !part.is_empty()).fold(self.prefix.clone(), |at, part| {
            match PathPart::parse(part) {
                Ok(part) => at.join(part),
                Err(_) => at.join(part),
            }
        })
    }

    fn error(&self, path: &str, source: object_store::Error) -> Error {
        Error::Store { place: self.place(path), source }
    }
}

fn local(path: PathBuf) -> std::result::Result<(Arc<dyn ObjectStore>, Path), String> {
    let absolute = std::path::absolute(&path).map_err(|e| e.to_string())?;
    let prefix = Path::from_absolute_path(&absolute).map_err(|e| e.to_string())?;
    Ok((Arc::new(LocalFileSystem::new()), prefix))
}
