//! The loader over real files: what it yields, and that nothing else than (seed, data, plan) decides it.

mod common;

use std::collections::BTreeMap;
use std::ops::{ControlFlow, Range};
use std::path::Path;
use std::sync::Arc;

use anello_configs::{LoadOptions, Mask, OnCorrupt, RunConfig, Schedule, Source};
use anello_dataloader::{Cursor, Dataset, Error, Index, LaneStep, Loader, LoaderOptions, StepData, plan_of};
use anello_store::Store;
use anello_store::checkpoint::same_data;
use common::{documents, url, write_set};

const LANES: u32 = 6;

/// Two stages; the second has other shapes and another mixture.
fn plan(step: u64) -> Option<StepData> {
    let mixture = |web, code| Arc::new(BTreeMap::from([("web".to_owned(), web), ("code".to_owned(), code)]));
    let data = |stage, sequence, micro_batches, mixture| StepData {
        stage,
        sequence,
        micro_batch: 2,
        micro_batches,
        mask: Mask::Document,
        mixture,
    };
    match step {
        0..5 => Some(data(0, 32, 1, mixture(0.7, 0.3))),
        5..12 => Some(data(1, 48, 2, mixture(0.2, 0.8))),
        _ => None,
    }
}

fn sets(folder: &Path) -> BTreeMap<String, Arc<Dataset>> {
    write_set(&folder.join("web"), &documents(400), 3, 300);
    write_set(&folder.join("code"), &documents(150), 2, 200);
    let open = |name: &str| (name.to_owned(), Arc::new(Dataset::open(&url(&folder.join(name))).unwrap()));
    BTreeMap::from([open("web"), open("code")])
}

fn options(sources: &BTreeMap<String, Arc<Dataset>>, serve: Range<u32>) -> LoaderOptions {
    LoaderOptions {
        sources: sources.clone(),
        seed: 42,
        lanes: LANES,
        serve,
        plan: Arc::new(plan),
        start_step: 0,
        cursors: None,
        vocab: None,
        on_corrupt: OnCorrupt::Fail,
        prefetch_bytes: 1 << 20,
        threads: 2,
    }
}

fn all(options: LoaderOptions) -> Vec<LaneStep> {
    Loader::open(options).unwrap().map(Result::unwrap).collect()
}

#[test]
fn steps_come_in_order_and_end_with_the_plan() {
    let folder = tempfile::tempdir().unwrap();
    let sources = sets(folder.path());
    let steps = all(options(&sources, 0..LANES));
    let places: Vec<_> = steps.iter().map(|s| (s.step, s.lane)).collect();
    let expected: Vec<_> = (0..12).flat_map(|step| (0..LANES).map(move |lane| (step, lane))).collect();
    assert_eq!(places, expected);
    for taken in &steps {
        let data = plan(taken.step).unwrap();
        assert_eq!(taken.micro_batches.len() as u32, data.micro_batches);
        assert!(taken.micro_batches.iter().all(|b| b.tokens() as u32 == data.sequence * data.micro_batch));
    }
}

/// However large a shard is, one row group of it is asked for at a time, and no more than what is to be held ready.
#[test]
fn row_groups_are_fetched_one_by_one() {
    let folder = tempfile::tempdir().unwrap();
    // Past the footer, which is read from the shard's end in one piece.
    write_set(folder.path(), &documents(60_000), 1, 20_000);
    let shard = std::fs::metadata(folder.path().join("000.parquet")).unwrap().len();
    let dataset = Dataset::open(&url(folder.path())).unwrap();
    let groups = dataset.row_groups();
    let read_bytes = |dataset: &Dataset| dataset.store().traffic().read_bytes;
    dataset.read(0, None).unwrap();
    let (mut before, mut sum) = (read_bytes(&dataset), 0);
    for group in 0..groups {
        dataset.read(group, None).unwrap();
        let bytes = read_bytes(&dataset) - before;
        assert!(
            bytes > 0 && bytes < 2 * shard / groups,
            "row group {group} of {groups}: {bytes} of {shard} bytes"
        );
        (before, sum) = (before + bytes, sum + bytes);
    }
    assert!(groups > 20 && sum <= shard, "{sum} of {shard} bytes in {groups} row groups");

    let dataset = Arc::new(Dataset::open(&url(folder.path())).unwrap());
    let before = read_bytes(&dataset);
    let sources = BTreeMap::from([("web".to_owned(), Arc::clone(&dataset))]);
    let one = |step| {
        (step < 20_000).then(|| StepData {
            stage: 0,
            sequence: 32,
            micro_batch: 1,
            micro_batches: 1,
            mask: Mask::Document,
            mixture: Arc::new(BTreeMap::from([("web".to_owned(), 1.0)])),
        })
    };
    let held = LoaderOptions { lanes: 1, plan: Arc::new(one), prefetch_bytes: 1, ..options(&sources, 0..1) };
    let mut loader = Loader::open(held).unwrap();
    loader.next().unwrap().unwrap();
    let bytes = read_bytes(&dataset) - before;
    assert!(bytes < shard / 4, "{bytes} of {shard} bytes for the first step");
}

