//! A conversation with a model in a terminal: typed text goes to the model or to the program, and the conversation is kept.
//!
//! [`input`] reads what is typed, [`command`] interprets it, [`talk`] asks the model and shows its answer on the [`screen`],
//! [`conversation`] keeps messages and answers in a file. The store of sessions keeps what the model remembers, beside these files.

pub(crate) mod command;
pub(crate) mod conversation;
pub(crate) mod history;
pub(crate) mod input;
pub(crate) mod screen;
pub(crate) mod settings;
pub(crate) mod talk;

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use sluice_model::Stats;
use sluice_model::memory::Bytes;
use sluice_server::ask::{Ask, Chat, Input as Asked};
use sluice_server::error::Kind;
use sluice_sessions::Store;

use crate::error::CliError;
use crate::terminal::counted;
use command::{COMMANDS, Command, Entry, KEYS};
use conversation::{Conversation, Folder, Kept, Listed, Said, Turn};
use input::{Input, Typed};
use screen::Screen;
use talk::{Failure, How, Outcome, Talk, Took, more_room};

/// Least similarity, by Jaro and Winkler, of an unknown name to the one that is suggested.
const LIKE: f64 = 0.8;
/// How often `/stats` checks for a report of the model.
const LOOKS: usize = 50;
/// Conversations that a list shows.
const LISTED: usize = 20;

/// Least characters of a name that is taken for another one if a single slip, such as two letters in the wrong order, makes it so. Of two
/// letters, one slip leaves nothing.
const SLIP: usize = 3;

/// The known name that is most similar to an unknown one, if any is similar.
pub(crate) fn nearest<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    let is_slip = |other: &str| name.chars().count() >= SLIP && strsim::osa_distance(name, other) == 1;
    let likeness = |other: &&'a str| (strsim::jaro_winkler(name, other), *other);
    let alike = known.iter().map(likeness).filter(|(likeness, other)| *likeness >= LIKE || is_slip(other));
    alike.max_by(|a, b| a.0.total_cmp(&b.0)).map(|best| best.1)
}

/// A running chat.
pub(crate) struct Session {
    /// The name of the model file on the command line.
    pub(crate) file: String,
    pub(crate) talk: Talk,
    pub(crate) screen: Screen,
    pub(crate) input: Input,
    pub(crate) conversation: Conversation,
    /// The folder of conversations; `None`: they are not kept.
    pub(crate) folder: Option<Folder>,
    /// The file of this conversation, once there is a message.
    pub(crate) kept: Option<Kept>,
    /// What the model remembers, on the drive.
    pub(crate) store: Option<Arc<Store>>,
    /// Tokens, time and bytes of the last answer.
    pub(crate) took: Option<Took>,
}

impl Session {
    /// Reads and answers until the user ends the chat.
    ///
    /// # Errors
    /// If the terminal or the input is gone. If the output is not a terminal, also errors of an answer or a command.
    pub(crate) fn run(mut self) -> Result<(), CliError> {
        self.greet()?;
        loop {
            match self.input.next(self.names())? {
                Typed::End => break,
                Typed::Interrupt => self.screen.remark("Ctrl-D or /quit ends the chat")?,
                Typed::Text(text) => match Entry::parse(&text) {
                    Entry::Nothing => {}
                    Entry::Message(message) => {
                        self.conversation.turns.push(Turn { message, answer: None });
                        if self.answer(None)?.is_break() {
                            break;
                        }
                    }
                    Entry::Wrong(message) => self.refuse(message)?,
                    Entry::Command(command) => {
                        if self.obey(command)?.is_break() {
                            break;
                        }
                    }
                },
            }
        }
        if let Some(kept) = &self.kept {
            let line = format!("[kept: sluice chat {} --resume {}]", self.file, kept.name);
            self.screen.remark(&line)?;
        }
        let Session { talk, store, .. } = self;
        talk.close();
        drop(store);
        Ok(())
    }

    fn greet(&mut self) -> Result<(), CliError> {
        let served = self.talk.served();
        let line =
            format!("{}: {} tokens of context. /help lists the commands, Ctrl-D ends.", served.id, served.context());
        self.screen.remark(&line)?;
        if self.kept.is_some() {
            self.show_last()?;
        }
        Ok(())
    }

    /// Reports an error in what was typed: a person can type something else, a program cannot.
    fn refuse(&mut self, message: String) -> Result<(), CliError> {
        match self.screen.is_terminal() {
            true => self.screen.complain(&message),
            false => Err(CliError::Failure(message)),
        }
    }

    fn names(&self) -> Vec<String> {
        let list = self.folder.as_ref().and_then(|folder| folder.names().ok());
        list.unwrap_or_default()
    }

