//! What is waited for, told to a person who watches: once, when it has been the same for a while.

use std::time::{Duration, Instant};

/// Waits that are shorter than this are not worth a line.
const A_WHILE: Duration = Duration::from_secs(2);

/// What something waits for, as far as it was looked at.
#[derive(Clone, Debug, Default)]
pub struct Waits {
    /// What, and since when.
    now: Option<(String, Instant)>,
    /// It was told.
    told: bool,
}

impl Waits {
    /// When it is to be looked at again, so that what lasts is told.
    pub fn due(&self) -> Option<Instant> {
        self.now.as_ref().filter(|_| !self.told).map(|(_, since)| *since + A_WHILE)
    }

    /// It waits for `what` at `now`, or for nothing: what is to be told of that, if anything.
    pub fn look(&mut self, what: Option<String>, now: Instant) -> Option<String> {
        let Some(what) = what else {
            *self = Self::default();
            return None;
        };
        match &self.now {
            Some((before, since)) if *before == what => {
                let due = !self.told && now.saturating_duration_since(*since) >= A_WHILE;
                self.told |= due;
                due.then_some(what)
            }
            _ => {
                (self.now, self.told) = (Some((what, now)), false);
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lasts_is_told_once_and_what_passes_is_not() {
        let (mut waits, start) = (Waits::default(), Instant::now());
        let mut look = |what: Option<&str>, seconds| {
            waits.look(what.map(str::to_owned), start + Duration::from_secs(seconds))
        };
        assert_eq!(look(Some("a"), 0), None);
        assert_eq!(look(Some("a"), 1), None);
        assert_eq!(look(Some("b"), 2), None, "a has passed");
        assert_eq!(look(Some("b"), 4).as_deref(), Some("b"));
        assert_eq!(look(Some("b"), 9), None, "it was told");
        assert_eq!(look(None, 10), None);
        assert_eq!(look(Some("b"), 11), None, "it begins anew");
        assert_eq!(look(Some("b"), 13).as_deref(), Some("b"));
        assert_eq!(waits.due(), None);
        waits.look(Some("c".to_owned()), start);
        assert_eq!(waits.due(), Some(start + A_WHILE));
    }
}
