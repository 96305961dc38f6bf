//! One row group's bytes to documents. Pure: what was fetched goes in, tokens or the reason why not come out.

use std::ops::Range;
use std::sync::Arc;

use anello_store::foreign::caught;
use bytes::{Buf, Bytes};
use parquet::basic::{Repetition, Type as Physical};
use parquet::column::page::{Page, PageMetadata, PageReader};
use parquet::column::reader::ColumnReaderImpl;
use parquet::data_type::{BoolType, DataType, Int32Type, Int64Type};
use parquet::errors::ParquetError;
use parquet::file::metadata::{ColumnChunkMetaData, ParquetMetaData};
use parquet::file::reader::{ChunkReader, Length};
use parquet::file::serialized_reader::SerializedPageReader;
use parquet::schema::types::SchemaDescriptor;

/// The label that says: this token is not trained on.
pub(crate) const IGNORED: i64 = -100;

/// The documents of one row group, in file order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Documents {
    tokens: Vec<i32>,
    /// `starts[d]..starts[d + 1]` are the tokens of document `d`.
    starts: Vec<u32>,
    /// One byte a token, 0 where the token is not a training target; absent = all are.
    counted: Option<Vec<u8>>,
}

/// One document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Document<'a> {
    /// Its token ids.
    pub tokens: &'a [i32],
    /// Per token, 0 where it is not a training target; absent = all are.
    pub counted: Option<&'a [u8]>,
}

impl Documents {
    /// Number of documents.
    pub fn len(&self) -> usize {
        self.starts.len().saturating_sub(1)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tokens of all documents together.
    pub fn tokens(&self) -> &[i32] {
        &self.tokens
    }

    /// Document `index`; panics unless `index < len`.
    pub fn at(&self, index: usize) -> Document<'_> {
        let range = self.starts[index] as usize..self.starts[index + 1] as usize;
        Document {
            tokens: &self.tokens[range.clone()],
            counted: self.counted.as_deref().map(|all| &all[range]),
        }
    }

    /// All documents in file order.
    pub fn iter(&self) -> impl Iterator<Item = Document<'_>> {
        (0..self.len()).map(|index| self.at(index))
    }

    /// A fault unless every id is below `vocab`.
    pub(crate) fn check_vocab(&self, vocab: u32) -> Result<(), Fault> {
        let max = self.tokens.iter().copied().max().unwrap_or(0);
        if i64::from(max) < i64::from(vocab) {
            return Ok(());
        }
        let at = self.tokens.iter().position(|id| *id == max).expect("the maximum is there");
        let detail = format!(
            "input_ids holds {max}, the vocabulary has {vocab}; tokenize again with the run's tokenizer"
        );
        Err(Fault::Row(row_of(&self.starts, at), detail))
    }

    #[cfg(test)]
    pub(crate) fn from_rows(rows: &[(Vec<i32>, Option<Vec<u8>>)]) -> Self {
        let mut documents = Self { starts: vec![0], ..Self::default() };
        for (tokens, counted) in rows {
            documents.tokens.extend(tokens);
            documents.starts.push(documents.tokens.len() as u32);
            if let Some(counted) = counted {
                documents.counted.get_or_insert_default().extend(counted);
            }
        }
        documents
    }
}

/// Why a row group could not be decoded.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The bytes are damaged.
    Corrupt(String),
    /// A row that cannot be trained on.
    Row(usize, String),
}

impl From<ParquetError> for Fault {
    fn from(error: ParquetError) -> Self {
        Self::Corrupt(error.to_string())
    }
}

/// The columns of a shard that the loader reads, found in its schema once a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Columns {
    ids: Leaf,
    mask: Option<(Mask, Leaf)>,
}

/// How the file says which tokens are not trained on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mask {
    /// `loss_mask`: 0 or false = not.
    Flags,
    /// `labels`: −100 = not, else the token itself.
    Labels,
}

