//! Figures for people that only the plan shows.

use crate::text::grouped;

/// `4 Mi`, `64 Ki`, or the plain count when it is no round power of 1024.
pub(super) fn binary(value: u64) -> String {
    let units = [(1 << 30, "Gi"), (1 << 20, "Mi"), (1 << 10, "Ki")];
    match units.into_iter().find(|(unit, _)| value >= *unit && value.is_multiple_of(*unit)) {
        Some((unit, name)) => format!("{} {name}", value / unit),
        None => grouped(value),
    }
}

/// The two largest units of a time: `72 d 4 h`, `3 min 20 s`.
pub(super) fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    let (days, hours, minutes) = (whole / 86_400, whole / 3600 % 24, whole / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) if seconds < 9.95 => format!("{seconds:.1} s"),
        (0, 0, 0) => format!("{whole} s"),
        (0, 0, _) => format!("{minutes} min {} s", whole % 60),
        (0, _, _) => format!("{hours} h {minutes} min"),
        _ => format!("{} d {hours} h", grouped(days)),
    }
}

/// A number that a person wrote, shown as they would: `0.0003`, `3e-5`, `10000`.
pub(super) fn number(value: f64) -> String {
    let (plain, scientific) = (format!("{value}"), format!("{value:e}"));
    if scientific.len() < plain.len() { scientific } else { plain }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_as_a_person_writes_them() {
        assert_eq!(
            [4 << 20, 65_536, 128, 8_388_607].map(binary).join(" | "),
            "4 Mi | 64 Ki | 128 | 8 388 607"
        );
        assert_eq!(
            [0.04, 59.0, 200.0, 86_399.0, 6_235_200.0].map(duration).join(" | "),
            "0.0 s | 59 s | 3 min 20 s | 23 h 59 min | 72 d 4 h"
        );
        assert_eq!(
            [0.0, 3e-4, 3e-5, 0.05, 10_000.0, 1e6].map(number).join(" | "),
            "0 | 3e-4 | 3e-5 | 0.05 | 1e4 | 1e6"
        );
    }
}
