//! Which document, when: a pure function of (seed, lanes, what the sources hold).
//!
//! ```text
//! a lane's n-th row group of a source      slot g = n * lanes + lane
//!                                          epoch  = g / R,  row group = permutation(source, epoch)[g mod R]
//! its d-th document of that row group      permutation(source, epoch, row group)[d]
//! the source of a lane's k-th document     a draw at position k of stream(stage, lane),
//! of a stage                               P(source) ~ weight / mean document length
//! ```
//!
//! Over all lanes every slot is taken once, so a row group is read once an epoch and by one lane. The shuffle window
//! of documents is a row group, which is what lets a lane be set to any place at the cost of one row group a source.
//! Dividing the weight by the mean length makes the shares of *tokens* equal the weights in expectation.

use anello_configs::random::{Permutation, Stream};

/// What a source holds, as far as the order depends on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceShape {
    /// Its name in the run config: part of what seeds its permutations.
    pub name: String,
    /// Row groups with documents (R), at least 1.
    pub row_groups: u64,
    /// Documents.
    pub rows: u64,
    /// Tokens.
    pub tokens: u64,
}

/// The order of everything under one seed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    seed: u64,
    lanes: u32,
    sources: Vec<SourceShape>,
}

/// A place in a source's endless sequence of row groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Times that the source was gone through before.
    pub epoch: u64,
    /// Row group, counted over the source.
    pub row_group: u64,
}

impl Order {
    /// Sources in the order of their names. Panics unless `lanes` and every source's row groups are at least 1.
    pub fn new(seed: u64, lanes: u32, sources: Vec<SourceShape>) -> Self {
        assert!(lanes > 0 && sources.iter().all(|s| s.row_groups > 0), "lanes and row groups are at least 1");
        Self { seed, lanes, sources }
    }

    /// The sources, as given.
    pub fn sources(&self) -> &[SourceShape] {
        &self.sources
    }

    /// The `n`-th row group that `lane` takes of a source.
    pub fn slot(&self, source: usize, lane: u32, n: u64) -> Slot {
        let shape = &self.sources[source];
        let global = n * u64::from(self.lanes) + u64::from(lane);
        let (epoch, at) = (global / shape.row_groups, global % shape.row_groups);
        let stream = Stream::new(self.seed, &format!("data/row-groups/{}", shape.name), &[epoch]);
        Slot { epoch, row_group: Permutation::new(stream, shape.row_groups).at(at) }
    }

    /// The order of the `rows` documents of the row group in `slot`.
    pub fn documents(&self, source: usize, slot: Slot, rows: u64) -> Permutation {
        let purpose = format!("data/documents/{}", self.sources[source].name);
        Permutation::new(Stream::new(self.seed, &purpose, &[slot.epoch, slot.row_group]), rows)
    }

    /// The draws of a stage for a lane; `weights` is a weight for each source, 0 = not in the mixture.
    ///
    /// Panics unless there is one weight a source and a positive one among them.
    pub fn draws(&self, stage: u32, lane: u32, weights: &[f64]) -> Draws {
        assert_eq!(weights.len(), self.sources.len(), "one weight a source");
        let mut sum = 0.0;
        let mut cumulative = Vec::new();
        for (source, (shape, weight)) in self.sources.iter().zip(weights).enumerate() {
            if *weight > 0.0 {
                sum += weight * shape.rows as f64 / shape.tokens.max(1) as f64;
                cumulative.push((sum, source));
            }
        }
        assert!(!cumulative.is_empty(), "a mixture has a source with a positive weight");
        let stream = Stream::new(self.seed, "data/draws", &[u64::from(stage), u64::from(lane)]);
        Draws { stream, cumulative }
    }
}

/// The sources of a lane's documents in one stage.
#[derive(Clone, Debug, PartialEq)]
pub struct Draws {
    stream: Stream,
    /// (sum of the chances up to here, source).
    cumulative: Vec<(f64, usize)>,
}

impl Draws {
    /// Source of the document at `position`.
    pub fn at(&self, position: u64) -> usize {
        let (total, last) = *self.cumulative.last().expect("a mixture has a source");
        if self.cumulative.len() == 1 {
            return last;
        }
        let point = self.stream.unit_at(position) * total;
        self.cumulative.iter().find(|(sum, _)| point < *sum).map_or(last, |(_, source)| *source)
    }

    /// Whether `source` is in the mixture.
    pub fn includes(&self, source: usize) -> bool {
        self.cumulative.iter().any(|(_, s)| *s == source)
    }
}

#[cfg(test)]
mod tests;
