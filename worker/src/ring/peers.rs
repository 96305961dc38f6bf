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
use tonic::metadata::{Binary, MetadataValue};
use tonic::service::Interceptor;
use tonic::{Request, Response, Status};

use super::cursors;
use super::live::{Live, Wants};
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

/// What a worker has of the state after a step, for others that form a generation with it.
#[derive(Debug)]
pub(super) struct Offered {
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
    pub weights: Cover,
    /// Those whose moments.
    pub moments: Cover,
    /// The blocks outside of which all moments are zero: they are not handed out.
    pub moved: Range<usize>,
    /// Where they are.
    pub from: From,
}

/// Where blocks are that are handed out.
#[derive(Debug)]
pub(super) enum From {
    /// Read of a checkpoint: weights of the blocks that are handed out, first and second moments of those of them that have any, one
    /// after the other, little-endian.
    Checkpoint([Vec<u8>; 3]),
    /// In the state itself, which does not change before all have what they lack.
    State(Live),
}

impl Offered {
    /// Some blocks: weights, first and second moments, as far as they are wanted. Absent: they are not here any more.
    fn cut(&self, blocks: Range<usize>, wants: Wants) -> Option<[Vec<u8>; 3]> {
        let buffers = match &self.from {
            From::State(live) => return live.take(blocks, wants).map(|(_, read)| read),
            From::Checkpoint(buffers) => buffers,
        };
        let mut read = [const { Vec::new() }; 3];
        for (at, (read, buffer)) in read.iter_mut().zip(buffers).enumerate() {
            let (cover, wanted) = match at {
                0 => (self.weights.clone(), wants.weights),
                _ => (self.moments.within(&self.moved), wants.moments),
            };
            if wanted {
                let place = cover.place(blocks.clone())?;
                *read = buffer[place.start * BLOCK_BYTES..place.end * BLOCK_BYTES].to_vec();
            }
        }
        Some(read)
    }

    /// A chunk of a state's stream.
    fn chunk(&self, blocks: Range<usize>, wants: Wants) -> Result<StateChunk, Status> {
        let gone = || Status::aborted(format!("blocks {blocks:?} are not handed out any more"));
        let [weights, exp_avg, exp_avg_sq] = self.cut(blocks.clone(), wants).ok_or_else(gone)?;
        let blake3 = digest([&weights, &exp_avg, &exp_avg_sq]);
        let blocks = StateBlocks { first_block: blocks.start as u64, weights, exp_avg, exp_avg_sq, blake3 };
        Ok(StateChunk { chunk: Some(Chunk::Blocks(blocks)) })
    }
}

/// The figures of steps that are not in the run folder.
pub(super) type SharedRows = Arc<Mutex<KeptRows<StepReport>>>;

/// What the service hands out now, of state.
#[derive(Clone, Default)]
pub(super) struct Shelf(Arc<RwLock<Shelved>>);

#[derive(Default)]
struct Shelved {
    /// To members of a generation that forms.
    forming: Option<Arc<Offered>>,
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
    pub fn lay(&self, state: Arc<Offered>) {
        self.put(Shelved { forming: Some(state), ..Shelved::default() });
    }

    /// Hands out to learners what trains in `generation`, and nothing else; at most so many bytes a second, to all together.
    pub fn lend(&self, generation: Generation, live: Arc<Live>, bytes_per_s: Option<u64>) {
        let lent = Lent { live, bytes_per_s, free: Mutex::new(Instant::now()) };
        self.put(Shelved { live: Some((generation, Arc::new(lent))), ..Shelved::default() });
    }

    /// Hands out nothing.
    pub fn clear(&self) {
        self.put(Shelved::default());
    }

    /// What was handed out before may change from now on: nobody reads it any more, in the midst of an answer neither.
    fn put(&self, shelved: Shelved) {
        let Shelved { forming, live } =
            std::mem::replace(&mut *self.0.write().expect("no holder panics"), shelved);
        if let Some(From::State(live)) = forming.as_ref().map(|offered| &offered.from) {
            live.close();
        }
        if let Some((_, lent)) = live {
            lent.live.close();
        }
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
        let wants = self.live.wants();
        self.make_way((2 + usize::from(wants.weights)) * BLOCK_BYTES).await;
        let read = tokio::task::spawn_blocking(move || {
            let (step, [weights, exp_avg, exp_avg_sq]) = self.live.take(block..block + 1, wants)?;
            let blake3 = digest([&weights, &exp_avg, &exp_avg_sq]);
            let blocks = StateBlocks { first_block: block as u64, weights, exp_avg, exp_avg_sq, blake3 };
            Some(LiveBlocks { step: step.0, blocks: Some(blocks) })
        });
        let read = read.await.map_err(|cause| Status::internal(cause.to_string()))?;
        read.ok_or_else(|| Status::failed_precondition(format!("no block {block} here")))
    }
}

