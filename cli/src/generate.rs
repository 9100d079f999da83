//! The generation loop: prompt in, tokens and text out, measured.

use std::time::Instant;

use serde::Serialize;
use sluice_runtime::model::router::Choice;
use sluice_runtime::sampler::{Sampler, SamplerConfig};
use sluice_runtime::text::{Detokenizer, Emit, Special, StopCondition, StopMatcher, Tokenizer};
use sluice_runtime::{Control, Engine, Phase, Progress, Span, Want};

use crate::error::CliError;
use crate::profile;
use crate::recorder::Recorder;
use crate::terminal::step_bar;

/// What to generate.
#[derive(Debug)]
pub(crate) struct Request<'a> {
    /// Tokens to continue.
    pub(crate) prompt: &'a [u32],
    /// Most tokens to generate.
    pub(crate) max_tokens: usize,
    /// How tokens are chosen.
    pub(crate) sampling: SamplerConfig,
    /// What ends the generation early.
    pub(crate) stop: &'a StopCondition,
    /// Turns tokens into text; without it there is no text.
    pub(crate) tokenizer: Option<&'a Tokenizer>,
    /// What becomes of special tokens in the text.
    pub(crate) special: Special,
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Finish {
    /// As many tokens as were asked for.
    Length,
    /// The model said that it is done.
    EndToken,
    /// A stop string appeared.
    StopString,
    /// The context is full.
    Context,
}

/// What was generated.
#[derive(Debug)]
pub(crate) struct Generation {
    /// The tokens, an end token included.
    pub(crate) ids: Vec<u32>,
    /// Their text, without stop string, and without end token unless special tokens are shown; `None` without a tokenizer.
    pub(crate) text: Option<String>,
    pub(crate) finish: Finish,
    pub(crate) prefill: profile::Phase,
    pub(crate) decode: profile::Phase,
}

/// Sees every token, and the text that became certain with it.
pub(crate) type TokenSink<'a> = dyn FnMut(Option<u32>, &str) -> Result<(), CliError> + 'a;

/// Generates; calls `sink` with every token and the text that became certain with it (often empty, and at the end without
/// a token). `recorder` sees the routing.
pub(crate) fn generate(
    engine: &mut Engine,
    request: &Request<'_>,
    mut recorder: Option<&mut Recorder>,
    sink: &mut TokenSink<'_>,
) -> Result<Generation, CliError> {
    let mut sampler = Sampler::new(request.sampling)?;
    let mut sequence = engine.new_sequence();
    let mut logits = Vec::new();
    let before = (Instant::now(), engine.stats());
    let prompt = Span::prompt(&mut sequence, request.prompt, Want::Last);
    step(engine, prompt, recorder.as_deref_mut(), &mut logits)?;
    let prefill = profile::Phase::since(&before, engine);

    let before = (Instant::now(), engine.stats());
    let mut stream = TextStream::new(request);
    let mut history = request.prompt.to_vec();
    let finish = loop {
        if history.len() - request.prompt.len() == request.max_tokens {
            break Finish::Length;
        }
        // The first token's logits come from the prompt.
        if let Some(&last) = history.get(request.prompt.len()..).and_then(<[u32]>::last) {
            if sequence.position() == sequence.capacity() {
                break Finish::Context;
            }
            step(engine, Span::decode(&mut sequence, &last), recorder.as_deref_mut(), &mut logits)?;
        }
        let id = sampler.sample(&logits, &history)?;
        history.push(id);
        if request.stop.is_eos(id) {
            match request.special {
                Special::Shown => stream.push(id, &mut |text| sink(Some(id), text)).map(|_| ())?,
                Special::Markup | Special::Hidden => sink(Some(id), "")?,
            }
            break Finish::EndToken;
        }
        let stopped = stream.push(id, &mut |text| sink(Some(id), text))?;
        if stopped {
            break Finish::StopString;
        }
    };
    let stopped = stream.finish(&mut |text| sink(None, text))?;
    let decode = profile::Phase::since(&before, engine);
    Ok(Generation {
        ids: history.split_off(request.prompt.len()),
        text: request.tokenizer.map(|_| stream.text),
        finish: if stopped { Finish::StopString } else { finish },
        prefill,
        decode,
    })
}

