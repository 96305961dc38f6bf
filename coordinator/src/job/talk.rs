//! What workers say, and where they are told that the run is.

use anello_proto::convert::Malformed;
use anello_proto::ring::{Hello, Leave, Order, Pace, Stance};

use super::*;
use crate::records::record_of;

impl Running {
    pub(super) fn hello(&mut self, hello: v1::Hello, orders: Orders) {
        let worker = WorkerId(hello.worker);
        if self.links.get(&worker).is_some_and(|link| link.connection >= hello.connection) {
            return;
        }
        if self.awaits_members() && !self.core.knows(worker) {
            tracing::info!(%worker, "came before all members of the ring, and waits for one");
            self.early.retain(|(before, _)| before.worker != worker.0);
            return self.early.push((hello, orders));
        }
        let machine = hello.machine.clone();
        let hello = match self.checked(hello) {
            Ok(hello) => hello,
            Err((what, reason)) => {
                self.notify(Notice::Refused(what));
                tracing::warn!(%worker, machine, reason, "refused a worker");
                let order = Some((&Order::Leave { why: Leave::Refused { reason } }).into());
                let _ = orders.try_send(Ok(v1::ToWorker { epoch: self.epoch.0, order }));
                return;
            }
        };
        self.links.insert(worker, Link { connection: hello.connection, orders });
        self.news.0.tell();
        self.rows.connected(worker);
        self.welcome(worker);
        let Hello { endpoints, machine, stance, .. } = hello;
        self.core_event(Event::Linked { worker, endpoints, machine, stance });
    }

    /// A hello that fits to those of the others; otherwise why it is refused.
    fn checked(&mut self, hello: v1::Hello) -> Result<Hello, (Refused, String)> {
        let hello =
            Hello::try_from(hello).map_err(|malformed| (Refused::Malformed, malformed.to_string()))?;
        // Whoever comes to nobody says anew what the workers are.
        self.kind.take_if(|_| !self.core.knows_anyone());
        let Kind { build, device } = self
            .kind
            .get_or_insert_with(|| Kind { build: hello.build.clone(), device: hello.device.clone() });
        let differs: Vec<String> = [("build", build, &hello.build), ("device", device, &hello.device)]
            .into_iter()
            .filter(|(_, ours, theirs)| *ours != *theirs)
            .map(|(what, ours, theirs)| format!("its {what} is {theirs}, the job's {ours}"))
            .collect();
        if differs.is_empty() {
            return Ok(hello);
        }
        let differs = differs.join(" and ");
        Err((Refused::Stranger, format!("{differs}; start workers of one build on one kind of device")))
    }

    /// Members of the ring that was taken up may be training, and none has said what they are.
    fn awaits_members(&self) -> bool {
        self.kind.is_none() && self.core.knows_anyone() && self.core.outcome().is_none()
    }

    /// Takes in those that came early, once it can be said whether they fit.
    pub(super) fn admit(&mut self) {
        if !self.awaits_members() {
            std::mem::take(&mut self.early).into_iter().for_each(|(hello, orders)| self.hello(hello, orders));
        }
    }

    pub(super) fn word(&mut self, worker: WorkerId, word: v1::from_worker::Word) {
        match word {
            v1::from_worker::Word::Hello(_) => {
                let why = "it said hello twice; over one connection that is the first word, and only that";
                self.refuse(worker, Refused::Impossible, Status::failed_precondition(why));
            }
            v1::from_worker::Word::Stance(stance) => match Stance::try_from(stance) {
                Ok(stance) => {
                    self.core_event(Event::Stands { worker, stance });
                    if !self.links.contains_key(&worker) {
                        self.notify(Notice::Refused(Refused::Impossible));
                    }
                }
                Err(malformed) => self.refuse_malformed(worker, malformed),
            },
            v1::from_worker::Word::Pace(pace) => match Pace::try_from(pace) {
                Ok(pace) => self.core_event(Event::Paced { worker, pace }),
                Err(malformed) => self.refuse_malformed(worker, malformed),
            },
            v1::from_worker::Word::Failed(failed) => match failed.checked() {
                Ok(reason) => self.core_event(Event::Failed { worker, reason }),
                Err(malformed) => self.refuse_malformed(worker, malformed),
            },
            v1::from_worker::Word::Step(report) if report.step >= self.total => {
                let Self { total, .. } = self;
                let why = format!(
                    "it reports step {}, and the run has {total}; start workers of this run",
                    report.step
                );
                self.refuse(worker, Refused::Impossible, Status::out_of_range(why));
            }
            v1::from_worker::Word::Step(report) => self.step(worker, report),
        }
    }

