//! Jobs as text. Pure.

use anello_proto::jobs::Phase;
use anello_proto::ring::WorkerId;
use anello_proto::v1;

use super::{phase_of, record_of};
use crate::failure::Failure;
use crate::text::{Table, grouped, nats, per_second, percent, utc};
use anello_store::words::{describe as sentence_of, short_digest, times};

/// `job small is queued; it waits for its turn: 1 job is before it`
pub fn sentence(job: &v1::Job) -> Result<String, Failure> {
    let phase = phase_of(job)?;
    let waits = job.waits_for.as_ref().map(|what| format!("; it waits for {what}")).unwrap_or_default();
    Ok(format!("job {} is {phase}{waits}", job.name))
}

/// The jobs as a table.
pub fn list(jobs: &[v1::Job]) -> Result<String, Failure> {
    if jobs.is_empty() {
        return Ok("there are no jobs; `anello submit CONFIG` makes one\n".to_owned());
    }
    let mut table = Table::new(2);
    table.row(["job", "phase", "step", "of", "loss", "tok/s", "workers"]);
    for job in jobs {
        table.row([
            job.name.clone(),
            phase_of(job)?.to_string(),
            job.step.map_or("–".to_owned(), grouped),
            grouped(job.total_steps),
            job.loss.map_or("–".to_owned(), nats),
            job.tokens_per_s.map_or("–".to_owned(), per_second),
            format!("{} of {}", job.workers, job.desired),
        ]);
    }
    let text = table.render();
    let more = |job: &v1::Job| {
        let waits = job.waits_for.as_ref().map(|what| format!("waits for {what}"));
        let quarantined = match job.quarantined {
            0 => None,
            1 => Some("1 machine is quarantined".to_owned()),
            count => Some(format!("{count} machines are quarantined")),
        };
        let said = [waits.or_else(|| job.reason.clone()), quarantined].into_iter().flatten();
        let said = said.collect::<Vec<_>>().join("; ");
        if said.is_empty() { said } else { format!("  {said}") }
    };
    let suffixes = std::iter::once(String::new()).chain(jobs.iter().map(more));
    Ok(text.lines().zip(suffixes).map(|(line, more)| format!("{line}{more}\n")).collect())
}

/// All of a job.
pub fn describe(detail: &v1::JobDetail) -> Result<String, Failure> {
    let job = job_of(detail)?;
    let mut facts = vec![("job", job.name.clone()), ("phase", phase_of(job)?.to_string())];
    facts.extend(job.waits_for.iter().map(|what| ("waits for", what.clone())));
    facts.extend(job.reason.iter().map(|why| ("why", why.clone())));
    let (min, desired, here) = (job.min, job.desired, job.workers);
    facts.push(("workers", format!("{here} of {desired} that are wanted; at least {min} train")));
    let total = job.total_steps;
    facts.push((
        "step",
        match job.step {
            Some(step) => format!("{} of {} ({})", grouped(step), grouped(total), percent(step, total)),
            None => format!("none of {} is known", grouped(total)),
        },
    ));
    facts.extend(job.loss.map(|loss| ("loss", nats(loss))));
    facts.extend(job.tokens_per_s.map(|speed| ("speed", format!("{} tokens/s", per_second(speed)))));
    facts.extend(detail.generation.map(|ring| ("ring", ring.to_string())));
    facts.extend(detail.committed.map(|step| ("checkpoint", grouped(step))));
    facts.extend(quarantined(detail).map(|machines| ("quarantined", machines)));
    facts.push(("run folder", job.run.clone()));
    facts.push(("submitted", format!("{} UTC", utc(job.created_unix_ms))));
    let mut table = Table::new(2);
    for (key, value) in facts {
        table.row([key.to_owned(), value]);
    }
    let mut text = table.render();
    if !detail.workers.is_empty() {
        text.push('\n');
        text.push_str(&workers(detail));
    }
    if let Some(paces) = paces(detail) {
        text.push_str(&format!("\n{paces}"));
    }
    if !detail.events.is_empty() {
        text.push('\n');
        detail.events.iter().for_each(|event| text.push_str(&format!("{}\n", record(event))));
    }
    Ok(text)
}

