//! TLS between all parts: the run is the undisturbed one, and who proves nothing gets nothing.

use std::path::Path;
use std::sync::OnceLock;

use anello_tests::{Done, Process, newest_checkpoint, signal, wait_until};

use super::world;

/// `certs` in the world, made by the command; and beside it `certs-ROLE`, with what a machine of that role needs.
fn make_certificates() {
    static MADE: OnceLock<()> = OnceLock::new();
    MADE.get_or_init(|| {
        world().anello(&["certs", "init"]).expect(0);
        world().anello(&["certs", "init", "--dir", "certs-of-others"]).expect(0);
        for role in ["coordinator", "worker", "user"] {
            let folder = world().folder.join(format!("certs-{role}"));
            std::fs::create_dir_all(&folder).unwrap();
            for name in ["ca.pem".to_owned(), format!("{role}.pem"), format!("{role}.key")] {
                std::fs::copy(world().folder.join("certs").join(&name), folder.join(&name)).unwrap();
            }
        }
    });
}

fn start_coordinator(arguments: &[&str]) -> (Process, String) {
    let mut process = Process::start(&world().folder, arguments);
    let address = |out: &str| {
        let address = out.strip_prefix("coordinator at ")?.split_once(", ")?.0;
        Some(address.split(' ').next().unwrap_or(address).to_owned())
    };
    wait_until("the coordinator listens", || address(&process.out()).is_some() || process.ended());
    let address = address(&process.out()).unwrap_or_else(|| panic!("{}", process.log()));
    (process, address)
}

fn ask(address: &str, arguments: &[&str]) -> Done {
    world().anello(&[arguments, &["--coordinator", address]].concat())
}

fn assert_undisturbed(run: &str) {
    world().assert_undisturbed(run);
    world().assert_same_checkpoints(run);
}

#[test]
fn a_job_over_tls_has_the_same_bits_and_strangers_have_nothing() {
    make_certificates();
    let arguments = ["coordinator", "--listen", "127.0.0.1:0", "--jobs", "tls-jobs", "--slots", "2"];
    let (mut coordinator, address) = start_coordinator(&[&arguments[..], &["--tls", "certs"]].concat());
    assert!(coordinator.out().contains(" (TLS), "), "{}", coordinator.out());
    let submit = ["submit", "small.toml", "--name", "a", "--workers", "2"];

    // Nothing, the certificates of others, those of another role.
    let refused = |done: Done, what: &[&str]| {
        for what in what {
            assert!(done.log.contains(what), "{what}: {done:?}");
        }
        done.expect(3);
    };
    let at = format!("the coordinator at {address} ");
    refused(ask(&address, &submit), &[&at, "wants TLS; give --tls DIR"]);
    let others = [&submit[..], &["--tls", "certs-of-others"]].concat();
    refused(ask(&address, &others), &[&at, "not of the CA in certs-of-others/ca.pem"]);
    let worker = ["worker", "--job", "a"];
    refused(ask(&address, &worker), &[&at, "wants TLS; give --tls DIR"]);
    let others = [&worker[..], &["--tls", "certs-of-others"]].concat();
    refused(ask(&address, &others), &[&at, "not of the CA in certs-of-others/ca.pem"]);
    let wrong = ["--tls-ca", "certs/ca.pem", "--tls-cert", "certs/user.pem", "--tls-key", "certs/user.key"];
    let done = ask(&address, &[&worker[..], &wrong].concat());
    assert!(done.log.contains("certs/user.pem is the certificate of user, not of a worker"), "{done:?}");
    done.expect(2);

    // A user needs no more than a user's.
    ask(&address, &[&submit[..], &["--tls", "certs-user"]].concat()).expect(0);
    let said = "job a is completed\n";
    wait_until(said, || coordinator.out().contains(said) || coordinator.ended());
    assert!(coordinator.out().contains(said), "{}\n{}", coordinator.out(), coordinator.log());
    let told = ask(&address, &["logs", "a", "--tls", "certs-user"]).expect(0);
    assert!(told.contains("with 2 workers from step"), "{told}");
    assert_undisturbed("tls-jobs/a");
    assert!(coordinator.log().contains("a connection is refused"), "{}", coordinator.log());
    coordinator.signal("TERM");
    coordinator.wait().expect(130);
}

#[test]
fn workers_from_elsewhere_bring_their_own_certificates_and_take_state_over_tls() {
    make_certificates();
    let arguments = ["coordinator", "--listen", "127.0.0.1:0", "--jobs", "tls-joined", "--slots", "0"];
    // Nobody is taken for dead here: the first worker is frozen until the second is there.
    let more = ["--detection", "60s", "--tls", "certs-coordinator"];
    let (mut coordinator, address) = start_coordinator(&[&arguments[..], &more].concat());
    let user = |arguments: &[&str]| ask(&address, &[arguments, &["--tls", "certs-user"]].concat());
    user(&["submit", "small.toml", "--name", "a"]).expect(0);
    let worker = || {
        let arguments = ["worker", "--coordinator", &address, "--job", "a", "--threads", "1"];
        Process::start(&world().folder, &[&arguments[..], &["--tls", "certs-worker"]].concat())
    };
    let mut first = worker();
    let folder = world().folder.join("tls-joined/a");
    wait_until("it is so far", || newest_checkpoint(&folder) >= 3 || first.ended());
    signal(first.id(), "STOP");
    user(&["scale", "a", "--workers", "2"]).expect(0);
    let second = worker();
    wait_until("both are here", || user(&["describe", "a"]).expect(0).contains("2 of 2 that are wanted"));
    signal(first.id(), "CONT");
    let said = "job a is completed\n";
    wait_until(said, || coordinator.out().contains(said) || coordinator.ended());
    let told = user(&["logs", "a"]).expect(0);
    assert!(told.contains("with 2 workers from step"), "{told}");
    assert_undisturbed("tls-joined/a");
    first.wait().expect(0);
    second.wait().expect(0);
    coordinator.signal("TERM");
    coordinator.wait().expect(0);
}

