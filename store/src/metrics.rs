//! The metrics of a run as Parquet: one row a step, one column a loop step.
//!
//! Rows are written in objects `metrics/FIRST-LAST.parquet`. Everything but the `_s` columns is a function of the run
//! alone: whoever trained, and however often it was resumed, the values are the same bits.

mod eval;

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, BooleanArray, Float64Array, RecordBatch, StringArray, UInt64Array};
use arrow::datatypes::{Field, Schema};
use bytes::Bytes;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

pub use eval::Evaluated;
use eval::{EvalColumns, eval_columns};

use crate::foreign::caught;
use crate::{Error, Object, Result, Store};

/// What is logged of a step. Through serde its figures are their bits: equal at the other end, NaN included.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// The step, from 0.
    pub step: u64,
    /// Its stage.
    pub stage: String,
    /// Tokens trained on, this step included.
    pub tokens: u64,
    /// Tokens of the batch.
    pub batch_tokens: u64,
    /// Tokens of the batch that have a target: what the means below are over.
    pub counted: u64,
    /// Learning rate.
    #[serde(with = "bits")]
    pub lr: f64,
    /// The objective, nats a token.
    #[serde(with = "bits")]
    pub loss: f64,
    /// L(t) for t = 1..=T, nats a token.
    #[serde(with = "bits")]
    pub loop_loss: Vec<f64>,
    /// Mean p(t) for t = 1..=T.
    #[serde(with = "bits")]
    pub exit: Vec<f64>,
    /// Mean H(p), nats.
    #[serde(with = "bits")]
    pub entropy: f64,
    /// Global gradient norm before the clip.
    #[serde(with = "bits")]
    pub grad_norm: f64,
    /// False when the step was skipped because it was not finite.
    pub applied: bool,
    /// Digest of the weights after the step, as a manifest has it; put on record every `record.digest_every_steps`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights: Option<String>,
    /// What the model was worth on held-out data after the step, one a set; mostly none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub evals: Vec<Evaluated>,
    /// Wall-clock seconds of the step, and where they went.
    pub seconds: Seconds,
}

/// Wall-clock seconds of a step. The only columns that differ between runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Seconds {
    /// The whole step.
    #[serde(with = "bits")]
    pub step: f64,
    /// Waiting for data.
    #[serde(with = "bits")]
    pub data: f64,
    /// Forward and backward of all lanes.
    #[serde(with = "bits")]
    pub compute: f64,
    /// Of `compute`, the way from the embeddings to the hidden states; the rest are losses and the way back. 0 of older builds.
    #[serde(with = "bits", default = "bits::zero")]
    pub forward: f64,
    /// In the collective that adds the gradients of several workers; 0 with one.
    #[serde(with = "bits")]
    pub reduce: f64,
    /// Norm, clip and update.
    #[serde(with = "bits")]
    pub update: f64,
    /// Waiting for the copy of a checkpoint.
    #[serde(with = "bits")]
    pub checkpoint: f64,
    /// Measuring on held-out data.
    #[serde(with = "bits", default = "bits::zero")]
    pub eval: f64,
}

/// Floating-point numbers as the integers that their bits are: text would lose a bit here and a NaN there.
mod bits {
    use super::{Deserialize, Deserializer, Serialize, Serializer};

    /// What is not there.
    pub fn zero() -> f64 {
        0.0
    }

    pub trait Bits: Sized {
        type As: Serialize + for<'de> Deserialize<'de>;
        fn to(&self) -> Self::As;
        fn from(bits: Self::As) -> Self;
    }

    impl Bits for f64 {
        type As = u64;
        fn to(&self) -> u64 {
            self.to_bits()
        }
        fn from(bits: u64) -> Self {
            Self::from_bits(bits)
        }
    }

    impl Bits for Vec<f64> {
        type As = Vec<u64>;
        fn to(&self) -> Vec<u64> {
            self.iter().map(Bits::to).collect()
        }
        fn from(bits: Vec<u64>) -> Self {
            bits.into_iter().map(f64::from_bits).collect()
        }
    }

    pub fn serialize<T: Bits, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
        value.to().serialize(serializer)
    }

    pub fn deserialize<'de, T: Bits, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
        T::As::deserialize(deserializer).map(T::from)
    }
}

