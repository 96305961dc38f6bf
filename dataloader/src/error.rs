use std::path::PathBuf;

/// Why data could not be read or made.
///
/// [`Error::is_corrupt`] tells what `on_corrupt = "skip"` may leave out; everything else stops the loader, because
/// going on would make the run depend on the machine (a disk, a network) instead of on the data.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No store serves the place, or an object there could not be listed, read or written.
    #[error(transparent)]
    Store(#[from] anello_store::Error),
    /// A local file could not be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// The path.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Bytes that are not what was written there.
    #[error(
        "{file}: row group {row_group} at byte {offset} is corrupt: {detail}; restore the file, or set on_corrupt = \"skip\" to go on without it"
    )]
    Corrupt {
        /// URL of the shard.
        file: String,
        /// Row group in the shard.
        row_group: usize,
        /// Where the row group's first column of tokens begins in the file.
        offset: u64,
        /// What was found.
        detail: String,
    },
    /// A row that reads well and cannot be trained on.
    #[error("{file}: row group {row_group}, row {row}: {detail}")]
    Row {
        /// URL of the shard.
        file: String,
        /// Row group in the shard.
        row_group: usize,
        /// Row in the row group.
        row: usize,
        /// Fact and remedy.
        detail: String,
    },
    /// A file whose footer or columns are not those of a token shard.
    #[error("{file}: {detail}")]
    Shard {
        /// URL of the shard.
        file: String,
        /// Fact and remedy.
        detail: String,
    },
    /// A folder without tokens, or whose `index.json` tells of other files than it holds.
    #[error("{url}: {detail}")]
    Index {
        /// URL of the folder.
        url: String,
        /// Fact and remedy.
        detail: String,
    },
    /// A source that has no row group left that can be read.
    #[error(
        "source {source_name}: every row group is corrupt; restore the files, or take it out of the mixture"
    )]
    NothingLeft {
        /// Name of the source.
        source_name: String,
    },
    /// Options, a plan or cursors that do not fit together.
    #[error("{0}")]
    Options(String),
    /// Text, a tokenizer or a manifest that the tools cannot use.
    #[error("{place}: {detail}")]
    Tool {
        /// File or folder.
        place: String,
        /// Fact and remedy.
        detail: String,
    },
    /// The caller asked to stop; what is finished stays and is taken up again.
    #[error("stopped; run the same command again to go on")]
    Stopped,
}

impl Error {
    /// Whether the data itself is at fault, the same on every machine: what `on_corrupt = "skip"` leaves out.
    pub fn is_corrupt(&self) -> bool {
        matches!(self, Self::Corrupt { .. } | Self::Row { .. } | Self::Shard { .. })
    }

    pub(crate) fn file(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { path, source }
    }

    pub(crate) fn tool(place: impl ToString, detail: impl ToString) -> Self {
        Self::Tool { place: place.to_string(), detail: detail.to_string() }
    }
}

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