/// Machines from which nobody is taken in; absent: there are none.
fn quarantined(detail: &v1::JobDetail) -> Option<String> {
    (!detail.quarantined.is_empty()).then(|| detail.quarantined.join(", "))
}

/// Who serves what.
pub fn workers(detail: &v1::JobDetail) -> String {
    let mut table = Table::new(4);
    table.row(["worker", "machine", "lanes", "", "state after"]);
    for worker in &detail.workers {
        table.row([
            name_of(worker),
            machine_of(worker),
            lanes_of(worker, detail.lanes),
            activity_of(worker),
            worker.holds.map_or("–".to_owned(), |step| format!("step {}", grouped(step))),
        ]);
    }
    table.render()
}

fn name_of(worker: &v1::Attendant) -> String {
    short_digest(&WorkerId(worker.worker).to_string()).to_owned()
}

fn machine_of(worker: &v1::Attendant) -> String {
    if worker.machine.is_empty() { "–".to_owned() } else { worker.machine.clone() }
}

fn lanes_of(worker: &v1::Attendant, all: u32) -> String {
    match (worker.first_lane, worker.end_lane) {
        (Some(first), Some(end)) if first + 1 == end => format!("{first} of {all}"),
        (Some(first), Some(end)) if first < end => format!("{first} to {} of {all}", end - 1),
        (Some(_), _) => "none".to_owned(),
        (None, _) => "–".to_owned(),
    }
}

fn activity_of(worker: &v1::Attendant) -> String {
    let slow = slow_of(worker).map(|slow| format!(", {slow}")).unwrap_or_default();
    format!("{}{slow}", worker.activity)
}

/// `slow (1.8 ×)`
fn slow_of(worker: &v1::Attendant) -> Option<String> {
    worker.slow.map(|factor| format!("slow ({})", times(factor)))
}

/// Where the time of those goes that have told of it: of a whole step and of its parts, as means over their last steps.
fn paces(detail: &v1::JobDetail) -> Option<String> {
    let batch = detail.steps.last().map(|step| step.batch_tokens as f64);
    let mut table = Table::new(4);
    table.row([
        "worker", "machine", "lanes", "", "step", "tok/s", "time", "data", "forward", "backward", "reduce",
        "update", "copy",
    ]);
    let mut some = false;
    for worker in &detail.workers {
        let Some(pace) = &worker.pace else { continue };
        some = true;
        let lanes = worker.end_lane.unwrap_or(0).saturating_sub(worker.first_lane.unwrap_or(0));
        let share = f64::from(lanes) / f64::from(detail.lanes.max(1));
        let speed = batch.map_or("–".to_owned(), |batch| per_second(batch * share / pace.whole_s));
        let cells = [
            name_of(worker),
            machine_of(worker),
            lanes_of(worker, detail.lanes),
            slow_of(worker).unwrap_or_default(),
            worker.holds.map_or("–".to_owned(), grouped),
            speed,
        ];
        let backward_s = (pace.compute_s - pace.forward_s).max(0.0);
        let v1::PaceFigures { whole_s, data_s, forward_s, reduce_s, update_s, checkpoint_s, .. } = *pace;
        let seconds = [whole_s, data_s, forward_s, backward_s, reduce_s, update_s, checkpoint_s];
        table.row(cells.into_iter().chain(seconds.map(|s| format!("{s:.3} s"))));
    }
    some.then(|| table.render())
}

/// What `anello top` shows: the job's line, and where its workers' time goes.
pub fn top(detail: &v1::JobDetail) -> Result<String, Failure> {
    let nothing = || "no worker has told yet where its time goes\n".to_owned();
    Ok(format!("{}\n\n{}", line(detail)?, paces(detail).unwrap_or_else(nothing)))
}

