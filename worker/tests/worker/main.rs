//! Tests of the worker against independent mathematics, and of the same-bits contract on real small runs.

mod interchange;
mod numerics;
mod runs;
mod support;
mod using;
