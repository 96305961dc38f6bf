use proptest::prelude::*;

use super::*;
use crate::order::SourceShape;

/// Sources in memory: `sets[source][row group]`; every token is unique in its source.
#[derive(Clone, Debug)]
struct Sets {
    sets: Vec<Vec<Arc<Documents>>>,
    corrupt: BTreeSet<(usize, u64)>,
    fetches: u64,
}

impl Fetch for Sets {
    fn fetch(&mut self, source: usize, row_group: u64) -> Result<Arc<Documents>> {
        self.fetches += 1;
        if self.corrupt.contains(&(source, row_group)) {
            return Err(Error::Corrupt {
                file: format!("{source}.parquet"),
                row_group: row_group as usize,
                offset: 4,
                detail: "a test broke it".to_owned(),
            });
        }
        Ok(self.sets[source][row_group as usize].clone())
    }
}

impl Sets {
    /// `lengths[source][row group]` are the lengths of its documents.
    fn new(lengths: &[Vec<Vec<usize>>]) -> Self {
        let sets = lengths.iter().map(|groups| {
            let mut next = 0;
            let group = |lengths: &Vec<usize>| {
                let rows: Vec<_> = lengths
                    .iter()
                    .map(|length| {
                        next += *length as i32;
                        ((next - *length as i32..next).collect(), None)
                    })
                    .collect();
                Arc::new(Documents::from_rows(&rows))
            };
            groups.iter().map(group).collect()
        });
        Self { sets: sets.collect(), corrupt: BTreeSet::new(), fetches: 0 }
    }

    fn order(&self, seed: u64, lanes: u32) -> Arc<Order> {
        let shapes = self.sets.iter().enumerate().map(|(source, groups)| SourceShape {
            name: format!("s{source}"),
            row_groups: groups.len() as u64,
            rows: groups.iter().map(|d| d.len() as u64).sum(),
            tokens: groups.iter().map(|d| d.tokens().len() as u64).sum(),
        });
        Arc::new(Order::new(seed, lanes, shapes.collect()))
    }
}

fn stage(stage: u32, sequence: u32, micro_batches: u32, weights: &[f64]) -> StepData {
    let named = weights.iter().enumerate().map(|(s, w)| (format!("s{s}"), *w));
    let mixture = Arc::new(named.collect());
    StepData { stage, sequence, micro_batch: 2, micro_batches, mask: Mask::Document, mixture }
}

/// Three stages of four steps: sequence length, micro-batches and mixture change.
fn plan(step: u64) -> StepData {
    match step / 4 {
        0 => stage(0, 7, 1, &[1.0, 1.0]),
        1 => stage(1, 16, 2, &[0.0, 1.0]),
        _ => stage(2, 5, 3, &[3.0, 1.0]),
    }
}

fn walk(lane: &mut Lane, steps: std::ops::Range<u64>, sets: &mut Sets) -> Vec<LaneStep> {
    steps.map(|step| lane.step(step, &plan(step), sets).unwrap()).collect()
}

fn lengths() -> impl Strategy<Value = Vec<Vec<Vec<usize>>>> {
    let group = prop::collection::vec(1usize..30, 1..6);
    prop::collection::vec(prop::collection::vec(group, 1..7), 2..=2)
}

