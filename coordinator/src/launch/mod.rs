//! Worker processes: started, watched, started again.
//!
//! The ring does not need this: it takes whoever reports in. A launcher is what keeps somebody reporting in.

mod process;

use std::time::{Duration, Instant};

pub use process::Local;

use crate::error::Result;

/// How a worker process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The run is over, or the worker was asked to go and went: it is not started again.
    Done,
    /// Starting it again changes nothing: its config or build does not fit, or its machine computes wrongly.
    Hopeless(i32),
    /// What its run needs is not on its machine: data, or the device. That may be a mount that comes back: a few more are
    /// tried.
    Unfit(i32),
    /// It died, or its machine did.
    Died(Option<i32>),
}

/// Something that can start workers.
pub trait Launcher: Send {
    /// A handle on one worker process.
    type Process: Process;

    /// Starts worker number `slot` of the job (a number that a replacement keeps).
    ///
    /// # Errors
    /// [`crate::Error::Launch`].
    fn start(&mut self, slot: u32) -> Result<Self::Process>;
}

/// A worker process.
pub trait Process: Send {
    /// How it ended; absent while it lives. Never waits.
    fn poll(&mut self) -> Option<Exit>;
    /// Asks it to go.
    fn terminate(&mut self);
    /// Ends it at once.
    fn kill(&mut self);
    /// What a person calls it.
    fn name(&self) -> String;
    /// The last that it said of an error, once it has ended; absent: nothing.
    fn last_words(&mut self) -> Option<String> {
        None
    }
}

/// Pause before a worker that died is started again: the first, and the longest; each death within
/// [`Crew::STEADY`] doubles it.
const PAUSE: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(30));
/// Ends in a row of a slot's workers for want of what the run needs: then it is given up.
const UNFIT_MAX: u32 = 3;

struct Slot<P> {
    process: Option<P>,
    started: Instant,
    pause: Duration,
    again_at: Option<Instant>,
    over: bool,
    /// Ends in a row for want of what the run needs.
    unfit: u32,
    /// It was asked to go, and is ended at this time if it has not.
    until: Option<Instant>,
}

impl<P: Process> Slot<P> {
    fn new(process: P) -> Self {
        let started = Instant::now();
        Self {
            process: Some(process),
            started,
            pause: PAUSE.0,
            again_at: None,
            over: false,
            unfit: 0,
            until: None,
        }
    }

    fn retire(&mut self, until: Instant) {
        (self.over, self.again_at) = (true, None);
        if let Some(process) = &mut self.process
            && self.until.is_none()
        {
            self.until = Some(until);
            process.terminate();
        }
    }
}

/// The workers of one job.
pub struct Crew<L: Launcher> {
    launcher: L,
    slots: Vec<Slot<L::Process>>,
    /// Workers that are wanted: those that have gone for good count.
    wanted: u32,
    /// Deaths that are still replaced.
    budget: u32,
    /// Why a worker was given up, the last time.
    given_up: Option<String>,
    /// How a worker ended that another was started for, and when: the last one.
    failed: Option<(Instant, String)>,
}

impl<L: Launcher> Crew<L> {
    /// A worker that lived for so long is not what keeps dying.
    pub const STEADY: Duration = Duration::from_secs(60);

    /// Starts `workers` workers, and replaces up to `budget` that die.
    ///
    /// # Errors
    /// [`crate::Error::Launch`]; those that were started are ended.
    pub fn start(mut launcher: L, workers: u32, budget: u32) -> Result<Self> {
        let mut slots: Vec<Slot<L::Process>> = Vec::new();
        for slot in 0..workers {
            match launcher.start(slot) {
                Ok(process) => slots.push(Slot::new(process)),
                Err(error) => {
                    slots.iter_mut().filter_map(|slot| slot.process.as_mut()).for_each(Process::kill);
                    return Err(error);
                }
            }
        }
        Ok(Self { launcher, slots, wanted: workers, budget, given_up: None, failed: None })
    }

