//! State that is shared out over the ring: from which step those who are here can go on.
//!
//! Every member has all weights; the moments of a block are with its owner and with the member before that one. All members
//! make the moments of a step ready before the first of them can finish it. So who holds a step proves that the others, who
//! may hold the one before, have what it takes to get there ([`Shard::next`]): the newest step that anyone holds is then
//! whole, as long as no two neighbours are gone.

use super::*;

/// Whether all that is left of the state after `step` with these is enough to go on from there: `Ok`, or the blocks whose
/// moments nobody has.
pub(in crate::core) fn whole_at<'a>(
    step: Step,
    stances: impl Iterator<Item = &'a Stance> + Clone,
) -> Result<(), Vec<Range<u64>>> {
    let holders = stances.clone().filter(|stance| stance.holds == Some(step));
    if holders.clone().any(|stance| stance.shard.is_none()) {
        return Ok(());
    }
    // Where the stack grows, some may have it grown already: what they have is of another size.
    let sizes: BTreeSet<u64> =
        holders.filter_map(|stance| stance.shard.as_ref()).map(|shard| shard.all_blocks).collect();
    let gaps = sizes.into_iter().map(|size| gaps(step, size, stances.clone()));
    gaps.min_by_key(|gaps| gaps.iter().map(|gap| gap.end - gap.start).sum::<u64>())
        .map_or(Err(Vec::new()), |gaps| if gaps.is_empty() { Ok(()) } else { Err(gaps) })
}

/// How many blocks' moments after `step` none of these has: more than there are when nobody has the weights either.
fn lacking_at<'a>(step: Step, stances: impl Iterator<Item = &'a Stance> + Clone) -> u64 {
    match whole_at(step, stances) {
        Ok(()) => 0,
        Err(gaps) if gaps.is_empty() => u64::MAX,
        Err(gaps) => gaps.iter().map(|gap| gap.end - gap.start).sum(),
    }
}

/// The blocks, of `size`, whose moments after `step` none of these has.
fn gaps<'a>(step: Step, size: u64, stances: impl Iterator<Item = &'a Stance>) -> Vec<Range<u64>> {
    let shards = stances.filter_map(|stance| shard_at(stance, step)).filter(|shard| shard.all_blocks == size);
    let mut have: Vec<&Range<u64>> = shards.flat_map(|shard| &shard.blocks).collect();
    have.sort_unstable_by_key(|range| range.start);
    let (mut gaps, mut next) = (Vec::new(), 0);
    for range in have {
        if range.start > next {
            gaps.push(next..range.start);
        }
        next = next.max(range.end);
    }
    if next < size {
        gaps.push(next..size);
    }
    gaps
}

/// The moments that a worker has, or can have, of the state after `step`.
fn shard_at(stance: &Stance, step: Step) -> Option<&Shard> {
    let shard = stance.shard.as_ref()?;
    let holds = stance.holds?;
    (holds == step || shard.next && holds.0 + 1 == step.0).then_some(shard)
}

/// Whether a shard has moments of some of these blocks.
fn has_some(shard: &Shard, blocks: &[Range<u64>]) -> bool {
    let meet = |range: &Range<u64>| blocks.iter().any(|gap| gap.start < range.end && range.start < gap.end);
    shard.blocks.iter().any(meet)
}

