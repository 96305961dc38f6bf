//! The tools: tokenizing, training a tokenizer, synthetic sets, inspecting and verifying.

mod common;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use anello_dataloader::{
    Dataset, Error, Index, ManoOptions, Progress, SPECIAL_TOKENS, ShardFormat, TextInputs, TokenizeOptions,
    TrainOptions, inspect, mano_token, synth_mano, tokenize, train_tokenizer, verify,
};
use arrow::array::{Array, ArrayRef, ListArray, RecordBatch, StringArray, StructArray};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field};
use common::{documents, url, write_set};
use parquet::arrow::ArrowWriter;
use parquet::file::properties::WriterProperties;
use tokenizers::Tokenizer;

fn go(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// A text of `words` words, different for each seed.
fn prose(seed: u64, words: usize) -> String {
    const WORDS: [&str; 12] = [
        "the",
        "ring",
        "learns",
        "slowly",
        "über",
        "12345",
        "tokens;",
        "and",
        "loops",
        "\n\nagain",
        "def f(x):\n    return x",
        "…",
    ];
    let mut state = seed;
    let mut draw = |bound: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % bound
    };
    let mut word = || match draw(3) {
        0 => {
            ["an", "ello", "lo", "pa", "re", "ti"][draw(6)].repeat(1 + draw(2))
                + ["s", "ing", "ed", ""][draw(4)]
        }
        _ => WORDS[draw(WORDS.len())].to_owned(),
    };
    (0..words).map(|_| word()).collect::<Vec<_>>().join(" ")
}

/// A folder of text: files, JSON Lines and Parquet, and things that are no text. Returns the texts in order.
fn corpus(folder: &Path) -> Vec<String> {
    let path = |name: &str| folder.join(name);
    std::fs::create_dir_all(path("code")).unwrap();
    std::fs::create_dir_all(path(".git")).unwrap();
    std::fs::write(path(".git/config"), "hidden").unwrap();
    std::fs::write(path("code/binary.so"), [0u8, 159, 146, 150]).unwrap();
    let mut texts = Vec::new();
    for at in 0..6 {
        texts.push(prose(at, 300 + 50 * at as usize));
        std::fs::write(path(&format!("code/{at}.py")), texts.last().unwrap()).unwrap();
    }
    std::fs::write(path("code/empty.py"), "").unwrap();
    let lines: Vec<String> = (10..60).map(|at| prose(at, at as usize * 3)).collect();
    let json: Vec<String> =
        lines.iter().map(|text| serde_json::json!({"id": 1, "text": text}).to_string()).collect();
    std::fs::write(path("lines.jsonl"), json.join("\n") + "\n\n").unwrap();
    texts.extend(lines);
    let rows: Vec<String> = (100..140).map(|at| prose(at, 40)).collect();
    let column: ArrayRef = Arc::new(StringArray::from(rows.clone()));
    let batch = RecordBatch::try_from_iter([("text", column)]).unwrap();
    let file = std::fs::File::create(path("rows.parquet")).unwrap();
    let properties = WriterProperties::builder().set_max_row_group_row_count(Some(7)).build();
    let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    texts.extend(rows);
    texts
}

fn tokenizer(folder: &Path, corpus: &Path) -> PathBuf {
    let path = folder.join("tokenizer.json");
    let options = TrainOptions {
        inputs: TextInputs::new([corpus]),
        vocab: 360,
        bytes_max: 1 << 20,
        seed: 1,
        output: path.clone(),
    };
    train_tokenizer(&options, &go).unwrap();
    path
}

fn options(folder: &Path, threads: usize) -> TokenizeOptions {
    TokenizeOptions {
        inputs: TextInputs::new([folder.join("text")]),
        tokenizer: folder.join("tokenizer.json"),
        output: url(&folder.join("out")),
        end: Some("<|endoftext|>".to_owned()),
        source: Some("prose".to_owned()),
        format: ShardFormat { row_group_tokens: 2000, zstd_level: 3 },
        shard_bytes: 5000,
        threads,
    }
}

