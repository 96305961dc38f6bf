//! What a bisection found: plain values, that serialise as they are.

use serde::Serialize;

/// One of the two runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Which {
    /// The first.
    A,
    /// The second.
    B,
}

impl Which {
    /// Both, in order.
    pub const BOTH: [Self; 2] = [Self::A, Self::B];
}

/// The parts of a step in the order in which they happen: what differs first is the cause of what differs later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// The state that the step begins with: initial weights, upcycling, moments set to zero.
    Start,
    /// Token ids, targets and positions of each lane.
    Batch,
    /// Losses and exit probabilities.
    Forward,
    /// Each lane's gradient.
    Gradient,
    /// The sum of all lanes along the tree.
    Reduce,
    /// Gradient norm, clip, and whether the step is applied.
    Norm,
    /// Learning rate, weights and moments.
    Update,
    /// What the weights are worth on held-out data.
    Eval,
}

/// The first difference between two computations of one step. Of each pair the first is A's, or what is on record; the
/// second is B's, or what was computed here.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// The step, from 0 as in the metrics. The checkpoint after it has the next number.
    pub step: u64,
    /// The first phase that differs. A checkpoint shows only that something differs by the end of its last step.
    pub phase: Phase,
    /// The checkpoint in which it was seen, where it was not seen in the step itself.
    pub checkpoint: Option<u64>,
    /// The first lane that differs, where the phase has lanes and they were looked at.
    pub lane: Option<u32>,
    /// Figures that differ.
    pub figures: Vec<Figure>,
    /// The first block that differs, where blocks were looked at.
    pub blocks: Option<Blocks>,
}

/// A figure that differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Figure {
    /// Its name, as in the metrics where it is among them.
    pub name: String,
    /// Both values: the shortest texts that read back to the same bits.
    pub values: [String; 2],
}

/// Blocks of a flat buffer that differ.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Blocks {
    /// `weights`, `exp_avg`, `exp_avg_sq`, `gradient` (of a lane) or `total` (of all).
    pub buffer: &'static str,
    /// The first that differs.
    pub block: usize,
    /// How many of this buffer do.
    pub differ: usize,
    /// Tensors with elements in the first.
    pub tensors: Vec<String>,
    /// Its first element that differs; absent when only digests could be compared.
    pub element: Option<Element>,
}

/// The first element of a block that differs, and how much of the block does.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Element {
    /// Its tensor.
    pub tensor: String,
    /// Where it is in the tensor.
    pub index: Vec<usize>,
    /// Both values, as [`Figure::values`].
    pub values: [String; 2],
    /// Elements of the block that differ.
    pub differ: usize,
    /// Largest absolute difference in the block; not a number when one of the two is none.
    pub max_abs: f64,
}

/// A key of the mathematics in which the configs differ.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct KeyDifference {
    /// The first step for which both configs hold that were compared: 0, unless one was changed on the way.
    pub from: u64,
    /// The dotted key.
    pub key: String,
    /// Both values as TOML; absent where a config has no such key.
    pub values: [Option<String>; 2],
}

/// A source whose index is another one in the other run, by what their checkpoints and logs say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SourceDifference {
    /// The first step of those for which they say so.
    pub from: u64,
    /// Its name.
    pub source: String,
    /// Both digests.
    pub values: [String; 2],
}

/// What one run's folder tells.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Told {
    /// Where it is.
    pub place: String,
    /// Steps that were logged.
    pub logged: u64,
    /// Steps of the checkpoints that it keeps.
    pub checkpoints: Vec<u64>,
    /// Kinds of device that it was trained on.
    pub devices: Vec<String>,
    /// Builds that trained it.
    pub builds: Vec<String>,
}

/// What of the two records could be compared, and where they part.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Records {
    /// Steps that both have logged.
    pub steps: u64,
    /// The first step with figures that differ.
    pub figures: Option<Difference>,
    /// Checkpoints that both keep and that are equal.
    pub equal_checkpoints: Vec<u64>,
    /// The first checkpoint that both keep and that differs.
    pub checkpoint: Option<Difference>,
}

impl Records {
    /// The step at which the records are first seen to differ.
    pub fn part_at(&self) -> Option<u64> {
        self.first().map(|difference| difference.step)
    }

    /// The earlier of both differences. Figures are told first: they are of the step itself.
    pub fn first(&self) -> Option<&Difference> {
        let both = [&self.figures, &self.checkpoint].into_iter().flatten();
        both.min_by_key(|difference| difference.step)
    }
}

/// Whether the runs were computed again.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Replay {
    /// Their records do not differ.
    NotNeeded,
    /// The caller did not want it.
    NotWanted,
    /// It could not be done.
    Impossible {
        /// Why, and what to do.
        reason: String,
    },
    /// Up to the first difference.
    Done(Box<Replayed>),
}

/// What computing both runs again showed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Replayed {
    /// Steps applied in the state that both began from.
    pub from: u64,
    /// Whether that was a checkpoint; else each began from its own seed.
    pub checkpoint: bool,
    /// Steps applied at the end.
    pub to: u64,
    /// The first difference between the two computations.
    pub differs: Option<Difference>,
    /// The first difference between A's record and A computed again, and the same for B.
    pub off_record: [Option<Difference>; 2],
    /// What this machine is that computed: (kind of device, build).
    pub here: (String, String),
}

/// The answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// No difference in anything that both have.
    Equal,
    /// None so far, but they have other configs or other data.
    EqualSoFar,
    /// None in what could be read, and not all could.
    Unknown,
    /// There is nothing yet that both have.
    NothingToCompare,
    /// Their records differ, and they were not computed again.
    Recorded,
    /// They differ when this machine computes both: by their configs, data, or a defect of this build.
    Inputs,
    /// This machine computes the same for both, and A's record is not that.
    OffRecordA,
    /// The same, and B's record is not that.
    OffRecordB,
    /// The same, and neither record is that.
    OffRecordBoth,
    /// Both records agree with one another where this machine computes something else, so that it cannot say more.
    Elsewhere,
}

/// All that was found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Findings {
    /// The answer.
    pub verdict: Verdict,
    /// What A's folder tells.
    pub a: Told,
    /// What B's folder tells.
    pub b: Told,
    /// Keys of the mathematics that differ.
    pub config: Vec<KeyDifference>,
    /// The first step that the two configs make another one; absent when they never do.
    pub configs_part_at: Option<u64>,
    /// Sources whose index differs.
    pub data: Vec<SourceDifference>,
    /// Where the records part.
    pub records: Records,
    /// Whether, and how, the runs were computed again.
    pub replay: Replay,
    /// What could not be read, and other things to know.
    pub notes: Vec<String>,
}

impl Findings {
    /// What computing both again showed, when it was done.
    pub fn replayed(&self) -> Option<&Replayed> {
        match &self.replay {
            Replay::Done(replayed) => Some(replayed),
            Replay::NotNeeded | Replay::NotWanted | Replay::Impossible { .. } => None,
        }
    }

    /// The first difference that is known: of the computations when there is one, else of the records.
    pub fn first(&self) -> Option<&Difference> {
        let computed = self.replayed().and_then(|replayed| {
            let off_record = replayed.off_record.iter().flatten().min_by_key(|difference| difference.step);
            replayed.differs.as_ref().or(off_record)
        });
        computed.or(self.records.first())
    }
}
