//! Numbers with units, exactly: `"0.05T"` is 50 000 000 000 and never a float on the way.

use std::ops::RangeInclusive;

/// What a quantity counts, which decides its units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Tokens: `K M B T` are powers of 1000 (`G` = `B`), `Ki Mi Gi Ti` of 1024.
    Tokens,
    /// Bytes: `B kB MB GB TB` are powers of 1000, `KiB MiB GiB TiB` of 1024.
    Bytes,
    /// A time in milliseconds: `ms`, `s`, `min`, `h`; never without a unit.
    Time,
}

impl Unit {
    /// What is accepted, for messages.
    pub fn accepted(self, range: &RangeInclusive<u64>) -> String {
        let [low, high] = [*range.start(), *range.end()].map(|bound| self.shown(bound));
        match self {
            Self::Tokens => {
                format!("a number of tokens, {low} to {high}, written as 4096, \"4Ki\" or \"0.05T\"")
            }
            Self::Time => format!("a time, {low} to {high}, written as \"500ms\", \"10s\" or \"2min\""),
            Self::Bytes => format!("a size, {low} to {high}, written as 1048576, \"64MiB\" or \"1GB\""),
        }
    }

    /// A count with the largest unit that divides it.
    pub fn shown(self, count: u64) -> String {
        let suffixes: &[&str] = match self {
            Self::Tokens => &["Ti", "T", "Gi", "B", "Mi", "M", "Ki", "K"],
            Self::Bytes => &["TiB", "TB", "GiB", "GB", "MiB", "MB", "KiB", "kB"],
            Self::Time => &["h", "min", "s", "ms"],
        };
        let mut units =
            suffixes.iter().filter_map(|suffix| Some((suffix, u64::try_from(self.factor(suffix)?).ok()?)));
        match units.find(|(_, factor)| count >= *factor && count.is_multiple_of(*factor)) {
            Some((suffix, factor)) => format!("{}{suffix}", count / factor),
            None => count.to_string(),
        }
    }

    fn factor(self, suffix: &str) -> Option<u128> {
        const K: u128 = 1000;
        const KI: u128 = 1024;
        Some(match (self, suffix) {
            (Self::Tokens | Self::Bytes, "") | (Self::Bytes, "B") | (Self::Time, "ms") => 1,
            (Self::Time, "s") => K,
            (Self::Time, "min") => 60 * K,
            (Self::Time, "h") => 3600 * K,
            (Self::Tokens, "K" | "k") | (Self::Bytes, "kB" | "KB") => K,
            (Self::Tokens, "M") | (Self::Bytes, "MB") => K * K,
            (Self::Tokens, "B" | "G") | (Self::Bytes, "GB") => K * K * K,
            (Self::Tokens, "T") | (Self::Bytes, "TB") => K * K * K * K,
            (Self::Tokens, "Ki") | (Self::Bytes, "KiB") => KI,
            (Self::Tokens, "Mi") | (Self::Bytes, "MiB") => KI * KI,
            (Self::Tokens, "Gi") | (Self::Bytes, "GiB") => KI * KI * KI,
            (Self::Tokens, "Ti") | (Self::Bytes, "TiB") => KI * KI * KI * KI,
            _ => return None,
        })
    }
}

/// Reads `digits[.digits][e[+-]digits][ ][unit]`, with `_` allowed between digits, as a whole number.
///
/// Absent when the text is not of that form, is not whole, or is beyond 64 bits.
pub(crate) fn parse(text: &str, unit: Unit) -> Option<u64> {
    let text = text.trim();
    let number_len = number_len(text);
    let (number, suffix) = text.split_at(number_len);
    let factor = unit.factor(suffix.trim_start())?;

    let (mantissa, exponent) = match number.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, exponent.parse::<i32>().ok()?),
        None => (number, 0),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    if whole.is_empty() || (mantissa.contains('.') && fraction.is_empty()) {
        return None;
    }
    // value = digits · 10^power · factor. Trailing zeros go into the power, so that 1.50 is as good as 1.5.
    let mut power = exponent.checked_sub(i32::try_from(fraction.len()).ok()?)?;
    let joined: String = whole.chars().chain(fraction.chars()).filter(|c| *c != '_').collect();
    power += fraction.matches('_').count() as i32;
    let digits = joined.trim_end_matches('0');
    power = power.checked_add(i32::try_from(joined.len() - digits.len()).ok()?)?;
    let digits = digits.trim_start_matches('0');
    if digits.is_empty() {
        return Some(0);
    }
    if digits.len() > 20 || !(-38..=20).contains(&power) {
        return None;
    }
    let scaled = digits.parse::<u128>().ok()?.checked_mul(factor)?;
    let ten = 10u128.pow(power.unsigned_abs());
    let value = match power < 0 {
        true if !scaled.is_multiple_of(ten) => return None,
        true => scaled / ten,
        false => scaled.checked_mul(ten)?,
    };
    u64::try_from(value).ok()
}

