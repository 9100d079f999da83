//! What people see: progress, errors, numbers.

use std::fmt::{Display, Write as _};
use std::io::{self, IsTerminal, Write as _};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::error::CliError;

/// A message without control characters other than line ends: names in files come from strangers, and an escape sequence in
/// one could rewrite the terminal.
pub(crate) fn printable(message: &dyn Display) -> String {
    let mut out = String::new();
    for c in message.to_string().chars() {
        match c {
            '\n' => out.push(c),
            c if c.is_control() => out.extend(c.escape_default()),
            c => out.push(c),
        }
    }
    out
}

/// Prints an error as one paragraph on standard error.
pub(crate) fn error(message: &dyn Display) {
    let mut err = io::stderr().lock();
    let prefix = if err.is_terminal() { "\x1b[1;31merror:\x1b[0m" } else { "error:" };
    // Nobody is left to tell when this fails.
    let _ = writeln!(err, "{prefix} {}", printable(message));
}

/// Prints a remark on standard error.
pub(crate) fn note(message: &dyn Display) {
    let _ = writeln!(io::stderr().lock(), "{}", printable(message));
}

/// Writes to standard output and flushes, so that a reader sees text as it comes.
pub(crate) fn print(text: &str) -> Result<(), CliError> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(CliError::Output)
}

/// Writes one JSON value and a line end to standard output.
pub(crate) fn print_json(value: &impl Serialize) -> Result<(), CliError> {
    let json = serde_json::to_string_pretty(value).map_err(|e| CliError::Failure(format!("cannot write JSON: {e}")))?;
    print(&(escape_json(&json) + "\n"))
}

/// JSON without the control characters beyond ASCII and the DEL that serde leaves as they are: terminals obey some of them. All
/// but line ends stand in strings.
fn escape_json(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        if c.is_control() && c != '\n' {
            let _ = write!(out, "\\u{:04x}", u32::from(c));
        } else {
            out.push(c);
        }
    }
    out
}

/// A progress bar on standard error: nothing at all when that is not a terminal.
fn bar(length: u64, template: &str) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::with_draw_target(Some(length), ProgressDrawTarget::stderr_with_hz(10));
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("━━╌"));
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// Progress through bytes, with rate and remaining time.
pub(crate) fn byte_bar(what: &'static str, bytes: u64) -> ProgressBar {
    let template = "{prefix:.bold} {bar:32.cyan} {bytes} of {total_bytes}  {binary_bytes_per_sec}  {eta} left";
    bar(bytes, template).with_prefix(what)
}

/// Progress through steps, with the time remaining.
pub(crate) fn step_bar(what: impl Into<std::borrow::Cow<'static, str>>, steps: u64) -> ProgressBar {
    bar(steps, "{prefix:.bold} {bar:32.cyan} {percent} %  {eta} left").with_prefix(what)
}

/// A sign of life, for work whose length is not known.
pub(crate) fn spinner(what: &'static str) -> ProgressBar {
    bar(0, "{spinner} {prefix} ({elapsed})").with_prefix(what)
}

/// `value` of `whole` in percent, 0 when there is no whole.
pub(crate) fn percent(value: f64, whole: f64) -> f64 {
    if whole > 0.0 { 100.0 * value / whole } else { 0.0 }
}

/// Seconds with a precision that suits their size.
pub(crate) fn seconds(seconds: f64) -> String {
    match seconds {
        s if s < 0.1 => format!("{:.1} ms", s * 1e3),
        s if s < 100.0 => format!("{s:.2} s"),
        s => format!("{:.0} min {:02.0} s", (s / 60.0).floor(), s % 60.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_well() {
        let shown: Vec<_> = [0.0123, 1.5, 99.0, 130.0].into_iter().map(seconds).collect();
        assert_eq!(shown, ["12.3 ms", "1.50 s", "99.00 s", "2 min 10 s"]);
    }

    #[test]
    fn control_characters_are_shown_not_sent() {
        let hostile = "a\u{1b}[2J\r\u{7f}\u{9b}1m\u{e4}\nb";
        assert_eq!(printable(&hostile), "a\\u{1b}[2J\\r\\u{7f}\\u{9b}1m\u{e4}\nb");
        let json = escape_json(&serde_json::to_string(hostile).unwrap());
        assert!(!json.contains(char::is_control), "{json}");
        assert_eq!(serde_json::from_str::<String>(&json).unwrap(), hostile);
    }

    #[test]
    fn percent_of_nothing() {
        assert_eq!(percent(1.0, 0.0), 0.0);
        assert_eq!(percent(1.0, 4.0), 25.0);
    }
}
