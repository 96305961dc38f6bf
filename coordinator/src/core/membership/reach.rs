//! Workers that the coordinator hears and that do not reach one another: a dropped route, a firewall, a broken switch.
//!
//! No time-out of theirs is a death: both are well, and a ring that has both cannot train. One of the two is left out for a
//! while, then tried again; each time that they turn out to be apart still, the while is twice as long.
//!
//! Whoever leaves a ring names all members that it does not reach, and what all say of a generation is decided at once: where a
//! network is cut in two, the smaller half is left out of the next generation, and of no later one.

use super::*;

/// How long one of two is left out the first time, and at most: in leases.
const LEASES: (u64, u32) = (4, 4);

/// What is between two workers.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Rift {
    /// They are not both in a ring before.
    until: Millis,
    /// Rings that it has broken.
    times: u32,
    /// What was seen of it.
    reason: String,
}

/// Two workers, the lower id first.
pub(super) type Pair = (WorkerId, WorkerId);

/// A worker that is left out: with whom it is apart, and until when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LeftOut {
    pub from: WorkerId,
    pub until: Millis,
}

impl Membership {
    /// After a generation's end: which members did not reach which. Who is left out for it is told.
    pub(super) fn note_rifts(&mut self, formation: &Formation, out: &mut Vec<Effect>) {
        let members: BTreeSet<WorkerId> = formation.members.iter().map(|member| member.worker).collect();
        let mut apart: BTreeMap<Pair, String> = BTreeMap::new();
        for (&id, worker) in &self.workers {
            let Activity::Holding { generation, cause: Cause::Unreachable { peers, reason } } =
                &worker.stance.activity
            else {
                continue;
            };
            if *generation != formation.generation || !members.contains(&id) {
                continue;
            }
            // One that is gone is dead, not apart.
            for peer in peers.iter().filter(|peer| **peer != id && members.contains(peer)) {
                if self.workers.contains_key(peer) {
                    apart.entry((id.min(*peer), id.max(*peer))).or_insert_with(|| reason.clone());
                }
            }
        }
        if apart.is_empty() {
            return;
        }
        let before = self.left_out();
        for (pair, reason) in apart {
            let times = self.rifts.get(&pair).map_or(0, |rift| rift.times);
            let leases = LEASES.0 << times.min(LEASES.1);
            let until = self.now + Millis(self.options.lease.0.saturating_mul(leases));
            self.rifts.insert(pair, Rift { until, times: times + 1, reason });
        }
        for (id, LeftOut { from, until }) in self.left_out() {
            if before.get(&id).is_some_and(|before| before.from == from && before.until == until) {
                continue;
            }
            let (Some(worker), Some(rift)) =
                (self.workers.get(&id), self.rifts.get(&(id.min(from), id.max(from))))
            else {
                continue;
            };
            out.push(Effect::Record(Entry::LeftOut {
                worker: id,
                machine: worker.machine.clone(),
                from,
                step: worker.stance.holds,
                rest: until.since(self.now),
                reason: rift.reason.clone(),
            }));
        }
    }

    /// Who is left out now, so that of the others any two reach one another as far as is known. Who is apart from most goes
    /// first; of two that are apart from as many, the one that holds less, then the one that came later. Of two halves that is
    /// the smaller one, and of two alike that of those who came later.
    pub(super) fn left_out(&self) -> BTreeMap<WorkerId, LeftOut> {
        let mut apart: BTreeMap<Pair, Millis> = self
            .rifts
            .iter()
            .filter(|((one, other), rift)| {
                rift.until > self.now && self.workers.contains_key(one) && self.workers.contains_key(other)
            })
            .map(|(pair, rift)| (*pair, rift.until))
            .collect();
        let mut left_out = BTreeMap::new();
        while !apart.is_empty() {
            let mut counts = BTreeMap::<WorkerId, usize>::new();
            apart.keys().flat_map(|(one, other)| [*one, *other]).for_each(|id| {
                *counts.entry(id).or_default() += 1;
            });
            let holds = |id: &WorkerId| self.workers[id].stance.holds;
            let worst =
                |(id, count): &(WorkerId, usize)| (*count, std::cmp::Reverse(holds(id)), self.place(*id));
            let Some((worst, _)) = counts.into_iter().max_by_key(worst) else { break };
            let rifts = apart.iter().filter(|((one, other), _)| *one == worst || *other == worst);
            if let Some((&(one, other), &until)) = rifts.max_by_key(|(_, until)| **until) {
                let from = if one == worst { other } else { one };
                left_out.insert(worst, LeftOut { from, until });
            }
            apart.retain(|(one, other), _| *one != worst && *other != worst);
        }
        left_out
    }

    /// Forgets what is over: a worker is gone, or both are in a ring that trains.
    pub(super) fn forget_rifts(&mut self) {
        if self.rifts.is_empty() {
            return;
        }
        let joined = match &self.ring {
            Ring::Alive { formation, .. } if self.trains() => Some(formation.clone()),
            _ => None,
        };
        let together = |id: &WorkerId| joined.as_ref().is_some_and(|f| f.member(*id).is_some());
        let workers = &self.workers;
        self.rifts.retain(|(one, other), _| {
            workers.contains_key(one) && workers.contains_key(other) && !(together(one) && together(other))
        });
    }

    /// When somebody is to be tried again.
    pub(super) fn rifts_end(&self) -> Option<Millis> {
        self.rifts.values().map(|rift| rift.until).filter(|until| *until > self.now).min()
    }

    /// Who is left out, in words; absent: nobody is.
    pub(super) fn left_out_in_words(&self) -> Option<String> {
        let told = self.left_out().into_iter().map(|(id, LeftOut { from, until })| {
            let rest = until.since(self.now);
            format!(
                "worker {id} is left out for {rest} more, since it and worker {from} do not reach one another"
            )
        });
        let told: Vec<String> = told.collect();
        (!told.is_empty()).then(|| told.join("; "))
    }
}
