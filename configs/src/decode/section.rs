//! A table of the tree, read key by key, and the problems found on the way.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use crate::names::{A_NAME, Named, closest, is_name};
use crate::problem::{Origin, Problem};
use crate::quantity::{self, Unit};
use crate::run::StateCopies;
use crate::tree::{Entry, Node, Table, Value, join};

/// What is wrong, as far as it has been found.
#[derive(Default)]
pub(crate) struct Found {
    problems: Vec<Problem>,
    /// Keys with a problem: what is said to follow from their values follows from stand-ins.
    bad: BTreeSet<String>,
}

impl Found {
    pub fn report(&mut self, problem: Problem) {
        self.bad.insert(problem.key.clone());
        self.problems.push(problem);
    }

    /// Whether `key`, or anything in the table `key`, has a problem.
    pub fn is_bad(&self, key: &str) -> bool {
        self.bad.iter().any(|bad| is_inside(bad, key))
    }

    /// Takes back what was reported of `key` and of the table `key`: it is not part of the run.
    pub fn forgive(&mut self, key: &str) {
        self.problems.retain(|problem| !is_inside(&problem.key, key));
        self.bad.retain(|bad| !is_inside(bad, key));
    }

    pub fn into_problems(self) -> Vec<Problem> {
        self.problems
    }
}

