//! Where moments are shared out, whoever asks to go may have what nobody else has.

use super::*;

/// Where one stands that held state after step 20 when the ring of generation 1 broke, with these of three blocks.
fn survivor(shares: &[Range<u64>], leaving: bool) -> Stance {
    let shard = Some(Shard { blocks: shares.to_vec(), all_blocks: 3, next: false });
    Stance { shard, leaving, ..stance(Some(20), holding(1, lost(2))) }
}

/// A coordinator takes up a ring of three, and a lease later none of them has come. Worker 9 holds nothing.
fn nobody_came(options: Options) -> Story {
    let members = [(1, 0..3), (2, 3..6), (3, 6..8)];
    let found = Found {
        formation: Some(Formation::clone(&formation(1, 10, peers(&[1, 2, 3]), &members))),
        checkpoints: vec![Step(10)],
        ..Found::default()
    };
    let mut story = Story { core: Membership::new(options, Epoch(1), found, Millis(0)), now: 0 };
    story.event(Event::Tick);
    story.now = 1000;
    let lost = |effect: &Effect| matches!(effect, Effect::Record(Entry::Lost { .. }));
    assert_eq!(story.event(Event::Tick).iter().filter(|effect| lost(effect)).count(), 3);
    story.link(9, stance(None, Activity::Outside));
    story
}

fn dismissed(id: u64) -> Effect {
    send(id, Order::Leave { why: Leave::Dismissed { reason: "the worker asked to go".to_owned() } })
}

#[test]
fn who_goes_is_kept_while_the_others_may_bring_the_rest_of_its_state() {
    let mut story = nobody_came(options(3));
    assert_eq!(
        story.link(1, survivor(&blocks(0..2), true)),
        [joined(1), Effect::List],
        "it is not sent away"
    );
    // All of the state after step 20 is here: it is gone on from, with the leaver in the ring until the others have its share.
    let next = formation(2, 20, peers(&[1, 3]), &[(1, 0..4), (3, 4..8), (9, 8..8)]);
    assert_eq!(story.link(3, survivor(&[0..1, 2..3], false)), [joined(3), formed(&next)]);
}

#[test]
fn who_goes_with_what_others_have_told_of_is_let_go() {
    let mut story = nobody_came(Options { min: 3, ..options(4) });
    assert_eq!(story.link(3, survivor(&[0..1, 2..3], false)), [joined(3)]);
    assert_eq!(story.link(1, survivor(&blocks(0..1), true)), [joined(1), dismissed(1)]);
}

#[test]
fn where_the_rest_does_not_come_who_goes_trains_from_the_checkpoint_rather_than_nobody() {
    let mut story = nobody_came(Options { min: 2, ..options(2) });
    assert_eq!(story.link(1, survivor(&blocks(0..2), true)), [joined(1), Effect::List], "two are enough");
    let next = formation(2, 10, Source::Checkpoint { step: Step(10) }, &[(1, 0..4), (9, 4..8)]);
    let reason = "the moments of blocks 2 are lost: nobody who is here has them".to_owned();
    let fell_back = Effect::Record(Entry::FellBack { step: Step(20), reason });
    assert_eq!(story.event(Event::Listed { steps: vec![Step(10)] }), [fell_back, formed(&next)]);
    // It goes once the others train on.
    story.event(Event::Recorded { generation: Generation(2) });
    story.stands(1, Stance { leaving: true, ..stance(Some(10), running(2)) });
    let hold = |id| send(id, Order::Hold { generation: Generation(2), save: false });
    assert_eq!(
        story
            .stands(9, stance(Some(10), running(2)))
            .into_iter()
            .filter(|effect| matches!(effect, Effect::Send { .. }))
            .collect::<Vec<_>>(),
        [hold(1), hold(9)]
    );
}

#[test]
fn who_alone_holds_the_state_hands_it_over_before_it_goes() {
    let mut story = Story::running(1);
    story.link(2, stance(None, Activity::Outside));
    let hold = |id, generation| send(id, Order::Hold { generation: Generation(generation), save: false });
    let leaving = |holds, activity| Stance { leaving: true, ..stance(Some(holds), activity) };
    assert_eq!(story.stands(1, leaving(20, running(1))), [hold(1, 1)]);
    let next = formation(2, 21, peers(&[1]), &[(1, 0..8), (2, 8..8)]);
    assert_eq!(story.stands(1, leaving(21, holding(1, Cause::Ordered))), [formed(&next)]);
    story.event(Event::Recorded { generation: Generation(2) });
    story.stands(1, leaving(21, running(2)));
    let out = story.stands(2, stance(None, running(2)));
    assert!(
        matches!(out[..], [Effect::Record(Entry::Recovered { .. })]),
        "no boundary while one learns: {out:?}"
    );
    assert_eq!(story.stands(2, stance(Some(23), running(2))), [hold(1, 2), hold(2, 2)]);
    story.stands(2, stance(Some(24), holding(2, Cause::Ordered)));
    let next = formation(3, 24, peers(&[2]), &[(2, 0..8)]);
    assert_eq!(story.stands(1, leaving(24, holding(2, Cause::Ordered))), [formed(&next), dismissed(1)]);
}
