//! Rings of worker processes: whatever happens to them and to their coordinator, the run is the undisturbed one.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anello_tests::{
    Done, Process, free_port, newest_checkpoint, objects, signal, wait_until, without_seconds,
};
use serde_json::{Value, json};

use super::world;

/// Steps of the run.
pub(super) const STEPS: u64 = 31;

pub(super) fn start(run: &str, workers: u32, more: &[&str]) -> Process {
    let workers = workers.to_string();
    let arguments =
        ["run", "small.toml", "--out", run, "--workers", &workers, "--detection", "1s", "--sample", "0"];
    Process::start(&world().folder, &[&arguments[..], more].concat())
}

pub(super) fn worker(coordinator: &str) -> Process {
    worker_with(coordinator, &[])
}

pub(super) fn worker_with(coordinator: &str, more: &[&str]) -> Process {
    let arguments = ["worker", "--coordinator", coordinator, "--job", "small", "--threads", "1"];
    Process::start(&world().folder, &[&arguments[..], more].concat())
}

/// A coordinator, workers from outside on machines that they call `m0`, `m1`, and so on, and the port where they meet.
pub(super) fn start_on_machines(run: &str, workers: u32, more: &[&str]) -> (Process, Vec<Process>, String) {
    let port = free_port().to_string();
    let coordinator = start(run, workers, &[&["--external", "--port", &port][..], more].concat());
    let address = format!("127.0.0.1:{port}");
    let on = |at: u32| worker_with(&address, &["--machine", &format!("m{at}")]);
    (coordinator, (0..workers).map(on).collect(), port)
}

/// The records of a run's log.
pub(super) fn records(run: &str) -> Vec<Value> {
    let mut paths: Vec<_> = objects(&world().folder.join(run).join("events")).into_iter().collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
    paths
        .iter()
        .map(|path| serde_json::from_slice(&std::fs::read(path).expect("it was listed")).expect("JSON"))
        .collect()
}

/// The first record of a kind, and the worker that had `rank` in the last ring that was formed before it.
pub(super) fn blamed<'a>(records: &'a [Value], kind: &str, rank: usize) -> (&'a Value, &'a str) {
    let at = records.iter().position(|record| record["kind"] == kind);
    let at = at.unwrap_or_else(|| panic!("nothing of the kind {kind} in {records:#?}"));
    let ring = records[..at].iter().rfind(|record| record["kind"] == "formed").expect("a ring was formed");
    let worker = ring["members"][rank]["worker"].as_str().unwrap_or_else(|| panic!("no {rank} in {ring}"));
    (&records[at], worker)
}

/// Where a worker says that it is.
pub(super) fn machine_of<'a>(records: &'a [Value], worker: &str) -> &'a str {
    let joined = records.iter().find(|record| record["kind"] == "joined" && record["worker"] == worker);
    joined.and_then(|joined| joined["machine"].as_str()).unwrap_or_else(|| panic!("{worker} never joined"))
}

/// Asserts that the worker of `rank`, and nobody else, was sent away for what it held or computed, and knows it: `workers` are
/// those of [`start_on_machines`] at their end. Returns its machine.
pub(super) fn assert_sent_away(run: &str, rank: usize, workers: Vec<Done>) -> String {
    let records = records(run);
    let (evicted, guilty) = blamed(&records, "evicted", rank);
    let machine = machine_of(&records, guilty);
    assert_eq!((&evicted["worker"], &evicted["machine"]), (&json!(guilty), &json!(machine)), "{evicted}");
    let reason = evicted["reason"].as_str().unwrap_or_default();
    assert!(reason.contains(&format!("worker {guilty} ")), "{evicted}");
    let all = records.iter().filter(|record| record["kind"] == "evicted").count();
    assert_eq!(all, 1, "{records:#?}");
    for (at, done) in workers.into_iter().enumerate() {
        done.expect(if machine == format!("m{at}") { 5 } else { 0 });
    }
    machine.to_owned()
}

pub(super) fn rest(duration: Duration) {
    let began = Instant::now();
    wait_until("its time has come", || began.elapsed() >= duration);
}

pub(super) fn events(run: &str) -> String {
    world().anello(&["events", run]).expect(0)
}

