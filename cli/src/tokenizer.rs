//! A model's tokenizer: read, and checked for being the one that its vocabulary and its data are of.

use std::path::{Path, PathBuf};

use anello_configs::RunConfig;
use anello_dataloader::{Index, tokenizer_digest};
use anello_store::Store;
use anello_store::words::short_digest;
use tokenizers::Tokenizer;

use crate::failure::Failure;

/// The `tokenizer.json` of a run, on this machine.
pub fn tokenizer_file(config: &RunConfig) -> Option<PathBuf> {
    let path = config.data.tokenizer.as_deref()?;
    Some(PathBuf::from(path.strip_prefix("file://").unwrap_or(path)))
}

/// Reads a `tokenizer.json`.
pub fn read_tokenizer(path: &Path) -> Result<Tokenizer, Failure> {
    Tokenizer::from_file(path).map_err(|cause| {
        Failure::Usage(format!("{} is no tokenizer ({cause}); give a tokenizer.json", path.display()))
    })
}

/// The tokenizer of a run; `None` where it has none, or it is not on this machine.
///
/// Refused: one with tokens that the model has no place for, and one that is not what the run's data was made with, where
/// the indexes of the data tell.
pub fn tokenizer_of(config: &RunConfig) -> Result<Option<Tokenizer>, Failure> {
    let Some(path) = tokenizer_file(config).filter(|path| path.exists()) else { return Ok(None) };
    let tokenizer = fitting(&path, config.model.vocab)?;
    for (name, source) in &config.data.sources {
        check_made_with(&path, &source.url).map_err(|fact| {
            Failure::Usage(format!(
                "source {name} of {}: {fact}; set data.tokenizer to the one it was tokenized with, or tokenize it anew",
                config.name
            ))
        })?;
    }
    Ok(Some(tokenizer))
}

/// The tokenizer at `path` for a model with a vocabulary of `vocab` tokens, none of whose ids is beyond that.
pub fn fitting(path: &Path, vocab: u32) -> Result<Tokenizer, Failure> {
    let tokenizer = read_tokenizer(path)?;
    match tokenizer.get_vocab(true).into_iter().max_by_key(|(_, id)| *id) {
        Some((token, id)) if id >= vocab => Err(Failure::Usage(format!(
            "{} has the token {id} ({token:?}), the model's vocabulary {vocab} tokens; give the tokenizer of this model",
            path.display()
        ))),
        _ => Ok(tokenizer),
    }
}

/// Whether the tokens at `data` were made with the tokenizer at `path`, as far as that is known: where the data cannot be
/// reached from here, or does not tell, it may be. The error is the fact.
pub fn check_made_with(path: &Path, data: &str) -> Result<(), String> {
    let theirs = Store::open(data).ok().and_then(|store| Index::tokenizer_of(&store).ok().flatten());
    let (Some(theirs), Ok(bytes)) = (theirs, std::fs::read(path)) else { return Ok(()) };
    let ours = tokenizer_digest(&bytes);
    if ours == theirs {
        return Ok(());
    }
    Err(format!(
        "{data} was tokenized with the tokenizer {}, {} is {}",
        short_digest(&theirs),
        path.display(),
        short_digest(&ours)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word_level(words: &[(&str, u32)]) -> String {
        let vocab: serde_json::Value = words.iter().map(|(word, id)| ((*word).to_owned(), *id)).collect();
        serde_json::json!({
            "version": "1.0",
            "added_tokens": [],
            "pre_tokenizer": { "type": "WhitespaceSplit" },
            "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "a" },
        })
        .to_string()
    }

    #[test]
    fn a_tokenizer_with_more_tokens_than_the_model_is_refused_by_its_last_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        std::fs::write(&path, word_level(&[("a", 0), ("b", 7)])).unwrap();
        fitting(&path, 8).unwrap();
        let refused = fitting(&path, 7).unwrap_err();
        let fact =
            "has the token 7 (\"b\"), the model's vocabulary 7 tokens; give the tokenizer of this model";
        assert!(refused.text().contains(fact), "{}", refused.text());
        std::fs::write(&path, "{}").unwrap();
        assert!(fitting(&path, 8).unwrap_err().text().contains("is no tokenizer"));
    }

    #[test]
    fn data_tells_which_tokenizer_made_it() {
        let folder = tempfile::tempdir().unwrap();
        let (path, data) = (folder.path().join("tokenizer.json"), folder.path().join("data"));
        let text = word_level(&[("a", 0)]);
        std::fs::write(&path, &text).unwrap();
        std::fs::create_dir(&data).unwrap();
        let data = data.to_str().unwrap();
        let told = |tokenizer: Option<&str>| {
            let digest = tokenizer.map(|text| tokenizer_digest(text.as_bytes()));
            let index = serde_json::json!({ "version": 1, "shards": [], "tokenizer": digest });
            std::fs::write(format!("{data}/index.json"), index.to_string()).unwrap();
        };
        // Without an index, or with one that does not tell, it may be.
        check_made_with(&path, data).unwrap();
        told(None);
        check_made_with(&path, data).unwrap();
        told(Some(&text));
        check_made_with(&path, data).unwrap();
        told(Some("another"));
        let refused = check_made_with(&path, data).unwrap_err();
        assert!(refused.contains(&format!("{data} was tokenized with the tokenizer ")), "{refused}");
    }
}
