//! Jobs at a coordinator: whatever its users want and whatever happens to it, a run that ends is the undisturbed one.

use std::path::{Path, PathBuf};

use anello_tests::{Done, Process, free_port, newest_checkpoint, objects, signal, wait_until};

use super::generating::{COLUMNS, start_on_a_terminal};
use super::world;

/// A coordinator with its place.
struct Coordinator {
    process: Process,
    address: String,
    place: String,
}

impl Coordinator {
    fn start(place: &str, slots: u32, detection: u32) -> Self {
        Self::start_at("127.0.0.1:0", place, slots, detection)
    }

    fn start_at(listen: &str, place: &str, slots: u32, detection: u32) -> Self {
        let (slots, detection) = (slots.to_string(), format!("{detection}s"));
        let arguments = ["coordinator", "--listen", listen, "--jobs", place, "--slots", &slots];
        let more = ["--detection", &detection];
        let mut process = Process::start(&world().folder, &[&arguments[..], &more].concat());
        let address = |out: &str| Some(out.strip_prefix("coordinator at ")?.split_once(',')?.0.to_owned());
        wait_until("the coordinator listens", || address(&process.out()).is_some() || process.ended());
        let address = address(&process.out()).unwrap_or_else(|| panic!("{}", process.log()));
        Self { process, address, place: place.to_owned() }
    }

    fn ask(&self, arguments: &[&str]) -> Done {
        world().anello(&[arguments, &["--coordinator", &self.address]].concat())
    }

    fn submit(&self, name: &str, workers: u32) -> String {
        let workers = workers.to_string();
        self.ask(&["submit", "small.toml", "--name", name, "--workers", &workers]).expect(0)
    }

    fn folder(&self, job: &str) -> PathBuf {
        world().folder.join(&self.place).join(job)
    }

    /// Waits until the coordinator has said that the job is in a phase, so many times.
    fn wait_for(&mut self, job: &str, phase: &str, times: usize) {
        let said = format!("job {job} is {phase}\n");
        let seen = |out: String| out.matches(&said).count() >= times;
        wait_until(&said, || seen(self.process.out()) || self.process.ended());
        assert!(seen(self.process.out()), "{}\n{}", self.process.out(), self.process.log());
    }

    /// The worker processes of a job that live.
    fn workers_of(&self, job: &str) -> Vec<u32> {
        let words =
            |worker: &u32| std::fs::read_to_string(format!("/proc/{worker}/cmdline")).unwrap_or_default();
        let named = format!("\0--job\0{job}\0");
        self.process.children().into_iter().filter(|worker| words(worker).contains(&named)).collect()
    }

    fn wait_for_checkpoint(&mut self, job: &str, step: u64) {
        let folder = self.folder(job);
        wait_until("it is so far", || newest_checkpoint(&folder) >= step || self.process.ended());
    }

    fn assert_undisturbed(&self, job: &str) {
        let run = format!("{}/{job}", self.place);
        world().assert_undisturbed(&run);
        world().assert_same_checkpoints(&run);
    }

    /// SIGTERM, when nothing trains.
    fn stop(self) -> Done {
        self.process.signal("TERM");
        self.process.wait()
    }
}

