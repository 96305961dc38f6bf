//! The registry over workers that never report in: what users see, and what another coordinator finds.

use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anello_configs::LoadOptions;
use anello_store::Store;
use anello_store::events::{Event, EventLog};

use super::*;
use crate::launch::{Exit, Process};

/// Starts workers that do nothing.
struct Idle;

struct IdleProcess {
    told: bool,
}

impl Launcher for Idle {
    type Process = IdleProcess;
    fn start(&mut self, _slot: u32) -> Result<IdleProcess> {
        Ok(IdleProcess { told: false })
    }
}

impl Process for IdleProcess {
    fn poll(&mut self) -> Option<Exit> {
        self.told.then_some(Exit::Done)
    }
    fn terminate(&mut self) {
        self.told = true;
    }
    fn kill(&mut self) {}
    fn name(&self) -> String {
        "idle".to_owned()
    }
}

struct World {
    runtime: tokio::runtime::Runtime,
    place: String,
}

struct Kept {
    registry: Registry,
    thread: JoinHandle<()>,
    said: Receiver<Said>,
}

impl World {
    fn new(name: &str) -> Self {
        let place = std::env::temp_dir().join(format!("anello-registry-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&place);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        Self { runtime: runtime.unwrap(), place: place.display().to_string() }
    }

    fn keep(&self, slots: u32) -> Kept {
        let timings = Timings::new(Duration::from_millis(200));
        let options = RegistryOptions {
            place: self.place.clone(),
            slots: Some(slots),
            timings: Some(timings),
            board: crate::telemetry::Board::default(),
        };
        let (sender, said) = channel();
        let runtime = self.runtime.handle().clone();
        let kept = Registry::start(options, runtime, Jobs::default(), sender, |_, _, _| Idle);
        let (registry, thread) = kept.unwrap();
        Kept { registry, thread, said }
    }

    fn submit(&self, kept: &Kept, name: &str, desired: u32) -> std::result::Result<v1::Job, Refusal> {
        let config = RunConfig::load(&LoadOptions::new("tiny")).unwrap().config.to_toml();
        let submission = Submission { config, name: JobName::new(name), min: 1, desired, run: None };
        self.runtime.block_on(kept.registry.ask(|reply| Command::Submit(submission, reply)))
    }

    fn want(&self, kept: &Kept, name: &str, wish: Wish) -> std::result::Result<(), Refusal> {
        let name = JobName::new(name).unwrap();
        self.runtime.block_on(kept.registry.want(&name, wish)).map(drop)
    }

    fn phases(&self, kept: &Kept) -> Vec<(String, Phase)> {
        let jobs = self.runtime.block_on(kept.registry.ask(Command::List)).unwrap();
        jobs.into_iter().map(|job| (job.name.clone(), Phase::try_from(job.phase()).unwrap())).collect()
    }

    fn stop(&self, kept: Kept) {
        self.runtime.block_on(kept.registry.stop());
        kept.thread.join().unwrap();
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.place);
    }
}

fn wait_for(kept: &Kept, job: &str, phase: Phase) {
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        let left = until.saturating_duration_since(Instant::now());
        match kept.said.recv_timeout(left) {
            Ok(Said::Phase { job: of, phase: now, .. }) if of == job && now == phase => return,
            Ok(_) => {}
            Err(cause) => panic!("{job} is not {phase}: {cause}"),
        }
    }
}

fn names(phases: &[(&str, Phase)]) -> Vec<(String, Phase)> {
    phases.iter().map(|(name, phase)| ((*name).to_owned(), *phase)).collect()
}

