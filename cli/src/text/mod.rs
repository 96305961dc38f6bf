//! Text for people: numbers, times and aligned tables. All of it pure.

mod number;
mod pieces;
mod time;

pub use anello_configs::text::{Table, bytes, count, grouped, read_bytes, read_count, read_time};
pub use number::{lr, nats, per_second, percent, short};
pub use pieces::Pieces;
pub use time::{duration, utc};
