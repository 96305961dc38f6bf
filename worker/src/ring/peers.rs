//! State from worker to worker: the service that hands it out, and the client that gathers it.

use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use anello_collective::AbortHandle;
use anello_proto::ring::{Generation, Step};
use anello_proto::v1::peers_client::PeersClient;
use anello_proto::v1::peers_server::{Peers, PeersServer};
use anello_proto::v1::{StateBlocks, StateChunk, StateHead, StateRequest, state_chunk::Chunk};
use anello_store::Cursor;
use anello_tls::grpc::{To, incoming};
use anello_tls::{Role, Tls};
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status};

use crate::params::BLOCK;

/// Bytes of a block of one buffer.
const BLOCK_BYTES: usize = BLOCK * 4;
/// Blocks of a chunk: 3 MiB, under gRPC's limit of 4 MiB a message.
const CHUNK_BLOCKS: usize = 4;
/// Time to reach a peer.
const CONNECT: Duration = Duration::from_secs(5);

/// State on the host, as it is after a step.
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
    /// Weights, first and second moments: whole blocks, little-endian.
    pub buffers: [Vec<u8>; 3],
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
        let StateRequest { generation, step, first_block, blocks } = request.into_inner();
        let state = self.shelf.read().expect("no holder panics").clone();
        let state = state
            .filter(|state| (state.generation.0, state.step.0) == (generation, step))
            .ok_or_else(|| Status::unavailable("this state is not on the shelf now; ask again"))?;
        let all = (state.buffers[0].len() / BLOCK_BYTES) as u64;
        let end = first_block.saturating_add(blocks);
        if end > all {
            return Err(Status::out_of_range(format!("blocks {first_block}..{end} of {all}")));
        }
        let head = StateHead {
            updates: state.updates,
            layers: state.layers,
            blocks: all,
            cursors: serde_json::to_string(&state.cursors).expect("maps have string keys"),
            losses: state.losses.clone(),
        };
        let head = StateChunk { chunk: Some(Chunk::Head(head)) };
        let (first, end) = (first_block as usize, end as usize);
        let chunks = (first..end).step_by(CHUNK_BLOCKS).map(move |at| {
            let bytes = at * BLOCK_BYTES..(at + CHUNK_BLOCKS).min(end) * BLOCK_BYTES;
            let [weights, exp_avg, exp_avg_sq] =
                state.buffers.each_ref().map(|buffer| buffer[bytes.clone()].to_vec());
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

/// Gathers the state after `step` from `holders` (addresses), each giving a part of the blocks, all at once.
///
/// # Errors
/// In words: a holder that is lost, a chunk with another digest, the abort.
pub(super) async fn gather(
    holders: Vec<String>,
    tls: Option<&Tls>,
    generation: Generation,
    step: Step,
    abort: &AbortHandle,
) -> Result<HostState, String> {
    let aborted = async {
        loop {
            if let Some(reason) = abort.reason() {
                return reason.to_owned();
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::select! {
        state = gather_all(holders, tls, generation, step) => state,
        reason = aborted => Err(reason),
    }
}

async fn gather_all(
    holders: Vec<String>,
    tls: Option<&Tls>,
    generation: Generation,
    step: Step,
) -> Result<HostState, String> {
    let holders = holders.into_iter().map(|address| To { address, role: Role::Worker, tls: tls.cloned() });
    let holders: Vec<To> = holders.collect();
    let request =
        |first_block, blocks| StateRequest { generation: generation.0, step: step.0, first_block, blocks };
    let first = holders.first().ok_or("nobody holds the state")?;
    let (head, _) = fetch(first.clone(), request(0, 0)).await?;
    let cursors: Vec<Cursor> = serde_json::from_str(&head.cursors)
        .map_err(|cause| format!("{} tells of no cursors: {cause}", first.address))?;
    let (count, all) = (holders.len() as u64, head.blocks);
    let mut tasks = tokio::task::JoinSet::new();
    for (at, holder) in (0u64..).zip(holders) {
        let (from, to) = (all * at / count, all * (at + 1) / count);
        tasks.spawn(fetch(holder, request(from, to - from)));
    }
    let len = all as usize * BLOCK_BYTES;
    let mut buffers = [vec![0; len], vec![0; len], vec![0; len]];
    let mut have = 0;
    while let Some(done) = tasks.join_next().await {
        let (other, chunks) = done.map_err(|cause| cause.to_string())??;
        if (other.updates, other.layers, other.blocks) != (head.updates, head.layers, head.blocks) {
            return Err("two holders hold states of different kinds".to_owned());
        }
        for chunk in chunks {
            let at = chunk.first_block as usize * BLOCK_BYTES;
            for (buffer, bytes) in buffers.iter_mut().zip([chunk.weights, chunk.exp_avg, chunk.exp_avg_sq]) {
                let place =
                    buffer.get_mut(at..at + bytes.len()).ok_or("a chunk lies outside of the state")?;
                place.copy_from_slice(&bytes);
                have += bytes.len();
            }
        }
    }
    if have != 3 * len {
        return Err(format!("{have} of {} bytes of state came", 3 * len));
    }
    let StateHead { updates, layers, losses, .. } = head;
    Ok(HostState { generation, step, updates, layers, cursors, losses, buffers })
}

/// One holder's part. A holder that has not got there yet is asked again.
async fn fetch(holder: To, request: StateRequest) -> Result<(StateHead, Vec<StateBlocks>), String> {
    let failed = |what: String| format!("state from {}: {what}", holder.address);
    let channel = holder.connect(CONNECT).await.map_err(|cause| failed(cause.to_string()))?;
    let mut client = PeersClient::new(channel);
    let mut stream = loop {
        match client.state(request).await {
            Ok(stream) => break stream.into_inner(),
            Err(status) if status.code() == tonic::Code::Unavailable => {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Err(status) => return Err(failed(status.to_string())),
        }
    };
    let (mut head, mut chunks) = (None, Vec::new());
    while let Some(message) = stream.next().await {
        match message.map_err(|status| failed(status.to_string()))?.chunk {
            Some(Chunk::Head(said)) => head = Some(said),
            Some(Chunk::Blocks(blocks)) => {
                let StateBlocks { weights, exp_avg, exp_avg_sq, blake3, first_block } = &blocks;
                if digest([weights, exp_avg, exp_avg_sq]) != *blake3 {
                    return Err(failed(format!(
                        "blocks from {first_block} on have another digest than was sent"
                    )));
                }
                if weights.len() % BLOCK_BYTES != 0 || [exp_avg.len(), exp_avg_sq.len()] != [weights.len(); 2]
                {
                    return Err(failed("a chunk is not of whole blocks".to_owned()));
                }
                chunks.push(blocks);
            }
            None => return Err(failed("an empty chunk".to_owned())),
        }
    }
    Ok((head.ok_or_else(|| failed("no head".to_owned()))?, chunks))
}