/// A leaf of a list column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Leaf {
    column: usize,
    /// Definition level of an element that is there.
    max: i16,
    /// Definition level of an element at all: one below is an empty list, less a null row.
    repeated: i16,
    /// Unsigned 32-bit, which Parquet keeps as the bits of an `INT32`.
    unsigned: bool,
}

impl Columns {
    /// Finds `input_ids` and, if there, `loss_mask` or `labels`.
    pub(crate) fn find(schema: &SchemaDescriptor) -> Result<Self, String> {
        let ids = Leaf::find(schema, "input_ids", &[Physical::INT32, Physical::INT64])?.ok_or_else(|| {
            let names: Vec<_> = schema.root_schema().get_fields().iter().map(|f| f.name()).collect();
            format!(
                "has no column input_ids, only {}; make token shards with `anello data tokenize`",
                names.join(", ")
            )
        })?;
        let flags = Leaf::find(schema, "loss_mask", &[Physical::BOOLEAN, Physical::INT32, Physical::INT64])?;
        let labels = Leaf::find(schema, "labels", &[Physical::INT32, Physical::INT64])?;
        let mask = match (flags, labels) {
            (Some(leaf), _) => Some((Mask::Flags, leaf)),
            (None, Some(leaf)) => Some((Mask::Labels, leaf)),
            (None, None) => None,
        };
        Ok(Self { ids, mask })
    }

    fn leaves(&self) -> impl Iterator<Item = usize> {
        std::iter::once(self.ids.column).chain(self.mask.map(|(_, leaf)| leaf.column))
    }

    /// The byte ranges of the row group's column chunks that [`decode`] wants, in its order.
    pub(crate) fn ranges(
        &self,
        metadata: &ParquetMetaData,
        row_group: usize,
    ) -> Result<Vec<Range<u64>>, Fault> {
        let group = metadata.row_group(row_group);
        self.leaves()
            .map(|column| {
                // `byte_range` asserts that offsets are not negative; a damaged footer must not end the process.
                caught(|| group.column(column).byte_range())
                    .map(|(start, length)| start..start.saturating_add(length))
                    .map_err(|_| Fault::Corrupt("the footer has negative offsets".to_owned()))
            })
            .collect()
    }

    /// Tokens of the row group as its footer has them; an empty document counts as one.
    pub(crate) fn token_slots(&self, metadata: &ParquetMetaData, row_group: usize) -> u64 {
        u64::try_from(metadata.row_group(row_group).column(self.ids.column).num_values()).unwrap_or(0)
    }

    /// Largest id of the file, where the statistics of every row group have it.
    pub(crate) fn max_id(&self, metadata: &ParquetMetaData) -> Option<u64> {
        use parquet::file::statistics::Statistics;
        if self.ids.unsigned {
            return None;
        }
        let of = |group: &parquet::file::metadata::RowGroupMetaData| match group
            .column(self.ids.column)
            .statistics()?
        {
            Statistics::Int32(s) => s.max_opt().map(|v| i64::from(*v)),
            Statistics::Int64(s) => s.max_opt().copied(),
            _ => None,
        };
        let maxima =
            metadata.row_groups().iter().filter(|g| g.num_rows() > 0).map(of).collect::<Option<Vec<_>>>()?;
        maxima.into_iter().max().and_then(|max| u64::try_from(max).ok())
    }
}

