//! The progress of a batch: a bar for people at a terminal, a line now and then for those who look later, JSON for programs.

use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use serde_json::json;
use sluice_batch::Progress;
use sluice_generate::{Report, Status, Window};

use crate::error::CliError;
use crate::progress::count_bar;
use crate::terminal::{ProgressKind, can_show_bars, note, print_json_line, say_json, seconds, wishes};

/// How often somebody without a terminal is told.
const LINES: Duration = Duration::from_secs(60);
/// How often a program is told.
const EVENTS: Duration = Duration::from_secs(1);

/// Reports how far a run is.
pub(crate) struct Reporter {
    /// Whether a program reads standard output.
    json: bool,
    /// Whether a program reads standard error (`--progress json`).
    lines: bool,
    terminal: bool,
    bar: Option<ProgressBar>,
    told: Option<Instant>,
    finished: usize,
}

impl Reporter {
    pub(crate) fn new(json: bool) -> Self {
        let wishes = wishes();
        let lines = wishes.progress == ProgressKind::Json && !wishes.is_quiet;
        let terminal = wishes.progress == ProgressKind::Auto && !wishes.is_quiet && can_show_bars();
        Reporter { json, lines, terminal, bar: None, told: None, finished: 0 }
    }

    /// Reports, if it is time to.
    pub(crate) fn report(
        &mut self,
        progress: &Progress,
        status: &Status,
        report: Option<&Report>,
    ) -> Result<(), CliError> {
        let window = report.and_then(|report| report.window.as_ref());
        let union = report.and_then(|report| union_of_experts(status, report));
        if self.json || self.lines {
            let has_more = std::mem::replace(&mut self.finished, progress.finished) != progress.finished;
            if has_more || self.is_time(EVENTS) {
                self.told = Some(Instant::now());
                let event = json!({
                    "event": "progress",
                    "progress": progress,
                    "sequences": sequences(status),
                    "prompt_tokens_per_second": status.prompt_tokens_per_second,
                    "drive_bytes_per_second": window.map(|window| window.drive_bytes_per_second),
                    "hit_rate": window.and_then(|window| window.hit_rate),
                    "union_of_experts": union,
                    "restored_tokens": status.totals.restored_tokens,
                });
                if self.lines {
                    say_json(&event);
                }
                return if self.json { print_json_line(&event) } else { Ok(()) };
            }
            return Ok(());
        }
        let line = describe(progress, status, window, union);
        if self.terminal {
            let bar = self.bar.get_or_insert_with(|| count_bar("answering", progress.requests as u64));
            bar.set_position(progress.finished as u64);
            bar.set_message(line);
        } else if self.is_time(LINES) {
            self.told = Some(Instant::now());
            note(&format_args!("{} of {} done; {line}", progress.finished, progress.requests));
        }
        Ok(())
    }

    fn is_time(&self, every: Duration) -> bool {
        self.told.is_none_or(|told| told.elapsed() >= every)
    }

    /// Takes the bar away.
    pub(crate) fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

/// Different experts that a step used, in the mean.
fn union_of_experts(status: &Status, report: &Report) -> Option<f64> {
    let steps = status.totals.steps;
    (steps > 0).then(|| (report.total.hits + report.total.misses) as f64 / steps as f64)
}

/// Answers that are being made, without those that wait for a place.
fn sequences(status: &Status) -> usize {
    status.reading + status.decoding
}

fn describe(progress: &Progress, status: &Status, window: Option<&Window>, union: Option<f64>) -> String {
    let (now, mean) = (progress.tokens_per_second, progress.mean_tokens_per_second);
    // Before the first answer nobody knows how long they are.
    let at_most = || progress.seconds_left_at_most.map(|left| format!("at most {} left", seconds(left)));
    // What people wait for comes first: narrow terminals cut the end.
    let mut parts: Vec<String> =
        progress.seconds_left.map(|left| format!("{} left", seconds(left))).or_else(at_most).into_iter().collect();
    parts.extend([format!("{} at a time", sequences(status)), format!("{now:.2} tokens/s (mean {mean:.2})")]);
    if status.reading > 0 {
        parts.push(format!("reading {:.1} tokens/s", status.prompt_tokens_per_second));
    }
    if let Some(window) = window {
        parts.push(format!("drive {:.2} GB/s", window.drive_bytes_per_second / 1e9));
        parts.extend(window.hit_rate.map(|rate| format!("{:.0} % of experts in memory", 100.0 * rate)));
    }
    parts.extend(union.filter(|union| *union > 0.0).map(|union| format!("{union:.0} experts a step")));
    if progress.failed > 0 {
        parts.push(format!("{} failed", progress.failed));
    }
    parts.join(", ")
}