    /// Looks after them: call it a few times a second. Returns what a person should hear.
    pub fn tend(&mut self) -> Vec<String> {
        let mut said = Vec::new();
        for (number, slot) in (0u32..).zip(&mut self.slots) {
            let ended = slot.process.as_mut().and_then(|process| {
                let exit = process.poll()?;
                let words = process.last_words().map(|words| format!(": {words}")).unwrap_or_default();
                Some((exit, process.name(), words))
            });
            if let Some((exit, name, words)) = ended {
                slot.process = None;
                let steady = slot.started.elapsed() >= Self::STEADY;
                slot.unfit = match exit {
                    Exit::Unfit(_) if steady => 1,
                    Exit::Unfit(_) => slot.unfit + 1,
                    Exit::Done | Exit::Hopeless(_) | Exit::Died(_) => 0,
                };
                let of_code =
                    |code: Option<i32>| code.map_or("a signal".to_owned(), |code| format!("code {code}"));
                let given_up = match exit {
                    _ if slot.over => None,
                    Exit::Done => {
                        slot.over = true;
                        None
                    }
                    Exit::Hopeless(code) => Some(format!("ended with code {code} and is not started again")),
                    Exit::Unfit(code) if slot.unfit >= UNFIT_MAX => {
                        let times = slot.unfit;
                        Some(format!(
                            "ended with code {code}, {times} times in a row, and is not started again"
                        ))
                    }
                    Exit::Died(_) | Exit::Unfit(_) if self.budget == 0 => {
                        Some("died, as too many did before: it is not started again".to_owned())
                    }
                    Exit::Died(_) | Exit::Unfit(_) => {
                        self.budget -= 1;
                        slot.pause = if steady { PAUSE.0 } else { (slot.pause * 2).min(PAUSE.1) };
                        slot.again_at = Some(Instant::now() + slot.pause);
                        let how = of_code(match exit {
                            Exit::Unfit(code) => Some(code),
                            Exit::Died(code) => code,
                            Exit::Done | Exit::Hopeless(_) => None,
                        });
                        let how = format!("worker {number} ({name}) ended with {how}");
                        self.failed = Some((Instant::now(), format!("{how}{words}")));
                        said.push(format!("{how}; another is started{words}"));
                        None
                    }
                };
                if let Some(how) = given_up {
                    slot.over = true;
                    let why = format!("worker {number} ({name}) {how}{words}");
                    self.given_up = Some(why.clone());
                    said.push(why);
                }
            }
            if slot.again_at.is_some_and(|at| at <= Instant::now()) {
                slot.again_at = None;
                match self.launcher.start(number) {
                    Ok(process) => (slot.process, slot.started) = (Some(process), Instant::now()),
                    Err(error) => {
                        slot.over = true;
                        self.given_up = Some(error.to_string());
                        said.push(error.to_string());
                    }
                }
            }
            if slot.until.is_some_and(|until| until <= Instant::now())
                && let Some(process) = &mut slot.process
            {
                process.kill();
                slot.process = None;
            }
        }
        said
    }

    /// Wants `workers` workers from now on. More: they are started. Fewer: the newest are asked to go, and ended when
    /// they have not within `grace`.
    ///
    /// # Errors
    /// [`crate::Error::Launch`]; those that were started stay.
    pub fn resize(&mut self, workers: u32, grace: Duration) -> Result<()> {
        while self.wanted < workers {
            let process = self.launcher.start(self.slots.len() as u32)?;
            self.slots.push(Slot::new(process));
            self.wanted += 1;
        }
        let until = Instant::now() + grace;
        for slot in self.slots.iter_mut().rev().filter(|slot| !slot.over) {
            if self.wanted <= workers {
                break;
            }
            self.wanted -= 1;
            slot.retire(until);
        }
        // The rest of them had gone by themselves.
        self.wanted = self.wanted.min(workers);
        Ok(())
    }

    /// Asks all to go, and ends those that have not within `grace`, if it is tended on.
    pub fn retire(&mut self, grace: Duration) {
        let until = Instant::now() + grace;
        self.slots.iter_mut().for_each(|slot| slot.retire(until));
    }

    /// Workers that live, or are about to be started again.
    pub fn size(&self) -> u32 {
        self.slots.iter().filter(|slot| slot.process.is_some() || slot.again_at.is_some()).count() as u32
    }

    /// Why a worker is not started again, when one had to be given up.
    pub fn given_up(&self) -> Option<&str> {
        self.given_up.as_deref()
    }

    /// How a worker ended a short while ago that another was started for, and what it said of it.
    pub fn failing(&self) -> Option<&str> {
        self.failed.as_ref().filter(|(at, _)| at.elapsed() < 2 * Self::STEADY).map(|(_, how)| how.as_str())
    }

    /// Whether no worker lives and none will be started.
    pub fn is_over(&self) -> bool {
        self.slots.iter().all(|slot| slot.over)
    }

