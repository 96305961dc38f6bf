//! State from worker to worker: the service that hands it out, and the client that gathers it.
//!
//! What moves is what somebody lacks, and no more: who gathers asks everyone first what they have ([`Head`]), and then for
//! each block one of those that have it ([`share_out`]).

use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::pin::Pin;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use anello_collective::AbortHandle;
use anello_collective::tree::balanced;
use anello_proto::ring::{Generation, Step};
use anello_proto::v1::peers_client::PeersClient;
use anello_proto::v1::peers_server::{Peers, PeersServer};
use anello_proto::v1::{StateBlocks, StateChunk, StateHead, StateRange, StateRequest, state_chunk::Chunk};
use anello_store::Cursor;
use anello_tls::grpc::{ConnectError, To, incoming};
use anello_tls::{Role, Tls};
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status};

use crate::cover::Cover;
use crate::params::BLOCK;

/// Bytes of a block of one buffer.
const BLOCK_BYTES: usize = BLOCK * 4;
/// Blocks of a chunk: 3 MiB, under gRPC's limit of 4 MiB a message.
const CHUNK_BLOCKS: usize = 4;
/// Blocks of a state at most: what is said of one that is larger is not believed.
const BLOCKS_MAX: u64 = 1 << 32;

/// What a worker has, on the host, of the state after a step.
#[derive(Debug)]
pub(super) struct HostState {
    /// The generation that forms.
    pub generation: Generation,
    /// Steps applied.
    pub step: Step,
    /// Updates since the moments were zero.
    pub updates: u64,
    /// Layers in the stack.
    pub layers: u32,
    /// Where each lane is.
    pub cursors: Vec<Cursor>,
    /// Losses of the last steps of the stage.
    pub losses: Vec<f64>,
    /// The blocks whose weights it hands out.
    pub weights_cover: Cover,
    /// Those weights, one block after the other, little-endian.
    pub weights: Vec<u8>,
    /// The blocks whose moments it has.
    pub cover: Cover,
    /// First and second moments: those blocks, one after the other.
    pub moments: [Vec<u8>; 2],
}

/// What the service hands out now.
pub(super) type Shelf = Arc<RwLock<Option<Arc<HostState>>>>;

/// Serves what is on `shelf` at a free port of `address`, with TLS to workers alone.
pub(super) async fn start(address: IpAddr, tls: Option<&Tls>, shelf: Shelf) -> std::io::Result<SocketAddr> {
    let listener = tokio::net::TcpListener::bind((address, 0)).await?;
    let address = listener.local_addr()?;
    let server = tonic::transport::Server::builder()
        .add_service(PeersServer::new(Service { shelf }))
        .serve_with_incoming(incoming(listener, tls.map(|tls| (tls, &[Role::Worker][..]))));
    tokio::spawn(async move {
        if let Err(error) = server.await {
            tracing::error!(%error, "the service that hands out state has ended");
        }
    });
    Ok(address)
}

struct Service {
    shelf: Shelf,
}

#[tonic::async_trait]
impl Peers for Service {
    type StateStream = Pin<Box<dyn Stream<Item = Result<StateChunk, Status>> + Send>>;

    async fn state(&self, request: Request<StateRequest>) -> Result<Response<Self::StateStream>, Status> {
        let StateRequest { generation, step, first_block, blocks, weights, moments } = request.into_inner();
        let state = self.shelf.read().expect("no holder panics").clone();
        let state = state
            .filter(|state| (state.generation.0, state.step.0) == (generation, step))
            .ok_or_else(|| Status::unavailable("this state is not on the shelf now; ask again"))?;
        let all = state.cover.of_blocks() as u64;
        let end = first_block.saturating_add(blocks);
        if end > all {
            return Err(Status::out_of_range(format!("blocks {first_block}..{end} of {all}")));
        }
        let (first, end) = (first_block as usize, end as usize);
        let lacks =
            |what: &str| Status::failed_precondition(format!("no {what} of blocks {first}..{end} here"));
        let place_of = |cover: &Cover, what: &str| cover.place(first..end).ok_or_else(|| lacks(what));
        let weights = weights.then(|| place_of(&state.weights_cover, "weights")).transpose()?;
        let moments = moments.then(|| place_of(&state.cover, "moments")).transpose()?;
        let range = |range: &Range<usize>| StateRange { first: range.start as u64, end: range.end as u64 };
        let head = StateHead {
            updates: state.updates,
            layers: state.layers,
            blocks: all,
            cursors: serde_json::to_string(&state.cursors).expect("maps have string keys"),
            losses: state.losses.clone(),
            moments: state.cover.ranges().iter().map(range).collect(),
            weights: state.weights_cover.ranges().iter().map(range).collect(),
        };
        let head = StateChunk { chunk: Some(Chunk::Head(head)) };
        let chunks = (first..end).step_by(CHUNK_BLOCKS).map(move |at| {
            let until = (at + CHUNK_BLOCKS).min(end);
            let cut = |buffer: &[u8], place: &Option<Range<usize>>| match place {
                Some(place) => {
                    let from = place.start + at - first;
                    buffer[from * BLOCK_BYTES..(from + until - at) * BLOCK_BYTES].to_vec()
                }
                None => Vec::new(),
            };
            let [exp_avg, exp_avg_sq] = state.moments.each_ref().map(|buffer| cut(buffer, &moments));
            let weights = cut(&state.weights, &weights);
            let blake3 = digest([&weights, &exp_avg, &exp_avg_sq]);
            let first_block = at as u64;
            let blocks = StateBlocks { first_block, weights, exp_avg, exp_avg_sq, blake3 };
            StateChunk { chunk: Some(Chunk::Blocks(blocks)) }
        });
        let stream = tokio_stream::iter(std::iter::once(head).chain(chunks).map(Ok));
        Ok(Response::new(Box::pin(stream)))
    }
}

