//! The sum has the bits of one worker, whatever the ring.

use std::time::Duration;

use anello_collective::{Collective, Error, MESSAGE_BYTES_MAX, Shape, Step};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use crate::fabric::{Fabric, assert_bits, borrowed, output, partials, run, whole};

/// A step as a worker takes it: reduce with a message, then gather.
pub fn step(member: &mut dyn Collective, step: Step) -> (Vec<f32>, Vec<Vec<u8>>) {
    let partials = partials(member, step);
    let (partials, mut out) = (borrowed(&partials), output(member));
    let message = format!("{} at {step}", member.ring().rank());
    let reduction = member.reduction(step, message.as_bytes()).unwrap();
    let messages = reduction.finish(&partials, &mut out).unwrap();
    let ring = member.ring();
    let (own, mut buffer) = (ring.elements(ring.rank()), vec![f32::NAN; ring.len()]);
    buffer[own].copy_from_slice(&out);
    member.all_gather(step, &mut buffer).unwrap();
    (buffer, messages)
}

fn shapes() -> Vec<Shape> {
    let mut shapes = Vec::new();
    for members in [1, 2, 3, 4, 7] {
        for (blocks, block_len) in [(0, 5), (1, 300), (5, 7), (16, 65)] {
            let mut even = Shape::balanced(8, members, blocks, block_len);
            shapes.push(even.clone());
            // More members than lanes: some serve none.
            shapes.push(Shape::balanced(4, members, blocks, block_len));
            // The first serves nearly all, in the order of lanes and backwards.
            let last = members as u32 - 1;
            even.ranges = (0..=last)
                .map(|rank| if rank == 0 { 0..8 - last } else { 7 - last + rank..8 - last + rank })
                .collect();
            shapes.push(even.clone());
            even.ranges.reverse();
            shapes.push(even);
        }
    }
    shapes
}

pub fn any_ring_has_the_bits_of_one_worker<F: Fabric>() {
    for shape in shapes() {
        let results = run(F::ring(&shape), |mut member| {
            [0, 1, 7].map(|at| step(&mut *member, Step(at))).into_iter().zip([0, 1, 7]).collect::<Vec<_>>()
        });
        for (rank, steps) in results.into_iter().enumerate() {
            for ((sum, messages), at) in steps {
                assert_bits(&sum, &whole(&shape, Step(at)), &format!("rank {rank}, step {at}, {shape:?}"));
                assert_eq!(messages.len(), shape.ranges.len());
                for (sender, message) in messages.into_iter().enumerate() {
                    assert_eq!(message, format!("rank {sender} at step {at}").into_bytes());
                }
            }
        }
    }
}

pub fn random_rings_have_the_bits_of_one_worker<F: Fabric>() {
    let rings = (0u32..5, prop::collection::vec(0u32..17, 0..7), 0u32..12, 1usize..40, any::<u64>());
    let orders = any::<u32>();
    // Each case is a ring of threads and sockets: few of them.
    let mut runner =
        TestRunner::new(ProptestConfig { cases: 48, failure_persistence: None, ..Default::default() });
    let ran = runner.run(
        &(rings, orders, any::<prop::sample::Index>()),
        |((log, cuts, blocks, block_len, at), shuffle, turn)| {
            let lanes = 1 << log;
            let mut bounds: Vec<u32> =
                cuts.into_iter().map(|cut| cut % (lanes + 1)).chain([0, lanes]).collect();
            bounds.sort_unstable();
            let mut ranges: Vec<_> = bounds.windows(2).map(|pair| pair[0]..pair[1]).collect();
            // Ranks need not follow the lanes.
            let members = ranges.len();
            ranges.rotate_left(turn.index(members));
            let mut order: Vec<u32> = (0..blocks).collect();
            order.sort_by_key(|block| (block.wrapping_mul(0x9E37_79B9) ^ shuffle, *block));
            // Of the last ranks some may own nothing.
            let owners = shuffle % (members as u32 + 1);
            let (shape, at) = (Shape { ranges, blocks, block_len, order, owners }, Step(at));
            for (sum, _) in run(F::ring(&shape), |mut member| step(&mut *member, at)) {
                assert_bits(&sum, &whole(&shape, at), &format!("{shape:?}"));
            }
            Ok(())
        },
    );
    ran.unwrap();
}

