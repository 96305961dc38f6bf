//! What workers say, and where they are told that the run is.

use anello_proto::ring::{Hello, Leave, Order, Pace, Stance};

use super::*;
use crate::records::record_of;

impl Running {
    pub(super) fn hello(&mut self, hello: v1::Hello, orders: mpsc::Sender<v1::ToWorker>) {
        let worker = WorkerId(hello.worker);
        if self.links.get(&worker).is_some_and(|link| link.connection >= hello.connection) {
            return;
        }
        let machine = hello.machine.clone();
        let refuse = |reason: String| {
            tracing::warn!(%worker, machine, reason, "refused a worker");
            let order = Order::Leave { why: Leave::Refused { reason } };
            let _ = orders.try_send(v1::ToWorker { epoch: self.epoch.0, order: Some((&order).into()) });
        };
        let hello = match Hello::try_from(hello) {
            Ok(hello) => hello,
            Err(malformed) => return refuse(malformed.to_string()),
        };
        if let Some(Kind { build, device }) = &self.first {
            let differs: Vec<String> = [("build", build, &hello.build), ("device", device, &hello.device)]
                .into_iter()
                .filter(|(_, ours, theirs)| ours != theirs)
                .map(|(what, ours, theirs)| format!("its {what} is {theirs}, the job's {ours}"))
                .collect();
            if !differs.is_empty() {
                return refuse(format!(
                    "{}; start workers of one build on one kind of device",
                    differs.join(" and ")
                ));
            }
        }
        self.first.get_or_insert(Kind { build: hello.build.clone(), device: hello.device.clone() });
        self.links.insert(worker, Link { connection: hello.connection, orders });
        self.news.0.tell();
        self.rows.connected(worker);
        self.welcome(worker);
        let Hello { endpoints, machine, stance, .. } = hello;
        self.core_event(Event::Linked { worker, endpoints, machine, stance });
    }

    pub(super) fn word(&mut self, worker: WorkerId, word: v1::from_worker::Word) {
        match word {
            v1::from_worker::Word::Hello(_) => self.drop_link(worker, "it said hello twice"),
            v1::from_worker::Word::Stance(stance) => match Stance::try_from(stance) {
                Ok(stance) => self.core_event(Event::Stands { worker, stance }),
                Err(malformed) => self.drop_link(worker, &malformed.to_string()),
            },
            v1::from_worker::Word::Pace(pace) => match Pace::try_from(pace) {
                Ok(pace) => self.core_event(Event::Paced { worker, pace }),
                Err(malformed) => self.drop_link(worker, &malformed.to_string()),
            },
            v1::from_worker::Word::Failed(failed) => match failed.checked() {
                Ok(reason) => self.core_event(Event::Failed { worker, reason }),
                Err(malformed) => self.drop_link(worker, &malformed.to_string()),
            },
            v1::from_worker::Word::Step(report) if report.step >= self.total => {
                let reason = format!("it reports step {}, and the run has {}", report.step, self.total);
                self.drop_link(worker, &reason);
            }
            v1::from_worker::Word::Step(report) => self.step(report),
        }
    }

    /// A step's figures, from whoever is rank 0, or was asked.
    fn step(&mut self, mut report: v1::StepReport) {
        if !self.rows.take(report.step) {
            return;
        }
        let events = std::mem::take(&mut report.events);
        for text in events {
            match serde_json::from_str(&text) {
                // Only what a step can bring about: the rest of the log is the coordinator's.
                Ok(
                    event @ (Logged::Stage { .. }
                    | Logged::Skipped { .. }
                    | Logged::Spike { .. }
                    | Logged::Epoch { .. }
                    | Logged::SkippedData { .. }),
                ) => self.desk.ask(Task::Append { event, formed: None }),
                Ok(event) => tracing::warn!(?event, "a worker reports an event that is not a step's"),
                Err(cause) => {
                    tracing::warn!(%cause, text, "a worker reports an event that this build does not know")
                }
            }
        }
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
            let _ = link.orders.try_send(v1::ToWorker { epoch: self.epoch.0, order });
        }
    }

    pub(super) fn drop_link(&mut self, worker: WorkerId, reason: &str) {
        if self.links.remove(&worker).is_some() {
            self.news.0.tell();
            tracing::info!(%worker, reason, "closed a worker's connection");
            self.core_event(Event::Unlinked { worker });
        }
    }
}
