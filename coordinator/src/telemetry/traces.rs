//! Traces of steps and of recoveries, for a collector that speaks OTLP: a span for each, with spans of its parts in it.
//!
//! ```text
//! step     ├ data ┤├ compute ──────────┤├ reduce ┤├ update ┤├ checkpoint ┤├ eval ┤
//! recovery ├ gather ──────────────┤├ form ────────┤        events: lost, evicted, left-out, broke, fell-back, formed
//! ```
//! A step ends when it is heard of. Where its time went is known, not in which pieces: a part that came in several is drawn
//! as one, in the order in which they begin. What is drawn is a pure function of what happened; a thread of the exporter sends
//! it, and drops what it cannot send fast enough, so nothing that trains waits for it.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use anello_store::Notice;
use anello_store::events::{Event, Record};
use anello_store::metrics::StepRecord;
use opentelemetry::trace::{Span, TraceContextExt, Tracer, TracerProvider};
use opentelemetry::{Context, KeyValue};
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};

/// Where a collector is: of all signals, and of traces alone, which counts first.
const ENDPOINTS: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"];
/// Who it is that sends traces, where the user says nothing else.
const SERVICE: (&str, &str) = ("OTEL_SERVICE_NAME", "anello");
/// For the last spans, when the process is to end.
const FAREWELL: Duration = Duration::from_secs(5);
/// A record of what a recovery began with may be stamped so much before its beginning, which was measured by another clock and
/// in whole milliseconds.
const STAMPED_BEFORE_MS: u64 = 1_000;
/// Records that a recovery tells of.
const RECORDS: usize = 64;

/// Why no traces can be sent.
#[derive(Debug, thiserror::Error)]
#[error("traces cannot be sent to {endpoint}, which {variable} names: {fact}")]
pub struct TraceError {
    endpoint: String,
    variable: &'static str,
    fact: String,
}

/// Sends traces. Clones are the same.
#[derive(Clone)]
pub struct Traces {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
    /// Since the last recovery of each job.
    records: Arc<Mutex<BTreeMap<String, Vec<Record>>>>,
}

impl fmt::Debug for Traces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Traces")
    }
}

impl Traces {
    /// Those that the environment asks for, by OpenTelemetry's own variables; absent where it names no endpoint. Of the
    /// protocols gRPC without TLS is spoken: to an agent on this machine, or a collector in a network that is trusted. Called
    /// on the runtime that carries the connection.
    ///
    /// # Errors
    /// [`TraceError`].
    pub fn from_environment() -> Result<Option<Self>, TraceError> {
        let named = ENDPOINTS.into_iter().find_map(|variable| {
            let endpoint = std::env::var(variable).ok().filter(|endpoint| !endpoint.is_empty())?;
            Some((variable, endpoint))
        });
        let Some((variable, endpoint)) = named else { return Ok(None) };
        let wrong = |fact: String| TraceError { endpoint: endpoint.clone(), variable, fact };
        if !endpoint.starts_with("http://") {
            return Err(wrong(
                "give an http:// address of a collector that speaks OTLP over gRPC".to_owned(),
            ));
        }
        let exporter = SpanExporter::builder().with_tonic().with_endpoint(&endpoint).build();
        let exporter = exporter.map_err(|cause| wrong(cause.to_string()))?;
        let resource = match std::env::var_os(SERVICE.0) {
            Some(_) => Resource::builder(),
            None => Resource::builder().with_service_name(SERVICE.1),
        };
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_resource(resource.build())
            .build();
        let tracer = provider.tracer("anello");
        Ok(Some(Self { provider, tracer, records: Arc::default() }))
    }

    /// Something happened in a job, and is heard of at `now_ms`.
    pub(super) fn observe(&self, job: &str, notice: &Notice, now_ms: u64) {
        let drawn = match notice {
            Notice::Step(row) => Some(step(job, row, now_ms)),
            Notice::Logged(record) => {
                let mut records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
                let of_job = records.entry(job.to_owned()).or_default();
                let drawn = recovery(job, record, of_job);
                if drawn.is_some() {
                    of_job.clear();
                } else if is_told(&record.event).is_some() && of_job.len() < RECORDS {
                    of_job.push(record.clone());
                }
                drawn
            }
            Notice::Ready { .. }
            | Notice::Stage { .. }
            | Notice::Checkpoint { .. }
            | Notice::CheckpointFailed { .. }
            | Notice::Refused(_) => None,
        };
        if let Some(drawn) = drawn {
            self.send(drawn, &Context::new());
        }
    }

