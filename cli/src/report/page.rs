//! The page: a template, filled. Pure.

use anello_coordinator::http::{CHARTS, STYLE};
use anello_store::events::{Event, Record};

use super::{Story, series};
use crate::stages::{StageSummary, summarise};
use crate::text::{count, duration, grouped, nats, per_second, utc};
use anello_store::words::{describe, where_it_runs};

const TEMPLATE: &str = include_str!("page.html");
const SCRIPT: &str = include_str!("page.js");

/// Events that are told of; of more, the first and the last.
const EVENTS_SHOWN: usize = 400;

/// The whole page.
pub fn render(story: &Story) -> String {
    let stages = summarise(&story.records);
    let data = series::data(story).to_string();
    fill(TEMPLATE, |key| match key {
        "name" => escape(&story.config.name),
        "style" => STYLE.to_owned(),
        "script" => format!("{CHARTS}{SCRIPT}"),
        "status" => escape(&status(story)),
        "facts" => facts(story),
        "tiles" => tiles(story, &stages),
        "stages" => stage_table(&stages),
        "events" => event_list(&story.events),
        "config" => escape(&story.config.to_toml()),
        // Nothing in a script block of JSON may look like the end of it.
        "data" => data.replace('<', "\\u003c"),
        _ => String::new(),
    })
}

/// Puts `value(key)` in the place of each `{{key}}`, once: what is put in is not looked at again.
fn fill(template: &str, value: impl Fn(&str) -> String) -> String {
    let mut pieces = template.split("{{");
    let mut text = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        let (key, rest) = piece.split_once("}}").unwrap_or(("", piece));
        text.push_str(&value(key));
        text.push_str(rest);
    }
    text
}

/// Text as HTML, in an element or in a quoted attribute.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            other => escaped.push(other),
        }
    }
    escaped
}

fn status(story: &Story) -> String {
    let total = grouped(story.schedule.total_steps());
    match story.events.last().map(|record| &record.event) {
        Some(Event::Finished { step, .. }) => format!("finished after {} steps", grouped(*step)),
        Some(Event::Stopped { step }) => format!("stopped after {} of {total} steps", grouped(*step)),
        Some(Event::Ended { outcome, .. }) => {
            format!("{outcome}, at step {} of {total}", grouped(story.records.len() as u64))
        }
        Some(_) => format!("under way or killed, at step {} of {total}", grouped(story.records.len() as u64)),
        None => "not begun".to_owned(),
    }
}

/// Term and description of what identifies the run.
fn facts(story: &Story) -> String {
    let last_start = story.events.iter().rev().find_map(|record| match &record.event {
        Event::Started { environment, .. } => Some(where_it_runs(environment)),
        _ => None,
    });
    // A ring's workers come and go; what they agree on was written down by the first.
    let place = last_start.or_else(|| story.environment.as_ref().map(where_it_runs));
    let starts = story.events.iter().filter(|record| matches!(record.event, Event::Started { .. })).count();
    let weights = story.events.iter().rev().find_map(|record| match &record.event {
        Event::Finished { step, weights } | Event::Checkpoint { step, weights } => {
            Some(format!("{weights} after step {}", grouped(*step)))
        }
        _ => None,
    });
    let when = match (story.events.first(), story.events.last()) {
        (Some(first), Some(last)) => format!("{} to {} UTC", utc(first.unix_ms), utc(last.unix_ms)),
        _ => "–".to_owned(),
    };
    let taken_up = if starts > 1 { format!(", taken up {starts} times") } else { String::new() };
    [
        ("run", story.place.clone()),
        ("when", when + &taken_up),
        ("where", place.unwrap_or_else(|| "–".to_owned())),
        ("config", story.config.digest()),
        ("weights", weights.unwrap_or_else(|| "–".to_owned())),
    ]
    .into_iter()
    .map(|(term, text)| format!("<dt>{term}</dt><dd>{}</dd>\n", escape(&text)))
    .collect()
}

