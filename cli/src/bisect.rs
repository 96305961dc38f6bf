//! `anello bisect`: why are two runs not the same?

use std::time::Duration;

use anello_configs::ComputeDevice;
use anello_worker::bisect::{
    self, Difference, Findings, Options, Phase, Progress, Records, Replay, Replayed, SourceDifference, Told,
    Verdict,
};
use indicatif::ProgressBar;

use crate::difference::{FIGURES_SHOWN, block, checkpoints_of, place, steps_of, told, values};
use crate::failure::{Exit, Failure, Outcome};
use crate::place::open_run;
use crate::screen::Screen;
use crate::text::grouped;

/// Arguments of `anello bisect`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The folder of a run, called A. It may be going on.
    #[arg(value_name = "RUN_A")]
    a: String,
    /// The folder of the run that should be the same, called B.
    #[arg(value_name = "RUN_B")]
    b: String,
    /// Only read what is in the folders; compute nothing again.
    #[arg(long)]
    read_only: bool,
    /// All that was found, as one JSON object.
    #[arg(long)]
    json: bool,
    /// What to compute on: cpu, cuda or cuda:N (default: `compute.device` of A's config).
    #[arg(long, value_name = "DEVICE", conflicts_with = "read_only")]
    device: Option<ComputeDevice>,
    /// CPU threads of LibTorch (default: all cores). The result does not depend on it.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    threads: Option<u32>,
}

/// Keys of the configs that are told one by one.
const KEYS_SHOWN: usize = 12;

/// `anello bisect`
pub fn run(args: &Args, screen: &Screen) -> Outcome {
    let (a, b) = (open_run(&args.a)?, open_run(&args.b)?);
    if let Some(threads) = args.threads {
        tch::set_num_threads(threads as i32);
    }
    let options = Options { read_only: args.read_only, device: args.device };
    let mut bar: Option<ProgressBar> = None;
    let findings = bisect::bisect(&a, &b, options, &mut |progress| show(progress, &mut bar, screen))?;
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    let text = match args.json {
        true => serde_json::to_string_pretty(&findings).expect("findings have string keys") + "\n",
        false => story(&findings),
    };
    screen.print(&text)?;
    match findings.verdict {
        Verdict::Equal => Ok(Exit::Done),
        Verdict::Unknown => Err(Failure::Usage(
            "what could be read is equal, and not all could be read; restore it, then compare again".into(),
        )),
        Verdict::NothingToCompare => Err(Failure::Usage(
            "there is no step and no checkpoint that both have; let both train some steps first".into(),
        )),
        _ => Ok(Exit::No),
    }
}

fn show(progress: Progress, bar: &mut Option<ProgressBar>, screen: &Screen) {
    if let Progress::Replaying { done, steps } = progress {
        let bar = bar.get_or_insert_with(|| {
            let template = "computing both again  {bar:30.cyan/dim}  step {pos} of at most {len}  {eta} left";
            let bar = screen.add(steps, template);
            bar.enable_steady_tick(Duration::from_millis(250));
            bar
        });
        bar.set_length(steps);
        bar.set_position(done);
    }
}

/// The answer first, then why, then how it was found.
fn story(findings: &Findings) -> String {
    let mut lines = headline(findings);
    lines.extend(why(findings));
    lines.push(format!("A  {}", told(&findings.a)));
    lines.push(format!("B  {}", told(&findings.b)));
    lines.push(on_record(&findings.records));
    lines.extend(again(findings));
    lines.extend(places(findings));
    lines.extend(findings.notes.iter().map(|note| format!("note: {note}")));
    lines.join("\n") + "\n"
}

