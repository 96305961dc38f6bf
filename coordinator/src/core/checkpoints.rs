//! Which checkpoints are complete: a manifest is committed once all blocks are written, by whomever.
//!
//! A block is written by its owner in the generation that took the copy, and, when that one is gone, by the member that
//! kept a second copy. So what counts is which blocks are there, not who has reported.

use std::collections::{BTreeMap, BTreeSet};

use anello_proto::ring::{Generation, Step, WorkerId, Written};

use super::Effect;

/// Checkpoints under way at a time. A worker writes one at a time; more wait only while somebody is away.
const PENDING_MAX: usize = 16;

/// Commit of checkpoints, for one job.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Checkpoints {
    committed: BTreeSet<Step>,
    distrusted: BTreeSet<Step>,
    pending: BTreeMap<(Step, Generation), Pending>,
    #[cfg(test)]
    pub(super) early: bool,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Pending {
    written: BTreeMap<WorkerId, Written>,
    /// Its manifest is being written.
    committing: bool,
}

impl Pending {
    /// Whether all blocks are written, and all writers tell of the same state.
    fn is_complete(&self) -> bool {
        let Some(first) = self.written.values().next() else { return false };
        let agreed = |other: &Written| (&other.facts, other.all_blocks) == (&first.facts, first.all_blocks);
        if !self.written.values().all(agreed) {
            return false;
        }
        let mut ranges: Vec<_> = self.written.values().flat_map(|written| written.blocks.iter()).collect();
        ranges.sort_unstable_by_key(|range| range.start);
        let reach = |have: u64, range: &&std::ops::Range<u64>| {
            if range.start <= have { have.max(range.end) } else { have }
        };
        ranges.iter().fold(0, reach) >= first.all_blocks
    }
}

impl Checkpoints {
    pub fn new(committed: impl IntoIterator<Item = Step>) -> Self {
        Self { committed: committed.into_iter().collect(), ..Self::default() }
    }

    /// The newest that is committed and was not found unreadable.
    pub fn newest(&self) -> Option<Step> {
        self.committed.last().copied()
    }

    /// Whether the one at `step` is committed.
    pub fn has(&self, step: Step) -> bool {
        self.committed.contains(&step)
    }

    /// Whether there were some, and none can be read.
    pub fn all_distrusted(&self) -> bool {
        self.committed.is_empty() && !self.distrusted.is_empty()
    }

    /// One exists, whoever committed it.
    pub fn exists(&mut self, step: Step) {
        if !self.distrusted.contains(&step) {
            self.committed.insert(step);
        }
    }

    /// A checkpoint cannot be read: it is set aside, and may be written again.
    pub fn distrust(&mut self, step: Step) {
        self.committed.remove(&step);
        self.distrusted.insert(step);
    }

    /// A worker says what it wrote. Returns the commit when nothing was missing but that.
    pub fn written(&mut self, worker: WorkerId, written: &Written) -> Option<Effect> {
        let Written { step, generation, .. } = *written;
        if self.committed.contains(&step) {
            return None;
        }
        let pending = self.pending.entry((step, generation)).or_default();
        pending.written.insert(worker, written.clone());
        let complete = pending.is_complete();
        #[cfg(test)]
        let complete = complete || self.early;
        // Two generations may have copied the same state: one manifest is enough.
        let busy = self.pending.iter().any(|((other, _), pending)| *other == step && pending.committing);
        let pending = self.pending.get_mut(&(step, generation)).expect("just inserted");
        let commit = complete && !busy;
        pending.committing |= commit;
        let parts = commit.then(|| pending.written.values().cloned().collect());
        while self.pending.len() > PENDING_MAX {
            self.pending.pop_first();
        }
        parts.map(|parts| Effect::Commit { step, generation, parts })
    }

    pub fn committed(&mut self, step: Step) {
        self.committed.insert(step);
        self.distrusted.remove(&step);
        self.pending.retain(|(other, _), _| *other != step);
    }

    /// The manifest of a step could not be written: its parts are said again with the next words, and tried again.
    pub fn failed(&mut self, step: Step) {
        self.pending.retain(|(other, _), _| *other != step);
    }

    /// Whether all parts of the checkpoint at `step` are there, so that its manifest is on its way.
    pub fn is_complete(&self, step: Step) -> bool {
        self.pending.iter().any(|((of, _), pending)| *of == step && pending.is_complete())
    }
}
