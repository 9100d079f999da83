//! `sluice chat` under a pseudo-terminal: what is typed, and what the screen shows and the drive has afterwards.

use crate::common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use crate::common::{assert_fails, sluice, stderr, stdout};
use crate::pty::Terminal;
use nix::sys::signal::Signal;
use serde_json::Value;
use sluice_model::memory::Bytes;
use sluice_model::{Engine, EngineOptions, Prefetch};
use sluice_sessions::{Store, StoreOptions};
use sluice_tests::chat_model::{Layers, chat_model};

/// Keys.
const UP: &str = "\x1b[A";
const LEFT: &str = "\x1b[D";
const ALT_ENTER: &str = "\x1b\r";
const CTRL_A: &str = "\x01";
const CTRL_C: &str = "\x03";
const CTRL_D: &str = "\x04";
const CTRL_R: &str = "\x12";
const CTRL_U: &str = "\x15";
const CTRL_W: &str = "\x17";
const BACKSPACE: &str = "\x7f";

/// The model that chats, made once for all tests.
fn model() -> &'static Path {
    static MODEL: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = MODEL.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let path = chat_model(folder.path(), Layers::Full);
        (folder, path)
    });
    path
}

/// A user with a folder of his own.
struct User(tempfile::TempDir);

impl User {
    fn new() -> Self {
        User(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The command that chats with a model.
    fn chat_with(&self, model: &Path, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
        command.arg("chat").arg(model).args(["--threads", "1", "--forget"]).args(args);
        for name in ["NO_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "XDG_STATE_HOME", "SLUICE_HOME"] {
            command.env_remove(name);
        }
        command.env("TERM", "xterm-256color").env("HOME", self.0.path()).env("XDG_STATE_HOME", self.path("state"));
        command.env("XDG_CACHE_HOME", self.path("cache"));
        command
    }

    fn chat(&self, args: &[&str]) -> Command {
        self.chat_with(model(), args)
    }

    /// A chat that waits for its first message.
    fn open(&self, args: &[&str]) -> Terminal {
        let mut terminal = Terminal::start(self.chat(args), 40, 100);
        terminal.ready();
        terminal
    }

    /// A chat in a pipe.
    fn pipe(&self, command: &mut Command, input: &[u8]) -> std::process::Output {
        use std::io::Write as _;
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // A chat that has failed reads no more.
        let _ = child.stdin.take().unwrap().write_all(input);
        child.wait_with_output().unwrap()
    }

    fn folder(&self) -> PathBuf {
        self.path("state/sluice/sessions/chats")
    }

    /// A conversation as it is on the drive.
    fn kept(&self, name: &str) -> Value {
        let path = self.folder().join(format!("{name}.json"));
        serde_json::from_slice(&fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))).unwrap()
    }

    /// The messages of a conversation on the drive.
    fn messages(&self, name: &str) -> Vec<String> {
        let turns = self.kept(name)["turns"].as_array().unwrap().clone();
        turns.iter().map(|turn| turn["message"].as_str().unwrap().to_owned()).collect()
    }

    /// The last answer of a conversation on the drive.
    fn answer(&self, name: &str) -> String {
        let kept = self.kept(name);
        let last = kept["turns"].as_array().unwrap().last().unwrap().clone();
        last["answer"]["text"].as_str().unwrap_or_else(|| panic!("{last}")).to_owned()
    }
}

/// Settings that keep answers short.
const SHORT: [&str; 2] = ["-n", "12"];

#[test]
fn a_chat_greets_helps_and_ends() {
    let user = User::new();
    let mut terminal = user.open(&SHORT);
    assert!(terminal.contents().contains("8192 tokens of context"), "{}", terminal.contents());
    let help = terminal.ask("/help");
    for word in ["/system", "/reset", "/undo", "/retry", "/save", "/load", "/stats", "/set", "/thinking", "Ctrl-C"] {
        assert!(help.contains(word), "{word}: {help}");
    }
    terminal.ask("");
    terminal.ask("   ");
    terminal.send(CTRL_D);
    let (status, said) = terminal.end();
    assert!(status.success() && !said.contains("--resume"), "nothing was said that could be gone on with: {said}");
    assert!(!user.folder().join("chat-1.json").exists());

    for command in ["/quit", "/exit", "/bye"] {
        let mut terminal = user.open(&SHORT);
        terminal.line(command);
        assert!(terminal.end().0.success(), "{command}");
    }
}