    /// Gets an answer to the last message. `before`: its earlier answer.
    fn answer(&mut self, before: Option<Said>) -> Result<ControlFlow<()>, CliError> {
        // If the program is killed now, the message or its earlier answer is kept.
        if before.is_none() {
            self.keep()?;
        }
        let conversation = &self.conversation;
        let ask = Ask {
            api: "chat",
            model: self.talk.served().id.clone(),
            input: Asked::Chat(Chat {
                messages: conversation.messages(),
                now: Some(conversation.begun),
                ..Chat::default()
            }),
            settings: conversation.settings.server(conversation.answers),
            thinking: conversation.settings.thinking(),
            n: 1,
            keep: true,
            ..Ask::default()
        };
        match self.talk.ask(&ask, self.conversation.settings.shown(), &mut self.screen) {
            Ok(outcome) => self.answered(outcome, before),
            Err(Failure::Terminal(error)) => Err(error),
            Err(Failure::Api(error)) => {
                self.take_back(before)?;
                let room = match error.kind {
                    // More context is advised by the error itself, where the model takes more.
                    Kind::Invalid if error.too_long.is_some() => ". /undo and /reset make room",
                    _ => "",
                };
                self.refuse(format!("{error}{room}"))?;
                Ok(ControlFlow::Continue(()))
            }
        }
    }

