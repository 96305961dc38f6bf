//! Workers that do not reach one another.

use super::*;

fn unreachable(peer: u64) -> Cause {
    all_unreachable(&[peer])
}

fn all_unreachable(peers: &[u64]) -> Cause {
    let peers = peers.iter().copied().map(WorkerId).collect();
    Cause::Unreachable { peers, reason: "no answer".to_owned() }
}

fn left_out(worker: u64, from: u64, rest: u64) -> Effect {
    Effect::Record(Entry::LeftOut {
        worker: WorkerId(worker),
        machine: "m".to_owned(),
        from: WorkerId(from),
        step: Some(Step(12)),
        rest: Millis(rest),
        reason: "no answer".to_owned(),
    })
}

fn aborted() -> Cause {
    Cause::Broken { lost: None, reason: "a member has left the ring".to_owned() }
}

/// Members hold after step 12 of a generation, each for its cause; what the last one's word sets off.
fn hold(story: &mut Story, generation: u64, causes: &[(u64, Cause)]) -> Vec<Effect> {
    let mut out = Vec::new();
    for (id, cause) in causes {
        out = story.stands(*id, stance(Some(12), holding(generation, cause.clone())));
    }
    out.into_iter().filter(|effect| matches!(effect, Effect::Record(_))).collect()
}

/// The log takes a generation, and its members run it.
fn run(story: &mut Story, generation: u64, members: &[u64]) {
    story.event(Event::Recorded { generation: Generation(generation) });
    for id in members {
        story.stands(*id, stance(Some(12), running(generation)));
    }
}

#[test]
fn of_two_that_are_apart_the_later_one_is_left_out_and_then_tried_again() {
    let mut story = Story::running(3);
    let next = formation(2, 12, peers(&[1, 2]), &[(1, 0..4), (2, 4..8)]);
    let out = hold(&mut story, 1, &[(2, unreachable(3)), (1, aborted()), (3, aborted())]);
    assert_eq!(out, [left_out(3, 2, 4000), formed(&next)]);
    run(&mut story, 2, &[1, 2]);
    let of_three = story.core.status().attendants.into_iter().find(|a| a.worker == WorkerId(3)).unwrap();
    assert_eq!(of_three.apart, Some(WorkerId(2)));
    // The others' leases are no matter here: they speak.
    story.now = 3900;
    (1..=2).for_each(|id| drop(story.stands(id, stance(Some(12), running(2)))));
    story.stands(3, stance(Some(12), holding(1, aborted())));
    assert_eq!(story.event(Event::Tick), []);
    assert_eq!(story.core.deadline(), Some(Millis(4000)));
    story.now = 4000;
    let hold_on = |id| send(id, Order::Hold { generation: Generation(2), save: false });
    assert_eq!(story.event(Event::Tick), [hold_on(1), hold_on(2)]);
}

#[test]
fn each_time_that_they_are_apart_still_it_takes_twice_as_long() {
    let mut story = Story::running(2);
    let mut rests = Vec::new();
    for generation in (1..20).step_by(2) {
        let out = hold(&mut story, generation, &[(1, aborted()), (2, unreachable(1))]);
        rests.extend(out.iter().filter_map(|effect| match effect {
            Effect::Record(Entry::LeftOut { worker: WorkerId(2), rest, .. }) => Some(rest.0),
            _ => None,
        }));
        run(&mut story, generation + 1, &[1]);
        story.now += rests.last().unwrap() + 1;
        story.stands(1, stance(Some(12), running(generation + 1)));
        story.link(2, stance(Some(12), holding(generation, unreachable(1))));
        story.event(Event::Tick);
        story.stands(1, stance(Some(12), holding(generation + 1, Cause::Ordered)));
        story.event(Event::Recorded { generation: Generation(generation + 2) });
        for id in [1, 2] {
            story.stands(id, stance(Some(12), Activity::Forming { generation: Generation(generation + 2) }));
        }
    }
    assert_eq!(rests, [4, 8, 16, 32, 64, 64, 64, 64, 64, 64].map(|leases| leases * 1000));
}

#[test]
fn once_both_train_together_it_is_forgotten() {
    let mut story = Story::running(2);
    hold(&mut story, 1, &[(1, unreachable(2)), (2, aborted())]);
    run(&mut story, 2, &[1]);
    story.now = 4000;
    story.link(2, stance(Some(12), holding(1, aborted())));
    story.stands(1, stance(Some(12), holding(2, Cause::Ordered)));
    run(&mut story, 3, &[1, 2]);
    let out = hold(&mut story, 3, &[(1, unreachable(2)), (2, aborted())]);
    assert_eq!(out[0], left_out(2, 1, 4000));
}

#[test]
fn who_reaches_nobody_goes_first_though_it_is_the_first_of_all() {
    let mut story = Story::running(3);
    let next = formation(2, 12, peers(&[2, 3]), &[(2, 0..4), (3, 4..8)]);
    let out = hold(&mut story, 1, &[(2, unreachable(1)), (3, unreachable(1)), (1, aborted())]);
    assert_eq!(out, [left_out(1, 3, 4000), formed(&next)]);
}

