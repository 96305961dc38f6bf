use std::path::PathBuf;

use anello_store::{Fetched, Store};
use serde::{Deserialize, Serialize};
use tokenizers::Tokenizer;

use crate::index::Index;
use crate::progress::{Meter, OnProgress, parallel};
use crate::text::{Kind, Piece, TextInputs, parts, read_file};
use crate::write::{ShardFormat, ShardWriter};
use crate::{Error, Result};

/// Documents longer than this are handed to the tokenizer part by part: it needs about a hundred times their memory, and is faster on parts that stay in the cache.
const PART_BYTES: usize = 16 << 10;

/// Folder of what is known of finished shards, below the output.
const STATE: &str = "_state";

/// What to tokenize, and into what.
#[derive(Clone, Debug)]
pub struct TokenizeOptions {
    /// The text.
    pub inputs: TextInputs,
    /// A Hugging Face `tokenizer.json`.
    pub tokenizer: PathBuf,
    /// Folder or URL for the shards; nothing else may be in it.
    pub output: String,
    /// Token put behind each document, such as `<|endoftext|>`; `None` = none. Conversations end themselves.
    pub end: Option<String>,
    /// Written in each row's `source`; `None` = no such column.
    pub source: Option<String>,
    /// How shards are written.
    pub format: ShardFormat,
    /// Text of one shard, bytes: the unit of work, of continuing and of memory (about three times as much a thread).
    pub shard_bytes: u64,
    /// Threads, one shard each.
    pub threads: usize,
}

/// What was made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenizeReport {
    /// Documents in all shards.
    pub documents: u64,
    /// Tokens in all shards.
    pub tokens: u64,
    /// Bytes of text.
    pub bytes: u64,
    /// Shards in all.
    pub shards: u64,
    /// Shards that were there already and are right.
    pub reused: u64,
    /// Files in folders that are not text.
    pub skipped_files: Vec<String>,
}

/// A finished shard: written after it, so that a shard without one is made again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    /// Digest of the options and of the text.
    input: String,
    /// BLAKE3 of the shard.
    shard: String,
    documents: u64,
    tokens: u64,
    bytes: u64,
    skipped_files: Vec<String>,
}

/// Tokenizes text into shards and writes their index.
///
/// What is written depends on the text, the tokenizer and the options but `threads`, to the byte. It can be stopped or
/// killed at any time: shards appear whole, and the next call makes only those that are missing, damaged, or of other
/// text. Progress counts bytes of text. Errors: text or a tokenizer that cannot be used, other shards in the output.
pub fn tokenize(options: &TokenizeOptions, progress: OnProgress<'_>) -> Result<TokenizeReport> {
    let raw = read_file(&options.tokenizer)?;
    let mut tokenizer =
        Tokenizer::from_bytes(&raw).map_err(|e| Error::tool(options.tokenizer.display(), e))?;
    let end = match &options.end {
        Some(end) => Some(tokenizer.token_to_id(end).ok_or_else(|| {
            Error::tool(
                options.tokenizer.display(),
                format!("has no token {end}; name one of its special tokens"),
            )
        })?),
        None => None,
    };
    let turn = |token: &str| {
        tokenizer.token_to_id(token).ok_or_else(|| {
            let detail = format!("has no token {token}, which conversations are written with");
            Error::tool(options.tokenizer.display(), detail)
        })
    };
    let turns = match options.inputs.conversations {
        true => Some((turn("<|im_start|>")?, turn("<|im_end|>")?)),
        false => None,
    };
    // Text that spells out a special token must not become one.
    tokenizer.set_encode_special_tokens(true);

    let shards = group(options.inputs.pieces(options.shard_bytes)?, options.shard_bytes);
    let store = Store::open(&options.output)?;
    let names: Vec<String> =
        (0..shards.len()).map(|at| format!("shard-{at:05}-of-{:05}.parquet", shards.len())).collect();
    if let Some(other) =
        store.list("")?.iter().find(|o| o.path.ends_with(".parquet") && !names.contains(&o.path))
    {
        return Err(Error::tool(
            &options.output,
            format!("holds {}, which is not of this set; remove the folder or name another one", other.path),
        ));
    }

    let meter = Meter::new(shards.iter().flatten().map(|piece| piece.bytes).sum(), progress);
    let job = Job { options, tokenizer, end, turns, identity: identity(options, &raw), store, meter };
    let made = parallel(options.threads, shards.len(), |at| job.shard(at, &names[at], &shards[at]))?;

    let mut report = TokenizeReport { shards: shards.len() as u64, ..TokenizeReport::default() };
    for (state, reused) in made {
        report.documents += state.documents;
        report.tokens += state.tokens;
        report.bytes += state.bytes;
        report.reused += u64::from(reused);
        report.skipped_files.extend(state.skipped_files);
    }
    if report.tokens == 0 {
        return Err(Error::tool(&options.output, "the inputs hold no text; check the paths and extensions"));
    }
    let index = Index::build(&job.store, true, options.threads, &|_| std::ops::ControlFlow::Continue(()))?;
    index.made_by(&raw).save(&job.store)?;
    Ok(report)
}