/// Every file of a folder, by path.
fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => all.extend(files(&path)),
            false => drop(all.insert(path.clone(), std::fs::read(path).unwrap())),
        }
    }
    all
}

fn ready() -> (tempfile::TempDir, Vec<String>) {
    let folder = tempfile::tempdir().unwrap();
    let texts = corpus(&folder.path().join("text"));
    tokenizer(folder.path(), &folder.path().join("text"));
    (folder, texts)
}

#[test]
fn tokenized_text_decodes_to_itself_document_by_document() {
    let (folder, texts) = ready();
    let report = tokenize(&options(folder.path(), 2), &go).unwrap();
    assert_eq!(report.documents, texts.len() as u64);
    assert_eq!(report.bytes, texts.iter().map(|t| t.len() as u64).sum::<u64>());
    assert!(report.shards > 5 && report.reused == 0);
    assert!(report.skipped_files.len() == 1 && report.skipped_files[0].ends_with("code/binary.so"));

    let tokenizer = Tokenizer::from_file(folder.path().join("tokenizer.json")).unwrap();
    let dataset = Dataset::open(&url(&folder.path().join("out"))).unwrap();
    assert!(dataset.index().row_groups().all(|g| g.blake3.is_some()), "the index was stored with checksums");
    let mut decoded = Vec::new();
    for at in 0..dataset.row_groups() {
        for document in dataset.read(at, Some(400)).unwrap().iter() {
            let ids: Vec<u32> = document.tokens.iter().map(|id| *id as u32).collect();
            assert_eq!(ids.last(), Some(&0));
            decoded.push(tokenizer.decode(&ids[..ids.len() - 1], false).unwrap());
        }
    }
    assert_eq!(decoded, texts);
}

#[test]
fn the_output_is_the_same_to_the_byte_for_any_number_of_threads() {
    let (folder, _) = ready();
    let made = [1, 2, 5].map(|threads| {
        tokenize(&options(folder.path(), threads), &go).unwrap();
        let made = files(&folder.path().join("out"));
        std::fs::remove_dir_all(folder.path().join("out")).unwrap();
        made
    });
    assert!(made[0].len() > 10);
    assert!(made[0] == made[1] && made[1] == made[2]);
}

#[test]
fn a_stopped_run_goes_on_where_it_was_and_ends_in_the_same_bytes() {
    let (folder, _) = ready();
    let out = folder.path().join("out");
    tokenize(&options(folder.path(), 2), &go).unwrap();
    let expected = files(&out);
    std::fs::remove_dir_all(&out).unwrap();

    let calls = AtomicU32::new(0);
    let stop = |_: Progress| match calls.fetch_add(1, Ordering::Relaxed) {
        0..8 => ControlFlow::Continue(()),
        _ => ControlFlow::Break(()),
    };
    let error = tokenize(&options(folder.path(), 2), &stop).unwrap_err();
    assert!(matches!(error, Error::Stopped), "{error}");
    assert!(!out.join("index.json").exists());
    let finished = std::fs::read_dir(out.join("_state")).unwrap().count() as u64;
    assert!(finished > 0);

    // What a kill -9 may leave besides: a shard whose state was not written, and half a temporary file.
    let state = std::fs::read_dir(out.join("_state")).unwrap().next().unwrap().unwrap().path();
    std::fs::remove_file(state).unwrap();
    std::fs::write(out.join("shard-00001-of-99999.parquet#1"), b"half").unwrap();
    let report = tokenize(&options(folder.path(), 1), &go).unwrap();
    assert_eq!(report.reused, finished - 1);
    std::fs::remove_file(out.join("shard-00001-of-99999.parquet#1")).unwrap();
    assert_eq!(files(&out), expected);

    assert_eq!(
        tokenize(&options(folder.path(), 2), &go).unwrap().reused,
        report.shards,
        "nothing is left to do"
    );
    // Damaged, changed and differently optioned shards are made again.
    let shard = out.join(format!("shard-00002-of-{:05}.parquet", report.shards));
    std::fs::write(&shard, b"damaged").unwrap();
    assert_eq!(tokenize(&options(folder.path(), 2), &go).unwrap().reused, report.shards - 1);
    assert_eq!(files(&out), expected);
    let file = folder.path().join("text/code/3.py");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replacen("ring", "gnir", 1)).unwrap();
    let again = tokenize(&options(folder.path(), 2), &go).unwrap();
    assert_eq!(again.reused, again.shards - 1);
    let other = TokenizeOptions { end: None, ..options(folder.path(), 2) };
    assert_eq!(tokenize(&other, &go).unwrap().reused, 0);
}

