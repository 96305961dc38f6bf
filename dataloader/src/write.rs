use std::sync::Arc;

use arrow::array::{ArrayRef, Int32Array, ListArray, RecordBatch, StringArray, UInt8Array};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, Schema};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::errors::ParquetError;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use serde::{Deserialize, Serialize};

/// How token shards are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardFormat {
    /// Aimed tokens of a row group: what a lane reads at once, and the window in which documents are shuffled. With
    /// fewer row groups than lanes, lanes are in different epochs.
    pub row_group_tokens: u64,
    /// zstd level, 1 to 22.
    pub zstd_level: i32,
}

impl Default for ShardFormat {
    fn default() -> Self {
        Self { row_group_tokens: 256 << 10, zstd_level: 3 }
    }
}

/// Writes one token shard into memory: `input_ids` as `list<int32 not null>`, and `loss_mask` and `source` if wanted.
pub struct ShardWriter {
    writer: ArrowWriter<Vec<u8>>,
    schema: Arc<Schema>,
    format: ShardFormat,
    ids: Vec<i32>,
    ends: Vec<i32>,
    mask: Option<Vec<u8>>,
    source: Option<String>,
    rows: u64,
    tokens: u64,
}

/// A shard in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shard {
    /// The Parquet file.
    pub bytes: Vec<u8>,
    /// Documents in it.
    pub rows: u64,
    /// Tokens in it.
    pub tokens: u64,
}

impl ShardWriter {
    /// A shard without documents. With `masked`, each document comes with a loss mask; `source` is written in each row.
    pub fn new(format: ShardFormat, masked: bool, source: Option<&str>) -> Result<Self, ParquetError> {
        let item = |data_type| Arc::new(Field::new("element", data_type, false));
        let mut fields = vec![Field::new("input_ids", DataType::List(item(DataType::Int32)), false)];
        if masked {
            fields.push(Field::new("loss_mask", DataType::List(item(DataType::UInt8)), false));
        }
        if source.is_some() {
            fields.push(Field::new("source", DataType::Utf8, false));
        }
        let schema = Arc::new(Schema::new(fields));
        let properties = WriterProperties::builder()
            .set_compression(Compression::ZSTD(ZstdLevel::try_new(format.zstd_level)?))
            .set_statistics_enabled(EnabledStatistics::Chunk)
            // Plain ids under zstd: 4 % smaller on real text than a dictionary, whose packed bits hide repeated
            // phrases from zstd, as fast to decode, and read by everyone.
            .set_dictionary_enabled(false)
            .set_column_dictionary_enabled("source".into(), true)
            .set_created_by(concat!("anello ", env!("CARGO_PKG_VERSION")).to_owned())
            .set_max_row_group_row_count(None)
            .build();
        let writer = ArrowWriter::try_new(Vec::new(), schema.clone(), Some(properties))?;
        Ok(Self {
            writer,
            schema,
            format,
            ids: Vec::new(),
            ends: Vec::new(),
            mask: masked.then(Vec::new),
            source: source.map(str::to_owned),
            rows: 0,
            tokens: 0,
        })
    }

    /// Adds a document; an empty one is left out. Panics unless `mask` is there exactly if the shard is masked, with
    /// one entry a token.
    pub fn push(&mut self, ids: &[i32], mask: Option<&[u8]>) -> Result<(), ParquetError> {
        if ids.is_empty() {
            return Ok(());
        }
        assert_eq!(mask.map(<[u8]>::len), self.mask.as_ref().map(|_| ids.len()), "one mask entry a token");
        self.ids.extend(ids);
        if let (Some(all), Some(mask)) = (&mut self.mask, mask) {
            all.extend(mask);
        }
        self.ends.push(i32::try_from(self.ids.len()).map_err(|e| ParquetError::External(e.into()))?);
        self.rows += 1;
        self.tokens += ids.len() as u64;
        if self.ids.len() as u64 >= self.format.row_group_tokens { self.flush() } else { Ok(()) }
    }

    /// Tokens so far.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// The finished file.
    pub fn finish(mut self) -> Result<Shard, ParquetError> {
        self.flush()?;
        Ok(Shard { bytes: self.writer.into_inner()?, rows: self.rows, tokens: self.tokens })
    }

    fn flush(&mut self) -> Result<(), ParquetError> {
        if self.ends.is_empty() {
            return Ok(());
        }
        let ends = std::mem::take(&mut self.ends);
        let offsets =
            OffsetBuffer::new(std::iter::once(0).chain(ends.iter().copied()).collect::<Vec<_>>().into());
        let list = |values: ArrayRef| -> ArrayRef {
            let item = Arc::new(Field::new("element", values.data_type().clone(), false));
            Arc::new(ListArray::new(item, offsets.clone(), values, None))
        };
        let mut columns = vec![list(Arc::new(Int32Array::from(std::mem::take(&mut self.ids))))];
        if let Some(mask) = &mut self.mask {
            columns.push(list(Arc::new(UInt8Array::from(std::mem::take(mask)))));
        }
        if let Some(source) = &self.source {
            columns.push(Arc::new(StringArray::from_iter_values(ends.iter().map(|_| source))));
        }
        self.writer.write(&RecordBatch::try_new(self.schema.clone(), columns)?)?;
        self.writer.flush()
    }
}
