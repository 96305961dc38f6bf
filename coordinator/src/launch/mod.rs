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
    /// Starting it again changes nothing: its config or build does not fit.
    Hopeless(i32),
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
}

/// Pause before a worker that died is started again: the first, and the longest; each death within
/// [`Crew::STEADY`] doubles it.
const PAUSE: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(30));

struct Slot<P> {
    process: Option<P>,
    started: Instant,
    pause: Duration,
    again_at: Option<Instant>,
    over: bool,
}

/// The workers of one job.
pub struct Crew<L: Launcher> {
    launcher: L,
    slots: Vec<Slot<L::Process>>,
    /// Deaths that are still replaced.
    budget: u32,
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
                Ok(process) => slots.push(Slot {
                    process: Some(process),
                    started: Instant::now(),
                    pause: PAUSE.0,
                    again_at: None,
                    over: false,
                }),
                Err(error) => {
                    slots.iter_mut().filter_map(|slot| slot.process.as_mut()).for_each(Process::kill);
                    return Err(error);
                }
            }
        }
        Ok(Self { launcher, slots, budget })
    }

    /// Looks after them: call it a few times a second. Returns what a person should hear.
    pub fn tend(&mut self) -> Vec<String> {
        let mut said = Vec::new();
        for (number, slot) in (0u32..).zip(&mut self.slots) {
            if let Some((exit, name)) = slot.process.as_mut().and_then(|p| Some((p.poll()?, p.name()))) {
                slot.process = None;
                match exit {
                    Exit::Done => slot.over = true,
                    Exit::Hopeless(code) => {
                        slot.over = true;
                        said.push(format!(
                            "worker {number} ({name}) ended with code {code} and is not started again"
                        ));
                    }
                    Exit::Died(code) if self.budget > 0 => {
                        self.budget -= 1;
                        let steady = slot.started.elapsed() >= Self::STEADY;
                        slot.pause = if steady { PAUSE.0 } else { (slot.pause * 2).min(PAUSE.1) };
                        slot.again_at = Some(Instant::now() + slot.pause);
                        let how = code.map_or("a signal".to_owned(), |code| format!("code {code}"));
                        said.push(format!("worker {number} ({name}) ended with {how}; another is started"));
                    }
                    Exit::Died(_) => {
                        slot.over = true;
                        said.push(format!(
                            "worker {number} ({name}) died, as too many did before: it is not started again"
                        ));
                    }
                }
            }
            if slot.again_at.is_some_and(|at| at <= Instant::now()) {
                slot.again_at = None;
                match self.launcher.start(number) {
                    Ok(process) => (slot.process, slot.started) = (Some(process), Instant::now()),
                    Err(error) => {
                        slot.over = true;
                        said.push(error.to_string());
                    }
                }
            }
        }
        said
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
