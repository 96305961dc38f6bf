//! The event log of a run: numbered records, created and never changed.
//!
//! A record is an object `events/N.json` made by put-if-absent: two processes that train the same run cannot both
//! write N, so the one that comes second learns that it is not alone and leaves.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::{Environment, Error, Object, Result, Store};

/// Something that happened in a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Event {
    /// A process took the run up.
    Started {
        /// Steps already applied.
        step: u64,
        /// Where it runs.
        environment: Environment,
        /// Keys of the config that were changed and allowed with `--allow`: (key, before, now).
        changed: Vec<(String, String, String)>,
        /// Sources whose data is another from here on, allowed with `--allow`: (name, digest of the index before, now); `absent`
        /// where the config has no such source any more.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        data: Vec<(String, String, String)>,
    },
    /// A checkpoint that could not be used was passed over.
    PassedOver {
        /// Its step.
        step: u64,
        /// Why.
        reason: String,
    },
    /// The first step of a stage begins.
    Stage {
        /// Steps applied before.
        step: u64,
        /// Its name.
        stage: String,
    },
    /// A step whose gradient or loss was not finite was not applied.
    Skipped {
        /// The step (steps applied or skipped before it).
        step: u64,
        /// Its loss, as text since it may be NaN.
        loss: String,
    },
    /// The loss of a step was far above those before it.
    Spike {
        /// The step (steps applied or skipped before it).
        step: u64,
        /// Its loss, nats a token, as the shortest text that reads back to the same bits.
        loss: String,
        /// The median of those before it.
        median: String,
        /// What it would have had to stay at or below.
        limit: String,
        /// Whether its update was left out for that.
        skipped: bool,
        /// The run's plan from here on: the state after this step is that after so many steps, and the batches from there up
        /// to this one are left out of it. Absent: it does not go back.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        back_to: Option<u64>,
    },
    /// A lane began a source anew.
    Epoch {
        /// The step.
        step: u64,
        /// The source.
        source: String,
        /// The epoch that began, from 0.
        epoch: u64,
    },
    /// A row group that could not be read was left out.
    SkippedData {
        /// The step.
        step: u64,
        /// The lane.
        lane: u32,
        /// The source.
        source: String,
        /// Its number in the source.
        row_group: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// A checkpoint is complete.
    Checkpoint {
        /// Steps applied.
        step: u64,
        /// Digest of the weights.
        weights: String,
    },
    /// A checkpoint could not be written; the run goes on.
    CheckpointFailed {
        /// Steps applied.
        step: u64,
        /// The cause.
        cause: String,
    },
    /// A coordinator took the run up, to have it trained by a ring of workers.
    TakenUp {
        /// Step of the newest checkpoint; absent: there is none.
        step: Option<u64>,
    },
    /// The user wants something else of the job, or another number of workers.
    Goal {
        /// What, in one word: `run`, `pause` or `cancel`.
        goal: String,
        /// Workers that are wanted.
        workers: u32,
    },
    /// A worker came to the ring's coordinator.
    Joined {
        /// Its id, 16 hex digits.
        worker: String,
        /// The machine that it runs on.
        machine: String,
    },
    /// A worker is gone.
    Lost {
        /// Its id.
        worker: String,
        /// Steps applied in the state that it held last; absent: it held none.
        step: Option<u64>,
        /// How that was noticed.
        reason: String,
    },
    /// A worker's state differed from that of most others: it was sent away, and its machine is not used any more.
    Evicted {
        /// The worker.
        worker: String,
        /// Where it ran; empty when it was away, and had not said so to this coordinator.
        machine: String,
        /// Steps applied to the state that differed.
        step: Option<u64>,
        /// Which blocks differed.
        reason: String,
    },
    /// A generation was formed: these workers train from here on.
    Formed {
        /// Its number, from 1 and only ever rising.
        generation: u64,
        /// Steps applied when it starts.
        start: u64,
        /// Where members without the state after `start` get it: `seed`, `checkpoint` or `peers`.
        source: String,
        /// Ids of the members that hold it and hand it out, in rank order; empty unless `source` is `peers`.
        holders: Vec<String>,
        /// The members, in rank order.
        members: Vec<RingMember>,
        /// Whether a checkpoint is taken before the first step.
        save_first: bool,
    },
    /// All members of a generation that follows another train. The time is for people: nothing is decided by it.
    Recovered {
        /// Its number.
        generation: u64,
        /// Its members.
        workers: u32,
        /// Milliseconds from when the generation before was seen to break, or to hold for a change, until the first step of
        /// this one began.
        took_ms: u64,
        /// Steps that had been applied and are computed again.
        again: u64,
        /// The checkpoint that its state is from; absent: from members that held it.
        checkpoint: Option<u64>,
    },
    /// A ring broke for a reason that is no death, and is formed anew.
    Broke {
        /// Who says why.
        worker: String,
        /// The ring's number.
        generation: u64,
        /// Steps applied in the state that it holds; absent: it holds none.
        step: Option<u64>,
        /// Why.
        reason: String,
    },
    /// State that workers held was given up: the run goes on from its last checkpoint, or begins anew.
    FellBack {
        /// Steps applied to it.
        step: u64,
        /// Why.
        reason: String,
    },
    /// Two workers do not reach one another, though the coordinator reaches both: one is in no ring for a while.
    LeftOut {
        /// The one that is left out.
        worker: String,
        /// Where it runs.
        machine: String,
        /// The other.
        from: String,
        /// Steps applied in the state that it holds; absent: it holds none.
        step: Option<u64>,
        /// Milliseconds after which it is tried again.
        rest_ms: u64,
        /// What was seen of it.
        reason: String,
    },
    /// A member of a ring takes longer for a lane than the others. It changes no bit.
    Slow {
        /// Its id.
        worker: String,
        /// Where it runs.
        machine: String,
        /// Steps applied.
        step: u64,
        /// Its time for forward and backward of a lane, in hundredths of the members' median.
        percent: u32,
    },
    /// It does not any more.
    InStep {
        /// Its id.
        worker: String,
        /// Steps applied.
        step: u64,
    },
    /// The coordinator is done with the run.
    Ended {
        /// How the run ended, in one word: `finished`, `failed`, …
        outcome: String,
        /// Why, when there is more to say.
        reason: Option<String>,
    },
    /// The process left before the end of the run.
    Stopped {
        /// Steps applied.
        step: u64,
    },
    /// The run is complete.
    Finished {
        /// Steps applied.
        step: u64,
        /// Digest of the weights.
        weights: String,
    },
}