impl Leaf {
    fn find(schema: &SchemaDescriptor, name: &str, types: &[Physical]) -> Result<Option<Self>, String> {
        let mut leaves =
            (0..schema.num_columns()).filter(|&i| schema.column(i).path().parts()[0].as_str() == name);
        let Some(column) = leaves.next() else { return Ok(None) };
        let leaf = schema.column(column);
        if leaves.next().is_some() || leaf.max_rep_level() != 1 || !types.contains(&leaf.physical_type()) {
            return Err(format!(
                "column {name} is {} with {} levels of lists, where a list of integers is wanted; make token shards with `anello data tokenize`",
                leaf.physical_type(),
                leaf.max_rep_level()
            ));
        }
        let mut node = schema.root_schema().get_fields().iter().find(|f| f.name() == name).cloned();
        let (mut level, mut repeated) = (0, 0);
        while let Some(at) = node {
            match at.get_basic_info().repetition() {
                Repetition::REQUIRED => {}
                Repetition::OPTIONAL => level += 1,
                Repetition::REPEATED => {
                    level += 1;
                    repeated = level;
                }
            }
            node = if at.is_primitive() { None } else { at.get_fields().first().cloned() };
        }
        let unsigned = matches!(
            leaf.logical_type_ref(),
            Some(parquet::basic::LogicalType::Integer(kind)) if !kind.is_signed && kind.bit_width == 32
        ) || leaf.converted_type() == parquet::basic::ConvertedType::UINT_32;
        Ok(Some(Self { column, max: leaf.max_def_level(), repeated, unsigned }))
    }
}

/// Decodes the fetched column chunks (in the order of [`Columns::ranges`]) of a row group.
pub(crate) fn decode(
    columns: &Columns,
    metadata: &ParquetMetaData,
    row_group: usize,
    chunks: &[Bytes],
) -> Result<Documents, Fault> {
    caught(|| decode_chunks(columns, metadata, row_group, chunks)).map_err(Fault::Corrupt)?
}

fn decode_chunks(
    columns: &Columns,
    metadata: &ParquetMetaData,
    row_group: usize,
    chunks: &[Bytes],
) -> Result<Documents, Fault> {
    let group = metadata.row_group(row_group);
    let rows =
        usize::try_from(group.num_rows()).map_err(|_| Fault::Corrupt("negative row count".to_owned()))?;
    let chunk = |leaf: &Leaf| group.column(leaf.column);

    let ids = columns.ids;
    // A mask may be one run, and is as long as the ids.
    let most = Most { rows, tokens: tokens_max(chunks[0].len()) };
    let (tokens, starts) = read_ints(&ids, "input_ids", chunk(&ids), &chunks[0], most)?;
    let counted = match &columns.mask {
        None => None,
        Some((Mask::Flags, leaf)) if chunk(leaf).column_type() == Physical::BOOLEAN => {
            let (flags, lens) = read_list::<BoolType>(leaf, "loss_mask", chunk(leaf), &chunks[1], most)?;
            same_lengths(&starts, &lens, "loss_mask")?;
            Some(flags.into_iter().map(u8::from).collect())
        }
        Some((Mask::Flags, leaf)) => {
            let (flags, lens) = read_ints(leaf, "loss_mask", chunk(leaf), &chunks[1], most)?;
            same_lengths(&starts, &lens, "loss_mask")?;
            Some(flags.into_iter().map(|flag| u8::from(flag != 0)).collect())
        }
        Some((Mask::Labels, leaf)) => {
            let (labels, lens) = read_ints(leaf, "labels", chunk(leaf), &chunks[1], most)?;
            same_lengths(&starts, &lens, "labels")?;
            let odd = labels.iter().zip(&tokens).position(|(l, t)| i64::from(*l) != IGNORED && l != t);
            if let Some(at) = odd {
                return Err(Fault::Row(
                    row_of(&starts, at),
                    format!(
                        "a label is {} where the token is {}; a label is its token or {IGNORED}",
                        labels[at], tokens[at]
                    ),
                ));
            }
            Some(labels.into_iter().map(|label| u8::from(i64::from(label) != IGNORED)).collect())
        }
    };
    // A minimum is a vector instruction, a search is not: look for the place only when there is one.
    if tokens.iter().copied().min().is_some_and(|min| min < 0) {
        let at = tokens.iter().position(|id| *id < 0).expect("the minimum is there");
        let id = if ids.unsigned { i64::from(tokens[at] as u32) } else { i64::from(tokens[at]) };
        return Err(Fault::Row(row_of(&starts, at), out_of_range("input_ids", id)));
    }
    Ok(Documents { tokens, starts, counted })
}

