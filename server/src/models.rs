//! The models of a server. They share one budget: a model is loaded on its first request, and idle models make room for others.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use sluice_dialect::Dialect;
use sluice_format::{FormatError, ModelFile, VolumeName};
use sluice_generate::{GenerationError, SchedulerOptions};
use sluice_model::PromptAttention;
use sluice_model::engine::{EngineOptions, RuntimeError};
use sluice_model::memory::{BudgetError, Bytes};
use sluice_text::ChatTemplate;

use crate::error::{ApiError, Kind};
use crate::options::ServerOptions;
use crate::served::Served;
use crate::texts::Texts;

/// How often a request that waits for memory tries again.
const RETRY: Duration = Duration::from_millis(100);

/// A model that clients can request.
pub struct Entry {
    /// The name that clients see.
    pub id: String,
    path: PathBuf,
    /// Where its file is, without links, if the system says so.
    place: Option<PathBuf>,
    /// What its file says about it.
    pub facts: Facts,
    loaded: Mutex<Option<Loaded>>,
    /// How it reads requests, while it is loaded or a request waits for it.
    texts: Mutex<Weak<Texts>>,
}

/// What is known about a model before it is loaded.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The family.
    pub family: String,
    /// Bytes of the file.
    pub bytes: u64,
    /// Seconds since 1970 at which the file was written.
    pub created: u64,
    /// Tokens that the model can see.
    pub max_positions: usize,
    /// The file's own id: of weights, specification and tokenizer.
    pub state_id: String,
    /// The source of its chat template; of the one for tools, if there are several.
    pub template: Option<String>,
    /// Whether it has a layer for multi-token prediction.
    pub predicts: bool,
    /// How its experts are chosen otherwise than by its routers, in words, if they are.
    pub lossy: Option<String>,
    /// The form in which its prompts are read, if it is not the usual one.
    pub prompt_attention: Option<&'static str>,
}

struct Loaded {
    served: Arc<Served>,
    used: Instant,
    /// Its present budget.
    budget: Option<u64>,
    /// Its least possible budget.
    least: u64,
}

/// Why models cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ModelsError {
    /// A file is not a model file.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The memory does not suffice for a model, even if it is the only one that is loaded.
    #[error("{}: {source}{}", path.display(), fewer(source.sequences, *one))]
    Memory {
        /// The model file.
        path: PathBuf,
        /// What it needs.
        source: Box<BudgetError>,
        /// The least budget for one conversation at a time, in bytes, if memory was planned for several.
        one: Option<u64>,
    },
    /// A file is given twice.
    #[error("{} is given twice, and one model needs to be loaded only once: leave one of them out", path.display())]
    Twice {
        /// The model file.
        path: PathBuf,
    },
}

/// What to do about memory that is planned for `sequences` conversations.
fn fewer(sequences: usize, one: Option<u64>) -> String {
    let advice = |least| {
        let least = Bytes::at_least(least);
        format!(". With --parallel 1, for one conversation at a time instead of {sequences}, the least is {least}")
    };
    one.map(advice).unwrap_or_default()
}

/// All models.
pub struct Models {
    entries: Vec<Entry>,
    engine: EngineOptions,
    scheduling: SchedulerOptions,
    /// Held while a model is loaded: only one is loaded at a time, and only the holder changes which are loaded.
    loading: tokio::sync::Mutex<()>,
}

