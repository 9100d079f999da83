//! One answer while it is made: a generation's events become pieces of thinking, text and tool calls.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use sluice_dialect::{AnswerParser, Piece};
use sluice_generate::{Event, Finish, Handle, Logprob, Place, Request, Sampled};
use sluice_text::{StopCondition, StopMatcher, Tokenizer};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::{Instant, timeout_at};

use crate::ask::{Ask, Input};
use crate::error::{ApiError, Kind};
use crate::live::{Live, LiveAnswer, LiveGuard};
use crate::served::{Hears, Served};

/// A client gets something at least this often.
pub const KEEP_ALIVE: Duration = Duration::from_secs(4);
/// While a prompt is read, the client is told at most this often.
const PROGRESS: Duration = Duration::from_secs(1);

/// The next step of an answer. Nothing comes after [`Step::End`] or [`Step::Failed`].
#[derive(Debug)]
pub enum Step {
    /// Nothing new of the answer itself, but the client should know that the server is working on it.
    Waiting(Waiting),
    /// The text that is continued, if requested, and the model's probabilities of its tokens, except the first.
    Echo(String, Vec<TokenLogprob>),
    /// More of the answer, and the log probabilities of its tokens, if requested.
    Piece(Piece, Vec<TokenLogprob>),
    /// The end.
    End(Ending),
    /// The end, because something went wrong.
    Failed(ApiError),
}

/// The state of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Waiting {
    /// The model is being loaded.
    Loading,
    /// Others come first.
    Queued {
        /// Number of generations that come first.
        ahead: usize,
    },
    /// The prompt is being read.
    Reading {
        /// Tokens read so far.
        read: usize,
        /// Tokens of the prompt.
        prompt: usize,
    },
    /// Tokens are being generated, but their meaning is not certain yet.
    Generating {
        /// Number of tokens so far.
        generated: usize,
    },
}

/// How an answer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ending {
    /// The reason.
    pub why: Why,
    /// Numbers of tokens.
    pub usage: Usage,
}

/// Why an answer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Why {
    /// The model has finished.
    Done,
    /// The model has finished, and has called tools.
    Calls,
    /// This stop string occurred.
    Stop(Option<String>),
    /// The answer has as many tokens as were requested, or as fit.
    Length,
}

/// Tokens of an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Tokens of the prompt that did not have to be computed.
    pub cached: usize,
    /// Tokens generated.
    pub generated: usize,
    /// Generated tokens that are thinking.
    pub thinking: usize,
}

/// A token and the model's probability of it.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub token: TokenText,
    /// Natural logarithm of its probability; `None` for the first token of a text.
    pub logprob: Option<f32>,
    /// The likeliest tokens with theirs.
    pub top: Vec<(TokenText, f32)>,
}

/// A token as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenText {
    /// Its number.
    pub id: u32,
    /// Its text; incomplete characters are replaced.
    pub text: String,
    /// Its bytes, which may be a part of a character.
    pub bytes: Vec<u8>,
}

/// How the events of a generation are interpreted.
pub struct Reading {
    /// Parses the text; `None`: all of it is text.
    pub parser: Option<AnswerParser>,
    /// Strings that end the text of the answer.
    pub strings: StopCondition,
    /// Turns tokens into text.
    pub tokenizer: Option<Tokenizer>,
    /// Receives every token that is sampled now, but not those that the request supplies.
    pub hears: Option<Hears>,
    /// Whether later requests will not need the tokens of the answer.
    pub forgets: bool,
}

impl Reading {
    fn text_of(&self, id: u32) -> TokenText {
        let tokenizer = self.tokenizer.as_ref();
        let text = tokenizer.and_then(|t| t.decode(&[id], false).ok()).unwrap_or_default();
        let bytes = tokenizer.and_then(|t| t.token_bytes(id).ok()?).unwrap_or_else(|| text.clone().into_bytes());
        TokenText { id, text, bytes }
    }

    fn scored(&self, id: u32, logprob: f32, top: &[Logprob]) -> TokenLogprob {
        let top = top.iter().map(|other| (self.text_of(other.id), other.logprob)).collect();
        TokenLogprob { token: self.text_of(id), logprob: Some(logprob), top }
    }
}

/// The text that is continued, and its first token if probabilities are requested.
fn echo(request: &Request, reading: &Reading, ask: &Ask) -> Result<(String, Vec<TokenLogprob>), ApiError> {
    let text = match (&ask.input, &reading.tokenizer) {
        (Input::Text(text), _) => text.clone(),
        (_, Some(tokenizer)) => tokenizer.decode(&request.prompt, false)?,
        (_, None) => String::new(),
    };
    let first = request.prompt.first().filter(|_| request.prompt_logprobs.is_some());
    let token = |&id: &u32| TokenLogprob { token: reading.text_of(id), logprob: None, top: Vec::new() };
    Ok((text, first.map(token).into_iter().collect()))
}

