use std::path::PathBuf;

use anello_configs::random::Stream;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{AddedToken, NormalizerWrapper, PostProcessorWrapper, TokenizerBuilder};

use crate::progress::{Meter, OnProgress};
use crate::text::{TextInputs, parts};
use crate::{Error, Result};

/// The special tokens of SmolLM2 and Ouro, with their ids 0, 1, 2: end of text, start and end of a chat turn.
pub const SPECIAL_TOKENS: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// Smallest vocabulary: the special tokens and one token a byte.
pub const VOCAB_MIN: u32 = SPECIAL_TOKENS.len() as u32 + 256;

/// What to train a tokenizer on.
#[derive(Clone, Debug)]
pub struct TrainOptions {
    /// The text.
    pub inputs: TextInputs,
    /// Tokens in the vocabulary, special ones and the 256 bytes included; at least [`VOCAB_MIN`]. Short text may not
    /// yield as many.
    pub vocab: u32,
    /// Text to train on, bytes; of more, documents are drawn.
    pub bytes_max: u64,
    /// Seed of that draw.
    pub seed: u64,
    /// The `tokenizer.json` to write.
    pub output: PathBuf,
}

/// What was trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrainReport {
    /// Tokens in the vocabulary.
    pub vocab: u32,
    /// Bytes of text that were used.
    pub bytes: u64,
}

/// Trains a byte-level BPE tokenizer in the manner of SmolLM2's: digits one by one, GPT-2's words, all bytes known.
///
/// The same text and options give the same file, byte for byte. Progress counts bytes read; the training after that is
/// not counted and cannot be stopped.
pub fn train_tokenizer(options: &TrainOptions, progress: OnProgress<'_>) -> Result<TrainReport> {
    if options.vocab < VOCAB_MIN {
        let detail =
            format!("a vocabulary of {} is below {VOCAB_MIN}, special tokens and bytes", options.vocab);
        return Err(Error::tool(options.output.display(), detail));
    }
    let (texts, bytes) = sample(options, progress)?;
    let fault = |e: tokenizers::Error| Error::tool(options.output.display(), e);
    let words = Sequence::new(vec![
        PreTokenizerWrapper::Digits(Digits::new(true)),
        PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, true)),
    ]);
    let mut tokenizer =
        TokenizerBuilder::<BPE, NormalizerWrapper, Sequence, PostProcessorWrapper, ByteLevel>::new()
            .with_model(BPE::default())
            .with_normalizer(None)
            .with_pre_tokenizer(Some(words))
            .with_post_processor(None)
            .with_decoder(Some(ByteLevel::default()))
            .build()
            .map_err(fault)?;
    let mut trainer = BpeTrainer::builder()
        .vocab_size(options.vocab as usize)
        .min_frequency(2)
        .show_progress(false)
        .special_tokens(SPECIAL_TOKENS.iter().map(|token| AddedToken::from(*token, true)).collect())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    tokenizer.train(&mut trainer, texts.iter()).map_err(fault)?;
    let vocab = u32::try_from(tokenizer.get_vocab_size(true)).expect("no larger than asked for");
    let text = tokenizer.to_string(true).map_err(fault)?;

    let temporary = options.output.with_extension("tmp");
    std::fs::write(&temporary, text).map_err(Error::file(&temporary))?;
    std::fs::rename(&temporary, &options.output).map_err(Error::file(&options.output))?;
    Ok(TrainReport { vocab, bytes })
}

/// The text to train on, in parts: all of it, or documents drawn with the chance that makes it `bytes_max`.
fn sample(options: &TrainOptions, progress: OnProgress<'_>) -> Result<(Vec<String>, u64)> {
    const PIECE_BYTES: u64 = 16 << 20;
    const PART_BYTES: usize = 64 << 10;
    let pieces = options.inputs.pieces(PIECE_BYTES)?;
    let total: u64 = pieces.iter().map(|piece| piece.bytes).sum();
    let (share, stream) =
        (options.bytes_max as f64 / total.max(1) as f64, Stream::new(options.seed, "tokenizer", &[]));
    let meter = Meter::new(total, progress);
    let (mut texts, mut bytes, mut drawn) = (Vec::new(), 0, 0);
    for piece in &pieces {
        piece.read(options.inputs.field(), &mut |text| {
            for part in parts(text, PART_BYTES) {
                drawn += 1;
                if stream.unit_at(drawn) < share {
                    bytes += part.len() as u64;
                    texts.push(part.to_owned());
                }
            }
            Ok(())
        })?;
        meter.add(piece.bytes, 0)?;
    }
    if texts.is_empty() {
        return Err(Error::tool(options.output.display(), "there is no text to train on; check the inputs"));
    }
    Ok((texts, bytes))
}
