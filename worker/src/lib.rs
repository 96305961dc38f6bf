//! Model, objective, optimizer, step loop, checkpoints: the crate that links LibTorch.
//!
//! ```text
//! pure arithmetic   params     one flat buffer, its names and blocks
//!                   model      the looped language model          objective  loss and its backward by chunks
//!                   tape       forward and backward by segments   fold       the fixed tree over lanes
//!                   shelf      inputs of layers on the host meanwhile
//!                   optimizer  AdamW over the flat buffer         engine     a step of these
//!                   kernels    fused ones for GPUs, for norms, SwiGLU, RoPE and AdamW
//!                   stopwatch  how long forward and backward take
//!                   guard      what a loss spike is         cover      which blocks' moments are here
//!                   rollback   the state before a spike, made again
//!                   generate   texts, with early exit         evaluate   figures of each loop step
//!                   validate   these on held-out data, while a run trains
//! durable state     checkpoint a state to parts and back           account    what is stamped and told beside it
//!                   init       what a run begins with              interchange  the published layout, out and in
//! to ask why        bisect     two runs side by side, and computed again
//!                   audit      one run computed again, against its own record
//! the shells        trainer    one thread that owns the model, one that writes; commands in, notices out
//!                   ring       the same in a ring of workers under a coordinator
//! ```

mod account;
pub mod audit;
pub mod bisect;
pub mod checkpoint;
mod cover;
pub mod device;
mod digest;
mod engine;
mod environment;
mod error;
pub mod evaluate;
mod ffi;
mod fold;
mod generate;
mod guard;
mod host;
mod init;
pub mod interchange;
pub mod kernels;
mod model;
mod objective;
mod optimizer;
mod params;
pub mod ring;
mod rollback;
mod shelf;
mod stopwatch;
mod tape;
mod trainer;
mod validate;

pub use account::{Epochs, Stamp, outcome_event, position_after};
pub use cover::{Cover, Piece};
pub use engine::{Engine, Growing, Inputs, Outcome, Pass, forward_backward};
pub use error::{Error, Result, with_causes};
pub use ffi::{as_mut_slice, as_slice};
pub use fold::{Fold, combine, fold_sums};
pub use generate::{Cache, Generator, Leave, Options as GenerateOptions, Sampled};
pub use init::{initial_state, pin_init};
pub use model::{Angles, Context, Model, Rotary, Tokens};
pub use objective::{Goal, LossSums, TokenLosses, log_exit, token_losses};
pub use optimizer::{Prepared, State, Summed, Update, block_square_sums};
pub use params::{BLOCK, Entry, Layout};
pub use tape::Tape;
pub use trainer::{Control, Ended, Resume, Run, Training};
pub use validate::HeldOut;
