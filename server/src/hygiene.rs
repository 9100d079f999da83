//! Removes the parts of prompts that agents change on every call without saying anything new.
//!
//! A model that has read a prompt need not read it again, up to the first token that differs. Agents put things at its beginning
//! that differ on every call: Claude Code adds a line for Anthropic's billing (`x-anthropic-billing-header: …; cch=…;`), others the
//! time of day. With the option [`ServerOptions::normalise`], the line is removed, and times become days, so that the prompt
//! changes once a day. Without the option, nothing that a client sends is changed.
//!
//! Times are changed only where agents describe their surroundings: in `<env>`, `<environment_context>`, `<environment_details>`,
//! `<system-reminder>` and `<CURRENT_DATETIME>`, and in lines of the system prompt that give the current date or time.

use std::borrow::Cow;
use std::sync::LazyLock;

use regex::{Captures, Regex};
use serde_json::{Map, Value};

use crate::ask::{Ask, Input};
use crate::options::ServerOptions;

/// A line for Anthropic's billing, and the empty lines after it.
static BILLING: LazyLock<Regex> =
    LazyLock::new(|| regex(r"(?im)^[ \t]*x-anthropic-billing-header:[^\n]*(?:\n(?:[ \t]*\n)*|\z)"));

/// The tags in which agents describe their surroundings.
static SURROUNDINGS: LazyLock<Regex> = LazyLock::new(|| {
    let section = |name: &str| format!("<{name}>.*?</{name}>");
    let names = ["env", "environment_context", "environment_details", "system-reminder", "CURRENT_DATETIME"];
    let sections = names.map(section);
    regex(&format!("(?s){}", sections.join("|")))
});

/// A line that gives the current date or time, or a heading to which the next line belongs.
static CURRENT: LazyLock<Regex> = LazyLock::new(|| {
    regex(r"(?im)^[^\n]*\b(?:today(?:'s date)?|current (?:date|time)|date and time|time now)\b[^\n]*(?:\n+[^\n]+)?$")
});

/// Times, in groups: the part for the day is kept, the rest is removed.
static MOMENTS: LazyLock<[Regex; 4]> = LazyLock::new(|| {
    const CLOCK: &str = r"\d{1,2}:\d{2}(?::\d{2}(?:\.\d+)?)?(?:[ \x{202F}]?[AaPp][Mm]\b)?";
    const ZONE: &str = r"(?: ?(?:Z|UTC|[A-Z]{1,3}T)\b)?(?: ?[+-]\d{1,2}(?::?\d{2})?\b)?(?: ?\([^)\n]*\))?";
    [
        // 2026-11-28T23:15:44.120Z, 2026-11-28 23:15
        format!(r"(\d{{4}}-\d{{2}}-\d{{2}})(?:T|,? (?:at )?){CLOCK}{ZONE}"),
        // 11/28/2026, 11:15:44 PM (Europe/Berlin, UTC+1:00)
        format!(r"(\d{{1,2}}/\d{{1,2}}/\d{{4}}),? (?:at )?{CLOCK}{ZONE}"),
        // Sat Nov 28 2026 23:15:44 GMT+0100 (Central European Standard Time)
        format!(r"((?:[A-Z][a-z]+,? )?[A-Z][a-z]{{2,8}} \d{{1,2}},? \d{{4}}),? (?:at )?{CLOCK}{ZONE}"),
        // Sat Nov 28 23:15:44 UTC 2026
        format!(r"((?:[A-Z][a-z]{{2}} )?[A-Z][a-z]{{2}} [ \d]?\d) {CLOCK}(?: [A-Z]{{3,4}})?( \d{{4}})"),
    ]
    .map(|pattern| regex(&pattern))
});

fn regex(pattern: &str) -> Regex {
    Regex::new(pattern).expect("the pattern is a regular expression, as the tests show")
}