/// Reads a count as a config has it: `3000`, `256Ki`, `1.5M`. For command lines.
pub fn read_count(text: &str) -> Result<u64, String> {
    read(text, Unit::Tokens, "write a whole number as 3000, 256Ki, 1.5M or 20B")
}

/// Reads a size as a config has it: `1048576`, `64MiB`, `1GB`. For command lines.
pub fn read_bytes(text: &str) -> Result<u64, String> {
    read(text, Unit::Bytes, "write a size as 1048576, 64MiB or 1GB")
}

/// Reads a time as a config has it: `500ms`, `10s`, `2min`. For command lines.
pub fn read_time(text: &str) -> Result<std::time::Duration, String> {
    let millis = read(text, Unit::Time, "write a time as 500ms, 10s or 2min")?;
    Ok(std::time::Duration::from_millis(millis))
}

fn read(text: &str, unit: Unit, remedy: &str) -> Result<u64, String> {
    parse(text, unit).ok_or_else(|| remedy.to_owned())
}

/// Length of the leading number: digits, `_`, one `.`, and an exponent only when digits follow its `e`.
fn number_len(text: &str) -> usize {
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() && (bytes[at].is_ascii_digit() || matches!(bytes[at], b'_' | b'.')) {
        at += 1;
    }
    if at < bytes.len() && matches!(bytes[at], b'e' | b'E') {
        let sign = usize::from(matches!(bytes.get(at + 1), Some(b'+' | b'-')));
        let digits = bytes[at + 1 + sign..].iter().take_while(|b| b.is_ascii_digit()).count();
        if digits > 0 {
            at += 1 + sign + digits;
        }
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_shown_with_the_largest_unit_that_divides_them() {
        let shown = |bound| Unit::Tokens.shown(bound);
        assert_eq!(
            [1, 8192, 16 << 20, 10_000_000_000_000_000, 1500].map(shown),
            ["1", "8Ki", "16Mi", "10000T", "1500"]
        );
        assert_eq!(Unit::Bytes.shown(64 << 30), "64GiB");
    }

    #[test]
    fn quantities_are_exact() {
        let table = [
            ("0", Some(0)),
            ("4096", Some(4096)),
            ("1_000_000", Some(1_000_000)),
            ("0.05T", Some(50_000_000_000)),
            ("0.0_5T", Some(50_000_000_000)),
            ("6.0T", Some(6_000_000_000_000)),
            ("20B", Some(20_000_000_000)),
            ("20G", Some(20_000_000_000)),
            ("4Mi", Some(4 << 20)),
            ("1.5Ki", Some(1536)),
            ("64 K", Some(64_000)),
            ("6e12", Some(6_000_000_000_000)),
            ("1.4e+12", Some(1_400_000_000_000)),
            ("1500e-2", Some(15)),
            ("18446744073709551615", Some(u64::MAX)),
            ("18446744073709551616", None),
            ("0.3", None),
            ("0.0001K", None),
            ("1e99999999999", None),
            ("1e400", None),
            ("", None),
            (".5K", None),
            ("5.", None),
            ("1.2.3", None),
            ("-1", None),
            ("T", None),
            ("6 Q", None),
            ("64MiB", None),
        ];
        for (text, value) in table {
            assert_eq!(parse(text, Unit::Tokens), value, "{text:?}");
        }
        for (text, value) in
            [("64MiB", Some(64 << 20)), ("1GB", Some(1_000_000_000)), ("7B", Some(7)), ("4Mi", None)]
        {
            assert_eq!(parse(text, Unit::Bytes), value, "{text:?}");
        }
    }

    #[test]
    fn times_have_units() {
        let table =
            [("500ms", Some(500)), ("10s", Some(10_000)), ("1.5min", Some(90_000)), ("1h", Some(3_600_000))];
        for (text, value) in
            table.into_iter().chain([("10", None), ("1d", None), ("0.1ms", None), ("", None)])
        {
            assert_eq!(parse(text, Unit::Time), value, "{text:?}");
        }
        assert_eq!([1500, 10_000, 120_000].map(|millis| Unit::Time.shown(millis)), ["1500ms", "10s", "2min"]);
    }
}
