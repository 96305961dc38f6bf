//! `--trace FILE`: where the time of the first steps goes, as a timeline to open in Perfetto or `chrome://tracing`.
//!
//! Chrome's trace format as a JSON array whose end is left open, which its readers allow: so the processes of one
//! machine, workers included, append whole lines to one file.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id};
use tracing::{Metadata, Subscriber};
use tracing_subscriber::layer::{Context, Layer};
use tracing_subscriber::registry::LookupSpan;

/// The variable that tells the processes started by this one.
pub const VARIABLE: &str = "ANELLO_TRACE";

/// Steps of a process that are traced. A step of a small model is some hundred lines.
const STEPS: u32 = 20;

/// Writes every span of the first steps.
#[derive(Debug)]
pub struct Timeline {
    file: Mutex<File>,
    began: Instant,
    /// Of `began`, since 1970: so that the processes of a machine lie beside one another.
    began_unix: Duration,
    steps_left: AtomicU32,
}

/// What a span carries until it ends.
struct Entered {
    at: Duration,
    fields: Map<String, Value>,
}

impl Timeline {
    /// Appends to `file`, which is made when it is not there.
    #[allow(clippy::disallowed_methods)] // a timeline is of the clock
    pub fn append(file: &Path) -> io::Result<Self> {
        let opened = OpenOptions::new().append(true).create(true).open(file)?;
        let timeline = Self {
            file: Mutex::new(opened),
            began: Instant::now(),
            began_unix: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
            steps_left: AtomicU32::new(STEPS),
        };
        if timeline.lock().metadata()?.len() == 0 {
            timeline.lock().write_all(b"[\n")?;
        }
        let command: Vec<String> = std::env::args().skip(1).take(1).collect();
        timeline.name("process_name", &format!("anello {}", command.join(" ")));
        Ok(timeline)
    }

    /// What is to be traced: this program's own spans, of which those around a step are at the finest level.
    pub fn wants(metadata: &Metadata<'_>) -> bool {
        metadata.is_span() && metadata.target().starts_with("anello")
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, File> {
        self.file.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.began_unix + self.began.elapsed()
    }

    /// A line in one write, so that no other process's comes between. A timeline that cannot be written is not worth a
    /// run.
    fn write(&self, event: &Value) {
        let _ = self.lock().write_all(format!("{event},\n").as_bytes());
    }

    fn name(&self, what: &str, name: &str) {
        self.write(&json!({ "name": what, "ph": "M", "pid": std::process::id(), "tid": thread(), "args": { "name": name } }));
    }

    fn name_thread(&self) {
        thread_local!(static NAMED: std::cell::Cell<bool> = const { std::cell::Cell::new(false) });
        if !NAMED.replace(true) {
            self.name("thread_name", std::thread::current().name().unwrap_or("thread"));
        }
    }
}

/// A number for this thread, within this process.
fn thread() -> u32 {
    static THREADS: AtomicU32 = AtomicU32::new(0);
    thread_local!(static NUMBER: u32 = THREADS.fetch_add(1, Ordering::Relaxed));
    NUMBER.with(|number| *number)
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Timeline {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        if let Some(span) = context.span(id) {
            let mut fields = Fields(Map::new());
            attributes.record(&mut fields);
            span.extensions_mut().insert(Entered { at: Duration::ZERO, fields: fields.0 });
        }
    }

    fn on_enter(&self, id: &Id, context: Context<'_, S>) {
        let now = self.now();
        if let Some(span) = context.span(id)
            && let Some(entered) = span.extensions_mut().get_mut::<Entered>()
        {
            entered.at = now;
        }
    }

    fn on_exit(&self, id: &Id, context: Context<'_, S>) {
        let now = self.now();
        let Some(span) = context.span(id) else { return };
        if self.steps_left.load(Ordering::Relaxed) == 0 {
            return;
        }
        if let Some(Entered { at, fields }) = span.extensions().get::<Entered>() {
            self.name_thread();
            let micros = |time: Duration| time.as_nanos() as f64 / 1e3;
            self.write(&json!({
                "name": span.name(), "ph": "X", "ts": micros(*at), "dur": micros(now.saturating_sub(*at)),
                "pid": std::process::id(), "tid": thread(), "args": fields,
            }));
        }
        if span.name() == "step" {
            self.steps_left.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// The fields of a span as JSON.
struct Fields(Map<String, Value>);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.0.insert(field.name().to_owned(), json!(format!("{value:?}")));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.0.insert(field.name().to_owned(), json!(value));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name().to_owned(), json!(value));
    }
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    #[test]
    fn spans_become_lines_that_several_processes_may_append() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("trace.json");
        for _ in 0..2 {
            let subscriber = tracing_subscriber::registry().with(Timeline::append(&file).unwrap());
            tracing::subscriber::with_default(subscriber, || {
                for step in 0..STEPS + 5 {
                    let _step = tracing::trace_span!("step", step).entered();
                    let _inner = tracing::trace_span!("forward", lane = 3u64).entered();
                }
            });
        }
        let text = std::fs::read_to_string(&file).unwrap();
        let closed = format!("{}]", text.trim_end().trim_end_matches(','));
        let events: Vec<Value> = serde_json::from_str(&closed).unwrap();
        let spans: Vec<&Value> = events.iter().filter(|event| event["ph"] == "X").collect();
        assert_eq!(spans.len(), 2 * 2 * STEPS as usize, "the first steps of each process, and no more");
        let [inner, step] = spans[..2] else { unreachable!("there are more") };
        assert_eq!((&inner["name"], &inner["args"]["lane"]), (&json!("forward"), &json!(3)));
        assert_eq!((&step["name"], &step["args"]["step"]), (&json!("step"), &json!(0)));
        let [from, until] = [
            |e: &Value| e["ts"].as_f64().unwrap(),
            |e: &Value| e["ts"].as_f64().unwrap() + e["dur"].as_f64().unwrap(),
        ];
        assert!(from(step) <= from(inner) && until(inner) <= until(step) + 1e-3, "{step} holds {inner}");
        assert!(events.iter().any(|event| event["name"] == "thread_name"));
    }
}
