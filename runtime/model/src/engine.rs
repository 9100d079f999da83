//! The opened model: file, pool, layers and kernels, and the steps that it takes with sequences.

mod budget;
mod context;
mod demand;
mod passes;
mod prediction;
mod reading;
mod residency;
mod sparing;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;
use sluice_format::{
    Codec, ExtentKind, ExtentRecord, FormatError, ModelFile, ModelSpec, NO_LAYER, Stripe, open_regular,
};
use sluice_kernels::{IsaError, Kernels, KvType, Precision, ThreadPool};

use crate::cache::{PageCount, PagePool, PagesFull};
use crate::compute::Compute;
use crate::control::{Cancel, Control};
use crate::counts;
use crate::memory::{BudgetError, MemoryPlan, PressureWatch, available_memory};
use crate::model::HeadStep;
use crate::ngrams;
use crate::room;
use crate::rows::{Cursor, Phase, Rows, Span, Want};
use crate::sequence::MarkLimits;
use crate::session::{self, Binding, SegmentFile, SessionError};
use crate::{
    GENERATED, LayerTimes, Model, ModelError, ModelOptions, PromptAttention, RewindError, Sequence, Thrift, Weights,
    dense_extents, opened_extents,
};
use sluice_storage::io::{CalibrationStore, DirectMode, ExtentName, IoConfig, StripeRead, Tuning};
use sluice_storage::pool::{
    DenseHandle, DenseLocation, ExpertDirectory, ExtentLocation, Packed, PolicyKind, PoolError, SlotPlan, Storage,
    StorageConfig, Workers,
};

use self::demand::plan_memory;
use self::sparing::Sparing;

/// How to open a model.
#[derive(Clone, Debug, Default)]
pub struct EngineOptions {
    /// Bytes for everything large; `None`: as much as is useful and available.
    pub budget: Option<u64>,
    /// Which read engine; `None`: the best that works here.
    pub read_engine: Option<ReadEngineKind>,
    /// How the file is read; `None`: according to the calibration of its drive, or otherwise in a way that suits most drives.
    pub io: Option<IoConfig>,
    /// Do not use a calibration.
    pub no_calibration: bool,
    /// Worker threads; `None`: one per core.
    pub threads: Option<usize>,
    /// f32 activations everywhere instead of int8 activations for quantised weights.
    pub exact: bool,
    /// How the cache chooses the expert that leaves when another one needs its slot.
    pub policy: PolicyKind,
    /// Whether experts are read before the router asks for them.
    pub prefetch: Prefetch,
    /// Whether to start without what earlier runs have learned about this model's experts.
    pub forget: bool,
    /// Sequences to plan memory for; `None`: one.
    pub sequences: Option<usize>,
    /// Tokens that a sequence can hold; `None`: 4096, or the model's own maximum if that is less.
    pub context: Option<usize>,
    /// How keys and values are kept; anything but f32 changes results.
    pub kv_type: KvType,
    /// Marks that a sequence of a model with windows or recurrent states can keep. Each mark keeps the pages of the windows and of
    /// the states (75 MB for Qwen3-Next), and the memory plan reserves room for them. In other models marks cost nothing, and their
    /// number is not limited.
    pub marks: usize,
    /// A simulated drive from which experts are read instead of the file; its bytes stand in for every expert. For measurements
    /// only.
    #[cfg(feature = "sim")]
    pub simulated: Option<sluice_storage::io::sim::SimulatedDrive>,
    /// The decompressed contents of that drive, if they are compressed.
    #[cfg(feature = "sim")]
    pub simulated_packed: Option<sluice_storage::pool::Packed>,
    /// Whether the budget shrinks while the system is short of memory.
    pub yields: Yields,
    /// Whether [`Engine::warm`] does nothing.
    pub no_warm: bool,
    /// While a prompt is read, a sequence with room for marks makes one by itself each time it has read this many tokens; `None`: 2048. So a
    /// rewind into a long prompt need not begin anew. Marks that are asked for take the place of these.
    pub mark_every: Option<usize>,
    /// Whether the layer for multi-token prediction is opened too ([`Engine::predict`]). It then takes memory: its dense parts, and
    /// keys and values of as many sequences; its experts share the slots. What policies have learned ([`Engine::save_counts`]) is
    /// not carried over between runs with it and runs without it.
    pub prediction: bool,
    /// How experts are chosen otherwise than by the model's routers, so that fewer are read. This is lossy, and off by default.
    pub thrift: Thrift,
    /// In which form the latent attention (MLA) of prompts is computed.
    pub prompt_attention: PromptAttention,
}