pub(super) fn assert_undisturbed(run: &str) {
    world().assert_undisturbed(run);
    world().assert_same_checkpoints(run);
    let losses = |run: &str| {
        let path = world().folder.join(run).join("checkpoints/0000000020/manifest.json");
        let text = std::fs::read_to_string(path).expect("it was compared");
        serde_json::from_str::<Value>(&text).expect("JSON")["losses"].clone()
    };
    assert_eq!(losses(run), losses("undisturbed"), "what a spike is measured by");
    assert_no_strays(run);
}

/// No worker left a half-written object behind.
pub(super) fn assert_no_strays(run: &str) {
    let strays =
        objects(&world().folder.join(run)).into_iter().find(|path| path.to_string_lossy().contains('#'));
    assert_eq!(strays, None, "the workers have left something");
}

#[test]
fn any_number_of_workers_is_one_worker() {
    for workers in 1..=4 {
        let run = format!("ring-of-{workers}");
        start(&run, workers, &[]).wait().expect(0);
        assert_undisturbed(&run);
        let told = events(&run);
        assert!(told.contains(&format!("with {workers} worker")), "{told}");
        assert!(world().folder.join(&run).join("environment.json").exists());
    }
}

/// The timeline of `--trace` has both workers, and the sum over them begins while each is still computing its last lane.
#[test]
fn the_sum_begins_while_the_last_lane_is_computed() {
    let run = "ring-traced";
    start(run, 2, &["--trace", "trace.json"]).wait().expect(0);
    assert_undisturbed(run);
    let text = std::fs::read_to_string(world().folder.join("trace.json")).unwrap();
    let events: Vec<Value> =
        serde_json::from_str(&format!("{}]", text.trim_end().trim_end_matches(','))).unwrap();
    let spans =
        |name: &str| events.iter().filter(|e| e["ph"] == "X" && e["name"] == name).collect::<Vec<_>>();
    let at = |span: &Value| {
        let start = span["ts"].as_f64().unwrap();
        start..start + span["dur"].as_f64().unwrap()
    };
    let workers: BTreeSet<u64> = spans("step").iter().map(|step| step["pid"].as_u64().unwrap()).collect();
    assert_eq!(workers.len(), 2, "both workers have steps");
    for worker in workers {
        let of =
            |name: &str| spans(name).into_iter().filter(|e| e["pid"] == worker).map(at).collect::<Vec<_>>();
        let (reductions, lanes) = (of("reduce"), of("lane"));
        let (folds, walks) = (of("fold"), of("backward"));
        assert!(reductions.len() >= 20, "{} reductions", reductions.len());
        // Not all of them: the lane of so small a model may be over before a thread has its turn.
        let during = reductions.iter().filter(|sum| lanes.iter().any(|lane| lane.contains(&sum.start)));
        assert!(
            during.count() > 0,
            "of {} reductions none begins while a lane is computed",
            reductions.len()
        );
        // Whatever the threads do: the first block of a last lane is in its sum before the walk back through the layers ends.
        let last_lanes: Vec<_> =
            lanes.iter().filter(|lane| folds.iter().any(|fold| lane.contains(&fold.start))).collect();
        assert!(last_lanes.len() >= 20, "{} lanes with folds", last_lanes.len());
        for lane in last_lanes {
            let first =
                folds.iter().map(|fold| fold.end).filter(|end| lane.contains(end)).fold(f64::MAX, f64::min);
            let walked = walks.iter().map(|walk| walk.start).filter(|start| lane.contains(start));
            assert!(walked.clone().any(|start| start >= first), "{lane:?}: {:?}", walked.collect::<Vec<_>>());
        }
    }
}