#[test]
fn two_jobs_take_their_turn_at_one_slot() {
    // Nobody is taken for dead here: the first job's worker is frozen until all is asked of the second.
    let mut coordinator = Coordinator::start("jobs-turns", 1, 60);
    let told = coordinator.submit("a", 1);
    assert!(told.contains("job a is ") && told.contains("anello watch a"), "{told}");
    coordinator.wait_for_checkpoint("a", 3);
    let first = coordinator.process.children()[0];
    signal(first, "STOP");
    let told = coordinator.submit("b", 1);
    assert!(told.contains("job b is queued; it waits for "), "{told}");
    let follow = |command: &[&str]| {
        Process::start(&world().folder, &[command, &["b", "--coordinator", &coordinator.address]].concat())
    };
    let (watch, logs) = (follow(&["watch"]), follow(&["logs", "--follow"]));

    let told = coordinator.ask(&["list"]).expect(0);
    let lines: Vec<&str> = told.lines().collect();
    assert!(
        lines[0].starts_with("job  phase") && lines[1].starts_with("a ") && lines[2].starts_with("b "),
        "{told}"
    );
    let told = coordinator.ask(&["describe", "b"]).expect(0);
    assert!(told.contains("0 of 1 that are wanted") && told.contains(&coordinator.place), "{told}");
    let taken = coordinator.ask(&["submit", "small.toml", "--name", "a"]);
    assert!(taken.log.contains("there is a job a already"), "{taken:?}");
    taken.expect(2);
    signal(first, "CONT");

    coordinator.wait_for("b", "completed", 1);
    let said = coordinator.process.out();
    let (before, after) = said.split_once("job a is completed\n").unwrap_or_else(|| panic!("{said}"));
    // A phase that passes while nobody looks is not told, so what is known is what b was not.
    let phases = |said: &str| said.lines().filter(|line| line.starts_with("job b is ")).count();
    assert_eq!(phases(before), before.matches("job b is queued\n").count(), "{said}");
    assert!(after.ends_with("job b is completed\n"), "{said}");
    let told = watch.wait().expect(0);
    assert!(told.contains("b is completed: step 31/31  100.0 %  loss "), "{told}");
    assert!(told.contains("with 1 worker from step 1"), "{told}");
    let told = logs.wait().expect(0);
    assert!(told.trim_end().ends_with("the coordinator ended the run: completed"), "{told}");
    let told = coordinator.ask(&["top", "b"]).expect(0);
    assert!(told.starts_with("b is completed: step 31/31"), "into a pipe it is told once: {told}");
    let told = coordinator.ask(&["describe", "b"]).expect(0);
    assert!(told.contains("phase       completed") && told.contains("31 of 31 (100.0 %)"), "{told}");
    coordinator.assert_undisturbed("a");
    coordinator.assert_undisturbed("b");
    coordinator.stop().expect(130);
}

/// Two jobs that train at the same time, a worker of each killed while they do: neither is the other's business.
#[test]
fn two_jobs_train_side_by_side_and_each_loses_a_worker() {
    // Nobody is taken for dead: one job is frozen until the other trains too, so that both do at one moment.
    let mut coordinator = Coordinator::start("jobs-side-by-side", 4, 60);
    let jobs = ["a", "b"];
    let mut workers = Vec::new();
    for job in jobs {
        coordinator.submit(job, 2);
        coordinator.wait_for_checkpoint(job, 3);
        let of_job = coordinator.workers_of(job);
        assert_eq!(of_job.len(), 2, "{job}: {}", coordinator.process.out());
        of_job.iter().for_each(|worker| signal(*worker, "STOP"));
        workers.push(of_job);
    }
    for job in jobs {
        let told = coordinator.ask(&["describe", job]).expect(0);
        assert!(told.contains("phase       running") && told.contains("2 of 2 that are wanted"), "{told}");
    }
    workers.iter().for_each(|of_job| signal(of_job[1], "KILL"));
    workers.iter().for_each(|of_job| signal(of_job[0], "CONT"));
    for job in jobs {
        coordinator.wait_for(job, "completed", 1);
        let told = coordinator.ask(&["logs", job]).expect(0);
        assert_eq!(told.matches(" lost (").count(), 1, "{job}: {told}");
        assert!(told.contains("with 2 workers from step"), "{job}: {told}");
        coordinator.assert_undisturbed(job);
    }
    coordinator.stop().expect(130);
}

#[test]
fn a_paused_job_goes_on_where_it_was() {
    let mut coordinator = Coordinator::start("jobs-paused", 2, 1);
    coordinator.submit("a", 2);
    coordinator.wait_for_checkpoint("a", 6);
    coordinator.ask(&["pause", "a"]).expect(0);
    coordinator.wait_for("a", "paused", 1);
    let place = format!("{}/a", coordinator.place);
    world().anello(&["checkpoint", "verify", &place]).expect(0);
    let told = coordinator.ask(&["list"]).expect(0);
    assert!(told.lines().nth(1).is_some_and(|line| line.starts_with("a    paused")), "{told}");
    coordinator.ask(&["resume", "a"]).expect(0);
    coordinator.wait_for("a", "completed", 1);
    let told = coordinator.ask(&["logs", "a"]).expect(0);
    assert!(told.contains("the user asks to pause, with 2 workers"), "{told}");
    assert!(told.contains("the user asks to train, with 2 workers"), "{told}");
    coordinator.assert_undisturbed("a");
}