/// The default of [`EngineOptions::mark_every`]. A rewind to one of the latest automatic marks computes at most this many tokens
/// again, or as many as a pass has rows if that is more.
const MARK_EVERY: usize = 2048;

pub use self::budget::ShrinkError;
pub use self::residency::LayerExperts;
pub use sluice_storage::io::EngineKind as ReadEngineKind;

/// Whether the budget shrinks while the system is short of memory ([`Engine::heed_pressure`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Yields {
    /// Only if no budget is stated: the engine has then taken the memory that was free at the start, and returns some when other
    /// programs need it. A stated budget does not change.
    #[default]
    Unstated,
    /// Always, whatever the budget.
    Always,
    /// Never.
    Never,
}

/// Whether experts are read ahead of the router.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Prefetch {
    /// While the drive would idle, as long as prefetches are mostly right.
    #[default]
    Auto,
    /// Never.
    Off,
}

/// Why a model could not be opened or run.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The model file cannot be read, or is not valid.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The budget is too small.
    #[error(transparent)]
    Budget(#[from] BudgetError),
    /// The budget of an opened model cannot become this small.
    #[error(transparent)]
    Shrink(#[from] ShrinkError),
    /// Extents cannot be read.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// A step failed.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A session cannot be restored.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// A sequence cannot go back.
    #[error(transparent)]
    Rewind(#[from] RewindError),
    /// The instruction set that was asked for is not available.
    #[error(transparent)]
    Isa(#[from] IsaError),
    /// The prediction layer was requested, but the file has none.
    #[error(
        "{path} has no layer for multi-token prediction: its checkpoint has none, or it was converted with --no-mtp or an older version"
    )]
    NoPrediction {
        /// The file.
        path: PathBuf,
    },
    /// The prediction layer was used, but not opened.
    #[error("the layer for multi-token prediction is not open: open the model with EngineOptions::prediction")]
    PredictionClosed,
    /// A policy that works only in replays.
    #[error("the policy {0} needs to know the future; choose lru, lfu or next-use")]
    Policy(PolicyKind),
}

/// What happened since the model was opened.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Stats {
    /// Tokens that went through the layers.
    pub tokens: u64,
    /// Time in forward passes, in seconds.
    pub seconds: f64,
    /// Part of `seconds` spent in attention.
    pub attention_seconds: f64,
    /// Part of `seconds` spent in routed experts, without waiting.
    pub expert_seconds: f64,
    /// Part of `seconds` spent waiting for experts to arrive.
    pub io_wait_seconds: f64,
    /// Part of `seconds` spent in the output head.
    pub head_seconds: f64,
    /// The rest of `seconds`.
    pub other_seconds: f64,
    /// Experts found in memory.
    pub hits: u64,
    /// Experts that had to be read.
    pub misses: u64,
    /// Experts read before the router asked for them.
    pub prefetched: u64,
    /// Prefetched experts that were used before they left memory.
    pub prefetched_used: u64,
    /// Prefetched experts that left memory, or were given up, unused.
    pub prefetched_wasted: u64,
    /// Bytes of experts read, including prefetched ones.
    pub expert_bytes_read: u64,
    /// Bytes of dense parts, embedding and tables read.
    pub dense_bytes_read: u64,
    /// Experts chosen instead of the routers' own, because those in memory were preferred ([`Thrift::preference`]).
    pub replaced: u64,
    /// Experts read while there was nothing to do ([`Engine::warm`]).
    pub warmed: u64,
    /// Bytes of these; a part of `expert_bytes_read`.
    pub warmed_bytes: u64,
}

