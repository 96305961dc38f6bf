//! Grafana dashboards, from a table of panels.

use serde_json::{Value, json};

/// A dashboard.
#[derive(Clone, Copy, Debug)]
pub struct Dashboard {
    /// Its file's name, without `.json`; also what Grafana knows it by.
    pub name: &'static str,
    /// What people read.
    pub title: &'static str,
    /// Its panels, row by row.
    pub panels: &'static [Panel],
}

/// A panel.
#[derive(Clone, Copy, Debug)]
pub struct Panel {
    /// What people read.
    pub title: &'static str,
    /// Grafana's name of the unit.
    pub unit: &'static str,
    /// How it is drawn.
    pub shape: Shape,
    /// What is drawn: expressions, with the names of their series.
    pub queries: &'static [(&'static str, &'static str)],
}

/// How a panel is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Lines, half a page wide.
    Lines,
    /// The same, as areas on top of one another.
    Stacked,
    /// One number, an eighth of a page wide.
    Number,
}

const fn lines(
    title: &'static str,
    unit: &'static str,
    queries: &'static [(&'static str, &'static str)],
) -> Panel {
    Panel { title, unit, shape: Shape::Lines, queries }
}

const fn stacked(
    title: &'static str,
    unit: &'static str,
    queries: &'static [(&'static str, &'static str)],
) -> Panel {
    Panel { title, unit, shape: Shape::Stacked, queries }
}

const fn number(
    title: &'static str,
    unit: &'static str,
    queries: &'static [(&'static str, &'static str)],
) -> Panel {
    Panel { title, unit, shape: Shape::Number, queries }
}