fn tiles(story: &Story, stages: &[StageSummary]) -> String {
    let seconds: f64 = stages.iter().map(|stage| stage.seconds).sum();
    let tokens: u64 = stages.iter().map(|stage| stage.tokens).sum();
    let mut tiles = vec![
        ("tokens", count(tokens), format!("of {}", count(story.schedule.total_tokens()))),
        (
            "steps",
            grouped(story.records.len() as u64),
            format!("of {}", grouped(story.schedule.total_steps())),
        ),
        ("training", duration(seconds), format!("{} tokens/s", per_second(tokens as f64 / seconds))),
    ];
    if let Some(last) = stages.last()
        && let (Some(first_loop), Some(last_loop)) = (last.loop_loss.first(), last.loop_loss.last())
    {
        let ln_vocab = f64::from(story.config.model.vocab).ln();
        let loops = last.loop_loss.len();
        tiles.push(("loss of the last loop step", nats(*last_loop), format!("ln V = {}", nats(ln_vocab))));
        let gain = first_loop - last_loop;
        tiles.push(("what looping gains", nats(gain).replace('-', "−"), format!("L(1) − L({loops}), nats")));
        tiles.push(("mean exit depth", format!("{:.2}", last.depth), format!("of {loops}")));
    }
    let tile = |(name, value, note): (&str, String, String)| {
        format!(
            "<div class=\"tile\"><span>{}</span><b>{}</b><small>{}</small></div>\n",
            escape(name),
            escape(&value),
            escape(&note)
        )
    };
    tiles.into_iter().map(tile).collect()
}

fn stage_table(stages: &[StageSummary]) -> String {
    let head = [
        "stage",
        "steps",
        "tokens",
        "loss, first",
        "loss, last",
        "L(1)",
        "L(T)",
        "T",
        "exit depth",
        "tokens/s",
        "time",
    ];
    let head: String = head.iter().map(|title| format!("<th scope=\"col\">{title}</th>")).collect();
    let mut rows = String::new();
    for stage in stages {
        let loss = |value: Option<&f64>| value.copied().map_or("–".to_owned(), nats);
        let skipped =
            if stage.skipped > 0 { format!(" ({} skipped)", grouped(stage.skipped)) } else { String::new() };
        let cells = [
            grouped(stage.steps) + &skipped,
            grouped(stage.tokens),
            nats(stage.loss_first),
            nats(stage.loss_last),
            loss(stage.loop_loss.first()),
            loss(stage.loop_loss.last()),
            stage.loop_loss.len().to_string(),
            format!("{:.2}", stage.depth),
            per_second(stage.tokens_per_s),
            duration(stage.seconds),
        ];
        let cells: String = cells.iter().map(|cell| format!("<td>{}</td>", escape(cell))).collect();
        rows.push_str(&format!("<tr><th scope=\"row\">{}</th>{cells}</tr>\n", escape(&stage.stage)));
    }
    format!("<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>")
}

fn event_list(records: &[Record]) -> String {
    let line = |record: &Record| {
        let kind = match record.event {
            Event::PassedOver { .. }
            | Event::Broke { .. }
            | Event::Skipped { .. }
            | Event::Spike { .. }
            | Event::SkippedData { .. }
            | Event::CheckpointFailed { .. }
            | Event::Lost { .. }
            | Event::Evicted { .. }
            | Event::FellBack { .. }
            | Event::LeftOut { .. }
            | Event::Slow { .. } => " class=\"bad\"",
            Event::Started { .. }
            | Event::Stage { .. }
            | Event::Epoch { .. }
            | Event::Checkpoint { .. }
            | Event::TakenUp { .. }
            | Event::Goal { .. }
            | Event::Joined { .. }
            | Event::Formed { .. }
            | Event::Recovered { .. }
            | Event::InStep { .. }
            | Event::Ended { .. }
            | Event::Stopped { .. }
            | Event::Finished { .. } => "",
        };
        format!("<li{kind}><time>{}</time> {}</li>\n", utc(record.unix_ms), escape(&describe(&record.event)))
    };
    if records.len() <= EVENTS_SHOWN {
        return records.iter().map(line).collect();
    }
    let (first, last) = (&records[..EVENTS_SHOWN / 2], &records[records.len() - EVENTS_SHOWN / 2..]);
    let between = grouped((records.len() - EVENTS_SHOWN) as u64);
    let gap = format!("<li>… {between} more; <code>anello events</code> has them all</li>\n");
    first.iter().map(line).chain([gap]).chain(last.iter().map(line)).collect()
}
