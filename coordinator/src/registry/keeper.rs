//! The registry's thread: what comes to it, and what it does about it.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::mpsc::Sender as SaidSender;
use std::time::{Duration, Instant};

use anello_configs::{RunConfig, Timings};
use anello_proto::jobs::{JobName, Phase, Submission};
use anello_proto::v1;
use anello_store::checkpoint::refuse_leftovers;
use anello_store::{CONFIG, Store, read_config};
use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc};

use super::entry::Entry;
use super::place::{Place, Spec, unix_ms};
use super::queue::{Ask, share};
use super::{Command, Recorded, Refusal, RegistryOptions, Said, Wish};
use crate::core::{Goal, Outcome};
use crate::launch::{Crew, Launcher};
use crate::service::Jobs;

/// How often the registry looks at processes, which say nothing by themselves, and after news at most.
const TICK: Duration = Duration::from_millis(50);
/// Time between two looks whether another coordinator has a place, where no job asks for more.
const WATCH: Duration = Duration::from_secs(5);
/// Deaths of a job's workers that are replaced.
const BUDGET: u32 = 1000;

/// Says how workers of a job are started, given its name, its run and how many it wants.
pub(super) type Launch<L> = Box<dyn Fn(&str, &RunConfig, u32) -> L + Send>;

pub(super) struct Keeper<L: Launcher> {
    options: RegistryOptions,
    place: Place,
    /// In the order of the queue.
    entries: Vec<Entry<L>>,
    /// Processes of rings that are over.
    leaving: Vec<Crew<L>>,
    runtime: Handle,
    jobs: Jobs,
    said: SaidSender<Said>,
    launcher: Launch<L>,
    stopping: bool,
    /// When it looked last whether another coordinator has the place.
    looked: Instant,
    /// Woken by the news of every ring.
    wake: Arc<Notify>,
}

impl<L: Launcher> Keeper<L> {
    pub fn new(
        options: RegistryOptions,
        place: Place,
        entries: Vec<Entry<L>>,
        runtime: Handle,
        jobs: Jobs,
        said: SaidSender<Said>,
        launcher: Launch<L>,
    ) -> Self {
        let (looked, wake) = (Instant::now(), Arc::default());
        Self {
            options,
            place,
            entries,
            leaving: Vec::new(),
            runtime,
            jobs,
            said,
            launcher,
            stopping: false,
            looked,
            wake,
        }
    }

    pub fn run(mut self, mut inbox: mpsc::Receiver<Command>) {
        let runtime = self.runtime.clone();
        loop {
            let (until, wake) = (tokio::time::Instant::from_std(self.next_look()), self.wake.clone());
            let command = runtime.block_on(async {
                tokio::select! {
                    command = inbox.recv() => Some(command),
                    // What comes together is looked at together.
                    () = wake.notified() => {
                        tokio::time::timeout(TICK, inbox.recv()).await.ok()
                    }
                    () = tokio::time::sleep_until(until) => None,
                }
            });
            let over = match command {
                Some(Some(command)) => self.obey(command).is_break(),
                Some(None) => true,
                None => false,
            };
            if over {
                return;
            }
            if let Err(fenced) = self.look_around() {
                // Dropping the crews ends the workers: the other coordinator starts its own.
                let _ = self.said.send(Said::Fenced { by: fenced.to_string() });
                return;
            }
            let kept = self.entries.iter().any(|entry| entry.ring.is_some());
            if self.stopping && !kept && self.leaving.is_empty() {
                return;
            }
        }
    }

    /// When it is to look around though nobody has said anything.
    fn next_look(&self) -> Instant {
        let ends = |entry: &Entry<L>| entry.ring.as_ref().is_some_and(|ring| ring.ends);
        let tends =
            !self.leaving.is_empty() || self.entries.iter().any(|entry| entry.crew.is_some() || ends(entry));
        let (soon, watch) = (Instant::now() + TICK, self.looked + self.watch());
        let due = |entry: &Entry<L>| [entry.again_at, entry.waits.due()].into_iter().flatten().min();
        let again = self.entries.iter().filter_map(due).min();
        if tends { soon } else { again.map_or(watch, |again| again.min(watch)).max(soon) }
    }

    /// The times of a job's ring.
    fn timings(&self, at: usize) -> Timings {
        self.options.timings.unwrap_or_else(|| Timings::of(&self.entries[at].config))
    }

    /// Time between two looks whether another coordinator has the place: as often as the most impatient of its jobs is looked
    /// after.
    fn watch(&self) -> Duration {
        let jobs = (0..self.entries.len()).map(|at| self.timings(at).watch);
        jobs.chain([WATCH]).min().unwrap_or(WATCH)
    }

