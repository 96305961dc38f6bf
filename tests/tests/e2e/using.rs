//! Text and figures from trained weights, by whichever name they go.

use serde_json::Value;

use super::world;

fn json(arguments: &[&str]) -> Vec<Value> {
    let out = world().anello(arguments).expect(0);
    out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The undisturbed run in the published layout.
fn published() -> &'static str {
    static MADE: std::sync::Once = std::sync::Once::new();
    MADE.call_once(|| {
        world().anello(&["export", "undisturbed", "--to", "used", "--dtype", "fp32"]).expect(0);
    });
    "used"
}

#[test]
fn figures_are_the_same_by_any_name_and_number_of_threads() {
    let eval = |name: &str, threads: &str| {
        let arguments =
            ["eval", name, "--data", "data/tales", "--tokens", "2Ki", "--sequence", "64", "--json"];
        let [found] = &json(&[&arguments[..], &["--threads", threads]].concat())[..] else {
            panic!("one line")
        };
        let mut found = found.clone();
        found["model"] = Value::Null;
        found
    };
    let found = eval("undisturbed", "1");
    assert_eq!(found, eval("undisturbed", "2"));
    assert_eq!(found, eval(published(), "1"));
    assert_ne!(found, eval("undisturbed@4", "1"));
    let steps = found["steps"].as_array().unwrap();
    assert_eq!((steps.len(), found["by_exit_mass"].as_array().unwrap().len()), (3, 9));
    for step in steps {
        let (loss, accuracy) = (step["loss"].as_f64().unwrap(), step["accuracy"].as_f64().unwrap());
        assert!(loss > 0.0 && loss < 2048f64.ln() + 1.0 && (0.0..=1.0).contains(&accuracy), "{step}");
    }
    let exits: f64 = steps.iter().map(|step| step["exit"].as_f64().unwrap()).sum();
    assert!((exits - 1.0).abs() < 1e-4, "{exits}");
    let table = world().anello(&["eval", "undisturbed", "--data", "data/lists", "--tokens", "1Ki"]).expect(0);
    assert!(table.contains("loop step") && table.contains("mean depth"), "{table}");
}

#[test]
fn texts_are_the_same_by_any_name() {
    let generate = |name: &str, more: &[&str]| {
        json(
            &[&["generate", name, "--prompt", "once upon", "--tokens", "9", "--ignore-end", "--json"], more]
                .concat(),
        )
    };
    let ids = |found: &[Value]| found[0]["ids"].clone();
    let exits = |found: &[Value]| {
        found[0]["exits"].as_array().unwrap().iter().map(|e| e.as_u64().unwrap()).collect::<Vec<_>>()
    };
    let written = generate("undisturbed", &[]);
    assert_eq!(ids(&written).as_array().unwrap().len(), 9);
    assert_eq!(ids(&written), ids(&generate(published(), &[])));
    assert_eq!(exits(&generate("undisturbed", &["--exit", "step=1"])), [1; 9]);
    assert_eq!(exits(&generate("undisturbed", &["--exit", "weighted", "--loops", "5"])), [5; 9]);
    let warm =
        |seed| ids(&generate("undisturbed", &["--temperature", "2", "--top-p", "0.9", "--seed", seed]));
    assert_eq!(warm("1"), warm("1"));
    assert_ne!(warm("1"), warm("2"));
    std::fs::write(world().folder.join("prompts.txt"), "one\ntwo words\n").unwrap();
    let several = json(&[
        "generate",
        "undisturbed",
        "--prompts",
        "prompts.txt",
        "--tokens",
        "3",
        "--kv",
        "last",
        "--json",
    ]);
    assert_eq!(
        several.iter().map(|v| v["prompt"].as_str().unwrap()).collect::<Vec<_>>(),
        ["one", "two words"]
    );
    for (text, together) in ["one", "two words"].iter().zip(&several) {
        let [alone] =
            &json(&["generate", "undisturbed", "--prompt", text, "--tokens", "3", "--kv", "last", "--json"])
                [..]
        else {
            panic!("one line")
        };
        for figure in ["ids", "exits", "text"] {
            assert_eq!(together[figure], alone[figure], "{text}: {figure}");
        }
    }
    // What is wrong with the last is told before the first is gone on with.
    std::fs::write(world().folder.join("prompts-empty.txt"), "one\n\n").unwrap();
    let refused =
        world().anello(&["generate", "undisturbed", "--prompts", "prompts-empty.txt", "--tokens", "3"]);
    let told = refused.log.clone();
    assert!(told.contains("line 2 of prompts-empty.txt is empty; give at least one letter"), "{told}");
    assert_eq!(refused.expect(2), "");
    let told = world().anello(&["generate", "undisturbed", "--prompt", "once", "--tokens", "4"]).expect(0);
    assert!(told.starts_with("once") && told.contains("mean depth"), "{told}");
}

