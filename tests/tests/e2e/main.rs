//! The `anello` command over real processes: killed, interrupted, doubled, on a full disk, in a ring, as jobs.

mod disk;
mod jobs;
mod kill;
mod links;
mod ring;
mod signals;
mod twice;

/// The world of these tests.
fn world() -> &'static anello_tests::World {
    anello_tests::world(env!("CARGO_TARGET_TMPDIR"))
}
