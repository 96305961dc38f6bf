//! The event log in plain words.

use crate::Environment;
use crate::events::{Event, RingMember};

use anello_configs::text::grouped;

/// What happened, as one line without the time (changed keys follow on lines of their own).
pub fn describe(event: &Event) -> String {
    match event {
        Event::Started { step, environment, changed, data } => {
            let begun = match step {
                0 => "begun".to_owned(),
                step => format!("resumed after step {}", grouped(*step)),
            };
            let changed =
                changed.iter().map(|(key, before, now)| format!("\n  changed: {key}: {before} -> {now}"));
            let data = data.iter().map(|(source, before, now)| {
                format!("\n  changed: data of {source}: {}", other_data(before, now))
            });
            format!("{begun} on {}{}", where_it_runs(environment), changed.chain(data).collect::<String>())
        }
        Event::PassedOver { step, reason } => {
            format!(
                "checkpoint {} cannot be used and was passed over: {}",
                grouped(*step),
                reason.replace('\n', " ")
            )
        }
        Event::Broke { worker, generation, step, reason } => {
            let step = step.map(|step| format!(" after step {}", grouped(step))).unwrap_or_default();
            format!("ring {generation} broke{step}: worker {} says: {reason}", short_digest(worker))
        }
        Event::Stage { step, stage } => format!("stage {stage} begins, after {} steps", grouped(*step)),
        Event::Skipped { step, loss } => {
            format!("step {} was skipped: it was not finite (loss {loss})", grouped(*step))
        }
        Event::Spike { step, loss, median, limit, skipped, back_to } => {
            let outcome = match back_to {
                Some(to) => format!(
                    "; the run goes on from its state after {} steps, and leaves out the batches of steps {} to {}",
                    grouped(*to),
                    grouped(*to),
                    grouped(*step)
                ),
                None if *skipped => "; its update was left out".to_owned(),
                None => String::new(),
            };
            let [loss, median, limit] = [loss, median, limit].map(|text| short_number(text));
            format!(
                "the loss of step {} is a spike: {loss}, above {limit}, where the median is {median}{outcome}",
                grouped(*step)
            )
        }
        Event::Epoch { step, source, epoch } => {
            format!("source {source} is in its {} epoch, from step {}", ordinal(epoch + 1), grouped(*step))
        }
        Event::SkippedData { step, lane, source, row_group, reason } => format!(
            "row group {row_group} of source {source} was left out of lane {lane} at step {}: {reason}",
            grouped(*step)
        ),
        Event::Checkpoint { step, weights } => {
            format!("checkpoint {}, weights {}", grouped(*step), short_digest(weights))
        }
        Event::CheckpointFailed { step, cause } => {
            format!("checkpoint {} could not be written now: {cause}", grouped(*step))
        }
        Event::TakenUp { step: None } => {
            "a coordinator took the run up; there is no checkpoint yet".to_owned()
        }
        Event::TakenUp { step: Some(step) } => {
            format!("a coordinator took the run up; the newest checkpoint is {}", grouped(*step))
        }
        Event::Goal { goal, workers } => {
            let wish = match goal.as_str() {
                "run" => "train",
                other => other,
            };
            format!("the user asks to {wish}, with {}", of_workers(*workers as usize))
        }
        Event::Joined { worker, machine } => format!("worker {} joined from {machine}", short_digest(worker)),
        Event::Lost { worker, step, reason } => {
            let at = match step {
                Some(step) => format!(" at step {}", grouped(*step)),
                None => "; it held no state".to_owned(),
            };
            format!("worker {} lost ({reason}){at}", short_digest(worker))
        }
        Event::Evicted { worker, machine, step, reason } => {
            let step = step.map_or(String::new(), |step| format!(" after step {}", grouped(step)));
            let machine = match machine.as_str() {
                "" => String::new(),
                machine => format!(" and machine {machine} quarantined"),
            };
            format!("worker {} sent away{step}{machine}: {reason}", short_digest(worker))
        }
        Event::Formed { generation, start, source, holders, members, save_first } => {
            let whence = match source.as_str() {
                "seed" => "the run's seed".to_owned(),
                "checkpoint" => format!("checkpoint {}", grouped(*start)),
                "peers" => of_workers(holders.len()),
                other => other.to_owned(),
            };
            let save = if *save_first { "; a checkpoint comes first" } else { "" };
            // Those that serve no lanes yet come last.
            let learns = |member: &&RingMember| {
                source == "peers" && member.first_lane == member.end_lane && !holders.contains(&member.worker)
            };
            let learners = members.iter().rev().take_while(learns).count();
            let meanwhile = match learners {
                0 => String::new(),
                learners => format!(", sent to {} while the others train", of_workers(learners)),
            };
            format!(
                "ring {generation} formed with {}{} from step {}, state from {whence}{meanwhile}{save}",
                of_workers(members.len()),
                shares(&members[..members.len() - learners]),
                grouped(start + 1)
            )
        }
        Event::Recovered { workers, took_ms, again, checkpoint, .. } => {
            let steps = match again {
                1 => "1 step".to_owned(),
                again => format!("{} steps", grouped(*again)),
            };
            let cost = match (checkpoint, again) {
                (_, 0) => "no step lost".to_owned(),
                (None, _) => format!("{steps} computed again"),
                (Some(step), _) => {
                    format!("went back to the checkpoint of step {}: {steps} lost", grouped(*step))
                }
            };
            let took = *took_ms as f64 / 1000.0;
            format!("ring re-formed with {} in {took:.2} s; {cost}", of_workers(*workers as usize))
        }
        Event::FellBack { step, reason } => format!(
            "the state after step {} is given up and the run goes back to its last checkpoint: {reason}",
            grouped(*step)
        ),
        Event::LeftOut { worker, machine, from, step, rest_ms, reason } => {
            let at = step.map_or(String::new(), |step| format!(" at step {}", grouped(step)));
            format!(
                "worker {} on {machine} is left out for {:.1} s{at}: it and worker {} do not reach one another ({reason})",
                short_digest(worker),
                *rest_ms as f64 / 1000.0,
                short_digest(from)
            )
        }
        Event::Slow { worker, machine, step, percent } => format!(
            "worker {} on {machine} is slow: its lanes take {} as long as the others' at step {}",
            short_digest(worker),
            times(f64::from(*percent) / 100.0),
            grouped(*step)
        ),
        Event::InStep { worker, step } => {
            format!(
                "worker {} is as fast as the others again, at step {}",
                short_digest(worker),
                grouped(*step)
            )
        }
        Event::Ended { outcome, reason } => {
            let reason = reason.as_deref().map(|reason| format!(": {reason}")).unwrap_or_default();
            format!("the coordinator ended the run: {outcome}{reason}")
        }
        Event::Stopped { step } => format!("stopped after {} steps", grouped(*step)),
        Event::Finished { step, weights } => {
            format!("finished after {} steps, weights {}", grouped(*step), short_digest(weights))
        }
    }
}

