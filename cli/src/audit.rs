//! `anello audit`: is a run what its record says?

use std::time::Duration;

use anello_configs::ComputeDevice;
use anello_worker::audit::{self, Compared, Findings, Options, Progress, Verdict};
use indicatif::ProgressBar;

use crate::difference::{checkpoints_of, place, steps_of, told, values};
use crate::failure::{Exit, Failure, Outcome};
use crate::place::open_run;
use crate::screen::Screen;
use crate::text::grouped;

/// Arguments of `anello audit`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The folder of the run. It may be going on.
    run: String,
    /// The steps to compute again: A and all after it below B (default: all that were logged). It begins from the last
    /// checkpoint at or before A.
    #[arg(long, value_name = "A..B", value_parser = read_steps)]
    steps: Option<(u64, u64)>,
    /// Stretches between checkpoints that are computed at the same time; each takes the memory of a run.
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u32).range(1..=1024))]
    workers: u32,
    /// CPU threads of LibTorch for each of them (default: all cores, shared out). The result does not depend on it.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    threads: Option<u32>,
    /// What to compute on: cpu, cuda or cuda:N (default: `compute.device` of the run's config; its bits hold for one kind of device).
    #[arg(long, value_name = "DEVICE")]
    device: Option<ComputeDevice>,
    /// Where the data of a source (or held-out set) lies now, if not where the run's config says: `tales=s3://moved/tales`. May
    /// be given again. Other data than the run was trained on is refused.
    #[arg(long, value_name = "NAME=URL", value_parser = read_place)]
    data: Vec<(String, String)>,
    /// All that was found, as one JSON object.
    #[arg(long)]
    json: bool,
}

fn read_place(text: &str) -> Result<(String, String), String> {
    let place = text.split_once('=').filter(|(name, url)| !name.is_empty() && !url.is_empty());
    let place = place.map(|(name, url)| (name.to_owned(), url.to_owned()));
    place.ok_or_else(|| "give the name of a source and its place, as tales=s3://moved/tales".to_owned())
}

fn read_steps(text: &str) -> Result<(u64, u64), String> {
    let steps = text.split_once("..").and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    steps.ok_or_else(|| "give the first step and the one after the last, as 100..200".to_owned())
}

/// `anello audit`
pub fn run(args: &Args, screen: &Screen) -> Outcome {
    let store = open_run(&args.run)?;
    let options = Options {
        steps: args.steps,
        workers: args.workers,
        threads: args.threads,
        device: args.device,
        data: args.data.clone(),
    };
    let mut bar: Option<ProgressBar> = None;
    let findings = audit::audit(&store, &options, &mut |progress| show(progress, &mut bar, screen))?;
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    screen.print(&match args.json {
        true => serde_json::to_string_pretty(&findings).expect("findings have string keys") + "\n",
        false => story(&findings),
    })?;
    match findings.verdict {
        Verdict::Confirmed => Ok(Exit::Done),
        Verdict::Refuted => Ok(Exit::No),
        Verdict::Incomplete => Err(Failure::Usage(
            "nothing contradicts the record, and not all of it could be checked; restore what is missing, then audit \
             again"
                .into(),
        )),
    }
}

fn show(progress: Progress, bar: &mut Option<ProgressBar>, screen: &Screen) {
    if let Progress::Computing { done, steps } = progress {
        let bar = bar.get_or_insert_with(|| {
            let bar =
                screen.add(steps, "computing again  {bar:30.cyan/dim}  step {pos} of {len}  {eta} left");
            bar.enable_steady_tick(Duration::from_millis(250));
            bar
        });
        bar.set_position(done);
    }
}

/// The answer first, then what contradicts, then what was done.
fn story(findings: &Findings) -> String {
    let mut lines = headline(findings);
    for contradiction in &findings.contradictions {
        lines.push(format!("on record: {}", contradiction.fact));
    }
    if findings.verdict == Verdict::Refuted && findings.difference.is_some() {
        lines.push(reason(findings).to_owned());
    }
    lines.push(told(&findings.run));
    lines.push(compared(findings));
    if findings.elsewhere() {
        let (device, build) = &findings.here;
        let there = format!("{}; {}", findings.run.devices.join(" and "), findings.run.builds.join(" and "));
        lines.push(format!("trained on {there}"));
        lines.push(format!("computed on {device}; {build}"));
    }
    lines.extend(findings.unchecked.iter().map(|what| format!("not checked: {what}")));
    lines.extend(findings.notes.iter().map(|note| format!("note: {note}")));
    lines.join("\n") + "\n"
}

