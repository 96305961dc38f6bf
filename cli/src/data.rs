//! `anello data`: makes, looks at and checks token sets.

mod inspect;

use std::ops::ControlFlow;
use std::path::PathBuf;

use anello_dataloader::{
    Dataset, Index, ManoOptions, Progress, ShardFormat, TextInputs, TokenizeOptions, TrainOptions,
    mano_vocab, synth_mano, tokenize, train_tokenizer,
};
use anello_store::Store;
use indicatif::ProgressBar;

use crate::failure::{Exit, Failure, Outcome};
use crate::interrupt::Interrupt;
use crate::screen::Screen;
use crate::text::{bytes, grouped, read_bytes, read_count};

/// Subcommands of `anello data`.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Turn text (files, folders of text or code, JSON Lines, Parquet) into a token set. Can be killed and run again.
    Tokenize(TokenizeArgs),
    /// Train a byte-level BPE tokenizer on text.
    TrainTokenizer(TrainTokenizerArgs),
    /// Make a synthetic set.
    #[command(subcommand)]
    Synth(Synth),
    /// Write the index of a token set anew, with checksums.
    Index {
        /// Folder or URL of the set.
        set: String,
        /// Leave the checksums out, which need all bytes to be read.
        #[arg(long)]
        no_checksums: bool,
        #[command(flatten)]
        threads: Threads,
    },
    /// Read a token set and say what it holds: rows, tokens, lengths, sources, samples.
    Inspect(inspect::Args),
    /// Read every byte of a token set and say exactly what is broken. Exit code 1 when something is.
    Verify {
        /// Folder or URL of the set.
        set: String,
        /// Ids must be below this.
        #[arg(long, value_name = "SIZE")]
        vocab: Option<u32>,
        #[command(flatten)]
        threads: Threads,
    },
}

/// Synthetic sets.
#[derive(Debug, clap::Subcommand)]
pub enum Synth {
    /// Arithmetic mod 23 in prefix notation; its depth is the length of the expression.
    Mano(ManoArgs),
}

#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Threads {
    /// Threads (default: all cores). The result does not depend on it.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    threads: Option<u32>,
}

impl Threads {
    fn count(self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        self.threads.map_or_else(cores, |threads| threads as usize)
    }
}

/// Where text comes from.
#[derive(Debug, clap::Args)]
pub struct TextArgs {
    /// Files and folders. `.jsonl` has a document a line, `.parquet` one a row; any other file is one document.
    #[arg(required = true)]
    paths: Vec<PathBuf>,
    /// In folders, only files with these extensions: `--ext py,md`.
    #[arg(long, value_name = "EXT", value_delimiter = ',')]
    ext: Vec<String>,
    /// The field of JSON Lines and the column of Parquet that holds the text (default: text; of conversations: messages).
    #[arg(long, value_name = "NAME")]
    field: Option<String>,
}

impl TextArgs {
    fn inputs(&self, conversations: bool) -> TextInputs {
        let usual = if conversations { "messages" } else { "text" };
        TextInputs {
            paths: self.paths.clone(),
            extensions: self.ext.clone(),
            text_field: self.field.clone().unwrap_or_else(|| usual.to_owned()),
            conversations,
        }
    }
}

/// How shards are written.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct FormatArgs {
    /// Aimed tokens of a row group: what a lane reads at once, and the window in which documents are shuffled.
    #[arg(long, value_name = "TOKENS", default_value = "256Ki", value_parser = read_count)]
    row_group: u64,
    /// zstd level.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(i32).range(1..=22))]
    zstd: i32,
}

impl FormatArgs {
    fn format(self) -> ShardFormat {
        ShardFormat { row_group_tokens: self.row_group, zstd_level: self.zstd }
    }
}

/// Arguments of `anello data tokenize`.
#[derive(Debug, clap::Args)]
pub struct TokenizeArgs {
    #[command(flatten)]
    text: TextArgs,
    /// A Hugging Face `tokenizer.json`.
    #[arg(long, value_name = "FILE")]
    tokenizer: PathBuf,
    /// Folder or URL for the shards; nothing else may be in it.
    #[arg(long, value_name = "FOLDER")]
    out: String,
    /// The field holds conversations, lists of {role, content}: they are written in ChatML, and only what assistants say
    /// counts (`loss_mask`), as fine-tuning wants it.
    #[arg(long, conflicts_with_all = ["end", "no_end"])]
    chat: bool,
    /// The token behind each document.
    #[arg(long, value_name = "TOKEN", default_value = "<|endoftext|>")]
    end: String,
    /// Put no token behind documents.
    #[arg(long, conflicts_with = "end")]
    no_end: bool,
    /// Write this in each row's column `source`.
    #[arg(long, value_name = "NAME")]
    source: Option<String>,
    /// Text of one shard: the unit of work and of continuing.
    #[arg(long, value_name = "BYTES", default_value = "64MiB", value_parser = read_bytes)]
    shard: u64,
    #[command(flatten)]
    format: FormatArgs,
    #[command(flatten)]
    threads: Threads,
}