    /// Breaks when there is nothing more to do for this coordinator.
    fn obey(&mut self, command: Command) -> ControlFlow<()> {
        match command {
            Command::Submit(submission, reply) => {
                let submitted = self.submit(submission);
                let job = submitted.map(|at| {
                    self.share();
                    self.view(at)
                });
                let _ = reply.send(job);
            }
            Command::Ensure(submission, reply) => {
                let ensured = self.ensure(submission);
                let job = ensured.map(|at| {
                    self.share();
                    self.view(at)
                });
                let _ = reply.send(job);
            }
            Command::List(reply) => {
                let all = (0..self.entries.len()).map(|at| self.view(at)).collect();
                let _ = reply.send(Ok(all));
            }
            Command::Describe(name, reply) => {
                let detail = self.find(&name).map(|at| {
                    self.refresh(at);
                    self.entries[at].detail(self.queue_position(at))
                });
                let _ = reply.send(detail);
            }
            Command::Want(name, wish, reply) => {
                let wanted = self.find(&name).and_then(|at| self.want(at, wish));
                let _ = reply.send(wanted);
            }
            Command::Checkpoint(name, reply) => {
                let wanted = self.find(&name).and_then(|at| self.checkpoint(at));
                let _ = reply.send(wanted);
            }
            Command::Stop => {
                self.stopping = true;
                for ring in self.entries.iter().filter_map(|entry| entry.ring.as_ref()) {
                    self.runtime.block_on(ring.job.set_goal(Goal::Pause));
                }
            }
            Command::HandOver => {
                self.hand_over();
                return ControlFlow::Break(());
            }
        }
        ControlFlow::Continue(())
    }

    fn hand_over(&self) {
        let rings = self.entries.iter().filter_map(|entry| entry.ring.as_ref());
        let written: Vec<_> = rings.map(|ring| self.runtime.block_on(ring.job.hand_over())).collect();
        for written in written {
            // A job that is over has nothing more to write.
            let _ = self.runtime.block_on(written);
        }
    }

    fn find(&self, name: &JobName) -> std::result::Result<usize, Refusal> {
        self.entries.iter().position(|entry| entry.spec.name == name.as_str()).ok_or_else(|| {
            let names: Vec<&str> = self.entries.iter().map(|entry| entry.spec.name.as_str()).collect();
            Refusal::NoSuchJob { name: name.to_string(), there: names.join(", ") }
        })
    }

    fn view(&mut self, at: usize) -> v1::Job {
        self.refresh(at);
        self.entries[at].view(self.queue_position(at))
    }

    fn refresh(&mut self, at: usize) {
        let runtime = self.runtime.clone();
        self.entries[at].refresh(&runtime);
    }

    /// Jobs that wait before this one; absent unless it waits.
    fn queue_position(&self, at: usize) -> Option<u32> {
        let waits = |entry: &&Entry<L>| entry.phase() == Phase::Queued;
        let entry = &self.entries[at];
        waits(&entry).then(|| self.entries[..at].iter().filter(waits).count() as u32)
    }

    fn submit(&mut self, submission: Submission) -> std::result::Result<usize, Refusal> {
        let Submission { config, name, min, desired, run } = submission;
        if self.stopping {
            return Err(Refusal::Ending("this coordinator is ending"));
        }
        let config = RunConfig::parse("the submitted config", &config)
            .map_err(|problems| Refusal::Invalid(problems.to_string()))?;
        let name = match name {
            Some(name) => name,
            None => JobName::new(config.name.as_str()).ok_or_else(|| {
                Refusal::Invalid(format!(
                    "the config's name `{}` is no name of a job; give one with --name",
                    config.name
                ))
            })?,
        };
        if let Some(slots) = self.options.slots.filter(|slots| min > *slots) {
            return Err(Refusal::Invalid(format!(
                "it needs at least {min} workers, and this coordinator has --slots {slots}; ask for fewer, or start it with \
                 --slots {min}"
            )));
        }
        if let Ok(at) = self.find(&name) {
            let phase = self.entries[at].phase().to_string();
            return Err(Refusal::Taken { name: name.to_string(), phase });
        }
        let name = name.to_string();
        let spec = Spec { name: name.clone(), min, desired, created_unix_ms: unix_ms(), run };
        let run = self.place.run_of(&spec);
        if let Some(other) = self.entries.iter().find(|entry| entry.run == run) {
            let other = &other.spec.name;
            return Err(Refusal::Invalid(format!("job {other} trains in {run}; give another run folder")));
        }
        self.place.check()?;
        let store = Store::durable(&run)?;
        if store.get(CONFIG)?.is_none() {
            refuse_leftovers(&store)?;
        }
        if !store.create(CONFIG, config.to_toml())? {
            // A run that is there goes on, if it is the same run.
            let theirs = read_config(&store)?;
            if let Some(differs) = theirs.diff_mathematics(&config).first() {
                return Err(Refusal::Invalid(format!(
                    "{run} holds a run whose {} differs; give another name or run folder",
                    differs.key
                )));
            }
        }
        // The job exists from here on, and not before.
        if !self.place.submit(&spec)? {
            return Err(Refusal::Taken { name, phase: "another coordinator's".to_owned() });
        }
        let entry = Entry::load(spec, run, self.options.board.clone())?;
        self.entries.push(entry);
        Ok(self.entries.len() - 1)
    }