/// An opened model.
pub struct Engine {
    file: ModelFile,
    /// How it was opened.
    options: EngineOptions,
    memory: MemoryPlan,
    compute: Compute,
    storage: Storage,
    /// How each file is read.
    tuning: Vec<Tuning>,
    model: Model,
    pages: Arc<PagePool>,
    /// The pages of sequences of the prediction layer, if it is open.
    prediction_pages: Option<Arc<PagePool>>,
    /// What the numbers of a sequence depend on, besides its tokens.
    binding: Binding,
    marks: MarkLimits,
    tokens: u64,
    time: Duration,
    /// Rows of the current pass, and the rows whose logits are wanted.
    rows: Rows,
    wanted: Vec<usize>,
    /// Expert slots that the budget allows; there are fewer while the system is short of memory.
    allowed_slots: SlotPlan,
    /// Watches the system's memory, if the budget follows it.
    pressure: Option<PressureWatch>,
    /// What was known when it was looked last how much memory slots can still take.
    looked: Option<budget::Look>,
    /// When the last step ended.
    stepped: Option<Instant>,
    warms: bool,
    sparing: Sparing,
}

impl Engine {
    /// Opens a model: checks the file, plans the memory, and begins to read the dense parts. Each layer of the first step waits for
    /// its own dense parts only. Memory of expert slots is taken as they are filled.
    ///
    /// # Errors
    /// See [`RuntimeError`]. A dense part that cannot be read, or is damaged, is an error of the first step that needs it.
    pub fn open(path: &Path, options: &EngineOptions) -> Result<Self, RuntimeError> {
        Self::of(ModelFile::open(path)?, options)
    }

