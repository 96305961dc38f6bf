//! Broken things that someone hands in as data: each is one clear error, never a panic, and never memory that only the
//! broken number asks for.

#[path = "common/footer.rs"]
mod footer;

use std::ops::ControlFlow;
use std::sync::Arc;

use anello_configs::random::Stream;
use anello_configs::{Mask, OnCorrupt};
use anello_dataloader::{
    Cursor, Dataset, INDEX_FILE, Index, Loader, LoaderOptions, OpenDocument, ShardFormat, ShardWriter,
    SourceCursor, StepData,
};
use anello_store::Store;
use footer::lying;
use proptest::prelude::*;

/// Documents of 0 to 16 tokens in a few row groups.
fn shard() -> Vec<u8> {
    let format = ShardFormat { row_group_tokens: 60, zstd_level: 1 };
    let mut writer = ShardWriter::new(format, false, None).unwrap();
    for row in 0..40i32 {
        let ids: Vec<i32> = (0..1 + row % 16).map(|at| (row * 31 + at * 7) % 500).collect();
        writer.push(&ids, None).unwrap();
    }
    writer.finish().unwrap().bytes.to_vec()
}

fn store_of(shard: &[u8]) -> Store {
    let store = Store::memory().unwrap();
    store.put("a.parquet", shard.to_vec()).unwrap();
    store
}

/// Opens and reads all of it; what was wrong, if anything.
fn read_all(store: Store) -> Result<u64, String> {
    let index = Index::open(&store).map_err(|error| error.to_string())?;
    let set = Dataset::new(store, index).map_err(|error| error.to_string())?;
    let mut rows = 0;
    for group in 0..set.row_groups() {
        rows += set.read(group, Some(500)).map_err(|error| error.to_string())?.len() as u64;
    }
    Ok(rows)
}

#[test]
fn a_footer_that_is_damaged_anywhere_is_an_error_or_harmless() {
    let good = shard();
    assert_eq!(read_all(store_of(&good)), Ok(40));
    let footer = u32::from_le_bytes(*good[..good.len() - 4].last_chunk().unwrap()) as usize;
    let from = good.len() - 8 - footer;
    let dice = Stream::new(1, "damage", &[]);
    let mut refused = 0;
    for (case, at) in (from..good.len()).enumerate() {
        let mut bad = good.clone();
        bad[at] ^= 1 + dice.below_at(case as u64, 255) as u8;
        match read_all(store_of(&bad)) {
            Err(error) => {
                assert!(error.contains("a.parquet"), "byte {at}: {error}");
                refused += 1;
            }
            Ok(rows) => assert!(rows <= 40, "byte {at}: {rows} rows"),
        }
    }
    assert!(refused * 3 > footer, "{refused} of {footer} damaged footers were refused");
}

#[test]
fn a_shard_that_is_cut_short_says_so() {
    let good = shard();
    for length in (0..good.len()).step_by(7) {
        let error = read_all(store_of(&good[..length])).unwrap_err();
        assert!(error.contains("a.parquet"), "{length} bytes: {error}");
    }
}

#[test]
fn a_footer_that_claims_what_cannot_be_is_one_clear_error() {
    assert_eq!(read_all(store_of(&lying(&shard(), None, None))), Ok(40));
    for (rows, values, expected) in [
        (
            Some(1 << 62),
            None,
            "its Parquet footer claims more than 10000000000000000 documents; restore the file",
        ),
        (
            None,
            Some(1 << 62),
            "its Parquet footer claims more than 10000000000000000 tokens; restore the file",
        ),
        // More than there is, and little enough to be believed: memory for it would be 34 GB.
        (
            None,
            Some((1 << 32) - 2),
            "4294967294 tokens in one row group, whose ids take too few bytes to be that many",
        ),
        (None, Some(1 << 27), "the footer tells of 134217728 values, the pages of "),
        // Less than the pages hold: what is more is not even unpacked.
        (None, Some(3), "values, and the footer tells of 3 more"),
        (None, Some(1 << 32), "4294967296 tokens in one row group; write smaller row groups"),
        (Some(1 << 32), None, "the footer tells of 4294967296 rows, the pages of "),
    ] {
        let error = read_all(store_of(&lying(&shard(), rows, values))).unwrap_err();
        assert!(error.contains("a.parquet") && error.contains(expected), "{rows:?} {values:?}: {error}");
    }
}

/// One document of one token, over and over: a few kilobytes that unpack to 64 MiB, and to 8 bytes a token on the way. A footer
/// that tells of fewer has them refused before that.
#[test]
fn a_run_of_one_token_is_unpacked_as_far_as_the_footer_tells() {
    const TOKENS: usize = 1 << 24;
    let format = ShardFormat { row_group_tokens: 1 << 25, zstd_level: 1 };
    let mut writer = ShardWriter::new(format, false, None).unwrap();
    writer.push(&vec![7; TOKENS], None).unwrap();
    let packed = writer.finish().unwrap().bytes.to_vec();
    assert!(packed.len() < TOKENS / 256, "{} bytes", packed.len());
    let (read, kib) = peak_of(|| read_all(store_of(&lying(&packed, None, Some(1000)))));
    let error = read.unwrap_err();
    assert!(error.contains("a page of ") && error.contains("the footer tells of 1000 more"), "{error}");
    let (whole, kib_of_whole) = peak_of(|| read_all(store_of(&packed)));
    assert_eq!(whole, Ok(1));
    assert!(
        kib < TOKENS as u64 / 1024 && kib_of_whole > 4 * TOKENS as u64 / 1024,
        "{kib}, {kib_of_whole} KiB"
    );
}

