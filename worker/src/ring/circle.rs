//! State of peers, gathered: what each has is asked first ([`Head`]), and then for each block one of those that have it
//! ([`share_out`]).

use std::ops::Range;
use std::time::Duration;

use anello_collective::AbortHandle;
use anello_collective::tree::balanced;
use anello_proto::ring::{Generation, Step};
use anello_proto::v1::peers_client::PeersClient;
use anello_proto::v1::state_chunk::Chunk;
use anello_proto::v1::{
    LiveBlocks, LiveRequest, RowsItem, RowsRequest, StateBlocks, StateHead, StateRange, StateRequest,
    StepReport,
};
use anello_store::Cursor;
use anello_tls::grpc::{ConnectError, To};
use anello_tls::{Role, Tls};
use tokio_stream::{Stream, StreamExt};
use tonic::Status;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;

use super::cursors;
use super::peers::{BLOCK_BYTES, Job, digest};
use crate::cover::{Cover, both};

/// Bytes of a message of a peer at most: that of a head with the cursors of every lane a run may have.
const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// Blocks of a state at most: what is said of one that is larger is not believed.
const BLOCKS_MAX: u64 = 1 << 32;
/// For a better address of a peer to answer, before the next is tried too.
const PREFERENCE: Duration = Duration::from_millis(250);
/// Pause before a peer is asked again that has not got there yet.
const AGAIN: Duration = Duration::from_millis(10);

/// What a peer says that it has.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Head {
    pub updates: u64,
    pub layers: u32,
    pub cursors: Vec<Cursor>,
    pub losses: Vec<f64>,
    /// The blocks whose weights it hands out.
    pub weights: Cover,
    /// Those whose moments it has.
    pub cover: Cover,
    /// The blocks outside of which all moments are zero.
    pub moved: Range<usize>,
}

impl Head {
    fn read(said: StateHead) -> Result<Self, String> {
        let all = said.blocks;
        if all > BLOCKS_MAX {
            return Err(format!("it has a state of {all} blocks, of at most {BLOCKS_MAX}"));
        }
        let cover = |ranges: &[StateRange], what: &str| {
            let mut from = 0;
            for &StateRange { first, end } in ranges {
                if first < from || first >= end || end > all {
                    return Err(format!("it has {what} of blocks {first} to {end}, of {all}"));
                }
                from = end;
            }
            let ranges = ranges.iter().map(|range| range.first as usize..range.end as usize);
            Ok(Cover::of(ranges, all as usize))
        };
        let (weights, cover) = (cover(&said.weights, "weights")?, cover(&said.moments, "moments")?);
        let StateRange { first, end } = said.moved.unwrap_or_default();
        if first > end || end > all {
            return Err(format!("it moves blocks {first} to {end}, of {all}"));
        }
        let moved = first as usize..end as usize;
        let cursors = cursors::unpacked(said.cursors.unwrap_or_default())
            .map_err(|cause| format!("it tells of cursors in {cause}"))?;
        let (updates, layers, losses) = (said.updates, said.layers, said.losses);
        Ok(Self { updates, layers, cursors, losses, weights, cover, moved })
    }
}

/// The blocks that are moved in the state of these, outside of which each says that all moments are zero.
pub(super) fn moved_of<'a>(heads: impl IntoIterator<Item = &'a Head>) -> Range<usize> {
    let ranges = heads.into_iter().map(|head| head.moved.clone());
    ranges.reduce(|all, moved| both(&all, &moved)).unwrap_or(0..0)
}

/// What is asked of one peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Asked {
    /// Its place among those asked.
    pub peer: usize,
    pub blocks: Range<usize>,
    /// Their moments, and not their weights.
    pub moments: bool,
}