impl StepRecord {
    /// Expected depth Σ t·p(t), loop steps.
    pub fn depth(&self) -> f64 {
        self.exit.iter().zip(1..).map(|(p, t)| p * f64::from(t)).sum()
    }

    /// KL(p ‖ uniform) = ln T − H(p), nats.
    pub fn kl(&self) -> f64 {
        (self.exit.len() as f64).ln() - self.entropy
    }

    /// The same with the wall-clock figures at zero: what must be equal between two runs.
    pub fn without_seconds(&self) -> Self {
        Self { seconds: Seconds::default(), ..self.clone() }
    }
}

const NUMBERS: [&str; 14] = [
    "lr",
    "loss",
    "entropy",
    "kl",
    "depth",
    "grad_norm",
    "step_s",
    "data_s",
    "compute_s",
    "update_s",
    "checkpoint_s",
    REDUCE,
    EVAL,
    FORWARD,
];
/// Columns that older files do not have.
const REDUCE: &str = "reduce_s";
const EVAL: &str = "eval_s";
const FORWARD: &str = "forward_s";
const WEIGHTS: &str = "weights";

fn numbers(record: &StepRecord) -> [f64; 14] {
    let s = &record.seconds;
    let (kl, depth) = (record.kl(), record.depth());
    let of_step = [record.lr, record.loss, record.entropy, kl, depth, record.grad_norm];
    let [lr, loss, entropy, kl, depth, norm] = of_step;
    let of_time = [s.step, s.data, s.compute, s.update, s.checkpoint, s.reduce, s.eval, s.forward];
    let [step, data, compute, update, checkpoint, reduce, eval, forward] = of_time;
    [lr, loss, entropy, kl, depth, norm, step, data, compute, update, checkpoint, reduce, eval, forward]
}

/// The records as one Arrow batch: the columns of a metrics object.
pub fn to_batch(records: &[StepRecord]) -> RecordBatch {
    let loops = records.iter().map(|r| r.loop_loss.len()).max().unwrap_or(0);
    let mut columns: Vec<(String, ArrayRef)> = Vec::new();
    let integer = |of: fn(&StepRecord) -> u64| -> ArrayRef {
        Arc::new(UInt64Array::from_iter_values(records.iter().map(of)))
    };
    columns.push(("step".into(), integer(|r| r.step)));
    columns.push(("stage".into(), Arc::new(StringArray::from_iter_values(records.iter().map(|r| &r.stage)))));
    columns.push(("tokens".into(), integer(|r| r.tokens)));
    columns.push(("batch_tokens".into(), integer(|r| r.batch_tokens)));
    columns.push(("counted".into(), integer(|r| r.counted)));
    let applied: Vec<bool> = records.iter().map(|r| r.applied).collect();
    columns.push(("applied".into(), Arc::new(BooleanArray::from(applied))));
    let digests = records.iter().map(|record| record.weights.as_deref());
    columns.push((WEIGHTS.into(), Arc::new(digests.collect::<StringArray>())));
    for (at, name) in NUMBERS.into_iter().enumerate() {
        let values = records.iter().map(|record| numbers(record)[at]);
        columns.push((name.into(), Arc::new(Float64Array::from_iter_values(values))));
    }
    for t in 0..loops {
        let column = |of: fn(&StepRecord) -> &Vec<f64>| -> ArrayRef {
            Arc::new(records.iter().map(|record| of(record).get(t).copied()).collect::<Float64Array>())
        };
        columns.push((format!("loss_{}", t + 1), column(|r| &r.loop_loss)));
        columns.push((format!("exit_{}", t + 1), column(|r| &r.exit)));
    }
    columns.extend(eval_columns(records));
    let fields = columns.iter().map(|(name, array)| Field::new(name, array.data_type().clone(), true));
    let schema = Schema::new(fields.collect::<Vec<_>>());
    let arrays = columns.into_iter().map(|(_, array)| array).collect();
    RecordBatch::try_new(Arc::new(schema), arrays).expect("every column has one value a record")
}

fn encode(records: &[StepRecord]) -> Vec<u8> {
    let batch = to_batch(records);
    let mut bytes = Vec::new();
    let mut writer =
        ArrowWriter::try_new(&mut bytes, batch.schema(), None).expect("a flat schema of plain types");
    writer.write(&batch).expect("writing to memory");
    writer.close().expect("writing to memory");
    bytes
}

