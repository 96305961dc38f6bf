use anello_store::{Notice, Refused, Store};
use prometheus::Registry;

use super::*;
use crate::core::{Attendant, Status};
use crate::telemetry::Scrape;
use crate::telemetry::figures::tests::{config, row};
use anello_proto::ring::{
    Activity, Endpoints, Formation, Generation, Member, Pace, Source, Spent, Stance, Step, WorkerId,
};

fn status(workers: &[u64]) -> Status {
    let generation = Generation(3);
    let member = |(at, worker): (usize, &u64)| Member {
        worker: WorkerId(*worker),
        endpoints: Endpoints::default(),
        lanes: at as u32..at as u32 + 1,
    };
    let members = workers.iter().enumerate().map(member).collect();
    let formation =
        Formation { generation, start: Step(0), source: Source::Seed, members, save_first: false };
    let attendant = |(at, worker): (usize, &u64)| Attendant {
        worker: WorkerId(*worker),
        machine: "m".into(),
        lanes: Some(at as u32..at as u32 + 1),
        linked: true,
        stance: Stance::new(None, Activity::Running { generation }),
        pace: Some(Pace {
            generation,
            lanes: 1,
            steps: 2,
            spent: Spent {
                step_us: 900_000,
                compute_us: 200_000 * (at as u64 + 1),
                forward_us: 50_000,
                ..Spent::default()
            },
        }),
        slow: None,
        apart: None,
    };
    Status {
        generation,
        formation: Some(formation),
        trains: true,
        has_trained: true,
        workers: workers.len() as u32,
        attendants: workers.iter().enumerate().map(attendant).collect(),
        step: Some(Step(3)),
        committed: None,
        waits_for: None,
        outcome: None,
        quarantined: Vec::new(),
    }
}

fn board() -> Board {
    let board = Board::new(Some(1e12));
    let store = Store::memory().unwrap();
    board.take_up("a", &config(), &store, &[]).unwrap();
    board.with("a", |figures| figures.use_store(Some(store)));
    for step in 0..3 {
        board.observe("a", &Notice::Step(row(step)));
    }
    board.set_phase("a", Phase::Running, 2);
    board
}

#[test]
fn what_is_known_is_scraped() {
    let board = board();
    board.set_status("a", Some(status(&[0xa1, 0xb2])));
    let text = Scrape::of(&board).unwrap().text().unwrap();
    for line in [
        "# TYPE anello_loss_nats gauge",
        "# TYPE anello_recovery_seconds histogram",
        "anello_loss_nats{job=\"a\",stage=\"warmup\"} 5",
        "anello_loop_loss_nats{job=\"a\",loop=\"1\",stage=\"warmup\"} 5.5",
        "anello_step{job=\"a\"} 3",
        "anello_steps_total{job=\"a\",stage=\"warmup\"} 3",
        "anello_job_phase{job=\"a\",phase=\"running\"} 1",
        "anello_job_phase{job=\"a\",phase=\"failed\"} 0",
        "anello_worker_lanes{job=\"a\",worker=\"00000000000000b2\"} 1",
        "anello_worker_straggler_ratio{job=\"a\",worker=\"00000000000000b2\"} 2",
        "anello_worker_step_seconds{job=\"a\",phase=\"forward\",worker=\"00000000000000a1\"} 0.025",
        "anello_worker_step_seconds{job=\"a\",phase=\"backward\",worker=\"00000000000000a1\"} 0.075",
        "anello_worker_deaths_total{job=\"a\",reason=\"silent\"} 0",
        "anello_invariant_violations_total{invariant=\"generations-rise\",job=\"a\"} 0",
        "anello_store_requests_total{job=\"a\",operation=\"list\"} 2",
    ] {
        assert!(text.lines().any(|of| of == line), "{line} is not in\n{text}");
    }
    assert!(text.contains("anello_model_flops_utilisation_ratio{job=\"a\"} "), "{text}");
    // Every series is of a family, with help; and every family of a keeper is told of this job, or needs what is not here.
    let told: Vec<&str> =
        text.lines().filter_map(|line| line.strip_prefix("# HELP ")?.split(' ').next()).collect();
    let silent = |family: &&Family| !told.contains(&family.name);
    let keepers = FAMILIES.iter().filter(|family| family.teller != Teller::Worker);
    let silent: Vec<&str> = keepers.filter(silent).map(|family| family.name).collect();
    assert_eq!(silent, ["anello_checkpoint_bytes", "anello_checkpoint_write_seconds"]);
}

#[test]
fn promtool_finds_nothing_to_say_of_a_scrape() {
    let board = board();
    board.set_status("a", Some(status(&[0xa1, 0xb2])));
    board.observe("a", &Notice::Checkpoint { step: 3, seconds: 0.5, bytes: 1 << 20 });
    let text = Scrape::of(&board).unwrap().text().unwrap();
    let Some((well, said)) = crate::telemetry::tests::promtool(&["check", "metrics"], &text) else { return };
    assert!(well && said.trim().is_empty(), "{said}\n{text}");
    let (well, said) =
        crate::telemetry::tests::promtool(&["check", "metrics"], "anello_x_count 1\n").unwrap();
    assert!(!well || !said.is_empty(), "it finds fault with what is wrong");
}

#[test]
fn words_that_were_refused_are_counted_by_reason() {
    let board = board();
    board.set_status("a", Some(status(&[0xa1])));
    [Refused::Stranger, Refused::Event, Refused::Stranger]
        .into_iter()
        .for_each(|what| board.observe("a", &Notice::Refused(what)));
    let text = Scrape::of(&board).unwrap().text().unwrap();
    for (reason, count) in [("stranger", 2), ("malformed", 0), ("impossible", 0), ("event", 1)] {
        let line = format!("anello_worker_words_refused_total{{job=\"a\",reason=\"{reason}\"}} {count}\n");
        assert!(text.contains(&line), "{line}{text}");
    }
}

#[test]
fn who_leaves_leaves_no_series_behind() {
    let board = board();
    let scrape = Scrape::of(&board).unwrap();
    board.set_status("a", Some(status(&[0xa1, 0xb2])));
    assert!(scrape.text().unwrap().contains("00000000000000b2"));
    board.set_status("a", Some(status(&[0xa1])));
    let text = scrape.text().unwrap();
    assert!(text.contains("00000000000000a1") && !text.contains("00000000000000b2"), "{text}");
    board.set_status("a", None);
    assert!(!scrape.text().unwrap().contains("worker=\""));
}

#[test]
fn a_registry_is_the_callers_and_holds_a_board_once() {
    let (board, registry) = (board(), Registry::new());
    board.register(&registry).unwrap();
    assert!(board.register(&registry).is_err());
    assert!(!registry.gather().is_empty());
}
