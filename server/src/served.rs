//! A model that is served: how it was opened, and how requests become generations on it.

use std::path::Path;
use std::sync::Arc;

use sluice_dialect::Dialect;
use sluice_generate::{Drain, GenerationError, Model, Priority, Sampled, SchedulerOptions};
use sluice_grammar::Form;
use sluice_model::engine::{Engine, EngineOptions};
use sluice_text::{ChatTemplate, Prompt, Tokenizer};

use crate::answer::{Answer, Reading};
use crate::ask::{Ask, Chat};
use crate::error::ApiError;
use crate::live::Live;
use crate::texts::{Encoded, Own, Prepared, Texts, now};
use crate::transcripts::Transcripts;

/// A loaded model.
pub struct Served {
    /// The name that clients see.
    pub id: String,
    model: Model,
    texts: Arc<Texts>,
    transcripts: Transcripts,
}

/// Receives tokens as they are sampled.
pub type Hears = Box<dyn FnMut(Sampled) + Send>;

/// Values that a batch fixes in addition to the request, so that it can be answered again in the same way.
pub struct Repeatable {
    /// The time that templates see, in seconds since 1970.
    pub now: i64,
    /// Seed of the random numbers, if the request gives none.
    pub seed: u64,
    /// Seed of the ids of calls.
    pub calls: u64,
    /// For each answer: the tokens that an earlier run sampled, and the receiver of those that are sampled now.
    pub answers: Vec<(Vec<Sampled>, Hears)>,
    /// Whether it comes before other requests.
    pub priority: Priority,
}

impl Served {
    /// Opens a model and begins to read its dense parts; the first answer waits for them. `texts`: those of the model, if they have been read
    /// already.
    ///
    /// # Errors
    /// If the file, its text files, or the memory do not allow it.
    pub fn open(
        id: String,
        path: &Path,
        options: &EngineOptions,
        scheduling: SchedulerOptions,
        texts: Option<Arc<Texts>>,
    ) -> Result<Self, GenerationError> {
        let engine = Engine::open(path, options)?;
        // The file may be another one by now.
        let texts = texts.filter(|texts| texts.are_of(engine.file(), engine.memory().context));
        let read = || Texts::of(engine.file(), engine.memory().context, None).map(Arc::new);
        let texts = texts.map_or_else(read, Ok)?;
        Self::of(id, engine, scheduling, !options.forget, texts)
    }

    /// A model on top of an engine, whose texts these are. `learn`: whether to save what is learned about the experts.
    ///
    /// # Errors
    /// If the system refuses to start a thread.
    pub fn of(
        id: String,
        engine: Engine,
        scheduling: SchedulerOptions,
        learn: bool,
        texts: Arc<Texts>,
    ) -> Result<Self, GenerationError> {
        let store = scheduling.store.clone();
        let model = Model::with_texts(engine, texts.files().clone(), scheduling, learn)?;
        let transcripts = Transcripts::default();
        if let Some(store) = &store {
            store.texts(model.binding()).into_iter().for_each(|tokens| transcripts.remember(tokens));
        }
        Ok(Served { id, model, texts, transcripts })
    }

    /// Closes the model; what it remembers of conversations is kept if possible.
    pub fn close(self) {
        self.model.close(Drain::default());
    }

    /// The [`Model`] of the generation layer.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// How it reads requests.
    pub fn texts(&self) -> &Arc<Texts> {
        &self.texts
    }

    /// Most tokens of a conversation.
    pub fn context(&self) -> usize {
        self.model.context()
    }

    /// Most tokens that the model itself allows, whatever memory there is.
    pub fn max_positions(&self) -> usize {
        self.model.max_positions()
    }

