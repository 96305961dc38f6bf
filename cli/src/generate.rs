//! `anello generate`: text from a model, token by token, with the loop step at which each left.

use std::io::Write;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Instant;

use anello_configs::ComputeDevice;
use anello_worker::{Cache, GenerateOptions, Generator, Leave, Sampled, device};
use serde_json::json;

use crate::failure::{Exit, Failure, Outcome};
use crate::interrupt::Interrupt;
use crate::screen::Screen;
use crate::text::{Pieces, grouped, per_second};
use crate::weights::Weights;

/// Arguments of `anello generate`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// RUN, RUN@STEP, or a folder in the published Ouro layout.
    #[arg(value_name = "CKPT")]
    name: String,
    /// What to continue. May be given again.
    #[arg(long, value_name = "TEXT", required_unless_present = "prompts")]
    prompt: Vec<String>,
    /// A file of prompts, one a line.
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    prompts: Option<PathBuf>,
    /// Tokens to write at most, for each prompt.
    #[arg(long, value_name = "N", default_value_t = 128)]
    tokens: usize,
    /// When a token leaves the loop: q=0.5 (so much exit mass), step=3, diff=0.1 (nearer than this to the state before), or
    /// weighted (all loop steps, logits weighted by the exit distribution).
    #[arg(long, value_name = "RULE", default_value = "q=0.5", value_parser = Rule::from_str)]
    exit: Rule,
    /// Keys and values that later tokens see: of their own loop step (full), or one a layer (last, averaged, first).
    #[arg(long, value_name = "CACHE", default_value = "full", value_parser = ["full", "last", "averaged", "first"])]
    kv: String,
    /// Loop steps at most (default: as last trained). May be more.
    #[arg(long, value_name = "T", value_parser = clap::value_parser!(u32).range(1..=256))]
    loops: Option<u32>,
    /// 0 always takes the most probable token.
    #[arg(long, value_name = "X", default_value_t = 0.0, value_parser = at_least_zero)]
    temperature: f64,
    /// Draw from the most probable tokens that make up this mass.
    #[arg(long, value_name = "P", default_value_t = 1.0, value_parser = share)]
    top_p: f64,
    /// Seed of the draws.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Go on after <|endoftext|> or <|im_end|>.
    #[arg(long)]
    ignore_end: bool,
    /// One JSON object a prompt, at its end.
    #[arg(long)]
    json: bool,
    /// CPU threads of LibTorch (default: all cores).
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    threads: Option<u32>,
    /// What to compute on: cpu, cuda or cuda:N.
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: ComputeDevice,
}

/// `--exit`.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Rule(Leave);

impl FromStr for Rule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number =
            |value: &str, accepts: fn(f64) -> bool| value.parse::<f64>().ok().filter(|v| accepts(*v));
        let rule = match text.split_once('=') {
            None if text == "weighted" => Some(Leave::Weighted),
            Some(("q", q)) => number(q, |q| (0.0..=1.0).contains(&q)).map(Leave::Mass),
            Some(("step", step)) => step.parse().ok().filter(|step| *step > 0).map(Leave::Step),
            Some(("diff", distance)) => number(distance, |d| d >= 0.0 && d.is_finite()).map(Leave::Near),
            _ => None,
        };
        rule.map(Self).ok_or_else(|| "give q=0.5 (0 to 1), step=3, diff=0.1 or weighted".to_owned())
    }
}

fn at_least_zero(text: &str) -> Result<f64, String> {
    let value = text.parse::<f64>().ok().filter(|value| *value >= 0.0 && value.is_finite());
    value.ok_or_else(|| "give a number from 0 on".to_owned())
}

fn share(text: &str) -> Result<f64, String> {
    let value = text.parse::<f64>().ok().filter(|value| *value > 0.0 && *value <= 1.0);
    value.ok_or_else(|| "give a number above 0, up to 1".to_owned())
}

