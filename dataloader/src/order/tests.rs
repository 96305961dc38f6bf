use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

fn shape(name: &str, row_groups: u64, rows: u64, tokens: u64) -> SourceShape {
    SourceShape { name: name.to_owned(), row_groups, rows, tokens }
}

proptest! {
    #[test]
    fn every_row_group_is_taken_once_an_epoch_by_one_lane(seed: u64, lanes in 1u32..20, groups in 1u64..60) {
        let order = Order::new(seed, lanes, vec![shape("web", groups, groups, groups)]);
        let epochs = 3;
        let mut taken: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
        for lane in 0..lanes {
            for n in 0..(epochs * groups).div_ceil(u64::from(lanes)) {
                let slot = order.slot(0, lane, n);
                taken.entry(slot.epoch).or_default().push(slot.row_group);
            }
        }
        for epoch in 0..epochs {
            let mut groups_taken = taken[&epoch].clone();
            groups_taken.sort_unstable();
            prop_assert_eq!(groups_taken, (0..groups).collect::<Vec<_>>());
        }
    }

    #[test]
    fn documents_of_a_row_group_are_a_permutation(seed: u64, rows in 1u64..500, epoch in 0u64..4) {
        let order = Order::new(seed, 1, vec![shape("web", 3, 3, 3)]);
        let permutation = order.documents(0, Slot { epoch, row_group: 1 }, rows);
        let mut documents: Vec<_> = (0..rows).map(|d| permutation.at(d)).collect();
        documents.sort_unstable();
        prop_assert_eq!(documents, (0..rows).collect::<Vec<_>>());
    }
}

#[test]
fn epochs_sources_seeds_and_row_groups_are_shuffled_differently() {
    let order = Order::new(1, 1, vec![shape("a", 100, 1, 1), shape("b", 100, 1, 1)]);
    let other = Order::new(2, 1, vec![shape("a", 100, 1, 1)]);
    let row_groups = |order: &Order, source, epoch: u64| -> Vec<u64> {
        (0..100).map(|n| order.slot(source, 0, epoch * 100 + n).row_group).collect()
    };
    let first = row_groups(&order, 0, 0);
    assert_ne!(first, (0..100).collect::<Vec<_>>());
    assert_ne!(first, row_groups(&order, 0, 1));
    assert_ne!(first, row_groups(&order, 1, 0));
    assert_ne!(first, row_groups(&other, 0, 0));
    let documents = |epoch, row_group| {
        let permutation = order.documents(0, Slot { epoch, row_group }, 100);
        (0..100).map(|d| permutation.at(d)).collect::<Vec<_>>()
    };
    assert_ne!(documents(0, 0), documents(0, 1));
    assert_ne!(documents(0, 0), documents(1, 0));
}

#[test]
fn token_shares_are_the_weights_whatever_the_document_lengths() {
    // Mean lengths 20, 500 and 3000; weights 0.5, 0.3, 0.2 by tokens.
    let means = [20u64, 500, 3000];
    let shapes = means.iter().zip(["a", "b", "c"]).map(|(mean, name)| shape(name, 1, 1000, 1000 * mean));
    let order = Order::new(11, 2, shapes.collect());
    let draws = order.draws(0, 1, &[5.0, 3.0, 2.0]);
    let mut tokens = [0u64; 3];
    for position in 0..400_000 {
        let source = draws.at(position);
        tokens[source] += means[source];
    }
    let total = tokens.iter().sum::<u64>() as f64;
    for (got, want) in tokens.iter().zip([0.5, 0.3, 0.2]) {
        let share = *got as f64 / total;
        assert!((share - want).abs() < 0.02, "share {share}, weight {want}");
    }
}

#[test]
fn a_source_without_weight_is_never_drawn_and_stages_and_lanes_draw_apart() {
    let order = Order::new(3, 2, vec![shape("a", 1, 1, 1), shape("b", 1, 1, 1), shape("c", 1, 1, 1)]);
    let drawn = |stage, lane| {
        let draws = order.draws(stage, lane, &[1.0, 0.0, 1.0]);
        assert!(draws.includes(0) && !draws.includes(1) && draws.includes(2));
        (0..200).map(|k| draws.at(k)).collect::<Vec<_>>()
    };
    assert!(drawn(0, 0).iter().all(|s| *s != 1));
    assert_ne!(drawn(0, 0), drawn(0, 1));
    assert_ne!(drawn(0, 0), drawn(1, 0));
}

/// The order of a run is part of its identity: these values may change only with a note in the changelog.
#[test]
fn the_order_of_seed_7_is_what_it_was() {
    let order = Order::new(7, 2, vec![shape("web", 5, 50, 5000), shape("code", 3, 30, 6000)]);
    let slots: Vec<_> = (0..6).map(|n| (order.slot(0, 1, n).epoch, order.slot(0, 1, n).row_group)).collect();
    let draws: Vec<_> = (0..12).map(|k| order.draws(1, 0, &[0.5, 0.5]).at(k)).collect();
    let permutation = order.documents(1, Slot { epoch: 0, row_group: 2 }, 6);
    let documents: Vec<_> = (0..6).map(|d| permutation.at(d)).collect();
    assert_eq!(slots, [(0, 3), (0, 4), (1, 2), (1, 0), (1, 4), (2, 1)]);
    assert_eq!(draws, [1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0]);
    assert_eq!(documents, [3, 4, 2, 5, 0, 1]);
}
