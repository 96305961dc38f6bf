//! What is seen of a run: bars on a terminal, or a line every few seconds.

use std::io;
use std::time::{Duration, Instant};

use anello_store::Notice;
use indicatif::ProgressBar;

use super::lines;
use super::tracker::Tracker;
use crate::screen::Screen;
use crate::text::{count, duration, grouped, lr, nats, per_second, short};

/// Time between two step lines of a log.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Time after which the live display is drawn again though nothing happened.
const REFRESH_EVERY: Duration = Duration::from_millis(500);

/// The view of a run.
pub struct View<'a> {
    screen: &'a Screen,
    kind: Kind,
}

enum Kind {
    Live(Box<Live>),
    /// When the last step line was written; the step of it.
    Log(Option<(Instant, u64)>),
}

impl<'a> View<'a> {
    /// Live on a terminal, a log elsewhere.
    pub fn new(screen: &'a Screen) -> Self {
        let kind = if screen.is_live() { Kind::Live(Box::new(Live::new(screen))) } else { Kind::Log(None) };
        Self { screen, kind }
    }

    /// A line of its own.
    pub fn line(&self, text: &str) -> io::Result<()> {
        self.screen.line(text)
    }

    /// Shows a notice that `tracker` has observed.
    pub fn notice(&mut self, notice: &Notice, tracker: &Tracker) -> io::Result<()> {
        if let Some(text) = lines::news(notice) {
            self.screen.line(&text)?;
        }
        if let Notice::Stage { .. } = notice {
            self.screen.line(&lines::stage(tracker))?;
        }
        if let Notice::Step(record) = notice {
            lines::evals(record).iter().try_for_each(|line| self.screen.line(line))?;
        }
        match (&mut self.kind, notice) {
            (Kind::Live(live), _) => {
                live.notice(notice);
                live.draw(tracker, self.screen);
            }
            (Kind::Log(_), Notice::Checkpoint { step, seconds, .. }) => {
                self.screen.line(&lines::checkpoint(*step, *seconds))?;
            }
            (Kind::Log(last), Notice::Step(record)) => {
                if last.is_none_or(|(at, _)| at.elapsed() >= LINE_EVERY) {
                    *last = Some((Instant::now(), record.step));
                    self.screen.line(&lines::step(tracker))?;
                }
            }
            (Kind::Log(_), _) => {}
        }
        Ok(())
    }

    /// Nothing has happened for a while: draws what was held back, since bars are drawn a few times a second at most.
    pub fn refresh(&mut self, tracker: &Tracker) {
        if let Kind::Live(live) = &mut self.kind
            && live.drawn.elapsed() >= REFRESH_EVERY
        {
            live.draw(tracker, self.screen);
        }
    }

    /// The run is over: leaves the last step behind as a line.
    pub fn close(self, tracker: &Tracker) -> io::Result<()> {
        let shown = match &self.kind {
            Kind::Live(_) => None,
            Kind::Log(last) => last.map(|(_, step)| step),
        };
        self.screen.clear()?;
        match &tracker.last {
            Some(last) if shown != Some(last.step) => self.screen.line(&lines::step(tracker)),
            _ => Ok(()),
        }
    }
}

/// ```text
/// stage stable (2 of 5) ━━━━━━━━━╸──────────────────── 182/384 steps
/// run                   ━━━━━━━━━━━━╸───────────────── 214/640 steps  ETA 5 min 20 s
/// step 214   loss 4.312   by loop step 4.610 4.381 4.290 4.268   mean exit depth 2.48 of 4
/// lr 3.00e-3   gradient norm 0.412   9 820 tokens/s   1.75 M tokens   checkpoint 200, 14 s ago
/// ```
struct Live {
    stage: ProgressBar,
    run: ProgressBar,
    loss: ProgressBar,
    pace: ProgressBar,
    checkpoint: Option<(Instant, u64)>,
    drawn: Instant,
}

impl Live {
    fn new(screen: &Screen) -> Self {
        let bar = "{prefix:24} {bar:30.cyan/dim} {msg}";
        let live = Self {
            stage: screen.add(1, bar),
            run: screen.add(1, bar),
            loss: screen.add(1, "{wide_msg}"),
            pace: screen.add(1, "{wide_msg}"),
            checkpoint: None,
            drawn: Instant::now(),
        };
        live.run.set_prefix("run");
        live.loss.set_message("getting ready …");
        live
    }

    fn notice(&mut self, notice: &Notice) {
        if let Notice::Checkpoint { step, .. } = notice {
            self.checkpoint = Some((Instant::now(), *step));
        }
    }

    fn draw(&mut self, tracker: &Tracker, screen: &Screen) {
        if !tracker.is_ready() {
            return;
        }
        self.drawn = Instant::now();
        let (done, of) = tracker.stage_steps();
        let stages = tracker.schedule().stages().len();
        self.stage.set_prefix(format!("{} ({} of {stages})", tracker.stage_name(), tracker.stage + 1));
        self.stage.set_length(of);
        self.stage.set_position(done);
        self.stage.set_message(format!("{}/{} steps", grouped(done), grouped(of)));
        let until = tracker.until_step();
        let eta = tracker.eta_s().map(|s| format!("  ETA {}", duration(s))).unwrap_or_default();
        self.run.set_length(until);
        self.run.set_position(tracker.step);
        self.run.set_message(format!("{}/{} steps{eta}", grouped(tracker.step), grouped(until)));

        let Some(last) = &tracker.last else { return };
        let faint = |text: &str| screen.faint(text);
        let loops: Vec<String> = last.loop_loss.iter().copied().map(nats).collect();
        self.loss.set_message(format!(
            "{} {}   {} {}   {} {}   {} {:.2} {}",
            faint("step"),
            grouped(tracker.step),
            faint("loss"),
            screen.bold(&nats(last.loss)),
            faint("by loop step"),
            loops.join(" "),
            faint("mean exit depth"),
            last.depth(),
            faint(&format!("of {}", last.exit.len())),
        ));
        let checkpoint = self.checkpoint.map_or_else(
            || faint("no checkpoint yet"),
            |(at, step)| {
                let ago = duration(at.elapsed().as_secs_f64().round());
                format!("{} {}{}", faint("checkpoint"), grouped(step), faint(&format!(", {ago} ago")))
            },
        );
        self.pace.set_message(format!(
            "{} {}   {} {}   {} {}   {} {}   {checkpoint}",
            faint("lr"),
            lr(last.lr),
            faint("gradient norm"),
            short(last.grad_norm),
            per_second(tracker.speed.tokens_per_s().unwrap_or(f64::NAN)),
            faint("tokens/s"),
            count(tracker.tokens()),
            faint("tokens"),
        ));
    }
}
