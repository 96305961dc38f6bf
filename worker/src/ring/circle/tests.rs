use std::net::Ipv4Addr;

use anello_proto::v1::RowsRequest;
use anello_proto::v1::peers_server::{Peers, PeersServer};
use anello_proto::v1::{Cursors, LaneCursor, SourcePlace, StateChunk, state_chunk};
use anello_tls::grpc::incoming;
use tokio::runtime::Runtime;
use tonic::{Request, Response};

use proptest::prelude::*;

use super::*;

/// A peer that answers what it was given, whatever is asked.
#[derive(Clone, Default)]
struct Scripted {
    state: Vec<StateChunk>,
    live: Vec<LiveBlocks>,
    rows: Vec<RowsItem>,
}

type Answer<T> = tokio_stream::Iter<std::vec::IntoIter<Result<T, Status>>>;

fn answer<T: Clone>(items: &[T]) -> Result<Response<Answer<T>>, Status> {
    Ok(Response::new(tokio_stream::iter(items.iter().cloned().map(Ok).collect::<Vec<_>>())))
}

#[tonic::async_trait]
impl Peers for Scripted {
    type StateStream = Answer<StateChunk>;
    type LiveStream = Answer<LiveBlocks>;
    type RowsStream = Answer<RowsItem>;

    async fn state(&self, _: Request<StateRequest>) -> Result<Response<Self::StateStream>, Status> {
        answer(&self.state)
    }

    async fn live(&self, _: Request<LiveRequest>) -> Result<Response<Self::LiveStream>, Status> {
        answer(&self.live)
    }

    async fn rows(&self, _: Request<RowsRequest>) -> Result<Response<Self::RowsStream>, Status> {
        answer(&self.rows)
    }
}

impl Scripted {
    /// What comes of asking it.
    fn asked<T, F: Future<Output = T>>(self, ask: impl FnOnce(Circle) -> F) -> T {
        Runtime::new().unwrap().block_on(async {
            let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
            let address = listener.local_addr().unwrap().to_string();
            let server = tonic::transport::Server::builder().add_service(PeersServer::new(self));
            tokio::spawn(server.serve_with_incoming(incoming(listener, None)));
            ask(Circle::new(
                Job::new("a"),
                vec![vec![address]],
                None,
                Duration::from_secs(60),
                Generation(4),
                Step(7),
            ))
            .await
        })
    }
}

/// Weights of one block, each byte this one.
fn weights_of(block: u64, byte: u8) -> StateBlocks {
    let weights = vec![byte; BLOCK_BYTES];
    let blake3 = digest([&weights, &[], &[]]);
    StateBlocks { first_block: block, weights, blake3, ..StateBlocks::default() }
}

/// What a worker makes of these answers to a request for the weights of block 3.
fn gathered(blocks: Vec<StateBlocks>) -> Result<Gathered, Failed> {
    let head = StateHead { blocks: 9, ..StateHead::default() };
    let chunks = blocks.into_iter().map(state_chunk::Chunk::Blocks);
    let items = std::iter::once(state_chunk::Chunk::Head(head)).chain(chunks);
    let state = items.map(|chunk| StateChunk { chunk: Some(chunk) }).collect();
    Scripted { state, ..Scripted::default() }.asked(|circle| async move {
        let asked = Asked { peer: 0, blocks: 3..4, moments: false };
        circle.gather(vec![asked], &AbortHandle::new()).await
    })
}

#[test]
fn state_that_is_not_what_was_sent_or_asked_for_is_not_taken() {
    let right = weights_of(3, 5);
    assert_eq!(gathered(vec![right.clone()]).unwrap().weights, [(3, vec![5; BLOCK_BYTES])]);
    let mut flipped = right.clone();
    flipped.weights[70_000] ^= 1;
    let mut cut = StateBlocks { weights: right.weights[..BLOCK_BYTES / 2].to_vec(), ..right.clone() };
    cut.blake3 = digest([&cut.weights, &[], &[]]);
    let moments = StateBlocks {
        exp_avg: right.weights.clone(),
        exp_avg_sq: right.weights.clone(),
        blake3: digest([&[], &right.weights, &right.weights]),
        ..StateBlocks { first_block: 3, ..StateBlocks::default() }
    };
    for (sent, told) in [
        (vec![flipped], "blocks from 3 on have another digest than was sent"),
        (vec![StateBlocks { blake3: Vec::new(), ..right.clone() }], "another digest than was sent"),
        (vec![cut], "a chunk is not of whole blocks"),
        (vec![weights_of(4, 5)], "a peer sends blocks that were not asked for"),
        (vec![moments], "a peer sends blocks that were not asked for"),
        (vec![right.clone(), weights_of(4, 5)], "a peer sends more blocks than were asked for"),
        (Vec::new(), "blocks from 3 to 4 did not come"),
    ] {
        let failed = gathered(sent).unwrap_err();
        assert!(failed.reason.contains(told), "{failed:?}, and not {told}");
    }
}

