//! `anello eval`: what a model is worth at each loop step on held-out data, and what leaving early costs.

mod mano;
mod page;
mod plot;

use std::path::{Path, PathBuf};

use anello_configs::{ComputeDevice, Mask};
use anello_dataloader::{Dataset, InOrder};
use anello_worker::evaluate::{Evaluation, Sums, continuation};
use anello_worker::{Rotary, device};
use serde_json::{Value, json};

use crate::failure::{Exit, Failure, Outcome};
use crate::interrupt::Interrupt;
use crate::screen::Screen;
use crate::text::{Table, grouped, read_count};
use crate::tokenizer::check_made_with;
use crate::weights::Weights;

/// Exit masses that are tried.
const MASSES: [f64; 9] = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9];

/// Tokens that go through the model at a time, about.
const BATCH_TOKENS: u32 = 4096;

/// Arguments of `anello eval`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// RUN, RUN@STEP, or a folder in the published Ouro layout.
    #[arg(value_name = "CKPT")]
    name: String,
    /// The questions of `--task multiple-choice`, as of --choices.
    #[arg(value_name = "FILE", requires = "task", conflicts_with_all = ["choices", "data"])]
    questions: Option<PathBuf>,
    /// A token set: loss and accuracy of the tokens that count.
    #[arg(long, value_name = "SET", required_unless_present_any = ["choices", "task"])]
    data: Option<String>,
    /// A task with exact answers.
    #[arg(long, value_enum)]
    task: Option<Task>,
    /// With `--task mano`: another model, measured on the same test set and told in the same table; once for each.
    #[arg(long, value_name = "CKPT", requires = "task", conflicts_with_all = ["choices", "questions", "json", "plot"])]
    beside: Vec<String>,
    /// A file of questions, one JSON object a line: {"prompt": "…", "choices": ["…", …], "answer": 0}. The choice whose tokens
    /// are most probable after the prompt is the model's. Means `--task multiple-choice`.
    #[arg(long, value_name = "FILE", conflicts_with = "data")]
    choices: Option<PathBuf>,
    /// Tokens of the set to read at most.
    #[arg(long, value_name = "TOKENS", default_value = "256Ki", value_parser = read_count)]
    tokens: u64,
    /// Sequence length (default: as last trained).
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(2..=1 << 20))]
    sequence: Option<u32>,
    /// Loop steps (default: as last trained). May be more.
    #[arg(long, value_name = "T", value_parser = clap::value_parser!(u32).range(1..=256))]
    loops: Option<u32>,
    /// Write accuracy against mean depth: as an SVG, or with a name that ends in .html as a page with all figures. Neither
    /// needs anything else.
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// One JSON object in place of tables.
    #[arg(long)]
    json: bool,
    /// CPU threads of LibTorch (default: all cores). The figures do not depend on it.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    threads: Option<u32>,
    /// What to compute on: cpu, cuda or cuda:N.
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: ComputeDevice,
}

/// Tasks that are known by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Task {
    /// Prefix arithmetic (`anello data synth mano`): accuracy of the answers, beside the paper's. Its test set is the one
    /// beside the data that the model was trained on, unless --data gives one.
    Mano,
    /// Questions with several answers, from the FILE after it: `--task multiple-choice FILE`.
    MultipleChoice,
}

/// What is measured.
enum Measured<'a> {
    /// Of a token set; of a task's own where none is named.
    Data(Option<&'a str>, Option<Task>),
    /// Of the questions in a file.
    Questions(&'a Path),
}

/// What the arguments ask for; an error before anything is loaded where that is not clear.
fn measured(args: &Args) -> Result<Measured<'_>, Failure> {
    let usage = |text: &str| Err(Failure::Usage(text.to_owned()));
    let file = args.questions.as_ref().or(args.choices.as_ref());
    match (args.task, file, &args.data) {
        (Some(Task::MultipleChoice), _, Some(_)) => {
            usage("--task multiple-choice asks questions, not a token set; leave --data out")
        }
        (Some(Task::MultipleChoice), _, None) if !args.beside.is_empty() => {
            usage("--beside is for --task mano; ask the other model its questions by another command")
        }
        (Some(Task::MultipleChoice), None, None) => {
            usage("--task multiple-choice has no questions; give it a file: --task multiple-choice FILE")
        }
        (Some(Task::Mano), Some(file), _) => usage(&format!(
            "--task mano has a test set, and no questions as in {}; give --data SET, or --task multiple-choice",
            file.display()
        )),
        (Some(Task::MultipleChoice) | None, Some(file), None) => Ok(Measured::Questions(file)),
        (task, _, Some(set)) => Ok(Measured::Data(Some(set), task)),
        (Some(Task::Mano), None, None) => Ok(Measured::Data(None, args.task)),
        (None, None, None) => usage("give --data SET, --choices FILE or --task TASK"),
    }
}