/// Beside those of its config, one or many, and while workers die: it is the same run.
#[test]
fn checkpoints_that_are_asked_for_change_nothing() {
    const LONG: &str = "stage.stable.tokens=128Ki";
    world().anello(&["run", "small.toml", "--out", "jobs-asked-alone", "--set", LONG]).expect(0);
    let mut coordinator = Coordinator::start("jobs-asked", 2, 10);
    coordinator.ask(&["submit", "small.toml", "--name", "a", "--workers", "2", "--set", LONG]).expect(0);
    coordinator.wait_for_checkpoint("a", 3);
    let step = |told: String| {
        let digits = told.chars().filter(char::is_ascii_digit).collect::<String>();
        digits.parse::<u64>().unwrap_or_else(|_| panic!("{told}"))
    };
    let mut last = 0;
    for _ in 0..3 {
        let told = coordinator.ask(&["checkpoint", "now", "a"]).expect(0);
        assert!(told.starts_with("job a: checkpoint ") && told.ends_with(" is there\n"), "{told}");
        let there = step(told);
        assert!(
            there >= last && newest_checkpoint(&coordinator.folder("a")) >= there,
            "{there} after {last}"
        );
        last = there;
    }
    let told = coordinator.ask(&["checkpoint", "now", "a", "--no-wait"]).expect(0);
    assert!(told.starts_with("job a takes a checkpoint that holds step "), "{told}");
    if let Some(worker) = coordinator.process.children().first() {
        signal(*worker, "KILL");
    }
    coordinator.wait_for("a", "completed", 1);
    world().assert_alike(&format!("{}/a", coordinator.place), "jobs-asked-alone");
    world().anello(&["checkpoint", "verify", &format!("{}/a", coordinator.place)]).expect(0);
    let told = coordinator.ask(&["checkpoint", "now", "a"]);
    assert!(told.log.contains("job a is completed, which is for good"), "{told:?}");
    told.expect(2);
    let told = coordinator.ask(&["checkpoint", "now", "none"]);
    assert!(told.log.contains("there is no job none"), "{told:?}");
    told.expect(2);
}

/// Whether a record of the run's log tells of a generation of three.
fn has_ring_of_three(run: &Path) -> bool {
    let records = objects(&run.join("events")).into_iter().filter_map(|path| std::fs::read(path).ok());
    let members = |record: serde_json::Value| record["members"].as_array().map_or(0, Vec::len);
    records.filter_map(|bytes| serde_json::from_slice(&bytes).ok()).any(|record| members(record) == 3)
}

#[test]
fn a_job_is_scaled_up_and_down_while_it_trains() {
    // Nobody is taken for dead here: the first worker is frozen, so that the run is not over before the others come.
    let mut coordinator = Coordinator::start("jobs-scaled", 3, 60);
    coordinator.submit("a", 1);
    coordinator.wait_for_checkpoint("a", 3);
    let first = coordinator.process.children()[0];
    let describe = |coordinator: &Coordinator| coordinator.ask(&["describe", "a"]).expect(0);
    signal(first, "STOP");
    coordinator.ask(&["scale", "a", "--workers", "3"]).expect(0);
    wait_until("three workers are here", || describe(&coordinator).contains("3 of 3 that are wanted"));
    signal(first, "CONT");
    let formed = |told: &str| told.find("with 3 workers from step");
    let mut step = 0;
    wait_until("a ring of three is formed", || {
        step = newest_checkpoint(&coordinator.folder("a"));
        has_ring_of_three(&coordinator.folder("a")) || coordinator.process.ended()
    });
    coordinator.wait_for_checkpoint("a", step + 3);
    signal(first, "STOP");
    coordinator.ask(&["scale", "a", "--workers", "1"]).expect(0);
    wait_until("two want to go", || describe(&coordinator).matches("  leaving ").count() == 2);
    signal(first, "CONT");
    coordinator.wait_for("a", "completed", 1);
    let told = coordinator.ask(&["logs", "a"]).expect(0);
    let after = formed(&told).map(|at| &told[at..]);
    assert!(after.is_some_and(|after| after.contains("with 1 worker from step")), "{told}");
    coordinator.assert_undisturbed("a");
}