impl Models {
    /// Reads the headers of the files, and checks that memory suffices for each of them; loads nothing yet.
    ///
    /// # Errors
    /// The first file that is not a model file, or whose model does not fit into the memory.
    pub fn new(options: &ServerOptions, scheduling: SchedulerOptions) -> Result<Self, ModelsError> {
        let mut entries: Vec<Entry> = Vec::new();
        for path in &options.files {
            let file = ModelFile::open(path)?;
            let name = name_of(path);
            let here = std::fs::canonicalize(file.path()).ok();
            let is_same = |entry: &Entry| name_of(&entry.path) == name && here.is_some() && entry.place == here;
            if entries.iter().any(is_same) {
                return Err(ModelsError::Twice { path: path.clone() });
            }
            let with_prediction = opened(&options.engine, &scheduling, Some(&file), file.spec().prediction.is_some());
            let plan = with_prediction.check_memory(&file);
            plan.map_err(|source| {
                let alone = EngineOptions { sequences: Some(1), budget: Some(0), ..with_prediction.clone() };
                let one = alone.check_memory(&file).err().map(|error| error.least).filter(|_| source.sequences > 1);
                ModelsError::Memory { path: path.clone(), source: Box::new(source), one }
            })?;
            let taken = |id: &str| entries.iter().any(|entry| entry.id == id);
            let more = (2..).map(|n| format!("{name}-{n}"));
            let id = std::iter::once(name.clone()).chain(more).find(|id| !taken(id)).unwrap_or(name);
            entries.push(Entry {
                id,
                path: path.clone(),
                place: here,
                facts: Facts::of(&file, &options.engine),
                loaded: Mutex::default(),
                texts: Mutex::default(),
            });
        }
        Ok(Models { entries, engine: options.engine.clone(), scheduling, loading: tokio::sync::Mutex::new(()) })
    }

    /// The models, in the order of the command line.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// How experts of any of the models are chosen otherwise than by the routers, in words.
    pub fn lossy(&self) -> Option<&str> {
        self.entries.iter().find_map(|entry| entry.facts.lossy.as_deref())
    }

