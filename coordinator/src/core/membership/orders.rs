//! What is said to whom.

use super::*;

impl Membership {
    /// What the core wants of a worker that stands as it does; a function of the present alone. `needed` are those that may
    /// not go yet, since nobody else has what they have.
    pub(super) fn owed(&self, id: WorkerId, worker: &Worker, needed: &BTreeSet<WorkerId>) -> Option<Order> {
        let stance = &worker.stance;
        let abort_older = |below: Generation| match &stance.activity {
            Activity::Forming { generation } | Activity::Running { generation } if *generation < below => {
                let reason = format!("generation {generation} is over");
                Some(Order::Abort { generation: *generation, reason })
            }
            _ => None,
        };
        let dismissed = || {
            let reason = "the worker asked to go".to_owned();
            (stance.leaving && !in_a_ring(stance) && !worker.owes_a_copy())
                .then_some(Order::Leave { why: Leave::Dismissed { reason } })
        };
        match &self.ring {
            Ring::Gathering { .. } => {
                let dismissed = dismissed().filter(|_| !needed.contains(&id));
                dismissed.or_else(|| abort_older(Generation(u64::MAX)))
            }
            Ring::Recording(formation) => {
                let dismissed =
                    dismissed().filter(|_| formation.member(id).is_none() && stance.shard.is_none());
                dismissed.or_else(|| abort_older(Generation(u64::MAX)))
            }
            Ring::Alive { formation, changing } => {
                let generation = formation.generation;
                if !self.seats.contains_key(&id) {
                    // What it has is a second copy until all members have theirs.
                    let dismissed = dismissed().filter(|_| stance.shard.is_none() || self.trains());
                    return dismissed.or_else(|| abort_older(Generation(u64::MAX)));
                }
                if stance.activity.generation() < Some(generation) {
                    return Some(Order::Form(formation.clone()));
                }
                let change = changing.as_ref()?;
                stance.activity.is_in(generation).then_some(Order::Hold { generation, save: change.save })
            }
            Ring::Breaking { formation, abort, .. } => {
                let generation = formation.generation;
                match (self.seats.get(&id), abort) {
                    (Some(_), Some(reason)) if !matches!(stance.activity, Activity::Holding { generation: of, .. } if of >= generation) => {
                        Some(Order::Abort { generation, reason: reason.clone() })
                    }
                    (Some(_), _) => worker.told.clone(),
                    (None, _) if stance.shard.is_some() => abort_older(Generation(u64::MAX)),
                    (None, _) => dismissed().or_else(|| abort_older(Generation(u64::MAX))),
                }
            }
            Ring::Over(outcome) => Some(Order::Leave {
                why: match outcome {
                    Outcome::Completed => Leave::Done,
                    Outcome::Paused => Leave::Dismissed { reason: "the job is paused".to_owned() },
                    Outcome::Cancelled => Leave::Dismissed { reason: "the job is cancelled".to_owned() },
                    Outcome::Failed { reason } => Leave::Failed { reason: reason.clone() },
                    Outcome::Fenced { .. } => return None,
                },
            }),
        }
    }
}
