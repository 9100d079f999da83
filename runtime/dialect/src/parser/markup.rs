//! Answers with markers around thinking and calls: all families except gpt-oss.

use super::Piece;
use super::header::{self, Begun, Body, Header, bare_object, object};
use super::output::Output;
use super::python;
use super::scan::{Scan, begins, scan};
use crate::syntax::{Calls, Fields, Named, Objects, Syntax, Tagged};
use crate::tools::Tools;

/// The parser of these answers.
#[derive(Debug, Clone)]
pub(super) struct Markup {
    syntax: &'static Syntax,
    tools: Tools,
    /// Text that has been pushed but not consumed.
    buffer: String,
    state: State,
    /// Whether only white space has arrived, so that thinking may open.
    at_start: bool,
    /// Whether line breaks here belong to a marker before them.
    skips_lines: bool,
    /// Whether a section of calls is open.
    in_section: bool,
    /// Whether the marker that opens an answer may come next.
    opens_answer: bool,
    /// Whether it has come, so that the marker that closes it counts.
    in_answer: bool,
    /// Markers that may come next and have no further meaning.
    trailers: Vec<&'static str>,
    out: Output,
}

#[derive(Debug, Clone)]
enum State {
    Text,
    Thinking,
    Call(Body),
    /// After a call, where another one of the same list may follow.
    Next,
    /// In thinking, at text that may be a call that should have ended it.
    Drafted(Box<Draft>),
}

/// Calls within thinking. Models forget to end it, so calls at the end of an answer are calls. If other text follows, the model has
/// only thought about them.
#[derive(Debug, Clone)]
struct Draft {
    /// Everything from the line breaks before the first marker on.
    text: String,
    /// Length of that marker and the text before it.
    marker: usize,
    /// Parses it as if thinking had ended.
    parser: Markup,
    pieces: Vec<Piece>,
}

/// The effect of a marker in text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Effect {
    EndThinking,
    OpenSection,
    CloseSection,
    CloseAnswer,
    Call,
    Draft,
}

impl Markup {
    pub(super) fn new(syntax: &'static Syntax, prompt_tail: &str, tools: &Tools) -> Self {
        let (tail, answer) = (prompt_tail.trim_end(), syntax.answer);
        let thinks = tail.ends_with(syntax.think.open);
        Self {
            syntax,
            tools: tools.clone(),
            buffer: String::new(),
            state: if thinks { State::Thinking } else { State::Text },
            at_start: !thinks,
            skips_lines: true,
            in_section: false,
            opens_answer: false,
            in_answer: answer.is_some_and(|answer| tail.ends_with(answer.open)),
            trailers: Vec::new(),
            out: Output::new(syntax.ids),
        }
    }

    pub(super) fn output(&mut self) -> &mut Output {
        &mut self.out
    }

    pub(super) fn calls(&self) -> usize {
        self.out.calls()
    }

    pub(super) fn push(&mut self, text: &str) -> Vec<Piece> {
        self.buffer.push_str(text);
        self.run(false);
        self.out.take()
    }

    pub(super) fn finish(&mut self) -> Vec<Piece> {
        self.run(true);
        match &mut self.state {
            State::Call(Body::Json(arguments) | Body::Object(arguments)) => arguments.finish(&mut self.out),
            State::Call(Body::Tags(tags)) => tags.finish(&mut self.out),
            State::Call(Body::Fields(_) | Body::Whole(_))
            | State::Text
            | State::Thinking
            | State::Next
            | State::Drafted(_) => {}
        }
        self.out.take()
    }

    fn run(&mut self, end: bool) {
        loop {
            let goes_on = match &self.state {
                State::Text => self.step_text(end),
                State::Thinking => self.step_marked(end),
                State::Call(_) => self.step_call(end),
                State::Next => self.step_next(end),
                State::Drafted(_) => self.step_draft(end),
            };
            if !goes_on {
                return;
            }
        }
    }

