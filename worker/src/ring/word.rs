//! What rides along with a step's gradients.

use anello_proto::v1::{PartialSums, StepWord};
use anello_store::Cursor;
use anello_store::events::Event;
use prost::Message;

use super::cursors;
use crate::error::{Error, Result};
use crate::fold::fold_sums;
use crate::objective::LossSums;

/// One member's word for one step.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Word {
    /// 0: go on; 1: hold; 2: hold with a checkpoint.
    pub control: u8,
    /// (first lane, lanes, sums) of each aligned subtree, in order.
    pub sums: Vec<(u32, u32, LossSums)>,
    /// Of the member's lanes, in order.
    pub cursors: Vec<Cursor>,
    /// What happened to their data.
    pub events: Vec<Event>,
}

/// What all members' words come to.
#[derive(Debug)]
pub(super) struct Agreed {
    pub control: u8,
    pub sums: LossSums,
    pub events: Vec<Event>,
}

impl Word {
    pub fn encode(&self) -> Vec<u8> {
        let sums = self.sums.iter().map(|(first_lane, lanes, sums)| PartialSums {
            first_lane: *first_lane,
            lanes: *lanes,
            counted: sums.counted,
            loss: sums.loss,
            cross_entropy: sums.cross_entropy.clone(),
            exit: sums.exit.clone(),
            entropy: sums.entropy,
        });
        let word = StepWord {
            control: self.control.into(),
            sums: sums.collect(),
            cursors: Some(cursors::packed(&self.cursors)),
            events: self.events.iter().map(json).collect(),
        };
        word.encode_to_vec()
    }

    fn decode(bytes: &[u8]) -> std::result::Result<Self, String> {
        let word = StepWord::decode(bytes).map_err(|cause| cause.to_string())?;
        let sums = word.sums.into_iter().map(|part| {
            let PartialSums { first_lane, lanes, counted, loss, cross_entropy, exit, entropy } = part;
            (first_lane, lanes, LossSums { counted, loss, cross_entropy, exit, entropy })
        });
        let events: std::result::Result<Vec<Event>, _> =
            word.events.iter().map(|text| serde_json::from_str(text)).collect();
        Ok(Self {
            control: word.control.min(2) as u8,
            sums: sums.collect(),
            cursors: cursors::unpacked(word.cursors.unwrap_or_default())?,
            events: events.map_err(|cause| cause.to_string())?,
        })
    }
}

fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).expect("maps have string keys, and no float is not a number")
}

/// Puts the words of all members together, whose lanes are `lanes` in rank order, and writes where every lane is now
/// into `cursors`.
pub(super) fn agree(
    words: &[Vec<u8>],
    lanes: &[std::ops::Range<u32>],
    cursors: &mut [Cursor],
) -> Result<Agreed> {
    let (mut control, mut sums, mut events) = (0, Vec::new(), Vec::new());
    for (rank, (bytes, lanes)) in words.iter().zip(lanes).enumerate() {
        let word = Word::decode(bytes).map_err(|cause| Error::Ring {
            fact: format!("the word of rank {rank} cannot be read: {cause}"),
        })?;
        let mut next = lanes.start;
        for (first, lanes, _) in &word.sums {
            let aligned = lanes.is_power_of_two() && first.is_multiple_of(*lanes);
            next = if *first == next && aligned { next.saturating_add(*lanes) } else { u32::MAX };
        }
        if next != lanes.end || word.cursors.len() != lanes.len() {
            let fact = format!("the sums of rank {rank} are not those of lanes {lanes:?}");
            return Err(Error::Ring { fact });
        }
        control = control.max(word.control);
        sums.extend(word.sums);
        events.extend(word.events);
        for (lane, cursor) in lanes.clone().zip(word.cursors) {
            cursors[lane as usize] = cursor;
        }
    }
    let total = fold_sums(sums, cursors.len() as u32);
    Ok(Agreed { control, sums: total, events })
}

#[cfg(test)]
mod tests {
    use anello_collective::MESSAGE_BYTES_MAX;
    use anello_configs::lanes::{LANE_PLACES_MAX, balanced};
    use anello_proto::v1::{Cursors, LaneCursor, OpenDocument, SourcePlace};
    use anello_store::{OpenDocument as Open, SourceCursor};
    use proptest::prelude::*;

    use super::*;

    fn sums(counted: u64) -> LossSums {
        let loss = counted as f64 / 8.0;
        LossSums { counted, loss, cross_entropy: vec![loss; 2], exit: vec![0.5; 2], entropy: 0.25 }
    }

    prop_compose! {
        fn any_cursor()(
            (stage, draws) in (0..3u32, any::<u64>()),
            sources in prop::collection::btree_map("[a-c]", (any::<u64>(), any::<u64>()), 0..3),
            open in prop::option::of(("[a-d]", any::<u64>())),
        ) -> Cursor {
            let place = |(row_groups, documents)| SourceCursor { row_groups, documents };
            Cursor {
                stage,
                draws,
                sources: sources.into_iter().map(|(name, both)| (name, place(both))).collect(),
                open: open.map(|(source, token)| Open { source, token }),
            }
        }
    }

