//! Hosts that are cut off without a word: a pulled cable, a dropped route. Nobody is told by a closed connection here.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anello_tests::{Done, Network, Process, newest_checkpoint, wait_until};

use super::world;

/// Where the first coordinator and its users are.
const DESK: u32 = 0;
/// How everybody calls the coordinator, wherever it is.
const NAME: &str = "coordinator.anello.test";
/// Its port, on a host of its own.
const PORT: u16 = 7000;

/// A coordinator on one host, a worker on each of others, and a last host that is idle.
struct Cluster {
    network: Network,
    /// Where the coordinator is.
    desk: u32,
    coordinator: Process,
    workers: Vec<Process>,
    place: String,
    detection: &'static str,
    /// Networks that the workers are told to use: each has an address at each.
    networks: u32,
}

impl Cluster {
    /// All of the workers, or none train. Absent where namespaces may not be made; said, since then nothing is tested.
    fn start(name: &str, workers: u32) -> Option<Self> {
        Self::start_with(name, workers, workers, |_| {})
    }

    /// The same, where fewer may train, and with something done to the network before there are workers.
    fn start_with(name: &str, workers: u32, min: u32, prepare: impl FnOnce(&Network)) -> Option<Self> {
        Self::start_detecting("1s", name, (workers, min), 1, prepare)
    }

    /// The same, with another time after which something silent is found, and on so many networks.
    fn start_detecting(
        detection: &'static str,
        name: &str,
        (workers, min): (u32, u32),
        networks: u32,
        prepare: impl FnOnce(&Network),
    ) -> Option<Self> {
        let network = match Network::new(name, workers + 2, networks) {
            Ok(network) => network,
            Err(why) => {
                println!("NOT RUN, for this user may make no network namespaces: {why}");
                return None;
            }
        };
        for host in 0..workers + 2 {
            network.names(host, &[(NAME, network.address(DESK))]);
        }
        let place = format!("cut-{name}");
        let coordinator = Self::coordinator(&network, DESK, &place, detection);
        let mut cluster =
            Self { network, desk: DESK, coordinator, workers: Vec::new(), place, detection, networks };
        let (count, min) = (workers.to_string(), min.to_string());
        cluster.ask(&["submit", "small.toml", "--name", "a", "--workers", &count, "--min", &min]).expect(0);
        prepare(&cluster.network);
        cluster.workers = (1..=workers).map(|host| cluster.worker(host)).collect();
        Some(cluster)
    }

    /// One that listens.
    fn coordinator(network: &Network, host: u32, place: &str, detection: &str) -> Process {
        let listen = format!("{}:{PORT}", network.address(host));
        let arguments = ["coordinator", "--listen", &listen, "--jobs", place, "--slots", "0", "--insecure"];
        let more = ["--detection", detection];
        let arguments = [&arguments[..], &more].concat();
        let mut process = Process::start_by(&network.on(host), &world().folder, &arguments, &[]);
        let listens = |process: &Process| process.out().starts_with("coordinator at ");
        wait_until("the coordinator listens", || listens(&process) || process.ended());
        assert!(listens(&process), "{}", process.log());
        process
    }

    /// Has the coordinator's name lead to another host, where one takes up what it finds. Returns the one before.
    fn move_coordinator(&mut self, host: u32) -> Process {
        self.desk = host;
        for worker in 1..=self.workers.len() as u32 {
            self.network.names(worker, &[(NAME, self.network.address(host))]);
        }
        self.network.names(host, &[(NAME, self.network.address(host))]);
        let next = Self::coordinator(&self.network, host, &self.place, self.detection);
        std::mem::replace(&mut self.coordinator, next)
    }

    fn worker(&self, host: u32) -> Process {
        let here: Vec<String> = (0..self.networks).map(|at| self.network.address_at(host, at)).collect();
        let coordinator = format!("{NAME}:{PORT}");
        let mut arguments = vec!["worker", "--coordinator", &coordinator, "--job", "a", "--threads", "1"];
        arguments.extend(here.iter().flat_map(|here| ["--address", here]));
        arguments.push("--insecure");
        let on = self.network.on(host);
        Process::start_by(&on, &world().folder, &arguments, &[])
    }

    fn ask(&self, arguments: &[&str]) -> Done {
        let coordinator = format!("{NAME}:{PORT}");
        let arguments = [arguments, &["--coordinator", &coordinator]].concat();
        Process::start_by(&self.network.on(self.desk), &world().folder, &arguments, &[]).wait()
    }

