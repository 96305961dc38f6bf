//! What the trained model writes: a greedy continuation of a document, with the loop step at which each token left.

use anello_configs::{RunConfig, Stage};
use anello_dataloader::Dataset;
use anello_store::Store;
use anello_worker::{Cache, GenerateOptions, Generator, Leave, Model, Sampled};
use tokenizers::Tokenizer;

use crate::failure::Failure;
use crate::text::Pieces;
use crate::weights::weights_at;

/// Tokens of a document that are given as the prompt, at most half of it.
const PROMPT: usize = 16;
/// Sources of the stage's mixture that are sampled: those that weigh most.
const SOURCES: usize = 2;
/// Lines of a sample that are shown: a model that has learnt little may write nothing but ends of lines.
const LINES: usize = 12;
/// A token leaves the loop once so much of the exit distribution is behind it.
const EXIT_MASS: f64 = 0.5;

/// A continuation.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Where the prompt is from.
    source: String,
    prompt: Vec<u32>,
    written: Vec<Sampled>,
    /// Loop steps of the stage.
    loops: u32,
}

/// Continues the beginning of a document of each of the heaviest sources of `stage` by `tokens` tokens, with the
/// weights after `step` steps.
pub fn take(
    store: &Store,
    config: &RunConfig,
    stage: &Stage,
    step: u64,
    tokens: usize,
) -> Result<Vec<Sample>, Failure> {
    let mut weighed: Vec<(&String, f64)> =
        stage.mixture.iter().map(|(name, weight)| (name, *weight)).collect();
    weighed.sort_by(|a, b| b.1.total_cmp(&a.1));
    let (_, layout, flat) = weights_at(store, config, step)?;
    let model = Model::new(&config.model, config.compute.dtype, &layout, &flat);
    let options = GenerateOptions {
        loops: stage.loops,
        leave: Leave::Mass(EXIT_MASS),
        cache: Cache::Full,
        temperature: 0.0,
        top_p: 1.0,
        seed: 0,
    };
    let sources = weighed.into_iter().take(SOURCES);
    let sources = sources.filter_map(|(name, _)| Some((name, config.data.sources.get(name)?)));
    sources
        .map(|(name, source)| {
            let documents = Dataset::open(&source.url)?.read(0, Some(config.model.vocab))?;
            let first = documents.iter().find(|document| document.tokens.len() > 1);
            let ids = first.map_or(&[][..], |document| document.tokens);
            let prompt: Vec<u32> = ids.iter().take(PROMPT.min(ids.len() / 2)).map(|id| *id as u32).collect();
            let mut generator = Generator::new(&model, stage.rope_base, prompt.len() + tokens, options);
            let mut written: Vec<Sampled> = Vec::new();
            while written.len() < tokens && !prompt.is_empty() {
                let last = written.last().map(|token| vec![token.id]);
                written.push(generator.next(last.as_ref().unwrap_or(&prompt)));
            }
            Ok(Sample { source: name.clone(), prompt, written, loops: stage.loops })
        })
        .collect()
}

/// The samples for a person; ids in place of text when there is no tokenizer.
pub fn render(samples: &[Sample], tokenizer: Option<&Tokenizer>) -> String {
    let mut text = String::from(
        "\nwhat it writes: greedy, after ▸; small figures are the loop step at which a token left (half its exit mass)\n",
    );
    for Sample { source, prompt, written, loops } in samples {
        let depth =
            written.iter().map(|token| f64::from(token.exit)).sum::<f64>() / written.len().max(1) as f64;
        text.push_str(&format!("{source}, mean exit depth {depth:.2} of {loops}\n"));
        let mut shown = pieces(prompt, &[], tokenizer).concat();
        shown.push('▸');
        let ids: Vec<u32> = written.iter().map(|token| token.id).collect();
        for (piece, token) in pieces(&ids, prompt, tokenizer).iter().zip(written) {
            // Before the white space at a token's end, so that lines end where the text has them end.
            let (word, space) = piece.split_at(piece.trim_end().len());
            shown.push_str(&format!("{word}{}{space}", subscript(token.exit)));
        }
        shown.lines().take(LINES).for_each(|line| text.push_str(&format!("  | {line}\n")));
        if let more @ 1.. = shown.lines().count().saturating_sub(LINES) {
            text.push_str(&format!("  | … {more} more lines\n"));
        }
    }
    text
}

/// The text that each of `ids` adds after `before`.
fn pieces(ids: &[u32], before: &[u32], tokenizer: Option<&Tokenizer>) -> Vec<String> {
    let mut pieces = Pieces::after(before, tokenizer);
    ids.iter().map(|id| pieces.push(*id)).collect()
}

fn subscript(number: u32) -> String {
    let digit =
        |letter: char| letter.to_digit(10).and_then(|d| char::from_u32('₀' as u32 + d)).unwrap_or(letter);
    number.to_string().chars().map(digit).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_shows_where_it_left() {
        let token = |id, exit| Sampled { id, exit, probability: 0.5 };
        let sample = Sample {
            source: "docs".into(),
            prompt: vec![7, 8],
            written: vec![token(9, 1), token(10, 4)],
            loops: 4,
        };
        let text = render(&[sample], None);
        assert!(text.ends_with("\ndocs, mean exit depth 2.50 of 4\n  |  7 8▸ 9₁ 10₄\n"), "{text}");
        assert_eq!(subscript(120), "₁₂₀");
    }

    /// A tokenizer of bytes: id 3 + byte, as `train_tokenizer` makes one from text without repetition.
    fn byte_tokenizer() -> Tokenizer {
        let folder = tempfile::tempdir().unwrap();
        let (text, output) = (folder.path().join("text"), folder.path().join("tokenizer.json"));
        std::fs::write(&text, "ab").unwrap();
        let inputs = anello_dataloader::TextInputs::new([&text]);
        let options = anello_dataloader::TrainOptions {
            inputs,
            vocab: 259,
            bytes_max: 9,
            seed: 0,
            output: output.clone(),
        };
        anello_dataloader::train_tokenizer(&options, &|_| std::ops::ControlFlow::Continue(())).unwrap();
        Tokenizer::from_file(output).unwrap()
    }

    #[test]
    fn a_letter_of_several_tokens_is_shown_once_and_whole() {
        let tokenizer = byte_tokenizer();
        let ids = tokenizer.encode("aé b\n", false).unwrap().get_ids().to_vec();
        assert_eq!(ids.len(), 6);
        assert_eq!(pieces(&ids[1..], &ids[..1], Some(&tokenizer)), ["", "é", " ", "b", "\n"]);
    }
}
