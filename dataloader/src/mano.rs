//! Mano (LOOPLM §6): arithmetic mod 23 (or less) in prefix notation, a task whose depth is the length of the expression.
//!
//! ```text
//! <bos> <len_2> - * 5 7 20 <ans> 15          5·7 − 20 = 15 (mod 23)
//! ```

use std::collections::BTreeMap;

use anello_configs::random::Stream;
use anello_store::Store;

use crate::index::Index;
use crate::progress::{Meter, OnProgress, parallel};
use crate::write::{ShardFormat, ShardWriter};
use crate::{Error, Result};

/// The paper's modulus, and the largest: numbers are 0 to 22.
pub const MODULUS: u32 = 23;

const BOS: i32 = 1;
const ANS: i32 = 2;
/// First of `+`, `-`, `*`.
const OPERATORS: i32 = 3;
/// First of the numbers.
const NUMBERS: i32 = OPERATORS + 3;
/// `<len_1>`; the lengths go on to `<len_L>`.
const LENGTHS: i32 = NUMBERS + MODULUS as i32;

/// What to generate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManoOptions {
    /// Most operations of an expression (L), 1 to 1000.
    pub length: u32,
    /// Expressions to train on, with ℓ ~ U[1, L] operations each.
    pub documents: u64,
    /// Expressions to test on, with ℓ = L.
    pub eval_documents: u64,
    /// What is computed modulo, 2 to [`MODULUS`], which is the paper's. A smaller one has smaller tables to learn, so that small
    /// models learn them; the vocabulary is the same.
    pub modulus: u32,
    /// Only the answer is a training target, by `loss_mask`. Otherwise every token is.
    pub answer_only: bool,
    /// Seed of the expressions.
    pub seed: u64,
    /// Folder or URL: gets `train/`, `eval/`, `tokenizer.json` and `vocab.json`.
    pub output: String,
    /// How shards are written.
    pub format: ShardFormat,
    /// Threads.
    pub threads: usize,
}

/// Tokens in the vocabulary for expressions of up to `length` operations: 29 and one for each length.
pub fn mano_vocab(length: u32) -> u32 {
    LENGTHS as u32 + length
}

/// Writes the training and test sets, their indices and the vocabulary. Progress counts documents.
///
/// What is written is a function of the options but `threads`. In the test set's documents the answer is the last
/// token, and the only one that counts.
pub fn synth_mano(options: &ManoOptions, progress: OnProgress<'_>) -> Result<()> {
    if !(1..=1000).contains(&options.length) || options.documents == 0 {
        let detail = "a length of 1 to 1000 and at least one document are wanted";
        return Err(Error::tool(&options.output, detail));
    }
    if !(2..=MODULUS).contains(&options.modulus) {
        return Err(Error::tool(&options.output, format!("a modulus of 2 to {MODULUS} is wanted")));
    }
    let meter = Meter::new(options.documents + options.eval_documents, progress);
    let output = options.output.trim_end_matches('/');
    let root = Store::open(output)?;
    let vocab: BTreeMap<String, i32> =
        (0..mano_vocab(options.length) as i32).map(|id| (mano_token(id), id)).collect();
    let json = |value: &serde_json::Value| serde_json::to_vec_pretty(value).expect("json writes itself");
    root.put("vocab.json", json(&serde_json::json!(vocab)))?;
    let tokenizer = json(&tokenizer(&vocab));
    root.put("tokenizer.json", tokenizer.clone())?;
    for (set, documents, masked) in
        [("train", options.documents, options.answer_only), ("eval", options.eval_documents, true)]
    {
        if documents > 0 {
            write(
                &Store::open(&format!("{output}/{set}"))?,
                (set, documents, masked),
                options,
                &tokenizer,
                &meter,
            )?;
        }
    }
    Ok(())
}

fn write(
    store: &Store,
    (set, documents, masked): (&str, u64, bool),
    options: &ManoOptions,
    tokenizer: &[u8],
    meter: &Meter<'_>,
) -> Result<()> {
    const SHARD_DOCUMENTS: u64 = 1 << 18;
    let shards = documents.div_ceil(SHARD_DOCUMENTS);
    let names: Vec<_> = (0..shards).map(|at| format!("shard-{at:05}-of-{shards:05}.parquet")).collect();
    if let Some(other) =
        store.list("")?.iter().find(|o| o.path.ends_with(".parquet") && !names.contains(&o.path))
    {
        let detail =
            format!("holds {}, which is not of this set; remove the folder or name another one", other.path);
        return Err(Error::tool(store.place(), detail));
    }
    parallel(options.threads, names.len(), |at| {
        let fault = |e: parquet::errors::ParquetError| Error::tool(store.place_of(&names[at]), e);
        let mut writer = ShardWriter::new(options.format, masked, None).map_err(fault)?;
        let first = at as u64 * SHARD_DOCUMENTS;
        let range = first..(first + SHARD_DOCUMENTS).min(documents);
        for document in range.clone() {
            let stream = Stream::new(options.seed, &format!("mano/{set}"), &[document]);
            let ids = expression(stream, options.length, options.modulus, set == "eval");
            let mask: Option<Vec<u8>> =
                masked.then(|| (1..=ids.len()).map(|i| u8::from(i == ids.len())).collect());
            writer.push(&ids, mask.as_deref()).map_err(fault)?;
        }
        let shard = writer.finish().map_err(fault)?;
        store.put(&names[at], shard.bytes)?;
        meter.add(range.end - range.start, shard.tokens)
    })?;
    let index = Index::build(store, true, options.threads, &|_| std::ops::ControlFlow::Continue(()))?;
    index.made_by(tokenizer).save(store)
}

