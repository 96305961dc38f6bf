//! `docs/metrics.md`: every metric, from the families; every alert, from the rules.

use std::fmt::Write;

use super::families::{FAMILIES, Family, Kind, Teller};
use super::rules::{Alert, Limits, alerts};

/// The page.
pub fn render() -> String {
    let mut text = HEAD.to_owned();
    for Family { name, kind, labels, help, teller } in FAMILIES {
        let kind = match kind {
            Kind::Gauge => "gauge",
            Kind::Counter => "counter",
            Kind::Histogram(_) => "histogram",
        };
        let teller = match teller {
            Teller::Keeper => "coordinator",
            Teller::Worker => "worker",
            Teller::Both => "both",
        };
        let labels: Vec<String> = labels.iter().map(|label| format!("`{label}`")).collect();
        let _ = writeln!(text, "| `{name}` | {kind} | {} | {teller} | {help} |", labels.join(", "));
    }
    text += ALERTS;
    for Alert { name, severity, expression, for_s, remedy, .. } in alerts(&Limits::default()) {
        let expression = expression.replace('|', "\\|");
        let _ = writeln!(
            text,
            "| {name} | {severity} | `{expression}` | {for_s} s | {} |",
            remedy.replace('|', "\\|")
        );
    }
    text
}

const HEAD: &str = "\
# Metrics

What `/metrics` has, in Prometheus' text format. This page is written by `anello dashboards` from the same table as the
metrics themselves; a test compares.

`coordinator` stands for whoever keeps a run: `anello coordinator --http ADDRESS`, or `anello run --http ADDRESS`. Workers tell
theirs with `anello worker --http ADDRESS`. Units are base units: seconds, bytes, tokens; a loss is nats a token. Counters
count from when the process took the job up. A worker that left leaves no series behind.

Labels: `job` is the job's name, so scrape with `honor_labels: true` (Prometheus' own `job` would hide it); `stage` a stage of
the recipe; `loop` a loop step from 1; `worker` a worker's id, 16 hex digits.

```yaml
scrape_configs:
- job_name: anello-coordinator
  honor_labels: true
  static_configs: [{targets: ['127.0.0.1:9100']}]
```

| metric | kind | labels | told by | what |
|---|---|---|---|---|
";

const ALERTS: &str = "
## Alerts

Those of `k8s/rules/anello.yaml`.

| alert | severity | when | for | what to do |
|---|---|---|---|---|
";
