//! An object store in memory that remembers every change, and fails or waits on command.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};

use anello_store::Store;
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

/// What becomes of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Done,
    /// Nothing is written, and the caller is told so.
    DiskFull,
    /// It is written, and the caller is told that it is not: an answer that was lost.
    AnswerLost,
}

/// A change to the store: an object's new bytes, or that it is gone.
pub type Change = (String, Option<Bytes>);
type Rule = Box<dyn FnMut(&str) -> Fate + Send>;

/// See the module. Clones are the same store.
#[derive(Clone)]
pub struct TestStore {
    inner: Arc<InMemory>,
    journal: Arc<Mutex<Vec<Change>>>,
    rule: Arc<Mutex<Rule>>,
}

impl TestStore {
    pub fn new() -> Self {
        let rule: Rule = Box::new(|_| Fate::Done);
        Self { inner: Arc::default(), journal: Arc::default(), rule: Arc::new(Mutex::new(rule)) }
    }

    /// The store after `changes`: what a process that was killed then has left.
    pub fn after(changes: &[Change]) -> Self {
        let objects: BTreeMap<&str, &Option<Bytes>> =
            changes.iter().map(|(path, bytes)| (path.as_str(), bytes)).collect();
        let store = Self::new();
        for (path, bytes) in objects {
            if let Some(bytes) = bytes {
                store.run().put(path, bytes.clone()).unwrap();
            }
        }
        store
    }

    pub fn run(&self) -> Store {
        Store::new(Arc::new(self.clone()), "memory").unwrap()
    }

    /// The same objects behind another handle, with a rule of its own: another process.
    pub fn another(&self) -> Self {
        let rule: Rule = Box::new(|_| Fate::Done);
        Self { rule: Arc::new(Mutex::new(rule)), ..self.clone() }
    }

    /// Every change so far, in order.
    pub fn journal(&self) -> Vec<Change> {
        self.journal.lock().unwrap().clone()
    }

    /// Decides over writes from here on, by their path. It may block. One at a time.
    pub fn rule(&self, rule: impl FnMut(&str) -> Fate + Send + 'static) {
        *self.rule.lock().unwrap() = Box::new(rule);
    }

    /// All objects.
    pub fn objects(&self) -> BTreeMap<String, Bytes> {
        let run = self.run();
        let objects = run.list("").unwrap();
        objects.into_iter().map(|o| (o.path.clone(), run.get(&o.path).unwrap().unwrap())).collect()
    }
}

impl fmt::Display for TestStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("test store")
    }
}

impl fmt::Debug for TestStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TestStore")
    }
}

fn no_space() -> object_store::Error {
    object_store::Error::Generic { store: "test", source: "no space left on device".into() }
}

#[async_trait::async_trait]
impl ObjectStore for TestStore {
    async fn put_opts(&self, path: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let fate = {
            let mut rule = self.rule.lock().unwrap_or_else(|held| held.into_inner());
            rule(path.as_ref())
        };
        if fate == Fate::DiskFull {
            return Err(no_space());
        }
        let bytes = Bytes::from(payload.clone());
        let put = self.inner.put_opts(path, payload, options).await?;
        self.journal.lock().unwrap().push((path.to_string(), Some(bytes)));
        if fate == Fate::AnswerLost { Err(no_space()) } else { Ok(put) }
    }

    async fn put_multipart_opts(&self, _: &Path, _: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        unimplemented!("a run never uploads in parts")
    }

    async fn get_opts(&self, path: &Path, options: GetOptions) -> Result<GetResult> {
        self.inner.get_opts(path, options).await
    }

    fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let (inner, journal) = (self.inner.clone(), self.journal.clone());
        let deleted = paths.and_then(move |path| {
            let (inner, journal) = (inner.clone(), journal.clone());
            async move {
                inner.delete(&path).await?;
                journal.lock().unwrap().push((path.to_string(), None));
                Ok(path)
            }
        });
        deleted.boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> Result<()> {
        unimplemented!("a run never copies")
    }
}
