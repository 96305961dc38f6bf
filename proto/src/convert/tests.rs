//! Whatever comes in: no panic, and every word that is taken goes out and comes in again as itself.

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use prost::Message;

use super::*;

fn number() -> impl Strategy<Value = u64> {
    prop_oneof![0u64..9, any::<u64>(), Just(u64::MAX)]
}

fn small() -> impl Strategy<Value = u32> {
    prop_oneof![0u32..9, any::<u32>()]
}

fn text() -> impl Strategy<Value = String> {
    // The last is longer than a reason may be, and no character ends where it must be cut.
    prop_oneof![4 => "\\PC{0,9}", 1 => Just("\u{20ac}".repeat(REASON_BYTES_MAX / 3 + 9))]
}

fn address() -> impl Strategy<Value = String> {
    prop_oneof![9 => any::<std::net::SocketAddr>().prop_map(|address| address.to_string()), 1 => text()]
}

fn endpoints() -> impl Strategy<Value = v1::Endpoints> {
    (vec(address(), 0..4), vec(address(), 0..4)).prop_map(|(ring, peers)| v1::Endpoints { ring, peers })
}

fn written() -> impl Strategy<Value = v1::Written> {
    let blocks = vec((number(), number()).prop_map(|(first, end)| v1::BlockRange { first, end }), 0..3);
    let kept = (number(), option::weighted(0.9, (number(), number()))).prop_map(|(owner, blocks)| v1::Kept {
        owner,
        blocks: blocks.map(|(first, end)| v1::BlockRange { first, end }),
    });
    (number(), number(), text(), text(), blocks, number(), option::of(kept)).prop_map(
        |(step, generation, parts, facts, blocks, all_blocks, kept)| v1::Written {
            step,
            generation,
            parts,
            facts,
            blocks,
            all_blocks,
            kept,
        },
    )
}

fn stance() -> impl Strategy<Value = v1::Stance> {
    use v1::holding::Cause as C;
    use v1::stance::Activity as A;
    let cause = prop_oneof![
        Just(C::Ordered(v1::Ordered {})),
        Just(C::Ended(v1::Ended {})),
        (option::of(number()), text()).prop_map(|(lost, reason)| C::Broken(v1::Broken { lost, reason })),
        text().prop_map(C::NoState),
        (vec(number(), 1..4), text())
            .prop_map(|(peers, reason)| C::Unreachable(v1::Unreachable { peers, reason })),
        (vec(number(), 0..4), text())
            .prop_map(|(workers, reason)| C::Diverged(v1::Diverged { workers, reason })),
        text().prop_map(C::Fault),
    ];
    let activity = prop_oneof![
        Just(A::Outside(v1::Outside {})),
        number().prop_map(A::Forming),
        number().prop_map(A::Running),
        (number(), option::weighted(0.9, cause))
            .prop_map(|(generation, cause)| A::Holding(v1::Holding { generation, cause })),
    ];
    (
        option::of(number()),
        option::of(shard()),
        option::weighted(0.9, activity),
        any::<bool>(),
        prop_oneof![9 => vec(written(), 0..4), 1 => vec(written(), WRITTEN_MAX..WRITTEN_MAX + 3)],
        vec(unwritten(), 0..UNWRITTEN_MAX + 2),
    )
        .prop_map(|(holds, shard, activity, leaving, written, unwritten)| v1::Stance {
            holds,
            shard,
            activity,
            leaving,
            written,
            unwritten,
        })
}

fn unwritten() -> impl Strategy<Value = v1::Unwritten> {
    (number(), number(), text()).prop_map(|(step, generation, reason)| v1::Unwritten {
        step,
        generation,
        reason,
    })
}

fn shard() -> impl Strategy<Value = v1::Shard> {
    let block = || (0u64..9, 0u64..9).prop_map(|(first, end)| v1::BlockRange { first, end });
    let blocks = prop_oneof![9 => vec(block(), 0..3), 1 => vec(block(), RANGES_MAX + 1)];
    (blocks, number(), any::<bool>()).prop_map(|(blocks, all_blocks, next)| v1::Shard {
        blocks,
        all_blocks,
        next,
    })
}

