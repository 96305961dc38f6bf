//! The HTTP face: metrics for Prometheus, figures as JSON, and a page for people.
//!
//! ```text
//! connection ──▶ door (limits, TLS) ──▶ site (how often) ──▶ guard (who may what) ──▶ routes ──▶ /metrics   telemetry
//!                                                                                         ├─▶ /api/v1   keeper, history, words
//!                                                                                         ├─▶ actions   keeper
//!                                                                                         └─▶ /         page
//! ```
//! It reads, unless tokens were given: then an operator's may also ask what `anello pause` and its like ask. Nothing that
//! trains waits for it: a request is answered from what is known, or from the run folder on a thread of its own.

mod actions;
mod door;
mod guard;
mod history;
mod keeper;
mod openapi;
mod page;
mod routes;
mod site;
mod stream;
pub mod words;

pub use door::{Bound, Limits, Server};
pub use guard::{Role, TokenError, Tokens};
pub use history::{History, Thinned};
pub use keeper::Keeper;
pub use openapi::description;
pub use page::{CHARTS, STYLE};
pub use site::Site;