fn out_of_range(name: &str, id: i64) -> String {
    format!("{name} holds {id}, outside 0..=2147483647; tokenize again with the run's tokenizer")
}

/// What a list column of a row group may hold.
#[derive(Clone, Copy)]
struct Most {
    /// Rows, as the footer tells.
    rows: usize,
    tokens: usize,
}

/// Tokens that a row group may have whose ids take so many bytes. A run of one id takes a few bytes however long it is, so that a
/// small file could ask for all memory: a token takes eight bytes while it is read, 1 GiB together for any file, and
/// for a large one 512 bytes for each of its own.
fn tokens_max(bytes: usize) -> usize {
    const OF_ANY: usize = 1 << 27;
    const A_BYTE: usize = 64;
    bytes.saturating_mul(A_BYTE).max(OF_ANY)
}

/// A list column of integers as `i32`; values that do not fit are a fault.
fn read_ints(
    leaf: &Leaf,
    name: &str,
    meta: &ColumnChunkMetaData,
    bytes: &Bytes,
    most: Most,
) -> Result<(Vec<i32>, Vec<u32>), Fault> {
    if meta.column_type() == Physical::INT32 {
        return read_list::<Int32Type>(leaf, name, meta, bytes, most);
    }
    let (wide, starts) = read_list::<Int64Type>(leaf, name, meta, bytes, most)?;
    if let Some(at) = wide.iter().position(|v| i32::try_from(*v).is_err()) {
        return Err(Fault::Row(row_of(&starts, at), out_of_range(name, wide[at])));
    }
    Ok((wide.into_iter().map(|v| v as i32).collect(), starts))
}

fn row_of(starts: &[u32], at: usize) -> usize {
    starts.partition_point(|start| *start as usize <= at).saturating_sub(1)
}

fn same_lengths(ids: &[u32], other: &[u32], name: &str) -> Result<(), Fault> {
    match ids.iter().zip(other).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(end) => Err(Fault::Row(
            end - 1,
            format!("{name} and input_ids have different lengths; give each token one entry"),
        )),
    }
}

/// Values of a list column and where each row's begin (one more than there are rows).
fn read_list<T: DataType>(
    leaf: &Leaf,
    name: &str,
    meta: &ColumnChunkMetaData,
    bytes: &Bytes,
    Most { rows, tokens: most }: Most,
) -> Result<(Vec<T::T>, Vec<u32>), Fault> {
    let slots = usize::try_from(meta.num_values()).unwrap_or(usize::MAX);
    if slots >= u32::MAX as usize {
        return Err(Fault::Corrupt(format!("{slots} tokens in one row group; write smaller row groups")));
    }
    if slots > most {
        return Err(Fault::Corrupt(format!(
            "{slots} tokens in one row group, whose ids take too few bytes to be that many ({most}); write smaller row groups"
        )));
    }
    let reader = Arc::new(Chunk { start: meta.byte_range().0, bytes: bytes.clone() });
    let pages = Pages { pages: SerializedPageReader::new(reader, meta, rows, None)?, left: slots };
    let mut column = ColumnReaderImpl::<T>::new(meta.column_descr_ptr(), Box::new(pages));
    // The footer's count is anybody's claim: no more is reserved than eight values a byte, and lists that are
    // packed more tightly grow as they are read.
    let reserved = slots.min(bytes.len().saturating_mul(8));
    let (mut values, mut defs, mut reps) =
        (Vec::with_capacity(reserved), Vec::with_capacity(reserved), Vec::with_capacity(reserved));
    let (read, there, levels) = column.read_records(rows, Some(&mut defs), Some(&mut reps), &mut values)?;
    let more = column.read_records(1, Some(&mut vec![]), Some(&mut vec![]), &mut vec![])?.0;
    if read != rows || more != 0 {
        return Err(Fault::Corrupt(format!("the footer tells of {rows} rows, the pages of {}", read + more)));
    }
    if levels != slots {
        return Err(Fault::Corrupt(format!("the footer tells of {slots} values, the pages of {levels}")));
    }

    let mut starts = Vec::with_capacity(rows + 1);
    if there == levels {
        // Every slot is a token: rows begin where the repetition level is 0.
        row_starts(&reps, &mut starts);
    } else {
        let mut at = 0u32;
        for (def, rep) in defs.iter().zip(&reps) {
            if *rep == 0 {
                starts.push(at);
            }
            if *def == leaf.max {
                at += 1;
            } else if *def != leaf.repeated - 1 {
                let what = if *def >= leaf.repeated { "holds a null" } else { "is null" };
                let row = starts.len().saturating_sub(1);
                return Err(Fault::Row(row, format!("{name} {what}; drop such rows or fill them in")));
            }
        }
    }
    starts.push(values.len() as u32);
    if starts.len() != rows + 1 {
        return Err(Fault::Corrupt(format!("{rows} rows are told of, {} begin", starts.len() - 1)));
    }
    Ok((values, starts))
}

