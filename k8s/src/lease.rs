//! The Lease by which one of several controllers is the one that acts.
//!
//! Clocks are not compared: who does not hold it watches for as long as it is good whether its record changes (as
//! client-go does). Every write names the version that it was decided on, so of two that write at once one is refused.

use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::PostParams;

use crate::controller::{Error, kube};

/// Its name.
pub const NAME: &str = "anello-controller";
/// How long it is good after it was renewed.
pub const GOOD: Duration = Duration::from_secs(15);
/// How often it is renewed, or looked at.
pub const RENEW: Duration = Duration::from_secs(5);

/// What to do about a Lease.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// It is ours, or nobody's: write that it is ours.
    Write,
    /// It is another's.
    Wait,
}

/// What was last seen of another's Lease, and since when it has not changed.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    holder: Option<String>,
    renewed: Option<Timestamp>,
    since: Instant,
}

/// Decides by what is there now and what was `seen` before.
fn judge(lease: &LeaseSpec, identity: &str, seen: &mut Option<Seen>, now: Instant) -> Verdict {
    let holder = lease.holder_identity.clone().filter(|holder| !holder.is_empty());
    if holder.as_deref().is_none_or(|holder| holder == identity) {
        return Verdict::Write;
    }
    let renewed = lease.renew_time.as_ref().map(|time| time.0);
    let good = lease.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok());
    let good = good.map_or(GOOD, Duration::from_secs);
    match seen {
        Some(seen) if (&seen.holder, seen.renewed) == (&holder, renewed) => {
            if now.duration_since(seen.since) >= good { Verdict::Write } else { Verdict::Wait }
        }
        _ => {
            *seen = Some(Seen { holder, renewed, since: now });
            Verdict::Wait
        }
    }
}

/// A controller's hold on the Lease.
pub struct Holding {
    api: Api<Lease>,
    identity: String,
    seen: Option<Seen>,
    /// When it was last written that it is ours; absent: it is not.
    held: Option<Instant>,
}

impl Holding {
    pub fn new(api: Api<Lease>, identity: String) -> Self {
        Self { api, identity, seen: None, held: None }
    }

    /// Takes or renews it. True while it is ours: also when the API server did not answer, as long as nobody else can have
    /// taken it.
    ///
    /// # Errors
    /// What the API server says to a first attempt, but for a lost race.
    pub async fn take(&mut self) -> Result<bool, Error> {
        match self.try_take().await {
            Ok(ours) => {
                self.held = ours.then(Instant::now);
                Ok(ours)
            }
            Err(kube::Error::Api(status)) if status.code == 409 => {
                self.held = None;
                Ok(false)
            }
            Err(cause) => match self.held {
                // A round less than it is good for: the others begin to count when they see it, which is later.
                Some(held) if held.elapsed() + RENEW < GOOD => {
                    tracing::warn!(%cause, "the Lease could not be renewed");
                    Ok(true)
                }
                Some(_) => Ok(false),
                None => Err(kube("taking the Lease")(cause)),
            },
        }
    }

    async fn try_take(&mut self) -> Result<bool, kube::Error> {
        let now = MicroTime(Timestamp::now());
        let Some(mut lease) = self.api.get_opt(NAME).await? else {
            let metadata = ObjectMeta { name: Some(NAME.to_owned()), ..ObjectMeta::default() };
            let lease = Lease { metadata, spec: Some(self.ours(LeaseSpec::default(), now)) };
            return self.api.create(&PostParams::default(), &lease).await.map(|_| true);
        };
        let spec = lease.spec.unwrap_or_default();
        if judge(&spec, &self.identity, &mut self.seen, Instant::now()) == Verdict::Wait {
            return Ok(false);
        }
        lease.spec = Some(self.ours(spec, now));
        // With the version that was read.
        self.api.replace(NAME, &PostParams::default(), &lease).await.map(|_| true)
    }

    fn ours(&self, before: LeaseSpec, now: MicroTime) -> LeaseSpec {
        let is_ours = before.holder_identity.as_deref() == Some(&self.identity);
        let transitions = before.lease_transitions.unwrap_or_default();
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: Some(GOOD.as_secs() as i32),
            acquire_time: if is_ours { before.acquire_time } else { Some(now.clone()) },
            renew_time: Some(now),
            lease_transitions: Some(if is_ours { transitions } else { transitions + 1 }),
            ..before
        }
    }

    /// Lets it go, so that the next one need not wait.
    pub async fn give_back(&mut self) {
        if self.held.take().is_none() {
            return;
        }
        let Ok(Some(mut lease)) = self.api.get_opt(NAME).await else { return };
        let spec = lease.spec.get_or_insert_default();
        if spec.holder_identity.as_deref() == Some(&self.identity) {
            spec.holder_identity = None;
            let _ = self.api.replace(NAME, &PostParams::default(), &lease).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(holder: &str, renewed_s: i64) -> LeaseSpec {
        LeaseSpec {
            holder_identity: Some(holder.to_owned()),
            lease_duration_seconds: Some(15),
            renew_time: Some(MicroTime(Timestamp::from_second(renewed_s).unwrap())),
            ..LeaseSpec::default()
        }
    }

    #[test]
    fn nobodys_and_ones_own_are_taken() {
        let now = Instant::now();
        assert_eq!(judge(&LeaseSpec::default(), "a", &mut None, now), Verdict::Write);
        assert_eq!(judge(&of("", 1), "a", &mut None, now), Verdict::Write);
        assert_eq!(judge(&of("a", 1), "a", &mut None, now), Verdict::Write);
    }

    #[test]
    fn anothers_is_taken_when_it_has_not_changed_for_as_long_as_it_is_good() {
        let (mut seen, now) = (None, Instant::now());
        let at = |s| now + Duration::from_secs(s);
        // Whatever the holder's clock says: only that it changes counts.
        assert_eq!(judge(&of("b", 100), "a", &mut seen, at(0)), Verdict::Wait);
        assert_eq!(judge(&of("b", 100), "a", &mut seen, at(14)), Verdict::Wait);
        assert_eq!(judge(&of("b", 105), "a", &mut seen, at(20)), Verdict::Wait);
        assert_eq!(judge(&of("b", 105), "a", &mut seen, at(34)), Verdict::Wait);
        assert_eq!(judge(&of("b", 105), "a", &mut seen, at(35)), Verdict::Write);
        assert_eq!(judge(&of("c", 106), "a", &mut seen, at(36)), Verdict::Wait);
    }
}
