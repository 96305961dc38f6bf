//! The metrics of a run as TensorBoard reads them: one event file.
//!
//! A file is records one after the other, each an `Event` message (tensorflow/core/util/event.proto) framed as TFRecord:
//!
//! ```text
//! u64 length │ u32 masked CRC-32C of the length │ message │ u32 masked CRC-32C of the message        little-endian
//! masked(c) = rotate_right(c, 15) + 0xa282ead8
//! ```

use std::io::{self, Write};

use anello_store::metrics::{Evaluated, StepRecord};
use crc_fast::{CrcAlgorithm, checksum};
use prost::Message;

/// `tensorflow.Event`, as far as scalars need it.
#[derive(Clone, PartialEq, Message)]
struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum What {
    /// Of the first record: `brain.Event:2`.
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
}

/// `tensorflow.Summary`.
#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Scalar>,
}

/// `tensorflow.Summary.Value` with a number.
#[derive(Clone, PartialEq, Message)]
struct Scalar {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

/// Writes `records` as one event file. The first step begins at `begun_s`, seconds since 1970; the time of each is that and
/// the wall clock that the steps took, so that the same metrics are the same bytes.
pub fn write(out: &mut impl Write, records: &[StepRecord], begun_s: f64) -> io::Result<()> {
    let version = What::FileVersion("brain.Event:2".to_owned());
    frame(out, &Event { wall_time: begun_s, step: 0, what: Some(version) })?;
    let mut wall_time = begun_s;
    for record in records {
        wall_time += record.seconds.step;
        let summary = What::Summary(Summary { value: scalars(record) });
        frame(out, &Event { wall_time, step: record.step as i64, what: Some(summary) })?;
    }
    Ok(())
}

fn frame(out: &mut impl Write, event: &Event) -> io::Result<()> {
    let message = event.encode_to_vec();
    let length = (message.len() as u64).to_le_bytes();
    for part in [&length[..], &message] {
        out.write_all(part)?;
        out.write_all(&masked_crc(part).to_le_bytes())?;
    }
    Ok(())
}

fn masked_crc(bytes: &[u8]) -> u32 {
    let crc = checksum(CrcAlgorithm::Crc32Iscsi, bytes) as u32;
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// The figures of a step; those of one chart share what is before the slash.
fn scalars(record: &StepRecord) -> Vec<Scalar> {
    let seconds = &record.seconds;
    let named: [(&str, f64); 17] = [
        ("loss/objective", record.loss),
        ("exit/depth", record.depth()),
        ("exit/entropy", record.entropy),
        ("exit/kl", record.kl()),
        ("optimizer/lr", record.lr),
        ("optimizer/grad_norm", record.grad_norm),
        ("optimizer/applied", f64::from(u8::from(record.applied))),
        ("progress/tokens", record.tokens as f64),
        ("speed/tokens_per_s", record.batch_tokens as f64 / seconds.step),
        ("seconds/step", seconds.step),
        ("seconds/data", seconds.data),
        ("seconds/compute", seconds.compute),
        ("seconds/forward", seconds.forward),
        ("seconds/reduce", seconds.reduce),
        ("seconds/update", seconds.update),
        ("seconds/checkpoint", seconds.checkpoint),
        ("seconds/eval", seconds.eval),
    ];
    let mut all: Vec<(String, f64)> = named.map(|(tag, value)| (tag.to_owned(), value)).into();
    let mut per_loop = |stem: &str, values: &[f64]| {
        all.extend(values.iter().zip(1..).map(|(value, t)| (format!("{stem}_{t}"), *value)));
    };
    per_loop("loss/loop", &record.loop_loss);
    per_loop("exit/loop", &record.exit);
    for Evaluated { set, counted: _, loop_loss, accuracy, exit } in &record.evals {
        per_loop(&format!("eval_{set}/loss"), loop_loss);
        per_loop(&format!("eval_{set}/accuracy"), accuracy);
        per_loop(&format!("eval_{set}/exit"), exit);
    }
    all.into_iter().map(|(tag, value)| Scalar { tag, simple_value: Some(value as f32) }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stages::record_of;

    /// The check value of CRC-32C; turned right by 15 it is 0x2507c60d.
    #[test]
    fn the_checksum_is_crc32c_masked() {
        assert_eq!(checksum(CrcAlgorithm::Crc32Iscsi, b"123456789"), 0xe306_9283);
        assert_eq!(masked_crc(b"123456789"), 0xc78a_b0e5);
    }

    #[test]
    fn the_file_is_framed_and_reads_back() {
        let mut records = vec![record_of(0, "a", 2), record_of(1, "a", 2)];
        let (loop_loss, accuracy, exit) = (vec![2.5], vec![0.5], vec![1.0]);
        records[1].evals = vec![Evaluated { set: "tales".to_owned(), counted: 9, loop_loss, accuracy, exit }];
        let mut file = Vec::new();
        write(&mut file, &records, 100.0).unwrap();
        let (mut rest, mut events) = (&file[..], Vec::new());
        while !rest.is_empty() {
            let (length, tail) = rest.split_at(8);
            let (crc, tail) = tail.split_at(4);
            assert_eq!(crc, masked_crc(length).to_le_bytes());
            let (message, tail) = tail.split_at(u64::from_le_bytes(length.try_into().unwrap()) as usize);
            let (crc, tail) = tail.split_at(4);
            assert_eq!(crc, masked_crc(message).to_le_bytes());
            events.push(Event::decode(message).unwrap());
            rest = tail;
        }
        assert_eq!(events.len(), 3);
        assert_eq!(events[0].what, Some(What::FileVersion("brain.Event:2".to_owned())));
        let value = |event: &Event, tag: &str| {
            let Some(What::Summary(summary)) = &event.what else { panic!("{event:?}") };
            summary.value.iter().find(|scalar| scalar.tag == tag).and_then(|scalar| scalar.simple_value)
        };
        assert_eq!((events[1].step, events[2].step, events[2].wall_time), (0, 1, 101.0));
        assert_eq!(
            (value(&events[1], "loss/loop_2"), value(&events[1], "eval_tales/loss_1")),
            (Some(6.5), None)
        );
        assert_eq!(value(&events[2], "eval_tales/loss_1"), Some(2.5));
    }
}
