use std::collections::BTreeSet;

use anello_proto::ring::{Endpoints, Member, Source, Step};
use proptest::prelude::*;

use super::*;

const WINDOW: u32 = 20;

fn formation(generation: u64, members: &[u64], lanes: u32) -> Formation {
    let member = |(at, id): (usize, &u64)| {
        let first = at as u32 * lanes;
        let (worker, endpoints) = (WorkerId(*id), Endpoints::default());
        Member { worker, endpoints, lanes: first..first + lanes }
    };
    Formation {
        generation: Generation(generation),
        start: Step(0),
        source: Source::Seed,
        members: members.iter().enumerate().map(member).collect(),
        save_first: false,
    }
}

fn paces() -> Paces {
    Paces::new(Straggling { factor_permille: 1500, window_steps: WINDOW })
}

/// All members tell of `steps` steps at these times for a lane, the first of them last; returns all verdicts.
fn tell(paces: &mut Paces, ring: &Formation, steps: u32, lane_us: &[u64]) -> Vec<Verdict> {
    let told: Vec<Verdict> = ring
        .members
        .iter()
        .zip(lane_us)
        .rev()
        .flat_map(|(member, us)| {
            let lanes = member.lanes.len() as u32;
            let compute_us = us * u64::from(lanes) * u64::from(steps);
            let spent = Spent { compute_us, ..Spent::default() };
            paces.told(ring, member.worker, Pace { generation: ring.generation, lanes, steps, spent })
        })
        .collect();
    told
}

#[test]
fn one_that_takes_longer_for_a_lane_is_named_once_and_again_when_it_is_in_step() {
    let (mut paces, ring) = (paces(), formation(1, &[1, 2, 3], 4));
    assert_eq!(tell(&mut paces, &ring, WINDOW - 1, &[100, 100, 300]), [], "half a window says nothing");
    assert_eq!(tell(&mut paces, &ring, 1, &[100, 100, 300]), [Verdict::Slow(WorkerId(3), 300)]);
    assert_eq!(paces.slow(WorkerId(3)), Some(300));
    assert_eq!(tell(&mut paces, &ring, WINDOW, &[100, 100, 140]), [], "between the two thresholds it stays");
    assert_eq!(tell(&mut paces, &ring, WINDOW, &[100, 100, 120]), [Verdict::InStep(WorkerId(3))]);
    assert_eq!(tell(&mut paces, &ring, WINDOW, &[100, 100, 140]), [], "and here too");
    assert_eq!(paces.slow(WorkerId(3)), None);
}

#[test]
fn of_two_the_faster_is_the_measure_and_one_alone_is_never_slow() {
    let (mut paces, ring) = (paces(), formation(1, &[1, 2], 4));
    assert_eq!(tell(&mut paces, &ring, WINDOW, &[200, 100]), [Verdict::Slow(WorkerId(1), 200)]);
    let alone = formation(2, &[1], 8);
    assert_eq!(tell(&mut paces, &alone, WINDOW, &[900]), []);
    assert_eq!(paces.slow(WorkerId(1)), Some(200), "nothing was learned of it");
    assert_eq!(
        tell(&mut paces, &formation(3, &[1, 4], 4), WINDOW, &[100, 100]),
        [Verdict::InStep(WorkerId(1))]
    );
}

#[test]
fn words_of_another_ring_and_of_strangers_do_not_count() {
    let (mut paces, ring) = (paces(), formation(2, &[1, 2], 4));
    let spent = Spent { compute_us: 1, ..Spent::default() };
    let word = Pace { generation: Generation(2), lanes: 4, steps: WINDOW, spent };
    paces.told(&ring, WorkerId(1), Pace { generation: Generation(1), ..word });
    paces.told(&ring, WorkerId(1), Pace { lanes: 3, ..word });
    paces.told(&ring, WorkerId(9), word);
    assert_eq!((paces.pace(WorkerId(1)), paces.pace(WorkerId(9))), (None, None));
    paces.told(&ring, WorkerId(1), word);
    assert_eq!(paces.pace(WorkerId(1)), Some(word));
}

#[test]
fn it_can_be_turned_off() {
    let mut paces = Paces::new(Straggling { factor_permille: 0, window_steps: WINDOW });
    assert_eq!(tell(&mut paces, &formation(1, &[1, 2], 4), WINDOW, &[100, 9000]), []);
}

proptest! {
    /// Whatever is told: what is slow was told to be and not taken back, at least half of the members are not slow, and
    /// memory is bounded.
    #[test]
    fn whatever_is_told(
        words in prop::collection::vec((0usize..5, 1u32..30, prop_oneof![1u64..400, any::<u32>().prop_map(u64::from)]), 0..200)
    ) {
        let (mut paces, ring) = (paces(), formation(1, &[1, 2, 3, 4, 5], 2));
        let mut slow = BTreeSet::new();
        for (at, steps, us) in words {
            let compute_us = us * 2 * u64::from(steps);
            let spent = Spent { compute_us, ..Spent::default() };
            let pace = Pace { generation: Generation(1), lanes: 2, steps, spent };
            for verdict in paces.told(&ring, ring.members[at].worker, pace) {
                match verdict {
                    Verdict::Slow(worker, percent) => {
                        prop_assert!(percent >= 150 && slow.insert(worker), "told twice");
                    }
                    Verdict::InStep(worker) => prop_assert!(slow.remove(&worker), "never told"),
                }
            }
            prop_assert!(slow.len() < 3, "most are slow");
            prop_assert!(ring.members.iter().all(|m| paces.slow(m.worker).is_some() == slow.contains(&m.worker)));
            prop_assert!(paces.of.values().all(|words| words.len() <= WORDS_MAX));
        }
    }

    /// Noise of a fifth either way never names anyone, however it falls.
    #[test]
    fn noise_is_no_straggler(rounds in prop::collection::vec(prop::array::uniform4(80u64..=120), 1..40)) {
        let (mut paces, ring) = (paces(), formation(1, &[1, 2, 3, 4], 2));
        for times in rounds {
            prop_assert_eq!(tell(&mut paces, &ring, 5, &times), []);
        }
    }
}
