//! What was probably meant by a word in the place of a command that is none.

use std::ffi::OsString;
use std::path::Path;

use clap::Command;
use clap::error::{ContextKind, ContextValue};
use sluice_converter::synth::Geometry;

use crate::chat::nearest;

/// Words that other programs use, or that come to mind first, and what they are called here.
const ALSO_CALLED: [(&str, &str); 28] = [
    ("benchmark", "bench"),
    ("check", "verify"),
    ("complete", "run"),
    ("delete", "rm"),
    ("diagnose", "doctor"),
    ("download", "pull"),
    ("edit", "set"),
    ("estimate", "plan"),
    ("generate", "run"),
    ("get", "pull"),
    ("import", "convert"),
    ("infer", "run"),
    ("info", "inspect"),
    ("ls", "list"),
    ("models", "list"),
    ("ppl", "perplexity"),
    ("quantise", "convert"),
    ("quantize", "convert"),
    ("remove", "rm"),
    ("server", "serve"),
    ("show", "inspect"),
    ("start", "serve"),
    ("stripe", "restripe"),
    ("talk", "chat"),
    ("tokenise", "tokenize"),
    ("uninstall", "rm"),
    ("ver", "--version"),
    ("version", "--version"),
];

/// A refusal of a word in the place of a command, with what was probably meant; another refusal as it is. `arguments`: those of the
/// command line, without the program. `text`: the refusal, as clap writes it.
pub(crate) fn with_meant(root: &Command, refused: &clap::Error, arguments: &[OsString], text: &str) -> String {
    let Some(ContextValue::String(word)) = refused.get(ContextKind::InvalidSubcommand) else { return text.to_owned() };
    let parent = parent(root, arguments, word);
    let is_root = parent.get_name() == root.get_name();
    let tip = match is_root.then(|| elsewhere(word)).flatten() {
        Some(tip) => tip,
        // What clap has found is as good.
        None if refused.get(ContextKind::SuggestedSubcommand).is_some() => return text.to_owned(),
        None => {
            let names: Vec<&str> = parent.get_subcommands().map(Command::get_name).collect();
            match nearest(word, &names) {
                Some(near) => format!("a similar subcommand exists: '{near}'"),
                None => return text.to_owned(),
            }
        }
    };
    let (first, rest) = text.split_once('\n').unwrap_or((text, ""));
    let rest: Vec<&str> = rest.lines().skip_while(|line| line.is_empty() || line.starts_with("  tip:")).collect();
    format!("{first}\n\n  tip: {tip}\n\n{}", rest.join("\n"))
}

/// The command whose own commands a word is none of.
fn parent<'a>(root: &'a Command, arguments: &[OsString], word: &str) -> &'a Command {
    let before = arguments.iter().map_while(|argument| argument.to_str().filter(|argument| *argument != word));
    let mut at = root;
    for argument in before {
        match at.find_subcommand(argument) {
            Some(inner) if inner.has_subcommands() => at = inner,
            _ => {}
        }
    }
    at
}

/// What a word means that is neither a command nor similar to one: another name of a command, a model, or a file.
fn elsewhere(word: &str) -> Option<String> {
    let lower = word.to_lowercase();
    if let Some((_, name)) = ALSO_CALLED.iter().find(|(other, _)| *other == lower) {
        return Some(format!("this is called 'sluice {name}' here"));
    }
    if Geometry::presets().any(|name| name == lower) {
        return Some(format!("a command comes first: 'sluice plan {lower}'"));
    }
    let path = Path::new(word);
    let has_ending = |endings: &[&str]| path.extension().is_some_and(|e| endings.iter().any(|ending| e == *ending));
    let is_source = has_ending(&["gguf", "safetensors"]) || path.is_dir();
    let is_path = is_source || has_ending(&["sluice"]) || word.contains('/') || path.exists();
    let word = if word.contains(' ') { format!("\"{word}\"") } else { word.to_owned() };
    if is_source {
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        let name = if name.is_empty() || name.contains(' ') { "model".into() } else { name };
        return Some(format!("a command comes first: 'sluice convert {word} {name}.sluice'"));
    }
    (is_path || word.starts_with("hf:"))
        .then(|| format!("a command comes first: 'sluice run {word} --prompt \"…\"', or 'sluice chat {word}'"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_have_a_meaning() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().to_str().unwrap();
        for (word, meant) in [
            ("models", "'sluice list'"),
            ("LS", "'sluice list'"),
            ("version", "'sluice --version'"),
            ("model.sluice", "'sluice run model.sluice --prompt \"…\"'"),
            ("my model.sluice", "run \"my model.sluice\" --prompt"),
            ("some/where/model", "'sluice run some/where/model --prompt"),
            ("hf:a/b", "'sluice chat hf:a/b'"),
            ("a.gguf", "'sluice convert a.gguf a.sluice'"),
            (folder, "'sluice convert "),
            ("deepseek-r1", "'sluice plan deepseek-r1'"),
        ] {
            let said = elsewhere(word).unwrap_or_default();
            assert!(said.contains(meant), "{word}: {said}");
        }
        assert_eq!(elsewhere("rnu"), None);
    }

    #[test]
    fn other_names_are_those_of_commands() {
        let root = <crate::Cli as clap::CommandFactory>::command();
        for (other, name) in ALSO_CALLED {
            assert!(root.find_subcommand(other).is_none(), "{other} is a command");
            assert!(name == "--version" || root.find_subcommand(name).is_some(), "{name} is no command");
        }
        assert!(ALSO_CALLED.is_sorted(), "in the order of the alphabet");
    }
}