/// Appends the span and writes the logits of its last token. A bar follows a prompt through the layers: minutes, for a large model.
fn step(
    engine: &mut Engine,
    span: Span<'_>,
    recorder: Option<&mut Recorder>,
    logits: &mut Vec<f32>,
) -> Result<(), CliError> {
    let (tokens, layers) = (span.tokens.len(), engine.spec().layers.len());
    let bar = match span.phase {
        Phase::Prompt => step_bar(format!("reading {tokens} tokens"), (tokens * layers) as u64),
        Phase::Decode | Phase::Draft => indicatif::ProgressBar::hidden(),
    };
    let mut progress = |p: Progress| bar.set_position((p.rows_before * layers + p.rows * p.layers) as u64);
    let mut recorder = recorder;
    let mut routing = |layer: usize, position: usize, top_k: usize, choices: &[Choice]| {
        if let Some(recorder) = &mut recorder {
            recorder.record(layer, position, top_k, choices);
        }
    };
    let mut control = Control { progress: Some(&mut progress), routing: Some(&mut routing), ..Control::default() };
    let outcome = engine.step(&mut [span], &mut control, &mut |_, _, row| row.clone_into(logits));
    bar.finish_and_clear();
    Ok(outcome?)
}

/// Tokens to text, up to a stop string.
struct TextStream<'a> {
    tokenizer: Option<(&'a Tokenizer, Detokenizer)>,
    stop: &'a StopCondition,
    matcher: StopMatcher,
    text: String,
    stopped: bool,
}

impl<'a> TextStream<'a> {
    fn new(request: &Request<'a>) -> Self {
        TextStream {
            tokenizer: request.tokenizer.map(|t| (t, Detokenizer::with_special(t, request.special))),
            stop: request.stop,
            matcher: request.stop.matcher(),
            text: String::new(),
            stopped: false,
        }
    }

    /// Adds a token; whether a stop string was found.
    fn push(&mut self, id: u32, sink: &mut dyn FnMut(&str) -> Result<(), CliError>) -> Result<bool, CliError> {
        let emit = match &mut self.tokenizer {
            None => Emit::default(),
            Some((tokenizer, detokenizer)) if detokenizer.hides(id) => {
                // Nobody sees it, but it may be what the user wants to stop at.
                let spelling = tokenizer.token_text(id).unwrap_or_default();
                let mut emit = self.matcher.push_hidden(&spelling);
                let length = self.matcher.matched().map_or(usize::MAX, |index| self.stop.strings()[index].len());
                if emit.stopped && length <= spelling.len() {
                    // The whole stop string is in the token, so all text before it counts.
                    emit.text += &detokenizer.finish()?;
                }
                emit
            }
            Some((_, detokenizer)) => self.matcher.push(&detokenizer.push(id)?),
        };
        self.text += &emit.text;
        self.stopped |= emit.stopped;
        sink(&emit.text)?;
        Ok(self.stopped)
    }

    /// Ends the text; whether a stop string was found, now or before.
    fn finish(&mut self, sink: &mut dyn FnMut(&str) -> Result<(), CliError>) -> Result<bool, CliError> {
        if self.stopped {
            return Ok(true);
        }
        let piece = self.tokenizer.as_mut().map_or(Ok(String::new()), |(_, d)| d.finish())?;
        let emit = self.matcher.push(&piece);
        let mut rest = emit.text;
        if !emit.stopped {
            rest += &self.matcher.finish();
        }
        self.text += &rest;
        if !rest.is_empty() {
            sink(&rest)?;
        }
        Ok(emit.stopped)
    }
}
