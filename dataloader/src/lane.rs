//! One lane's walk through its order. Pure but for the row groups it is handed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use anello_configs::random::Permutation;
use anello_configs::{Mask, OnCorrupt};
use anello_store::{Cursor, OpenDocument, SourceCursor};

use crate::decode::Documents;
use crate::order::{Draws, Order};
use crate::pack::{MicroBatch, Packer};
use crate::{Error, Result};

/// What the data of a step depends on: its row of the recipe, for one lane.
#[derive(Clone, Debug, PartialEq)]
pub struct StepData {
    /// Index of the stage.
    pub stage: u32,
    /// Sequence length (S).
    pub sequence: u32,
    /// Sequences of a micro-batch (B).
    pub micro_batch: u32,
    /// Micro-batches that each lane takes in this step.
    pub micro_batches: u32,
    /// Which tokens a token attends to.
    pub mask: Mask,
    /// Weight of each source, by tokens; any positive scale. Sources that are not named have none.
    pub mixture: Arc<BTreeMap<String, f64>>,
}

/// One lane's share of one step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaneStep {
    /// The step.
    pub step: u64,
    /// The lane.
    pub lane: u32,
    /// In the order in which they are trained on.
    pub micro_batches: Vec<MicroBatch>,
    /// Where the lane is after them.
    pub cursor: Cursor,
    /// Tokens that each source gave.
    pub tokens_by_source: BTreeMap<String, u64>,
    /// Times that each source was gone through before the row group that this lane is in now.
    pub epochs_by_source: BTreeMap<String, u64>,
    /// Row groups left out on the way, with the reason (`on_corrupt = "skip"` only).
    pub skipped_row_groups: Vec<SkippedRowGroup>,
}

/// A row group that was left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SkippedRowGroup {
    /// Its source.
    pub source: String,
    /// Its number in the source.
    pub row_group: u64,
    /// What is wrong with it.
    pub reason: String,
}

/// Hands out the row group with this number of this source.
pub(crate) trait Fetch {
    fn fetch(&mut self, source: usize, row_group: u64) -> Result<Arc<Documents>>;
}

fn unfit(lane: u32, source: &str) -> Error {
    Error::Options(format!(
        "the cursor of lane {lane} does not fit the documents of source {source}; resume with the data that the run began with"
    ))
}

/// A lane at a place.
pub(crate) struct Lane {
    order: Arc<Order>,
    lane: u32,
    on_corrupt: OnCorrupt,
    stage: u32,
    position: u64,
    draws: Option<(StepData, Draws)>,
    open: Option<Open>,
    sources: Vec<Place>,
}

/// A document that was begun: the last one drawn from its source.
struct Open {
    source: usize,
    token: usize,
}

/// A lane's place in a source.
#[derive(Default)]
struct Place {
    cursor: SourceCursor,
    touched: bool,
    current: Option<Current>,
    corrupt: BTreeSet<u64>,
}

/// A row group in memory.
struct Current {
    documents: Arc<Documents>,
    order: Permutation,
}

impl Lane {
    /// The lane at `cursor`. Errors: a cursor that names a source that is not there.
    pub(crate) fn new(order: Arc<Order>, lane: u32, on_corrupt: OnCorrupt, cursor: &Cursor) -> Result<Self> {
        let find = |name: &str| {
            order.sources().iter().position(|s| s.name == name).ok_or_else(|| {
                Error::Options(format!(
                    "the cursor of lane {lane} is in source {name}, which the run does not have; keep the sources of a run, also those that no later stage uses"
                ))
            })
        };
        let mut sources: Vec<Place> = order.sources().iter().map(|_| Place::default()).collect();
        for (name, cursor) in &cursor.sources {
            let place = &mut sources[find(name)?];
            (place.cursor, place.touched) = (*cursor, true);
        }
        let open = match &cursor.open {
            Some(open) => {
                let source = find(&open.source)?;
                if sources[source].cursor.documents == 0 {
                    return Err(unfit(lane, &open.source));
                }
                Some(Open { source, token: open.token as usize })
            }
            None => None,
        };
        Ok(Self {
            stage: cursor.stage,
            position: cursor.draws,
            order,
            lane,
            on_corrupt,
            draws: None,
            open,
            sources,
        })
    }

    /// The lane's share of `step`.
    pub(crate) fn step(&mut self, step: u64, data: &StepData, fetch: &mut dyn Fetch) -> Result<LaneStep> {
        self.enter(data)?;
        let mut skipped = Vec::new();
        let mut tokens = vec![0u64; self.sources.len()];
        let mut micro_batches = Vec::with_capacity(data.micro_batches as usize);
        for _ in 0..data.micro_batches {
            let mut packer = Packer::new(data.micro_batch, data.sequence, data.mask);
            while packer.room() > 0 {
                self.fill(&mut packer, &mut tokens, fetch, &mut skipped)?;
            }
            micro_batches.push(packer.finish());
        }
        let named = |source: usize| self.order.sources()[source].name.clone();
        let epochs = self.sources.iter().enumerate().filter(|(_, place)| place.touched);
        Ok(LaneStep {
            step,
            lane: self.lane,
            micro_batches,
            cursor: self.cursor(),
            tokens_by_source: tokens
                .iter()
                .enumerate()
                .filter(|(_, n)| **n > 0)
                .map(|(s, n)| (named(s), *n))
                .collect(),
            epochs_by_source: epochs
                .map(|(s, place)| (named(s), self.order.slot(s, self.lane, place.cursor.row_groups).epoch))
                .collect(),
            skipped_row_groups: skipped,
        })
    }

