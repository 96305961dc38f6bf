//! What a schedule saw.

use super::mix;

/// What a schedule saw.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    pub trace: u64,
    pub generations: u64,
    pub steps: u64,
    pub kills: u64,
    pub freezes: u64,
    pub cuts: u64,
    pub mutes: u64,
    pub preemptions: u64,
    pub coordinator_crashes: u64,
    pub stale_coordinators: u64,
    pub fenced: u64,
    pub faults: u64,
    pub unreadable: u64,
    pub pauses: u64,
    pub replayed_steps: u64,
    pub copies: u64,
    pub slow: u64,
    pub recuts: u64,
    pub moved: u64,
    pub promoted: u64,
    pub fell_back: u64,
    pub rifts: u64,
    pub halves: u64,
    pub unwritten: u64,
    pub left_out: u64,
    pub sleeps: u64,
    pub wanted: u64,
    pub learned: u64,
    /// Rings that a cut broke, and the next one was whole: where nothing else happens.
    pub healed: u64,
    pub spread: u64,
    pub taken: u64,
    pub asked: u64,
    pub grown: u64,
    pub repeated: u64,
    pub flips: u64,
}

impl Report {
    pub fn counts(&self) -> [(&'static str, u64); 33] {
        self.clone().counters().map(|(what, count)| (what, *count))
    }

    fn counters(&mut self) -> [(&'static str, &mut u64); 33] {
        [
            ("a generation", &mut self.generations),
            ("a step", &mut self.steps),
            ("a kill", &mut self.kills),
            ("a freeze", &mut self.freezes),
            ("a cut", &mut self.cuts),
            ("a silent cut", &mut self.mutes),
            ("a preemption", &mut self.preemptions),
            ("a coordinator's crash", &mut self.coordinator_crashes),
            ("a stale coordinator", &mut self.stale_coordinators),
            ("a fenced coordinator", &mut self.fenced),
            ("a failing step", &mut self.faults),
            ("an unreadable checkpoint", &mut self.unreadable),
            ("a pause", &mut self.pauses),
            ("a step done again", &mut self.replayed_steps),
            ("a second copy that was asked for", &mut self.copies),
            ("a slow member", &mut self.slow),
            ("lanes shared out by speed", &mut self.recuts),
            ("a block of moments that moved", &mut self.moved),
            ("a share brought to the step that a peer had reached", &mut self.promoted),
            ("a state that was lost with two neighbours", &mut self.fell_back),
            ("two workers that do not reach one another", &mut self.rifts),
            ("parts that could not be written", &mut self.unwritten),
            ("a network that is cut in two", &mut self.halves),
            ("a worker that is left out", &mut self.left_out),
            ("a coordinator that slept", &mut self.sleeps),
            ("a checkpoint that was asked for", &mut self.wanted),
            ("a learner that holds the state", &mut self.learned),
            ("a learner that holds the weights, and its share of the moments", &mut self.spread),
            ("a message that came twice", &mut self.repeated),
            ("a share that grew before learners had lanes", &mut self.grown),
            ("figures that came with a state", &mut self.taken),
            ("a worker that was asked for figures", &mut self.asked),
            ("a replica that differs", &mut self.flips),
        ]
    }

    pub fn add(&mut self, other: &Self) {
        self.trace = mix(self.trace, other.trace);
        for ((_, sum), (_, count)) in self.counters().into_iter().zip(other.counts()) {
            *sum += count;
        }
    }
}
