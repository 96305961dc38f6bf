//! The command as a user meets it: help, exit codes, messages. Nothing here trains.

use std::path::Path;
use std::process::{Command, Output};

/// `anello ARGUMENTS` in `directory`, with nothing of ours in the environment.
fn anello(directory: &Path, arguments: &[&str]) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_anello"));
    command.current_dir(directory).args(arguments).env_remove("RUST_LOG");
    for (name, _) in std::env::vars_os() {
        let ours = ["ANELLO_SET__", "ANELLO_TLS_DIR", "ANELLO_COORDINATOR"];
        if ours.iter().any(|ours| name.to_string_lossy().starts_with(ours)) {
            command.env_remove(name);
        }
    }
    let Output { status, stdout, stderr } = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().unwrap(), text(stdout), text(stderr))
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// Names of the subcommands in a help text.
fn subcommands(help: &str) -> Vec<String> {
    let Some((_, list)) = help.split_once("\nCommands:\n") else { return Vec::new() };
    let names = list
        .lines()
        .take_while(|line| !line.is_empty())
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    names
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| *name != "help")
        .map(str::to_owned)
        .collect()
}

#[test]
fn every_subcommand_has_help() {
    let directory = folder();
    let (mut open, mut leaves) = (vec![Vec::<String>::new()], 0);
    while let Some(path) = open.pop() {
        let arguments: Vec<&str> = path.iter().map(String::as_str).chain(["--help"]).collect();
        let (code, help, complaint) = anello(directory.path(), &arguments);
        assert_eq!((code, complaint.as_str()), (0, ""), "{path:?}");
        assert!(help.contains("Usage: anello"), "{path:?}: {help}");
        let below = subcommands(&help);
        leaves += usize::from(below.is_empty());
        open.extend(below.into_iter().map(|name| path.iter().cloned().chain([name]).collect()));
    }
    assert!(leaves >= 14, "only {leaves} commands were found");
}

#[test]
fn help_tells_the_exit_codes() {
    let (_, help, _) = anello(folder().path(), &["--help"]);
    for code in [0, 1, 2, 3, 4, 5, 6, 7, 101, 130, 131] {
        assert!(help.contains(&format!("\n  {code:<5}")), "{code}: {help}");
    }
}

