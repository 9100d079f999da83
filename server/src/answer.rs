//! One answer as it is made: a generation's events become pieces of thinking, text and tool calls.

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

/// A client hears something at least this often.
pub const KEEP_ALIVE: Duration = Duration::from_secs(4);
/// While a prompt is read, it hears of that at most this often.
const PROGRESS: Duration = Duration::from_secs(1);

/// The next step of an answer. After [`Step::End`] or [`Step::Failed`] nothing comes.
#[derive(Debug)]
pub enum Step {
    /// Nothing new of the answer itself, but the client should hear that it is being worked on.
    Waiting(Waiting),
    /// The text that is continued, if that was asked for, and how probable its tokens are to the model: nothing for the first.
    Echo(String, Vec<TokenLogprob>),
    /// More of the answer, and the log probabilities of its tokens, if they were asked for.
    Piece(Piece, Vec<TokenLogprob>),
    /// The end.
    End(Ending),
    /// The end, because something went wrong.
    Failed(ApiError),
}

/// Where an answer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Waiting {
    /// The model is being loaded.
    Loading,
    /// Others come first.
    Queued {
        /// How many.
        ahead: usize,
    },
    /// The prompt is being read.
    Reading {
        /// Tokens read so far.
        read: usize,
        /// Tokens of the prompt.
        prompt: usize,
    },
    /// Tokens come, but it is not certain yet what they say.
    Generating {
        /// Tokens so far.
        generated: usize,
    },
}

/// How an answer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ending {
    /// Why.
    pub why: Why,
    /// Tokens.
    pub usage: Usage,
}

/// Why an answer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Why {
    /// The model is done.
    Done,
    /// The model is done, and has called tools.
    Calls,
    /// This stop string came.
    Stop(Option<String>),
    /// As many tokens as were asked for, or as fit.
    Length,
}

/// Tokens of an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Of these, the ones that did not have to be computed.
    pub cached: usize,
    /// Tokens generated.
    pub generated: usize,
    /// Of these, the ones of thinking.
    pub thinking: usize,
}

/// A token and how probable it is to the model.
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
    /// Its text; characters that are not complete in it are replaced.
    pub text: String,
    /// Its bytes, which may be a part of a character.
    pub bytes: Vec<u8>,
}

/// How the events of a generation are read.
pub struct Reading {
    /// Takes the text apart; `None`: all of it is text.
    pub parser: Option<AnswerParser>,
    /// Strings that end the text of the answer.
    pub strings: StopCondition,
    /// Turns tokens into text.
    pub tokenizer: Option<Tokenizer>,
    /// Hears of every token that is sampled now, and not of those that the request brings along.
    pub hears: Option<Hears>,
    /// Whether the tokens of the answer are of no use to later requests.
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

/// The text that is continued, and its first token if their probabilities are wanted.
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

/// An answer that is being made. Dropping it ends its generation.
pub struct Answer {
    /// Keeps the model loaded.
    served: Arc<Served>,
    events: UnboundedReceiver<Event>,
    handle: Handle,
    live: Option<LiveGuard>,
    reading: Reading,
    matcher: StopMatcher,
    logprobs: bool,
    /// The prompt and what was generated, if that is to be remembered.
    transcript: Option<Vec<u32>>,
    /// Tokens since the last piece.
    tokens: Vec<TokenLogprob>,
    fresh: usize,
    ready: VecDeque<Step>,
    usage: Usage,
    /// The text that is continued and its tokens, until they are sent.
    echo: Option<(String, Vec<TokenLogprob>)>,
    /// The end that a stop string has made, until the generation has ended.
    stopped: Option<Why>,
    read: Option<(usize, usize)>,
    told: Instant,
    over: bool,
}

impl Answer {
    /// Puts a generation into the model's queue.
    ///
    /// # Errors
    /// What is wrong with the request, or that the queue is full.
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
        // It holds no more than the context has tokens.
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

    /// The model that makes it.
    pub fn served(&self) -> &Arc<Served> {
        &self.served
    }

    /// Tokens of its prompt.
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

    /// What comes next, at least every [`KEEP_ALIVE`]; `None` after the end. It can be given up while it waits, and nothing is lost.
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

    /// Ends the answer where it is. What it has said so far comes as pieces, and then the end, once the model has let go of it; what the
    /// model remembers of it is kept as of an answer that ended by itself.
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

    /// Where it is: waiting for others, reading its prompt, or generating.
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
                        // The rest of the step's tokens does not count; the generation's end says what was cached.
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

    /// Text that was held back because a stop string might begin in it is certain now.
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
        // Whoever went away may come back to go on.
        self.close();
    }
}