/// Of whom to ask which blocks, to have the weights and the moments that are lacked. Each goes once over the wire, and peers
/// that have the same share what they send. Heads are those of the peers that may be asked, by their place. Absent: nobody has
/// some of it.
pub(super) fn share_out(heads: &[(usize, &Head)], weights: &Cover, moments: &Cover) -> Option<Vec<Asked>> {
    let mut asked = Vec::new();
    for (lacks, moments) in [(weights, false), (moments, true)] {
        let has = |head: &Head, block: usize| {
            let cover = if moments { &head.cover } else { &head.weights };
            cover.place(block..block + 1).is_some()
        };
        let able = |block: usize| -> Vec<usize> {
            let able = heads.iter().filter(|(_, head)| has(head, block));
            able.map(|(peer, _)| *peer).collect()
        };
        for range in lacks.ranges() {
            let mut start = range.start;
            while start < range.end {
                let peers = able(start);
                if peers.is_empty() {
                    return None;
                }
                let end = (start + 1..range.end).find(|block| able(*block) != peers).unwrap_or(range.end);
                for (at, &peer) in peers.iter().enumerate() {
                    let part = balanced(end - start, peers.len(), at);
                    asked.push(Asked { peer, blocks: start + part.start..start + part.end, moments });
                }
                start = end;
            }
        }
    }
    asked.retain(|asked| !asked.blocks.is_empty());
    Some(asked)
}

/// Weights of some blocks, from the first on.
pub(super) type Weights = (usize, Vec<u8>);

/// Moments of some blocks, from the first on: first and second.
pub(super) type Moments = (usize, [Vec<u8>; 2]);

/// What was asked for, gathered.
#[derive(Debug, Default)]
pub(super) struct Gathered {
    pub weights: Vec<Weights>,
    pub moments: Vec<Moments>,
}

impl Gathered {
    /// Bytes of it.
    pub fn bytes(&self) -> usize {
        let weights = self.weights.iter().map(|(_, bytes)| bytes);
        weights.chain(self.moments.iter().flat_map(|(_, both)| both)).map(Vec::len).sum()
    }

    /// What was gathered that `check` does not accept: it is given the buffer (weights, first, second moments), the block and its
    /// bytes.
    pub fn wrong(&self, check: impl Fn(usize, usize, &[u8]) -> bool) -> Option<(usize, usize)> {
        let weights = self.weights.iter().map(|(first, bytes)| (0, *first, bytes));
        let moments = self.moments.iter().flat_map(|(first, [m, v])| [(1, *first, m), (2, *first, v)]);
        weights.chain(moments).find_map(|(buffer, first, bytes)| {
            let mut blocks = (first..).zip(bytes.chunks(BLOCK_BYTES));
            blocks.find(|(block, bytes)| !check(buffer, *block, bytes)).map(|(block, _)| (buffer, block))
        })
    }
}

/// Why something could not be had of peers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failed {
    /// The places of those that cannot be reached, when that is why.
    pub unreachable: Vec<usize>,
    /// In words.
    pub reason: String,
}

impl From<String> for Failed {
    fn from(reason: String) -> Self {
        Self { unreachable: Vec::new(), reason }
    }
}

/// The figures of steps, as a peer has them.
#[derive(Debug, Default)]
pub(super) struct Rows {
    /// Those of steps before this one are in the run folder.
    pub durable: u64,
    /// Those of the steps from there on, or from the first that was asked for.
    pub rows: Vec<StepReport>,
}

impl Rows {
    /// Whether these are all that is not in the run folder of steps from `first` to before `end`.
    fn fit(&self, first: u64, end: u64) -> bool {
        let from = first.max(self.durable).min(end);
        self.rows.iter().map(|row| row.step).eq(from..end)
    }
}

/// Peers that form the same generation, and the state that is asked of them.
#[derive(Clone)]
pub(super) struct Circle {
    /// Of each its addresses, best first.
    peers: Vec<Vec<To>>,
    pub(super) job: Job,
    generation: Generation,
    step: Step,
    /// Of one of them, after which it cannot be reached.
    silence: Duration,
}

impl Circle {
    /// Those of `job` at `addresses`, of which each has some, best first.
    pub fn new(
        job: Job,
        addresses: Vec<Vec<String>>,
        tls: Option<&Tls>,
        silence: Duration,
        generation: Generation,
        step: Step,
    ) -> Self {
        let to = |address| To { address, role: Role::Worker, tls: tls.cloned() };
        let peers = addresses.into_iter().map(|of_one| of_one.into_iter().map(to).collect()).collect();
        Self { peers, job, generation, step, silence }
    }

