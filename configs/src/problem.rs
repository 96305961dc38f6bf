//! What can be wrong with a config, said so that a person can put it right.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

/// Where a value was written. The order is the one in which problems are told.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// Nowhere: something that should be there and is not, in the config of this name.
    Missing(Arc<str>),
    /// A place in a file, or in an embedded preset or recipe (`preset:tiny`).
    File {
        /// The file as the user named it.
        file: Arc<str>,
        /// Line, from 1.
        line: usize,
        /// Column in characters, from 1.
        column: usize,
    },
    /// An environment variable, by name.
    Environment(Arc<str>),
    /// A `--set` argument, as given.
    Set(Arc<str>),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { file, line, column } => write!(f, "{file}:{line}:{column}"),
            Self::Environment(variable) => write!(f, "environment {variable}"),
            Self::Set(text) => write!(f, "--set {text}"),
            Self::Missing(config) => write!(f, "{config}"),
        }
    }
}

/// One thing to put right: where, which key, what is the case, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where the offending value (or, for an unknown key, the key) stands.
    pub origin: Origin,
    /// The key, dotted; empty when the text is not TOML at all.
    pub key: String,
    /// What is the case, with the offending value and the accepted range.
    pub fact: String,
    /// What to do.
    pub remedy: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.origin, self.fact)?;
        if self.remedy.is_empty() { Ok(()) } else { write!(f, "; {}", self.remedy) }
    }
}

/// Why there is no config.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The config was read and is wrong: all that is wrong with it, in the order of where it stands.
    #[error("{}", listed(problems))]
    Invalid {
        /// At least one.
        problems: Vec<Problem>,
    },
    /// A file could not be read.
    #[error("{} cannot be read{from}; {remedy}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The `include` that asked for it, in words; empty for the config itself.
        from: String,
        /// What to do.
        remedy: String,
        /// What the system said.
        source: std::io::Error,
    },
}

impl ConfigError {
    /// The problems of an invalid config; none when a file could not be read.
    pub fn problems(&self) -> &[Problem] {
        match self {
            Self::Invalid { problems } => problems,
            Self::Unreadable { .. } => &[],
        }
    }
}

fn listed(problems: &[Problem]) -> String {
    let mut text = match problems.len() {
        1 => "the config has a problem".to_owned(),
        n => format!("the config has {n} problems"),
    };
    for problem in problems {
        text.push_str(&format!("\n  {problem}"));
    }
    text
}