    fn more_room(&self) -> &'static str {
        let served = self.talk.served();
        more_room(served.context(), served.max_positions())
    }

    /// The last message has no answer: it keeps its earlier answer, or is removed.
    fn take_back(&mut self, before: Option<Said>) -> Result<(), CliError> {
        match (before, self.conversation.turns.last_mut()) {
            (Some(before), Some(turn)) => turn.answer = Some(before),
            _ => _ = self.conversation.turns.pop(),
        }
        self.keep()
    }

    fn answered(&mut self, outcome: Outcome, before: Option<Said>) -> Result<ControlFlow<()>, CliError> {
        let Outcome { said, ending, took } = outcome;
        let is_empty = said == Said::default();
        if is_empty && matches!(ending, How::Stopped(_)) {
            let what = match before {
                Some(_) => "the earlier one stays",
                None => "the message is removed, and the up arrow shows it",
            };
            self.take_back(before)?;
            self.screen.remark(&format!("[stopped before the answer began: {what}]"))?;
            return Ok(ControlFlow::Continue(()));
        }
        if let Some(turn) = self.conversation.turns.last_mut() {
            let is_answer = !is_empty || matches!(ending, How::Ended(_));
            turn.answer = if is_answer { Some(said) } else { before };
        }
        // A file that somebody has edited may contain any number.
        self.conversation.answers = self.conversation.answers.wrapping_add(1);
        self.keep()?;
        let context = self.talk.served().context();
        let room = took.prompt + took.generated < context;
        if let Some(remark) = ending.remark((!room).then(|| self.more_room())) {
            self.screen.remark(&remark)?;
        }
        let flow = match ending {
            How::Failed(error) => {
                self.refuse(format!("{error}. /retry asks again"))?;
                ControlFlow::Continue(())
            }
            How::Abandoned => ControlFlow::Break(()),
            How::Ended(_) | How::Stopped(_) => {
                self.screen.remark(&took.status(context))?;
                ControlFlow::Continue(())
            }
        };
        self.took = Some(took);
        // What the model remembers is on the drive before the next message, so if the program ends then, only that message is lost.
        if flow.is_continue() {
            self.store.iter().for_each(|store| store.flush());
        }
        Ok(flow)
    }

    /// Writes the conversation to its file, if there is anything to write.
    fn keep(&mut self) -> Result<(), CliError> {
        let Some(folder) = &self.folder else { return Ok(()) };
        let written = match &mut self.kept {
            Some(kept) => folder.replace(kept, &self.conversation),
            None if self.conversation.turns.is_empty() => return Ok(()),
            None => folder.create(None, &self.conversation).map(|kept| self.kept = Some(kept)),
        };
        // A full drive is no reason to end the conversation.
        if let Err(error) = written {
            self.folder = None;
            self.screen.complain(&format!("note: the conversation is not kept from now on: {error}"))?;
        }
        Ok(())
    }

    fn obey(&mut self, command: Command) -> Result<ControlFlow<()>, CliError> {
        match command {
            Command::Quit => return Ok(ControlFlow::Break(())),
            Command::Help => self.screen.report(&help())?,
            Command::System(text) => self.system(text)?,
            Command::Reset => {
                (self.kept, self.took) = (None, None);
                self.conversation = self.conversation.anew();
                self.screen.remark("[a new conversation]")?;
            }
            Command::Undo => self.undo()?,
            Command::Retry => return self.retry(),
            Command::Save(name) => self.save(name)?,
            Command::Load(name) => self.load(name)?,
            Command::Stats => self.stats()?,
            Command::Set(pairs) => self.set(pairs)?,
            Command::Thinking => self.thinking()?,
        }
        Ok(ControlFlow::Continue(()))
    }

    fn system(&mut self, text: Option<String>) -> Result<(), CliError> {
        match text {
            None => {
                let text = self.conversation.system.clone().unwrap_or_else(|| "[there is no system message]".into());
                self.screen.report(&text)
            }
            Some(text) => {
                self.conversation.system = Some(text).filter(|text| !text.is_empty());
                self.keep()?;
                let what = if self.conversation.system.is_some() { "changed" } else { "taken away" };
                let read = match self.conversation.turns.is_empty() {
                    true => String::new(),
                    false => "; the whole conversation is read again with the next message".into(),
                };
                self.screen.remark(&format!("[system message {what}{read}]"))
            }
        }
    }

    fn undo(&mut self) -> Result<(), CliError> {
        match self.conversation.turns.pop() {
            None => self.refuse("there is nothing to undo".into()),
            Some(turn) => {
                self.took = None;
                self.keep()?;
                self.screen.remark(&format!("[taken back: {}]", title(&turn.message)))
            }
        }
    }

    fn retry(&mut self) -> Result<ControlFlow<()>, CliError> {
        let Some(turn) = self.conversation.turns.last_mut() else {
            self.refuse("there is nothing to answer".into())?;
            return Ok(ControlFlow::Continue(()));
        };
        let before = turn.answer.take();
        if before.is_some() && self.conversation.settings.is_greedy() {
            self.screen.remark("[with temperature=0 the answer is the same]")?;
        }
        self.answer(before)
    }

    fn save(&mut self, name: Option<String>) -> Result<(), CliError> {
        let Some(folder) = &self.folder else {
            return self.refuse("this chat keeps nothing on the drive".into());
        };
        let Some(name) = name else {
            let line = match &self.kept {
                Some(kept) => format!("kept as `{}`; /save NAME gives it a name", kept.name),
                None => "nothing has been said yet".into(),
            };
            return self.screen.report(&line);
        };
        if self.kept.as_ref().is_some_and(|kept| kept.name == name) {
            return self.screen.remark(&format!("[kept as `{name}` already]"));
        }
        match folder.create(Some(&name), &self.conversation) {
            Err(error) => self.refuse(error.to_string()),
            Ok(kept) => {
                let before = self.kept.replace(kept);
                before.into_iter().for_each(|before| folder.remove_unnamed(before));
                self.screen.remark(&format!("[kept as `{name}`]"))
            }
        }
    }

    fn load(&mut self, name: Option<String>) -> Result<(), CliError> {
        let Some(folder) = &self.folder else {
            return self.refuse("this chat keeps nothing on the drive".into());
        };
        let Some(name) = name else {
            let list = folder.list()?;
            return self.screen.report(&described(&list));
        };
        if self.kept.as_ref().is_some_and(|kept| kept.name == name) {
            return self.screen.remark(&format!("[`{name}` is this conversation]"));
        }
        match folder.load(&name) {
            Err(error) => self.refuse(error.to_string()),
            Ok((conversation, kept)) => {
                let model = std::mem::take(&mut self.conversation.model);
                (self.conversation, self.kept, self.took) = (conversation, Some(kept), None);
                self.take_over(model)?;
                self.show_last()
            }
        }
    }

    /// Continues a conversation that was loaded with this model.
    pub(crate) fn take_over(&mut self, model: String) -> Result<(), CliError> {
        if self.conversation.model != model && !self.conversation.turns.is_empty() {
            self.screen.complain("note: this conversation was with another model; this one has to read it first")?;
        }
        self.conversation.model = model;
        Ok(())
    }

    /// Shows the user the last message and answer.
    fn show_last(&mut self) -> Result<(), CliError> {
        let name = self.kept.as_ref().map_or_else(String::new, |kept| kept.name.clone());
        let turns = self.conversation.turns.len();
        self.screen.remark(&format!("[`{name}`: {turns} {}]", if turns == 1 { "message" } else { "messages" }))?;
        let Some(Turn { message, answer }) = self.conversation.turns.last().cloned() else { return Ok(()) };
        // A program did not ask for it.
        if !self.screen.is_terminal() {
            return Ok(());
        }
        self.screen.said(&format!("> {message}\n"))?;
        match answer {
            Some(said) => self.screen.said(&said.text)?,
            None => self.screen.remark("[this message has no answer yet: /retry asks again]")?,
        }
        self.screen.end_line()
    }

    fn stats(&mut self) -> Result<(), CliError> {
        let served = self.talk.served();
        let mut text = format!("model    {}, {} tokens of context\n", served.id, served.context());
        // The model makes reports only after the first request for one.
        let looks = (0..LOOKS).map(|look| {
            std::thread::sleep(Duration::from_millis(if look == 0 { 0 } else { 20 }));
            served.model().report()
        });
        if let Some(report) = looks.flatten().next() {
            let memory = &report.memory;
            text += &format!(
                "memory   room for {} of {} experts; {}, {} threads\ndrive    {}\n",
                memory.slots, memory.experts, report.isa, report.threads, report.read_path
            );
            text += &warmed(&report.total);
        }
        text += &match &self.took {
            Some(took) => took.describe(),
            None => "nothing has been answered yet".to_owned(),
        };
        self.screen.report(&text)
    }

    fn set(&mut self, pairs: Vec<(String, String)>) -> Result<(), CliError> {
        if pairs.is_empty() {
            let list = self.conversation.settings.list().join("\n");
            return self.screen.report(&list);
        }
        let mut settings = self.conversation.settings.clone();
        for (name, value) in &pairs {
            if let Err(message) = settings.set(name, value) {
                return self.refuse(message);
            }
        }
        self.conversation.settings = settings;
        self.keep()?;
        let set: Vec<String> = pairs.iter().map(|(name, value)| format!("{name}={value}")).collect();
        self.screen.remark(&format!("[{}]", set.join(" ")))
    }

    fn thinking(&mut self) -> Result<(), CliError> {
        let last = self.conversation.turns.iter().rev().find_map(|turn| turn.answer.as_ref());
        match last.map(|said| said.thinking.clone()).filter(|thinking| !thinking.is_empty()) {
            None => self.screen.report("[the last answer has no thinking]"),
            Some(thinking) => {
                self.screen.thought(&thinking)?;
                self.screen.end_line()
            }
        }
    }
}

