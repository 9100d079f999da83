//! Shows the progress of long work on standard error: a bar on a terminal, or JSON lines for programs.

use std::borrow::Cow;
use std::io;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};

use crate::terminal::{ProgressKind, can_show_bars, is_coloured, say_json, wishes};

/// Least time between two lines of one meter.
const BETWEEN_LINES: Duration = Duration::from_millis(500);

/// Follows one piece of work. It counts even if nothing is shown, because no bar can be seen or silence was requested.
#[derive(Debug)]
pub(crate) struct Meter {
    bar: ProgressBar,
    lines: Option<Lines>,
}

/// Progress as JSON lines.
#[derive(Debug)]
struct Lines {
    what: Cow<'static, str>,
    unit: &'static str,
    began: Instant,
    /// When the latest line was written.
    latest: Mutex<Option<Instant>>,
}

/// Progress through bytes, with rate and remaining time.
pub(crate) fn byte_bar(what: &'static str, bytes: u64) -> Meter {
    let template = "{prefix:.bold} {bar:32.cyan} {bytes} of {total_bytes}  {binary_bytes_per_sec}  {eta} left";
    Meter::new(what.into(), "bytes", bytes, template)
}

/// Progress through steps, with the time remaining.
pub(crate) fn step_bar(what: impl Into<Cow<'static, str>>, steps: u64) -> Meter {
    Meter::new(what.into(), "steps", steps, "{prefix:.bold} {bar:32.cyan} {percent} %  {eta} left")
}

/// A sign of life, for work of unknown length.
pub(crate) fn spinner(what: &'static str) -> Meter {
    let meter = Meter::new(what.into(), "steps", 0, "{spinner} {prefix} ({elapsed})");
    meter.moved();
    meter
}

/// Progress through things that are counted, followed by a message. It is hidden if there are no bars.
pub(crate) fn count_bar(what: &'static str, count: u64) -> ProgressBar {
    told(count, "{prefix:.bold} {bar:24.cyan} {pos} of {len}  {wide_msg}").with_prefix(what)
}

/// A sign of life with a message. It is hidden if there are no bars.
pub(crate) fn message_line() -> ProgressBar {
    told(0, "{spinner} {wide_msg} ({elapsed})")
}

fn told(length: u64, template: &str) -> ProgressBar {
    if !can_show_bars() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::with_draw_target(Some(length), ProgressDrawTarget::stderr_with_hz(10));
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("━━╌"));
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

impl Meter {
    fn new(what: Cow<'static, str>, unit: &'static str, length: u64, template: &str) -> Meter {
        let wishes = wishes();
        let lines = (wishes.progress == ProgressKind::Json && !wishes.is_quiet).then(|| Lines {
            what: what.trim_end().to_owned().into(),
            unit,
            began: Instant::now(),
            latest: Mutex::default(),
        });
        if wishes.is_quiet || wishes.progress != ProgressKind::Auto || !can_show_bars() {
            let bar = ProgressBar::hidden();
            bar.set_length(length);
            return Meter { bar, lines };
        }
        let bar = ProgressBar::with_draw_target(Some(length), ProgressDrawTarget::stderr_with_hz(10));
        let plain = || template.replace(".bold", "").replace(".cyan", "");
        let template = if is_coloured(&io::stderr()) { template.to_owned() } else { plain() };
        if let Ok(style) = ProgressStyle::with_template(&template) {
            bar.set_style(style.progress_chars("━━╌"));
        }
        bar.enable_steady_tick(Duration::from_millis(200));
        Meter { bar: bar.with_prefix(what), lines }
    }

    /// Shows it below the other bars of a group.
    pub(crate) fn beside(self, group: &MultiProgress) -> Meter {
        // The group would show a hidden bar.
        let bar = if self.bar.is_hidden() { self.bar } else { group.add(self.bar) };
        Meter { bar, ..self }
    }

    pub(crate) fn set_length(&self, length: u64) {
        self.bar.set_length(length);
    }

    pub(crate) fn set_position(&self, position: u64) {
        self.bar.set_position(position);
        self.moved();
    }

    pub(crate) fn inc(&self, by: u64) {
        self.bar.inc(by);
        self.moved();
    }

    pub(crate) fn position(&self) -> u64 {
        self.bar.position()
    }

    /// Forgets the speed so far.
    pub(crate) fn reset_eta(&self) {
        self.bar.reset_eta();
    }

    /// Clears the bar while something else is written.
    pub(crate) fn suspend(&self, write: impl FnOnce()) {
        self.bar.suspend(write);
    }

    /// The work is done.
    pub(crate) fn finish_and_clear(&self) {
        self.bar.finish_and_clear();
        if let Some(lines) = &self.lines {
            say_json(&self.line(lines, "finished"));
        }
    }

    /// Writes a line, if the latest one is old enough.
    fn moved(&self) {
        let Some(lines) = &self.lines else { return };
        // The thread that holds the lock writes a line.
        let Ok(mut latest) = lines.latest.try_lock() else { return };
        if latest.is_none_or(|latest| latest.elapsed() >= BETWEEN_LINES) {
            *latest = Some(Instant::now());
            say_json(&self.line(lines, "progress"));
        }
    }

    fn line(&self, lines: &Lines, event: &str) -> Value {
        let total = self.bar.length().filter(|&length| length > 0);
        json!({
            "event": event,
            "what": lines.what,
            "unit": lines.unit,
            "done": self.bar.position(),
            "total": total,
            "seconds": lines.began.elapsed().as_secs_f64(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_meters_count() {
        let meter = byte_bar("testing", 10);
        meter.inc(3);
        meter.set_position(meter.position() + 4);
        meter.set_length(20);
        let lines = Lines { what: "testing".into(), unit: "bytes", began: Instant::now(), latest: Mutex::default() };
        let line = meter.line(&lines, "progress");
        assert_eq!((&line["done"], &line["total"], &line["event"]), (&7.into(), &20.into(), &"progress".into()));
        meter.set_length(0);
        assert!(meter.line(&lines, "progress")["total"].is_null());
    }
}
