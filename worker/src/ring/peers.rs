//! State for other workers: the service that hands it out.
//!
//! While a generation forms that is a copy of what somebody lacks, and no more; while it trains, and some of its members are
//! learners, the state itself ([`super::live`]).

use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::pin::Pin;
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

use anello_member::KeptRows;
use anello_proto::ring::{Generation, Step};
use anello_proto::v1::peers_server::{Peers, PeersServer};
use anello_proto::v1::{
    LiveBlocks, LiveRequest, RowsItem, RowsRequest, StateBlocks, StateChunk, StateHead, StateRange,
    StateRequest, StepReport, state_chunk::Chunk,
};
use anello_store::Cursor;
use anello_tls::grpc::incoming;
use anello_tls::{Role, Tls};
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status};

use super::live::Live;
use crate::cover::Cover;
use crate::params::BLOCK;

/// Bytes of a block of one buffer.
pub(super) const BLOCK_BYTES: usize = BLOCK * 4;
/// Blocks of a chunk: 3 MiB, under gRPC's limit of 4 MiB a message.
const CHUNK_BLOCKS: usize = 4;

/// How often a block lets gradients pass, and for how long: 100 ms at most, so that two requests of a learner take 15 MiB/s of
/// a link on which gradients are sent all the time.
const YIELDS: u32 = 50;
const YIELD: Duration = Duration::from_millis(2);

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

/// The figures of steps that are not in the run folder.
pub(super) type Rows = Arc<Mutex<KeptRows<StepReport>>>;

/// What the service hands out now, of state.
#[derive(Clone, Default)]
pub(super) struct Shelf(Arc<RwLock<Shelved>>);

#[derive(Default)]
struct Shelved {
    /// To members of a generation that forms.
    forming: Option<Arc<HostState>>,
    /// To learners of this generation, while it trains.
    live: Option<(Generation, Arc<Lent>)>,
}

/// A state that is handed out as it is, and no faster than its worker is asked to.
struct Lent {
    live: Arc<Live>,
    bytes_per_s: Option<u64>,
    /// When the next bytes may go.
    free: Mutex<Instant>,
}

impl Shelf {
    /// Hands out this, and nothing else.
    pub fn lay(&self, state: Arc<HostState>) {
        *self.0.write().expect("no holder panics") = Shelved { forming: Some(state), ..Shelved::default() };
    }

    /// Hands out to learners what trains in `generation`, and nothing else; at most so many bytes a second, to all together.
    pub fn lend(&self, generation: Generation, live: Arc<Live>, bytes_per_s: Option<u64>) {
        let lent = Lent { live, bytes_per_s, free: Mutex::new(Instant::now()) };
        *self.0.write().expect("no holder panics") =
            Shelved { live: Some((generation, Arc::new(lent))), ..Shelved::default() };
    }

    /// Hands out nothing.
    pub fn clear(&self) {
        *self.0.write().expect("no holder panics") = Shelved::default();
    }
}

impl Lent {
    /// Waits until so many bytes may go: as fast as the limit says, and after the gradients that are on their way, but for a
    /// trickle, since there may be rings in which gradients are always on their way.
    async fn make_way(&self, bytes: usize) {
        for _ in 0..YIELDS {
            if !self.live.is_in_sum() {
                break;
            }
            tokio::time::sleep(YIELD).await;
        }
        let Some(limit) = self.bytes_per_s else { return };
        let at = {
            let mut free = self.free.lock().expect("no holder panics");
            let at = (*free).max(Instant::now());
            *free = at + Duration::from_secs_f64(bytes as f64 / limit as f64);
            at
        };
        tokio::time::sleep_until(at.into()).await;
    }

    /// One block, read when its turn has come.
    async fn block(self: Arc<Self>, block: usize) -> Result<LiveBlocks, Status> {
        self.make_way(3 * BLOCK_BYTES).await;
        let read = tokio::task::spawn_blocking(move || {
            let (step, [weights, exp_avg, exp_avg_sq]) = self.live.take(block..block + 1)?;
            let blake3 = digest([&weights, &exp_avg, &exp_avg_sq]);
            let blocks = StateBlocks { first_block: block as u64, weights, exp_avg, exp_avg_sq, blake3 };
            Some(LiveBlocks { step: step.0, blocks: Some(blocks) })
        });
        let read = read.await.map_err(|cause| Status::internal(cause.to_string()))?;
        read.ok_or_else(|| Status::failed_precondition(format!("no block {block} here")))
    }
}

/// Serves what is on `shelf`, and `rows`, at a free port of `address`, with TLS to workers alone.
pub(super) async fn start(
    address: IpAddr,
    tls: Option<&Tls>,
    shelf: Shelf,
    rows: Rows,
) -> std::io::Result<SocketAddr> {
    let listener = tokio::net::TcpListener::bind((address, 0)).await?;
    let address = listener.local_addr()?;
    let server = tonic::transport::Server::builder()
        .add_service(PeersServer::new(Service { shelf, rows }))
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
    rows: Rows,
}

#[tonic::async_trait]
impl Peers for Service {
    type StateStream = Pin<Box<dyn Stream<Item = Result<StateChunk, Status>> + Send>>;

    async fn state(&self, request: Request<StateRequest>) -> Result<Response<Self::StateStream>, Status> {
        let StateRequest { generation, step, first_block, blocks, weights, moments } = request.into_inner();
        let state = self.shelf.0.read().expect("no holder panics").forming.clone();
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

    type LiveStream = Pin<Box<dyn Stream<Item = Result<LiveBlocks, Status>> + Send>>;

    async fn live(&self, request: Request<LiveRequest>) -> Result<Response<Self::LiveStream>, Status> {
        let LiveRequest { generation, first_block, blocks } = request.into_inner();
        let lent = match &self.shelf.0.read().expect("no holder panics").live {
            Some((of, lent)) if of.0 == generation => lent.clone(),
            _ => return Err(Status::unavailable("this generation does not train here now; ask again")),
        };
        let (all, end) = (lent.live.blocks() as u64, first_block.saturating_add(blocks));
        if first_block >= end || end > all {
            return Err(Status::out_of_range(format!("blocks {first_block}..{end} of {all}")));
        }
        let blocks = tokio_stream::iter(first_block as usize..end as usize);
        Ok(Response::new(Box::pin(blocks.then(move |block| lent.clone().block(block)))))
    }

    type RowsStream = Pin<Box<dyn Stream<Item = Result<RowsItem, Status>> + Send>>;

    async fn rows(&self, request: Request<RowsRequest>) -> Result<Response<Self::RowsStream>, Status> {
        let RowsRequest { first, end } = request.into_inner();
        let kept = self.rows.lock().expect("no holder panics");
        let (durable, rows) = kept.between(first, end).ok_or_else(|| {
            Status::unavailable(format!("the figures of {end} steps are not here yet; ask again"))
        })?;
        let rows = rows.map(|row| RowsItem { row: Some(row.clone()), durable: None });
        let first = RowsItem { durable: Some(durable), row: None };
        let items: Vec<_> = std::iter::once(first).chain(rows).map(Ok).collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(items))))
    }
}

/// What a message is checked by.
pub(super) fn digest(buffers: [&[u8]; 3]) -> Vec<u8> {
    let mut hasher = blake3::Hasher::new();
    buffers.into_iter().for_each(|buffer| {
        hasher.update(buffer);
    });
    hasher.finalize().as_bytes().to_vec()
}
