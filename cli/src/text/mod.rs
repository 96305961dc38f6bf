//! Text for people: numbers, times and aligned tables. All of it pure.

mod number;
mod quantity;
mod table;
mod time;

pub use number::{bytes, count, grouped, lr, nats, per_second, percent, short};
pub use quantity::quantity;
pub use table::Table;
pub use time::{duration, utc};