    fn ensure(&mut self, submission: Submission) -> std::result::Result<usize, Refusal> {
        let at = match &submission.name {
            Some(name) => self.find(name).ok(),
            None => None,
        };
        let Some(at) = at else { return self.submit(submission) };
        let config = RunConfig::parse("the submitted config", &submission.config)
            .map_err(|problems| Refusal::Invalid(problems.to_string()))?;
        let entry = &self.entries[at];
        if let Some(differs) = entry.config.diff_mathematics(&config).first() {
            return Err(Refusal::Invalid(format!(
                "{} holds job {} whose {} differs; give another name or place",
                entry.run, entry.spec.name, differs.key
            )));
        }
        Ok(at)
    }

    fn want(&mut self, at: usize, wish: Wish) -> std::result::Result<Recorded, Refusal> {
        self.refresh(at);
        self.place.check()?;
        let slots = self.options.slots;
        let entry = &mut self.entries[at];
        let (name, phase) = (entry.spec.name.clone(), entry.phase());
        if phase.is_terminal() {
            return Err(Refusal::Over { name, phase });
        }
        let (goal, desired) = match wish {
            Wish::Pause => (Goal::Pause, entry.standing.desired),
            Wish::Resume => (Goal::Run, entry.standing.desired),
            Wish::Cancel => (Goal::Cancel, entry.standing.desired),
            Wish::Scale(workers) => (entry.standing.goal, workers),
        };
        if entry.standing.goal == Goal::Cancel && goal != Goal::Cancel {
            return Err(Refusal::Invalid(format!("job {name} is being cancelled, which is for good")));
        }
        if desired < entry.spec.min {
            let min = entry.spec.min;
            return Err(Refusal::Invalid(format!(
                "job {name} needs at least {min} workers; ask for {min} or more"
            )));
        }
        if let (Wish::Scale(workers), Some(slots)) = (wish, slots)
            && workers > slots
        {
            return Err(Refusal::Invalid(format!(
                "job {name} cannot have {workers} workers, since this coordinator has --slots {slots}; start it with more"
            )));
        }
        if wish == Wish::Resume {
            (entry.trouble, entry.again_at) = (None, None);
        }
        if (goal, desired) == (entry.standing.goal, entry.standing.desired) {
            return Ok(None);
        }
        entry.amend(&self.runtime, goal, desired)
    }

    fn checkpoint(&mut self, at: usize) -> std::result::Result<u64, Refusal> {
        self.refresh(at);
        self.place.check()?;
        let entry = &self.entries[at];
        let (name, phase) = (entry.spec.name.clone(), entry.phase());
        if phase.is_terminal() {
            return Err(Refusal::Over { name, phase });
        }
        let Some(ring) = &entry.ring else {
            return Err(Refusal::Invalid(format!(
                "job {name} is {phase}: nothing of it trains, and what was trained is in its newest checkpoint"
            )));
        };
        let step = self.runtime.block_on(ring.job.checkpoint());
        step.map(|step| step.0).ok_or(Refusal::Ending("the job comes to an end at this moment"))
    }

    /// Only a fence is an error.
    fn look_around(&mut self) -> std::result::Result<(), anello_store::Error> {
        let runtime = self.runtime.clone();
        let mut fenced = false;
        for at in 0..self.entries.len() {
            self.entries[at].listen(&runtime);
            self.tend(at);
            if let Some(outcome) = self.entries[at].end(&runtime) {
                self.jobs.remove(&self.entries[at].spec.name);
                if let Some(mut crew) = self.entries[at].crew.take() {
                    crew.retire(self.timings(at).grace);
                    self.leaving.push(crew);
                }
                fenced |= matches!(outcome, Outcome::Fenced { .. });
            }
        }
        self.leaving.retain_mut(|crew| {
            crew.tend();
            crew.size() > 0
        });
        if fenced || self.looked.elapsed() >= self.watch() {
            self.looked = Instant::now();
            match self.place.check() {
                Err(fenced @ anello_store::Error::Fenced { .. }) => return Err(fenced),
                Err(error) => tracing::warn!(%error, "the place cannot be read now"),
                Ok(()) => {}
            }
        }
        if !self.stopping {
            self.share();
        }
        self.say_phases();
        Ok(())
    }