    /// A message of a step as a peer may say it, some of it right for four lanes of two members.
    fn any_word() -> impl Strategy<Value = Vec<u8>> {
        let number = || prop_oneof![0..5u32, any::<u32>()];
        let floats = || prop::collection::vec(any::<f64>(), 0..3);
        let part = (number(), number(), any::<u64>(), any::<f64>(), floats(), floats()).prop_map(
            |(first_lane, lanes, counted, loss, cross_entropy, exit)| PartialSums {
                first_lane,
                lanes,
                counted,
                loss,
                cross_entropy,
                exit,
                entropy: loss,
            },
        );
        let right = prop_oneof![Just((0, 2)), Just((2, 2))].prop_map(|(first_lane, lanes)| PartialSums {
            first_lane,
            lanes,
            cross_entropy: vec![1.0; 2],
            exit: vec![0.5; 2],
            ..PartialSums::default()
        });
        let place = (number(), any::<u64>(), any::<u64>())
            .prop_map(|(source, row_groups, documents)| SourcePlace { source, row_groups, documents });
        let open = (number(), any::<u64>()).prop_map(|(source, token)| OpenDocument { source, token });
        let lane = (number(), any::<u64>(), prop::collection::vec(place, 0..3), prop::option::of(open))
            .prop_map(|(stage, draws, sources, open)| LaneCursor { stage, draws, sources, open });
        let cursors = (prop::collection::vec("[a-c]", 0..4), prop::collection::vec(lane, 0..4))
            .prop_map(|(sources, lanes)| Cursors { sources, lanes });
        let events = prop::collection::vec(prop_oneof!["\\PC{0,9}", Just("{}".to_owned())], 0..2);
        let sums = prop::collection::vec(prop_oneof![3 => right, 1 => part], 0..3);
        let word = (number(), sums, prop::option::of(cursors), events).prop_map(
            |(control, sums, cursors, events)| StepWord { control, sums, cursors, events }.encode_to_vec(),
        );
        prop_oneof![9 => word, 1 => prop::collection::vec(any::<u8>(), 0..40)]
    }

    proptest! {
        #[test]
        fn all_know_where_every_lane_is(all in prop::collection::vec(any_cursor(), 4), control in 0..3u8) {
            let lanes = balanced(4, 2);
            let words = lanes.iter().zip([0, control]).map(|(lanes, control)| {
                let cursors = all[lanes.start as usize..lanes.end as usize].to_vec();
                let sums = vec![(lanes.start, 2, sums(u64::from(lanes.start) + 1))];
                Word { control, sums, cursors, events: Vec::new() }.encode()
            });
            let mut moved = vec![Cursor::default(); 4];
            let agreed = agree(&words.collect::<Vec<_>>(), &lanes, &mut moved).unwrap();
            prop_assert_eq!(moved, all);
            prop_assert_eq!((agreed.control, agreed.sums.counted), (control, 4));
        }

        /// What is not a word is an error, and what is one is of the lanes that it should be of: never a panic.
        #[test]
        fn whatever_a_peer_says_is_refused_or_of_its_lanes(words in prop::collection::vec(any_word(), 2)) {
            let mut cursors = vec![Cursor::default(); 4];
            if let Ok(agreed) = agree(&words, &balanced(4, 2), &mut cursors) {
                prop_assert!(agreed.control <= 2);
                prop_assert!(words.iter().all(|word| StepWord::decode(&word[..]).unwrap().cursors.unwrap().lanes.len() == 2));
            }
        }
    }

    /// One worker may be left with all lanes of a run: its word is one that a message may be.
    #[test]
    fn the_word_of_all_lanes_is_no_longer_than_a_message() {
        for lanes in [1 << 16, 1 << 12] {
            let places = LANE_PLACES_MAX / u64::from(lanes);
            let place = SourceCursor { row_groups: u64::MAX, documents: u64::MAX };
            let name = |at: u64| format!("{at:064}");
            let sources = (0..places).map(|at| (name(at), place)).collect();
            let open = Some(Open { source: name(places - 1), token: u64::MAX });
            let cursor = Cursor { stage: 999, draws: u64::MAX, sources, open };
            let cursors = vec![cursor; lanes as usize];
            let word = Word {
                control: 1,
                sums: vec![(0, lanes, sums(1))],
                cursors: cursors.clone(),
                events: Vec::new(),
            };
            let bytes = word.encode();
            assert!(bytes.len() < MESSAGE_BYTES_MAX * 2 / 3, "{} bytes", bytes.len());
            let mut moved = vec![Cursor::default(); lanes as usize];
            agree(&[bytes], std::slice::from_ref(&(0..lanes)), &mut moved).unwrap();
            assert!(moved == cursors);
        }
    }
}
