//! A set from its beginning: what a model is measured on.

use anello_configs::Mask;

use crate::dataset::Dataset;
use crate::decode::{Document, Documents};
use crate::pack::{MicroBatch, Packer};
use crate::{Error, Result};

/// The documents of a set in their order, packed one after the other into micro-batches of one shape. What the last one
/// has room for is filled with tokens that do not count. After an error it yields nothing more.
pub struct InOrder<'a> {
    set: &'a Dataset,
    sequences: u32,
    length: u32,
    mask: Mask,
    vocab: Option<u32>,
    /// The row group that is read next.
    group: u64,
    /// The one being read, and where: document, token in it.
    documents: Option<Documents>,
    at: usize,
    from: usize,
    over: bool,
}

impl<'a> InOrder<'a> {
    /// `set` in micro-batches of `sequences` of `length` tokens each. Ids must be below `vocab`, if given.
    pub fn new(set: &'a Dataset, sequences: u32, length: u32, mask: Mask, vocab: Option<u32>) -> Self {
        let (documents, over) = (None, false);
        Self { set, sequences, length, mask, vocab, group: 0, documents, at: 0, from: 0, over }
    }

    /// Fills `packer` as far as there are documents; whether it is full.
    fn fill(&mut self, packer: &mut Packer) -> Result<bool> {
        while packer.room() > 0 {
            let Some(documents) = &self.documents else {
                if self.group == self.set.row_groups() {
                    return Ok(false);
                }
                self.documents = Some(self.set.read(self.group, self.vocab)?);
                (self.group, self.at, self.from) = (self.group + 1, 0, 0);
                continue;
            };
            if self.at == documents.len() {
                self.documents = None;
                continue;
            }
            let document = documents.at(self.at);
            self.from += packer.push(document, self.from);
            if self.from >= document.tokens.len() {
                (self.at, self.from) = (self.at + 1, 0);
            }
        }
        Ok(true)
    }

    fn batch(&mut self) -> Result<Option<MicroBatch>> {
        let mut packer = Packer::new(self.sequences, self.length, self.mask);
        let full = self.fill(&mut packer)?;
        if !full {
            self.over = true;
            if packer.tokens() == 0 {
                return Ok(None);
            }
            let filler = vec![0; self.length as usize];
            let nothing = vec![0; filler.len()];
            while packer.room() > 0 {
                packer.push(Document { tokens: &filler, counted: Some(&nothing) }, 0);
            }
        }
        Ok(Some(packer.finish()))
    }
}

impl Iterator for InOrder<'_> {
    type Item = Result<MicroBatch, Error>;

    fn next(&mut self) -> Option<Result<MicroBatch>> {
        if self.over {
            return None;
        }
        let next = self.batch();
        self.over |= next.is_err();
        next.transpose()
    }
}

#[cfg(test)]
mod tests {
    use anello_store::Store;

    use super::*;
    use crate::{Index, ShardFormat, ShardWriter};

    /// Documents 1 2 3 | 4 5 | 6 7 8 9 in row groups of about 4 tokens.
    fn set() -> Dataset {
        let store = Store::memory().unwrap();
        let format = ShardFormat { row_group_tokens: 4, zstd_level: 1 };
        let mut writer = ShardWriter::new(format, false, None).unwrap();
        for document in [&[1, 2, 3][..], &[4, 5], &[6, 7, 8, 9]] {
            writer.push(document, None).unwrap();
        }
        store.put("000.parquet", writer.finish().unwrap().bytes).unwrap();
        let index = Index::open(&store).unwrap();
        Dataset::new(store, index).unwrap()
    }

    #[test]
    fn every_token_comes_once_and_what_is_left_over_does_not_count() {
        let set = set();
        let of = |sequences, length| -> Vec<MicroBatch> {
            InOrder::new(&set, sequences, length, Mask::Document, Some(10)).map(Result::unwrap).collect()
        };
        let batches = of(1, 4);
        assert_eq!(batches.len(), 3);
        let ids: Vec<i64> = batches.iter().flat_map(|batch| batch.input_ids.clone()).collect();
        assert_eq!(ids, [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0, 0]);
        let targets: Vec<i64> = batches.iter().flat_map(|batch| batch.targets.clone()).collect();
        assert_eq!(targets, [2, 3, -100, 5, -100, 7, 8, 9, -100, -100, -100, -100]);
        assert_eq!(batches.iter().map(|batch| batch.counted).sum::<u64>(), 6);
        // Another shape has the same pairs of tokens.
        assert_eq!(
            of(3, 3).iter().map(|batch| (batch.tokens(), batch.counted)).collect::<Vec<_>>(),
            [(9, 6)]
        );
        assert_eq!(
            of(2, 8).iter().map(|batch| (batch.tokens(), batch.counted)).collect::<Vec<_>>(),
            [(16, 6)]
        );
    }

    #[test]
    fn an_id_past_the_vocabulary_ends_it() {
        let set = set();
        let mut batches = InOrder::new(&set, 1, 4, Mask::Document, Some(8));
        let error = batches.find_map(Result::err).expect("6 7 8 9 has ids past the vocabulary");
        assert!(matches!(error, Error::Row { .. }), "{error}");
        assert!(batches.next().is_none());
    }
}
