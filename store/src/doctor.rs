//! Is a store fit for runs? Tried out, since not every server that speaks a protocol keeps its promises.
//!
//! A run's ledger stands on put-if-absent alone: of all that create one object, one is told that it did. A server that
//! looks first and writes afterwards lets two win, and then two coordinators take up one job. Only a race shows that.

use std::sync::Barrier;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::{Error, Result, Store};

/// Races and writers of one race.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Races {
    /// Objects that are raced for.
    pub races: u32,
    /// Writers that race for each.
    pub writers: u32,
}

impl Races {
    /// What a check-up makes.
    pub const THOROUGH: Self = Self { races: 20, writers: 16 };
    /// What a coordinator makes before it trusts a store: a server that looks first lets several of 16 win nearly always.
    pub const QUICK: Self = Self { races: 3, writers: 16 };
}

/// What came of the races.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Raced {
    /// Races with one winner, whose object is there.
    pub fair: u32,
    /// All races.
    pub races: u32,
    /// Writers of each.
    pub writers: u32,
    /// The most winners of one race.
    pub winners_most: u32,
}

impl Raced {
    /// Whether put-if-absent was atomic.
    pub fn is_atomic(&self) -> bool {
        self.fair == self.races
    }
}

/// Time of one call, the median of several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Latency {
    /// Of a small object that is written.
    pub put_ms: f64,
    /// That is created.
    pub create_ms: f64,
    /// That is read.
    pub get_ms: f64,
    /// Of a listing.
    pub list_ms: f64,
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Checkup {
    /// Where.
    pub place: String,
    /// What does not hold, in words; empty: it is fit.
    pub faults: Vec<String>,
    /// The races.
    pub raced: Raced,
    /// How long calls take.
    pub latency: Latency,
    /// How far the store's clock is ahead of ours, seconds; absent when it does not tell.
    pub clock_ahead_s: Option<f64>,
}

impl Checkup {
    /// Whether runs and coordinators may live there.
    pub fn is_fit(&self) -> bool {
        self.faults.is_empty()
    }
}

/// Calls that a latency is the median of.
const CALLS: usize = 9;
/// Size of an object that is read and written in pieces.
const LARGE: usize = 20 << 20;
/// Difference of clocks from which it is a fault: S3 refuses requests that are signed a quarter of an hour off.
const CLOCK_MAX: Duration = Duration::from_secs(5 * 60);

/// Tries everything that a run asks of a store, in a folder below `_doctor/`, which is gone afterwards.
pub fn check(store: &Store) -> Result<Checkup> {
    let folder = folder();
    let checked = Trial { store, folder: &folder }.run();
    let swept =
        store.list(&folder).and_then(|left| left.iter().try_for_each(|object| store.delete(&object.path)));
    checked.and_then(|checkup| swept.map(|()| checkup))
}

/// [`Error::Place`] when two writers could both be told that an object is theirs. A folder is known to be fit.
pub fn check_ledger(store: &Store) -> Result<()> {
    if store.folder().is_some() {
        return Ok(());
    }
    let folder = folder();
    let raced = Trial { store, folder: &folder }.race(Races::QUICK);
    store.list(&folder)?.iter().try_for_each(|object| store.delete(&object.path))?;
    match raced? {
        raced if raced.is_atomic() => Ok(()),
        raced => Err(Error::Place { place: store.place().to_owned(), detail: not_atomic(&raced) }),
    }
}

/// A folder that no other process uses.
fn folder() -> String {
    let now = unix().unwrap_or_default();
    format!("_doctor/{}-{}", now.as_nanos(), std::process::id())
}

fn unix() -> Option<Duration> {
    #[expect(clippy::disallowed_methods, reason = "our own clock is what the store's is compared with")]
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.ok()
}

fn not_atomic(raced: &Raced) -> String {
    let Raced { fair, races, writers, winners_most } = raced;
    format!(
        "put-if-absent is not atomic there: {} of {races} races of {writers} writers had not one winner but up to \
         {winners_most}, so that two processes could both train one run; use a store that keeps the promise",
        races - fair
    )
}

struct Trial<'a> {
    store: &'a Store,
    folder: &'a str,
}