/// Normalises a request, if the server's options ask for it.
pub fn apply(options: &ServerOptions, ask: &mut Ask) {
    if let Input::Chat(chat) | Input::After { chat, .. } = &mut ask.input
        && options.normalise
    {
        chat.messages.iter_mut().for_each(|message| normalise(&mut message.fields));
    }
}

/// Normalises a message of the system or of a user. Messages of the assistant and of tools do not change.
pub fn normalise(message: &mut Map<String, Value>) {
    let system = match message.get("role").and_then(Value::as_str) {
        Some("system" | "developer") => true,
        Some("user") => false,
        _ => return,
    };
    match message.get_mut("content") {
        Some(Value::String(text)) => *text = text_of(text, system),
        Some(Value::Array(parts)) => {
            for part in parts.iter_mut() {
                if let Some(Value::String(text)) = part.get_mut("text") {
                    *text = text_of(text, system);
                }
            }
            // A part that consisted of the line alone.
            parts.retain(|part| !system || part.get("text").is_none_or(|text| text != ""));
        }
        _ => {}
    }
}

fn text_of(text: &str, system: bool) -> String {
    let day = |found: &Captures<'_>| days(&found[0]).into_owned();
    let text = SURROUNDINGS.replace_all(text, day);
    if !system {
        return text.into_owned();
    }
    let text = CURRENT.replace_all(&text, day);
    BILLING.replace_all(&text, "").into_owned()
}

/// A text with days instead of times.
fn days(text: &str) -> Cow<'_, str> {
    MOMENTS.iter().fold(Cow::Borrowed(text), |text, pattern| match pattern.replace_all(&text, DayOf) {
        Cow::Borrowed(_) => text,
        Cow::Owned(changed) => Cow::Owned(changed),
    })
}

/// Keeps the groups of a match.
struct DayOf;