#[test]
fn any_partition_threads_and_prefetch_give_the_same_global_sequence() {
    let folder = tempfile::tempdir().unwrap();
    let sources = sets(folder.path());
    let expected = all(options(&sources, 0..LANES));
    for (cuts, threads, prefetch_bytes) in
        [(vec![0, 6], 1, 0), (vec![0, 6], 5, 1 << 30), (vec![0, 1, 6], 3, 5000), (vec![0, 2, 3, 6], 64, 1)]
    {
        let mut steps: Vec<_> = cuts
            .windows(2)
            .flat_map(|cut| {
                all(LoaderOptions { threads, prefetch_bytes, ..options(&sources, cut[0]..cut[1]) })
            })
            .collect();
        steps.sort_by_key(|s| (s.step, s.lane));
        assert_eq!(steps, expected, "cuts {cuts:?}, {threads} threads, {prefetch_bytes} bytes");
    }
}

#[test]
fn a_loader_goes_on_from_the_cursors_of_any_step_with_other_partitions() {
    let folder = tempfile::tempdir().unwrap();
    let sources = sets(folder.path());
    let expected = all(options(&sources, 0..LANES));
    for start_step in 1..12u64 {
        let after = &expected[(start_step as usize - 1) * LANES as usize..];
        let cursors: Vec<Cursor> = after[2..5].iter().map(|s| s.cursor.clone()).collect();
        let text = serde_json::to_string(&cursors).unwrap();
        let cursors = Some(serde_json::from_str(&text).unwrap());
        let rest = all(LoaderOptions { start_step, cursors, ..options(&sources, 2..5) });
        let wanted: Vec<_> =
            expected.iter().filter(|s| s.step >= start_step && (2..5).contains(&s.lane)).cloned().collect();
        assert_eq!(rest, wanted);
    }
}

#[test]
fn a_stored_index_changes_nothing_but_what_it_can_check() {
    let folder = tempfile::tempdir().unwrap();
    let sources = sets(folder.path());
    let expected = all(options(&sources, 0..LANES));
    for dataset in sources.values() {
        let index = Index::build(dataset.store(), true, 2, &|_| ControlFlow::Continue(())).unwrap();
        let (stored, in_memory) = (index.digest(), dataset.index().digest());
        assert!(same_data(&stored, &in_memory) && stored.starts_with(&format!("{in_memory}+")), "{stored}");
        assert!(index.row_groups().all(|g| g.blake3.is_some()));
        index.save(dataset.store()).unwrap();
    }
    let stored = sources
        .iter()
        .map(|(name, d)| (name.clone(), Arc::new(Dataset::open(d.store().place()).unwrap())))
        .collect();
    assert_eq!(all(options(&stored, 0..LANES)), expected);
}

#[test]
fn an_index_that_tells_of_other_files_is_an_error_with_a_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("web");
    let save = || {
        write_set(&path, &documents(50), 2, 100);
        let store = Store::open(&url(&path)).unwrap();
        Index::build(&store, false, 1, &|_| ControlFlow::Continue(())).unwrap().save(&store).unwrap();
    };
    let fault = || Dataset::open(&url(&path)).unwrap_err().to_string();
    save();
    Dataset::open(&url(&path)).unwrap();
    std::fs::write(path.join("000.parquet"), b"other").unwrap();
    assert!(
        fault().contains("index.json says 000.parquet has")
            && fault().contains("it has 5; run `anello data index")
    );
    save();
    std::fs::copy(path.join("000.parquet"), path.join("new.parquet")).unwrap();
    assert!(fault().contains("does not know new.parquet"), "{}", fault());
    save_without(&path);
    assert!(fault().contains("tells of new.parquet, which is not there"), "{}", fault());
    std::fs::write(path.join("index.json"), "{").unwrap();
    assert!(fault().contains("cannot be read"), "{}", fault());
    std::fs::remove_dir_all(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    assert!(fault().contains("holds no .parquet file"), "{}", fault());

    fn save_without(path: &Path) {
        let store = Store::open(&url(path)).unwrap();
        Index::build(&store, false, 1, &|_| ControlFlow::Continue(())).unwrap().save(&store).unwrap();
        std::fs::remove_file(path.join("new.parquet")).unwrap();
    }
}

