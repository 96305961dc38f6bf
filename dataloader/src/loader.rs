use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anello_configs::{OnCorrupt, RunConfig, Schedule};
use anello_store::Cursor;

use crate::cache::Cache;
use crate::dataset::Dataset;
use crate::decode::Documents;
use crate::lane::{Fetch, Lane, LaneStep, StepData};
use crate::order::{Order, SourceShape};
use crate::{Error, Result};

/// What the data of a step depends on; `None` from the end of the run on.
pub type Plan = Arc<dyn Fn(u64) -> Option<StepData> + Send + Sync>;

/// The plan of a schedule.
pub fn plan_of(schedule: Schedule) -> Plan {
    let mixtures: Vec<_> = schedule.stages().map(|(stage, _)| Arc::new(stage.mixture.clone())).collect();
    Arc::new(move |step| {
        let plan = schedule.at(step)?;
        Some(StepData {
            stage: plan.stage_index as u32,
            sequence: plan.stage.sequence,
            micro_batch: plan.stage.micro_batch,
            micro_batches: u32::try_from(plan.micro_batches_per_lane)
                .expect("a lane's step is no billion tokens"),
            mask: plan.stage.mask,
            mixture: mixtures[plan.stage_index].clone(),
        })
    })
}

/// What a [`Loader`] serves, and how.
#[derive(Clone)]
pub struct LoaderOptions {
    /// Every source of the run by name, also those that no stage from here on uses.
    pub sources: BTreeMap<String, Arc<Dataset>>,
    /// The run's seed.
    pub seed: u64,
    /// Lanes of the run.
    pub lanes: u32,
    /// The lanes to serve, a part of `0..lanes`.
    pub serve: Range<u32>,
    /// What a step wants.
    pub plan: Plan,
    /// The first step to serve.
    pub start_step: u64,
    /// Where each served lane is before `start_step`, in their order; `None` at the beginning of a run.
    pub cursors: Option<Vec<Cursor>>,
    /// Ids must be below this; `None` = any.
    pub vocab: Option<u32>,
    /// What a row group that cannot be read does.
    pub on_corrupt: OnCorrupt,
    /// Bound on micro-batches that wait, bytes. Each thread may hold one lane step more; and each lane has the row
    /// group it is in of each source in memory besides.
    pub prefetch_bytes: u64,
    /// Threads that fetch, decode and pack; at most one a lane is used.
    pub threads: usize,
}

impl LoaderOptions {
    /// All lanes of a run from its first step on. Opens every source of the config.
    pub fn of(config: &RunConfig) -> Result<Self> {
        let cache = config.data.cache.as_ref();
        let cache = cache.map(|cache| Arc::new(Cache::open(Path::new(&cache.dir), cache.bytes)));
        let mut sources = BTreeMap::new();
        for (name, source) in &config.data.sources {
            let dataset = Dataset::open(&source.url)?.cached(cache.clone());
            sources.insert(name.clone(), Arc::new(dataset));
        }
        Ok(Self {
            sources,
            seed: config.seed,
            lanes: config.lanes,
            serve: 0..config.lanes,
            plan: plan_of(Schedule::new(config)),
            start_step: 0,
            cursors: None,
            vocab: Some(config.model.vocab),
            on_corrupt: config.data.on_corrupt,
            prefetch_bytes: config.data.prefetch_bytes,
            threads: std::thread::available_parallelism().map_or(1, |n| n.get()).min(4),
        })
    }
}

/// Lane steps in their order: step by step, and in a step lane by lane.
///
/// What a lane gets does not depend on which lanes are served together, on `threads` or on `prefetch_bytes`. After an
/// error, and after the last step, it yields nothing more. Dropping it stops its threads (it waits for a fetch that is
/// under way).
pub struct Loader {
    queues: Vec<Arc<Queue>>,
    threads: Vec<JoinHandle<()>>,
    served: usize,
    taken: usize,
    done: bool,
    epochs: BTreeMap<String, u64>,
    waited: Duration,
}