#[test]
fn a_cancelled_job_never_comes_back() {
    let mut coordinator = Coordinator::start("jobs-cancelled", 1, 1);
    coordinator.submit("a", 1);
    coordinator.wait_for_checkpoint("a", 3);
    coordinator.ask(&["cancel", "a"]).expect(0);
    coordinator.wait_for("a", "cancelled", 1);
    assert!(coordinator.process.kill());
    let mut coordinator = Coordinator::start("jobs-cancelled", 1, 1);
    coordinator.wait_for("a", "cancelled", 1);
    let refused = coordinator.ask(&["resume", "a"]);
    assert!(refused.log.contains("job a is cancelled, which is for good"), "{refused:?}");
    refused.expect(2);
    assert!(newest_checkpoint(&coordinator.folder("a")) < 31);
    let done = coordinator.stop();
    assert!(!done.out.contains("forming") && !done.out.contains("running"), "{done:?}");
}

#[test]
fn a_coordinator_that_is_killed_and_started_again_takes_its_jobs_up() {
    let mut coordinator = Coordinator::start("jobs-killed", 2, 1);
    coordinator.submit("a", 2);
    coordinator.wait_for_checkpoint("a", 6);
    assert!(coordinator.process.kill());
    let mut coordinator = Coordinator::start("jobs-killed", 2, 1);
    coordinator.wait_for("a", "completed", 1);
    let told = coordinator.ask(&["logs", "a"]).expect(0);
    assert_eq!(told.matches("a coordinator took the run up").count(), 2, "{told}");
    coordinator.assert_undisturbed("a");
}

#[test]
fn a_submission_that_is_refused_at_the_start_is_the_last_word_and_loses_nothing() {
    let mut coordinator = Coordinator::start("jobs-refused", 1, 1);
    coordinator.submit("a", 1);
    coordinator.wait_for_checkpoint("a", 3);
    assert!(coordinator.process.kill());
    let start = ["coordinator", "--listen", "127.0.0.1:0", "--jobs", "jobs-refused", "--slots", "1"];
    let submit = ["--submit", "small.toml", "--name", "a", "--set", "seed=4"];
    let done = world().anello(&[&start[..], &submit].concat());
    let last = done.log.lines().last().unwrap_or_default();
    assert!(last.starts_with("error: ") && last.contains("whose seed differs"), "{done:?}");
    assert!(!done.log.contains("panicked"), "{done:?}");
    done.expect(2);
    let mut coordinator = Coordinator::start("jobs-refused", 1, 1);
    coordinator.wait_for("a", "completed", 1);
    coordinator.assert_undisturbed("a");
}

#[test]
fn of_two_coordinators_of_one_place_the_older_is_fenced_and_says_so() {
    let mut older = Coordinator::start("jobs-fenced", 1, 1);
    older.submit("a", 1);
    older.wait_for_checkpoint("a", 3);
    let mut newer = Coordinator::start("jobs-fenced", 1, 1);
    let done = older.process.wait();
    assert!(done.log.contains("another coordinator has taken over"), "{done:?}");
    done.expect(1);
    newer.wait_for("a", "completed", 1);
    newer.assert_undisturbed("a");
}

#[test]
fn what_is_not_there_is_said() {
    let nobody = ["list", "--coordinator", "127.0.0.1:9"];
    let done = world().anello(&nobody);
    let text = "there is no coordinator at 127.0.0.1:9; start one with `anello coordinator --jobs DIR`";
    assert!(done.log.contains(text), "{done:?}");
    done.expect(1);
    let doctor = |address: &str| world().anello(&["doctor", "--coordinator", address]);
    let done = doctor("127.0.0.1:9");
    assert!(done.out.contains("not reached") && done.out.contains("nobody listens at this port"), "{done:?}");
    done.expect(1);
    let done = doctor("127.0.0.1");
    assert!(done.out.contains("give it as host:port"), "{done:?}");
    done.expect(1);
    let coordinator = Coordinator::start("jobs-none", 1, 1);
    let told = doctor(&coordinator.address).expect(0);
    assert!(told.contains("is reached from here") && told.contains("it has 0 jobs"), "{told}");
    assert!(coordinator.ask(&["list"]).expect(0).contains("there are no jobs"));
    let done = coordinator.ask(&["watch", "a"]);
    assert!(done.log.contains("there is no job a; there are none"), "{done:?}");
    done.expect(2);
    let done = coordinator.ask(&["submit", "small.toml", "--min", "2"]);
    assert!(done.log.contains("at least 2 workers, and this coordinator has --slots 1"), "{done:?}");
    done.expect(2);
}