/// The job that a request is of, or that is served: its name is in the metadata of every request.
#[derive(Clone, Debug)]
pub(super) struct Job(MetadataValue<Binary>);

impl Job {
    /// What requests name it by: bytes, since whoever starts a worker may give any name.
    const KEY: &str = "anello-job-bin";

    /// The one of this name.
    pub fn new(name: &str) -> Self {
        Self(MetadataValue::from_bytes(name.as_bytes()))
    }

    /// A request is of this one, or is refused: a port that a worker had may be another's by now.
    fn check(&self, request: Request<()>) -> Result<Request<()>, Status> {
        let name = |job: &MetadataValue<Binary>| {
            job.to_bytes().map(|name| String::from_utf8_lossy(&name).into_owned()).unwrap_or_default()
        };
        match request.metadata().get_bin(Self::KEY) {
            Some(theirs) if *theirs == self.0 => Ok(request),
            theirs => {
                let theirs = theirs.map_or("no job".to_owned(), |theirs| format!("job {}", name(theirs)));
                let fact = format!("a worker of job {} was asked for the state of {theirs}", name(&self.0));
                Err(Status::failed_precondition(fact))
            }
        }
    }
}

impl Interceptor for Job {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert_bin(Self::KEY, self.0.clone());
        Ok(request)
    }
}

/// Serves what is on `shelf`, and `rows`, of `job`, at a free port of each of `addresses`, with TLS to workers alone.
pub(super) async fn start(
    job: &Job,
    addresses: &[IpAddr],
    tls: Option<&Tls>,
    shelf: Shelf,
    rows: SharedRows,
) -> std::io::Result<Vec<SocketAddr>> {
    let service = Service { shelf, rows };
    let mut bound = Vec::new();
    for address in addresses {
        let listener = tokio::net::TcpListener::bind((*address, 0)).await?;
        let address = listener.local_addr()?;
        bound.push(address);
        let server = tonic::transport::Server::builder()
            .add_service(PeersServer::with_interceptor(service.clone(), {
                let job = job.clone();
                move |request| job.check(request)
            }))
            .serve_with_incoming(incoming(listener, tls.map(|tls| (tls, &[Role::Worker][..]))));
        tokio::spawn(async move {
            if let Err(error) = server.await {
                tracing::error!(%address, %error, "the service that hands out state has ended");
            }
        });
    }
    Ok(bound)
}

#[derive(Clone)]
struct Service {
    shelf: Shelf,
    rows: SharedRows,
}

#[tonic::async_trait]
impl Peers for Service {
    type StateStream = Pin<Box<dyn Stream<Item = Result<StateChunk, Status>> + Send>>;

    async fn state(&self, request: Request<StateRequest>) -> Result<Response<Self::StateStream>, Status> {
        let StateRequest { generation, step, first_block, blocks, weights, moments } = request.into_inner();
        let state = self.shelf.0.read().expect("no holder panics").forming.clone();
        let state = state
            .filter(|state| (state.generation.0, state.step.0) == (generation, step))
            .ok_or_else(|| {
                Status::unavailable(format!(
                    "the state after {step} steps for generation {generation} is not handed out here now; ask again"
                ))
            })?;
        let all = state.moments.of_blocks() as u64;
        let end = first_block.saturating_add(blocks);
        if end > all {
            return Err(Status::out_of_range(format!("blocks {first_block}..{end} of {all}")));
        }
        let (first, end) = (first_block as usize, end as usize);
        for (wanted, cover, what) in
            [(weights, &state.weights, "weights"), (moments, &state.moments, "moments")]
        {
            if wanted && cover.place(first..end).is_none() {
                return Err(Status::failed_precondition(format!("no {what} of blocks {first}..{end} here")));
            }
        }
        let range = |range: &Range<usize>| StateRange { first: range.start as u64, end: range.end as u64 };
        let head = StateHead {
            updates: state.updates,
            layers: state.layers,
            blocks: all,
            cursors: Some(cursors::packed(&state.cursors)),
            losses: state.losses.clone(),
            moments: state.moments.ranges().iter().map(range).collect(),
            weights: state.weights.ranges().iter().map(range).collect(),
            moved: Some(range(&state.moved)),
        };
        let head = StateChunk { chunk: Some(Chunk::Head(head)) };
        let chunks = (first..end).step_by(CHUNK_BLOCKS).map(move |at| at..(at + CHUNK_BLOCKS).min(end));
        let wants = Wants { weights, moments };
        let chunks = tokio_stream::iter(chunks).then(move |blocks| {
            let state = Arc::clone(&state);
            async move {
                let read = tokio::task::spawn_blocking(move || state.chunk(blocks, wants)).await;
                read.map_err(|cause| Status::internal(cause.to_string()))?
            }
        });
        Ok(Response::new(Box::pin(tokio_stream::once(Ok(head)).chain(chunks))))
    }