/// The one line of a job that is watched: `small is running: step 12/31  38.7 %  loss 6.1  9 820 tok/s  3 of 3 workers`.
pub fn line(detail: &v1::JobDetail) -> Result<String, Failure> {
    let job = job_of(detail)?;
    let (step, total) = (job.step.unwrap_or(0), job.total_steps);
    let mut text = format!(
        "{} is {}: step {}/{}  {}",
        job.name,
        phase_of(job)?,
        grouped(step),
        grouped(total),
        percent(step, total)
    );
    text.extend(job.loss.map(|loss| format!("  loss {}", nats(loss))));
    text.extend(job.tokens_per_s.map(|speed| format!("  {} tok/s", per_second(speed))));
    if !phase_of(job)?.is_terminal() {
        text.push_str(&format!("  {} of {} workers", job.workers, job.desired));
    }
    let lanes: Vec<String> = detail
        .workers
        .iter()
        .filter_map(|worker| Some((worker.end_lane? - worker.first_lane?).to_string()))
        .collect();
    if !lanes.is_empty() {
        text.push_str(&format!("  lanes {}", lanes.join("+")));
    }
    text.extend(job.waits_for.as_ref().map(|what| format!("  waits for {what}")));
    text.extend(job.reason.as_ref().map(|why| format!("  {why}")));
    Ok(text)
}

/// What a terminal shows while a job is watched.
pub fn board(detail: &v1::JobDetail) -> Result<String, Failure> {
    const EVENTS: usize = 6;
    const STEPS: usize = 4;
    let mut text = format!("{}\n", line(detail)?);
    if !detail.workers.is_empty() {
        text.push('\n');
        text.push_str(&workers(detail));
    }
    if let Some(machines) = quarantined(detail) {
        text.push_str(&format!("\nquarantined: {machines}\n"));
    }
    if !detail.steps.is_empty() {
        let mut table = Table::new(2);
        table.row(["step", "stage", "loss", "tok/s"]);
        for step in &detail.steps[detail.steps.len().saturating_sub(STEPS)..] {
            let speed = step.batch_tokens as f64 / step.seconds;
            table.row([grouped(step.step + 1), step.stage.clone(), nats(step.loss), per_second(speed)]);
        }
        text.push('\n');
        text.push_str(&table.render());
    }
    if !detail.events.is_empty() {
        text.push('\n');
        let last = &detail.events[detail.events.len().saturating_sub(EVENTS)..];
        last.iter().for_each(|event| text.push_str(&format!("{}\n", record(event))));
    }
    Ok(text)
}

/// A record of the log.
pub fn record(record: &v1::LogRecord) -> String {
    let words = record_of(record).map_or_else(|| record.json.clone(), |record| sentence_of(&record.event));
    format!("{} UTC  {words}", utc(record.unix_ms))
}

/// The job of a detail.
pub fn job_of(detail: &v1::JobDetail) -> Result<&v1::Job, Failure> {
    detail.job.as_ref().ok_or_else(|| Failure::Unreachable("the coordinator tells of no job".to_owned()))
}