/// A number as people read it, of the text that has all its digits.
fn short_number(text: &str) -> String {
    text.parse().map_or_else(|_| text.to_owned(), |value: f64| format!("{value:.3}"))
}

/// Device and build in one line.
pub fn where_it_runs(environment: &Environment) -> String {
    let Environment { anello, revision, libtorch, device, threads, system } = environment;
    let revision = revision.as_deref().map(|revision| format!(" ({revision})")).unwrap_or_default();
    let threads = if *threads == 1 { "1 thread".to_owned() } else { format!("{threads} threads") };
    format!("{device}, {threads}, {system}; anello {anello}{revision}, libtorch {libtorch}")
}

/// `2.5 ×`
pub fn times(factor: f64) -> String {
    format!("{factor:.1} ×")
}

/// Enough of a digest to tell two apart.
pub fn short_digest(digest: &str) -> &str {
    digest.get(..12).unwrap_or(digest)
}

/// Two digests of data that are not the same, as manifests have them: the order of documents, or else what is in them.
pub fn other_data(before: &str, now: &str) -> String {
    let [(order, content), (other_order, other_content)] =
        [before, now].map(|digest| digest.split_once('+').unwrap_or((digest, "")));
    let told = |what: &str, before: &str, now: &str| {
        format!("{what}{} -> {what}{}", short_digest(before), short_digest(now))
    };
    match order == other_order {
        true => told("contents ", content, other_content),
        false => told("", order, other_order),
    }
}

/// ` (lanes 3+1)`, when they are not shared out evenly.
fn shares(members: &[RingMember]) -> String {
    let lanes: Vec<u32> =
        members.iter().map(|member| member.end_lane.saturating_sub(member.first_lane)).collect();
    match (lanes.iter().min(), lanes.iter().max()) {
        (Some(least), Some(most)) if most - least > 1 => {
            let lanes: Vec<String> = lanes.iter().map(u32::to_string).collect();
            format!(" (lanes {})", lanes.join("+"))
        }
        _ => String::new(),
    }
}