#[test]
fn an_answer_has_a_status_and_is_kept() {
    let user = User::new();
    let mut terminal = user.open(&SHORT);
    let said = terminal.ask("hello");
    for word in ["tokens/s", "of experts found in memory", "12 tokens", "of 8192]", "[cut off after max_tokens]"] {
        assert!(said.contains(word), "{word}: {said}");
    }
    assert_eq!(user.messages("chat-1"), ["hello"]);
    let answer = user.answer("chat-1");
    assert!(!answer.is_empty() && said.contains(answer.trim()), "{answer:?} {said:?}");
    let stats = terminal.ask("/stats");
    for word in ["chat-model", "prompt ", " remembered", "answer   12 tokens", "experts used", "drive ", "memory "] {
        assert!(stats.contains(word), "{word}: {stats}");
    }
    // The second message has the first one and its answer before it, and does not read them again.
    terminal.ask("and more");
    assert_eq!(user.messages("chat-1"), ["hello", "and more"]);
    assert!(!terminal.ask("/stats").contains(": 0 remembered"));
    terminal.line("/quit");
    let (status, said) = terminal.end();
    assert!(status.success() && said.contains("--resume chat-1"), "{said}");
}

#[test]
fn lines_are_edited() {
    let user = User::new();
    let mut terminal = user.open(&SHORT);
    terminal.ask(&format!("helo{LEFT}l"));
    terminal.ask(&format!("world{CTRL_A}my "));
    terminal.ask(&format!("one two{CTRL_W}three"));
    terminal.ask(&format!("all wrong{CTRL_U}right"));
    // Wide characters, and those of several parts, are one to the user.
    terminal.ask(&format!("日本語{BACKSPACE}人"));
    terminal.ask(&format!("a👩‍👩‍👧b{LEFT}{BACKSPACE}c"));
    terminal.ask(&format!("gone{BACKSPACE}{BACKSPACE}{BACKSPACE}{BACKSPACE}ü"));
    let expected = ["hello", "my world", "one three", "right", "日本人", "acb", "ü"];
    assert_eq!(user.messages("chat-1"), expected);
}

#[test]
fn messages_can_have_several_lines() {
    let user = User::new();
    let mut terminal = user.open(&SHORT);
    terminal.ask(&format!("one{ALT_ENTER}two"));
    terminal.ask("\"\"\"\rthree\r/quit\r\"\"\"");
    terminal.ask("\x1b[200~four\nfive\n\tsix\x1b[201~");
    assert_eq!(user.messages("chat-1"), ["one\ntwo", "three\n/quit", "four\nfive\n\tsix"]);
    // The up arrow brings all of them back.
    terminal.ask(UP);
    assert_eq!(user.messages("chat-1")[3], "four\nfive\n\tsix");
}

#[test]
fn earlier_messages_come_back() {
    let user = User::new();
    let mut terminal = user.open(&SHORT);
    terminal.ask("the first");
    terminal.ask("second");
    terminal.ask(&format!("{UP}{UP} again"));
    terminal.send(&format!("{CTRL_R}sec"));
    terminal.shows("second", |screen| screen.contains("second"));
    terminal.ask("");
    assert_eq!(user.messages("chat-1"), ["the first", "second", "the first again", "second"]);
    terminal.line("/quit");
    assert!(terminal.end().0.success());
    // In another chat as well.
    let mut terminal = user.open(&SHORT);
    terminal.ask(&format!("{UP}{UP} later"));
    assert_eq!(user.messages("chat-2"), ["second later"]);
}

#[test]
fn ctrl_c_at_the_prompt_takes_the_line_and_nothing_else() {
    let user = User::new();
    let mut terminal = user.open(&SHORT);
    terminal.send(&format!("half a mess{CTRL_C}"));
    terminal.see("/quit ends the chat");
    terminal.ready();
    terminal.ask("whole");
    assert_eq!(user.messages("chat-1"), ["whole"]);
    // Ctrl-D in a line that has begun deletes, and does not end.
    terminal.ask(&format!("xyz{CTRL_A}{CTRL_D}"));
    assert_eq!(user.messages("chat-1"), ["whole", "yz"]);
}

/// A text that takes the model a while to read.
fn long_text() -> String {
    "What shall we do, and when, and who is to be there? ".repeat(1500)
}