#[test]
fn a_folder_with_other_shards_and_bad_inputs_are_refused() {
    let (folder, _) = ready();
    let base = options(folder.path(), 1);
    let outputs = AtomicU32::new(0);
    let fault = |options: &TokenizeOptions| {
        let output = format!("{}-{}", options.output, outputs.fetch_add(1, Ordering::Relaxed));
        tokenize(&TokenizeOptions { output, ..options.clone() }, &go).unwrap_err().to_string()
    };
    let missing = TokenizeOptions { end: Some("<eos>".to_owned()), ..base.clone() };
    assert!(fault(&missing).contains("has no token <eos>"));
    let field = TextInputs { text_field: "content".to_owned(), ..base.inputs.clone() };
    let said = fault(&TokenizeOptions { inputs: field, ..base.clone() });
    assert!(said.contains("has no string \"content\"") || said.contains("has no column content"), "{said}");
    let binary = TextInputs::new([folder.path().join("text/code/binary.so")]);
    assert!(fault(&TokenizeOptions { inputs: binary, ..base.clone() }).contains("is not UTF-8 text"));
    let none = TextInputs { extensions: vec!["rs".to_owned()], ..base.inputs.clone() };
    assert!(fault(&TokenizeOptions { inputs: none, ..base.clone() }).contains("no text file there"));
    let chat = |name: &str, text: &str| {
        let file = folder.path().join(name);
        std::fs::write(&file, text).unwrap();
        let inputs =
            TextInputs { text_field: "messages".into(), conversations: true, ..TextInputs::new([file]) };
        fault(&TokenizeOptions { inputs, end: None, ..base.clone() })
    };
    assert!(chat("chat.txt", "hello").contains("conversations are in .jsonl or .parquet files"));
    assert!(
        chat("c1.jsonl", "{\"messages\": \"hi\"}").contains("the line at byte 0 has no list \"messages\"")
    );
    assert!(
        chat("c2.jsonl", "{\"messages\": [{\"role\": \"user\"}]}").contains("a list of role and content")
    );
    let bad = folder.path().join("bad.jsonl");
    std::fs::write(&bad, "{\"text\": \"fine\"}\nnot json\n").unwrap();
    let said = fault(&TokenizeOptions { inputs: TextInputs::new([&bad]), ..base.clone() });
    assert!(said.contains("bad.jsonl: the line at byte 17 is not JSON"), "{said}");
    write_set(&folder.path().join("out"), &documents(3), 1, 100);
    let said = tokenize(&base, &go).unwrap_err().to_string();
    assert!(said.contains("holds 000.parquet, which is not of this set"), "{said}");
}

#[test]
fn text_that_spells_a_special_token_does_not_become_one() {
    let (folder, _) = ready();
    let file = folder.path().join("trick.txt");
    std::fs::write(&file, "a <|endoftext|> b <|im_start|>").unwrap();
    let options =
        TokenizeOptions { inputs: TextInputs::new([&file]), end: None, ..options(folder.path(), 1) };
    tokenize(&options, &go).unwrap();
    let documents = Dataset::open(&options.output).unwrap().read(0, None).unwrap();
    assert!(documents.tokens().iter().all(|id| *id > 2), "{:?}", documents.tokens());
}