fn of_workers(number: usize) -> String {
    match number {
        1 => "1 worker".to_owned(),
        number => format!("{number} workers"),
    }
}

fn ordinal(number: u64) -> String {
    let suffix = match (number % 10, number % 100) {
        (_, 11..=13) => "th",
        (1, _) => "st",
        (2, _) => "nd",
        (3, _) => "rd",
        _ => "th",
    };
    format!("{number}{suffix}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_events_of_a_ring_read_as_sentences() {
        let worker = || "3f00000000000001".to_owned();
        let member = |first_lane| RingMember {
            worker: worker(),
            ring: vec!["10.0.0.1:1".into()],
            peers: vec!["10.0.0.1:2".into()],
            first_lane,
            end_lane: first_lane + 2,
        };
        let formed = |source: &str, holders, save_first| Event::Formed {
            generation: 7,
            start: 412,
            source: source.into(),
            holders,
            members: vec![member(0), member(2), member(4)],
            save_first,
        };
        let recovered = |again, checkpoint| {
            let took_ms = 214;
            Event::Recovered { generation: 7, workers: 3, took_ms, again, checkpoint }
        };
        let silent = || "silent for 1.000 s".to_owned();
        let ended = |outcome: &str, reason: Option<&str>| Event::Ended {
            outcome: outcome.into(),
            reason: reason.map(str::to_owned),
        };
        let cases = [
            (Event::TakenUp { step: None }, "a coordinator took the run up; there is no checkpoint yet"),
            (
                Event::TakenUp { step: Some(1200) },
                "a coordinator took the run up; the newest checkpoint is 1 200",
            ),
            (Event::Goal { goal: "pause".into(), workers: 1 }, "the user asks to pause, with 1 worker"),
            (Event::Goal { goal: "run".into(), workers: 3 }, "the user asks to train, with 3 workers"),
            (
                Event::Joined { worker: worker(), machine: "node-3".into() },
                "worker 3f0000000000 joined from node-3",
            ),
            (
                Event::Lost { worker: worker(), step: Some(412), reason: silent() },
                "worker 3f0000000000 lost (silent for 1.000 s) at step 412",
            ),
            (
                Event::Lost { worker: worker(), step: None, reason: silent() },
                "worker 3f0000000000 lost (silent for 1.000 s); it held no state",
            ),
            (
                Event::Broke {
                    worker: worker(),
                    generation: 4,
                    step: Some(412),
                    reason: "rank 1 sent a block with a wrong checksum".to_owned(),
                },
                "ring 4 broke after step 412: worker 3f0000000000 says: rank 1 sent a block with a wrong checksum",
            ),
            (
                Event::Evicted {
                    worker: worker(),
                    machine: "node-7".to_owned(),
                    step: Some(412),
                    reason: "block 3 differs".to_owned(),
                },
                "worker 3f0000000000 sent away after step 412 and machine node-7 quarantined: block 3 differs",
            ),
            (
                Event::Evicted {
                    worker: worker(),
                    machine: String::new(),
                    step: None,
                    reason: "block 3 differs".to_owned(),
                },
                "worker 3f0000000000 sent away: block 3 differs",
            ),
            (
                formed("peers", vec![worker()], false),
                "ring 7 formed with 3 workers from step 413, state from 1 worker",
            ),
            (
                Event::Formed {
                    generation: 8,
                    start: 412,
                    source: "peers".into(),
                    holders: vec![worker(), worker()],
                    members: vec![
                        RingMember { end_lane: 3, ..member(0) },
                        RingMember { end_lane: 4, ..member(3) },
                    ],
                    save_first: false,
                },
                "ring 8 formed with 2 workers (lanes 3+1) from step 413, state from 2 workers",
            ),
            (
                Event::Formed {
                    generation: 8,
                    start: 412,
                    source: "peers".into(),
                    holders: vec![worker()],
                    members: vec![
                        RingMember { end_lane: 4, ..member(0) },
                        RingMember { worker: "9a00000000000000".into(), end_lane: 4, ..member(4) },
                    ],
                    save_first: false,
                },
                "ring 8 formed with 2 workers from step 413, state from 1 worker, sent to 1 worker while the others train",
            ),
            (
                formed("checkpoint", Vec::new(), true),
                "ring 7 formed with 3 workers from step 413, state from checkpoint 412; a checkpoint comes first",
            ),
            (
                formed("seed", Vec::new(), false),
                "ring 7 formed with 3 workers from step 413, state from the run's seed",
            ),
            (
                Event::Slow { worker: worker(), machine: "node-3".into(), step: 412, percent: 253 },
                "worker 3f0000000000 on node-3 is slow: its lanes take 2.5 × as long as the others' at step 412",
            ),
            (
                Event::InStep { worker: worker(), step: 1412 },
                "worker 3f0000000000 is as fast as the others again, at step 1 412",
            ),
            (
                Event::LeftOut {
                    worker: worker(),
                    machine: "node-7".into(),
                    from: worker(),
                    step: Some(1412),
                    rest_ms: 40_000,
                    reason: "no answer from 10.0.0.7:4100".into(),
                },
                "worker 3f0000000000 on node-7 is left out for 40.0 s at step 1 412: it and worker 3f0000000000 do not reach \
                 one another (no answer from 10.0.0.7:4100)",
            ),
            (recovered(0, None), "ring re-formed with 3 workers in 0.21 s; no step lost"),
            (recovered(0, Some(412)), "ring re-formed with 3 workers in 0.21 s; no step lost"),
            (recovered(1, None), "ring re-formed with 3 workers in 0.21 s; 1 step computed again"),
            (recovered(2, None), "ring re-formed with 3 workers in 0.21 s; 2 steps computed again"),
            (
                recovered(12, Some(400)),
                "ring re-formed with 3 workers in 0.21 s; went back to the checkpoint of step 400: 12 steps lost",
            ),
            (ended("finished", None), "the coordinator ended the run: finished"),
            (ended("failed", Some("no data")), "the coordinator ended the run: failed: no data"),
        ];
        for (event, text) in cases {
            assert_eq!(describe(&event), text);
        }
    }

    #[test]
    fn events_read_as_sentences() {
        let environment = Environment {
            anello: "0.1.0".into(),
            revision: Some("abc".into()),
            libtorch: "2.11.0".into(),
            device: "A CPU".into(),
            threads: 1,
            system: "linux x86_64".into(),
        };
        let three = |key: &str, before: &str, now: &str| (key.to_owned(), before.to_owned(), now.to_owned());
        let changed = vec![three("seed", "1", "2")];
        let data = vec![
            three("docs", "0123456789abcdef+aa", "fedcba9876543210+bb"),
            three("code", "0123456789abcdef+0123456789abcdef", "0123456789abcdef+fedcba9876543210"),
            three("gone", "0123456789abcdef", "absent"),
        ];
        let cases = [
            (
                Event::Started { step: 1200, environment, changed, data },
                "resumed after step 1 200 on A CPU, 1 thread, linux x86_64; anello 0.1.0 (abc), libtorch 2.11.0\n  changed: seed: 1 -> 2\n  \
                 changed: data of docs: 0123456789ab -> fedcba987654\n  \
                 changed: data of code: contents 0123456789ab -> contents fedcba987654\n  \
                 changed: data of gone: 0123456789ab -> absent",
            ),
            (
                Event::Spike {
                    step: 1300,
                    loss: "6.123456".into(),
                    median: "2.5".into(),
                    limit: "2.75".into(),
                    skipped: true,
                    back_to: None,
                },
                "the loss of step 1 300 is a spike: 6.123, above 2.750, where the median is 2.500; its update was left out",
            ),
            (
                Event::Spike {
                    step: 1300,
                    loss: "6.123456".into(),
                    median: "2.5".into(),
                    limit: "2.75".into(),
                    skipped: true,
                    back_to: Some(1290),
                },
                "the loss of step 1 300 is a spike: 6.123, above 2.750, where the median is 2.500; the run goes on from its \
                 state after 1 290 steps, and leaves out the batches of steps 1 290 to 1 300",
            ),
            (
                Event::Epoch { step: 7, source: "docs".into(), epoch: 1 },
                "source docs is in its 2nd epoch, from step 7",
            ),
            (
                Event::Skipped { step: 3, loss: "NaN".into() },
                "step 3 was skipped: it was not finite (loss NaN)",
            ),
            (
                Event::Finished { step: 640, weights: "0123456789abcdef".into() },
                "finished after 640 steps, weights 0123456789ab",
            ),
        ];
        for (event, text) in cases {
            assert_eq!(describe(&event), text);
        }
        assert_eq!(
            [1, 2, 3, 4, 11, 12, 13, 21, 102, 111].map(ordinal).join(" "),
            "1st 2nd 3rd 4th 11th 12th 13th 21st 102nd 111th"
        );
    }
}
