//! What became of each stage, from the metrics.

use anello_store::metrics::StepRecord;

/// Steps whose mean stands for the beginning or the end of a stage, when it has as many in each half.
const FEW: usize = 10;

/// One stage of a run, as far as it was trained.
#[derive(Clone, Debug, PartialEq)]
pub struct StageSummary {
    /// Its name.
    pub stage: String,
    /// Steps done.
    pub steps: u64,
    /// Of these, the ones that were not applied.
    pub skipped: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Mean objective of the first few steps.
    pub loss_first: f64,
    /// Mean objective of the last few steps.
    pub loss_last: f64,
    /// Mean L(t) of the last few steps, t = 1..=T.
    pub loop_loss: Vec<f64>,
    /// Mean exit depth of the last few steps.
    pub depth: f64,
    /// Tokens a second over the whole stage.
    pub tokens_per_s: f64,
    /// Seconds of all steps.
    pub seconds: f64,
}

/// Sums up each stage. Steps that were skipped count, but their losses do not.
pub fn summarise(records: &[StepRecord]) -> Vec<StageSummary> {
    records.chunk_by(|a, b| a.stage == b.stage).map(stage).collect()
}

fn stage(records: &[StepRecord]) -> StageSummary {
    let applied: Vec<&StepRecord> = records.iter().filter(|record| record.applied).collect();
    let few = (applied.len() / 2).clamp(1, FEW).min(applied.len());
    let (first, last) = (&applied[..few], &applied[applied.len() - few..]);
    let tokens = records.iter().map(|record| record.batch_tokens).sum();
    let seconds = records.iter().map(|record| record.seconds.step).sum();
    let loops = last.iter().map(|record| record.loop_loss.len()).min().unwrap_or(0);
    StageSummary {
        stage: records[0].stage.clone(),
        steps: records.len() as u64,
        skipped: (records.len() - applied.len()) as u64,
        tokens,
        loss_first: mean(first, |record| record.loss),
        loss_last: mean(last, |record| record.loss),
        loop_loss: (0..loops).map(|t| mean(last, |record| record.loop_loss[t])).collect(),
        depth: mean(last, StepRecord::depth),
        tokens_per_s: tokens as f64 / seconds,
        seconds,
    }
}

fn mean(records: &[&StepRecord], of: impl Fn(&StepRecord) -> f64) -> f64 {
    records.iter().map(|record| of(record)).sum::<f64>() / records.len() as f64
}

/// A record for tests: loss falls by 0.1 a step from 7, loop step t is 0.5·t below the first.
#[cfg(test)]
pub fn record_of(step: u64, stage: &str, loops: usize) -> StepRecord {
    use anello_store::metrics::Seconds;
    let loss = 7.0 - 0.1 * step as f64;
    StepRecord {
        step,
        stage: stage.into(),
        tokens: 100 * (step + 1),
        batch_tokens: 100,
        counted: 97,
        lr: 1e-3,
        loss,
        loop_loss: (0..loops).map(|t| loss - 0.5 * t as f64).collect(),
        exit: vec![1.0 / loops as f64; loops],
        entropy: (loops as f64).ln(),
        grad_norm: 0.3,
        applied: true,
        weights: None,
        evals: Vec::new(),
        seconds: Seconds { step: 0.5, data: 0.05, compute: 0.35, update: 0.1, ..Seconds::default() },
    }
}

/// A config for tests that no preset changes: 8 Ki tokens a step, 32 steps of warmup, 384 of stable.
#[cfg(test)]
pub fn config_of() -> anello_configs::RunConfig {
    let stage = |name: &str, tokens: &str| {
        format!(
            "[stage.{name}]\ntokens = {tokens:?}\nsequence = 128\nbatch = \"8Ki\"\nmicro_batch = 16\nlr_curve = \"constant\"\n\
             lr = 3e-3\nloops = 4\nbeta = 0.1\nrope_base = 10_000\nmixture = {{ docs = 1.0 }}\n"
        )
    };
    let head = "name = \"small\"\nseed = 1\nlanes = 4\nstages = [\"warmup\", \"stable\"]\n\
                data.sources.docs.url = \"docs\"\n\
                [model]\nlayers = 2\nhidden = 128\nheads = 4\nffn = 352\nvocab = 2048\n";
    let text = head.to_owned() + &stage("warmup", "256Ki") + &stage("stable", "3Mi");
    anello_configs::RunConfig::parse("small.toml", &text).unwrap()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_are_told_apart_and_skipped_steps_do_not_spoil_the_means() {
        let mut records: Vec<StepRecord> =
            (0..24).map(|s| record_of(s, if s < 4 { "warmup" } else { "stable" }, 4)).collect();
        records[20].applied = false;
        records[20].loss = f64::NAN;
        let [warmup, stable] = &summarise(&records)[..] else { panic!("two stages") };
        assert_eq!((warmup.steps, warmup.skipped, warmup.tokens), (4, 0, 400));
        assert!(
            (warmup.loss_first - 6.95).abs() < 1e-9 && (warmup.loss_last - 6.75).abs() < 1e-9,
            "{warmup:?}"
        );
        assert_eq!((stable.steps, stable.skipped, stable.loop_loss.len()), (20, 1, 4));
        assert!(stable.loss_last.is_finite() && (stable.depth - 2.5).abs() < 1e-9);
        assert!((stable.tokens_per_s - 200.0).abs() < 1e-9);
        assert!(summarise(&[]).is_empty());
    }

    #[test]
    fn a_stage_without_an_applied_step_has_no_loss() {
        let record = StepRecord { applied: false, ..record_of(0, "warmup", 4) };
        let stage = &summarise(&[record])[0];
        assert!(stage.loss_first.is_nan() && stage.loop_loss.is_empty() && stage.skipped == 1);
    }
}
