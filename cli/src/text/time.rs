//! Times for people.

/// The two largest units of a time: `72 d 4 h`, `3 min 20 s`.
pub fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "–".to_owned();
    }
    let whole = seconds.round() as u64;
    let (days, hours, minutes) = (whole / 86_400, whole / 3600 % 24, whole / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) if seconds < 0.0995 => format!("{:.0} ms", seconds * 1000.0),
        (0, 0, 0) if seconds < 9.95 => format!("{seconds:.1} s"),
        (0, 0, 0) => format!("{whole} s"),
        (0, 0, _) => format!("{minutes} min {} s", whole % 60),
        (0, _, _) => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}

/// `2026-07-29 14:03:07` of a time in milliseconds since 1970, UTC.
pub fn utc(unix_ms: u64) -> String {
    let seconds = unix_ms / 1000;
    let (hours, minutes) = (seconds / 3600 % 24, seconds / 60 % 60);
    // The civil calendar of H. Hinnant: 400-year eras of 146 097 days that begin on 1 March.
    let days = seconds / 86_400 + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {hours:02}:{minutes:02}:{:02}", seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_two_units() {
        let seconds = [0.0, 0.0421, 0.1, 9.94, 59.0, 59.6, 200.0, 86_399.0, 6_235_200.0, -1.0, f64::INFINITY];
        assert_eq!(
            seconds.map(duration).join(" | "),
            "0 ms | 42 ms | 0.1 s | 9.9 s | 59 s | 1 min 0 s | 3 min 20 s | 23 h 59 min | 72 d 4 h | – | –"
        );
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        let cases = [
            (0, "1970-01-01 00:00:00"),
            (951_782_400_000, "2000-02-29 00:00:00"),
            (1_709_251_199_999, "2024-02-29 23:59:59"),
            (1_735_689_600_000, "2025-01-01 00:00:00"),
            (4_107_542_400_000, "2100-03-01 00:00:00"),
        ];
        for (unix_ms, text) in cases {
            assert_eq!(utc(unix_ms), text);
        }
    }
}