/// One document: with `longest`, of exactly `length` operations, else of 1 to `length`.
fn expression(stream: Stream, length: u32, modulus: u32, longest: bool) -> Vec<i32> {
    let mut draws = Draws { stream, modulus, position: 0 };
    let drawn = draws.below(length) + 1;
    let operations = if longest { length } else { drawn };
    let mut ids = vec![BOS, LENGTHS + operations as i32 - 1];
    let answer = draws.operand(operations, &mut ids);
    ids.extend([ANS, NUMBERS + answer as i32]);
    ids
}

struct Draws {
    stream: Stream,
    modulus: u32,
    position: u64,
}

impl Draws {
    fn below(&mut self, bound: u32) -> u32 {
        self.position += 1;
        self.stream.below_at(self.position - 1, u64::from(bound)) as u32
    }

    /// Appends an expression of `operations` operations, and returns its value. Of an operation's other operations, a
    /// uniform number is in its left operand.
    fn operand(&mut self, operations: u32, ids: &mut Vec<i32>) -> u32 {
        if operations == 0 {
            let number = self.below(self.modulus);
            ids.push(NUMBERS + number as i32);
            return number;
        }
        let operator = self.below(3);
        ids.push(OPERATORS + operator as i32);
        let left = self.below(operations);
        let (a, b) = (self.operand(left, ids), self.operand(operations - 1 - left, ids));
        apply(operator as i32, a, b, self.modulus)
    }
}

/// What a document of Mano is found to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ManoDocument {
    /// Operations of its expression.
    pub operations: u32,
    /// Bit m is set when the answer is right modulo m, 2 to [`MODULUS`], and all numbers are below m.
    pub moduli: u32,
}

/// Reads a whole document, its answer included. The error says in what it is none of Mano.
pub fn read_mano(document: &[i64]) -> std::result::Result<ManoDocument, String> {
    let token = |id: i64| i32::try_from(id).unwrap_or(-1);
    let [begin, length, expression @ .., ans, answer] = document else {
        return Err(format!("of {} tokens is too short", document.len()));
    };
    let operations = token(*length).saturating_sub(LENGTHS).saturating_add(1);
    if (token(*begin), token(*ans)) != (BOS, ANS) || !(1..=1000).contains(&operations) {
        return Err("does not have the form <bos> <len_N> … <ans> ANSWER".to_owned());
    }
    let number = |id: i64| (NUMBERS..LENGTHS).contains(&token(id)).then(|| (token(id) - NUMBERS) as u32);
    let answer = number(*answer).ok_or("ends with no number")?;
    let mut most = answer;
    for id in expression {
        match number(*id) {
            Some(number) => most = most.max(number),
            None if (OPERATORS..NUMBERS).contains(&token(*id)) => {}
            None => return Err(format!("has the token {id} in its expression")),
        }
    }
    let told = expression.iter().filter(|id| token(**id) < NUMBERS).count();
    if told != operations as usize {
        return Err(format!("says that it has {operations} operations, and has {told}"));
    }
    let mut moduli = 0;
    for modulus in (most + 1).max(2)..=MODULUS {
        // From its end: an operator finds its operands done.
        let mut done = Vec::new();
        for id in expression.iter().rev() {
            let value = match (token(*id) - OPERATORS, number(*id)) {
                (_, Some(number)) => number,
                (operator, None) => match (done.pop(), done.pop()) {
                    (Some(a), Some(b)) => apply(operator, a, b, modulus),
                    _ => return Err("has an operator without operands".to_owned()),
                },
            };
            done.push(value);
        }
        match done[..] {
            [value] => moduli |= u32::from(value == answer) << modulus,
            _ => return Err("has more than one expression".to_owned()),
        }
    }
    match moduli {
        0 => Err("has a wrong answer".to_owned()),
        moduli => Ok(ManoDocument { operations: operations as u32, moduli }),
    }
}

fn apply(operator: i32, a: u32, b: u32, modulus: u32) -> u32 {
    match operator {
        0 => (a + b) % modulus,
        1 => (a + modulus - b) % modulus,
        _ => (a * b) % modulus,
    }
}

/// How a token of Mano is written.
pub fn mano_token(id: i32) -> String {
    match id {
        0 => "<pad>".to_owned(),
        BOS => "<bos>".to_owned(),
        ANS => "<ans>".to_owned(),
        OPERATORS..NUMBERS => ["+", "-", "*"][(id - OPERATORS) as usize].to_owned(),
        NUMBERS..LENGTHS => (id - NUMBERS).to_string(),
        _ => format!("<len_{}>", id - LENGTHS + 1),
    }
}

/// A `tokenizer.json` of whole words, so that tools can print and read expressions.
fn tokenizer(vocab: &BTreeMap<String, i32>) -> serde_json::Value {
    serde_json::json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [],
        "normalizer": null,
        "pre_tokenizer": { "type": "WhitespaceSplit" },
        "post_processor": null,
        "decoder": null,
        "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "<pad>" },
    })
}

#[cfg(test)]
mod tests;