#[test]
fn a_state_that_comes_while_it_trains_is_checked_block_by_block() {
    let both = |byte: u8| [vec![byte; BLOCK_BYTES], vec![byte; BLOCK_BYTES]];
    let block = |first_block: u64, byte: u8| {
        let [exp_avg, exp_avg_sq] = both(byte);
        let blake3 = digest([&[], &exp_avg, &exp_avg_sq]);
        let blocks = StateBlocks { first_block, exp_avg, exp_avg_sq, blake3, ..StateBlocks::default() };
        LiveBlocks { step: 7, blocks: Some(blocks) }
    };
    let ask = |live: Vec<LiveBlocks>, weights: bool| {
        Scripted { live, ..Scripted::default() }.asked(|circle| async move {
            let stream = circle.live(0, 3..5, weights).await.unwrap();
            stream.collect::<Vec<_>>().await
        })
    };
    let came = ask(vec![block(3, 5), block(4, 6)], false);
    let read = |at: usize, byte: u8| {
        let [exp_avg, exp_avg_sq] = both(byte);
        Ok((Step(7), at, [Vec::new(), exp_avg, exp_avg_sq]))
    };
    assert_eq!(came, [read(3, 5), read(4, 6)]);
    let mut flipped = block(4, 6);
    flipped.blocks.as_mut().unwrap().exp_avg_sq[9] ^= 1;
    for (sent, weights, told) in [
        (vec![block(3, 5), flipped], false, "block 4 has another digest than was sent"),
        (vec![block(3, 5), block(5, 6)], false, "it sends blocks that were not asked for"),
        (vec![block(3, 5), block(4, 6), block(5, 7)], false, "it sends blocks that were not asked for"),
        (vec![LiveBlocks { step: 7, blocks: None }], false, "it sends blocks that were not asked for"),
        (vec![block(3, 5)], true, "it sends blocks that were not asked for"),
    ] {
        let came = ask(sent, weights);
        let failed = came.last().unwrap().as_ref().unwrap_err();
        assert!(failed.reason.contains(told), "{failed:?}, and not {told}");
    }
}

#[test]
fn figures_that_are_not_those_of_the_steps_that_were_asked_for_are_refused() {
    let durable = |steps| RowsItem { durable: Some(steps), row: None };
    let row = |step| RowsItem { durable: None, row: Some(StepReport { step, ..StepReport::default() }) };
    let ask = |rows: Vec<RowsItem>| {
        Scripted { rows, ..Scripted::default() }
            .asked(|circle| async move { circle.rows(0, 3, 6).await.map(|came| came.rows.len()) })
    };
    assert_eq!(ask(vec![durable(0), row(3), row(4), row(5)]), Ok(3));
    assert_eq!(ask(vec![durable(5), row(5)]), Ok(1));
    assert_eq!(ask(vec![durable(9)]), Ok(0));
    for sent in [
        vec![durable(0), row(3), row(4)],
        vec![durable(0), row(3), row(5), row(4)],
        vec![durable(0), row(2), row(3), row(4), row(5)],
        vec![durable(5), row(4), row(5)],
        vec![],
    ] {
        let failed = ask(sent).unwrap_err();
        assert!(failed.reason.contains("rows that were not asked for"), "{failed:?}");
    }
}

#[test]
fn what_is_not_a_checkpoints_is_found_in_what_peers_have_read_of_it() {
    let bytes = |of: &[u8]| of.iter().flat_map(|byte| vec![*byte; BLOCK_BYTES]).collect::<Vec<u8>>();
    let gathered =
        Gathered { weights: vec![(3, bytes(&[1, 2]))], moments: vec![(7, [bytes(&[3]), bytes(&[4])])] };
    let right = [(0, 3, 1), (0, 4, 2), (1, 7, 3), (2, 7, 4)];
    let has = |all: &[(usize, usize, u8)], buffer: usize, block: usize, bytes: &[u8]| {
        all.contains(&(buffer, block, bytes[0])) && bytes.len() == BLOCK_BYTES
    };
    assert_eq!(gathered.wrong(|buffer, block, bytes| has(&right, buffer, block, bytes)), None);
    for (at, (buffer, block, _)) in right.iter().enumerate() {
        let mut others = right.to_vec();
        others.remove(at);
        let wrong = gathered.wrong(|buffer, block, bytes| has(&others, buffer, block, bytes));
        assert_eq!(wrong, Some((*buffer, *block)));
    }
}

fn head(cover: Cover, weights: bool) -> Head {
    let all = cover.of_blocks();
    let weights = if weights { Cover::all(all) } else { Cover::none(all) };
    Head { updates: 7, layers: 1, cursors: Vec::new(), losses: Vec::new(), weights, cover, moved: 0..all }
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
            let asked = share_out(&others, &Cover::none(blocks), &lacks).expect("one death loses nothing");
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
    let said = |moments: &[(u64, u64)], blocks| StateHead {
        updates: 1,
        layers: 1,
        blocks,
        cursors: None,
        losses: vec![5.25],
        weights: ranges(&[(0, 1)]),
        moments: ranges(moments),
        moved: None,
    };
    assert_eq!(Head::read(said(&[(0, 2), (3, 5)], 5)).unwrap().losses, [5.25]);
    let moved = |first, end| StateHead { moved: Some(StateRange { first, end }), ..said(&[], 5) };
    let heads = [(1, 5), (0, 4)].map(|(first, end)| Head::read(moved(first, end)).unwrap());
    assert_eq!((moved_of(&heads), moved_of(&[])), (1..4, 0..0), "what one says is zero is zero");
    for wrong in [
        said(&[(0, 2), (1, 5)], 5),
        said(&[(0, 6)], 5),
        said(&[(2, 2)], 5),
        said(&[], 1 << 40),
        StateHead { cursors: Some(of_no_source()), ..said(&[], 5) },
        StateHead { weights: ranges(&[(3, 6)]), ..said(&[], 5) },
        moved(3, 6),
        moved(3, 2),
    ] {
        assert!(Head::read(wrong.clone()).is_err(), "{wrong:?}");
    }
}

