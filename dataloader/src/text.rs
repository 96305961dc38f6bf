//! Text in: files, folders, JSON Lines and Parquet, as an ordered list of pieces that can be read apart.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use anello_store::foreign::decoded;
use bytes::Bytes;
use parquet::basic::Type as Physical;
use parquet::column::reader::ColumnReader;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field as Value, Row};

use crate::{Error, Result};

/// Where text comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextInputs {
    /// Files, and folders that are walked by name. A `.jsonl` or `.ndjson` file has a document a line, a `.parquet`
    /// file one a row; any other file is one document.
    pub paths: Vec<PathBuf>,
    /// In folders, only files with one of these extensions (without the dot); empty = every file. What is hidden
    /// (a leading dot), a link, or not UTF-8 text is left out of folders; the latter are told of.
    pub extensions: Vec<String>,
    /// The field of JSON Lines and the column of Parquet that holds the text.
    pub text_field: String,
    /// It holds conversations, a list of `{role, content}` each, and no text: a document is then such a list as JSON.
    pub conversations: bool,
}

/// Where in a row the document is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Field<'a> {
    name: &'a str,
    conversation: bool,
}

impl TextInputs {
    /// Every file below `paths`, text in the field `text`.
    pub fn new(paths: impl IntoIterator<Item = impl Into<PathBuf>>) -> Self {
        Self {
            paths: paths.into_iter().map(Into::into).collect(),
            extensions: Vec::new(),
            text_field: "text".to_owned(),
            conversations: false,
        }
    }

    pub(crate) fn field(&self) -> Field<'_> {
        Field { name: &self.text_field, conversation: self.conversations }
    }

    /// The pieces of all inputs in order: paths as given, folders by name. Long files of lines and of row groups are
    /// cut into pieces of about `piece_bytes`.
    pub(crate) fn pieces(&self, piece_bytes: u64) -> Result<Vec<Piece>> {
        let mut pieces = Vec::new();
        for path in &self.paths {
            let meta = std::fs::metadata(path).map_err(Error::file(path))?;
            if meta.is_dir() {
                self.walk(path, piece_bytes, &mut pieces)?;
            } else {
                cut(path, meta.len(), true, piece_bytes, &mut pieces)?;
            }
        }
        if pieces.is_empty() {
            let paths: Vec<_> = self.paths.iter().map(|p| p.display().to_string()).collect();
            let detail = "no text file there; check the paths and extensions";
            return Err(Error::tool(paths.join(", "), detail));
        }
        Ok(pieces)
    }

    fn walk(&self, folder: &Path, piece_bytes: u64, pieces: &mut Vec<Piece>) -> Result<()> {
        let mut entries = std::fs::read_dir(folder)
            .and_then(|entries| entries.collect::<std::io::Result<Vec<_>>>())
            .map_err(Error::file(folder))?;
        entries.sort_by_key(|entry| entry.file_name());
        for entry in entries {
            let (path, kind) = (entry.path(), entry.file_type().map_err(Error::file(entry.path()))?);
            if entry.file_name().as_encoded_bytes().starts_with(b".") {
                continue;
            }
            if kind.is_dir() {
                self.walk(&path, piece_bytes, pieces)?;
            } else if kind.is_file() && self.wants(&path) {
                let bytes = entry.metadata().map_err(Error::file(&path))?.len();
                cut(&path, bytes, false, piece_bytes, pieces)?;
            }
        }
        Ok(())
    }

    fn wants(&self, path: &Path) -> bool {
        let extension = extension(path);
        self.extensions.is_empty() || self.extensions.iter().any(|e| e.trim_start_matches('.') == extension)
    }
}

/// A part of an input that is read by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) path: PathBuf,
    /// About so many bytes of text.
    pub(crate) bytes: u64,
    /// Named by the user, so that it must be text.
    named: bool,
    part: Part,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    /// One document.
    File,
    /// The JSON lines that begin in this range of bytes.
    Lines(Range<u64>),
    /// A row group of Parquet.
    RowGroup(usize),
}

/// Whether a piece was text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Text,
    Binary,
}

fn extension(path: &Path) -> String {
    path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase()).unwrap_or_default()
}

