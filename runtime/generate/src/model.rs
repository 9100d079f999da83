//! The front door: an opened model with its own thread, for callers on any thread.

use std::fmt;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::sampler::SamplerConfig;
use sluice_model::control::Progress;
use sluice_model::engine::{Engine, EngineOptions, Stats};
use sluice_model::session::Binding;
use sluice_text::{
    ChatTemplate, GenerationDefaults, Message, RenderOptions, StopCondition, TextFiles, Tokenizer, encode_chat,
};

use super::{
    Event, Finish, GenerationError, Handle, Report, Request, Scheduler, SchedulerOptions, Status, Submitter, Usage,
    Watch, Work,
};

/// Tokens that are generated unless a request says otherwise.
const USUAL_TOKENS: usize = 256;
/// Largest of a model's own files that [`Model::metadata`] keeps. Configurations and templates are smaller. Tokenizers can be
/// larger, but have already been read.
const LARGEST_FILE: usize = 4 << 20;
/// While there is nothing to do but to fill the cache: how often it is looked what has arrived. A fast drive reads 20 MB meanwhile, less than
/// is in flight.
const WARM_EVERY: Duration = Duration::from_millis(2);

/// The result of a generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The tokens, including an end token.
    pub ids: Vec<u32>,
    /// Their text, without stop string and end token; empty if the model has no tokenizer.
    pub text: String,
    /// Why it ended.
    pub finish: Finish,
    /// Tokens that it read, generated and dropped.
    pub usage: Usage,
}

/// An opened model that continues prompts, conversations and batches. Any number of threads can use it; their generations share its
/// engine and are admitted in order of arrival. Dropping it cancels all remaining generations.
pub struct Model {
    submitter: Submitter,
    tokenizer: Option<Tokenizer>,
    template: Option<ChatTemplate>,
    /// Settings that the model's authors recommend.
    sampling: SamplerConfig,
    stop: StopCondition,
    /// The least budget that the engine can have while it is open.
    least_budget: u64,
    about: About,
    thread: Option<JoinHandle<()>>,
    /// Gets a message when the thread has ended.
    ended: Mutex<Receiver<()>>,
}

/// Data about a model, for use while its engine is on another thread.
struct About {
    vocab_size: usize,
    layers: usize,
    context: usize,
    max_positions: usize,
    family: String,
    binding: Binding,
    files: Vec<(String, Vec<u8>)>,
}

impl About {
    fn new(engine: &Engine) -> Self {
        let files = engine.file().metadata().iter().filter(|(_, bytes)| bytes.len() <= LARGEST_FILE);
        About {
            vocab_size: engine.spec().vocab_size,
            layers: engine.spec().layers.len(),
            context: engine.memory().context,
            max_positions: engine.spec().max_positions,
            family: engine.spec().family.clone(),
            binding: engine.binding(),
            files: files.map(|(name, bytes)| (name.to_owned(), bytes.to_vec())).collect(),
        }
    }
}

/// How a model is closed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drain {
    /// How long running generations may continue. Those that remain afterwards are cancelled.
    pub within: Duration,
}

impl Model {
    /// Opens a model file and begins to read its dense parts; the first answer waits for them. While there is nothing to do, the experts
    /// that were used most are read into empty slots ([`Engine::warm`]). Memory is planned for `options.sequences`
    /// generations of `options.context` tokens; more run at a time while they are shorter.
    ///
    /// # Errors
    /// All errors of [`Engine::open`], and errors in the model's text files.
    pub fn open(path: &Path, options: &EngineOptions) -> Result<Self, GenerationError> {
        let engine = Engine::open(path, options)?;
        Self::new(engine, SchedulerOptions::default(), !options.forget)
    }

    /// A model on top of an engine. `learn`: whether to save what is learned about the experts for the next start.
    ///
    /// # Errors
    /// If the model's text files are invalid, or the system refuses to start a thread.
    pub fn new(engine: Engine, options: SchedulerOptions, learn: bool) -> Result<Self, GenerationError> {
        let texts = TextFiles::of(engine.file().metadata())?;
        Self::with_texts(engine, texts, options, learn)
    }

