//! Counts and sizes on the command line, written as in a config.

/// Reads `3000`, `256Ki`, `64MiB`, `20M`: digits (`_` between them is fine) and a unit of 1000 or 1024. For clap.
pub fn quantity(text: &str) -> Result<u64, String> {
    let compact = text.replace(['_', ' '], "");
    let split = compact.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(compact.len());
    let (digits, unit) = compact.split_at(split);
    let unit = unit.strip_suffix('B').filter(|rest| !rest.is_empty()).unwrap_or(unit);
    let factor: u64 = match unit {
        "" => 1,
        "K" | "k" => 1_000,
        "M" => 1_000_000,
        "G" | "B" => 1_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        _ => return Err(format!("the unit {unit} is unknown; there are K, M, G, Ki, Mi, Gi, KiB, MiB, GiB")),
    };
    let wrong = || "write a count as 3000, 256Ki, 64MiB or 1.5M".to_owned();
    if let Ok(whole) = digits.parse::<u64>() {
        return whole.checked_mul(factor).ok_or_else(|| "this is beyond 64 bits".to_owned());
    }
    let value = digits.parse::<f64>().map_err(|_| wrong())? * factor as f64;
    if value.fract() == 0.0 && value < 2f64.powi(53) { Ok(value as u64) } else { Err(wrong()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_those_of_a_config() {
        let cases = [
            ("3000", 3000),
            ("10_000", 10_000),
            ("256Ki", 262_144),
            ("64MiB", 64 << 20),
            ("1.5M", 1_500_000),
            ("2kB", 2000),
        ];
        for (text, value) in cases {
            assert_eq!(quantity(text), Ok(value), "{text}");
        }
        for text in
            ["", "Ki", "-3", "1.5", "3 apples", "1e30", "99999999999999999999", "18446744073709551615Ki"]
        {
            assert!(quantity(text).is_err(), "{text}");
        }
    }
}