/// Arguments of `anello data train-tokenizer`.
#[derive(Debug, clap::Args)]
pub struct TrainTokenizerArgs {
    #[command(flatten)]
    text: TextArgs,
    /// The `tokenizer.json` to write.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Tokens in the vocabulary, with the special ones and the 256 bytes.
    #[arg(long, value_name = "SIZE", default_value_t = 2048)]
    vocab: u32,
    /// Train on so much text; of more, documents are drawn.
    #[arg(long, value_name = "BYTES", default_value = "64MiB", value_parser = read_bytes)]
    bytes_max: u64,
    /// Seed of that draw.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// Arguments of `anello data synth mano`.
#[derive(Debug, clap::Args)]
pub struct ManoArgs {
    /// Folder or URL: gets `train/`, `eval/`, `tokenizer.json` and `vocab.json`.
    #[arg(long, value_name = "FOLDER")]
    out: String,
    /// Most operations of an expression.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    length: u32,
    /// Expressions to train on.
    #[arg(long, value_name = "COUNT", default_value = "1M", value_parser = read_count)]
    documents: u64,
    /// Expressions to test on, all of the full length.
    #[arg(long, value_name = "COUNT", default_value = "1000", value_parser = read_count)]
    eval_documents: u64,
    /// What is computed modulo. A smaller one than the paper's has smaller tables to learn.
    #[arg(long, default_value_t = anello_dataloader::MODULUS, value_parser = clap::value_parser!(u32).range(2..=i64::from(anello_dataloader::MODULUS)))]
    modulus: u32,
    /// Only the answer is a training target.
    #[arg(long)]
    answer_only: bool,
    /// Seed of the expressions.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    format: FormatArgs,
    #[command(flatten)]
    threads: Threads,
}

/// `anello data`
pub fn run(command: &Command, screen: &Screen) -> Outcome {
    let interrupt = Interrupt::watch()?;
    let done = match command {
        Command::Tokenize(args) => tokenized(args, screen, &interrupt)?,
        Command::TrainTokenizer(args) => tokenizer_trained(args, screen, &interrupt)?,
        Command::Synth(Synth::Mano(args)) => mano_made(args, screen, &interrupt)?,
        Command::Index { set, no_checksums, threads } => {
            let watch = Watch::new(screen, &interrupt, "indexing", Unit::Shards);
            let store = Store::open(set)?;
            let index =
                Index::build(&store, !no_checksums, threads.count(), &|progress| watch.report(progress))?;
            index.save(&store)?;
            let (shards, rows, tokens) = (index.shards.len() as u64, index.rows(), index.tokens());
            format!(
                "{set}: {} shards, {} documents, {} tokens; digest {}\n",
                grouped(shards),
                grouped(rows),
                grouped(tokens),
                index.digest()
            )
        }
        Command::Inspect(args) => inspect::inspected(args, screen, &interrupt)?,
        Command::Verify { set, vocab, threads } => {
            return verified(set, *vocab, threads.count(), screen, &interrupt);
        }
    };
    screen.clear()?;
    screen.print(&done)?;
    Ok(Exit::Done)
}

fn tokenized(args: &TokenizeArgs, screen: &Screen, interrupt: &Interrupt) -> Result<String, Failure> {
    let options = TokenizeOptions {
        inputs: args.text.inputs(args.chat),
        tokenizer: args.tokenizer.clone(),
        output: args.out.clone(),
        end: (!args.no_end && !args.chat).then(|| args.end.clone()),
        source: args.source.clone(),
        format: args.format.format(),
        shard_bytes: args.shard,
        threads: args.threads.count(),
    };
    let watch = Watch::new(screen, interrupt, "tokenizing", Unit::Bytes);
    let report = tokenize(&options, &|progress| watch.report(progress))?;
    let mut text = format!(
        "{}: {} documents, {} tokens from {} of text ({:.2} bytes a token) in {} shards",
        args.out,
        grouped(report.documents),
        grouped(report.tokens),
        bytes(report.bytes),
        report.bytes as f64 / report.tokens.max(1) as f64,
        grouped(report.shards),
    );
    if report.reused > 0 {
        text.push_str(&format!(", of which {} were there already", grouped(report.reused)));
    }
    text.push('\n');
    if !report.skipped_files.is_empty() {
        const SHOWN: usize = 3;
        let names = report.skipped_files.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
        let more = if report.skipped_files.len() > SHOWN { ", …" } else { "" };
        let count = grouped(report.skipped_files.len() as u64);
        text.push_str(&format!("{count} files are not UTF-8 text and were left out: {names}{more}\n"));
    }
    Ok(text)
}

fn tokenizer_trained(
    args: &TrainTokenizerArgs,
    screen: &Screen,
    interrupt: &Interrupt,
) -> Result<String, Failure> {
    if let Some(folder) = args.out.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        let failed = |source| Failure::File { action: "making", path: folder.to_owned(), source };
        std::fs::create_dir_all(folder).map_err(failed)?;
    }
    let options = TrainOptions {
        inputs: args.text.inputs(false),
        vocab: args.vocab,
        bytes_max: args.bytes_max,
        seed: args.seed,
        output: args.out.clone(),
    };
    let watch = Watch::new(screen, interrupt, "reading", Unit::Bytes).then("training the vocabulary …");
    let report = train_tokenizer(&options, &|progress| watch.report(progress))?;
    let mut text = format!(
        "{}: {} tokens, from {} of text\n",
        args.out.display(),
        grouped(report.vocab.into()),
        bytes(report.bytes)
    );
    if report.vocab < args.vocab {
        text.push_str(&format!(
            "the text yields no more than that, not the {} asked for\n",
            grouped(args.vocab.into())
        ));
    }
    Ok(text)
}

