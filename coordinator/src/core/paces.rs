//! How fast the members of a ring are, and which of them are slow. It tells people, shares out lanes when asked, and changes no
//! bit.
//!
//! ```text
//!            its time for a lane > factor × the median, over a window of steps
//!   in step ──────────────────────────────────────────────────────────────────▶ slow
//!      ▲                                                                          │
//!      └──────────────────────────────────────────────────────────────────────────┘
//!            its time for a lane < half-way between the median and that
//! ```
//!
//! Only forward and backward are compared: they are a worker's own, whereas all wait for the slowest in the collective. The
//! median is the lower one of the two in the middle, so that of two members the faster one is the measure. The way back is
//! further than the way there, or one at the threshold would be told of again and again.

use std::collections::{BTreeMap, VecDeque};

use anello_proto::ring::{Formation, Generation, Pace, Spent, WorkerId};

/// When a member is slow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Straggling {
    /// Its time for a lane is so many thousandths of the median; 0: nobody is.
    pub factor_permille: u32,
    /// Over so many steps, at least 1.
    pub window_steps: u32,
}

/// What changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is slow now: its time for a lane, in hundredths of the median.
    Slow(WorkerId, u32),
    /// It is not any more.
    InStep(WorkerId),
}

/// The last words of the members of a generation about their time.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Paces {
    options: Straggling,
    generation: Generation,
    /// How many each member of it serves.
    lanes: BTreeMap<WorkerId, u32>,
    of: BTreeMap<WorkerId, VecDeque<Pace>>,
    /// Who is slow, and how slow when that was seen last.
    slow: BTreeMap<WorkerId, u32>,
    /// Nanoseconds for a lane over the last whole window, in this generation or in one before.
    lane_ns: BTreeMap<WorkerId, u64>,
}

/// Words that a window is made of at most: with more steps to a window than that, the words of a small run are still a few
/// kilobytes a member.
const WORDS_MAX: usize = 64;

impl Paces {
    pub fn new(options: Straggling) -> Self {
        Self {
            options,
            generation: Generation(0),
            lanes: BTreeMap::new(),
            of: BTreeMap::new(),
            slow: BTreeMap::new(),
            lane_ns: BTreeMap::new(),
        }
    }

    /// A member tells. All are compared when the first of them does, so that it costs one look at all a heartbeat.
    pub fn told(&mut self, formation: &Formation, worker: WorkerId, pace: Pace) -> Vec<Verdict> {
        if formation.generation != self.generation {
            self.generation = formation.generation;
            self.of.clear();
            let lanes = formation.members.iter().map(|member| (member.worker, member.lanes.len() as u32));
            self.lanes = lanes.collect();
            self.slow.retain(|worker, _| self.lanes.contains_key(worker));
            self.lane_ns.retain(|worker, _| self.lanes.contains_key(worker));
        }
        if (pace.generation, Some(&pace.lanes)) != (self.generation, self.lanes.get(&worker)) {
            return Vec::new();
        }
        let words = self.of.entry(worker).or_default();
        words.push_back(pace);
        let steps = |words: &VecDeque<Pace>| words.iter().map(|pace| u64::from(pace.steps)).sum::<u64>();
        while words.len() > WORDS_MAX
            || steps(words).saturating_sub(words[0].steps.into()) >= self.options.window_steps.into()
        {
            words.pop_front();
        }
        if let Some(cost) = self.cost(worker) {
            self.lane_ns.insert(worker, cost);
        }
        if formation.members.first().is_none_or(|first| first.worker != worker) {
            return Vec::new();
        }
        self.judge(formation)
    }

    fn judge(&mut self, formation: &Formation) -> Vec<Verdict> {
        let Straggling { factor_permille, .. } = self.options;
        let costs: Option<Vec<(WorkerId, u64)>> =
            formation.members.iter().map(|member| Some((member.worker, self.cost(member.worker)?))).collect();
        let Some(costs) = costs.filter(|costs| factor_permille > 0 && costs.len() > 1) else {
            return Vec::new();
        };
        let median = median(costs.iter().map(|(_, cost)| *cost));
        let mut verdicts = Vec::new();
        for (worker, cost) in costs {
            let permille = (u128::from(cost) * 1000 / u128::from(median)).min(u32::MAX.into()) as u32;
            let was = self.slow.contains_key(&worker);
            let is = permille > if was { (1000 + factor_permille) / 2 } else { factor_permille };
            match (was, is) {
                (false, true) => verdicts.push(Verdict::Slow(worker, permille / 10)),
                (true, false) => {
                    self.slow.remove(&worker);
                    verdicts.push(Verdict::InStep(worker));
                }
                (false, false) | (true, true) => {}
            }
            if is {
                self.slow.insert(worker, permille / 10);
            }
        }
        verdicts
    }

    /// Nanoseconds for a lane's forward and backward, over a whole window of steps of this generation; at least 1.
    fn cost(&self, worker: WorkerId) -> Option<u64> {
        let Pace { lanes, steps, spent, .. } = self.pace(worker)?;
        let whole = steps >= self.options.window_steps || self.of[&worker].len() >= WORDS_MAX;
        whole.then(|| (spent.compute_us * 1000 / (u64::from(lanes) * u64::from(steps))).max(1))
    }

    /// What a member's last steps took.
    pub fn pace(&self, worker: WorkerId) -> Option<Pace> {
        let words = self.of.get(&worker)?;
        let spent = words.iter().fold(Spent::default(), |sum, pace| sum + pace.spent);
        let steps = words.iter().fold(0, |sum: u32, pace| sum.saturating_add(pace.steps));
        Some(Pace { steps, spent, ..*words.back()? })
    }

    /// Its time for a lane's forward and backward, when a whole window of it was told: at least 1.
    pub fn lane_ns(&self, worker: WorkerId) -> Option<u64> {
        self.lane_ns.get(&worker).copied()
    }

    /// Its time for a lane, in hundredths of the median, when it is slow.
    pub fn slow(&self, worker: WorkerId) -> Option<u32> {
        self.slow.get(&worker).copied()
    }
}

/// The lower median of some numbers; 1 of none.
pub(super) fn median(of: impl Iterator<Item = u64>) -> u64 {
    let mut all: Vec<u64> = of.collect();
    all.sort_unstable();
    all.get(all.len().saturating_sub(1) / 2).copied().unwrap_or(1)
}

#[cfg(test)]
mod tests;
