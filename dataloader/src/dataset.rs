use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use anello_store::Store;
use bytes::Bytes;
use parquet::errors::ParquetError;
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};

use crate::cache::{Cache, Wanted};
use crate::decode::{Columns, Documents, Fault, decode};
use crate::index::{Index, RowGroupEntry, ShardEntry};
use crate::{Error, Result};

/// Bytes from a file's end that nearly always hold its whole footer.
const FOOTER_BYTES: u64 = 64 << 10;

/// Footers kept in memory, about 100 KiB each.
const FOOTERS_MAX: usize = 512;

/// A source of tokens: a folder of shards and its index.
#[derive(Debug)]
pub struct Dataset {
    store: Store,
    cache: Option<Arc<Cache>>,
    index: Index,
    /// (shard, row group) of every row group that has rows.
    row_groups: Vec<(u32, u32)>,
    footers: Mutex<BTreeMap<u32, Arc<Footer>>>,
}

impl Dataset {
    /// Opens the folder at `url`; see [`Store::open`] and [`Index::open`].
    pub fn open(url: &str) -> Result<Self> {
        let store = Store::open(url)?;
        let index = Index::open(&store)?;
        Self::new(store, index)
    }

    /// A folder with an index that is known already.
    pub fn new(store: Store, index: Index) -> Result<Self> {
        let mut row_groups = Vec::new();
        for (shard, entry) in index.shards.iter().enumerate() {
            for (at, group) in entry.row_groups.iter().enumerate() {
                if group.rows > 0 {
                    row_groups.push((shard as u32, at as u32));
                }
            }
        }
        if row_groups.is_empty() {
            return Err(Error::Index {
                url: store.place().to_owned(),
                detail: "its shards hold no document; take the source out of the mixture".to_owned(),
            });
        }
        Ok(Self { store, cache: None, index, row_groups, footers: Mutex::default() })
    }

    /// The same, keeping in `cache` what is fetched over a network. A folder of this machine needs no copy in another.
    pub fn cached(self, cache: Option<Arc<Cache>>) -> Self {
        let cache = cache.filter(|_| self.store.folder().is_none());
        Self { cache, ..self }
    }

    /// What the folder holds.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// Where it is.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Row groups with documents.
    pub fn row_groups(&self) -> u64 {
        self.row_groups.len() as u64
    }

    /// (path of the shard, row group in it) of the `at`-th row group with documents.
    pub fn place(&self, at: u64) -> (&str, usize) {
        let (shard, group) = self.row_groups[at as usize];
        (&self.index.shards[shard as usize].path, group as usize)
    }

    /// Fetches, checks and decodes the `at`-th row group with documents. Ids must be below `vocab`, if given.
    pub fn read(&self, at: u64, vocab: Option<u32>) -> Result<Documents> {
        let (shard, group) = self.row_groups[at as usize];
        let entry = &self.index.shards[shard as usize];
        let footer = self.footer(shard, entry)?;
        let from = Shard { store: &self.store, cache: self.cache.as_deref(), path: &entry.path };
        footer.documents(from, group as usize, &entry.row_groups[group as usize], vocab)
    }

    fn footer(&self, shard: u32, entry: &ShardEntry) -> Result<Arc<Footer>> {
        let lock = || self.footers.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(footer) = lock().get(&shard) {
            return Ok(footer.clone());
        }
        let from = Shard { store: &self.store, cache: self.cache.as_deref(), path: &entry.path };
        let footer = Arc::new(Footer::read(from, entry.bytes, &version(entry))?);
        let mut footers = lock();
        if footers.len() >= FOOTERS_MAX {
            footers.clear();
        }
        footers.insert(shard, footer.clone());
        Ok(footer)
    }
}

/// What tells a shard apart from another at the same place.
fn version(entry: &ShardEntry) -> String {
    serde_json::to_string(entry).expect("an index is numbers and strings")
}

/// Where the bytes of a shard come from.
#[derive(Clone, Copy)]
pub(crate) struct Shard<'a> {
    pub store: &'a Store,
    pub cache: Option<&'a Cache>,
    pub path: &'a str,
}

impl Shard<'_> {
    fn place(&self) -> String {
        self.store.place_of(self.path)
    }

    /// The last `length` bytes of all `bytes` of them.
    fn tail(&self, bytes: u64, length: u64, version: &str) -> Result<Bytes> {
        let fetch = || Ok(Vec::from([self.store.tail(self.path, length)?]));
        let range = bytes - length..bytes;
        let ranges = std::slice::from_ref(&range);
        let wanted = Wanted { place: &self.place(), version, ranges, blake3: None };
        let mut tail = self.get(wanted, fetch)?;
        Ok(tail.pop().expect("one range was asked for"))
    }

    fn get(&self, wanted: Wanted<'_>, fetch: impl FnOnce() -> Result<Vec<Bytes>>) -> Result<Vec<Bytes>> {
        match self.cache {
            Some(cache) => cache.get(wanted, fetch),
            None => fetch(),
        }
    }
}

