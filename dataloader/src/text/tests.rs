use proptest::prelude::*;

use super::*;

#[test]
fn every_line_is_in_one_piece_however_the_file_is_cut() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.jsonl");
    let texts: Vec<String> = (0..9).map(|i| "é".repeat(i * 2)).collect();
    let lines: Vec<String> =
        texts.iter().map(|text| serde_json::json!({ "text": text }).to_string()).collect();
    for end in ["", "\n", "\n\n  \n"] {
        std::fs::write(&path, lines.join("\n") + end).unwrap();
        for piece_bytes in 1..200 {
            let inputs = TextInputs::new([&path]);
            let mut read = Vec::new();
            for piece in inputs.pieces(piece_bytes).unwrap() {
                piece
                    .read(inputs.field(), &mut |text| {
                        read.push(text.to_owned());
                        Ok(())
                    })
                    .unwrap();
            }
            assert_eq!(read, texts, "pieces of {piece_bytes} bytes, ending {end:?}");
        }
    }
}

#[test]
fn folders_are_walked_by_name_without_what_is_hidden_or_linked() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    std::fs::create_dir_all(path("b/.hidden")).unwrap();
    for name in ["z.txt", "b/2.py", "b/10.py", "b/.hidden/x.py", ".dot.txt", "a.md"] {
        std::fs::write(path(name), name).unwrap();
    }
    std::os::unix::fs::symlink(path("b"), path("loop")).unwrap();
    let names = |inputs: &TextInputs| -> Vec<String> {
        let pieces = inputs.pieces(100).unwrap();
        pieces.iter().map(|p| p.path.strip_prefix(folder.path()).unwrap().display().to_string()).collect()
    };
    let all = TextInputs::new([folder.path()]);
    assert_eq!(names(&all), ["a.md", "b/10.py", "b/2.py", "z.txt"]);
    let some = TextInputs { extensions: vec!["py".to_owned(), ".txt".to_owned()], ..all };
    assert_eq!(names(&some), ["b/10.py", "b/2.py", "z.txt"]);
}

proptest! {
    #[test]
    fn parts_are_the_text_in_bounded_pieces(
        text in "([a-z0-9 .]{0,30}(\n|\n    |é|\u{1F980})){0,40}", bytes in 1usize..64,
    ) {
        let all: Vec<&str> = parts(&text, bytes).collect();
        prop_assert_eq!(all.concat(), text.as_str());
        prop_assert!(all.iter().all(|part| !part.is_empty() && part.len() <= bytes * 4 + 3));
        for pair in all.windows(2) {
            let clean = pair[1].starts_with('\n') && pair[0].ends_with(|c: char| c.is_ascii_alphanumeric());
            prop_assert!(clean || pair[0].len() >= bytes * 4, "{pair:?}");
        }
    }
}