/// The phase of a detail.
pub fn phase(detail: &v1::JobDetail) -> Result<Phase, Failure> {
    phase_of(job_of(detail)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(name: &str, phase: Phase) -> v1::Job {
        v1::Job {
            name: name.into(),
            phase: v1::Phase::from(phase).into(),
            min: 1,
            desired: 3,
            run: format!("/jobs/{name}"),
            total_steps: 1031,
            ..Default::default()
        }
    }

    fn running() -> v1::JobDetail {
        let worker = |id: u64, first_lane, activity: &str| v1::Attendant {
            worker: id << 60,
            machine: "node-1".into(),
            first_lane,
            end_lane: first_lane.map(|first| first + 2),
            holds: first_lane.map(|_| 412),
            activity: activity.into(),
            pace: first_lane.map(|_| v1::PaceFigures {
                steps: 20,
                whole_s: 0.05,
                data_s: 0.001,
                compute_s: 0.04,
                forward_s: 0.01,
                reduce_s: 0.006,
                update_s: 0.002,
                checkpoint_s: 0.001,
            }),
            slow: (id == 5).then_some(1.84),
        };
        let job = v1::Job {
            workers: 3,
            step: Some(412),
            loss: Some(4.3121),
            tokens_per_s: Some(9820.0),
            waits_for: Some("the next step boundary, to take in 1 more".into()),
            ..job("small", Phase::Running)
        };
        let json = r#"{"number":7,"unix_ms":0,"kind":"goal","goal":"run","workers":3}"#;
        v1::JobDetail {
            job: Some(job),
            generation: Some(7),
            committed: Some(400),
            workers: vec![
                worker(3, Some(0), "training"),
                worker(5, Some(2), "training"),
                worker(1, None, "waiting"),
            ],
            steps: vec![v1::StepFigures {
                step: 411,
                stage: "stable".into(),
                loss: 4.3121,
                batch_tokens: 512,
                seconds: 0.05,
            }],
            events: vec![v1::LogRecord { number: 7, unix_ms: 0, json: json.into() }],
            lanes: 4,
            quarantined: Vec::new(),
        }
    }

    #[test]
    fn a_list_is_a_table_and_says_what_is_waited_for() {
        let queued = v1::Job { waits_for: Some("free slots".into()), ..job("other", Phase::Queued) };
        let failed = v1::Job { reason: Some("disk".into()), ..job("third", Phase::Failed) };
        let quarantined = |name, waits_for: Option<&str>, machines| v1::Job {
            waits_for: waits_for.map(str::to_owned),
            quarantined: machines,
            ..job(name, Phase::Running)
        };
        let (one, two) = (quarantined("one", None, 1), quarantined("two", Some("workers"), 2));
        let text = list(&[running().job.unwrap(), queued, failed, one, two]).unwrap();
        assert_eq!(
            text,
            "job    phase    step     of   loss  tok/s  workers\n\
             small  running   412  1 031  4.312  9 820   3 of 3  waits for the next step boundary, to take in 1 more\n\
             other  queued      –  1 031      –      –   0 of 3  waits for free slots\n\
             third  failed      –  1 031      –      –   0 of 3  disk\n\
             one    running     –  1 031      –      –   0 of 3  1 machine is quarantined\n\
             two    running     –  1 031      –      –   0 of 3  waits for workers; 2 machines are quarantined\n"
        );
        assert!(list(&[]).unwrap().contains("anello submit"));
    }

    #[test]
    fn a_job_is_told_whole() {
        assert_eq!(
            describe(&running()).unwrap(),
            "job         small\n\
             phase       running\n\
             waits for   the next step boundary, to take in 1 more\n\
             workers     3 of 3 that are wanted; at least 1 train\n\
             step        412 of 1 031 (40.0 %)\n\
             loss        4.312\n\
             speed       9 820 tokens/s\n\
             ring        7\n\
             checkpoint  400\n\
             run folder  /jobs/small\n\
             submitted   1970-01-01 00:00:00 UTC\n\
             \n\
             worker        machine  lanes                                state after\n\
             300000000000  node-1   0 to 1 of 4  training                   step 412\n\
             500000000000  node-1   2 to 3 of 4  training, slow (1.8 ×)     step 412\n\
             100000000000  node-1   –            waiting                           –\n\
             \n\
             worker        machine  lanes                      step  tok/s     time     data  forward  backward   reduce   update     copy\n\
             300000000000  node-1   0 to 1 of 4                 412  5 120  0.050 s  0.001 s  0.010 s   0.030 s  0.006 s  0.002 s  0.001 s\n\
             500000000000  node-1   2 to 3 of 4  slow (1.8 ×)   412  5 120  0.050 s  0.001 s  0.010 s   0.030 s  0.006 s  0.002 s  0.001 s\n\
             \n\
             1970-01-01 00:00:00 UTC  the user asks to train, with 3 workers\n"
        );
    }

    #[test]
    fn a_watched_job_is_a_line_or_a_board() {
        assert_eq!(
            line(&running()).unwrap(),
            "small is running: step 412/1 031  40.0 %  loss 4.312  9 820 tok/s  3 of 3 workers  lanes 2+2  waits for the \
             next step boundary, to take in 1 more"
        );
        let mut many = running();
        let step = many.steps[0].clone();
        many.steps = (407..=411).map(|at| v1::StepFigures { step: at, ..step.clone() }).collect();
        let worker = "5000000000000000";
        let more = [
            format!(r#""kind":"joined","worker":"{worker}","machine":"node-1""#),
            format!(r#""kind":"lost","worker":"{worker}","step":398,"reason":"silent for 1.000 s""#),
            r#""kind":"recovered","generation":7,"workers":2,"took_ms":340,"again":1"#.to_owned(),
            r#""kind":"stage","step":400,"stage":"stable""#.to_owned(),
            r#""kind":"checkpoint","step":400,"weights":"9f86d081884c7d65""#.to_owned(),
            format!(r#""kind":"slow","worker":"{worker}","machine":"node-1","step":410,"percent":184"#),
        ];
        many.events.extend((8..).zip(more).map(|(number, event)| v1::LogRecord {
            number,
            unix_ms: number * 1000,
            json: format!(r#"{{"number":{number},"unix_ms":0,{event}}}"#),
        }));
        assert_eq!(
            board(&many).unwrap(),
            "small is running: step 412/1 031  40.0 %  loss 4.312  9 820 tok/s  3 of 3 workers  lanes 2+2  waits for the \
             next step boundary, to take in 1 more\n\
             \n\
             worker        machine  lanes                                state after\n\
             300000000000  node-1   0 to 1 of 4  training                   step 412\n\
             500000000000  node-1   2 to 3 of 4  training, slow (1.8 ×)     step 412\n\
             100000000000  node-1   –            waiting                           –\n\
             \n\
             step  stage    loss   tok/s\n\
             409   stable  4.312  10 240\n\
             410   stable  4.312  10 240\n\
             411   stable  4.312  10 240\n\
             412   stable  4.312  10 240\n\
             \n\
             1970-01-01 00:00:08 UTC  worker 500000000000 joined from node-1\n\
             1970-01-01 00:00:09 UTC  worker 500000000000 lost (silent for 1.000 s) at step 398\n\
             1970-01-01 00:00:10 UTC  ring re-formed with 2 workers in 0.34 s; 1 step computed again\n\
             1970-01-01 00:00:11 UTC  stage stable begins, after 400 steps\n\
             1970-01-01 00:00:12 UTC  checkpoint 400, weights 9f86d081884c\n\
             1970-01-01 00:00:13 UTC  worker 500000000000 on node-1 is slow: its lanes take 1.8 × as long as the others' at \
             step 410\n"
        );
        let unknown = v1::LogRecord { number: 1, unix_ms: 0, json: r#"{"kind":"new"}"#.into() };
        assert_eq!(record(&unknown), r#"1970-01-01 00:00:00 UTC  {"kind":"new"}"#);
    }

    #[test]
    fn machines_that_compute_wrongly_are_named() {
        assert!(!describe(&running()).unwrap().contains("quarantined"));
        let machines = vec!["node-7".to_owned(), "node-9".to_owned()];
        let detail = v1::JobDetail { quarantined: machines, ..running() };
        let text = describe(&detail).unwrap();
        assert!(text.contains("\ncheckpoint   400\nquarantined  node-7, node-9\nrun folder"), "{text}");
        let text = board(&detail).unwrap();
        assert!(text.contains("\n\nquarantined: node-7, node-9\n\nstep "), "{text}");
    }

    #[test]
    fn the_time_of_workers_is_a_table() {
        let text = top(&running()).unwrap();
        assert!(text.starts_with("small is running: step 412/1 031"), "{text}");
        assert!(
            text.contains("500000000000  node-1   2 to 3 of 4  slow (1.8 ×)   412  5 120  0.050 s"),
            "{text}"
        );
        let mut new = running();
        new.workers.iter_mut().for_each(|worker| worker.pace = None);
        assert!(top(&new).unwrap().ends_with("\n\nno worker has told yet where its time goes\n"));
    }
}