fn mano_made(args: &ManoArgs, screen: &Screen, interrupt: &Interrupt) -> Result<String, Failure> {
    let options = ManoOptions {
        length: args.length,
        documents: args.documents,
        eval_documents: args.eval_documents,
        answer_only: args.answer_only,
        modulus: args.modulus,
        seed: args.seed,
        output: args.out.clone(),
        format: args.format.format(),
        threads: args.threads.count(),
    };
    let watch = Watch::new(screen, interrupt, "making", Unit::Documents);
    synth_mano(&options, &|progress| watch.report(progress))?;
    Ok(format!(
        "{}: {} expressions of up to {} operations to train on, {} of {} to test on; vocabulary {}\n",
        args.out,
        grouped(args.documents),
        args.length,
        grouped(args.eval_documents),
        args.length,
        mano_vocab(args.length),
    ))
}

fn verified(
    set: &str,
    vocab: Option<u32>,
    threads: usize,
    screen: &Screen,
    interrupt: &Interrupt,
) -> Outcome {
    let dataset = Dataset::open(set)?;
    let watch = Watch::new(screen, interrupt, "verifying", Unit::RowGroups);
    let found = anello_dataloader::verify(&dataset, vocab, threads, &|progress| watch.report(progress))?;
    screen.clear()?;
    for fault in &found.faults {
        screen.line(&fault.to_string())?;
    }
    let sound = format!(
        "{} documents, {} tokens in {} row groups, {} of them with a checksum",
        grouped(found.rows),
        grouped(found.tokens),
        grouped(found.row_groups),
        grouped(found.checksums)
    );
    if found.faults.is_empty() {
        screen.line(&format!("{set}: whole; {sound}"))?;
        return Ok(Exit::Done);
    }
    screen.line(&format!(
        "{set}: {} row groups are broken; whole: {sound}",
        grouped(found.faults.len() as u64)
    ))?;
    Ok(Exit::No)
}

/// What a tool's progress counts.
#[derive(Clone, Copy, Debug)]
enum Unit {
    Bytes,
    Shards,
    RowGroups,
    Documents,
}

/// Draws a tool's progress, and hands an interrupt on to it.
struct Watch<'a> {
    bar: ProgressBar,
    interrupt: &'a Interrupt,
    /// What is said when all is counted and the tool goes on.
    then: Option<&'static str>,
}

impl<'a> Watch<'a> {
    fn new(screen: &Screen, interrupt: &'a Interrupt, what: &'static str, unit: Unit) -> Self {
        let counted = match unit {
            Unit::Bytes => "{bytes}/{total_bytes}",
            Unit::Shards => "{human_pos}/{human_len} shards",
            Unit::RowGroups => "{human_pos}/{human_len} row groups",
            Unit::Documents => "{human_pos}/{human_len} documents",
        };
        let bar = screen.add(0, &format!("{{prefix}} {{bar:40.cyan/dim}} {counted}  ETA {{eta}}  {{msg}}"));
        bar.set_prefix(what);
        Self { bar, interrupt, then: None }
    }

    fn then(self, what: &'static str) -> Self {
        Self { then: Some(what), ..self }
    }

    fn report(&self, progress: Progress) -> ControlFlow<()> {
        self.bar.set_length(progress.total);
        self.bar.set_position(progress.done);
        if progress.tokens > 0 {
            self.bar.set_message(format!("{} tokens", grouped(progress.tokens)));
        }
        if let Some(then) = self.then.filter(|_| progress.done >= progress.total) {
            self.bar.set_message(then);
        }
        if self.interrupt.raised() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}
