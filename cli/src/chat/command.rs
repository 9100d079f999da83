//! Interprets typed text: a message, or a command that begins with a slash.

use crate::chat::nearest;

/// What a user has typed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// Nothing.
    Nothing,
    /// A message for the model.
    Message(String),
    /// A command for the program.
    Command(Command),
    /// A command that does not exist, or that is used wrongly.
    Wrong(String),
}

/// A command for the program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    /// Lists the commands.
    Help,
    /// Shows the system message, or changes it; an empty text removes it.
    System(Option<String>),
    /// Starts a new conversation.
    Reset,
    /// Removes the last message and its answer.
    Undo,
    /// Answers the last message again.
    Retry,
    /// Keeps the conversation under a name, or reports its name.
    Save(Option<String>),
    /// Continues another conversation, or lists them.
    Load(Option<String>),
    /// Reports tokens, time and bytes of the last answer.
    Stats,
    /// Changes settings, or lists them.
    Set(Vec<(String, String)>),
    /// Shows the thinking of the last answer.
    Thinking,
    /// Ends.
    Quit,
}

/// The commands: name, arguments, what they do.
pub(crate) const COMMANDS: [(&str, &str, &str); 11] = [
    ("help", "", "this list"),
    ("system", "[TEXT]", "show the system message, or change it; `/system clear` removes it"),
    ("reset", "", "begin a new conversation; system message and settings stay"),
    ("undo", "", "remove the last message and its answer"),
    ("retry", "", "answer the last message again"),
    ("save", "[NAME]", "keep the conversation under this name, or show its name"),
    ("load", "[NAME]", "continue another conversation, or list them"),
    ("stats", "", "what the last answer took: tokens, speed, experts, bytes"),
    ("set", "[NAME=VALUE …]", "change settings, such as `/set temperature=0.7 top_p=0.9`, or list them"),
    ("thinking", "", "show the thinking of the last answer"),
    ("quit", "", "end; so does Ctrl-D"),
];

/// Keys and input.
pub(crate) const KEYS: &str = "\
Enter sends; Alt-Enter begins a line, and so does Enter between \"\"\" and \"\"\". A pasted text is one message.
Ctrl-C stops an answer; what has been said stays. Up and Ctrl-R find earlier messages.
A message that begins with a slash is written with two.";

impl Entry {
    /// The meaning of this text.
    pub(crate) fn parse(text: &str) -> Entry {
        let trimmed = text.trim();
        if trimmed.is_empty() {
            return Entry::Nothing;
        }
        if let Some(quoted) = trimmed.strip_prefix("\"\"\"") {
            let inner = quoted.strip_suffix("\"\"\"").unwrap_or(quoted);
            let inner = inner.strip_prefix('\n').unwrap_or(inner);
            let inner = inner.strip_suffix('\n').unwrap_or(inner);
            return if inner.trim().is_empty() { Entry::Nothing } else { Entry::Message(inner.to_owned()) };
        }
        match trimmed.strip_prefix('/') {
            None => Entry::Message(trimmed.to_owned()),
            Some(message) if message.starts_with('/') => Entry::Message(message.to_owned()),
            Some(command) => {
                let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
                match Command::parse(name, rest.trim()) {
                    Ok(command) => Entry::Command(command),
                    Err(wrong) => Entry::Wrong(wrong),
                }
            }
        }
    }

    /// Whether a text is complete: not if three quotes are open.
    pub(crate) fn is_complete(text: &str) -> bool {
        let text = text.trim();
        !text.starts_with("\"\"\"") || (text.len() >= 6 && text.ends_with("\"\"\""))
    }
}

impl Command {
    fn parse(name: &str, rest: &str) -> Result<Command, String> {
        let argument = || Some(rest).filter(|rest| !rest.is_empty()).map(str::to_owned);
        let alone = |command: Command| match rest {
            "" => Ok(command),
            _ => Err(format!("/{name} takes no arguments")),
        };
        match name {
            "help" | "?" => alone(Command::Help),
            "system" if rest == "clear" => Ok(Command::System(Some(String::new()))),
            "system" => Ok(Command::System(argument())),
            "reset" => alone(Command::Reset),
            "undo" => alone(Command::Undo),
            "retry" => alone(Command::Retry),
            "save" => Ok(Command::Save(argument())),
            "load" => Ok(Command::Load(argument())),
            "stats" => alone(Command::Stats),
            "set" => assignments(rest).map(Command::Set),
            "thinking" => alone(Command::Thinking),
            "quit" | "exit" | "bye" => alone(Command::Quit),
            _ => {
                let names = COMMANDS.map(|command| command.0);
                let nearest = nearest(name, &names).map_or(String::from("."), |near| format!("; is it /{near}?"));
                Err(format!(
                    "there is no command /{name}{nearest} /help lists the commands, and // begins a message with a slash"
                ))
            }
        }
    }
}