fn hello() -> impl Strategy<Value = v1::Hello> {
    let names = (text(), text(), text(), text());
    let parts = (option::weighted(0.9, endpoints()), option::weighted(0.9, stance()));
    (number(), number(), names, parts).prop_map(
        |(worker, connection, (job, machine, build, device), (endpoints, stance))| v1::Hello {
            job,
            worker,
            connection,
            endpoints,
            machine,
            build,
            device,
            stance,
        },
    )
}

fn formation() -> impl Strategy<Value = v1::Formation> {
    use v1::formation::Source as S;
    let source = prop_oneof![
        Just(S::Seed(v1::FromSeed {})),
        number().prop_map(S::Checkpoint),
        vec(number(), 0..3).prop_map(|workers| S::Holders(v1::Holders { workers })),
    ];
    let member = (number(), option::weighted(0.9, endpoints()), small(), small()).prop_map(
        |(worker, endpoints, first_lane, end_lane)| v1::Member { worker, endpoints, first_lane, end_lane },
    );
    (number(), number(), vec(member, 0..4), option::weighted(0.9, source), any::<bool>()).prop_map(
        |(generation, start, members, source, save_first)| v1::Formation {
            generation,
            start,
            members,
            source,
            save_first,
        },
    )
}

fn to_worker() -> impl Strategy<Value = v1::ToWorker> {
    use v1::to_worker::Order as O;
    let welcome =
        (text(), number(), number(), number()).prop_map(|(run, heartbeat_ms, reported, silence_ms)| {
            v1::Welcome { run, heartbeat_ms, reported, silence_ms }
        });
    let order = prop_oneof![
        welcome.prop_map(O::Welcome),
        formation().prop_map(O::Form),
        (number(), any::<bool>()).prop_map(|(generation, save)| O::Hold(v1::Hold { generation, save })),
        (number(), text()).prop_map(|(generation, reason)| O::Abort(v1::Abort { generation, reason })),
        number().prop_map(O::Committed),
        (number(), number()).prop_map(|(step, generation)| O::WriteKept(v1::WriteKept { step, generation })),
        (-2i32..9, text()).prop_map(|(why, reason)| O::Leave(v1::Leave { why, reason })),
    ];
    (number(), option::weighted(0.95, order)).prop_map(|(epoch, order)| v1::ToWorker { epoch, order })
}

fn again<M: Message + Default>(message: &M) -> M {
    M::decode(&message.encode_to_vec()[..]).expect("what was encoded can be decoded")
}

/// What a coordinator takes in goes out and comes in again as itself.
fn take_stance(message: v1::Stance) {
    if let Ok(stance) = Stance::try_from(message) {
        assert!(stance.written.iter().all(|written| {
            let kept = written.kept.iter().map(|kept| &kept.blocks);
            written.blocks.iter().chain(kept).all(|b| b.end <= written.all_blocks)
        }));
        assert_eq!(Stance::try_from(again(&v1::Stance::from(&stance))), Ok(stance));
    }
}

fn take_hello(message: v1::Hello) {
    if let Ok(hello) = Hello::try_from(message) {
        assert_eq!(Hello::try_from(again(&v1::Hello::from(&hello))), Ok(hello));
    }
}

fn pace() -> impl Strategy<Value = v1::Pace> {
    let times = prop::array::uniform7(number());
    (number(), small(), small(), times).prop_map(|(generation, lanes, steps, times)| {
        let [step_us, data_us, compute_us, forward_us, reduce_us, update_us, checkpoint_us] = times;
        v1::Pace {
            generation,
            lanes,
            steps,
            step_us,
            data_us,
            compute_us,
            forward_us,
            reduce_us,
            update_us,
            checkpoint_us,
        }
    })
}

fn take_pace(message: v1::Pace) {
    if let Ok(pace) = Pace::try_from(message) {
        assert!(pace.lanes > 0 && pace.steps > 0);
        assert_eq!(Pace::try_from(again(&v1::Pace::from(&pace))), Ok(pace));
    }
}

