//! Which checkpoints are complete: a manifest is committed once all blocks are written, by whomever.
//!
//! A block is written by its owner in the generation that took the copy, and, when that one is gone, by the member that
//! kept a second copy, which is asked to. So what counts is which blocks are there, not who has reported.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use anello_proto::ring::{Generation, Step, WorkerId, Written};

use super::{Effect, Millis};

/// Checkpoints under way at a time. A worker writes one at a time; more wait only while somebody is away.
const PENDING_MAX: usize = 16;
/// Attempts at a manifest before the parts are taken for unusable.
const ATTEMPTS_MAX: u32 = 10;

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
    /// Times that it could not be, and when that is tried again.
    failures: u32,
    again_at: Option<Millis>,
}

impl Pending {
    /// Whether all blocks are written, and all writers tell of the same state.
    fn is_complete(&self) -> bool {
        let Some(first) = self.written.values().next() else { return false };
        let agreed = |other: &Written| (&other.facts, other.all_blocks) == (&first.facts, first.all_blocks);
        self.written.values().all(agreed) && self.has(&(0..first.all_blocks))
    }

    /// Whether these blocks are written.
    fn has(&self, blocks: &Range<u64>) -> bool {
        let mut ranges: Vec<_> = self.written.values().flat_map(|written| written.blocks.iter()).collect();
        ranges.sort_unstable_by_key(|range| range.start);
        let reach = |have: u64, range: &&Range<u64>| {
            if range.start <= have { have.max(range.end) } else { have }
        };
        ranges.iter().fold(blocks.start, reach) >= blocks.end
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
        let commit = complete && !busy && pending.again_at.is_none();
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
        self.withdraw(step);
    }

    /// The manifest of a step could not be written: it is tried again from `again_at` on, some times.
    pub fn failed(&mut self, step: Step, again_at: Millis) {
        for ((of, _), pending) in &mut self.pending {
            if *of == step && std::mem::take(&mut pending.committing) {
                pending.failures += 1;
                pending.again_at = Some(again_at);
            }
        }
        self.pending.retain(|_, pending| pending.failures < ATTEMPTS_MAX);
    }

    /// The checkpoint of a step is not to be, unless its parts are written anew.
    pub fn withdraw(&mut self, step: Step) {
        self.pending.retain(|(other, _), _| *other != step);
    }

    /// When the next attempt is due at a manifest that could not be written.
    pub fn again_at(&self) -> Option<Millis> {
        self.pending.values().filter_map(|pending| pending.again_at).min()
    }

    /// The attempts that are due at `now`.
    pub fn try_again(&mut self, now: Millis, out: &mut Vec<Effect>) {
        for ((step, generation), pending) in &mut self.pending {
            if pending.again_at.take_if(|at| *at <= now).is_some() {
                pending.committing = true;
                let parts = pending.written.values().cloned().collect();
                out.push(Effect::Commit { step: *step, generation: *generation, parts });
            }
        }
    }

    /// Checkpoints of which some parts are written and which are not committed.
    pub fn unfinished(&self) -> impl Iterator<Item = Step> {
        self.pending.keys().map(|(step, _)| *step)
    }

    /// Whether some of these blocks, as `generation` copied them, are what the checkpoint of `step` still lacks.
    pub fn lacks(&self, step: Step, generation: Generation, blocks: &Range<u64>) -> bool {
        !self.has(step)
            && !self.is_complete(step)
            && self.pending.get(&(step, generation)).is_some_and(|pending| !pending.has(blocks))
    }

    /// Whether all parts of one at `step` or later are there.
    pub fn is_complete_from(&self, step: Step) -> bool {
        self.pending.iter().any(|((of, _), pending)| *of >= step && pending.is_complete())
    }

    /// Whether all parts of the checkpoint at `step` are there, so that its manifest is on its way.
    pub fn is_complete(&self, step: Step) -> bool {
        self.pending.iter().any(|((of, _), pending)| *of == step && pending.is_complete())
    }
}
