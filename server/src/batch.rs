//! The requests of batches, answered by a model: what [`sluice_batch`] hands out becomes generations, and their tokens go back to its
//! journal.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::StreamExt as _;
use serde_json::Value;
use sluice_batch::{
    Answerer, Batch, BatchError, Ending, Event, Events, Failure, Identity, Job, Line, Ongoing, Progress, Summary,
    Token, number_of,
};
use sluice_dialect::Piece;
use sluice_format::ModelFile;
use sluice_generate::{Drafts, GenerationError, Logprob, Priority, Report, Sampled, SchedulerOptions, Status};
use sluice_model::PromptAttention;
use sluice_model::engine::EngineOptions;
use sluice_sessions::Store;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use crate::answer::{Answer, Step};
use crate::api::openai::line::{generated, make_repeatable, prepare};
use crate::ask::Ask;
use crate::error::{ApiError, Flavour, Kind, PANICKED};
use crate::live::Live;
use crate::models::Models;
use crate::reply::Fold;
use crate::run::side_by_side;
use crate::served::{Hears, Repeatable, Served};
use crate::texts::{Texts, digest};

/// What the answers of a model that is opened like this depend on besides the requests. `context` is the number of tokens that a sequence
/// can have.
pub fn identity(file: &ModelFile, engine: &EngineOptions, context: usize) -> Identity {
    let texts = digest(file);
    let kv_type = engine.kv_type;
    let exact = if engine.exact { ", --exact" } else { "" };
    let thrift = engine.thrift.in_model(file.spec());
    let fewer = if thrift.is_exact() { String::new() } else { format!(", {thrift}") };
    let lossy = [
        kv_type.is_lossy().then(|| format!("keys and values are rounded to {kv_type}")),
        (!thrift.is_exact()).then(|| thrift.to_string()),
    ];
    let lossy = lossy.into_iter().flatten().reduce(|all, one| format!("{all}; {one}"));
    let form = engine.prompt_attention.in_model(file.spec());
    let prompt_attention = (form != PromptAttention::default()).then(|| form.to_string());
    let prompts = prompt_attention.as_ref().map_or_else(String::new, |form| format!(", --prompt-attention {form}"));
    Identity {
        model: file.state_id().to_string(),
        settings: format!(
            "--context {context}, --kv-type {kv_type}{exact}{fewer}{prompts}, template and defaults {texts:016x}"
        ),
        lossy,
        prompt_attention,
    }
}

/// A prompt of a request, and what may become of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Answers to it.
    pub answers: usize,
    /// Most tokens of each of them: as many as the request allows, and the context has room for.
    pub most: usize,
    /// Whether the request limits them.
    pub limited: bool,
}

/// Checks a request, and says how much there is to do for it. This needs no model, only its text files.
///
/// # Errors
/// What the result of the request would say.
pub fn check(line: &Line, texts: &Arc<Texts>, now: i64) -> Result<Vec<Expected>, ApiError> {
    let (asks, _) = prepare(line, "")?;
    let expected = |ask: &Ask| {
        let prompt = texts.prepare(ask, None, now, None)?.encoded.ids.len();
        let room = (texts.context() + 1).saturating_sub(prompt);
        let asked = ask.settings.max_tokens;
        Ok(Expected {
            prompt,
            answers: ask.n.max(1),
            most: asked.map_or(room, |most| most.min(room)),
            limited: asked.is_some(),
        })
    };
    asks.iter().map(expected).collect()
}

/// Sees the pieces of a request's answers as they come; the index of the answer comes first.
pub type Pieces = Arc<dyn Fn(usize, &Piece) + Send + Sync>;

/// Answers requests with a model.
pub struct BatchAnswerer {
    served: Arc<Served>,
    runtime: Handle,
    live: Live,
    priority: Priority,
    /// The only path that requests may name, and the models that there are.
    only: Option<(String, Arc<Models>)>,
    pieces: Option<Pieces>,
}

impl BatchAnswerer {
    /// Answers with this model, on the threads of a runtime.
    pub fn new(served: Arc<Served>, runtime: Handle) -> Self {
        let (live, priority) = (Live::default(), Priority::Usual);
        BatchAnswerer { served, runtime, live, priority, only: None, pieces: None }
    }

    /// The same, for requests that nobody waits for, and that all name this path and one of these models.
    #[must_use]
    pub fn in_background(self, endpoint: String, models: Arc<Models>) -> Self {
        BatchAnswerer { priority: Priority::Background, only: Some((endpoint, models)), ..self }
    }

