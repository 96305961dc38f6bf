//! What was asked of a store, and what came of it.

use std::sync::atomic::{AtomicU64, Ordering};

/// What a store is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operation {
    /// An object, or a part of one.
    Get,
    /// An object over an old one.
    Put,
    /// An object that is not there yet.
    Create,
    /// Which objects there are.
    List,
    /// When an object was written.
    Head,
    /// An object is to be gone.
    Delete,
}

impl Operation {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Get, Self::Put, Self::Create, Self::List, Self::Head, Self::Delete];

    /// Its name in labels.
    pub fn name(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::Put => "put",
            Self::Create => "create",
            Self::List => "list",
            Self::Head => "head",
            Self::Delete => "delete",
        }
    }
}

/// Counts of one operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// How often it was asked for.
    pub requests: u64,
    /// How often it failed, after all attempts.
    pub errors: u64,
    /// Attempts after the first that were seen here; those inside a remote store's client are not.
    pub retries: u64,
}

/// Counts of all operations of a store and its clones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    counts: [Counts; 6],
    /// Bytes of objects that came.
    pub read_bytes: u64,
    /// Bytes of objects that were sent, those that were there already included.
    pub written_bytes: u64,
}

impl Traffic {
    /// Those of one operation.
    pub fn of(&self, operation: Operation) -> Counts {
        self.counts[operation as usize]
    }
}

impl std::ops::Add for Traffic {
    type Output = Self;
    fn add(mut self, other: Self) -> Self {
        for (ours, theirs) in self.counts.iter_mut().zip(other.counts) {
            ours.requests += theirs.requests;
            ours.errors += theirs.errors;
            ours.retries += theirs.retries;
        }
        self.read_bytes += other.read_bytes;
        self.written_bytes += other.written_bytes;
        self
    }
}

/// Where they are counted.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    counts: [[AtomicU64; 3]; 6],
    read: AtomicU64,
    written: AtomicU64,
}

impl Meter {
    /// An operation ended so.
    pub fn count<T, E>(&self, operation: Operation, result: Result<T, E>) -> Result<T, E> {
        self.add(operation, 0);
        if result.is_err() {
            self.add(operation, 1);
        }
        result
    }

    /// It is tried once more.
    pub fn retry(&self, operation: Operation) {
        self.add(operation, 2);
    }

    pub fn read(&self, bytes: usize) {
        self.read.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub fn written(&self, bytes: usize) {
        self.written.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn add(&self, operation: Operation, at: usize) {
        self.counts[operation as usize][at].fetch_add(1, Ordering::Relaxed);
    }

    pub fn read_off(&self) -> Traffic {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let counts = self.counts.each_ref().map(|[requests, errors, retries]| Counts {
            requests: of(requests),
            errors: of(errors),
            retries: of(retries),
        });
        Traffic { counts, read_bytes: of(&self.read), written_bytes: of(&self.written) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Store;

    #[test]
    fn what_is_asked_of_a_store_and_its_clones_is_counted() {
        let store = Store::memory().unwrap();
        let clone = store.clone();
        store.put("a", vec![0; 10]).unwrap();
        assert!(clone.create("b", vec![0; 5]).unwrap());
        assert!(!clone.create("b", vec![0; 5]).unwrap());
        assert_eq!(store.get("a").unwrap().unwrap().len(), 10);
        assert!(store.get("none").unwrap().is_none());
        store.tail("a", 4).unwrap();
        assert!(store.tail("none", 4).is_err());
        store.list("").unwrap();
        store.delete("a").unwrap();
        let traffic = store.traffic();
        let of = |operation| {
            let Counts { requests, errors, retries } = traffic.of(operation);
            (requests, errors, retries)
        };
        // A create that finds something there reads it.
        assert_eq!((of(Operation::Get), of(Operation::Put)), ((5, 1, 0), (1, 0, 0)));
        assert_eq!((of(Operation::Create), of(Operation::List)), ((2, 0, 0), (1, 0, 0)));
        assert_eq!((of(Operation::Delete), of(Operation::Head)), ((1, 0, 0), (0, 0, 0)));
        assert_eq!((traffic.read_bytes, traffic.written_bytes), (19, 20));
        let twice = traffic + traffic;
        assert_eq!((twice.of(Operation::Get).requests, twice.written_bytes), (10, 40));
        assert_eq!(Store::memory().unwrap().traffic(), Traffic::default());
    }
}
