//! One generation on the command line: prompt in, tokens and text out, measured.

use std::ops::ControlFlow;
use std::sync::mpsc::channel;
use std::time::Instant;

use sluice_generate::sampler::SamplerConfig;
use sluice_generate::{self, Event, Place, Scheduler, SchedulerOptions, Watch, WhenFull};
use sluice_model::router::Choice;
use sluice_model::{Engine, Progress};
use sluice_text::{Special, StopCondition, Tokenizer};

use crate::drafts::DraftCounts;
use crate::error::CliError;
use crate::profile;
use crate::progress::{Meter, step_bar};
use crate::recorder::Recorder;
use crate::terminal::{counted, note};

pub(crate) use sluice_generate::Finish;

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
    /// How special tokens appear in the text.
    pub(crate) special: Special,
    /// What to do when the context is full.
    pub(crate) when_full: WhenFull,
    /// Scheduling, including the source of proposed tokens.
    pub(crate) scheduling: SchedulerOptions,
}

impl Request<'_> {
    fn to_library(&self) -> sluice_generate::Request {
        sluice_generate::Request {
            sampling: self.sampling,
            stop: self.stop.clone(),
            special: self.special,
            when_full: self.when_full,
            ..sluice_generate::Request::new(self.prompt.to_vec(), self.max_tokens)
        }
    }
}

/// What was generated.
#[derive(Debug)]
pub(crate) struct Generation {
    /// The tokens, including an end token.
    pub(crate) ids: Vec<u32>,
    /// Their text, without stop string, and without end token unless special tokens are shown; `None` without a tokenizer.
    pub(crate) text: Option<String>,
    pub(crate) finish: Finish,
    /// Tokens that were dropped because the context was full.
    pub(crate) dropped: usize,
    pub(crate) drafts: DraftCounts,
    pub(crate) first_token: Option<FirstToken>,
    pub(crate) prefill: profile::Phase,
    pub(crate) decode: profile::Phase,
}

/// When the first token had been shown.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FirstToken {
    pub(crate) at: Instant,
    /// Bytes of experts, dense weights and embedding read until then.
    pub(crate) bytes_read: u64,
}

impl FirstToken {
    fn now(engine: &Engine) -> Self {
        let stats = engine.stats();
        FirstToken { at: Instant::now(), bytes_read: stats.expert_bytes_read + stats.dense_bytes_read }
    }
}

/// Sees every token, and the text that became certain with it; the engine is as it was when the step ended.
pub(crate) type TokenSink<'a> = dyn FnMut(&Engine, Option<u32>, &str) -> Result<(), CliError> + 'a;

/// Generates; calls `sink` with every token (without text), and with text as it becomes certain (without a token). `recorder` sees
/// the routing.
pub(crate) fn generate(
    engine: &mut Engine,
    request: &Request<'_>,
    mut recorder: Option<&mut Recorder>,
    sink: &mut TokenSink<'_>,
) -> Result<Generation, CliError> {
    let mut scheduler = Scheduler::new(engine, request.tokenizer.cloned(), request.scheduling.clone());
    let (sender, events) = channel();
    let handle = scheduler.submit(request.to_library(), move |event| match sender.send(event) {
        Ok(()) => ControlFlow::Continue(()),
        Err(_) => ControlFlow::Break(()),
    })?;
    let mut done = Collected::default();
    let mut before = (Instant::now(), engine.stats());
    let (tokens, layers) = (request.prompt.len(), engine.spec().layers.len());
    let bar = step_bar(format!("reading {}", counted(tokens, "token")), (tokens * layers) as u64);
    let mut prefill = None;
    while done.finish.is_none() {
        turn(engine, &mut scheduler, prefill.is_none().then_some(&bar), done.read, recorder.as_deref_mut());
        if prefill.is_none() && !matches!(handle.place(), Some(Place::Reading { .. } | Place::Queued { .. })) {
            prefill = Some(profile::Phase::since(&before, engine));
            before = (Instant::now(), engine.stats());
            bar.finish_and_clear();
        }
        for event in events.try_iter() {
            done.take(engine, event, sink)?;
        }
        if done.first_token.is_none() && !done.ids.is_empty() {
            done.first_token = Some(FirstToken::now(engine));
        }
    }
    let status = scheduler.status();
    let drafts = DraftCounts { proposed: status.proposed, accepted: status.came_true };
    let decode = profile::Phase::since(&before, engine).without(drafts.rejected());
    if let Some(failure) = scheduler.draft_failure() {
        note(&format_args!("note: the layer for multi-token prediction proposed nothing any more: {failure}"));
    }
    Ok(Generation {
        drafts,
        ids: done.ids,
        text: request.tokenizer.map(|_| done.text),
        finish: done.finish.unwrap_or(Finish::Cancelled),
        dropped: done.dropped,
        first_token: done.first_token,
        prefill: prefill.unwrap_or_default(),
        decode,
    })
}

/// Takes one step. A bar follows a prompt through the layers, which takes minutes for a large model.
fn turn(
    engine: &mut Engine,
    scheduler: &mut Scheduler,
    bar: Option<&Meter>,
    read: usize,
    mut recorder: Option<&mut Recorder>,
) {
    let layers = engine.spec().layers.len();
    let mut progress = |p: Progress| {
        if let Some(bar) = bar {
            bar.set_position(((read + p.rows_before) * layers + p.rows * p.layers) as u64);
        }
    };
    let mut routing = |layer: usize, position: usize, top_k: usize, choices: &[Choice]| {
        if let Some(recorder) = &mut recorder {
            recorder.record(layer, position, top_k, choices);
        }
    };
    scheduler.turn(engine, &mut Watch { progress: Some(&mut progress), routing: Some(&mut routing) });
}

/// The results so far.
#[derive(Default)]
struct Collected {
    /// Tokens of the prompt that have been read.
    read: usize,
    ids: Vec<u32>,
    text: String,
    /// Tokens that were dropped because the context was full.
    dropped: usize,
    finish: Option<Finish>,
    first_token: Option<FirstToken>,
}

impl Collected {
    fn take(&mut self, engine: &Engine, event: Event, sink: &mut TokenSink<'_>) -> Result<(), CliError> {
        match event {
            Event::Progress { read, .. } => self.read = read,
            Event::PromptToken { .. } => {}
            Event::Token { id, .. } => {
                self.ids.push(id);
                sink(engine, Some(id), "")?;
            }
            Event::Text(piece) => {
                sink(engine, None, &piece)?;
                self.text += &piece;
            }
            Event::Shifted { dropped, .. } => self.dropped += dropped,
            Event::Finish { reason, .. } => self.finish = Some(reason),
            Event::Failed(error) => return Err(error.into()),
        }
        Ok(())
    }
}