    fn refuse_malformed(&mut self, worker: WorkerId, malformed: Malformed) {
        self.refuse(worker, Refused::Malformed, Status::invalid_argument(malformed.to_string()));
    }

    /// Has nothing more to do with what comes over a connection, and says why.
    pub(super) fn refuse(&mut self, worker: WorkerId, what: Refused, why: Status) {
        self.notify(Notice::Refused(what));
        self.drop_link(worker, why);
    }

    /// A step's figures, from whoever is rank 0, or was asked.
    fn step(&mut self, worker: WorkerId, mut report: v1::StepReport) {
        let mut events = Vec::new();
        for text in std::mem::take(&mut report.events) {
            match serde_json::from_str(&text) {
                // Only what a step can bring about: the rest of the log is the coordinator's.
                Ok(
                    event @ (Logged::Stage { .. }
                    | Logged::Skipped { .. }
                    | Logged::Spike { .. }
                    | Logged::Epoch { .. }
                    | Logged::SkippedData { .. }),
                ) => events.push(event),
                Ok(_) => {
                    let why = format!(
                        "with step {} it reports what no step brings about: {text}; that is the coordinator's to say",
                        report.step
                    );
                    return self.refuse(worker, Refused::Event, Status::permission_denied(why));
                }
                // Of a later build: the step is a step all the same.
                Err(cause) => {
                    tracing::warn!(%worker, %cause, text, "a worker reports an event that this build does not know");
                    self.notify(Notice::Refused(Refused::Event));
                }
            }
        }
        if !self.rows.take(report.step) {
            return;
        }
        events.into_iter().for_each(|event| self.desk.ask(Task::Append { event, formed: None }));
        let record = record_of(report);
        if let Some(index) = self.stages.iter().position(|name| *name == record.stage)
            && self.stage != Some(index)
        {
            self.stage = Some(index);
            self.notify(Notice::Stage { index });
        }
        self.core_event(Event::Reported { step: Step(record.step + 1) });
        self.desk.ask(Task::Row(record.clone()));
        self.notify(Notice::Step(record));
    }

    /// Says where the run is. Said a second time over one connection, it asks for rows.
    pub(super) fn welcome(&mut self, worker: WorkerId) {
        let welcome = v1::Welcome {
            run: self.run.clone(),
            heartbeat_ms: millis(self.timings.heartbeat).0,
            silence_ms: millis(self.timings.silence).0,
            reported: self.rows.reported(),
        };
        if let Some(link) = self.links.get(&worker) {
            let order = Some(v1::to_worker::Order::Welcome(welcome));
            let _ = link.orders.try_send(Ok(v1::ToWorker { epoch: self.epoch.0, order }));
        }
    }

    /// Closes a connection; the last that its worker hears over it is why.
    pub(super) fn drop_link(&mut self, worker: WorkerId, why: Status) {
        if let Some(link) = self.links.remove(&worker) {
            self.news.0.tell();
            tracing::info!(%worker, reason = why.message(), "closed a worker's connection");
            let _ = link.orders.try_send(Err(why));
            self.core_event(Event::Unlinked { worker });
        }
    }
}
