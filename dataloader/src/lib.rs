//! Tokenized Parquet in, packed token batches out. Knows nothing of models or rings.
//!
//! ```text
//! pure     order   which document, when             shells   dataset   a folder of shards: footers, row groups
//!          pack    documents to sequences                    index     what the shards hold, stored beside them
//!          decode  a row group's bytes to documents          loader    threads that prefetch lane steps
//!          lane    one lane's walk                           cache     what was fetched of remote shards
//!          in_order  a set from its beginning, to measure on
//! ```
//! A [`Loader`] yields what each lane trains on in each step. It is a function of (seed, sources, plan, lane, cursor)
//! alone: which lanes are served together, how many threads there are and what was prefetched changes nothing.

mod cache;
mod dataset;
mod decode;
mod error;
mod in_order;
mod index;
mod inspect;
mod lane;
mod loader;
mod mano;
mod order;
mod pack;
mod progress;
mod text;
mod tokenize;
mod train;
mod verify;
mod write;

pub use anello_store::{Cursor, OpenDocument, SourceCursor};
pub use cache::Cache;
pub use dataset::Dataset;
pub use decode::{Document, Documents};
pub use error::{Error, Result};
pub use in_order::InOrder;
pub use index::{INDEX_FILE, Index, RowGroupEntry, ShardEntry, tokenizer_digest};
pub use inspect::{Inspection, Sample, inspect};
pub use lane::{LaneStep, SkippedRowGroup, StepData};
pub use loader::{Loader, LoaderOptions, Plan, plan_of};
pub use mano::{MODULUS, ManoDocument, ManoOptions, mano_token, mano_vocab, read_mano, synth_mano};
pub use order::{Draws, Order, Slot, SourceShape};
pub use pack::{MicroBatch, Packer};
pub use progress::{OnProgress, Progress};
pub use text::TextInputs;
pub use tokenize::{TokenizeOptions, TokenizeReport, tokenize};
pub use train::{SPECIAL_TOKENS, TrainOptions, TrainReport, VOCAB_MIN, train_tokenizer};
pub use verify::{Verification, verify};
pub use write::{Shard, ShardFormat, ShardWriter};
