//! No ring: who could be in the next one, and from where it goes on.

use super::*;

impl Membership {
    /// No ring: is it over, or can one be formed?
    pub(super) fn gather(&mut self, out: &mut Vec<Effect>) -> Option<Ring> {
        let Ring::Gathering { since, listing } = self.ring else { return None };
        let committed = self.checkpoints.newest();
        let held = self.newest_held();
        let saved = held <= committed;
        let total = self.options.total;
        let outcome = match self.goal {
            _ if self.is_trained() => Some(Outcome::Completed),
            Goal::Cancel => Some(Outcome::Cancelled),
            Goal::Pause if saved => Some(Outcome::Paused),
            Goal::Run | Goal::Pause => None,
        };
        if let Some(outcome) = outcome {
            if outcome != Outcome::Cancelled && self.late_checkpoint(since).is_some() {
                return None;
            }
            out.push(Effect::Record(Entry::Ended { outcome: outcome.clone() }));
            return Some(Ring::Over(outcome));
        }
        // At the end, or before a pause, a worker holds only after its parts are durable: if all are there, the manifest
        // is on its way; if not, a new generation must write them.
        if (held == Some(total) || self.goal == Goal::Pause)
            && held.is_some_and(|step| self.checkpoints.is_complete(step))
        {
            return None;
        }
        // One that was given up and has come back may be in its old ring still, and may hold the newest state: it is told
        // to leave that ring, and is waited for.
        if self.workers.values().any(|worker| worker.linked && in_a_ring(&worker.stance)) {
            return None;
        }
        let late = self.now >= since + self.options.gather;
        let enough = if late { self.options.min } else { self.needed() };
        if let Some(lack @ 1..) = enough.checked_sub(self.workers.len() as u32) {
            self.too_few = lack - 1;
            return None;
        }
        let mut candidates = self.candidates();
        // One that asks to go, and is not let go yet, trains on meanwhile.
        let kept = self.needed_leavers();
        if ((candidates.len() + kept.len()) as u32) < enough.max(1) {
            return None;
        }
        let filled =
            |members: Vec<WorkerId>, may: &dyn Fn(WorkerId) -> bool| self.filled(members, enough, &kept, may);
        candidates.truncate(self.options.desired.min(self.options.lanes).max(1) as usize);

        let stored = self.checkpoints.newest();
        // Those who go or stand by may have what the others lack: where the moments are shared out, or nobody else has any.
        let usable = self.usable();
        let shared = usable.iter().any(|id| self.workers[id].stance.shard.is_some());
        let pool = if shared || !kept.is_empty() { usable } else { candidates.iter().copied().collect() };
        let survive = self.survive(&pool);
        if !survive && self.may_have_moments().next().is_some() && !self.faults.distrust {
            return None;
        }
        if !survive && listing != Listing::Fresh {
            if listing == Listing::Old {
                out.push(Effect::List);
            }
            return (listing == Listing::Old).then_some(Ring::Gathering { since, listing: Listing::Asked });
        }
        if self.checkpoints.all_distrusted()
            && !candidates.iter().any(|id| self.workers[id].stance.holds.is_some())
        {
            let outcome = Outcome::Failed { reason: "none of the checkpoints can be read".to_owned() };
            out.push(Effect::Record(Entry::Ended { outcome: outcome.clone() }));
            return Some(Ring::Over(outcome));
        }
        let use_held = !self.faults.distrust || stored.is_none() && !self.faults.differ;
        let held = self.newest_whole(&pool).filter(|_| use_held);
        let able = held.map(|held| {
            let members = self.with_state(&candidates, &pool, held);
            (held, filled(members, &|id| self.workers[&id].stance.holds <= Some(held)))
        });
        let able = able
            .filter(|(held, members)| members.len() as u32 >= enough.max(1) && self.is_whole(*held, members));
        let (start, source) = match (able, stored) {
            (Some((held, members)), stored) if Some(held) >= stored => {
                candidates = members;
                let holders = candidates.iter().filter(|id| self.workers[id].stance.holds == Some(held));
                (held, Source::Peers { holders: holders.copied().collect() })
            }
            (_, stored) => {
                if let Some((step, reason)) = self.lost_moments().filter(|(step, _)| Some(*step) > stored) {
                    out.push(Effect::Record(Entry::FellBack { step, reason }));
                }
                candidates = filled(candidates, &|_| true);
                match stored {
                    Some(step) => (step, Source::Checkpoint { step }),
                    None => (Step(0), Source::Seed),
                }
            }
        };
        // Whoever holds nothing comes last, and learns the state before it serves lanes.
        let learns =
            |id: &WorkerId| matches!(source, Source::Peers { .. }) && self.workers[id].stance.holds.is_none();
        candidates.sort_by_key(learns);
        let trainers = candidates.iter().position(learns).unwrap_or(candidates.len());
        let mut lanes = self.cut(&candidates[..trainers], start);
        lanes.resize(candidates.len(), self.options.lanes..self.options.lanes);
        let member = |(worker, lanes): (WorkerId, Range<u32>)| Member {
            worker,
            endpoints: self.workers[&worker].endpoints.clone(),
            lanes,
        };
        let formation = Formation {
            generation: Generation(self.generation.0 + 1),
            start,
            source,
            members: candidates.into_iter().zip(lanes).map(member).collect(),
            save_first: start > Step(0) && !self.checkpoints.has(start),
        };
        let formation = Arc::new(formation);
        out.push(Effect::Record(Entry::Formed(Arc::clone(&formation))));
        Some(Ring::Recording(formation))
    }