/// Of a ring that is cut in two, who of one half or the other says whom it does not reach, and who is left.
fn cut_in_two(members: u64, smaller: &[u64], speakers: &[u64]) -> Vec<u64> {
    let mut story = Story::running(members);
    let larger: Vec<u64> = (1..=members).filter(|id| !smaller.contains(id)).collect();
    let causes: Vec<(u64, Cause)> = (1..=members)
        .map(|id| match (speakers.contains(&id), smaller.contains(&id)) {
            (false, _) => (id, aborted()),
            (true, true) => (id, all_unreachable(&larger)),
            (true, false) => (id, all_unreachable(smaller)),
        })
        .collect();
    let out = hold(&mut story, 1, &causes);
    let formed = out.into_iter().find_map(|effect| match effect {
        Effect::Record(Entry::Formed(formation)) => Some(formation),
        _ => None,
    });
    let formed = formed.expect("a half goes on");
    formed.members.iter().map(|member| member.worker.0).collect()
}

#[test]
fn of_two_halves_the_smaller_one_is_left_out_at_once() {
    for smaller in [&[2][..], &[1, 4], &[3, 5]] {
        let larger: Vec<u64> = (1..=6).filter(|id| !smaller.contains(id)).collect();
        let all: Vec<u64> = (1..=6).collect();
        // All say it, or those of one half alone.
        for speakers in [&all[..], smaller, &larger] {
            assert_eq!(cut_in_two(6, smaller, speakers), larger, "{smaller:?} by the word of {speakers:?}");
        }
    }
    // Of two that are alike those stay that came first.
    for half in [[4, 5, 6], [2, 4, 6], [1, 2, 3]] {
        let others: Vec<u64> = (1..=6).filter(|id| !half.contains(id)).collect();
        let first = if half.contains(&6) { others.clone() } else { half.to_vec() };
        for speakers in [&half[..], &others, &[1, 2, 3, 4, 5, 6]] {
            assert_eq!(cut_in_two(6, &half, speakers), first, "{half:?} by the word of {speakers:?}");
        }
    }
}

#[test]
fn one_of_a_half_that_says_nothing_is_known_by_the_others_words() {
    // The half of three is told of by all of the other, and by one of its own.
    assert_eq!(cut_in_two(7, &[5, 6, 7], &[1, 2, 3, 4, 6]), [1, 2, 3, 4]);
    // One that is named by nobody, and names nobody, is in the next ring: that one tells of it.
    assert_eq!(cut_in_two(5, &[4, 5], &[4]), [1, 2, 3, 5]);
}

#[test]
fn who_holds_the_state_stays_and_a_newcomer_that_does_not_reach_it_waits() {
    let mut story = Story::running(1);
    story.event(Event::Desired(2));
    story.link(0, stance(None, Activity::Outside));
    story.stands(1, stance(Some(12), holding(1, Cause::Ordered)));
    story.event(Event::Recorded { generation: Generation(2) });
    story.stands(0, stance(None, holding(2, unreachable(1))));
    let out = story.stands(1, stance(Some(12), holding(2, aborted())));
    let expected = Entry::LeftOut {
        worker: WorkerId(0),
        machine: "m".to_owned(),
        from: WorkerId(1),
        step: None,
        rest: Millis(4000),
        reason: "no answer".to_owned(),
    };
    let next = formation(3, 12, peers(&[1]), &[(1, 0..8)]);
    assert_eq!(out, [Effect::Record(expected), formed(&next)]);
}

#[test]
fn one_that_is_gone_is_dead_and_not_apart() {
    let mut story = Story::running(2);
    hold(&mut story, 1, &[(1, unreachable(2))]);
    story.event(Event::Unlinked { worker: WorkerId(2) });
    story.now = 999;
    story.stands(1, stance(Some(12), holding(1, unreachable(2))));
    story.now = 1000;
    let out = story.event(Event::Tick);
    assert!(matches!(&out[0], Effect::Record(Entry::Lost { worker: WorkerId(2), .. })), "{out:?}");
    assert!(!out.iter().any(|effect| matches!(effect, Effect::Record(Entry::LeftOut { .. }))), "{out:?}");
}

#[test]
fn where_both_are_needed_it_is_told_why_nothing_trains() {
    let mut story = Story::running(2);
    story.core.options.min = 2;
    assert_eq!(hold(&mut story, 1, &[(1, unreachable(2)), (2, aborted())]), [left_out(2, 1, 4000)]);
    let waits_for = story.core.status().waits_for;
    let expected = "workers: 1 of 2 are here; worker 0000000000000002 is left out for 4.000 s more, since it and worker \
                    0000000000000001 do not reach one another";
    assert_eq!(waits_for.as_deref(), Some(expected));
    // Of a sudden both are enough again, when the time is over.
    story.now = 4000;
    (1..=2).for_each(|id| drop(story.link(id, stance(Some(12), holding(1, aborted())))));
    let both = formation(2, 12, peers(&[1, 2]), &[(1, 0..4), (2, 4..8)]);
    assert_eq!(story.core.formation(), Some(&*both));
}