/// The records of steps `steps` as they were encoded, each step at most once: no more rows are read, whatever the bytes tell of.
fn decode(bytes: Bytes, steps: RangeInclusive<u64>) -> std::result::Result<Vec<StepRecord>, String> {
    caught(|| decode_batches(bytes, steps))?
}

fn decode_batches(bytes: Bytes, steps: RangeInclusive<u64>) -> std::result::Result<Vec<StepRecord>, String> {
    let reader = ParquetRecordBatchReaderBuilder::try_new(bytes).and_then(|builder| builder.build());
    let mut records: Vec<StepRecord> = Vec::new();
    for batch in reader.map_err(|e| e.to_string())? {
        let batch = batch.map_err(|e| e.to_string())?;
        let missing = |name: &str| format!("column {name} is missing or of another type");
        let array = |name: &str| batch.column_by_name(name).ok_or_else(|| missing(name));
        let number = |name: &str| -> std::result::Result<Float64Array, String> {
            if [REDUCE, EVAL, FORWARD].contains(&name) && batch.column_by_name(name).is_none() {
                return Ok(vec![0.0; batch.num_rows()].into());
            }
            array(name)?.as_any().downcast_ref::<Float64Array>().cloned().ok_or_else(|| missing(name))
        };
        let integer = |name: &str| -> std::result::Result<UInt64Array, String> {
            array(name)?.as_any().downcast_ref::<UInt64Array>().cloned().ok_or_else(|| missing(name))
        };
        let (step, tokens) = (integer("step")?, integer("tokens")?);
        let (batch_tokens, counted) = (integer("batch_tokens")?, integer("counted")?);
        let stage = array("stage")?.as_any().downcast_ref::<StringArray>().ok_or_else(|| missing("stage"))?;
        let applied =
            array("applied")?.as_any().downcast_ref::<BooleanArray>().ok_or_else(|| missing("applied"))?;
        let weights = match batch.column_by_name(WEIGHTS) {
            Some(column) => {
                Some(column.as_any().downcast_ref::<StringArray>().ok_or_else(|| missing(WEIGHTS))?)
            }
            None => None,
        };
        let columns = NUMBERS.map(number).into_iter().collect::<std::result::Result<Vec<_>, _>>()?;
        let per_loop = |stem: &str| -> std::result::Result<Vec<Float64Array>, String> {
            let names = (1..).map(|t| format!("{stem}_{t}"));
            names.take_while(|name| batch.column_by_name(name).is_some()).map(|name| number(&name)).collect()
        };
        let (losses, exits) = (per_loop("loss")?, per_loop("exit")?);
        let evals = EvalColumns::of(&batch)?;
        for row in 0..batch.num_rows() {
            let next = records.last().map_or(*steps.start(), |last| last.step + 1);
            if !(next..=*steps.end()).contains(&step.value(row)) {
                return Err(format!(
                    "step {} where step {next} to {} is looked for",
                    step.value(row),
                    steps.end()
                ));
            }
            let of = |columns: &[Float64Array]| {
                columns.iter().filter(|c| c.is_valid(row)).map(|c| c.value(row)).collect::<Vec<_>>()
            };
            let [
                lr,
                loss,
                entropy,
                _kl,
                _depth,
                grad_norm,
                s_step,
                data,
                compute,
                update,
                checkpoint,
                reduce,
                eval,
                forward,
            ] = columns.iter().map(|c| c.value(row)).collect::<Vec<_>>()[..]
            else {
                return Err("the columns are incomplete".to_owned());
            };
            records.push(StepRecord {
                step: step.value(row),
                stage: stage.value(row).to_owned(),
                tokens: tokens.value(row),
                batch_tokens: batch_tokens.value(row),
                counted: counted.value(row),
                lr,
                loss,
                loop_loss: of(&losses),
                exit: of(&exits),
                entropy,
                grad_norm,
                applied: applied.value(row),
                weights: weights.filter(|w| w.is_valid(row)).map(|w| w.value(row).to_owned()),
                evals: evals.at(row),
                seconds: Seconds { step: s_step, data, compute, forward, reduce, update, checkpoint, eval },
            });
        }
    }
    Ok(records)
}

fn range_of(path: &str) -> Option<(u64, u64)> {
    let (first, last) = path.strip_prefix("metrics/")?.strip_suffix(".parquet")?.split_once('-')?;
    Some((first.parse().ok()?, last.parse().ok()?))
}