proptest! {
    #[test]
    fn a_saved_cursor_goes_on_as_if_nothing_happened(
        lengths in lengths(), seed: u64, lanes in 1u32..5, at in 0u64..12, corrupt in 0u64..8,
    ) {
        let mut sets = Sets::new(&lengths);
        // One corrupt row group in a source that has more of them.
        if sets.sets[1].len() > 1 {
            sets.corrupt.insert((1, corrupt % sets.sets[1].len() as u64));
        }
        let order = sets.order(seed, lanes);
        let new = |cursor: &Cursor| Lane::new(order.clone(), lanes - 1, OnCorrupt::Skip, cursor).unwrap();
        let mut lane = new(&Cursor::default());
        let all = walk(&mut lane, 0..12, &mut sets);
        let cursor = match at { 0 => Cursor::default(), at => all[at as usize - 1].cursor.clone() };
        let text = serde_json::to_string(&cursor).unwrap();
        let mut resumed = new(&serde_json::from_str(&text).unwrap());
        prop_assert_eq!(resumed.cursor(), cursor);
        let rest = walk(&mut resumed, at..12, &mut sets);
        prop_assert_eq!(&all[at as usize..], &rest[..]);
    }

    #[test]
    fn going_to_a_place_costs_one_row_group_a_source_at_most(
        lengths in lengths(), seed: u64, at in 1u64..12,
    ) {
        let mut sets = Sets::new(&lengths);
        let order = sets.order(seed, 2);
        let mut lane = Lane::new(order.clone(), 1, OnCorrupt::Fail, &Cursor::default()).unwrap();
        let before = walk(&mut lane, 0..at, &mut sets).pop().unwrap();
        let reads = |mut lane: Lane, mut sets: Sets| {
            sets.fetches = 0;
            walk(&mut lane, at..at + 1, &mut sets);
            sets.fetches
        };
        let resumed = Lane::new(order, 1, OnCorrupt::Fail, &before.cursor).unwrap();
        let (fresh, warm) = (reads(resumed, sets.clone()), reads(lane, sets));
        prop_assert!(fresh <= warm + 2, "{fresh} row groups after seek, {warm} without");
    }

    #[test]
    fn all_lanes_together_see_each_token_once_an_epoch(
        lengths in lengths(), seed: u64, lanes in 1u32..6, sequence in 1u32..40,
    ) {
        let mut sets = Sets::new(&lengths[..1]);
        let (groups, order) = (sets.sets[0].clone(), sets.order(seed, lanes));
        let mut seen = Vec::new();
        for lane in 0..lanes {
            // What this lane has of the first epoch: its slots below R, whole.
            let slots = (0..).map(|n| order.slot(0, lane, n)).take_while(|slot| slot.epoch == 0);
            let want: usize = slots.map(|slot| groups[slot.row_group as usize].tokens().len()).sum();
            let mut walker = Lane::new(order.clone(), lane, OnCorrupt::Fail, &Cursor::default()).unwrap();
            let (mut ids, mut step) = (Vec::new(), 0);
            while ids.len() < want {
                let taken = walker.step(step, &stage(0, sequence, 1, &[1.0]), &mut sets).unwrap();
                ids.extend(taken.micro_batches.into_iter().flat_map(|b| b.input_ids));
                step += 1;
            }
            seen.extend_from_slice(&ids[..want]);
        }
        seen.sort_unstable();
        let all: i64 = groups.iter().map(|d| d.tokens().len() as i64).sum();
        prop_assert_eq!(seen, (0..all).collect::<Vec<_>>());
    }
}

#[test]
fn tokens_are_counted_by_source_and_add_up() {
    let mut sets = Sets::new(&[vec![vec![5, 9], vec![3]], vec![vec![50, 20]]]);
    let mut lane = Lane::new(sets.order(5, 1), 0, OnCorrupt::Fail, &Cursor::default()).unwrap();
    let taken = walk(&mut lane, 0..12, &mut sets);
    for (step, taken) in taken.iter().enumerate() {
        let data = plan(step as u64);
        let tokens = u64::from(data.sequence * data.micro_batch * data.micro_batches);
        assert_eq!(taken.tokens_by_source.values().sum::<u64>(), tokens);
        assert_eq!(taken.micro_batches.len() as u32, data.micro_batches);
    }
    assert!(taken[11].epochs_by_source["s0"] >= 1, "17 tokens are gone through within 12 steps");
    // Stage 1 is of s1 alone; the rest of a document of s0 is left at its door.
    assert!(taken[4..8].iter().all(|t| t.tokens_by_source.keys().eq(["s1"])));
}

