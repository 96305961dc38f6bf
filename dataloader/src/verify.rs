use crate::dataset::Dataset;
use crate::progress::{Meter, OnProgress, parallel};
use crate::{Error, Result};

/// What [`verify`] found.
#[derive(Debug, Default)]
pub struct Verification {
    /// Row groups that were read.
    pub row_groups: u64,
    /// Of those, the ones whose checksum the index has.
    pub checksums: u64,
    /// Documents that are right.
    pub rows: u64,
    /// Tokens that are right.
    pub tokens: u64,
    /// What is not, in the order of the files.
    pub faults: Vec<Error>,
}

/// Reads every row group and checks it: bytes against the checksums of a stored index, counts, and ids against
/// `vocab`. Damage is collected; only a place that cannot be reached at all ends it. Progress counts row groups.
pub fn verify(
    dataset: &Dataset,
    vocab: Option<u32>,
    threads: usize,
    progress: OnProgress<'_>,
) -> Result<Verification> {
    let groups = dataset.row_groups();
    let meter = Meter::new(groups, progress);
    let results = parallel(threads, groups as usize, |at| {
        let result = match dataset.read(at as u64, vocab) {
            Ok(documents) => Ok((documents.len() as u64, documents.tokens().len() as u64)),
            Err(error) if error.is_corrupt() => Err(error),
            Err(error) => return Err(error),
        };
        meter.add(1, result.as_ref().map_or(0, |(_, tokens)| *tokens))?;
        Ok(result)
    })?;
    let with = dataset.index().row_groups().filter(|g| g.rows > 0 && g.blake3.is_some()).count();
    let mut all = Verification { row_groups: groups, checksums: with as u64, ..Verification::default() };
    for result in results {
        match result {
            Ok((rows, tokens)) => {
                all.rows += rows;
                all.tokens += tokens;
            }
            Err(error) => all.faults.push(error),
        }
    }
    Ok(all)
}
