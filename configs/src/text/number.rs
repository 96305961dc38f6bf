//! Figures for people: three digits and a unit.

/// Three significant digits with the units given for 1, 10³, 10⁶, …
fn scaled(value: f64, units: &[&str]) -> String {
    if !value.is_finite() {
        return value.to_string();
    }
    let (mut value, mut unit) = (value, 0);
    // 999.5 would print as 1000.
    while value >= 999.5 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    let digits = match value {
        _ if value >= 99.95 || (unit == 0 && value.fract() == 0.0) => 0,
        _ if value >= 9.995 => 1,
        _ => 2,
    };
    format!("{value:.digits$} {}", units[unit]).trim_end().to_owned()
}

/// A count of tokens or parameters: `1.43 M`.
pub fn count(value: u64) -> String {
    scaled(value as f64, &["", "K", "M", "B", "T"])
}

/// A size: `64.2 MB`.
pub fn bytes(value: u64) -> String {
    scaled(value as f64, &["B", "kB", "MB", "GB", "TB", "PB"])
}

/// An amount of arithmetic: `36.8 GFLOP`.
pub fn flops(value: f64) -> String {
    scaled(value, &["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP", "ZFLOP", "YFLOP"])
}

/// An exact count, in groups of three digits: `1 430 552`.
pub fn grouped(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn each<T: Copy>(values: &[T], format: impl Fn(T) -> String) -> String {
        values.iter().map(|value| format(*value)).collect::<Vec<_>>().join(" | ")
    }

    #[test]
    fn figures_have_three_digits_and_a_unit() {
        assert_eq!(
            each(&[0, 7, 999, 1_000, 999_499, 999_500, 1_433_000_000], count),
            "0 | 7 | 999 | 1.00 K | 999 K | 1.00 M | 1.43 B"
        );
        assert_eq!(
            each(&[0, 1_024, 12_884_901_888, 80_000_000_000], bytes),
            "0 B | 1.02 kB | 12.9 GB | 80.0 GB"
        );
        assert_eq!(each(&[36.8e9, f64::NAN], flops), "36.8 GFLOP | NaN");
        assert_eq!(each(&[0, 12, 1_234, 5_242_880], grouped), "0 | 12 | 1 234 | 5 242 880");
    }
}