    /// `members`, and where they are fewer than `enough` also those of `kept` that may: they are not let go before the next ring
    /// trains, and nobody comes in their places before.
    fn filled(
        &self,
        mut members: Vec<WorkerId>,
        enough: u32,
        kept: &BTreeSet<WorkerId>,
        may: &dyn Fn(WorkerId) -> bool,
    ) -> Vec<WorkerId> {
        let lack = (enough as usize).saturating_sub(members.len());
        let others = kept.iter().copied().filter(|id| !members.contains(id) && may(*id));
        let others: Vec<WorkerId> = others.take(lack).collect();
        members.extend(others);
        members.sort_by_key(|id| self.place(*id));
        members
    }

    /// Workers that a generation needs now: survivors go on at once, but where nobody holds state there is nothing to
    /// lose by waiting for all that are wanted.
    pub(super) fn needed(&self) -> u32 {
        let survivors = self.workers.values().any(|worker| worker.linked && worker.stance.holds.is_some());
        match survivors {
            true => self.options.min,
            false => self.options.min.max(self.options.desired.min(self.options.lanes)),
        }
    }

    /// Whether the newest state that those of `pool` hold is what the next generation goes on from.
    fn survive(&self, pool: &BTreeSet<WorkerId>) -> bool {
        let holds = |id: &WorkerId| self.workers[id].stance.holds;
        !self.faults.distrust
            && pool.iter().any(|id| holds(id).is_some())
            && self.newest_whole(pool) == pool.iter().filter_map(holds).max()
    }

    /// Workers that can be members now, in the order in which they would be.
    pub(super) fn candidates(&self) -> Vec<WorkerId> {
        let usable = self.usable().into_iter();
        let mut all: Vec<WorkerId> = usable.filter(|id| !self.workers[id].stance.leaving).collect();
        all.sort_by_key(|id| self.place(*id));
        all
    }

    /// Members come in the order of their ranks, then those that arrived first.
    pub(super) fn place(&self, id: WorkerId) -> (usize, u64, WorkerId) {
        let rank = self.seats.get(&id).map_or(usize::MAX, |seat| seat.rank);
        (rank, self.workers.get(&id).map_or(u64::MAX, |worker| worker.arrival), id)
    }

    /// The newest step after which a worker holds state.
    pub(super) fn newest_held(&self) -> Option<Step> {
        self.workers.values().filter_map(|worker| worker.stance.holds).max()
    }

    /// The newest step after which a worker that is connected holds state.
    pub fn held_here(&self) -> Option<Step> {
        let here = self.workers.values().filter(|worker| worker.linked);
        here.filter_map(|worker| worker.stance.holds).max()
    }
}
