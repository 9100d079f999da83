//! Grammars of calls of gpt-oss.

use super::write::{Writer, schema};
use crate::tools::Tool;

/// The tokens of the format.
pub(super) const MARKERS: [&str; 6] =
    ["<|channel|>", "<|message|>", "<|constrain|>", "<|start|>", "<|end|>", "<|call|>"];

/// The whole answer: thinking, then a call, or text if that is allowed. The token that ends a call ends the answer, and is not part
/// of the grammar.
pub(super) fn start(writer: &mut Writer<'_>, tools: &[&Tool], may_speak: bool) -> String {
    let next = writer.literal("<|start|>assistant");
    let thought = writer.until("thought", "<|end|>");
    let analysis = format!("{} {thought} {next}", writer.literal("<|channel|>analysis<|message|>"));
    writer.rule("analysis", &analysis);
    let mut calls = Vec::new();
    for (i, tool) in tools.iter().enumerate() {
        let arguments = writer.json(&format!("arguments_{i}"), &schema(tool));
        let header = format!("<|channel|>commentary to=functions.{} <|constrain|>json<|message|>", tool.name);
        calls.push(format!("{} {arguments}", writer.literal(&header)));
    }
    writer.rule("call", &calls.join(" | "));
    if !may_speak {
        return "analysis* call".to_owned();
    }
    let spoken = writer.until("spoken", "<|end|>");
    let preamble = format!("{} {spoken} {next}", writer.literal("<|channel|>commentary<|message|>"));
    writer.rule("preamble", &preamble);
    writer.rule("TEXT", "/(?s:.*)/");
    let last = format!("{} TEXT", writer.literal("<|channel|>final<|message|>"));
    writer.rule("last", &last);
    "( analysis | preamble )* ( call | last )".to_owned()
}