    fn folder(&self) -> PathBuf {
        world().folder.join(&self.place).join("a")
    }

    fn wait_for_checkpoint(&mut self, step: u64) {
        let folder = self.folder();
        let what = format!("checkpoint {step} of {} is there", self.place);
        wait_until(&what, || newest_checkpoint(&folder) >= step || self.coordinator.ended());
    }

    /// The newest step of which a worker has written parts of a checkpoint, whether anyone has committed it or not.
    fn newest_parts(&self) -> u64 {
        let entries = std::fs::read_dir(self.folder().join("checkpoints")).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).max().unwrap_or(0)
    }

    fn logs(&self) -> String {
        self.ask(&["logs", "a"]).expect(0)
    }

    fn is_over(&self) -> bool {
        self.coordinator.out().contains("job a is completed\n")
    }

    /// The job ends, and it is the undisturbed run. Returns its log.
    fn finish(&mut self) -> String {
        wait_until("the job is completed", || self.is_over() || self.coordinator.ended());
        assert!(self.is_over(), "{}", self.coordinator.log());
        let run = format!("{}/a", self.place);
        world().assert_undisturbed(&run);
        world().assert_same_checkpoints(&run);
        self.logs()
    }
}

/// Runs at most three of names of their own until the thing happens in one: on a busy machine a ring may be between two
/// generations at the very moment that a network is cut, when it waits for its coordinator and has no connections, and one that
/// is given no time to compute may be taken for dead.
fn in_one_of_three(what: &str, happens: impl Fn(&str) -> bool) {
    let names = ["", "-again", "-once-more"];
    assert!(names.iter().any(|name| happens(name)), "in none of {} runs {what}", names.len());
}

#[test]
fn a_worker_that_is_cut_off_is_left_behind_and_comes_back() {
    in_one_of_three("it was missed", |again| {
        let Some(mut cluster) = Cluster::start_with(&format!("worker{again}"), 3, 2, |_| {}) else {
            return true;
        };
        cluster.wait_for_checkpoint(6);
        cluster.network.cut(2);
        wait_until("it is missed, or all is over", || {
            cluster.logs().contains("lost (silent for") || cluster.is_over()
        });
        cluster.network.mend(2);
        let told = cluster.finish();
        let after = told.find("lost (silent for").map(|at| &told[at..]);
        after.is_some_and(|after| after.contains("with 2 workers from step"))
    });
}

#[test]
fn a_coordinator_that_is_cut_off_is_not_needed_and_comes_back() {
    in_one_of_three("the workers trained on alone", |again| {
        let Some(mut cluster) = Cluster::start(&format!("coordinator{again}"), 2) else { return true };
        cluster.wait_for_checkpoint(3);
        cluster.network.cut(DESK);
        // The run folder is on a disk that all have, so what they train meanwhile is seen in its parts.
        let cut = Instant::now();
        let mut trained_on = false;
        wait_until("they train on alone, or it is clear that they do not", || {
            trained_on = cluster.newest_parts() >= 12;
            trained_on || cut.elapsed() > Duration::from_secs(20)
        });
        cluster.network.mend(DESK);
        cluster.finish();
        trained_on
    });
}

/// The machine of a coordinator is gone without a word, and another machine has its name.
#[test]
fn a_coordinator_that_comes_back_on_another_machine_is_found_by_its_name() {
    let Some(mut cluster) = Cluster::start_detecting("8s", "moved", (2, 2), 1, |_| {}) else { return };
    cluster.wait_for_checkpoint(3);
    // The run folder is on a disk that all have; a machine whose cables are pulled would not have it.
    cluster.coordinator.signal("STOP");
    cluster.network.cut(DESK);
    let left_at = newest_checkpoint(&cluster.folder());
    // Where the model grows a ring is formed anew, for which there must be a coordinator.
    let grows = 20;
    wait_until("they train on alone", || cluster.newest_parts() >= grows);
    assert!(left_at < grows && newest_checkpoint(&cluster.folder()) < grows, "nobody was there to commit it");
    let older = cluster.move_coordinator(3);
    cluster.wait_for_checkpoint(grows + 1);
    let told = cluster.finish();
    assert!(told.contains("a coordinator took the run up; the newest checkpoint is "), "{told}");
    assert!(!told.contains("lost (") && told.matches(" joined ").count() == 2, "{told}");
    for worker in cluster.workers.drain(..) {
        worker.wait().expect(0);
    }
    cluster.network.mend(DESK);
    older.signal("CONT");
    let done = older.wait();
    assert!(done.log.contains("another coordinator has taken over"), "{done:?}");
    done.expect(1);
}

