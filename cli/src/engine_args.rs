//! Options that every command that computes shares.

use std::num::{NonZeroU16, NonZeroUsize};
use std::path::Path;

use clap::ValueEnum;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use sluice_format::ModelFile;
use sluice_generate::Drafts;
use sluice_model::memory::Bytes;
use sluice_model::{
    Engine, EngineOptions, KvType, Preference, Prefetch, PromptAttention, ReadEngineKind, RuntimeError, Thrift, Yields,
};
use sluice_storage::pool::PolicyKind;
use sluice_text::{TextError, Tokenizer};

use crate::error::CliError;
use crate::progress::spinner;
use crate::size::{parse_count, parse_experts, parse_size};
use crate::terminal::note;

/// How the model is opened.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Engine")]
pub(crate) struct EngineArgs {
    /// Memory for everything large: dense weights, key-value cache and expert slots [default: as much as is useful and
    /// available]
    ///
    /// `sluice inspect` prints the least that works. The result does not depend on it, only the speed.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) budget: Option<u64>,

    /// How the file is read [default: the best that works here]
    #[arg(long, value_name = "ENGINE")]
    pub(crate) engine: Option<EngineChoice>,

    /// Read in a way that suits most drives, instead of the way that `sluice bench disk` found best for this one
    #[arg(long)]
    pub(crate) no_calibration: bool,

    /// Worker threads [default: one per core; while the drive is read, decoding leaves one core free]
    #[arg(long, value_name = "N", value_parser = parse_count)]
    pub(crate) threads: Option<NonZeroUsize>,

    /// Type of keys and values
    ///
    /// Types other than f32 take less memory and change the result a little: `docs/QUANTISATION.md` says how much.
    #[arg(long, value_name = "TYPE", default_value_t, value_parser = kv_type_parser())]
    pub(crate) kv_type: KvType,

    /// Eviction policy of the expert cache: next-use, lru or lfu
    #[arg(long, value_name = "POLICY", default_value_t, hide_short_help = true)]
    pub(crate) policy: PolicyKind,

    /// Start without what earlier runs learned about this model's experts, and save nothing from this one
    #[arg(long, hide_short_help = true)]
    pub(crate) forget: bool,

    /// Never read experts ahead of the router
    #[arg(long, hide_short_help = true)]
    pub(crate) no_prefetch: bool,

    /// Do not fill the expert cache with the most used experts while there is nothing to do, as `chat` and `serve` do between requests
    #[arg(long, hide_short_help = true)]
    pub(crate) no_warm: bool,

    /// Compute with f32 activations throughout: slower; for comparison with reference implementations
    #[arg(long)]
    pub(crate) exact: bool,

    /// Lossy: generate with experts in memory instead of others whose scores are better by at most this part of the range of scores
    ///
    /// 0.05, for instance, is 5 % of the distance between a token's best score and its lowest. Fewer experts are read, and the text
    /// becomes another one, which depends on what is in memory: the same request can give another text the next time. Prompts are
    /// read without it.
    #[arg(long, value_name = "S", hide_short_help = true, allow_negative_numbers = true)]
    pub(crate) expert_preference: Option<Preference>,

    /// Lossy: use no more than this many experts per token and layer, fewer than the model was made for
    ///
    /// As if its config.json gave this number, such as num_experts_per_tok. (--top-k chooses among tokens.)
    #[arg(long, value_name = "N", hide_short_help = true, allow_negative_numbers = true, value_parser = parse_experts)]
    pub(crate) top_k_experts: Option<NonZeroU16>,

    /// How the latent attention (MLA) of prompts is computed: expanded takes less time for long prompts
    ///
    /// Both are the same mathematically; their last digits differ. With expanded, what was generated is not reused as a part of a later
    /// prompt, but read again. It has no effect in models without latent attention.
    #[arg(long, value_name = "FORM", value_enum, default_value = "absorbed", hide_short_help = true)]
    pub(crate) prompt_attention: PromptForm,
}

/// Names of the forms of latent attention for prompts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum PromptForm {
    /// As generated tokens are computed
    Absorbed,
    /// With keys and values expanded from latents, block by block
    Expanded,
}

impl From<PromptForm> for PromptAttention {
    fn from(form: PromptForm) -> Self {
        match form {
            PromptForm::Absorbed => PromptAttention::Absorbed,
            PromptForm::Expanded => PromptAttention::Expanded,
        }
    }
}

