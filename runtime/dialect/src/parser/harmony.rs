//! Answers in OpenAI's harmony format: messages with channels and recipients.
//!
//! <https://github.com/openai/harmony/blob/main/docs/format.md>: `<|channel|>analysis` is thinking; `final`, and `commentary`
//! without a recipient, are text; and a message `to=functions.name` is a call.

use super::Piece;
use super::output::Output;
use super::scan::{Scan, begins, scan};
use crate::syntax::Ids;
use crate::tools::Tools;

const START: &str = "<|start|>";
const CHANNEL: &str = "<|channel|>";
const CONSTRAIN: &str = "<|constrain|>";
const MESSAGE: &str = "<|message|>";
/// Markers that end a message.
const ENDS: [&str; 5] = ["<|end|>", "<|return|>", "<|call|>", START, CHANNEL];

/// Longest header of a message, in bytes.
const MAX_HEADER_BYTES: usize = 1024;

/// The parser of these answers.
#[derive(Debug, Clone)]
pub(super) struct Harmony {
    /// Without tools, nothing is a call.
    has_tools: bool,
    buffer: String,
    state: State,
    /// Kinds of the messages so far that had text.
    thought: bool,
    spoke: bool,
    out: Output,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Before or in the header of a message.
    Header,
    /// In a message. `first`: none of it has arrived yet.
    Thinking {
        first: bool,
    },
    Text {
        first: bool,
    },
    Call,
}

impl Harmony {
    pub(super) fn new(prompt_tail: &str, tools: &Tools) -> Self {
        let inside = prompt_tail.rfind(MESSAGE).filter(|at| prompt_tail.len() == at + MESSAGE.len());
        let header = inside.map(|at| &prompt_tail[prompt_tail.rfind(CHANNEL).unwrap_or(at)..at]);
        let mut parser = Self {
            has_tools: !tools.is_empty(),
            buffer: String::new(),
            state: State::Header,
            thought: false,
            spoke: false,
            out: Output::new(Ids::Long),
        };
        if let Some(header) = header {
            parser.open(header);
        }
        parser
    }

    pub(super) fn output(&mut self) -> &mut Output {
        &mut self.out
    }

    pub(super) fn calls(&self) -> usize {
        self.out.calls()
    }

    pub(super) fn push(&mut self, text: &str) -> Vec<Piece> {
        self.buffer.push_str(text);
        while self.step(false) {}
        self.out.take()
    }

    pub(super) fn finish(&mut self) -> Vec<Piece> {
        while self.step(true) {}
        self.out.take()
    }

    fn step(&mut self, end: bool) -> bool {
        match self.state {
            State::Header => self.step_header(end),
            _ => self.step_message(end),
        }
    }

    fn step_header(&mut self, end: bool) -> bool {
        if self.buffer.is_empty() {
            return false;
        }
        let starts = [START, CHANNEL, CONSTRAIN, MESSAGE, " to="];
        let is_header = starts.iter().any(|start| self.buffer.starts_with(start));
        if !end && starts.iter().chain(&ENDS).any(|start| begins(&self.buffer, start)) {
            return false;
        }
        // The end of a message that did not begin.
        if let Some(stray) = ENDS[..3].iter().find(|end| self.buffer.starts_with(**end)) {
            self.buffer.drain(..stray.len());
            return true;
        }
        let found = self.buffer.find(MESSAGE).filter(|&at| at <= MAX_HEADER_BYTES);
        match found {
            Some(at) if is_header => {
                let header = self.buffer[..at].to_owned();
                self.buffer.drain(..at + MESSAGE.len());
                self.open(&header);
                true
            }
            None if is_header && !end && self.buffer.len() <= MAX_HEADER_BYTES + MESSAGE.len() => false,
            // There is no header. Nothing that the model said is lost.
            _ => {
                let marker = starts[..4].iter().find(|start| self.buffer.starts_with(**start));
                self.state = State::Text { first: true };
                let used = marker.map_or(0, |marker| marker.len());
                let marker = self.buffer[..used].to_owned();
                self.say(&marker);
                self.buffer.drain(..used);
                true
            }
        }
    }

    /// Begins the message with this header.
    fn open(&mut self, header: &str) {
        let recipient = header.split_once("to=").map(|(_, behind)| {
            let end = behind.find(|c: char| c.is_whitespace() || c == '<').unwrap_or(behind.len());
            &behind[..end]
        });
        let channel = header.rsplit_once(CHANNEL).map_or("", |(_, behind)| {
            let end = behind.find(|c: char| c.is_whitespace() || c == '<').unwrap_or(behind.len());
            &behind[..end]
        });
        self.state = match (recipient, channel) {
            (Some(recipient), _) if self.has_tools && !recipient.is_empty() => {
                self.out.call(recipient.strip_prefix("functions.").unwrap_or(recipient), None);
                State::Call
            }
            (_, "analysis") => State::Thinking { first: true },
            _ => State::Text { first: true },
        };
    }

    fn step_message(&mut self, end: bool) -> bool {
        match scan(&self.buffer, &ENDS, end) {
            Scan::Safe(safe) => {
                let text: String = self.buffer.drain(..safe).collect();
                self.say(&text);
                false
            }
            Scan::Found { at, marker } => {
                let text: String = self.buffer.drain(..at).collect();
                self.say(&text);
                // These two markers begin the next message.
                let used = if marker < 3 { ENDS[marker].len() } else { 0 };
                self.buffer.drain(..used);
                self.state = State::Header;
                true
            }
        }
    }

    /// Passes on more of the message. An empty line separates messages of a kind.
    fn say(&mut self, text: &str) {
        if text.is_empty() {
            return;
        }
        match self.state {
            State::Call => self.out.arguments(text),
            State::Thinking { first } => {
                self.out.thinking(if first && self.thought { "\n\n" } else { "" });
                self.out.thinking(text);
                self.thought = true;
                self.state = State::Thinking { first: false };
            }
            State::Text { first } => {
                self.out.text(if first && self.spoke { "\n\n" } else { "" });
                self.out.text(text);
                self.spoke = true;
                self.state = State::Text { first: false };
            }
            State::Header => {}
        }
    }
}
