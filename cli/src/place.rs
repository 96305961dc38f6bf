//! What a user calls a run (`RUN`) and a checkpoint (`RUN@STEP`).

use std::convert::Infallible;
use std::fmt;
use std::str::FromStr;

use anello_store::{CONFIG, Store, checkpoint};

use crate::failure::Failure;

/// `RUN@STEP`: a checkpoint of a run, the newest unless a step is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointName {
    /// The folder of the run.
    pub run: String,
    /// Steps applied.
    pub step: Option<u64>,
}

impl FromStr for CheckpointName {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        let (run, step) = checkpoint::split_name(text);
        Ok(Self { run: run.to_owned(), step })
    }
}

impl fmt::Display for CheckpointName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.step {
            Some(step) => write!(f, "{}@{step}", self.run),
            None => f.write_str(&self.run),
        }
    }
}

impl CheckpointName {
    /// The run's store and the step that is meant.
    pub fn open(&self) -> Result<(Store, u64), Failure> {
        let store = open_run(&self.run)?;
        let step = match self.step {
            Some(step) => step,
            None => checkpoint::steps(&store)?.last().copied().ok_or_else(|| none_yet(&store))?,
        };
        Ok((store, step))
    }
}

/// There is no checkpoint.
pub fn none_yet(store: &Store) -> Failure {
    Failure::Usage(format!(
        "{} has no checkpoint yet; let it train until `checkpoint.every_steps`, or stop it with Ctrl-C",
        store.place()
    ))
}

/// The store of a run that exists, to read it.
pub fn open_run(place: &str) -> Result<Store, Failure> {
    let store = Store::open(place)?;
    let is_run = match store.folder() {
        Some(folder) => folder.join(CONFIG).is_file(),
        None => store.get(CONFIG)?.is_some(),
    };
    if !is_run {
        return Err(Failure::Usage(format!("{place} holds no run; give the folder of one, as runs/tiny")));
    }
    Ok(store)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_digits_after_the_last_at() {
        let cases = [
            ("runs/tiny", "runs/tiny", None),
            ("runs/tiny@1200", "runs/tiny", Some(1200)),
            ("runs/tiny@0", "runs/tiny", Some(0)),
            ("a@b", "a@b", None),
            ("a@7@9", "a@7", Some(9)),
            ("a@7/b", "a@7/b", None),
            ("a@", "a@", None),
            ("@7", "@7", None),
            ("a@+7", "a@+7", None),
            ("a@99999999999999999999", "a@99999999999999999999", None),
            ("file:///runs/x@3", "file:///runs/x", Some(3)),
        ];
        for (text, run, step) in cases {
            let Ok(name) = text.parse::<CheckpointName>();
            assert_eq!((name.run.as_str(), name.step), (run, step), "{text}");
        }
    }
}
