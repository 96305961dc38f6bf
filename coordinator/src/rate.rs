//! How often somebody may ask: so many requests a second of one address, of which few may change something.
//!
//! Each address has two buckets (the generic cell rate algorithm, a leaky bucket as a meter): one for all requests, one for
//! those that change something. A bucket holds [`BURST_S`] seconds' worth, so that a page that opens or a script that does
//! ten things at once is not held up; who goes on is told when to come again. IPv6 addresses are told apart by their network
//! of 64 bits, of which one machine has all. Whoever shares an address shares its buckets.

use std::net::{IpAddr, Ipv6Addr};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use governor::clock::{Clock, MonotonicClock};
use governor::middleware::NoOpMiddleware;
use governor::state::keyed::HashMapStateStore;
use governor::{Quota, RateLimiter};

/// Requests that an address may make at once, as seconds of its rate.
const BURST_S: u32 = 5;
/// Addresses that are remembered, 64 bytes each, before those are forgotten that have been quiet.
const ADDRESSES: usize = 1 << 16;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It reads.
    Read,
    /// It may change something.
    Change,
}

/// Requests a second of one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rates {
    /// All of them.
    pub requests: NonZeroU32,
    /// Those that may change something.
    pub changes: NonZeroU32,
}

impl Rates {
    /// Enough for pages, scrapers and scripts; none of them notices.
    pub const DEFAULT: Self = Self { requests: number(400), changes: number(20) };
}

impl Default for Rates {
    fn default() -> Self {
        Self::DEFAULT
    }
}

const fn number(number: u32) -> NonZeroU32 {
    match NonZeroU32::new(number) {
        Some(number) => number,
        None => panic!("a rate of nothing lets nobody in"),
    }
}

type Buckets =
    RateLimiter<IpAddr, HashMapStateStore<IpAddr>, MonotonicClock, NoOpMiddleware<std::time::Instant>>;

/// Counts requests. Clones count together.
#[derive(Clone, Debug)]
pub struct Limiter {
    rates: Rates,
    requests: Arc<Buckets>,
    changes: Arc<Buckets>,
}

/// Somebody asks too often.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{address} asks too often: this server answers {most} requests{of} a second of one address; try again in {} s", seconds(*again))]
pub(crate) struct TooOften {
    pub address: IpAddr,
    most: NonZeroU32,
    of: &'static str,
    /// When the next request is answered.
    pub again: Duration,
}

/// Whole seconds, and at least one: what `Retry-After` can say.
pub(crate) fn seconds(again: Duration) -> u64 {
    (again.as_secs_f64().ceil() as u64).max(1)
}

impl Limiter {
    /// One that has counted nothing.
    pub fn new(rates: Rates) -> Self {
        let buckets = |rate: NonZeroU32| {
            let quota = Quota::per_second(rate).allow_burst(rate.saturating_mul(number(BURST_S)));
            Arc::new(RateLimiter::new(quota, HashMapStateStore::default(), MonotonicClock))
        };
        Self { rates, requests: buckets(rates.requests), changes: buckets(rates.changes) }
    }

    /// Counts a request of `address`.
    pub(crate) fn admit(&self, address: IpAddr, kind: Kind) -> Result<(), TooOften> {
        let Rates { requests, changes } = self.rates;
        count(&self.requests, address, requests, "")?;
        match kind {
            Kind::Read => Ok(()),
            Kind::Change => count(&self.changes, address, changes, " that change something"),
        }
    }
}

fn count(buckets: &Buckets, address: IpAddr, most: NonZeroU32, of: &'static str) -> Result<(), TooOften> {
    if buckets.len() >= ADDRESSES {
        // Their buckets are empty again: to forget them changes nothing.
        buckets.retain_recent();
        buckets.shrink_to_fit();
    }
    buckets.check_key(&bucket_of(address)).map_err(|refused| {
        let again = refused.wait_time_from(MonotonicClock.now());
        TooOften { address, most, of, again }
    })
}

/// The bucket of an address.
fn bucket_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX))),
        address => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLOW: Rates = Rates { requests: number(2), changes: number(1) };

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn who_asks_too_often_is_told_when_to_come_again_and_nobody_else_is() {
        let limiter = Limiter::new(SLOW);
        let (one, other) = (address("10.0.0.1"), address("10.0.0.2"));
        // Time passes here, too: more may be answered, never fewer.
        let answered = (0..1000).take_while(|_| limiter.admit(one, Kind::Read).is_ok()).count();
        assert!((10..1000).contains(&answered), "{answered}");
        let told = limiter.admit(one, Kind::Read).unwrap_err();
        assert!(told.again > Duration::ZERO && told.again <= Duration::from_secs(1), "{told:?}");
        assert_eq!(
            told.to_string(),
            "10.0.0.1 asks too often: this server answers 2 requests a second of one address; try again in 1 s"
        );
        assert!(limiter.admit(other, Kind::Read).is_ok());
        assert!(limiter.clone().admit(one, Kind::Read).is_err(), "clones count together");
    }

    #[test]
    fn changes_are_fewer_than_requests() {
        let limiter = Limiter::new(Rates { requests: number(1000), ..SLOW });
        let one = address("10.0.0.1");
        let answered = (0..1000).take_while(|_| limiter.admit(one, Kind::Change).is_ok()).count();
        assert!((5..1000).contains(&answered), "{answered}");
        let told = limiter.admit(one, Kind::Change).unwrap_err().to_string();
        assert!(told.contains("1 requests that change something a second"), "{told}");
        assert!(limiter.admit(one, Kind::Read).is_ok(), "it may read on");
    }

    #[test]
    fn a_machine_has_one_bucket() {
        for (one, other, same) in [
            ("2001:db8::1", "2001:db8::ffff:2", true),
            ("2001:db8::1", "2001:db8:0:1::1", false),
            ("::ffff:10.0.0.1", "10.0.0.1", true),
            ("10.0.0.1", "10.0.0.2", false),
        ] {
            assert_eq!(bucket_of(address(one)) == bucket_of(address(other)), same, "{one} {other}");
        }
        assert_eq!((seconds(Duration::ZERO), seconds(Duration::from_millis(1001))), (1, 2));
    }

    #[test]
    fn many_addresses_cost_no_more_than_some() {
        let limiter = Limiter::new(Rates { requests: NonZeroU32::MAX, changes: number(1) });
        for n in 0..2 * ADDRESSES as u32 {
            assert!(limiter.admit(IpAddr::from(n.to_be_bytes()), Kind::Read).is_ok());
        }
        assert!(limiter.requests.len() <= ADDRESSES + 1, "{}", limiter.requests.len());
    }
}