#[test]
fn questions_are_answered_at_each_loop_step() {
    let questions = world().folder.join("questions.jsonl");
    let line = |answer: u32| {
        format!("{{\"prompt\": \"the\", \"choices\": [\" a\", \" zebra\", \" of\"], \"answer\": {answer}}}\n")
    };
    std::fs::write(&questions, (0..3).map(line).collect::<String>()).unwrap();
    let [found] = &json(&["eval", "undisturbed", "--choices", "questions.jsonl", "--json"])[..] else {
        panic!("one line")
    };
    let steps = found["steps"].as_array().unwrap();
    for words in [
        &["--task", "multiple-choice", "questions.jsonl"][..],
        &["--task", "multiple-choice", "--choices", "questions.jsonl"],
    ] {
        assert_eq!(
            &json(&[&["eval", "undisturbed", "--json"], words].concat())[..],
            std::slice::from_ref(found),
            "{words:?}"
        );
    }
    // The same question with each answer: one of the three is what the model says.
    assert_eq!(steps.len(), 3);
    assert!(
        steps.iter().all(|step| (step["accuracy"].as_f64().unwrap() - 1.0 / 3.0).abs() < 1e-9),
        "{steps:?}"
    );
    assert_eq!((&found["counted"], &found["data"]), (&Value::from(3), &Value::from("questions.jsonl")));
    // The loss is that of the right answers: of all three choices, in nats a token.
    assert!(steps.iter().all(|step| step["loss"].as_f64().unwrap() > 1.0), "{steps:?}");
    let by_mass = found["by_exit_mass"].as_array().unwrap();
    let figure = |at: usize, name: &str| by_mass[at][name].as_f64().unwrap();
    assert_eq!(by_mass.len(), 9);
    assert!(
        figure(0, "mean_depth") < figure(8, "mean_depth") && figure(8, "mean_depth") <= 3.0,
        "{by_mass:?}"
    );
    assert!((0..9).all(|at| (figure(at, "accuracy") - 1.0 / 3.0).abs() < 1e-9), "{by_mass:?}");
    let asked = ["eval", "undisturbed", "--choices", "questions.jsonl", "--plot", "questions.svg"];
    let told = world().anello(&asked).expect(0);
    assert!(told.starts_with("undisturbed on questions.jsonl, 3 questions\n"), "{told}");
    let plot = std::fs::read_to_string(world().folder.join("questions.svg")).unwrap();
    assert!(plot.contains("on questions.jsonl, 3 questions"), "{plot}");
    for (text, expected) in [
        ("{", "questions.jsonl:1: no JSON"),
        ("{\"choices\": [\"a\", \"b\"], \"answer\": 0}", ":1: there is no prompt"),
        ("\n{\"prompt\": \"p\", \"choices\": [\"a\"], \"answer\": 0}", ":2: choices are at least two texts"),
        (
            "{\"prompt\": \"p\", \"choices\": [\"a\", \"b\"], \"answer\": 2}",
            ":1: answer is the number of the right choice",
        ),
        ("", "has no questions"),
    ] {
        std::fs::write(&questions, text).unwrap();
        let done = world().anello(&["eval", "undisturbed", "--choices", "questions.jsonl"]);
        let log = done.log.clone();
        done.expect(2);
        assert!(log.contains(expected), "{text}: {log}");
    }
}

#[test]
fn what_cannot_be_used_is_refused() {
    for (arguments, expected) in [
        (
            vec!["generate", "undisturbed", "--prompt", "x", "--exit", "step=9"],
            "beyond the 3 loop steps; give --loops 9",
        ),
        (
            vec!["generate", "undisturbed", "--prompt", "x", "--exit", "q=2"],
            "give q=0.5 (0 to 1), step=3, diff=0.1 or weighted",
        ),
        (vec!["generate", "undisturbed", "--prompt", ""], "a prompt is empty"),
        (vec!["generate", "data", "--prompt", "x"], "data holds no run"),
        (vec!["generate", "undisturbed"], "--prompt"),
        (vec!["eval", "undisturbed"], "--data"),
        (
            vec!["eval", "undisturbed", "--task", "multiple-choice"],
            "--task multiple-choice has no questions; give it a file: --task multiple-choice FILE",
        ),
        (
            vec!["eval", "undisturbed", "--task", "multiple-choice", "--data", "data/tales"],
            "asks questions, not a token set; leave --data out",
        ),
        (
            vec!["eval", "undisturbed", "--task", "mano", "questions.jsonl"],
            "--task mano has a test set, and no questions as in questions.jsonl",
        ),
        (vec!["eval", "undisturbed", "questions.jsonl"], "--task"),
        (
            vec!["eval", "undisturbed", "--task", "multiple-choice", "--beside", "undisturbed"],
            "--beside is for --task mano",
        ),
        (vec!["eval", "undisturbed", "--task", "mano"], "give it with --data SET/eval"),
    ] {
        let done = world().anello(&arguments);
        let log = done.log.clone();
        done.expect(2);
        assert!(log.contains(expected), "{arguments:?}: {log}");
    }
}

