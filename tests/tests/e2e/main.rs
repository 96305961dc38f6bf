//! The `anello` command over real processes: killed, interrupted, doubled, on a full disk, in a ring, as jobs, over TLS, in a
//! bucket, cut off; compared; handed what is broken; weights out and in, and used; over HTTP, as Prometheus and a browser see it, as a person
//! acts on the page, and as a collector of traces does.

mod acts;
mod alerts;
mod bisect;
mod bucket;
mod chat;
mod clouds;
mod cut;
mod disk;
mod faults;
mod generating;
mod gpu;
mod hostile;
mod http;
mod interchange;
mod jobs;
mod joiners;
mod kill;
mod links;
mod loading;
mod recorded;
mod reference;
mod ring;
mod shards;
mod signals;
mod tls;
mod traces;
mod twice;
mod using;

/// The world of these tests.
fn world() -> &'static anello_tests::World {
    // A soak may run beside the tests.
    let name = if std::env::var_os("ANELLO_SOAK_RUNS").is_some() { "soak" } else { "e2e" };
    anello_tests::world(env!("CARGO_TARGET_TMPDIR"), name)
}