    /// The form in which prompts of any of the models are read, if it is not the usual one.
    pub fn prompt_attention(&self) -> Option<&'static str> {
        self.entries.iter().find_map(|entry| entry.facts.prompt_attention)
    }

    /// The model of a name. With one model, every name means that one, since many clients send the name of somebody else's model.
    ///
    /// # Errors
    /// If there is no such model.
    pub fn find(&self, name: &str) -> Result<&Entry, ApiError> {
        let name = name.strip_suffix(":latest").unwrap_or(name);
        match (self.entries.iter().find(|entry| entry.id == name), &self.entries[..]) {
            (Some(entry), _) | (None, [entry]) => Ok(entry),
            (None, _) if name.is_empty() => Err(ApiError::field("model", "say which model, as `model`")),
            (None, entries) => {
                let known: Vec<&str> = entries.iter().map(|entry| entry.id.as_str()).collect();
                let message = format!("there is no model {name:?} here; the models are {}", known.join(", "));
                Err(ApiError { param: Some("model".into()), ..ApiError::new(Kind::NotFound, message) }
                    .code("model_not_found"))
            }
        }
    }

    /// The model with a name, loaded.
    ///
    /// # Errors
    /// If there is no such model, or it cannot be loaded.
    pub async fn get(self: &Arc<Self>, name: &str) -> Result<Arc<Served>, ApiError> {
        let entry = self.find(name)?;
        if let Some(served) = entry.served() {
            self.balance(&entry.id);
            return Ok(served);
        }
        let guard = self.loading.lock().await;
        if let Some(served) = entry.served() {
            return Ok(served);
        }
        let (models, id) = (Arc::clone(self), entry.id.clone());
        loop {
            let (models, id) = (Arc::clone(&models), id.clone());
            let loaded = tokio::task::spawn_blocking(move || models.load(&id)).await;
            let (loaded, busy) =
                loaded.map_err(|_| ApiError::new(Kind::Internal, "the model could not be loaded: the log says why"))?;
            match loaded {
                // It will fit once the others are idle.
                Err(GenerationError::Engine(RuntimeError::Budget(_))) if busy > 0 => {
                    tokio::time::sleep(RETRY).await;
                }
                loaded => {
                    drop(guard);
                    return loaded.map_err(|error| ApiError::new(Kind::Internal, error.to_string()));
                }
            }
        }
    }

    /// Loads a model into the memory that the others leave: idle models are closed, busy ones keep the least that they need. Also
    /// returns the number of bytes that the busy ones keep.
    fn load(&self, id: &str) -> (Result<Arc<Served>, GenerationError>, u64) {
        let others = self.entries.iter().filter(|other| other.id != id);
        let busy: u64 = others.filter_map(Entry::close_if_idle).sum();
        (self.load_beside(id, busy), busy)
    }

    /// Loads a model into the part of the budget that is left beside `busy` bytes.
    fn load_beside(&self, id: &str, busy: u64) -> Result<Arc<Served>, GenerationError> {
        let entry = self.entries.iter().find(|entry| entry.id == id).expect("the name was found before");
        let budget = self.engine.budget.map(|total| total.saturating_sub(busy));
        let options = EngineOptions { budget, ..self.engine.clone() };
        // What is wrong with the file is said when it is opened.
        let file = if entry.facts.predicts { ModelFile::open(&entry.path).ok() } else { None };
        let options = opened(&options, &self.scheduling, file.as_ref(), entry.facts.predicts);
        let texts = entry.known_texts().upgrade();
        let served = Served::open(entry.id.clone(), &entry.path, &options, self.scheduling.clone(), texts)?;
        *entry.known_texts() = Arc::downgrade(served.texts());
        if let Some(lossy) = &entry.facts.lossy {
            tracing::warn!(model = entry.id, lossy, "answers differ from the model's own");
        }
        if let Some(form) = entry.facts.prompt_attention {
            tracing::info!(model = entry.id, form, "latent attention of prompts");
        }
        let (served, budget) = (Arc::new(served), options.budget);
        let least = served.model().least_budget();
        *entry.lock() = Some(Loaded { served: Arc::clone(&served), used: Instant::now(), budget, least });
        self.balance(id);
        Ok(served)
    }

    /// Divides the budget among the loaded models: idle ones get the least that they need, the others equal parts of the rest.
    /// `wanted` counts as busy.
    fn balance(&self, wanted: &str) {
        let Some(total) = self.engine.budget else { return };
        let is_active = |entry: &Entry| entry.id == wanted || entry.is_in_use();
        let loaded = self.entries.iter().filter_map(|entry| Some((entry, is_active(entry), entry.least()?)));
        let loaded: Vec<(&Entry, bool, u64)> = loaded.collect();
        let idle: u64 = loaded.iter().filter(|(_, active, _)| !active).map(|(.., least)| least).sum();
        let active = loaded.iter().filter(|(_, active, _)| *active).count() as u64;
        let share = total.saturating_sub(idle) / active.max(1);
        for (entry, active, least) in loaded {
            entry.set_budget(if active { share.max(least) } else { least });
        }
    }

    /// Closes all models.
    pub fn close(&self) {
        for entry in &self.entries {
            let loaded = entry.lock().take();
            // A thread that still uses it closes it later.
            if let Some(served) = loaded.and_then(|loaded| Arc::into_inner(loaded.served)) {
                served.close();
            }
        }
    }
}

/// How a model is opened: with its prediction layer if drafts come from it.
fn opened(
    engine: &EngineOptions,
    scheduling: &SchedulerOptions,
    file: Option<&ModelFile>,
    predicts: bool,
) -> EngineOptions {
    let holds = || predicts && file.is_some_and(|file| engine.holds_prediction(file));
    EngineOptions { prediction: scheduling.drafts.opens_prediction(holds), ..engine.clone() }
}

impl Entry {
    /// How the model reads requests. If it is not loaded, its text files are read, which takes a while.
    ///
    /// # Errors
    /// What is wrong with the file or its text files.
    pub fn texts(&self, engine: &EngineOptions) -> Result<Arc<Texts>, ApiError> {
        let mut known = self.known_texts();
        if let Some(texts) = known.upgrade() {
            return Ok(texts);
        }
        let failed = |error: GenerationError| ApiError::new(Kind::Internal, error.to_string());
        let file = ModelFile::open(&self.path).map_err(|error| failed(RuntimeError::from(error).into()))?;
        let texts = Texts::of(&file, engine.context_in(file.spec()), None).map(Arc::new).map_err(failed)?;
        *known = Arc::downgrade(&texts);
        Ok(texts)
    }

