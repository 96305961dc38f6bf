//! The terminal, or what stands in its place: where progress is drawn and lines are written without tearing it.

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{EnvFilter, filter_fn};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::failure::Failure;
use crate::trace::Timeline;

/// What is logged unless something is said: warnings, and [`anello_coordinator::AUDIT`].
const QUIET: &str = "warn,anello::audit=info";

/// Where progress is drawn. One a process.
#[derive(Clone, Debug)]
pub struct Screen {
    bars: MultiProgress,
    live: bool,
    color: bool,
    timeline: Option<PathBuf>,
}

impl Screen {
    /// The screen of this process: bars are drawn when standard output is a terminal, colours used unless `NO_COLOR`.
    /// `timeline` is the file for `--trace`.
    pub fn new(timeline: Option<PathBuf>) -> Self {
        let live = io::stdout().is_terminal();
        let target = if live { ProgressDrawTarget::stdout() } else { ProgressDrawTarget::hidden() };
        let color = live && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Self { bars: MultiProgress::with_draw_target(target), live, color, timeline }
    }

    /// The file for `--trace`.
    pub fn timeline(&self) -> Option<&Path> {
        self.timeline.as_deref()
    }

    /// Whether a person watches.
    pub fn is_live(&self) -> bool {
        self.live
    }

    /// Sends what is logged to standard error, above the bars, and the spans of the first steps to the timeline. `filter`
    /// wins over `RUST_LOG`; without both, warnings, and what users had done.
    pub fn log(&self, filter: Option<&str>) -> Result<(), Failure> {
        let variable = std::env::var("RUST_LOG").ok().filter(|text| !text.is_empty());
        let (origin, text) = match (filter, &variable) {
            (Some(filter), _) => ("--log", filter),
            (None, Some(variable)) => ("RUST_LOG", variable.as_str()),
            (None, None) => ("", QUIET),
        };
        let wrong = |e| {
            Failure::Usage(format!(
                "{origin} {text} is no filter ({e}); write one as info or anello_worker=debug"
            ))
        };
        let filter = EnvFilter::builder().parse(text).map_err(wrong)?;
        let color =
            io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let log =
            tracing_subscriber::fmt::layer().with_ansi(color).with_writer(self.clone()).with_filter(filter);
        let timeline = self
            .timeline
            .as_deref()
            .map(|file| {
                Timeline::append(file)
                    .map_err(|e| Failure::Usage(format!("the trace {}: {e}", file.display())))
            })
            .transpose()?
            .map(|timeline| timeline.with_filter(filter_fn(Timeline::wants)));
        tracing_subscriber::registry().with(log).with(timeline).init();
        Ok(())
    }

    /// Writes to standard output, above the bars.
    pub fn print(&self, text: &str) -> io::Result<()> {
        self.bars.suspend(|| {
            let mut out = io::stdout().lock();
            out.write_all(text.as_bytes())?;
            out.flush()
        })
    }

    /// Like [`Screen::print`], with a newline.
    pub fn line(&self, text: &str) -> io::Result<()> {
        self.print(&format!("{text}\n"))
    }

    /// A new line at the bottom for a bar or a message.
    pub fn add(&self, total: u64, template: &str) -> ProgressBar {
        let template = if self.color { template.to_owned() } else { without_colors(template) };
        let style = ProgressStyle::with_template(&template).expect("the templates are written in this crate");
        self.bars.add(ProgressBar::new(total).with_style(style.progress_chars("━╸─")))
    }

    /// Removes all bars.
    pub fn clear(&self) -> io::Result<()> {
        self.bars.clear()
    }

    /// `text` in the faint colour.
    pub fn faint(&self, text: &str) -> String {
        if self.color { format!("\x1b[2m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// `text` in one of the 256 colours of terminals.
    pub fn in_color(&self, text: &str, color: u8) -> String {
        if self.color { format!("\x1b[38;5;{color}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// `text` in bold.
    pub fn bold(&self, text: &str) -> String {
        if self.color { format!("\x1b[1m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// Takes the styles (`:.cyan/dim`) out of a template's keys: `{bar:30.cyan/dim}` becomes `{bar:30}`.
fn without_colors(template: &str) -> String {
    let mut plain = String::new();
    let mut in_style = false;
    for letter in template.chars() {
        match letter {
            '.' if plain.rfind('{') > plain.rfind('}') => in_style = true,
            '}' => in_style = false,
            _ => {}
        }
        if !in_style {
            plain.push(letter);
        }
    }
    plain.replace(":}", "}")
}

/// Writes one log line to standard error, above the bars.
pub struct LogWriter(MultiProgress);

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.suspend(|| io::stderr().write_all(bytes)).map(|()| bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

impl<'a> MakeWriter<'a> for Screen {
    type Writer = LogWriter;

    fn make_writer(&'a self) -> LogWriter {
        LogWriter(self.bars.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_lose_their_colours_and_nothing_else() {
        assert_eq!(
            without_colors("a. {bar:30.cyan/dim} {msg:.bold} {pos}/{len}."),
            "a. {bar:30} {msg} {pos}/{len}."
        );
    }
}