/// The first line of a message, shortened.
fn title(message: &str) -> String {
    const MOST: usize = 60;
    let line = message.lines().next().unwrap_or_default();
    let whole = line.len() == message.len() && line.chars().count() <= MOST;
    let cut: String = line.chars().take(MOST).collect();
    if whole { cut } else { cut + " …" }
}

fn help() -> String {
    let line = |(name, arguments, what): (&str, &str, &str)| format!("{:<23} {what}", format!("/{name} {arguments}"));
    let lines: Vec<String> = COMMANDS.into_iter().map(line).collect();
    lines.join("\n") + "\n\n" + KEYS
}

/// A list of conversations, one line each.
fn described(list: &[Listed]) -> String {
    if list.is_empty() {
        return "there are no conversations yet".into();
    }
    let age = |listed: &Listed| match SystemTime::now().duration_since(listed.changed).map_or(0, |d| d.as_secs()) {
        s if s < 3600 => format!("{} min ago", s / 60),
        s if s < 48 * 3600 => format!("{} h ago", s / 3600),
        s => format!("{} days ago", s / 86_400),
    };
    let line = |listed: &Listed| {
        let Listed { name, turns, first, .. } = listed;
        let messages = if *turns == 1 { "message " } else { "messages" };
        format!("{name:<20} {turns:>4} {messages}  {:>12}  {}", age(listed), title(first))
    };
    let mut lines: Vec<String> = list.iter().take(LISTED).map(line).collect();
    if list.len() > LISTED {
        lines.push(format!("and {} older ones", list.len() - LISTED));
    }
    lines.join("\n")
}

/// What was read while nothing was asked, as a line; nothing where nothing was.
fn warmed(total: &Stats) -> String {
    match total.warmed {
        0 => String::new(),
        n => format!(
            "         {} ({}) read while there was nothing to do\n",
            counted(n, "expert"),
            Bytes(total.warmed_bytes)
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_name_that_is_like_it_is_proposed() {
        assert_eq!(nearest("tempratur", &["temperature", "top_p"]), Some("temperature"));
        assert_eq!(nearest("zzz", &["temperature", "top_p"]), None);
        // Short names have little in common after a slip.
        assert_eq!(nearest("rnu", &["rm", "run"]), Some("run"));
        assert_eq!(nearest("rx", &["rm", "run"]), None);
        assert_eq!(nearest("a", &[]), None);
    }

    #[test]
    fn what_was_read_meanwhile_is_said() {
        assert_eq!(warmed(&Stats::default()), "");
        let said = warmed(&Stats { warmed: 1, warmed_bytes: 3 << 20, ..Stats::default() });
        assert!(said.contains("1 expert (3.0 MiB) read"), "{said}");
    }

    #[test]
    fn titles_are_short() {
        assert_eq!(title("short"), "short");
        assert_eq!(title("two\nlines"), "two …");
        assert_eq!(title(&"ä".repeat(100)).chars().count(), 62);
    }
}
