//! `anello checkpoint list | verify | diff`; for those that change a store see `prune`, for one that is asked for `now`.

mod now;
mod prune;

use anello_store::checkpoint::{self, Manifest};
use anello_store::{Error, Store, read_config};
use anello_worker::checkpoint::{Comparison, compare};

use crate::failure::{Exit, Failure, Outcome};
use crate::place::{CheckpointName, none_yet, open_run};
use crate::screen::Screen;
use crate::text::{Table, bytes, grouped};
use anello_store::words::short_digest;

/// Blocks that a diff tells of one by one.
const BLOCKS_SHOWN: usize = 20;

/// Subcommands of `anello checkpoint`.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// List the checkpoints of a run.
    List {
        /// The folder of the run.
        run: String,
    },
    /// Read every byte of checkpoints and say exactly what is broken. Exit code 1 when something is.
    Verify {
        /// RUN: all of its checkpoints; RUN@STEP: that one.
        #[arg(value_name = "RUN[@STEP]")]
        name: CheckpointName,
    },
    /// Say in which blocks two checkpoints differ. Exit code 0: they are equal; 1: they differ.
    Diff {
        /// The newest of the run unless a step is given.
        #[arg(value_name = "RUN[@STEP]")]
        a: CheckpointName,
        /// The other one.
        #[arg(value_name = "RUN[@STEP]")]
        b: CheckpointName,
        /// Tell of every block.
        #[arg(long)]
        all: bool,
    },
    /// Ask a coordinator for a checkpoint of a job at its next step, beside those that its config asks for, and wait until it is
    /// there. The ring goes on; the result does not depend on it.
    Now(now::Args),
    /// Remove old checkpoints of a run, as its config says unless told otherwise, and parts that no checkpoint names. The
    /// newest two stay, and the newest that is whole: it is read to the last byte before anything goes.
    Prune {
        /// The folder of the run.
        run: String,
        /// Keep so many of the newest.
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
        keep_last: Option<u32>,
        /// Keep those whose step is a multiple of this.
        #[arg(long, value_name = "M", value_parser = clap::value_parser!(u64).range(1..))]
        keep_every: Option<u64>,
        /// Say what would go, and remove nothing.
        #[arg(long)]
        dry_run: bool,
    },
    /// Copy a checkpoint to another place, of whatever kind, where a run can then go on from it. What is there already is not
    /// sent again.
    Copy {
        /// The newest of the run unless a step is given.
        #[arg(value_name = "RUN[@STEP]")]
        name: CheckpointName,
        /// A place that is empty, or holds an earlier or unfinished copy of the same run.
        to: String,
    },
}

/// `anello checkpoint`
pub fn run(command: &Command, screen: &Screen) -> Outcome {
    match command {
        Command::List { run } => list(run, screen),
        Command::Verify { name } => verify(name, screen),
        Command::Now(args) => now::now(args, screen),
        Command::Prune { run, keep_last, keep_every, dry_run } => {
            prune::prune(run, *keep_last, *keep_every, *dry_run, screen)
        }
        Command::Copy { name, to } => prune::copy(name, to, screen),
        Command::Diff { a, b, all } => diff(a, b, if *all { usize::MAX } else { BLOCKS_SHOWN }, screen),
    }
}

fn list(run: &str, screen: &Screen) -> Outcome {
    let store = open_run(run)?;
    let steps = checkpoint::steps(&store)?;
    if steps.is_empty() {
        return Err(none_yet(&store));
    }
    let mut table = Table::new(0);
    table.row(["step", "stage", "tokens", "stage end", "weights", "parts", "size", "of it new"]);
    for step in steps {
        match checkpoint::read_manifest(&store, step) {
            Ok(manifest) => table.row(row(&manifest)),
            Err(Error::Checkpoint { fact, .. }) => table.row([grouped(step), fact]),
            Err(other) => return Err(other.into()),
        };
    }
    screen.print(&table.render())?;
    Ok(Exit::Done)
}

fn row(manifest: &Manifest) -> [String; 8] {
    [
        grouped(manifest.step),
        manifest.stage.clone(),
        grouped(manifest.tokens),
        if manifest.stage_end { "yes" } else { "" }.to_owned(),
        short_digest(&manifest.weights).to_owned(),
        manifest.parts.len().to_string(),
        bytes(size(manifest)),
        bytes(manifest.parts.iter().filter(|part| part.step.is_none()).map(|part| part.bytes).sum()),
    ]
}

fn size(manifest: &Manifest) -> u64 {
    manifest.parts.iter().map(|part| part.bytes).sum()
}

