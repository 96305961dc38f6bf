//! The loss-spike guard: a pure rule over the losses of the steps before, so that every worker decides alike.
//!
//! ```text
//! a step is a spike when   loss > m + max(k · 1.4826 · median |l − m|, floor),   m = median of the losses l
//! ```
//! The losses l are those of the last `guard.window` steps of the stage, spikes among them, so that a loss that has risen
//! for good is the measure in the end; below half a window nothing is a spike. 1.4826 times the median absolute deviation is
//! the standard deviation of what is normally distributed: k counts standard deviations, and no spike widens them.

use anello_configs::{Guard, OnSpike};

/// A step whose loss is far above those before it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spike {
    /// Its loss, nats a token.
    pub loss: f64,
    /// The median of those before it.
    pub median: f64,
    /// What it would have had to stay at or below.
    pub limit: f64,
}

/// Standard deviations of a normal distribution in its median absolute deviation.
const DEVIATIONS: f64 = 1.4826;

/// Whether `loss` is a spike after `losses`.
pub fn spike(options: &Guard, losses: &[f64], loss: f64) -> Option<Spike> {
    let enough = losses.len() >= (options.window as usize).div_ceil(2);
    if options.on_spike == OnSpike::Off || !enough || !loss.is_finite() {
        return None;
    }
    let median_loss = median(losses.to_vec());
    let deviation = median(losses.iter().map(|l| (l - median_loss).abs()).collect());
    let limit = median_loss + (options.factor * DEVIATIONS * deviation).max(options.floor);
    (loss > limit).then_some(Spike { loss, median: median_loss, limit })
}

/// Takes `loss` up among `losses`, of which the window's last are kept.
pub fn remember(options: &Guard, losses: &mut Vec<f64>, loss: f64) {
    if options.on_spike == OnSpike::Off || !loss.is_finite() {
        return;
    }
    losses.push(loss);
    let surplus = losses.len().saturating_sub(options.window as usize);
    losses.drain(..surplus);
}

/// Steps applied in the state that `spike`, at `step`, goes back to; absent: there is none, or it does not go back.
///
/// The losses that it is measured by are those of as many steps before it, at least, since the stage or the last spike that
/// was undone: half a window, which is no less than `rollback_steps`. So what it goes back to is of this stage, and of the
/// run as it was amended.
pub fn back_to(options: &Guard, spike: Option<Spike>, step: u64) -> Option<u64> {
    let goes_back = spike.is_some() && options.on_spike == OnSpike::Rollback;
    goes_back.then(|| step.saturating_sub(options.rollback_steps))
}

/// The mean of the two in the middle, or the one. Panics without any.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let half = values.len() / 2;
    if values.len().is_multiple_of(2) { (values[half - 1] + values[half]) / 2.0 } else { values[half] }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> Guard {
        Guard { on_spike: OnSpike::Log, window: 8, factor: 4.0, floor: 0.25, rollback_steps: 4 }
    }

    #[test]
    fn a_spike_is_far_above_the_median_by_the_scatter_or_the_floor() {
        let calm = [3.0, 3.01, 2.99, 3.0, 3.02, 2.98];
        // Scatter 0.01: 4 deviations are 0.06, so the floor holds.
        assert_eq!(spike(&options(), &calm, 3.25), None);
        assert_eq!(spike(&options(), &calm, 3.26), Some(Spike { loss: 3.26, median: 3.0, limit: 3.25 }));
        // Scatter 0.5: 4 · 1.4826 · 0.5.
        let wild = [2.0, 4.0, 2.5, 3.5, 3.0, 2.75, 3.25, 3.0];
        let limit = spike(&options(), &wild, 99.0).unwrap().limit;
        assert!((limit - (3.0 + 4.0 * DEVIATIONS * 0.375)).abs() < 1e-12, "{limit}");
        assert_eq!(spike(&options(), &wild, limit), None);
        // What falls, or is not finite, is none; nor is anything before half a window, or when it is off.
        for loss in [-50.0, f64::NAN, f64::INFINITY] {
            assert_eq!(spike(&options(), &calm, loss), None);
        }
        assert_eq!(spike(&options(), &calm[..3], 99.0), None);
        assert!(spike(&options(), &calm[..4], 99.0).is_some());
        assert_eq!(spike(&Guard { on_spike: OnSpike::Off, ..options() }, &calm, 99.0), None);
    }

    #[test]
    fn a_loss_that_has_risen_for_good_is_the_measure_in_the_end() {
        let mut losses = Vec::new();
        let mut told = Vec::new();
        for step in 0..24 {
            let loss = if step < 10 { 3.0 } else { 5.0 };
            if spike(&options(), &losses, loss).is_some() {
                told.push(step);
            }
            remember(&options(), &mut losses, loss);
            assert!(losses.len() <= 8);
        }
        // With four of eight risen the median is between, and the scatter reaches up to there.
        assert_eq!(told, [10, 11, 12, 13]);
        remember(&options(), &mut losses, f64::NAN);
        assert_eq!(losses, [5.0; 8]);
    }
}
