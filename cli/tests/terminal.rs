//! What a model says cannot command the terminal that shows it.

use std::fs::{self, File};
use std::io::Read as _;
use std::process::{Command, Stdio};

use crate::common::{copy_checkpoint, open_terminal, sluice, stdout};
use serde_json::Value;

/// A token that the demo model writes often.
const FREQUENT: u64 = 17;
/// ` ESC ]0;owned BEL`, in the alphabet of byte-level tokenizers: it names a terminal's window.
const ESCAPE: &str = "\u{120}\u{11b}]0;owned\u{107}";

/// The demo's tokenizer, in which a frequent token is an escape sequence.
fn hostile_tokenizer(json: &[u8]) -> Value {
    let mut tokenizer: Value = serde_json::from_slice(json).unwrap();
    let vocab = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    let word = vocab.iter().find(|(_, id)| **id == FREQUENT).unwrap().0.clone();
    vocab.remove(&word);
    vocab.insert(ESCAPE.into(), FREQUENT.into());
    let uses = |merge: &Value| match merge {
        Value::String(pair) => pair.split(' ').any(|part| part == word),
        pair => pair.as_array().unwrap().iter().any(|part| *part == *word),
    };
    tokenizer["model"]["merges"].as_array_mut().unwrap().retain(|merge| !uses(merge));
    tokenizer
}

#[test]
fn escape_sequences_reach_programs_and_no_terminal() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("checkpoint");
    copy_checkpoint(&source, None);
    let tokenizer = source.join("tokenizer.json");
    let hostile = hostile_tokenizer(&fs::read(&tokenizer).unwrap());
    fs::write(&tokenizer, hostile.to_string()).unwrap();
    let model = folder.path().join("m.sluice");
    stdout(&sluice(&["convert", source.to_str().unwrap(), model.to_str().unwrap()]));

    let args = ["run", model.to_str().unwrap(), "--prompt", "ROMEO:", "-n", "120", "--temperature", "0", "--forget"];
    let piped = stdout(&sluice(&args));
    assert!(piped.contains("\u{1b}]0;owned\u{7}"), "{piped:?}");

    let terminal = open_terminal(None);
    let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
    command.args(args).stdin(Stdio::null()).stdout(terminal.slave).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    // The last of ours: a terminal ends when nobody can write to it.
    drop(command);
    let mut shown = Vec::new();
    // On Linux it ends with an error.
    let _ = File::from(terminal.master).read_to_end(&mut shown);
    assert!(child.wait().unwrap().success());
    let shown = String::from_utf8(shown).unwrap();
    assert!(shown.contains("\\u{1b}]0;owned\\u{7}"), "{shown:?}");
    assert!(!shown.contains(['\u{1b}', '\u{7}']), "{shown:?}");
    // Line ends are line ends: a terminal makes them \r\n.
    let unescaped = shown.replace("\r\n", "\n").replace("\\u{1b}", "\u{1b}").replace("\\u{7}", "\u{7}");
    assert_eq!(unescaped, piped);
}