/// A tokenizer that is not the one of the model, or of its data, is refused wherever one is used.
#[test]
fn another_tokenizer_is_refused_everywhere() {
    let folder = &world().folder;
    let train = ["data", "train-tokenizer", "tales.jsonl", "--vocab", "300", "--out", "other/tokenizer.json"];
    world().anello(&train).expect(0);
    let large = r#"{"version":"1.0","added_tokens":[],"model":{"type":"WordLevel","vocab":{"a":0,"b":9999},"unk_token":"a"}}"#;
    std::fs::write(folder.join("large.json"), large).unwrap();
    for (name, tokenizer) in [("of-other", "other/tokenizer.json"), ("of-large", "large.json")] {
        world().anello(&["export", "undisturbed", "--to", name, "--dtype", "fp32"]).expect(0);
        std::fs::copy(folder.join(tokenizer), folder.join(name).join("tokenizer.json")).unwrap();
    }
    let (other, large) = ("data.tokenizer=other/tokenizer.json", "data.tokenizer=large.json");
    let sft = [
        "stages=[\"sft\"]",
        "stage.sft={loss=\"sft\",tokens=512,sequence=16,batch=128,lr=1e-3,loops=2,mixture={tales=1}}",
    ];
    let import = |tokenizer| {
        let arguments = ["import", published(), "--config", "small.toml", "--out", "refused"];
        [&arguments[..], &["--set", sft[0], "--set", sft[1], "--set", tokenizer]].concat()
    };
    let of_other = "was tokenized with the tokenizer ";
    let of_large = "has the token 9999 (\"b\"), the model's vocabulary 2048 tokens";
    for (arguments, expected) in [
        (vec!["run", "small.toml", "--out", "refused", "--set", other], of_other),
        (vec!["run", "small.toml", "--out", "refused", "--set", large], of_large),
        (vec!["run", "small.toml", "--out", "refused", "--workers", "2", "--set", other], of_other),
        (
            vec!["run", "small.toml", "--out", "refused", "--set", sft[0], "--set", sft[1], "--set", other],
            of_other,
        ),
        (vec!["run", "--resume", "undisturbed", "--set", other], of_other),
        (import(other), of_other),
        (import(large), of_large),
        (vec!["eval", "of-other", "--data", "data/tales"], of_other),
        (vec!["eval", "of-large", "--data", "data/tales"], of_large),
        (vec!["generate", "of-large", "--prompt", "a"], of_large),
    ] {
        let done = world().anello(&arguments);
        let log = done.log.clone();
        done.expect(2);
        assert!(log.contains(expected), "{arguments:?}: {log}");
        assert!(!folder.join("refused").exists(), "{arguments:?}: nothing was begun");
    }
    // An index that is made anew knows it still.
    world().anello(&["data", "index", "data/tales"]).expect(0);
    let done = world().anello(&["run", "small.toml", "--out", "refused", "--set", other]);
    assert!(done.log.contains(of_other), "{done:?}");
    done.expect(2);
}

/// Trained on expressions so short that it takes seconds, the test set is found and the figures are told beside the paper's.
#[test]
fn mano_is_told_beside_the_paper() {
    let make = ["data", "synth", "mano", "--out", "mano", "--length", "3", "--modulus", "2"];
    let sizes = ["--documents", "500", "--eval-documents", "40", "--answer-only"];
    world().anello(&[&make[..], &sizes].concat()).expect(0);
    let sets = [
        "stages=[\"stable\"]",
        "data.sources.mano.url=\"mano/train\"",
        "stage.stable={tokens=512,sequence=32,batch=128,lr=1e-3,loops=2,mixture={mano=1}}",
    ];
    let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
    let config = std::fs::read_to_string(world().folder.join("small.toml")).unwrap();
    let without: Vec<&str> = config.lines().filter(|line| !line.starts_with("tokenizer")).collect();
    std::fs::write(world().folder.join("mano.toml"), without.join("\n")).unwrap();
    let run = ["run", "mano.toml", "--out", "run-of-mano", "--sample", "0"];
    world().anello(&[&run[..], &sets].concat()).expect(0);
    let once = [
        &["run", "mano.toml", "--out", "once", "--sample", "0"],
        &sets[..],
        &["--set", "stage.stable.loops=1"],
    ];
    world().anello(&once.concat()).expect(0);
    let told = world().anello(&["eval", "run-of-mano", "--task", "mano", "--beside", "once"]).expect(0);
    assert!(told.contains("mano/eval, 40 tokens that count"), "{told}");
    assert!(told.contains("Mano: right answers to expressions of 3 operations here"), "{told}");
    let (_, table) = told.split_once("Mano: ").unwrap();
    let row = |begin: &str| -> Vec<&str> {
        let row = table.lines().find(|line| line.trim_start().starts_with(begin));
        row.unwrap_or_else(|| panic!("{begin} is not in {told}")).split_whitespace().skip(1).collect()
    };
    assert_eq!((&row("run-of-mano ")[..3], &row("once ")[..3]), (&["1", "x", "2"][..], &["1", "x", "1"][..]));
    assert!(told.contains("98.1") && told.matches("the paper's").count() == 7, "{told}");
    let page = ["eval", "run-of-mano", "--data", "mano/eval", "--plot", "mano.html"];
    world().anello(&page).expect(0);
    let page = std::fs::read_to_string(world().folder.join("mano.html")).unwrap();
    assert!(page.starts_with("<!doctype html>") && page.contains("<svg "), "{page}");
}