fn cut(path: &Path, bytes: u64, named: bool, piece_bytes: u64, pieces: &mut Vec<Piece>) -> Result<()> {
    let mut push = |bytes, part| pieces.push(Piece { path: path.to_owned(), bytes, named, part });
    match extension(path).as_str() {
        "jsonl" | "ndjson" => {
            for start in (0..bytes).step_by(piece_bytes.max(1) as usize) {
                let end = (start + piece_bytes).min(bytes);
                push(end - start, Part::Lines(start..end));
            }
        }
        "parquet" => {
            let file = File::open(path).map_err(Error::file(path))?;
            let reader =
                decoded(|| SerializedFileReader::new(file)).map_err(|e| Error::tool(path.display(), e))?;
            for (at, group) in reader.metadata().row_groups().iter().enumerate() {
                push(u64::try_from(group.total_byte_size()).unwrap_or(0), Part::RowGroup(at));
            }
        }
        _ => push(bytes, Part::File),
    }
    Ok(())
}

impl Piece {
    /// Hands each document of the piece to `document`, in order.
    pub(crate) fn read(
        &self,
        field: Field<'_>,
        document: &mut dyn FnMut(&str) -> Result<()>,
    ) -> Result<Kind> {
        match &self.part {
            Part::File if field.conversation => {
                return Err(self.fault("is a file of text; conversations are in .jsonl or .parquet files"));
            }
            Part::File => return self.read_file(document),
            Part::Lines(range) => self.read_lines(range, field, document)?,
            Part::RowGroup(group) => self.read_row_group(*group, field, document)?,
        }
        Ok(Kind::Text)
    }

    fn read_file(&self, document: &mut dyn FnMut(&str) -> Result<()>) -> Result<Kind> {
        let bytes = std::fs::read(&self.path).map_err(Error::file(&self.path))?;
        match String::from_utf8(bytes) {
            Ok(text) if !text.contains('\0') => {
                document(&text)?;
                Ok(Kind::Text)
            }
            _ if self.named => Err(self.fault("is not UTF-8 text; convert it, or leave it out")),
            _ => Ok(Kind::Binary),
        }
    }

    fn read_lines(
        &self,
        range: &Range<u64>,
        field: Field<'_>,
        document: &mut dyn FnMut(&str) -> Result<()>,
    ) -> Result<()> {
        let io = || Error::file(&self.path);
        let mut file = File::open(&self.path).map_err(io())?;
        // A line belongs to the piece in which it begins: look at the byte before the piece for a line end.
        let mut at = range.start.saturating_sub(1);
        file.seek(SeekFrom::Start(at)).map_err(io())?;
        let mut reader = BufReader::with_capacity(1 << 20, file);
        let mut line = Vec::new();
        if range.start > 0 {
            at += reader.read_until(b'\n', &mut line).map_err(io())? as u64;
        }
        while at < range.end {
            line.clear();
            let read = reader.read_until(b'\n', &mut line).map_err(io())?;
            if read == 0 {
                break;
            }
            if !line.trim_ascii().is_empty() {
                let value: serde_json::Value = serde_json::from_slice(&line).map_err(|e| {
                    self.fault(format!("the line at byte {at} is not JSON ({e}); repair or drop it"))
                })?;
                let found = value.get(field.name);
                match found.and_then(|text| text.as_str()) {
                    _ if field.conversation => match found.filter(|list| list.is_array()) {
                        Some(list) => document(&list.to_string())?,
                        None => {
                            return Err(self.fault(format!(
                                "the line at byte {at} has no list \"{}\"; name the field of the conversation",
                                field.name
                            )));
                        }
                    },
                    Some(text) => document(text)?,
                    None => {
                        return Err(self.fault(format!(
                            "the line at byte {at} has no string \"{}\"; name the field of the text",
                            field.name
                        )));
                    }
                }
            }
            at += read as u64;
        }
        Ok(())
    }

    fn read_row_group(
        &self,
        group: usize,
        field: Field<'_>,
        document: &mut dyn FnMut(&str) -> Result<()>,
    ) -> Result<()> {
        let file = File::open(&self.path).map_err(Error::file(&self.path))?;
        let reader = decoded(|| SerializedFileReader::new(file)).map_err(|e| self.fault(e))?;
        if field.conversation {
            return self.read_conversations(&reader, group, field.name, document);
        }
        let name = field.name;
        read_strings(&reader, group, name, &mut |row, text| match text {
            Some(text) => document(text),
            None => Err(self.fault(format!("row group {group}, row {row}: {name} is null; drop such rows"))),
        })
        .map_err(|e| match e {
            StringsError::Parquet(detail) => self.fault(detail),
            StringsError::Ours(e) => e,
        })
    }

