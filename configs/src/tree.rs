//! TOML as a tree in which every value knows where it was written, and how trees are laid over one another.

use std::collections::BTreeMap;
use std::sync::Arc;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::problem::{Origin, Problem};

/// Where a value stands, and in which layer: a later layer wins.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Place {
    pub origin: Origin,
    pub layer: u32,
}

/// A value with its place, and as it was written.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub value: Value,
    pub place: Place,
    /// The text that the user wrote, for messages; short.
    pub shown: String,
}

#[derive(Clone, Debug)]
pub(crate) enum Value {
    Text(String),
    /// Beyond 128 bits: saturated, which is out of every range.
    Integer(i128),
    /// The value, and its digits for exact arithmetic.
    Float(f64, String),
    Bool(bool),
    List(Vec<Node>),
    Table(Table),
    Date,
}

impl Value {
    /// What it is, for messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Text(_) => "text",
            Self::Integer(_) => "a whole number",
            Self::Float(..) => "a number",
            Self::Bool(_) => "true or false",
            Self::List(_) => "a list",
            Self::Table(_) => "a table",
            Self::Date => "a date",
        }
    }
}

/// A table; `whole` when it was written as `{ … }`, which is one value and replaces what it is laid over.
#[derive(Clone, Debug, Default)]
pub(crate) struct Table {
    pub entries: BTreeMap<String, Entry>,
    pub whole: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct Entry {
    /// Where the key stands.
    pub key: Place,
    pub node: Node,
}

impl Table {
    /// Lays `over` on top: tables merge key by key, everything else (and a `{ … }`) replaces.
    pub fn lay(&mut self, over: Table) {
        for (key, entry) in over.entries {
            match (self.entries.get_mut(&key), entry) {
                (
                    Some(Entry { node: Node { value: Value::Table(under), .. }, .. }),
                    Entry { node: Node { value: Value::Table(over), .. }, .. },
                ) if !over.whole => under.lay(over),
                (_, entry) => {
                    self.entries.insert(key, entry);
                }
            }
        }
    }

    /// The entry at a dotted path.
    pub fn find(&self, path: &str) -> Option<&Entry> {
        let (head, rest) = path.split_once('.').map_or((path, None), |(head, rest)| (head, Some(rest)));
        let entry = self.entries.get(head)?;
        match (rest, &entry.node.value) {
            (None, _) => Some(entry),
            (Some(rest), Value::Table(table)) => table.find(rest),
            (Some(_), _) => None,
        }
    }

    /// Where the value at a dotted path stands; failing that, the nearest table around it.
    pub fn origin(&self, path: &str) -> Option<&Origin> {
        let mut path = path;
        loop {
            if let Some(entry) = self.find(path) {
                return Some(&entry.node.place.origin);
            }
            path = path.rsplit_once('.')?.0;
        }
    }

    /// The latest layer that wrote anything in here.
    pub fn latest_layer(&self) -> u32 {
        self.entries
            .values()
            .map(|entry| match &entry.node.value {
                Value::Table(table) if !table.entries.is_empty() => table.latest_layer(),
                _ => entry.node.place.layer,
            })
            .max()
            .unwrap_or(0)
    }

