//! The wire of Anello: the words that its processes exchange.

pub mod ring;