#[test]
fn a_corrupt_row_group_stops_the_lane_or_is_skipped_and_told() {
    let mut sets = Sets::new(&[vec![vec![4; 3], vec![4; 3], vec![4; 3]]]);
    sets.corrupt.insert((0, 1));
    let order = sets.order(1, 1);
    let data = stage(0, 8, 3, &[1.0]);
    let mut lane = Lane::new(order.clone(), 0, OnCorrupt::Fail, &Cursor::default()).unwrap();
    let error = (0..9).find_map(|step| lane.step(step, &data, &mut sets).err()).unwrap();
    assert!(error.to_string().starts_with("0.parquet: row group 1 at byte 4 is corrupt"), "{error}");

    let mut lane = Lane::new(order, 0, OnCorrupt::Skip, &Cursor::default()).unwrap();
    let taken: Vec<_> = (0..3).map(|step| lane.step(step, &data, &mut sets).unwrap()).collect();
    let skipped: Vec<_> = taken.iter().flat_map(|t| &t.skipped_row_groups).collect();
    // 144 tokens are six times the 24 that can be read: six epochs, each of which meets the corrupt one.
    assert!((5..=7).contains(&skipped.len()), "{}", skipped.len());
    assert!(skipped.iter().all(|s| (s.source.as_str(), s.row_group) == ("s0", 1)));
    let ids = taken.iter().flat_map(|t| &t.micro_batches).flat_map(|b| &b.input_ids);
    assert!(ids.into_iter().all(|id| !(12..24).contains(id)));
}

#[test]
fn a_source_without_a_readable_row_group_is_an_error() {
    let mut sets = Sets::new(&[vec![vec![4], vec![4]]]);
    sets.corrupt = BTreeSet::from([(0, 0), (0, 1)]);
    let mut lane = Lane::new(sets.order(1, 3), 2, OnCorrupt::Skip, &Cursor::default()).unwrap();
    let error = lane.step(0, &stage(0, 8, 1, &[1.0]), &mut sets).unwrap_err();
    assert!(matches!(error, Error::NothingLeft { .. }), "{error}");
}

#[test]
fn cursors_and_mixtures_that_do_not_fit_are_errors() {
    let mut sets = Sets::new(&[vec![vec![4]]]);
    let order = sets.order(1, 1);
    let lane = |cursor: &Cursor| Lane::new(order.clone(), 0, OnCorrupt::Fail, cursor);
    let place = |row_groups, documents| SourceCursor { row_groups, documents };
    let cursor =
        |name: &str, place| Cursor { sources: [(name.to_owned(), place)].into(), ..Cursor::default() };
    assert!(lane(&cursor("gone", place(0, 0))).is_err());
    let open = Some(OpenDocument { source: "s0".to_owned(), token: 1 });
    assert!(lane(&Cursor { open, ..cursor("s0", place(0, 0)) }).is_err());

    let data = stage(0, 2, 1, &[1.0]);
    let error = lane(&cursor("s0", place(0, 2))).unwrap().step(0, &data, &mut sets).unwrap_err();
    assert!(error.to_string().contains("does not fit the documents of source s0"), "{error}");
    for weights in [&[1.0, 1.0][..], &[0.0], &[-1.0], &[f64::NAN], &[]] {
        let data = stage(0, 2, 1, weights);
        assert!(lane(&Cursor::default()).unwrap().step(0, &data, &mut sets).is_err(), "{weights:?}");
    }
}

#[test]
fn token_shares_of_a_lane_converge_to_the_weights() {
    // Short and long documents; token ids stay unique, epochs repeat.
    let short = (0..8).map(|g| (0..40).map(|d| 3 + (g * 7 + d * 5) % 11).collect()).collect();
    let long = (0..6).map(|g| (0..9).map(|d| 100 + (g * 31 + d * 57) % 300).collect()).collect();
    let mut sets = Sets::new(&[short, long]);
    let order = sets.order(17, 3);
    let mut lane = Lane::new(order, 1, OnCorrupt::Fail, &Cursor::default()).unwrap();
    let data = stage(0, 512, 4, &[0.35, 0.65]);
    let mut tokens = BTreeMap::<String, u64>::new();
    for step in 0..200 {
        for (source, more) in lane.step(step, &data, &mut sets).unwrap().tokens_by_source {
            *tokens.entry(source).or_default() += more;
        }
    }
    let share = tokens["s0"] as f64 / (tokens["s0"] + tokens["s1"]) as f64;
    assert!((share - 0.35).abs() < 0.01, "share {share} of 819200 tokens");
}
