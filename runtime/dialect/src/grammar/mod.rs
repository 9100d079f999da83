//! Grammars that let a model make only allowed calls.
//!
//! They are in llguidance's dialect of Lark (<https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md>). Its lexer takes
//! the longest lexeme and never backtracks, except for rules marked `lazy`, which end at their first match; text up to a marker is
//! such a rule. Special tokens are not text for the lexer: they are written as ids (`<[17]>`), and text before them ends with them.
//!
//! A strict tool's arguments follow its schema. If a family writes them as tags, parameters come in the order of the schema, values
//! that may be strings are constrained only by `enum` and `const`, and MiniMax M3's nested values and all of Gemma 4's arguments
//! are free. The arguments of other tools are any object.

mod calls;
mod harmony;
#[cfg(test)]
mod tests;
mod write;

use calls::{Entry, entries};
use write::Writer;

use crate::syntax::{self, Calls, Fields, Named, Objects, Parameter, Syntax, Tagged};
use crate::tools::{Tool, ToolChoice, Tools};

/// Tokens of a family's format that may be special tokens.
pub(crate) fn markers(syntax: &Syntax) -> Vec<&'static str> {
    let mut markers = vec![syntax.think.open, syntax.think.close];
    markers.extend(syntax.section.iter().flat_map(|section| [section.open, section.close]));
    match &syntax.calls {
        Calls::Objects(Objects { open, close, .. }) => markers.extend([*open].into_iter().chain(*close)),
        Calls::Named(Named { open, separator, close }) => {
            markers.extend([*open, separator].into_iter().chain(*close));
        }
        Calls::Tagged(Tagged { open, close, parameter, name_ends, .. }) => {
            markers.extend([*open, close]);
            markers.extend(name_ends.iter().map(|(end, _)| *end).filter(|end| end.starts_with('<')));
            if let Parameter::Plain { value, middle, close, open, .. } = parameter {
                markers.extend([*open, middle, value, close]);
            }
        }
        Calls::Fields(Fields { open, close, .. }) => markers.extend([*open, close, syntax::QUOTE, "<|channel>"]),
        Calls::Python => {}
        Calls::Harmony => markers.extend(harmony::MARKERS),
    }
    // Parts of markers that are separate tokens.
    markers.extend(["｜DSML｜", syntax::M3, "<tool_call>", "</tool_call>"]);
    markers.retain(|marker| !marker.is_empty());
    markers.sort_unstable();
    markers.dedup();
    markers
}

/// A grammar for the whole answer, or `None` if nothing needs to be constrained.
pub(crate) fn tool_grammar(
    syntax: &'static Syntax,
    special: &[(&'static str, u32)],
    tools: &Tools,
    (choice, parallel): (&ToolChoice, bool),
    prompt_tail: &str,
) -> Option<String> {
    let allowed: Vec<&Tool> = match choice {
        ToolChoice::None => return None,
        ToolChoice::Auto if tools.iter().all(|tool| !tool.strict) => return None,
        ToolChoice::Auto | ToolChoice::Required => tools.iter().collect(),
        ToolChoice::Named(name) => tools.get(name).into_iter().collect(),
    };
    if allowed.is_empty() {
        return None;
    }
    let may_speak = *choice == ToolChoice::Auto;
    let mut writer = Writer::new(syntax, special);
    let start = match syntax.calls {
        Calls::Harmony => harmony::start(&mut writer, &allowed, may_speak),
        _ => {
            let entries = entries(&mut writer, &allowed, parallel);
            let thinks = prompt_tail.trim_end().ends_with(syntax.think.open);
            start(&mut writer, &entries, thinks, may_speak)
        }
    };
    Some(format!("start: {start}\n{}", writer.finish()))
}

/// The whole answer: thinking, then calls, or text if that is allowed.
fn start(writer: &mut Writer<'_>, entries: &[Entry], thinks: bool, may_speak: bool) -> String {
    let syntax = writer.syntax;
    let body = body(writer, entries, may_speak);
    let mut alternatives = Vec::new();
    let open = match thinks {
        true => String::new(),
        false => format!("{} ", writer.literal(syntax.think.open)),
    };
    let thought = writer.until("thought", syntax.think.close);
    alternatives.push(format!("{open}{thought} body"));
    if syntax.calls_end_thinking {
        for (i, entry) in entries.iter().enumerate() {
            let thought = writer.until(&format!("thought_{i}"), &entry.marker);
            alternatives.push(format!("{open}{thought} {}", entry.behind));
        }
    }
    if !thinks {
        alternatives.push("body".to_owned());
    }
    writer.rule("body", &body);
    alternatives.join(" | ")
}

/// The part after thinking.
fn body(writer: &mut Writer<'_>, entries: &[Entry], may_speak: bool) -> String {
    let bare = matches!(writer.syntax.calls, Calls::Objects(Objects { bare: true, .. }) | Calls::Python);
    if !may_speak || bare {
        // The first one is the form that the family's template writes.
        let entry = &entries[0];
        let call = format!("{} {}", writer.literal(&entry.marker), entry.behind);
        writer.rule("LINES", "/\\n{1,4}/");
        return match may_speak {
            // Text that cannot be taken for a call.
            true => {
                writer.rule("TEXT", "/(\\s*[^\\s{\\[](?s:.*))?/");
                format!("LINES? {call} | TEXT")
            }
            false => format!("LINES? {call}"),
        };
    }
    writer.rule("TEXT", "/(?s:.*)/");
    let mut alternatives = vec!["TEXT".to_owned()];
    for (i, entry) in entries.iter().enumerate() {
        let spoken = writer.until(&format!("spoken_{i}"), &entry.marker);
        alternatives.push(format!("{spoken} {}", entry.behind));
    }
    alternatives.join(" | ")
}