    /// A column of `list<struct<role: string, content: string>>`.
    fn read_conversations(
        &self,
        reader: &SerializedFileReader<File>,
        group: usize,
        name: &str,
        document: &mut dyn FnMut(&str) -> Result<()>,
    ) -> Result<()> {
        let groups = decoded(|| reader.get_row_group(group)).map_err(|e| self.fault(e))?;
        let mut rows = decoded(|| groups.get_row_iter(None)).map_err(|e| self.fault(e))?;
        for at in 0.. {
            let Some(row) = decoded(|| rows.next().transpose()).map_err(|e| self.fault(e))? else { break };
            let column = row.get_column_iter().find(|(column, _)| *column == name).map(|(_, field)| field);
            let list = column.and_then(conversation).ok_or_else(|| {
                self.fault(format!(
                    "row group {group}, row {at}: {name} is no list of role and content; name the column of the conversation"
                ))
            })?;
            document(&list.to_string())?;
        }
        Ok(())
    }

    fn fault(&self, detail: impl ToString) -> Error {
        Error::tool(self.path.display(), detail)
    }
}

/// A Parquet value as a conversation in JSON.
fn conversation(field: &Value) -> Option<serde_json::Value> {
    let Value::ListInternal(list) = field else { return None };
    let text = |row: &Row, name: &str| match row.get_column_iter().find(|(column, _)| *column == name)? {
        (_, Value::Str(text)) => Some(text.clone()),
        _ => None,
    };
    let message = |message: &Value| match message {
        Value::Group(row) => {
            Some(serde_json::json!({ "role": text(row, "role")?, "content": text(row, "content")? }))
        }
        _ => None,
    };
    list.elements().iter().map(message).collect()
}

pub(crate) enum StringsError {
    Parquet(String),
    Ours(Error),
}

/// Hands each value of a flat string column to `value`, with its row.
pub(crate) fn read_strings(
    reader: &dyn FileReader,
    group: usize,
    name: &str,
    value: &mut dyn FnMut(usize, Option<&str>) -> Result<()>,
) -> Result<(), StringsError> {
    const ROWS: usize = 1024;
    let bad = |detail: String| StringsError::Parquet(detail);
    let schema = reader.metadata().file_metadata().schema_descr();
    let column =
        (0..schema.num_columns()).find(|&i| schema.column(i).path().parts() == [name]).ok_or_else(|| {
            let names: Vec<_> = schema.root_schema().get_fields().iter().map(|f| f.name()).collect();
            bad(format!("has no column {name}, only {}; name the column of the text", names.join(", ")))
        })?;
    if schema.column(column).physical_type() != Physical::BYTE_ARRAY {
        return Err(bad(format!("column {name} is {}, not a string", schema.column(column).physical_type())));
    }
    let groups = decoded(|| reader.get_row_group(group)).map_err(bad)?;
    let ColumnReader::ByteArrayColumnReader(mut column) =
        decoded(|| groups.get_column_reader(column)).map_err(bad)?
    else {
        return Err(bad(format!("column {name} is not a string")));
    };
    let mut row = 0;
    loop {
        let (mut defs, mut values) = (Vec::new(), Vec::new());
        let (rows, _, _) =
            decoded(|| column.read_records(ROWS, Some(&mut defs), None, &mut values)).map_err(bad)?;
        if rows == 0 {
            return Ok(());
        }
        let mut values = values.iter();
        for at in 0..rows {
            // A flat column has one optional level at most: 0 is null there.
            let text = match defs.get(at) {
                Some(0) => None,
                _ => values.next().map(|v| v.as_utf8()).transpose().map_err(|e| bad(e.to_string()))?,
            };
            value(row + at, text).map_err(StringsError::Ours)?;
        }
        row += rows;
    }
}

/// Cuts a long document into parts of about `bytes` that tokenize as the whole does: each cut is before a line end
/// that follows a letter or digit, where byte-level pre-tokenizers cut anyway. Where there is no such place within four
/// times `bytes`, it is cut between any two characters.
pub(crate) fn parts(text: &str, bytes: usize) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let (part, after) = rest.split_at(part_end(rest, bytes));
        rest = after;
        Some(part)
    })
}

fn part_end(text: &str, bytes: usize) -> usize {
    if text.len() <= bytes {
        return text.len();
    }
    let raw = text.as_bytes();
    let until = (bytes * 4).min(raw.len() - 1);
    for at in bytes.max(1)..until {
        if raw[at] == b'\n' && raw[at - 1].is_ascii_alphanumeric() {
            return at;
        }
    }
    if text.len() <= bytes * 4 {
        return text.len();
    }
    (until..raw.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(raw.len())
}

/// Reads a file that must be there, for the tools.
pub(crate) fn read_file(path: &Path) -> Result<Bytes> {
    let mut bytes = Vec::new();
    File::open(path).and_then(|mut file| file.read_to_end(&mut bytes)).map_err(Error::file(path))?;
    Ok(bytes.into())
}

#[cfg(test)]
mod tests;