    type LiveStream = Pin<Box<dyn Stream<Item = Result<LiveBlocks, Status>> + Send>>;

    async fn live(&self, request: Request<LiveRequest>) -> Result<Response<Self::LiveStream>, Status> {
        let LiveRequest { generation, first_block, blocks } = request.into_inner();
        let lent = match &self.shelf.0.read().expect("no holder panics").live {
            Some((of, lent)) if of.0 == generation => lent.clone(),
            _ => {
                let fact = format!("generation {generation} does not train here now; ask again");
                return Err(Status::unavailable(fact));
            }
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

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use anello_proto::v1::peers_client::PeersClient;
    use anello_tls::grpc::To;
    use anello_tls::{Files, authority};
    use tokio::runtime::Runtime;

    use super::*;

    const SILENCE: Duration = Duration::from_secs(30);

    /// State is for workers of the same CA: whoever comes without a certificate, with a stranger's or with a user's gets none of it, and
    /// hears why.
    #[test]
    fn state_is_for_workers_and_others_are_told_why_they_get_none() {
        let [ours, others] = [0, 1].map(|_| tempfile::tempdir().unwrap());
        [&ours, &others].iter().for_each(|dir| authority::init(dir.path(), 30, false).unwrap());
        let files = |dir: &tempfile::TempDir, role| Files::in_dir(dir.path(), role);
        let load = |dir: &tempfile::TempDir, role| Tls::load(files(dir, role), role).unwrap();
        let runtime = Runtime::new().unwrap();
        let (here, tls) = ([IpAddr::V4(Ipv4Addr::LOCALHOST)], load(&ours, Role::Worker));
        let job = Job::new("a");
        let serving = start(&job, &here, Some(&tls), Shelf::default(), SharedRows::default());
        let address = runtime.block_on(serving).unwrap()[0].to_string();
        let told = |tls: Option<Tls>| {
            let to = To { address: address.clone(), role: Role::Worker, tls };
            runtime.block_on(async {
                let channel = to.connect(SILENCE).await.map_err(|cause| cause.to_string())?;
                match PeersClient::with_interceptor(channel, job.clone()).rows(RowsRequest::default()).await {
                    Ok(_) => Ok(()),
                    Err(status) => Err(match to.refusal(&status).await {
                        Some(refusal) => refusal.to_string(),
                        None => status.to_string(),
                    }),
                }
            })
        };
        let folders = [&ours, &others].map(|dir| format!("{}/", dir.path().display()));
        let refused = |tls: Option<Tls>| {
            let text = told(tls).unwrap_err().replace(&address, "PEER");
            text.replace(&folders[0], "OURS/").replace(&folders[1], "OTHERS/")
        };
        assert_eq!(told(Some(tls.clone())), Ok(()));

        assert_eq!(
            refused(None),
            "the worker at PEER wants TLS; give --tls DIR with certificates of its CA (ANELLO_TLS_DIR does the same)"
        );
        let one_ca = "both need certificates, and the ca.pem, of one `anello certs init`";
        assert_eq!(
            refused(Some(load(&others, Role::Worker))),
            format!(
                "the worker at PEER shows a certificate that is not of the CA in OTHERS/ca.pem; {one_ca}"
            )
        );
        // One that believes both, and shows what the others signed.
        let both = [&ours, &others].map(|dir| std::fs::read(dir.path().join("ca.pem")).unwrap());
        let ca = others.path().join("both.pem");
        std::fs::write(&ca, both.concat()).unwrap();
        assert_eq!(
            refused(Some(Tls::load(Files { ca, ..files(&others, Role::Worker) }, Role::Worker).unwrap())),
            format!("the worker at PEER does not know the CA of OTHERS/worker.pem; {one_ca}")
        );
        assert_eq!(
            refused(Some(load(&ours, Role::User))),
            "the worker at PEER does not serve who shows OURS/user.pem; look with `anello certs show` whether it is that of a user"
        );
    }
}