    /// As [`open`](Self::open), of a file that is open already.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn of(file: ModelFile, options: &EngineOptions) -> Result<Self, RuntimeError> {
        let prediction = options.prediction;
        if prediction && file.spec().prediction.is_none() {
            return Err(RuntimeError::NoPrediction { path: file.path().to_owned() });
        }
        let prompt_attention = options.prompt_attention.in_model(file.spec());
        let demand = options.demand(&file);
        let memory = plan_memory(&file, options, demand, available_memory())?;
        let kernels = Kernels::detect()?;
        let store = if options.no_calibration { None } else { CalibrationStore::of_user().ok() };
        let paths: Vec<PathBuf> = file.volumes().iter().map(|volume| volume.path().to_owned()).collect();
        let choose = |path: &PathBuf| Tuning::choose(path, options.io.as_ref(), options.read_engine, store.as_ref());
        let tuning: Vec<Tuning> = paths.iter().map(choose).collect();
        let mut storage = open_storage(&paths, &file, &memory, options, &tuning)?;
        let precision = if options.exact { Precision::Exact } else { Precision::Int8 };
        let threads = Arc::new(compute_threads(options.threads, storage.io.reading()));
        let workers: Arc<dyn Workers> = Arc::new(Unpacking(Arc::clone(&threads)));
        storage.set_workers(&workers);
        let mut compute = Compute::new(kernels, threads, precision);
        compute.prompt_attention = prompt_attention;
        if !options.forget
            && let Some(counts) = counts::load(file.path(), file.state_id())
        {
            // Counts of another policy or shape are of no use.
            let _ = storage.pool.policy_mut().import(&counts);
        }
        let handles: Vec<_> = (0..storage.dense.len() as u32).map(DenseHandle).collect();
        let thrift = options.thrift.in_model(file.spec());
        let prefetch = options.prefetch == Prefetch::Auto;
        let of_model = ModelOptions { prefetch, most_kept: memory.kept_outputs, prediction, thrift };
        let model = Model::new(&file, &handles, &compute, of_model)?;
        let pages = memory.page_pool(model.spec());
        let prediction_pages = memory.prediction_pool(model.spec());
        let (state_id, exact) = (file.state_id(), options.exact);
        let binding = Binding { state_id, kv_type: memory.kv_type, exact, thrift, prompt_attention };
        let marks = MarkLimits { most: memory.marks, every: options.mark_every.unwrap_or(MARK_EVERY).max(1) };
        let (tokens, time) = (0, Duration::ZERO);
        let (rows, wanted) = (Rows::default(), Vec::new());
        let yields = match options.yields {
            Yields::Unstated => options.budget.is_none(),
            Yields::Always => true,
            Yields::Never => false,
        };
        let pressure = yields.then(PressureWatch::new).flatten();
        let allowed_slots = memory.slot_plan.clone();
        Ok(Engine {
            file,
            options: options.clone(),
            memory,
            compute,
            storage,
            tuning,
            model,
            pages,
            prediction_pages,
            binding,
            marks,
            tokens,
            time,
            rows,
            wanted,
            allowed_slots,
            pressure,
            looked: None,
            stepped: None,
            warms: !options.no_warm,
            sparing: Sparing::default(),
        })
    }

    /// What the model computes.
    pub fn spec(&self) -> &ModelSpec {
        self.model.spec()
    }

    /// The file.
    pub fn file(&self) -> &ModelFile {
        &self.file
    }

    /// Closes the model, and returns its file, to open it in another way.
    pub fn into_file(self) -> ModelFile {
        self.file
    }

    /// How experts are chosen otherwise than by the routers: the part of [`EngineOptions::thrift`] that makes a difference in this
    /// model.
    pub fn thrift(&self) -> Thrift {
        self.binding.thrift
    }

    /// In which form prompts are read: [`EngineOptions::prompt_attention`], where it makes a difference in this model.
    pub fn prompt_attention(&self) -> PromptAttention {
        self.binding.prompt_attention
    }

    /// How the budget is spent.
    pub fn memory(&self) -> &MemoryPlan {
        &self.memory
    }

    /// Name of the instruction set that the kernels use.
    pub fn isa(&self) -> &'static str {
        self.compute.kernels.isa_name()
    }

    /// Worker threads, the caller's included.
    pub fn threads(&self) -> usize {
        self.compute.threads.threads()
    }

    /// Saves what the eviction policy has learned beside the model, for the next start.
    ///
    /// # Errors
    /// The filesystem's error. Only what was learned is lost.
    pub fn save_counts(&self) -> io::Result<()> {
        let counts = self.storage.pool.policy().export();
        if counts.is_empty() {
            return Ok(());
        }
        counts::save(self.file.path(), self.file.state_id(), &counts)
    }

    /// Waits until all dense parts that stay are in memory, and verified. No step needs this: it is for measurements, and for callers
    /// who want to know at once whether they are sound.
    ///
    /// # Errors
    /// [`RuntimeError::Pool`] for the first dense part that cannot be read or is damaged.
    pub fn wait_for_dense(&self) -> Result<(), RuntimeError> {
        Ok(self.storage.dense.wait_for_all()?)
    }

    /// An empty sequence for as many tokens as the memory plan gives each. It has no pages yet: there can be more sequences than
    /// were planned, as long as the pages last.
    pub fn new_sequence(&self) -> Sequence {
        Sequence::new(&self.pages, self.memory.context, self.binding, self.marks)
    }

    /// How many pages there are of each kind, and how many of them are free.
    pub fn pages(&self) -> Vec<PageCount> {
        self.pages.counts()
    }

    /// Whether there are enough pages for one step to append this many tokens to each of these sequences of this engine. An empty
    /// sequence can stand for one that will be made later.
    ///
    /// # Errors
    /// [`PagesFull`], as [`Engine::step`] would return it.
    pub fn room_for<'a>(&self, appends: impl Iterator<Item = (&'a Sequence, usize)> + Clone) -> Result<(), PagesFull> {
        room::check(&self.pages, appends, self.memory.rows)
    }

    /// How many tokens a new sequence would have pages for now.
    pub fn tokens_that_fit(&self) -> usize {
        let (empty, mut most) = (self.new_sequence(), self.memory.context + 1);
        let mut least = 0;
        while most - least > 1 {
            let middle = least + (most - least) / 2;
            match self.room_for(std::iter::once((&empty, middle))) {
                Ok(()) => least = middle,
                Err(_) => most = middle,
            }
        }
        least
    }

    /// Reads a sequence that [`Sequence::save_file`] wrote. It has this engine's capacity, and as many of its newest marks as this
    /// engine has room for.
    ///
    /// # Errors
    /// [`SessionError`]: the session cannot be read; is damaged; belongs to another model, precision, key-value type or version; or
    /// does not fit.
    pub fn restore_file(&self, path: &Path) -> Result<Sequence, SessionError> {
        let mut file = open_regular(path).map_err(|source| SessionError::Open { path: path.to_owned(), source })?;
        self.restore(&mut file, path)
    }

    /// Reads a sequence that [`Sequence::save`] wrote. `name`: its name in errors.
    ///
    /// # Errors
    /// Like [`Engine::restore_file`].
    pub fn restore(&self, input: &mut dyn io::Read, name: &Path) -> Result<Sequence, SessionError> {
        session::append(&self.new_sequence(), self.model.spec().vocab_size, input, name)
    }

    /// Appends a segment that [`Sequence::save_file_from`] wrote to a sequence that has the tokens before it. The segment replaces
    /// the tokens that the sequence has after them. The sequence then has the segment's marks, and its own marks before the
    /// segment.
    ///
    /// # Errors
    /// Like [`Engine::restore_file`]; [`SessionError::Continues`] if the sequence has fewer tokens than stand before the segment,
    /// [`SessionError::OtherText`] if it has different ones. The sequence is then unchanged.
    pub fn restore_onto(&self, sequence: &mut Sequence, path: &Path) -> Result<(), SessionError> {
        let open = |source| SessionError::Open { path: path.to_owned(), source };
        let mut file = open_regular(path).map_err(open)?;
        *sequence = session::append(sequence, self.model.spec().vocab_size, &mut file, path)?;
        Ok(())
    }

    /// Reads what a chain of segments has of the first of `tokens` into a new sequence: each begins inside of the one before it or at
    /// its end, and all that stands before a segment is of that text. The sequence has as many tokens as it can go on with: in models
    /// whose layers see everything all that agree, in others those up to the last mark or end of a segment. It has no marks. Nothing is
    /// read but what the sequence needs, a few rows at the end of a segment excepted. Where phases are told apart, `tokens` have theirs
    /// ([`Sequence::phased`]).
    ///
    /// # Errors
    /// Like [`Engine::restore_onto`].
    pub fn restore_segments(&self, segments: &mut [SegmentFile], tokens: &[u32]) -> Result<Sequence, SessionError> {
        session::restore_segments(self.new_sequence(), self.model.spec().vocab_size, segments, tokens)
    }

    /// What the numbers of its sequences depend on, besides the tokens.
    pub fn binding(&self) -> Binding {
        self.binding
    }

    /// Takes the tokens from `position` on out of a sequence. Where it cannot go there ([`Sequence::rewind_to`]), it goes to the
    /// nearest earlier position that it can go to, and the tokens in between are computed again, each in its phase, under `control`.
    ///
    /// # Errors
    /// [`RuntimeError::Rewind`] if it has fewer tokens; otherwise the errors of [`Engine::step`], after which the sequence is at a
    /// position before `position`.
    pub fn rewind(
        &mut self,
        sequence: &mut Sequence,
        position: usize,
        control: &mut Control<'_>,
    ) -> Result<(), RuntimeError> {
        let reached = sequence.reachable(position)?;
        let again = sequence.phased()[reached..position].to_vec();
        sequence.rewind_to(reached)?;
        for run in again.chunk_by(|a, b| a & GENERATED == b & GENERATED) {
            let phase = if run[0] & GENERATED == 0 { Phase::Prompt } else { Phase::Again };
            let tokens: Vec<u32> = run.iter().map(|token| token & !GENERATED).collect();
            let span = Span { sequence: &mut *sequence, tokens: &tokens, phase, logits: Want::Nothing };
            self.step(&mut [span], control, &mut |_, _, _| {})?;
        }
        Ok(())
    }

    /// Appends a prompt, or a part of one, to the sequence and writes the logits of its last token, `[vocab]`.
    ///
    /// # Errors
    /// Like [`Engine::step`].
    pub fn forward(
        &mut self,
        sequence: &mut Sequence,
        tokens: &[u32],
        logits: &mut Vec<f32>,
    ) -> Result<(), RuntimeError> {
        let span = Span::prompt(sequence, tokens, Want::Last);
        self.step(&mut [span], &mut Control::default(), &mut |_, _, row| row.clone_into(logits))
    }

    /// Appends a prompt, or a part of one, to the sequence; calls `sink` with the index and the logits `[vocab]` of each token,
    /// in order.
    ///
    /// # Errors
    /// Like [`Engine::step`].
    pub fn forward_all(
        &mut self,
        sequence: &mut Sequence,
        tokens: &[u32],
        sink: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), RuntimeError> {
        let span = Span::prompt(sequence, tokens, Want::All);
        self.step(&mut [span], &mut Control::default(), &mut |_, token, row| sink(token, row))
    }

    /// Appends the last sampled token to the sequence and writes its logits, `[vocab]`.
    ///
    /// # Errors
    /// Like [`Engine::step`].
    pub fn decode(&mut self, sequence: &mut Sequence, token: u32, logits: &mut Vec<f32>) -> Result<(), RuntimeError> {
        self.step(&mut [Span::decode(sequence, &token)], &mut Control::default(), &mut |_, _, row| {
            row.clone_into(logits)
        })
    }

    /// Appends every span's tokens to its sequence, all of them together, layer by layer: an expert that any of them needs is read
    /// once for as many rows as memory holds. Calls `sink` with span, token and logits `[vocab]` of the tokens whose logits are
    /// wanted, span by span. A sequence's logits do not depend on the other spans, to the bit.
    ///
    /// # Errors
    /// [`RuntimeError::Model`]: no tokens, no room, an unknown id, an extent that cannot be read or is damaged, or a cancellation
    /// through `control`. Tokens that were appended before the failing pass stay in the sequences. If there is no room
    /// ([`ModelError::ContextFull`], [`ModelError::PagesFull`]), nothing has been appended.
    pub fn step(
        &mut self,
        spans: &mut [Span<'_>],
        control: &mut Control<'_>,
        sink: &mut dyn FnMut(usize, usize, &[f32]),
    ) -> Result<(), RuntimeError> {
        let pages = Arc::clone(&self.pages);
        self.take_step(&pages, None, spans, control, sink)
    }

    /// A step of the decoder, or, if the head's inputs of the tokens before are given, of the prediction layer. `pages`: those of
    /// its sequences.
    fn take_step(
        &mut self,
        pages: &Arc<PagePool>,
        head_inputs: Option<&[&[f32]]>,
        spans: &mut [Span<'_>],
        control: &mut Control<'_>,
        sink: &mut dyn FnMut(usize, usize, &[f32]),
    ) -> Result<(), RuntimeError> {
        let started = Instant::now();
        if control.inputs.is_some() && self.binding.prompt_attention == PromptAttention::Expanded {
            return Err(ModelError::ObservedExpanded.into());
        }
        if spans.is_empty() || spans.iter().any(|span| span.tokens.is_empty()) {
            return Err(ModelError::NoTokens.into());
        }
        for span in &*spans {
            if !Arc::ptr_eq(span.sequence.pool(), pages) {
                return Err(ModelError::ForeignSequence.into());
            }
            let (capacity, wanted) = (span.sequence.capacity(), span.sequence.position() + span.tokens.len());
            if wanted > capacity {
                return Err(ModelError::ContextFull { capacity, wanted }.into());
            }
        }
        // A step that ended in an observer's panic has left pages after the last token.
        spans.iter_mut().for_each(|span| span.sequence.settle());
        if let Err(full) = self.room(pages, spans) {
            if !full.kind.forgets() {
                return Err(ModelError::from(full).into());
            }
            // Automatic marks are given up first, because they keep pages of windows and states.
            spans.iter_mut().for_each(|span| span.sequence.forget_automatic_marks());
            self.room(pages, spans).map_err(ModelError::from)?;
        }
        self.wake_up()?;
        self.storage.pool.stop_warming();
        self.limit_new_memory();
        self.compute.observer = control.inputs.clone();
        self.compute.cancel = control.cancel.cloned();
        self.compute.threads.cancel_by(control.cancel.map(Cancel::flag));
        let outcome = self
            .with_rows_for(head_inputs.is_none().then(|| passes::reading(spans, control)), |engine, rows| {
                engine.passes(rows, head_inputs, spans, control, sink)
            });
        if outcome.is_err() {
            self.storage.pool.stop_reading_ahead();
        }
        spans.iter_mut().for_each(|span| span.sequence.settle());
        (self.compute.observer, self.compute.cancel) = (None, None);
        self.compute.threads.cancel_by(None);
        let ended = Instant::now();
        self.time += ended - started;
        self.stepped = Some(ended);
        Ok(outcome?)
    }

    fn room(&self, pages: &PagePool, spans: &[Span<'_>]) -> Result<(), PagesFull> {
        room::check(pages, spans.iter().map(|span| (&*span.sequence, span.tokens.len())), self.memory.rows)
    }

    /// Runs as many passes as the spans need, of at most `most` rows each.
    fn passes(
        &mut self,
        most: usize,
        head_inputs: Option<&[&[f32]]>,
        spans: &mut [Span<'_>],
        control: &mut Control<'_>,
        sink: &mut dyn FnMut(usize, usize, &[f32]),
    ) -> Result<(), ModelError> {
        let Engine { file, compute, storage, model, rows, wanted, sparing, .. } = self;
        let mut cursor = Cursor::default();
        while rows.take(spans, &mut cursor, most) {
            prepare(rows, spans)?;
            let decodes = rows.wait_for_memory() && head_inputs.is_none();
            let pass = decodes.then(|| sparing.begin(storage.io.stats()));
            compute.threads.spare(pass.map_or(rows.wait_for_memory(), |pass| pass.spared));
            let Storage { dense, pool: experts, tables, .. } = storage;
            let mut weights = Weights { file, dense, experts, tables };
            match head_inputs {
                None => {
                    model.forward(compute, &mut weights, rows, spans, control)?;
                    self.tokens += rows.len() as u64;
                }
                Some(before) => model.predict(compute, &mut weights, rows, spans, before, control)?,
            }
            if let Some(pass) = pass {
                sparing.end(pass, storage.io.stats());
            }
            wanted.clear();
            for part in rows.spans() {
                let Span { tokens, logits, .. } = &spans[part.span];
                wanted.extend(part.rows().filter(|row| logits.includes(part.token + row - part.first, tokens.len())));
            }
            let step = HeadStep { prediction: head_inputs.is_some(), dense: &storage.dense, rows: rows.len(), wanted };
            model.logits(compute, &step, control, &mut |i, logits| {
                let (span, token) = rows.token(wanted[i]);
                sink(span, token, logits);
            })?;
            rows.advance(spans);
        }
        Ok(())
    }

    /// What happened since the model was opened.
    pub fn stats(&self) -> Stats {
        let pool = self.storage.pool.stats();
        let LayerTimes { attention, experts, head, .. } = self.model.times();
        let wait = Duration::from_nanos(pool.wait_ns) + self.storage.dense.stats().wait + self.storage.tables.wait();
        let accounted = attention + experts + wait + head;
        Stats {
            tokens: self.tokens,
            seconds: self.time.as_secs_f64(),
            attention_seconds: attention.as_secs_f64(),
            expert_seconds: experts.as_secs_f64(),
            io_wait_seconds: wait.as_secs_f64(),
            head_seconds: head.as_secs_f64(),
            other_seconds: self.time.saturating_sub(accounted).as_secs_f64(),
            hits: pool.hits,
            misses: pool.misses,
            prefetched: pool.prefetched,
            prefetched_used: pool.prefetched_used,
            prefetched_wasted: pool.prefetched_wasted,
            expert_bytes_read: pool.bytes_read,
            dense_bytes_read: self.storage.dense.stats().bytes_read
                + self.model.embedding_bytes_read()
                + self.storage.tables.bytes_read(),
            replaced: self.model.replaced(),
            warmed: pool.warmed,
            warmed_bytes: pool.warmed_bytes,
        }
    }
}

/// As many threads as were asked for, or one per core.
fn thread_count(asked: Option<usize>) -> usize {
    asked.unwrap_or_else(|| thread::available_parallelism().map_or(1, Into::into)).max(1)
}

/// A pool of [so many](thread_count) threads. If they take all cores, decoding leaves one to reading while there
/// are reads in flight: the I/O thread needs it, and in a virtual machine so may the host that moves the bytes.
fn compute_threads(asked: Option<usize>, reading: Arc<AtomicBool>) -> ThreadPool {
    let cores = thread::available_parallelism().map_or(1, Into::into);
    let pool = ThreadPool::new(thread_count(asked));
    if pool.threads() < cores { pool } else { pool.sparing_while(reading) }
}

/// Takes the pages of a pass. The step has made sure that they are free; but automatic marks that earlier passes have set keep
/// pages too, and are given up.
fn prepare(rows: &Rows, spans: &mut [Span<'_>]) -> Result<(), PagesFull> {
    let take = |spans: &mut [Span<'_>]| rows.spans().iter().try_for_each(|p| spans[p.span].sequence.prepare(p.count));
    if take(spans).is_ok() {
        return Ok(());
    }
    spans.iter_mut().for_each(|span| span.sequence.forget_automatic_marks());
    take(spans)
}

/// Opens the storage: dense parts on their way into memory, as many expert slots as the plan has. `paths`: the files that the extents lie in, by
/// volume, each with its tuning.
fn open_storage(
    paths: &[PathBuf],
    file: &ModelFile,
    memory: &MemoryPlan,
    options: &EngineOptions,
    tuning: &[Tuning],
) -> Result<Storage, RuntimeError> {
    let opened = opened_extents(file.spec(), file.extents(), options.prediction);
    let dense: Vec<_> =
        dense_extents(&opened).iter().map(|e| DenseLocation { extent: location(file, e), name: name(e) }).collect();
    let layers = file.spec().layers.len() + usize::from(options.prediction);
    let layers = file.spec().all_layers().take(layers).enumerate().map(|(layer, spec)| {
        let count = spec.ffn.moe.as_ref().map_or(0, |m| m.experts as u32);
        let experts = (0..count).filter_map(|e| file.extent(ExtentKind::Expert, layer as u32, e));
        experts.map(|e| location(file, e)).collect::<Vec<_>>()
    });
    let experts = ExpertDirectory::new(&layers.collect::<Vec<_>>())?;
    let config = StorageConfig {
        expert_slots: memory.slot_plan.clone(),
        staging_slots: memory.staging_slots,
        pinned: memory.pinned.clone(),
        tables: ngrams::tables(file),
        sectors: ngrams::cached_sectors(file.spec()).0,
        tuning: tuning.to_vec(),
        direct: DirectMode::default(),
        #[cfg(feature = "sim")]
        simulated: options.simulated.clone(),
        #[cfg(feature = "sim")]
        simulated_packed: options.simulated_packed,
    };
    let policy = options.policy.build(experts.shape()).ok_or(RuntimeError::Policy(options.policy))?;
    Ok(Storage::open(paths, &dense, experts, policy, &config)?)
}

/// Where an extent is, and what its bytes become.
fn location(file: &ModelFile, e: &ExtentRecord) -> ExtentLocation {
    let read = |s: &Stripe| StripeRead { file: s.volume, offset: s.offset, len: s.len as usize, checksum: s.checksum };
    let stripes = file.stripes(e);
    let packed = Packed { logical_len: e.logical_len, padded_len: e.padded_len, checksum: e.logical_checksum };
    ExtentLocation {
        file: e.volume,
        offset: e.offset,
        len: e.stored_len,
        checksum: e.checksum,
        packed: (e.codec == Codec::Planes).then_some(packed),
        stripes: (stripes.len() > 1).then(|| stripes.iter().map(read).collect()),
    }
}

/// The worker threads, in their role of decompressing.
struct Unpacking(Arc<ThreadPool>);

impl Workers for Unpacking {
    fn for_each_part(&self, data: &mut [u8], ends: &[usize], f: &(dyn Fn(usize, &mut [u8]) + Sync)) {
        self.0.for_each_part(data, ends, f);
    }
}

fn name(e: &ExtentRecord) -> ExtentName {
    ExtentName {
        kind: e.kind.name(),
        layer: (e.layer != NO_LAYER).then_some(e.layer),
        index: matches!(e.kind, ExtentKind::Head | ExtentKind::Embedding).then_some(e.index),
    }
}

/// A server moves its engine to its own thread, so this must compile.
const _: () = {
    const fn is_send<T: Send>() {}
    is_send::<Engine>();
    is_send::<Sequence>();
};
