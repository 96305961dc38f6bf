//! The typed run config: what a user's TOML means after presets, includes and overrides.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Everything a run is determined by, except its data.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RunConfig {
    /// Name of the run: letters, digits, `-`, `_`, and `.` but not first. Names the run folder unless the user gives one.
    pub name: String,
    /// Seed of every generator of the run.
    pub seed: u64,
    /// Number of data-parallel streams, a power of two, fixed for the life of the run.
    pub lanes: u32,
    /// Sizes of the model at the first step (an upcycling stage may change `layers`).
    pub model: Model,
    /// Weights to begin with, in place of the seed's.
    pub init: Option<Init>,
    /// AdamW and clipping.
    pub optimizer: Optimizer,
    /// How the mathematics is carried out.
    pub compute: Compute,
    /// Tokenizer and token sources.
    pub data: Data,
    /// When checkpoints are taken and which are kept.
    pub checkpoint: Checkpoint,
    /// How the run folder is used.
    pub store: RunStore,
    /// What a loss far above those before it does.
    pub guard: Guard,
    /// Held-out data that the model is measured on while it trains.
    pub eval: Eval,
    /// What is put on record for those who want to check the run.
    pub record: Record,
    /// How a ring watches over itself.
    pub ring: Ring,
    /// The recipe, in order.
    pub stages: Vec<Stage>,
}

/// Sizes of a LoopLM (LOOPLM §1): L, D, H, key/value heads, F, V.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Model {
    /// Layers in the shared stack (L).
    pub layers: u32,
    /// Hidden size (D), a multiple of `2 * heads`.
    pub hidden: u32,
    /// Attention heads (H).
    pub heads: u32,
    /// Key/value heads; divides `heads`.
    pub kv_heads: u32,
    /// Feed-forward size (F).
    pub ffn: u32,
    /// Vocabulary size (V).
    pub vocab: u32,
    /// ε of every RMSNorm.
    pub rms_eps: f64,
    /// Standard deviation of the initial matrices.
    pub init_std: f64,
    /// Standard deviation of the initial embedding; `init_std` in the published models.
    pub embed_std: f64,
    /// Initial weight of the norms after attention and after the MLP; 1 in the published models. With 1 and an embedding
    /// far below it, a token's own identity is lost in the residual until the norms have shrunk, which takes more steps
    /// than a small run has.
    pub post_norm: f64,
}

/// Weights that a run begins with: those of another run's checkpoint, or of a folder in the published layout. With fewer
/// layers there the stack is repeated, as by an upcycling.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Init {
    /// `RUN`, `RUN@STEP`, or the folder with `config.json`; a relative path in a file is relative to that file.
    pub from: String,
    /// Digest of the weights, as a checkpoint of step 0 would have it; found out when the run is made.
    pub weights: Option<String>,
}

/// AdamW with decoupled weight decay on matrices, and the global gradient clip.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Optimizer {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay, on matrices only.
    pub weight_decay: f64,
    /// Largest global gradient norm; gradients above it are scaled down to it.
    pub clip: f64,
}

/// Number format of the matrix multiplications; weights, moments, gradients, norms and losses are fp32 in both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Dtype {
    /// 32-bit floats throughout.
    Fp32,
    /// bfloat16 matrices.
    Bf16,
}

/// What the forward keeps for the backward. The bits of the result do not depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Recompute {
    /// Every activation of every loop step.
    None,
    /// The input of every layer at every loop step (L·T hidden states); a layer is recomputed in its backward.
    Layer,
    /// The input of every loop step (T hidden states); the stack is recomputed loop step by loop step.
    Loop,
}

/// What the model is computed on. The bits hold for one kind of device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum ComputeDevice {
    /// The cores of this machine.
    #[default]
    Cpu,
    /// An NVIDIA GPU: the one of this number among those that CUDA shows to the process; absent: of several workers of
    /// one machine each takes the next.
    Cuda(Option<u32>),
}

impl ComputeDevice {
    /// What may be written.
    pub const ACCEPTED: &str = "\"cpu\", \"cuda\" or \"cuda:N\", N from 0 to 255";
}