    /// A connection to one of them: it cannot be reached when there was no answer at all for `silence` at any of its addresses, or
    /// the two do not believe one another. With it comes how to say what fails later.
    async fn client(
        &self,
        at: usize,
    ) -> Result<(PeersClient<InterceptedService<Channel, Job>>, impl Fn(String) -> Failed + use<>), Failed>
    {
        let failed = |address: &str, what: &str| Failed::from(format!("state from {address}: {what}"));
        // All are tried at once, but for a little that the better ones are given: the first that is there is taken.
        let mut tries = tokio::task::JoinSet::new();
        for (to, place) in self.peers[at].iter().cloned().zip(0..) {
            let silence = self.silence;
            tries.spawn(async move {
                tokio::time::sleep(PREFERENCE.min(silence / 8) * place).await;
                let connected = to.connect_watched(silence).await;
                (to.address, connected)
            });
        }
        let (mut reasons, mut is_apart) = (Vec::new(), true);
        while let Some(tried) = tries.join_next().await {
            let (address, connected) = tried.map_err(|cause| Failed::from(cause.to_string()))?;
            match connected {
                Ok(channel) => {
                    let failed = move |what: String| failed(&address, &what);
                    return Ok((
                        PeersClient::with_interceptor(channel, self.job.clone())
                            .max_decoding_message_size(MESSAGE_BYTES_MAX),
                        failed,
                    ));
                }
                Err(cause) => {
                    is_apart &= matches!(&cause, ConnectError::Unanswered(_) | ConnectError::Refused(_));
                    reasons.push(failed(&address, &cause.to_string()).reason);
                }
            }
        }
        Err(Failed { unreachable: Vec::from_iter(is_apart.then_some(at)), reason: reasons.join("; ") })
    }

    /// One peer's part. A peer that has not got there yet is asked again.
    async fn fetch(self, at: usize, request: StateRequest) -> Result<(Head, Vec<StateBlocks>), Failed> {
        let (mut client, failed) = self.client(at).await?;
        // One that falls silent meanwhile is found by the next generation, which cannot connect to it.
        let ended = |status: Status| failed(status.to_string());
        let mut stream = loop {
            match client.state(request).await {
                Ok(stream) => break stream.into_inner(),
                Err(status) if is_not_there_yet(&status) => tokio::time::sleep(AGAIN).await,
                Err(status) => return Err(ended(status)),
            }
        };
        let (mut head, mut chunks) = (None, Vec::new());
        while let Some(message) = stream.next().await {
            match message.map_err(ended)?.chunk {
                Some(Chunk::Head(said)) => head = Some(Head::read(said).map_err(&failed)?),
                Some(Chunk::Blocks(blocks)) => {
                    let StateBlocks { weights, exp_avg, exp_avg_sq, blake3, first_block } = &blocks;
                    if digest([weights, exp_avg, exp_avg_sq]) != *blake3 {
                        return Err(failed(format!(
                            "blocks from {first_block} on have another digest than was sent"
                        )));
                    }
                    if [weights, exp_avg, exp_avg_sq].iter().any(|bytes| bytes.len() % BLOCK_BYTES != 0) {
                        return Err(failed("a chunk is not of whole blocks".to_owned()));
                    }
                    chunks.push(blocks);
                }
                None => return Err(failed("an empty chunk".to_owned())),
            }
        }
        Ok((head.ok_or_else(|| failed("no head".to_owned()))?, chunks))
    }

    fn request(&self) -> StateRequest {
        let (generation, step) = (self.generation.0, self.step.0);
        StateRequest { generation, step, ..StateRequest::default() }
    }

