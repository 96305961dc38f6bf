//! From a name or a path to a run config: layers, includes and overrides.
//!
//! A config is a stack of layers, and a later layer wins: what a file includes, in order; the file; the environment;
//! `--set`. Tables merge key by key; a value, a list, and a table written whole as `{ … }` replace what was there.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::check::{Finding, check};
use crate::decode::decode;
use crate::names::closest;
use crate::problem::{ConfigError, Origin, Problem};
use crate::run::RunConfig;
use crate::tree::{self, Entry, Node, Table, Value};

/// Embedded run configs, by name.
const PRESETS: [(&str, &str); 8] = [
    ("tiny", include_str!("../presets/tiny.toml")),
    ("mano", include_str!("../presets/mano.toml")),
    ("mano-x1", include_str!("../presets/mano-x1.toml")),
    ("mano-small", include_str!("../presets/mano-small.toml")),
    ("mano-small-x1", include_str!("../presets/mano-small-x1.toml")),
    ("ouro-1.4b", include_str!("../presets/ouro-1.4b.toml")),
    ("ouro-2.6b", include_str!("../presets/ouro-2.6b.toml")),
    ("ouro-2.6b-wide", include_str!("../presets/ouro-2.6b-wide.toml")),
];

/// Embedded stages and mixtures without a model, by name.
const RECIPES: [(&str, &str); 2] =
    [("ouro", include_str!("../recipes/ouro.toml")), ("ouro-v4", include_str!("../recipes/ouro-v4.toml"))];

/// Names of the presets, each a whole run config.
pub fn presets() -> impl Iterator<Item = &'static str> {
    PRESETS.iter().map(|(name, _)| *name)
}

/// Names of the recipes, each the stages and sources of a run without its model.
pub fn recipes() -> impl Iterator<Item = &'static str> {
    RECIPES.iter().map(|(name, _)| *name)
}

/// The TOML of `preset:NAME` or `recipe:NAME`, to show or to start a file from.
pub fn embedded(name: &str) -> Option<&'static str> {
    let (list, name): (&[(&str, &str)], _) = match name.split_once(':') {
        Some(("preset", name)) => (&PRESETS, name),
        Some(("recipe", name)) => (&RECIPES, name),
        _ => return None,
    };
    list.iter().find(|(other, _)| *other == name).map(|(_, text)| *text)
}

/// The prefix of environment variables that set a key: `ANELLO_SET__stage__stable__lr=1e-4` sets `stage.stable.lr`.
pub const ENVIRONMENT_PREFIX: &str = "ANELLO_SET__";

/// What to load, and everything from outside that has a say in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadOptions {
    /// Name of a preset (`tiny`), or path of a TOML file.
    pub config: String,
    /// The TOML of `config` where that is no file of this machine: `config` is then its name in messages.
    pub text: Option<String>,
    /// What relative paths on the command line, in the environment and in presets are relative to; they are joined
    /// to it, so that with an absolute directory the loaded config holds absolute paths only. Empty: they are kept.
    pub directory: PathBuf,
    /// The environment, in any order. Variables that do not begin with [`ENVIRONMENT_PREFIX`] are ignored; after it,
    /// `__` stands for the dot between keys, and a `-` stays one:
    /// `env ANELLO_SET__stage__ct-anneal__lr_to=1e-6 anello run tiny`. Values are read as those of `--set` are.
    pub environment: Vec<(String, String)>,
    /// `--set` arguments, in order: `key.path=value`, where the value is TOML or else plain text
    /// (`compute.dtype=bf16`, `stage.stable.tokens=6T`).
    pub sets: Vec<String>,
}

impl LoadOptions {
    /// The config of this name or path, with nothing from outside.
    pub fn new(config: impl Into<String>) -> Self {
        Self { config: config.into(), ..Self::default() }
    }
}

/// A config that is right, and where it came from.
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded {
    /// The run.
    pub config: RunConfig,
    /// Where each key that somebody wrote was written; the others have their defaults.
    pub origins: BTreeMap<String, Origin>,
    /// The files that were read, presets and recipes as `preset:NAME` and `recipe:NAME`, in the order of their layers.
    pub files: Vec<String>,
}

