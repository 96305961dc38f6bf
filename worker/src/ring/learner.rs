//! A member that is sent the state while the others train (see [`super::live`]).

use std::collections::VecDeque;
use std::ops::Range;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anello_collective::AbortHandle;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio_stream::StreamExt;

use super::circle::{Circle, Failed};
use super::live::{Live, Put};

/// Blocks that are asked for at a time: 48 MiB.
const PIECE: usize = 64;
/// Requests to one peer at a time, so that one is answered while another is on its way.
const AT_ONCE: usize = 2;
/// Blocks that come too late, one after the other, before this member lets the ring wait for one: of steps that are shorter than
/// the way of a block it would never have any.
const LATE_MAX: usize = 16;
/// Pause of whoever waits for something to come.
const POLL: Duration = Duration::from_millis(2);

/// A state on its way.
pub(super) struct Learner {
    circle: Circle,
    desk: Arc<Desk>,
    tasks: Vec<JoinHandle<()>>,
}

/// What is still to be asked for, and what came of it.
struct Desk {
    live: Arc<Live>,
    wanted: Mutex<VecDeque<Piece>>,
    /// Blocks that came too late since one did not.
    late: AtomicUsize,
    failed: Mutex<Option<Failed>>,
}

/// Blocks, and the places of those that have them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub blocks: Range<usize>,
    pub peers: Vec<usize>,
}

impl Piece {
    /// These blocks, which all of `peers` have, in pieces that are asked for at a time.
    pub fn all_of(blocks: Range<usize>, peers: &[usize]) -> impl Iterator<Item = Self> {
        let end = blocks.end;
        blocks
            .step_by(PIECE)
            .map(move |from| Self { blocks: from..end.min(from + PIECE), peers: peers.to_vec() })
    }
}

impl Learner {
    /// Of a state that lacks the blocks of `pieces`, which peers of `circle` have; nobody is asked yet.
    pub fn new(live: Arc<Live>, circle: Circle, pieces: impl Iterator<Item = Piece>) -> Self {
        let wanted = Mutex::new(pieces.collect());
        let desk = Arc::new(Desk { live, wanted, late: AtomicUsize::new(0), failed: Mutex::new(None) });
        Self { circle, desk, tasks: Vec::new() }
    }

    /// Asks the peers, all at once, until everything is there.
    pub fn begin(&mut self, runtime: &tokio::runtime::Handle) {
        let peers = self.circle.len();
        for at in (0..peers).cycle().take(AT_ONCE * peers) {
            let (circle, desk) = (self.circle.clone(), self.desk.clone());
            self.tasks.push(runtime.spawn(async move {
                if let Err(failed) = desk.learn_from(&circle, at).await {
                    desk.failed.lock().expect("no holder panics").get_or_insert(failed);
                }
            }));
        }
    }

    /// Whether the state is all there.
    pub fn is_through(&self) -> bool {
        self.desk.live.missing() == 0
    }

    /// To be called between two steps: lets the others wait where nothing would ever come in time.
    ///
    /// # Errors
    /// A peer that is lost, the abort.
    pub fn keep_up(&self, abort: &AbortHandle) -> Result<(), Failed> {
        loop {
            if let Some(failed) = self.desk.failed.lock().expect("no holder panics").clone() {
                return Err(failed);
            }
            if let Some(reason) = abort.reason() {
                return Err(reason.to_owned().into());
            }
            if self.is_through() || self.desk.late.load(Ordering::Relaxed) < LATE_MAX {
                return Ok(());
            }
            std::thread::sleep(POLL);
        }
    }
}

impl Drop for Learner {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Desk {
    /// What the peer at `at` is to be asked for next.
    fn next(&self, at: usize) -> Option<Piece> {
        let mut wanted = self.wanted.lock().expect("no holder panics");
        let first = wanted.iter().position(|piece| piece.peers.contains(&at))?;
        wanted.remove(first)
    }

