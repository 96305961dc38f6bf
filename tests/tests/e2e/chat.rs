//! Conversations as a user has them, tokenized and learnt in a stage of fine-tuning: what assistants say counts, and nothing else.

use anello_tests::Dice;
use serde_json::{Value, json};

use super::world;

/// What every assistant says.
const ANSWER: &str = "the ring turns and every step leaves its mark";
/// Conversations.
const COUNT: usize = 150;

/// Conversations in which system and user say what nobody can foretell, and the assistant always the same.
fn write_conversations(name: &str) {
    const WORDS: [&str; 8] = ["glass", "old", "light", "workers", "while", "loop", "began", "falls"];
    let mut dice = Dice(7);
    let lines = (0..COUNT).map(|_| {
        let mut words = || (0..6).map(|_| WORDS[dice.below(8) as usize]).collect::<Vec<_>>().join(" ");
        let say = |role: &str, content: &str| json!({ "role": role, "content": content });
        let turns = [say("system", &words()), say("user", &words()), say("assistant", ANSWER)];
        json!({ "messages": turns }).to_string() + "\n"
    });
    std::fs::write(world().folder.join(name), lines.collect::<String>()).unwrap();
}

/// A column of a run's metrics.
fn column(run: &str, name: &str) -> Vec<f64> {
    let csv = world().anello(&["metrics", run, "--csv"]).expect(0);
    let at = csv.lines().next().unwrap().split(',').position(|column| column == name).unwrap();
    csv.lines().skip(1).map(|row| row.split(',').nth(at).unwrap().parse().unwrap()).collect()
}

#[test]
fn of_conversations_the_answers_are_learnt_and_nothing_else() {
    write_conversations("chat.jsonl");
    let tokenize = |out: &str, more: &[&str]| {
        let arguments = ["data", "tokenize", "chat.jsonl", "--tokenizer", "tokenizer.json", "--out", out];
        world().anello(&[&arguments[..], more].concat()).expect(0);
        let told = world().anello(&["data", "inspect", out, "--tokenizer", "tokenizer.json"]).expect(0);
        let figure = |name: &str| -> Option<f64> {
            let line = told.lines().find_map(|line| line.strip_prefix(name))?;
            line.replace(' ', "").parse().ok()
        };
        (figure("tokens "), figure("targets "))
    };
    let (tokens, targets) = tokenize("data/chat", &["--chat"]);
    // The answer with the token that ends it: as many of each conversation.
    let of_answer = targets.unwrap() / COUNT as f64;
    assert!(of_answer > 5.0 && of_answer.fract() == 0.0, "{targets:?}");
    assert!(tokens.unwrap() > 3.0 * targets.unwrap(), "{tokens:?}, {targets:?}");

    let train = |run: &str, workers: &str| {
        let sets = [
            "data.sources.chat.url=data/chat",
            "stages=[\"stable\"]",
            "stage.stable={tokens=122880,sequence=128,batch=1024,lr=3e-3,loops=2,loss=\"sft\",mixture={chat=1}}",
            "checkpoint.every_steps=120",
        ];
        let begin = ["run", "small.toml", "--out", run, "--sample", "0", "--workers", workers];
        world().anello(&[&begin[..], &sets.map(|set| ["--set", set]).concat()].concat()).expect(0);
    };
    train("chat-one", "1");
    let (loss, counted, all) =
        (column("chat-one", "loss"), column("chat-one", "counted"), column("chat-one", "batch_tokens"));
    assert_eq!(loss.len(), 120);
    // Of the tokens of all batches as large a part counts as of the set; a conversation at the end of one may be cut.
    let share = counted.iter().sum::<f64>() / all.iter().sum::<f64>();
    let expected = targets.unwrap() / tokens.unwrap();
    assert!((share / expected - 1.0).abs() < 0.05, "{share} of the tokens count, {expected} of the set");
    // What cannot be foretold would cost two nats a word; what is always the same is known by heart.
    assert!(loss[0] > 6.0 && *loss.last().unwrap() < 0.05, "{loss:?}");
    let prompt =
        "<|im_start|>system\nold glass<|im_end|>\n<|im_start|>user\nloop<|im_end|>\n<|im_start|>assistant\n";
    let ask = ["generate", "chat-one", "--prompt", prompt, "--tokens", "40", "--temperature", "0", "--json"];
    let answer: Value = serde_json::from_str(&world().anello(&ask).expect(0)).unwrap();
    println!("{answer}");
    assert_eq!(answer["text"].as_str().map(str::trim), Some(ANSWER), "{answer}");
    // A ring counts as one process does.
    train("chat-ring", "2");
    world().anello(&["checkpoint", "diff", "chat-one", "chat-ring"]).expect(0);
    assert_eq!(column("chat-ring", "loss"), loss);
}