    fn known_texts(&self) -> MutexGuard<'_, Weak<Texts>> {
        self.texts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The model, if it is loaded.
    pub fn served(&self) -> Option<Arc<Served>> {
        let mut loaded = self.lock();
        let loaded = loaded.as_mut()?;
        loaded.used = Instant::now();
        Some(Arc::clone(&loaded.served))
    }

    /// The model file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The model, if it is loaded, without counting as a use.
    pub fn peek(&self) -> Option<Arc<Served>> {
        self.lock().as_ref().map(|loaded| Arc::clone(&loaded.served))
    }

    /// Seconds since its last request; `None` if it is not loaded.
    pub fn idle_seconds(&self) -> Option<f64> {
        self.lock().as_ref().map(|loaded| loaded.used.elapsed().as_secs_f64())
    }

    fn is_in_use(&self) -> bool {
        // Every answer holds a reference.
        self.lock().as_ref().is_some_and(|loaded| Arc::strong_count(&loaded.served) > 1)
    }

    /// The least memory that it needs, in bytes; `None` if it is not loaded.
    fn least(&self) -> Option<u64> {
        self.lock().as_ref().map(|loaded| loaded.least)
    }

    fn set_budget(&self, bytes: u64) {
        if let Some(loaded) = self.lock().as_mut().filter(|loaded| loaded.budget != Some(bytes)) {
            loaded.budget = Some(bytes);
            loaded.served.model().set_budget(bytes);
        }
    }

    /// Closes the model unless it is busy; if it is busy, returns the least memory that it needs.
    fn close_if_idle(&self) -> Option<u64> {
        let mut loaded = self.lock();
        let taken = loaded.take()?;
        if Arc::strong_count(&taken.served) > 1 {
            let least = taken.least;
            *loaded = Some(taken);
            return Some(least);
        }
        drop(loaded);
        if let Some(served) = Arc::into_inner(taken.served) {
            served.close();
        }
        None
    }

    /// The state is consistent between any two statements, so a panic elsewhere does no harm.
    fn lock(&self) -> MutexGuard<'_, Option<Loaded>> {
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The name of the model in a file: the file's name, without folder and extension.
pub fn name_of(path: &Path) -> String {
    let whole = VolumeName::parse(path).map(|name| name.whole());
    let stem = whole.as_deref().unwrap_or(path).file_stem();
    stem.map_or_else(|| "model".into(), |stem| stem.to_string_lossy().into_owned())
}

impl Facts {
    fn of(file: &ModelFile, engine: &EngineOptions) -> Self {
        let thrift = engine.thrift.in_model(file.spec());
        let form = engine.prompt_attention.in_model(file.spec());
        let metadata = std::fs::metadata(file.path()).ok();
        let written = metadata.as_ref().and_then(|m| m.modified().ok());
        let since = written.and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
        Facts {
            family: file.spec().family.clone(),
            bytes: file.file_bytes(),
            created: since.map_or(0, |since| since.as_secs()),
            max_positions: file.spec().max_positions,
            state_id: file.state_id().to_string(),
            template: template(file),
            predicts: file.spec().prediction.is_some(),
            lossy: (!thrift.is_exact()).then(|| thrift.to_string()),
            prompt_attention: (form != PromptAttention::default()).then(|| form.name()),
        }
    }
}

/// The source of a file's chat template, or of its family's own here. Errors in it are reported when the model is loaded.
fn template(file: &ModelFile) -> Option<String> {
    let metadata = file.metadata();
    let own = ChatTemplate::find(|name| metadata.get(name)).ok().flatten();
    let family = Some(file.spec().family.as_str());
    match own {
        Some(template) => Some(template.source(true).to_owned()),
        None => Dialect::own_template(family, &|_| true).map(str::to_owned),
    }
}