/// Trains stages that freeze parameters (gate, fine-tuning, everything again) in one process, `NAME-one`, in a ring of `workers`,
/// and in one more whose worker is killed in the middle of it: all alike. Returns how the one process was started.
pub(super) fn train_stages_that_freeze(name: &str, workers: [u32; 2], more: &[&str]) -> Vec<String> {
    let stages = [
        "stages=[\"warmup\",\"gate\",\"sft\",\"stable\"]",
        "stage.gate={loss=\"gate\",tokens=512,sequence=16,batch=128,lr=1e-2,loops=2,mixture={tales=1}}",
        "stage.sft={loss=\"sft\",tokens=512,sequence=16,batch=128,lr=1e-3,loops=2,mixture={tales=1}}",
    ];
    let sets: Vec<&str> = stages.iter().flat_map(|set| ["--set", set]).collect();
    let [alone, ring, killed] = ["one", "ring", "killed"].map(|run| format!("{name}-{run}"));
    let one = [&["run", "small.toml", "--out", &alone, "--sample", "0"], &sets[..]].concat();
    world().anello(&one).expect(0);
    let sets = [&sets[..], more].concat();
    start(&ring, workers[0], &sets).wait().expect(0);
    let mut disturbed = start(&killed, workers[1], &sets);
    wait_until("it is in the gate's stage", || {
        newest_checkpoint(&world().folder.join(&killed)) >= 5 || disturbed.ended()
    });
    if let Some(worker) = disturbed.children().first() {
        signal(*worker, "KILL");
    }
    disturbed.wait().expect(0);
    for run in [&ring, &killed] {
        world().anello(&["checkpoint", "diff", &alone, run]).expect(0);
        let figures = |run| without_seconds(&world().anello(&["metrics", run]).expect(0));
        assert_eq!(figures(run), figures(&alone), "{run}");
    }
    one.into_iter().map(str::to_owned).collect()
}

/// What is frozen is not sent around, and the ring is formed anew where that changes: gate, fine-tuning, everything again.
#[test]
fn stages_that_freeze_parameters_are_the_same_in_a_ring() {
    let one = train_stages_that_freeze("late", [2, 3], &[]);
    let one: Vec<&str> = one.iter().map(String::as_str).collect();
    // Nor is it written again, by one process or by a ring.
    world().anello(&[&one[..2], &["--out", "late-resumed", "--until", "6"], &one[4..]].concat()).expect(0);
    world().anello(&["run", "--resume", "late-resumed", "--workers", "2", "--sample", "0"]).expect(0);
    world().anello(&["checkpoint", "diff", "late-one", "late-resumed"]).expect(0);
    for run in ["late-one", "late-resumed"] {
        let path = world().folder.join(run).join("checkpoints/0000000008/manifest.json");
        let manifest: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let parts = manifest["parts"].as_array().unwrap();
        let own = parts.iter().filter(|part| part["step"].is_null()).count();
        assert!(own == 1 && parts.len() == 4, "{run}: {own} of {} parts were written anew", parts.len());
        let still = parts.iter().filter(|part| part["still"] == true).count();
        assert_eq!(
            (still, &manifest["format"]),
            (3, &Value::from(3)),
            "{run}: what is frozen has no moments"
        );
        world().anello(&["checkpoint", "verify", run]).expect(0);
    }
    let formed = events("late-ring").lines().filter(|line| line.contains("formed with")).count();
    assert!(formed >= 3, "{formed} rings over two changes of what is trained");
}

/// What makes the small run one of forty steps of one stage, whose learning rate is so high that it goes back after spikes.
pub(super) const WILD: [&str; 8] = [
    "--set",
    "stages=[\"stable\"]",
    "--set",
    "stage.stable={tokens=5120,sequence=16,batch=128,lr=1.0,loops=2,mixture={tales=3,lists=1}}",
    "--set",
    "guard={on_spike=\"rollback\",window=6,factor=1.0,floor=0.01,rollback_steps=2}",
    "--set",
    "checkpoint.every_steps=5",
];

/// What the log tells of spikes, each once: a ring that died before it told may tell again.
pub(super) fn spikes(run: &str) -> BTreeSet<String> {
    let told = events(run);
    let spikes = told.lines().filter_map(|line| line.split_once("the loss of step "));
    spikes
        .map(|(_, told)| {
            assert!(told.contains("the run goes on from its state after"), "{told}");
            told.to_owned()
        })
        .collect()
}

/// Trains in a ring of which a worker is killed every eight steps, so often.
fn with_deaths(run: &str, workers: u32, kills: u64, more: &[&str]) {
    let mut ring = start(run, workers, more);
    for kill in 1..=kills {
        wait_until("it is so far", || {
            newest_checkpoint(&world().folder.join(run)) >= 8 * kill || ring.ended()
        });
        if let Some(worker) = ring.children().first() {
            signal(*worker, "KILL");
        }
    }
    ring.wait().expect(0);
}

