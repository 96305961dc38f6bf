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
}

impl Report {
    pub fn counts(&self) -> [(&'static str, u64); 17] {
        [
            ("a generation", self.generations),
            ("a step", self.steps),
            ("a kill", self.kills),
            ("a freeze", self.freezes),
            ("a cut", self.cuts),
            ("a silent cut", self.mutes),
            ("a preemption", self.preemptions),
            ("a coordinator's crash", self.coordinator_crashes),
            ("a stale coordinator", self.stale_coordinators),
            ("a fenced coordinator", self.fenced),
            ("a failing step", self.faults),
            ("an unreadable checkpoint", self.unreadable),
            ("a pause", self.pauses),
            ("a step done again", self.replayed_steps),
            ("a second copy that was asked for", self.copies),
            ("a slow member", self.slow),
            ("lanes shared out by speed", self.recuts),
        ]
    }

    pub fn add(&mut self, other: &Self) {
        let mut sum = self.counts().map(|(_, count)| count);
        for (sum, (_, count)) in sum.iter_mut().zip(other.counts()) {
            *sum += count;
        }
        let [
            generations,
            steps,
            kills,
            freezes,
            cuts,
            mutes,
            preemptions,
            crashes,
            stale,
            fenced,
            faults,
            unreadable,
            pauses,
            again,
            copies,
            slow,
            recuts,
        ] = sum;
        *self = Self {
            trace: mix(self.trace, other.trace),
            generations,
            steps,
            kills,
            freezes,
            cuts,
            mutes,
            preemptions,
            coordinator_crashes: crashes,
            stale_coordinators: stale,
            fenced,
            faults,
            unreadable,
            pauses,
            replayed_steps: again,
            copies,
            slow,
            recuts,
        };
    }
}
