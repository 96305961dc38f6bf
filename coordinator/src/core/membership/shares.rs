//! Who serves how many lanes.

use super::*;

/// Windows of steps that a ring trains before its lanes are cut anew: a re-formation costs about as much as a step or two.
const WINDOWS: u64 = 5;

impl Membership {
    /// The ranges of these workers from step `start` on, in rank order. Who was about to make that step keeps what it can of its
    /// lanes; by speed, one that has not told how fast it is counts as the median of the others.
    pub(super) fn cut(&self, workers: &[WorkerId], start: Step) -> Vec<Range<u32>> {
        let lanes = self.options.lanes;
        let known: Vec<Option<u64>> = workers.iter().map(|id| self.paces.lane_ns(*id)).collect();
        if !self.options.by_speed || known.iter().all(Option::is_none) {
            let had = |id: &WorkerId| {
                let holds = self.workers.get(id)?.stance.holds;
                self.seats.get(id).filter(|_| holds == Some(start)).map(|seat| seat.lanes.clone())
            };
            return cut::keeping(lanes, &workers.iter().map(had).collect::<Vec<_>>());
        }
        let median = paces::median(known.iter().flatten().copied());
        let times: Vec<u64> = known.into_iter().map(|ns| ns.unwrap_or(median)).collect();
        cut::by_speed(lanes, &times)
    }

    /// Whether another cut is worth forming the living ring anew for: by what all members have told of it, and not too soon.
    pub(super) fn is_cut_due(&self) -> bool {
        let Ring::Alive { formation, .. } = &self.ring else { return false };
        let window = u64::from(self.options.straggling.window_steps);
        if !self.options.by_speed || self.reached.0 < formation.start.0 + WINDOWS * window {
            return false;
        }
        let times: Option<Vec<u64>> =
            formation.members.iter().map(|member| self.paces.lane_ns(member.worker)).collect();
        let present: Vec<Range<u32>> = formation.members.iter().map(|member| member.lanes.clone()).collect();
        times.is_some_and(|times| cut::is_worth_it(&present, self.options.lanes, &times))
    }
}