/// Names of the read engines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum EngineChoice {
    /// io_uring with direct I/O (Linux)
    Uring,
    /// A pool of threads that read, with direct I/O where the system has it
    Pread,
}

impl EngineArgs {
    /// Opens the model for a sequence of `context` tokens, and begins to read its dense weights.
    pub(crate) fn open(&self, path: &Path, context: usize) -> Result<Engine, CliError> {
        self.open_as(path, &self.options(context))
    }

    /// Like [`open`](Self::open), with options that begin with [`options`](Self::options).
    pub(crate) fn open_as(&self, path: &Path, options: &EngineOptions) -> Result<Engine, CliError> {
        let engine = self.open_with(path, options)?;
        self.say_what_is_lossy_with(engine.thrift(), engine.prompt_attention());
        Ok(engine)
    }

    /// Opens one of several models, which has a part of the budget.
    pub(crate) fn open_within(&self, path: &Path, context: usize, budget: u64) -> Result<Engine, CliError> {
        self.open_with(path, &EngineOptions { budget: Some(budget), ..self.options(context) })
    }

    /// As [`open_within`](Self::open_within), with the experts that the model's routers choose, and with prompts in the absorbed form.
    pub(crate) fn open_exactly(&self, path: &Path, context: usize, budget: u64) -> Result<Engine, CliError> {
        let (thrift, prompt_attention) = (Thrift::default(), PromptAttention::default());
        let options = EngineOptions { budget: Some(budget), thrift, prompt_attention, ..self.options(context) };
        self.open_with(path, &options)
    }

    /// As [`open_as`](Self::open_as), of a file that is open already: one of a large model has tables and a tokenizer of many megabytes, which
    /// are read and checked once.
    pub(crate) fn open_file(&self, file: ModelFile, options: &EngineOptions) -> Result<Engine, CliError> {
        let engine = self.opened(options, || Engine::of(file, options))?;
        self.say_what_is_lossy_with(engine.thrift(), engine.prompt_attention());
        Ok(engine)
    }

    /// Prints the notes that [`open_file`](Self::open_file) prints, for an engine that was opened with these options without them.
    pub(crate) fn say_how_it_was_opened(&self, engine: &Engine, options: &EngineOptions) {
        say_what_is_different(engine, options);
        self.say_what_is_lossy_with(engine.thrift(), engine.prompt_attention());
    }

    fn open_with(&self, path: &Path, options: &EngineOptions) -> Result<Engine, CliError> {
        self.opened(options, || Engine::open(path, options))
    }

    fn opened(
        &self,
        options: &EngineOptions,
        open: impl FnOnce() -> Result<Engine, RuntimeError>,
    ) -> Result<Engine, CliError> {
        let spinner = spinner("opening the model");
        let engine = open();
        spinner.finish_and_clear();
        let engine = engine?;
        say_what_is_different(&engine, options);
        Ok(engine)
    }

    /// Prints a note on standard error if the results differ from those of the file's weights alone.
    pub(crate) fn say_what_is_lossy(&self) {
        self.say_what_is_lossy_with(self.thrift(), self.prompt_attention.into());
    }

    /// As [`say_what_is_lossy`](Self::say_what_is_lossy), if these are what makes a difference in the model.
    fn say_what_is_lossy_with(&self, thrift: Thrift, prompt_attention: PromptAttention) {
        if self.kv_type.is_lossy() {
            note(&format_args!(
                "note: keys and values are rounded to {}: results differ from those with f32",
                self.kv_type
            ));
        }
        if !thrift.is_exact() {
            note(&format_args!("note: lossy: {thrift}; results differ from the model's own"));
        }
        if prompt_attention == PromptAttention::Expanded {
            note(
                &"note: prompts are read in the expanded form of latent attention: last digits differ from the absorbed form's",
            );
        }
    }

    /// Refuses prompts in the expanded form, where `command` observes what the absorbed form multiplies.
    pub(crate) fn refuse_expanded(&self, command: &str) -> Result<(), CliError> {
        if self.prompt_attention == PromptForm::Absorbed {
            return Ok(());
        }
        let message = format!(
            "{command} observes what matrices are multiplied with in the absorbed form: leave --prompt-attention expanded out"
        );
        Err(CliError::Usage(message))
    }