/// A member of a generation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingMember {
    /// Its id, 16 hex digits.
    pub worker: String,
    /// Addresses of its collective, best first: `ip:port`.
    pub ring: Vec<String>,
    /// Addresses of its service that hands out state, best first: `ip:port`. Older builds wrote one, by itself.
    #[serde(deserialize_with = "one_or_more")]
    pub peers: Vec<String>,
    /// The first lane that it serves.
    pub first_lane: u32,
    /// The lane after the last: that of `first_lane` when it serves none.
    pub end_lane: u32,
}

fn one_or_more<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Found {
        One(String),
        More(Vec<String>),
    }
    Ok(match Found::deserialize(deserializer)? {
        Found::One(one) => vec![one],
        Found::More(more) => more,
    })
}

/// A record of the log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Number, from 1 without gaps.
    pub number: u64,
    /// When, milliseconds since 1970: for people, nothing is decided by it.
    pub unix_ms: u64,
    /// What.
    #[serde(flatten)]
    pub event: Event,
}

/// The writing end of the log: one for each process that trains.
#[derive(Debug)]
pub struct EventLog {
    store: Store,
    session: u64,
    next: u64,
    /// The record that the store said it could not write: it may be there all the same.
    unsure: Option<(Record, Bytes)>,
}

fn path_of(number: u64) -> String {
    format!("events/{number:08}.json")
}

