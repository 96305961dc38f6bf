//! Which checkpoints may go.

use anello_configs::Checkpoint;

/// Steps of the checkpoints that `policy` no longer keeps. `kept` are all that exist, rising: (step, whether it is
/// the end of a stage). The newest `keep_last` stay, and at least two whatever the policy says.
pub fn superseded(policy: &Checkpoint, kept: &[(u64, bool)]) -> Vec<u64> {
    let newest = kept.len().saturating_sub(policy.keep_last.max(2) as usize);
    let stays = |step: u64, stage_end: bool| {
        (policy.keep_stage_ends && stage_end)
            || policy.keep_every_steps.is_some_and(|every| every > 0 && step.is_multiple_of(every))
    };
    kept[..newest].iter().filter(|&&(step, end)| !stays(step, end)).map(|&(step, _)| step).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_the_multiples_and_the_stage_ends_stay() {
        let policy = Checkpoint {
            every_steps: 10,
            keep_last: 2,
            keep_every_steps: Some(40),
            keep_stage_ends: true,
            part_bytes: 1,
        };
        let all: Vec<(u64, bool)> = (1..=9).map(|i| (i * 10, i == 3)).collect();
        assert_eq!(superseded(&policy, &all), [10, 20, 50, 60, 70]);
        assert_eq!(superseded(&Checkpoint { keep_last: 0, ..policy.clone() }, &all), [10, 20, 50, 60, 70]);
        let bare = Checkpoint { keep_every_steps: None, keep_stage_ends: false, keep_last: 3, ..policy };
        assert_eq!(superseded(&bare, &all), [10, 20, 30, 40, 50, 60]);
        assert_eq!(superseded(&bare, &all[..2]), [0u64; 0]);
    }
}