    fn step_text(&mut self, end: bool) -> bool {
        if !self.trailers.is_empty() {
            let rest = self.buffer.trim_start();
            if let Some(trailer) = self.trailers.iter().find(|trailer| rest.starts_with(**trailer)) {
                let used = self.buffer.len() - rest.len() + trailer.len();
                self.buffer.drain(..used);
                return true;
            }
            if !end && (rest.is_empty() || self.trailers.iter().any(|trailer| begins(rest, trailer))) {
                return false;
            }
            self.trailers.clear();
        }
        if let (Some(answer), true) = (self.syntax.answer, self.opens_answer) {
            let rest = self.buffer.trim_start();
            if !end && (rest.is_empty() || begins(rest, answer.open)) {
                return false;
            }
            self.opens_answer = false;
            if rest.starts_with(answer.open) {
                let used = self.buffer.len() - rest.len() + answer.open.len();
                self.buffer.drain(..used);
                (self.in_answer, self.skips_lines) = (true, true);
            }
        }
        self.skip_lines();
        if self.at_start {
            if let Some(goes_on) = self.step_start(end) {
                return goes_on;
            }
            self.at_start = false;
        }
        self.step_marked(end)
    }

    /// Drops line breaks that belong to a marker before them.
    fn skip_lines(&mut self) {
        if self.skips_lines {
            let kept = self.buffer.trim_start_matches(['\n', '\r']).len();
            self.buffer.drain(..self.buffer.len() - kept);
            self.skips_lines = self.buffer.is_empty();
        }
    }

    /// Handles the beginning of an answer. `None`: it is ordinary text.
    fn step_start(&mut self, end: bool) -> Option<bool> {
        let rest = self.buffer.trim_start();
        let space = self.buffer.len() - rest.len();
        if rest.is_empty() && !end {
            return Some(false);
        }
        let (think, answer) = (self.syntax.think, self.syntax.answer.map(|answer| answer.open));
        let marks = [(think.open, State::Thinking), (think.close, State::Text)];
        for (marker, state) in marks.into_iter().chain(answer.map(|open| (open, State::Text))) {
            if rest.starts_with(marker) {
                self.in_answer |= answer == Some(marker);
                self.opens_answer = marker == think.close;
                self.buffer.drain(..space + marker.len());
                (self.state, self.at_start, self.skips_lines) = (state, false, true);
                return Some(true);
            }
            if begins(rest, marker) && !end {
                return Some(false);
            }
        }
        let found = match self.syntax.calls {
            _ if self.tools.is_empty() => Header::Not,
            Calls::Objects(Objects { bare: true, .. }) => bare_object(rest, &self.tools),
            Calls::Python => python::bare(rest, &self.tools),
            _ => Header::Not,
        };
        match found {
            Header::Wait if end => None,
            Header::Wait => Some(false),
            Header::Not => None,
            Header::Call(begun) => {
                self.at_start = false;
                self.begin(space, begun);
                Some(true)
            }
        }
    }

