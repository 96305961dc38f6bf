//! How long forward passes take, and what comes after them, on the device that computes: a GPU works on when the calls have
//! returned long since, so that there it is the time between two points of its stream.

use std::time::{Duration, Instant};

use tch::Device;

use crate::ffi::torch::{Mark, Stream};

/// Time on the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spent {
    /// From the embedding to the hidden states of the last loop step.
    pub forward: Duration,
    /// The losses with their gradients, and the way back.
    pub backward: Duration,
}

impl Spent {
    /// Seconds of a step, where they went: `compute` is what calls took, and what a GPU went on with afterwards was taken for
    /// `waiting`.
    pub(crate) fn account(self, compute: &mut f64, forward: &mut f64, waiting: &mut f64) {
        let late = ((self.forward + self.backward).as_secs_f64() - *compute).clamp(0.0, waiting.max(0.0));
        *compute += late;
        *waiting -= late;
        *forward = self.forward.as_secs_f64().min(*compute);
    }
}

/// Sums up the times of a step's micro-batches.
#[derive(Debug)]
pub(crate) struct Stopwatch {
    device: Device,
    spent: Spent,
    /// On a GPU: where a micro-batch begins, where its hidden states are there, where it ends.
    marked: Vec<[Mark; 3]>,
}

/// A point in time, or in a stream.
#[derive(Debug)]
pub(crate) enum Point {
    Host(Instant),
    Stream(Mark),
    /// A GPU that takes no mark: what is wrong with it shows elsewhere.
    Nowhere,
}

impl Stopwatch {
    pub fn new(device: Device) -> Self {
        Self { device, spent: Spent::default(), marked: Vec::new() }
    }

    /// Now, by the device's work.
    pub fn point(&self) -> Point {
        match self.device {
            Device::Cpu => Point::Host(Instant::now()),
            device => {
                let mark = Stream::current(device).and_then(Stream::mark);
                mark.map_or(Point::Nowhere, Point::Stream)
            }
        }
    }

    /// A micro-batch was computed.
    pub fn add(&mut self, points: [Point; 3]) {
        match points {
            [Point::Host(begin), Point::Host(hidden), Point::Host(end)] => {
                self.spent.forward += hidden - begin;
                self.spent.backward += end - hidden;
            }
            [Point::Stream(begin), Point::Stream(hidden), Point::Stream(end)] => {
                self.marked.push([begin, hidden, end]);
            }
            _ => {}
        }
    }

    /// The sum since it was taken last. What a GPU is not through with counts for nothing: it is asked when the step is over.
    pub fn take(&mut self) -> Spent {
        for [begin, hidden, end] in self.marked.drain(..) {
            if let (Ok(forward), Ok(backward)) = (begin.until(&hidden), hidden.until(&end)) {
                self.spent.forward += forward;
                self.spent.backward += backward;
            }
        }
        std::mem::take(&mut self.spent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A GPU has taken 1 s and 3 s: of its 4 s, calls took one, and 2.5 of the rest were waited for.
    #[test]
    fn what_a_gpu_does_after_the_calls_is_no_waiting() {
        let spent = Spent { forward: Duration::from_secs(1), backward: Duration::from_secs(3) };
        for (waited, after) in [(2.5, (3.5, 1.0, 0.0)), (4.0, (4.0, 1.0, 1.0))] {
            let (mut compute, mut forward, mut waiting) = (1.0, 0.0, waited);
            spent.account(&mut compute, &mut forward, &mut waiting);
            assert_eq!((compute, forward, waiting), after);
        }
        let (mut compute, mut forward, mut waiting) = (4.5, 0.0, 2.0);
        spent.account(&mut compute, &mut forward, &mut waiting);
        assert_eq!((compute, forward, waiting), (4.5, 1.0, 2.0));
    }

    #[test]
    fn micro_batches_add_up_until_they_are_taken() {
        let mut watch = Stopwatch::new(Device::Cpu);
        let at = Instant::now();
        let point = |ms: u64| Point::Host(at + Duration::from_millis(ms));
        watch.add([point(0), point(10), point(40)]);
        watch.add([point(100), point(105), point(106)]);
        watch.add([point(200), Point::Nowhere, point(300)]);
        let spent = Spent { forward: Duration::from_millis(15), backward: Duration::from_millis(31) };
        assert_eq!((watch.take(), watch.take()), (spent, Spent::default()));
    }
}
