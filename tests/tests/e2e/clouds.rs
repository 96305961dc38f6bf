//! Google's and Azure's object stores, as their emulators speak: fit, found unfit where they are, and home of runs.

use anello_tests::{Cloud, Done, Kind, Process, free_port, wait_until};

use super::world;

fn start(kind: Kind) -> Cloud {
    Cloud::start(kind, &world().folder.join("logs"))
}

fn process(cloud: &Cloud, arguments: &[&str]) -> Process {
    Process::start_with(&world().folder, arguments, &cloud.variables())
}

fn anello(cloud: &Cloud, arguments: &[&str]) -> Done {
    process(cloud, arguments).wait()
}

/// Put-if-absent under racing writers, reads of ranges, an object that goes in pieces, listings, deletions: what the doctor
/// tries. Then data, log, metrics and checkpoints of a run that is killed twice.
fn serves_runs(kind: Kind) {
    let cloud = start(kind);
    let told = anello(&cloud, &["doctor", &cloud.url("doctor")]).expect(0);
    let fit =
        "/doctor is fit for runs and coordinators\nput-if-absent: one winner in 20 of 20 races of 16 writers";
    assert!(told.contains(fit), "{told}");

    let (data, url) = (cloud.url("data"), cloud.url("killed"));
    for source in ["tales", "lists"] {
        let (text, out) = (format!("{source}.jsonl"), format!("{data}/{source}"));
        let tokenize = ["data", "tokenize", &text, "--tokenizer", "tokenizer.json", "--out", &out];
        anello(&cloud, &[&tokenize[..], &["--row-group", "200"]].concat()).expect(0);
        anello(&cloud, &["data", "verify", &out]).expect(0);
    }
    let sets = ["tales", "lists"].map(|source| format!("data.sources.{source}.url={data}/{source}"));
    let mut arguments =
        vec!["run", "small.toml", "--out", &url, "--sample", "0", "--set", &sets[0], "--set", &sets[1]];
    for until in [5, 14] {
        let mut run = process(&cloud, &arguments);
        wait_until("it is so far", || {
            cloud.newest_checkpoint(&world().folder, "killed") >= until || run.ended()
        });
        assert!(run.kill(), "it was over too soon");
        arguments = vec!["run", "--resume", &url, "--sample", "0"];
    }
    anello(&cloud, &arguments).expect(0);
    anello(&cloud, &["checkpoint", "verify", &url]).expect(0);
    let told = anello(&cloud, &["bisect", "undisturbed", &url]).expect(0);
    assert!(told.contains("are equal in all that both have: 31 steps and 7 checkpoints"), "{told}");

    // What is done with checkpoints on any store.
    let copied = cloud.url("copied");
    let told = anello(&cloud, &["checkpoint", "copy", &format!("{url}@20"), &copied]).expect(0);
    assert!(told.contains("checkpoint 20 of ") && told.contains("parts sent"), "{told}");
    anello(&cloud, &["run", "--resume", &copied, "--sample", "0"]).expect(0);
    let told = anello(&cloud, &["checkpoint", "diff", "undisturbed", &copied]).expect(0);
    assert!(told.contains("are equal: all"), "{told}");
    let list = || anello(&cloud, &["checkpoint", "list", &copied]).expect(0);
    let before = list();
    anello(&cloud, &["checkpoint", "prune", &copied, "--keep-last", "2"]).expect(0);
    assert!(list().lines().count() < before.lines().count(), "{before}");
    anello(&cloud, &["checkpoint", "verify", &copied]).expect(0);

    // A place that is not there, or whose credentials are wrong, says what to look at.
    let absent = anello(&cloud, &["events", &cloud.url("killed").replace("/anello/", "/no-such-bucket/")]);
    assert!(absent.log.contains("no-such-bucket"), "{absent:?}");
    assert!(!absent.status.success(), "{absent:?}");
}

#[test]
fn a_run_in_azure_is_killed_and_resumed() {
    serves_runs(Kind::Azure);
}

#[test]
fn a_run_in_google_cloud_storage_is_killed_and_resumed() {
    serves_runs(Kind::Google);
}

/// A server that looks first and writes afterwards lets several win: the doctor says so, and no coordinator takes it up.
#[test]
fn a_server_whose_put_if_absent_is_not_atomic_is_refused() {
    let cloud = start(Kind::GoogleLookingFirst);
    let told = anello(&cloud, &["doctor", &cloud.url("runs")]);
    assert!(told.out.contains("put-if-absent is not atomic there"), "{told:?}");
    told.expect(1);
    let address = format!("127.0.0.1:{}", free_port());
    let refused = anello(&cloud, &["coordinator", "--listen", &address, "--jobs", &cloud.url("jobs")]);
    assert!(refused.log.contains("use a store that keeps the promise"), "{refused:?}");
    assert!(!refused.status.success(), "{refused:?}");
}
