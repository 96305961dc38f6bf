//! Traces of a real run, at a collector.

use std::collections::BTreeSet;

use anello_tests::{Collector, Process, newest_checkpoint, signal, wait_until};

use super::world;

#[test]
fn steps_and_recoveries_are_traced_where_a_collector_is_named() {
    const LONG: &str = "stage.stable.tokens=128Ki";
    let collector = Collector::start();
    let _ = std::fs::remove_dir_all(world().folder.join("traced"));
    let run = ["run", "small.toml", "--out", "traced", "--workers", "2", "--sample", "0", "--set", LONG];
    let traced = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint.clone()),
        // On a busy machine, too, none is to be dropped.
        ("OTEL_BSP_MAX_QUEUE_SIZE", "100000".to_owned()),
    ];
    let mut process = Process::start_with(&world().folder, &run, &traced);
    let folder = world().folder.join("traced");
    wait_until("it is so far", || newest_checkpoint(&folder) >= 3 || process.ended());
    if let Some(worker) = process.children().first() {
        signal(*worker, "KILL");
    }
    process.wait().expect(0);
    // The process has sent all before it ended.
    let spans = collector.spans();
    let called = |name: &str| spans.iter().filter(|span| span.name == name).collect::<Vec<_>>();
    let steps = called("step");
    let fact = |span: &opentelemetry_proto::tonic::trace::v1::Span, key: &str| {
        let value = span.attributes.iter().find(|fact| fact.key == key)?.value.clone()?.value?;
        Some(format!("{value:?}"))
    };
    let numbers: BTreeSet<_> = steps.iter().filter_map(|span| fact(span, "step")).collect();
    let rows = world().anello(&["metrics", "traced", "--csv"]).expect(0).lines().count() - 1;
    assert_eq!(numbers.len(), rows, "a span for each step");
    assert!(steps.iter().all(|span| span.parent_span_id.is_empty()));
    assert_eq!(fact(steps[0], "job").as_deref(), Some("StringValue(\"small\")"));
    // Its parts are in it.
    let computed = called("compute");
    assert!(computed.len() >= rows, "{} of {rows}", computed.len());
    for part in computed {
        let whole = steps.iter().find(|step| step.span_id == part.parent_span_id).expect("it is of a step");
        assert_eq!(whole.trace_id, part.trace_id);
        assert!(whole.start_time_unix_nano <= part.start_time_unix_nano);
        assert!(whole.end_time_unix_nano >= part.end_time_unix_nano);
    }
    let recoveries = called("recovery");
    assert!(!recoveries.is_empty(), "a death was recovered from");
    let told = recoveries.iter().flat_map(|span| &span.events).any(|event| event.name == "lost");
    assert!(told, "it is told who was lost: {recoveries:?}");
    for part in ["gather", "form"] {
        assert!(called(part).iter().any(|span| span.parent_span_id == recoveries[0].span_id), "{part}");
    }
    assert!(
        collector.services().iter().all(|name| name.contains("\"anello\"")),
        "{:?}",
        collector.services()
    );

    // It is the same run as one that nobody traced.
    world().anello(&["run", "small.toml", "--out", "not-traced", "--sample", "0", "--set", LONG]).expect(0);
    world().assert_alike("traced", "not-traced");
}

#[test]
fn a_collector_that_is_away_or_cannot_be_is_in_nobodys_way() {
    let endpoint = |endpoint: &str| [("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.to_owned())];
    let away = format!("http://127.0.0.1:{}", anello_tests::free_port());
    let run = ["run", "small.toml", "--out", "traced-away", "--sample", "0"];
    let _ = std::fs::remove_dir_all(world().folder.join("traced-away"));
    Process::start_with(&world().folder, &run, &endpoint(&away)).wait().expect(0);
    world().assert_undisturbed("traced-away");
    let run = ["run", "small.toml", "--out", "traced-wrong"];
    let done = Process::start_with(&world().folder, &run, &endpoint("https://collector:4317")).wait();
    assert!(done.log.contains("OTEL_EXPORTER_OTLP_ENDPOINT names: give an http:// address"), "{}", done.log);
    done.expect(2);
}