impl EventLog {
    /// The log of `store`, positioned after its last record, whether a listing shows it yet or not.
    pub fn open(store: &Store) -> Result<Self> {
        let mut next = last_number(store)? + 1;
        while store.size(&path_of(next))?.is_some() {
            next += 1;
        }
        Ok(Self { store: store.clone(), session: next, next, unsure: None })
    }

    /// Number of the first record that this process writes: no other process that trains the run has the same.
    pub fn session(&self) -> u64 {
        self.session
    }

    /// Appends a record. [`Error::Fenced`] when another process has written it. After any other error the same event
    /// comes next.
    pub fn append(&mut self, event: Event) -> Result<Record> {
        let unsure = self.unsure.take().filter(|(record, _)| record.event == event);
        let again = unsure.is_some();
        let (record, bytes) = unsure.unwrap_or_else(|| self.record(event));
        let path = path_of(self.next);
        match self.store.create(&path, bytes.clone()) {
            Ok(true) => {}
            Ok(false) if again && self.store.get(&path)?.as_ref() == Some(&bytes) => {}
            Ok(false) => return Err(self.fenced()),
            Err(cause) => {
                self.unsure = Some((record, bytes));
                return Err(cause);
            }
        }
        self.next += 1;
        Ok(record)
    }

    /// [`Error::Fenced`] when another process has taken the run up.
    pub fn check(&self) -> Result<()> {
        let there = self.store.get(&path_of(self.next))?;
        let ours = self.unsure.as_ref().map(|(_, bytes)| bytes);
        if there.is_none() || there.as_ref() == ours { Ok(()) } else { Err(self.fenced()) }
    }

    fn fenced(&self) -> Error {
        Error::Fenced { place: self.store.place_of(&path_of(self.next)) }
    }

    fn record(&self, event: Event) -> (Record, Bytes) {
        #[expect(
            clippy::disallowed_methods,
            reason = "the time of a record is for people; nothing reads it back"
        )]
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let unix_ms = now.map_or(0, |since| since.as_millis() as u64);
        let record = Record { number: self.next, unix_ms, event };
        let bytes = serde_json::to_vec(&record).expect("a record has no map with keys that are not strings");
        (record, bytes.into())
    }
}

/// All records of a run, in order.
pub fn read(store: &Store) -> Result<Vec<Record>> {
    let mut records = Vec::new();
    each(store, |record| records.push(record))?;
    Ok(records)
}

/// Hands over all records of a run, in order, each as it is read: a long log takes no more memory than its objects' names.
pub fn each(store: &Store, mut take: impl FnMut(Record)) -> Result<()> {
    for Object { path, .. } in store.list("events")?.iter().filter(|object| number_of(object).is_some()) {
        let Some(bytes) = store.get(path)? else { continue };
        take(parse(store, path, &bytes)?);
    }
    Ok(())
}

/// Records after number `after`, in order, at most `most`: what a reader asks for that follows a log.
pub fn read_after(store: &Store, after: u64, most: usize) -> Result<Vec<Record>> {
    let mut records = Vec::new();
    while records.len() < most {
        let path = path_of(after + 1 + records.len() as u64);
        let Some(bytes) = store.get(&path)? else { break };
        records.push(parse(store, &path, &bytes)?);
    }
    Ok(records)
}

/// Steps that were applied when the mathematics or the data of the run last changed (`--allow`): only what comes after them is of
/// the config and the data that there are now. Absent: it never changed. A run that falls back behind the change trains the steps from there
/// on anew, and has changed there.
pub fn changed_at(store: &Store) -> Result<Option<u64>> {
    let mut at = None;
    each(store, |record| at = changed_after(at, &record.event))?;
    Ok(at)
}

/// The same after one record more.
fn changed_after(at: Option<u64>, event: &Event) -> Option<u64> {
    match event {
        Event::Started { step, changed, data, .. } if !(changed.is_empty() && data.is_empty()) => Some(*step),
        Event::Started { step, .. } | Event::Formed { start: step, .. } => at.map(|at| at.min(*step)),
        _ => at,
    }
}

