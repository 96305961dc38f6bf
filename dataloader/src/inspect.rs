use std::collections::BTreeMap;

use anello_store::Fetched;
use anello_store::foreign::decoded;
use parquet::file::serialized_reader::SerializedFileReader;
use tokenizers::Tokenizer;

use crate::dataset::Dataset;
use crate::index::ShardEntry;
use crate::progress::{Meter, OnProgress, parallel};
use crate::text::{StringsError, read_strings};
use crate::{Error, Result};

/// What a token set holds, read from all of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Inspection {
    /// Files.
    pub shards: u64,
    /// Bytes of all files.
    pub bytes: u64,
    /// Row groups with documents.
    pub row_groups: u64,
    /// Documents.
    pub rows: u64,
    /// Tokens.
    pub tokens: u64,
    /// Tokens that are training targets, where a `loss_mask` or `labels` tells.
    pub counted: u64,
    /// Largest token id.
    pub max_id: u32,
    /// Documents with so many tokens: entry b counts lengths in `2^(b-1) .. 2^b`, entry 0 the empty ones.
    pub lengths: Vec<u64>,
    /// Shortest, mean and longest document, tokens.
    pub length_min: u64,
    /// See `length_min`.
    pub length_mean: f64,
    /// See `length_min`.
    pub length_max: u64,
    /// Rows by the value of the `source` column, where there is one.
    pub rows_by_source: BTreeMap<String, u64>,
    /// Some documents.
    pub samples: Vec<Sample>,
}

/// The beginning of a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Shard and row group it is in.
    pub place: String,
    /// Row in the row group.
    pub row: usize,
    /// Tokens of the whole document.
    pub length: usize,
    /// Its first ids.
    pub ids: Vec<i32>,
    /// The text of those, if a tokenizer was given.
    pub text: Option<String>,
}

/// Reads every row group. `samples` documents, spread over the set, come with their first `sample_tokens` tokens.
/// Progress counts row groups. Errors: anything that cannot be read (see [`crate::verify()`] to go on past it).
pub fn inspect(
    dataset: &Dataset,
    tokenizer: Option<&Tokenizer>,
    samples: u64,
    sample_tokens: usize,
    threads: usize,
    progress: OnProgress<'_>,
) -> Result<Inspection> {
    let groups = dataset.row_groups();
    let meter = Meter::new(groups, progress);
    // The first document of row groups at equal distances.
    let sampled = |at: u64| (0..samples.min(groups)).any(|s| s * groups / samples.min(groups) == at);
    let parts = parallel(threads, groups as usize, |at| {
        let (at, (path, group)) = (at as u64, dataset.place(at as u64));
        let documents = dataset.read(at, None)?;
        let mut part = Inspection { length_min: u64::MAX, ..Inspection::default() };
        for document in documents.iter() {
            part.count(document.tokens.len() as u64);
            part.counted += match document.counted {
                Some(counted) => counted.iter().filter(|c| **c != 0).count() as u64,
                None => document.tokens.len() as u64,
            };
        }
        part.max_id = documents.tokens().iter().copied().max().unwrap_or(0) as u32;
        if sampled(at) {
            let document = documents.at(0);
            let ids: Vec<i32> = document.tokens.iter().take(sample_tokens).copied().collect();
            let wide: Vec<u32> = ids.iter().map(|id| *id as u32).collect();
            let text = tokenizer.map(|t| t.decode(&wide, false)).transpose().map_err(|e| {
                Error::tool(dataset.store().place_of(path), format!("ids cannot be decoded: {e}"))
            })?;
            let place = format!("{path}, row group {group}");
            part.samples.push(Sample { place, row: 0, length: document.tokens.len(), ids, text });
        }
        meter.add(1, part.tokens)?;
        Ok(part)
    })?;

    let index = dataset.index();
    let mut all = Inspection {
        shards: index.shards.len() as u64,
        bytes: index.shards.iter().map(|s| s.bytes).sum(),
        row_groups: groups,
        length_min: u64::MAX,
        ..Inspection::default()
    };
    parts.into_iter().for_each(|part| all.add(part));
    all.length_mean = all.tokens as f64 / all.rows.max(1) as f64;
    for shard in &index.shards {
        count_sources(dataset, shard, &mut all.rows_by_source)?;
    }
    Ok(all)
}

impl Inspection {
    fn count(&mut self, length: u64) {
        let bucket = (64 - length.leading_zeros()) as usize;
        if self.lengths.len() <= bucket {
            self.lengths.resize(bucket + 1, 0);
        }
        self.lengths[bucket] += 1;
        self.rows += 1;
        self.tokens += length;
        self.length_min = self.length_min.min(length);
        self.length_max = self.length_max.max(length);
    }

    fn add(&mut self, part: Self) {
        self.rows += part.rows;
        self.tokens += part.tokens;
        self.counted += part.counted;
        self.max_id = self.max_id.max(part.max_id);
        self.length_min = self.length_min.min(part.length_min);
        self.length_max = self.length_max.max(part.length_max);
        if self.lengths.len() < part.lengths.len() {
            self.lengths.resize(part.lengths.len(), 0);
        }
        part.lengths.iter().zip(&mut self.lengths).for_each(|(more, all)| *all += more);
        self.samples.extend(part.samples);
    }
}

fn count_sources(dataset: &Dataset, shard: &ShardEntry, rows: &mut BTreeMap<String, u64>) -> Result<()> {
    let &ShardEntry { ref path, bytes, .. } = shard;
    let fault = |detail: String| Error::Shard { file: dataset.store().place_of(path), detail };
    let bytes = match dataset.store().get_sized(path, |size| size == bytes)? {
        Fetched::Bytes(bytes) => bytes,
        Fetched::Absent => return Err(fault("is gone; restore the file".to_owned())),
        Fetched::Other(size) => {
            return Err(fault(format!(
                "has {size} bytes, where the index tells of {bytes}; restore the file"
            )));
        }
    };
    let reader = decoded(|| SerializedFileReader::new(bytes)).map_err(fault)?;
    let schema = parquet::file::reader::FileReader::metadata(&reader).file_metadata().schema_descr_ptr();
    if !(0..schema.num_columns()).any(|i| schema.column(i).path().parts() == ["source"]) {
        return Ok(());
    }
    for group in 0..parquet::file::reader::FileReader::metadata(&reader).num_row_groups() {
        let mut count = |_: usize, source: Option<&str>| {
            *rows.entry(source.unwrap_or("(null)").to_owned()).or_default() += 1;
            Ok(())
        };
        read_strings(&reader, group, "source", &mut count).map_err(|e| match e {
            StringsError::Parquet(detail) => fault(detail),
            StringsError::Ours(e) => e,
        })?;
    }
    Ok(())
}
