//! What rides along with a step's gradients.

use anello_proto::v1::{PartialSums, StepWord};
use anello_store::Cursor;
use anello_store::events::Event;
use prost::Message;

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
            cursors: self.cursors.iter().map(json).collect(),
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
        let cursors: std::result::Result<Vec<Cursor>, _> =
            word.cursors.iter().map(|text| serde_json::from_str(text)).collect();
        let events: std::result::Result<Vec<Event>, _> =
            word.events.iter().map(|text| serde_json::from_str(text)).collect();
        Ok(Self {
            control: word.control.min(2) as u8,
            sums: sums.collect(),
            cursors: cursors.map_err(|cause| cause.to_string())?,
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