fn digest(buffers: [&[u8]; 3]) -> Vec<u8> {
    let mut hasher = blake3::Hasher::new();
    buffers.into_iter().for_each(|buffer| {
        hasher.update(buffer);
    });
    hasher.finalize().as_bytes().to_vec()
}

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
}

impl Head {
    fn read(said: &StateHead) -> Result<Self, String> {
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
        let cursors = serde_json::from_str(&said.cursors)
            .map_err(|cause| format!("it tells of no cursors: {cause}"))?;
        let (updates, layers, losses) = (said.updates, said.layers, said.losses.clone());
        Ok(Self { updates, layers, cursors, losses, weights, cover })
    }
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
    /// The place of the one that cannot be reached, when that is why.
    pub unreachable: Option<usize>,
    /// In words.
    pub reason: String,
}

impl From<String> for Failed {
    fn from(reason: String) -> Self {
        Self { unreachable: None, reason }
    }
}

/// Peers that form the same generation, and the state that is asked of them.
#[derive(Clone)]
pub(super) struct Circle {
    peers: Vec<To>,
    generation: Generation,
    step: Step,
    /// Of one of them, after which it cannot be reached.
    silence: Duration,
}

impl Circle {
    /// Those at `addresses`.
    pub fn new(
        addresses: Vec<String>,
        tls: Option<&Tls>,
        silence: Duration,
        generation: Generation,
        step: Step,
    ) -> Self {
        let to = |address| To { address, role: Role::Worker, tls: tls.cloned() };
        Self { peers: addresses.into_iter().map(to).collect(), generation, step, silence }
    }

    /// What one of them answers.
    async fn fetch(self, at: usize, request: StateRequest) -> Result<(Head, Vec<StateBlocks>), Failed> {
        let failed = |(is_apart, reason)| Failed { unreachable: Some(at).filter(|_| is_apart), reason };
        fetch(&self.peers[at], request, self.silence).await.map_err(failed)
    }

    fn request(&self) -> StateRequest {
        let (generation, step) = (self.generation.0, self.step.0);
        StateRequest { generation, step, ..StateRequest::default() }
    }