/// A job whose tokenizer is not the one of its data, or has tokens beyond the model's, is refused before there is one.
#[test]
fn a_job_with_another_tokenizer_is_not_submitted() {
    let folder = world().folder.join("jobs-tokenizers");
    std::fs::create_dir_all(&folder).unwrap();
    let train =
        ["data", "train-tokenizer", "tales.jsonl", "--vocab", "300", "--out", "jobs-tokenizers/other.json"];
    world().anello(&train).expect(0);
    let large = r#"{"version":"1.0","added_tokens":[],"model":{"type":"WordLevel","vocab":{"a":0,"b":9999},"unk_token":"a"}}"#;
    std::fs::write(folder.join("large.json"), large).unwrap();
    let coordinator = Coordinator::start("jobs-tokenizer", 1, 1);
    for (tokenizer, said) in [
        ("other", "was tokenized with the tokenizer "),
        ("large", "has the token 9999 (\"b\"), the model's vocabulary 2048 tokens"),
    ] {
        let set = format!("data.tokenizer=jobs-tokenizers/{tokenizer}.json");
        let done = coordinator.ask(&["submit", "small.toml", "--name", tokenizer, "--set", &set]);
        assert!(done.log.contains(said), "{done:?}");
        done.expect(2);
        assert!(!coordinator.folder(tokenizer).exists(), "nothing was begun");
    }
    assert!(coordinator.ask(&["list"]).expect(0).contains("there are no jobs"));
}

#[test]
fn where_the_time_of_its_workers_goes_is_told_while_a_job_trains() {
    let mut coordinator = Coordinator::start("jobs-top", 2, 1);
    // Workers say where they stand at every step, since each is a checkpoint: they tell of their time all the same.
    let long = ["stage.stable.tokens=300000", "checkpoint.every_steps=1"].map(|key| ["--set", key]).concat();
    coordinator
        .ask(&[&["submit", "small.toml", "--name", "a", "--workers", "2"], &long[..]].concat())
        .expect(0);
    let ask = |command| coordinator.ask(&[command, "a"]).expect(0);
    // A row of figures for each worker: its lanes, its speed, and the seconds of a step and of its parts.
    let parts = |line: &str| -> Vec<f64> {
        let words: Vec<&str> = line.split_whitespace().collect();
        words.windows(2).filter(|pair| pair[1] == "s").filter_map(|pair| pair[0].parse().ok()).collect()
    };
    let rows = |told: &str| told.lines().filter(|line| parts(line).len() == 7).count();
    wait_until("both workers tell where their time goes", || rows(&ask("top")) == 2);
    let told = ask("top");
    assert!(told.starts_with("a is running: step ") && told.contains("forward  backward   reduce"), "{told}");
    for line in told.lines().filter(|line| parts(line).len() == 7) {
        let [step, _, forward, backward, ..] = parts(line)[..] else { panic!("seven of {line}") };
        // The way back computes the gradients of losses, weights and inputs.
        assert!(0.0 < forward && forward < backward && forward + backward <= step + 0.002, "{told}");
    }
    let told = ask("describe");
    assert!(told.contains("run folder") && rows(&told) == 2, "{told}");
    ask("cancel");
    coordinator.wait_for("a", "cancelled", 1);
    coordinator.stop().expect(130);
}

#[test]
fn a_coordinator_of_workers_from_elsewhere_may_move_while_they_train() {
    let listen = format!("127.0.0.1:{}", free_port());
    let mut first = Coordinator::start_at(&listen, "jobs-moved", 0, 10);
    first.submit("a", 2);
    let worker = || {
        let arguments = ["worker", "--coordinator", &listen, "--job", "a", "--threads", "1"];
        Process::start(&world().folder, &arguments)
    };
    let workers = [worker(), worker()];
    first.wait_for_checkpoint("a", 3);
    first.process.signal("TERM");
    let told = first.process.wait().expect(0);
    assert!(
        told.ends_with(
            "leaving: workers train on, and the next coordinator of this place goes on with them\n"
        )
    );
    let mut second = Coordinator::start_at(&listen, "jobs-moved", 0, 10);
    second.wait_for("a", "completed", 1);
    for worker in workers {
        worker.wait().expect(0);
    }
    let told = second.ask(&["logs", "a"]).expect(0);
    assert!(told.matches("a coordinator took the run up").count() == 2 && !told.contains("paused"), "{told}");
    second.assert_undisturbed("a");
}