/// Puts pieces together, in order, to shards of about `shard_bytes`.
fn group(pieces: Vec<Piece>, shard_bytes: u64) -> Vec<Vec<Piece>> {
    let mut shards: Vec<Vec<Piece>> = Vec::new();
    let mut room = 0;
    for piece in pieces {
        if room == 0 {
            shards.push(Vec::new());
            room = shard_bytes;
        }
        room = room.saturating_sub(piece.bytes);
        shards.last_mut().expect("there is one when there is room").push(piece);
    }
    shards
}

/// What besides the text decides a shard's bytes.
fn identity(options: &TokenizeOptions, tokenizer: &[u8]) -> String {
    let mut rest = serde_json::json!({
        "version": 1,
        "writer": env!("CARGO_PKG_VERSION"),
        "tokenizer": blake3::hash(tokenizer).to_hex().as_str(),
        "end": options.end,
        "source": options.source,
        "format": options.format,
    });
    if options.inputs.conversations {
        rest["conversations"] = true.into();
    }
    rest.to_string()
}

struct Job<'a> {
    options: &'a TokenizeOptions,
    tokenizer: Tokenizer,
    end: Option<u32>,
    /// Tokens that begin and end a turn, when the inputs are conversations.
    turns: Option<(u32, u32)>,
    identity: String,
    store: Store,
    meter: Meter<'a>,
}