#[test]
fn reading_a_prompt_is_watched_and_stopped() {
    let user = User::new();
    let long = long_text();
    let mut terminal = user.open(&["-n", "12", "--context", "65536", "--system", &long]);
    terminal.line("hello");
    terminal.see("reading the prompt: ");
    terminal.see(" tokens, layer ");
    terminal.send(CTRL_C);
    terminal.see("[stopped before the answer began");
    terminal.ready();
    assert_eq!(user.messages("chat-1"), [""; 0]);
    // The session goes on.
    terminal.ask("/system Be brief.");
    let said = terminal.ask("hello again");
    assert!(said.contains("tokens · context"), "{said}");
    assert_eq!(user.messages("chat-1"), ["hello again"]);
}

/// Settings with which the model goes on and on.
const ENDLESS: [&str; 4] = ["--temperature", "0", "--context", "65536"];

/// A message to which the model, with these settings, has a long answer.
const ENDLESS_MESSAGE: &str = "go on";

#[test]
fn an_answer_is_stopped_and_what_was_said_stays() {
    let user = User::new();
    let mut terminal = user.open(&ENDLESS);
    terminal.line(ENDLESS_MESSAGE);
    terminal.more(700);
    // What is typed meanwhile waits for the next prompt.
    terminal.send("/undo");
    terminal.resize(30, 60);
    terminal.send(CTRL_C);
    terminal.see("[stopped]");
    terminal.see("tokens/s");
    terminal.ready();
    let answer = user.answer("chat-1");
    assert!(answer.len() > 100, "{answer:?}");
    let said = terminal.ask("/stats");
    assert!(said.contains("prompt "), "{said}");
    terminal.ask("/undo");
    assert_eq!(user.messages("chat-1"), [""; 0]);
    // A signal from elsewhere stops as well, and does not end.
    terminal.line(ENDLESS_MESSAGE);
    terminal.more(700);
    terminal.signal(Signal::SIGINT);
    terminal.see("[stopped]");
    terminal.ready();
    terminal.line("/quit");
    assert!(terminal.end().0.success());
}

#[test]
fn what_is_typed_during_an_answer_waits() {
    let user = User::new();
    let mut terminal = user.open(&["-n", "300", "--temperature", "0"]);
    terminal.send("one\rtwo\r/stats\r");
    terminal.see("answer ");
    terminal.ready();
    assert_eq!(user.messages("chat-1"), ["one", "two"]);
}

#[test]
fn a_line_follows_the_size_of_the_terminal() {
    let user = User::new();
    let mut terminal = user.open(&SHORT);
    let line = "word ".repeat(30);
    terminal.send(line.trim());
    terminal.shows("the whole line", |screen| screen.replace('\n', "").matches("word").count() == 30);
    terminal.resize(40, 50);
    terminal.send("!");
    terminal.shows("the line in the new size", |screen| screen.contains('!'));
    terminal.ask("");
    assert_eq!(user.messages("chat-1"), [format!("{}!", line.trim())]);
    // Lines that are longer than the screen are sent whole.
    let long = "x".repeat(6000);
    terminal.ask(&format!("\x1b[200~{long}\x1b[201~"));
    assert_eq!(user.messages("chat-1")[1], long);
}

#[test]
fn turns_are_taken_back_and_answered_again() {
    let user = User::new();
    let mut terminal = user.open(&SHORT);
    assert!(terminal.ask("/undo").contains("nothing to take back"));
    assert!(terminal.ask("/retry").contains("nothing to answer"));
    terminal.ask("hello");
    let first = user.answer("chat-1");
    terminal.ask("/retry");
    let second = user.answer("chat-1");
    assert_ne!(first, second, "another seed");
    assert_eq!(user.messages("chat-1"), ["hello"]);
    terminal.ask("more");
    assert!(terminal.ask("/undo").contains("[taken back: more]"));
    assert_eq!((user.messages("chat-1"), user.answer("chat-1")), (vec!["hello".to_owned()], second));
    terminal.ask("/set temperature=0");
    terminal.ask("/retry");
    let greedy = user.answer("chat-1");
    assert!(terminal.ask("/retry").contains("the answer is the same"));
    assert_eq!(user.answer("chat-1"), greedy);
}

