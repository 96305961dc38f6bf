//! What is logged of held-out data, and its columns: there when a set was measured in a file's steps, else absent.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, Float64Array, RecordBatch, UInt64Array};
use serde::{Deserialize, Serialize};

use super::StepRecord;

/// What a model is worth on held-out data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluated {
    /// Name of the set.
    pub set: String,
    /// Its tokens that have a target: what the means below are over.
    pub counted: u64,
    /// L(t) for t = 1..=T, nats a token.
    #[serde(with = "super::bits")]
    pub loop_loss: Vec<f64>,
    /// Share of the tokens whose most probable token at t = 1..=T is the target.
    #[serde(with = "super::bits")]
    pub accuracy: Vec<f64>,
    /// Mean p(t) for t = 1..=T.
    #[serde(with = "super::bits")]
    pub exit: Vec<f64>,
}

/// Of each held-out set `eval_SET_counted`, and `eval_SET_loss_T`, `eval_SET_accuracy_T` and `eval_SET_exit_T` a loop step.
pub(super) fn eval_columns(records: &[StepRecord]) -> Vec<(String, ArrayRef)> {
    let mut loops = BTreeMap::<&str, usize>::new();
    for eval in records.iter().flat_map(|record| &record.evals) {
        let known = loops.entry(&eval.set).or_default();
        *known = eval.loop_loss.len().max(*known);
    }
    let mut columns: Vec<(String, ArrayRef)> = Vec::new();
    for (set, loops) in loops {
        let evals = records.iter().map(|record| record.evals.iter().find(|eval| eval.set == set));
        let counted = evals.clone().map(|eval| eval.map(|eval| eval.counted));
        columns.push((format!("eval_{set}_counted"), Arc::new(counted.collect::<UInt64Array>())));
        for t in 0..loops {
            for (name, of) in EVAL_FIGURES {
                let values = evals.clone().map(|eval| of(eval?).get(t).copied());
                let array: ArrayRef = Arc::new(values.collect::<Float64Array>());
                columns.push((format!("eval_{set}_{name}_{}", t + 1), array));
            }
        }
    }
    columns
}

/// A figure of each loop step.
type PerLoop = fn(&Evaluated) -> &Vec<f64>;

const EVAL_FIGURES: [(&str, PerLoop); 3] =
    [("loss", |eval| &eval.loop_loss), ("accuracy", |eval| &eval.accuracy), ("exit", |eval| &eval.exit)];

/// The columns of held-out sets: name, tokens that count, and each of [`EVAL_FIGURES`] by loop step.
pub(super) struct EvalColumns(Vec<(String, UInt64Array, [Vec<Float64Array>; 3])>);

impl EvalColumns {
    pub fn of(batch: &RecordBatch) -> std::result::Result<Self, String> {
        let schema = batch.schema();
        let names = schema.fields().iter().map(|field| field.name());
        let sets = names.filter_map(|name| name.strip_prefix("eval_")?.strip_suffix("_counted"));
        let wrong = |name: &str| format!("column {name} is of another type");
        let columns = sets.map(|set| {
            let name = format!("eval_{set}_counted");
            let counted = batch.column_by_name(&name).and_then(|column| column.as_any().downcast_ref());
            let counted: &UInt64Array = counted.ok_or_else(|| wrong(&name))?;
            let mut figures = [const { Vec::new() }; 3];
            for ((figure, _), of) in EVAL_FIGURES.iter().zip(&mut figures) {
                for name in (1..).map(|t| format!("eval_{set}_{figure}_{t}")) {
                    let Some(column) = batch.column_by_name(&name) else { break };
                    let column =
                        column.as_any().downcast_ref::<Float64Array>().ok_or_else(|| wrong(&name))?;
                    of.push(column.clone());
                }
            }
            Ok((set.to_owned(), counted.clone(), figures))
        });
        columns.collect::<std::result::Result<_, String>>().map(Self)
    }

    pub fn at(&self, row: usize) -> Vec<Evaluated> {
        let there = self.0.iter().filter(|(_, counted, _)| counted.is_valid(row));
        let of = |columns: &[Float64Array]| {
            columns.iter().filter(|column| column.is_valid(row)).map(|column| column.value(row)).collect()
        };
        there
            .map(|(set, counted, [loss, accuracy, exit])| Evaluated {
                set: set.clone(),
                counted: counted.value(row),
                loop_loss: of(loss),
                accuracy: of(accuracy),
                exit: of(exit),
            })
            .collect()
    }
}