/// `anello generate`
pub fn run(args: &Args, screen: &Screen) -> Outcome {
    if let Some(threads) = args.threads {
        tch::set_num_threads(threads as i32);
    }
    let device = device::open(args.device)?;
    let prompts = match &args.prompts {
        None => args.prompt.clone(),
        Some(path) => {
            let failed = |source| Failure::File { action: "reading", path: path.clone(), source };
            std::fs::read_to_string(path).map_err(failed)?.lines().map(str::to_owned).collect()
        }
    };
    let interrupt = Interrupt::watch()?;
    let weights = Weights::load(&args.name, device)?;
    let loops = args.loops.unwrap_or(weights.loops);
    if let Rule(Leave::Step(step)) = args.exit
        && step > loops
    {
        return Err(Failure::Usage(format!(
            "--exit step={step} is beyond the {loops} loop steps; give --loops {step}"
        )));
    }
    let options = GenerateOptions {
        loops,
        leave: args.exit.0,
        cache: match args.kv.as_str() {
            "last" => Cache::Last,
            "averaged" => Cache::Averaged,
            "first" => Cache::First,
            _ => Cache::Full,
        },
        temperature: args.temperature,
        top_p: args.top_p,
        seed: args.seed,
    };
    let ends: Vec<u32> =
        ["<|endoftext|>", "<|im_end|>"].into_iter().filter_map(|end| weights.token(end)).collect();
    let ends = if args.ignore_end { Vec::new() } else { ends };
    // All of them before the first is gone on with: what is wrong with the last one is told at once.
    let mut told = Vec::new();
    for (at, prompt) in prompts.iter().enumerate() {
        let ids = weights.encode(prompt)?;
        if ids.is_empty() {
            let which = args.prompts.as_ref().map(|path| format!("line {} of {}", at + 1, path.display()));
            let which = which.unwrap_or_else(|| "a prompt".to_owned());
            return Err(Failure::Usage(format!("{which} is empty; give at least one letter")));
        }
        told.push((prompt, ids));
    }
    for (prompt, ids) in told {
        let mut generator =
            Generator::new(&weights.model, weights.rope_base, ids.len() + args.tokens, options);
        let (mut pieces, mut text) = (Pieces::after(&ids, weights.tokenizer.as_ref()), String::new());
        if !args.json {
            screen.print(&screen.faint(prompt))?;
        }
        let (began, mut written, mut next) = (Instant::now(), Vec::<Sampled>::new(), ids.clone());
        while written.len() < args.tokens && !interrupt.raised() {
            let sampled = generator.next(&next);
            next = vec![sampled.id];
            written.push(sampled);
            if ends.contains(&sampled.id) {
                break;
            }
            let piece = pieces.push(sampled.id);
            text.push_str(&piece);
            if !args.json {
                screen.print(&colored(screen, &piece, sampled.exit, loops))?;
                std::io::stdout().flush()?;
            }
        }
        let seconds = began.elapsed().as_secs_f64();
        let depth = written.iter().map(|s| f64::from(s.exit)).sum::<f64>() / written.len().max(1) as f64;
        let rate = written.len() as f64 / seconds;
        if args.json {
            let line = json!({
                "prompt": prompt, "text": text, "ids": written.iter().map(|s| s.id).collect::<Vec<_>>(),
                "exits": written.iter().map(|s| s.exit).collect::<Vec<_>>(),
                "probabilities": written.iter().map(|s| s.probability).collect::<Vec<_>>(),
                "mean_depth": depth, "loops": loops, "tokens_per_second": rate,
            });
            screen.line(&line.to_string())?;
        } else {
            let count = grouped(written.len() as u64);
            let told =
                format!("{count} tokens, {} tokens/s, mean depth {depth:.2} of {loops}", per_second(rate));
            screen.line(&format!("\n{}", screen.faint(&told)))?;
        }
        if interrupt.raised() {
            return Ok(Exit::Interrupted);
        }
    }
    Ok(Exit::Done)
}

/// Shallow tokens cold, deep ones warm; without colours, plain.
fn colored(screen: &Screen, piece: &str, exit: u32, loops: u32) -> String {
    const COLORS: [u8; 5] = [39, 43, 148, 214, 203];
    let at = (exit - 1) as usize * (COLORS.len() - 1) / (loops - 1).max(1) as usize;
    screen.in_color(piece, COLORS[at.min(COLORS.len() - 1)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_read_or_refused() {
        let read = |text: &str| text.parse::<Rule>().ok().map(|rule| rule.0);
        assert_eq!(read("q=0.5"), Some(Leave::Mass(0.5)));
        assert_eq!(read("step=3"), Some(Leave::Step(3)));
        assert_eq!(read("diff=1e-2"), Some(Leave::Near(0.01)));
        assert_eq!(read("weighted"), Some(Leave::Weighted));
        for wrong in [
            "",
            "q",
            "q=",
            "q=1.1",
            "q=nan",
            "step=0",
            "step=1.5",
            "diff=-1",
            "diff=inf",
            "mass=1",
            "weighted=1",
        ] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }
}