fn path_of(first: &StepRecord, last: &StepRecord) -> String {
    format!("metrics/{:010}-{:010}.parquet", first.step, last.step)
}

/// Writes records of consecutive steps as one object. [`Error::Fenced`] when another process has written them.
pub fn write(store: &Store, records: &[StepRecord]) -> Result<()> {
    let (Some(first), Some(last)) = (records.first(), records.last()) else { return Ok(()) };
    let (path, bytes) = (path_of(first, last), Bytes::from(encode(records)));
    // The same bytes, wall-clock figures included, are our own: written before, with an answer that was lost.
    if store.create(&path, bytes.clone())? || store.get(&path)?.as_ref() == Some(&bytes) {
        return Ok(());
    }
    Err(Error::Fenced { place: store.place_of(&path) })
}

/// The objects of records, in the order of their steps: first and last step, and path.
fn objects(store: &Store) -> Result<Vec<((u64, u64), String)>> {
    let listed = store.list("metrics")?.into_iter();
    let mut objects: Vec<_> =
        listed.filter_map(|object| Some((range_of(&object.path)?, object.path))).collect();
    objects.sort_unstable_by_key(|(range, _)| *range);
    Ok(objects)
}

/// The records of an object; absent: it is gone.
fn records_of(store: &Store, (first, last): (u64, u64), path: &str) -> Result<Option<Vec<StepRecord>>> {
    let Some(bytes) = store.get(path)? else { return Ok(None) };
    let malformed =
        |cause| Error::malformed(store.place_of(path), cause, "delete it; resuming writes later steps anew");
    decode(bytes, first..=last).map(Some).map_err(malformed)
}

/// Hands over the records of steps after `after` (absent: all) in the order of their steps, each step once, as objects are read: no
/// more of them are in memory than hold the same step.
pub fn read_after(store: &Store, after: Option<u64>, mut take: impl FnMut(StepRecord)) -> Result<()> {
    // What a later object may tell otherwise: of a step that two of them hold, the later one counts.
    let mut held = BTreeMap::new();
    for ((first, last), path) in objects(store)? {
        if after.is_some_and(|after| last <= after) {
            continue;
        }
        let Some(records) = records_of(store, (first, last), &path)? else { continue };
        let untold = held.split_off(&first);
        std::mem::replace(&mut held, untold).into_values().for_each(&mut take);
        let wanted = records.into_iter().filter(|record| after.is_none_or(|after| record.step > after));
        held.extend(wanted.map(|record| (record.step, record)));
    }
    held.into_values().for_each(take);
    Ok(())
}

/// All records of a run in order of their steps, each step once.
pub fn read(store: &Store) -> Result<Vec<StepRecord>> {
    let mut records = Vec::new();
    read_after(store, None, |record| records.push(record))?;
    Ok(records)
}

/// The last `count` records of a run in order of their steps: no more objects are read than hold them.
pub fn read_last(store: &Store, count: usize) -> Result<Vec<StepRecord>> {
    let mut by_step = BTreeMap::new();
    let objects = objects(store)?;
    for (at, (steps, path)) in objects.iter().enumerate().rev() {
        let Some(records) = records_of(store, *steps, path)? else { continue };
        // Of two that hold a step the later one counts.
        for record in records {
            by_step.entry(record.step).or_insert(record);
        }
        let before = objects[..at].iter().map(|((_, last), _)| *last).max();
        let enough = by_step.keys().rev().take(count).filter(|step| Some(**step) > before).count();
        if enough == count {
            break;
        }
    }
    let surplus = by_step.len().saturating_sub(count);
    Ok(by_step.into_values().skip(surplus).collect())
}

/// Removes what was logged from `step` on: a run that goes on from there logs it again.
pub fn truncate(store: &Store, step: u64) -> Result<()> {
    for Object { path, .. } in store.list("metrics")? {
        let Some((first, last)) = range_of(&path) else { continue };
        if last < step {
            continue;
        }
        if first < step {
            let Some(mut stay) = records_of(store, (first, last), &path)? else { continue };
            stay.retain(|record| record.step < step);
            if let (Some(first), Some(last)) = (stay.first(), stay.last()) {
                store.put(&path_of(first, last), encode(&stay))?;
            }
        }
        store.delete(&path)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
