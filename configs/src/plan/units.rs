//! Figures for people: three digits and a unit.

/// `1.43 B`, `36.8 G…`: three significant digits with the units given for 1, 10³, 10⁶, …
fn scaled(value: f64, units: &[&str]) -> String {
    let (mut value, mut unit) = (value, 0);
    // 999.5 would print as 1000.
    while value >= 999.5 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    let digits = if value >= 99.95 || value.fract() == 0.0 && unit == 0 {
        0
    } else if value >= 9.995 {
        1
    } else {
        2
    };
    format!("{value:.digits$} {}", units[unit]).trim_end().to_owned()
}

/// A count of parameters or tokens.
pub(super) fn count(value: u64) -> String {
    scaled(value as f64, &["", "K", "M", "B", "T"])
}

pub(super) fn bytes(value: u64) -> String {
    scaled(value as f64, &["B", "kB", "MB", "GB", "TB", "PB"])
}

pub(super) fn flops(value: f64) -> String {
    scaled(value, &["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP", "ZFLOP", "YFLOP"])
}

/// `4 Mi`, `64 Ki`, or the plain count when it is no round power of 1024.
pub(super) fn binary(value: u64) -> String {
    let units = [(1 << 30, "Gi"), (1 << 20, "Mi"), (1 << 10, "Ki")];
    match units.into_iter().find(|(unit, _)| value >= *unit && value.is_multiple_of(*unit)) {
        Some((unit, name)) => format!("{} {name}", value / unit),
        None => grouped(value),
    }
}

/// `1 430 552`.
pub(super) fn grouped(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
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
    fn figures_have_three_digits() {
        assert_eq!(
            [0, 7, 999, 1_000, 999_499, 999_500, 1_433_000_000].map(count).join(" | "),
            "0 | 7 | 999 | 1.00 K | 999 K | 1.00 M | 1.43 B"
        );
        assert_eq!([12_884_901_888, 80_000_000_000].map(bytes).join(" | "), "12.9 GB | 80.0 GB");
        assert_eq!(flops(36.8e9), "36.8 GFLOP");
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