    /// The integers from which [`Lane::new`] makes this lane again.
    pub(crate) fn cursor(&self) -> Cursor {
        let names = self.order.sources();
        Cursor {
            stage: self.stage,
            draws: self.position,
            sources: self
                .sources
                .iter()
                .zip(names)
                .filter(|(place, _)| place.touched)
                .map(|(place, shape)| (shape.name.clone(), place.cursor))
                .collect(),
            open: self.open.as_ref().map(|open| OpenDocument {
                source: names[open.source].name.clone(),
                token: open.token as u64,
            }),
        }
    }

    /// Makes the draws those of the step's stage and mixture.
    fn enter(&mut self, data: &StepData) -> Result<()> {
        let same = |known: &StepData| {
            known.stage == data.stage
                && (Arc::ptr_eq(&known.mixture, &data.mixture) || known.mixture == data.mixture)
        };
        if self.draws.as_ref().is_some_and(|(known, _)| same(known)) {
            return Ok(());
        }
        let names = self.order.sources();
        if let Some(name) = data.mixture.keys().find(|name| !names.iter().any(|s| s.name == **name)) {
            return Err(Error::Options(format!(
                "stage {} draws from {name}, which is not among the sources; add it to [data.sources]",
                data.stage
            )));
        }
        let weights: Vec<f64> =
            names.iter().map(|s| data.mixture.get(&s.name).copied().unwrap_or(0.0)).collect();
        if !weights.iter().any(|w| *w > 0.0) || weights.iter().any(|w| !w.is_finite() || *w < 0.0) {
            return Err(Error::Options(format!(
                "the mixture of stage {} needs weights of at least 0, one of them above 0",
                data.stage
            )));
        }
        let draws = self.order.draws(data.stage, self.lane, &weights);
        if data.stage != self.stage {
            (self.stage, self.position) = (data.stage, 0);
            // The rest of a document goes into the next stage only if that stage wants its source at all.
            self.open = self.open.take().filter(|open| draws.includes(open.source));
        }
        self.draws = Some((data.clone(), draws));
        Ok(())
    }

    /// One segment: the rest of the open document, or of a new one.
    fn fill(
        &mut self,
        packer: &mut Packer,
        tokens: &mut [u64],
        fetch: &mut dyn Fetch,
        skipped: &mut Vec<SkippedRowGroup>,
    ) -> Result<()> {
        let (source, from) = match self.open.take() {
            Some(open) => {
                if self.load(open.source, fetch, skipped)? {
                    (open.source, open.token)
                } else {
                    // The row group that held it cannot be read any more and is skipped: draw another one.
                    return Ok(());
                }
            }
            None => {
                let (_, draws) = self.draws.as_ref().expect("a stage is entered before documents are drawn");
                let source = draws.at(self.position);
                self.position += 1;
                self.next_document(source, fetch, skipped)?;
                (source, 0)
            }
        };
        let place = &self.sources[source];
        let current = place.current.as_ref().expect("the row group of a drawn document is in memory");
        let document = current.documents.at(current.order.at(place.cursor.documents - 1) as usize);
        let from = from.min(document.tokens.len());
        let took = packer.push(document, from);
        tokens[source] += took as u64;
        if from + took < document.tokens.len() {
            self.open = Some(Open { source, token: from + took });
        }
        Ok(())
    }

    /// Moves on to the next document of `source`, over row groups that are used up or skipped.
    fn next_document(
        &mut self,
        source: usize,
        fetch: &mut dyn Fetch,
        skipped: &mut Vec<SkippedRowGroup>,
    ) -> Result<()> {
        self.sources[source].touched = true;
        loop {
            if self.load(source, fetch, skipped)? {
                let place = &mut self.sources[source];
                let rows = place.current.as_ref().map_or(0, |current| current.documents.len() as u64);
                if place.cursor.documents < rows {
                    place.cursor.documents += 1;
                    return Ok(());
                }
                Self::leave(place);
            }
        }
    }

    /// Brings the current row group of `source` into memory; `false` if it was skipped instead.
    fn load(
        &mut self,
        source: usize,
        fetch: &mut dyn Fetch,
        skipped: &mut Vec<SkippedRowGroup>,
    ) -> Result<bool> {
        let place = &mut self.sources[source];
        if place.current.is_some() {
            return Ok(true);
        }
        let slot = self.order.slot(source, self.lane, place.cursor.row_groups);
        match fetch.fetch(source, slot.row_group) {
            Ok(documents) => {
                let rows = documents.len() as u64;
                if place.cursor.documents > rows {
                    return Err(unfit(self.lane, &self.order.sources()[source].name));
                }
                let order = self.order.documents(source, slot, rows);
                place.current = Some(Current { documents, order });
                Ok(true)
            }
            Err(error) if self.on_corrupt == OnCorrupt::Skip && error.is_corrupt() => {
                let shape = &self.order.sources()[source];
                let (name, reason) = (shape.name.clone(), error.to_string());
                tracing::warn!(
                    source = name,
                    lane = self.lane,
                    row_group = slot.row_group,
                    reason,
                    "row group skipped"
                );
                place.corrupt.insert(slot.row_group);
                if place.corrupt.len() as u64 == shape.row_groups {
                    return Err(Error::NothingLeft { source_name: name });
                }
                skipped.push(SkippedRowGroup { source: name, row_group: slot.row_group, reason });
                Self::leave(place);
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    fn leave(place: &mut Place) {
        place.current = None;
        place.cursor = SourceCursor { row_groups: place.cursor.row_groups + 1, documents: 0 };
    }
}

#[cfg(test)]
mod tests;