/// `name=value` pairs. A value in quotes can have white space, and line ends as `\n`.
fn assignments(text: &str) -> Result<Vec<(String, String)>, String> {
    let mut pairs = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let wrong = || format!("`{rest}` is not a setting: write /set NAME=VALUE, such as /set temperature=0.7");
        let (name, behind) = rest.split_once('=').ok_or_else(wrong)?;
        let name = name.trim_end();
        if name.is_empty() || name.contains(char::is_whitespace) {
            return Err(wrong());
        }
        let behind = behind.trim_start();
        let (value, behind) = match behind.starts_with('"') {
            true => {
                let mut values = serde_json::Deserializer::from_str(behind).into_iter::<String>();
                let value = values.next().and_then(Result::ok).ok_or_else(wrong)?;
                (value, &behind[values.byte_offset()..])
            }
            false => {
                let end = behind.find(char::is_whitespace).unwrap_or(behind.len());
                (behind[..end].to_owned(), &behind[end..])
            }
        };
        pairs.push((name.to_owned(), value));
        rest = behind.trim_start();
    }
    Ok(pairs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(text: &str) -> Command {
        match Entry::parse(text) {
            Entry::Command(command) => command,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn messages_are_what_is_no_command() {
        assert_eq!(Entry::parse(" \t\n"), Entry::Nothing);
        assert_eq!(Entry::parse(" hello \n"), Entry::Message("hello".into()));
        assert_eq!(Entry::parse("//etc is a folder"), Entry::Message("/etc is a folder".into()));
        assert_eq!(Entry::parse("\"\"\"\n/not\n a command\n\"\"\""), Entry::Message("/not\n a command".into()));
        assert_eq!(Entry::parse("\"\"\"\"\"\""), Entry::Nothing);
        assert_eq!(Entry::parse("a\n/quit"), Entry::Message("a\n/quit".into()));
    }

    #[test]
    fn every_command_is_understood() {
        for (name, arguments, _) in COMMANDS {
            assert!(matches!(Entry::parse(&format!("/{name}")), Entry::Command(_)), "{name}");
            let with = Entry::parse(&format!("/{name} a=b"));
            assert_eq!(matches!(with, Entry::Command(_)), !arguments.is_empty(), "{with:?}");
        }
        assert_eq!(command("/system You are\na pirate"), Command::System(Some("You are\na pirate".into())));
        assert_eq!(command("/system clear"), Command::System(Some(String::new())));
        assert_eq!(command("/exit"), Command::Quit);
    }

    #[test]
    fn settings_have_names_and_values() {
        let pairs = |text: &str| match command(text) {
            Command::Set(pairs) => pairs,
            other => panic!("{other:?}"),
        };
        let owned = |pairs: &[(&str, &str)]| -> Vec<_> {
            pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
        };
        assert_eq!(pairs("/set"), []);
        assert_eq!(pairs("/set temperature=0.7  top_p = 0.9"), owned(&[("temperature", "0.7"), ("top_p", "0.9")]));
        assert_eq!(pairs(r#"/set stop="a b\n" seed=1"#), owned(&[("stop", "a b\n"), ("seed", "1")]));
        for wrong in ["/set hot", "/set =1", "/set a b=1", "/set stop=\"open"] {
            assert!(matches!(Entry::parse(wrong), Entry::Wrong(_)), "{wrong}");
        }
    }

    #[test]
    fn the_nearest_command_is_named() {
        let Entry::Wrong(message) = Entry::parse("/rest") else { panic!() };
        assert!(message.contains("is it /reset?"), "{message}");
    }

    #[test]
    fn quotes_hold_lines_together() {
        assert!(Entry::is_complete("hello") && Entry::is_complete("\"\"\"a\nb\"\"\""));
        assert!(
            !Entry::is_complete("\"\"\"") && !Entry::is_complete("\"\"\"a\nb") && !Entry::is_complete("\"\"\"\"\"")
        );
    }
}