impl regex::Replacer for DayOf {
    fn replace_append(&mut self, found: &Captures<'_>, out: &mut String) {
        found.iter().skip(1).flatten().for_each(|group| out.push_str(group.as_str()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn normalised(role: &str, content: Value) -> Value {
        let mut message = Map::from_iter([("role".into(), role.into()), ("content".into(), content)]);
        normalise(&mut message);
        message["content"].clone()
    }

    #[test]
    fn the_line_for_billing_goes() {
        let prompt = |version: &str, cch: &str| {
            format!(
                "x-anthropic-billing-header: cc_version=2.1.177.{version}; cc_entrypoint=cli; cch={cch};\n\nYou are Claude Code, \
                 Anthropic's official CLI for Claude.\n\nHere is the environment."
            )
        };
        let first = normalised("system", prompt("01c", "36ee5").into());
        assert_eq!(first, normalised("system", prompt("9fb", "0aaa9").into()));
        assert!(first.as_str().unwrap().starts_with("You are Claude Code"));
        let alone = json!([
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.37.0d9; cc_entrypoint=cli; cch=fa690;"},
            {"type": "text", "text": "You are Claude Code."},
        ]);
        assert_eq!(normalised("system", alone), json!([{"type": "text", "text": "You are Claude Code."}]));
        let quoted = "What is x-anthropic-billing-header: cc_version=2?";
        assert_eq!(normalised("system", quoted.into()), quoted, "in the middle of a line it is text");
        let users = "x-anthropic-billing-header: a; cch=b;";
        assert_eq!(normalised("user", users.into()), users, "a user may ask about it");
    }

    #[test]
    fn moments_become_days_where_agents_describe_surroundings() {
        let within = |text: &str| {
            let text = normalised("user", format!("<environment_details>\n{text}\n</environment_details>").into());
            text.as_str().unwrap().lines().nth(1).unwrap().to_owned()
        };
        for (moment, day) in [
            ("2026-11-28T23:15:44.120Z", "2026-11-28"),
            ("2026-11-28 23:15:44 +01:00 (CET)", "2026-11-28"),
            ("11/28/2026, 11:15:44 PM (Europe/Berlin, UTC+1:00)", "11/28/2026"),
            ("Sat Nov 28 2026 23:15:44 GMT+0100 (Central European Standard Time)", "Sat Nov 28 2026"),
            ("Saturday, November 28, 2026 at 11:15 PM", "Saturday, November 28, 2026"),
            ("Sat Nov 28 23:15:44 UTC 2026", "Sat Nov 28 2026"),
            ("Tuesday, June 9, 2026, 03:04:20 PM +03:00", "Tuesday, June 9, 2026"),
            ("It was 2026-11-28 23:15 or so", "It was 2026-11-28 or so"),
            ("Today's date: 2026-11-28", "Today's date: 2026-11-28"),
            ("src/main.rs:12:30 is wrong", "src/main.rs:12:30 is wrong"),
            ("It is 2026-11-28T23:15:44Z, said he.", "It is 2026-11-28, said he."),
        ] {
            assert_eq!(within(moment), day, "{moment}");
        }
    }

    /// Lines of the system prompts of agents: pi, hermes, kimi-code, nanobot, OpenHands, OpenCode.
    #[test]
    fn lines_that_say_the_current_time_say_the_day() {
        for (line, day) in [
            (
                "Current date and time: Monday, March 9, 2026 at 06:00:31 PM PDT",
                "Current date and time: Monday, March 9, 2026",
            ),
            ("Current time: 2026-07-09 08:15:42 EDT (Thursday)", "Current time: 2026-07-09"),
            (
                "The current date and time in ISO format is `2026-08-02T10:11:12.345+08:00`. It does not update.",
                "The current date and time in ISO format is `2026-08-02`. It does not update.",
            ),
            ("## Current Time\n2026-02-06 10:11 (Friday)\n\nBe brief.", "## Current Time\n2026-02-06\n\nBe brief."),
            (
                "<CURRENT_DATETIME>\nThe current date and time is: 2026-06-11T00:44:42.714237\n</CURRENT_DATETIME>",
                "<CURRENT_DATETIME>\nThe current date and time is: 2026-06-11\n</CURRENT_DATETIME>",
            ),
            (
                "<env>\n  Working directory: /src\n  Today's date: Sat Nov 28 2026\n</env>",
                "<env>\n  Working directory: /src\n  Today's date: Sat Nov 28 2026\n</env>",
            ),
        ] {
            assert_eq!(normalised("system", line.into()), day);
        }
    }

    #[test]
    fn elsewhere_moments_are_text() {
        let log = "Why did it fail at 2026-11-28T23:15:44Z?\n<system-reminder>\nThe time is 2026-11-28T23:20:00Z.\n</system-reminder>";
        let expected = log.replace("T23:20:00Z", "");
        assert_eq!(normalised("user", log.into()), expected);
        assert_eq!(normalised("tool", log.into()), log);
        assert_eq!(normalised("assistant", log.into()), log);
        let system = "Logs begin at 2026-11-01 10:00:00.\nCurrent time: 2026-11-28 23:15:44 UTC\nBe brief.";
        let expected = "Logs begin at 2026-11-01 10:00:00.\nCurrent time: 2026-11-28\nBe brief.";
        assert_eq!(normalised("system", system.into()), expected);
    }

    #[test]
    fn nothing_is_changed_unless_it_is_asked_for() {
        let text = "x-anthropic-billing-header: cc_version=1; cch=00000;\nCurrent time: 2026-11-28 23:15:44";
        let chat = |text: &str| crate::ask::Chat {
            messages: vec![sluice_text::Message::new("system", text)],
            ..crate::ask::Chat::default()
        };
        for (normalise, expected) in [(false, text), (true, "Current time: 2026-11-28")] {
            let mut ask = Ask { input: Input::Chat(chat(text)), ..Ask::default() };
            apply(&ServerOptions { normalise, ..ServerOptions::default() }, &mut ask);
            let Input::Chat(chat) = &ask.input else { panic!() };
            assert_eq!(chat.messages[0].fields["content"], expected);
        }
    }
}