/// A peer on two networks is asked by the one that it answers on; it is out of reach when it answers on none.
#[test]
fn a_peer_is_reached_by_any_of_its_addresses() {
    let nobody =
        || std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().to_string();
    let rows = vec![RowsItem { durable: Some(9), row: None }];
    let came = Scripted { rows, ..Scripted::default() }.asked(|circle| async move {
        let [peer] = &circle.peers[..] else { panic!("one is asked") };
        let better = To { address: nobody(), ..peer[0].clone() };
        let circle = Circle { peers: vec![[&[better], &peer[..]].concat()], ..circle };
        circle.rows(0, 3, 6).await.map(|came| came.durable)
    });
    assert_eq!(came, Ok(9));
    let (one, other) = (nobody(), nobody());
    let none = vec![one.clone(), other.clone()];
    let circle =
        Circle::new(Job::new("a"), vec![none], None, Duration::from_millis(800), Generation(4), Step(7));
    let failed = Runtime::new().unwrap().block_on(circle.rows(0, 3, 6)).unwrap_err();
    assert!(failed.reason.contains(&one) && failed.reason.contains(&other), "{failed:?}");
    assert!(failed.unreachable.is_empty(), "its machine says that nobody is there: {failed:?}");
}

/// A lane whose place is in a source without a name.
fn of_no_source() -> Cursors {
    let sources = vec![SourcePlace { source: 1, ..SourcePlace::default() }];
    Cursors { sources: vec!["one".to_owned()], lanes: vec![LaneCursor { sources, ..LaneCursor::default() }] }
}

/// What a peer may say of its state, whatever it is; some of it can be.
fn any_head() -> impl Strategy<Value = StateHead> {
    let ranges = || {
        let range = prop_oneof![
            (0..20u64, 0..6u64).prop_map(|(first, more)| StateRange { first, end: first + more }),
            (any::<u64>(), any::<u64>()).prop_map(|(first, end)| StateRange { first, end }),
        ];
        prop::collection::vec(range, 0..4)
    };
    let cursors = prop_oneof![Just(None), Just(Some(of_no_source()))];
    let numbers = (any::<u64>(), any::<u32>(), prop_oneof![0..20u64, any::<u64>()]);
    (numbers, cursors, ranges(), ranges()).prop_map(
        |((updates, layers, blocks), cursors, weights, moments)| {
            let losses = Vec::new();
            let moved = moments.last().copied();
            StateHead { updates, layers, blocks, cursors, losses, weights, moments, moved }
        },
    )
}

/// A part of a state with a digest that fits, or does not.
fn any_blocks() -> impl Strategy<Value = StateBlocks> {
    let buffer = || prop_oneof![Just(0), Just(BLOCK_BYTES), Just(2 * BLOCK_BYTES), Just(7usize)];
    let first = prop_oneof![2..6u64, any::<u64>()];
    (first, buffer(), buffer(), buffer(), prop::bool::weighted(0.9)).prop_map(
        |(first_block, w, m, v, fits)| {
            let [weights, exp_avg, exp_avg_sq] = [w, m, v].map(|len| vec![3; len]);
            let blake3 = if fits { digest([&weights, &exp_avg, &exp_avg_sq]) } else { Vec::new() };
            StateBlocks { first_block, weights, exp_avg, exp_avg_sq, blake3 }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_head_is_refused_or_lies_within_its_state(head in any_head()) {
        if let Ok(read) = Head::read(head.clone()) {
            for cover in [&read.weights, &read.cover] {
                prop_assert_eq!(cover.of_blocks() as u64, head.blocks);
                prop_assert!(cover.ranges().iter().all(|range| range.end as u64 <= head.blocks));
            }
            prop_assert!(read.moved.start <= read.moved.end && read.moved.end as u64 <= head.blocks);
        }
    }

    /// Nothing but the blocks that were asked for is ever taken.
    #[test]
    fn any_blocks_are_refused_or_what_was_asked_for(sent in prop::collection::vec(any_blocks(), 0..3)) {
        if let Ok(gathered) = gathered(sent) {
            prop_assert_eq!(gathered.weights.len(), 1);
            let (first, bytes) = &gathered.weights[0];
            prop_assert_eq!((*first, bytes.len()), (3, BLOCK_BYTES));
            prop_assert!(gathered.moments.is_empty());
        }
    }
}
