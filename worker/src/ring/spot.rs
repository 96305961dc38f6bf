//! Does a lane's gradient come out the same on another machine?
//!
//! A gradient that was computed wrongly reaches all replicas alike, so that no comparison of replicas can see it. Every so
//! many steps one lane, drawn by the generator, is therefore computed by a second member too, and by a third when the two
//! differ. Nothing is applied before the verdict: the run's bits do not depend on who is right.

use anello_configs::random::Stream;
use anello_proto::ring::{Cause, Formation, WorkerId};
use tch::Tensor;

use crate::digest;

/// Who computes which lane of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Spot {
    pub lane: u32,
    /// Rank that serves it.
    pub owner: usize,
    /// Rank that computes it too.
    pub witness: usize,
    /// Rank that decides; absent in a ring of two.
    pub judge: Option<usize>,
}

impl Spot {
    /// The check of `step`, when there is one: a function of the seed, the step and the generation's members, of whom the first
    /// so many hold the state.
    pub fn at(seed: u64, every: u64, step: u64, formation: &Formation, members: usize) -> Option<Self> {
        if every == 0 || members < 2 || !(step + 1).is_multiple_of(every) {
            return None;
        }
        let draw = Stream::new(seed, "spot-check", &[step]);
        let lanes = formation.members.iter().map(|member| member.lanes.end).max()?;
        let lane = draw.below_at(0, lanes.into()) as u32;
        let owner = formation.members.iter().position(|member| member.lanes.contains(&lane))?;
        let witness = (owner + 1 + draw.below_at(1, members as u64 - 1) as usize) % members;
        let judge = (1..members).map(|next| (witness + next) % members).find(|rank| *rank != owner);
        Some(Self { lane, owner, witness, judge })
    }

    /// Whether the first two agree, by what each rank sent.
    pub fn agrees(&self, sent: &[Vec<u8>]) -> bool {
        sent[self.owner] == sent[self.witness]
    }

    /// Who is wrong, by the hashes of owner, witness and judge (which sent its own in the second round).
    pub fn verdict(&self, step: u64, first: &[Vec<u8>], second: &[Vec<u8>], formation: &Formation) -> Cause {
        let name = |rank: usize| formation.members[rank].worker;
        let lane = self.lane;
        let wrong = self.judge.and_then(|judge| {
            let decides = &second[judge];
            if *decides == first[self.owner] {
                Some(self.witness)
            } else if *decides == first[self.witness] {
                Some(self.owner)
            } else {
                None
            }
        });
        match wrong {
            Some(rank) => {
                let worker: WorkerId = name(rank);
                let reason = format!(
                    "worker {worker} computes another gradient of lane {lane} at step {step} than two others"
                );
                Cause::Diverged { workers: vec![worker], reason }
            }
            None => {
                let (owner, witness) = (name(self.owner), name(self.witness));
                let reason = format!(
                    "workers {owner} and {witness} compute different gradients of lane {lane} at step {step}, and nobody can tell who is right"
                );
                Cause::Diverged { workers: Vec::new(), reason }
            }
        }
    }
}

/// Hash of a flat gradient.
pub(super) fn hash(gradient: &Tensor) -> Vec<u8> {
    digest::of_all(gradient).as_bytes().to_vec()
}

#[cfg(test)]
mod tests {
    use anello_proto::ring::{Endpoints, Generation, Member, Source, Step};

    use super::*;

    fn formation(ranges: &[std::ops::Range<u32>]) -> Formation {
        let member = |(at, lanes): (usize, &std::ops::Range<u32>)| Member {
            worker: WorkerId(at as u64 + 1),
            endpoints: Endpoints::default(),
            lanes: lanes.clone(),
        };
        Formation {
            generation: Generation(1),
            start: Step(0),
            source: Source::Seed,
            members: ranges.iter().enumerate().map(member).collect(),
            save_first: false,
        }
    }

    #[test]
    fn every_member_is_checked_and_checks_in_its_turn() {
        let three = formation(&[0..3, 3..5, 5..8]);
        let spots: Vec<Spot> = (0..400).filter_map(|step| Spot::at(3, 2, step, &three, 3)).collect();
        assert_eq!(spots.len(), 200);
        for rank in 0..3 {
            assert!(spots.iter().any(|spot| spot.owner == rank));
            assert!(spots.iter().any(|spot| spot.witness == rank));
            assert!(spots.iter().any(|spot| spot.judge == Some(rank)));
        }
        for spot in spots {
            assert!(three.members[spot.owner].lanes.contains(&spot.lane));
            assert!(
                spot.owner != spot.witness
                    && spot.judge.is_some_and(|j| j != spot.owner && j != spot.witness)
            );
        }
        assert_eq!(Spot::at(3, 2, 1, &formation(&[0..4, 4..8]), 2).and_then(|spot| spot.judge), None);
        assert_eq!(
            Spot::at(3, 2, 1, &formation(&[0..8, 8..8].map(|r| r)), 2).map(|spot| spot.owner),
            Some(0)
        );
        assert_eq!(Spot::at(3, 0, 1, &three, 3), None);
        assert_eq!(Spot::at(3, 1, 1, &formation(std::slice::from_ref(&(0..8))), 1), None);
    }

    #[test]
    fn who_learns_the_state_checks_nobody() {
        let ring = formation(&[0..4, 4..8, 8..8, 8..8]);
        let spots: Vec<Spot> = (0..200).filter_map(|step| Spot::at(3, 2, step, &ring, 2)).collect();
        assert_eq!(spots.len(), 100);
        for spot in spots {
            assert!(spot.owner < 2 && spot.witness < 2 && spot.owner != spot.witness);
            assert_eq!(spot.judge, None);
        }
        assert_eq!(Spot::at(3, 1, 1, &ring, 1), None, "nobody else computes");
    }

    #[test]
    fn the_odd_one_out_is_named() {
        let three = formation(&[0..3, 3..5, 5..8]);
        let spot = Spot { lane: 1, owner: 0, witness: 1, judge: Some(2) };
        let sent = |text: [&str; 3]| text.map(|text| text.as_bytes().to_vec()).to_vec();
        let named = |first, second| match spot.verdict(9, &sent(first), &sent(second), &three) {
            Cause::Diverged { workers, .. } => workers,
            other => panic!("{other:?}"),
        };
        assert!(spot.agrees(&sent(["a", "a", ""])) && !spot.agrees(&sent(["a", "b", ""])));
        assert_eq!(named(["a", "b", ""], ["", "", "a"]), [WorkerId(2)]);
        assert_eq!(named(["a", "b", ""], ["", "", "b"]), [WorkerId(1)]);
        assert_eq!(named(["a", "b", ""], ["", "", "c"]), []);
    }
}