    /// Refuses experts other than those that the model's routers choose, if `command` measures these.
    pub(crate) fn refuse_thrift(&self, command: &str) -> Result<(), CliError> {
        if self.thrift().is_exact() {
            return Ok(());
        }
        let message = format!(
            "{command} measures what the model's routers choose: leave --expert-preference and --top-k-experts out"
        );
        Err(CliError::Usage(message))
    }

    /// Refuses to prefer experts in memory, if the results of `command` must not depend on what is in memory.
    pub(crate) fn refuse_preference(&self, command: &str) -> Result<(), CliError> {
        if self.thrift().preference.is_none() {
            return Ok(());
        }
        let message = format!(
            "with --expert-preference, texts depend on what is in memory, but the results of {command} must be the same after an \
             interruption: leave the option out"
        );
        Err(CliError::Usage(message))
    }

    /// Who proposes tokens to one sequence, unless the command says so. If experts in memory are preferred, the text depends on what steps have
    /// read, and nobody does.
    pub(crate) fn usual_drafts(&self) -> Drafts {
        if self.thrift().preference.is_none() { Drafts::Lookup } else { Drafts::Off }
    }

    /// How experts are chosen otherwise than by the model's routers.
    fn thrift(&self) -> Thrift {
        Thrift { preference: self.expert_preference.unwrap_or_default(), top_k: self.top_k_experts }
    }

    /// The options that follow from the arguments, for a sequence of `context` tokens.
    pub(crate) fn options(&self, context: usize) -> EngineOptions {
        EngineOptions {
            policy: self.policy,
            forget: self.forget,
            prefetch: if self.no_prefetch { Prefetch::Off } else { Prefetch::Auto },
            budget: self.budget,
            read_engine: self.engine.map(|e| match e {
                EngineChoice::Uring => ReadEngineKind::Uring,
                EngineChoice::Pread => ReadEngineKind::Pread,
            }),
            io: None,
            no_calibration: self.no_calibration,
            threads: self.threads.map(NonZeroUsize::get),
            exact: self.exact,
            sequences: None,
            context: Some(context),
            kv_type: self.kv_type,
            marks: 0,
            simulated: None,
            simulated_packed: None,
            yields: Yields::default(),
            no_warm: self.no_warm,
            mark_every: None,
            prediction: false,
            thrift: self.thrift(),
            prompt_attention: self.prompt_attention.into(),
        }
    }
}

/// Prints a note for each option that this model or this machine does not follow.
fn say_what_is_different(engine: &Engine, options: &EngineOptions) {
    let path = engine.file().path().display();
    if engine.thrift() != options.thrift {
        note(&format_args!("note: in {path}, {}", engine.thrift()));
    }
    if engine.prompt_attention() != options.prompt_attention {
        note(&format_args!("note: {path} has no latent attention: --prompt-attention has no effect"));
    }
    let memory = engine.memory();
    if let Some(requested) = memory.requested.filter(|&requested| memory.effective < requested) {
        note(&format_args!(
            "note: the budget is {} instead of {}: no more memory is available",
            Bytes(memory.effective),
            Bytes(requested)
        ));
    }
}

/// Names of the types of a key-value cache.
pub(crate) fn kv_type_parser() -> impl TypedValueParser<Value = KvType> {
    let help = |ty: KvType| match ty {
        KvType::F32 => "as computed",
        KvType::F16 => "half the memory: three digits, magnitudes up to 65504",
        KvType::Bf16 => "half the memory: two digits, any magnitude",
        KvType::Q8 => "a quarter of the memory: int8 with one scale per 32 numbers",
    };
    let values = KvType::ALL.map(|ty| PossibleValue::new(ty.name()).help(help(ty)));
    PossibleValuesParser::new(values).try_map(|name| name.parse::<KvType>())
}

/// The model's tokenizer, if it has one: errors in its files are reported before the weights are read.
pub(crate) fn tokenizer(file: &ModelFile) -> Result<Option<Tokenizer>, CliError> {
    let replace = |e: TextError| {
        let path = file.path().display();
        CliError::Failure(format!("{path}: {e}. To replace the tokenizer: `sluice set {path} --tokenizer PATH`"))
    };
    Tokenizer::find(|name| file.metadata().get(name)).map_err(replace)
}