fn take_order(message: v1::ToWorker) {
    if let Ok((epoch, Word::Order(order))) = <(Epoch, Word)>::try_from(message) {
        let message = v1::ToWorker { epoch: epoch.0, order: Some((&order).into()) };
        assert_eq!(<(Epoch, Word)>::try_from(again(&message)), Ok((epoch, Word::Order(order))));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_stance_is_taken_whole_or_refused(message in stance()) {
        take_stance(message);
    }

    #[test]
    fn any_hello_is_taken_whole_or_refused(message in hello()) {
        take_hello(message);
    }

    #[test]
    fn any_pace_is_taken_whole_or_refused(message in pace()) {
        take_pace(message);
    }

    #[test]
    fn any_order_is_taken_whole_or_refused(message in to_worker()) {
        take_order(message);
    }

    #[test]
    fn any_bytes_are_taken_whole_or_refused(bytes in vec(any::<u8>(), 0..200)) {
        if let Ok(v1::FromWorker { word: Some(word) }) = v1::FromWorker::decode(&bytes[..]) {
            match word {
                v1::from_worker::Word::Hello(hello) => take_hello(hello),
                v1::from_worker::Word::Stance(stance) => take_stance(stance),
                v1::from_worker::Word::Step(_) => {}
                v1::from_worker::Word::Pace(pace) => take_pace(pace),
                v1::from_worker::Word::Failed(failed) => drop(failed.checked()),
            }
        }
        if let Ok(message) = v1::ToWorker::decode(&bytes[..]) {
            take_order(message);
        }
    }

    /// Bytes that were damaged on the way.
    #[test]
    fn any_damage_is_taken_whole_or_refused(message in to_worker(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
        let mut bytes = message.encode_to_vec();
        if !bytes.is_empty() {
            let at = at.index(bytes.len());
            bytes[at] ^= 1u8 << bit;
        }
        if let Ok(message) = v1::ToWorker::decode(&bytes[..]) {
            take_order(message);
        }
    }

    /// A reason of any length arrives, cut off where a character ends.
    #[test]
    fn reasons_are_cut_by_who_says_them(reason in text()) {
        let cause = Cause::Fault { reason: reason.clone() };
        let told = Cause::try_from(v1::holding::Cause::from(&cause));
        let Ok(Cause::Fault { reason: told }) = told else { panic!("{told:?}") };
        prop_assert_eq!(v1::Failed::of(&reason).checked(), Ok(told.clone()));
        prop_assert!(reason.starts_with(&told) && told.len() + 3 >= reason.len().min(REASON_BYTES_MAX));
    }
}

/// Words and fields that a later build adds are nothing to this one.
#[test]
fn what_a_later_build_adds_is_left_out() {
    let later = [0x7a, 0x01, 0x00];
    assert_eq!(v1::FromWorker::decode(&later[..]), Ok(v1::FromWorker { word: None }));
    let stance = v1::Stance::from(&Stance::new(Some(Step(7)), Activity::Outside));
    let more = [&stance.encode_to_vec()[..], &later].concat();
    assert_eq!(v1::Stance::decode(&more[..]), Ok(stance));
}

#[test]
fn what_is_wrong_is_said() {
    let written = v1::Written { step: 9, generation: 2, all_blocks: 0, ..Default::default() };
    let told = Written::try_from(written.clone()).unwrap_err().to_string();
    assert!(told.contains("parts of checkpoint 9, which has no blocks"), "{told}");
    let blocks = vec![v1::BlockRange { first: 3, end: 5 }];
    let told = Written::try_from(v1::Written { all_blocks: 4, blocks, ..written }).unwrap_err().to_string();
    assert!(told.contains("blocks 3 to 5 of checkpoint 9, of 4"), "{told}");
    let endpoints = v1::Endpoints { ring: vec!["here".to_owned()], peers: vec!["127.0.0.1:1".to_owned()] };
    let told = Endpoints::try_from(endpoints).unwrap_err().to_string();
    assert!(told.contains("\"here\", which is no ip:port"), "{told}");
}
