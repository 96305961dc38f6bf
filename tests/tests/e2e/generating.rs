//! Text as it is written: token by token, in the colours of a terminal, with each of the caches.

use anello_tests::{Done, Process, wait_until};
use serde_json::Value;

use super::world;

/// The colours of tokens that leave at the first, the second and the last of three loop steps.
const COLORS: [&str; 3] = ["39", "148", "203"];

/// Width of that terminal.
pub(super) const COLUMNS: usize = 160;

/// A process with a terminal; what it writes there is its output.
pub(super) fn start_on_a_terminal(arguments: &[&str], variables: &[(&str, String)]) -> Process {
    let size = format!("stty cols {COLUMNS} rows 50");
    let terminal = ["sh", "-c", &format!("exec script -qfec \"{size}; exec $*\" /dev/null"), "script"];
    Process::start_by(&terminal.map(str::to_owned), &world().folder, arguments, variables)
}

fn on_a_terminal(arguments: &[&str], variables: &[(&str, String)]) -> Done {
    start_on_a_terminal(arguments, variables).wait()
}

fn json(arguments: &[&str]) -> Value {
    serde_json::from_str(&world().anello(&[arguments, &["--json"]].concat()).expect(0)).unwrap()
}

fn numbers(found: &Value, key: &str) -> Vec<f64> {
    found[key].as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

#[test]
fn tokens_are_told_as_they_are_drawn() {
    let forever = ["generate", "undisturbed", "--prompt", "once", "--tokens", "100000", "--ignore-end"];
    let mut process = Process::start(&world().folder, &forever);
    let mut lengths = Vec::new();
    wait_until("text comes piece by piece", || {
        let length = process.out().len();
        if lengths.last().is_none_or(|last| *last < length) {
            lengths.push(length);
        }
        lengths.len() >= 8 || process.ended()
    });
    assert!(!process.ended() && !process.out().contains("mean depth"), "{lengths:?}: {}", process.out());
    // Interrupted, it tells what it came to.
    process.signal("INT");
    let told = process.wait().expect(130);
    assert!(told.starts_with("once") && told.contains(" tokens/s, mean depth "), "{told}");
}

#[test]
fn a_terminal_shows_the_depth_of_each_token() {
    let generate = ["generate", "undisturbed", "--prompt", "once", "--tokens", "24", "--ignore-end"];
    let colors = |out: &str| -> Vec<String> {
        let of = out.split("\x1b[38;5;").skip(1).filter_map(|rest| rest.split_once('m'));
        of.map(|(color, _)| color.to_owned()).collect()
    };
    let mut seen = std::collections::BTreeSet::new();
    for rule in ["q=0.2", "q=0.5", "q=0.8", "step=1", "step=2", "step=3"] {
        let arguments = [&generate[..], &["--exit", rule]].concat();
        let exits = numbers(&json(&arguments), "exits");
        let expected: Vec<&str> = exits.iter().map(|exit| COLORS[*exit as usize - 1]).collect();
        let told = on_a_terminal(&arguments, &[]).expect(0);
        assert_eq!(colors(&told), expected, "{rule}: {told}");
        seen.extend(expected);
        let plain = on_a_terminal(&arguments, &[("NO_COLOR", "1".to_owned())]).expect(0);
        assert!(!plain.contains('\x1b') && plain.contains("mean depth"), "{plain:?}");
    }
    assert_eq!(seen.len(), COLORS.len(), "{seen:?}");
    let piped = world().anello(&generate).expect(0);
    assert!(!piped.contains('\x1b'), "{piped:?}");
}

/// A prompt is exact with any cache; what is written after it sees other keys and values, with each cache others.
#[test]
fn each_cache_is_one_of_its_own() {
    let with = |kv: &str, loops: &str| {
        let generate = ["generate", "undisturbed", "--prompt", "once", "--tokens", "12", "--ignore-end"];
        let rest = ["--kv", kv, "--exit", &format!("step={loops}"), "--loops", loops];
        json(&[&generate[..], &rest].concat())
    };
    let caches = ["full", "last", "averaged", "first"];
    let found = caches.map(|kv| numbers(&with(kv, "3"), "probabilities"));
    for (at, probabilities) in found.iter().enumerate() {
        assert_eq!(probabilities.len(), 12, "{}", caches[at]);
        assert!((probabilities[0] - found[0][0]).abs() < 1e-6, "{}: {probabilities:?}", caches[at]);
        for (other, others) in found.iter().enumerate().take(at) {
            assert_ne!(probabilities, others, "{} and {}", caches[at], caches[other]);
        }
    }
    let once = caches.map(|kv| with(kv, "1")["ids"].clone());
    assert!(once.iter().all(|ids| *ids == once[0]), "with one loop step there is nothing to share: {once:?}");
}