/// `anello eval`
pub fn run(args: &Args, screen: &Screen) -> Outcome {
    if let Some(threads) = args.threads {
        tch::set_num_threads(threads as i32);
    }
    let measured = measured(args)?;
    let device = device::open(args.device)?;
    let weights = Weights::load(&args.name, device)?;
    match measured {
        Measured::Questions(file) => choices(args, &weights, file, screen),
        Measured::Data(Some(set), task) => data(args, &weights, set, task, screen),
        Measured::Data(None, task) => data(args, &weights, &mano::test_set(&weights.sources)?, task, screen),
    }
}

/// Loop steps that a model is measured with.
fn loops_of(args: &Args, weights: &Weights) -> u32 {
    args.loops.unwrap_or(weights.loops)
}

fn data(args: &Args, weights: &Weights, set: &str, task: Option<Task>, screen: &Screen) -> Outcome {
    let interrupt = Interrupt::watch()?;
    let measure = |weights: &Weights| evaluate(args, weights, set, task, screen, &interrupt);
    let Some((found, operations)) = measure(weights)? else { return Ok(Exit::Interrupted) };
    let mut others = Vec::new();
    for name in &args.beside {
        let weights = Weights::load(name, weights.model.lm_head.value.device())?;
        let Some((found, _)) = measure(&weights)? else { return Ok(Exit::Interrupted) };
        others.push((name, weights.layers, found));
    }
    let told = Told { name: &weights.name, of: set, what: "tokens that count", found: &found };
    draw(args, &told)?;
    screen.print(&if args.json {
        format!("{}\n", as_json(&told))
    } else {
        let table = operations.map(|operations| {
            let first = mano::Answers { name: &weights.name, layers: weights.layers, found: &found };
            let others =
                others.iter().map(|(name, layers, found)| mano::Answers { name, layers: *layers, found });
            mano::table(operations, &std::iter::once(first).chain(others).collect::<Vec<_>>())
        });
        as_tables(&told) + &table.unwrap_or_default()
    })?;
    Ok(Exit::Done)
}

/// Writes the plot that was asked for, if one was.
fn draw(args: &Args, told: &Told<'_>) -> Result<(), Failure> {
    let Some(path) = &args.plot else { return Ok(()) };
    let page = path.extension().is_some_and(|end| end.eq_ignore_ascii_case("html"));
    let drawn = if page { page::html(told) } else { plot::svg(told) };
    std::fs::write(path, drawn).map_err(|source| Failure::File {
        action: "writing",
        path: path.clone(),
        source,
    })
}

/// What a model is worth on the tokens of `set` that count, and of how many operations its expressions are where it is Mano's.
/// Absent: it was interrupted.
fn evaluate(
    args: &Args,
    weights: &Weights,
    set: &str,
    task: Option<Task>,
    screen: &Screen,
    interrupt: &Interrupt,
) -> Result<Option<(Evaluation, Option<u32>)>, Failure> {
    let sequence = args.sequence.unwrap_or(weights.sequence);
    let dataset = Dataset::open(set)?;
    if let Some(tokenizer) = &weights.tokenizer_file {
        check_made_with(tokenizer, set).map_err(|fact| {
            Failure::Usage(format!("{fact}; give data that was tokenized with the model's tokenizer"))
        })?;
    }
    let rotary = Rotary::new(
        weights.rope_base,
        weights.model.head_size(),
        i64::from(sequence),
        weights.model.lm_head.value.device(),
    );
    let mut found = Evaluation::new(loops_of(args, weights), &MASSES);
    let bar = screen.add(args.tokens, "{bar:30.cyan/dim} {pos} of {len} tokens");
    let (mut read, mut operations) = (0, None);
    let sequences = (BATCH_TOKENS / sequence).max(1);
    let most = args.tokens.div_ceil(u64::from(sequences) * u64::from(sequence));
    let batches = InOrder::new(&dataset, sequences, sequence, Mask::Document, Some(weights.vocab));
    for batch in batches.take(usize::try_from(most).unwrap_or(usize::MAX)) {
        let batch = batch?;
        if task == Some(Task::Mano) && operations.is_none() {
            operations = Some(mano::operations(set, &batch)?);
        }
        read += batch.tokens() as u64;
        found.add(&weights.model, &rotary, Mask::Document, &batch);
        bar.set_position(read);
        if interrupt.raised() {
            screen.clear()?;
            return Ok(None);
        }
    }
    bar.finish_and_clear();
    if found.counted == 0 {
        return Err(Failure::Usage(format!(
            "{set} has no token that counts within {} tokens",
            grouped(args.tokens)
        )));
    }
    Ok(Some((found, operations)))
}

fn figures(sums: &Sums, counted: u64) -> (f64, f64, f64) {
    let counted = counted as f64;
    (sums.loss / counted, sums.correct as f64 / counted, sums.depth / counted)
}

/// What was found, of which model and on what.
struct Told<'a> {
    name: &'a str,
    /// The token set, or the file of questions.
    of: &'a str,
    /// What is counted.
    what: &'a str,
    found: &'a Evaluation,
}

impl Told<'_> {
    fn title(&self) -> String {
        format!("{} on {}", self.name, self.of)
    }

    fn counted(&self) -> String {
        format!("{} {}", grouped(self.found.counted), self.what)
    }
}