fn headline(findings: &Findings) -> Vec<String> {
    let (a, b) = (&findings.a.place, &findings.b.place);
    let Records { steps, equal_checkpoints, .. } = &findings.records;
    let common = format!("{} and {}", steps_of(*steps), checkpoints_of(equal_checkpoints.len()));
    let first = findings.first();
    let mut lines = vec![match (findings.verdict, first) {
        (Verdict::Equal, _) => format!("{a} and {b} are equal in all that both have: {common}"),
        (Verdict::EqualSoFar, _) => {
            format!("{a} and {b} are equal so far, and are not the same run: {common}")
        }
        (Verdict::Unknown, _) => format!("{a} and {b} are equal in what could be read: {common}"),
        (Verdict::NothingToCompare, _) => format!("{a} and {b} have nothing in common yet"),
        (Verdict::OffRecordA, Some(first)) => off_record("A", first),
        (Verdict::OffRecordB, Some(first)) => off_record("B", first),
        (Verdict::OffRecordBoth, Some(first)) => {
            format!("neither record is what this machine computes: {}", place(first))
        }
        (Verdict::Elsewhere, Some(first)) => {
            format!("{a} and {b} differ, and this machine computes neither of them: {}", place(first))
        }
        (Verdict::Recorded | Verdict::Inputs, Some(first)) => format!("{a} and {b} part {}", place(first)),
        (_, None) => format!("{a} and {b} differ"),
    }];
    let names = match findings.verdict {
        Verdict::Recorded | Verdict::Inputs => ["in A", "in B"],
        _ => ["on record", "computed here"],
    };
    lines.extend(first.into_iter().flat_map(|first| values(first, names)));
    lines
}

fn off_record(run: &str, first: &Difference) -> String {
    format!("the record of {run} is not what this machine computes: {}", place(first))
}

/// What explains it.
fn why(findings: &Findings) -> Vec<String> {
    let mut lines = Vec::new();
    if !findings.config.is_empty() {
        let at = match findings.configs_part_at {
            Some(step) => format!("they make another step of step {} on", grouped(step)),
            None => "they make the same steps all the same".to_owned(),
        };
        lines.push(format!("their configs differ; {at}:"));
        for key in findings.config.iter().take(KEYS_SHOWN) {
            let [a, b] = key.values.each_ref().map(|value| value.as_deref().unwrap_or("absent"));
            let from = match key.from {
                0 => String::new(),
                step => format!(", from step {} on", grouped(step)),
            };
            lines.push(format!("  {}: {a} in A, {b} in B{from}", key.key));
        }
        let more = findings.config.len().saturating_sub(KEYS_SHOWN);
        if more > 0 {
            lines.push(format!("  and {more} more keys; --json has all"));
        }
    }
    if !findings.data.is_empty() {
        let told = |difference: &SourceDifference| match difference.from {
            0 => difference.source.clone(),
            from => format!("{} from step {}", difference.source, grouped(from)),
        };
        let sources: Vec<String> = findings.data.iter().map(told).collect();
        lines.push(format!("they were trained on other data: {}", sources.join(", ")));
    }
    match findings.verdict {
        Verdict::Inputs => lines.extend(why_inputs(findings)),
        Verdict::OffRecordA => lines.extend(why_off_record(findings, ("A", &findings.a), Some("B"))),
        Verdict::OffRecordB => lines.extend(why_off_record(findings, ("B", &findings.b), Some("A"))),
        Verdict::OffRecordBoth => {
            lines.extend(why_off_record(findings, ("A", &findings.a), None));
            lines.extend(why_off_record(findings, ("B", &findings.b), None));
        }
        Verdict::Elsewhere => lines.push(
            "both were computed by another kind of device or another build, for which alone their bits hold: \
             bisect there, or compare the records with --read-only"
                .to_owned(),
        ),
        Verdict::Recorded if findings.replay == Replay::NotWanted => {
            lines.push("--read-only was given: without it both are computed again, which tells phase and lane".to_owned());
        }
        Verdict::Equal
        | Verdict::EqualSoFar
        | Verdict::Unknown
        | Verdict::NothingToCompare
        | Verdict::Recorded => {}
    }
    lines
}