fn verify(name: &CheckpointName, screen: &Screen) -> Outcome {
    let store = open_run(&name.run)?;
    let steps = match name.step {
        Some(step) => vec![step],
        None => checkpoint::steps(&store)?,
    };
    if steps.is_empty() {
        return Err(none_yet(&store));
    }
    let mut broken = 0;
    for &step in &steps {
        match checkpoint::verify(&store, step) {
            Ok(manifest) => screen.line(&format!(
                "checkpoint {}: whole; {} parts, {}, weights {}",
                grouped(step),
                manifest.parts.len(),
                bytes(size(&manifest)),
                short_digest(&manifest.weights)
            ))?,
            Err(damaged @ Error::Checkpoint { .. }) => {
                broken += 1;
                screen.line(&damaged.to_string())?;
            }
            Err(other) => return Err(other.into()),
        }
    }
    if broken == 0 {
        return Ok(Exit::Done);
    }
    screen.line(&format!(
        "{broken} of {} checkpoints cannot be used; resuming passes over them",
        steps.len()
    ))?;
    Ok(Exit::No)
}

fn diff(a: &CheckpointName, b: &CheckpointName, shown: usize, screen: &Screen) -> Outcome {
    let (in_a, in_b) = (a.open()?, b.open()?);
    let (config_a, config_b) = (read_config(&in_a.0)?, read_config(&in_b.0)?);
    if config_a.model != config_b.model {
        return Err(Failure::Usage(format!(
            "the models of {} and {} have other sizes; compare runs of one model",
            a.run, b.run
        )));
    }
    let named = |(store, step): &(Store, u64)| format!("{}@{step}", store.place());
    let comparison = compare((&in_a.0, in_a.1), (&in_b.0, in_b.1), &config_a.model)?;
    screen.print(&told(&comparison, &named(&in_a), &named(&in_b), shown))?;
    Ok(if comparison.differences.is_empty() && comparison.facts.is_empty() { Exit::Done } else { Exit::No })
}

/// The comparison in words.
fn told(comparison: &Comparison, a: &str, b: &str, shown: usize) -> String {
    let Comparison { blocks, differences, facts } = comparison;
    let mut text = match (differences.len(), facts.len()) {
        (0, 0) => format!(
            "{a} and {b} are equal: all {} blocks and every fact beside them\n",
            grouped(*blocks as u64)
        ),
        (0, _) => {
            format!("{a} and {b} have the same weights and moments, all {} blocks\n", grouped(*blocks as u64))
        }
        (n, _) => {
            format!("{a} and {b} differ in {} of {} blocks\n", grouped(n as u64), grouped(*blocks as u64))
        }
    };
    if !differences.is_empty() {
        let mut table = Table::new(2);
        table.row(["", "tensors", "block", "elements", "max |Δ|"]);
        for difference in differences.iter().take(shown) {
            let names = difference.names.join(", ");
            table.row([
                difference.buffer.to_owned(),
                shortened(&names),
                grouped(difference.block as u64),
                grouped(difference.elements),
                format!("{:.3e}", difference.max_abs),
            ]);
        }
        text.push_str(&table.render());
        if differences.len() > shown {
            text.push_str(&format!(
                "… and {} more; --all tells of each\n",
                grouped((differences.len() - shown) as u64)
            ));
        }
        for buffer in ["weights", "exp_avg", "exp_avg_sq"] {
            let of: Vec<f64> = differences.iter().filter(|d| d.buffer == buffer).map(|d| d.max_abs).collect();
            if let Some(largest) = of.iter().copied().reduce(f64::max) {
                text.push_str(&format!(
                    "{buffer}: {} blocks, max |Δ| {largest:.3e}\n",
                    grouped(of.len() as u64)
                ));
            }
        }
    }
    for (what, in_a, in_b) in facts {
        text.push_str(&format!("{what}: {} -> {}\n", shortened(in_a), shortened(in_b)));
    }
    text
}

/// Facts such as cursors are long: their beginning.
fn shortened(text: &str) -> String {
    const LENGTH: usize = 60;
    if text.chars().count() <= LENGTH {
        return text.to_owned();
    }
    text.chars().take(LENGTH - 1).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use anello_worker::checkpoint::BlockDifference;

    #[test]
    fn a_diff_names_blocks_tensors_and_facts() {
        let difference = |buffer, block| BlockDifference {
            buffer,
            block,
            names: vec!["lm_head".to_owned(), "norm".to_owned()],
            elements: 1234,
            max_abs: 0.00125,
        };
        let comparison = Comparison {
            blocks: 45,
            differences: vec![difference("weights", 3), difference("weights", 4), difference("exp_avg", 3)],
            facts: vec![("step", "100".to_owned(), "200".to_owned())],
        };
        assert_eq!(
            told(&comparison, "a@100", "b@200", 2),
            "a@100 and b@200 differ in 3 of 45 blocks
         tensors        block  elements   max |Δ|
weights  lm_head, norm      3     1 234  1.250e-3
weights  lm_head, norm      4     1 234  1.250e-3
… and 1 more; --all tells of each
weights: 2 blocks, max |Δ| 1.250e-3
exp_avg: 1 blocks, max |Δ| 1.250e-3
step: 100 -> 200
"
        );
        let equal = Comparison { blocks: 45, differences: vec![], facts: vec![] };
        assert_eq!(
            told(&equal, "a", "b", 2),
            "a and b are equal: all 45 blocks and every fact beside them\n"
        );
        assert_eq!(shortened(&"x".repeat(99)).chars().count(), 60);
    }
}