impl RunConfig {
    /// Loads a config and all its layers, and checks the whole. The error names everything that is wrong with it.
    pub fn load(options: &LoadOptions) -> Result<Loaded, ConfigError> {
        let mut stack = Stack::default();
        stack.load(options)?;
        let name: Arc<str> = options.config.as_str().into();
        let (root, files) = (stack.root, stack.files);
        let config = finish(&root, &name, stack.problems, stack.incomplete)?;
        let mut origins = BTreeMap::new();
        root.leaves("", &mut |key, node| {
            origins.insert(key, node.place.origin.clone());
        });
        Ok(Loaded { config, origins, files })
    }

    /// Reads a config without includes from `text`, as [`RunConfig::to_toml`] writes it: relative paths are kept.
    /// `file` is what problems call it.
    pub fn parse(file: &str, text: &str) -> Result<Self, ConfigError> {
        let (file, mut problems) = (Arc::from(file), Vec::new());
        let root = tree::read(&file, text, 0, &mut problems);
        let incomplete = !problems.is_empty();
        finish(&root, &file, problems, incomplete)
    }
}

impl Loaded {
    /// Checks that the local folders of the sources which the run's stages use, of the held-out sets, and the tokenizer
    /// are there.
    ///
    /// Apart from loading, because a run can be planned where its data is not.
    pub fn check_sources(&self) -> Result<(), ConfigError> {
        let data = &self.config.data;
        let used = |name: &String| self.config.stages.iter().any(|stage| stage.mixture.contains_key(name));
        let sources = data.sources.iter().filter(|(name, _)| used(name));
        let sources = sources.map(|(name, source)| (format!("data.sources.{name}.url"), &source.url));
        let eval = &self.config.eval;
        let sets = eval.sets.iter().filter(|_| eval.every_steps > 0);
        let sets = sets.map(|(name, set)| (format!("eval.sets.{name}.url"), &set.url));
        let tokenizer = data.tokenizer.iter().map(|path| ("data.tokenizer".to_owned(), path));
        let problems: Vec<Problem> = sources
            .chain(sets)
            .chain(tokenizer)
            .filter(|(_, location)| local_path(location).is_some_and(|path| !path.exists()))
            .map(|(key, location)| Problem {
                origin: self
                    .origins
                    .get(&key)
                    .cloned()
                    .unwrap_or(Origin::Missing(self.config.name.as_str().into())),
                fact: format!("{key} is {location}, which does not exist"),
                remedy: format!("make it with `anello data`, or set {key} to where it is"),
                key,
            })
            .collect();
        if problems.is_empty() { Ok(()) } else { Err(ConfigError::Invalid { problems }) }
    }
}

/// The path of a location on this machine; absent for a URL of a store elsewhere.
fn local_path(location: &str) -> Option<&Path> {
    match location.split_once("://") {
        Some(("file", path)) => Some(Path::new(path)),
        Some(_) => None,
        None => Some(Path::new(location)),
    }
}

/// Decodes and checks the merged tree, of which `problems` are known already.
///
/// A tree that is `incomplete` is not decoded: what it lacks may stand in the part that could not be read.
fn finish(
    root: &Table,
    name: &Arc<str>,
    mut problems: Vec<Problem>,
    incomplete: bool,
) -> Result<RunConfig, ConfigError> {
    let mut config = None;
    if !incomplete {
        let (decoded, mut found) = decode(root, name);
        for Finding { key, uses, fact, remedy } in check(&decoded) {
            if found.is_bad(&key) || uses.iter().any(|key| found.is_bad(key)) {
                continue;
            }
            let origin = root.origin(&key).cloned().unwrap_or(Origin::Missing(name.clone()));
            found.report(Problem { origin, key, fact, remedy });
        }
        problems.extend(found.into_problems());
        config = Some(decoded);
    }
    match config {
        Some(config) if problems.is_empty() => Ok(config),
        _ => {
            problems.sort_by(|a, b| a.origin.cmp(&b.origin));
            Err(ConfigError::Invalid { problems })
        }
    }
}

/// The layers as they are laid.
#[derive(Default)]
struct Stack {
    root: Table,
    layer: u32,
    files: Vec<String>,
    problems: Vec<Problem>,
    /// A file could not be read as a whole, so that what is missing says nothing.
    incomplete: bool,
    /// What relative paths are relative to outside of files.
    directory: PathBuf,
    /// The files being read, outermost first.
    open: Vec<Name>,
}