/// An answer while it is made. Dropping it ends its generation.
pub struct Answer {
    /// Keeps the model loaded.
    served: Arc<Served>,
    events: UnboundedReceiver<Event>,
    handle: Handle,
    live: Option<LiveGuard>,
    reading: Reading,
    matcher: StopMatcher,
    logprobs: bool,
    /// The prompt and the generated tokens, if they are to be remembered.
    transcript: Option<Vec<u32>>,
    /// Tokens since the last piece.
    tokens: Vec<TokenLogprob>,
    fresh: usize,
    ready: VecDeque<Step>,
    usage: Usage,
    /// The text that is continued and its tokens, until they are sent.
    echo: Option<(String, Vec<TokenLogprob>)>,
    /// The ending caused by a stop string, until the generation has ended.
    stopped: Option<Why>,
    read: Option<(usize, usize)>,
    told: Instant,
    over: bool,
}

impl Answer {
    /// Puts a generation into the model's queue.
    ///
    /// # Errors
    /// If the request is invalid, or the queue is full.
    pub fn start(
        served: Arc<Served>,
        request: Request,
        mut reading: Reading,
        ask: &Ask,
        live: &Live,
    ) -> Result<Self, ApiError> {
        let usage = Usage { prompt: request.prompt.len(), ..Usage::default() };
        let logprobs = request.logprobs.is_some();
        let remembers = ask.keep && !reading.forgets;
        let transcript = (remembers && matches!(ask.input, Input::Chat(_))).then(|| request.prompt.clone());
        // It never holds more events than the context has tokens.
        let (sender, events) = unbounded_channel();
        let (mut hears, mut known) = (reading.hears.take(), request.sampled.len());
        let owner = move |event| {
            if let (Some(hears), Event::Token { id, logprob, top }) = (&mut hears, &event) {
                match known {
                    0 => hears(Sampled { id: *id, logprob: *logprob, top: top.clone() }),
                    _ => known -= 1,
                }
            }
            match sender.send(event) {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            }
        };
        let echo = ask.echo.then(|| echo(&request, &reading, ask)).transpose()?;
        let handle = served.model().submit(request, owner)?;
        let entry = LiveAnswer {
            api: ask.api,
            model: served.id.clone(),
            since: std::time::Instant::now(),
            handle: handle.clone(),
        };
        Ok(Answer {
            live: Some(live.enter(entry)),
            matcher: reading.strings.matcher(),
            served,
            events,
            handle,
            reading,
            logprobs,
            transcript,
            tokens: Vec::new(),
            fresh: 0,
            ready: VecDeque::new(),
            usage,
            echo,
            stopped: None,
            read: None,
            told: Instant::now(),
            over: false,
        })
    }

    /// The model that makes the answer.
    pub fn served(&self) -> &Arc<Served> {
        &self.served
    }

    /// Number of tokens of its prompt.
    pub fn prompt_tokens(&self) -> usize {
        self.usage.prompt
    }

    /// How many generations come before it; 0 once it has begun.
    pub fn queue_position(&self) -> usize {
        match self.handle.place() {
            Some(Place::Queued { ahead }) => ahead,
            _ => 0,
        }
    }

    /// The next step, at least every [`KEEP_ALIVE`]; `None` after the end. The future can be dropped while it waits; nothing is
    /// lost.
    pub async fn next(&mut self) -> Option<Step> {
        loop {
            if let Some(step) = self.ready.pop_front() {
                self.told = Instant::now();
                return Some(step);
            }
            if self.over {
                return None;
            }
            match timeout_at(self.told + KEEP_ALIVE, self.events.recv()).await {
                Ok(Some(event)) => self.take(event),
                Ok(None) => self.fail(ApiError::new(Kind::Internal, "the model has ended: its log says why")),
                Err(_) => self.ready.push_back(Step::Waiting(self.waiting())),
            }
        }
    }

    /// Ends the answer early. The text so far comes as pieces, followed by the end once the generation has ended. What the model
    /// remembers of the answer is kept as if it had ended by itself.
    pub fn stop(&mut self) {
        if self.over || self.stopped.is_some() {
            return;
        }
        let pieces = self.reading.parser.as_mut().map(AnswerParser::finish).unwrap_or_default();
        self.add(pieces);
        self.release();
        self.stopped.get_or_insert(Why::Stop(None));
        self.handle.cancel();
    }