fn as_tables(told: &Told<'_>) -> String {
    let Evaluation { counted, steps, exit, by_mass } = told.found;
    let mut text = format!("{}, {}\n\n", told.title(), told.counted());
    let mut table = Table::new(0);
    table.row(["loop step", "loss", "perplexity", "accuracy", "leaves here"]);
    for (at, (sums, exit)) in steps.iter().zip(exit).enumerate() {
        let (loss, accuracy, _) = figures(sums, *counted);
        table.row([
            (at + 1).to_string(),
            format!("{loss:.4}"),
            format!("{:.2}", loss.exp()),
            format!("{:.2} %", accuracy * 100.0),
            format!("{:.1} %", exit / *counted as f64 * 100.0),
        ]);
    }
    text.push_str(&table.render());
    text.push_str("\nleaving once so much exit mass is behind a token\n");
    let mut table = Table::new(0);
    table.row(["q", "mean depth", "loss", "accuracy", ""]);
    for (q, sums) in by_mass {
        let (loss, accuracy, depth) = figures(sums, *counted);
        let bar = "█".repeat((accuracy * 40.0).round() as usize);
        table.row([
            format!("{q:.1}"),
            format!("{depth:.2}"),
            format!("{loss:.4}"),
            format!("{:.2} %", accuracy * 100.0),
            bar,
        ]);
    }
    text + &table.render()
}

fn as_json(told: &Told<'_>) -> Value {
    let Evaluation { counted, steps, exit, by_mass } = told.found;
    let steps: Vec<Value> = (1..)
        .zip(steps.iter().zip(exit))
        .map(|(step, (sums, exit))| {
            let (loss, accuracy, _) = figures(sums, *counted);
            json!({ "step": step, "loss": loss, "accuracy": accuracy, "exit": exit / *counted as f64 })
        })
        .collect();
    let by_mass: Vec<Value> = by_mass
        .iter()
        .map(|(q, sums)| {
            let (loss, accuracy, depth) = figures(sums, *counted);
            json!({ "q": q, "mean_depth": depth, "loss": loss, "accuracy": accuracy })
        })
        .collect();
    json!({ "model": told.name, "data": told.of, "counted": counted, "steps": steps, "by_exit_mass": by_mass })
}

/// A question with several answers.
#[derive(Debug, PartialEq)]
struct Question {
    prompt: String,
    choices: Vec<String>,
    answer: usize,
}

fn read_questions(path: &Path) -> Result<Vec<Question>, Failure> {
    let failed = |source| Failure::File { action: "reading", path: path.to_owned(), source };
    let text = std::fs::read_to_string(path).map_err(failed)?;
    let wrong = |line: usize, what: &str| Failure::Usage(format!("{}:{line}: {what}", path.display()));
    let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(at, line)| {
            let value: Value =
                serde_json::from_str(line).map_err(|cause| wrong(at, &format!("no JSON: {cause}")))?;
            let choices = value["choices"]
                .as_array()
                .map(|all| all.iter().filter_map(|c| Some(c.as_str()?.to_owned())));
            let choices: Vec<String> = choices.map(Iterator::collect).unwrap_or_default();
            let prompt = value["prompt"].as_str().filter(|prompt| !prompt.is_empty());
            let prompt = prompt.ok_or_else(|| wrong(at, "there is no prompt, a text"))?.to_owned();
            if choices.len() < 2 || choices.iter().any(String::is_empty) {
                return Err(wrong(at, "choices are at least two texts"));
            }
            match value["answer"].as_u64() {
                Some(answer) if (answer as usize) < choices.len() => {
                    Ok(Question { prompt, choices, answer: answer as usize })
                }
                _ => Err(wrong(at, "answer is the number of the right choice, from 0")),
            }
        })
        .collect()
}

fn choices(args: &Args, weights: &Weights, file: &Path, screen: &Screen) -> Outcome {
    let interrupt = Interrupt::watch()?;
    let loops = loops_of(args, weights);
    let questions = read_questions(file)?;
    if questions.is_empty() {
        return Err(Failure::Usage(format!("{} has no questions", file.display())));
    }
    let mut found = Evaluation::new(loops, &MASSES);
    let bar = screen.add(questions.len() as u64, "{bar:30.cyan/dim} {pos} of {len} questions");
    for question in &questions {
        let prompt = weights.encode(&question.prompt)?;
        let choices = question.choices.iter().map(|choice| {
            let choice = weights.encode(choice)?;
            Ok(continuation(&weights.model, weights.rope_base, (loops, &MASSES), &prompt, &choice))
        });
        found.add_question(&choices.collect::<Result<Vec<_>, Failure>>()?, question.answer);
        bar.inc(1);
        if interrupt.raised() {
            screen.clear()?;
            return Ok(Exit::Interrupted);
        }
    }
    bar.finish_and_clear();
    let told =
        Told { name: &weights.name, of: &file.display().to_string(), what: "questions", found: &found };
    draw(args, &told)?;
    screen.print(&if args.json { format!("{}\n", as_json(&told)) } else { as_tables(&told) })?;
    Ok(Exit::Done)
}