    /// The same with the engine's text files, which somebody has read already.
    ///
    /// # Errors
    /// If the system refuses to start a thread.
    pub fn with_texts(
        mut engine: Engine,
        texts: TextFiles,
        options: SchedulerOptions,
        learn: bool,
    ) -> Result<Self, GenerationError> {
        let TextFiles { tokenizer, template, defaults, stop } = texts;
        let sampling = recommended(&defaults);
        let (rest_after, least_budget) = (options.rest_after, engine.memory().least());
        let about = About::new(&engine);
        let (end, ended) = channel();
        let ended = Mutex::new(ended);
        let mut scheduler = Scheduler::new(&engine, tokenizer.clone(), options);
        let submitter = scheduler.submitter();
        let closing = Closing(submitter.clone(), end);
        let run = move || {
            let _closing = closing;
            let mut was_warming = false;
            loop {
                let warms = scheduler.is_idle() && engine.warm();
                if warms || was_warming {
                    scheduler.outdate_report();
                }
                was_warming = warms;
                // At rest, nothing but work changes anything.
                let rests = rest_after.filter(|_| !engine.is_at_rest());
                match scheduler.wait_for(if warms { Some(WARM_EVERY) } else { rests }) {
                    Work::Ready => _ = scheduler.turn(&mut engine, &mut Watch::default()),
                    Work::Idle if warms => {}
                    Work::Idle => {
                        scheduler.release_kept();
                        engine.release_idle();
                        scheduler.outdate_report();
                    }
                    Work::Closed => break,
                }
            }
            scheduler.settle();
            if learn {
                // Saving is a convenience, so a folder that cannot be written is not an error.
                let _ = engine.save_counts();
            }
        };
        let thread = std::thread::Builder::new().name("sluice-generate".into()).spawn(run);
        let thread = thread.map_err(|error| GenerationError::Thread { error })?;
        Ok(Model { submitter, tokenizer, template, sampling, stop, least_budget, about, thread: Some(thread), ended })
    }

    /// The tokenizer, if the model has one.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    /// The chat template, if the model has one.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// The sampling settings and end tokens that the model's authors recommend.
    pub fn recommended(&self) -> (SamplerConfig, &StopCondition) {
        (self.sampling, &self.stop)
    }

    /// Number of logits: token ids are less than this.
    pub fn vocab_size(&self) -> usize {
        self.about.vocab_size
    }

    /// Number of layers that every token goes through.
    pub fn layers(&self) -> usize {
        self.about.layers
    }

    /// Most tokens of a generation, including the prompt.
    pub fn context(&self) -> usize {
        self.about.context
    }

    /// Most tokens that the model itself allows: [`Model::context`] is never larger.
    pub fn max_positions(&self) -> usize {
        self.about.max_positions
    }

    /// The source's name for this kind of model, such as `deepseek_v3`.
    pub fn family(&self) -> &str {
        &self.about.family
    }

    /// What the numbers of a sequence depend on, besides its tokens: weights, specification and tokenizer, type of keys and values,
    /// precision.
    pub fn binding(&self) -> Binding {
        self.about.binding
    }

    /// The state id of the model file, in hexadecimal digits. Two files with the same state id continue a text in the same way.
    pub fn state_id(&self) -> String {
        self.about.binding.state_id.to_string()
    }

    /// One of the files that the model file carries from its source, such as `config.json`. `None` if there is no such file, or if
    /// it is larger than 4 MiB, as tokenizers can be.
    pub fn metadata(&self, name: &str) -> Option<&[u8]> {
        self.about.files.iter().find(|file| file.0 == name).map(|file| file.1.as_slice())
    }

    /// Closes the model: it accepts no more requests, generations that wait in the queue are cancelled, and running ones may
    /// continue for as long as `drain` says. Returns when the model's thread has ended; immediately, if called on that thread.
    pub fn close(self, drain: Drain) {
        self.submitter.drain();
        if self.thread.as_ref().is_some_and(is_another) {
            // The rest is the same, whether the thread has ended or the time is over.
            let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
            let _ = ended.recv_timeout(drain.within);
        }
    }

    /// A request to continue these tokens, with the end tokens and sampling settings that the model's authors recommend, by at most
    /// 256 tokens.
    pub fn tokens(&self, prompt: Vec<u32>) -> Request {
        let stop = self.stop.clone();
        Request { sampling: self.sampling, stop, ..Request::new(prompt, USUAL_TOKENS) }
    }

    /// A request to continue a text.
    ///
    /// # Errors
    /// If the model has no tokenizer, or the tokenizer refuses the text.
    pub fn text(&self, text: &str) -> Result<Request, GenerationError> {
        let tokenizer = self.tokenizer.as_ref().ok_or(GenerationError::NoTokenizer)?;
        Ok(self.tokens(tokenizer.encode(text, true)?))
    }