    /// The model's chat template, if it has one.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.texts.template()
    }

    /// How the model writes thinking and tool calls.
    pub fn dialect(&self) -> &Dialect {
        self.texts.dialect()
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// If the model has none.
    pub fn tokenizer(&self) -> Result<&Tokenizer, ApiError> {
        self.texts.tokenizer()
    }

    /// The prompt of a conversation as text.
    ///
    /// # Errors
    /// If the model has no template, or the template refuses the conversation.
    pub fn prompt(&self, chat: &Chat, ask: &Ask) -> Result<Prompt, ApiError> {
        self.texts.prompt(chat, ask, now())
    }

    /// The tokens of the text to continue.
    ///
    /// # Errors
    /// Like [`Served::prompt`], and if the tokenizer refuses the text.
    pub fn encode(&self, ask: &Ask) -> Result<Encoded, ApiError> {
        let mut encoded = self.texts.encode(ask, now())?;
        if let (true, Ok(tokenizer)) = (ask.keep, self.tokenizer()) {
            encoded.continue_from(&self.transcripts, tokenizer);
        }
        Ok(encoded)
    }

    /// Checks and prepares a request. `forced`: a form that the answer must have instead of the requested one.
    ///
    /// # Errors
    /// If the request is invalid.
    pub fn prepare(&self, ask: &Ask, forced: Option<&Form>) -> Result<Prepared, ApiError> {
        self.texts.prepare(ask, forced, now(), Some(&self.transcripts).filter(|_| ask.keep))
    }

    /// Starts the generations of a request that was prepared, perhaps before this model was loaded. `forced`: as when it was prepared.
    ///
    /// # Errors
    /// If the queue is full, or the model file is another one than that for which the request was prepared, and does not take it.
    pub fn start(
        self: &Arc<Self>,
        ask: &Ask,
        forced: Option<&Form>,
        mut prepared: Prepared,
        live: &Live,
    ) -> Result<Vec<Answer>, ApiError> {
        if !Arc::ptr_eq(&prepared.texts, &self.texts) {
            prepared = self.prepare(ask, forced)?;
        }
        if let (true, Ok(tokenizer)) = (ask.keep, self.tokenizer()) {
            prepared.encoded.continue_from(&self.transcripts, tokenizer);
        }
        self.start_all(ask, &prepared, live, None)
    }

    /// Starts the generations of a request in a batch.
    ///
    /// # Errors
    /// If the request is invalid.
    pub fn start_again(
        self: &Arc<Self>,
        ask: &Ask,
        live: &Live,
        repeatable: Repeatable,
    ) -> Result<Vec<Answer>, ApiError> {
        let prepared = self.texts.prepare(ask, None, repeatable.now, None)?;
        self.start_all(ask, &prepared, live, Some(repeatable))
    }

    fn start_all(
        self: &Arc<Self>,
        ask: &Ask,
        prepared: &Prepared,
        live: &Live,
        repeatable: Option<Repeatable>,
    ) -> Result<Vec<Answer>, ApiError> {
        let random = || repeatable.as_ref().map_or_else(|| uuid::Uuid::new_v4().as_u64_pair().0, |r| r.seed);
        let seed = ask.settings.seed.unwrap_or_else(random);
        let (calls, priority) = match &repeatable {
            Some(repeatable) => (Some(repeatable.calls), repeatable.priority),
            None => (None, Priority::Usual),
        };
        let titled = repeatable.is_none();
        let forgets = repeatable.is_some();
        let mut earlier = repeatable.map(|repeatable| repeatable.answers).unwrap_or_default().into_iter();
        let mut answers = Vec::new();
        for index in 0..ask.n.max(1) as u64 {
            let (sampled, hears) = earlier.next().filter(|_| ask.scored().is_none()).unzip();
            let own = Own { seed: seed.wrapping_add(index), sampled: sampled.unwrap_or_default(), priority, titled };
            let (request, reading) = prepared.answer(ask, own, calls.map(|calls| calls.wrapping_add(index)))?;
            let reading = Reading { hears, forgets, ..reading };
            answers.push(Answer::start(Arc::clone(self), request, reading, ask, live)?);
        }
        Ok(answers)
    }

    /// Forgets the tokens of all conversations. Their next turns use the tokenizer's tokens for their texts.
    pub fn forget(&self) {
        self.transcripts.clear();
    }

    /// Remembers the tokens of a conversation, so that its next turn continues from them.
    pub fn remember(&self, tokens: Vec<u32>) {
        self.transcripts.remember(tokens);
    }
}