#[test]
fn a_run_waits_for_workers_with_certificates() {
    make_certificates();
    let arguments =
        ["run", "small.toml", "--out", "tls-run", "--workers", "1", "--sample", "0", "--external"];
    let mut run =
        Process::start(&world().folder, &[&arguments[..], &["--tls", "certs-coordinator"]].concat());
    let address = |out: &str| Some(out.split_once("coordinator at ")?.1.split([',', ' ']).next()?.to_owned());
    wait_until("the coordinator listens", || address(&run.out()).is_some() || run.ended());
    let address = address(&run.out()).unwrap_or_else(|| panic!("{}", run.log()));
    let worker = ["worker", "--job", "small", "--threads", "1"];
    ask(&address, &worker).expect(3);
    ask(&address, &[&worker[..], &["--tls", "certs-worker"]].concat()).expect(0);
    run.wait().expect(0);
    assert_undisturbed("tls-run");
}

#[test]
fn where_others_reach_it_nothing_listens_without_tls_unless_a_person_says_so() {
    let run =
        ["run", "small.toml", "--out", "tls-never", "--workers", "1", "--external", "--address", "0.0.0.0"];
    let worker = ["worker", "--coordinator", "127.0.0.1:9", "--job", "a", "--address", "10.1.2.3"];
    let coordinator = ["coordinator", "--listen", "0.0.0.0:0", "--jobs", "tls-insecure", "--slots", "1"];
    for (command, address) in [(&run[..], "0.0.0.0"), (&worker, "10.1.2.3"), (&coordinator, "0.0.0.0")] {
        let done = world().anello(command);
        let text = format!("{address} is not a loopback address");
        assert!(done.log.contains(&text), "{done:?}");
        assert!(done.log.contains("--tls DIR") && done.log.contains("--insecure"), "{done:?}");
        done.expect(2);
    }
    assert!(!Path::new(&world().folder).join("tls-never").exists(), "a run was made that nobody can serve");

    let (mut process, address) = start_coordinator(&[&coordinator[..], &["--insecure"]].concat());
    assert!(process.log().contains("whoever reaches this process can read and change"), "{}", process.log());
    let reached = address.replace("0.0.0.0", "127.0.0.1");
    ask(&reached, &["submit", "small.toml", "--name", "a"]).expect(0);
    let said = "job a is completed\n";
    wait_until(said, || process.out().contains(said) || process.ended());
    assert_undisturbed("tls-insecure/a");
    process.signal("TERM");
    process.wait().expect(130);
}

/// Certificates, and even the CA, are exchanged while a run stands: whoever has new files takes part, without a restart.
#[test]
fn certificates_are_renewed_while_a_run_waits_and_nothing_is_started_again() {
    let folder = &world().folder;
    for dir in ["certs-living", "certs-next"] {
        world().anello(&["certs", "init", "--dir", dir]).expect(0);
    }
    // Nothing but the second worker ends the wait.
    let arguments =
        ["run", "small.toml", "--out", "tls-renewed", "--workers", "2", "--sample", "0", "--external"];
    let more = ["--detection", "300s", "--tls", "certs-living"];
    let mut run = Process::start(folder, &[&arguments[..], &more].concat());
    let address = |out: &str| Some(out.split_once("coordinator at ")?.1.split([',', ' ']).next()?.to_owned());
    wait_until("the coordinator listens", || address(&run.out()).is_some() || run.ended());
    let address = address(&run.out()).unwrap_or_else(|| panic!("{}", run.log()));
    let worker = |certificates: &str| {
        let arguments = ["worker", "--coordinator", &address, "--job", "small", "--threads", "1"];
        Process::start(folder, &[&arguments[..], &["--tls", certificates]].concat())
    };
    let first = worker("certs-living");
    wait_until("the first is here", || run.out().contains("joined from") || run.ended());
    worker("certs-next").wait().expect(3);
    for entry in std::fs::read_dir(folder.join("certs-next")).unwrap().map(Result::unwrap) {
        std::fs::copy(entry.path(), folder.join("certs-living").join(entry.file_name())).unwrap();
    }
    let second = worker("certs-next");
    first.wait().expect(0);
    second.wait().expect(0);
    run.wait().expect(0);
    let told = world().anello(&["events", "tls-renewed"]).expect(0);
    assert!(told.contains("with 2 workers from step 1,"), "{told}");
    assert_undisturbed("tls-renewed");
}