#[test]
fn a_flipped_byte_is_an_error_that_names_the_place_or_is_skipped_and_told() {
    let folder = tempfile::tempdir().unwrap();
    let sources = sets(folder.path());
    for dataset in sources.values() {
        let index = Index::build(dataset.store(), true, 2, &|_| ControlFlow::Continue(())).unwrap();
        index.save(dataset.store()).unwrap();
    }
    let file = folder.path().join("web/001.parquet");
    let mut bytes = std::fs::read(&file).unwrap();
    // The first row group lies right behind the magic number.
    bytes[40] ^= 0x10;
    std::fs::write(&file, bytes).unwrap();
    let open =
        |name: &str| (name.to_owned(), Arc::new(Dataset::open(&url(&folder.path().join(name))).unwrap()));
    let sources = BTreeMap::from([open("web"), open("code")]);

    let results: Vec<_> = Loader::open(options(&sources, 0..LANES)).unwrap().collect();
    let error = results.last().unwrap().as_ref().unwrap_err();
    assert!(matches!(error, Error::Corrupt { row_group: 0, offset: 4, .. }), "{error}");
    assert!(error.to_string().contains("web/001.parquet: row group 0 at byte 4 is corrupt"), "{error}");
    assert_eq!(results.iter().filter(|r| r.is_err()).count(), 1);

    let steps = all(LoaderOptions { on_corrupt: OnCorrupt::Skip, ..options(&sources, 0..LANES) });
    let skipped: Vec<_> = steps.iter().flat_map(|s| &s.skipped_row_groups).collect();
    assert!(!skipped.is_empty() && skipped.iter().all(|s| s.source == "web"));
    assert!(skipped.iter().all(|s| s.reason.contains("web/001.parquet: row group 0")));
}

#[test]
fn dropping_a_loader_in_the_middle_ends_its_threads() {
    let folder = tempfile::tempdir().unwrap();
    let sources = sets(folder.path());
    let endless = Arc::new(|_| plan(0));
    let mut loader = Loader::open(LoaderOptions {
        plan: endless,
        prefetch_bytes: 0,
        threads: 3,
        ..options(&sources, 0..LANES)
    })
    .unwrap();
    assert_eq!(loader.next().unwrap().unwrap().lane, 0);
    drop(loader);
    // The threads are joined: nothing holds the sets any more but this test.
    assert!(sources.values().all(|dataset| Arc::strong_count(dataset) == 1));
}

#[test]
fn options_that_do_not_fit_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let sources = sets(folder.path());
    let fault = |options| Loader::open(options).err().unwrap().to_string();
    assert!(fault(options(&sources, 4..7)).contains("lanes 4..7 cannot be served of a run with 6"));
    assert!(fault(options(&sources, 3..3)).contains("serve at least one"));
    let cursors = Some(vec![Cursor::default(); 2]);
    assert!(fault(LoaderOptions { cursors, ..options(&sources, 0..3) }).contains("2 cursors for 3 lanes"));
    assert!(
        fault(LoaderOptions { vocab: Some(100), ..options(&sources, 0..3) })
            .contains("the vocabulary has 100")
    );
    let plan = Arc::new(|_| {
        Some(StepData { mixture: Arc::new([("books".to_owned(), 1.0)].into()), ..plan(0).unwrap() })
    });
    let error =
        Loader::open(LoaderOptions { plan, ..options(&sources, 0..1) }).unwrap().next().unwrap().unwrap_err();
    assert!(error.to_string().contains("stage 0 draws from books"), "{error}");
}

#[test]
fn many_epochs_and_more_lanes_than_row_groups_work() {
    let folder = tempfile::tempdir().unwrap();
    write_set(&folder.path().join("web"), &documents(10), 1, 1 << 20);
    let dataset = Arc::new(Dataset::open(&url(&folder.path().join("web"))).unwrap());
    assert_eq!(dataset.row_groups(), 1);
    let mixture = Arc::new(BTreeMap::from([("web".to_owned(), 1.0)]));
    let plan = Arc::new(move |step| {
        (step < 50).then(|| StepData {
            mixture: mixture.clone(),
            sequence: 64,
            micro_batch: 1,
            micro_batches: 1,
            ..plan(0).unwrap()
        })
    });
    let sources = BTreeMap::from([("web".to_owned(), dataset)]);
    let steps = all(LoaderOptions { plan, ..options(&sources, 0..LANES) });
    // 117 tokens: each lane goes through them 27 times, in epochs of its own.
    let last: Vec<_> =
        steps[steps.len() - LANES as usize..].iter().map(|s| s.epochs_by_source["web"]).collect();
    assert!(last.windows(2).all(|w| w[1] == w[0] + 1) && last[0] >= 25 * u64::from(LANES), "{last:?}");
}