/// After a loss spike the state is that of some steps before: one process and any ring come to it, whoever dies meanwhile.
#[test]
fn a_ring_goes_back_after_a_spike_as_one_worker_does() {
    let one = [&["run", "small.toml", "--out", "wild-one", "--sample", "0"], &WILD[..]].concat();
    world().anello(&one).expect(0);
    let expected = spikes("wild-one");
    assert!(expected.len() >= 2, "the run is wild: {expected:?}");
    let figures = |run| without_seconds(&world().anello(&["metrics", run]).expect(0));
    let shared: &[&str] = &["--set", "ring.state_copies=2"];
    for (run, workers, kills, more) in
        [("wild-two", 2, 0, &[][..]), ("wild-killed", 3, 3, &[]), ("wild-shared", 3, 2, shared)]
    {
        with_deaths(run, workers, kills, &[&WILD[..], more].concat());
        world().anello(&["checkpoint", "diff", "wild-one", run]).expect(0);
        assert_eq!(figures(run), figures("wild-one"), "{run}");
        assert_eq!(spikes(run), expected, "{run}");
    }
    let audited = world().anello(&["audit", "wild-killed", "--workers", "2"]).expect(0);
    assert!(audited.contains("is what its record says"), "{audited}");
}

/// The update of a spike is left out by every worker, by the losses that all of them have: one process and any ring come to the
/// same, whoever dies meanwhile.
#[test]
fn a_ring_leaves_out_the_update_of_a_spike_as_one_worker_does() {
    let skip: Vec<String> = WILD.iter().map(|set| set.replace("\"rollback\"", "\"skip\"")).collect();
    let skip: Vec<&str> = skip.iter().map(String::as_str).collect();
    world()
        .anello(&[&["run", "small.toml", "--out", "skip-one", "--sample", "0"], &skip[..]].concat())
        .expect(0);
    let left_out = |run: &str| -> BTreeSet<String> {
        let told = events(run);
        let spikes = told.lines().filter_map(|line| line.split_once("the loss of step "));
        spikes.map(|(_, told)| told.to_owned()).collect()
    };
    let expected = left_out("skip-one");
    assert!(expected.len() >= 2, "the run is wild: {expected:?}");
    assert!(expected.iter().all(|told| told.ends_with("; its update was left out")), "{expected:?}");
    let figures = |run| without_seconds(&world().anello(&["metrics", run, "--csv"]).expect(0));
    let of_one = figures("skip-one");
    let applied = of_one[0].iter().position(|name| name == "applied").expect("a column");
    let skipped = of_one.iter().filter(|row| row[applied] == "false").count();
    assert_eq!((of_one.len(), skipped), (41, expected.len()), "{of_one:?}");
    let shared: &[&str] = &["--set", "ring.state_copies=2"];
    for (run, workers, kills, more) in
        [("skip-two", 2, 0, &[][..]), ("skip-killed", 3, 3, &[]), ("skip-shared", 3, 2, shared)]
    {
        with_deaths(run, workers, kills, &[&skip[..], more].concat());
        assert_eq!(figures(run), of_one, "{run}");
        assert_eq!(left_out(run), expected, "{run}");
        for step in ["@30", "@35", ""] {
            let (ours, theirs) = (format!("{run}{step}"), format!("skip-one{step}"));
            world().anello(&["checkpoint", "diff", &theirs, &ours]).expect(0);
        }
    }
    let audited = world().anello(&["audit", "skip-two", "--workers", "2"]).expect(0);
    assert!(audited.contains("is what its record says"), "{audited}");
}