#[test]
fn system_messages_change_and_conversations_begin_anew() {
    let user = User::new();
    let mut terminal = user.open(&[&SHORT[..], &["--system", "Be brief."]].concat());
    assert!(terminal.ask("/system").contains("Be brief."));
    terminal.ask("hello");
    assert!(terminal.ask("/system You are a pirate.").contains("read again"));
    assert_eq!(user.kept("chat-1")["system"], "You are a pirate.");
    assert!(terminal.ask("/reset").contains("[a new conversation]"));
    assert!(terminal.ask("/system").contains("You are a pirate."));
    terminal.ask("/system clear");
    assert!(terminal.ask("/system").contains("there is no system message"));
    terminal.ask("ahoy");
    assert_eq!((user.messages("chat-1"), user.messages("chat-2")), (vec!["hello".into()], vec!["ahoy".into()]));
}

#[test]
fn conversations_have_names() {
    let user = User::new();
    let mut terminal = user.open(&SHORT);
    assert!(terminal.ask("/save").contains("nothing has been said yet"));
    assert!(terminal.ask("/load").contains("no conversations yet"));
    terminal.ask("hello");
    assert!(terminal.ask("/save").contains("kept as `chat-1`"));
    assert!(terminal.ask("/save verse").contains("[kept as `verse`]"));
    assert!(!user.folder().join("chat-1.json").exists(), "it has another name now");
    terminal.ask("/reset");
    terminal.ask("other");
    assert!(terminal.ask("/save verse").contains("choose another name"));
    assert!(terminal.ask("/save ../verse").contains("cannot be the name"));
    let list = terminal.ask("/load");
    assert!(list.contains("verse") && list.contains("hello") && list.contains("chat-1"), "{list}");
    assert!(terminal.ask("/load vers").contains("is it `verse`?"));
    let loaded = terminal.ask("/load verse");
    assert!(loaded.contains("`verse`: 1 message") && loaded.contains("> hello"), "{loaded}");
    terminal.ask("more");
    assert_eq!(user.messages("verse"), ["hello", "more"]);
    // Tab completes names, commands and settings.
    terminal.ask("/loa\tcha\t");
    terminal.ask("/und\t");
    assert_eq!(user.messages("chat-1"), [""; 0]);
}

#[test]
fn settings_are_listed_changed_and_checked() {
    let user = User::new();
    let mut terminal = user.open(&["-n", "5", "--top-p", "0.9"]);
    let list = terminal.ask("/set");
    for (name, value) in [("max_tokens", "5"), ("top_p", "0.9"), ("temperature", "default"), ("seed", "0")] {
        let has = |line: &str| line.starts_with(name) && line.contains(value);
        assert!(list.lines().any(has), "{name}: {list}");
    }
    terminal.ask("/set max_tokens=3 temperature=0");
    assert!(terminal.ask("hello").contains("3 tokens"));
    for (wrong, word) in [
        ("/set temperature=hot", "give a number"),
        ("/set temperature=7", "between"),
        ("/set warmth=1", "no setting `warmth`"),
        ("/set temperatur=1", "is it `temperature`?"),
        ("/set hot", "NAME=VALUE"),
    ] {
        let said = terminal.ask(wrong);
        assert!(said.contains(word), "{wrong}: {said}");
    }
    assert_eq!(user.kept("chat-1")["settings"]["temperature"], 0.0, "what is wrong changes nothing");
    terminal.ask("/set max_tokens=default temperature=default");
    assert!(user.kept("chat-1")["settings"].get("max_tokens").is_none());
    // The same settings and seed give the same answer in another chat.
    let answers = [User::new(), User::new()].map(|user| {
        user.open(&["-n", "20", "--seed", "3"]).ask("hello");
        user.answer("chat-1")
    });
    assert_eq!(answers[0], answers[1]);
}

#[test]
fn commands_that_there_are_not_are_refused() {
    let user = User::new();
    let mut terminal = user.open(&SHORT);
    assert!(terminal.ask("/rest").contains("is it /reset?"));
    assert!(terminal.ask("/frobnicate").contains("/help lists them"));
    assert!(terminal.ask("/undo twice").contains("takes nothing"));
    terminal.ask("//etc is a folder");
    assert_eq!(user.messages("chat-1"), ["/etc is a folder"]);
}

/// A template after which the model thinks.
const THINKS: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
                      {% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}";