fn headline(findings: &Findings) -> Vec<String> {
    let Findings { run, asked: [first, end], .. } = findings;
    let steps = match end - first {
        1 => format!("step {}", grouped(*first)),
        _ => format!("steps {} to {}", grouped(*first), grouped(end - 1)),
    };
    let place_of_run = &run.place;
    match (findings.verdict, &findings.difference) {
        (Verdict::Confirmed, _) => {
            vec![format!("{place_of_run} is what its record says: {steps} come out bit for bit")]
        }
        (Verdict::Incomplete, _) => vec![format!("{place_of_run} could not be checked in full: {steps}")],
        (Verdict::Refuted, Some(first)) => {
            let told = format!("{place_of_run} is not what its record says: it differs {}", place(first));
            [vec![told], values(first, ["on record", "computed here"])].concat()
        }
        (Verdict::Refuted, None) => vec![format!("{place_of_run} contradicts itself")],
    }
}

/// What may be the cause of a step that does not come out.
fn reason(findings: &Findings) -> &'static str {
    if !findings.contradictions.is_empty() {
        "what contradicts above explains it, or hides the cause: mend it, then audit again"
    } else if findings.elsewhere() {
        "it was trained by another kind of device or another build, for which alone its bits hold: audit it there"
    } else {
        "config and data are those of the run: the record was changed, or a machine computed wrongly"
    }
}

fn compared(findings: &Findings) -> String {
    let Findings { from, checkpoint, compared, .. } = findings;
    let Compared { steps, digests, checkpoints, .. } = compared;
    let whence = match checkpoint {
        true => format!("checkpoint {}", grouped(*from)),
        false => "the initial weights".to_owned(),
    };
    format!(
        "computed again: {} from {whence}, against the figures of each, {} of the weights and {}",
        steps_of(*steps),
        match digests {
            1 => "1 digest".to_owned(),
            digests => format!("{} digests", grouped(*digests)),
        },
        checkpoints_of(checkpoints.len()),
    )
}

#[cfg(test)]
mod tests {
    use anello_worker::audit::{Contradiction, Subject};
    use anello_worker::bisect::{Difference, Figure, Phase, Told};

    use super::*;

    fn findings(verdict: Verdict) -> Findings {
        Findings {
            verdict,
            run: Told {
                place: "runs/a".to_owned(),
                logged: 31,
                checkpoints: vec![4, 14, 31],
                devices: vec!["A CPU".to_owned()],
                builds: vec!["anello 0.1.0".to_owned()],
            },
            asked: [5, 31],
            from: 4,
            checkpoint: true,
            compared: Compared { steps: 27, figures: 27, digests: 3, checkpoints: vec![14, 31] },
            contradictions: Vec::new(),
            difference: None,
            unchecked: Vec::new(),
            here: ("A CPU".to_owned(), "anello 0.1.0".to_owned()),
            notes: Vec::new(),
        }
    }

    #[test]
    fn the_answer_comes_first() {
        assert_eq!(
            story(&findings(Verdict::Confirmed)),
            "runs/a is what its record says: steps 5 to 30 come out bit for bit
runs/a: 31 steps logged, 3 checkpoints from 4 to 31
computed again: 27 steps from checkpoint 4, against the figures of each, 3 digests of the weights and 2 checkpoints
"
        );
    }

    #[test]
    fn a_difference_is_told_with_what_may_be_its_cause() {
        let mut found = findings(Verdict::Refuted);
        let figure = Figure { name: "loss".to_owned(), values: ["6.5".to_owned(), "6.25".to_owned()] };
        found.difference = Some(Difference {
            step: 9,
            phase: Phase::Forward,
            checkpoint: None,
            lane: None,
            figures: vec![figure],
            blocks: None,
        });
        let first = "runs/a is not what its record says: it differs at step 9, in the losses
  loss: 6.5 on record, 6.25 computed here
";
        let text = story(&found);
        assert!(text.starts_with(&format!("{first}config and data are those of the run: ")), "{text}");
        found.run.devices.push("Another CPU".to_owned());
        let text = story(&found);
        assert!(text.contains("\nit was trained by another kind of device"), "{text}");
        assert!(
            text.contains("\ntrained on A CPU and Another CPU; anello 0.1.0\ncomputed on A CPU;"),
            "{text}"
        );
        let fact = "runs/a/config.toml is the config 1, checkpoint 14 was trained with 2".to_owned();
        found.contradictions.push(Contradiction { subject: Subject::Config, step: Some(14), fact });
        let text = story(&found);
        assert!(text.starts_with(&format!("{first}on record: runs/a/config.toml is")), "{text}");
        assert!(text.contains("\nwhat contradicts above explains it"), "{text}");
    }

    #[test]
    fn steps_are_two_numbers() {
        assert_eq!(read_steps("100..200"), Ok((100, 200)));
        for wrong in ["", "7", "7..", "..7", "a..b", "1...3", "-1..4"] {
            assert!(read_steps(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_place_has_a_name() {
        let place = |name: &str, url: &str| Ok((name.to_owned(), url.to_owned()));
        assert_eq!(read_place("a=s3://b/c=d"), place("a", "s3://b/c=d"));
        for wrong in ["", "a", "a=", "=a"] {
            assert!(read_place(wrong).is_err(), "{wrong}");
        }
    }
}