    fn send(&self, drawn: Drawn, within: &Context) {
        let builder = self.tracer.span_builder(drawn.name);
        let builder = builder.with_start_time(at(drawn.from_us)).with_attributes(drawn.facts);
        let mut span = builder.start_with_context(&self.tracer, within);
        for (name, us, facts) in drawn.events {
            span.add_event_with_timestamp(name, at(us), facts);
        }
        let inside = within.with_remote_span_context(span.span_context().clone());
        drawn.parts.into_iter().for_each(|part| self.send(part, &inside));
        span.end_with_timestamp(at(drawn.to_us));
    }

    /// Sends what is left, for as long as that may take.
    pub fn finish(&self) {
        if let Err(cause) = self.provider.shutdown_with_timeout(FAREWELL) {
            tracing::warn!(%cause, "the last traces were not sent");
        }
    }
}

/// A span that is to be sent. Times are microseconds since 1970.
#[derive(Clone, Debug, PartialEq)]
struct Drawn {
    name: &'static str,
    from_us: u64,
    to_us: u64,
    facts: Vec<KeyValue>,
    events: Vec<(&'static str, u64, Vec<KeyValue>)>,
    parts: Vec<Drawn>,
}

fn at(us: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_micros(us)
}

/// A count as OpenTelemetry has them.
fn count(name: &'static str, value: u64) -> KeyValue {
    KeyValue::new(name, i64::try_from(value).unwrap_or(i64::MAX))
}

/// A part of a span.
fn part(name: &'static str, from_us: u64, to_us: u64) -> Drawn {
    Drawn { name, from_us, to_us, facts: Vec::new(), events: Vec::new(), parts: Vec::new() }
}

/// A step that is heard of at `now_ms`.
fn step(job: &str, row: &StepRecord, now_ms: u64) -> Drawn {
    let us = |seconds: f64| if seconds > 0.0 { (seconds * 1e6) as u64 } else { 0 };
    let s = row.seconds;
    let to_us = now_ms * 1000;
    let from_us = to_us.saturating_sub(us(s.step));
    let mut parts = Vec::new();
    let mut begins = from_us;
    for (name, seconds) in [
        ("data", s.data),
        ("compute", s.compute),
        ("reduce", s.reduce),
        ("update", s.update),
        ("checkpoint", s.checkpoint),
        ("eval", s.eval),
    ] {
        let ends = begins.saturating_add(us(seconds)).min(to_us);
        if ends > begins {
            parts.push(part(name, begins, ends));
        }
        begins = ends;
    }
    let facts = vec![
        KeyValue::new("job", job.to_owned()),
        KeyValue::new("stage", row.stage.clone()),
        count("step", row.step),
        count("tokens", row.batch_tokens),
        KeyValue::new("loss", row.loss),
        KeyValue::new("applied", row.applied),
    ];
    Drawn { facts, parts, ..part("step", from_us, to_us) }
}

/// The name of a record that a recovery tells of.
fn is_told(event: &Event) -> Option<&'static str> {
    match event {
        Event::Lost { .. } => Some("lost"),
        Event::Evicted { .. } => Some("evicted"),
        Event::LeftOut { .. } => Some("left-out"),
        Event::FellBack { .. } => Some("fell-back"),
        Event::Broke { .. } => Some("broke"),
        Event::Formed { .. } => Some("formed"),
        Event::Started { .. }
        | Event::PassedOver { .. }
        | Event::Stage { .. }
        | Event::Skipped { .. }
        | Event::Spike { .. }
        | Event::Epoch { .. }
        | Event::SkippedData { .. }
        | Event::Checkpoint { .. }
        | Event::CheckpointFailed { .. }
        | Event::TakenUp { .. }
        | Event::Goal { .. }
        | Event::Joined { .. }
        | Event::Recovered { .. }
        | Event::Slow { .. }
        | Event::InStep { .. }
        | Event::Ended { .. }
        | Event::Stopped { .. }
        | Event::Finished { .. } => None,
    }
}

/// What is told with it.
fn facts_of(event: &Event) -> Vec<KeyValue> {
    match event {
        Event::Lost { worker, reason, .. }
        | Event::Evicted { worker, reason, .. }
        | Event::LeftOut { worker, reason, .. }
        | Event::Broke { worker, reason, .. } => {
            vec![KeyValue::new("worker", worker.clone()), KeyValue::new("reason", reason.clone())]
        }
        Event::FellBack { step, reason } => {
            vec![count("step", *step), KeyValue::new("reason", reason.clone())]
        }
        Event::Formed { generation, start, members, source, .. } => vec![
            count("generation", *generation),
            count("step", *start),
            count("workers", members.len() as u64),
            KeyValue::new("source", source.clone()),
        ],
        _ => Vec::new(),
    }
}

