//! A lane's place in its data, as a checkpoint keeps it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Where a lane is in the data: a few integers, from which it goes on at the cost of one row group a source.
///
/// Places in the sources carry on from stage to stage (no token comes twice before its source's epoch ends); the
/// draws of sources start anew with each stage. The default is the beginning of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Index of the stage that `draws` counts in.
    pub stage: u32,
    /// Documents drawn in that stage.
    pub draws: u64,
    /// Place in each source that was drawn from so far, by name.
    pub sources: BTreeMap<String, SourceCursor>,
    /// The document that the last sequence cut, if any.
    pub open: Option<OpenDocument>,
}

/// A lane's place in one source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceCursor {
    /// Row groups that this lane is done with: the number of its current one.
    pub row_groups: u64,
    /// Documents drawn of the current row group.
    pub documents: u64,
}

/// A document that goes on in the next sequence: the last one drawn from `source`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenDocument {
    /// Its source.
    pub source: String,
    /// Tokens of it that were used.
    pub token: u64,
}
