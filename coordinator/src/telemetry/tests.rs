//! What is made from the tables: that the files in the repository are these, and that Prometheus reads them.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::*;

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Runs promtool, and returns what it says and whether it is content; absent where there is none and it need not be.
pub(super) fn promtool(arguments: &[&str], input: &str) -> Option<(bool, String)> {
    let ours = repository().join(".test-tools/bin/promtool");
    let program = if ours.exists() { ours.into_os_string() } else { "promtool".into() };
    let started = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = match started {
        Ok(child) => child,
        Err(_) if std::env::var_os("CI").is_none() => {
            eprintln!("SKIPPED: there is no promtool; scripts/test-tools fetches it from Debian");
            return None;
        }
        Err(cause) => panic!("promtool must be there in CI (scripts/test-tools): {cause}"),
    };
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    Some((output.status.success(), String::from_utf8_lossy(&said).into_owned()))
}

fn current(path: &str, text: &str) {
    let there = std::fs::read_to_string(repository().join(path)).unwrap_or_default();
    assert!(
        there == text,
        "{path} is not what the code makes; run `anello dashboards --to k8s --reference docs/metrics.md`"
    );
}

#[test]
fn the_files_in_the_repository_are_current() {
    current("docs/metrics.md", &reference::render());
    current("k8s/rules/anello.yaml", &rules::render(&rules::Limits::default()));
    for dashboard in dashboards::DASHBOARDS {
        current(&format!("k8s/dashboards/{}.json", dashboard.name), &dashboards::render(dashboard));
    }
}

/// Names of ours in an expression, with those of a histogram's series as the histogram's.
fn names(expression: &str) -> Vec<String> {
    let words = expression.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_');
    let ours = words.filter(|word| word.starts_with("anello_"));
    ours.map(|word| {
        ["_bucket", "_sum", "_count"]
            .iter()
            .fold(word, |word, end| word.strip_suffix(end).unwrap_or(word))
            .to_owned()
    })
    .collect()
}

#[test]
fn alerts_and_dashboards_speak_of_metrics_that_there_are() {
    let known: Vec<&str> = FAMILIES.iter().map(|family| family.name).collect();
    let mut used = Vec::new();
    let alerts = rules::alerts(&rules::Limits::default());
    let expressions =
        dashboards::expressions().into_iter().chain(alerts.into_iter().map(|alert| alert.expression));
    for expression in expressions {
        for name in names(&expression) {
            assert!(known.contains(&name.as_str()), "{name} in {expression}");
            used.push(name);
        }
    }
    // What nobody looks at is not worth telling, but for what only joins others or is made of what is shown.
    let silent: Vec<&str> = known.into_iter().filter(|name| !used.iter().any(|of| of == name)).collect();
    let expected = [
        "anello_start_timestamp_seconds",
        "anello_planned_tokens",
        "anello_steps_total",
        "anello_generations_total",
    ];
    assert_eq!(silent, expected);
}

#[test]
fn prometheus_reads_every_rule_and_every_expression() {
    let folder = tempfile::tempdir().unwrap();
    let check = |name: &str, text: String| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        promtool(&["check", "rules", path.to_str().unwrap()], "")
    };
    let Some((well, said)) = check("alerts.yaml", rules::render(&rules::Limits::default())) else { return };
    assert!(
        well && said.contains(&format!("{} rules found", rules::alerts(&rules::Limits::default()).len())),
        "{said}"
    );
    // A dashboard's expressions, as rules that record them.
    let records: String = dashboards::expressions()
        .iter()
        .enumerate()
        .map(|(at, expression)| {
            format!("  - record: at:{at}\n    expr: '{}'\n", expression.replace('\'', "''"))
        })
        .collect();
    let (well, said) = check("panels.yaml", format!("groups:\n- name: panels\n  rules:\n{records}")).unwrap();
    assert!(well, "{said}");
    // It does refuse what is wrong.
    let (well, _) =
        check("wrong.yaml", "groups:\n- name: a\n  rules:\n  - record: a\n    expr: 'sum by ('\n".to_owned())
            .unwrap();
    assert!(!well);
}

#[test]
fn each_alert_fires_when_its_cause_is_there_and_is_silent_before() {
    let path = repository().join("k8s/rules/tests.yaml");
    let Some((well, said)) = promtool(&["test", "rules", path.to_str().unwrap()], "") else { return };
    assert!(well, "{said}");
    let tested = std::fs::read_to_string(path).unwrap();
    for alert in rules::alerts(&rules::Limits::default()) {
        let about = format!("alertname: {}\n", alert.name);
        assert!(tested.matches(&about).count() >= 2, "{} is not tested to fire and to be silent", alert.name);
    }
}