/// Both come out different on one machine, and their configs may be equal.
fn why_inputs(findings: &Findings) -> Option<String> {
    let explained =
        findings.configs_part_at.zip(findings.first()).is_some_and(|(at, first)| at <= first.step);
    if explained {
        return None;
    }
    Some(match findings.first().map(|first| first.phase) {
        Some(Phase::Batch) => "no key of the configs explains it: the data that they read differ".to_owned(),
        _ => "neither configs nor batches explain it: this is a defect of Anello; please report it with both folders"
            .to_owned(),
    })
}

/// One machine computes the same for both, and the record of `run` says otherwise; that of `other` does not.
fn why_off_record(findings: &Findings, run: (&str, &Told), other: Option<&str>) -> Vec<String> {
    let Some(Replayed { here: (device, build), from, checkpoint, to, .. }) = findings.replayed() else {
        return Vec::new();
    };
    let (name, told) = run;
    let same = |known: &[String], here: &String| known.iter().all(|one| one == here);
    let agrees = match other {
        Some(other) => {
            format!("this machine computes the same for both, and that is the record of {other}: ")
        }
        None => String::new(),
    };
    let reason = if same(&told.devices, device) && same(&told.builds, build) {
        "was computed wrongly by a machine, or changed behind its back"
    } else {
        "was computed by another kind of device or another build, or wrongly"
    };
    let known = match checkpoint {
        true => format!("checkpoint {}", grouped(*from)),
        false => "the seed".to_owned(),
    };
    vec![format!("{agrees}{name} {reason}, between {known} and step {}", grouped(to - 1))]
}

fn on_record(records: &Records) -> String {
    let Records { steps, figures, equal_checkpoints, checkpoint } = records;
    let figures = match figures {
        Some(figures) => {
            let names: Vec<&str> = figures.figures.iter().map(|figure| figure.name.as_str()).collect();
            let more = if names.len() > FIGURES_SHOWN { ", …" } else { "" };
            let names = names.iter().take(FIGURES_SHOWN).copied().collect::<Vec<_>>().join(", ");
            format!("the first that differs is {} ({names}{more})", grouped(figures.step))
        }
        None => "no figure differs".to_owned(),
    };
    let checkpoints = match checkpoint {
        Some(difference) => {
            let blocks = difference.blocks.as_ref().map(|blocks| format!(" ({})", block(blocks)));
            format!(
                "{} differs{}",
                grouped(difference.checkpoint.unwrap_or(difference.step)),
                blocks.unwrap_or_default()
            )
        }
        None => "none differs".to_owned(),
    };
    let equal = match equal_checkpoints.last() {
        None => "no checkpoint in both is equal".to_owned(),
        Some(last) => {
            format!("{} in both equal, up to {}", checkpoints_of(equal_checkpoints.len()), grouped(*last))
        }
    };
    format!("on record: {} in both, {figures}; {equal}; {checkpoints}", steps_of(*steps))
}

fn again(findings: &Findings) -> Option<String> {
    if let Replay::Impossible { reason } = &findings.replay {
        return Some(format!("they could not be computed again: {reason}"));
    }
    let Replayed { from, checkpoint, to, off_record, .. } = findings.replayed()?;
    let whence = match checkpoint {
        true => format!("checkpoint {}", grouped(*from)),
        false => "their seeds".to_owned(),
    };
    let records = match off_record {
        [None, None] => "; both come out as they are on record",
        _ => "",
    };
    Some(format!("computed again: {} of both, from {whence}{records}", steps_of(to - from)))
}