/// Where the mathematics changes losses are measured anew, so that no spike leads back behind it: one process and a ring that
/// begins right there come to the same.
#[test]
fn a_ring_goes_back_behind_no_change_of_the_mathematics() {
    let begin = ["run", "small.toml", "--sample", "0"];
    world().anello(&[&begin[..], &["--out", "changed-not"], &WILD].concat()).expect(0);
    let numbers = |run: &str| -> Vec<[u64; 2]> {
        let of = |told: &String| {
            let number = |text: &str| text.split(' ').next().and_then(|text| text.parse::<u64>().ok());
            let back_to = told.split_once("its state after ").and_then(|(_, rest)| number(rest));
            [number(told), back_to].map(|number| number.unwrap_or_else(|| panic!("{told}")))
        };
        let mut numbers: Vec<[u64; 2]> = spikes(run).iter().map(of).collect();
        numbers.sort_unstable();
        numbers
    };
    // By the losses before it, the step after the change would be a spike.
    let change = numbers("changed-not")[0][0];
    let until = change.to_string();
    let change_it = ["--allow", "--sample", "0", "--set", "optimizer.weight_decay=0.2"];
    for run in ["changed-one", "changed-ring"] {
        world().anello(&[&begin[..], &["--out", run, "--until", &until], &WILD].concat()).expect(0);
        let resume = [&["run", "--resume", run, "--until", &until], &change_it[..]].concat();
        world().anello(&resume).expect(0);
    }
    world().anello(&["run", "--resume", "changed-one", "--sample", "0"]).expect(0);
    world().anello(&["run", "--resume", "changed-ring", "--workers", "2", "--sample", "0"]).expect(0);
    let spikes_of_one = numbers("changed-one");
    // Losses are measured again once half a window of six is full.
    let behind = |[spike, back_to]: &[u64; 2]| *spike >= change && (*back_to < change || *spike < change + 3);
    assert!(!spikes_of_one.iter().any(behind), "changed at {change}: {spikes_of_one:?}");
    assert!(spikes_of_one.iter().any(|[spike, _]| *spike >= change), "the run is wild: {spikes_of_one:?}");
    assert_eq!(numbers("changed-ring"), spikes_of_one);
    assert_eq!(spikes("changed-ring"), spikes("changed-one"));
    world().anello(&["checkpoint", "diff", "changed-one", "changed-ring"]).expect(0);
    let figures = |run| without_seconds(&world().anello(&["metrics", run]).expect(0));
    assert_eq!(figures("changed-ring"), figures("changed-one"));
}

/// Of three one dies: the others are the same processes to the end, and what they hold is what they held.
#[test]
fn a_death_is_told_in_plain_words_and_costs_no_step() {
    let (run, port) = ("ring-one-death", free_port().to_string());
    let place = world().folder.join(run);
    let address = format!("127.0.0.1:{port}");
    let mut process = start(run, 3, &["--external", "--port", &port]);
    let [victim, survivors @ ..] = [worker(&address), worker(&address), worker(&address)];
    wait_until("it is so far", || newest_checkpoint(&place) >= 9 || process.ended());
    let until_here = survivors.each_ref().map(|survivor| survivor.log().len());
    assert!(victim.kill(), "it was over too soon");
    process.wait().expect(0);
    let after = survivors.into_iter().zip(until_here).map(|(survivor, until_here)| {
        let done = survivor.wait();
        let log = done.log[until_here..].to_owned();
        // Nobody starts workers here: whoever trained at the end has never ended before.
        done.expect(0);
        log
    });
    let after: Vec<String> = after.collect();
    let held = |log: &String| {
        let left = log.lines().find(|line| line.contains("left the ring"));
        let step = left.and_then(|line| line.split_once("holds=Some(Step("))?.1.split_once(')')?.0;
        step.parse::<u64>().ok()
    };
    let held: Vec<u64> = after.iter().map(|log| held(log).unwrap_or_else(|| panic!("{log}"))).collect();
    let newest = held.iter().max();
    for (log, held) in after.iter().zip(&held) {
        assert!(!log.contains("took state from a checkpoint") && !log.contains("is sent the state"), "{log}");
        // Only one whose step the death cut short, while it was done for the other, takes anything.
        assert!(!log.contains("took state from peers") || Some(held) < newest, "{log}");
    }
    let told = events(run);
    assert!(told.contains("lost (it closed its connections to the coordinator and to its peers)"), "{told}");
    assert!(told.contains("with 2 workers from step"), "{told}");
    let re_formed =
        told.lines().find(|line| line.contains("ring re-formed with 2 workers in ")).expect(&told);
    assert!(re_formed.ends_with("no step lost") || re_formed.ends_with("1 step computed again"), "{told}");
    assert_undisturbed(run);
}

#[test]
fn ctrl_c_takes_a_checkpoint_and_another_number_of_workers_goes_on() {
    let run = "ring-paused";
    let place = world().folder.join(run);
    let mut process = start(run, 3, &[]);
    wait_until("it is so far", || newest_checkpoint(&place) >= 6 || process.ended());
    process.signal("INT");
    process.wait().expect(130);
    world().anello(&["checkpoint", "verify", run]).expect(0);
    let resume = ["run", "--resume", run, "--workers", "2", "--sample", "0"];
    world().anello(&resume).expect(0);
    assert_undisturbed(run);
}