impl std::fmt::Display for ComputeDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(None) => f.write_str("cuda"),
            Self::Cuda(Some(number)) => write!(f, "cuda:{number}"),
        }
    }
}

impl std::str::FromStr for ComputeDevice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |digits: &str| {
            let number = digits.parse::<u8>().ok()?;
            (number.to_string() == digits).then_some(number.into())
        };
        let device = match text {
            "cpu" => Some(Self::Cpu),
            "cuda" => Some(Self::Cuda(None)),
            other => other.strip_prefix("cuda:").and_then(number).map(|number| Self::Cuda(Some(number))),
        };
        device.ok_or_else(|| format!("`{text}` is no device; give {}", Self::ACCEPTED))
    }
}

impl From<ComputeDevice> for String {
    fn from(device: ComputeDevice) -> Self {
        device.to_string()
    }
}

impl TryFrom<String> for ComputeDevice {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// How the mathematics is carried out on a device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Compute {
    /// Where.
    pub device: ComputeDevice,
    /// Format of the matrices.
    pub dtype: Dtype,
    /// What the forward keeps.
    pub recompute: Recompute,
    /// Whether the inputs that it keeps wait in the host's memory, so that a GPU takes longer sequences. The bits do not depend
    /// on it; on a CPU it only costs time.
    pub offload: bool,
    /// Whether a GPU computes norms, SwiGLU, RoPE, cross-entropy, AdamW and, on Hopper, attention with kernels of Anello's own, where
    /// LibTorch has chains of them. They round elsewhere, so the bits depend on it; a CPU has no such kernels.
    pub fused: bool,
    /// Whether a GPU's work on a micro-batch is captured once, as CUDA graphs, and replayed: the host has a call or two a layer to
    /// make, rather than one a kernel. The bits do not depend on it.
    pub graphs: bool,
    /// Tokens that go through lm_head and cross-entropy at a time, of one loop step.
    pub loss_chunk_tokens: u32,
    /// CPU threads of LibTorch; absent = all cores. The bits do not depend on it.
    pub threads: Option<u32>,
}

/// Tokenizer and token sources.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Data {
    /// Path or URL of a Hugging Face `tokenizer.json`, for samples of text; absent for sets without text.
    pub tokenizer: Option<String>,
    /// Named sources that a stage's mixture weighs.
    pub sources: BTreeMap<String, Source>,
    /// What a row group that cannot be read does.
    pub on_corrupt: OnCorrupt,
    /// Bound on decoded tokens waiting in memory, bytes, over all lanes.
    pub prefetch_bytes: u64,
    /// Where shards of remote sources are kept on the machine; absent = nowhere. The bits do not depend on it.
    pub cache: Option<Cache>,
}

/// A folder of a machine that keeps what its workers have fetched of shards.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cache {
    /// The folder, which several processes and runs may share; a relative path in a file is relative to that file.
    pub dir: String,
    /// Bound on what it holds, bytes.
    pub bytes: u64,
}

/// One token source: a folder (or bucket prefix) of tokenized Parquet shards.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// `file:///…`, `s3://…` or a path; a relative path in a file is relative to that file.
    pub url: String,
}

/// What a row group that cannot be read does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnCorrupt {
    /// Stop the run with an error that names it.
    Fail,
    /// Leave it out, count it, and say so in the log.
    Skip,
}

/// When checkpoints are taken and which are kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// Steps between checkpoints; stage ends and the last step always get one.
    pub every_steps: u64,
    /// The newest so many are kept (at least 2).
    pub keep_last: u32,
    /// Every checkpoint whose step is a multiple of this is kept; absent = none for that reason.
    pub keep_every_steps: Option<u64>,
    /// Keep the checkpoint at the end of each stage.
    pub keep_stage_ends: bool,
    /// Aimed size of a part, bytes (a part is a whole number of blocks).
    pub part_bytes: u64,
}

/// How the run folder is used. It changes no bit of the run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunStore {
    /// Bytes a second that each process reads of it at most, and writes to it at most; absent = as fast as it goes.
    pub bandwidth: Option<u64>,
}

