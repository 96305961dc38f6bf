use super::*;
use crate::Operation;

fn evaluated(set: &str, loops: usize) -> Evaluated {
    let per_loop = |from: f64| (1..=loops).map(|t| from / t as f64).collect::<Vec<f64>>();
    let [loop_loss, accuracy, exit] = [7.3, 0.7, 0.9].map(per_loop);
    Evaluated { set: set.to_owned(), counted: 640, loop_loss, accuracy, exit }
}

fn record(step: u64, loops: usize) -> StepRecord {
    StepRecord {
        step,
        stage: "stable".into(),
        tokens: 100 * (step + 1),
        batch_tokens: 100,
        counted: 97,
        lr: 1e-3 / (step + 1) as f64,
        loss: 7.1,
        loop_loss: (0..loops).map(|t| 7.0 - t as f64 / 7.0).collect(),
        exit: vec![1.0 / loops as f64; loops],
        entropy: (loops as f64).ln(),
        grad_norm: if step == 3 { f64::NAN } else { 0.3 },
        applied: step != 3,
        evals: match step % 3 {
            0 => Vec::new(),
            sets => (0..sets).map(|set| evaluated(&format!("set-{set}"), loops)).collect(),
        },
        weights: (step % 2 == 1).then(|| format!("{step:064x}")),
        seconds: Seconds {
            step: 0.5,
            data: 0.1,
            compute: 0.2,
            forward: 0.05,
            reduce: 0.1,
            update: 0.1,
            checkpoint: 0.0,
            eval: 0.25,
        },
    }
}

/// `Debug` text: equal values, NaN included.
fn shown(records: &[StepRecord]) -> String {
    format!("{records:?}")
}

#[test]
fn records_survive_parquet_also_when_t_changes() {
    let store = Store::memory().unwrap();
    let records: Vec<StepRecord> = (0..6).map(|s| record(s, if s < 4 { 8 } else { 4 })).collect();
    write(&store, &records[..5]).unwrap();
    write(&store, &records[5..]).unwrap();
    assert_eq!(shown(&read(&store).unwrap()), shown(&records));
    assert!((records[0].depth() - 4.5).abs() < 1e-12 && records[0].kl().abs() < 1e-12);
}

#[test]
fn records_are_the_same_bits_after_transport() {
    let records = [record(2, 4), StepRecord { loss: 0.1 + 0.2, ..record(3, 4) }];
    let json = serde_json::to_vec(&records).unwrap();
    let back: Vec<StepRecord> = serde_json::from_slice(&json).unwrap();
    assert_eq!((&back[0], shown(&back)), (&records[0], shown(&records)));
}

