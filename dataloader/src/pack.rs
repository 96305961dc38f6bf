//! Documents to packed sequences. Pure.
//!
//! ```text
//! documents     a0 a1 a2 | b0 b1 b2 b3 | c0 ...          sequence length 5
//! input_ids     a0 a1 a2 b0 b1 / b2 b3 c0 ...
//! targets       a1 a2  – b1 b2 / b3  – c1 ...            – is -100: there is no next token
//! positions      0  1  2  0  1 /  0  1  0 ...            mask = document; with causal 0 1 2 3 4 / 0 1 2 ...
//! ```
//! A document that a sequence end cuts goes on as a new segment; the target of the last token before the cut is the
//! first one after it. So each pair of a token and its next is trained on exactly once, whatever the length.

use anello_configs::Mask;

use crate::decode::{Document, IGNORED};

/// What one forward and backward takes: `sequences × length` tokens, row by row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MicroBatch {
    /// Sequences (B).
    pub sequences: u32,
    /// Tokens of a sequence (S).
    pub length: u32,
    /// Token ids, [B, S] row by row.
    pub input_ids: Vec<i64>,
    /// The next token of the same document, [B, S]; −100 where there is none or it does not count.
    pub targets: Vec<i64>,
    /// Place of the token in its segment, [B, S].
    pub positions: Vec<i32>,
    /// Flat offsets in B·S at which a segment begins: strictly rising, the first is 0, every row start is one, and
    /// the end (B·S) is not among them. A token attends to its own segment only.
    pub segment_starts: Vec<u32>,
    /// Targets that are not −100.
    pub counted: u64,
}

impl MicroBatch {
    /// Tokens in it, B·S.
    pub fn tokens(&self) -> usize {
        self.input_ids.len()
    }

    /// Memory it takes, bytes.
    pub fn bytes(&self) -> usize {
        self.input_ids.len() * 8
            + self.targets.len() * 8
            + self.positions.len() * 4
            + self.segment_starts.len() * 4
    }
}

/// Fills one [`MicroBatch`].
#[derive(Debug)]
pub struct Packer {
    batch: MicroBatch,
    mask: Mask,
}

impl Packer {
    /// An empty micro-batch of `sequences` of `length` tokens each, both at least 1 and at most 2³¹ tokens together.
    pub fn new(sequences: u32, length: u32, mask: Mask) -> Self {
        let tokens = sequences as usize * length as usize;
        assert!(tokens > 0 && tokens <= i32::MAX as usize, "a micro-batch has 1 to 2^31 - 1 tokens");
        let batch = MicroBatch {
            sequences,
            length,
            input_ids: Vec::with_capacity(tokens),
            targets: Vec::with_capacity(tokens),
            positions: Vec::with_capacity(tokens),
            segment_starts: Vec::with_capacity(sequences as usize * 2),
            counted: 0,
        };
        Self { batch, mask }
    }

    /// Tokens that are in.
    pub fn tokens(&self) -> usize {
        self.batch.input_ids.len()
    }

    /// Tokens that the current sequence still takes; 0 when the micro-batch is full.
    pub fn room(&self) -> usize {
        let (filled, length) = (self.batch.input_ids.len(), self.batch.length as usize);
        if filled == self.batch.sequences as usize * length { 0 } else { length - filled % length }
    }

    /// Puts a segment of `document` from token `from` on, as far as the current sequence has room; returns how many
    /// tokens that was.
    pub fn push(&mut self, document: Document<'_>, from: usize) -> usize {
        let take = self.room().min(document.tokens.len() - from);
        if take == 0 {
            return 0;
        }
        let batch = &mut self.batch;
        let start = batch.input_ids.len();
        let column = start % batch.length as usize;
        let first = match self.mask {
            Mask::Document => 0,
            Mask::Causal => column,
        };
        if first == 0 {
            batch.segment_starts.push(start as u32);
        }
        batch.positions.extend(first as i32..(first + take) as i32);

        let wide = |tokens: &[i32], out: &mut Vec<i64>| out.extend(tokens.iter().map(|id| i64::from(*id)));
        let next = from + 1..(from + 1 + take).min(document.tokens.len());
        wide(&document.tokens[from..from + take], &mut batch.input_ids);
        match document.counted {
            None => {
                wide(&document.tokens[next.clone()], &mut batch.targets);
                batch.counted += next.len() as u64;
            }
            Some(counted) => {
                let pairs = document.tokens[next.clone()].iter().zip(&counted[next.clone()]);
                batch.targets.extend(pairs.map(|(id, c)| if *c == 0 { IGNORED } else { i64::from(*id) }));
                batch.counted += counted[next.clone()].iter().filter(|c| **c != 0).count() as u64;
            }
        }
        if next.len() < take {
            batch.targets.push(IGNORED);
        }
        take
    }

    /// The micro-batch. Panics unless it is full.
    pub fn finish(self) -> MicroBatch {
        assert_eq!(self.room(), 0, "a micro-batch is full before it is used");
        self.batch
    }
}

#[cfg(test)]
mod tests;