#[test]
fn a_damaged_footer_is_an_error_or_skipped_and_told() {
    let folder = tempfile::tempdir().unwrap();
    for dataset in sets(folder.path()).values() {
        let index = Index::build(dataset.store(), true, 2, &|_| ControlFlow::Continue(())).unwrap();
        index.save(dataset.store()).unwrap();
    }
    let file = folder.path().join("web/001.parquet");
    let mut bytes = std::fs::read(&file).unwrap();
    let length = bytes.len();
    bytes[length - 8..length - 4].copy_from_slice(&[0xff; 4]);
    std::fs::write(&file, bytes).unwrap();
    let open =
        |name: &str| (name.to_owned(), Arc::new(Dataset::open(&url(&folder.path().join(name))).unwrap()));
    let sources = BTreeMap::from([open("web"), open("code")]);
    let error = Loader::open(options(&sources, 0..LANES)).unwrap().find_map(Result::err).unwrap();
    assert!(error.to_string().contains("web/001.parquet: its Parquet footer cannot be read"), "{error}");
    let steps = all(LoaderOptions { on_corrupt: OnCorrupt::Skip, ..options(&sources, 0..LANES) });
    assert!(steps.iter().any(|s| !s.skipped_row_groups.is_empty()));
}

#[test]
fn a_run_config_gives_the_plan_of_its_schedule() {
    let folder = tempfile::tempdir().unwrap();
    let load = LoadOptions { config: "tiny".to_owned(), ..LoadOptions::default() };
    let mut config = RunConfig::load(&load).unwrap().config;
    let names: Vec<String> = config.data.sources.keys().cloned().collect();
    for name in names {
        write_set(&folder.path().join(&name), &documents(100), 1, 200);
        config.data.sources.insert(name.clone(), Source { url: url(&folder.path().join(name)) });
    }
    let schedule = Schedule::new(&config);
    let plan = plan_of(schedule.clone());
    for step in 0..schedule.total_steps() {
        let (plan, expected) = (plan(step).unwrap(), schedule.at(step).unwrap());
        assert_eq!(plan.stage as usize, expected.stage_index);
        assert_eq!((plan.sequence, plan.mask), (expected.stage.sequence, expected.stage.mask));
        assert_eq!(*plan.mixture, expected.stage.mixture);
        let tokens = u64::from(plan.sequence) * u64::from(plan.micro_batch) * u64::from(plan.micro_batches);
        assert_eq!(tokens * u64::from(config.lanes), expected.batch_tokens);
    }
    assert!(plan(schedule.total_steps()).is_none());

    let options = LoaderOptions { vocab: None, ..LoaderOptions::of(&config).unwrap() };
    let lanes = config.lanes as usize;
    let first: Vec<LaneStep> = Loader::open(options).unwrap().take(lanes).map(Result::unwrap).collect();
    let tokens: usize = first.iter().flat_map(|s| &s.micro_batches).map(|b| b.tokens()).sum();
    assert_eq!(tokens as u64, schedule.at(0).unwrap().batch_tokens);
}

#[test]
fn odd_paths_and_file_urls_open_and_unknown_schemes_say_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sp ace %41 é [x]");
    write_set(&path, &documents(60), 2, 200);
    std::fs::create_dir(path.join("lang=en")).unwrap();
    std::fs::rename(path.join("001.parquet"), path.join("lang=en/100% ~.parquet")).unwrap();
    std::fs::write(path.join("lang=en/.hidden.parquet"), "no shard").unwrap();
    let tokens = |url: &str| {
        let dataset = Dataset::open(url).unwrap();
        (0..dataset.row_groups()).map(|at| dataset.read(at, None).unwrap().tokens().len()).sum::<usize>()
    };
    let expected = documents(60).concat().len();
    assert_eq!(tokens(&url(&path)), expected);
    let encoded = url(&path).replace('%', "%25").replace(' ', "%20").replace('[', "%5B").replace(']', "%5D");
    assert_eq!(tokens(&format!("file://{encoded}/")), expected);

    let fault = |url: &str| Store::open(url).unwrap_err().to_string();
    assert!(fault("ftp://host/folder").contains("ftp://host/folder: ftp:// is no store that is known here"));
    assert!(fault("file://host/folder").contains("not an absolute path"), "{}", fault("file://host/folder"));
    let missing = Dataset::open(&url(&folder.path().join("nowhere"))).unwrap_err().to_string();
    assert!(missing.contains("nowhere: holds no .parquet file"), "{missing}");
}