#[test]
fn thinking_is_dimmed_folded_and_shown_again() {
    let user = User::new();
    let template = user.path("thinks.jinja");
    fs::write(&template, THINKS).unwrap();
    let args = ["-n", "12", "--chat-template", template.to_str().unwrap()];
    let mut terminal = user.open(&args);
    let said = terminal.ask("hello");
    assert!(said.contains("[thinking]") && said.contains("\x1b[2m"), "{said:?}");
    let kept = user.kept("chat-1");
    let thinking = kept["turns"][0]["answer"]["thinking"].as_str().unwrap().to_owned();
    assert!(thinking.len() > 10, "{kept}");
    let words: Vec<&str> = thinking.split_whitespace().collect();
    assert!(said.contains(words[0]), "{said:?}");
    assert!(terminal.ask("/stats").contains("12 of them thinking"));

    terminal.ask("/set show_thinking=folded");
    let folded = terminal.ask("/retry");
    assert!(folded.contains("[thinking folded") && !folded.contains("[thinking]"), "{folded:?}");
    let kept = user.kept("chat-1");
    let thinking = kept["turns"][0]["answer"]["thinking"].as_str().unwrap();
    let words: Vec<&str> = thinking.split_whitespace().collect();
    assert!(terminal.ask("/thinking").contains(words[0]));
    // A program gets none of it.
    let output = user.pipe(&mut user.chat(&[&args[..], &["--private"]].concat()), b"hello\n");
    assert_eq!(stdout(&output).trim(), "");
}

#[test]
fn terminals_without_colours_get_none() {
    let user = User::new();
    for (name, value) in [("NO_COLOR", "1"), ("CLICOLOR", "0")] {
        let mut command = user.chat(&SHORT);
        command.env(name, value);
        let mut terminal = Terminal::start(command, 40, 100);
        terminal.ready();
        terminal.ask("hello");
        terminal.ask("/set");
        assert!(!terminal.written().contains("\x1b[2m") && !terminal.written().contains("\x1b[1m"), "{name}");
    }
}

#[test]
fn a_simple_terminal_gets_text_alone() {
    let user = User::new();
    let mut command = user.chat(&SHORT);
    command.env("TERM", "dumb");
    let mut terminal = Terminal::start(command, 40, 100);
    terminal.see("> ");
    terminal.send("hello\n");
    terminal.see("tokens/s");
    terminal.see("> ");
    terminal.send("/quit\n");
    let (status, written) = terminal.end();
    let (_, said) = written.split_once("Ctrl-D ends").unwrap();
    assert!(status.success() && !said.contains('\x1b'), "{said:?}");
    assert_eq!(user.messages("chat-1"), ["hello"]);
}

#[test]
fn a_chat_that_was_killed_goes_on() {
    let user = User::new();
    let args = ["--temperature", "0", "-n", "100", "--context", "65536"];
    let question = "Tell me of the king and of all his men, and of the day when they went away. ".repeat(4);
    // What would be said if nothing happened.
    let calm = User::new();
    let mut terminal = calm.open(&args);
    terminal.ask(&question);
    terminal.ask("what then?");
    let (expected, stats) = (calm.answer("chat-1"), terminal.ask("/stats"));

    let mut terminal = user.open(&args);
    terminal.ask(&question);
    terminal.ask("/set max_tokens=60000");
    terminal.line(ENDLESS_MESSAGE);
    terminal.more(700);
    terminal.signal(Signal::SIGKILL);
    terminal.end();

    let mut terminal = Terminal::start(user.chat(&["--resume", "chat-1", "-n", "100"]), 40, 100);
    terminal.see("has no answer yet");
    terminal.ready();
    assert_eq!(user.messages("chat-1"), [question.trim(), ENDLESS_MESSAGE]);
    terminal.ask("/undo");
    terminal.ask("what then?");
    assert_eq!(user.answer("chat-1"), expected);
    // It has read no more of the prompt than a chat that was not killed.
    assert!(tokens_read(&terminal.ask("/stats")) <= tokens_read(&stats));
}

/// Tokens of the last prompt that had to be read, as `/stats` says.
fn tokens_read(stats: &str) -> usize {
    let (_, rest) = stats.split_once(" remembered, ").unwrap_or_else(|| panic!("{stats}"));
    rest.split(' ').next().unwrap().parse().unwrap()
}