    /// What each of them has.
    ///
    /// # Errors
    /// In words: a peer that is lost, one whose head makes no sense, the abort. Where some cannot be reached, all are told of that
    /// turn out not to be soon after the first.
    pub async fn heads(&self, abort: &AbortHandle) -> Result<Vec<Head>, Failed> {
        let mut tasks = tokio::task::JoinSet::new();
        for at in 0..self.peers.len() {
            let (circle, request) = (self.clone(), self.request());
            tasks.spawn(async move { (at, circle.fetch(at, request).await) });
        }
        let asked = unless_aborted(abort, async {
            let mut heads: Vec<Option<Head>> = vec![None; self.peers.len()];
            while let Some(done) = tasks.join_next().await {
                let (at, fetched) = done.map_err(|cause| Failed::from(cause.to_string()))?;
                heads[at] = Some(fetched?.0);
            }
            Ok(heads.into_iter().flatten().collect())
        });
        let mut failed = match asked.await {
            Err(failed) if !failed.unreachable.is_empty() => failed,
            heads => return heads,
        };
        let others = unless_aborted(abort, async {
            // All were tried at once, and are given up at once.
            let soon = tokio::time::Instant::now() + self.silence / 4;
            while let Ok(Some(done)) = tokio::time::timeout_at(soon, tasks.join_next()).await {
                let fetched = done.ok().and_then(|(_, fetched)| fetched.err());
                failed.unreachable.extend(fetched.into_iter().flat_map(|failed| failed.unreachable));
            }
            Ok(())
        });
        // That the ring has ended meanwhile changes nothing in who was not reached.
        let _ = others.await;
        Err(failed)
    }

    /// Peers that may be asked.
    pub fn len(&self) -> usize {
        self.peers.len()
    }

    /// Some blocks of one of them, as they are while it trains: with each come the steps that were applied when it was read. Without
    /// `weights` it is their moments alone.
    ///
    /// # Errors
    /// In words: a peer that is lost. Items too, and a block with another digest or that was not asked for.
    pub async fn live(
        &self,
        at: usize,
        blocks: Range<usize>,
        weights: bool,
    ) -> Result<impl Stream<Item = Result<(Step, usize, [Vec<u8>; 3]), Failed>> + use<>, Failed> {
        let (mut client, failed) = self.client(at).await?;
        let request = LiveRequest {
            generation: self.generation.0,
            first_block: blocks.start as u64,
            blocks: blocks.len() as u64,
        };
        let stream = loop {
            match client.live(request).await {
                Ok(stream) => break stream.into_inner(),
                Err(status) if is_not_there_yet(&status) => tokio::time::sleep(AGAIN).await,
                Err(status) => return Err(failed(status.to_string())),
            }
        };
        let mut wanted = blocks;
        let of_weights = if weights { BLOCK_BYTES } else { 0 };
        let lengths = [BLOCK_BYTES, 0].map(|of_moments| [of_weights, of_moments, of_moments]);
        Ok(stream.map(move |message| {
            let read = message.map_err(|status| status.to_string()).and_then(|message| {
                let LiveBlocks { step, blocks } = message;
                let StateBlocks { first_block, weights, exp_avg, exp_avg_sq, blake3 } =
                    blocks.unwrap_or_default();
                let buffers = [weights, exp_avg, exp_avg_sq];
                let block = wanted.next().filter(|block| *block as u64 == first_block);
                let is_one = lengths.contains(&buffers.each_ref().map(Vec::len));
                match block.filter(|_| is_one) {
                    None => Err("it sends blocks that were not asked for".to_owned()),
                    Some(block) if digest(buffers.each_ref().map(Vec::as_slice)) != blake3 => {
                        Err(format!("block {block} has another digest than was sent"))
                    }
                    Some(block) => Ok((Step(step), block, buffers)),
                }
            });
            read.map_err(&failed)
        }))
    }