    /// The same, with somebody who sees the pieces as they come.
    #[must_use]
    pub fn watched_by(self, pieces: Option<Pieces>) -> Self {
        BatchAnswerer { pieces, ..self }
    }

    /// Puts the generations of a request into the model's queue.
    fn start(&self, job: &mut Job) -> Result<(Vec<Answer>, Box<dyn Fold>), ApiError> {
        if let Some((endpoint, models)) = &self.only {
            if *endpoint != job.line.url {
                let message = format!("`url` is {:?}, but the batch is for {endpoint}", job.line.url);
                return Err(ApiError::field("url", message).code("mismatched_url"));
            }
            let model = &models.find(job.line.body.get("model").and_then(Value::as_str).unwrap_or_default())?.id;
            if *model != self.served.id {
                let message =
                    format!("`model` is {model:?}, but the first request of the batch is for {:?}", self.served.id);
                return Err(ApiError::field("model", message).code("mismatched_model"));
            }
        }
        let (asks, fold) = prepare(&job.line, &self.served.id)?;
        let mut answers = Vec::new();
        for ask in &asks {
            let repeatable = self.repeatable(job, ask, answers.len());
            answers.extend(self.served.start_again(ask, &self.live, repeatable)?);
        }
        Ok((answers, fold))
    }

    /// What makes the answers to `ask`, of which the first is the request's answer number `first`, the same as in any other run.
    fn repeatable(&self, job: &mut Job, ask: &Ask, first: usize) -> Repeatable {
        let earlier = |answer: usize| {
            let sampled = job.sampled.get_mut(answer).map(std::mem::take).unwrap_or_default();
            let (events, request) = (job.events.clone(), job.request);
            let hears = move |sampled| {
                events.send(Event::Sampled { request, answer: answer as u32, token: token_of(sampled) });
            };
            (sampled.into_iter().map(sampled_of).collect(), Box::new(hears) as Hears)
        };
        let Line { custom_id, .. } = &job.line;
        Repeatable {
            now: i64::try_from(job.started).unwrap_or(i64::MAX),
            seed: number_of(custom_id, "seed"),
            calls: number_of(custom_id, "calls").wrapping_add(first as u64),
            priority: self.priority,
            answers: (first..first + ask.n.max(1)).map(earlier).collect(),
        }
    }
}

impl Answerer for BatchAnswerer {
    fn end(&self) -> bool {
        self.live.cancel_all();
        true
    }

    fn begin(&self, mut job: Job) -> Ongoing {
        let mut delivery = Delivery { events: job.events.clone(), request: job.request, delivered: false };
        match self.start(&mut job) {
            Err(error) => {
                delivery.deliver(&job.line.custom_id, Err(error));
                Box::new(())
            }
            Ok((answers, fold)) => {
                let (custom_id, pieces) = (job.line.custom_id, self.pieces.clone());
                let task = self.runtime.spawn(async move {
                    let outcome = gather(answers, fold, pieces).await;
                    delivery.deliver(&custom_id, outcome);
                });
                Box::new(Task(task))
            }
        }
    }
}

/// Waits for all answers, and makes an object of them.
async fn gather(answers: Vec<Answer>, mut fold: Box<dyn Fold>, pieces: Option<Pieces>) -> Result<Value, ApiError> {
    let mut steps = side_by_side(answers);
    while let Some((index, step)) = steps.next().await {
        if let (Some(pieces), Step::Piece(piece, _)) = (&pieces, &step) {
            pieces(index, piece);
        }
        fold.step(index, step)?;
    }
    Ok(fold.finish())
}

