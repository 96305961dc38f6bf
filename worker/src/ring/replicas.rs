//! Do all replicas hold the same bits? Asked every so many steps and before every checkpoint.
//!
//! Every member hashes its weights and moments by block and sends the hash of those hashes to all. When they differ, the
//! block hashes follow, so that all members know alike who differs from the majority, and where.
//!
//! A learner takes part in what is sent, and says nothing.
//!
//! Where moments are shared out over the ring, that is for weights alone. Those of a block are with two members, of whom
//! nobody can tell who is right.

use std::collections::BTreeMap;

use anello_collective::{Collective, Error as RingError, Rank, Step as RingStep, tcp};
use anello_proto::ring::{Cause, Formation};

use crate::digest;
use crate::optimizer::State;

/// Bytes of a block's hash that are compared.
const SHORT: usize = 8;
/// Blocks whose hashes go into one message: 64 000 bytes.
const BLOCKS_A_MESSAGE: usize = 8000;
/// Blocks that are named to people.
const NAMED: usize = 4;

/// Compares the replicas after `step` steps. `Ok(Some(_))`: they differ, and the ring must end.
pub(super) fn compare(
    ring: &mut tcp::Tcp,
    step: u64,
    state: &State,
    shared: bool,
    trainers: usize,
    formation: &Formation,
) -> Result<Option<Cause>, RingError> {
    let learns = ring.ring().rank().index() >= trainers;
    if shared && let Some(cause) = compare_pairs(ring, step, state, trainers, formation)? {
        return Ok(Some(cause));
    }
    let blocks = if learns { Vec::new() } else { hashes(state, shared) };
    let root = digest::of_digests(&blocks);
    let mut roots = ring.exchange(RingStep(step), if learns { &[] } else { root.as_bytes() })?;
    roots.truncate(trainers);
    if roots.iter().all(|root| *root == roots[0]) {
        return Ok(None);
    }
    let mut all: Vec<Vec<u8>> = vec![Vec::new(); roots.len()];
    for from in (0..state.layout.blocks()).step_by(BLOCKS_A_MESSAGE) {
        let chunk = blocks.iter().skip(from).take(BLOCKS_A_MESSAGE);
        let short: Vec<u8> = chunk.flat_map(|hash| hash.as_bytes()[..SHORT].to_vec()).collect();
        for (have, more) in all.iter_mut().zip(ring.exchange(RingStep(step), &short)?) {
            have.extend(more);
        }
    }
    Ok(Some(verdict(step, &roots, &all, state, formation)))
}

/// Compares the moments of each member's blocks with the second copy that the one before it has.
fn compare_pairs(
    ring: &mut tcp::Tcp,
    step: u64,
    state: &State,
    trainers: usize,
    formation: &Formation,
) -> Result<Option<Cause>, RingError> {
    let rank = ring.ring().rank().index();
    let of = |rank: usize| {
        let digests = digest::of_moments(state, ring.ring().blocks(Rank(rank as u32)));
        digest::of_digests(digests.iter().flatten())
    };
    let said = match rank < trainers {
        true => [of(rank), of((rank + 1) % trainers)].map(|hash| *hash.as_bytes()).concat(),
        false => Vec::new(),
    };
    let mut all = ring.exchange(RingStep(step), &said)?;
    all.truncate(trainers);
    Ok(differing_pair(&all).map(|(second, owner)| {
        let name = |rank: usize| formation.members[rank].worker;
        let (second, owner) = (name(second), name(owner));
        let reason = format!(
            "workers {second} and {owner} have different moments of the blocks of {owner} after step {step}, and nobody can tell who is right"
        );
        Cause::Diverged { workers: Vec::new(), reason }
    }))
}

/// The first member whose second copy is not what the one after it owns, and that one, by what each said: the hash of its own
/// moments and that of its second copy.
fn differing_pair(said: &[Vec<u8>]) -> Option<(usize, usize)> {
    let pairs = (0..said.len()).map(|rank| (rank, (rank + 1) % said.len()));
    pairs
        .into_iter()
        .find(|(second, owner)| said[*second].get(blake3::OUT_LEN..) != said[*owner].get(..blake3::OUT_LEN))
}

/// A hash of each block of the state: of the digests of its weights and moments.
fn hashes(state: &State, weights_alone: bool) -> Vec<blake3::Hash> {
    let weights = digest::of_blocks(&state.weights);
    if weights_alone {
        return weights;
    }
    let [exp_avg, exp_avg_sq] = digest::of_moments(state, 0..state.layout.blocks());
    let of_block = |((weights, exp_avg), exp_avg_sq): ((blake3::Hash, blake3::Hash), blake3::Hash)| {
        blake3::hash(&[weights, exp_avg, exp_avg_sq].map(|digest| *digest.as_bytes()).concat())
    };
    weights.into_iter().zip(exp_avg).zip(exp_avg_sq).map(of_block).collect()
}

/// Who differs from the majority, and where.
fn verdict(step: u64, roots: &[Vec<u8>], all: &[Vec<u8>], state: &State, formation: &Formation) -> Cause {
    let mut votes = BTreeMap::<&[u8], usize>::new();
    roots.iter().for_each(|root| *votes.entry(root).or_default() += 1);
    let majority = votes.iter().find(|(_, votes)| **votes * 2 > roots.len()).map(|(root, _)| *root);
    let Some(majority) = majority else {
        let reason = format!("the replicas differ after step {step}, and no majority is of one kind");
        return Cause::Diverged { workers: Vec::new(), reason };
    };
    let right = roots.iter().position(|root| *root == majority).unwrap_or(0);
    let (mut workers, mut told) = (Vec::new(), Vec::new());
    for (rank, member) in
        formation.members[..roots.len()].iter().enumerate().filter(|(rank, _)| roots[*rank] != majority)
    {
        let theirs = all[rank].chunks(SHORT).zip(all[right].chunks(SHORT));
        let differ: Vec<usize> =
            theirs.enumerate().filter(|(_, (a, b))| a != b).map(|(block, _)| block).collect();
        let named: Vec<String> = differ
            .iter()
            .take(NAMED)
            .map(|block| {
                let names: Vec<&str> = state.layout.names_in(*block).collect();
                format!("{block} ({})", names.join(", "))
            })
            .collect();
        let more =
            if differ.len() > NAMED { format!(" and {} more", differ.len() - NAMED) } else { String::new() };
        workers.push(member.worker);
        told.push(format!("worker {} in block {}{more}", member.worker, named.join(", ")));
    }
    let reason = format!("after step {step} the state differs from all others': {}", told.join("; "));
    Cause::Diverged { workers, reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_copy_that_is_none_names_both() {
        let said = |own: u8, second: u8| [[own; blake3::OUT_LEN], [second; blake3::OUT_LEN]].concat();
        assert_eq!(differing_pair(&[said(1, 2), said(2, 3), said(3, 1)]), None);
        assert_eq!(differing_pair(&[said(1, 2), said(2, 9), said(3, 1)]), Some((1, 2)));
        assert_eq!(differing_pair(&[said(1, 2), said(2, 3), said(3, 9)]), Some((2, 0)));
        assert_eq!(differing_pair(&[said(1, 2), Vec::new(), said(3, 1)]), Some((0, 1)));
    }
}
