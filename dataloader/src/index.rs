use std::collections::BTreeMap;
use std::ops::ControlFlow;

use anello_store::{Object, Store};
use serde::{Deserialize, Serialize};

use crate::dataset::{Footer, Shard};
use crate::progress::{Meter, OnProgress, parallel};
use crate::{Error, Result};

/// Name of the stored index, beside the shards.
pub const INDEX_FILE: &str = "index.json";

const VERSION: u32 = 1;

/// Documents, and tokens, that an index may tell of: past what any run can train on, and far from where sums end.
const MOST: u64 = 10_000_000_000_000_000;

/// What a folder of token shards holds: enough to say which document comes when without opening a shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Index {
    version: u32,
    /// BLAKE3 of the `tokenizer.json` that made the tokens, hex, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<String>,
    /// The shards, ordered by path.
    pub shards: Vec<ShardEntry>,
}

/// One Parquet file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardEntry {
    /// Path below the folder.
    pub path: String,
    /// Size, bytes.
    pub bytes: u64,
    /// Largest token id, where the file's statistics tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_id: Option<u64>,
    /// Its row groups in file order.
    pub row_groups: Vec<RowGroupEntry>,
}

/// One row group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowGroupEntry {
    /// Documents.
    pub rows: u64,
    /// Tokens, as the footer has them: an empty document counts as one.
    pub tokens: u64,
    /// BLAKE3 of the column chunks that the loader reads, one after the other; absent in an index built in memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blake3: Option<String>,
}

impl Index {
    /// Lists the folder and reads the footer of every shard; with `checksums`, all of its token columns too. Which tokenizer
    /// made them is taken from the index that is there.
    ///
    /// Progress counts shards. Errors: no shard, a shard whose footer or columns are not those of a token set.
    pub fn build(store: &Store, checksums: bool, threads: usize, progress: OnProgress<'_>) -> Result<Self> {
        let objects = shards_of(store.list("")?);
        if objects.is_empty() {
            return Err(Error::Index {
                url: store.place().to_owned(),
                detail:
                    "holds no .parquet file; check the address, or make shards with `anello data tokenize`"
                        .to_owned(),
            });
        }
        let meter = Meter::new(objects.len() as u64, progress);
        let shards = parallel(threads, objects.len(), |at| {
            let Object { path, bytes } = &objects[at];
            let from = Shard { store, cache: None, path };
            let footer = Footer::read(from, *bytes, "")?;
            let entry = footer.entry(from, *bytes, checksums)?;
            if let Some(what) = beyond_reason(entry.row_groups.iter()) {
                let detail = format!("its Parquet footer claims more than {MOST} {what}; restore the file");
                return Err(Error::Shard { file: store.place_of(path), detail });
            }
            meter.add(1, entry.row_groups.iter().map(|g| g.tokens).sum())?;
            Ok(entry)
        })?;
        let index = Self { version: VERSION, tokenizer: Self::tokenizer_of(store)?, shards };
        match beyond_reason(index.row_groups()) {
            None => Ok(index),
            Some(what) => Err(Error::Index {
                url: store.place().to_owned(),
                detail: format!("its shards claim more than {MOST} {what}; restore them"),
            }),
        }
    }

    /// The stored index of the folder if there is one and it is up to date, else one built in memory.
    ///
    /// Errors: an index that tells of other files or sizes than the folder holds.
    pub fn open(store: &Store) -> Result<Self> {
        match Self::load(store)? {
            Some(index) => Ok(index),
            None => Self::build(store, false, 8, &|_| ControlFlow::Continue(())),
        }
    }

    /// The stored index, checked against the folder's listing.
    pub fn load(store: &Store) -> Result<Option<Self>> {
        let Some(bytes) = store.get(INDEX_FILE)? else { return Ok(None) };
        let fault = |detail: String| Error::Index {
            url: store.place().to_owned(),
            detail: format!("{INDEX_FILE} {detail}; run `anello data index {}`", store.place()),
        };
        let index: Self =
            serde_json::from_slice(&bytes).map_err(|e| fault(format!("cannot be read ({e})")))?;
        if index.version != VERSION {
            return Err(fault(format!("has version {}, this build reads {VERSION}", index.version)));
        }
        if let Some(what) = beyond_reason(index.row_groups()) {
            return Err(fault(format!("claims more than {MOST} {what}")));
        }
        let listed: BTreeMap<_, _> =
            shards_of(store.list("")?).into_iter().map(|o| (o.path, o.bytes)).collect();
        let known: BTreeMap<_, _> = index.shards.iter().map(|s| (s.path.clone(), s.bytes)).collect();
        for (path, bytes) in &known {
            match listed.get(path) {
                None => return Err(fault(format!("tells of {path}, which is not there"))),
                Some(found) if found != bytes => {
                    return Err(fault(format!("says {path} has {bytes} bytes, it has {found}")));
                }
                Some(_) => {}
            }
        }
        if let Some(new) = listed.keys().find(|path| !known.contains_key(*path)) {
            return Err(fault(format!("does not know {new}")));
        }
        Ok(Some(index))
    }

