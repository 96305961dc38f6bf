//! Who may speak with whom: a private CA, certificates of roles, and TLS in which both sides prove theirs.
//!
//! ```text
//! role        coordinator, worker, user: the name in a certificate       protection  which addresses need TLS
//! authority   makes the CA and certificates                              identity    files ──▶ configs of rustls
//! live        what the files say now: they are read again when they change
//! grpc        connections of gRPC, both sides, with TLS or without (feature `grpc`)
//! ```
//! An identity is a role, not an address: pods move. A certificate of the CA carries the role's name as a DNS name; who
//! dials checks the name that it wants to reach, who accepts asks for a certificate and checks the role of it:
//!
//! ```text
//! worker ──▶ coordinator's workers' service      wants coordinator   shows worker
//! user   ──▶ coordinator's jobs service          wants coordinator   shows user
//! worker ──▶ worker (collective, state)          wants worker        shows worker
//! ```
//! So a stolen worker's key submits no jobs, and a user's joins no ring. TLS 1.3 only, no resumption: every connection
//! is checked anew, by what the files say then: who replaces them before a certificate expires need not restart anything. The arithmetic is ring's, since that builds with a C compiler alone.

pub mod authority;
mod error;
#[cfg(feature = "grpc")]
pub mod grpc;
mod identity;
mod live;
mod protection;
mod role;
mod shown;

pub use error::{Error, Result};
pub use identity::{Files, Protocol, Tls};
pub use protection::Protection;
pub use role::Role;
pub use shown::Shown;

#[cfg(test)]
mod tests;
