//! Output for people: progress, errors, numbers.

use std::fmt::{Display, Write as _};
use std::io::{self, IsTerminal, Write as _};
use std::sync::OnceLock;

use serde::Serialize;
use serde_json::json;

use crate::error::CliError;

/// The user's choice of output on standard error.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Wishes {
    /// Only errors.
    pub(crate) is_quiet: bool,
    /// How progress is shown.
    pub(crate) progress: ProgressKind,
}

/// How progress is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum ProgressKind {
    /// Bars where standard error is a terminal
    #[default]
    Auto,
    /// One JSON object per line, including notes and errors
    Json,
    /// Nothing
    None,
}

static WISHES: OnceLock<Wishes> = OnceLock::new();

/// Keeps the user's choice, before anything is printed.
pub(crate) fn keep_wishes(wishes: Wishes) {
    // A second call has the same choice.
    let _ = WISHES.set(wishes);
}

pub(crate) fn wishes() -> Wishes {
    WISHES.get().copied().unwrap_or_default()
}

/// Whether standard error is a terminal that can move its cursor.
pub(crate) fn can_show_bars() -> bool {
    io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Whether text that goes to a stream has colours, or is bold.
pub(crate) fn is_coloured(stream: &impl IsTerminal) -> bool {
    wants_colour(|name| std::env::var(name).ok(), stream.is_terminal())
}

/// By the conventions of no-color.org and bixense.com/clicolors, in the order that clap's help follows as well.
pub(crate) fn wants_colour(variable: impl Fn(&str) -> Option<String>, is_terminal: bool) -> bool {
    let given = |name| variable(name).filter(|value| !value.is_empty());
    let is_on = |value: String| value != "0";
    if given("NO_COLOR").is_some() {
        return false;
    }
    if given("CLICOLOR_FORCE").is_some_and(is_on) {
        return true;
    }
    given("CLICOLOR").is_none_or(is_on) && given("TERM").is_none_or(|term| term != "dumb") && is_terminal
}

/// Most lines of an error or remark, and most characters of a line: about a screenful. The author of a file can make a name in it
/// as long as they like.
const MOST_LINES: usize = 24;
const MOST_CHARACTERS: usize = 1200;

/// Whether a character could make a terminal do something other than begin a line: control characters, and those that change the
/// order in which others are shown.
fn is_command(c: char) -> bool {
    let reorders = matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{206f}');
    c != '\n' && (c.is_control() || reorders || matches!(c, '\u{2028}' | '\u{2029}'))
}

/// A message without control characters other than line ends. Names in files come from strangers, and an escape sequence in one
/// could rewrite the terminal.
pub(crate) fn printable(message: &dyn Display) -> String {
    shown(&message.to_string(), is_command)
}

/// The text with the hidden characters as escapes, such as `\u{1b}`.
fn shown(text: &str, hidden: impl Fn(char) -> bool) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match hidden(c) {
            true if c.is_control() => out.extend(c.escape_default()),
            true => out.extend(c.escape_unicode()),
            false => out.push(c),
        }
    }
    out
}

/// A printable message of at most a screenful. The middle of long lines, and of many lines, is left out, because the problem is at
/// the beginning and the advice at the end.
fn screenful(message: &dyn Display) -> String {
    let text = printable(message);
    let lines: Vec<&str> = text.lines().collect();
    let (head, tail) = match lines.len().checked_sub(MOST_LINES) {
        None | Some(0) => (lines.as_slice(), &[][..]),
        Some(_) => (&lines[..MOST_LINES / 2], &lines[lines.len() - MOST_LINES / 2..]),
    };
    let mut out: Vec<_> = head.iter().map(|line| shortened(line)).collect();
    if !tail.is_empty() {
        out.push(format!("[… {} lines …]", lines.len() - head.len() - tail.len()));
        out.extend(tail.iter().map(|line| shortened(line)));
    }
    let joined = out.join("\n");
    // Many long lines count as one long line.
    if joined.chars().count() > 2 * MOST_CHARACTERS { shortened(&joined) } else { joined }
}