/// One thing to read: an embedded text, a file, or what the caller read.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Name {
    Embedded(String),
    File(PathBuf),
    Given { name: String, text: String },
}

impl Name {
    /// What `text` means in a file of `directory`.
    fn of(text: &str, directory: &Path) -> Self {
        match text.split_once(':') {
            Some(("preset" | "recipe", _)) => Self::Embedded(text.to_owned()),
            _ => Self::File(directory.join(text)),
        }
    }

    fn shown(&self) -> String {
        match self {
            Self::Embedded(name) | Self::Given { name, .. } => name.clone(),
            Self::File(path) => path.display().to_string(),
        }
    }
}

impl Stack {
    fn load(&mut self, options: &LoadOptions) -> Result<(), ConfigError> {
        let name = match &options.text {
            Some(text) => Name::Given { name: options.config.clone(), text: text.clone() },
            None if PRESETS.iter().any(|(name, _)| *name == options.config) => {
                Name::Embedded(format!("preset:{}", options.config))
            }
            None => Name::of(&options.config, &options.directory),
        };
        self.directory = options.directory.clone();
        self.file(name, None)?;

        let mut environment: Vec<_> = options.environment.iter().collect();
        environment.sort();
        let environment = environment.into_iter().filter_map(|(variable, value)| {
            let key = variable.strip_prefix(ENVIRONMENT_PREFIX)?.replace("__", ".");
            Some((Origin::Environment(variable.as_str().into()), key, value.as_str()))
        });
        let sets = options.sets.iter().map(|text| {
            let (key, value) = text.split_once('=').unwrap_or_default();
            (Origin::Set(text.as_str().into()), key.to_owned(), value)
        });
        for (origin, key, value) in environment.chain(sets) {
            self.set(&origin, &key, value);
        }
        Ok(())
    }

    /// Lays one override.
    fn set(&mut self, origin: &Origin, key: &str, value: &str) {
        self.layer += 1;
        let (fact, remedy) = match tree::assignment(key, value, origin, self.layer) {
            Some(table) if table.entries.contains_key("include") => (
                "include cannot be set from outside",
                "write it at the top of a file, and load that file".to_owned(),
            ),
            Some(table) => return self.lay(table, &self.directory.clone()),
            None if matches!(origin, Origin::Environment(_)) => {
                ("this names no key", format!("name it as {ENVIRONMENT_PREFIX}stage__stable__lr"))
            }
            None => ("this sets no key", "write key.path=value, as stage.stable.lr=1e-4".to_owned()),
        };
        self.problems.push(Problem {
            origin: origin.clone(),
            key: String::new(),
            fact: fact.to_owned(),
            remedy,
        });
    }

    /// Lays a file over what is there, after all that it includes.
    fn file(&mut self, name: Name, from: Option<&Origin>) -> Result<(), ConfigError> {
        let shown = name.shown();
        let (text, directory, identity) = match &name {
            Name::Embedded(embedded_name) => match embedded(embedded_name) {
                Some(text) => (text.to_owned(), self.directory.clone(), name),
                None => return self.unknown(embedded_name, from),
            },
            Name::Given { text, .. } => (text.clone(), self.directory.clone(), name),
            Name::File(path) => {
                let text = std::fs::read_to_string(path).map_err(|source| unreadable(path, from, source))?;
                let identity = Name::File(path.canonicalize().unwrap_or_else(|_| path.clone()));
                (text, path.parent().unwrap_or(Path::new("")).to_owned(), identity)
            }
        };
        if self.open.contains(&identity) {
            self.incomplete = true;
            let chain: Vec<String> = self.open.iter().map(Name::shown).collect();
            self.problems.push(Problem {
                origin: from.cloned().unwrap_or(Origin::Missing(shown.as_str().into())),
                key: "include".to_owned(),
                fact: format!("{shown} includes itself, by way of {}", chain.join(" → ")),
                remedy: "take one of these includes out".to_owned(),
            });
            return Ok(());
        }

        // The layer's number is known only after what is included has been laid.
        let file: Arc<str> = shown.as_str().into();
        let mut includes = tree::read(&file, &text, 0, &mut Vec::new());
        self.open.push(identity);
        if let Some(include) = includes.entries.remove("include") {
            self.includes(&include, &directory)?;
        }
        self.open.pop();
        self.layer += 1;
        let problems = self.problems.len();
        let mut table = tree::read(&file, &text, self.layer, &mut self.problems);
        self.incomplete |= self.problems.len() > problems;
        table.entries.remove("include");
        self.files.push(shown);
        self.lay(table, &directory);
        Ok(())
    }