    /// A request for the next message of a conversation, in the model's chat template. Text in the messages never becomes a
    /// control token.
    ///
    /// # Errors
    /// If the model has no tokenizer or no template, or the template refuses the conversation.
    pub fn chat(&self, messages: &[Message]) -> Result<Request, GenerationError> {
        let tokenizer = self.tokenizer.as_ref().ok_or(GenerationError::NoTokenizer)?;
        let template = self.template.as_ref().ok_or(GenerationError::NoChatTemplate)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64);
        let options = RenderOptions { add_generation_prompt: true, now, ..RenderOptions::default() };
        Ok(self.tokens(encode_chat(tokenizer, template, messages, &options)?))
    }

    /// Puts a generation into the queue. `owner` is called with its events on the model's thread, and should return quickly; `Break`
    /// cancels the generation.
    ///
    /// # Errors
    /// If the request is invalid.
    pub fn submit(
        &self,
        request: Request,
        owner: impl FnMut(Event) -> ControlFlow<()> + Send + 'static,
    ) -> Result<Handle, GenerationError> {
        self.submitter.submit(request, owner)
    }

    /// Generates, and waits for the result.
    ///
    /// # Errors
    /// If the request is invalid, or the generation fails.
    pub fn complete(&self, request: Request) -> Result<Completion, GenerationError> {
        collect(self.start(request)?)
    }

    /// Runs all of these requests, as many at a time as there are pages for, and waits for the last. The results have the order of
    /// the requests.
    pub fn batch(&self, requests: Vec<Request>) -> Vec<Result<Completion, GenerationError>> {
        let started: Vec<_> = requests.into_iter().map(|request| self.start(request)).collect();
        started.into_iter().map(|events| collect(events?)).collect()
    }

    /// Changes the budget from the next step on: the model returns memory to the system, or takes memory again, up to the budget
    /// with which it was opened. Returns the least budget that is possible while the model is open; a lower budget is raised to
    /// that.
    pub fn set_budget(&self, bytes: u64) -> u64 {
        self.submitter.set_budget(bytes);
        self.least_budget
    }

    /// The least budget that it can have while it is open, in bytes.
    pub fn least_budget(&self) -> u64 {
        self.least_budget
    }

    /// What the model is doing.
    pub fn status(&self) -> Status {
        self.submitter.status()
    }

    /// The progress of its running step ([`Submitter::progress`]).
    pub fn progress(&self) -> Option<Progress> {
        self.submitter.progress()
    }

    /// Statistics since it was opened ([`Submitter::stats`]).
    pub fn stats(&self) -> Stats {
        self.submitter.stats()
    }

    /// A report on its inner state ([`Submitter::report`]).
    pub fn report(&self) -> Option<Arc<Report>> {
        self.submitter.report()
    }

    fn start(&self, request: Request) -> Result<Receiver<Event>, GenerationError> {
        let (sender, events) = channel();
        let owner = move |event| match sender.send(event) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        };
        self.submit(request, owner)?;
        Ok(events)
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        self.submitter.close();
        // A panic of that thread has been reported already, and must not become an abort here.
        let _ = self.thread.take().filter(is_another).map(JoinHandle::join);
    }
}

/// An owner may drop the model last, on the model's own thread. That thread cannot wait for itself, and ends without this.
fn is_another(thread: &JoinHandle<()>) -> bool {
    thread.thread().id() != std::thread::current().id()
}

impl fmt::Debug for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Model").field("status", &self.status()).finish_non_exhaustive()
    }
}

/// The sampling settings of the model's authors; neutral values for those that they do not give.
pub fn recommended(own: &GenerationDefaults) -> SamplerConfig {
    let neutral = SamplerConfig::default();
    SamplerConfig {
        temperature: own.effective_temperature(),
        top_k: own.top_k.unwrap_or(neutral.top_k),
        top_p: own.top_p.unwrap_or(neutral.top_p),
        min_p: own.min_p.unwrap_or(neutral.min_p),
        repetition_penalty: own.repetition_penalty.unwrap_or(neutral.repetition_penalty),
        seed: neutral.seed,
    }
}

/// Closes the queue when the thread ends, even by a panic, so that no caller waits for it forever, and reports the end.
struct Closing(Submitter, Sender<()>);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.close();
        // This drops the owners, and with them the channels on which callers wait. It happens outside the lock, because an owner
        // may take that lock while it is dropped.
        let mut state = self.0.0.lock();
        let queue = std::mem::take(&mut state.queue);
        state.places.clear();
        drop(state);
        drop(queue);
        // There may be no receiver.
        let _ = self.1.send(());
    }
}

/// Collects the events of a generation.
fn collect(events: Receiver<Event>) -> Result<Completion, GenerationError> {
    let (mut ids, mut text) = (Vec::new(), String::new());
    for event in events {
        match event {
            Event::Progress { .. } | Event::PromptToken { .. } | Event::Shifted { .. } => {}
            Event::Token { id, .. } => ids.push(id),
            Event::Text(piece) => text += &piece,
            Event::Finish { reason, usage } => return Ok(Completion { ids, text, finish: reason, usage }),
            Event::Failed(error) => return Err(error),
        }
    }
    Err(GenerationError::Closed)
}
