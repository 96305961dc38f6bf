//! Whatever a worker is told and whatever happens to it, in any order: no panic, and nothing is done that must not be.

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use super::*;

fn number() -> impl Strategy<Value = u64> {
    prop_oneof![9 => 0u64..8, 1 => any::<u64>(), 1 => Just(u64::MAX)]
}

fn order() -> impl Strategy<Value = Order> {
    let source = prop_oneof![
        Just(Source::Seed),
        number().prop_map(|step| Source::Checkpoint { step: Step(step) }),
        vec(number().prop_map(WorkerId), 0..3).prop_map(|holders| Source::Peers { holders }),
    ];
    let form =
        (number(), number(), source, any::<bool>()).prop_map(|(generation, start, source, save_first)| {
            let (generation, start) = (Generation(generation), Step(start));
            Order::Form(Arc::new(Formation { generation, start, source, members: Vec::new(), save_first }))
        });
    let leave = Order::Leave { why: Leave::Done };
    prop_oneof![
        6 => form,
        3 => (number(), any::<bool>())
            .prop_map(|(generation, save)| Order::Hold { generation: Generation(generation), save }),
        3 => number().prop_map(|generation| {
            Order::Abort { generation: Generation(generation), reason: "something".to_owned() }
        }),
        1 => number().prop_map(|step| Order::Committed { step: Step(step) }),
        1 => (number(), number()).prop_map(|(step, generation)| {
            Order::WriteKept { step: Step(step), generation: Generation(generation) }
        }),
        1 => Just(leave),
    ]
}

/// An event; absent: what the shell owes of the ring that was begun last.
fn event() -> impl Strategy<Value = Option<Event>> {
    let reason = || "something".to_owned();
    let workers = || vec(number().prop_map(WorkerId), 0..3);
    let cause = prop_oneof![
        Just(Cause::Ordered),
        Just(Cause::Ended),
        Just(Cause::Broken { lost: None, reason: reason() }),
        workers().prop_map(move |peers| Cause::Unreachable { peers, reason: reason() }),
        workers().prop_map(move |workers| Cause::Diverged { workers, reason: reason() }),
        Just(Cause::NoState { reason: reason() }),
        Just(Cause::Fault { reason: reason() }),
    ];
    let written = (number(), number()).prop_map(|(step, generation)| Written {
        step: Step(step),
        generation: Generation(generation),
        parts: String::new(),
        facts: String::new(),
        blocks: Vec::new(),
        all_blocks: 1,
        kept: None,
    });
    prop_oneof![
        4 => Just(None),
        2 => Just(Some(Event::Linked)),
        1 => Just(Some(Event::Unlinked)),
        8 => (0u64..4, order()).prop_map(|(epoch, order)| Some(Event::Ordered { epoch: Epoch(epoch), order })),
        2 => (number(), option::of(number())).prop_map(|(generation, holds)| {
            Some(Event::Ready { generation: Generation(generation), holds: holds.map(Step), shard: None })
        }),
        2 => number().prop_map(|holds| Some(Event::Applied { holds: Step(holds) })),
        1 => (number(), option::of(number()), cause).prop_map(|(generation, holds, cause)| {
            Some(Event::Left { generation: Generation(generation), holds: holds.map(Step), shard: None, cause })
        }),
        3 => written.prop_map(|written| Some(Event::Wrote(written))),
        2 => (number(), number()).prop_map(|(step, generation)| {
            let reason = "something".to_owned();
            Some(Event::Unwritten(Unwritten { step: Step(step), generation: Generation(generation), reason }))
        }),
        1 => (number(), number()).prop_map(|(step, generation)| {
            Some(Event::LetGo { step: Step(step), generation: Generation(generation) })
        }),
        1 => Just(Some(Event::Terminate)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn whatever_happens(events in vec(event(), 0..60)) {
        let mut member = Member::new(None);
        // Generations that were begun; the last one, while it was not left; connections; the end.
        let (mut newest, mut ring, mut linked, mut gone) = (None, None, false, false);
        for event in events {
            let event = match (event, ring) {
                (Some(event), _) => event,
                (None, Some(generation)) => {
                    Event::Left { generation, holds: None, shard: None, cause: Cause::Broken { lost: None, reason: String::new() } }
                }
                (None, None) => continue,
            };
            match &event {
                Event::Linked => linked = true,
                Event::Unlinked => linked = false,
                Event::Left { generation, .. } if ring == Some(*generation) => ring = None,
                _ => {}
            }
            let (epoch, before) = (member.epoch(), member.clone());
            let outranked = matches!(&event, Event::Ordered { epoch: of, .. } if *of < epoch);
            let mut out = Vec::new();
            member.handle(event, &mut out);
            prop_assert!(!gone || out.is_empty(), "it acts after its end: {out:?}");
            prop_assert!(!outranked || (out.is_empty() && member == before), "it obeys one that was replaced");
            prop_assert!(member.epoch() >= epoch);
            prop_assert!(member.stance().written.len() <= WRITTEN_MAX);
            prop_assert!(member.stance().unwritten.len() <= UNWRITTEN_MAX);
            for effect in out {
                match effect {
                    Effect::Say(stance) => {
                        prop_assert!(linked, "it speaks to nobody");
                        prop_assert_eq!(&stance, member.stance());
                    }
                    Effect::Form(formation) => {
                        prop_assert_eq!(ring, None, "two rings at once");
                        prop_assert!(Some(formation.generation) > newest, "an old ring is joined");
                        (ring, newest) = (Some(formation.generation), Some(formation.generation));
                    }
                    Effect::Hold { .. } | Effect::Abort { .. } => prop_assert!(ring.is_some(), "there is no ring"),
                    // In a ring or not.
                    Effect::WriteKept { .. } => {}
                    Effect::Exit(_) => {
                        prop_assert_eq!(ring, None, "it goes while in a ring");
                        gone = true;
                    }
                }
            }
            prop_assert_eq!(member.is_gone(), gone);
        }
    }
}