/// A text without its middle, if it is too long.
fn shortened(text: &str) -> String {
    let count = text.chars().count();
    if count <= MOST_CHARACTERS {
        return text.to_owned();
    }
    let (head, tail) = (MOST_CHARACTERS * 2 / 3, MOST_CHARACTERS / 3);
    let at = |n: usize| text.char_indices().nth(n).map_or(text.len(), |(at, _)| at);
    format!("{}[… {} characters …]{}", &text[..at(head)], count - head - tail, &text[at(count - tail)..])
}

/// Prints an error as one paragraph on standard error.
pub(crate) fn error(message: &dyn Display) {
    if wishes().progress == ProgressKind::Json {
        return say_json(&json!({ "event": "error", "message": screenful(message) }));
    }
    let prefix = if is_coloured(&io::stderr()) { "\x1b[1;31merror:\x1b[0m" } else { "error:" };
    // If this fails, there is no way to report it.
    let _ = writeln!(io::stderr().lock(), "{prefix} {}", screenful(message));
}

/// Prints a remark on standard error.
pub(crate) fn note(message: &dyn Display) {
    match wishes() {
        Wishes { is_quiet: true, .. } => {}
        Wishes { progress: ProgressKind::Json, .. } => {
            let text = screenful(message);
            say_json(&json!({ "event": "note", "text": text.strip_prefix("note: ").unwrap_or(&text) }));
        }
        _ => {
            let _ = writeln!(io::stderr().lock(), "{}", screenful(message));
        }
    }
}

/// Prints a report that was requested on standard error.
pub(crate) fn report(text: &str) {
    if wishes().progress == ProgressKind::Json {
        return say_json(&json!({ "event": "report", "text": text }));
    }
    let _ = writeln!(io::stderr().lock(), "{}", printable(&text));
}

/// Writes one JSON object as a line to standard error.
pub(crate) fn say_json(value: &serde_json::Value) {
    let _ = writeln!(io::stderr().lock(), "{}", escape_json(&value.to_string()));
}

/// Writes a report to standard output. Names in it may come from strangers.
pub(crate) fn print(report: &str) -> Result<(), CliError> {
    print_as_is(&printable(&report))
}

/// Writes a model's text to standard output and flushes, so that a reader sees text as it arrives. A program that reads it gets
/// every byte. A terminal gets nothing that it would obey: models repeat what they have read, which somebody may have written for
/// this purpose.
pub(crate) fn print_text(text: &str) -> Result<(), CliError> {
    if io::stdout().is_terminal() { print_as_is(&text_for_terminal(text)) } else { print_as_is(text) }
}

/// Tabs and line ends are text; other control characters are escaped. A sequence that begins in one piece of a text and ends in
/// another is escaped too, because none of its characters that could begin one is left.
pub(crate) fn text_for_terminal(text: &str) -> String {
    shown(text, |c| c != '\t' && is_command(c))
}

/// Writes text that is known to be harmless to standard output.
pub(crate) fn print_as_is(text: &str) -> Result<(), CliError> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(CliError::Output)
}

/// Writes one JSON value and a line end to standard output.
pub(crate) fn print_json(value: &impl Serialize) -> Result<(), CliError> {
    let json = serde_json::to_string_pretty(value).map_err(|e| CliError::Failure(format!("cannot write JSON: {e}")))?;
    print_as_is(&(escape_json(&json) + "\n"))
}

/// Writes one JSON value on a line of its own to standard output.
pub(crate) fn print_json_line(value: &impl Serialize) -> Result<(), CliError> {
    let json = serde_json::to_string(value).map_err(|e| CliError::Failure(format!("cannot write JSON: {e}")))?;
    print_as_is(&(escape_json(&json) + "\n"))
}