    /// Text or thinking up to the next marker.
    fn step_marked(&mut self, end: bool) -> bool {
        self.skip_lines();
        let (markers, effects): (Vec<&'static str>, Vec<Effect>) = self.markers().into_iter().unzip();
        match scan(&self.buffer, &markers, end) {
            Scan::Safe(safe) => {
                self.emit_before(safe, !end);
                false
            }
            Scan::Found { at, marker } => self.mark(at, markers[marker], effects[marker], end),
        }
    }

    /// Markers that count at this place.
    fn markers(&self) -> Vec<(&'static str, Effect)> {
        let mut markers = Vec::new();
        if let (Some(answer), true, State::Text) = (self.syntax.answer, self.in_answer, &self.state) {
            markers.push((answer.close, Effect::CloseAnswer));
        }
        if matches!(self.state, State::Thinking) {
            markers.push((self.syntax.think.close, Effect::EndThinking));
            if !self.syntax.calls_end_thinking {
                let open = self.syntax.section.map_or(self.syntax.calls.open(), |section| section.open);
                markers.extend((!self.tools.is_empty()).then_some((open, Effect::Draft)));
                return markers;
            }
        }
        if self.tools.is_empty() {
            return markers;
        }
        match self.syntax.section {
            Some(section) if self.in_section => markers.push((section.close, Effect::CloseSection)),
            Some(section) => markers.push((section.open, Effect::OpenSection)),
            None => {}
        }
        let call = match &self.syntax.calls {
            Calls::Tagged(Tagged { bare: false, .. }) => self.syntax.section.is_none() || self.in_section,
            _ => true,
        };
        if call {
            markers.push((self.syntax.calls.open(), Effect::Call));
        }
        if let Calls::Tagged(Tagged { bare: true, open, name, .. }) = &self.syntax.calls
            && !open.is_empty()
        {
            markers.push((name, Effect::Call));
        }
        markers
    }

    /// Applies the effect of a marker. Returns whether there is more to do.
    fn mark(&mut self, at: usize, marker: &'static str, effect: Effect, end: bool) -> bool {
        if effect == Effect::CloseAnswer {
            return self.close_answer(at, marker, end);
        }
        let rest = &self.buffer[at..];
        let found = match (effect, self.syntax.section) {
            (Effect::Call | Effect::Draft, None) | (Effect::Call, Some(_)) => {
                header::header(self.syntax, &self.tools, rest, end)
            }
            (Effect::OpenSection | Effect::Draft, Some(section)) => {
                header::section(self.syntax, section, &self.tools, rest, end)
            }
            _ => {
                self.emit_before(at, true);
                let used = self.buffer.find(marker).map_or(0, |at| at + marker.len());
                self.buffer.drain(..used);
                self.in_section = false;
                self.opens_answer |= effect == Effect::EndThinking;
                self.skips_lines = true;
                self.state = State::Text;
                return true;
            }
        };
        match found {
            Header::Wait => {
                self.emit_before(at, true);
                false
            }
            Header::Not => {
                self.emit_before(at + marker.len(), false);
                true
            }
            Header::Call(begun) if effect == Effect::Draft => {
                match self.tools.get(&begun.name).is_some() {
                    true => self.draft(at, marker),
                    false => self.emit_before(at + marker.len(), false),
                }
                true
            }
            Header::Call(begun) => {
                let before = self.buffer.len();
                self.emit_before(at, true);
                self.in_section |= effect == Effect::OpenSection;
                self.begin(at - (before - self.buffer.len()), begun);
                true
            }
        }
    }

    /// Handles the marker that closes an answer, which it does only if nothing follows. Elsewhere, the text mentions it.
    fn close_answer(&mut self, at: usize, marker: &'static str, end: bool) -> bool {
        if !self.buffer[at + marker.len()..].trim().is_empty() {
            self.emit_before(at + marker.len(), false);
            return true;
        }
        self.emit_before(at, true);
        if end {
            self.buffer.clear();
        }
        false
    }

    /// Sets aside text that may be a call, from the line breaks before it on.
    fn draft(&mut self, at: usize, marker: &'static str) {
        let before = self.buffer.len();
        self.emit_before(at, true);
        let marker = at + marker.len() - (before - self.buffer.len());
        let mut parser = Self::new(self.syntax, "", &self.tools);
        parser.at_start = false;
        parser.out = self.out.clone();
        parser.out.take();
        self.state = State::Drafted(Box::new(Draft { text: String::new(), marker, parser, pieces: Vec::new() }));
    }

    fn step_draft(&mut self, end: bool) -> bool {
        let State::Drafted(draft) = &mut self.state else { return false };
        let more = std::mem::take(&mut self.buffer);
        draft.text.push_str(&more);
        draft.pieces.extend(draft.parser.push(&more));
        if end {
            draft.pieces.extend(draft.parser.finish());
        }
        let is_text = |piece: &Piece| matches!(piece, Piece::Text(text) if !text.trim().is_empty());
        if draft.pieces.iter().any(is_text) {
            self.out.thinking(&draft.text[..draft.marker]);
            self.buffer = draft.text.split_off(draft.marker);
            self.state = State::Thinking;
            return true;
        }
        if end {
            self.out.adopt(std::mem::take(&mut draft.pieces), draft.parser.out.calls());
            self.state = State::Text;
        }
        false
    }

    /// Passes on the text before a place; with `keeps_lines`, all but line breaks at its end.
    fn emit_before(&mut self, at: usize, keeps_lines: bool) {
        let text = &self.buffer[..at];
        let length = if keeps_lines { text.trim_end_matches(['\n', '\r']).len() } else { at };
        match self.state {
            State::Thinking => self.out.thinking(&text[..length]),
            _ => self.out.text(&text[..length]),
        }
        self.buffer.drain(..length);
    }

    /// Begins a call at a place in the buffer.
    fn begin(&mut self, at: usize, begun: Begun) {
        self.buffer.drain(..at + begun.length);
        self.out.call(&begun.name, begun.id.as_deref());
        self.state = match begun.body {
            Body::Whole(arguments) => {
                self.out.arguments(&arguments);
                State::Next
            }
            Body::Tags(tags) => {
                self.out.arguments("{");
                State::Call(Body::Tags(tags))
            }
            body => State::Call(body),
        };
    }

    fn step_call(&mut self, end: bool) -> bool {
        let State::Call(body) = &mut self.state else { return false };
        let (used, over) = match body {
            Body::Json(arguments) | Body::Object(arguments) => arguments.read(&self.buffer, end, &mut self.out),
            Body::Tags(tags) => tags.read(&self.buffer, end, &mut self.out),
            Body::Fields(fields) => fields.read(&self.buffer, end, &mut self.out),
            Body::Whole(_) => (0, true),
        };
        let listed = matches!(body, Body::Object(_));
        self.buffer.drain(..used);
        if over {
            match listed {
                true => self.state = State::Next,
                false => self.end_call(),
            }
        }
        over
    }

    fn end_call(&mut self) {
        self.state = State::Text;
        self.skips_lines = true;
        self.trailers = match &self.syntax.calls {
            Calls::Named(Named { close, .. }) => close.iter().copied().collect(),
            Calls::Tagged(Tagged { trailer, .. }) => trailer.iter().copied().collect(),
            Calls::Objects(Objects { close, .. }) => close.iter().copied().collect(),
            Calls::Fields(Fields { close, .. }) => vec![close],
            Calls::Python => vec![python::CLOSE],
            Calls::Harmony => Vec::new(),
        };
        if let (Some(section), false) = (self.syntax.section, self.in_section) {
            self.trailers.push(section.close);
        }
        if let (Some(answer), true) = (self.syntax.answer, self.in_answer) {
            self.trailers.push(answer.close);
        }
    }

    /// Handles the text after a call of a list: another call, or the end of the list.
    fn step_next(&mut self, end: bool) -> bool {
        let between = |c: char| c.is_whitespace() || matches!(c, ',' | ';' | ']' | '}');
        let kept = self.buffer.trim_start_matches(between).len();
        self.buffer.drain(..self.buffer.len() - kept);
        if self.buffer.is_empty() {
            return false;
        }
        let found = match &self.syntax.calls {
            Calls::Objects(Objects { bare: true, .. }) => bare_object(&self.buffer, &self.tools),
            Calls::Objects(Objects { close, .. }) => object(&self.buffer, close.iter().copied().collect()),
            Calls::Named(_) => object(&self.buffer, Vec::new()),
            Calls::Python => python::next(&self.buffer, &self.tools),
            Calls::Tagged(_) | Calls::Fields(_) | Calls::Harmony => Header::Not,
        };
        match found {
            Header::Wait if !end => false,
            Header::Wait | Header::Not => {
                self.end_call();
                true
            }
            Header::Call(begun) => {
                self.begin(0, begun);
                true
            }
        }
    }
}