    /// What each of them has.
    ///
    /// # Errors
    /// In words: a peer that is lost, one whose head makes no sense, the abort.
    pub async fn heads(&self, abort: &AbortHandle) -> Result<Vec<Head>, Failed> {
        unless_aborted(abort, async {
            let mut tasks = tokio::task::JoinSet::new();
            for at in 0..self.peers.len() {
                let (circle, request) = (self.clone(), self.request());
                tasks.spawn(async move { (at, circle.fetch(at, request).await) });
            }
            let mut heads: Vec<Option<Head>> = vec![None; self.peers.len()];
            while let Some(done) = tasks.join_next().await {
                let (at, fetched) = done.map_err(|cause| Failed::from(cause.to_string()))?;
                heads[at] = Some(fetched?.0);
            }
            Ok(heads.into_iter().flatten().collect())
        })
        .await
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

/// One peer's part. A peer that has not got there yet is asked again. With an error comes whether there was no answer at all
/// for `silence`, or the two do not believe one another.
async fn fetch(
    peer: &To,
    request: StateRequest,
    silence: Duration,
) -> Result<(Head, Vec<StateBlocks>), (bool, String)> {
    let told = |what: String| format!("state from {}: {what}", peer.address);
    let failed = |what: String| (false, told(what));
    let channel = peer.connect_watched(silence).await.map_err(|cause| {
        let is_apart = matches!(&cause, ConnectError::Unanswered(_) | ConnectError::Refused(_));
        (is_apart, told(cause.to_string()))
    })?;
    // One that falls silent meanwhile is found by the next generation, which cannot connect to it.
    let ended = |status: Status| failed(status.to_string());
    let mut client = PeersClient::new(channel);
    let mut stream = loop {
        match client.state(request).await {
            Ok(stream) => break stream.into_inner(),
            // The peer's own word; one of the connection has a source.
            Err(status)
                if status.code() == tonic::Code::Unavailable
                    && std::error::Error::source(&status).is_none() =>
            {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Err(status) => return Err(ended(status)),
        }
    };
    let (mut head, mut chunks) = (None, Vec::new());
    while let Some(message) = stream.next().await {
        match message.map_err(ended)?.chunk {
            Some(Chunk::Head(said)) => head = Some(Head::read(&said).map_err(failed)?),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn head(cover: Cover, weights: bool) -> Head {
        let all = cover.of_blocks();
        let weights = if weights { Cover::all(all) } else { Cover::none(all) };
        Head { updates: 7, layers: 1, cursors: Vec::new(), losses: Vec::new(), weights, cover }
    }

    /// Blocks of moments that each survivor asks for when the member of rank `dead` of `members` is gone.
    fn moved(blocks: usize, members: usize, dead: usize) -> Vec<usize> {
        let heads: Vec<Head> = (0..members)
            .filter(|rank| *rank != dead)
            .map(|rank| head(Cover::of_rank(blocks, members, rank), false))
            .collect();
        let survivors = heads.len();
        (0..survivors)
            .map(|rank| {
                let need = Cover::of_rank(blocks, survivors, rank);
                let lacks = need.without(&heads[rank].cover);
                let others: Vec<(usize, &Head)> =
                    heads.iter().enumerate().filter(|(other, _)| *other != rank).collect();
                let asked =
                    share_out(&others, &Cover::none(blocks), &lacks).expect("one death loses nothing");
                let ranges: Vec<Range<usize>> = asked.iter().map(|asked| asked.blocks.clone()).collect();
                let total: usize = ranges.iter().map(Range::len).sum();
                assert_eq!(Cover::of(ranges, blocks), lacks, "what is lacked, and nothing else");
                assert_eq!(total, lacks.len(), "each block once");
                for Asked { peer, blocks, moments } in &asked {
                    assert!(*moments && heads[*peer].cover.place(blocks.clone()).is_some());
                }
                total
            })
            .collect()
    }

    #[test]
    fn a_death_moves_what_must_move() {
        // Of four one dies: the others had half of the moments each, and have two thirds then.
        let blocks = 48;
        for dead in 0..4 {
            let moved = moved(blocks, 4, dead);
            assert_eq!(moved.len(), 3);
            let least = 3 * (blocks * 2 / 3 - blocks / 2);
            let sum: usize = moved.iter().sum();
            assert!((least..blocks).contains(&sum), "rank {dead} dies: {moved:?} of {blocks}");
        }
        for members in 3..9 {
            (0..members).for_each(|dead| drop(moved(61, members, dead)));
        }
    }

    #[test]
    fn who_has_the_same_shares_what_is_sent() {
        let all: Vec<Head> = (0..3).map(|_| head(Cover::all(30), true)).collect();
        let heads: Vec<(usize, &Head)> = all.iter().enumerate().collect();
        let asked = share_out(&heads, &Cover::all(30), &Cover::all(30)).unwrap();
        assert_eq!(asked.len(), 6, "one request for what one sends: {asked:?}");
        for moments in [false, true] {
            let of = |peer| {
                let parts = asked.iter().filter(|a| (a.peer, a.moments) == (peer, moments));
                parts.map(|a| a.blocks.len()).sum::<usize>()
            };
            assert_eq!((0..3).map(of).sum::<usize>(), 30);
            assert!((0..3).all(|peer| (8..=12).contains(&of(peer))), "{asked:?}");
        }
    }

    #[test]
    fn what_nobody_has_is_told() {
        let heads = [head(Cover::of_rank(8, 4, 0), true), head(Cover::of_rank(8, 4, 1), false)];
        let heads: Vec<(usize, &Head)> = heads.iter().enumerate().collect();
        let (all, none) = (Cover::all(8), Cover::none(8));
        assert!(share_out(&heads, &all, &Cover::of([0..3, 3..6], 8)).is_some());
        assert_eq!(share_out(&heads, &none, &Cover::of([0..3, 3..7], 8)), None);
        assert_eq!(share_out(&heads[1..], &all, &none), None);
        assert_eq!(share_out(&heads, &none, &none), Some(Vec::new()));
    }

    #[test]
    fn a_head_that_makes_no_sense_is_refused() {
        let ranges = |ranges: &[(u64, u64)]| -> Vec<StateRange> {
            ranges.iter().map(|&(first, end)| StateRange { first, end }).collect()
        };
        let said = |moments: &[(u64, u64)], blocks, cursors: &str| StateHead {
            updates: 1,
            layers: 1,
            blocks,
            cursors: cursors.to_owned(),
            losses: vec![5.25],
            weights: ranges(&[(0, 1)]),
            moments: ranges(moments),
        };
        assert_eq!(Head::read(&said(&[(0, 2), (3, 5)], 5, "[]")).unwrap().losses, [5.25]);
        for wrong in [
            said(&[(0, 2), (1, 5)], 5, "[]"),
            said(&[(0, 6)], 5, "[]"),
            said(&[(2, 2)], 5, "[]"),
            said(&[], 1 << 40, "[]"),
            said(&[], 5, "{}"),
            StateHead { weights: ranges(&[(3, 6)]), ..said(&[], 5, "[]") },
        ] {
            assert!(Head::read(&wrong).is_err(), "{wrong:?}");
        }
    }
}
