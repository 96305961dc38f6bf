//! Which checkpoints are complete: a manifest is committed once every writer of its generation has written its parts.

use std::collections::{BTreeMap, BTreeSet};

use anello_proto::ring::{Formation, Generation, Step, WorkerId, Written};

use super::Effect;

/// Generations whose writers are remembered. A checkpoint is written within the time of a few generations or not at
/// all: the next one that is due replaces it.
const GENERATIONS_KEPT: usize = 8;

/// Checkpoints under way at a time: a worker writes one at a time and may have one waiting.
const PENDING_MAX: usize = 4;

/// Commit of checkpoints, for one job.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Checkpoints {
    committed: BTreeSet<Step>,
    distrusted: BTreeSet<Step>,
    /// Members of recent generations, in rank order.
    writers: BTreeMap<Generation, Vec<WorkerId>>,
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

impl Checkpoints {
    pub fn new(committed: impl IntoIterator<Item = Step>) -> Self {
        Self { committed: committed.into_iter().collect(), ..Self::default() }
    }

    /// The newest that is committed and was not found unreadable.
    pub fn newest(&self) -> Option<Step> {
        self.committed.last().copied()
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

    /// A generation is formed: its members write its checkpoints.
    pub fn expect(&mut self, formation: &Formation) {
        let members = formation.members.iter().map(|member| member.worker).collect();
        self.writers.insert(formation.generation, members);
        while self.writers.len() > GENERATIONS_KEPT {
            self.writers.pop_first();
        }
    }

    /// A worker says what it wrote. Returns the commit when that was the last part.
    pub fn written(&mut self, worker: WorkerId, written: &Written) -> Option<Effect> {
        let Written { step, generation, .. } = *written;
        let writers = self.writers.get(&generation)?;
        if !writers.contains(&worker) || self.committed.contains(&step) {
            return None;
        }
        let pending = self.pending.entry((step, generation)).or_default();
        pending.written.insert(worker, written.clone());
        let complete = writers.iter().all(|writer| pending.written.contains_key(writer));
        #[cfg(test)]
        let complete = complete || self.early;
        let first = &pending.written.first_key_value().expect("just inserted").1.facts;
        let agreed = pending.written.values().all(|other| other.facts == *first);
        let commit = complete && agreed && !pending.committing;
        pending.committing |= commit;
        let parts = commit
            .then(|| writers.iter().filter_map(|writer| pending.written.get(writer).cloned()).collect());
        while self.pending.len() > PENDING_MAX {
            self.pending.pop_first();
        }
        parts.map(|parts| Effect::Commit { step, generation, parts })
    }

    pub fn committed(&mut self, step: Step) {
        self.committed.insert(step);
        self.distrusted.remove(&step);
        self.pending.retain(|(other, _), _| *other > step);
    }

    /// The manifest of a step could not be written: its parts may be said again, and are then tried again.
    pub fn failed(&mut self, step: Step) {
        self.pending.retain(|(other, _), _| *other != step);
    }

    /// Whether all parts of the checkpoint at `step` are there, so that its manifest is on its way.
    pub fn is_complete(&self, step: Step) -> bool {
        self.pending.iter().filter(|((of, _), _)| *of == step).any(|((_, generation), pending)| {
            self.writers.get(generation).is_some_and(|writers| writers.len() == pending.written.len())
        })
    }
}