/// The folder of sessions as it is, for others.
fn copied(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap).filter(|entry| entry.path().is_file()) {
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

#[test]
fn a_resumed_chat_reads_the_experts_of_its_new_tokens() {
    let user = User::new();
    let mut terminal = user.open(&["-n", "6", "--no-prefetch"]);
    terminal.ask(&"Tell me of the king and of all his men, and of the day when they went away. ".repeat(4));
    // Half a character is no text that a conversation could keep.
    while user.answer("chat-1").contains('\u{fffd}') {
        terminal.ask("/retry");
    }
    terminal.signal(Signal::SIGKILL);
    terminal.end();
    let (sessions, copy) = (user.path("state/sluice/sessions"), user.path("copy"));
    copied(&sessions, &copy);

    let mut terminal = user.open(&["--resume", "chat-1", "-n", "1", "--no-prefetch"]);
    terminal.ask("what then?");
    let stats = terminal.ask("/stats");
    terminal.line("/quit");
    assert!(terminal.end().0.success());
    let prompt = stats.lines().find_map(|line| line.strip_prefix("prompt   ")).unwrap().split(' ').next().unwrap();
    let prompt: usize = prompt.parse().unwrap();

    // An engine that has what was saved, and computes what is new of the same tokens.
    let options = EngineOptions {
        context: Some(8192),
        sequences: Some(1),
        threads: Some(1),
        forget: true,
        prefetch: Prefetch::Off,
        ..EngineOptions::default()
    };
    let mut engine = Engine::open(model(), &options).unwrap();
    let store = |folder: &Path| {
        Store::open(StoreOptions { folder: folder.to_owned(), max_bytes: 1 << 30, expire_after: None }).unwrap()
    };
    let texts = store(&sessions).texts(engine.binding());
    let text = texts.iter().find(|text| text.len() >= prompt).unwrap();
    let store = store(&copy);
    let found = store.longest(engine.binding(), &text[..prompt - 1]).unwrap();
    let mut sequence = store.restore(&engine, &found).unwrap();
    let new = &text[sequence.position()..prompt];
    assert_eq!(tokens_read(&stats), new.len());
    assert!(new.len() < prompt / 4, "{} of {prompt}", new.len());
    engine.forward(&mut sequence, new, &mut Vec::new()).unwrap();
    let expected = format!("{} read", Bytes(engine.stats().expert_bytes_read));
    let line = stats.lines().skip_while(|line| !line.starts_with("prompt")).nth(1).unwrap();
    assert!(line.contains(&expected), "{expected}: {stats}");
}

#[test]
fn what_has_no_answer_is_asked_again() {
    let user = User::new();
    let mut terminal = user.open(&ENDLESS);
    terminal.line(ENDLESS_MESSAGE);
    terminal.more(700);
    terminal.signal(Signal::SIGKILL);
    terminal.end();
    // Without a name, the latest one.
    let mut terminal = user.open(&["--resume", "-n", "12"]);
    assert!(terminal.ask("/retry").contains("tokens/s"));
    assert!(!user.answer("chat-1").is_empty());
}

/// The tokenizer of a model, in which many tokens are escape sequences.
fn hostile_model(folder: &Path) -> PathBuf {
    let model = chat_model(folder, Layers::Full);
    let path = folder.join("checkpoint/tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let vocab = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    // In the alphabet of byte-level tokenizers: a window's name, in one token and in two, the clipboard, a link, the screen cleared,
    // a reversed line, and C1.
    let hostile = ["ě]0;ownedć", "ě", "]0;ownedć", "ě]52;c;AAAAć", "ě]8;;http://xć", "ě[2J", "âĢ®", "ÂĽ31m"];
    let words: Vec<String> =
        vocab.iter().filter(|(_, id)| id.as_u64().unwrap() >= 300).map(|(word, _)| word.clone()).collect();
    for (number, word) in words.iter().enumerate().filter(|(number, _)| number % 2 == 0) {
        let id = vocab.remove(word).unwrap();
        let text = format!("{}{number}", hostile[number / 2 % hostile.len()]);
        vocab.insert(text, id);
    }
    tokenizer["model"]["merges"] = Value::Array(Vec::new());
    let changed = folder.join("tokenizer.json");
    fs::write(&changed, tokenizer.to_string()).unwrap();
    let set = sluice(&["set", model.to_str().unwrap(), "--tokenizer", changed.to_str().unwrap()]);
    stdout(&set);
    model
}

#[test]
fn what_a_model_prints_does_not_command_the_terminal() {
    let folder = tempfile::tempdir().unwrap();
    let model = hostile_model(folder.path());
    let user = User::new();
    let args = ["-n", "300", "--temperature", "0.9", "--private"];
    let mut terminal = Terminal::start(user.chat_with(&model, &args), 40, 100);
    terminal.ready();
    let mut said = String::new();
    for message in ["one", "two", "three"] {
        said += &terminal.ask(message);
    }
    for shown in ["\\u{1b}", "\\u{7}", "]52;c;", "\\u{202e}"] {
        assert!(said.contains(shown), "{shown}: {said:?}");
    }
    for obeyed in ["\x1b]", "\x1b[2J", "\u{7}", "\u{9b}", "\u{202e}"] {
        assert!(!said.contains(obeyed), "{obeyed:?}: {said:?}");
    }
    // Another program gets every byte.
    let output = user.pipe(&mut user.chat_with(&model, &args), b"one\ntwo\nthree\n");
    let piped = stdout(&output);
    assert!(piped.contains("\x1b]52;c;") && piped.contains('\u{202e}'), "{piped:?}");
}

#[test]
fn pipes_get_answers_alone() {
    let user = User::new();
    let output = user.pipe(&mut user.chat(&["-n", "12", "--private"]), b"hello\n/set max_tokens=3\nmore\n");
    let said = stdout(&output);
    assert!(
        !said.contains('\x1b') && !said.contains("tokens/s") && stderr(&output).is_empty(),
        "{said} {}",
        stderr(&output)
    );
    assert!(said.matches('\n').count() >= 2, "{said:?}");
    assert!(!user.path("state").exists(), "--private keeps nothing");

    // What is asked for is told, and lines in quotes are one message.
    let input = "\"\"\"\none\ntwo\n\"\"\"\n/stats\n/quit\nnever\n";
    let output = user.pipe(&mut user.chat(&SHORT), input.as_bytes());
    assert!(stdout(&output).contains("answer   12 tokens"));
    assert_eq!(user.messages("chat-1"), ["one\ntwo"]);
    // The last line needs no end.
    user.pipe(&mut user.chat(&["-n", "3", "--resume"]), b"last");
    assert_eq!(user.messages("chat-1"), ["one\ntwo", "last"]);
}

#[test]
fn programs_hear_of_errors() {
    let user = User::new();
    for (input, words) in [
        (&b"/rest\nhello\n"[..], &["/rest", "is it /reset?"][..]),
        (b"/set temperature=hot\n", &["give a number"]),
        (b"/undo\n", &["nothing to take back"]),
        (b"\xff\xfe\n", &["standard input", "UTF-8"]),
    ] {
        let output = user.pipe(&mut user.chat(&SHORT), input);
        assert_fails(&output, 1, words);
    }
    assert!(!user.folder().join("chat-1.json").exists(), "what came behind the error was not said");
    let model = model().to_str().unwrap();
    assert_fails(&sluice(&["chat", model, "--private", "--resume"]), 2, &["--private"]);
    let temperature = ["chat", model, "--private", "--temperature", "9"];
    assert_fails(&sluice(&temperature), 2, &["temperature"]);
    assert_fails(&sluice(&["chat", common::demo_model(), "--private"]), 2, &["no chat template", "--chat-template"]);
    assert_fails(&user.pipe(&mut user.chat(&["--resume", "nobody"]), b""), 1, &["no conversation `nobody`"]);
    assert_fails(&user.pipe(&mut user.chat(&["--resume"]), b""), 1, &["no conversation to go on with"]);
}

#[test]
fn a_conversation_has_one_chat_at_a_time() {
    let user = User::new();
    let mut first = user.open(&SHORT);
    first.ask("hello");
    assert_fails(&user.pipe(&mut user.chat(&["--resume", "chat-1"]), b"more\n"), 1, &["chat-1", "another chat"]);
    // Another conversation can be had, though what the model remembers of it is not kept.
    let output = user.pipe(&mut user.chat(&SHORT), b"other\n");
    assert!(stderr(&output).contains("in memory only") && output.status.success(), "{}", stderr(&output));
    assert_eq!((user.messages("chat-1"), user.messages("chat-2")), (vec!["hello".into()], vec!["other".into()]));
}

#[test]
fn a_full_context_is_no_end() {
    let user = User::new();
    let mut terminal = user.open(&["--context", "64", "--temperature", "0"]);
    let said = terminal.ask(&"many words ".repeat(100));
    assert!(said.contains("/undo and /reset make room"), "{said}");
    let said = terminal.ask("go on");
    assert!(said.contains("tokens · context"), "{said}");
    assert_eq!(user.messages("chat-1"), ["go on"]);
}