#[test]
fn jobs_take_their_turn_and_what_is_over_stays_over() {
    let world = World::new("turns");
    let kept = world.keep(1);
    world.submit(&kept, "a", 1).unwrap();
    let second = world.submit(&kept, "b", 1).unwrap();
    wait_for(&kept, "a", Phase::Forming);
    assert_eq!(world.phases(&kept), names(&[("a", Phase::Forming), ("b", Phase::Queued)]));
    assert_eq!(second.phase(), v1::Phase::Queued);

    let refused = world.submit(&kept, "a", 1).unwrap_err();
    assert!(matches!(refused, Refusal::Taken { .. }), "{refused}");
    let refused = world.want(&kept, "c", Wish::Pause).unwrap_err();
    assert_eq!(refused.to_string(), "there is no job c; there are: a, b");
    let refused = world.want(&kept, "a", Wish::Scale(2)).unwrap_err();
    assert!(refused.to_string().contains("--slots 1"), "{refused}");

    world.want(&kept, "a", Wish::Pause).unwrap();
    wait_for(&kept, "a", Phase::Paused);
    wait_for(&kept, "b", Phase::Forming);
    world.want(&kept, "a", Wish::Resume).unwrap();
    wait_for(&kept, "a", Phase::Queued);
    world.want(&kept, "b", Wish::Cancel).unwrap();
    wait_for(&kept, "b", Phase::Cancelled);
    wait_for(&kept, "a", Phase::Forming);
    let refused = world.want(&kept, "b", Wish::Resume).unwrap_err();
    assert!(refused.to_string().contains("for good"), "{refused}");
    world.stop(kept);

    let next = world.keep(1);
    wait_for(&next, "a", Phase::Forming);
    assert_eq!(world.phases(&next), names(&[("a", Phase::Forming), ("b", Phase::Cancelled)]));
    world.stop(next);
}

#[test]
fn wishes_outlive_the_coordinator() {
    let world = World::new("wishes");
    let kept = world.keep(2);
    world.submit(&kept, "a", 1).unwrap();
    wait_for(&kept, "a", Phase::Forming);
    world.want(&kept, "a", Wish::Scale(2)).unwrap();
    world.want(&kept, "a", Wish::Pause).unwrap();
    wait_for(&kept, "a", Phase::Paused);
    world.stop(kept);
    let next = world.keep(2);
    wait_for(&next, "a", Phase::Paused);
    let jobs = world.runtime.block_on(next.registry.ask(Command::List)).unwrap();
    assert_eq!((jobs[0].desired, jobs[0].waits_for.clone()), (2, None));
    world.stop(next);
}

#[test]
fn a_list_counts_the_machines_that_nobody_is_taken_from() {
    let world = World::new("quarantine");
    let kept = world.keep(1);
    world.submit(&kept, "a", 1).unwrap();
    wait_for(&kept, "a", Phase::Forming);
    world.stop(kept);
    let mut log = EventLog::open(&Store::durable(&format!("{}/a", world.place)).unwrap()).unwrap();
    for (worker, machine) in [("1", "m1"), ("2", "m2"), ("3", "m2")] {
        let (worker, machine) = (format!("000000000000000{worker}"), machine.to_owned());
        log.append(Event::Evicted { worker, machine, step: None, reason: "it differs".to_owned() }).unwrap();
    }
    let next = world.keep(1);
    wait_for(&next, "a", Phase::Forming);
    let jobs = world.runtime.block_on(next.registry.ask(Command::List)).unwrap();
    assert_eq!(jobs[0].quarantined, 2);
    world.stop(next);
}

#[test]
fn of_two_coordinators_the_older_is_fenced() {
    let world = World::new("fence");
    let older = world.keep(1);
    world.submit(&older, "a", 1).unwrap();
    wait_for(&older, "a", Phase::Forming);
    let newer = world.keep(1);
    wait_for(&newer, "a", Phase::Forming);
    let fenced = older.said.iter().find_map(|said| match said {
        Said::Fenced { by } => Some(by),
        _ => None,
    });
    assert!(fenced.unwrap().contains("_coordinators/00000002.json"));
    older.thread.join().unwrap();
    world.stop(newer);
}

#[test]
fn what_is_handed_over_goes_on() {
    let world = World::new("handed");
    let kept = world.keep(1);
    world.submit(&kept, "a", 1).unwrap();
    wait_for(&kept, "a", Phase::Forming);
    world.runtime.block_on(kept.registry.hand_over());
    kept.thread.join().unwrap();
    let next = world.keep(1);
    wait_for(&next, "a", Phase::Forming);
    world.want(&next, "a", Wish::Pause).unwrap();
    wait_for(&next, "a", Phase::Paused);
    world.want(&next, "a", Wish::Cancel).unwrap();
    wait_for(&next, "a", Phase::Cancelled);
    world.stop(next);
}
