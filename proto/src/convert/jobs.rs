//! What users ask, and the phases that they are told.

use super::Malformed;
use crate::jobs::{JobName, Phase, Submission, WORKERS_MAX};
use crate::v1;

/// Bytes of a config.
const CONFIG_BYTES_MAX: usize = 1 << 20;
/// Bytes of a path or URL.
const PLACE_BYTES_MAX: usize = 4 << 10;

const A_NAME: &str = "a job's name has 1 to 64 letters, digits, `-` and `_`, the first a letter or a digit";

fn wrong(what: impl Into<String>, remedy: &'static str) -> Malformed {
    Malformed { what: what.into(), remedy }
}

fn name_of(text: String) -> Result<JobName, Malformed> {
    let shown: String = text.chars().take(JobName::BYTES_MAX).collect();
    JobName::new(text).ok_or_else(|| wrong(format!("`{shown}` is no name of a job"), A_NAME))
}

fn workers_of(what: &str, number: u32) -> Result<u32, Malformed> {
    if (1..=WORKERS_MAX).contains(&number) {
        return Ok(number);
    }
    Err(wrong(format!("{number} {what}"), "ask for 1 to 4096 workers"))
}

impl TryFrom<v1::SubmitRequest> for Submission {
    type Error = Malformed;
    fn try_from(request: v1::SubmitRequest) -> Result<Self, Malformed> {
        let v1::SubmitRequest { config, name, min, desired, run } = request;
        if config.len() > CONFIG_BYTES_MAX {
            let bytes = config.len();
            return Err(wrong(format!("a config of {bytes} bytes"), "a config has at most 1 MiB"));
        }
        if run.as_ref().is_some_and(|run| run.is_empty() || run.len() > PLACE_BYTES_MAX) {
            return Err(wrong("a run folder without a name, or with one too long", "give its path or URL"));
        }
        let name = name.map(name_of).transpose()?;
        let min = min.map(|min| workers_of("workers at least", min)).transpose()?;
        let desired = desired.map(|desired| workers_of("workers", desired)).transpose()?;
        let (min, desired) = (min.unwrap_or(1), desired.or(min).unwrap_or(1));
        if min > desired {
            let what = format!("at least {min} workers of {desired} wanted");
            return Err(wrong(what, "ask for no fewer workers than the job needs at least"));
        }
        Ok(Self { config, name, min, desired, run })
    }
}

impl TryFrom<v1::JobRequest> for JobName {
    type Error = Malformed;
    fn try_from(request: v1::JobRequest) -> Result<Self, Malformed> {
        name_of(request.name)
    }
}

impl TryFrom<v1::ScaleRequest> for (JobName, u32) {
    type Error = Malformed;
    fn try_from(request: v1::ScaleRequest) -> Result<Self, Malformed> {
        Ok((name_of(request.name)?, workers_of("workers", request.workers)?))
    }
}

/// Whose log, whether to follow it, and the number of the last record that is known.
impl TryFrom<v1::LogsRequest> for (JobName, bool, u64) {
    type Error = Malformed;
    fn try_from(request: v1::LogsRequest) -> Result<Self, Malformed> {
        Ok((name_of(request.name)?, request.follow, request.after.unwrap_or(0)))
    }
}

impl From<Phase> for v1::Phase {
    fn from(phase: Phase) -> Self {
        match phase {
            Phase::Queued => Self::Queued,
            Phase::Forming => Self::Forming,
            Phase::Running => Self::Running,
            Phase::Pausing => Self::Pausing,
            Phase::Paused => Self::Paused,
            Phase::Recovering => Self::Recovering,
            Phase::Completed => Self::Completed,
            Phase::Failed => Self::Failed,
            Phase::Cancelled => Self::Cancelled,
        }
    }
}

impl TryFrom<v1::Phase> for Phase {
    type Error = Malformed;
    fn try_from(phase: v1::Phase) -> Result<Self, Malformed> {
        Ok(match phase {
            v1::Phase::Unspecified => {
                return Err(super::malformed("a job in a phase that this build does not know"));
            }
            v1::Phase::Queued => Self::Queued,
            v1::Phase::Forming => Self::Forming,
            v1::Phase::Running => Self::Running,
            v1::Phase::Pausing => Self::Pausing,
            v1::Phase::Paused => Self::Paused,
            v1::Phase::Recovering => Self::Recovering,
            v1::Phase::Completed => Self::Completed,
            v1::Phase::Failed => Self::Failed,
            v1::Phase::Cancelled => Self::Cancelled,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_submission_is_checked() {
        let request = |name: &str, min, desired, run: Option<&str>| v1::SubmitRequest {
            config: "name = 1".into(),
            name: Some(name.into()),
            min,
            desired,
            run: run.map(str::to_owned),
        };
        let cases = [
            (request("a-b_9", None, None, None), Ok((1, 1))),
            (request("a", None, Some(3), Some("/runs/a")), Ok((1, 3))),
            (request("a", Some(2), None, None), Ok((2, 2))),
            (request("a", Some(2), Some(1), None), Err("at least 2 workers of 1 wanted")),
            (request("a", Some(0), None, None), Err("0 workers at least")),
            (request("a", None, Some(4097), None), Err("4097 workers")),
            (request("_a", None, None, None), Err("`_a` is no name of a job")),
            (request("../a", None, None, None), Err("`../a` is no name of a job")),
            (request("", None, None, None), Err("`` is no name of a job")),
            (request("a", None, None, Some("")), Err("a run folder without a name, or with one too long")),
        ];
        for (request, expected) in cases {
            let shown = format!("{request:?}");
            let found = Submission::try_from(request).map(|s| (s.min, s.desired)).map_err(|e| e.what);
            assert_eq!(found, expected.map_err(str::to_owned), "{shown}");
        }
        let long = v1::SubmitRequest { config: "#".repeat((1 << 20) + 1), ..Default::default() };
        assert!(Submission::try_from(long).is_err());
        assert!(JobName::new("x".repeat(65)).is_none() && JobName::new("x".repeat(64)).is_some());
    }

    #[test]
    fn phases_go_there_and_back() {
        for number in 1..=9 {
            let word = v1::Phase::try_from(number).unwrap();
            let phase = Phase::try_from(word).unwrap();
            assert_eq!(v1::Phase::from(phase), word);
            assert_eq!(phase.is_terminal(), number >= 7);
        }
        assert!(Phase::try_from(v1::Phase::Unspecified).is_err());
    }
}