#[test]
fn a_ring_goes_on_where_one_process_stopped_and_the_other_way_round() {
    let run = "ring-both-ways";
    world().anello(&["run", "small.toml", "--out", run, "--until", "10", "--sample", "0"]).expect(0);
    let place = world().folder.join(run);
    let mut process =
        Process::start(&world().folder, &["run", "--resume", run, "--workers", "3", "--sample", "0"]);
    wait_until("it is so far", || newest_checkpoint(&place) >= 18 || process.ended());
    process.signal("INT");
    process.wait().expect(130);
    world().anello(&["run", "--resume", run, "--sample", "0"]).expect(0);
    assert_undisturbed(run);
}

#[test]
fn a_coordinator_that_is_killed_is_taken_over_while_training_goes_on() {
    let (run, port) = ("ring-coordinator-killed", free_port().to_string());
    let place = world().folder.join(run);
    let address = format!("127.0.0.1:{port}");
    let mut first = start(run, 2, &["--external", "--port", &port]);
    let workers = [&["--log", "anello_worker=debug"][..], &[]].map(|more| worker_with(&address, more));
    wait_until("it is so far", || newest_checkpoint(&place) >= 6 || first.ended());
    assert!(first.kill(), "it was over too soon");
    // What a worker had applied when the coordinator was gone: two more, and the second was begun after that.
    let applied = || workers[0].log().matches("applied a step").count();
    let before = applied();
    wait_until("steps are made without a coordinator", || applied() >= before + 2);
    let resume =
        ["run", "--resume", run, "--workers", "2", "--external", "--port", &port, "--detection", "1s"];
    Process::start(&world().folder, &[&resume[..], &["--sample", "0"]].concat()).wait().expect(0);
    for worker in workers {
        worker.wait().expect(0);
    }
    assert_undisturbed(run);
}

/// Whoever starts workers tells by their exit codes what became of them.
#[test]
fn the_exit_code_of_a_worker_says_how_it_ended() {
    let (run, port) = ("ring-exit-codes", free_port().to_string());
    let place = world().folder.join(run);
    let address = format!("127.0.0.1:{port}");
    let mut coordinator = start(run, 3, &["--external", "--port", &port]);
    let (stays, goes) = (worker(&address), worker(&address));
    let goes_with_code = worker_with(&address, &["--left-code", "75"]);
    wait_until("it is so far", || newest_checkpoint(&place) >= 3 || coordinator.ended());
    goes.signal("TERM");
    goes_with_code.signal("TERM");
    for (worker, code) in [(goes, 0), (goes_with_code, 75)] {
        let done = worker.wait();
        assert!(done.log.contains("dismissed"), "{done:?}");
        done.expect(code);
    }
    // Its standard input has ended, as when whoever started it is gone.
    worker_with(&address, &["--until-eof"]).wait().expect(4);
    stays.wait().expect(0);
    coordinator.wait().expect(0);
    assert!(events(run).contains("with 1 worker from step"), "{}", events(run));
    assert_undisturbed(run);
}

#[test]
fn a_worker_of_no_job_is_told_so() {
    let (run, port) = ("ring-stranger", free_port().to_string());
    let address = format!("127.0.0.1:{port}");
    let process = start(run, 1, &["--external", "--port", &port]);
    let arguments = ["worker", "--coordinator", &address, "--job", "other"];
    let done = Process::start(&world().folder, &arguments).wait();
    assert!(done.log.contains("there is no job other; there are: small"), "{done:?}");
    assert_eq!(done.status.code(), Some(3));
    drop(process);
}