/// Workers are started a few times, and the reason is everywhere where one looks for it.
#[test]
fn a_job_whose_data_are_gone_ends_soon_and_says_why() {
    let data = world().folder.join("gone-data");
    std::fs::create_dir_all(&data).unwrap();
    for object in objects(&world().folder.join("data/tales")) {
        std::fs::copy(&object, data.join(object.file_name().unwrap())).unwrap();
    }
    let settings = ["--set", "data.sources.tales.url=gone-data", "--set", "stage.stable.tokens=3000000"];
    let mut coordinator = Coordinator::start("jobs-gone", 2, 10);
    let submit = ["submit", "small.toml", "--name", "a", "--workers", "2"];
    coordinator.ask(&[&submit[..], &settings].concat()).expect(0);
    coordinator.wait_for_checkpoint("a", 3);
    coordinator.ask(&["pause", "a"]).expect(0);
    coordinator.wait_for("a", "paused", 1);
    let run = ["run", "small.toml", "--out", "gone", "--sample", "0", "--until", "3"];
    world().anello(&[&run[..], &settings].concat()).expect(0);

    std::fs::remove_dir_all(&data).unwrap();
    let (why, times) = ("gone-data", "code 6, 3 times in a row");
    coordinator.ask(&["resume", "a"]).expect(0);
    wait_until("it has failed", || {
        coordinator.process.out().contains("job a is failed: no worker is left: ")
    });
    let told = coordinator.ask(&["describe", "a"]).expect(0);
    assert!(told.contains(why) && told.contains(times), "{told}");
    let told = coordinator.ask(&["logs", "a"]).expect(0);
    let failed = told.lines().filter(|line| line.contains("it failed: ") && line.contains(why)).count();
    assert!((1..=6).contains(&failed), "two workers, three times each: {told}");
    assert!(coordinator.process.out().contains("another is started: "), "{}", coordinator.process.out());

    let done = world().anello(&["run", "--resume", "gone", "--sample", "0", "--workers", "2"]);
    assert!(done.log.contains(times) && done.log.contains(why), "{done:?}");
    done.expect(1);
    let told = world().anello(&["events", "gone"]).expect(0);
    assert!(told.contains("no worker is left: ") && told.contains(times), "{told}");
}

/// A coordinator that waits for workers says so by itself, and until when: it does not look as if it hung.
#[test]
fn a_coordinator_says_what_a_job_waits_for() {
    // Longer than this test may take: nothing but the second worker ends the wait, and nothing but the wait itself is news.
    let mut coordinator = Coordinator::start("jobs-waits", 0, 300);
    coordinator.submit("a", 2);
    let worker = |coordinator: &Coordinator| {
        let arguments = ["worker", "--coordinator", &coordinator.address, "--job", "a", "--threads", "1"];
        Process::start(&world().folder, &arguments)
    };
    let said = |what: &str, coordinator: &mut Coordinator| {
        wait_until(what, || coordinator.process.out().contains(what) || coordinator.process.ended());
    };
    said("job a: waits for workers: 0 of 2 are here\n", &mut coordinator);
    let first = worker(&coordinator);
    said(
        "job a: waits for workers: 1 of 2 are here; 300.000 s at most, then fewer are enough\n",
        &mut coordinator,
    );
    let second = worker(&coordinator);
    coordinator.wait_for("a", "completed", 1);
    coordinator.assert_undisturbed("a");
    let told = coordinator.process.out();
    assert_eq!(told.matches("job a: waits for workers: ").count(), 2, "each is told once: {told}");
    first.wait().expect(0);
    second.wait().expect(0);
}

/// No worker is left, and none is started from here: the job waits, says so, and goes on with the first that comes.
#[test]
fn a_job_whose_workers_all_die_waits_for_others_and_says_so() {
    let mut coordinator = Coordinator::start("jobs-deserted", 0, 1);
    coordinator.submit("a", 2);
    let worker = |coordinator: &Coordinator| {
        let arguments = ["worker", "--coordinator", &coordinator.address, "--job", "a", "--threads", "1"];
        Process::start(&world().folder, &arguments)
    };
    let workers = [worker(&coordinator), worker(&coordinator)];
    coordinator.wait_for_checkpoint("a", 6);
    for worker in workers {
        assert!(worker.kill(), "it was over too soon");
    }
    let describe = |coordinator: &Coordinator| coordinator.ask(&["describe", "a"]).expect(0);
    wait_until("it says what it waits for", || describe(&coordinator).contains("workers: 0 of "));
    let told = describe(&coordinator);
    assert!(told.contains("0 of 2 that are wanted"), "{told}");
    // Unasked too, as it lasts.
    let said =
        |coordinator: &Coordinator| coordinator.process.out().contains("job a: waits for workers: 0 of ");
    wait_until("it says so by itself", || said(&coordinator) || coordinator.process.ended());
    let comes = worker(&coordinator);
    coordinator.wait_for("a", "completed", 1);
    comes.wait().expect(0);
    let told = coordinator.ask(&["logs", "a"]).expect(0);
    let (_, after) = told.split_once("state from checkpoint").unwrap_or_else(|| panic!("{told}"));
    assert_eq!(after.matches(" joined from ").count(), 0, "nobody else came: {told}");
    assert!(told.contains("with 1 worker from step"), "{told}");
    coordinator.assert_undisturbed("a");
}