/// All dashboards.
pub const DASHBOARDS: &[Dashboard] = &[
    Dashboard {
        name: "anello-run",
        title: "Anello: run",
        panels: &[
            number(
                "Progress",
                "percentunit",
                &[("anello_step{job=~\"$job\"} / anello_planned_steps{job=~\"$job\"}", "{{job}}")],
            ),
            number("Loss", "none", &[("anello_loss_nats{job=~\"$job\"}", "{{job}} {{stage}}")]),
            number("Tokens a second", "short", &[("anello_tokens_per_second{job=~\"$job\"}", "{{job}}")]),
            number("Goodput", "percentunit", &[("anello_goodput_ratio{job=~\"$job\"}", "{{job}}")]),
            number("Workers", "short", &[("anello_member_workers{job=~\"$job\"}", "{{job}}")]),
            number(
                "Since the last step",
                "s",
                &[("time() - anello_last_step_timestamp_seconds{job=~\"$job\"}", "{{job}}")],
            ),
            number(
                "Since the last checkpoint",
                "s",
                &[("anello_checkpoint_age_seconds{job=~\"$job\"}", "{{job}}")],
            ),
            number("Steps skipped", "short", &[("anello_steps_skipped_total{job=~\"$job\"}", "{{job}}")]),
            lines(
                "Loss by loop step, nats a token",
                "none",
                &[("anello_loop_loss_nats{job=~\"$job\"}", "{{job}} {{stage}} t={{loop}}")],
            ),
            stacked(
                "Where tokens exit",
                "percentunit",
                &[("anello_exit_probability_ratio{job=~\"$job\"}", "{{job}} {{stage}} t={{loop}}")],
            ),
            lines(
                "Objective, nats a token",
                "none",
                &[("anello_loss_nats{job=~\"$job\"}", "{{job}} {{stage}}")],
            ),
            lines(
                "Expected depth, loop steps",
                "none",
                &[("anello_expected_depth_loops{job=~\"$job\"}", "{{job}} {{stage}}")],
            ),
            lines(
                "Entropy of the exit distribution, nats",
                "none",
                &[("anello_exit_entropy_nats{job=~\"$job\"}", "{{job}} {{stage}}")],
            ),
            lines(
                "Gradient norm before the clip",
                "none",
                &[("anello_gradient_norm{job=~\"$job\"}", "{{job}} {{stage}}")],
            ),
            lines("Learning rate", "sci", &[("anello_learning_rate{job=~\"$job\"}", "{{job}} {{stage}}")]),
            lines(
                "Throughput, tokens a second",
                "short",
                &[("rate(anello_tokens_total{job=~\"$job\"}[$__rate_interval])", "{{job}}")],
            ),
            lines(
                "Model FLOPs utilisation",
                "percentunit",
                &[("anello_model_flops_utilisation_ratio{job=~\"$job\"}", "{{job}}")],
            ),
            stacked(
                "Where the time of steps goes",
                "s",
                &[("rate(anello_step_seconds_total{job=~\"$job\"}[$__rate_interval])", "{{job}} {{phase}}")],
            ),
        ],
    },
    Dashboard {
        name: "anello-ring",
        title: "Anello: ring",
        panels: &[
            number("Generation", "short", &[("anello_generation{job=~\"$job\"}", "{{job}}")]),
            number(
                "Deaths",
                "short",
                &[("sum by (job) (anello_worker_deaths_total{job=~\"$job\"})", "{{job}}")],
            ),
            number(
                "Digest mismatches",
                "short",
                &[("anello_digest_mismatches_total{job=~\"$job\"}", "{{job}}")],
            ),
            number(
                "Invariants violated",
                "short",
                &[("sum by (job) (anello_invariant_violations_total{job=~\"$job\"})", "{{job}}")],
            ),
            number(
                "Words refused",
                "short",
                &[("sum by (job) (anello_worker_words_refused_total{job=~\"$job\"})", "{{job}}")],
            ),
            lines(
                "Workers",
                "short",
                &[
                    ("anello_wanted_workers{job=~\"$job\"}", "{{job}} wanted"),
                    ("anello_connected_workers{job=~\"$job\"}", "{{job}} connected"),
                    ("anello_member_workers{job=~\"$job\"}", "{{job}} members"),
                ],
            ),
            lines(
                "Deaths and joiners",
                "short",
                &[
                    (
                        "increase(anello_worker_deaths_total{job=~\"$job\"}[$__rate_interval])",
                        "{{job}} {{reason}}",
                    ),
                    (
                        "increase(anello_worker_joins_total{job=~\"$job\"}[$__rate_interval])",
                        "{{job}} joined",
                    ),
                ],
            ),
            lines(
                "Recovery, 95 of 100 within",
                "s",
                &[(
                    "histogram_quantile(0.95, sum by (job, le) (rate(anello_recovery_seconds_bucket{job=~\"$job\"}[1h])))",
                    "{{job}}",
                )],
            ),
            stacked(
                "Time lost, by cause",
                "s",
                &[("anello_lost_seconds{job=~\"$job\"}", "{{job}} {{cause}}")],
            ),
            lines(
                "Goodput and effective training time",
                "percentunit",
                &[
                    ("anello_goodput_ratio{job=~\"$job\"}", "{{job}} goodput"),
                    ("anello_effective_training_time_ratio{job=~\"$job\"}", "{{job}} effective"),
                ],
            ),
            lines(
                "Steps computed again",
                "short",
                &[("increase(anello_recomputed_steps_total{job=~\"$job\"}[$__rate_interval])", "{{job}}")],
            ),
            lines(
                "Time for a lane, of the median",
                "none",
                &[("anello_worker_straggler_ratio{job=~\"$job\"}", "{{worker}}")],
            ),
            stacked("Lanes", "short", &[("anello_worker_lanes{job=~\"$job\"}", "{{worker}}")]),
            lines(
                "Forward and backward of a step, by worker",
                "s",
                &[(
                    "sum by (worker) (anello_worker_step_seconds{job=~\"$job\", phase=~\"forward|backward\"})",
                    "{{worker}}",
                )],
            ),
            lines(
                "In the collective, by worker",
                "s",
                &[("anello_worker_step_seconds{job=~\"$job\", phase=\"reduce\"}", "{{worker}}")],
            ),
            lines(
                "Sent to other members, by worker",
                "Bps",
                &[(
                    "rate(anello_ring_sent_bytes_total{job=~\"$job\"}[$__rate_interval])",
                    "{{job}} {{instance}}",
                )],
            ),
        ],
    },
    Dashboard {
        name: "anello-data-storage",
        title: "Anello: data and storage",
        panels: &[
            number("Newest checkpoint", "short", &[("anello_checkpoint_step{job=~\"$job\"}", "{{job}}")]),
            number("Its size", "bytes", &[("anello_checkpoint_bytes{job=~\"$job\"}", "{{job}}")]),
            number("Its commit", "s", &[("anello_checkpoint_write_seconds{job=~\"$job\"}", "{{job}}")]),
            number(
                "Row groups left out",
                "short",
                &[("anello_data_skipped_row_groups_total{job=~\"$job\"}", "{{job}}")],
            ),
            lines(
                "Waiting for data, of steps",
                "percentunit",
                &[(
                    "sum by (job) (rate(anello_step_seconds_total{job=~\"$job\", phase=\"data\"}[$__rate_interval])) / sum by (job) (rate(anello_step_seconds_total{job=~\"$job\"}[$__rate_interval]))",
                    "{{job}}",
                )],
            ),
            lines(
                "Waiting for a checkpoint's copy, of steps",
                "percentunit",
                &[(
                    "sum by (job) (rate(anello_step_seconds_total{job=~\"$job\", phase=\"checkpoint\"}[$__rate_interval])) / sum by (job) (rate(anello_step_seconds_total{job=~\"$job\"}[$__rate_interval]))",
                    "{{job}}",
                )],
            ),
            lines(
                "Age of the newest checkpoint",
                "s",
                &[("anello_checkpoint_age_seconds{job=~\"$job\"}", "{{job}}")],
            ),
            lines(
                "Checkpoints",
                "short",
                &[
                    (
                        "increase(anello_checkpoints_total{job=~\"$job\"}[$__rate_interval])",
                        "{{job}} completed",
                    ),
                    (
                        "increase(anello_checkpoint_failures_total{job=~\"$job\"}[$__rate_interval])",
                        "{{job}} failed",
                    ),
                    (
                        "increase(anello_checkpoints_passed_over_total{job=~\"$job\"}[$__rate_interval])",
                        "{{job}} passed over",
                    ),
                ],
            ),
            lines(
                "Operations on the store",
                "reqps",
                &[(
                    "sum by (job, operation) (rate(anello_store_requests_total{job=~\"$job\"}[$__rate_interval]))",
                    "{{job}} {{operation}}",
                )],
            ),
            lines(
                "Errors and retries",
                "reqps",
                &[
                    (
                        "sum by (job) (rate(anello_store_errors_total{job=~\"$job\"}[$__rate_interval]))",
                        "{{job}} errors",
                    ),
                    (
                        "sum by (job) (rate(anello_store_retries_total{job=~\"$job\"}[$__rate_interval]))",
                        "{{job}} retries",
                    ),
                ],
            ),
            lines(
                "Bytes",
                "Bps",
                &[(
                    "rate(anello_store_bytes_total{job=~\"$job\"}[$__rate_interval])",
                    "{{job}} {{direction}}",
                )],
            ),
            lines(
                "Data that waits, by worker",
                "bytes",
                &[("anello_data_queue_bytes{job=~\"$job\"}", "{{job}} {{instance}}")],
            ),
            lines(
                "Sources begun anew",
                "short",
                &[("increase(anello_data_epochs_total{job=~\"$job\"}[$__rate_interval])", "{{job}}")],
            ),
        ],
    },
    Dashboard {
        name: "anello-cluster",
        title: "Anello: cluster",
        panels: &[
            number("Jobs that train", "short", &[("sum(anello_job_phase{phase=\"running\"})", "running")]),
            number("Jobs that wait", "short", &[("sum(anello_job_phase{phase=\"queued\"})", "queued")]),
            number("Jobs that failed", "short", &[("sum(anello_job_phase{phase=\"failed\"})", "failed")]),
            number("Workers", "short", &[("sum(anello_connected_workers)", "connected")]),
            stacked("Jobs by phase", "short", &[("sum by (phase) (anello_job_phase)", "{{phase}}")]),
            stacked("Workers by job", "short", &[("anello_connected_workers", "{{job}}")]),
            stacked("Tokens a second by job", "short", &[("anello_tokens_per_second", "{{job}}")]),
            stacked(
                "Model FLOP/s by job",
                "short",
                &[("rate(anello_model_flops_total[$__rate_interval])", "{{job}}")],
            ),
            lines("Goodput by job", "percentunit", &[("anello_goodput_ratio", "{{job}}")]),
            lines("Progress by job", "percentunit", &[("anello_step / anello_planned_steps", "{{job}}")]),
            lines(
                "Coordinators",
                "none",
                &[
                    ("up{job=\"anello-coordinator\"}", "{{instance}}"),
                    ("count by (version) (anello_build_info)", "version {{version}}"),
                ],
            ),
            lines(
                "Deaths by job",
                "short",
                &[("sum by (job) (increase(anello_worker_deaths_total[$__rate_interval]))", "{{job}}")],
            ),
        ],
    },
];

