//! Who gets how many of the machine's slots. Pure.

/// What a job asks of the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ask {
    /// Fewest workers that train.
    pub min: u32,
    /// Workers that are wanted.
    pub desired: u32,
    /// Workers that it was given; absent: it waits for its turn.
    pub given: Option<u32>,
    /// Slots that its processes take now.
    pub taken: u32,
}

/// How many workers each job may have now, in the order of their arrival; absent: it waits on.
///
/// First come, first served: a job that waits holds free slots for itself until it can begin with `min`, and nobody
/// grows before it. One that asks for more than the machine has holds nothing, since it would wait for ever.
pub(super) fn share(slots: u32, asks: &[Ask]) -> Vec<Option<u32>> {
    let mut free = slots.saturating_sub(asks.iter().map(|ask| ask.taken).sum());
    let mut shares: Vec<Option<u32>> =
        asks.iter().map(|ask| ask.given.map(|given| given.min(ask.desired))).collect();
    let waiting = |ask: &Ask| ask.given.is_none() && ask.min <= slots;
    for (ask, share) in asks.iter().zip(&mut shares).filter(|(ask, _)| waiting(ask)) {
        if free < ask.min {
            return shares;
        }
        let now = ask.desired.min(free);
        (*share, free) = (Some(now), free - now);
    }
    for (ask, share) in asks.iter().zip(&mut shares).filter(|(ask, _)| ask.given.is_some()) {
        if let Some(share) = share {
            let more = (ask.desired - *share).min(free);
            (*share, free) = (*share + more, free - more);
        }
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waits(min: u32, desired: u32) -> Ask {
        Ask { min, desired, given: None, taken: 0 }
    }

    fn runs(desired: u32, given: u32, taken: u32) -> Ask {
        Ask { min: 1, desired, given: Some(given), taken }
    }

    #[test]
    fn slots_go_to_whoever_came_first() {
        let cases = [
            ("alone", 4, vec![waits(1, 2)], vec![Some(2)]),
            ("fewer than it wants", 1, vec![waits(1, 2)], vec![Some(1)]),
            ("one after the other", 1, vec![waits(1, 1), waits(1, 1)], vec![Some(1), None]),
            ("beside one another", 3, vec![waits(1, 2), waits(1, 2)], vec![Some(2), Some(1)]),
            ("none free", 2, vec![runs(2, 2, 2), waits(1, 1)], vec![Some(2), None]),
            ("nobody overtakes", 3, vec![runs(1, 1, 1), waits(3, 3), waits(1, 1)], vec![Some(1), None, None]),
            ("nobody grows before one that waits", 3, vec![runs(3, 1, 1), waits(3, 3)], vec![Some(1), None]),
            ("never", 2, vec![waits(3, 3), waits(1, 1)], vec![None, Some(1)]),
            ("scaled up", 3, vec![runs(3, 1, 1)], vec![Some(3)]),
            ("scaled up as far as it goes", 2, vec![runs(3, 1, 1)], vec![Some(2)]),
            ("scaled down, and not gone yet", 3, vec![runs(1, 3, 3), waits(1, 1)], vec![Some(1), None]),
            ("scaled down, and gone", 3, vec![runs(1, 1, 1), waits(1, 4)], vec![Some(1), Some(2)]),
            ("more slots are taken than there are", 1, vec![runs(2, 2, 2), waits(1, 1)], vec![Some(2), None]),
        ];
        for (what, slots, asks, expected) in cases {
            assert_eq!(share(slots, &asks), expected, "{what}");
        }
    }
}
