//! Why two runs are not the same, told by the command.

use serde_json::{Value, json};

use super::world;

fn train(run: &str, more: &[&str]) {
    let arguments = ["run", "small.toml", "--out", run, "--sample", "0"];
    world().anello(&[&arguments[..], more].concat()).expect(0);
}

/// What `anello bisect undisturbed RUN` ends with and says, to a machine and to a person.
fn bisect(run: &str, code: i32) -> (Value, String) {
    let json = world().anello(&["bisect", "undisturbed", run, "--json"]).expect(code);
    let value = serde_json::from_str(&json).unwrap_or_else(|cause| panic!("{cause}: {json}"));
    (value, world().anello(&["bisect", "undisturbed", run, "--threads", "1"]).expect(code))
}

#[test]
fn a_ring_and_one_process_are_equal() {
    train("bisect-equal", &["--workers", "2"]);
    let (found, told) = bisect("bisect-equal", 0);
    assert_eq!(found["verdict"], "equal");
    assert_eq!(found["records"]["steps"], 31);
    let first = "undisturbed and bisect-equal are equal in all that both have: 31 steps and 7 checkpoints\n";
    assert!(told.starts_with(first), "{told}");
}

#[test]
fn a_key_of_a_late_stage_is_named_with_the_step_and_what_it_changes() {
    train("bisect-rate", &["--set", "stage.mid-training.lr=2e-3"]);
    let (found, told) = bisect("bisect-rate", 1);
    assert_eq!((&found["verdict"], &found["configs_part_at"]), (&json!("inputs"), &json!(25)), "{found:#}");
    let differs = &found["replay"]["differs"];
    assert_eq!(
        (&differs["step"], &differs["phase"], &differs["lane"]),
        (&json!(25), &json!("update"), &Value::Null)
    );
    assert_eq!((&differs["blocks"]["buffer"], &differs["blocks"]["block"]), (&json!("weights"), &json!(0)));
    assert_eq!(found["replay"]["from"], 25);
    for words in [
        "undisturbed and bisect-rate part at step 25, in the update: weights, block 0 (model.embed_tokens.weight)",
        "  stage.mid-training.lr: 0.001 in A, 0.002 in B\n",
    ] {
        assert!(told.contains(words), "{told}");
    }
}

/// Bits that flip in a ring where nobody can notice: found in the first checkpoint that holds them.
#[test]
fn a_bit_that_flipped_in_a_ring_is_found_in_its_block() {
    for (buffer, checkpoint) in [("weights", 14), ("exp_avg_sq", 20)] {
        let (run, fault) = (format!("bisect-{buffer}"), format!("ring.fault={buffer}@{checkpoint}/0"));
        // Of several the replicas differ, and which of them writes a block is a matter of chance.
        train(&run, &["--workers", "1", "--set", &fault, "--set", "ring.digest_every_steps=0"]);
        let (found, told) = bisect(&run, 1);
        assert_eq!(found["verdict"], "off-record-b", "{found:#}");
        assert_eq!(found["replay"]["differs"], Value::Null);
        assert_eq!(found["replay"]["off_record"][0], Value::Null, "A is as it is on record");
        let differs = &found["replay"]["off_record"][1];
        assert_eq!(
            (&differs["step"], &differs["phase"], &differs["checkpoint"]),
            (&json!(checkpoint - 1), &json!("update"), &json!(checkpoint)),
            "{found:#}"
        );
        let blocks = &differs["blocks"];
        assert_eq!(
            (&blocks["buffer"], &blocks["block"], &blocks["differ"]),
            (&json!(buffer), &json!(0), &json!(1))
        );
        let element = &blocks["element"];
        assert_eq!(
            (&element["tensor"], &element["index"], &element["differ"]),
            (&json!("model.embed_tokens.weight"), &json!([0, 7]), &json!(1))
        );
        let place = format!("by checkpoint {checkpoint}: {buffer}, block 0 (model.embed_tokens.weight)");
        let first = format!("the record of B is not what this machine computes: {place}\n");
        assert!(told.starts_with(&first), "{told}");
        assert!(told.contains("the record of A: B was computed wrongly by a machine"), "{told}");
    }
}

#[test]
fn what_is_no_run_cannot_be_compared() {
    let done = world().anello(&["bisect", "undisturbed", "data"]);
    assert!(done.log.contains("data holds no run"), "{done:?}");
    done.expect(2);
}