/// The recovery that `record` is the end of; `before` are records since the one before.
fn recovery(job: &str, record: &Record, before: &[Record]) -> Option<Drawn> {
    let Event::Recovered { generation, workers, took_ms, again, checkpoint } = &record.event else {
        return None;
    };
    let to_us = record.unix_ms * 1000;
    let from_us = to_us.saturating_sub(took_ms * 1000);
    let is_of_it = |record: &&Record| match &record.event {
        Event::Formed { generation: of, .. } => of == generation,
        _ => (record.unix_ms + STAMPED_BEFORE_MS) * 1000 >= from_us,
    };
    let told = before.iter().filter(is_of_it);
    let within = |record: &Record| (record.unix_ms * 1000).clamp(from_us, to_us);
    let events =
        told.filter_map(|record| Some((is_told(&record.event)?, within(record), facts_of(&record.event))));
    let events: Vec<_> = events.collect();
    let formed = events.iter().rev().find(|(name, ..)| *name == "formed").map(|(_, us, _)| *us);
    let parts = formed.map(|us| vec![part("gather", from_us, us), part("form", us, to_us)]);
    let mut facts = vec![
        KeyValue::new("job", job.to_owned()),
        count("generation", *generation),
        count("workers", u64::from(*workers)),
        count("steps.again", *again),
    ];
    facts.extend(checkpoint.map(|step| count("checkpoint", step)));
    Some(Drawn { facts, events, parts: parts.unwrap_or_default(), ..part("recovery", from_us, to_us) })
}

#[cfg(test)]
mod tests {
    use anello_store::metrics::Seconds;

    use super::*;
    use crate::telemetry::figures::tests::row;

    #[test]
    fn the_parts_of_a_step_are_in_it() {
        let seconds =
            Seconds { step: 1.0, data: 0.25, compute: 0.5, reduce: 0.125, eval: 4.0, ..Seconds::default() };
        let drawn = step("a", &StepRecord { seconds, ..row(7) }, 10_000);
        assert_eq!((drawn.name, drawn.from_us, drawn.to_us), ("step", 9_000_000, 10_000_000));
        let parts: Vec<_> = drawn.parts.iter().map(|part| (part.name, part.from_us, part.to_us)).collect();
        let expected = [
            ("data", 9_000_000, 9_250_000),
            ("compute", 9_250_000, 9_750_000),
            ("reduce", 9_750_000, 9_875_000),
            ("eval", 9_875_000, 10_000_000),
        ];
        assert_eq!(parts, expected, "none is outside, and none is empty");
        assert!(drawn.facts.contains(&count("step", 7)));
        let broken = Seconds { step: f64::NAN, data: f64::INFINITY, ..Seconds::default() };
        let drawn = step("a", &StepRecord { seconds: broken, ..row(7) }, 10_000);
        assert_eq!((drawn.from_us, drawn.parts.len()), (drawn.to_us, 0));
    }

    #[test]
    fn a_recovery_tells_why_and_what_it_took() {
        let record = |unix_ms, event| Record { number: 1, unix_ms, event };
        let lost =
            |worker: &str| Event::Lost { worker: worker.into(), step: Some(3), reason: "silent".into() };
        let formed = |generation| Event::Formed {
            generation,
            start: 4,
            source: "peers".into(),
            holders: Vec::new(),
            members: Vec::new(),
            save_first: false,
        };
        let before = [
            record(1_000, lost("old")),
            record(8_900, formed(1)),
            // Its stamp is of another clock than the recovery's length.
            record(8_998, lost("v")),
            record(9_100, lost("w")),
            record(9_400, formed(2)),
        ];
        let end = Event::Recovered { generation: 2, workers: 1, took_ms: 1_000, again: 1, checkpoint: None };
        let drawn = recovery("a", &record(10_000, end), &before).unwrap();
        assert_eq!((drawn.name, drawn.from_us, drawn.to_us), ("recovery", 9_000_000, 10_000_000));
        let events: Vec<_> = drawn.events.iter().map(|(name, us, _)| (*name, *us)).collect();
        let expected = [("lost", 9_000_000), ("lost", 9_100_000), ("formed", 9_400_000)];
        assert_eq!(events, expected, "what was before is not of it");
        let parts: Vec<_> = drawn.parts.iter().map(|part| (part.name, part.from_us, part.to_us)).collect();
        assert_eq!(parts, [("gather", 9_000_000, 9_400_000), ("form", 9_400_000, 10_000_000)]);
        assert_eq!(recovery("a", &before[1], &before), None);
    }
}
