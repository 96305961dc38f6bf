//! Text for people, as the plan and the command line show it: figures and aligned tables.

mod number;
mod table;

pub use number::{bytes, count, flops, grouped};
pub use table::Table;

pub use crate::quantity::{read_bytes, read_count, read_time};