impl Membership {
    fn stances<'a>(
        &'a self,
        workers: &'a BTreeSet<WorkerId>,
    ) -> impl Iterator<Item = &'a Stance> + Clone + 'a {
        workers.iter().filter_map(|id| self.workers.get(id)).map(|worker| &worker.stance)
    }

    /// Workers that are connected, are not on their way out, and reach one another.
    fn here(&self) -> impl Iterator<Item = (WorkerId, &Worker)> {
        let left_out = self.left_out();
        let sent_away = |worker: &Worker| matches!(worker.told, Some(Order::Leave { .. }));
        let here = move |(id, worker): &(&WorkerId, &Worker)| {
            worker.linked && !sent_away(worker) && !left_out.contains_key(*id)
        };
        self.workers.iter().filter(here).map(|(id, worker)| (*id, worker))
    }

    /// Of those, who can give or take state now.
    pub(super) fn usable(&self) -> BTreeSet<WorkerId> {
        self.here().filter(|(_, worker)| !in_a_ring(&worker.stance)).map(|(id, _)| id).collect()
    }

    /// The newest step from which these can go on.
    pub(super) fn newest_whole(&self, workers: &BTreeSet<WorkerId>) -> Option<Step> {
        let steps: BTreeSet<Step> = self.stances(workers).filter_map(|stance| stance.holds).collect();
        steps.into_iter().rev().find(|step| whole_at(*step, self.stances(workers)).is_ok())
    }

    /// Whether somebody who is away, and not given up, may have moments that those who are here lack.
    pub(super) fn may_have_moments(&self) -> impl Iterator<Item = WorkerId> {
        let away = |(_, worker): &(&WorkerId, &Worker)| {
            !worker.linked && worker.stance.holds.is_some() && worker.stance.shard.is_some()
        };
        self.workers.iter().filter(away).map(|(id, _)| *id)
    }

    /// Whether the state after `step` is whole with these.
    pub(super) fn is_whole(&self, step: Step, workers: &[WorkerId]) -> bool {
        whole_at(step, self.stances(&workers.iter().copied().collect())).is_ok()
    }

    /// The members of a generation that starts at `start`, in rank order: those of `wanted` that are not ahead of it, and of
    /// the others in `pool`, though they go or stand by, as many as it takes to have the state whole.
    pub(super) fn with_state(
        &self,
        wanted: &[WorkerId],
        pool: &BTreeSet<WorkerId>,
        start: Step,
    ) -> Vec<WorkerId> {
        let mut members: BTreeSet<WorkerId> =
            wanted.iter().filter(|id| self.workers[id].stance.holds <= Some(start)).copied().collect();
        for &id in pool {
            let worker = &self.workers[&id];
            if members.contains(&id) || worker.stance.holds > Some(start) {
                continue;
            }
            let Err(gaps) = whole_at(start, self.stances(&members)) else { break };
            let adds = |shard: &Shard| has_some(shard, &gaps);
            let is_there = worker.stance.holds == Some(start);
            let has_all = is_there && (gaps.is_empty() || worker.stance.shard.is_none());
            if has_all || shard_at(&worker.stance, start).is_some_and(adds) {
                members.insert(id);
            }
        }
        let mut members: Vec<WorkerId> = members.into_iter().collect();
        members.sort_by_key(|id| self.place(*id));
        members
    }

    /// Workers that ask to go and cannot be let go yet: without one of them, and those that are let go before it, the newest
    /// state would be whole no more. Where it is not whole as it is, those who come next may bring the rest of it: then
    /// whoever has some that nobody else who is here has told of is kept too.
    pub(super) fn needed_leavers(&self) -> BTreeSet<WorkerId> {
        let mut stay = self.usable();
        let leaves = |id: &&WorkerId| self.workers[*id].stance.leaving;
        let leaving: Vec<WorkerId> = stay.iter().filter(leaves).copied().collect();
        if leaving.is_empty() {
            return BTreeSet::new();
        }
        let whole = self.newest_whole(&stay);
        // When all go there is nobody to stay for, once those who may come with the rest were waited for.
        let somebody_stays = self.here().any(|(_, worker)| !worker.stance.leaving);
        let is_partial = whole < self.stances(&stay).filter_map(|stance| stance.holds).max();
        let is_early =
            matches!(self.ring, Ring::Gathering { since, .. } if self.now < since + self.options.gather);
        if !(somebody_stays || is_partial && is_early) {
            return BTreeSet::new();
        }
        let mut partial: BTreeSet<Step> = self.stances(&stay).filter_map(|stance| stance.holds).collect();
        partial.retain(|step| Some(*step) > whole.max(self.checkpoints.newest()));
        let lacking = |stay: &BTreeSet<WorkerId>| -> Vec<u64> {
            partial.iter().map(|step| lacking_at(*step, self.stances(stay))).collect()
        };
        let mut needed = BTreeSet::new();
        let mut lack = lacking(&stay);
        for id in leaving {
            stay.remove(&id);
            let without = lacking(&stay);
            if self.newest_whole(&stay) < whole || without.iter().zip(&lack).any(|(now, before)| now > before)
            {
                stay.insert(id);
                needed.insert(id);
            } else {
                lack = without;
            }
        }
        needed
    }

    /// Why the state that was reached cannot be gone on from, in words; absent: it can, or nobody has any.
    pub(super) fn lost_moments(&self) -> Option<(Step, String)> {
        let usable = self.usable();
        let step = self.stances(&usable).filter_map(|stance| stance.holds).max()?;
        let gaps = whole_at(step, self.stances(&usable)).err()?;
        let blocks: Vec<String> = gaps
            .iter()
            .map(|gap| match gap.end - gap.start {
                1 => gap.start.to_string(),
                _ => format!("{} to {}", gap.start, gap.end - 1),
            })
            .collect();
        let names: Vec<String> = self
            .gone
            .iter()
            .filter(|(_, shard)| has_some(shard, &gaps))
            .map(|(id, _)| id.to_string())
            .collect();
        let names = match &names[..] {
            [] => "nobody who is here has them".to_owned(),
            [one] => format!("worker {one} had them last"),
            some => format!("workers {} had them, and are gone", some.join(" and ")),
        };
        Some((step, format!("the moments of blocks {} are lost: {names}", blocks.join(", "))))
    }

    /// Remembers what a worker that is gone had.
    pub(super) fn remember(&mut self, id: WorkerId, worker: &Worker) {
        if let Some(shard) = &worker.stance.shard {
            self.gone.push((id, shard.clone()));
            if self.gone.len() > GONE_MAX {
                self.gone.remove(0);
            }
        }
    }
}