fn is_inside(key: &str, outer: &str) -> bool {
    key.strip_prefix(outer).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// A table being read: what has been asked for, and where to report.
pub(super) struct Section<'f, 't> {
    pub found: &'f mut Found,
    pub table: &'t Table,
    /// Where a missing key would stand.
    origin: Origin,
    pub path: String,
    pub known: BTreeSet<String>,
}

impl<'f, 't> Section<'f, 't> {
    pub fn new(found: &'f mut Found, table: &'t Table, origin: Origin, path: String) -> Self {
        Self { found, table, origin, path, known: BTreeSet::new() }
    }

    pub fn report(&mut self, origin: Origin, key: &str, fact: String, remedy: String) {
        self.found.report(Problem { origin, key: key.to_owned(), fact, remedy });
    }

    pub fn missing(&mut self, key: &str, accepted: &str) {
        self.known.insert(key.to_owned());
        let path = join(&self.path, key);
        self.report(self.origin.clone(), &path, format!("{path} is missing"), format!("add {accepted}"));
    }

    /// Reads `key`, or reports that it is missing or not as `accepted`.
    pub fn read<T>(
        &mut self,
        key: &str,
        accepted: &str,
        default: Option<T>,
        read: impl FnOnce(&'t Node) -> Option<T>,
    ) -> Option<T> {
        self.known.insert(key.to_owned());
        let Some(Entry { node, .. }) = self.table.entries.get(key) else {
            if default.is_none() {
                self.missing(key, accepted);
            }
            return default;
        };
        let value = read(node);
        if value.is_none() {
            let path = join(&self.path, key);
            let is = match &node.value {
                Value::Table(_) => "a table".to_owned(),
                Value::Text(text) if text.is_empty() => "empty".to_owned(),
                _ => node.shown.clone(),
            };
            self.report(
                node.place.origin.clone(),
                &path,
                format!("{path} is {is}"),
                format!("give {accepted}"),
            );
        }
        value
    }

    /// A whole number in `range`.
    pub fn count(&mut self, key: &str, range: RangeInclusive<u64>, default: Option<u64>) -> u64 {
        let accepted = format!("a whole number, {} to {}", range.start(), range.end());
        let (low, high) = (i128::from(*range.start()), i128::from(*range.end()));
        self.read(key, &accepted, default, |node| match node.value {
            Value::Integer(value) if (low..=high).contains(&value) => u64::try_from(value).ok(),
            _ => None,
        })
        .unwrap_or(*range.start())
    }

    /// A whole number in `range`, possibly with a unit.
    pub fn quantity(
        &mut self,
        key: &str,
        unit: Unit,
        range: RangeInclusive<u64>,
        default: Option<u64>,
    ) -> u64 {
        let accepted = unit.accepted(&range);
        let value = self.read(key, &accepted, default, |node| {
            let value = match &node.value {
                // A time says its unit.
                Value::Integer(_) if unit == Unit::Time => None,
                Value::Integer(value) => u64::try_from(*value).ok(),
                Value::Float(_, digits) | Value::Text(digits) => quantity::parse(digits, unit),
                _ => None,
            };
            value.filter(|value| range.contains(value))
        });
        value.unwrap_or(*range.start())
    }

    /// A number that `accepts`.
    pub fn number(
        &mut self,
        key: &str,
        accepted: &str,
        accepts: impl FnOnce(f64) -> bool,
        default: Option<f64>,
    ) -> f64 {
        let value = self.read(key, accepted, default, |node| {
            let value = match node.value {
                Value::Integer(value) => value as f64,
                Value::Float(value, _) => value,
                _ => return None,
            };
            (value.is_finite() && accepts(value)).then_some(value)
        });
        value.unwrap_or_default()
    }

    pub fn rate(&mut self, key: &str, default: Option<f64>) -> f64 {
        self.number(key, "a learning rate, 0 to 10", |v| (0.0..=10.0).contains(&v), default)
    }

    pub fn flag(&mut self, key: &str, default: bool) -> bool {
        self.read(key, "true or false", Some(default), |node| match node.value {
            Value::Bool(value) => Some(value),
            _ => None,
        })
        .unwrap_or(default)
    }

    pub fn choice<T: Named>(&mut self, key: &str, default: T) -> T {
        self.word(key, Some(default)).unwrap_or(default)
    }

    /// One of the words of a closed choice; absent when it is none of them.
    pub fn word<T: Named>(&mut self, key: &str, default: Option<T>) -> Option<T> {
        let words: Vec<String> = T::NAMES.iter().map(|(word, _)| format!("\"{word}\"")).collect();
        self.read(key, &words.join(" or "), default, |node| match &node.value {
            Value::Text(text) => T::NAMES.iter().find(|(word, _)| word == text).map(|(_, value)| *value),
            _ => None,
        })
    }

    pub fn state_copies(&mut self, key: &str) -> StateCopies {
        let read = self.read(key, "\"all\" or 2", Some(StateCopies::All), |node| match &node.value {
            Value::Text(text) if text == "all" => Some(StateCopies::All),
            Value::Integer(2) => Some(StateCopies::Two),
            _ => None,
        });
        read.unwrap_or(StateCopies::All)
    }

    pub fn text(&mut self, key: &str, accepted: &str, accepts: impl FnOnce(&str) -> bool) -> String {
        self.read(key, accepted, None, |node| match &node.value {
            Value::Text(text) if accepts(text) => Some(text.clone()),
            _ => None,
        })
        .unwrap_or_default()
    }

    /// A text that means a value of `T`.
    pub fn parsed<T: std::str::FromStr + Copy>(&mut self, key: &str, accepted: &str, default: T) -> T {
        let found = self.read(key, accepted, Some(default), |node| match &node.value {
            Value::Text(text) => text.parse().ok(),
            _ => None,
        });
        found.unwrap_or(default)
    }

    /// The name of a run may hold dots as well (`ouro-1.4b`), since no key is made of it.
    pub fn run_name(&mut self, key: &str) -> String {
        let accepts = |text: &str| is_name(&text.replace('.', "-")) && !text.starts_with('.');
        self.text(key, "a name of 1 to 64 letters, digits, `-`, `_` and `.`, not first", accepts)
    }

    /// A path, or a URL of a store that there is.
    pub fn location(&mut self, key: &str) -> String {
        const SCHEMES: [&str; 4] = ["file", "s3", "gs", "az"];
        self.text(key, "a path, or a URL that begins with file://, s3://, gs:// or az://", |text| {
            let scheme = text.split_once("://").map(|(scheme, _)| scheme);
            !text.trim().is_empty()
                && !text.contains(char::is_control)
                && scheme.is_none_or(|scheme| SCHEMES.contains(&scheme))
        })
    }

    /// Whether the key is there.
    pub fn has(&self, key: &str) -> bool {
        self.table.entries.contains_key(key)
    }

    /// Whether an optional key is there; `"none"` takes back what an earlier layer set.
    pub fn optional(&mut self, key: &str) -> bool {
        self.known.insert(key.to_owned());
        self.table.entries.get(key).is_some_and(|entry| !is_none(&entry.node))
    }

    /// Reads the table `key`; absent when there is none, or (reported) when it is something else.
    pub fn section<T>(&mut self, key: &str, read: impl FnOnce(&mut Section<'_, 't>) -> T) -> Option<T> {
        self.known.insert(key.to_owned());
        let entry = self.table.entries.get(key)?;
        let path = join(&self.path, key);
        let Value::Table(table) = &entry.node.value else {
            let fact = format!("{path} is {}, {}", entry.node.shown, entry.node.value.kind());
            self.report(entry.node.place.origin.clone(), &path, fact, "give a table".to_owned());
            return None;
        };
        let mut section = Section::new(self.found, table, entry.node.place.origin.clone(), path);
        let value = read(&mut section);
        section.finish();
        Some(value)
    }

    /// Reads the table `key` with defaults for all that is not there.
    pub fn section_or_empty<T>(&mut self, key: &str, read: impl Fn(&mut Section<'_, '_>) -> T) -> T {
        match self.section(key, |s| read(s)) {
            Some(value) => value,
            None => {
                let empty = Table::default();
                let path = join(&self.path, key);
                read(&mut Section::new(self.found, &empty, self.origin.clone(), path))
            }
        }
    }

    /// Reads a table whose keys are names that the user gives.
    pub fn map<T>(
        &mut self,
        key: &str,
        mut read: impl FnMut(&mut Section<'_, 't>, &str) -> T,
    ) -> BTreeMap<String, T> {
        self.section(key, |s| {
            let mut values = BTreeMap::new();
            for (name, entry) in &s.table.entries {
                if is_name(name) {
                    values.insert(name.clone(), read(s, name));
                } else {
                    s.known.insert(name.clone());
                    let path = join(&s.path, name);
                    let fact = format!("{path} has a name that cannot be used");
                    s.report(entry.key.origin.clone(), &path, fact, format!("give a name of {A_NAME}"));
                }
            }
            values
        })
        .unwrap_or_default()
    }

    /// Reports the keys that nobody asked for.
    pub fn finish(&mut self) {
        let unknown: Vec<_> =
            self.table.entries.iter().filter(|(key, _)| !self.known.contains(*key)).collect();
        for (key, entry) in unknown {
            let path = join(&self.path, key);
            let known = self.known.iter().map(String::as_str);
            let remedy = match closest(key, known.clone()) {
                Some(close) => format!("did you mean `{close}`?"),
                None => format!("the keys here are {}", known.collect::<Vec<_>>().join(", ")),
            };
            self.report(entry.key.origin.clone(), &path, format!("{path} is no key"), remedy);
        }
    }
}

fn is_none(node: &Node) -> bool {
    matches!(&node.value, Value::Text(text) if text == "none")
}