/// The loss-spike guard. A step is a spike when its loss is above the median of the stage's last `window` by more than
/// `factor` standard deviations (estimated by the median absolute deviation) and more than `floor`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Guard {
    /// What a spike does. Only what leaves updates out changes bits.
    pub on_spike: OnSpike,
    /// Steps of the stage that it is measured by; from half of them on.
    pub window: u32,
    /// Standard deviations above the median.
    pub factor: f64,
    /// Least distance from the median, nats.
    pub floor: f64,
    /// Steps before the spike whose updates are left out too when it rolls back: at most half the window, so that it never
    /// reaches into the stage before or behind another spike.
    pub rollback_steps: u64,
}

impl Guard {
    /// Steps that a run may go back: 0 when it never does.
    pub fn reach(&self) -> u64 {
        if self.on_spike == OnSpike::Rollback { self.rollback_steps } else { 0 }
    }
}

/// What a loss spike does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnSpike {
    /// Nothing; nobody looks.
    Off,
    /// It is told of.
    Log,
    /// Its update is not applied, as with a step that is not finite.
    Skip,
    /// The state after it is that of `rollback_steps` before it: the updates since are left out, and the batches with them.
    Rollback,
}

/// Held-out data that the model is measured on while it trains. It changes no bit of the run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Eval {
    /// Steps between two measurements; 0 = never. The end of a stage is measured too.
    pub every_steps: u64,
    /// The first so many sequences of each set, as long as those of the stage; a set that is shorter is taken whole.
    pub sequences: u32,
    /// The sets by name.
    pub sets: BTreeMap<String, Source>,
}

/// What is put on record beside the figures of every step, so that others can check the run. It changes no bit of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Steps between two digests of the weights in the metrics; 0 = never.
    pub digest_every_steps: u64,
}

impl Record {
    /// Whether the weights after `steps` steps are put on record.
    pub fn has_weights(&self, steps: u64) -> bool {
        self.digest_every_steps > 0 && steps.is_multiple_of(self.digest_every_steps)
    }
}

/// How a ring of workers watches over itself. None of it changes a bit of the run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ring {
    /// How long a silent fault may go unseen, milliseconds: every time-out follows from it ([`crate::Timings`]).
    pub detection_ms: u64,
    /// Steps between two comparisons of all replicas of weights and moments, which are made before every checkpoint
    /// too; 0 = never.
    pub digest_every_steps: u64,
    /// Steps between two checks of one lane's gradient by a second worker; 0 = never.
    pub spot_check_every_steps: u64,
    /// A worker whose time for a lane is more than so many times the members' median is told of as slow; 0 = never.
    pub straggler_factor: f64,
    /// Steps over which that is measured.
    pub straggler_window_steps: u32,
    /// How the lanes are shared out.
    pub lanes: LaneShares,
    /// How many workers have the moments of a block.
    pub state_copies: StateCopies,
    /// What a worker hands out to learners while it trains, bytes a second, to all of them together; absent: as fast as it can.
    pub state_bandwidth: Option<u64>,
    /// What gradients travel by.
    pub transport: Transport,
    /// For tests: a bit that is flipped on purpose.
    pub fault: Option<Fault>,
}

/// How many lanes each worker of a ring serves. Which ones changes no bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LaneShares {
    /// As many as any other, or one more.
    Balanced,
    /// By how fast it was so far.
    BySpeed,
}

/// How many workers of a ring have the optimizer's moments of a block. It changes memory and traffic, and no bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StateCopies {
    /// All of them: no death loses anything.
    #[serde(rename = "all")]
    All,
    /// The block's owner and one other: memory falls with workers, and when two neighbours in the ring die together the run
    /// goes back to its last checkpoint.
    #[serde(rename = "2")]
    Two,
}

/// What gradients and new weights travel by between the workers of a ring. It changes no bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// Sockets, from memory of the host, and added up there.
    Tcp,
    /// NCCL, from GPU to GPU, and added up there. Everything else goes by TCP.
    Nccl,
}

/// One bit flip, once in the life of a process or again and again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// `weights`, `exp_avg`, `exp_avg_sq`, or `gradient`: of the first lane from that step on that is spot-checked.
    pub buffer: String,
    /// After so many steps are applied.
    pub step: u64,
    /// On the worker of this rank.
    pub rank: u32,
    /// Each time that it is due, and not once.
    pub again: bool,
}