pub fn blocks_may_become_ready_in_any_order<F: Fabric>() {
    let shape = Shape {
        order: (0..11).map(|at| at * 4 % 11).collect(),
        ranges: vec![0..3, 3..4, 4..8],
        blocks: 11,
        block_len: 50,
        owners: 2,
    };
    let expected = whole(&shape, Step(2));
    let results = run(F::ring(&shape), |mut member| {
        let partials = partials(&*member, Step(2));
        let (partials, mut out) = (borrowed(&partials), output(&*member));
        let mut reduction = member.reduction(Step(2), b"").unwrap();
        // Each member another order, some blocks never named.
        for blocks in [vec![9..11, 0..4, 4..5], vec![], vec![5..6, 0..0, 0..11]][out.len() % 3].clone() {
            reduction.advance(blocks, &partials, &mut out, Duration::from_micros(100)).unwrap();
        }
        reduction.finish(&partials, &mut out).unwrap();
        (member.ring().elements(member.ring().rank()), out)
    });
    for (elements, out) in results {
        assert_bits(&out, &expected[elements], "own blocks");
    }
}

pub fn blocks_that_are_not_summed_stay_as_they_are<F: Fabric>() {
    let shape = Shape { ranges: vec![0..1, 1..4], blocks: 6, block_len: 9, order: vec![4, 1, 3], owners: 0 };
    let expected = whole(&shape, Step(3));
    for sum in run(F::ring(&shape), |mut member| step(&mut *member, Step(3)).0) {
        for block in 0..6 {
            let elements = block * 9..(block + 1) * 9;
            match [1, 3, 4].contains(&block) {
                true => assert_bits(&sum[elements.clone()], &expected[elements], "a block that is summed"),
                false => assert!(sum[elements].iter().all(|v| v.is_nan()), "block {block} was touched"),
            }
        }
    }
}

pub fn buffers_larger_than_sockets_do_not_deadlock<F: Fabric>() {
    // 24 MiB each way between some pairs; the sockets hold 4 to 6.
    let shape =
        Shape { ranges: vec![0..1, 1..3, 3..4], blocks: 96, block_len: 1 << 16, order: vec![], owners: 0 };
    let expected = whole(&shape, Step(5));
    let results = run(F::ring(&shape), |mut member| step(&mut *member, Step(5)).0);
    for sum in results {
        assert_bits(&sum, &expected, "all blocks");
    }
}

pub fn messages_come_in_the_order_of_ranks<F: Fabric>() {
    let shape = Shape::balanced(4, 4, 1, 1);
    let results = run(F::ring(&shape), |mut member| {
        let rank = member.ring().rank().0 as u8;
        // From nothing to the bound, everyone at once.
        [0, 1, MESSAGE_BYTES_MAX].map(|len| member.exchange(Step(len as u64), &vec![rank; len]).unwrap())
    });
    for exchanged in results {
        for (len, messages) in [0, 1, MESSAGE_BYTES_MAX].into_iter().zip(exchanged) {
            assert!(messages == [0, 1, 2, 3].map(|rank| vec![rank; len]), "{len} bytes");
        }
    }
}

pub fn mistakes_of_the_caller_change_nothing<F: Fabric>() {
    let shape = Shape::balanced(4, 2, 3, 4);
    let results = run(F::ring(&shape), |mut member| {
        let mut out = output(&*member);
        let fact = |result: Result<(), Error>| match result.unwrap_err() {
            Error::Shape { fact } => fact,
            other => panic!("{other:?}"),
        };
        assert_eq!(
            fact(member.exchange(Step(0), &[0; MESSAGE_BYTES_MAX + 1]).map(drop)),
            "a message of 16777217 bytes; 16777216 are allowed"
        );
        assert!(fact(member.reduce_scatter(Step(0), &[], &mut out)).starts_with("0 partial sums; "));
        assert!(
            fact(member.reduce_scatter(Step(0), &[&[0.0; 12]], &mut []))
                .starts_with("an output of 0 elements; ")
        );
        assert_eq!(
            fact(member.reduce_scatter(Step(0), &[&[0.0; 11]], &mut out)),
            "a partial sum of 11 elements; the buffer has 12"
        );
        assert_eq!(fact(member.all_gather(Step(0), &mut [0.0])), "a buffer of 1 elements; the ring's has 12");
        step(&mut *member, Step(0)).0
    });
    for sum in results {
        assert_bits(&sum, &whole(&shape, Step(0)), "after mistakes");
    }
}