/// A shard's footer, and where in it the tokens are.
#[derive(Debug)]
pub(crate) struct Footer {
    metadata: ParquetMetaData,
    columns: Columns,
    version: String,
}

impl Footer {
    /// The footer of a shard of so many `bytes`; `version` tells it apart from another at the same place.
    pub(crate) fn read(from: Shard<'_>, bytes: u64, version: &str) -> Result<Self> {
        let fault = |detail: String| Error::Shard { file: from.place(), detail };
        let mut reader = ParquetMetaDataReader::new();
        let mut want = FOOTER_BYTES.min(bytes);
        loop {
            let tail = from.tail(bytes, want, version)?;
            match reader.try_parse_sized(&tail, bytes) {
                Ok(()) => break,
                Err(ParquetError::NeedMoreData(more)) if more as u64 > want => want = more as u64,
                Err(e) => {
                    return Err(fault(format!("its Parquet footer cannot be read ({e}); restore the file")));
                }
            }
        }
        let metadata = reader.finish().map_err(|e| fault(e.to_string()))?;
        let columns = Columns::find(metadata.file_metadata().schema_descr()).map_err(fault)?;
        Ok(Self { metadata, columns, version: version.to_owned() })
    }

    /// The shard's entry in an index, with a digest of each row group if `checksums`.
    pub(crate) fn entry(&self, from: Shard<'_>, bytes: u64, checksums: bool) -> Result<ShardEntry> {
        let row_groups = (0..self.metadata.num_row_groups())
            .map(|group| {
                Ok(RowGroupEntry {
                    rows: u64::try_from(self.metadata.row_group(group).num_rows()).unwrap_or(0),
                    tokens: self.columns.token_slots(&self.metadata, group),
                    blake3: if checksums { Some(digest(&self.fetch(from, group, None)?)) } else { None },
                })
            })
            .collect::<Result<_>>()?;
        Ok(ShardEntry {
            path: from.path.to_owned(),
            bytes,
            max_id: self.columns.max_id(&self.metadata),
            row_groups,
        })
    }

    /// Fetches the row group, compares it with what the index says of it, and decodes it.
    pub(crate) fn documents(
        &self,
        from: Shard<'_>,
        group: usize,
        entry: &RowGroupEntry,
        vocab: Option<u32>,
    ) -> Result<Documents> {
        if group >= self.metadata.num_row_groups() {
            return Err(self.fault(from, group, Fault::Corrupt("the footer does not list it".to_owned())));
        }
        let chunks = self.fetch(from, group, entry.blake3.as_deref())?;
        let checked = match &entry.blake3 {
            Some(expected) if *expected != digest(&chunks) => {
                Err(Fault::Corrupt("its checksum differs from the index's".to_owned()))
            }
            _ => decode(&self.columns, &self.metadata, group, &chunks),
        };
        let checked = checked.and_then(|documents| {
            if documents.len() as u64 != entry.rows {
                let (found, told) = (documents.len(), entry.rows);
                return Err(Fault::Corrupt(format!("it has {found} rows, the index says {told}")));
            }
            if documents.tokens().is_empty() {
                return Err(Fault::Corrupt("none of its documents has a token".to_owned()));
            }
            match vocab {
                Some(vocab) => documents.check_vocab(vocab).map(|()| documents),
                None => Ok(documents),
            }
        });
        checked.map_err(|fault| self.fault(from, group, fault))
    }

    fn fetch(&self, from: Shard<'_>, group: usize, blake3: Option<&str>) -> Result<Vec<Bytes>> {
        let ranges =
            self.columns.ranges(&self.metadata, group).map_err(|fault| self.fault(from, group, fault))?;
        let wanted = Wanted { place: &from.place(), version: &self.version, ranges: &ranges, blake3 };
        from.get(wanted, || Ok(from.store.ranges(from.path, &ranges)?))
    }

    fn fault(&self, from: Shard<'_>, row_group: usize, fault: Fault) -> Error {
        let file = from.place();
        match fault {
            Fault::Row(row, detail) => Error::Row { file, row_group, row, detail },
            Fault::Corrupt(detail) => {
                let ranges = (row_group < self.metadata.num_row_groups())
                    .then(|| self.columns.ranges(&self.metadata, row_group).ok())
                    .flatten();
                let offset = ranges.and_then(|ranges| ranges.first().map(|range| range.start)).unwrap_or(0);
                Error::Corrupt { file, row_group, offset, detail }
            }
        }
    }
}

fn digest(chunks: &[Bytes]) -> String {
    let mut hasher = blake3::Hasher::new();
    chunks.iter().for_each(|chunk| {
        hasher.update(chunk);
    });
    hasher.finalize().to_hex().to_string()
}