/// A dashboard as Grafana imports it.
pub fn render(dashboard: &Dashboard) -> String {
    let (mut x, mut y, mut row_height) = (0, 0, 0);
    let mut panels = Vec::new();
    for (at, panel) in dashboard.panels.iter().enumerate() {
        let (w, h) = match panel.shape {
            Shape::Lines | Shape::Stacked => (12, 8),
            Shape::Number => (3, 4),
        };
        if x + w > 24 || (row_height != 0 && row_height != h) {
            (x, y) = (0, y + row_height);
        }
        panels.push(panel_json(panel, at + 1, [x, y, w, h]));
        (x, row_height) = (x + w, h);
    }
    let source = |name: &str, label: &str| json!({ "name": name, "label": label, "type": "datasource", "query": "prometheus" });
    let job = json!({
        "name": "job", "label": "Job", "type": "query", "datasource": { "type": "prometheus", "uid": "${source}" },
        "query": { "query": "label_values(anello_step, job)", "refId": "job" }, "definition": "label_values(anello_step, job)",
        "includeAll": true, "multi": true, "allValue": ".*", "refresh": 2, "sort": 1,
        "current": { "selected": true, "text": "All", "value": "$__all" },
    });
    let all = json!({
        "uid": dashboard.name, "title": dashboard.title, "tags": ["anello"], "schemaVersion": 38, "version": 1,
        "editable": true, "graphTooltip": 1, "refresh": "30s", "time": { "from": "now-6h", "to": "now" },
        "timezone": "browser", "templating": { "list": [source("source", "Prometheus"), job] }, "panels": panels,
        "annotations": { "list": [] }, "links": [{
            "title": "Anello", "type": "dashboards", "tags": ["anello"], "asDropdown": true, "includeVars": true, "keepTime": true,
        }],
    });
    let mut text = serde_json::to_string_pretty(&all).expect("values of ours");
    text.push('\n');
    text
}