/// Ends a task when it is dropped, and with it the generations.
struct Task(JoinHandle<()>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Sees to it that news of a request's end come, whatever happens.
struct Delivery {
    events: Events,
    request: u32,
    delivered: bool,
}

impl Delivery {
    fn deliver(&mut self, custom_id: &str, outcome: Result<Value, ApiError>) {
        self.delivered = true;
        let outcome = match outcome {
            Ok(mut body) => {
                make_repeatable(&mut body, custom_id);
                let generated = u32::try_from(generated(&body)).unwrap_or(u32::MAX);
                Ok(Ending { body, generated })
            }
            // What the model or the machine cannot do now is no result of the request.
            Err(error) if matches!(error.kind, Kind::Internal | Kind::Closing) && error.code != Some(PANICKED) => {
                let request = Some(self.request);
                return self.events.send(Event::Broken { request, message: error.message });
            }
            Err(error) => {
                let body = error.body(Flavour::OpenAi);
                let code = error.code.map(str::to_owned);
                let code = code.or_else(|| Some(body["error"]["type"].as_str()?.to_owned())).unwrap_or_default();
                Err(Failure { status: error.kind.status().as_u16(), code, message: error.message, body })
            }
        };
        self.events.send(Event::Ended { request: self.request, outcome });
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        if !self.delivered {
            let message = "a request was given up without a result: this is a bug, and standard error says more".into();
            self.events.send(Event::Broken { request: Some(self.request), message });
        }
    }
}

fn token_of(Sampled { id, logprob, top }: Sampled) -> Token {
    Token { id, logprob, top: top.into_iter().map(|Logprob { id, logprob }| (id, logprob)).collect() }
}

fn sampled_of(Token { id, logprob, top }: Token) -> Sampled {
    Sampled { id, logprob, top: top.into_iter().map(|(id, logprob)| Logprob { id, logprob }).collect() }
}

/// Why a batch cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The batch.
    #[error(transparent)]
    Batch(#[from] BatchError),
    /// The model.
    #[error(transparent)]
    Model(#[from] GenerationError),
    /// The runtime.
    #[error("cannot start the threads of the run: {0}")]
    Runtime(std::io::Error),
}

/// Hears of the progress of a run, of what the model is doing, and of what goes on inside it; stops the run with `Break`.
pub type RunWatch<'a> = dyn FnMut(&Progress, &Status, Option<&Report>) -> ControlFlow<()> + 'a;

/// Where the sequences of unfinished requests are saved, so that the next run need not read them again.
pub struct Saving {
    /// The folder.
    pub store: Arc<Store>,
    /// New tokens of a sequence after which it is saved while its request is answered. All are saved when the run is told to end.
    pub every: usize,
}

/// How a batch is run by a process of its own.
pub struct BatchRun {
    /// The model file.
    pub file: std::path::PathBuf,
    /// The name that answers give the model.
    pub name: String,
    /// How it is opened.
    pub engine: EngineOptions,
    /// Answers that are made at a time.
    pub at_a_time: usize,
    /// Who sees the pieces of answers as they come.
    pub pieces: Option<Pieces>,
    /// Where sequences are saved, if they are.
    pub saving: Option<Saving>,
    /// Who proposes tokens.
    pub drafts: Drafts,
}

impl BatchRun {
    /// Runs the batch to its end, or until the process is told to end (SIGINT, SIGTERM). `watch` hears of the progress.
    ///
    /// # Errors
    /// What is wrong with the model, or keeps the batch from going on. What was done until then is kept.
    pub fn until_told(self, batch: &mut Batch, watch: &mut RunWatch<'_>) -> Result<Summary, RunError> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.map_err(RunError::Runtime)?;
        let stop = Arc::new(AtomicBool::new(false));
        let ended = {
            let _entered = runtime.enter();
            crate::serve::told_to_end().map_err(RunError::Runtime)?
        };
        let told = Arc::clone(&stop);
        runtime.spawn(async move {
            ended.await;
            told.store(true, Ordering::Relaxed);
        });
        let scheduling = SchedulerOptions {
            running: Some(self.at_a_time),
            // Nobody waits for the next token: prompts are read with as many rows as there are.
            prompt_rows: usize::MAX,
            drafts: self.drafts,
            ..saving_options(self.saving)
        };
        let served = Arc::new(Served::open(self.name, &self.file, &self.engine, scheduling, None)?);
        let answerer = BatchAnswerer::new(Arc::clone(&served), runtime.handle().clone()).watched_by(self.pieces);
        // Some more than run, so that the next one is there when one ends.
        let at_a_time = self.at_a_time + self.at_a_time.div_ceil(4).min(16);
        let outcome = batch.run(&answerer, at_a_time, &stop, &mut |progress| {
            let report = served.model().report();
            watch(progress, &served.model().status(), report.as_deref())
        });
        drop(answerer);
        // Its tasks have the model too.
        drop(runtime);
        if let Some(served) = Arc::into_inner(served) {
            served.close();
        }
        Ok(outcome?)
    }
}

/// How a scheduler saves the sequences of a batch: not those of requests that have a result, since nobody goes on from there.
fn saving_options(saving: Option<Saving>) -> SchedulerOptions {
    let usual = SchedulerOptions::default();
    let every = saving.as_ref().map_or(usual.save_every, |saving| saving.every);
    SchedulerOptions { store: saving.map(|saving| saving.store), save_every: every, save_ended: false, ..usual }
}