/// One row of the recipe.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Stage {
    /// Name, unique in the run.
    pub name: String,
    /// Tokens to train on; rounded up to whole batches.
    pub tokens: u64,
    /// Sequence length (S), tokens.
    pub sequence: u32,
    /// Global batch, tokens.
    pub batch: Batch,
    /// Sequences that one forward and backward takes.
    pub micro_batch: u32,
    /// Learning rate over the stage.
    pub lr: LrCurve,
    /// Loop steps (T).
    pub loops: u32,
    /// Weight of the entropy of the exit distribution (β).
    pub beta: f64,
    /// Base of the rotary angles.
    pub rope_base: f64,
    /// Weight of each source, by tokens; any scale. Sources of weight 0 are left out.
    pub mixture: BTreeMap<String, f64>,
    /// Which tokens a token attends to.
    pub mask: Mask,
    /// Which parameters move.
    pub trains: Trains,
    /// The objective.
    pub loss: Loss,
    /// Start the stage with moments and their step count at zero.
    pub reset_optimizer: bool,
    /// Duplicate the layer stack before the first step of the stage.
    pub upcycle: Option<Upcycle>,
    /// Held-out sets that it is measured on; absent = all.
    pub eval: Option<Vec<String>>,
}

impl Stage {
    /// Whether its steps move every parameter. With the language model frozen they move the gate alone, and fine-tuning leaves the gate.
    pub fn moves_all(&self) -> bool {
        self.trains == Trains::All && self.loss != Loss::Sft
    }
}

/// Tokens of one global batch: constant, or rising linearly over the first tokens of the stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Batch {
    /// Tokens of a batch after the ramp.
    pub tokens: u64,
    /// The ramp, if any.
    pub ramp: Option<Ramp>,
}

/// A batch ramp: from `from` tokens, in equal plateaus of one quantum (lanes × sequence × micro_batch) each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Ramp {
    /// Tokens of the first batch.
    pub from: u64,
    /// Tokens of the stage over which the batch rises.
    pub over: u64,
}

/// Learning rate over a stage, as a function of the share `f` in (0, 1] of the stage's tokens that are done when the
/// step is applied: the last step has exactly `to`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(tag = "curve", rename_all = "kebab-case")]
pub enum LrCurve {
    /// `lr` throughout.
    Constant {
        /// The learning rate.
        lr: f64,
    },
    /// `from + (to − from)·f`.
    Linear {
        /// At the start of the stage.
        from: f64,
        /// At its last step.
        to: f64,
    },
    /// `to + (from − to)·(1 + cos πf)/2`.
    Cosine {
        /// At the start of the stage.
        from: f64,
        /// At its last step.
        to: f64,
    },
    /// Linear 0 → `peak` over the first `warmup` share, `peak`, then linear to `to` over the last `decay` share.
    /// Without a decay `to` is `peak`.
    Wsd {
        /// The plateau.
        peak: f64,
        /// At the last step.
        to: f64,
        /// Share of the stage that warms up, 0 ..= 1.
        warmup: f64,
        /// Share of the stage that decays, 0 ..= 1 − warmup.
        decay: f64,
    },
}

/// Which tokens a token attends to, besides the causal order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mask {
    /// Its own document only; positions restart at each document.
    Document,
    /// The whole sequence before it.
    Causal,
}

/// Which parameters a stage moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Trains {
    /// All of them.
    All,
    /// The exit gate only.
    Gate,
}

/// The objective of a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Loss {
    /// Gate-weighted cross-entropy of all loop steps with the entropy term (LOOPLM §2).
    Loop,
    /// Adaptive gate training (LOOPLM §3).
    Gate,
    /// Cross-entropy of the last loop step on answer tokens (LOOPLM §4).
    Sft,
}

/// Duplicate the layer stack: layer `l` of the new stack is layer `l mod old` (LOOPLM §5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upcycle {
    /// Layers after it; a multiple of the layers before.
    pub layers: u32,
}