#[test]
fn a_file_of_an_older_build_reads_without_what_it_does_not_have() {
    let records = [record(0, 4), record(1, 4)];
    let mut batch = to_batch(&records);
    for newer in [REDUCE, EVAL, FORWARD, WEIGHTS] {
        batch.remove_column(batch.schema().index_of(newer).unwrap());
    }
    let mut bytes = Vec::new();
    let mut writer = ArrowWriter::try_new(&mut bytes, batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    let expected = records.map(|r| StepRecord {
        seconds: Seconds { reduce: 0.0, eval: 0.0, forward: 0.0, ..r.seconds },
        weights: None,
        ..r
    });
    assert_eq!(decode(bytes.into(), 0..=1).unwrap(), expected);
}

/// Of a file that was damaged anywhere, its footer included, records are told that are of its steps, or an error.
#[test]
fn a_file_that_is_damaged_anywhere_is_an_error_or_harmless() {
    let good = encode(&(3..9).map(|s| record(s, 4)).collect::<Vec<_>>());
    assert_eq!(decode(good.clone().into(), 3..=8).unwrap().len(), 6);
    let (mut refused, mut panicked) = (0, 0);
    for at in 0..good.len() {
        for flip in [1, 0x80] {
            let mut bad = good.clone();
            bad[at] ^= flip;
            match decode(bad.into(), 3..=8) {
                Err(cause) => {
                    refused += 1;
                    panicked += usize::from(cause.contains("the decoder gave up"));
                }
                Ok(records) => {
                    assert!(
                        records.iter().all(|record| (3..=8).contains(&record.step)) && records.len() <= 6,
                        "byte {at}"
                    );
                }
            }
        }
    }
    assert!(
        refused > 500 && panicked > 0,
        "{refused} of {} were refused, {panicked} by a panic",
        2 * good.len()
    );
    for (steps, expected) in
        [(3..=7, "step 8 where step 8 to 7 is looked for"), (4..=8, "step 3 where step 4 to 8 is")]
    {
        let error = decode(good.clone().into(), steps).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}

/// However many there are, a record is handed over as soon as no later object can hold its step.
#[test]
fn records_are_handed_over_as_they_are_read_and_each_step_once() {
    let store = Store::memory().unwrap();
    let objects: Vec<Vec<StepRecord>> =
        (0..30).map(|at| (at * 5..at * 5 + 5).map(|s| record(s, 2)).collect()).collect();
    objects.iter().for_each(|records| write(&store, records).unwrap());
    let gets = || store.traffic().of(Operation::Get).requests;
    let (before, mut steps) = (gets(), Vec::new());
    read_after(&store, Some(6), |record| {
        steps.push(record.step);
        // The first is skipped; each record waits for the one object after its own.
        assert!(gets() - before <= record.step / 5 + 1, "step {}: {} objects", record.step, gets() - before);
    })
    .unwrap();
    assert_eq!(steps, (7..150).collect::<Vec<u64>>());

    // Steps that were trained again, in an object of their own and in one that goes on from it.
    let again = |steps: std::ops::Range<u64>| -> Vec<StepRecord> {
        steps.map(|step| StepRecord { loss: -1.0, ..record(step, 2) }).collect()
    };
    write(&store, &again(12..14)).unwrap();
    write(&store, &again(148..153)).unwrap();
    let mut told = Vec::new();
    read_after(&store, None, |record| told.push(record)).unwrap();
    assert_eq!(told.iter().map(|record| record.step).collect::<Vec<_>>(), (0..153).collect::<Vec<u64>>());
    let later: Vec<u64> = told.iter().filter(|record| record.loss < 0.0).map(|record| record.step).collect();
    assert_eq!(later, [12, 13, 148, 149, 150, 151, 152]);
    assert_eq!(shown(&told), shown(&read(&store).unwrap()));
}

#[test]
fn the_last_records_are_read_without_the_others() {
    let store = Store::memory().unwrap();
    let records: Vec<StepRecord> = (0..10).map(|s| record(s, 4)).collect();
    for part in [&records[..4], &records[4..8], &records[8..]] {
        write(&store, part).unwrap();
    }
    for count in [0, 1, 2, 3, 6, 7, 10, 99] {
        let all = read(&store).unwrap();
        let last = &all[all.len().saturating_sub(count)..];
        assert_eq!(shown(&read_last(&store, count).unwrap()), shown(last), "{count}");
    }
    let after = |after| {
        let mut steps = Vec::new();
        read_after(&store, after, |record| steps.push(record.step)).unwrap();
        steps
    };
    assert_eq!((after(None), after(Some(5)), after(Some(9))), ((0..10).collect(), vec![6, 7, 8, 9], vec![]));
    // The first is not looked at when it is not needed.
    store.put("metrics/0000000000-0000000003.parquet", b"damaged".to_vec()).unwrap();
    assert_eq!(shown(&read_last(&store, 6).unwrap()), shown(&records[4..]));
    assert!(read_last(&store, 7).is_err());
}

#[test]
fn truncation_keeps_exactly_what_is_before_the_step() {
    let store = Store::memory().unwrap();
    let records: Vec<StepRecord> = (0..10).map(|s| record(s, 4)).collect();
    write(&store, &records[..4]).unwrap();
    write(&store, &records[4..8]).unwrap();
    write(&store, &records[8..]).unwrap();
    truncate(&store, 6).unwrap();
    assert_eq!(shown(&read(&store).unwrap()), shown(&records[..6]));
    truncate(&store, 4).unwrap();
    assert_eq!(shown(&read(&store).unwrap()), shown(&records[..4]));
}
