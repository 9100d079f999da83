//! Reads what the user types: with a line editor on a terminal, line by line elsewhere.

use std::borrow::Cow;
use std::io::{self, BufRead as _, IsTerminal as _, Read as _, Write as _};

use rustyline::completion::Completer;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::MemHistory;
use rustyline::validate::{ValidationContext, ValidationResult, Validator};
use rustyline::{Cmd, ColorMode, Config, Context, Editor, Helper, KeyCode, KeyEvent, Modifiers};

use crate::chat::command::{COMMANDS, Entry};
use crate::chat::history::{History, MOST};
use crate::chat::screen::Kind;
use crate::chat::settings::SETTINGS;
use crate::error::CliError;
use crate::input::MAX_TEXT;

/// The prompt before a message.
const PROMPT: &str = "> ";

/// One input of the user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Typed {
    /// A message or a command, which can have several lines.
    Text(String),
    /// Ctrl-C.
    Interrupt,
    /// Ctrl-D, or the end of a file.
    End,
}

/// The source of messages.
pub(crate) enum Input {
    /// A terminal, with a line editor.
    Editor(Box<Editor<Assistant, MemHistory>>, History),
    /// Lines; `prompt`: whether a person types them.
    Lines {
        /// Whether to print a prompt for each.
        prompt: bool,
    },
}

impl Input {
    /// The source that standard input allows. The editor needs a terminal for both input and output that can move its cursor.
    ///
    /// # Errors
    /// If the editor cannot be set up.
    pub(crate) fn new(screen: Kind, history: History) -> Result<Self, CliError> {
        let is_terminal = io::stdin().is_terminal();
        let Kind::Terminal { colours } = screen else { return Ok(Input::Lines { prompt: is_terminal }) };
        if !is_terminal {
            return Ok(Input::Lines { prompt: false });
        }
        let color_mode = if colours { ColorMode::Enabled } else { ColorMode::Disabled };
        let config = Config::builder().color_mode(color_mode).max_history_size(MOST).map_err(broken)?.build();
        let entries = MemHistory::with_config(&config);
        let mut editor = Editor::with_history(config, entries).map_err(broken)?;
        editor.set_helper(Some(Assistant { names: Vec::new() }));
        editor.bind_sequence(KeyEvent(KeyCode::Enter, Modifiers::ALT), Cmd::Newline);
        for message in history.load() {
            editor.add_history_entry(message).map_err(broken)?;
        }
        Ok(Input::Editor(Box::new(editor), history))
    }

    /// Waits for the next message or command. `names`: conversations, for completing `/load`.
    ///
    /// # Errors
    /// If standard input cannot be read, or is not text.
    pub(crate) fn next(&mut self, names: Vec<String>) -> Result<Typed, CliError> {
        match self {
            Input::Editor(editor, history) => {
                if let Some(helper) = editor.helper_mut() {
                    helper.names = names;
                }
                match editor.readline(PROMPT) {
                    Ok(text) => {
                        if !text.trim().is_empty() && editor.add_history_entry(&text).map_err(broken)? {
                            history.add(&text);
                        }
                        Ok(Typed::Text(text))
                    }
                    Err(ReadlineError::Eof) => Ok(Typed::End),
                    Err(ReadlineError::Interrupted) => Ok(Typed::Interrupt),
                    Err(error) => Err(broken(error)),
                }
            }
            Input::Lines { prompt } => lines(*prompt),
        }
    }
}

fn broken(error: ReadlineError) -> CliError {
    match error {
        ReadlineError::Io(error) => CliError::Input(error),
        ReadlineError::Errno(error) => CliError::Input(error.into()),
        other => CliError::Failure(format!("cannot read from the terminal: {other}")),
    }
}

/// Reads a line, and the following ones while three quotes are open.
fn lines(prompt: bool) -> Result<Typed, CliError> {
    let mut text = String::new();
    let mut stdin = io::stdin().lock();
    loop {
        if prompt {
            let mut err = io::stderr().lock();
            let _ = write!(err, "{PROMPT}").and_then(|()| err.flush());
        }
        let room = MAX_TEXT - text.len() as u64;
        let read = stdin.by_ref().take(room).read_line(&mut text).map_err(CliError::Input)? as u64;
        if read == room {
            let message = format!("a message has more than {}, the most that is read", MAX_TEXT >> 20);
            return Err(CliError::Failure(message + " MiB"));
        }
        if read == 0 && text.is_empty() {
            return Ok(Typed::End);
        }
        if read == 0 || Entry::is_complete(&text) {
            return Ok(Typed::Text(text));
        }
    }
}

/// Helps the editor: completes commands, and knows when a message is complete.
pub(crate) struct Assistant {
    /// Conversations.
    names: Vec<String>,
}

impl Helper for Assistant {}

impl Hinter for Assistant {
    type Hint = String;
}

impl Highlighter for Assistant {
    fn highlight_prompt<'b, 's: 'b, 'p: 'b>(&'s self, prompt: &'p str, _default: bool) -> Cow<'b, str> {
        Cow::Owned(format!("\x1b[1m{prompt}\x1b[0m"))
    }
}

impl Validator for Assistant {
    fn validate(&self, context: &mut ValidationContext<'_>) -> rustyline::Result<ValidationResult> {
        match Entry::is_complete(context.input()) {
            true => Ok(ValidationResult::Valid(None)),
            false => Ok(ValidationResult::Incomplete),
        }
    }
}

impl Completer for Assistant {
    type Candidate = String;

    fn complete(&self, line: &str, at: usize, _: &Context<'_>) -> rustyline::Result<(usize, Vec<String>)> {
        Ok(candidates(&line[..at], &self.names))
    }
}

/// The position at which the last word of a command begins, and its completions.
fn candidates(line: &str, names: &[String]) -> (usize, Vec<String>) {
    let begins = |from: usize, all: &mut dyn Iterator<Item = String>| {
        (from, all.filter(|candidate| candidate.starts_with(&line[from..])).collect())
    };
    match line.split_once(' ') {
        _ if !line.starts_with('/') || line.contains('\n') => (0, Vec::new()),
        None => begins(
            0,
            &mut COMMANDS.iter().map(|(name, arguments, _)| match arguments.is_empty() {
                true => format!("/{name}"),
                false => format!("/{name} "),
            }),
        ),
        Some(("/load", _)) => begins("/load ".len(), &mut names.iter().cloned()),
        Some(("/set", rest)) => {
            let from = line.len() - rest.rsplit(' ').next().map_or(0, str::len);
            begins(from, &mut SETTINGS.iter().map(|setting| format!("{}=", setting.0)))
        }
        Some(_) => (0, Vec::new()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_settings_and_names_are_completed() {
        let names = ["verse".to_owned(), "chat-1".to_owned()];
        assert_eq!(candidates("/re", &names), (0, vec!["/reset".to_owned(), "/retry".to_owned()]));
        assert_eq!(candidates("/load v", &names), (6, vec!["verse".to_owned()]));
        assert_eq!(candidates("/set temperature=1 top_", &names), (19, vec!["top_k=".to_owned(), "top_p=".to_owned()]));
        assert!(candidates("tell me", &names).1.is_empty() && candidates("/system a", &names).1.is_empty());
    }
}
