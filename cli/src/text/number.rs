//! Figures for people that only the command line shows.

use anello_configs::text::{count, grouped};

/// A speed without its unit: `9 820`, `82.0 K` from a hundred thousand on.
pub fn per_second(value: f64) -> String {
    match value {
        _ if !value.is_finite() => "–".to_owned(),
        _ if value < 99_999.5 => grouped(value.round().max(0.0) as u64),
        _ => count(value.round() as u64),
    }
}

/// A loss: `4.312`.
pub fn nats(value: f64) -> String {
    format!("{value:.3}")
}

/// A learning rate: `3.00e-3`, and `0` for none.
pub fn lr(value: f64) -> String {
    if value == 0.0 { "0".to_owned() } else { format!("{value:.2e}") }
}

/// A positive figure of any size in three significant digits: `0.412`, `13.2`, `1.70e4`.
pub fn short(value: f64) -> String {
    let size = value.abs();
    match size {
        _ if size == 0.0 || !size.is_finite() => value.to_string(),
        _ if !(1e-3..999.5).contains(&size) => format!("{value:.2e}"),
        _ if size >= 99.95 => format!("{value:.0}"),
        _ if size >= 9.995 => format!("{value:.1}"),
        _ if size >= 0.9995 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// `done` of `total` as `33.4 %`; 100.0 % only when all of it is done.
pub fn percent(done: u64, total: u64) -> String {
    if done >= total {
        return "100.0 %".to_owned();
    }
    let share = done as f64 / total as f64 * 100.0;
    format!("{:.1} %", share.min(99.9))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn each<T: Copy>(values: &[T], format: impl Fn(T) -> String) -> String {
        values.iter().map(|value| format(*value)).collect::<Vec<_>>().join(" | ")
    }

    #[test]
    fn speeds_are_whole_and_large_ones_short() {
        assert_eq!(
            each(&[0.0, 9_820.4, 99_999.0, 99_999.6, 1.6e6, f64::NAN, f64::INFINITY], per_second),
            "0 | 9 820 | 99 999 | 100 K | 1.60 M | – | –"
        );
    }

    #[test]
    fn small_figures_keep_their_digits() {
        assert_eq!(each(&[0.0, 3e-3, 1e-5, 0.15], lr), "0 | 3.00e-3 | 1.00e-5 | 1.50e-1");
        assert_eq!(
            each(&[0.0, 1e-9, 0.0123, 0.412, 0.9999, 1.0, 13.24, 250.0, 17_000.0, f64::NAN], short),
            "0 | 1.00e-9 | 0.012 | 0.412 | 1.00 | 1.00 | 13.2 | 250 | 1.70e4 | NaN"
        );
        assert_eq!(each(&[7.6246, f64::NAN], nats), "7.625 | NaN");
    }

    #[test]
    fn it_is_done_only_when_it_is_done() {
        assert_eq!(
            each(&[0, 1, 639, 9_999, 10_000], |d| percent(d, 10_000)),
            "0.0 % | 0.0 % | 6.4 % | 99.9 % | 100.0 %"
        );
        assert_eq!(percent(0, 0), "100.0 %");
    }
}
