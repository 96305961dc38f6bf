use anello_store::events::{Event, Record};
use anello_store::metrics::Evaluated;

use super::page::escape;
use super::*;
use crate::stages::{config_of, record_of};

const HOSTILE: &str = "</script><b>\"&'{{config}}";

fn story(steps: u64) -> Story {
    let mut config = config_of();
    config.name = HOSTILE.to_owned();
    let mut records: Vec<StepRecord> =
        (0..steps).map(|s| record_of(s, if s < steps / 3 { "warmup" } else { HOSTILE }, 4)).collect();
    if let Some(skipped) = records.get_mut(5) {
        (skipped.applied, skipped.loss, skipped.grad_norm) = (false, f64::NAN, f64::INFINITY);
    }
    let event = |number, event| Record { number, unix_ms: 1_700_000_000_000 + number, event };
    let events = vec![
        event(1, Event::Stage { step: 0, stage: HOSTILE.into() }),
        event(2, Event::Checkpoint { step: 2, weights: "ab".into() }),
        event(3, Event::Checkpoint { step: 4, weights: "cd".into() }),
        event(4, Event::CheckpointFailed { step: 4, cause: HOSTILE.into() }),
        event(5, Event::Stopped { step: 6 }),
    ];
    let environment = Environment {
        anello: "1.2".into(),
        revision: None,
        libtorch: "2.11".into(),
        device: HOSTILE.into(),
        threads: 3,
        system: "linux".into(),
    };
    Story {
        place: HOSTILE.into(),
        schedule: Schedule::new(&config),
        config,
        records,
        events,
        kept: vec![4],
        environment: Some(environment),
    }
}

/// The JSON that the page carries.
fn carried(page: &str) -> serde_json::Value {
    let (_, rest) = page.split_once("<script type=\"application/json\" id=\"data\">").unwrap();
    serde_json::from_str(rest.split_once("</script>").unwrap().0).unwrap()
}

#[test]
fn a_page_is_whole_and_nothing_in_a_run_can_break_it() {
    let page = page::render(&story(30));
    assert!(!page.contains(HOSTILE) && page.contains(&escape(HOSTILE)));
    assert_eq!(page.matches("<script").count(), 2);
    assert_eq!(page.matches("</script>").count(), 2);
    // Every placeholder was filled: the only braces left are those of the hostile name, and never filled again.
    assert_eq!(page.matches("{{").count(), page.matches("{{config}}").count());
    assert_eq!(page.matches("[optimizer]").count(), 1);
    for tag in ["table", "ol", "dl", "section", "details", "main", "header"] {
        let (open, close) =
            (page.matches(&format!("<{tag}")).count(), page.matches(&format!("</{tag}>")).count());
        assert_eq!(open, close, "{tag}");
    }
    // No process of a ring says in the log where it runs.
    assert!(page.contains(&format!("<dd>{}, 3 threads, linux;", escape(HOSTILE))));
    // Self-contained.
    for outside in ["http://", "https://", "src=", "@import", "url(http"] {
        assert!(!page.replace("http://www.w3.org/2000/svg", "").contains(outside), "{outside}");
    }
}

#[test]
fn the_data_is_that_of_the_run() {
    let data = carried(&page::render(&story(30)));
    assert_eq!(data["tokens"].as_array().unwrap().len(), 30);
    assert_eq!((&data["stride"], &data["loops"]), (&1.into(), &4.into()));
    assert_eq!(data["stages"][1]["name"], HOSTILE);
    assert_eq!(data["checkpoints"], serde_json::json!([[2, 16384, false], [4, 32768, true]]));
    assert_eq!(data["skipped"], serde_json::json!([[5, 600]]));
    assert_eq!(data["norm"][5], serde_json::Value::Null);
    assert_eq!(data["loop"][3][0], 5.5);
    let shares: f64 = ["compute", "reduce", "update", "data", "checkpoint", "eval", "other"]
        .map(|k| data["time"][k][9].as_f64().unwrap())
        .iter()
        .sum();
    assert!((shares - 1.0).abs() < 1e-3, "{shares}");
}

#[test]
fn held_out_losses_are_as_last_measured() {
    let mut story = story(30);
    for (step, loss) in [(9, 4.0), (19, 3.0)] {
        story.records[step].evals = vec![Evaluated {
            set: HOSTILE.to_owned(),
            counted: 10,
            loop_loss: vec![loss, loss - 0.5],
            accuracy: vec![0.1; 2],
            exit: vec![0.5; 2],
        }];
    }
    let data = carried(&page::render(&story));
    let set = &data["heldOut"][0];
    assert_eq!(set["set"], HOSTILE);
    let at = |t: usize| [8, 9, 18, 19, 29].map(|at| set["loop"][t][at].as_f64());
    assert_eq!(at(0), [None, Some(4.0), Some(4.0), Some(3.0), Some(3.0)]);
    assert_eq!(at(1), [None, Some(3.5), Some(3.5), Some(2.5), Some(2.5)]);
    assert_eq!(set["loop"].as_array().unwrap().len(), 2);
}

#[test]
fn long_runs_are_thinned_within_stages() {
    let data = carried(&page::render(&story(9_001)));
    let points = data["tokens"].as_array().unwrap();
    assert_eq!(data["stride"], 5);
    assert!((1_800..=2_002).contains(&points.len()), "{}", points.len());
    assert_eq!(points[0], 500);
    assert_eq!(points[points.len() - 1], 900_100);
    // The mean of the first five steps: 7, 6.9, 6.8, 6.7, 6.6.
    assert_eq!(data["loop"][0][0], 6.8);
}

#[test]
fn a_run_that_has_only_begun_has_a_page_too() {
    let page = page::render(&story(0));
    assert_eq!(carried(&page)["tokens"].as_array().unwrap().len(), 0);
}
