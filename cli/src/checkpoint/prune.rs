//! `anello checkpoint prune | copy`.

use anello_store::checkpoint::{self, Pruning, Retention, plan_pruning, superseded};
use anello_store::{Error, Store, read_config};

use crate::failure::{Exit, Failure, Outcome};
use crate::place::{CheckpointName, none_yet, open_run};
use crate::screen::Screen;
use crate::text::{bytes, grouped};

/// `anello checkpoint prune`
pub fn prune(
    run: &str,
    keep_last: Option<u32>,
    keep_every: Option<u64>,
    dry_run: bool,
    screen: &Screen,
) -> Outcome {
    open_run(run)?;
    let store = Store::durable(run)?;
    let mut retention = Retention::of(&read_config(&store)?);
    let policy = &mut retention.policy;
    policy.keep_last = keep_last.unwrap_or(policy.keep_last);
    policy.keep_every_steps = keep_every.or(policy.keep_every_steps);
    let all = checkpoint::steps(&store)?;
    if all.is_empty() {
        return Err(none_yet(&store));
    }
    // The last that is whole, so that it stays, whatever became of those after it.
    let (mut whole, mut damaged) = (None, Vec::new());
    for &step in all.iter().rev() {
        match checkpoint::verify(&store, step) {
            Ok(_) => {
                whole = Some(step);
                break;
            }
            Err(flaw @ Error::Checkpoint { .. }) => {
                damaged.push(step);
                screen.line(&flaw.to_string())?;
            }
            Err(other) => return Err(other.into()),
        }
    }
    let Some(whole) = whole else {
        return Err(Failure::Usage(format!(
            "none of the {} checkpoints of {run} is whole; nothing is removed",
            all.len()
        )));
    };
    let gone = |kept: &[(u64, bool)]| {
        let kept: Vec<_> = kept.iter().filter(|(step, _)| !damaged.contains(step)).copied().collect();
        superseded(&retention, &kept).into_iter().filter(|step| *step != whole).collect::<Vec<_>>()
    };
    // A run may be at work: parts near its newest checkpoints may be those of one that it is writing.
    let leftovers = |kept: &[u64]| kept.len().checked_sub(2).map(|second| kept[second]);
    let pruning = plan_pruning(&store, gone, leftovers)?;
    for (_, flaw) in pruning.flawed.iter().filter(|(step, _)| !damaged.contains(step)) {
        screen.line(flaw)?;
    }
    screen.line(&told(&pruning, whole, dry_run))?;
    if !dry_run {
        pruning.carry_out(&store)?;
    }
    Ok(Exit::Done)
}

fn told(pruning: &Pruning, whole: u64, dry_run: bool) -> String {
    let list = |steps: &[u64]| match steps {
        [] => "none".to_owned(),
        steps => steps.iter().map(|step| grouped(*step)).collect::<Vec<_>>().join(", "),
    };
    format!(
        "checkpoint {} is whole\n{}: {}\nstay: {}\n{} {} in {} objects",
        grouped(whole),
        if dry_run { "would go" } else { "go" },
        list(&pruning.gone),
        list(&pruning.kept),
        if dry_run { "would free" } else { "frees" },
        bytes(pruning.bytes()),
        pruning.objects.len(),
    )
}

/// `anello checkpoint copy`
pub fn copy(name: &CheckpointName, to: &str, screen: &Screen) -> Outcome {
    let (from, step) = name.open()?;
    let target = Store::durable(to)?;
    let copied = checkpoint::copy(&from, step, &target, |part| {
        tracing::info!(part = part.name, bytes = part.bytes, "there");
    })?;
    let (parts, sent) = copied.sent;
    screen.line(&format!(
        "{to}: checkpoint {} of {}, weights {}; {parts} of {} parts sent, {}",
        grouped(step),
        from.place(),
        anello_store::words::short_digest(&copied.manifest.weights),
        parts + copied.there,
        bytes(sent),
    ))?;
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pruning_says_what_goes_and_what_stays() {
        let object = |path: &str, bytes| anello_store::Object { path: path.to_owned(), bytes };
        let objects = vec![object("a", 1000), object("b", 3000)];
        let pruning = Pruning { gone: vec![1000], kept: vec![2000, 3000], objects, ..Pruning::default() };
        assert_eq!(
            told(&pruning, 3000, true),
            "checkpoint 3 000 is whole\nwould go: 1 000\nstay: 2 000, 3 000\nwould free 4.00 kB in 2 objects"
        );
        let nothing = Pruning { kept: vec![1], ..Pruning::default() };
        assert_eq!(
            told(&nothing, 1, false),
            "checkpoint 1 is whole\ngo: none\nstay: 1\nfrees 0 B in 0 objects"
        );
    }
}