impl Loader {
    /// Starts to prefetch. Errors: options that do not fit together, a cursor in a source that is not there.
    pub fn open(options: LoaderOptions) -> Result<Self> {
        let LoaderOptions {
            sources, seed, lanes, serve, plan, start_step, cursors, vocab, on_corrupt, ..
        } = options;
        if serve.is_empty() || serve.end > lanes {
            return Err(Error::Options(format!(
                "lanes {}..{} cannot be served of a run with {lanes}; serve at least one of 0..{lanes}",
                serve.start, serve.end
            )));
        }
        let served = serve.len();
        let cursors = cursors.unwrap_or_else(|| vec![Cursor::default(); served]);
        if cursors.len() != served {
            return Err(Error::Options(format!(
                "{} cursors for {served} lanes; give one for each lane, in order",
                cursors.len()
            )));
        }
        if let (Some(vocab), Some((name, max))) = (vocab, largest_id(&sources))
            && max >= u64::from(vocab)
        {
            return Err(Error::Options(format!(
                "source {name} has token id {max}, the vocabulary has {vocab}; tokenize it again with the run's tokenizer"
            )));
        }
        let shapes = sources.iter().map(|(name, dataset)| SourceShape {
            name: name.clone(),
            row_groups: dataset.row_groups(),
            rows: dataset.index().rows(),
            tokens: dataset.index().tokens(),
        });
        let order = Arc::new(Order::new(seed, lanes, shapes.collect()));
        let datasets: Vec<_> = sources.into_values().collect();

        let threads = options.threads.clamp(1, served);
        let mut shares: Vec<Vec<Lane>> = (0..threads).map(|_| Vec::new()).collect();
        for (at, (lane, cursor)) in serve.zip(&cursors).enumerate() {
            shares[at % threads].push(Lane::new(order.clone(), lane, on_corrupt, cursor)?);
        }
        let bound = usize::try_from(options.prefetch_bytes).unwrap_or(usize::MAX) / threads;
        let queues: Vec<_> = (0..threads).map(|_| Arc::new(Queue::new(bound))).collect();
        let mut loader = Self {
            queues,
            threads: Vec::with_capacity(threads),
            served,
            taken: 0,
            done: false,
            epochs: BTreeMap::new(),
            waited: Duration::ZERO,
        };
        for (at, lanes) in shares.into_iter().enumerate() {
            let (queue, plan) = (loader.queues[at].clone(), plan.clone());
            let fetch = Sources { datasets: datasets.clone(), vocab };
            let thread = std::thread::Builder::new()
                .name(format!("anello-data-{at}"))
                .spawn(move || produce(lanes, start_step, &plan, fetch, &queue))
                .map_err(|e| Error::Options(format!("cannot start a loader thread: {e}; lower `threads`")))?;
            loader.threads.push(thread);
        }
        Ok(loader)
    }

    /// Time that [`Loader::next`] waited for data so far.
    pub fn waited(&self) -> Duration {
        self.waited
    }

    /// Bytes of micro-batches that wait to be taken.
    pub fn queued_bytes(&self) -> u64 {
        self.queues.iter().map(|queue| queue.lock().bytes as u64).sum()
    }

    /// Says once for all lanes that a source starts over.
    fn note_epochs(&mut self, step: &LaneStep) {
        for (source, epoch) in &step.epochs_by_source {
            let known = self.epochs.entry(source.clone()).or_insert(*epoch);
            if *epoch > *known {
                *known = *epoch;
                tracing::info!(source, epoch, step = step.step, "source starts over");
            }
        }
    }
}

impl Iterator for Loader {
    type Item = Result<LaneStep>;