    async fn learn_from(&self, circle: &Circle, at: usize) -> Result<(), Failed> {
        while self.live.missing() > 0 {
            let Some(Piece { blocks, peers }) = self.next(at) else {
                tokio::time::sleep(POLL).await;
                continue;
            };
            let mut stream = pin!(circle.live(at, blocks.clone(), self.live.wants().weights).await?);
            let mut came = 0;
            while let Some(item) = stream.next().await {
                let (step, block, buffers) = item?;
                came += 1;
                let buffers = Arc::new(buffers);
                let put = loop {
                    let (live, buffers) = (self.live.clone(), buffers.clone());
                    let put = spawn_blocking(move || live.put(step, block, &buffers));
                    match put.await.map_err(|cause| Failed::from(cause.to_string()))? {
                        Put::Early => tokio::time::sleep(POLL).await,
                        put => break put,
                    }
                };
                if put == Put::Taken {
                    self.late.store(0, Ordering::Relaxed);
                } else {
                    self.late.fetch_add(1, Ordering::Relaxed);
                    let again = Piece { blocks: block..block + 1, peers: peers.clone() };
                    self.wanted.lock().expect("no holder panics").push_back(again);
                }
            }
            if came < blocks.len() {
                let from = blocks.start + came;
                return Err(format!("blocks from {from} to {} did not come", blocks.end).into());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use anello_proto::ring::{Generation, Step};
    use anello_proto::v1::StepReport;
    use tokio::runtime::Runtime;

    use super::*;
    use crate::cover::Cover;
    use crate::optimizer::State;
    use crate::params::BLOCK;
    use crate::ring::circle::Asked;
    use crate::ring::live::tests::{advance, bytes, state};
    use crate::ring::peers::{self, Job, Offered, Shelf};

    /// A worker that lends its state after step 7, and one that lacks all of it.
    struct Pair {
        runtime: Runtime,
        shelf: Shelf,
        states: [State; 2],
        lives: [Arc<Live>; 2],
        learner: Learner,
    }

    impl Pair {
        /// All of whose blocks have moments.
        fn new() -> Self {
            Self::of([state(1), state(2)])
        }

        fn of(states: [State; 2]) -> Self {
            let (runtime, shelf) = (Runtime::new().unwrap(), Shelf::default());
            let here = IpAddr::V4(Ipv4Addr::LOCALHOST);
            let rows = peers::SharedRows::default();
            let address =
                runtime.block_on(peers::start(&Job::new("a"), &[here], None, shelf.clone(), rows)).unwrap();
            let blocks = states[0].layout.blocks();
            let missing = [0..0, 0..blocks].into_iter();
            let lives: Vec<_> =
                states.iter().zip(missing).map(|(s, m)| Arc::new(Live::new(Step(7), s, m))).collect();
            let lives: [Arc<Live>; 2] = lives.try_into().ok().unwrap();
            let (generation, silence) = (Generation(4), Duration::from_secs(60));
            let peer = vec![address[0].to_string()];
            let circle = Circle::new(Job::new("a"), vec![peer], None, silence, generation, Step(7));
            let mut learner = Learner::new(lives[1].clone(), circle, Piece::all_of(0..blocks, &[0]));
            learner.begin(runtime.handle());
            Self { runtime, shelf, states, lives, learner }
        }

        fn lend(&self, bytes_per_s: Option<u64>) {
            self.shelf.lend(Generation(4), self.lives[0].clone(), bytes_per_s);
        }

        /// Both make the update of a step, one after the other.
        fn update(&self, step: u64) {
            for (live, state) in self.lives.iter().zip(&self.states) {
                live.update(|| advance(state, step));
            }
        }
    }

    #[test]
    fn all_of_a_state_comes_between_updates_however_fast_they_follow() {
        for (limit, pause) in [(None, 0), (None, 3), (Some(20 << 20), 1)] {
            let pair = Pair::new();
            pair.lend(limit);
            let mut step = 7;
            // Of updates that follow at once most blocks come too late: then the learner has the others wait.
            while !pair.learner.is_through() {
                pair.learner.keep_up(&AbortHandle::new()).unwrap();
                pair.update(step);
                step += 1;
                std::thread::sleep(Duration::from_millis(pause));
            }
            pair.update(step);
            assert!(bytes(&pair.states[0]) == bytes(&pair.states[1]), "the same bits after {step} steps");
        }
    }

    /// The moments of what a stage has frozen are zero: none are sent.
    #[test]
    fn what_stands_still_comes_without_moments() {
        let pair = Pair::of([1, 2].map(|seed| {
            let mut state = state(seed);
            state.reset_moments(1..3);
            state
        }));
        pair.lend(None);
        let all = pair.lives[0].blocks();
        let stream = pair.runtime.block_on(pair.learner.circle.live(0, 0..all, true)).unwrap();
        let came: Vec<_> =
            pair.runtime.block_on(stream.map(|item| item.unwrap().2.map(|bytes| bytes.len())).collect());
        for (block, lengths) in came.into_iter().enumerate() {
            let of_moments = if (1..3).contains(&block) { BLOCK * 4 } else { 0 };
            assert_eq!(lengths, [BLOCK * 4, of_moments, of_moments], "block {block} of {all}");
        }
        let mut step = 7;
        while !pair.learner.is_through() {
            pair.learner.keep_up(&AbortHandle::new()).unwrap();
            pair.update(step);
            step += 1;
            std::thread::sleep(Duration::from_millis(3));
        }
        pair.update(step);
        assert!(bytes(&pair.states[0]) == bytes(&pair.states[1]), "the same bits after {step} steps");
        assert_eq!(pair.states[1].exp_avg.numel(), 2 * BLOCK);
    }

    #[test]
    fn state_lets_gradients_pass_and_comes_for_all_that() {
        let pair = Pair::new();
        pair.lives[0].begin_sum();
        pair.lend(None);
        while !pair.learner.is_through() {
            pair.learner.keep_up(&AbortHandle::new()).unwrap();
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(bytes(&pair.states[0]) == bytes(&pair.states[1]));
    }

    #[test]
    fn a_peer_that_lends_something_else_is_asked_again_and_an_abort_ends_it() {
        let pair = Pair::new();
        pair.shelf.lend(Generation(3), pair.lives[0].clone(), None);
        std::thread::sleep(Duration::from_millis(50));
        let abort = AbortHandle::new();
        pair.learner.keep_up(&abort).unwrap();
        assert!(!pair.learner.is_through());
        abort.abort("the ring is over");
        assert_eq!(pair.learner.keep_up(&abort).unwrap_err().reason, "the ring is over");
    }

    #[test]
    fn a_peer_that_is_gone_is_told_of() {
        let pair = Pair::new();
        pair.lend(Some(1 << 20));
        let Pair { runtime, learner, shelf: _shelf, .. } = pair;
        let (live, circle) = (
            learner.desk.live.clone(),
            Circle::new(
                Job::new("a"),
                vec![vec!["127.0.0.1:1".to_owned()]],
                None,
                Duration::from_millis(200),
                Generation(4),
                Step(7),
            ),
        );
        let pieces = Piece::all_of(0..live.blocks(), &[0]);
        let mut other = Learner::new(live, circle, pieces);
        other.begin(runtime.handle());
        let abort = AbortHandle::new();
        let told = loop {
            match other.keep_up(&abort) {
                Ok(()) => std::thread::sleep(Duration::from_millis(5)),
                Err(failed) => break failed,
            }
        };
        assert!(told.reason.starts_with("state from 127.0.0.1:1: "), "{told:?}");
    }

    #[test]
    fn a_worker_of_another_job_is_no_peer() {
        let pair = Pair::new();
        pair.lend(None);
        let mut other = pair.learner.circle.clone();
        other.job = Job::new("b");
        let told = |failed: Failed| failed.reason;
        let refused = "a worker of job a was asked for the state of job b";
        let rows = pair.runtime.block_on(other.rows(0, 0, 0)).map(drop).map_err(told).unwrap_err();
        let heads =
            pair.runtime.block_on(other.heads(&AbortHandle::new())).map(drop).map_err(told).unwrap_err();
        let live = pair.runtime.block_on(other.live(0, 0..1, true)).map(drop).map_err(told).unwrap_err();
        for told in [rows, heads, live] {
            assert!(told.contains(refused), "{told}");
        }
    }

    /// What is not there is refused by the service, whoever asks, and with what was asked for.
    #[test]
    fn what_a_peer_does_not_have_is_refused_in_words() {
        let pair = Pair::new();
        let circle = &pair.learner.circle;
        let blocks = pair.lives[0].blocks();
        let live = |range| match pair.runtime.block_on(circle.live(0, range, true)) {
            Ok(stream) => {
                let first = pair.runtime.block_on(async { pin!(stream).next().await });
                first.expect("an answer").map(drop).map_err(|failed| failed.reason)
            }
            Err(failed) => Err(failed.reason),
        };
        pair.lend(None);
        assert_eq!(live(0..1), Ok(()));
        for wrong in [blocks..blocks + 1, 0..blocks + 1, 1..1] {
            let told = live(wrong.clone()).unwrap_err();
            assert!(told.contains(&format!("blocks {}..{} of {blocks}", wrong.start, wrong.end)), "{told}");
        }
        let of = |range: Range<usize>| Cover::of([range], blocks);
        let live = Live::lacking_moments(Step(7), &pair.states[0], &of(0..1));
        pair.shelf.lay(Arc::new(Offered {
            generation: Generation(4),
            step: Step(7),
            updates: 1,
            layers: 1,
            cursors: Vec::new(),
            losses: Vec::new(),
            weights: of(1..2),
            moments: of(1..2),
            moved: 0..blocks,
            from: peers::From::State(live),
        }));
        for (asked, expected) in [
            (Asked { peer: 0, blocks: 0..1, moments: false }, "no weights of blocks 0..1 here".to_owned()),
            (Asked { peer: 0, blocks: 0..2, moments: true }, "no moments of blocks 0..2 here".to_owned()),
            (
                Asked { peer: 0, blocks: 0..blocks + 1, moments: true },
                format!("blocks 0..{} of {blocks}", blocks + 1),
            ),
        ] {
            let gathered = pair.runtime.block_on(circle.gather(vec![asked], &AbortHandle::new()));
            let told = gathered.map(drop).map_err(|failed| failed.reason).unwrap_err();
            assert!(told.contains(&expected), "{told}");
        }
    }

    #[test]
    fn figures_come_from_a_peer_once_it_has_them_and_from_no_other() {
        let runtime = Runtime::new().unwrap();
        let here = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let row = |step| StepReport { step, loss: step as f64, ..StepReport::default() };
        let rows = peers::SharedRows::default();
        rows.lock().unwrap().took(2, (2..5).map(|step| (step, row(step))).collect()).for_each(drop);
        let address = runtime
            .block_on(peers::start(&Job::new("a"), &[here], None, Shelf::default(), rows.clone()))
            .unwrap();
        let silence = Duration::from_millis(500);
        let peer = vec![address[0].to_string()];
        let circle = Circle::new(Job::new("a"), vec![peer], None, silence, Generation(4), Step(5));
        let ask = |first, end| runtime.block_on(circle.rows(0, first, end));
        let came = ask(0, 5).unwrap();
        assert_eq!((came.durable, came.rows), (2, (2..5).map(row).collect()));
        let came = ask(4, 5).unwrap();
        assert_eq!((came.durable, came.rows), (2, vec![row(4)]));
        assert!(ask(5, 5).unwrap().rows.is_empty() && ask(0, 1).unwrap().rows.is_empty());
        // It has applied the step, and is about to note its figures.
        let noted = std::thread::spawn({
            let rows = rows.clone();
            move || {
                std::thread::sleep(Duration::from_millis(100));
                assert_eq!(rows.lock().unwrap().applied(5, row(5)), None);
            }
        });
        assert_eq!(ask(5, 6).unwrap().rows, [row(5)]);
        noted.join().unwrap();
        let failed = ask(5, 8).unwrap_err();
        assert!(failed.reason.contains("the figures of 8 steps are not here yet"), "{failed:?}");
    }
}