    /// Which tokenizer made the tokens in `store`, by its stored index alone; `None` where that does not tell.
    pub fn tokenizer_of(store: &Store) -> Result<Option<String>> {
        #[derive(Deserialize)]
        struct Told {
            tokenizer: Option<String>,
        }
        let bytes = store.get(INDEX_FILE)?;
        Ok(bytes.and_then(|bytes| serde_json::from_slice::<Told>(&bytes).ok()?.tokenizer))
    }

    /// The same, made by the tokenizer whose file holds `json`.
    pub fn made_by(self, json: &[u8]) -> Self {
        Self { tokenizer: Some(tokenizer_digest(json)), ..self }
    }

    /// Writes it beside the shards.
    pub fn save(&self, store: &Store) -> Result<()> {
        let mut text = serde_json::to_vec_pretty(self).expect("an index is numbers and strings");
        text.push(b'\n');
        Ok(store.put(INDEX_FILE, text)?)
    }

    /// What tells the data apart from other data: BLAKE3 of what determines the order of documents (paths, sizes, rows and
    /// tokens), hex, and after a `+` that of what is in them, by the checksums of all row groups, where the index has them. So
    /// it covers the content when an index is made anew; compare two with [`anello_store::checkpoint::same_data`], since
    /// an index built in memory has no checksums.
    pub fn digest(&self) -> String {
        let order = self.order_digest();
        self.content_digest().map_or(order.clone(), |content| format!("{order}+{content}"))
    }

    /// BLAKE3 of the checksums of all row groups, in order; `None` when one has none.
    fn content_digest(&self) -> Option<String> {
        let mut hasher = blake3::Hasher::new();
        for group in self.row_groups() {
            let checksum = group.blake3.as_ref()?;
            hasher.update(&(checksum.len() as u64).to_le_bytes());
            hasher.update(checksum.as_bytes());
        }
        Some(hasher.finalize().to_hex().to_string())
    }

    fn order_digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for shard in &self.shards {
            hasher.update(&(shard.path.len() as u64).to_le_bytes());
            hasher.update(shard.path.as_bytes());
            hasher.update(&shard.bytes.to_le_bytes());
            hasher.update(&(shard.row_groups.len() as u64).to_le_bytes());
            for group in &shard.row_groups {
                hasher.update(&group.rows.to_le_bytes());
                hasher.update(&group.tokens.to_le_bytes());
            }
        }
        hasher.finalize().to_hex().to_string()
    }

    /// Documents in all shards.
    pub fn rows(&self) -> u64 {
        self.row_groups().map(|g| g.rows).sum()
    }

    /// Tokens in all shards.
    pub fn tokens(&self) -> u64 {
        self.row_groups().map(|g| g.tokens).sum()
    }

    /// Largest token id, if every shard's statistics tell.
    pub fn max_id(&self) -> Option<u64> {
        self.shards.iter().map(|s| s.max_id).collect::<Option<Vec<_>>>()?.into_iter().max()
    }

    /// All row groups, shard by shard.
    pub fn row_groups(&self) -> impl Iterator<Item = &RowGroupEntry> {
        self.shards.iter().flat_map(|shard| &shard.row_groups)
    }
}

/// What an index calls a tokenizer whose file holds `json`: BLAKE3, hex.
pub fn tokenizer_digest(json: &[u8]) -> String {
    blake3::hash(json).to_hex().to_string()
}

/// What these row groups have more of together than can be, if anything.
fn beyond_reason<'a>(groups: impl Iterator<Item = &'a RowGroupEntry>) -> Option<&'static str> {
    let (mut documents, mut tokens) = (0u64, 0u64);
    for group in groups {
        documents = documents.saturating_add(group.rows);
        tokens = tokens.saturating_add(group.tokens);
    }
    [("documents", documents), ("tokens", tokens)].into_iter().find(|(_, n)| *n > MOST).map(|(what, _)| what)
}

/// The token shards among a folder's objects: `*.parquet`, and no part of its path hidden by `.` or `_`.
fn shards_of(objects: Vec<Object>) -> Vec<Object> {
    let shown = |path: &str| path.split('/').all(|part| !part.starts_with(['.', '_']));
    objects.into_iter().filter(|o| o.path.ends_with(".parquet") && shown(&o.path)).collect()
}