/// The pictures that a terminal was shown one after the other, each as its lines. Each is drawn where the one before was. The last
/// may still be under way and is left out.
fn pictures(out: &str) -> Vec<Vec<String>> {
    let (out, _) = out.rsplit_once('\x1b').unwrap_or_default();
    let drawn = |piece: &str| {
        let (up, picture) = piece.strip_prefix('[')?.split_once('A')?;
        up.parse::<u32>().is_ok().then(|| picture.chars().collect::<Vec<char>>())
    };
    let line = |letters: &[char]| letters.iter().collect::<String>().trim_end().to_owned();
    out.split('\x1b').filter_map(drawn).map(|picture| picture.chunks(COLUMNS).map(line).collect()).collect()
}

/// Whoever watches a job on a terminal sees who is in it and what happened last, drawn anew while it trains; the last picture stays.
#[test]
fn a_job_that_is_watched_on_a_terminal_is_a_board_that_is_drawn_anew() {
    let mut coordinator = Coordinator::start("jobs-watched", 2, 10);
    let submit = ["submit", "small.toml", "--name", "a", "--workers", "2"];
    coordinator.ask(&[&submit[..], &["--set", "stage.stable.tokens=16Ki"]].concat()).expect(0);
    let mut watcher = start_on_a_terminal(&["watch", "a", "--coordinator", &coordinator.address], &[]);
    let is_training = |picture: &Vec<String>| {
        let trains = picture.iter().filter(|line| line.contains(" of 4  training ")).count() == 2;
        let line = &picture[0];
        trains && line.starts_with("a is running: step ") && line.ends_with(" 2 of 2 workers  lanes 2+2")
    };
    let seen = |out: String| pictures(&out).into_iter().filter(is_training).collect::<Vec<_>>();
    wait_until("both train", || seen(watcher.out()).len() > 2 || watcher.ended());
    let [.., earlier, later] = &seen(watcher.out())[..] else { panic!("{:?}", watcher.out()) };
    assert_ne!(earlier, later, "nothing is drawn anew");
    let told = coordinator.ask(&["logs", "a"]).expect(0);
    let [header, members @ ..] = &later[2..5] else { unreachable!("three lines") };
    assert!(header.starts_with("worker ") && header.ends_with(" state after"), "{later:#?}");
    for (member, lanes) in members.iter().zip(["0 to 1 of 4", "2 to 3 of 4"]) {
        let words: Vec<&str> = member.split_whitespace().collect();
        let joined = format!("worker {} joined from {}\n", words[0], words[1]);
        assert!(told.contains(&joined), "{member}\n{told}");
        assert!(member.contains(&format!("  {lanes}  training ")), "{later:#?}");
    }
    let steps = later.iter().position(|line| line.starts_with("step  stage")).expect("steps are told of");
    let told_of = later[steps + 1..].iter().position(String::is_empty);
    assert!(told_of.is_some_and(|steps| (1..=4).contains(&steps)), "{later:#?}");
    let happened: Vec<&String> = later.iter().filter(|line| line.contains(" UTC  ")).collect();
    assert!((1..=6).contains(&happened.len()), "{later:#?}");
    assert!(happened.iter().all(|line| told.contains(line.as_str())), "{later:#?}\n{told}");
    coordinator.wait_for("a", "completed", 1);
    let out = watcher.wait().expect(0);
    // Written, and not drawn.
    assert!(
        out.contains("the coordinator ended the run: completed\r\na is completed: step 88/88 "),
        "{out:?}"
    );
}