/// Workers that are gone of which it is known what they had, to be named when it is missed.
const GONE_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    /// What a worker says that holds `step`, with the moments of these of eight blocks.
    fn stance(step: u64, blocks: &[Range<u64>], next: bool) -> Stance {
        let shard = Some(Shard { blocks: blocks.to_vec(), all_blocks: 8, next });
        Stance { shard, ..Stance::new(Some(Step(step)), Activity::Outside) }
    }

    #[test]
    fn a_step_is_whole_when_somebody_has_its_weights_and_everyone_together_its_moments() {
        let four = |rank: usize, step, next| stance(step, &shares(8, 4, rank), next);
        let whole = |step, stances: &[Stance]| whole_at(Step(step), stances.iter());
        // All are at 5: three of four are enough, and two that are no neighbours.
        assert_eq!(whole(5, &[four(0, 5, false), four(1, 5, false), four(2, 5, false)]), Ok(()));
        assert_eq!(whole(5, &[four(0, 5, false), four(2, 5, false)]), Ok(()));
        let gap = std::iter::once(6..8).collect::<Vec<_>>();
        assert_eq!(whole(5, &[four(0, 5, false), four(1, 5, false)]), Err(gap));
        // One has finished step 6, and the others have it within reach.
        let some = [four(0, 5, true), four(1, 6, false), four(2, 5, true), four(3, 5, true)];
        assert_eq!(whole(6, &some), Ok(()));
        assert_eq!(whole(6, &[four(0, 5, true), four(2, 6, false)]), Ok(()));
        // One that has not is no help there.
        let gap = std::iter::once(0..2).collect::<Vec<_>>();
        assert_eq!(whole(6, &[four(0, 5, false), four(1, 6, false), four(2, 5, true)]), Err(gap));
        // Nobody has the weights.
        assert_eq!(whole(6, &[four(0, 5, true), four(2, 5, true)]), Err(Vec::new()));
        // Whoever has all needs nobody.
        let all = Stance { shard: None, ..four(0, 7, false) };
        assert_eq!(whole(7, &[all, four(1, 6, false)]), Ok(()));
    }

    #[test]
    fn a_stack_that_grew_is_another_state_of_the_same_step() {
        let grown = Stance {
            shard: Some(Shard { blocks: std::iter::once(0..3).collect(), all_blocks: 12, next: false }),
            ..stance(5, &[], false)
        };
        let old = |blocks: Range<u64>| stance(5, std::slice::from_ref(&blocks), false);
        let whole = |stances: &[Stance]| whole_at(Step(5), stances.iter());
        assert_eq!(whole(&[grown.clone(), old(0..5), old(4..8)]), Ok(()));
        let gap = std::iter::once(5..8).collect::<Vec<_>>();
        assert_eq!(whole(&[grown, old(0..5)]), Err(gap));
    }
}
