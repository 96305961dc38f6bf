//! What can happen, and to whom.

use super::*;

#[derive(Clone, Debug)]
pub(super) enum Happening {
    Connect {
        worker: WorkerId,
    },
    Heartbeat {
        worker: WorkerId,
    },
    ToCoordinator {
        coordinator: usize,
        link: u64,
        worker: WorkerId,
        hello: bool,
        stance: Stance,
    },
    Paced {
        coordinator: usize,
        link: u64,
        worker: WorkerId,
        pace: Pace,
    },
    /// Figures of these steps.
    Rows {
        coordinator: usize,
        link: u64,
        worker: WorkerId,
        steps: Vec<u64>,
    },
    ClosedAtCoordinator {
        coordinator: usize,
        link: u64,
        worker: WorkerId,
    },
    ToWorker {
        worker: WorkerId,
        link: u64,
        epoch: Epoch,
        order: Order,
    },
    /// So many steps' figures are known there.
    Welcome {
        worker: WorkerId,
        link: u64,
        reported: u64,
    },
    ClosedAtWorker {
        worker: WorkerId,
        link: u64,
    },
    Formed {
        worker: WorkerId,
        generation: Generation,
    },
    Ready {
        worker: WorkerId,
        generation: Generation,
    },
    StepEnd {
        generation: Generation,
        token: u64,
    },
    Prepare {
        worker: WorkerId,
        generation: Generation,
        token: u64,
    },
    Spread {
        generation: Generation,
        token: u64,
    },
    Apply {
        worker: WorkerId,
        generation: Generation,
        step: Step,
        word: u8,
        twisted: bool,
    },
    PeerLost {
        worker: WorkerId,
        generation: Generation,
        lost: WorkerId,
    },
    Unanswered {
        worker: WorkerId,
        generation: Generation,
        peer: WorkerId,
    },
    Wrote {
        worker: WorkerId,
        written: Written,
        state: u64,
        leave: Option<Cause>,
    },
    /// The copy that it is asked for is written, or gone.
    LetGo {
        worker: WorkerId,
        step: Step,
        generation: Generation,
    },
    Appended {
        coordinator: usize,
        entry: Entry,
    },
    Commit {
        coordinator: usize,
        step: Step,
        generation: Generation,
    },
    Listed {
        coordinator: usize,
    },
    Tick {
        coordinator: usize,
    },
    CheckFence {
        coordinator: usize,
    },
    StartCoordinator,
    Kill {
        worker: WorkerId,
    },
    Terminate {
        worker: WorkerId,
    },
    Launch,
    Chaos,
    Halve,
    /// Replicas were compared, and this one's differs.
    Differ {
        worker: WorkerId,
        generation: Generation,
        flipped: WorkerId,
    },
}

/// Whom a happening is for, if for a worker's process.
pub(super) fn target(happening: &Happening) -> Option<WorkerId> {
    match happening {
        Happening::Connect { worker }
        | Happening::Heartbeat { worker }
        | Happening::ToWorker { worker, .. }
        | Happening::Welcome { worker, .. }
        | Happening::ClosedAtWorker { worker, .. }
        | Happening::Formed { worker, .. }
        | Happening::Ready { worker, .. }
        | Happening::Prepare { worker, .. }
        | Happening::Apply { worker, .. }
        | Happening::PeerLost { worker, .. }
        | Happening::Unanswered { worker, .. }
        | Happening::Wrote { worker, .. }
        | Happening::LetGo { worker, .. }
        | Happening::Kill { worker }
        | Happening::Differ { worker, .. }
        | Happening::Terminate { worker } => Some(*worker),
        Happening::ToCoordinator { .. }
        | Happening::Paced { .. }
        | Happening::Rows { .. }
        | Happening::ClosedAtCoordinator { .. }
        | Happening::StepEnd { .. }
        | Happening::Spread { .. }
        | Happening::Appended { .. }
        | Happening::Commit { .. }
        | Happening::Listed { .. }
        | Happening::Tick { .. }
        | Happening::CheckFence { .. }
        | Happening::StartCoordinator
        | Happening::Launch
        | Happening::Chaos
        | Happening::Halve => None,
    }
}

/// Whom a happening is for, if for a coordinator's process.
pub(super) fn addressee(happening: &Happening) -> Option<usize> {
    match happening {
        Happening::ToCoordinator { coordinator, .. }
        | Happening::Paced { coordinator, .. }
        | Happening::Rows { coordinator, .. }
        | Happening::ClosedAtCoordinator { coordinator, .. }
        | Happening::Appended { coordinator, .. }
        | Happening::Commit { coordinator, .. }
        | Happening::Listed { coordinator }
        | Happening::Tick { coordinator }
        | Happening::CheckFence { coordinator } => Some(*coordinator),
        Happening::Connect { .. }
        | Happening::Heartbeat { .. }
        | Happening::ToWorker { .. }
        | Happening::Welcome { .. }
        | Happening::ClosedAtWorker { .. }
        | Happening::Formed { .. }
        | Happening::Ready { .. }
        | Happening::StepEnd { .. }
        | Happening::Prepare { .. }
        | Happening::Spread { .. }
        | Happening::Apply { .. }
        | Happening::PeerLost { .. }
        | Happening::Unanswered { .. }
        | Happening::Wrote { .. }
        | Happening::LetGo { .. }
        | Happening::StartCoordinator
        | Happening::Kill { .. }
        | Happening::Differ { .. }
        | Happening::Terminate { .. }
        | Happening::Launch
        | Happening::Chaos
        | Happening::Halve => None,
    }
}

pub(super) fn kind(happening: &Happening) -> u64 {
    let kind = match happening {
        Happening::Connect { .. } => 1,
        Happening::Heartbeat { .. } => 2,
        Happening::ToCoordinator { .. } => 3,
        Happening::ClosedAtCoordinator { .. } => 4,
        Happening::ToWorker { .. } => 5,
        Happening::ClosedAtWorker { .. } => 6,
        Happening::Formed { .. } => 7,
        Happening::Ready { .. } => 8,
        Happening::StepEnd { .. } => 9,
        Happening::Apply { .. } => 10,
        Happening::PeerLost { .. } => 11,
        Happening::Wrote { .. } => 12,
        Happening::Appended { .. } => 13,
        Happening::Commit { .. } => 14,
        Happening::Tick { .. } => 15,
        Happening::CheckFence { .. } => 16,
        Happening::StartCoordinator => 17,
        Happening::Terminate { .. } => 18,
        Happening::Launch => 19,
        Happening::Chaos => 20,
        Happening::Listed { .. } => 21,
        Happening::Paced { .. } => 22,
        Happening::Prepare { .. } => 23,
        Happening::Spread { .. } => 24,
        Happening::Unanswered { .. } => 25,
        Happening::Halve => 26,
        Happening::Rows { .. } => 27,
        Happening::Welcome { .. } => 28,
        Happening::Kill { .. } => 29,
        Happening::Differ { .. } => 30,
        Happening::LetGo { .. } => 31,
    };
    kind * 1_000_003 + target(happening).map_or(0, |worker| worker.0)
}