    /// The next lane step; blocks until it is there.
    fn next(&mut self) -> Option<Result<LaneStep>> {
        if self.done {
            return None;
        }
        let start = Instant::now();
        let item = self.queues[self.taken % self.served % self.queues.len()].pop();
        self.waited += start.elapsed();
        self.taken += 1;
        match item {
            Some(Item::Step(step)) => {
                self.note_epochs(&step);
                return Some(Ok(*step));
            }
            Some(Item::End) => self.done = true,
            Some(Item::Failed(error)) => {
                self.done = true;
                return Some(Err(error));
            }
            None => {
                self.done = true;
                let said = "a loader thread ended without a word; see the panic above, and report it";
                return Some(Err(Error::Options(said.to_owned())));
            }
        }
        None
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.queues.iter().for_each(|queue| queue.close());
        for thread in self.threads.drain(..) {
            // A panic there was printed by the hook, and `next` has told of it.
            let _ = thread.join();
        }
    }
}

fn largest_id(sources: &BTreeMap<String, Arc<Dataset>>) -> Option<(&String, u64)> {
    let maxima = sources.iter().filter_map(|(name, dataset)| Some((name, dataset.index().max_id()?)));
    maxima.max_by_key(|(_, max)| *max)
}

/// A thread's life: its lanes' steps in order, until the plan ends, an error, or the loader is dropped.
fn produce(mut lanes: Vec<Lane>, start_step: u64, plan: &Plan, mut fetch: Sources, queue: &Queue) {
    struct CloseOnExit<'a>(&'a Queue);
    impl Drop for CloseOnExit<'_> {
        fn drop(&mut self) {
            self.0.close();
        }
    }
    let _close = CloseOnExit(queue);
    for step in start_step.. {
        let Some(data) = plan(step) else {
            queue.push(Item::End);
            return;
        };
        for lane in &mut lanes {
            let (item, failed) = match lane.step(step, &data, &mut fetch) {
                Ok(step) => (Item::Step(Box::new(step)), false),
                Err(error) => (Item::Failed(error), true),
            };
            if !queue.push(item) || failed {
                return;
            }
        }
    }
}

struct Sources {
    datasets: Vec<Arc<Dataset>>,
    vocab: Option<u32>,
}

impl Fetch for Sources {
    fn fetch(&mut self, source: usize, row_group: u64) -> Result<Arc<Documents>> {
        Ok(Arc::new(self.datasets[source].read(row_group, self.vocab)?))
    }
}

enum Item {
    Step(Box<LaneStep>),
    Failed(Error),
    End,
}

impl Item {
    fn bytes(&self) -> usize {
        match self {
            Self::Step(step) => step.micro_batches.iter().map(|batch| batch.bytes()).sum(),
            Self::Failed(_) | Self::End => 0,
        }
    }
}

/// A queue from one thread to the loader, bounded in bytes; an empty one takes an item of any size.
struct Queue {
    state: Mutex<QueueState>,
    changed: Condvar,
    bound: usize,
}

#[derive(Default)]
struct QueueState {
    items: VecDeque<Item>,
    bytes: usize,
    closed: bool,
}

impl Queue {
    fn new(bound: usize) -> Self {
        Self { state: Mutex::default(), changed: Condvar::new(), bound }
    }

    fn lock(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn wait<'a>(&self, state: MutexGuard<'a, QueueState>) -> MutexGuard<'a, QueueState> {
        self.changed.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Waits for room; `false` if the queue was closed.
    fn push(&self, item: Item) -> bool {
        let bytes = item.bytes();
        let mut state = self.lock();
        while !state.closed && !state.items.is_empty() && state.bytes + bytes > self.bound {
            state = self.wait(state);
        }
        if state.closed {
            return false;
        }
        state.bytes += bytes;
        state.items.push_back(item);
        self.changed.notify_all();
        true
    }

    /// Waits for an item; `None` if the queue was closed and is empty.
    fn pop(&self) -> Option<Item> {
        let mut state = self.lock();
        loop {
            if let Some(item) = state.items.pop_front() {
                state.bytes -= item.bytes();
                self.changed.notify_all();
                return Some(item);
            }
            if state.closed {
                return None;
            }
            state = self.wait(state);
        }
    }

    fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }
}