/// A death in the midst of a step: what the survivors have computed of it they need not compute again, only what the dead had.
#[test]
fn a_death_costs_the_lanes_of_the_dead() {
    // Three steps of seconds each; nothing but the sum of the gradients can break.
    let set = [
        "stages=[\"warmup\"]",
        "stage.warmup.tokens=49152",
        "stage.warmup.batch=16384",
        "ring.digest_every_steps=0",
    ];
    let long: Vec<&str> = set.iter().flat_map(|set| ["--set", *set]).collect();
    let one = ["run", "small.toml", "--out", "long-steps", "--sample", "0"];
    world().anello(&[&one[..], &long].concat()).expect(0);
    let (run, port) = ("ring-death-in-a-step", free_port().to_string());
    let mut process = start(run, 4, &[&["--external", "--port", &port][..], &long].concat());
    let address = format!("127.0.0.1:{port}");
    let workers: Vec<Process> = (0..4).map(|_| worker(&address)).collect();
    wait_until("they train", || {
        workers.iter().all(|worker| worker.log().contains("has its share of the state")) || process.ended()
    });
    rest(Duration::from_millis(300));
    let mut survivors = workers;
    assert!(survivors.remove(1).kill(), "it was over too soon");
    process.wait().expect(0);
    let logs: Vec<String> = survivors
        .into_iter()
        .map(|survivor| {
            let done = survivor.wait();
            let log = done.log.clone();
            done.expect(0);
            log
        })
        .collect();
    let kept: Vec<&str> = logs
        .iter()
        .flat_map(|log| log.lines().filter(|line| line.contains("need not compute these lanes again")))
        .collect();
    assert_eq!(kept.len(), 3, "{kept:#?}\n{logs:#?}");
    assert!(kept.iter().all(|line| line.contains("step=0")), "{kept:#?}");
    let told = events(run);
    assert!(told.contains("ring re-formed with 3 workers"), "{told}");
    world().anello(&["checkpoint", "diff", "long-steps", run]).expect(0);
    let figures = |run| without_seconds(&world().anello(&["metrics", run]).expect(0));
    assert_eq!(figures(run), figures("long-steps"));
    assert_no_strays(run);
}

/// SIGTERM is noticed at any point of a step, and not only at its end, which is when the worker goes.
#[test]
fn a_worker_that_is_asked_to_go_in_the_midst_of_a_step_notices_within_a_second() {
    let (run, port) = ("ring-asked-to-go", free_port().to_string());
    // Three steps of some seconds each.
    let long = [
        "--set",
        "stages=[\"warmup\"]",
        "--set",
        "stage.warmup.tokens=98304",
        "--set",
        "stage.warmup.batch=32768",
    ];
    let mut process = start(run, 2, &[&["--external", "--port", &port][..], &long].concat());
    let address = format!("127.0.0.1:{port}");
    let (stays, goes) = (worker(&address), worker(&address));
    wait_until("it trains", || goes.log().contains("has its share of the state") || process.ended());
    rest(Duration::from_millis(200));
    let asked = Instant::now();
    goes.signal("TERM");
    wait_until("it notices", || goes.log().contains("asked to go"));
    let noticed = asked.elapsed();
    goes.wait().expect(0);
    let left = asked.elapsed();
    assert!(noticed < Duration::from_secs(1), "it noticed after {noticed:?}");
    assert!(
        left > noticed + Duration::from_millis(300),
        "that was no midst of a step: it left after {left:?}"
    );
    process.wait().expect(0);
    stays.wait().expect(0);
    let told = events(run);
    assert!(told.contains("with 1 worker") && !told.contains("state from checkpoint"), "{told}");
    assert_no_strays(run);
}

/// A worker that is stopped for most of the time: it is named, the lanes move to the other, and the run is the same.
#[test]
fn a_slow_worker_is_named_and_serves_fewer_lanes_when_asked_and_changes_nothing() {
    let run = "ring-slow";
    let place = world().folder.join(run);
    let set = ["--set", "ring.lanes=by-speed", "--set", "ring.straggler_window_steps=2"];
    let mut process = start(run, 2, &set);
    wait_until("it trains", || newest_checkpoint(&place) >= 3 || process.ended());
    let slow = process.children()[1];
    while !process.ended() {
        for (name, pause) in [("STOP", 80), ("CONT", 20)] {
            signal(slow, name);
            rest(Duration::from_millis(pause));
        }
    }
    process.wait().expect(0);
    let told = events(run);
    assert!(told.contains(" is slow: its lanes take "), "{told}");
    assert!(
        told.contains("with 2 workers (lanes 3+1)") || told.contains("with 2 workers (lanes 1+3)"),
        "{told}"
    );
    assert_undisturbed(run);
}