    fn includes(&mut self, include: &Entry, directory: &Path) -> Result<(), ConfigError> {
        let items = match &include.node.value {
            Value::List(items) => items.as_slice(),
            _ => std::slice::from_ref(&include.node),
        };
        for item in items {
            let origin = &item.place.origin;
            match &item.value {
                Value::Text(text) => self.file(Name::of(text, directory), Some(origin))?,
                _ => self.problems.push(Problem {
                    origin: origin.clone(),
                    key: "include".to_owned(),
                    fact: format!("include holds {}", item.shown),
                    remedy: "give \"preset:NAME\", \"recipe:NAME\" or the path of a file".to_owned(),
                }),
            }
        }
        Ok(())
    }

    fn unknown(&mut self, name: &str, from: Option<&Origin>) -> Result<(), ConfigError> {
        self.incomplete = true;
        let all = || PRESETS.iter().map(|p| ("preset", p.0)).chain(RECIPES.iter().map(|r| ("recipe", r.0)));
        let names: Vec<String> = all().map(|(kind, name)| format!("{kind}:{name}")).collect();
        let remedy = match closest(name, names.iter().map(String::as_str)) {
            Some(close) => format!("did you mean `{close}`?"),
            None => format!("there are {}", names.join(", ")),
        };
        self.problems.push(Problem {
            origin: from.cloned().unwrap_or(Origin::Missing(name.into())),
            key: "include".to_owned(),
            fact: format!("there is no {name}"),
            remedy,
        });
        Ok(())
    }

    fn lay(&mut self, mut table: Table, directory: &Path) {
        anchor(&mut table, directory);
        self.root.lay(table);
    }
}

/// Makes the relative paths in a layer relative to where the layer stands.
fn anchor(table: &mut Table, directory: &Path) {
    if let Some(Entry { node: Node { value: Value::Table(init), .. }, .. }) = table.entries.get_mut("init")
        && let Some(from) = init.entries.get_mut("from")
    {
        anchor_path(&mut from.node, directory);
    }
    if let Some(Entry { node: Node { value: Value::Table(eval), .. }, .. }) = table.entries.get_mut("eval") {
        anchor_urls(eval, "sets", directory);
    }
    let Some(Entry { node: Node { value: Value::Table(data), .. }, .. }) = table.entries.get_mut("data")
    else {
        return;
    };
    for key in ["tokenizer", "cache_dir"] {
        if let Some(path) = data.entries.get_mut(key) {
            anchor_path(&mut path.node, directory);
        }
    }
    anchor_urls(data, "sources", directory);
}

/// The `url` of each table in the table `key`.
fn anchor_urls(table: &mut Table, key: &str, directory: &Path) {
    let Some(Entry { node: Node { value: Value::Table(sources), .. }, .. }) = table.entries.get_mut(key)
    else {
        return;
    };
    for source in sources.entries.values_mut() {
        if let Value::Table(source) = &mut source.node.value
            && let Some(url) = source.entries.get_mut("url")
        {
            anchor_path(&mut url.node, directory);
        }
    }
}

fn anchor_path(node: &mut Node, directory: &Path) {
    if let Value::Text(text) = &mut node.value
        && !text.contains("://")
        && !text.is_empty()
        && text != "none"
        && let Some(joined) = directory.join(&*text).to_str()
    {
        *text = joined.to_owned();
    }
}

fn unreadable(path: &Path, from: Option<&Origin>, source: std::io::Error) -> ConfigError {
    let presets: Vec<&str> = presets().collect();
    // A path that names no file may be a preset's name with a slip, made absolute by now.
    let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    let remedy = match closest(&name, presets.iter().copied()) {
        Some(close) if from.is_none() => format!("did you mean the preset `{close}`?"),
        _ => format!("give the path of a TOML file, or one of the presets {}", presets.join(", ")),
    };
    let from = from.map(|origin| format!(" (included at {origin})")).unwrap_or_default();
    ConfigError::Unreadable { path: path.to_owned(), from, remedy, source }
}