#[test]
fn wrong_arguments_and_configs_are_told_in_full_with_exit_code_2() {
    let directory = folder();
    let cases: [(&[&str], &[&str]); 10] = [
        (&["run"], &["<CONFIG>"]),
        (&["run", "tiny", "--allow"], &["--resume <RUN>"]),
        (&["run", "tiny", "--out", "x", "--resume", "y"], &["cannot be used with"]),
        (&["plan", "tinny"], &["tinny cannot be read; did you mean the preset `tiny`?"]),
        (
            &["plan", "nothing-of-the-kind"],
            &["kind cannot be read; give the path of a TOML file, or one of the presets tiny, "],
        ),
        (
            &["config", "tiny", "--set", "lanes=3", "--set", "stage.stable.lrr=1"],
            &["2 problems", "--set lanes=3: lanes is 3", "did you mean `lr`?"],
        ),
        (&["run", "tiny"], &["data.sources.docs.url is", "which does not exist", "anello data"]),
        (&["run", "--resume", "nowhere"], &["nowhere holds no run; give the folder of one"]),
        (&["events", "ftp://host/run"], &["ftp://host/run: ftp:// is no store that is known here"]),
        (&["plan", "tiny", "--log", "a=b=c"], &["--log a=b=c is no filter"]),
    ];
    for (arguments, told) in cases {
        let (code, output, complaint) = anello(directory.path(), arguments);
        assert_eq!((code, output.as_str()), (2, ""), "{arguments:?}: {complaint}");
        told.iter().for_each(|text| assert!(complaint.contains(text), "{arguments:?}: {complaint}"));
    }
    // Looking at what is not there makes nothing.
    for command in
        [vec!["checkpoint", "list", "nowhere"], vec!["events", "nowhere"], vec!["report", "nowhere"]]
    {
        assert_eq!(anello(directory.path(), &command).0, 2, "{command:?}");
    }
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn a_config_that_was_printed_is_one_that_loads() {
    let directory = folder();
    let (code, toml, _) = anello(directory.path(), &["config", "tiny", "--set", "seed=7"]);
    assert_eq!(code, 0);
    std::fs::write(directory.path().join("mine.toml"), &toml).unwrap();
    let (code, again, complaint) = anello(directory.path(), &["config", "mine.toml"]);
    assert_eq!((code, again, complaint.as_str()), (0, toml, ""));
    let (code, plan, _) = anello(directory.path(), &["plan", "mine.toml", "--gpu", "h200", "--count", "4"]);
    assert!(code == 0 && plan.contains("tiny on 4 × h200"), "{plan}");
}

#[test]
fn data_is_made_looked_at_and_found_broken() {
    let directory = folder();
    let make = [
        "data",
        "synth",
        "mano",
        "--out",
        "mano",
        "--documents",
        "2K",
        "--eval-documents",
        "10",
        "--length",
        "4",
    ];
    let (code, told, complaint) = anello(directory.path(), &make);
    assert_eq!((code, complaint.as_str()), (0, ""));
    assert_eq!(
        told,
        "mano: 2 000 expressions of up to 4 operations to train on, 10 of 4 to test on; vocabulary 33\n"
    );

    let (code, told, _) =
        anello(directory.path(), &["data", "inspect", "mano/train", "--tokenizer", "mano/tokenizer.json"]);
    assert!(code == 0 && told.contains("documents   2 000\n") && told.contains("<ans>"), "{told}");

    let (code, told, _) = anello(directory.path(), &["data", "verify", "mano/train", "--vocab", "33"]);
    assert!(code == 0 && told.starts_with("mano/train: whole; 2 000 documents"), "{told}");
    let (code, told, _) = anello(directory.path(), &["data", "verify", "mano/train", "--vocab", "10"]);
    assert!(code == 1 && told.contains("the vocabulary has 10"), "{told}");

    std::fs::write(directory.path().join("text.txt"), "one two three ".repeat(500)).unwrap();
    let train = ["data", "train-tokenizer", "text.txt", "--out", "new/tokenizer.json", "--vocab", "300"];
    let (code, told, _) = anello(directory.path(), &train);
    assert!(code == 0 && told.contains("not the 300 asked for"), "{told}");
    let tokenize = ["data", "tokenize", "text.txt", "--tokenizer", "new/tokenizer.json", "--out", "set"];
    let (code, told, _) = anello(directory.path(), &tokenize);
    assert!(code == 0 && told.contains("set: 1 documents") && told.contains("in 1 shards\n"), "{told}");
    let (_, told, _) = anello(directory.path(), &tokenize);
    assert!(told.contains("of which 1 were there already"), "{told}");
}

#[test]
fn certificates_are_made_shown_and_never_replaced_unasked() {
    let directory = folder();
    let (code, told, complaint) = anello(directory.path(), &["certs", "init", "--days", "30"]);
    assert_eq!((code, complaint.as_str()), (0, ""));
    let lines: Vec<&str> = told.lines().collect();
    assert!(lines[0].starts_with("a private CA in certs, until 20") && lines[0].ends_with(" UTC"), "{told}");
    assert_eq!(
        lines[1..6],
        [
            "  ca.pem                            for all: who shows a certificate of this CA is believed",
            "  ca.key                            for you alone: makes certificates; keep it off the machines that train",
            "  coordinator.pem, coordinator.key  for the coordinator",
            "  worker.pem, worker.key            for workers, and for a coordinator that starts some itself",
            "  user.pem, user.key                for who submits jobs, and watches and stops them",
        ]
    );
    let mut there: Vec<String> = std::fs::read_dir(directory.path().join("certs"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    there.sort();
    let all =
        ["ca.key", "ca.pem", "coordinator.key", "coordinator.pem", "user.key", "user.pem", "worker.key"];
    assert_eq!(there, [&all[..], &["worker.pem"]].concat());

    for again in [&["certs", "init"][..], &["certs", "issue", "worker"]] {
        let (code, told, complaint) = anello(directory.path(), again);
        assert_eq!((code, told.as_str()), (2, ""));
        assert!(complaint.contains(" is there already; ") && complaint.contains("--force"), "{complaint}");
    }
    let (code, told, _) = anello(directory.path(), &["certs", "issue", "user", "--force", "--days", "1"]);
    assert!(code == 0 && told.starts_with("certs/user.pem and certs/user.key, until 20"), "{told}");
    let (code, _, complaint) = anello(directory.path(), &["certs", "issue", "root"]);
    assert!(
        code == 2 && complaint.contains("`root` is no role; give coordinator, worker or user"),
        "{complaint}"
    );

    let (code, told, _) = anello(directory.path(), &["certs", "show"]);
    let rows: Vec<Vec<&str>> =
        told.lines().map(|line| line.split("  ").filter(|cell| !cell.is_empty()).collect()).collect();
    assert_eq!((code, rows.len()), (0, 5), "{told}");
    assert_eq!((rows[1][..2].to_vec(), rows[1][4].trim()), (vec!["certs/ca.pem", " CA"], "valid"), "{told}");
    let roles: Vec<&str> = rows[2..].iter().map(|row| row[1].trim()).collect();
    assert_eq!(roles, ["coordinator", "user", "worker"], "{told}");
}

#[test]
fn certificates_that_cannot_be_used_are_told_with_the_file_and_what_to_do() {
    let directory = folder();
    anello(directory.path(), &["certs", "init"]);
    std::fs::create_dir(directory.path().join("empty")).unwrap();
    let list = |more: &[&str]| {
        let (code, told, complaint) = anello(directory.path(), &[&["list"], more].concat());
        assert_eq!((code, told.as_str()), (2, ""), "{more:?}: {complaint}");
        complaint
    };
    let told = list(&["--tls", "empty"]);
    assert!(told.contains("empty/ca.pem is missing; `anello certs init` makes all files"), "{told}");
    let told = list(&["--tls-ca", "certs/ca.pem", "--tls-cert", "certs/user.pem"]);
    assert!(told.contains("TLS needs a private key too; give --tls DIR, or all of --tls-ca"), "{told}");
    let told = list(&["--tls", "certs", "--tls-key", "certs/worker.key"]);
    assert!(told.contains("certs/worker.key is not the key of certs/user.pem"), "{told}");
    let told = list(&["--tls", "certs", "--tls-cert", "certs/worker.pem", "--tls-key", "certs/worker.key"]);
    assert!(told.contains("certs/worker.pem is the certificate of worker, not of a user"), "{told}");

    // What speaks both ways at once, and what is not for anybody.
    let coordinator = ["coordinator", "--jobs", "jobs", "--listen", "127.0.0.1:0"];
    let refused = |more: &[&str]| anello(directory.path(), &[&coordinator, more].concat());
    let (code, _, told) = refused(&["--tls", "certs", "--insecure"]);
    assert!(code == 2 && told.contains("leave one of them out"), "{told}");
    let files = [
        "--tls-ca",
        "certs/ca.pem",
        "--tls-cert",
        "certs/coordinator.pem",
        "--tls-key",
        "certs/coordinator.key",
    ];
    let (code, _, told) = refused(&files);
    assert!(
        code == 2 && told.contains("workers that are started here need certificates of their own"),
        "{told}"
    );
    let (code, _, told) = anello(directory.path(), &["run", "tiny", "--workers", "2", "--tls", "certs"]);
    assert!(code == 2 && told.contains("TLS is for workers from elsewhere (--external)"), "{told}");
    std::fs::remove_file(directory.path().join("certs/worker.pem")).unwrap();
    let (code, _, told) = refused(&["--tls", "certs"]);
    assert!(code == 2 && told.contains("certs/worker.pem is missing"), "{told}");
    assert!(!directory.path().join("jobs").exists());
}