/// Conversations as a Parquet column of lists of structs, one row each.
fn write_conversations(path: &Path, conversations: &[&[(&str, &str)]]) {
    let text = |of: fn(&(&str, &str)) -> String| -> ArrayRef {
        Arc::new(StringArray::from(conversations.concat().iter().map(of).collect::<Vec<_>>()))
    };
    let field = |name: &str| Arc::new(Field::new(name, DataType::Utf8, true));
    let messages = StructArray::from(vec![
        (field("role"), text(|(role, _)| (*role).to_owned())),
        (field("content"), text(|(_, content)| (*content).to_owned())),
    ]);
    let item = Arc::new(Field::new("item", messages.data_type().clone(), true));
    let lengths = OffsetBuffer::from_lengths(conversations.iter().map(|c| c.len()));
    let column: ArrayRef = Arc::new(ListArray::new(item, lengths, Arc::new(messages), None));
    let batch = RecordBatch::try_from_iter([("messages", column)]).unwrap();
    let mut writer =
        ArrowWriter::try_new(std::fs::File::create(path).unwrap(), batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

#[test]
fn of_a_conversation_only_what_the_assistant_says_counts() {
    let (folder, _) = ready();
    let conversations: [&[(&str, &str)]; 2] = [
        &[
            ("system", "be brief"),
            ("user", "the ring?"),
            ("assistant", "learns slowly"),
            ("user", "<|im_end|> again"),
            ("assistant", "12345"),
        ],
        &[("user", "über"), ("assistant", "tokens;")],
    ];
    let json = |conversation: &[(&str, &str)]| {
        let list: Vec<_> =
            conversation.iter().map(|(r, c)| serde_json::json!({ "role": r, "content": c })).collect();
        serde_json::json!({ "id": 3, "messages": list }).to_string()
    };
    let (lines, rows) = (folder.path().join("chat.jsonl"), folder.path().join("chat.parquet"));
    std::fs::write(&lines, conversations.map(json).join("\n")).unwrap();
    write_conversations(&rows, &conversations);
    let tokenizer = Tokenizer::from_file(folder.path().join("tokenizer.json")).unwrap();
    let mut plainly = tokenizer.clone();
    plainly.set_encode_special_tokens(true);
    // What spells a special token is text.
    let plain = |text: &str| {
        plainly.encode_fast(text, false).unwrap().get_ids().iter().map(|id| *id as i32).collect::<Vec<_>>()
    };
    let ids = |text: &str| {
        tokenizer.encode_fast(text, false).unwrap().get_ids().iter().map(|id| *id as i32).collect::<Vec<_>>()
    };
    for (name, file) in [("lines", &lines), ("rows", &rows)] {
        let inputs =
            TextInputs { text_field: "messages".into(), conversations: true, ..TextInputs::new([file]) };
        let output = url(&folder.path().join(name));
        let options = TokenizeOptions { inputs, end: None, output, ..options(folder.path(), 1) };
        let report = tokenize(&options, &go).unwrap();
        assert_eq!(report.documents, 2, "{name}");
        let documents = Dataset::open(&options.output).unwrap().read(0, None).unwrap();
        for (document, conversation) in documents.iter().zip(conversations) {
            let mut expected: Vec<(i32, u8)> = Vec::new();
            for (role, content) in conversation {
                let mut add =
                    |ids: &[i32], counts: bool| expected.extend(ids.iter().map(|id| (*id, u8::from(counts))));
                let answers = *role == "assistant";
                add(&[1], false);
                add(&ids(&format!("{role}\n")), false);
                add(&plain(content), answers);
                add(&[2], answers);
                add(&ids("\n"), false);
            }
            let found: Vec<(i32, u8)> =
                document.tokens.iter().copied().zip(document.counted.unwrap().iter().copied()).collect();
            assert_eq!(found, expected, "{name}");
        }
        // The same again is no work.
        assert_eq!(tokenize(&options, &go).unwrap().reused, report.shards, "{name}");
    }
}

#[test]
fn a_long_document_is_tokenized_as_if_it_were_whole() {
    let (folder, _) = ready();
    let text: String =
        (0..40_000).map(|line| format!("line {line} of a long file, {}\n", prose(line, 3))).collect();
    assert!(text.len() > 1 << 20);
    let file = folder.path().join("long.txt");
    std::fs::write(&file, &text).unwrap();
    let options =
        TokenizeOptions { inputs: TextInputs::new([&file]), end: None, ..options(folder.path(), 1) };
    tokenize(&options, &go).unwrap();
    let tokenizer = Tokenizer::from_file(&options.tokenizer).unwrap();
    let whole: Vec<i32> =
        tokenizer.encode_fast(text, false).unwrap().get_ids().iter().map(|id| *id as i32).collect();
    let dataset = Dataset::open(&options.output).unwrap();
    assert_eq!(dataset.index().rows(), 1);
    assert!(dataset.read(0, None).unwrap().tokens() == whole);
}

#[test]
fn training_a_tokenizer_is_deterministic_and_knows_every_byte() {
    let folder = tempfile::tempdir().unwrap();
    let texts = corpus(&folder.path().join("text"));
    let first = std::fs::read(tokenizer(folder.path(), &folder.path().join("text"))).unwrap();
    let second = std::fs::read(tokenizer(folder.path(), &folder.path().join("text"))).unwrap();
    assert!(first == second);
    let tokenizer = Tokenizer::from_bytes(&first).unwrap();
    assert_eq!(tokenizer.get_vocab_size(true), 360);
    for (id, token) in SPECIAL_TOKENS.iter().enumerate() {
        assert_eq!(tokenizer.token_to_id(token), Some(id as u32));
    }
    for text in [texts[0].as_str(), "tabs\t\r\n 日本語 \u{1F980} \u{7f}", "12345"] {
        let ids = tokenizer.encode_fast(text, false).unwrap().get_ids().to_vec();
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
    }
    assert_eq!(tokenizer.encode_fast("12345", false).unwrap().get_ids().len(), 5, "digits stand one by one");
    let small = TrainOptions {
        inputs: TextInputs::new([folder.path().join("text")]),
        vocab: 258,
        bytes_max: 1,
        seed: 0,
        output: folder.path().join("x.json"),
    };
    assert!(
        train_tokenizer(&small, &go).unwrap_err().to_string().contains("a vocabulary of 258 is below 259")
    );
    let drawn = TrainOptions { vocab: 300, bytes_max: 8 << 10, ..small };
    let report = train_tokenizer(&drawn, &go).unwrap();
    assert!((1 << 10..32 << 10).contains(&report.bytes), "{report:?}");
}

#[test]
fn mano_is_written_with_its_vocabulary_and_test_set() {
    let folder = tempfile::tempdir().unwrap();
    let make = |name: &str, threads| {
        let output = folder.path().join(name);
        let format = ShardFormat::default();
        let options = ManoOptions {
            length: 10,
            documents: 3000,
            eval_documents: 200,
            modulus: 23,
            answer_only: false,
            seed: 5,
            output: url(&output),
            format,
            threads,
        };
        synth_mano(&options, &go).unwrap();
        output
    };
    let (one, two) = (make("one", 1), make("two", 4));
    let bytes = |folder: &Path| files(folder).into_values().collect::<Vec<_>>();
    assert!(bytes(&one) == bytes(&two));

    let tokenizer = Tokenizer::from_file(one.join("tokenizer.json")).unwrap();
    assert_eq!(tokenizer.get_vocab_size(true), 39);
    let train = Dataset::open(&url(&one.join("train"))).unwrap();
    assert_eq!((train.index().rows(), train.index().max_id()), (3000, Some(38)));
    let eval = Dataset::open(&url(&one.join("eval"))).unwrap().read(0, Some(39)).unwrap();
    assert_eq!(eval.len(), 200);
    for document in eval.iter() {
        assert_eq!(document.tokens.len(), 25);
        assert_eq!(
            document.counted.unwrap().iter().map(|c| u32::from(*c)).collect::<Vec<_>>().iter().sum::<u32>(),
            1
        );
        assert_eq!(document.counted.unwrap()[24], 1);
        let text = document.tokens.iter().map(|id| mano_token(*id)).collect::<Vec<_>>().join(" ");
        let ids: Vec<i32> = tokenizer
            .encode_fast(text.as_str(), false)
            .unwrap()
            .get_ids()
            .iter()
            .map(|i| *i as i32)
            .collect();
        assert_eq!(ids, document.tokens);
    }
}

#[test]
fn inspect_counts_what_is_there() {
    let (folder, texts) = ready();
    let report = tokenize(&options(folder.path(), 2), &go).unwrap();
    let dataset = Dataset::open(&url(&folder.path().join("out"))).unwrap();
    let tokenizer = Tokenizer::from_file(folder.path().join("tokenizer.json")).unwrap();
    let seen = inspect(&dataset, Some(&tokenizer), 3, 20, 2, &go).unwrap();
    assert_eq!((seen.rows, seen.tokens, seen.counted), (report.documents, report.tokens, report.tokens));
    assert_eq!((seen.rows, seen.tokens), (dataset.index().rows(), dataset.index().tokens()));
    assert_eq!(seen.lengths.iter().sum::<u64>(), seen.rows);
    assert_eq!(seen.rows_by_source, BTreeMap::from([("prose".to_owned(), seen.rows)]));
    assert!(u64::from(seen.max_id) == dataset.index().max_id().unwrap() && seen.max_id < 400);
    assert!(seen.length_min > 0 && seen.length_max >= seen.length_min);
    assert_eq!(seen.samples.len(), 3);
    assert!(texts[0].starts_with(seen.samples[0].text.as_ref().unwrap()), "{:?}", seen.samples[0]);
    let lengths: Vec<usize> = (0..dataset.row_groups())
        .flat_map(|at| dataset.read(at, None).unwrap().iter().map(|d| d.tokens.len()).collect::<Vec<_>>())
        .collect();
    for (bucket, count) in seen.lengths.iter().enumerate().skip(1) {
        let range = 1usize << (bucket - 1)..1 << bucket;
        assert_eq!(*count, lengths.iter().filter(|length| range.contains(length)).count() as u64);
    }
}

#[test]
fn verify_names_every_damaged_row_group() {
    let folder = tempfile::tempdir().unwrap();
    write_set(folder.path(), &documents(300), 2, 300);
    let open = || Dataset::open(&url(folder.path())).unwrap();
    let index = Index::build(open().store(), true, 2, &go).unwrap();
    index.save(open().store()).unwrap();
    let good = verify(&open(), None, 2, &go).unwrap();
    assert_eq!((good.row_groups, good.checksums), (open().row_groups(), open().row_groups()));
    assert_eq!((good.rows, good.tokens), (index.rows(), index.tokens()));
    assert!(good.faults.is_empty());

    let vocab = verify(&open(), Some(3000), 2, &go).unwrap();
    assert!(
        !vocab.faults.is_empty()
            && vocab.faults.iter().all(|f| f.to_string().contains("the vocabulary has 3000"))
    );

    let file = folder.path().join("001.parquet");
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[100] ^= 4;
    std::fs::write(&file, bytes).unwrap();
    let bad = verify(&open(), None, 2, &go).unwrap();
    assert_eq!(bad.faults.len(), 1);
    assert!(bad.faults[0].to_string().contains("001.parquet: row group 0"), "{}", bad.faults[0]);
    assert_eq!(bad.rows + index.shards[1].row_groups[0].rows, index.rows());
}

/// The test binary runs itself as the process that is killed.
#[test]
fn a_killed_run_goes_on_and_ends_in_the_same_bytes() {
    const FOLDER: &str = "ANELLO_TEST_TOKENIZE_IN";
    const NAME: &str = "a_killed_run_goes_on_and_ends_in_the_same_bytes";
    if let Ok(folder) = std::env::var(FOLDER) {
        // Slow enough to be killed between two shards or within one.
        let slow = |_: Progress| {
            std::thread::sleep(std::time::Duration::from_millis(30));
            ControlFlow::Continue(())
        };
        tokenize(&options(Path::new(&folder), 2), &slow).unwrap();
        return;
    }
    let (folder, _) = ready();
    let out = folder.path().join("out");
    tokenize(&options(folder.path(), 2), &go).unwrap();
    let expected = files(&out);
    for kills in 1..=3 {
        std::fs::remove_dir_all(&out).unwrap();
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args([NAME, "--exact"])
            .env(FOLDER, folder.path())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let finished = || std::fs::read_dir(out.join("_state")).map_or(0, |states| states.count());
        let start = std::time::Instant::now();
        while finished() < kills * 2 {
            assert!(start.elapsed().as_secs() < 30, "the child makes no shards");
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        child.kill().unwrap();
        assert!(!child.wait().unwrap().success(), "it was killed before its end");
        let report = tokenize(&options(folder.path(), 1), &go).unwrap();
        assert!(report.reused >= kills as u64 * 2 - 1 && report.reused < report.shards, "{report:?}");
        let made: BTreeMap<_, _> =
            files(&out).into_iter().filter(|(p, _)| !p.to_string_lossy().contains('#')).collect();
        assert!(made == expected);
    }
}

/// Of text in Parquet whose footer was damaged anywhere, documents are made or an error is told; no thread panics.
#[test]
fn text_whose_footer_is_damaged_anywhere_is_an_error_or_harmless() {
    let (folder, _) = ready();
    let chat = folder.path().join("chat.parquet");
    write_conversations(&chat, &[&[("user", "hello"), ("assistant", "a ring")], &[("user", "and?")]]);
    let bad = folder.path().join("bad.parquet");
    for (good, field, conversations) in
        [(folder.path().join("text/rows.parquet"), "text", false), (chat, "messages", true)]
    {
        let good = std::fs::read(good).unwrap();
        let footer = u32::from_le_bytes(*good[..good.len() - 4].last_chunk().unwrap()) as usize;
        let inputs = TextInputs { text_field: field.into(), conversations, ..TextInputs::new([&bad]) };
        let output = url(&folder.path().join("of-bad"));
        let options = TokenizeOptions { inputs, end: None, output, ..options(folder.path(), 1) };
        let (mut refused, mut panicked) = (0, 0);
        for at in good.len() - 8 - footer..good.len() {
            let mut bytes = good.clone();
            bytes[at] ^= if at % 2 == 0 { 1 } else { 0x80 };
            std::fs::write(&bad, bytes).unwrap();
            match tokenize(&options, &go) {
                Err(error) => {
                    let error = error.to_string();
                    assert!(error.contains("bad.parquet"), "byte {at}: {error}");
                    refused += 1;
                    panicked += usize::from(error.contains("the decoder gave up"));
                }
                Ok(report) => assert!(report.documents <= 40, "byte {at}: {report:?}"),
            }
            let _ = std::fs::remove_dir_all(folder.path().join("of-bad"));
        }
        assert!(
            refused * 4 > footer && panicked > 0,
            "{refused} of {footer} were refused, {panicked} by a panic"
        );
    }
}
