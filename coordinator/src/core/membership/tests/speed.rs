//! How long things take: recoveries, slow members, lanes by speed.

use super::*;

#[test]
fn a_ring_that_follows_another_says_how_long_it_took_and_what_it_cost() {
    let recovered = |generation, took, again, checkpoint: Option<u64>| {
        let (generation, took) = (Generation(generation), Millis(took));
        let checkpoint = checkpoint.map(Step);
        Effect::Record(Entry::Recovered { generation, workers: 1, took, again, checkpoint })
    };
    let mut story = Story::running(2);
    story.event(Event::Reported { step: Step(42) });
    (story.now, _) = (300, story.event(Event::Unlinked { worker: WorkerId(2) }));
    // Rank 0, which is gone or not, has told of one step more than the survivor holds.
    story.stands(1, stance(Some(41), holding(1, lost(2))));
    story.now = 450;
    story.event(Event::Recorded { generation: Generation(2) });
    assert_eq!(story.stands(1, stance(Some(41), running(2))), [recovered(2, 150, 1, None)]);
    story.event(Event::Committed { step: Step(40) });
    // Two that differ in turn: what is held is not used, and the time counts from the first.
    let diverged = || Cause::Diverged { workers: Vec::new(), reason: "they differ".to_owned() };
    story.now = 500;
    story.stands(1, stance(Some(52), holding(2, diverged())));
    story.event(Event::Listed { steps: vec![Step(40)] });
    story.event(Event::Recorded { generation: Generation(3) });
    story.now = 700;
    let broken = Cause::Broken { lost: None, reason: "connection reset".to_owned() };
    story.stands(1, stance(Some(40), holding(3, broken)));
    story.event(Event::Listed { steps: vec![Step(40)] });
    story.event(Event::Recorded { generation: Generation(4) });
    story.now = 900;
    let out = story.stands(1, stance(Some(40), running(4)));
    let Effect::Record(Entry::Recovered { took: Millis(400), again: 12, .. }) = &out[0] else {
        panic!("{out:?}")
    };
}

#[test]
fn a_slow_member_is_told_of_and_nothing_else_comes_of_it() {
    let mut story = Story::running(2);
    let paced = |id, lane_us: u64| {
        let spent = Spent { compute_us: lane_us * 4 * 20, ..Spent::default() };
        let pace = Pace { generation: Generation(1), lanes: 4, steps: 20, spent };
        Event::Paced { worker: WorkerId(id), pace }
    };
    let before = story.core.clone();
    assert_eq!(story.event(paced(2, 250)), []);
    let slow = Entry::Slow { worker: WorkerId(2), machine: "m".to_owned(), step: Step(10), percent: 250 };
    assert_eq!(story.event(paced(1, 100)), [Effect::Record(slow)]);
    let shown = |story: &Story| {
        let status = story.core.status();
        status.attendants.iter().map(|a| (a.slow, a.pace.map(|pace| pace.steps))).collect::<Vec<_>>()
    };
    assert_eq!(shown(&story), [(None, Some(20)), (Some(250), Some(20))]);
    assert_eq!(story.event(paced(2, 100)), []);
    let in_step = Entry::InStep { worker: WorkerId(2), step: Step(10) };
    assert_eq!(story.event(paced(1, 100)), [Effect::Record(in_step)]);
    story.core.paces = before.paces.clone();
    assert_eq!(story.core, before);
}

#[test]
fn lanes_are_cut_by_speed_when_that_is_worth_a_new_ring_and_not_too_soon() {
    let mut story = Story::running(2);
    story.core.options.by_speed = true;
    let paced = |generation, id, lanes: u64, lane_us: u64| {
        let spent = Spent { compute_us: lane_us * lanes * 20, ..Spent::default() };
        let (generation, lanes) = (Generation(generation), lanes as u32);
        Event::Paced { worker: WorkerId(id), pace: Pace { generation, lanes, steps: 20, spent } }
    };
    let hold = |id| send(id, Order::Hold { generation: Generation(1), save: false });
    // Not slow enough to be told of, but for the lanes: 100 × 6 and 140 × 4.
    story.event(paced(1, 2, 4, 140));
    story.event(Event::Reported { step: Step(99) });
    assert_eq!(story.event(paced(1, 1, 4, 100)), [], "it has not trained for five windows");
    story.event(Event::Reported { step: Step(100) });
    assert_eq!(story.event(paced(1, 1, 4, 100)), [hold(1), hold(2)]);
    assert_eq!(
        story.core.status().waits_for.as_deref(),
        Some("the next step boundary, to share the lanes out by speed")
    );
    assert_eq!(story.event(paced(1, 1, 4, 100)), [], "it is asked once");
    story.stands(1, stance(Some(90), holding(1, Cause::Ordered)));
    let next = formation(2, 90, peers(&[1, 2]), &[(1, 0..5), (2, 5..8)]);
    assert_eq!(story.stands(2, stance(Some(90), holding(1, Cause::Ordered))), [formed(&next)]);
    // The same speeds ask for nothing more, and a newcomer counts as one of the others.
    story.event(Event::Recorded { generation: Generation(2) });
    (1..=2).for_each(|id| drop(story.stands(id, stance(Some(90), running(2)))));
    story.event(Event::Reported { step: Step(300) });
    story.event(paced(2, 2, 3, 140));
    assert_eq!(story.event(paced(2, 1, 5, 100)), []);
    assert_eq!(story.core.cut(&[1, 2, 3].map(WorkerId), Step(90)), [0..3, 3..5, 5..8]);
}