fn panel_json(panel: &Panel, id: usize, [x, y, w, h]: [u32; 4]) -> Value {
    let source = json!({ "type": "prometheus", "uid": "${source}" });
    let targets: Vec<Value> = panel
        .queries
        .iter()
        .zip('A'..='Z')
        .map(|((expression, legend), id)| {
            json!({ "refId": id.to_string(), "expr": expression, "legendFormat": legend, "datasource": source })
        })
        .collect();
    let stacking = if panel.shape == Shape::Stacked { "normal" } else { "none" };
    let fill = if panel.shape == Shape::Stacked { 60 } else { 0 };
    let (kind, custom, options) = match panel.shape {
        Shape::Number => (
            "stat",
            json!({}),
            json!({ "reduceOptions": { "calcs": ["lastNotNull"] }, "colorMode": "none", "graphMode": "area", "textMode": "value" }),
        ),
        Shape::Lines | Shape::Stacked => (
            "timeseries",
            json!({
                "drawStyle": "line", "lineWidth": 1, "fillOpacity": fill, "showPoints": "never", "spanNulls": false,
                "stacking": { "mode": stacking, "group": "A" },
            }),
            json!({ "legend": { "displayMode": "list", "placement": "bottom" }, "tooltip": { "mode": "multi", "sort": "desc" } }),
        ),
    };
    json!({
        "id": id, "title": panel.title, "type": kind, "datasource": source, "targets": targets, "options": options,
        "gridPos": { "x": x, "y": y, "w": w, "h": h },
        "fieldConfig": { "defaults": { "unit": panel.unit, "custom": custom }, "overrides": [] },
    })
}

/// Every expression, as Prometheus reads it: with Grafana's variables filled in.
pub fn expressions() -> Vec<String> {
    let queries = DASHBOARDS.iter().flat_map(|dashboard| dashboard.panels).flat_map(|panel| panel.queries);
    queries
        .map(|(expression, _)| expression.replace("$job", ".*").replace("$__rate_interval", "5m"))
        .collect()
}