    /// What one of them, which holds the state after `end` steps, has of the figures of the steps before, from `first` on.
    ///
    /// # Errors
    /// In words: a peer that is lost, one that sends other rows.
    pub async fn rows(&self, at: usize, first: u64, end: u64) -> Result<Rows, Failed> {
        let (mut client, failed) = self.client(at).await?;
        let until = tokio::time::Instant::now() + self.silence;
        let mut stream = loop {
            match client.rows(RowsRequest { first, end }).await {
                Ok(stream) => break stream.into_inner(),
                // It has applied the step, and is about to note its figures.
                Err(status) if is_not_there_yet(&status) && tokio::time::Instant::now() < until => {
                    tokio::time::sleep(AGAIN).await;
                }
                Err(status) => return Err(failed(status.to_string())),
            }
        };
        let mut rows = Rows::default();
        while let Some(message) = stream.next().await {
            let RowsItem { durable, row } = message.map_err(|status| failed(status.to_string()))?;
            rows.durable = durable.unwrap_or(rows.durable);
            rows.rows.extend(row);
        }
        if rows.fit(first, end) { Ok(rows) } else { Err(failed("rows that were not asked for".to_owned())) }
    }

    /// [`Circle::rows`], or, when that is earlier, the reason of an abort.
    pub async fn figures(
        &self,
        at: usize,
        first: u64,
        end: u64,
        abort: &AbortHandle,
    ) -> Result<Rows, Failed> {
        unless_aborted(abort, self.rows(at, first, end)).await
    }

    /// Gathers what is `asked`, all at once.
    ///
    /// # Errors
    /// In words: a peer that is lost, a chunk with another digest or that was not asked for, the abort.
    pub async fn gather(&self, asked: Vec<Asked>, abort: &AbortHandle) -> Result<Gathered, Failed> {
        unless_aborted(abort, async {
            let mut tasks = tokio::task::JoinSet::new();
            for part in asked {
                let (circle, at) = (self.clone(), part.peer);
                let request = StateRequest {
                    first_block: part.blocks.start as u64,
                    blocks: part.blocks.len() as u64,
                    weights: !part.moments,
                    moments: part.moments,
                    ..self.request()
                };
                tasks.spawn(async move { (part, circle.fetch(at, request).await) });
            }
            let mut gathered = Gathered::default();
            while let Some(done) = tasks.join_next().await {
                let (part, fetched) = done.map_err(|cause| Failed::from(cause.to_string()))?;
                let (_, chunks) = fetched?;
                let mut next = part.blocks.start as u64;
                let (mut flat, mut both) = (Vec::new(), [Vec::new(), Vec::new()]);
                for StateBlocks { first_block, weights, exp_avg, exp_avg_sq, .. } in chunks {
                    let asked = if part.moments { exp_avg.len() } else { weights.len() };
                    let other = if part.moments { weights.len() } else { exp_avg.len() };
                    if first_block != next || other != 0 || exp_avg.len() != exp_avg_sq.len() {
                        return Err("a peer sends blocks that were not asked for".to_owned().into());
                    }
                    next += (asked / BLOCK_BYTES) as u64;
                    if next > part.blocks.end as u64 {
                        return Err("a peer sends more blocks than were asked for".to_owned().into());
                    }
                    if part.moments {
                        both[0].extend(exp_avg);
                        both[1].extend(exp_avg_sq);
                    } else {
                        flat.extend(weights);
                    }
                }
                if next != part.blocks.end as u64 {
                    return Err(format!("blocks from {next} to {} did not come", part.blocks.end).into());
                }
                match part.moments {
                    true => gathered.moments.push((part.blocks.start, both)),
                    false => gathered.weights.push((part.blocks.start, flat)),
                }
            }
            Ok(gathered)
        })
        .await
    }
}

/// What `work` comes to, or, when that is earlier, the reason of an abort.
async fn unless_aborted<T>(
    abort: &AbortHandle,
    work: impl Future<Output = Result<T, Failed>>,
) -> Result<T, Failed> {
    let aborted = async {
        loop {
            if let Some(reason) = abort.reason() {
                return reason.to_owned();
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::select! {
        done = work => done,
        reason = aborted => Err(reason.into()),
    }
}

/// Whether it is the peer's own word that it has not got there yet; one of the connection has a source.
fn is_not_there_yet(status: &Status) -> bool {
    status.code() == tonic::Code::Unavailable && std::error::Error::source(status).is_none()
}

#[cfg(test)]
mod tests;