/// Where they were trained, when that is not one kind of device and one build.
fn places(findings: &Findings) -> Vec<String> {
    let mut all = vec![
        ("A".to_owned(), findings.a.devices.clone(), findings.a.builds.clone()),
        ("B".to_owned(), findings.b.devices.clone(), findings.b.builds.clone()),
    ];
    if let Some(Replayed { here: (device, build), .. }) = findings.replayed() {
        all.push(("here".to_owned(), vec![device.clone()], vec![build.clone()]));
    }
    let differ = all.iter().any(|(_, devices, builds)| (devices, builds) != (&all[0].1, &all[0].2));
    let shown = |(who, devices, builds): &(String, Vec<String>, Vec<String>)| {
        format!("trained on, {who}: {}; {}", devices.join(" and "), builds.join(" and "))
    };
    if differ { all.iter().map(shown).collect() } else { Vec::new() }
}

#[cfg(test)]
mod tests {
    use anello_worker::bisect::{Blocks, Element, Figure, KeyDifference};

    use super::*;

    fn told_of(place: &str) -> Told {
        Told {
            place: place.to_owned(),
            logged: 31,
            checkpoints: vec![4, 14, 31],
            devices: vec!["A CPU".to_owned()],
            builds: vec!["anello 0.1.0".to_owned()],
        }
    }

    fn findings(verdict: Verdict) -> Findings {
        Findings {
            verdict,
            a: told_of("runs/a"),
            b: told_of("runs/b"),
            config: Vec::new(),
            configs_part_at: None,
            data: Vec::new(),
            records: Records { steps: 31, equal_checkpoints: vec![4, 14, 31], ..Records::default() },
            replay: Replay::NotNeeded,
            notes: Vec::new(),
        }
    }

    fn figure(name: &str, a: &str, b: &str) -> Figure {
        Figure { name: name.to_owned(), values: [a.to_owned(), b.to_owned()] }
    }

    fn difference(step: u64, phase: Phase, checkpoint: Option<u64>) -> Difference {
        Difference { step, phase, checkpoint, lane: None, figures: Vec::new(), blocks: None }
    }

    fn one_element(buffer: &'static str) -> Blocks {
        let element = Element {
            tensor: "lm_head.weight".to_owned(),
            index: vec![0, 7],
            values: ["0.5".to_owned(), "0.25".to_owned()],
            differ: 1,
            max_abs: 0.25,
        };
        let tensors = vec!["model.layers.0.mlp.down_proj.weight".to_owned(), "lm_head.weight".to_owned()];
        Blocks { buffer, block: 3, differ: 2, tensors, element: Some(element) }
    }

    fn replayed(differs: Option<Difference>, off_record: [Option<Difference>; 2]) -> Replay {
        let here = ("A CPU".to_owned(), "anello 0.1.0".to_owned());
        Replay::Done(Box::new(Replayed { from: 4, checkpoint: true, to: 14, differs, off_record, here }))
    }

    #[test]
    fn equal_runs_take_no_more_words_than_that() {
        assert_eq!(
            story(&findings(Verdict::Equal)),
            "runs/a and runs/b are equal in all that both have: 31 steps and 3 checkpoints
A  runs/a: 31 steps logged, 3 checkpoints from 4 to 31
B  runs/b: 31 steps logged, 3 checkpoints from 4 to 31
on record: 31 steps in both, no figure differs; 3 checkpoints in both equal, up to 31; none differs
"
        );
    }