/// Two workers that both reach the coordinator, and not one another: nobody is dead, and a ring of both cannot train.
#[test]
fn two_that_do_not_reach_one_another_do_not_hold_up_the_others() {
    in_one_of_three("they were parted and nobody taken for dead", |again| {
        let Some(mut cluster) = Cluster::start_with(&format!("pair{again}"), 3, 2, |_| {}) else {
            return true;
        };
        cluster.wait_for_checkpoint(3);
        for (from, to) in [(1, 2), (2, 1)] {
            cluster.network.drop_way(from, to);
        }
        let told = cluster.finish();
        let Some((_, after)) = told.split_once("do not reach one another") else { return false };
        assert!(told.contains("is left out for ") && after.contains("with 2 workers from step"), "{told}");
        !told.contains("lost (silent for")
    });
}

/// Of two networks one breaks between the workers: they go on by the other, and nobody is left out.
#[test]
fn workers_on_two_networks_go_on_when_one_of_them_is_cut() {
    in_one_of_three("the cut was found and nobody taken for dead", |again| {
        let name = format!("networks{again}");
        let started = Cluster::start_detecting("2s", &name, (2, 2), 2, |_| {});
        let Some(mut cluster) = started else { return true };
        cluster.wait_for_checkpoint(3);
        for (from, to) in [(1, 2), (2, 1)] {
            cluster.network.drop_way(from, to);
        }
        let told = cluster.finish();
        let formed = told.matches(" formed with 2 workers").count();
        assert!(formed >= 2 && !told.contains("do not reach one another"), "{told}");
        told.contains(" broke after step ") && !told.contains("lost (silent for")
    });
}

/// A switch between two halves of the workers breaks: one of them goes on at once, and not after one ring for each pair.
#[test]
fn a_network_that_is_cut_in_two_costs_one_ring() {
    in_one_of_three("a half was the next ring", |again| {
        // Half of it may lie between two that notice, and the cuts are made one after the other.
        let name = format!("halves{again}");
        let Some(mut cluster) = Cluster::start_detecting("8s", &name, (4, 2), 1, |_| {}) else { return true };
        cluster.wait_for_checkpoint(3);
        for (here, there) in [1, 2].into_iter().flat_map(|here| [3, 4].map(|there| (here, there))) {
            cluster.network.drop_way(here, there);
            cluster.network.drop_way(there, here);
        }
        let told = cluster.finish();
        let Some((_, after)) = told.split_once("do not reach one another") else { return false };
        let next = after.lines().find(|line| line.contains(" formed with "));
        next.is_some_and(|next| next.contains(" formed with 2 workers"))
    });
}

/// One connection loses all that is sent on it, as where one of several links is broken: the messages still pass, and nothing is
/// closed.
#[test]
fn a_way_of_blocks_alone_that_is_cut_is_found() {
    in_one_of_three("the cut was found and nobody taken for dead", |again| {
        let Some(mut cluster) = Cluster::start(&format!("blocks{again}"), 2) else { return true };
        cluster.wait_for_checkpoint(3);
        let cut = cluster.network.drop_connection(1, 2);
        let between = cut.as_ref().is_err_and(|why| why.contains("no connection"));
        if let (Err(why), false) = (cut, between) {
            println!("NOT RUN, for this kernel or user may drop no single connection: {why}");
            return true;
        }
        let told = cluster.finish();
        told.contains("do not reach one another") && !told.contains("lost (silent for")
    });
}

/// What is lost one way only, from the beginning: they never meet. Once it arrives again, both train.
#[test]
fn one_whose_words_do_not_arrive_at_another_is_tried_again() {
    for (name, from, to) in [("one-way", 1, 2), ("other-way", 2, 1)] {
        let Some(mut cluster) = Cluster::start_with(name, 2, 1, |network| network.drop_way(from, to)) else {
            return;
        };
        wait_until("it is told", || cluster.logs().contains("do not reach one another"));
        cluster.network.mend_way(from, to);
        let told = cluster.finish();
        assert!(told.contains("is left out for ") && told.contains("with 1 worker from step"), "{told}");
    }
}