    /// Its state: waiting for others, reading its prompt, or generating.
    pub fn waiting(&self) -> Waiting {
        match (self.handle.place(), self.read) {
            (Some(Place::Queued { ahead }), _) => Waiting::Queued { ahead },
            (Some(Place::Reading { read, prompt }), _) => Waiting::Reading { read, prompt },
            (_, Some((read, prompt))) if read < prompt => Waiting::Reading { read, prompt },
            _ => Waiting::Generating { generated: self.usage.generated },
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Progress { read, prompt } => {
                self.read = Some((read, prompt));
                if read < prompt && self.told.elapsed() >= PROGRESS {
                    self.ready.push_back(Step::Waiting(Waiting::Reading { read, prompt }));
                }
            }
            Event::PromptToken { id, logprob, top } => {
                let scored = self.reading.scored(id, logprob, &top);
                self.echo.iter_mut().for_each(|(_, tokens)| tokens.push(scored.clone()));
            }
            Event::Token { .. } | Event::Text(_) if self.stopped.is_some() => {}
            Event::Token { id, logprob, top } => {
                self.send_echo();
                self.usage.generated += 1;
                self.transcript.iter_mut().for_each(|transcript| transcript.push(id));
                self.fresh += 1;
                if let Some(logprob) = logprob.filter(|_| self.logprobs) {
                    self.tokens.push(self.reading.scored(id, logprob, &top));
                }
            }
            Event::Text(text) => {
                let pieces = match &mut self.reading.parser {
                    Some(parser) => parser.push(&text),
                    None => vec![Piece::Text(text)],
                };
                self.add(pieces);
            }
            Event::Shifted { .. } => {}
            Event::Finish { reason, usage } => self.finish(reason, &usage),
            Event::Failed(error) => self.fail(error.into()),
        }
    }

    fn send_echo(&mut self) {
        self.ready.extend(self.echo.take().map(|(text, tokens)| Step::Echo(text, tokens)));
    }

    /// Adds pieces, up to a stop string in the text.
    fn add(&mut self, pieces: Vec<Piece>) {
        for piece in pieces {
            match piece {
                Piece::Text(text) => {
                    let emit = self.matcher.push(&text);
                    self.push(Piece::Text(emit.text));
                    if emit.stopped {
                        let string = self.matcher.matched().map(|index| self.reading.strings.strings()[index].clone());
                        // The rest of the step's tokens does not count; the end of the generation reports what was cached.
                        self.stopped = Some(Why::Stop(string));
                        self.handle.cancel();
                        return;
                    }
                }
                other => {
                    self.release();
                    self.push(other);
                }
            }
        }
    }

    /// Text that was held back because a stop string might begin in it is now certain.
    fn release(&mut self) {
        let held = self.matcher.finish();
        self.matcher = self.reading.strings.matcher();
        self.push(Piece::Text(held));
    }

    fn push(&mut self, piece: Piece) {
        let fresh = std::mem::take(&mut self.fresh);
        match &piece {
            Piece::Text(text) if text.is_empty() => {
                self.fresh = fresh;
                return;
            }
            Piece::Thinking(_) => {
                self.usage.thinking += fresh;
                self.tokens.clear();
            }
            _ => {}
        }
        let tokens = std::mem::take(&mut self.tokens);
        self.ready.push_back(Step::Piece(piece, tokens));
    }

    fn finish(&mut self, reason: Finish, usage: &sluice_generate::Usage) {
        self.usage.cached = usage.cached_tokens;
        self.send_echo();
        if let Some(why) = self.stopped.take() {
            return self.end(why);
        }
        self.usage.generated = usage.generated_tokens;
        let pieces = self.reading.parser.as_mut().map(AnswerParser::finish).unwrap_or_default();
        self.add(pieces);
        if let Some(why) = self.stopped.take() {
            return self.end(why);
        }
        self.release();
        let calls = self.reading.parser.as_ref().is_some_and(AnswerParser::has_calls);
        match reason {
            Finish::EndToken | Finish::Complete if calls => self.end(Why::Calls),
            Finish::EndToken | Finish::Complete => self.end(Why::Done),
            Finish::StopString => self.end(Why::Stop(None)),
            Finish::Length | Finish::Context => self.end(Why::Length),
            Finish::Cancelled => self.fail(ApiError::new(Kind::Closing, "the answer was ended by the server")),
        }
    }

    fn end(&mut self, why: Why) {
        self.ready.push_back(Step::End(Ending { why, usage: self.usage }));
        self.close();
    }

    fn fail(&mut self, error: ApiError) {
        self.ready.push_back(Step::Failed(error));
        self.close();
    }

    fn close(&mut self) {
        self.over = true;
        self.live = None;
        if let Some(tokens) = self.transcript.take() {
            self.served.remember(tokens);
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        // A client that disconnected may come back to continue.
        self.close();
    }
}