    /// Asks all to go, and ends those that have not within `grace`.
    pub fn dismiss(&mut self, grace: Duration) {
        self.slots.iter_mut().for_each(|slot| (slot.over, slot.again_at) = (true, None));
        let mut living: Vec<&mut L::Process> =
            self.slots.iter_mut().filter_map(|slot| slot.process.as_mut()).collect();
        living.retain_mut(|process| process.poll().is_none());
        living.iter_mut().for_each(|process| process.terminate());
        let until = Instant::now() + grace;
        while !living.is_empty() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
            living.retain_mut(|process| process.poll().is_none());
        }
        living.iter_mut().for_each(|process| process.kill());
    }
}

impl<L: Launcher> Drop for Crew<L> {
    fn drop(&mut self) {
        self.dismiss(Duration::ZERO);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// Workers that end as they are told to.
    #[derive(Clone, Default)]
    struct Fake(Arc<Mutex<FakeState>>);

    #[derive(Default)]
    struct FakeState {
        started: Vec<u32>,
        ends: Vec<(u32, Exit)>,
        words: Option<String>,
        killed: Vec<u32>,
    }

    struct FakeProcess(u32, Fake);

    impl Launcher for Fake {
        type Process = FakeProcess;
        fn start(&mut self, slot: u32) -> Result<FakeProcess> {
            self.0.lock().unwrap().started.push(slot);
            Ok(FakeProcess(slot, self.clone()))
        }
    }

    impl Process for FakeProcess {
        fn poll(&mut self) -> Option<Exit> {
            let mut state = self.1.0.lock().unwrap();
            let at = state.ends.iter().position(|(slot, _)| *slot == self.0)?;
            Some(state.ends.remove(at).1)
        }
        fn terminate(&mut self) {
            self.1.0.lock().unwrap().ends.push((self.0, Exit::Done));
        }
        fn kill(&mut self) {
            self.1.0.lock().unwrap().killed.push(self.0);
        }
        fn name(&self) -> String {
            format!("fake {}", self.0)
        }
        fn last_words(&mut self) -> Option<String> {
            self.1.0.lock().unwrap().words.clone()
        }
    }

    fn end(fake: &Fake, slot: u32, exit: Exit) {
        fake.0.lock().unwrap().ends.push((slot, exit));
    }

    #[test]
    fn the_dead_are_replaced_within_the_budget_and_others_are_not() {
        let fake = Fake::default();
        let mut crew = Crew::start(fake.clone(), 3, 1).unwrap();
        end(&fake, 0, Exit::Died(None));
        end(&fake, 1, Exit::Hopeless(2));
        let said = crew.tend();
        assert_eq!(said.len(), 2, "{said:?}");
        assert!(said[0].contains("a signal; another is started") && said[1].contains("code 2"), "{said:?}");
        let until = Instant::now() + Duration::from_secs(5);
        while fake.0.lock().unwrap().started.len() < 4 && Instant::now() < until {
            crew.tend();
        }
        assert_eq!(fake.0.lock().unwrap().started, [0, 1, 2, 0]);
        end(&fake, 0, Exit::Died(Some(1)));
        assert!(crew.tend()[0].contains("too many"), "the budget is spent");
        assert!(!crew.is_over());
        end(&fake, 2, Exit::Done);
        assert_eq!(crew.tend(), Vec::<String>::new());
        assert!(crew.is_over());
    }

    /// Ends of a slot's worker one after the other, without the waits between them.
    #[test]
    fn each_death_doubles_the_pause_up_to_the_longest_and_a_steady_worker_begins_anew() {
        let fake = Fake::default();
        let mut crew = Crew::start(fake.clone(), 2, 1000).unwrap();
        let pause_after = |crew: &mut Crew<Fake>, lived: Duration| {
            crew.slots[0].started = Instant::now() - lived;
            end(&fake, 0, Exit::Died(None));
            let before = Instant::now();
            crew.tend();
            let slot = &mut crew.slots[0];
            let at = slot.again_at.expect("another is started");
            assert!(slot.process.is_none() && at >= before + slot.pause, "not before the pause is over");
            slot.again_at = Some(Instant::now());
            crew.tend();
            assert!(crew.slots[0].process.is_some(), "then at once");
            crew.slots[0].pause.as_millis()
        };
        let soon = Crew::<Fake>::STEADY / 2;
        let pauses: Vec<u128> = (0..10).map(|_| pause_after(&mut crew, soon)).collect();
        assert_eq!(pauses, [400, 800, 1600, 3200, 6400, 12_800, 25_600, 30_000, 30_000, 30_000]);
        assert_eq!(pause_after(&mut crew, Crew::<Fake>::STEADY), 200);
        assert_eq!(pause_after(&mut crew, soon), 400);
        assert_eq!(crew.slots[1].pause, PAUSE.0, "the other slot's worker has not died");
    }

    #[test]
    fn what_a_run_needs_is_looked_for_a_few_times_and_the_reason_is_told() {
        let fake = Fake::default();
        fake.0.lock().unwrap().words = Some("data/tales: there is nothing".to_owned());
        let mut crew = Crew::start(fake.clone(), 1, 1000).unwrap();
        for time in 1..3 {
            end(&fake, 0, Exit::Unfit(6));
            let told =
                "worker 0 (fake 0) ended with code 6; another is started: data/tales: there is nothing";
            assert_eq!(crew.tend(), [told]);
            let failing = "worker 0 (fake 0) ended with code 6: data/tales: there is nothing";
            assert_eq!((crew.failing(), crew.given_up()), (Some(failing), None));
            let until = Instant::now() + Duration::from_secs(5);
            while fake.0.lock().unwrap().started.len() <= time && Instant::now() < until {
                crew.tend();
            }
        }
        end(&fake, 0, Exit::Unfit(6));
        let told = "worker 0 (fake 0) ended with code 6, 3 times in a row, and is not started again: data/tales: there is nothing";
        assert_eq!((crew.tend(), crew.is_over(), crew.given_up()), (vec![told.to_owned()], true, Some(told)));
        // One that died of something else in between begins the count anew.
        let mut crew = Crew::start(fake.clone(), 1, 1000).unwrap();
        for exit in [Exit::Unfit(6), Exit::Unfit(6), Exit::Died(None), Exit::Unfit(6)] {
            let before = fake.0.lock().unwrap().started.len();
            end(&fake, 0, exit);
            let until = Instant::now() + Duration::from_secs(5);
            while fake.0.lock().unwrap().started.len() == before && Instant::now() < until {
                crew.tend();
            }
        }
        assert!(!crew.is_over());
    }

    #[test]
    fn a_crew_grows_and_the_newest_go_first() {
        let fake = Fake::default();
        let mut crew = Crew::start(fake.clone(), 1, 10).unwrap();
        crew.resize(3, Duration::from_secs(5)).unwrap();
        assert_eq!((crew.size(), fake.0.lock().unwrap().started.clone()), (3, vec![0, 1, 2]));
        crew.resize(2, Duration::from_secs(5)).unwrap();
        assert_eq!(fake.0.lock().unwrap().ends, [(2, Exit::Done)], "the newest was asked to go");
        assert_eq!((crew.tend(), crew.size()), (Vec::new(), 2));
        crew.resize(3, Duration::from_secs(5)).unwrap();
        assert_eq!(fake.0.lock().unwrap().started, [0, 1, 2, 3], "a number is not used twice");
        end(&fake, 1, Exit::Died(None));
        crew.tend();
        crew.retire(Duration::from_secs(5));
        crew.tend();
        assert_eq!((crew.size(), crew.is_over(), crew.given_up()), (0, true, None));
        assert!(fake.0.lock().unwrap().killed.is_empty());
    }

    #[test]
    fn one_that_does_not_go_is_ended() {
        #[derive(Clone, Default)]
        struct Deaf(Arc<Mutex<u32>>);
        impl Launcher for Deaf {
            type Process = Self;
            fn start(&mut self, _slot: u32) -> Result<Self> {
                Ok(self.clone())
            }
        }
        impl Process for Deaf {
            fn poll(&mut self) -> Option<Exit> {
                None
            }
            fn terminate(&mut self) {}
            fn kill(&mut self) {
                *self.0.lock().unwrap() += 1;
            }
            fn name(&self) -> String {
                "deaf".to_owned()
            }
        }
        let deaf = Deaf::default();
        let mut crew = Crew::start(deaf.clone(), 2, 10).unwrap();
        crew.resize(1, Duration::ZERO).unwrap();
        crew.tend();
        assert_eq!((*deaf.0.lock().unwrap(), crew.size()), (1, 1));
    }

    #[test]
    fn dismissed_workers_go_and_are_not_replaced() {
        let fake = Fake::default();
        let mut crew = Crew::start(fake.clone(), 2, 10).unwrap();
        crew.dismiss(Duration::from_secs(5));
        assert!(crew.is_over() && fake.0.lock().unwrap().killed.is_empty());
        drop(crew);
        assert_eq!(fake.0.lock().unwrap().started, [0, 1]);
    }
}