impl Job<'_> {
    /// Makes a shard, or finds that it is there; `true` in the latter case.
    fn shard(&self, at: usize, name: &str, pieces: &[Piece]) -> Result<(State, bool)> {
        let state_path = format!("{STATE}/{at:05}.json");
        let bytes: u64 = pieces.iter().map(|piece| piece.bytes).sum();
        if let Some(state) = self.finished(&state_path, name, pieces)? {
            self.meter.add(bytes, state.tokens)?;
            return Ok((state, true));
        }
        let fault = |e: parquet::errors::ParquetError| Error::tool(self.store.place_of(name), e);
        let mut writer =
            ShardWriter::new(self.options.format, self.turns.is_some(), self.options.source.as_deref())
                .map_err(fault)?;
        let mut input = self.hasher();
        let (mut read, mut skipped_files) = (0, Vec::new());
        for piece in pieces {
            let before = writer.tokens();
            let kind = piece.read(self.options.inputs.field(), &mut |text| {
                hash_text(&mut input, text);
                read += text.len() as u64;
                let told = |e: tokenizers::Error| Error::tool(piece.path.display(), e);
                match &self.turns {
                    None => writer.push(&self.encode(text).map_err(told)?, None).map_err(fault),
                    Some(turns) => {
                        let (ids, mask) = self.encode_conversation(text, turns).map_err(told)?;
                        writer.push(&ids, Some(&mask)).map_err(fault)
                    }
                }
            })?;
            if kind == Kind::Binary {
                skipped_files.push(piece.path.display().to_string());
            }
            self.meter.add(piece.bytes, writer.tokens() - before)?;
        }
        let shard = writer.finish().map_err(fault)?;
        let state = State {
            input: input.finalize().to_hex().to_string(),
            shard: blake3::hash(&shard.bytes).to_hex().to_string(),
            documents: shard.rows,
            tokens: shard.tokens,
            bytes: read,
            skipped_files,
        };
        self.store.put(name, shard.bytes)?;
        self.store.put(&state_path, serde_json::to_vec(&state).expect("a state is strings and numbers"))?;
        Ok((state, false))
    }

    /// The state of a shard that is there, whole, and of this text.
    fn finished(&self, state_path: &str, name: &str, pieces: &[Piece]) -> Result<Option<State>> {
        let Some(state) = self.store.get(state_path)? else { return Ok(None) };
        let Ok(state) = serde_json::from_slice::<State>(&state) else { return Ok(None) };
        // Of any size: it was written here.
        let Fetched::Bytes(shard) = self.store.get_sized(name, |_| true)? else { return Ok(None) };
        if blake3::hash(&shard).to_hex().as_str() != state.shard {
            return Ok(None);
        }
        let mut input = self.hasher();
        for piece in pieces {
            piece.read(self.options.inputs.field(), &mut |text| {
                hash_text(&mut input, text);
                Ok(())
            })?;
        }
        Ok((input.finalize().to_hex().as_str() == state.input).then_some(state))
    }

    fn hasher(&self) -> blake3::Hasher {
        let mut hasher = blake3::Hasher::new();
        hash_text(&mut hasher, &self.identity);
        hasher
    }

    /// ChatML: `<|im_start|>role\ncontent<|im_end|>\n` for each message. What counts is what an assistant says, and that it
    /// stops.
    fn encode_conversation(
        &self,
        text: &str,
        (start, end): &(u32, u32),
    ) -> Result<(Vec<i32>, Vec<u8>), tokenizers::Error> {
        #[derive(Deserialize)]
        struct Message {
            role: String,
            content: String,
        }
        let messages: Vec<Message> = serde_json::from_str(text).map_err(|cause| {
            format!("a conversation is a list of role and content, two texts each: {cause}")
        })?;
        let (mut ids, mut mask) = (Vec::new(), Vec::new());
        let mut push = |more: &[u32], counts: bool| -> Result<(), tokenizers::Error> {
            for id in more {
                ids.push(i32::try_from(*id)?);
                mask.push(u8::from(counts));
            }
            Ok(())
        };
        let encode = |text: &str| {
            Ok::<_, tokenizers::Error>(self.tokenizer.encode_fast(text, false)?.get_ids().to_vec())
        };
        for Message { role, content } in messages {
            let answers = role == "assistant";
            push(&[*start], false)?;
            push(&encode(&format!("{role}\n"))?, false)?;
            for part in parts(&content, PART_BYTES) {
                push(&encode(part)?, answers)?;
            }
            push(&[*end], answers)?;
            push(&encode("\n")?, false)?;
        }
        Ok((ids, mask))
    }

    fn encode(&self, text: &str) -> Result<Vec<i32>, tokenizers::Error> {
        let mut ids = Vec::with_capacity(text.len() / 3 + 1);
        for part in parts(text, PART_BYTES) {
            let encoding = self.tokenizer.encode_fast(part, false)?;
            for id in encoding.get_ids() {
                ids.push(i32::try_from(*id)?);
            }
        }
        // An empty document stays empty, and is left out.
        if let (Some(end), false) = (self.end, ids.is_empty()) {
            ids.push(i32::try_from(end)?);
        }
        Ok(ids)
    }
}

fn hash_text(hasher: &mut blake3::Hasher, text: &str) {
    hasher.update(&(text.len() as u64).to_le_bytes());
    hasher.update(text.as_bytes());
}
