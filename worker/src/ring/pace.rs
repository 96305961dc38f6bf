//! Where this worker's time went since it said so last. Pure.

use anello_proto::ring::{Formation, Generation, Pace, Spent, WorkerId};
use anello_proto::v1;

/// A sum over the steps that are still to be told of.
#[derive(Debug, Default)]
pub(super) struct Tally {
    generation: Generation,
    lanes: u32,
    steps: u32,
    spent: Spent,
}

impl Tally {
    /// A ring begins: steps of the one before are not told any more.
    pub fn begin(&mut self, formation: &Formation, worker: WorkerId) {
        let lanes = formation.member(worker).map_or(0, |member| member.lanes.len() as u32);
        *self = Self { generation: formation.generation, lanes, ..Self::default() };
    }

    /// A step is applied.
    pub fn add(&mut self, report: &v1::StepReport) {
        let us = |at: usize| (report.seconds.get(at).copied().unwrap_or(0.0) * 1e6) as u64;
        let spent = Spent {
            step_us: us(0),
            data_us: us(1),
            compute_us: us(2),
            forward_us: us(7),
            reduce_us: us(3),
            update_us: us(4),
            checkpoint_us: us(5),
        };
        self.steps = self.steps.saturating_add(1);
        self.spent = self.spent + spent;
    }

    /// What is to be told now, if anything.
    pub fn take(&mut self) -> Option<Pace> {
        let Self { generation, lanes, steps, spent } = *self;
        (self.steps, self.spent) = (0, Spent::default());
        (lanes > 0 && steps > 0).then_some(Pace { generation, lanes, steps, spent })
    }
}

#[cfg(test)]
mod tests {
    use anello_proto::ring::{Endpoints, Member, Source, Step};

    use super::*;

    #[test]
    fn it_tells_of_the_steps_of_its_ring_once() {
        let (generation, worker) = (Generation(4), WorkerId(1));
        let member = Member { worker, endpoints: Endpoints::default(), lanes: 2..5 };
        let (members, source) = (vec![member], Source::Seed);
        let formation = Formation { generation, start: Step(0), source, members, save_first: false };
        let step = |seconds: f64| v1::StepReport {
            seconds: vec![seconds, 0.25, 0.5, 0.0, 0.0, 0.0, 0.0, 0.125],
            ..Default::default()
        };
        let mut tally = Tally::default();
        tally.add(&step(9.0));
        assert_eq!(tally.take(), None, "it is in no ring");
        tally.add(&step(9.0));
        tally.begin(&formation, worker);
        assert_eq!(tally.take(), None);
        tally.add(&step(1.0));
        tally.add(&step(2.0));
        let (step_us, data_us, compute_us, forward_us) = (3_000_000, 500_000, 1_000_000, 250_000);
        let spent = Spent { step_us, data_us, compute_us, forward_us, ..Spent::default() };
        assert_eq!(tally.take(), Some(Pace { generation, lanes: 3, steps: 2, spent }));
        assert_eq!(tally.take(), None);
    }
}