/// The data of a run that goes on from a checkpoint after `step` steps, which says `data` of it (digests of sources by name): what
/// was allowed since then (`--allow`) need not be allowed again.
pub fn data_since(
    records: &[Record],
    step: u64,
    mut data: BTreeMap<String, String>,
) -> BTreeMap<String, String> {
    for record in records {
        let Event::Started { step: at, data: changed, .. } = &record.event else { continue };
        for (source, _, now) in changed.iter().filter(|_| *at >= step) {
            match now.as_str() {
                ABSENT => drop(data.remove(source)),
                now => drop(data.insert(source.clone(), now.to_owned())),
            }
        }
    }
    data
}

/// What is said of a value that is not there, before or after a change.
pub const ABSENT: &str = "absent";

/// Number of the last record; 0: there is none.
pub fn last_number(store: &Store) -> Result<u64> {
    Ok(store.list("events")?.iter().filter_map(number_of).max().unwrap_or(0))
}

fn parse(store: &Store, path: &str, bytes: &[u8]) -> Result<Record> {
    serde_json::from_slice(bytes).map_err(|cause| {
        Error::malformed(store.place_of(path), cause, "restore it, or use a build that wrote it")
    })
}

fn number_of(object: &Object) -> Option<u64> {
    object.path.strip_prefix("events/")?.strip_suffix(".json")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Operation;

    #[test]
    fn the_second_writer_is_fenced_and_nothing_is_overwritten() {
        let store = Store::memory().unwrap();
        let (mut first, mut second) = (EventLog::open(&store).unwrap(), EventLog::open(&store).unwrap());
        first.append(Event::Stopped { step: 1 }).unwrap();
        let refused = second.append(Event::Stopped { step: 2 });
        assert!(matches!(refused, Err(Error::Fenced { .. })), "{refused:?}");
        assert!(first.check().is_ok() && matches!(second.check(), Err(Error::Fenced { .. })));
        assert_eq!(first.session(), second.session());
        let again = EventLog::open(&store).unwrap().append(Event::Stopped { step: 3 }).unwrap();
        assert_eq!(again.number, 2);
        let steps: Vec<_> = read(&store).unwrap().into_iter().map(|r| (r.number, r.event)).collect();
        assert_eq!(steps, [(1, Event::Stopped { step: 1 }), (2, Event::Stopped { step: 3 })]);
    }

    #[test]
    fn the_events_of_a_ring_read_back() {
        let text = |text: &str| text.to_owned();
        let member = RingMember {
            worker: text("3f00000000000001"),
            ring: vec![text("10.0.0.1:1"), text("127.0.0.1:1")],
            peers: vec![text("10.0.0.1:2"), text("127.0.0.1:2")],
            first_lane: 0,
            end_lane: 4,
        };
        let cases = [
            (Event::TakenUp { step: None }, r#""kind":"taken-up","step":null"#),
            (
                Event::Joined { worker: text("3f"), machine: text("host") },
                r#""kind":"joined","worker":"3f","machine":"host""#,
            ),
            (
                Event::Lost { worker: text("3f"), step: Some(412), reason: text("silent") },
                r#""kind":"lost","worker":"3f","step":412,"reason":"silent""#,
            ),
            (
                Event::Formed {
                    generation: 7,
                    start: 412,
                    source: text("peers"),
                    holders: vec![member.worker.clone()],
                    members: vec![member],
                    save_first: true,
                },
                r#""kind":"formed","generation":7,"start":412,"source":"peers","holders":["3f00000000000001"]"#,
            ),
            (
                Event::Recovered {
                    generation: 7,
                    workers: 3,
                    took_ms: 210,
                    again: 12,
                    checkpoint: Some(400),
                },
                r#""kind":"recovered","generation":7,"workers":3,"took_ms":210,"again":12,"checkpoint":400"#,
            ),
            (Event::Goal { goal: text("pause"), workers: 3 }, r#""kind":"goal","goal":"pause","workers":3"#),
            (
                Event::Ended { outcome: text("failed"), reason: Some(text("disk")) },
                r#""kind":"ended","outcome":"failed","reason":"disk""#,
            ),
        ];
        let store = Store::memory().unwrap();
        let mut log = EventLog::open(&store).unwrap();
        for (event, words) in &cases {
            let record = log.append(event.clone()).unwrap();
            let json = serde_json::to_string(&record).unwrap();
            assert!(json.contains(words), "{json}");
        }
        let back: Vec<Event> = read(&store).unwrap().into_iter().map(|record| record.event).collect();
        assert_eq!(back, cases.map(|(event, _)| event));
        // Older builds knew one address of that service.
        let old = r#"{"worker":"3f","ring":["a:1"],"peers":"a:2","first_lane":0,"end_lane":4}"#;
        assert_eq!(serde_json::from_str::<RingMember>(old).unwrap().peers, ["a:2"]);
        let numbers = |after, most| -> Vec<u64> {
            read_after(&store, after, most).unwrap().into_iter().map(|record| record.number).collect()
        };
        assert_eq!((numbers(0, 2), numbers(back.len() as u64 - 1, 9)), (vec![1, 2], vec![back.len() as u64]));
        assert_eq!(numbers(back.len() as u64, 9), [0; 0]);
    }

    #[test]
    fn a_record_is_handed_over_before_the_next_is_read() {
        let store = Store::memory().unwrap();
        let mut log = EventLog::open(&store).unwrap();
        (1..=40).for_each(|step| drop(log.append(Event::Stopped { step }).unwrap()));
        let gets = || store.traffic().of(Operation::Get).requests;
        let (before, mut numbers) = (gets(), Vec::new());
        each(&store, |record| {
            numbers.push(record.number);
            assert_eq!(gets() - before, record.number, "records that were read");
        })
        .unwrap();
        assert_eq!(numbers, (1..=40).collect::<Vec<u64>>());
    }

    fn started(step: u64, data: &[(&str, &str, &str)]) -> Record {
        let environment = Environment {
            anello: "0.1.0".to_owned(),
            revision: None,
            libtorch: "2".to_owned(),
            device: "CPU".to_owned(),
            threads: 1,
            system: "linux".to_owned(),
        };
        let data = data.iter().map(|(a, b, c)| ((*a).to_owned(), (*b).to_owned(), (*c).to_owned())).collect();
        let event = Event::Started { step, environment, changed: Vec::new(), data };
        Record { number: 1, unix_ms: 0, event }
    }

    #[test]
    fn data_that_was_replaced_is_a_change_and_is_known_from_there_on() {
        let log = [
            started(0, &[]),
            started(4, &[("a", "1", "2"), ("b", "5", ABSENT)]),
            started(6, &[("a", "2", "3")]),
        ];
        let changed = log.iter().scan(None, |at, record| {
            *at = changed_after(*at, &record.event);
            Some(*at)
        });
        assert_eq!(changed.collect::<Vec<_>>(), [None, Some(4), Some(6)]);
        let of = |step| {
            let data = [("a", "1"), ("b", "5"), ("c", "7")]
                .map(|(name, digest)| (name.to_owned(), digest.to_owned()));
            let data = data_since(&log, step, data.into_iter().collect());
            data.into_iter().map(|(name, digest)| name + &digest).collect::<Vec<_>>().join(" ")
        };
        assert_eq!([4, 5, 7].map(of), ["a3 c7", "a3 b5 c7", "a1 b5 c7"]);
        let json = serde_json::to_string(&log[2]).unwrap();
        assert!(json.contains(r#""data":[["a","2","3"]]"#), "{json}");
        let before = serde_json::to_string(&log[0]).unwrap();
        assert!(!before.contains("data"), "as builds before it wrote it: {before}");
        assert_eq!(serde_json::from_str::<Record>(&before).unwrap(), log[0]);
    }
}