    /// Visits every value that is no table, with its dotted path.
    pub fn leaves<'a>(&'a self, prefix: &str, visit: &mut impl FnMut(String, &'a Node)) {
        for (key, entry) in &self.entries {
            let path = join(prefix, key);
            match &entry.node.value {
                Value::Table(table) => table.leaves(&path, visit),
                _ => visit(path, &entry.node),
            }
        }
    }
}

/// `prefix.key`, or `key` at the top.
pub(crate) fn join(prefix: &str, key: &str) -> String {
    if prefix.is_empty() { key.to_owned() } else { format!("{prefix}.{key}") }
}

/// Reads a TOML document; its syntax errors go to `problems`.
pub(crate) fn read(file: &Arc<str>, text: &str, layer: u32, problems: &mut Vec<Problem>) -> Table {
    let reader = Reader { text, layer, locate: &|at| locate(file, text, at) };
    let (document, errors) = DeTable::parse_recoverable(text);
    problems.extend(errors.into_iter().map(|error| {
        Problem {
            origin: locate(file, text, error.span().map_or(text.len(), |span| span.start)),
            key: String::new(),
            fact: format!("this is not TOML: {}", error.message()),
            remedy: "text stands in quotes, a key stands once in its table, and a table is [named.like.this]"
                .to_owned(),
        }
    }));
    reader.table(document.get_ref(), false)
}

/// Keys that a dotted path may have; the deepest that means anything has four.
const DEPTH_MAX: usize = 16;

/// Reads `key.path=value`: the value is TOML, or else text as it stands (`--set compute.dtype=bf16`). Absent when
/// the path is none.
pub(crate) fn assignment(key: &str, value: &str, origin: &Origin, layer: u32) -> Option<Table> {
    let keys: Vec<&str> = key.split('.').map(str::trim).collect();
    if keys.len() > DEPTH_MAX || keys.iter().any(|key| key.is_empty()) {
        return None;
    }
    let value = value.trim();
    let reader = Reader { text: value, layer, locate: &|_| origin.clone() };
    let place = reader.place(0);
    let node = match DeValue::parse(value) {
        Ok(parsed) => reader.node(&parsed),
        Err(_) => Node { value: Value::Text(value.to_owned()), place: place.clone(), shown: short(value) },
    };
    let wrap = |node: Node, key: &str| {
        let entries = BTreeMap::from([(key.to_owned(), Entry { key: place.clone(), node })]);
        Node {
            value: Value::Table(Table { entries, whole: false }),
            place: place.clone(),
            shown: String::new(),
        }
    };
    match keys.into_iter().rev().fold(node, wrap).value {
        Value::Table(table) => Some(table),
        _ => None,
    }
}

struct Reader<'a> {
    text: &'a str,
    layer: u32,
    locate: &'a dyn Fn(usize) -> Origin,
}

impl Reader<'_> {
    fn place(&self, at: usize) -> Place {
        Place { origin: (self.locate)(at), layer: self.layer }
    }

    fn table(&self, table: &DeTable<'_>, whole: bool) -> Table {
        let entries = table
            .iter()
            .map(|(key, value)| {
                let entry = Entry { key: self.place(key.span().start), node: self.node(value) };
                (key.get_ref().to_string(), entry)
            })
            .collect();
        Table { entries, whole }
    }

    fn node(&self, node: &Spanned<DeValue<'_>>) -> Node {
        let span = node.span();
        let written = self.text.get(span.clone()).unwrap_or_default();
        let value = match node.get_ref() {
            DeValue::String(text) => Value::Text(text.to_string()),
            DeValue::Integer(number) => {
                let (digits, limit) = (number.as_str(), i128::MAX);
                let saturated = if digits.starts_with('-') { -limit } else { limit };
                Value::Integer(i128::from_str_radix(digits, number.radix()).unwrap_or(saturated))
            }
            DeValue::Float(number) => {
                Value::Float(number.as_str().parse().unwrap_or(f64::NAN), number.as_str().to_owned())
            }
            DeValue::Boolean(value) => Value::Bool(*value),
            DeValue::Datetime(_) => Value::Date,
            DeValue::Array(items) => Value::List(items.iter().map(|item| self.node(item)).collect()),
            DeValue::Table(table) => Value::Table(self.table(table, written.starts_with('{'))),
        };
        Node { value, place: self.place(span.start), shown: short(written) }
    }
}

fn short(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    match line.char_indices().nth(60) {
        Some((at, _)) => format!("{}…", &line[..at]),
        None if line.len() < text.trim_end().len() => format!("{line}…"),
        None => line.to_owned(),
    }
}

fn locate(file: &Arc<str>, text: &str, at: usize) -> Origin {
    let before = text.get(..at).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    let (line, column) = (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1);
    Origin::File { file: file.clone(), line, column }
}