/// What `act` returns, and how much more memory this process had meanwhile than before, at most, KiB.
fn peak_of<T>(act: impl FnOnce() -> T) -> (T, u64) {
    let told = |name: &str| -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    };
    // The kernel's record of the most begins anew.
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = told("VmRSS:");
    let done = act();
    (done, told("VmHWM:").saturating_sub(before))
}

/// The index of [`shard`], changed, as someone may hand it in.
fn with_index(change: impl FnOnce(&mut serde_json::Value)) -> Result<u64, String> {
    let store = store_of(&shard());
    let index = Index::build(&store, true, 1, &|_| ControlFlow::Continue(())).unwrap();
    index.save(&store).unwrap();
    let mut value = serde_json::from_slice(&store.get(INDEX_FILE).unwrap().unwrap()).unwrap();
    change(&mut value);
    store.put(INDEX_FILE, serde_json::to_vec(&value).unwrap()).unwrap();
    read_all(store)
}

#[test]
fn an_index_that_claims_what_cannot_be_is_refused() {
    assert_eq!(with_index(|_| ()), Ok(40));
    for huge in [1u64 << 62, u64::MAX] {
        for key in ["rows", "tokens"] {
            let claim = |index: &mut serde_json::Value| {
                for group in index["shards"][0]["row_groups"].as_array_mut().unwrap() {
                    group[key] = huge.into();
                }
            };
            let error = with_index(claim).unwrap_err();
            assert!(error.contains(INDEX_FILE) || error.contains("a.parquet"), "{key} {huge}: {error}");
        }
    }
    let error = with_index(|index| index["shards"][0]["path"] = "../a.parquet".into()).unwrap_err();
    assert!(error.contains("../a.parquet, which is not there"), "{error}");
    let error = with_index(|index| index["shards"][0]["row_groups"] = serde_json::json!([])).unwrap_err();
    assert!(error.contains("hold no document"), "{error}");
}

#[test]
fn an_index_that_is_no_text_is_refused() {
    for bytes in
        [&b"\xff\xfe{}"[..], b"{\"version\": 1, \"shards\": [{\"path\": \"\xc3\x28\"}]}", b"", b"[]", b"{"]
    {
        let store = store_of(&shard());
        store.put(INDEX_FILE, bytes.to_vec()).unwrap();
        let error = read_all(store).unwrap_err();
        assert!(error.contains("index.json cannot be read"), "{error}");
        assert!(error.contains("run `anello data index"), "{error}");
    }
}

/// A loader of the set at `cursor`, as far as its first step.
fn from(cursor: Cursor) -> Result<(), String> {
    let store = store_of(&shard());
    let index = Index::open(&store).unwrap();
    let set = Arc::new(Dataset::new(store, index).unwrap());
    let mixture = Arc::new([("words".to_owned(), 1.0)].into());
    let step =
        StepData { stage: 0, sequence: 8, micro_batch: 1, micro_batches: 1, mask: Mask::Document, mixture };
    let options = LoaderOptions {
        sources: [("words".to_owned(), set)].into(),
        seed: 1,
        lanes: 1,
        serve: 0..1,
        plan: Arc::new(move |at| (at < 1).then(|| step.clone())),
        start_step: 0,
        cursors: Some(vec![cursor]),
        vocab: Some(500),
        on_corrupt: OnCorrupt::Fail,
        prefetch_bytes: 1 << 20,
        threads: 1,
    };
    let mut loader = Loader::open(options).map_err(|error| error.to_string())?;
    loader.next().expect("there is a step").map(drop).map_err(|error| error.to_string())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// A cursor is read from checkpoints: whatever it says, the loader goes on or says what is wrong.
    #[test]
    fn any_cursor_is_taken_or_refused(
        stage in 0u32..3,
        draws in prop_oneof![0u64..100, any::<u64>()],
        row_groups in prop_oneof![0u64..100, any::<u64>()],
        documents in prop_oneof![0u64..20, any::<u64>()],
        open in prop::option::of(prop_oneof![0u64..20, any::<u64>()]),
    ) {
        let cursor = Cursor {
            stage,
            draws,
            sources: [("words".to_owned(), SourceCursor { row_groups, documents })].into(),
            open: open.map(|token| OpenDocument { source: "words".to_owned(), token }),
        };
        if let Err(error) = from(cursor) {
            prop_assert!(!error.contains("ended without a word"), "a thread panicked: {error}");
        }
    }

    /// The JSON of a cursor, damaged anywhere: it parses to some cursor, or it does not.
    #[test]
    fn any_damage_of_a_cursor_s_text_is_found_or_harmless(at in any::<prop::sample::Index>(), byte: u8) {
        let cursor = Cursor {
            stage: 1,
            draws: 7,
            sources: [("words".to_owned(), SourceCursor { row_groups: 1, documents: 2 })].into(),
            open: Some(OpenDocument { source: "words".to_owned(), token: 3 }),
        };
        let mut text = serde_json::to_vec(&cursor).unwrap();
        let at = at.index(text.len());
        text[at] = byte;
        if let Ok(cursor) = serde_json::from_slice::<Cursor>(&text)
            && let Err(error) = from(cursor)
        {
            prop_assert!(!error.contains("ended without a word"), "a thread panicked: {error}");
        }
    }
}