    /// Looks after a job's processes.
    fn tend(&mut self, at: usize) {
        let Entry { crew, ring, given, spec, .. } = &mut self.entries[at];
        let Some(alive) = crew else { return };
        for text in alive.tend() {
            let _ = self.said.send(Said::Job { job: spec.name.clone(), text });
        }
        let (Some(ring), true) = (ring, *given > Some(0) && alive.is_over()) else { return };
        if !ring.status.as_ref().is_some_and(|status| status.workers == 0 && status.outcome.is_none()) {
            return;
        }
        match alive.given_up() {
            Some(why) => self.runtime.block_on(ring.job.give_up(format!("no worker is left: {why}"))),
            // They were asked to go by somebody else: others are started when there is room.
            None => (*crew, *given) = (None, Some(0)),
        }
    }

    /// Gives slots to those whose turn it is.
    fn share(&mut self) {
        let leaving: u32 = self.leaving.iter().map(Crew::size).sum();
        let now = Instant::now();
        let takes_part = |entry: &Entry<L>| {
            entry.standing.wants_ring()
                && entry.again_at.is_none_or(|at| at <= now)
                && entry.trouble_is_over()
        };
        let at: Vec<usize> = (0..self.entries.len()).filter(|&at| takes_part(&self.entries[at])).collect();
        let ask = |entry: &Entry<L>| {
            // One that is to come to its end needs a ring, and no more workers than it has.
            let trains = entry.standing.goal == Goal::Run;
            let taken = entry.crew.as_ref().map_or(0, Crew::size);
            let desired = if trains { entry.standing.desired } else { entry.given.unwrap_or(0) };
            let given = if trains { entry.given } else { entry.given.or(Some(0)) };
            Ask { min: entry.spec.min, desired, given, taken }
        };
        let asks: Vec<Ask> = at.iter().map(|&at| ask(&self.entries[at])).collect();
        let shares = match self.options.slots {
            Some(slots) => share(slots.saturating_sub(leaving), &asks),
            None => vec![Some(0); asks.len()],
        };
        for (at, given) in at.into_iter().zip(shares) {
            let Some(given) = given else { continue };
            self.give(at, given);
        }
    }

    /// Gives a job so many workers, and starts its ring when it has none.
    fn give(&mut self, at: usize, given: u32) {
        let timings = self.timings(at);
        let entry = &mut self.entries[at];
        let name = entry.spec.name.clone();
        let external = self.options.slots.is_none();
        if entry.ring.is_none() {
            let wanted = if external { entry.standing.desired } else { given };
            if let Err(error) = entry.start(&self.runtime, timings, wanted, self.wake.clone()) {
                let _ = self.said.send(Said::Job { job: name, text: error.to_string() });
                return;
            }
            if let Some(ring) = &entry.ring {
                self.jobs.add(ring.job.clone());
            }
        }
        entry.given = Some(given);
        if given > 0 && entry.crew.is_none() {
            let launcher = (self.launcher)(&name, &entry.config, given);
            // Starting none cannot fail; those that are wanted come next.
            entry.crew = Crew::start(launcher, 0, BUDGET).ok();
        }
        if let Some(crew) = &mut entry.crew
            && let Err(error) = crew.resize(given, timings.grace)
        {
            let _ = self.said.send(Said::Job { job: name, text: error.to_string() });
        }
        let here = entry.crew.as_ref().map_or(0, Crew::size);
        let wanted = if external { entry.standing.desired } else { given.max(here) };
        if let Some(ring) = &mut entry.ring
            && wanted > 0
            && ring.told != wanted
        {
            // Those that are asked to go leave by themselves: until then there is room for them.
            ring.told = wanted;
            self.runtime.block_on(ring.job.scale(wanted));
        }
    }

    fn say_phases(&mut self) {
        for entry in &mut self.entries {
            let phase = entry.phase();
            entry.board.set_phase(&entry.spec.name, phase, entry.standing.desired);
            if entry.shown != Some(phase) {
                entry.shown = Some(phase);
                let why = entry.reason();
                let _ = self.said.send(Said::Phase { job: entry.spec.name.clone(), phase, why });
            }
            // What a queue waits for is told by its phase.
            let ring = entry.ring.as_ref().and_then(|ring| ring.status.as_ref()?.waits_for.clone());
            if let Some(what) = entry.waits.look(ring, Instant::now()) {
                let text = format!("waits for {what}");
                let _ = self.said.send(Said::Job { job: entry.spec.name.clone(), text });
            }
        }
    }
}
