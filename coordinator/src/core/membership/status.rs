//! For people.

use super::*;

/// Workers that are named where they are waited for.
const NAMED_MAX: usize = 8;

impl Membership {
    /// For people.
    pub fn status(&self) -> Status {
        let (generation, formation) = (self.generation, self.formation().cloned());
        let outcome = self.outcome().cloned();
        let waits_for = self.waits_for();
        let step = self.newest_held().max(self.checkpoints.newest());
        let workers = self.workers.values().filter(|worker| worker.linked).count() as u32;
        let members = formation.iter().flat_map(|formation| formation.members.iter().enumerate());
        let places: BTreeMap<WorkerId, (usize, &Member)> =
            members.map(|(rank, member)| (member.worker, (rank, member))).collect();
        let lanes = |id| places.get(&id).map(|(_, member)| member.lanes.clone());
        let left_out = self.left_out();
        let mut attendants: Vec<Attendant> = self
            .workers
            .iter()
            .map(|(&id, worker)| Attendant {
                worker: id,
                machine: worker.machine.clone(),
                lanes: lanes(id),
                linked: worker.linked,
                stance: worker.stance.clone(),
                pace: self.paces.pace(id),
                slow: self.paces.slow(id),
                apart: left_out.get(&id).map(|left_out| left_out.from),
            })
            .collect();
        let rank = |id| places.get(&id).map_or(usize::MAX, |(rank, _)| *rank);
        attendants.sort_by_key(|attendant| (rank(attendant.worker), attendant.worker));
        Status {
            trains: self.trains(),
            has_trained: self.has_trained,
            workers,
            attendants,
            generation,
            formation,
            step,
            committed: self.checkpoints.newest(),
            waits_for,
            outcome,
            quarantined: self.quarantined.iter().cloned().collect(),
        }
    }

    /// Whether so many workers are enough once those that are wanted were waited for.
    fn goes_on_without(&self, have: u32) -> bool {
        let Ring::Gathering { since, .. } = self.ring else { return false };
        have >= self.options.min && self.now < since + self.options.gather
    }

    /// How it ended; absent while it goes on.
    pub fn outcome(&self) -> Option<&Outcome> {
        match &self.ring {
            Ring::Over(outcome) => Some(outcome),
            _ => None,
        }
    }

    /// What it waits for, in words; absent while it trains.
    pub fn waits_for(&self) -> Option<String> {
        let members = |formation: &Formation, wanted: fn(&Activity, Generation) -> bool| {
            let stands = |member: &&Member| {
                self.workers
                    .get(&member.worker)
                    .is_some_and(|w| wanted(&w.stance.activity, formation.generation))
            };
            formation.members.iter().filter(stands).count()
        };
        let running = |activity: &Activity, generation| *activity == Activity::Running { generation };
        match &self.ring {
            Ring::Gathering { since, .. } if self.is_trained() => {
                let step = self.late_checkpoint(*since)?;
                Some(format!("the parts of checkpoint {step}"))
            }
            Ring::Gathering { .. } if self.goal != Goal::Run => Some("its last checkpoint".to_owned()),
            Ring::Gathering { .. } if self.workers.values().any(|w| w.linked && in_a_ring(&w.stance)) => {
                Some("workers of an older ring to leave it".to_owned())
            }
            Ring::Gathering { .. } => {
                let (have, need) = (self.candidates().len(), self.needed());
                let away: Vec<String> = self.may_have_moments().map(|id| id.to_string()).collect();
                Some(match away.is_empty() || (have as u32) < need {
                    true => match self.left_out_in_words() {
                        Some(left_out) => format!("workers: {have} of {need} are here; {left_out}"),
                        None if (have as u32) < need && self.goes_on_without(have as u32) => {
                            let gather = self.options.gather;
                            format!(
                                "workers: {have} of {need} are here; {gather} at most, then fewer are enough"
                            )
                        }
                        None => format!("workers: {have} of {need} are here"),
                    },
                    false => format!("worker {}, with moments that nobody else may have", away.join(", ")),
                })
            }
            Ring::Recording(_) => Some("the job's log to take the new generation".to_owned()),
            Ring::Alive { formation, changing } => {
                let (have, all) = (members(formation, running), formation.members.len());
                match changing {
                    _ if have < all => Some(format!("members to form: {have} of {all} run")),
                    Some(change) => Some(format!("the next step boundary, to {}", change.why)),
                    None => None,
                }
            }
            Ring::Breaking { formation, .. } => {
                let mut missing = self.still_in(formation);
                let names: Vec<String> = missing.by_ref().take(NAMED_MAX).map(|id| id.to_string()).collect();
                let more = match missing.count() {
                    0 => String::new(),
                    more => format!(" and {more} more"),
                };
                Some(format!("word from {}{more}", names.join(", ")))
            }
            Ring::Over(_) => None,
        }
    }
}