/// A single-precision number for JSON: the shortest form with the same value, not 0.699999988079071 for 0.7.
pub(crate) fn json_number(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

/// JSON without DEL and the control characters beyond ASCII, which serde does not escape, but some of which terminals obey. Except
/// for line ends, they occur only in strings.
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

/// `value` in percent of `whole`; 0 if `whole` is 0.
pub(crate) fn percent(value: f64, whole: f64) -> f64 {
    if whole > 0.0 { 100.0 * value / whole } else { 0.0 }
}

/// How many there are of something: `1 expert`, `2 experts`.
pub(crate) fn counted(count: impl TryInto<u64>, what: &str) -> String {
    // More than can be counted are several.
    match count.try_into().unwrap_or(u64::MAX) {
        1 => format!("1 {what}"),
        count => format!("{count} {what}s"),
    }
}

/// The size of each of several things, in words: the smallest and the largest.
pub(crate) fn each(smallest: String, largest: String) -> String {
    if smallest == largest { format!("{largest} each") } else { format!("{smallest} to {largest} each") }
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
    fn colours_follow_the_conventions() {
        let colours = |variables: &[(&str, &str)], is_terminal| {
            let find = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned());
            wants_colour(find, is_terminal)
        };
        assert!(colours(&[], true) && !colours(&[], false));
        assert!(!colours(&[("NO_COLOR", "1")], true) && colours(&[("NO_COLOR", "")], true));
        assert!(!colours(&[("CLICOLOR", "0")], true) && colours(&[("CLICOLOR", "1")], true));
        assert!(!colours(&[("CLICOLOR", "1")], false));
        assert!(colours(&[("CLICOLOR_FORCE", "1")], false) && !colours(&[("CLICOLOR_FORCE", "0")], false));
        assert!(colours(&[("CLICOLOR_FORCE", "1"), ("CLICOLOR", "0"), ("TERM", "dumb")], false));
        assert!(!colours(&[("CLICOLOR_FORCE", "1"), ("NO_COLOR", "1")], true));
        assert!(!colours(&[("TERM", "dumb")], true));
    }

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
        assert_eq!(printable(&"a\u{202e}b\u{2066}"), "a\\u{202e}b\\u{2066}");
        assert_eq!(text_for_terminal("\ta\u{1b}]0;x\u{7}\r\nb\u{9d}\u{e4}"), "\ta\\u{1b}]0;x\\u{7}\\r\nb\\u{9d}\u{e4}");
    }

    #[test]
    fn sequences_are_shown_wherever_a_text_is_cut() {
        // A colour, a window's name, the clipboard, a link, C1 controls with their strings, a charset, a reset, reversed text.
        let hostile = "\u{1b}[31m\u{1b}]0;x\u{7}\u{1b}]52;c;QQ==\u{1b}\\\u{1b}]8;;http://x\u{1b}\\link\u{9b}2J\u{9d}0;x\u{9c}\
                       \u{90}q\u{9c}\u{1b}(0\u{1b}c\u{e}\u{f}\u{8}\r\u{202e}abc\u{202c}\u{2067}\u{206b}\u{85}\u{7f}ä日👩‍👩‍👧";
        let whole = text_for_terminal(hostile);
        assert!(!whole.contains(|c: char| c.is_control() || is_command(c)), "{whole:?}");
        assert!(whole.ends_with("\\u{7f}ä日👩‍👩‍👧"), "what people write stays: {whole}");
        for (at, _) in hostile.char_indices() {
            let (before, behind) = hostile.split_at(at);
            assert_eq!(text_for_terminal(before) + &text_for_terminal(behind), whole);
        }
    }

    #[test]
    fn messages_are_cut_to_a_screenful() {
        assert_eq!(screenful(&"short\n  and whole"), "short\n  and whole");
        let long = screenful(&format!("begin{}end", "x".repeat(1 << 20)));
        assert!(long.starts_with("begin") && long.ends_with("end") && long.contains("characters"), "{long}");
        assert!(long.chars().count() < MOST_CHARACTERS + 40);
        let tall = screenful(&(0..10_000).map(|i| format!("line {i}\n")).collect::<String>());
        assert!(tall.starts_with("line 0\n") && tall.ends_with("line 9999") && tall.lines().count() < 30, "{tall}");
        let both = screenful(&format!("{}\n", "y".repeat(5_000)).repeat(500));
        assert!(both.chars().count() < 2 * MOST_CHARACTERS + 100);
        let escapes = screenful(&"\u{1b}".repeat(1 << 16));
        assert!(escapes.len() < 2 * MOST_CHARACTERS);
    }

    #[test]
    fn single_precision_is_shown_as_it_was_given() {
        assert_eq!(json_number(0.7).to_string(), "0.7");
        assert_eq!(json_number(1.0), 1.0);
        assert_eq!(json_number(f32::MIN_POSITIVE) as f32, f32::MIN_POSITIVE);
    }

    #[test]
    fn percent_of_nothing() {
        assert_eq!(percent(1.0, 0.0), 0.0);
        assert_eq!(percent(1.0, 4.0), 25.0);
    }
}