/// Where the repetition level is 0. Most stretches have none, and passing over those is what must be fast.
fn row_starts(reps: &[i16], starts: &mut Vec<u32>) {
    const STRETCH: usize = 64;
    for (at, stretch) in reps.chunks(STRETCH).enumerate() {
        if stretch.iter().fold(false, |found, rep| found | (*rep == 0)) {
            let zeros = stretch.iter().enumerate().filter(|(_, rep)| **rep == 0);
            starts.extend(zeros.map(|(i, _)| (at * STRETCH + i) as u32));
        }
    }
}

/// Pages of a column, as long as they hold no more values than the footer tells of: what is more is not unpacked.
struct Pages<R: ChunkReader> {
    pages: SerializedPageReader<R>,
    left: usize,
}

impl<R: ChunkReader> Iterator for Pages<R> {
    type Item = parquet::errors::Result<Page>;

    fn next(&mut self) -> Option<Self::Item> {
        self.get_next_page().transpose()
    }
}

impl<R: ChunkReader> PageReader for Pages<R> {
    fn get_next_page(&mut self) -> parquet::errors::Result<Option<Page>> {
        // The head of a page says how many values it has; its body is unpacked after that.
        let values = self.pages.peek_next_page()?.and_then(|page| page.num_levels).unwrap_or(0);
        self.left = self.left.checked_sub(values).ok_or_else(|| {
            let left = self.left;
            ParquetError::General(format!("a page of {values} values, and the footer tells of {left} more"))
        })?;
        self.pages.get_next_page()
    }

    fn peek_next_page(&mut self) -> parquet::errors::Result<Option<PageMetadata>> {
        self.pages.peek_next_page()
    }

    fn skip_next_page(&mut self) -> parquet::errors::Result<()> {
        self.pages.skip_next_page()
    }

    fn at_record_boundary(&mut self) -> parquet::errors::Result<bool> {
        self.pages.at_record_boundary()
    }
}

/// A column chunk in memory, addressed by its offsets in the file.
struct Chunk {
    start: u64,
    bytes: Bytes,
}

impl Chunk {
    fn from(&self, start: u64) -> parquet::errors::Result<Bytes> {
        let at = start.checked_sub(self.start).and_then(|at| usize::try_from(at).ok());
        match at {
            Some(at) if at <= self.bytes.len() => Ok(self.bytes.slice(at..)),
            _ => Err(ParquetError::EOF(format!("offset {start} is outside the column chunk"))),
        }
    }
}

impl Length for Chunk {
    fn len(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }
}

impl ChunkReader for Chunk {
    type T = bytes::buf::Reader<Bytes>;

    fn get_read(&self, start: u64) -> parquet::errors::Result<Self::T> {
        Ok(self.from(start)?.reader())
    }

    fn get_bytes(&self, start: u64, length: usize) -> parquet::errors::Result<Bytes> {
        let mut rest = self.from(start)?;
        if rest.len() < length {
            return Err(ParquetError::EOF(format!("{length} bytes at {start} reach past the column chunk")));
        }
        rest.truncate(length);
        Ok(rest)
    }
}