impl Trial<'_> {
    fn run(&self) -> Result<Checkup> {
        let mut faults = Vec::new();
        self.keeps_what_it_is_given(&mut faults)?;
        let raced = self.race(Races::THOROUGH)?;
        if !raced.is_atomic() {
            faults.push(not_atomic(&raced));
        }
        let latency = self.latency()?;
        let clock_ahead_s = self.clock()?;
        if let Some(ahead) = clock_ahead_s.filter(|ahead| ahead.abs() > CLOCK_MAX.as_secs_f64()) {
            faults.push(format!("its clock and ours are {:.0} s apart; set them by NTP", ahead.abs()));
        }
        Ok(Checkup { place: self.store.place().to_owned(), faults, raced, latency, clock_ahead_s })
    }

    fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.folder)
    }

    fn keeps_what_it_is_given(&self, faults: &mut Vec<String>) -> Result<()> {
        let store = self.store;
        let mut hold = |holds: bool, fault: &str| {
            if !holds {
                faults.push(fault.to_owned());
            }
        };
        let small = self.path("small");
        store.put(&small, "one")?;
        store.put(&small, "two")?;
        hold(
            store.get(&small)?.is_some_and(|bytes| bytes == "two"),
            "what was written last is not what is read",
        );
        let listed = || Ok::<_, Error>(store.list(self.folder)?.iter().any(|object| object.path == small));
        hold(listed()?, "what was written is not listed at once");
        hold(!store.create(&small, "three")?, "an object that is there can be created once more");
        store.delete(&small)?;
        hold(store.get(&small)?.is_none() && !listed()?, "what was deleted is still there");
        let large: Vec<u8> = (0..LARGE).map(|at| (at % 251) as u8).collect();
        store.put(&self.path("large"), large.clone())?;
        let read = store.get(&self.path("large"))?;
        hold(read.is_some_and(|bytes| bytes == large), "a large object is not read as it was written");
        let pieces = store.ranges(&self.path("large"), &[5..9, (LARGE as u64 - 2)..LARGE as u64])?;
        hold(
            pieces[0] == large[5..9] && pieces[1] == large[LARGE - 2..],
            "a range is not the part that was asked for",
        );
        Ok(())
    }

    fn race(&self, Races { races, writers }: Races) -> Result<Raced> {
        let mut raced = Raced { races, writers, ..Raced::default() };
        for race in 0..races {
            let path = self.path(&format!("race-{race:04}"));
            let line = Barrier::new(writers as usize);
            let told: Vec<Result<bool>> = std::thread::scope(|scope| {
                let writer = |number: u32| {
                    let (path, line) = (&path, &line);
                    move || {
                        line.wait();
                        self.store.create(path, format!("{number}"))
                    }
                };
                let racing: Vec<_> = (0..writers).map(|number| scope.spawn(writer(number))).collect();
                racing.into_iter().map(|thread| thread.join().expect("a writer does not panic")).collect()
            });
            let told = told.into_iter().collect::<Result<Vec<bool>>>()?;
            let winners: Vec<usize> = (0..told.len()).filter(|number| told[*number]).collect();
            let there = self.store.get(&path)?;
            let is_theirs = |number: &usize| there.as_ref().is_some_and(|bytes| *bytes == number.to_string());
            raced.winners_most = raced.winners_most.max(winners.len() as u32);
            raced.fair += u32::from(winners.len() == 1 && winners.iter().all(is_theirs));
        }
        Ok(raced)
    }

    fn latency(&self) -> Result<Latency> {
        let median = |call: &dyn Fn(usize) -> Result<()>| -> Result<f64> {
            let mut took = Vec::new();
            for number in 0..CALLS {
                let began = Instant::now();
                call(number)?;
                took.push(began.elapsed().as_secs_f64() * 1e3);
            }
            took.sort_by(f64::total_cmp);
            Ok(took[CALLS / 2])
        };
        let at = |kind: &str, number: usize| self.path(&format!("{kind}-{number}"));
        Ok(Latency {
            put_ms: median(&|number| self.store.put(&at("put", number), "x"))?,
            create_ms: median(&|number| self.store.create(&at("create", number), "x").map(drop))?,
            get_ms: median(&|number| self.store.get(&at("put", number)).map(drop))?,
            list_ms: median(&|_| self.store.list(self.folder).map(drop))?,
        })
    }

    fn clock(&self) -> Result<Option<f64>> {
        let path = self.path("clock");
        let ours = unix();
        self.store.put(&path, "x")?;
        let written = self.store.written_ms(&path)?;
        // Stores tell whole seconds.
        Ok(written.zip(ours).map(|(theirs, ours)| theirs as f64 / 1e3 - ours.as_secs_f64()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_in_memory_and_a_folder_are_fit_and_left_as_they_were() {
        let root = tempfile::tempdir().unwrap();
        for store in [Store::memory().unwrap(), Store::durable(root.path().to_str().unwrap()).unwrap()] {
            store.put("mine", "x").unwrap();
            let checkup = check(&store).unwrap();
            assert_eq!(checkup.faults, Vec::<String>::new());
            assert_eq!((checkup.raced.fair, checkup.raced.winners_most), (20, 1));
            assert!(checkup.clock_ahead_s.is_some_and(|ahead| ahead.abs() < 60.0), "{checkup:?}");
            check_ledger(&store).unwrap();
            let left: Vec<String> = store.list("").unwrap().into_iter().map(|object| object.path).collect();
            assert_eq!(left, ["mine"]);
        }
    }
}