    #[test]
    fn the_answer_comes_first_and_the_reason_next() {
        let mut found = findings(Verdict::Inputs);
        let key = |key: &str, a: Option<&str>, b: Option<&str>| KeyDifference {
            from: 0,
            key: key.to_owned(),
            values: [a.map(str::to_owned), b.map(str::to_owned)],
        };
        found.config = vec![key("stage.stable.lr", Some("0.001"), Some("0.002"))];
        found.config.push(KeyDifference { from: 13, ..key("stage.stable.lr_warmup", None, Some("0.1")) });
        found.configs_part_at = Some(13);
        found.records.equal_checkpoints = vec![4];
        let mut figures = difference(13, Phase::Update, None);
        figures.figures = vec![figure("lr", "0.001", "0.002")];
        found.records.figures = Some(figures.clone());
        found.records.checkpoint = Some(Difference {
            blocks: Some(one_element("weights")),
            ..difference(13, Phase::Update, Some(14))
        });
        figures.blocks = Some(one_element("weights"));
        found.replay = replayed(Some(figures), [None, None]);
        found.b.devices.push("Another CPU".to_owned());
        found.notes = vec!["something odd".to_owned()];
        assert_eq!(
            story(&found),
            "runs/a and runs/b part at step 13, in the update: weights, block 3 (lm_head.weight), and in 1 more block
  lm_head.weight[0, 7]: 0.5 in A, 0.25 in B; 1 element of the block differs, max |Δ| 2.500e-1
  lr: 0.001 in A, 0.002 in B
their configs differ; they make another step of step 13 on:
  stage.stable.lr: 0.001 in A, 0.002 in B
  stage.stable.lr_warmup: absent in A, 0.1 in B, from step 13 on
A  runs/a: 31 steps logged, 3 checkpoints from 4 to 31
B  runs/b: 31 steps logged, 3 checkpoints from 4 to 31
on record: 31 steps in both, the first that differs is 13 (lr); 1 checkpoint in both equal, up to 4; 14 differs (weights, block 3 (lm_head.weight), and in 1 more block)
computed again: 10 steps of both, from checkpoint 4; both come out as they are on record
trained on, A: A CPU; anello 0.1.0
trained on, B: A CPU and Another CPU; anello 0.1.0
trained on, here: A CPU; anello 0.1.0
note: something odd
"
        );
    }

    #[test]
    fn a_record_that_is_wrong_is_named_with_what_is_known_to_be_right() {
        let mut found = findings(Verdict::OffRecordB);
        let mut wrong = difference(13, Phase::Update, Some(14));
        wrong.blocks = Some(Blocks { differ: 1, ..one_element("exp_avg") });
        found.replay = replayed(None, [None, Some(wrong.clone())]);
        let text = story(&found);
        let first = "the record of B is not what this machine computes: by checkpoint 14: exp_avg, block 3 (lm_head.weight)
  lm_head.weight[0, 7]: 0.5 on record, 0.25 computed here; 1 element of the block differs, max |Δ| 2.500e-1
this machine computes the same for both, and that is the record of A: B was computed wrongly by a machine, or changed behind its back, between checkpoint 4 and step 13
A  ";
        assert!(text.starts_with(first), "{text}");

        found.b.devices = vec!["Another CPU".to_owned()];
        let text = story(&found);
        assert!(
            text.contains("B was computed by another kind of device or another build, or wrongly"),
            "{text}"
        );

        (found.verdict, found.replay) =
            (Verdict::OffRecordBoth, replayed(None, [Some(wrong.clone()), Some(wrong)]));
        let text = story(&found);
        assert!(text.starts_with("neither record is what this machine computes: by checkpoint 14"), "{text}");
        assert!(
            text.contains("\nA was computed wrongly by a machine")
                && text.contains("\nB was computed by another"),
            "{text}"
        );
    }

    #[test]
    fn a_batch_that_no_key_explains_is_put_down_to_the_data_and_all_else_to_us() {
        let mut found = findings(Verdict::Inputs);
        let batch = Difference {
            lane: Some(2),
            figures: vec![figure("micro-batch 0, row 1, token 5, id", "17", "18")],
            ..difference(9, Phase::Batch, None)
        };
        found.replay = replayed(Some(batch.clone()), [None, None]);
        let text = story(&found);
        let first = "runs/a and runs/b part at step 9, in the batch of lane 2
  micro-batch 0, row 1, token 5, id: 17 in A, 18 in B
no key of the configs explains it: the data that they read differ
";
        assert!(text.starts_with(first), "{text}");
        found.replay = replayed(Some(Difference { phase: Phase::Gradient, ..batch }), [None, None]);
        assert!(story(&found).contains("this is a defect of Anello; please report it"), "{}", story(&found));
    }
}
