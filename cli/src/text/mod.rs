//! Text for people: numbers, times and aligned tables. All of it pure.

mod number;
mod quantity;
mod time;

pub use anello_configs::text::{Table, bytes, count, grouped};
pub use number::{lr, nats, per_second, percent, short};
pub use quantity::quantity;
pub use time::{duration, utc};
